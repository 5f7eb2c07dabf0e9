"""Blocks of whole lines of large files, plain or gzip, in bounded memory.

Made for parsing with numpy, a megabyte at a time. No damage ends the reading: a
line without end is cut, and what a damaged gzip file has before the damage is
given, the torn line at its end left out.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from etils import epath

# Longer lines are cut to one byte more, by which they are known.
MAX_LINE = 4096

_BLOCK = 1 << 20
_BOM = b'\xef\xbb\xbf'
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


class Block(NamedTuple):
  """Some lines.

  Attributes:
    data: Whole lines, each with a newline at its end.
    first: Number of the first line, counted over all files.
    lines: How many.
    damaged_file: The index of a file whose rest cannot be read, or None; such
      a block has no lines.
  """

  data: bytes
  first: int
  lines: int
  damaged_file: int | None = None


def read_blocks(
    paths: Sequence[epath.Path], start: int = 0, stop: int | None = None
) -> Iterator[Block]:
  """All lines from number `start` to before number `stop`.

  Files that were damaged before `start` are named again.
  """
  position = 0
  for index, path in enumerate(paths):
    for data in _file_blocks(path):
      if data is None:
        yield Block(b'', position, 0, index)
        continue
      if stop is not None and position >= stop:
        return  # Not before: damage right behind the last line is seen.
      block = Block(data, position, data.count(b'\n'))
      position += block.lines
      block = cut(block, start, position if stop is None else stop)
      if block.lines:
        yield block


def count_lines(paths: Sequence[epath.Path]) -> int:
  """The number of lines of all files, damaged ones as far as they go."""
  return sum(block.lines for block in read_blocks(paths))


def cut(block: Block, start: int, stop: int) -> Block:
  """The lines of a block with numbers from `start` to before `stop`."""
  start = max(start, block.first)
  stop = min(stop, block.first + block.lines)
  if stop <= start:
    return Block(b'', start, 0)
  if stop - start == block.lines:
    return block
  ends = np.flatnonzero(np.frombuffer(block.data, np.uint8) == ord('\n')) + 1
  ends = np.concatenate([[0], ends])
  begin, end = ends[start - block.first], ends[stop - block.first]
  return Block(block.data[begin:end], start, stop - start)


def cut_every(
    blocks: Iterable[Block], lines: int
) -> Iterator[tuple[Block, bool]]:
  """The same lines in blocks that never reach over a multiple of `lines`.

  Yields:
    A block, and whether it ends at such a multiple.
  """
  for block in blocks:
    stop = block.first + block.lines
    while block.lines:
      bound = (block.first // lines + 1) * lines
      yield cut(block, block.first, bound), bound <= stop
      block = cut(block, bound, stop)
    if block.damaged_file is not None:
      yield block, False


def _file_blocks(path: epath.Path) -> Iterator[bytes | None]:
  """Whole lines of one file; None at the end if the rest is damaged."""
  with path.open('rb') as raw:
    stream = gzip.GzipFile(fileobj=raw) if path.suffix == '.gz' else raw
    rest, first = b'', True
    for data in _chunks(stream):
      if data is None:
        yield None
        return
      if first:
        data, first = data.removeprefix(_BOM), False
      head, newline, tail = data.rpartition(b'\n')
      if newline:
        yield rest + head + newline
        rest = b''
      # A line without end is cut, or it would fill the memory.
      rest = (rest + tail)[: MAX_LINE + 1]
    if rest:
      yield rest + b'\n'


def _chunks(stream: IO[bytes]) -> Iterator[bytes | None]:
  """The content in pieces of about a megabyte; None where damage begins."""
  parts, size, more = [], 0, True
  while more:
    try:
      # A little at a time: what comes before the damage is then not lost.
      part = stream.read1(_BLOCK)
      damaged = False
    except _DAMAGE:
      part, damaged = b'', True
    parts.append(part)
    size += len(part)
    more = bool(part)
    if size >= _BLOCK or (size and not more):
      yield b''.join(parts)
      parts, size = [], 0
    if damaged:
      yield None
