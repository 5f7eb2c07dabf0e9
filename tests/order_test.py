"""Permutations, partitions, splits: complete, disjoint, the same for ever."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codistill_jax.data import order

SEEDS = st.integers(0, 2**40)
KINDS = {
    'permutation': order.permutation,
    'bijection': lambda size, key: order.bijection(size, key)(np.arange(size)),
}
of_either_kind = pytest.mark.parametrize('make', KINDS.values(), ids=KINDS)
held_or_not = pytest.mark.parametrize('held', [False, True])


@of_either_kind
@hypothesis.given(
    size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=SEEDS
)
@hypothesis.settings(max_examples=60)
def test_it_is_a_permutation_of_any_size(make, size, seed):
  found = make(size, (seed, 1))
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
  assert len(np.unique(row_of(np.arange(10**5)))) == 10**5


@pytest.mark.parametrize(
    'kind, size, expected',
    [
        ('bijection', 1000, [410, 29, 140, 405, 996, 933, 523, 538]),
        ('permutation', 8, [1, 2, 4, 6, 5, 0, 7, 3]),
    ],
)
def test_the_order_is_the_same_for_ever(kind, size, expected):
  # Runs that were interrupted before an update must go on in the same order.
  assert KINDS[kind](size, (1, 2, 3))[:8].tolist() == expected


@of_either_kind
def test_keys_give_different_orders_that_look_random(make):
  size = 20_000
  places = np.arange(size)
  a, b = (make(size, (seed, 0)) for seed in (0, 1))
  # Fixed points and agreements of random permutations: 1 in the mean.
  assert np.sum(a == b) < 10 and np.sum(a == places) < 10
  for x in (a, b):
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(x, places)[0, 1]) < 0.05
    # Each tenth of the places is spread over all tenths of the rows.
    tenths = np.histogram2d(places, x, bins=10)[0]
    assert np.abs(tenths - size / 100).max() < 6 * np.sqrt(size / 100)


def rows_of(group_id, num_groups, partition, size=1003, seed=5, held=False):
  return order.group_rows(
      size,
      group_id=group_id,
      num_groups=num_groups,
      partition=partition,
      seed=seed,
      held=held,
  ).numbers()


@held_or_not
@hypothesis.given(groups=st.integers(1, 7), more=st.integers(0, 60), seed=SEEDS)
def test_disjoint_groups_share_nothing_and_cover_all(held, groups, more, seed):
  size = groups + more
  parts = [
      rows_of(g, groups, 'disjoint', size, seed, held) for g in range(groups)
  ]
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  if held:
    assert all((np.diff(part) > 0).all() for part in parts)


@held_or_not
def test_disjoint_parts_are_no_stripes_and_depend_on_the_seed(held):
  first, again, other = (
      rows_of(0, 2, 'disjoint', 1000, seed, held) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)
  # Neighbours, often of one origin, do not alternate between groups.
  assert not (np.diff(np.sort(first)) == 2).all()
  assert 0.4 < np.mean(first < 500) < 0.6


@held_or_not
def test_shared_groups_have_everything(held):
  found = rows_of(1, 2, 'shared', held=held)
  np.testing.assert_array_equal(found, np.arange(1003))


@held_or_not
def test_epochs_groups_and_seeds_have_orders_of_their_own(held):
  orders = {
      tuple(order.epoch_order(50, **key, held=held)(np.arange(50)))
      for s in (0, 1)
      for g in (0, 1)
      for e in (0, 1)
      for key in [{'seed': s, 'group_id': g, 'epoch': e}]
  }
  assert len(orders) == 8


def test_splits_are_disjoint_and_cover_everything():
  parts = order.split_rows(1003, [803, 100, 100], seed=0)
  rows = [part.numbers() for part in parts]
  assert [len(r) for r in rows] == [803, 100, 100]
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1003))


@hypothesis.given(size=st.integers(1, 50), share=st.floats(0, 1), seed=SEEDS)
def test_a_subset_and_the_others_are_everything(size, share, seed):
  count = int(share * size)
  chosen, others = order.subset(size, count, seed=seed)
  assert len(chosen) == count
  both = np.sort(np.concatenate([chosen, others]))
  np.testing.assert_array_equal(both, np.arange(size))
  assert (np.diff(chosen) > 0).all() and (np.diff(others) > 0).all()


def test_a_subset_is_chosen_at_random_and_the_same_for_ever():
  # Images are sorted by class: the first ones would be of one class.
  chosen, _ = order.subset(1000, 100)
  assert 0.3 < np.mean(chosen < 500) < 0.7
  assert order.subset(10, 4)[0].tolist() == [0, 5, 6, 8]
  # Not the choice of the partition.
  assert set(chosen) != set(rows_of(0, 10, 'disjoint', 1000, 0, held=True))


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: order.bijection(5, (-1,)), 'key='),
        (lambda: order.bijection(-5, (1,)), 'size=-5'),
        (lambda: order.permutation(5, (1, -1)), 'seeds must be 0 or more'),
        (lambda: order.split_rows(10, [5, 4], 0), '10 rows'),
        (
            lambda: rows_of(2, 2, 'shared'),
            r'group_id must be in 0\.\.1 .*got 2',
        ),
        (lambda: rows_of(-1, 2, 'shared'), 'group_id must be in'),
        (lambda: rows_of(0, 2, 'both'), "shared, disjoint; got 'both'"),
        (lambda: rows_of(0, 2000, 'disjoint'), '1003 .* cannot be divided'),
    ],
)
def test_a_mistake_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_documents_are_divided_by_their_text_and_the_seed_alone():
  texts = [f'document {i}' for i in range(4000)]

  def splits(validation, test, seed=0):
    return np.asarray(
        [order.split_of(t, validation, test, seed) for t in texts]
    )

  for shares in ((0.0, 0.0), (0.05, 0.0), (0.5, 0.3), (0.0, 0.2)):
    found = splits(*shares)
    np.testing.assert_array_equal(found, splits(*shares))
    for name, share in zip(('validation', 'test'), shares):
      deviation = (share * (1 - share) / len(texts)) ** 0.5
      assert abs(np.mean(found == name) - share) <= 5 * deviation
    # A larger validation split holds the smaller; a test split takes nothing.
    larger = splits(shares[0] + 0.2, 0.1)
    assert (larger[found == 'validation'] == 'validation').all()
  assert (splits(0.5, 0.0) != splits(0.5, 0.0, seed=1)).any()
