"""The tasks of predicting clicks: flights, which are packaged, and Criteo.

Both give batches of one kind for one model, `models/dnn.py`: dense columns
('integers'), ids of categories, a label of 0 or 1.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import (
    click_features,
    click_shards,
    criteo,
    flights,
    label_counts,
    order,
)
from codistill_jax.data.click_stream import ClickStream, EvalBatches, Gather


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
  """The task of telling late flights from others; see `flights`.

  327,346 flights, of which 32,734 each, chosen at random by `split_seed` alone,
  are the validation and the test split: a seed of the order moves none of them.
  All is in memory, some 40 MB.

  Args:
    label: Which delay counts: 'either', 'departure' or 'arrival'.
    categories: 'vocabulary' or 'hash'; see `click_features`.
    min_count: Of 'vocabulary': rarer values share an id.
    buckets: Of 'hash': ids of each column, or one number for all.
    partition: 'shared' or 'disjoint': how groups divide the flights.
    seed: Of the order of flights and of the partition.
    validation_fraction: Share of the validation split.
    test_fraction: Share of the test split.
    split_seed: Of the choice of the splits.

  Raises:
    ValueError: If an argument is out of range or the package is missing.
  """
  data = flights.read_flights(label)
  size = len(data.labels_N)
  train, validation, test = order.split_rows(
      size, split_sizes(size, validation_fraction, test_fraction), split_seed
  )
  train_rows = train.row_of(np.arange(train.size))
  encoder = click_features.make_encoder(
      categories,
      len(flights.CATEGORICAL),
      buckets=buckets,
      min_count=min_count,
      counts=lambda k: click_features.count_values(
          data.categories_NK[train_rows, k]
      ),
  )
  scaling = flights.fit_scaling(data.dense_NI[train_rows])
  integers = scaling(data.dense_NI)
  gather = gather_from(
      integers, encoder.encode(data.categories_NK), data.labels_N
  )
  return _task(
      f'flights_{label}',
      [gather] * 3,
      [train, validation, test],
      encoder,
      num_integers=integers.shape[1],
      partition=partition,
      seed=seed,
      example_name='flight',
      description=f'nycflights13, late by {label} delay',
      labels=lambda: [data.labels_N[train_rows]],
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
  """The task of Criteo's click logs; see `criteo` for the columns.

  Rows stay on disk, memory-mapped, and are taken from anywhere in it: that is
  fast where the files fit into the memory that the system spares for them (7.3
  GB for all 45.8 M rows).

  Args:
    data_dir: What `prepare_clicks` wrote.
    categories: 'hash' or 'vocabulary'; see `click_features`.
    buckets: Of 'hash': ids of each column, or one number for all.
    min_count: Of 'vocabulary': values that the training split has less often
      share an id.
    partition: 'shared' or 'disjoint': how groups divide the rows.
    seed: Of the order of rows and of the partition.
    max_eval_examples: Evaluate on the first so many rows of a split; None: all.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  splits = {s: click_shards.open_rows(data_dir, s) for s in click_shards.SPLITS}
  for name in ('train', 'validation'):
    if not len(splits[name]):
      raise ValueError(
          f'The {name} split of {data_dir} is empty; prepare the data again'
          ' with other fractions or more lines.'
      )
  encoder = click_features.make_encoder(
      categories,
      criteo.NUM_CATEGORIES,
      buckets=buckets,
      min_count=min_count,
      counts=functools.partial(click_shards.open_counts, data_dir),
  )
  gathers = [gather_mapped(data, encoder) for data in splits.values()]
  return _task(
      'criteo',
      gathers,
      [order.all_rows(len(data)) for data in splits.values()],
      encoder,
      num_integers=2 * criteo.NUM_INTEGERS,
      partition=partition,
      seed=seed,
      example_name='click',
      description='Criteo',
      labels=splits['train'].labels,
      max_eval_examples=max_eval_examples,
  )


def gather_mapped(
    data: click_shards.RowData, encoder: click_features.Encoder
) -> Gather:
  """Reads rows on disk and makes features of them."""

  def gather(rows: np.ndarray) -> base.Batch:
    found = data.gather(rows)
    integers = found[:, 1 : 1 + criteo.NUM_INTEGERS].view(np.int32)
    categories = found[:, 1 + criteo.NUM_INTEGERS :]
    return {
        'inputs': {
            'integers': click_features.log_integers(integers),
            'categories': encoder.encode(categories),
        },
        'labels': found[:, 0].astype(np.int32),
    }

  return gather


def split_sizes(size: int, validation: float, test: float) -> list[int]:
  """Examples of the training, validation and test split.

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


def gather_from(
    integers: np.ndarray, categories: np.ndarray, labels: np.ndarray
) -> Gather:
  """Reads rows of arrays in memory: float32 (N, I), int32 (N, K), int32 (N,).

  They are copied side by side: a row then costs one or two cache misses, where
  three arrays cost many times that, and indexing them many times again.
  """
  num_integers = integers.shape[1]
  packed = np.concatenate(
      [integers.view(np.int32), categories, labels[:, None]], axis=1
  )

  def gather(rows: np.ndarray) -> base.Batch:
    found = packed.take(rows, axis=0)
    return {
        'inputs': {
            'integers': found[:, :num_integers].view(np.float32).copy(),
            'categories': found[:, num_integers:-1].copy(),
        },
        'labels': found[:, -1].copy(),
    }

  return gather


def _task(
    name: str,
    gathers: Sequence[Gather],
    splits: Sequence[order.Rows],
    encoder: click_features.Encoder,
    *,
    num_integers: int,
    partition: str,
    seed: int,
    example_name: str,
    description: str,
    labels: Callable[[], Iterable[np.ndarray]],
    max_eval_examples: int | None = None,
) -> base.Task:
  train, validation, test = splits
  batches = lambda i: functools.partial(
      EvalBatches, gathers[i], splits[i], max_examples=max_eval_examples
  )
  return base.Task(
      train_stream=functools.partial(
          ClickStream, gathers[0], train, partition=partition, seed=seed
      ),
      eval_batches=batches(1),
      test_batches=batches(2) if test.size else None,
      num_classes=2,
      identity={
          'task': name,
          'categories': encoder.identity,
          'integers': str(num_integers),
      },
      example_name=example_name,
      description=(
          f'{description}: {train.size:,} training examples,'
          f' {validation.size:,} validation, {test.size:,} test,'
          f' {sum(encoder.table_sizes):,} ids in'
          f' {len(encoder.table_sizes)} columns, {partition} partition'
      ),
      partition=partition,
      label_frequencies=lambda: label_counts.frequencies(labels(), 2),
      output='sigmoid',
      model_arguments={
          'table_sizes': encoder.table_sizes,
          'num_integers': num_integers,
      },
  )
