"""Batches of rows: what the click tasks train and evaluate on.

Shape suffixes: B examples of a batch, N rows of a data set.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import order

# Row numbers of a batch (B,) -> its arrays: 'inputs' and 'labels'.
Gather = Callable[[np.ndarray], base.Batch]

# The order is worked out for so many places at a time: 5 ms, a few hundred
# batches long, and half a megabyte.
_BLOCK = 1 << 16


class ClickStream:
  """Training batches of one group: a pure function of (seed, group, step).

  In each epoch the group reads all of its rows in a new order; what is left at
  the end, less than a batch, is left out of that epoch. Nothing that grows with
  the data is held: see `order`.

  May be called from several threads.

  Attributes:
    steps_per_epoch: How many batches an epoch has.
  """

  def __init__(
      self,
      gather: Gather,
      split: order.Rows,
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
      gather: Reads rows.
      split: The training split.
      group_id: This group.
      num_groups: G.
      group_batch: B, examples of the whole group.
      partition: 'shared' or 'disjoint'.
      seed: Of the experiment; the same in all groups.
      rows: The rows of the group batch that this process loads; None: all.

    Raises:
      ValueError: If an argument is out of range, or the group's rows do not
        fill one batch.
    """
    if group_batch < 1:
      raise ValueError(f'group_batch must be 1 or more; got {group_batch}.')
    self._gather = gather
    self._split = split
    self._own = order.group_rows(
        split.size,
        group_id=group_id,
        num_groups=num_groups,
        partition=partition,
        seed=seed,
    )
    self._group_id = group_id
    self._seed = seed
    self._batch = group_batch
    self._rows = slice(None) if rows is None else rows
    self.steps_per_epoch = self._own.size // group_batch
    if self.steps_per_epoch < 1:
      raise ValueError(
          f'Group {group_id} has {self._own.size} examples, but one step needs'
          f' group_batch={group_batch}; use more data or a smaller batch.'
      )
    self._block_steps = max(1, _BLOCK // group_batch)
    # Two, because loading ahead goes to and fro over the end of a block.
    self._block = functools.lru_cache(maxsize=2)(self._make_block)

  def _make_block(self, epoch: int, block: int) -> np.ndarray:
    """Row numbers (steps, B) of some steps of an epoch."""
    start = block * self._block_steps
    stop = min(start + self._block_steps, self.steps_per_epoch)
    places = np.arange(start * self._batch, stop * self._batch, dtype=np.int64)
    shuffled = order.epoch_order(
        self._own.size, seed=self._seed, group_id=self._group_id, epoch=epoch
    )
    rows = self._split.row_of(self._own.row_of(shuffled(places)))
    return rows.reshape(stop - start, self._batch)

  def row_numbers(self, step: int) -> np.ndarray:
    """The rows of the data set that make update `step`: int64 (B,)."""
    epoch, step_in_epoch = divmod(int(step), self.steps_per_epoch)
    if epoch < 0:
      raise ValueError(f'step must be 0 or more; got {step}.')
    block, place = divmod(step_in_epoch, self._block_steps)
    return self._block(epoch, block)[place][self._rows]

  def batch(self, step: int) -> base.Batch:
    """The batch of update `step` (from 0): see `base.Stream`.

    Returns:
      'inputs': 'integers' float32 (B, I) and 'categories' int32 (B, K);
      'labels' int32 (B,).
    """
    return self._gather(self.row_numbers(step))


class EvalBatches(Sequence):
  """A split once, in order; the last batch is padded with weight 0."""

  def __init__(
      self,
      gather: Gather,
      split: order.Rows,
      batch_size: int,
      *,
      max_examples: int | None = None,
  ):
    """Reads nothing yet.

    Args:
      gather: Reads rows.
      split: A split that is not empty.
      batch_size: B.
      max_examples: Only the first so many of the split; None: all.

    Raises:
      ValueError: If an argument is out of range.
    """
    limit = split.size if max_examples is None else max_examples
    for name, value in (('batch_size', batch_size), ('max_examples', limit)):
      if value < 1:
        raise ValueError(f'{name} must be 1 or more; got {value}.')
    self._gather = gather
    self._split = split
    self._batch = batch_size
    self._size = min(split.size, limit)

  def __len__(self) -> int:
    return -(-self._size // self._batch)

  def __getitem__(self, index: int) -> base.Batch:
    """One batch, as of `ClickStream`, with 'weights' float32 (B,)."""
    if not -len(self) <= index < len(self):
      raise IndexError(f'Batch {index} of {len(self)}.')
    start = index % len(self) * self._batch
    places = np.arange(start, start + self._batch, dtype=np.int64)
    valid = places < self._size
    # Padding is the last example again, so that all values are good ones.
    rows = self._split.row_of(np.minimum(places, self._size - 1))
    return {**self._gather(rows), 'weights': valid.astype(np.float32)}
