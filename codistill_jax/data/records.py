"""Records of files: lines, blocks of lines, whole files, pages of WET files.

A record is some bytes, or a `Reject` that says why they cannot be used: real
data, which always has a broken line somewhere, is counted and not fatal. A
record's number never changes. Files may be compressed (.gz, .xz). No more than
`limit` bytes of a record are ever held: a longer one is read past, in pieces.

A WET file of Common Crawl has the text that was extracted from web pages. It is
a WARC file, usually one gzip member for each record. Its records of type
`conversion` are pages as plain text; the one of type `warcinfo` at its
beginning describes the file. FastWARC reads it (of resiliparse, Apache-2.0;
wheels for all systems). Beside warcio, the other library that is kept up, it
needs half the time for gzip and a fifth for plain files, reads files that were
compressed as a whole, which warcio refuses, and says how many bytes a record
should have had, which shows what was cut short. Neither goes on after damaged
gzip data, and what FastWARC can pass over (heads that it cannot parse) it does
not count. So that is done here: as each member (or, in plain files, each
record) can be read by itself, the next one that can be is looked for, and what
lies between is one Reject('damaged_record').
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
      type than extracted text).
      With a list of paragraphs: 'not_listed', 'file_not_listed', 'unnumbered',
      'missing_paragraphs'; see `paragraph_ids`.
      From filters: 'not_english', 'short'; see `sources`.
      From clicks: see `criteo`.
  """

  reason: str


Record = str | Reject  # A document, or why there is none.
Raw = bytes | str | Reject  # A record before it is decoded.

TOO_LONG = Reject('too_long')
DAMAGED_FILE = Reject('damaged_file')
DAMAGED_RECORD = Reject('damaged_record')

_BOM = b'\xef\xbb\xbf'
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_PIECE = 1 << 20
_GZIP_MEMBER = b'\x1f\x8b\x08'
_PLAIN_RECORD = b'\nWARC/1.'


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
      line = f.readline(limit + 1 + len(_BOM)).removeprefix(_BOM)
      while line:
        # The end of a line does not count; a file's last line may have none.
        if len(line) <= limit or line[limit:] == b'\n':
          yield line
        else:
          if not line.endswith(b'\n'):
            _skip_line(f)
          yield TOO_LONG
        line = f.readline(limit + 1)
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


def batched(records: Iterable[Raw], size: int) -> Iterator[list[Raw]]:
  """Cuts records into pieces of so many, of which the last may have fewer."""
  records = iter(records)
  return iter(lambda: list(itertools.islice(records, size)), [])


def cut(
    records: Iterable[Raw], most_records: int, most_size: float
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


# --- WET files ----------------------------------------------------------------


class _DamageError(Exception):
  """Nothing can be read between the record at `position` and the next one."""

  def __init__(self, position: int):
    super().__init__()
    self.position = position


def wet_pages(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads the content of each record but `warcinfo`, or why there is none.

  Args:
    path: A WET file; whether it is compressed is seen from its first bytes.
    limit: Bytes of a record; a longer one is skipped without being held.

  Yields:
    The content; or a Reject: 'too_long', 'no_conversion' (a record of another
    type: this is a WARC or WAT file), or 'damaged_record', once for each
    stretch of the file that cannot be read.

  Raises:
    ValueError: If the package fastwarc is missing.
    OSError: If the file cannot be read at all.
  """
  with path.open('rb') as f:
    mark = _GZIP_MEMBER if f.read(2) == _GZIP_MEMBER[:2] else _PLAIN_RECORD
    start, in_damage = 0, False
    while start is not None:
      f.seek(start)
      try:
        for record in _wet_records(f, start, limit):
          in_damage = False
          if record is not None:
            yield record
        return
      except _DamageError as e:
        if not in_damage:
          yield DAMAGED_RECORD
        in_damage = True
        start = _find_mark(f, mark, e.position + 1)


def _wet_records(
    f: IO[bytes], start: int, limit: int
) -> Iterator[bytes | Reject | None]:
  """Records from `start` to the first damage; None for `warcinfo`."""
  try:
    from fastwarc.warc import ArchiveIterator, WarcRecordType
  except ImportError as e:
    raise ValueError(
        'Reading WET files needs the package fastwarc: pip install fastwarc.'
    ) from e
  position = start
  try:
    for record in ArchiveIterator(f, parse_http=False):
      position = start + record.stream_pos
      # Of a length that is no number, and of none at all, FastWARC makes 0.
      declared = record.headers.get('Content-Length') or ''
      if declared.strip() != str(record.content_length):
        raise _DamageError(position)
      if record.record_type == WarcRecordType.warcinfo:
        yield None
      elif record.record_type != WarcRecordType.conversion:
        yield Reject('no_conversion')
      else:
        yield _page(record, limit, position)
    if _ends_within_member(f, position):
      raise _DamageError(position)
  except OSError as e:
    # Damage has no errno; a disk that fails has one.
    if e.errno is not None:
      raise
    raise _DamageError(position) from e


def _page(record, limit: int, position: int) -> bytes | Reject:
  content = record.reader.read(min(limit, record.content_length) + 1)
  if len(content) > limit:
    return TOO_LONG
  if len(content) != record.content_length:
    raise _DamageError(position)
  return content


def _ends_within_member(f: IO[bytes], position: int) -> bool:
  """Returns whether a gzip file is cut short behind its last whole record.

  FastWARC takes what ends within the head of a record for the end of the file.
  """
  f.seek(position)
  data = f.read(_PIECE)
  # Not of plain files; nor of one member for all, where positions mean little.
  if not data.startswith(_GZIP_MEMBER):
    return False
  member = None
  while data:
    member = member or zlib.decompressobj(wbits=31)
    try:
      member.decompress(data, _PIECE)
    except zlib.error:
      return True
    data = member.unconsumed_tail
    if member.eof:
      data, member = member.unused_data, None
    data = data or f.read(_PIECE)
  return member is not None


def _find_mark(f: IO[bytes], mark: bytes, start: int) -> int | None:
  """Finds where a member or a record begins, at `start` or after it."""
  begins = 1 if mark.startswith(b'\n') else 0
  at = max(0, start - begins)
  f.seek(at)
  window = b''
  while chunk := f.read(_PIECE):
    window += chunk
    found = window.find(mark)
    if found >= 0:
      return at + found + begins
    kept = min(len(window), len(mark) - 1)
    at += len(window) - kept
    window = window[len(window) - kept :]
  return None
