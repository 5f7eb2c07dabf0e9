"""Tasks of tables: a label, columns of categories, columns of numbers.

Batches are those of `models/dnn.py`: 'inputs' of dense columns ('integers'
float32 (B, I)) and of ids of categories ('categories' int32 (B, K)), and
'labels', int32 (B,).

A raw category is a uint32, `MISSING` if there was none. Both ways to an id are
the same on every machine:

* `hashed`: id 0 is missing, a value has one of the `buckets` ids behind it.
* `vocabulary`: id 0 is missing, id 1 any value that is rare, which is one that
  the training split has less than `min_count` times, so also one that it never
  has; each of the others has an id of its own.

Numbers are standardised by the training split. A missing one is 0, and a column
that misses some has another one behind, which is 1 there.

Arguments of all such tasks:
  categories: 'hash' or 'vocabulary'.
  buckets: Of 'hash': ids of each column, or one number for all.
  min_count: Of 'vocabulary'.
  partition: 'shared' or 'disjoint': how groups divide the examples.
  seed: Of the order of examples and of the partition.
Of those whose rows are in memory:
  validation_fraction: Share of the validation split.
  test_fraction: Share of the test split.
  split_seed: Of the choice of the splits: a seed of the order moves none.
All raise FileNotFoundError or ValueError where data, a package or an argument
cannot be used.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns, N
rows of a table.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax import base
from codistill_jax.data import examples, order

CATEGORIES = ('hash', 'vocabulary')
MISSING = 0  # A raw category that is none.

Counts = tuple[np.ndarray, np.ndarray]  # Values rising, and how often each.


class Rows(NamedTuple):
  """Rows in memory.

  Attributes:
    categories_NK: Raw categories, uint32.
    dense_NI: float64; NaN where a value is missing.
    labels_N: int32.
  """

  categories_NK: np.ndarray
  dense_NI: np.ndarray
  labels_N: np.ndarray


def task_of_rows(
    rows: Rows,
    *,
    validation_fraction: float,
    test_fraction: float,
    split_seed: int,
    categories: str,
    min_count: int,
    buckets: int | Sequence[int],
    **fields: Any,
) -> base.Task:
  """Returns the task of rows in memory, divided at random into three splits.

  Args:
    rows: All of them. Others: as at the head of this file, and of `make_task`.
  """
  size = len(rows.labels_N)
  train, validation, test = order.split_rows(
      size, split_sizes(size, validation_fraction, test_fraction), split_seed
  )
  chosen = train.numbers()
  encoder = make_encoder(
      categories,
      rows.categories_NK.shape[1],
      buckets=buckets,
      min_count=min_count,
      counts=lambda k: np.unique(
          rows.categories_NK[chosen, k], return_counts=True
      ),
  )
  integers = standardised(rows.dense_NI, rows.dense_NI[chosen])
  read = read_arrays(
      integers, encoder.encode(rows.categories_NK), rows.labels_N
  )
  return make_task(
      examples.Split(read, train),
      examples.Split(read, validation),
      lambda: examples.Split(read, test),
      test_size=test.size,
      encoder=encoder,
      num_integers=integers.shape[1],
      labels=lambda: [rows.labels_N[chosen]],
      **fields,
  )


def make_task(
    train: examples.Split,
    validation: examples.Split,
    test: Callable[[], examples.Split],
    *,
    test_size: int,
    name: str,
    encoder: 'Encoder',
    num_integers: int,
    description: str,
    partition: str,
    **fields: Any,
) -> base.Task:
  """Returns the task of three splits; an empty test split is none.

  Args:
    train, validation: The splits.
    test: Opens the test split.
    test_size: How many examples it has.
    name: Of the task.
    encoder: Of the categories.
    num_integers: I, as in a batch.
    description: What the data are.
    partition: As at the head of this file.
    **fields: Others of `examples.make_task`.
  """
  return examples.make_task(
      train,
      validation,
      test if test_size else None,
      partition=partition,
      num_classes=2,
      identity={
          'task': name,
          'categories': encoder.identity,
          'integers': str(num_integers),
      },
      description=(
          f'{description}: {train.rows.size:,} training examples,'
          f' {validation.rows.size:,} validation, {test_size:,} test,'
          f' {sum(encoder.table_sizes):,} ids in {len(encoder.table_sizes)}'
          f' columns, {partition} partition'
      ),
      output='sigmoid',
      model_arguments={
          'table_sizes': encoder.table_sizes,
          'num_integers': num_integers,
      },
      **fields,
  )


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
) -> Callable[[np.ndarray], base.Batch]:
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


# --- Numbers ------------------------------------------------------------------


def standardised(dense_NI: np.ndarray, train_NI: np.ndarray) -> np.ndarray:
  """Standardises columns by the training split: float32 (N, I + gaps)."""
  mean_I = np.nanmean(train_NI, axis=0)
  deviation_I = np.maximum(np.nanstd(train_NI, axis=0), 1e-6)
  scaled = (dense_NI - mean_I[None, :]) / deviation_I[None, :]
  gaps = np.flatnonzero(np.isnan(train_NI).any(axis=0))
  return np.concatenate(
      [np.nan_to_num(scaled, nan=0.0), np.isnan(dense_NI[:, gaps])], axis=1
  ).astype(np.float32)


# --- Categories ---------------------------------------------------------------


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


def raw_categories(column: Any) -> np.ndarray:
  """Returns raw categories of a pandas column of anything, by its text."""
  import pandas as pd

  codes, values = pd.factorize(column)
  raw = [value_of_text(str(value)) for value in values]
  # Code -1, the last, is a missing value.
  return np.asarray([*raw, MISSING], np.uint32)[codes]


def value_of_text(text: str) -> int:
  """Returns a raw category of a string, never `MISSING`."""
  digest = hashlib.blake2b(text.encode('utf-8'), digest_size=4).digest()
  return int.from_bytes(digest, 'big') or 1


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
    return np.where(values_BK == MISSING, 0, ids_BK).astype(np.int32)

  return Encoder(
      encode,
      tuple(n + 1 for n in buckets),
      f'hash {_digest([buckets_K])}',
  )


def vocabulary(counts: Sequence[Counts], min_count: int) -> Encoder:
  """Returns an encoder of frequent values: column k has 2 + those.

  Frequent values have ids in their own order.
  """
  try:
    import pandas as pd
  except ImportError as e:
    raise ValueError(
        "categories='vocabulary' needs the package pandas: pip install pandas."
    ) from e
  kept = [
      np.ascontiguousarray(values[(n >= min_count) & (values != MISSING)])
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
    ids_BK[values_BK == MISSING] = 0
    return ids_BK

  return Encoder(
      encode,
      tuple(size + 2 for size in sizes),
      f'vocabulary {_digest(kept)}',
  )


def _digest(arrays: Sequence[np.ndarray]) -> str:
  found = hashlib.sha256()
  for array in arrays:
    found.update(f'{len(array)} '.encode())
    found.update(np.ascontiguousarray(array, '<u4').tobytes())
  return found.hexdigest()[:16]
