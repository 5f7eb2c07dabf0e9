"""Streams of images: who gets what, when, and how it is augmented."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill_jax.data import image_stream, partition


class Numbered:
  """Images whose pixels tell their number and the draws they were read with.

  Label n of image n is 1000 - n, so that nothing is right by accident.
  """

  num_draws = 4

  def __init__(self, size):
    self.labels = (1000 - np.arange(size)).astype(np.int32)

  def read(self, indices, draws):
    pixels = np.zeros((len(indices), 1, 5, 1), np.float32)
    pixels[:, 0, 0, 0] = indices
    if draws is not None:
      pixels[:, 0, 1:, 0] = draws
    return pixels, np.ones(len(indices), np.float32)


def numbers(batch):
  return batch['inputs'][:, 0, 0, 0].astype(int)


def drawn(batch):
  return batch['inputs'][:, 0, 1:, 0]


def stream(size=23, examples=None, **changes):
  arguments = {'group_id': 0, 'num_groups': 1, 'group_batch': 4} | changes
  examples = np.arange(size) if examples is None else examples
  return image_stream.ImageStream(Numbered(size), examples, **arguments)


def epoch_of(one, epoch):
  first = epoch * one.steps_per_epoch
  steps = range(first, first + one.steps_per_epoch)
  return [one.batch(step) for step in steps]


@settings(max_examples=40)
@given(
    size=st.integers(8, 40),
    num_groups=st.integers(1, 3),
    group_batch=st.integers(1, 3),
    kind=st.sampled_from(partition.PARTITIONS),
    seed=st.integers(0, 9),
)
def test_an_epoch_reads_each_image_of_the_group_once(
    size, num_groups, group_batch, kind, seed
):
  examples = np.arange(size)[::2]  # A part of what the images hold.
  seen = []
  for group_id in range(num_groups):
    try:
      one = stream(
          size,
          examples,
          group_id=group_id,
          num_groups=num_groups,
          group_batch=group_batch,
          partition=kind,
          seed=seed,
      )
    except ValueError as e:
      assert 'fewer than group_batch' in str(e)
      assert len(examples) // num_groups < group_batch
      return
    mine = set()
    for epoch in range(20):
      read = np.concatenate([numbers(b) for b in epoch_of(one, epoch)])
      assert len(set(read)) == len(read)  # Once.
      mine |= set(read.tolist())
    if kind == 'shared':
      assert mine <= set(examples.tolist())
    seen.append(mine)
  if kind == 'disjoint':
    for i, a in enumerate(seen):
      assert not any(a & b for b in seen[:i])
  # In 20 epochs, what an epoch leaves out has had its turn.
  if group_batch == 1:
    assert set.union(*seen) == set(examples.tolist())


def test_an_epoch_leaves_out_less_than_a_batch():
  one = stream(23, group_batch=4)
  assert one.steps_per_epoch == 5
  read = [
      set(np.concatenate(list(map(numbers, epoch_of(one, e))))) for e in (0, 1)
  ]
  assert len(read[0]) == len(read[1]) == 20
  assert read[0] != read[1]  # Not always the same three.


def test_every_epoch_has_an_order_of_its_own():
  one = stream()
  orders = [
      np.concatenate(list(map(numbers, epoch_of(one, e)))) for e in range(4)
  ]
  assert len({tuple(order) for order in orders}) == 4


def test_labels_and_weights_belong_to_the_images():
  one = stream(23, np.arange(23)[3:])
  for step in range(12):
    batch = one.batch(step)
    np.testing.assert_array_equal(batch['labels'], 1000 - numbers(batch))
    assert {k: (x.dtype, x.shape[0]) for k, x in batch.items()} == {
        'inputs': (np.float32, 4),
        'labels': (np.int32, 4),
        'weights': (np.float32, 4),
    }


def test_a_batch_does_not_depend_on_what_was_read_before():
  one = stream(partition='disjoint', num_groups=2, group_id=1)
  for step in np.random.default_rng(0).integers(0, 99, 30):
    fresh = stream(partition='disjoint', num_groups=2, group_id=1)
    for name, x in one.batch(int(step)).items():
      np.testing.assert_array_equal(x, fresh.batch(int(step))[name])


@pytest.mark.parametrize(
    'slices',
    [
        [slice(0, 3), slice(3, 6)],
        [slice(0, 1), slice(1, 5), slice(5, None)],
        [slice(0, None, 2), slice(1, None, 2)],
    ],
)
def test_processes_read_the_rows_of_the_whole(slices):
  whole = stream(group_batch=6)
  parts = [stream(group_batch=6, rows=rows) for rows in slices]
  for step in range(8):
    batch = whole.batch(step)
    for rows, part in zip(slices, parts):
      for name, x in part.batch(step).items():
        np.testing.assert_array_equal(x, batch[name][rows])


def test_replicas_and_group_batch_do_not_change_who_is_augmented_how():
  # The same places of the same epoch, in batches of 4 and of 2.
  large, small = stream(24, group_batch=4), stream(24, group_batch=2)
  for name in ('inputs', 'labels'):
    np.testing.assert_array_equal(
        np.concatenate([b[name] for b in epoch_of(large, 1)]),
        np.concatenate([b[name] for b in epoch_of(small, 1)]),
    )


def test_an_image_is_augmented_otherwise_in_each_epoch_and_group():
  found = {}
  for group_id in (0, 1):
    one = stream(24, num_groups=2, group_id=group_id)
    for epoch in range(3):
      for batch in epoch_of(one, epoch):
        for number, row in zip(numbers(batch), drawn(batch)):
          found.setdefault(number, []).append(tuple(row))
  for rows in found.values():
    assert len(rows) == 6 and len(set(rows)) == 6


def test_groups_with_shared_data_read_in_different_orders():
  a, b = (stream(num_groups=2, group_id=g).batch(0) for g in (0, 1))
  assert not np.array_equal(numbers(a), numbers(b))


def test_seed_changes_order_augmentation_and_partition():
  def read(seed, kind):
    one = stream(24, num_groups=2, partition=kind, seed=seed)
    return [
        np.concatenate([f(b) for b in epoch_of(one, 0)])
        for f in (numbers, drawn)
    ]

  (order, rows), (other_order, other_rows) = read(0, 'shared'), read(
      1, 'shared'
  )
  assert not np.array_equal(order, other_order)
  assert not np.intersect1d(rows, other_rows).size
  assert set(read(0, 'disjoint')[0]) != set(read(1, 'disjoint')[0])


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'group_batch': 0}, 'group_batch must be 1 or more; got 0'),
        ({'group_batch': 24}, '23 images, fewer than group_batch=24'),
        ({'partition': 'both'}, "shared, disjoint; got 'both'"),
        ({'rows': slice(4, 8)}, 'holds none of 4 rows'),
        ({'group_id': 1}, 'group_id must be in'),
    ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    stream(**changes)


def test_negative_step_is_refused():
  with pytest.raises(ValueError, match='step must be 0 or more; got -1'):
    stream().batch(-1)


@given(size=st.integers(1, 20), batch_size=st.integers(1, 9))
def test_evaluation_reads_all_in_order_and_pads_with_weight_0(size, batch_size):
  images = Numbered(30)
  examples = np.arange(size) + 5
  batches = image_stream.EvalImages(images, examples, batch_size)
  read = list(batches)
  assert len(read) == len(batches) == -(-size // batch_size)
  assert all(x.shape[0] == batch_size for b in read for x in b.values())
  real = np.concatenate([numbers(b)[b['weights'] > 0] for b in read])
  np.testing.assert_array_equal(real, examples)
  labels = np.concatenate([b['labels'][b['weights'] > 0] for b in read])
  np.testing.assert_array_equal(labels, 1000 - examples)
  assert all(not drawn(b).any() for b in read)
  np.testing.assert_array_equal(batches[-1]['inputs'], read[-1]['inputs'])


def test_evaluation_ends():
  batches = image_stream.EvalImages(Numbered(5), np.arange(5), 2)
  for index in (3, -4):
    with pytest.raises(IndexError):
      batches[index]
  with pytest.raises(ValueError, match='batch_size must be 1 or more'):
    image_stream.EvalImages(Numbered(5), np.arange(5), 0)


@given(size=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_subset_and_the_others_are_everything(size, share, seed):
  count = int(share * size)
  chosen, others = image_stream.subset(size, count, seed=seed)
  assert len(chosen) == count
  both = np.concatenate([chosen, others])
  np.testing.assert_array_equal(np.sort(both), np.arange(size))
  assert (np.diff(chosen) > 0).all() and (np.diff(others) > 0).all()


def test_a_subset_is_chosen_at_random_and_the_same_on_every_machine():
  # Images are sorted by class: the first ones would be of one class.
  chosen, _ = image_stream.subset(1000, 100)
  assert 0.3 < np.mean(chosen < 500) < 0.7
  assert image_stream.subset(10, 4)[0].tolist() == [0, 5, 6, 8]
  order = partition.permutation(1000, (1, 0))
  assert set(chosen) != set(order[:100])  # Of the partition.
