"""Streams of examples: who gets what, when, and how it is augmented."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from codistill_jax.data import examples, order

LONG = 200_003  # Of several blocks.


def read(rows, draws=None):
  """Tells which rows were read, with which draws; no label is right by luck."""
  batch = {'inputs': {'row': rows}, 'labels': (10**6 - rows).astype(np.int32)}
  if draws is not None:
    batch['inputs']['draws'] = draws
  return batch


def split_of(size, **fields):
  rows = order.all_rows(size) if isinstance(size, int) else size
  return examples.Split(read, rows, **fields)


KINDS = {
    'images': {'num_draws': 4, 'held': True},
    'clicks': {'num_draws': 0, 'held': False},
}
of_either_kind = pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)


def stream(size=23, kind=KINDS['images'], **changes):
  arguments = {'group_id': 0, 'num_groups': 1, 'group_batch': 4} | changes
  return examples.ExampleStream(split_of(size, **kind), **arguments)


def epoch_of(one, epoch=0, name='row'):
  first = epoch * one.steps_per_epoch
  steps = range(first, first + one.steps_per_epoch)
  return np.concatenate([one.batch(step)['inputs'][name] for step in steps])


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@of_either_kind
@hypothesis.given(
    size=st.integers(8, 40),
    num_groups=st.integers(1, 3),
    group_batch=st.integers(1, 3),
    partition=st.sampled_from(order.PARTITIONS),
    seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=30)
def test_an_epoch_reads_each_example_of_the_group_once(
    kind, size, num_groups, group_batch, partition, seed
):
  numbers = np.arange(size)[::2]  # A part of the data set.
  if len(numbers) // num_groups < group_batch:
    return
  seen = []
  for group_id in range(num_groups):
    one = stream(
        order.listed_rows(numbers),
        kind,
        group_id=group_id,
        num_groups=num_groups,
        group_batch=group_batch,
        partition=partition,
        seed=seed,
    )
    epochs = [epoch_of(one, epoch) for epoch in range(20)]
    assert all(len(set(rows)) == len(rows) for rows in epochs)
    seen.append(set(np.concatenate(epochs).tolist()))
    assert seen[-1] <= set(numbers.tolist())
  if partition == 'disjoint':
    assert sum(map(len, seen)) == len(set.union(*seen))
  # In 20 epochs, what an epoch leaves out has had its turn.
  if group_batch == 1:
    assert set.union(*seen) == set(numbers.tolist())


@of_either_kind
def test_an_epoch_of_many_blocks_reads_all_but_less_than_a_batch(kind):
  groups = [
      stream(
          LONG,
          kind,
          group_id=g,
          num_groups=2,
          group_batch=3000,
          partition='disjoint',
      )
      for g in (0, 1)
  ]
  assert [one.steps_per_epoch for one in groups] == [33, 33]
  read = [[epoch_of(one, e) for e in (0, 1)] for one in groups]
  for epochs in read:
    assert all(len(np.unique(rows)) == 99_000 for rows in epochs)
    assert not np.array_equal(*epochs)
    assert set(epochs[0]) != set(epochs[1])  # Not always the same are left out.
  assert not np.intersect1d(read[0], read[1]).size


@of_either_kind
def test_a_batch_does_not_depend_on_what_was_read_before(kind):
  make = lambda: stream(
      LONG,
      kind,
      partition='disjoint',
      num_groups=2,
      group_id=1,
      group_batch=7000,
  )
  one = make()
  for step in (0, 70, 3, 29, 14, 13, 9, 8, 70):
    batch = one.batch(step)
    assert_equal(batch, make().batch(step))
    rows = batch['inputs']['row']
    np.testing.assert_array_equal(batch['labels'], 10**6 - rows)
    np.testing.assert_array_equal(one.row_numbers(step), rows)


@of_either_kind
@pytest.mark.parametrize(
    'slices',
    [
        [slice(0, 6)],
        [slice(0, 3), slice(3, 6)],
        [slice(0, 1), slice(1, 5), slice(5, None)],
        [slice(0, None, 2), slice(1, None, 2)],
    ],
)
def test_processes_read_the_rows_of_the_whole(kind, slices):
  whole = stream(kind=kind, group_batch=6)
  parts = [stream(kind=kind, group_batch=6, rows=rows) for rows in slices]
  for step in range(8):
    batch = whole.batch(step)
    for rows, part in zip(slices, parts):
      assert_equal(
          part.batch(step), jax.tree.map(lambda x, r=rows: x[r], batch)
      )


def test_the_group_batch_does_not_change_who_is_augmented_how():
  # The same places of the same epoch, in batches of 4 and of 2.
  large, small = stream(24, group_batch=4), stream(24, group_batch=2)
  for name in ('row', 'draws'):
    np.testing.assert_array_equal(
        epoch_of(large, 1, name), epoch_of(small, 1, name)
    )


@of_either_kind
def test_another_seed_group_or_epoch_is_another_order_and_other_draws(kind):
  base = stream(1003, kind, num_groups=2)
  orders = [
      epoch_of(base),
      epoch_of(base, 1),
      epoch_of(stream(1003, kind, num_groups=2, group_id=1)),
      epoch_of(stream(1003, kind, num_groups=2, seed=1)),
  ]
  for i, a in enumerate(orders):
    assert all(np.mean(a == b) < 0.02 for b in orders[:i])
  halves = [
      epoch_of(stream(1003, kind, num_groups=2, partition='disjoint', seed=s))
      for s in (0, 1)
  ]
  assert set(halves[0]) != set(halves[1])
  if kind['num_draws']:
    drawn = [
        epoch_of(one, epoch, 'draws')
        for one in (base, stream(1003, kind, num_groups=2, group_id=1))
        for epoch in (0, 1)
    ]
    assert len(np.unique(np.concatenate(drawn)[:, 0])) == 4 * len(drawn[0])


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'group_batch': 0}, 'group_batch must be 1 or more; got 0'),
        ({'group_batch': 24}, '0 has 23 examples, fewer than group_batch=24'),
        ({'partition': 'both'}, "shared, disjoint; got 'both'"),
        ({'rows': slice(4, 8)}, 'holds none of 4 rows'),
        ({'group_id': 1}, 'group_id must be in'),
    ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    stream(**changes)
  with pytest.raises(ValueError, match='step must be 0 or more; got -1'):
    stream().batch(-1)


# --- Draws --------------------------------------------------------------------

KEY = {'seed': 3, 'group_id': 1, 'epoch': 2}


@hypothesis.given(start=st.integers(0, 40), count=st.integers(1, 20))
def test_draws_of_a_place_do_not_depend_on_where_reading_starts(start, count):
  whole = examples.draw(0, 60, 8, **KEY)
  part = examples.draw(start, start + count, 8, **KEY)
  np.testing.assert_array_equal(part, whole[start : start + count])


def test_draws_are_uniform_and_depend_on_every_part_of_the_key():
  found = []
  for name in KEY:
    for value in (0, 7):
      drawn = examples.draw(0, 500, 4, **{**KEY, name: value})
      assert drawn.min() >= 0 and drawn.max() < 1
      # Five standard deviations of the mean of 2,000 numbers.
      assert abs(drawn.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
      assert not any(np.intersect1d(drawn, b).size for b in found)
      found.append(drawn)


def test_draws_are_the_same_for_ever_and_come_in_fours():
  # If these numbers change, resumed runs read other batches.
  drawn = examples.draw(5, 6, 4, seed=0, group_id=0, epoch=0)
  expected = [[0.23194784809791424, 0.01625969302011321]]
  np.testing.assert_allclose(drawn[:, :2], expected, rtol=1e-12)
  with pytest.raises(ValueError, match='multiple of 4; got 3'):
    examples.draw(0, 1, 3, **KEY)


# --- Evaluation ---------------------------------------------------------------


@hypothesis.given(size=st.integers(1, 20), batch_size=st.integers(1, 25))
def test_evaluation_reads_all_in_order_and_pads_with_weight_0(size, batch_size):
  def read_some(rows):
    return read(rows) | {'weights': (rows != 7).astype(np.float32)}

  rows = order.Rows(size, lambda places: places + 5)
  split = examples.Split(read_some, rows, num_draws=4)
  batches = examples.EvalBatches(split, batch_size)
  made = list(batches)
  assert len(made) == len(batches) == -(-size // batch_size)
  for batch in (*made, batches[-1]):
    assert batch['inputs'].keys() == {'row'}  # Not augmented.
    numbers = batch['inputs']['row']
    assert len(numbers) == len(batch['weights']) == batch_size
    np.testing.assert_array_equal(batch['labels'], 10**6 - numbers)
  assert_equal(batches[-1], made[-1])
  weights = np.concatenate([b['weights'] for b in made])
  numbers = np.concatenate([b['inputs']['row'] for b in made])
  assert numbers[:size].tolist() == list(range(5, 5 + size))
  assert set(numbers[size:]) <= {4 + size}
  # That of row 7 is its own: it cannot be read, say.
  np.testing.assert_array_equal(weights[:size], numbers[:size] != 7)
  assert not weights[size:].any()
  for index in (len(batches), -len(batches) - 1):
    with pytest.raises(IndexError):
      batches[index]


def test_evaluation_has_some_rows_a_batch():
  with pytest.raises(ValueError, match='batch_size must be 1 or more'):
    examples.EvalBatches(split_of(5), 0)
