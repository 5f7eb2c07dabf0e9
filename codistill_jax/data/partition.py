"""Who gets which documents: the groups' partitions and the validation split.

Everything here is a pure function of its arguments, the same on every machine
and with every version of numpy: it rests on the raw output of a bit generator
and on cryptographic hashes, which are fixed, and not on `Generator.shuffle`,
which numpy may change.
"""

import hashlib

import numpy as np

PARTITIONS = ('shared', 'disjoint')

# First words of the keys below, so that two uses of the same user's seed
# never draw the same numbers.
_PARTITION_KEY = 1
_EPOCH_KEY = 2


def permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
  """A permutation of `range(size)`: int64 (size,), a function of `key` alone.

  Args:
    size: How many numbers to permute.
    key: Non-negative integers.

  Raises:
    ValueError: If a number of the key is negative.
  """
  if min(key) < 0:
    raise ValueError(f'A seed must be 0 or more; got {min(key)}.')
  bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
  # Stable, so that even equal draws leave nothing to the sorting algorithm.
  return np.argsort(bits, kind='stable')


def check(
    num_examples: int,
    *,
    group_id: int,
    num_groups: int,
    partition: str,
    name: str = 'documents',
) -> None:
  """Raises ValueError if examples, called `name`, cannot be divided so."""
  if partition not in PARTITIONS:
    raise ValueError(
        f"partition must be one of {', '.join(PARTITIONS)}; got {partition!r}."
    )
  if not 0 <= group_id < num_groups:
    raise ValueError(
        f'group_id must be in 0..{num_groups - 1} for'
        f' num_groups={num_groups}; got {group_id}.'
    )
  if partition == 'disjoint' and num_examples < num_groups:
    raise ValueError(
        f'{num_examples} {name} cannot be divided among'
        f' num_groups={num_groups}; use partition=shared, fewer groups or more'
        f' {name}.'
    )


def documents_of(
    num_documents: int,
    *,
    group_id: int,
    num_groups: int,
    partition: str,
    seed: int,
) -> np.ndarray:
  """The documents that one group trains on, in every epoch.

  Args:
    num_documents: Documents of the training split.
    group_id: This group, 0 <= group_id < num_groups.
    num_groups: G.
    partition: 'shared' (every group has all documents) or 'disjoint' (every
      document belongs to exactly one group).
    seed: Of the experiment; the same in all groups.

  Returns:
    Document numbers in rising order, int64.

  Raises:
    ValueError: If the partition is unknown, the group is out of range, or
      there is less than one document for each group.
  """
  check(
      num_documents,
      group_id=group_id,
      num_groups=num_groups,
      partition=partition,
  )
  if partition == 'shared':
    return np.arange(num_documents, dtype=np.int64)
  order = permutation(num_documents, (_PARTITION_KEY, seed))
  return np.sort(order[group_id::num_groups])


def epoch_order(
    num_documents: int, *, seed: int, group_id: int, epoch: int
) -> np.ndarray:
  """The order in which a group reads its documents in one epoch, int64."""
  return permutation(num_documents, (_EPOCH_KEY, seed, group_id, epoch))


def in_validation(text: str, fraction: float, seed: int) -> bool:
  """Whether a document belongs to the validation split.

  The text itself is hashed: the answer does not depend on the document's
  place, and two copies of one text never land on both sides.

  Args:
    text: The whole document.
    fraction: Share of the documents in the validation split, 0 <= f < 1.
    seed: Another seed gives another split.
  """
  digest = hashlib.blake2b(
      text.encode('utf-8'), digest_size=8, key=str(seed).encode('ascii')
  ).digest()
  return int.from_bytes(digest, 'big') < fraction * 2**64
