"""The record of a checkpoint: what must be known before its arrays are read."""

import dataclasses
import hashlib
import json
import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from codistill_jax.base import PyTree
from codistill_jax.storage.remote import Digest


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a checkpoint."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  checksum: str = ''

  def __str__(self) -> str:
    return f'{self.path} {self.dtype}{list(self.shape)}'

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of a checkpoint without reading its arrays.

  Attributes:
    facts: JSON values of the caller.
    leaves: The arrays.
    files: The files that hold them; path below `arrays` -> content.
  """

  facts: Mapping[str, Any]
  leaves: tuple[Leaf, ...]
  files: Mapping[str, Digest] = dataclasses.field(default_factory=dict)


def flatten(tree: PyTree) -> list[tuple[str, Any]]:
  """(path, leaf) of each leaf, such as ('params/kernel', array)."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
      (jax.tree_util.keystr(path, simple=True, separator='/'), x)
      for path, x in leaves
  ]


def describe(tree: PyTree) -> tuple[Leaf, ...]:
  """The leaves of `tree` (arrays or their shapes), without checksums."""
  return tuple(
      Leaf(path, tuple(x.shape), np.dtype(x.dtype).name)
      for path, x in flatten(tree)
  )


def checksum(x: np.ndarray) -> str:
  """CRC-32 of the bits of an array, whatever its layout in memory."""
  data = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
  return f'{zlib.crc32(data):08x}'


def encode(record: Record) -> bytes:
  """The record as JSON, with a checksum of itself."""
  content = dataclasses.asdict(record)
  written = {'content': content, 'checksum': _text_checksum(content)}
  return (json.dumps(written, indent=1) + '\n').encode()


def decode(data: bytes) -> Record:
  """Undoes `encode`.

  Raises:
    ValueError: If it is not what `encode` wrote, or says what cannot be.
  """
  try:
    written = json.loads(data)
    content = written['content']
    if written['checksum'] != _text_checksum(content):
      raise ValueError('its checksum is wrong')
    if not isinstance(content['facts'], dict):
      raise ValueError('its facts are none')
    return Record(
        content['facts'],
        tuple(map(_leaf, content['leaves'])),
        {name: _digest(name, x) for name, x in content['files'].items()},
    )
  except (KeyError, TypeError, AttributeError, RecursionError) as e:
    raise ValueError(f'{type(e).__name__} {e}') from e


def _leaf(written: Mapping[str, Any]) -> Leaf:
  leaf = Leaf(**{**written, 'shape': tuple(written['shape'])})
  texts = (leaf.path, leaf.dtype, leaf.checksum)
  if (
      not all(type(text) is str for text in texts)
      or not all(type(n) is int and n >= 0 for n in leaf.shape)
      or np.dtype(leaf.dtype).name != leaf.dtype
  ):
    raise ValueError(f'{leaf} is no array')
  return leaf


def _digest(name: str, written: list[Any]) -> Digest:
  # Copied below a directory of the reader: nobody writes elsewhere through it.
  parts = pathlib.PurePosixPath(name).parts
  if not parts or name.startswith('/') or '..' in parts or '\\' in name:
    raise ValueError(f'{name!r} is no name of a file')
  size, sha256 = written
  if type(size) is not int or type(sha256) is not str:
    raise ValueError(f'the digest of {name!r} is none')
  return Digest(size, sha256)


def _text_checksum(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
