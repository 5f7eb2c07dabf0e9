"""Records of files: lines, blocks of lines, whole files, pages of WET files.

A record is some bytes, or a `Reject` that says why they cannot be used: real
data, which always has a broken line somewhere, is counted and not fatal. A
record's number never changes. No more than `limit` bytes of a record are ever
held: a longer one is read past, in pieces.

What a file is, its first bytes say and not its name: text, plain or compressed
(gzip, bzip2, xz, Zstandard), is read; an archive, a table, a document of an
office or text in another encoding than UTF-8 is refused by name. Nothing of a
tar archive would fail to be read as text, its heads and padding included.

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

import bz2
import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple, cast

from etils import epath

from codistill_jax.storage import files


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
_HEAD = 512  # Bytes that tell what a file is: the head of a tar archive.

# How a file begins, and what it is.
_COMPRESSED = {
    rb'\x1f\x8b': 'gzip',
    rb'BZh[1-9](1AY&SY|\x17rE8P\x90)': 'bzip2',
    rb'\xfd7zXZ\x00|\x5d\x00\x00': 'xz',
    rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18': 'Zstandard',
}
_FOREIGN = {
    rb'WARC/\d': 'WARC records, and WET files are named as wet:PATH_OR_GLOB',
    rb'PK[\x03\x05\x07]': 'a zip archive or a document of an office',
    rb"7z\xbc\xaf'\x1c": 'a 7z archive',
    rb'Rar!\x1a\x07': 'a rar archive',
    rb'07070[127][0-9A-Fa-f]{8}': 'a cpio archive',
    rb'!<arch>\n': 'an ar archive',
    rb'\x04"M\x18': 'compressed by LZ4',
    rb'\x1f[\x9d\xa0]': 'compressed by compress',
    rb'PAR1[\x00-\x1f]': 'a Parquet table, which hf:FOLDER reads',
    rb'ARROW1\x00': 'an Arrow table, which hf:FOLDER reads',
    rb'%PDF-': 'a PDF document',
    rb'\{\\rtf': 'an RTF document',
    rb'SQLite format 3\x00': 'an SQLite data base',
    rb'\xff\xfe\x00\x00|\x00\x00\xfe\xff': 'in UTF-32',
    rb'\xff\xfe|\xfe\xff': 'in UTF-16',
    **{mark: f'compressed by {name}' for mark, name in _COMPRESSED.items()},
}
# What decompressing damaged data raises; but see `check_damage`.
DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error)
_PIECE = 1 << 20
_GZIP_MEMBER = b'\x1f\x8b\x08'
_PLAIN_RECORD = b'\nWARC/1.'
_OF_WARC = ('request', 'response', 'resource', 'revisit', 'metadata')


def expand(pattern: str) -> list[epath.Path]:
  """Returns the files that a path or a glob pattern names, sorted.

  Raises:
    ValueError: If it names a directory, or folders of any depth.
    FileNotFoundError: If there is none.
  """
  if '**' in pattern:
    raise ValueError(f'{pattern} has ** in it; use * for each folder.')
  if files.is_remote(pattern):
    files.absolute(pattern)  # Raises if it is out of reach.
  path = epath.Path(pattern).expanduser()
  if path.is_dir():
    raise ValueError(
        f'{pattern} is a directory; name the files in it, as {pattern}/*.'
    )
  if path.exists():  # A name with brackets in it may be a file all the same.
    return [_seekable(path)]
  parts = path.parts
  fixed = list(
      itertools.takewhile(lambda part: not glob.has_magic(part), parts)
  )
  if len(fixed) == len(parts):
    raise FileNotFoundError(f'There is no file {pattern}.')
  root = epath.Path(*fixed) if fixed else epath.Path('.')
  found = root.glob('/'.join(parts[len(fixed) :])) if root.exists() else []
  paths = sorted(_seekable(path) for path in found if not path.is_dir())
  if not paths:
    raise FileNotFoundError(f'No file matches {pattern}.')
  return paths


def _seekable(path: epath.Path) -> epath.Path:
  if os.path.exists(path) and not os.path.isfile(path):
    raise ValueError(
        f'{path} is a pipe or a device, and a source is read several times;'
        ' write it to a file.'
    )
  return path


def compression_of(path: epath.Path, kind: str = 'text') -> str | None:
  """Returns how a file of text is compressed, by its first bytes; None: not.

  Args:
    path: The file.
    kind: What is expected: 'wet' for WARC records, 'jsonl' for JSON lines.

  Raises:
    ValueError: If it is no text, or that of another kind.
  """
  with path.open('rb') as f:
    head = f.read(_HEAD)
    compression = _named(_COMPRESSED, head)
    if compression:
      f.seek(0)
      try:
        head = _decompressed(f, compression).read(_HEAD)
      except DAMAGE as e:
        check_damage(e)
        return compression  # It is counted where the file is read.
  if kind == 'wet' and head.startswith(b'WARC/'):
    return compression
  found = _named(_FOREIGN, head)
  if found is None and _is_tar(head):
    found = 'a tar archive'
  if kind == 'jsonl' and head.removeprefix(_BOM).lstrip().startswith(b'['):
    found = 'a JSON array, and not an object a line'
  if found is None and kind != 'wet' and 16 * head.count(0) > len(head):
    found = 'binary data, or UTF-16 without a mark'
  if found is not None:
    where = f'What {path} holds, compressed by {compression},'
    raise ValueError(
        f'{where if compression else path} is {found}; expected text in UTF-8,'
        ' plain or compressed once. Unpack, extract or convert it, and name'
        ' what comes out.'
    )
  return compression


def _named(marks: dict[bytes, str], head: bytes) -> str | None:
  return next((marks[mark] for mark in marks if re.match(mark, head)), None)


def _is_tar(head: bytes) -> bool:
  try:
    tarfile.TarInfo.frombuf(head, 'utf-8', 'surrogateescape')
  except tarfile.HeaderError:
    return False
  return True


def _decompressed(f: IO[bytes], compression: str | None) -> IO[bytes]:
  match compression:
    case 'gzip':
      return cast(IO[bytes], gzip.GzipFile(fileobj=f))
    case 'bzip2':
      return bz2.BZ2File(f)
    case 'xz':
      return lzma.LZMAFile(f)
    case 'Zstandard':
      try:
        import pyarrow
      except ImportError as e:
        raise ValueError(
            'Files compressed by Zstandard need the package pyarrow: pip'
            ' install pyarrow.'
        ) from e
      stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(f), 'zstd')
      return io.BufferedReader(stream)
  return f


def check_damage(error: Exception) -> None:
  """Raises one of `DAMAGE` again if a disk failed, which has an errno."""
  if isinstance(error, OSError) and error.errno is not None:
    raise error


@contextlib.contextmanager
def open_text(path: epath.Path) -> Iterator[IO[bytes]]:
  """Opens a file of text, decompressed as its first bytes say.

  Raises:
    ValueError: If it is no text; see `compression_of`.
  """
  compression = compression_of(path)
  with path.open('rb') as raw:
    yield _decompressed(raw, compression)


def lines(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads lines with their ends; a damaged file ends with a Reject.

  What a compressed file has before the damage is given, without the torn line.
  """
  with open_text(path) as f:
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
    except DAMAGE as e:
      check_damage(e)
      yield DAMAGED_FILE


def _skip_line(f: IO[bytes]) -> None:
  """Reads to the end of the line, or of the file."""
  while (piece := f.readline(_PIECE)) and not piece.endswith(b'\n'):
    pass


def json_lines(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads lines that are not blank."""
  for line in lines(path, limit):
    if isinstance(line, Reject) or line.strip():
      yield line


def text_blocks(
    path: epath.Path, limit: int, start: re.Pattern[str] | None = None
) -> Iterator[bytes | Reject]:
  """Reads blocks of lines, each without its last end of line.

  Args:
    path: The file.
    limit: Bytes of a block.
    start: A block starts with each line whose beginning matches, and holds
      blank lines too; None: blank lines separate blocks.

  Raises:
    ValueError: If no line matches, or the file is no text.
  """
  starts = 0

  def starts_before(line: bytes | Reject) -> int:
    nonlocal starts
    if start and isinstance(line, bytes):
      text = line.decode('utf-8', 'replace').rstrip('\r\n')
      starts += start.match(text) is not None
    return starts

  is_blank = lambda line: isinstance(line, bytes) and not line.strip()
  key, read = starts_before if start else is_blank, False
  for blank, block in itertools.groupby(lines(path, limit), key):
    read = True
    if blank and not start:
      continue
    kept: list[bytes] = []
    size = 0
    for line in block:
      if line == DAMAGED_FILE:
        yield DAMAGED_FILE  # And not the block that it cuts short.
        return
      size += limit + 1 if line == TOO_LONG else len(line)
      if size <= limit and isinstance(line, bytes):
        kept.append(line)
      else:
        kept.clear()
    text = b''.join(kept).rstrip(b'\r\n')
    if size > limit:
      yield TOO_LONG
    elif text.strip():  # Blank lines may stand before the first start.
      yield text
  if start and read and not starts:
    raise ValueError(
        f'{path} has no line that document_start={start.pattern} matches.'
    )


def whole_file(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
  """Reads the content of a file."""
  with open_text(path) as f:
    try:
      # Not in one call: a buffer of `limit` bytes would be made beforehand.
      pieces: list[bytes] = []
      size = 0
      while size <= limit and (piece := f.read(_PIECE)):
        piece = piece if pieces else piece.removeprefix(_BOM)
        pieces.append(piece)
        size += len(piece)
    except DAMAGE as e:
      check_damage(e)
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
    path: A WET file, plain or gzip.
    limit: Bytes of a record; a longer one is skipped without being held.

  Yields:
    The content; or a Reject: 'too_long', 'no_conversion' (a record of another
    type), or, once for each stretch of the file that cannot be read,
    'damaged_record', or 'damaged_file' if nothing can be read behind it.

  Raises:
    ValueError: If the package fastwarc is missing, or it is another file.
    OSError: If the file cannot be read at all.
  """
  compression = compression_of(path, 'wet')
  if compression not in (None, 'gzip'):
    raise ValueError(
        f'{path} is compressed by {compression}, expected a WET file, plain or'
        ' gzip; decompress it.'
    )
  with path.open('rb') as f:
    mark = _GZIP_MEMBER if compression else _PLAIN_RECORD
    start, in_damage = 0, False
    while start is not None:
      f.seek(start)
      try:
        for record in _wet_records(path, f, start, limit):
          if in_damage:
            yield DAMAGED_RECORD
          in_damage = False
          if record is not None:
            yield record
        break
      except _DamageError as e:
        in_damage = True
        start = _find_mark(f, mark, e.position + 1)
    if in_damage:
      yield DAMAGED_FILE


def _wet_records(
    path: epath.Path, f: IO[bytes], start: int, limit: int
) -> Iterator[bytes | Reject | None]:
  """Records from `start` to the first damage; None for `warcinfo`."""
  try:
    from fastwarc.warc import ArchiveIterator, WarcRecordType
  except ImportError as e:
    raise ValueError(
        'Reading WET files needs the package fastwarc: pip install fastwarc.'
    ) from e
  position, first = start, start == 0
  try:
    for record in ArchiveIterator(f, parse_http=False):
      position = start + record.stream_pos
      # Of a length that is no number, and of none at all, FastWARC makes 0.
      declared = record.headers.get('Content-Length') or ''
      if declared.strip() != str(record.content_length):
        raise _DamageError(position)
      kind = record.record_type
      if kind == WarcRecordType.warcinfo:
        yield None
        continue
      type_ = record.headers.get('WARC-Type')
      if first and type_ in _OF_WARC:
        raise ValueError(
            f'{path} begins with a record of type {type_}: a WARC or WAT file,'
            ' with pages as they were sent, HTML and all. Expected a WET file,'
            ' whose records are of type conversion.'
        )
      first = False
      if kind == WarcRecordType.conversion:
        yield _page(record, limit, position)
      else:
        yield Reject('no_conversion')
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
