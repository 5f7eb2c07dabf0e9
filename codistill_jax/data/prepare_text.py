"""A preparation of text: source -> filters -> tokenizer -> token shards."""

import collections
import functools
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax.data import (
    order,
    paragraph_ids,
    prepare,
    records,
    shards,
    sources,
)
from codistill_jax.data import tokenizer as tokenizer_lib
from codistill_jax.data.prepare import Map
from codistill_jax.data.records import TOO_LONG, Raw, Record, Reject
from codistill_jax.data.sources import DEFAULT_MAX_DOCUMENT_BYTES, Source
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer
from codistill_jax.storage import files

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_TOKENIZER_BYTES = 50_000_000
DEFAULT_SHARD_TOKENS = 1 << 24

# A piece has about as many bytes as make a shard, fewer of a source that is
# small, so that there is something to do for all workers.
_BYTES_PER_TOKEN = 4
_PIECES = 32
_LEAST_BYTES = 1 << 22
_MOST_RECORDS = 1 << 20  # Rejects have no bytes.

_FROM = 'documents of '  # Key of their number, before the name of a source.

# A batch: what a worker decodes at a time, for the tokenizer.
_BATCH_RECORDS = 1024
_BATCH_BYTES = 1 << 20


def prepare_text(
    output: str | os.PathLike,
    source: str | Sequence[str] = 'bible',
    *,
    document_start: str | None = None,
    validation_source: str | None = None,
    test_source: str | None = None,
    text_key: str = 'text',
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    tokenizer_bytes: int = DEFAULT_TOKENIZER_BYTES,
    validation_fraction: float | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    max_documents: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    filters: Sequence[str] = (),
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    paragraphs: str | None = None,
    paragraphs_sha256: str | None = None,
    paragraph_unit: str = 'line',
    source_checksums: str | None = None,
    max_rejected: float = 0.05,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares text, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: See `sources.open_source`; several are mixed, in shares of their
      documents if each is a weight, * and a source, as '0.7*jsonl:PATH'.
    paragraphs: --paragraph_ids; paragraphs_sha256: --paragraph_ids_sha256.
    filters: --filter, each of them.
    source_checksums: --checksums.
    report: Takes a line about what goes on. All others: as the flags of the
      same names of `experiments.prepare_data`.

  Returns, raises: As `prepare.run`.
  """
  specs, weights = _weighted([source] if isinstance(source, str) else source)
  own = {'validation': validation_source, 'test': test_source}
  if validation_fraction is None:
    validation_fraction = 0.0 if validation_source else 0.05
  fractions = {'validation': validation_fraction, 'test': test_fraction}
  for split, fraction in fractions.items():
    if fraction and own[split]:
      raise ValueError(
          f'{split}_source and {split}_fraction={fraction} both say what the'
          f' {split} split is; leave one out.'
      )
  if not (min(fractions.values()) >= 0 and sum(fractions.values()) < 1):
    raise ValueError(
        'validation_fraction and test_fraction must be in [0, 1), also'
        f' together; got {validation_fraction} and {test_fraction}.'
    )
  named = [*specs, *filter(None, own.values())]
  if document_start and not any(spec.startswith('text:') for spec in named):
    raise ValueError(
        'document_start is of plain text, but no source is; name one as'
        ' text:PATH_OR_GLOB or leave it out.'
    )
  config: dict[str, Any] = {
      'source': ' + '.join([source] if isinstance(source, str) else source),
      'document_start': document_start,
      'validation_source': validation_source,
      'test_source': test_source,
      'text_key': text_key,
      'vocab_size': vocab_size,
      'tokenizer_bytes': tokenizer_bytes,
      'validation_fraction': validation_fraction,
      'test_fraction': test_fraction or None,
      'seed': seed,
      'max_documents': max_documents,
      'shard_tokens': shard_tokens,
      'max_document_bytes': max_document_bytes,
  }
  prepare.check_counts(
      config,
      'vocab_size',
      'tokenizer_bytes',
      'max_documents',
      'shard_tokens',
      'max_document_bytes',
  )
  given = None
  if tokenizer:
    given = _load_tokenizer(tokenizer, vocab_size)
    config |= {'vocab_size': given.vocab_size, 'tokenizer_bytes': None}
  elif vocab_size is None:
    config['vocab_size'] = DEFAULT_VOCAB_SIZE
  parsed = [sources.parse_filter(spec) for spec in filters]
  listed = _open_list(paragraphs, paragraphs_sha256, paragraph_unit)
  config |= {
      'tokenizer': given.sha256 if given else None,
      'filters': [sources.filter_spec(one) for one in parsed],
      'paragraph_ids': listed.sha256 if listed else None,
      'paragraph_unit': paragraph_unit if listed else None,
  }

  apart = [split for split in shards.SPLITS if own.get(split)]

  def open_one(spec: str, listed: Any = None) -> Source:
    return sources.open_source(
        spec,
        text_key,
        document_start=document_start,
        max_document_bytes=max_document_bytes,
        paragraphs=listed,
        paragraph_unit=paragraph_unit,
    )

  def open_source() -> Source:
    sources.check_filters(parsed)
    return sources.join(
        [open_one(own[split] or '') for split in apart],
        [open_one(spec, listed) for spec in specs],
        weights,
    )

  asked_for = {'not_english', 'short', 'not_listed', 'file_not_listed'}
  if max_document_bytes < DEFAULT_MAX_DOCUMENT_BYTES:
    asked_for.add(TOO_LONG.reason)

  def reader(source: Source) -> _Reader:
    names = [*(own[split] or '' for split in apart), *specs]
    return _Reader(source.decode, parsed, apart, names, asked_for, config)

  recipe = prepare.Recipe(
      kind=shards.KIND,
      config=config,
      open_source=open_source,
      start=lambda source, process: _start(
          reader(source), given, report, source, process
      ),
      cut=functools.partial(_cut, shard_tokens),
      make=lambda source, known: functools.partial(
          _write_shards,
          files.on_disk(output),
          reader(source),
          known['tokenizer_sha256'],
      ),
      finish=functools.partial(_finish, config),
      asked_for=asked_for,
  )
  return prepare.run(
      output,
      recipe,
      source_checksums=source_checksums,
      max_rejected=max_rejected,
      workers=workers,
      report=report,
  )


def _weighted(given: Sequence[str]) -> tuple[list[str], list[float] | None]:
  """Splits '0.7*jsonl:PATH' into weights and sources; None: no weights."""
  pairs = [re.findall(r'(?s)^(?:([\d.]+)\*)?(.*)', one)[0] for one in given]
  numbers = [weight for weight, _ in pairs if weight]
  try:
    weights = [float(number) for number in numbers]
  except ValueError:
    weights = [0.0]
  if not given or 0 in weights or len(numbers) not in (0, len(given)):
    raise ValueError(
        'Expected a source, or several that all have a weight above 0 or none,'
        f' as 0.7*jsonl:PATH; got {", ".join(given) or "none"}.'
    )
  return [spec for _, spec in pairs], weights or None


def _load_tokenizer(
    path: str | os.PathLike, vocab_size: int | None
) -> Tokenizer:
  model = pathlib.Path(path).read_bytes()
  try:
    loaded = Tokenizer(model)
  except ValueError as e:
    raise ValueError(f'Cannot use the tokenizer {path}: {e}') from e
  if vocab_size not in (None, loaded.vocab_size):
    raise ValueError(
        f'{path} has {loaded.vocab_size} word pieces, not'
        f' vocab_size={vocab_size}; leave vocab_size out.'
    )
  return loaded


def _open_list(
    spec: str | None, sha256: str | None, unit: str
) -> paragraph_ids.ParagraphList | None:
  if unit not in paragraph_ids.UNITS:
    raise ValueError(
        f'paragraph_unit must be one of {", ".join(paragraph_ids.UNITS)}; got'
        f' {unit!r}.'
    )
  if spec is not None:
    return paragraph_ids.open_list(spec, sha256)
  if sha256 is not None:
    raise ValueError(
        f'paragraph_ids_sha256 is {sha256}, but there is no list of paragraphs'
        ' to compare with it; add paragraph_ids or leave it out.'
    )
  return None


# --- before the first piece --------------------------------------------------


class _Reader(NamedTuple):
  """What makes documents of raw records; can be pickled.

  Attributes:
    decode: Of the source.
    filters: In order.
    apart: Splits that the first sources are.
    names: Of all sources.
    asked_for: Reasons of rejects that are no damage.
    config: As stored.
  """

  decode: Callable[[sources.Part], Record]
  filters: Sequence[sources.Filter]
  apart: Sequence[str]
  names: Sequence[str]
  asked_for: Collection[str]
  config: dict[str, Any]

  def read(self, raw: sources.Part | Reject) -> tuple[str, Record]:
    """Returns the split of a record, '' of a Reject, and the record."""
    record = sources.decoded(self.decode, raw)
    record = sources.apply_filters(self.filters, record)
    if isinstance(record, Reject) or isinstance(raw, Reject):
      return '', record
    if raw.source < len(self.apart):
      return self.apart[raw.source], record
    config = self.config
    split = order.split_of(
        record,
        config['validation_fraction'],
        config['test_fraction'] or 0.0,
        config['seed'],
    )
    return split, record

  def reject(
      self, place: int, raw: sources.Part | Reject, record: Record
  ) -> tuple[int, str, str] | None:
    """Describes a record that was read, if it is broken."""
    if not isinstance(record, Reject) or record.reason in self.asked_for:
      return None
    content = raw if isinstance(raw, Reject) else raw.raw
    return prepare.rejected(place, record.reason, content)

  def read_batch(
      self, batch: Sequence[sources.Part | Reject]
  ) -> list[tuple[str, Record]]:
    return [self.read(raw) for raw in batch]


def _start(
    reader: _Reader,
    given: Tokenizer | None,
    report: Callable[[str], None],
    source: Source,
    process: Map,
) -> prepare.Start:
  """Finds the record of the last document; makes the tokenizer."""

  def read(stop: int | None) -> Iterator[tuple[str, Record]]:
    raw = itertools.islice(source.raw(), stop)
    batches = records.cut(raw, _BATCH_RECORDS, _BATCH_BYTES)
    return itertools.chain.from_iterable(process(reader.read_batch, batches))

  stop = reader.config['max_documents']
  if stop is not None:
    stop = _records_of(stop, read(None), reader.apart)
  try:
    model = given.model if given else _train(reader.config, read(stop), report)
  except tokenizer_lib.NoTextError as e:
    for place, raw in enumerate(source.raw()):
      if first := reader.reject(place, raw, reader.read(raw)[1]):
        raise ValueError(f'{e} The first is {prepare.quoted(*first)}.') from e
    raise
  return prepare.Start(
      {'tokenizer_sha256': hashlib.sha256(model).hexdigest()},
      stop,
      {shards.TOKENIZER: model},
  )


def _records_of(
    documents: int, read: Iterable[tuple[str, Record]], apart: Sequence[str]
) -> int | None:
  """Counts the records up to the last document to take; None: all.

  Those of splits that have a source of their own come first, and all count.
  """
  found = 0
  for count, (split, _) in enumerate(read, 1):
    found += bool(split) and split not in apart
    if found == documents:
      return count
  return None


def _train(
    config: dict[str, Any],
    read: Iterable[tuple[str, Record]],
    report: Callable[[str], None],
) -> bytes:
  """Trains a tokenizer on the beginning of the training split."""
  rejects: collections.Counter[str] = collections.Counter()

  def texts() -> Iterator[str]:
    remaining = config['tokenizer_bytes']
    for split, record in read:
      if isinstance(record, Reject):
        rejects[record.reason] += 1
      elif split == 'train':
        if remaining == config['tokenizer_bytes']:
          report(f'Training {config["vocab_size"]:,} word pieces.')
        yield record
        remaining -= len(record.encode('utf-8'))
        if remaining <= 0:
          return

  try:
    return tokenizer_lib.train(texts(), config['vocab_size'])
  except tokenizer_lib.NoTextError as e:
    raise tokenizer_lib.NoTextError(
        f'{config["source"]} has no document to train on; rejected records:'
        f' {prepare.counts_text(rejects)}.'
    ) from e


# --- pieces ------------------------------------------------------------------


def _cut(
    shard_tokens: int, source: Source, raw: Iterable[Raw]
) -> Iterator[list[Raw]]:
  size = _BYTES_PER_TOKEN * shard_tokens
  if source.size is not None:
    size = min(size, max(_LEAST_BYTES, source.size // _PIECES))
  return records.cut(raw, _MOST_RECORDS, size)


def _splits(config: dict[str, Any]) -> list[str]:
  """Returns the splits that are written, if they have no documents too."""
  test = config['test_fraction'] or config['test_source']
  return ['train', 'validation', *(['test'] if test else [])]


def _write_shards(
    output: pathlib.Path,
    reader: _Reader,
    tokenizer_sha256: str,
    number: int,
    piece: Sequence[sources.Part | Reject],
) -> dict[str, Any]:
  """Writes the shards of a piece, one of each split; describes them."""
  tokenizer = _loaded(output / shards.TOKENIZER, tokenizer_sha256)
  dtype = shards.token_dtype(tokenizer.vocab_size)
  rejects: collections.Counter[str] = collections.Counter()
  first = None
  names = _splits(reader.config)
  documents: dict[str, list[np.ndarray]] = {split: [] for split in names}
  counted = {'words': 0, 'bytes': 0}
  if len(reader.names) > 1:
    counted |= {_FROM + name: 0 for name in reader.names}
  sizes = {split: dict(counted) for split in names}
  raw: Any
  for place, raw in enumerate(piece):
    split, record = reader.read(raw)
    if isinstance(record, Reject):
      rejects[record.reason] += 1
      first = first or reader.reject(place, raw, record)
      continue
    tokens: list[Any] = [[START_ID], tokenizer.encode(record), [END_ID]]
    documents[split].append(np.concatenate(tokens).astype(dtype))
    sizes[split]['words'] += len(record.split())
    sizes[split]['bytes'] += len(record.encode('utf-8'))
    if len(reader.names) > 1:
      sizes[split][_FROM + reader.names[raw.source]] += 1
  splits = {
      split: (
          sizes[split]
          | shards.write_shard(output, split, number, documents[split], dtype)
      )
      for split in names
  }
  return {
      'records': len(piece),
      'rejects': rejects,
      'first': first,
      'splits': splits,
  }


@functools.lru_cache(maxsize=1)
def _loaded(path: pathlib.Path, sha256: str) -> Tokenizer:
  """Loads a tokenizer once for all pieces that a process makes."""
  del sha256  # It tells apart what lay there at different times.
  return Tokenizer(path.read_bytes())


# --- the result --------------------------------------------------------------


def _finish(
    config: dict[str, Any], meta: dict[str, Any], process: Map
) -> dict[str, Any]:
  del process
  found = {
      split: meta['splits'].get(split, {}).get('documents', 0)
      for split in _splits(config)
  }
  wanted = [
      split
      for split in found
      if split == 'train'
      or config[f'{split}_fraction']
      or config[f'{split}_source']
  ]
  if not all(found[split] for split in wanted):
    counts = ', '.join(f'{n:,} into {split}' for split, n in found.items())
    raise ValueError(
        f'Of {sum(found.values()):,} documents fell {counts}; a split that is'
        ' asked for must not be empty. Choose other fractions (0 for none) or'
        ' more documents, and another output.'
    )
  if config['max_documents'] is None:
    for key, count in _documents_from(meta).items():
      if not count:
        raise ValueError(
            f'{key.removeprefix(_FROM)} gave no document (rejects of all:'
            f' {prepare.counts_text(meta["rejects"])}); mend it or leave it'
            ' out, and choose another output.'
        )
  return {
      'vocab_size': config['vocab_size'],
      'tokenizer_sha256': meta['tokenizer_sha256'],
  }


def _documents_from(meta: dict[str, Any]) -> collections.Counter:
  """Returns how many documents came from each source, if there are several."""
  found: collections.Counter[str] = collections.Counter()
  for split in meta['splits'].values():
    found.update({k: n for k, n in split.items() if k.startswith(_FROM)})
  return found


def summary(meta: dict[str, Any]) -> str:
  """Returns a few lines about prepared text, of its `meta.json`."""
  lines = []
  for name, split in meta['splits'].items():
    # <s> and </s> are pieces of no word.
    pieces = split['tokens'] - 2 * split['documents']
    lines.append(
        f'{name}: {split["documents"]:,} documents, {split["words"]:,} words,'
        f' {split["bytes"]:,} bytes, {pieces:,} pieces'
        f' ({pieces / max(1, split["words"]):.3f} pieces per word),'
        f' {split["tokens"]:,} tokens, {len(split["shards"])} shards'
    )
  lines += [f'{key}: {n:,}' for key, n in _documents_from(meta).items()]
  lines.append(
      f'rejected records of {meta["records"]:,}:'
      f' {prepare.counts_text(meta["rejects"])}'
  )
  lines.append(
      f'tokenizer: {meta["vocab_size"]:,} word pieces, sha256'
      f' {meta["tokenizer_sha256"][:12]}'
  )
  return '\n'.join(lines)
