"""Whose turn each update of asynchronous SGD is, and what that worker reads.

Shape suffixes: W workers, N updates.
"""

import fractions
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from codistill_jax.base import Array, Stream

ORDERS = ('round_robin', 'random')
STREAMS = 8  # At most so many of a group, where workers can share them.


class Turns(NamedTuple):
  """Whose turn each update is.

  Attributes:
    worker_N: int32; who computes the gradient.
    batch_N: int64; how many gradients it has computed before.
    joining_N: int32; the worker that pulls for the first time, before the
      gradient; -1 for none.
  """

  worker_N: np.ndarray
  batch_N: np.ndarray
  joining_N: np.ndarray


@functools.lru_cache(maxsize=8)
def worker_turns(
    workers: int,
    num_steps: int,
    order: str = 'round_robin',
    seed: int = 0,
    ramp_up_steps: int = 0,
) -> Turns:
  """The turns of the first updates; of more of them, these are the first.

  In each round every worker that has joined has one turn.

  Args:
    workers: W.
    num_steps: N.
    order: 'round_robin', in the same order in each round; or 'random', in an
      order of its own in each.
    seed: Of the random orders.
    ramp_up_steps: Updates after which the last worker joins; the others join
      one by one before, the first at once. 0: all at once.
  """
  joins_W = np.array(
      [
          math.ceil(fractions.Fraction(w * ramp_up_steps, max(workers - 1, 1)))
          for w in range(workers)
      ]
  )
  rounds, made = [], 0
  while made < num_steps:
    present = int(np.count_nonzero(joins_W <= made))
    turns = np.arange(present)
    if order == 'random':
      turns = np.random.default_rng([seed, len(rounds)]).permutation(present)
    rounds.append(turns)
    made += present
  worker_N = np.concatenate(rounds)[:num_steps].astype(np.int32)
  batch_N = np.zeros(num_steps, np.int64)
  joining_N = np.full(num_steps, -1, np.int32)
  for w in range(workers):
    turns_of_w = np.flatnonzero(worker_N == w)
    batch_N[turns_of_w] = np.arange(len(turns_of_w))
    if ramp_up_steps and joins_W[w] < num_steps:
      joining_N[joins_W[w]] = w
  return Turns(worker_N, batch_N, joining_N)


class WorkerStreams:
  """The batch of whoever has the turn.

  A stream may hold much, such as the order of all documents. So workers that
  read the same batch at about the same time share one, and what it gives.
  """

  def __init__(
      self,
      stream_of: Callable[[int], Stream],
      turns: Turns,
      together: int,
      rows: int,
  ):
    """Makes no stream before it is read.

    Args:
      stream_of: Number of a stream -> the rows of its workers, in order.
      turns: Whose turn each update is.
      together: Workers of a stream.
      rows: Of each worker.
    """
    self._turns = turns
    self._together = together
    self._rows = rows
    self._stream_of = functools.cache(stream_of)
    # In a round every stream is read at one place; if workers are by
    # themselves, none is read there twice.
    size = STREAMS if together > 1 else 1
    self._read = functools.lru_cache(size)(self._read_batch)

  def batch(self, step: int) -> dict[str, Array]:
    number, place = divmod(int(self._turns.worker_N[step]), self._together)
    batch = self._read(number, int(self._turns.batch_N[step]))
    rows = slice(place * self._rows, (place + 1) * self._rows)
    return jax.tree.map(lambda x: x[rows], dict(batch))

  def _read_batch(self, number: int, index: int) -> dict[str, Array]:
    return self._stream_of(number).batch(index)
