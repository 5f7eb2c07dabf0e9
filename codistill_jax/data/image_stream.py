"""Batches of images: what a stream promises, whatever the images come from.

Shape suffixes: B images of a batch, H height, W width, C channels, K draws.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from codistill_jax import base
from codistill_jax.data import augment
from codistill_jax.data import partition as partition_lib

# First word of the key of `subset`; see `partition`.
_SUBSET_KEY = 12


class Images(Protocol):
  """Labelled images that can be read in any order, from any thread.

  Attributes:
    labels: int32 (number of images,).
    num_draws: K, random numbers that the augmentation of an image takes.
  """

  labels: np.ndarray
  num_draws: int

  def read(
      self, indices_B: np.ndarray, draws_BK: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Some images, normalised.

    Args:
      indices_B: Which.
      draws_BK: Uniform in [0, 1), for the augmentation; None: there is none.

    Returns:
      float32 (B, H, W, C), and float32 (B,): 1, or 0 for an image that cannot
      be read.
    """


def _batch(
    images: Images, indices_B: np.ndarray, draws_BK: np.ndarray | None
) -> base.Batch:
  inputs, weights = images.read(indices_B, draws_BK)
  return {
      'inputs': inputs,
      'labels': images.labels[indices_B],
      'weights': weights,
  }


class ImageStream:
  """Training batches of one group: a pure function of (seed, group, step).

  In each epoch the group's images are put into a new order and augmented anew.
  A remainder that does not fill a batch is left out of that epoch.

  May be called from several threads.

  Attributes:
    steps_per_epoch: How many batches an epoch has.
  """

  def __init__(
      self,
      images: Images,
      examples: np.ndarray,
      *,
      group_id: int,
      num_groups: int,
      group_batch: int,
      partition: str = 'shared',
      seed: int = 0,
      rows: slice | None = None,
  ):
    """Makes the stream; reads nothing yet.

    Args:
      images: Where the training split is in.
      examples: Its images: indices into `images`.
      group_id: This group.
      num_groups: G.
      group_batch: B, images per update of the whole group.
      partition: 'shared' or 'disjoint'.
      seed: Of the experiment; the same in all groups.
      rows: The rows of the group batch that this process loads; None: all.

    Raises:
      ValueError: If an argument is out of range, or the group's images do not
        fill one batch.
    """
    if group_batch < 1:
      raise ValueError(f'group_batch must be 1 or more; got {group_batch}.')
    mine = partition_lib.documents_of(
        len(examples),
        group_id=group_id,
        num_groups=num_groups,
        partition=partition,
        seed=seed,
    )
    if len(mine) < group_batch:
      raise ValueError(
          f'group {group_id} has {len(mine)} images, fewer than'
          f' group_batch={group_batch}; lower it, or use more data.'
      )
    self._images = images
    self._examples = np.asarray(examples)[mine]
    self._group_batch = group_batch
    self._rows = np.arange(group_batch)[slice(None) if rows is None else rows]
    if not len(self._rows):
      raise ValueError(f'rows={rows} holds none of {group_batch} rows.')
    self._key = {'seed': seed, 'group_id': group_id}
    self.steps_per_epoch = len(mine) // group_batch
    # Two: the end of an epoch and the start of the next are loaded together.
    self._order = functools.lru_cache(2)(self._order_of)

  def _order_of(self, epoch: int) -> np.ndarray:
    order = partition_lib.epoch_order(
        len(self._examples), epoch=epoch, **self._key
    )
    return self._examples[order]

  def batch(self, step: int) -> base.Batch:
    """The batch of update `step` (from 0): see `base.Stream`.

    Returns:
      'inputs' float32 (B, H, W, C), 'labels' int32 (B,), and 'weights' float32
      (B,), 0 for an image that cannot be read.

    Raises:
      ValueError: If the step is negative.
    """
    epoch, step_in_epoch = divmod(int(step), self.steps_per_epoch)
    if epoch < 0:
      raise ValueError(f'step must be 0 or more; got {step}.')
    places = step_in_epoch * self._group_batch + self._rows
    start, stop = int(places.min()), int(places.max()) + 1
    drawn = augment.draws(
        start, stop, self._images.num_draws, epoch=epoch, **self._key
    )
    return _batch(
        self._images, self._order(epoch)[places], drawn[places - start]
    )


class EvalImages(Sequence):
  """A split once, in order, without augmentation: validation or test.

  The last batch is filled up with copies of its first image, of weight 0.
  """

  def __init__(self, images: Images, examples: np.ndarray, batch_size: int):
    """Reads nothing yet.

    Args:
      images: Where the split is in.
      examples: Its images: indices into `images`.
      batch_size: B.

    Raises:
      ValueError: If the batch size is out of range.
    """
    if batch_size < 1:
      raise ValueError(f'batch_size must be 1 or more; got {batch_size}.')
    self._images = images
    self._examples = np.asarray(examples)
    self._batch_size = batch_size

  def __len__(self) -> int:
    return -(-len(self._examples) // self._batch_size)

  def __getitem__(self, index: int) -> base.Batch:
    """One batch, as `ImageStream.batch`; padding has weight 0."""
    if not -len(self) <= index < len(self):
      raise IndexError(f'Batch {index} of {len(self)}.')
    first = (index % len(self)) * self._batch_size
    indices = self._examples[first : first + self._batch_size]
    padding = self._batch_size - len(indices)
    batch = _batch(self._images, indices, None)
    if padding:
      batch = {
          key: np.concatenate([x, np.repeat(x[:1], padding, axis=0)])
          for key, x in batch.items()
      }
      batch['weights'][-padding:] = 0.0
    return batch


def subset(
    size: int, count: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Divides range(size) at random into `count` numbers and the others.

  A function of the arguments alone, on every machine: what is validation in
  one group is never training data in another.

  Returns:
    Both in rising order, int64.
  """
  order = partition_lib.permutation(size, (_SUBSET_KEY, seed))
  return np.sort(order[:count]), np.sort(order[count:])
