"""SHA-256 of files, and lists of them as `sha256sum` writes."""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Sequence

from etils import epath

_LINE = re.compile(r'\\?([0-9a-fA-F]{64}) [ *](.+)')
_PIECE = 1 << 20


def sha256_of(path: epath.Path | os.PathLike) -> str:
  """Returns the SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with epath.Path(path).open('rb') as f:
    while piece := f.read(_PIECE):
      digest.update(piece)
  return digest.hexdigest()


def read_list(path: epath.Path) -> dict[str, str]:
  """Reads a list that `sha256sum` wrote: file name -> SHA-256.

  Raises:
    FileNotFoundError: If there is no such list.
    ValueError: If a line is malformed, or two lines contradict each other.
  """
  found = {}
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if not line.strip() or line.startswith('#'):
      continue
    match = _LINE.fullmatch(line)
    if not match:
      raise ValueError(
          f'{path}, line {number}: expected a SHA-256, two spaces and a file'
          ' name, as sha256sum writes them.'
      )
    name, digest = match[2], match[1].lower()
    if found.setdefault(name, digest) != digest:
      raise ValueError(
          f'{path}, line {number}: {name} has another SHA-256 in a line before;'
          ' leave in the right one.'
      )
  return found


def check_files(files: Sequence[epath.Path], list_path: str) -> int:
  """Compares files with a list; reads each of them once.

  Args:
    files: Each must be in the list: under the path that leads to it from the
      list's folder, as `sha256sum` there would have written it, or under its
      own path or name.
    list_path: See `read_list`.

  Returns:
    How many bytes were read.

  Raises:
    ValueError: If a file is not listed, or differs.
  """
  list_path = epath.Path(list_path).expanduser()
  listed = read_list(list_path)
  expected = [_expected(path, listed, list_path) for path in files]
  # Hashing leaves the interpreter free.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    for path, digest, found in zip(files, expected, pool.map(sha256_of, files)):
      if digest != found:
        pool.shutdown(wait=False, cancel_futures=True)
        raise ValueError(
            f'{path} has the SHA-256 {found}, but {list_path} says {digest};'
            ' load the file again.'
        )
  return sum(path.stat().length for path in files)


def _expected(
    path: epath.Path, listed: dict[str, str], list_path: epath.Path
) -> str:
  names = [str(path), path.name]
  if path.is_relative_to(list_path.parent):
    names.insert(0, str(path.relative_to(list_path.parent)))
  for name in [*names, *(f'./{name}' for name in names)]:
    if name in listed:
      return listed[name]
  raise ValueError(
      f'{list_path} has no checksum of {path}; add it with sha256sum, or leave'
      ' --checksums out.'
  )
