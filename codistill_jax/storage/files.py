"""Small files that are replaced as a whole, on disks and in object stores."""

import json
import math
import os
import secrets
from collections.abc import Mapping
from typing import Any

from etils import epath

PathLike = str | os.PathLike[str]

# JSON has no such numbers; these strings stand for them.
_NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def encode_number(value: float) -> float | str:
  """The value as JSON can hold it: NaN and infinities become strings."""
  if math.isnan(value):
    return 'NaN'
  if math.isinf(value):
    return 'Infinity' if value > 0 else '-Infinity'
  return value


def decode_numbers(tree: Any) -> Any:
  """Undoes `encode_number` in a tree of JSON values."""
  if isinstance(tree, str):
    return _NON_FINITE.get(tree, tree)
  if isinstance(tree, dict):
    return {k: decode_numbers(v) for k, v in tree.items()}
  if isinstance(tree, list):
    return [decode_numbers(v) for v in tree]
  return tree


def _encode_numbers(tree: Any) -> Any:
  if isinstance(tree, float):
    return encode_number(tree)
  if isinstance(tree, Mapping):
    return {k: _encode_numbers(v) for k, v in tree.items()}
  if isinstance(tree, list | tuple):
    return [_encode_numbers(v) for v in tree]
  return tree


def is_remote(path: PathLike) -> bool:
  """Whether a path names an object store (`gs://...`), not a mounted disk."""
  return '://' in os.fspath(path)


def write_bytes(path: PathLike, data: bytes) -> None:
  """Replaces a file as a whole: a reader sees the old bytes or the new ones."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    # An object appears as a whole, and cannot be renamed at one stroke.
    path.write_bytes(data)
    return
  # A name of its own per call: two writers must not share a temporary file.
  temporary = path.parent / f'.{path.name}.{secrets.token_hex(4)}.tmp'
  try:
    with temporary.open('wb') as f:
      f.write(data)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_json(path: PathLike, tree: Any) -> None:
  """Replaces a file by `tree` as JSON; NaN and infinities become strings."""
  text = json.dumps(_encode_numbers(tree), indent=2, allow_nan=False)
  write_bytes(path, (text + '\n').encode())


def read_json(path: PathLike) -> dict[str, Any] | None:
  """The JSON object in a file, or None where there is no such file.

  Raises:
    ValueError: If the file holds anything but one JSON object.
  """
  try:
    data = epath.Path(path).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None
  try:
    tree = json.loads(data)
  except ValueError as e:  # Also of bytes that are no text.
    raise ValueError(f'Expected JSON in {os.fspath(path)}, but: {e}.') from None
  if not isinstance(tree, dict):
    raise ValueError(
        f'Expected a JSON object in {os.fspath(path)}, got'
        f' {type(tree).__name__}.'
    )
  return decode_numbers(tree)
