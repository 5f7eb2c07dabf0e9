"""A preparation of text: source -> filters -> tokenizer -> token shards."""

import collections
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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
from codistill_jax.data.records import Raw, Record, Reject
from codistill_jax.data.sources import DEFAULT_MAX_DOCUMENT_BYTES, Source
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_TOKENIZER_BYTES = 50_000_000
DEFAULT_SHARD_TOKENS = 1 << 24

# A piece has about as many bytes as make a shard, fewer of a source that is
# small, so that there is something to do for all workers.
_BYTES_PER_TOKEN = 4
_PIECES = 32
_LEAST_BYTES = 1 << 22
_MOST_RECORDS = 1 << 20  # Rejects have no bytes.

# A batch: what a worker decodes at a time, for the tokenizer.
_BATCH_RECORDS = 1024
_BATCH_BYTES = 1 << 20


def prepare_text(
    output: str | os.PathLike,
    source: str = 'bible',
    *,
    text_key: str = 'text',
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    tokenizer_bytes: int = DEFAULT_TOKENIZER_BYTES,
    validation_fraction: float = 0.05,
    seed: int = 0,
    max_documents: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    filters: Sequence[str] = (),
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    paragraphs: str | None = None,
    paragraphs_sha256: str | None = None,
    paragraph_unit: str = 'line',
    source_checksums: str | None = None,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares text, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: See `sources.open_source`.
    paragraphs: --paragraph_ids; paragraphs_sha256: --paragraph_ids_sha256.
    filters: --filter, each of them.
    source_checksums: --checksums.
    report: Takes a line about what goes on. All others: as the flags of the
      same names of `experiments.prepare_data`.

  Returns, raises: As `prepare.run`.
  """
  if not 0 <= validation_fraction < 1:
    raise ValueError(
        f'validation_fraction must be in [0, 1); got {validation_fraction}.'
    )
  config = {
      'source': source,
      'text_key': text_key,
      'vocab_size': vocab_size,
      'tokenizer_bytes': tokenizer_bytes,
      'validation_fraction': validation_fraction,
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

  def open_source() -> Source:
    sources.check_filters(parsed)
    opened = sources.open_source(
        source,
        text_key,
        max_document_bytes=max_document_bytes,
        paragraphs=listed,
        paragraph_unit=paragraph_unit,
    )
    decode = functools.partial(_decode, opened.decode, parsed)
    return opened._replace(decode=decode)

  def make(source: Source, known: dict[str, Any]) -> prepare.Make:
    return functools.partial(
        _write_shards,
        pathlib.Path(output),
        source.decode,
        known['tokenizer_sha256'],
        config,
    )

  recipe = prepare.Recipe(
      kind=shards.KIND,
      config=config,
      open_source=open_source,
      start=functools.partial(_start, config, given, report),
      cut=functools.partial(_cut, shard_tokens),
      make=make,
      finish=functools.partial(_finish, config),
  )
  return prepare.run(
      output,
      recipe,
      source_checksums=source_checksums,
      workers=workers,
      report=report,
  )


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


def _decode(
    decode: Callable[[Any], Record],
    filters: Sequence[sources.Filter],
    raw: bytes | str,
) -> Record:
  """Decodes and filters a raw record."""
  return sources.apply_filters(filters, decode(raw))


def _decode_batch(
    decode: Callable[[Any], Record], batch: Sequence[Raw]
) -> list[Record]:
  return [sources.decoded(decode, raw) for raw in batch]


def _start(
    config: dict[str, Any],
    given: Tokenizer | None,
    report: Callable[[str], None],
    source: Source,
    process: Map,
) -> prepare.Start:
  """Finds the record of the last document; makes the tokenizer."""

  def read(stop: int | None) -> Iterator[Record]:
    raw = itertools.islice(source.raw(), stop)
    batches = records.cut(raw, _BATCH_RECORDS, _BATCH_BYTES)
    decode_batch = functools.partial(_decode_batch, source.decode)
    return itertools.chain.from_iterable(process(decode_batch, batches))

  stop = config['max_documents']
  if stop is not None:
    stop = _records_of(stop, read(None))
  model = given.model if given else _train(config, read(stop), report)
  return prepare.Start(
      {'tokenizer_sha256': hashlib.sha256(model).hexdigest()},
      stop,
      {shards.TOKENIZER: model},
  )


def _records_of(documents: int, read: Iterable[Record]) -> int | None:
  """Counts the records that hold the first so many documents; None: all."""
  found = 0
  for count, record in enumerate(read, 1):
    found += not isinstance(record, Reject)
    if found == documents:
      return count
  return None


def _train(
    config: dict[str, Any],
    read: Iterable[Record],
    report: Callable[[str], None],
) -> bytes:
  """Trains a tokenizer on the beginning of the training split."""
  rejects = collections.Counter()
  texts = _training_texts(config, read, rejects)
  first = next(texts, None)
  if first is None:
    raise ValueError(
        f'{config["source"]} has no document to train on; rejected records:'
        f' {prepare.counts_text(rejects)}.'
    )
  report(f'Training {config["vocab_size"]:,} word pieces.')
  texts = itertools.chain([first], texts)
  return tokenizer_lib.train(texts, config['vocab_size'])


def _is_validation(text: str, config: dict[str, Any]) -> bool:
  fraction, seed = config['validation_fraction'], config['seed']
  return order.in_validation(text, fraction, seed)


def _training_texts(
    config: dict[str, Any],
    read: Iterable[Record],
    rejects: collections.Counter,
) -> Iterator[str]:
  remaining = config['tokenizer_bytes']
  for record in read:
    if isinstance(record, Reject):
      rejects[record.reason] += 1
    elif not _is_validation(record, config):
      yield record
      remaining -= len(record.encode('utf-8'))
      if remaining <= 0:
        return


# --- pieces ------------------------------------------------------------------


def _cut(
    shard_tokens: int, source: Source, raw: Iterable[Raw]
) -> Iterator[list[Raw]]:
  size = _BYTES_PER_TOKEN * shard_tokens
  if source.size is not None:
    size = min(size, max(_LEAST_BYTES, source.size // _PIECES))
  return records.cut(raw, _MOST_RECORDS, size)


def _write_shards(
    output: pathlib.Path,
    decode: Callable[[Any], Record],
    tokenizer_sha256: str,
    config: dict[str, Any],
    number: int,
    piece: Sequence[Raw],
) -> dict[str, Any]:
  """Writes the shards of a piece, one of each split; describes them."""
  tokenizer = _loaded(output / shards.TOKENIZER, tokenizer_sha256)
  dtype = shards.token_dtype(tokenizer.vocab_size)
  rejects = collections.Counter()
  documents = {split: [] for split in shards.SPLITS}
  sizes = {split: {'words': 0, 'bytes': 0} for split in shards.SPLITS}
  for raw in piece:
    record = sources.decoded(decode, raw)
    if isinstance(record, Reject):
      rejects[record.reason] += 1
      continue
    split = 'validation' if _is_validation(record, config) else 'train'
    tokens = [[START_ID], tokenizer.encode(record), [END_ID]]
    documents[split].append(np.concatenate(tokens).astype(dtype))
    sizes[split]['words'] += len(record.split())
    sizes[split]['bytes'] += len(record.encode('utf-8'))
  splits = {
      split: (
          sizes[split]
          | shards.write_shard(output, split, number, documents[split], dtype)
      )
      for split in shards.SPLITS
  }
  return {'records': len(piece), 'rejects': rejects, 'splits': splits}


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
  wanted = config['validation_fraction'] > 0
  train, validation = (
      meta['splits'].get(split, {}).get('documents', 0)
      for split in shards.SPLITS
  )
  if not train or (wanted and not validation):
    raise ValueError(
        f'Of {train + validation} documents, {train} fell into the training'
        f' and {validation} into the validation split; choose another'
        ' validation_fraction (0 for none) or more documents, and another'
        ' output.'
    )
  return {
      'vocab_size': config['vocab_size'],
      'tokenizer_sha256': meta['tokenizer_sha256'],
  }


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
  lines.append(
      f'rejected records of {meta["records"]:,}:'
      f' {prepare.counts_text(meta["rejects"])}'
  )
  lines.append(
      f'tokenizer: {meta["vocab_size"]:,} word pieces, sha256'
      f' {meta["tokenizer_sha256"][:12]}'
  )
  return '\n'.join(lines)
