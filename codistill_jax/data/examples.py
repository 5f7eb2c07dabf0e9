"""Streams of examples, images or clicks: training by step, evaluation in order.

Shape suffixes: B examples of a batch, C classes, K draws.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from codistill_jax import base
from codistill_jax.data import order

# The order is worked out for so many places at a time: 5 ms, a few hundred
# batches long, and half a megabyte.
_BLOCK = 1 << 16

# First word of the key: the same user's seed is used for the order of the
# epochs too (see `order`), and must not draw the same numbers.
_DRAWS_KEY = 11
_DRAWS_AT_ONCE = 4  # What one step of the counter of Philox gives.


class Split(NamedTuple):
  """Examples that can be read in any order, from any thread.

  Attributes:
    read: `read(rows_B)` gives the batch of some rows of the data set, with
      'labels' and perhaps 'weights'; `read(rows_B, draws_BK)` an augmented one.
    rows: Those of the split.
    num_draws: K, random numbers that the augmentation of an example takes, a
      multiple of 4; 0: there is none.
    held: Which kind of permutation orders the rows; see `order`.
  """

  read: Callable[..., base.Batch]
  rows: order.Rows
  num_draws: int = 0
  held: bool = False


class ExampleStream:
  """Training batches of one group: a pure function of (seed, group, step).

  In each epoch the group reads all of its rows in a new order, augmented anew.
  A remainder that does not fill a batch is left out of that epoch. Nothing that
  grows with the data is kept, unless the order is `held`.

  May be called from several threads.

  Attributes:
    steps_per_epoch: How many batches an epoch has.
  """

  def __init__(
      self,
      split: Split,
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
      split: The training split.
      group_id: This group.
      num_groups: G.
      group_batch: B, examples per update of the whole group.
      partition: 'shared' or 'disjoint'.
      seed: Of the experiment; the same in all groups.
      rows: The rows of the group batch that this process loads; None: all.

    Raises:
      ValueError: If an argument is out of range, or the group's examples do not
        fill one batch.
    """
    if group_batch < 1:
      raise ValueError(f'group_batch must be 1 or more; got {group_batch}.')
    own = order.group_rows(
        split.rows.size,
        group_id=group_id,
        num_groups=num_groups,
        partition=partition,
        seed=seed,
        held=split.held,
    )
    if own.size < group_batch:
      raise ValueError(
          f'Group {group_id} has {own.size} examples, fewer than'
          f' group_batch={group_batch}; lower it, or use more data.'
      )
    self._loaded = np.arange(group_batch)[slice(None) if rows is None else rows]
    if not len(self._loaded):
      raise ValueError(f'rows={rows} holds none of {group_batch} rows.')
    self._split, self._own = split, own
    self._key = {'seed': seed, 'group_id': group_id}
    self._batch = group_batch
    self._block_steps = max(1, _BLOCK // group_batch)
    self.steps_per_epoch = own.size // group_batch
    # Two of each, because loading ahead goes to and fro over an end.
    self._order = functools.lru_cache(2)(self._make_order)
    self._block = functools.lru_cache(2)(self._make_block)

  def _make_order(self, epoch: int) -> order.Bijection:
    return order.epoch_order(
        self._own.size, epoch=epoch, held=self._split.held, **self._key
    )

  def _make_block(self, epoch: int, block: int) -> np.ndarray:
    """Returns the row numbers (steps, B) of some steps of an epoch."""
    start = block * self._block_steps
    stop = min(start + self._block_steps, self.steps_per_epoch)
    places = np.arange(start * self._batch, stop * self._batch)
    rows = self._split.rows.row_of(self._own.row_of(self._order(epoch)(places)))
    return rows.reshape(stop - start, self._batch)

  def _epoch_of(self, step: int) -> tuple[int, int]:
    epoch, step_in_epoch = divmod(int(step), self.steps_per_epoch)
    if epoch < 0:
      raise ValueError(f'step must be 0 or more; got {step}.')
    return epoch, step_in_epoch

  def row_numbers(self, step: int) -> np.ndarray:
    """Returns the rows of the data set that make update `step`: int64 (B,)."""
    epoch, step_in_epoch = self._epoch_of(step)
    block, place = divmod(step_in_epoch, self._block_steps)
    return self._block(epoch, block)[place][self._loaded]

  def batch(self, step: int) -> base.Batch:
    """Returns the batch of update `step` (from 0): see `base.Stream`.

    Raises:
      ValueError: If the step is negative.
    """
    rows = self.row_numbers(step)
    if not self._split.num_draws:
      return self._split.read(rows)
    epoch, step_in_epoch = self._epoch_of(step)
    places = step_in_epoch * self._batch + self._loaded
    first, last = int(places.min()), int(places.max())
    draws = draw(
        first, last + 1, self._split.num_draws, epoch=epoch, **self._key
    )
    return self._split.read(rows, draws[places - first])


def draw(
    start: int,
    stop: int,
    num_draws: int,
    *,
    seed: int,
    group_id: int,
    epoch: int,
) -> np.ndarray:
  """Draws uniform numbers for the places start..stop-1 of an epoch.

  Random access: the numbers of a place do not depend on start and stop, so an
  example is augmented alike whoever loads it, and otherwise in the next epoch.

  Returns:
    float64 (stop - start, num_draws) in [0, 1).

  Raises:
    ValueError: If `num_draws` is not a multiple of 4.
  """
  if num_draws % _DRAWS_AT_ONCE:
    raise ValueError(f'num_draws must be a multiple of 4; got {num_draws}.')
  key = (_DRAWS_KEY, seed, group_id, epoch)
  bits = np.random.Philox(np.random.SeedSequence(key))
  bits.advance(start * num_draws // _DRAWS_AT_ONCE)
  raw = bits.random_raw((stop - start) * num_draws).reshape(-1, num_draws)
  return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class EvalBatches(Sequence):
  """A split once, in order, not augmented; the last batch is padded.

  Padding is the last example again, of weight 0, so that all values are good
  ones.
  """

  def __init__(self, split: Split, batch_size: int):
    """Reads nothing yet.

    Args:
      split: A split that is not empty.
      batch_size: B.

    Raises:
      ValueError: If the batch size is out of range.
    """
    if batch_size < 1:
      raise ValueError(f'batch_size must be 1 or more; got {batch_size}.')
    self._split = split
    self._batch = batch_size

  def __len__(self) -> int:
    return -(-self._split.rows.size // self._batch)

  def __getitem__(self, index: int) -> base.Batch:  # type: ignore[override]
    """Returns one batch, as of `ExampleStream`, with 'weights' float32 (B,)."""
    if not -len(self) <= index < len(self):
      raise IndexError(f'Batch {index} of {len(self)}.')
    start = index % len(self) * self._batch
    places = np.arange(start, min(start + self._batch, self._split.rows.size))
    weights = np.ones(len(places), np.float32)
    batch = {
        'weights': weights,
        **self._split.read(self._split.rows.row_of(places)),
    }
    padding = self._batch - len(places)
    if padding:
      batch = jax.tree.map(
          lambda x: np.concatenate([x, np.repeat(x[-1:], padding, axis=0)]),
          batch,
      )
      batch['weights'][-padding:] = 0.0
    return batch


def make_task(
    train: Split,
    validation: Split,
    test: Callable[[], Split] | None,
    *,
    partition: str,
    seed: int,
    labels: Callable[[], Iterable[np.ndarray]],
    num_classes: int,
    **fields: Any,
) -> base.Task:
  """Returns the task of three splits.

  Args:
    train: The training split.
    validation: The validation split.
    test: Opens the test split, when it is asked for; None: there is none.
    partition: 'shared' or 'disjoint': how groups divide the training split.
    seed: Of order, augmentation and partition.
    labels: Gives all labels of the training split, in any pieces.
    num_classes: C.
    **fields: Others of `base.Task`.
  """

  def test_batches(batch_size: int) -> EvalBatches:
    return EvalBatches(cast(Callable[[], Split], test)(), batch_size)

  return base.Task(
      train_stream=functools.partial(
          ExampleStream, train, partition=partition, seed=seed
      ),
      eval_batches=functools.partial(EvalBatches, validation),
      test_batches=test_batches if test else None,
      num_classes=num_classes,
      partition=partition,
      label_frequencies=lambda: label_frequencies(labels(), num_classes),
      **fields,
  )


def check_no_splits(name: str, split: str) -> None:
  """Raises ValueError if one of the splits of undivided data is asked for."""
  if split != 'validation':
    raise ValueError(
        f'{name} is not divided into splits: all of it is evaluated; leave'
        f' split={split} out.'
    )


def label_frequencies(
    pieces: Iterable[np.ndarray], num_classes: int
) -> np.ndarray:
  """Returns the shares of the classes among labels: the unigram distribution.

  Args:
    pieces: Integers, as many arrays as there are.
    num_classes: C.

  Returns:
    float64 (C,), of sum 1.

  Raises:
    ValueError: If there is no label, or one is outside [0, C).
  """
  counts_C = np.zeros(num_classes, np.int64)
  for labels in pieces:
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
      raise ValueError(
          f'labels {labels.min()}..{labels.max()} among the training'
          f' examples, expected 0..{num_classes - 1}'
      )
    counts_C += np.bincount(labels, minlength=num_classes)
  return shares(counts_C)


def shares(counts_C: np.ndarray) -> np.ndarray:
  """Returns counts divided by their sum.

  Raises:
    ValueError: If all are 0.
  """
  if not counts_C.any():
    raise ValueError('there are no training labels to count')
  return counts_C / counts_C.sum()


def label_space(classes: Sequence[str]) -> str:
  """Returns a hash of the names of the classes: what a prediction means."""
  # Names of files may be bytes in any encoding.
  names = '\n'.join(classes).encode('utf-8', 'surrogateescape')
  return hashlib.sha256(names).hexdigest()
