"""Who reads what, and when: splits, the partition, the order of an epoch.

Everything here is a pure function of its arguments, the same on every machine
and with every version of numpy: it rests on integer arithmetic, the raw output
of a bit generator and cryptographic hashes, which are fixed, and not on
`Generator.shuffle`, which numpy may change.

There are two kinds of permutation. `permutation` is an array: of documents and
images, of which a machine holds the list anyway. One of the 45.8 M rows of
Criteo would take 370 MB, for each epoch and each group: `bijection` computes
any part of it instead. What is `held` below is of the first kind.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PARTITIONS = ('shared', 'disjoint')

Bijection = Callable[[np.ndarray], np.ndarray]

# First words of the keys, so that two uses of the same user's seed never draw
# the same numbers; by whether the permutation is held.
_PARTITION_KEYS = {False: 3, True: 1}
_EPOCH_KEYS = {False: 4, True: 2}
_SPLIT_KEY = 5
SUBSET_KEY = 12

_ROUNDS = 6

# A walk of n steps among numbers outside is as rare as 2**-n, and has no more
# steps than there are such numbers; a longer one never comes back.
_LONGEST_WALK = 1000


def permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
  """Returns a permutation of `range(size)`, int64, a function of `key` alone.

  Raises:
    ValueError: If a number is negative.
  """
  _check(size, key)
  bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
  # Stable, so that even equal draws leave nothing to the sorting algorithm.
  return np.argsort(bits, kind='stable')


def bijection(size: int, key: tuple[int, ...]) -> Bijection:
  """Returns a permutation of `range(size)` as a function of arrays of places.

  A Feistel network on the numbers of b bits, 2**b being the first power of two
  that is not below the size, walked along its cycles until it is back below the
  size (Black & Rogaway 2002). Not every permutation of a large set can come
  out, as there are far more of them than keys; for the order of examples that
  does no harm.

  Args:
    size: How many numbers to permute.
    key: Non-negative integers.

  Returns:
    `row_of(places)`: int64 of the shape of `places`, all of them below `size`.

  Raises:
    ValueError: If a number is negative.
  """
  _check(size, key)
  bits = max(2, (size - 1).bit_length())
  low_bits, high_bits = (bits + 1) // 2, bits // 2
  low, high = _mask(low_bits), _mask(high_bits)
  shift = np.uint64(low_bits)
  keys = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)

  def scramble(x: np.ndarray) -> np.ndarray:
    a, b = x >> shift, x & low
    for r in range(0, 2 * _ROUNDS, 2):
      # Each line is undone by itself, so the pair is permuted.
      a = a ^ (_mix64(b + keys[r]) & high)
      b = b ^ (_mix64(a + keys[r + 1]) & low)
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


def _check(size: int, key: tuple[int, ...]) -> None:
  if size < 0 or min(key) < 0:
    raise ValueError(
        f'Sizes and seeds must be 0 or more; got size={size}, key={key}.'
    )


def _mask(bits: int) -> np.uint64:
  return np.uint64((1 << bits) - 1)


def _mix64(x: np.ndarray) -> np.ndarray:
  """Scatters uint64: the finaliser of MurmurHash3 (Appleby, public domain)."""
  x = x ^ (x >> np.uint64(33))
  x = x * np.uint64(0xFF51AFD7ED558CCD)
  x = x ^ (x >> np.uint64(33))
  x = x * np.uint64(0xC4CEB9FE1A85EC53)
  return x ^ (x >> np.uint64(33))


def mix32(x: np.ndarray) -> np.ndarray:
  """Scatters uint32, one to one: as `_mix64`."""
  x = x ^ (x >> np.uint32(16))
  x = x * np.uint32(0x85EBCA6B)
  x = x ^ (x >> np.uint32(13))
  x = x * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


class Rows(NamedTuple):
  """Some rows of a data set, in an order.

  Attributes:
    size: How many.
    row_of: Places, 0 <= place < size, to row numbers; no row occurs twice.
  """

  size: int
  row_of: Bijection

  def numbers(self) -> np.ndarray:
    """Returns all row numbers in order, int64 (size,)."""
    return self.row_of(np.arange(self.size))


def all_rows(num_rows: int) -> Rows:
  """Returns all rows, in order."""
  return Rows(num_rows, lambda places: np.asarray(places, np.int64))


def listed_rows(numbers: np.ndarray) -> Rows:
  """Returns the rows of these numbers, in this order."""
  return Rows(len(numbers), numbers.take)


def group_rows(
    num_rows: int,
    *,
    group_id: int,
    num_groups: int,
    partition: str,
    seed: int,
    held: bool = False,
) -> Rows:
  """Returns the rows that one group trains on, in every epoch.

  Args:
    num_rows: Rows (documents, images, clicks) of the training split.
    group_id: This group, 0 <= group_id < num_groups.
    num_groups: G.
    partition: 'shared' (every group has all rows) or 'disjoint' (every row
      belongs to exactly one group).
    seed: Of the experiment; the same in all groups.
    held: Which kind of permutation; of this kind, the rows are in rising order.

  Raises:
    ValueError: If the partition is unknown, the group is out of range, or
      there is less than one row for each group.
  """
  if partition not in PARTITIONS:
    raise ValueError(
        f"partition must be one of {', '.join(PARTITIONS)}; got {partition!r}."
    )
  if not 0 <= group_id < num_groups:
    raise ValueError(
        f'group_id must be in 0..{num_groups - 1} for'
        f' num_groups={num_groups}; got {group_id}.'
    )
  if partition == 'shared':
    return all_rows(num_rows)
  if num_rows < num_groups:
    raise ValueError(
        f'{num_rows} examples cannot be divided among num_groups={num_groups};'
        ' use partition=shared, fewer groups or more data.'
    )
  key = (_PARTITION_KEYS[held], seed)
  if held:
    mine = permutation(num_rows, key)[group_id::num_groups]
    return listed_rows(np.sort(mine))
  row_of = bijection(num_rows, key)
  return Rows(
      len(range(group_id, num_rows, num_groups)),
      lambda places: row_of(np.asarray(places) * num_groups + group_id),
  )


def epoch_order(
    size: int, *, seed: int, group_id: int, epoch: int, held: bool = False
) -> Bijection:
  """Returns the order in which a group reads its `size` rows in one epoch."""
  key = (_EPOCH_KEYS[held], seed, group_id, epoch)
  return permutation(size, key).take if held else bijection(size, key)


def split_rows(num_rows: int, parts: list[int], seed: int) -> list[Rows]:
  """Divides rows at random into parts of these sizes: splits of a data set."""
  if sum(parts) != num_rows or min(parts) < 0:
    raise ValueError(f'{parts} do not add up to {num_rows} rows.')
  row_of = bijection(num_rows, (_SPLIT_KEY, seed))

  def part(start: int, size: int) -> Rows:
    return Rows(size, lambda places: row_of(np.asarray(places) + start))

  starts = np.cumsum([0, *parts[:-1]]).tolist()
  return [part(start, size) for start, size in zip(starts, parts)]


def subset(
    size: int, count: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Divides range(size) at random into `count` numbers and the others.

  What is validation in one group is never training data in another.

  Returns:
    Both in rising order, int64.
  """
  order = permutation(size, (SUBSET_KEY, seed))
  return np.sort(order[:count]), np.sort(order[count:])


def split_of(text: str, validation: float, test: float, seed: int) -> str:
  """Returns 'train', 'validation' or 'test', the split of a document.

  The text itself is hashed: the answer does not depend on the document's
  place, and two copies of one text never land on both sides.

  Args:
    text: The whole document.
    validation: Share of the documents in the validation split.
    test: Share of the documents in the test split; less than 1 together.
    seed: Another seed gives another split.
  """
  digest = hashlib.blake2b(
      text.encode('utf-8'), digest_size=8, key=str(seed).encode('ascii')
  ).digest()
  place = int.from_bytes(digest, 'big')
  if place < validation * 2**64:
    return 'validation'
  return 'test' if place < (validation + test) * 2**64 else 'train'
