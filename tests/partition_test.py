"""Partitions are disjoint, complete, and the same everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.data import partition


def groups(num_documents, num_groups, kind, seed=0):
  return [
      partition.documents_of(
          num_documents,
          group_id=group_id,
          num_groups=num_groups,
          partition=kind,
          seed=seed,
      )
      for group_id in range(num_groups)
  ]


@given(
    num_groups=st.integers(1, 7),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**40),
)
def test_disjoint_groups_share_nothing_and_cover_all(num_groups, more, seed):
  num_documents = num_groups + more
  parts = groups(num_documents, num_groups, 'disjoint', seed)
  everything = np.concatenate(parts)
  np.testing.assert_array_equal(np.sort(everything), np.arange(num_documents))
  sizes = [len(part) for part in parts]
  assert max(sizes) - min(sizes) <= 1
  for part in parts:
    assert (np.diff(part) > 0).all()


def test_shared_groups_have_everything():
  for part in groups(11, 3, 'shared'):
    np.testing.assert_array_equal(part, np.arange(11))


def test_disjoint_parts_are_no_stripes_and_depend_on_the_seed():
  first, again, other = (
      groups(1000, 2, 'disjoint', seed)[0] for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)
  # Neighbours, often of one origin, do not alternate between groups.
  assert not (np.diff(first) == 2).all()
  assert 0.4 < np.mean(first < 500) < 0.6


@given(size=st.integers(0, 50), key=st.tuples(st.integers(0, 2**70)))
def test_permutation_is_one(size, key):
  order = partition.permutation(size, key)
  assert order.dtype == np.int64
  np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_permutation_is_the_same_on_every_machine():
  # If these numbers change, resumed runs read other batches.
  assert partition.permutation(8, (1, 2, 3)).tolist() == [
      1,
      2,
      4,
      6,
      5,
      0,
      7,
      3,
  ]


def test_epoch_order_depends_on_each_of_its_arguments():
  orders = [
      tuple(partition.epoch_order(20, seed=s, group_id=g, epoch=e))
      for s in range(3)
      for g in range(3)
      for e in range(3)
  ]
  assert len(set(orders)) == len(orders)


def test_partition_and_epoch_orders_are_drawn_independently():
  first = groups(20, 1, 'disjoint', 5)[0]
  np.testing.assert_array_equal(first, np.arange(20))
  order = partition.epoch_order(20, seed=5, group_id=0, epoch=0)
  drawn = partition.permutation(20, (1, 5))
  assert not np.array_equal(order, drawn)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'group_id': 2}, r'group_id must be in 0\.\.1 .* got 2'),
        ({'group_id': -1}, 'group_id must be in'),
        ({'partition': 'both'}, "shared, disjoint; got 'both'"),
        ({'num_documents': 1}, '1 documents cannot be divided'),
        ({'seed': -1}, 'seed must be 0 or more'),
    ],
)
def test_errors(changes, message):
  arguments = {
      'num_documents': 5,
      'group_id': 0,
      'num_groups': 2,
      'partition': 'disjoint',
      'seed': 0,
  }
  arguments |= changes
  with pytest.raises(ValueError, match=message):
    partition.documents_of(arguments.pop('num_documents'), **arguments)


def test_validation_takes_about_its_share_of_the_texts():
  texts = [f'document {i}' for i in range(4000)]
  for fraction in (0.0, 0.05, 0.5):
    inside = [partition.in_validation(text, fraction, 0) for text in texts]
    # Five standard deviations.
    deviation = (fraction * (1 - fraction) / len(texts)) ** 0.5
    assert abs(np.mean(inside) - fraction) <= 5 * deviation


def test_larger_validation_split_contains_the_smaller():
  texts = [f'document {i}' for i in range(500)]
  small, large = (
      {text for text in texts if partition.in_validation(text, fraction, 3)}
      for fraction in (0.1, 0.3)
  )
  assert small and small < large


def test_validation_split_depends_on_text_and_seed_alone():
  texts = [f'document {i}' for i in range(200)]
  splits = [
      tuple(partition.in_validation(text, 0.5, seed) for text in texts)
      for seed in (0, 0, 1)
  ]
  assert splits[0] == splits[1] != splits[2]
