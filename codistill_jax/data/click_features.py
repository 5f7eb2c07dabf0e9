"""From raw values of categories to ids of embeddings, and integers to floats.

A raw category is a uint32, `MISSING` if there was none. Both ways to an id are
the same on every machine:

* `hashed`: id 0 is missing, a value has one of the `buckets` ids behind it.
* `vocabulary`: id 0 is missing, id 1 any value that is rare, which is one that
  the training split has less than `min_count` times, so also one that it never
  has; each of the others has an id of its own.

Shape suffixes: B examples, I dense columns, K categorical columns.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

MISSING = 0
MISSING_INTEGER = np.iinfo(np.int32).min

CATEGORIES = ('hash', 'vocabulary')

Counts = tuple[np.ndarray, np.ndarray]  # Values rising, and how often each.


class Encoder(NamedTuple):
  """How the K categorical columns become ids.

  Attributes:
    encode: uint32 (B, K) -> int32 (B, K), each id below its table's size.
    table_sizes: K numbers of ids.
    identity: Two encoders of the same identity give the same ids.
  """

  encode: Callable[[np.ndarray], np.ndarray]
  table_sizes: tuple[int, ...]
  identity: str


def make_encoder(
    categories: str,
    num_columns: int,
    *,
    buckets: int | Sequence[int],
    min_count: int,
    counts: Callable[[int], Counts],
) -> Encoder:
  """The encoder of a task.

  Args:
    categories: 'hash' or 'vocabulary'.
    num_columns: K.
    buckets: Of 'hash': for each column, or one number for all.
    min_count: Of 'vocabulary'.
    counts: The values of column k in the training split, and how often each
      occurs; called for 'vocabulary' only.

  Raises:
    ValueError: If an argument is out of range.
  """
  if categories == 'hash':
    if isinstance(buckets, int):
      buckets = [buckets] * num_columns
    return hashed(buckets, num_columns)
  if categories == 'vocabulary':
    if type(min_count) is not int or min_count < 1:
      raise ValueError(
          f'min_count must be a whole number of at least 1; got {min_count!r}.'
      )
    return vocabulary([counts(k) for k in range(num_columns)], min_count)
  raise ValueError(
      f"categories must be one of {', '.join(CATEGORIES)}; got {categories!r}."
  )


def hashed(buckets: Sequence[int], num_columns: int) -> Encoder:
  """Ids by hashing: column k has 1 + buckets[k] of them."""
  buckets = list(buckets)
  if len(buckets) != num_columns or any(
      type(n) is not int or not 0 < n < 2**31 for n in buckets
  ):
    raise ValueError(
        f'buckets must be {num_columns} numbers of at least 1 (or one for all'
        f' columns); got {buckets}.'
    )
  buckets_K = np.asarray(buckets, np.uint32)
  # So that values which meet in one column do not meet in all.
  salts_K = mix32(np.arange(1, num_columns + 1, dtype=np.uint32))

  def encode(values_BK: np.ndarray) -> np.ndarray:
    ids_BK = mix32(values_BK ^ salts_K[None, :]) % buckets_K[None, :] + 1
    return np.where(values_BK == MISSING, 0, ids_BK).astype(np.int32)

  return Encoder(
      encode,
      tuple(n + 1 for n in buckets),
      f'hash {_digest([buckets_K])}',
  )


def vocabulary(counts: Sequence[Counts], min_count: int) -> Encoder:
  """Ids of the values that are frequent enough: column k has 2 + those."""
  kept = [
      np.ascontiguousarray(values[(n >= min_count) & (values != MISSING)])
      for values, n in counts
  ]

  def encode(values_BK: np.ndarray) -> np.ndarray:
    ids_BK = np.ones(values_BK.shape, np.int32)
    for k, known in enumerate(kept):
      values_B = np.ascontiguousarray(values_BK[:, k])
      places_B = np.searchsorted(known, values_B)
      places_B[places_B == len(known)] = 0
      if len(known):
        found_B = known[places_B] == values_B
        ids_BK[found_B, k] = places_B[found_B] + 2
    ids_BK[values_BK == MISSING] = 0
    return ids_BK

  return Encoder(
      encode,
      tuple(len(known) + 2 for known in kept),
      f'vocabulary {_digest(kept)}',
  )


def count_values(values: np.ndarray) -> Counts:
  """The different values of one column, rising, and how often each occurs."""
  return np.unique(values, return_counts=True)


def log_integers(integers_BI: np.ndarray) -> np.ndarray:
  """sign(x) log(1 + |x|) of integers, and which are missing: float32 (B, 2I).

  Counts range over five decades and more; the logarithm is what most work on
  Criteo uses. A missing integer (`MISSING_INTEGER`) is 0, the value of a zero,
  and has a 1 in its own column of the second half, the others a 0.
  """
  missing_BI = integers_BI == MISSING_INTEGER
  x_BI = np.where(missing_BI, 0, integers_BI).astype(np.float32)
  logs_BI = np.copysign(np.log1p(np.abs(x_BI)), x_BI)
  return np.concatenate([logs_BI, missing_BI.astype(np.float32)], axis=1)


def mix32(x: np.ndarray) -> np.ndarray:
  """A bijection of uint32 that scatters (MurmurHash3's finaliser)."""
  x = x ^ (x >> np.uint32(16))
  x = x * np.uint32(0x85EBCA6B)
  x = x ^ (x >> np.uint32(13))
  x = x * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def value_of_text(text: str) -> int:
  """A raw category from a string, never `MISSING`."""
  digest = hashlib.blake2b(text.encode('utf-8'), digest_size=4).digest()
  return int.from_bytes(digest, 'big') or 1


def _digest(arrays: Sequence[np.ndarray]) -> str:
  found = hashlib.sha256()
  for array in arrays:
    found.update(f'{len(array)} '.encode())
    found.update(np.ascontiguousarray(array, '<u4').tobytes())
  return found.hexdigest()[:16]
