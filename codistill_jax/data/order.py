"""The order of very many rows, without holding it: seeded bijections.

A permutation of the 45.8 M rows of Criteo takes 370 MB as an array, for each
epoch and each group. `bijection` computes any part of one instead: a Feistel
network on the numbers of b bits, 2**b being the first power of two that is not
below the size, walked along its cycles until it is back below the size (Black &
Rogaway 2002). Not every permutation of a large set can come out, as there are
far more of them than keys; for the order of examples that does no harm.

Like partition.py, all is a pure function of its arguments and the same with
every version of numpy: integer arithmetic and `SeedSequence`, which is fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from codistill_jax.data import partition as partition_lib

Bijection = Callable[[np.ndarray], np.ndarray]

_ROUNDS = 6

# A walk of n steps among numbers outside is as rare as 2**-n, and has no more
# steps than there are such numbers; a longer one never comes back.
_LONGEST_WALK = 1000

# First words of the keys; the next after those of partition.py.
_PARTITION_KEY = 3
_EPOCH_KEY = 4
_SPLIT_KEY = 5


def bijection(size: int, key: tuple[int, ...]) -> Bijection:
  """A permutation of `range(size)` as a function of arrays of places.

  Args:
    size: How many numbers to permute.
    key: Non-negative integers.

  Returns:
    `row_of(places)`: int64 of the shape of `places`, all of them below `size`.

  Raises:
    ValueError: If a number is negative.
  """
  if size < 0 or min(key) < 0:
    raise ValueError(
        f'Sizes and seeds must be 0 or more; got size={size}, key={key}.'
    )
  bits = max(2, (size - 1).bit_length())
  low_bits, high_bits = (bits + 1) // 2, bits // 2
  low, high = _mask(low_bits), _mask(high_bits)
  shift = np.uint64(low_bits)
  keys = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)

  def scramble(x: np.ndarray) -> np.ndarray:
    a, b = x >> shift, x & low
    for r in range(0, 2 * _ROUNDS, 2):
      # Each line is undone by itself, so the pair is permuted.
      a = a ^ (_mix(b + keys[r]) & high)
      b = b ^ (_mix(a + keys[r + 1]) & low)
    return (a << shift) | b

  def row_of(places: np.ndarray) -> np.ndarray:
    places = np.asarray(places)
    found = scramble(places.reshape(-1).astype(np.uint64))
    (outside,) = np.nonzero(found >= size)
    for _ in range(_LONGEST_WALK):
      if not outside.size:
        return found.astype(np.int64).reshape(places.shape)
      found[outside] = scramble(found[outside])
      outside = outside[found[outside] >= size]
    raise AssertionError('the numbers are scrambled by no bijection')

  return row_of


def _mask(bits: int) -> np.uint64:
  return np.uint64((1 << bits) - 1)


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of MurmurHash3 (64 bits; Appleby, public domain)."""
  x = x ^ (x >> np.uint64(33))
  x = x * np.uint64(0xFF51AFD7ED558CCD)
  x = x ^ (x >> np.uint64(33))
  x = x * np.uint64(0xC4CEB9FE1A85EC53)
  return x ^ (x >> np.uint64(33))


class Rows(NamedTuple):
  """Some rows of a data set, in an order.

  Attributes:
    size: How many.
    row_of: Places, 0 <= place < size, to row numbers; no row occurs twice.
  """

  size: int
  row_of: Bijection


def all_rows(num_rows: int) -> Rows:
  """All rows, in order."""
  return Rows(num_rows, lambda places: np.asarray(places, np.int64))


def group_rows(
    num_rows: int,
    *,
    group_id: int,
    num_groups: int,
    partition: str,
    seed: int,
) -> Rows:
  """The rows that one group trains on: `partition.documents_of`, unheld.

  Raises:
    ValueError: As `partition.documents_of`.
  """
  partition_lib.check(
      num_rows,
      group_id=group_id,
      num_groups=num_groups,
      partition=partition,
      name='rows',
  )
  if partition == 'shared':
    return all_rows(num_rows)
  row_of = bijection(num_rows, (_PARTITION_KEY, seed))
  return Rows(
      len(range(group_id, num_rows, num_groups)),
      lambda places: row_of(np.asarray(places) * num_groups + group_id),
  )


def epoch_order(
    size: int, *, seed: int, group_id: int, epoch: int
) -> Bijection:
  """The order in which a group reads its `size` rows in one epoch."""
  return bijection(size, (_EPOCH_KEY, seed, group_id, epoch))


def split_rows(num_rows: int, parts: list[int], seed: int) -> list[Rows]:
  """Divides rows at random into parts of these sizes: splits of a data set."""
  if sum(parts) != num_rows or min(parts) < 0:
    raise ValueError(f'{parts} do not add up to {num_rows} rows.')
  row_of = bijection(num_rows, (_SPLIT_KEY, seed))

  def part(start: int, size: int) -> Rows:
    return Rows(size, lambda places: row_of(np.asarray(places) + start))

  starts = np.cumsum([0, *parts[:-1]]).tolist()
  return [part(start, size) for start, size in zip(starts, parts)]
