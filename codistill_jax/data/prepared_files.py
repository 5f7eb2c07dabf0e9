"""Files of prepared data: written whole or not at all, with checksums.

Arrays are memory-mapped: they must lie on a local or mounted file system, and
several processes of a machine share the memory. Opening compares sizes and
types only, which costs nothing; `verify` reads everything.
"""

import concurrent.futures
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codistill_jax.storage import files

META = 'meta.json'  # Written last: it makes a directory a data set.
_LINE = re.compile(r'\\?([0-9a-fA-F]{64}) [ *](.+)')  # Of sha256sum.


class DataKind(NamedTuple):
  """A kind of prepared data.

  Attributes:
    binary: What makes it.
    version: Of its format.
    keys: That its `meta.json` has, beside those that all have.
    files: The SHA-256 of every file, by its name, from `meta.json`.
    example: Flags with which to make it, for an error.
  """

  binary: str
  version: int
  keys: frozenset[str]
  files: Callable[[dict[str, Any]], dict[str, str]]
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


def read_json(path: Path, kind: DataKind) -> dict[str, Any]:
  """Reads a JSON object that a preparation wrote.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If the file is damaged.
  """
  try:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError('not a JSON object')
    return value
  except ValueError as e:
    raise ValueError(f'{path} is damaged ({e}); {kind.remedy}') from e


def read_meta(data_dir: Path, kind: DataKind) -> dict[str, Any]:
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
        f' -m {_binaries()}.{kind.binary} {kind.example}--output={data_dir}'
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


def _binaries() -> str:
  """Returns the package of the binaries: where installed, or in a clone."""
  installed = 'codistill_jax.experiments'
  return installed if importlib.util.find_spec(installed) else 'experiments'


def open_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, kind: DataKind
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


class Stack:
  """Arrays on disk, read as one along their first axis."""

  def __init__(self, arrays: Sequence[np.ndarray]):
    self._arrays = list(arrays)
    self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if self._arrays else 0

  def take(self, places: np.ndarray) -> np.ndarray:
    """Reads what lies at some places; the result has their shape in front."""
    flat, first = places.reshape(-1), self._arrays[0]
    found = np.empty((len(flat), *first.shape[1:]), first.dtype)
    array_of = np.searchsorted(self._ends, flat, side='right')
    for i in np.unique(array_of):
      here = np.flatnonzero(array_of == i)
      start = self._ends[i] - len(self._arrays[i])
      found[here] = self._arrays[i].take(flat[here] - start, axis=0)
    return found.reshape(*places.shape, *first.shape[1:])

  def blocks(self, most: int = 1 << 20) -> Iterator[np.ndarray]:
    """Reads all in order, at most so many at a time."""
    for array in self._arrays:
      for start in range(0, len(array), most):
        yield array[start : start + most]


# --- checksums ----------------------------------------------------------------


def verify(data_dir: str | os.PathLike, kind: DataKind) -> tuple[int, int]:
  """Reads every file of a data set and compares it with its SHA-256.

  Returns:
    How many files there are, and their bytes.

  Raises:
    FileNotFoundError: If the data set or a file of it is missing.
    ValueError: If a file has changed since it was written.
  """
  data_dir, size = files.on_disk(data_dir), 0
  expected = kind.files(read_meta(data_dir, kind))
  for name, sha256 in expected.items():
    path = data_dir / name
    if not path.exists():
      raise FileNotFoundError(f'{path} is missing; {kind.remedy}')
    found = files.digest(path)
    if found.sha256 != sha256:
      raise ValueError(
          f'{path} is damaged (SHA-256 {found.sha256[:12]}, expected'
          f' {sha256[:12]}); {kind.remedy}'
      )
    size += found.size
  return len(expected), size


def check_source(paths: Sequence[epath.Path], list_path: str) -> int:
  """Compares files with a list of `sha256sum`; reads each of them once.

  Args:
    paths: Each must be in the list: under the path that leads to it from the
      list's folder, as `sha256sum` there would have written it, or under its
      own path or name.
    list_path: The list.

  Returns:
    How many bytes were read.

  Raises:
    FileNotFoundError: If there is no such list.
    ValueError: If the list is malformed; if a file is not listed, or differs.
  """
  list_path = epath.Path(files.absolute(list_path))
  listed = _read_list(list_path)
  expected = []
  for path in paths:
    names = [str(path), path.name]
    if path.is_relative_to(list_path.parent):
      names.insert(0, str(path.relative_to(list_path.parent)))
    known = [listed[name] for name in names if name in listed]
    if not known:
      raise ValueError(
          f'{list_path} has no checksum of {path}; add it with sha256sum, or'
          ' leave --checksums out.'
      )
    expected.append(known[0])
  size = 0
  # Hashing leaves the interpreter free.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    found = pool.map(files.digest, paths)
    for path, sha256, digest in zip(paths, expected, found):
      if sha256 != digest.sha256:
        pool.shutdown(wait=False, cancel_futures=True)
        raise ValueError(
            f'{path} has the SHA-256 {digest.sha256}, but {list_path} says'
            f' {sha256}; load the file again.'
        )
      size += digest.size
  return size


def _read_list(path: epath.Path) -> dict[str, str]:
  """Reads a list that `sha256sum` wrote: file name -> SHA-256."""
  found = {}
  for number, line in enumerate(path.read_text().splitlines(), 1):
    match = _LINE.fullmatch(line)
    if match:
      found[match[2].removeprefix('./')] = match[1].lower()
    elif line.strip() and not line.startswith('#'):
      raise ValueError(
          f'{path}, line {number}: expected a SHA-256, two spaces and a file'
          ' name, as sha256sum writes them.'
      )
  return found
