"""Seeded bijections: permutations all, and shuffled well enough."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codistill_jax.data import order

SEEDS = st.integers(0, 2**40)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=SEEDS
)
def test_it_is_a_permutation_of_any_size(size, seed):
  found = order.bijection(size, (seed, 1))(np.arange(size))
  assert found.dtype == np.int64
  np.testing.assert_array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize('size', [2**16, 2**16 + 1, 2**17 - 1, 327_346])
def test_it_is_a_permutation_at_the_edges_of_its_bits(size):
  found = order.bijection(size, (3,))(np.arange(size))
  assert np.bincount(found, minlength=size).max() == 1


def test_a_place_alone_and_among_others_goes_to_the_same_row():
  size = 45_840_617  # All of Criteo: nothing of that size is made.
  row_of = order.bijection(size, (7, 8))
  places = np.random.default_rng(0).integers(size, size=1000)
  rows = row_of(places)
  assert rows.min() >= 0 and rows.max() < size
  assert [int(row_of(p)) for p in places[:20]] == rows[:20].tolist()
  np.testing.assert_array_equal(row_of(places.reshape(20, 50)).ravel(), rows)
  assert len(np.unique(row_of(np.arange(10**6)))) == 10**6


def test_the_order_is_the_same_for_ever():
  # Runs that were interrupted before an update must go on in the same order.
  found = order.bijection(1000, (1, 2, 3))(np.arange(8))
  assert found.tolist() == [410, 29, 140, 405, 996, 933, 523, 538]


def test_a_walk_that_never_comes_back_is_ended(monkeypatch):
  monkeypatch.setattr(order, '_LONGEST_WALK', 1)
  with pytest.raises(AssertionError, match='no bijection'):
    order.bijection(9, (1,))(np.arange(9))


def test_keys_give_different_orders_that_look_random():
  size = 20_000
  places = np.arange(size)
  a, b = (order.bijection(size, (seed, 0))(places) for seed in (0, 1))
  # Fixed points and agreements of random permutations: 1 in the mean.
  assert np.sum(a == b) < 10 and np.sum(a == places) < 10
  for x in (a, b):
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(x, places)[0, 1]) < 0.05
    # Each tenth of the places is spread over all tenths of the rows.
    tenths = np.histogram2d(places, x, bins=10)[0]
    assert np.abs(tenths - size / 100).max() < 6 * np.sqrt(size / 100)


def rows_of(group_id, num_groups, partition, size=1003, seed=5):
  rows = order.group_rows(
      size,
      group_id=group_id,
      num_groups=num_groups,
      partition=partition,
      seed=seed,
  )
  return rows.row_of(np.arange(rows.size))


@pytest.mark.parametrize('num_groups', [1, 2, 3, 7])
def test_disjoint_partitions_cover_everything_once(num_groups):
  parts = [rows_of(g, num_groups, 'disjoint') for g in range(num_groups)]
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1003))
  if num_groups > 1:
    other = rows_of(0, num_groups, 'disjoint', seed=6)
    assert set(other) != set(parts[0])


def test_a_shared_partition_is_everything():
  np.testing.assert_array_equal(rows_of(1, 2, 'shared'), np.arange(1003))


def test_epochs_and_groups_have_orders_of_their_own():
  orders = {
      tuple(order.epoch_order(50, seed=s, group_id=g, epoch=e)(np.arange(50)))
      for s in (0, 1)
      for g in (0, 1)
      for e in (0, 1)
  }
  assert len(orders) == 8


def test_splits_are_disjoint_and_cover_everything():
  parts = order.split_rows(1003, [803, 100, 100], seed=0)
  rows = [part.row_of(np.arange(part.size)) for part in parts]
  assert [len(r) for r in rows] == [803, 100, 100]
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1003))


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: order.bijection(5, (-1,)), 'key='),
        (lambda: order.bijection(-5, (1,)), 'size=-5'),
        (lambda: order.split_rows(10, [5, 4], 0), '10 rows'),
        (lambda: rows_of(2, 2, 'shared'), 'group_id must be'),
        (lambda: rows_of(0, 2, 'halves'), 'partition must be'),
        (lambda: rows_of(0, 2000, 'disjoint'), '1003 rows cannot be divided'),
    ],
)
def test_a_mistake_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
