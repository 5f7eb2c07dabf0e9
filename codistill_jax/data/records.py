"""Records of files: lines, blocks of lines, whole files; memory bounded.

A record is some bytes, or a `Reject` that says why they cannot be used: real
data, which always has a broken line somewhere, is counted and not fatal. A
record's number never changes. Files may be compressed (.gz, .xz). No more than
`limit` bytes of a record are ever held: a longer one is read past, in pieces.
"""

import glob
import gzip
import itertools
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from etils import epath


class Reject(NamedTuple):
  """A record that holds nothing usable.

  Attributes:
    reason: Why, as a name to count by.
      From any source: 'not_utf8', 'empty' (nothing but white space), 'too_long'
      (more bytes than allowed), 'damaged_file' (the rest of a compressed file
      cannot be read).
      From JSON: 'bad_json', 'no_text' (no string under the text key).
      From WET files: 'damaged_record', 'no_conversion' (a record of another
      type than extracted text); see `wet`.
      With a list of paragraphs: 'not_listed', 'file_not_listed', 'unnumbered',
      'missing_paragraphs'; see `paragraph_ids`.
      From filters: 'not_english', 'short'; see `filters`.
      From clicks: see `criteo`.
  """

  reason: str


Record = str | Reject  # A document, or why there is none.
Raw = bytes | str | Reject  # A record before it is decoded.

TOO_LONG = Reject('too_long')
DAMAGED_FILE = Reject('damaged_file')

_BOM = b'\xef\xbb\xbf'
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_PIECE = 1 << 20


def expand(pattern: str) -> list[epath.Path]:
  """Returns the files that a path or a glob pattern names, sorted.

  Raises:
    ValueError: If it names a directory, or folders of any depth.
    FileNotFoundError: If there is none.
  """
  if '**' in pattern:
    raise ValueError(f'{pattern} has ** in it; use * for each folder.')
  path = epath.Path(pattern).expanduser()
  if path.is_dir():
    raise ValueError(
        f'{pattern} is a directory; name the files in it, as {pattern}/*.'
    )
  if path.exists():  # A name with brackets in it may be a file all the same.
    return [path]
  parts = path.parts
  fixed = list(
      itertools.takewhile(lambda part: not glob.has_magic(part), parts)
  )
  if len(fixed) == len(parts):
    raise FileNotFoundError(f'There is no file {pattern}.')
  root = epath.Path(*fixed) if fixed else epath.Path('.')
  found = root.glob('/'.join(parts[len(fixed) :])) if root.exists() else []
  paths = sorted(path for path in found if not path.is_dir())
  if not paths:
    raise FileNotFoundError(f'No file matches {pattern}.')
  return paths


def lines(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads lines with their ends; a damaged file ends with a Reject.

  What a compressed file has before the damage is given, without the torn line.
  """
  with path.open('rb') as raw:
    f = _decompressed(path, raw)
    try:
      bom = _BOM
      # One byte more: a line of exactly `limit` bytes and its end is whole.
      while line := f.readline(limit + 1 + len(bom)):
        line, bom = line.removeprefix(bom), b''
        if len(line) - line.endswith(b'\n') <= limit:
          yield line
          continue
        if not line.endswith(b'\n'):
          _skip_line(f)
        yield TOO_LONG
    except _DAMAGE:
      yield DAMAGED_FILE


def _decompressed(path: epath.Path, raw: IO[bytes]) -> IO[bytes]:
  if path.suffix == '.gz':
    return gzip.GzipFile(fileobj=raw)
  if path.suffix == '.xz':
    return lzma.LZMAFile(raw)
  return raw


def _skip_line(f: IO[bytes]) -> None:
  """Reads to the end of the line, or of the file."""
  while (piece := f.readline(_PIECE)) and not piece.endswith(b'\n'):
    pass


def json_lines(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads lines that are not blank."""
  for line in lines(path, limit):
    if isinstance(line, Reject) or line.strip():
      yield line


def text_blocks(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads what blank lines separate; without the last end of line."""
  is_blank = lambda line: isinstance(line, bytes) and not line.strip()
  for blank, block in itertools.groupby(lines(path, limit), is_blank):
    if blank:
      continue
    kept, size = [], 0
    for line in block:
      if line == DAMAGED_FILE:
        yield line  # And not the block that it cuts short.
        return
      size += limit + 1 if line == TOO_LONG else len(line)
      if size <= limit:
        kept.append(line)
      else:
        kept.clear()
    text = b''.join(kept).rstrip(b'\r\n')
    yield TOO_LONG if size > limit else text


def whole_file(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads the content of a file."""
  with path.open('rb') as raw:
    try:
      # Not in one call: a buffer of `limit` bytes would be made beforehand.
      f, pieces, size = _decompressed(path, raw), [], 0
      while size <= limit and (piece := f.read(_PIECE)):
        piece = piece if pieces else piece.removeprefix(_BOM)
        pieces.append(piece)
        size += len(piece)
    except _DAMAGE:
      yield DAMAGED_FILE
      return
  text = b''.join(pieces)
  yield TOO_LONG if len(text) > limit else text


def cut(
    records: Iterable[Raw], most_records: int, most_size: float = float('inf')
) -> Iterator[list[Raw]]:
  """Cuts records into pieces: where one has so many, or bytes, it ends.

  A piece does not depend on what lies behind it.
  """
  piece, size = [], 0
  for record in records:
    piece.append(record)
    if not isinstance(record, Reject):
      size += len(record)
    if len(piece) >= most_records or size >= most_size:
      yield piece
      piece, size = [], 0
  if piece:
    yield piece
