"""WET files of Common Crawl: the text that was extracted from web pages.

A WET file is a WARC file, usually one gzip member for each record. Its records
of type `conversion` are pages as plain text; the one of type `warcinfo` at its
beginning describes the file.

FastWARC reads them (of resiliparse, Apache-2.0; wheels for all systems). Beside
warcio, the other library that is kept up, it needs half the time for gzip and a
fifth for plain files, reads files that were compressed as a whole, which warcio
refuses, and says how many bytes a record should have had, which shows what was
cut short. Neither goes on after damaged gzip data, and what FastWARC can pass
over (heads that it cannot parse) it does not count. So that is done here: as
each member (or, in plain files, each record) can be read by itself, the next
one that can be is looked for, and what lies between is one
Reject('damaged_record').
"""

import zlib
from collections.abc import Iterator
from typing import IO

from etils import epath

from codistill_jax.data.records import TOO_LONG, Reject

DAMAGED = Reject('damaged_record')

_GZIP_MEMBER = b'\x1f\x8b\x08'
_PLAIN_RECORD = b'\nWARC/1.'
_CHUNK = 1 << 20


class _DamageError(Exception):
  """Nothing can be read between the record at `position` and the next one."""

  def __init__(self, position: int):
    super().__init__()
    self.position = position


def wet_records(path: epath.Path, limit: int) -> Iterator[bytes | Reject]:
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
        for record in _readable(f, start, limit):
          in_damage = False
          if record is not None:
            yield record
        return
      except _DamageError as e:
        if not in_damage:
          yield DAMAGED
        in_damage = True
        start = _find(f, mark, e.position + 1)


def _readable(
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
        yield _content(record, limit, position)
    if _ends_within_member(f, position):
      raise _DamageError(position)
  except OSError as e:
    # Damage has no errno; a disk that fails has one.
    if e.errno is not None:
      raise
    raise _DamageError(position) from e


def _content(record, limit: int, position: int) -> bytes | Reject:
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
  data = f.read(_CHUNK)
  # Not of plain files; nor of one member for all, where positions mean little.
  if not data.startswith(_GZIP_MEMBER):
    return False
  member = None
  while data:
    member = member or zlib.decompressobj(wbits=31)
    try:
      member.decompress(data, _CHUNK)
    except zlib.error:
      return True
    data = member.unconsumed_tail
    if member.eof:
      data, member = member.unused_data, None
    data = data or f.read(_CHUNK)
  return member is not None


def _find(f: IO[bytes], mark: bytes, start: int) -> int | None:
  """Finds where a member or a record begins, at `start` or after it."""
  begins = 1 if mark.startswith(b'\n') else 0
  at = max(0, start - begins)
  f.seek(at)
  window = b''
  while chunk := f.read(_CHUNK):
    window += chunk
    found = window.find(mark)
    if found >= 0:
      return at + found + begins
    kept = min(len(window), len(mark) - 1)
    at += len(window) - kept
    window = window[len(window) - kept :]
  return None
