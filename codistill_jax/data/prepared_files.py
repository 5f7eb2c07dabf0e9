"""Files of prepared data: written whole or not at all, with checksums.

Arrays are memory-mapped: they must lie on a local or mounted file system, and
several processes of a machine share the memory. Opening compares sizes and
types only, which costs nothing; `verify` reads everything.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codistill_jax.data import checksums

META = 'meta.json'  # Written last: it makes a directory a data set.


class Kind(NamedTuple):
  """A kind of prepared data.

  Attributes:
    binary: What makes it.
    version: Of its format.
    keys: That its `meta.json` has, beside those that all have.
    example: Flags with which to make it, for an error.
  """

  binary: str
  version: int
  keys: frozenset[str]
  example: str = ''

  @property
  def remedy(self) -> str:
    """Says what to do about data that cannot be used, for errors."""
    return f'delete the directory and run {self.binary} again.'


def write_file(path: Path, data: bytes | memoryview) -> str:
  """Writes a file that is either whole or absent, whenever we are killed.

  Returns:
    The SHA-256 of what was written, in hex.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
  return hashlib.sha256(data).hexdigest()


def write_array(path: Path, array: np.ndarray) -> str:
  """Writes a .npy file; returns its SHA-256."""
  buffer = io.BytesIO()
  np.save(buffer, array)
  return write_file(path, buffer.getbuffer())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object."""
  text = json.dumps(value, indent=2) + '\n'
  write_file(path, text.encode('utf-8'))


def read_json(path: Path, kind: Kind) -> dict[str, Any]:
  """Reads a JSON object that a preparation wrote.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If the file is damaged.
  """
  try:
    value = json.loads(path.read_bytes())
  except ValueError as e:
    raise ValueError(f'{path} is damaged ({e}); {kind.remedy}') from e
  if not isinstance(value, dict):
    raise ValueError(f'{path} is damaged (not a JSON object); {kind.remedy}')
  return value


def read_meta(data_dir: Path, kind: Kind) -> dict[str, Any]:
  """Reads `meta.json` of a finished data set.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it is of another kind or version.
  """
  path = data_dir / META
  try:
    meta = read_json(path, kind)
  except (FileNotFoundError, NotADirectoryError) as e:
    raise FileNotFoundError(
        f'{data_dir} holds no prepared data (no {META}); make it with: python'
        f' -m experiments.{kind.binary} {kind.example}--output={data_dir}'
    ) from e
  if missing := {'format_version', 'splits', *kind.keys} - meta.keys():
    raise ValueError(
        f'{path} is not that of {kind.binary} (lacks'
        f' {", ".join(sorted(missing))}); {kind.remedy}'
    )
  if meta['format_version'] != kind.version:
    raise ValueError(
        f'{path} has format version {meta["format_version"]}, this program'
        f' reads {kind.version}; {kind.remedy}'
    )
  return meta


def open_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, kind: Kind
) -> np.ndarray:
  """Memory-maps an array and compares it with its description.

  Raises:
    FileNotFoundError: If the file is missing.
    ValueError: If it is damaged, or another array.
  """
  try:
    array = np.load(path, mmap_mode='r')
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {kind.remedy}') from e
  except (ValueError, EOFError) as e:
    raise ValueError(f'{path} is damaged ({e}); {kind.remedy}') from e
  if array.shape != shape or array.dtype != dtype:
    raise ValueError(
        f'{path} holds {array.dtype} {array.shape}, expected {dtype} {shape};'
        f' {kind.remedy}'
    )
  # A plain array on the same memory: the subclass makes indexing slow.
  return np.asarray(array)


def verify(expected: Mapping[Path, str], kind: Kind) -> int:
  """Reads files and compares their SHA-256; returns how many bytes they have.

  Raises:
    FileNotFoundError: If one is missing.
    ValueError: If one has changed since it was written.
  """
  size = 0
  for path, digest in expected.items():
    if not path.exists():
      raise FileNotFoundError(f'{path} is missing; {kind.remedy}')
    found = checksums.sha256_of(path)
    if found != digest:
      raise ValueError(
          f'{path} is damaged (SHA-256 {found[:12]}, expected {digest[:12]});'
          f' {kind.remedy}'
      )
    size += path.stat().st_size
  return size
