"""A preparation of text: source -> filters -> tokenizer -> token shards.

Everything streams; a preparation that was killed at any moment goes on when it
is called again with the same arguments, and ends with the same files as one
that was not, whatever the number of workers. `rounds` says how. `meta.json`,
written at the very end, makes the directory a data set.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from codistill_jax.data import (
    checksums,
    prepare_settings,
    processing,
    rounds,
    shards,
    sources,
)
from codistill_jax.data import filters as filters_lib
from codistill_jax.data import tokenizer as tokenizer_lib
from codistill_jax.data.prepare_settings import Settings
from codistill_jax.data.prepare_summary import counts_text
from codistill_jax.data.records import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    Reject,
    Source,
)
from codistill_jax.data.tokenizer import Tokenizer
from codistill_jax.data.workers import Workers
from codistill_jax.storage import leases


def prepare(
    output: str | os.PathLike,
    source: str = 'bible',
    *,
    text_key: str = 'text',
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    tokenizer_bytes: int = prepare_settings.DEFAULT_TOKENIZER_BYTES,
    validation_fraction: float = 0.05,
    seed: int = 0,
    max_documents: int | None = None,
    shard_tokens: int = prepare_settings.DEFAULT_SHARD_TOKENS,
    filters: Sequence[str] = (),
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    paragraphs: str | None = None,
    paragraphs_sha256: str | None = None,
    paragraph_unit: str = 'line',
    source_checksums: str | None = None,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares data, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: See `sources.open_source`.
    text_key: Key or column that holds the text.
    vocab_size: Word pieces; None: 4096, or those of `tokenizer`.
    tokenizer: A tokenizer.model to use; None: train one.
    tokenizer_bytes: Train on the first so many bytes of the training split.
    validation_fraction: Share of the documents in the validation split.
    seed: Of the choice of validation documents.
    max_documents: Stop after so many documents of the source; None: all.
    shard_tokens: Close a shard at about so many tokens.
    filters: Of documents, in this order; see `filters`.
    max_document_bytes: Skip longer documents, as 'too_long'.
    paragraphs: Take these paragraphs of WET files only: a list of their IDs;
      see `paragraph_ids`.
    paragraphs_sha256: What that list should have; see
      `paragraph_ids.open_list`.
    paragraph_unit: See `paragraph_ids.paragraphs`.
    source_checksums: A file of `sha256sum`, with which all files of the source
      are compared first.
    workers: Processes that decode, filter and tokenise; 1: this process alone.
      More are spawned: a script needs `if __name__ == '__main__'`.
    report: Takes a line about what goes on.

  Returns:
    What `meta.json` holds.

  Raises:
    ValueError: If an argument or the data are unusable, or `output` holds
      anything but a preparation with the same arguments.
    OSError: If something cannot be read or written.
  """
  given = prepare_settings.settings(
      source=source,
      text_key=text_key,
      vocab_size=vocab_size,
      tokenizer=tokenizer,
      tokenizer_bytes=tokenizer_bytes,
      validation_fraction=validation_fraction,
      seed=seed,
      max_documents=max_documents,
      shard_tokens=shard_tokens,
      filters=filters,
      max_document_bytes=max_document_bytes,
      paragraphs=paragraphs,
      paragraphs_sha256=paragraphs_sha256,
      paragraph_unit=paragraph_unit,
  )
  opened = functools.partial(
      sources.open_source,
      source,
      text_key,
      max_document_bytes=max_document_bytes,
      paragraphs=given.paragraphs,
      paragraph_unit=paragraph_unit,
  )
  output = pathlib.Path(output)
  with Workers(workers) as pool:
    if (output / shards.META).exists():
      return _finished(output, given.config, opened, report)
    corpus = opened()
    filters_lib.check(given.filters)
    if source_checksums:
      _check_files(corpus, source_checksums, report)
    with leases.exclusive(output, 'preparing'):
      # Another process may have finished it just now.
      if (output / shards.META).exists():
        return _finished(output, given.config, opened, report)
      return _Preparation(output, given, corpus, pool, report).run()


def _check_files(
    source: Source, list_path: str, report: Callable[[str], None]
) -> None:
  if not source.files:
    raise ValueError(
        f'The source {source.spec} has no files of its own to compare with'
        f' {list_path}; leave the checksums out.'
    )
  size = checksums.check_files(source.files, list_path)
  report(f'{len(source.files)} source files, {size:,} bytes: checksums agree.')


def _finished(
    output: pathlib.Path,
    config: dict[str, Any],
    opened: Callable[[], Source],
    report: Callable[[str], None],
) -> dict[str, Any]:
  meta = shards.read_meta(output)
  prepare_settings.check_config(output, config, meta['config'])
  try:
    source = opened()
  except (ValueError, OSError):
    pass  # Prepared data stay good when their source is gone.
  else:
    prepare_settings.check_source(output, source, meta['source_fingerprint'])
  # Killed between the last two steps of `_Preparation.run`.
  (output / rounds.PROGRESS).unlink(missing_ok=True)
  report(f'{output} is prepared already; nothing to do.')
  return meta


class _Preparation(NamedTuple):
  """An unfinished preparation."""

  output: pathlib.Path
  settings: Settings
  source: Source
  workers: Workers
  report: Callable[[str], None]

  @property
  def config(self) -> dict[str, Any]:
    return self.settings.config

  def run(self) -> dict[str, Any]:
    """From wherever it is to the end."""
    state = self._start_or_resume()
    tokenizer = Tokenizer((self.output / shards.TOKENIZER).read_bytes())
    prepare_settings.check_tokenizer(
        self.output, tokenizer, state.get('tokenizer_sha256')
    )
    self._write_rounds(state, tokenizer)
    prepare_settings.check_splits(self.config, state['splits'])
    meta = {
        'format_version': shards.FORMAT_VERSION,
        'vocab_size': tokenizer.vocab_size,
        'tokenizer_sha256': tokenizer.sha256,
        'source': self.source.spec,
        'source_fingerprint': state['source_fingerprint'],
        'config': self.config,
        'records': state['position'],
        'rejects': state['rejects'],
        'splits': state['splits'],
    }
    shards.write_json(self.output / shards.META, meta)
    # Another start may have found that all is done, and cleaned up.
    (self.output / rounds.PROGRESS).unlink(missing_ok=True)
    return meta

  def _start_or_resume(self) -> dict[str, Any]:
    """The state of the preparation, with its tokenizer on disk."""
    path = self.output / rounds.PROGRESS
    if path.exists():
      state = shards.read_json(path)
      prepare_settings.check_config(self.output, self.config, state['config'])
      prepare_settings.check_source(
          self.output, self.source, state['source_fingerprint']
      )
      self.report(
          f'Continuing in {self.output} at record {state["position"]:,}.'
      )
      if not (self.output / shards.TOKENIZER).exists():
        self._write_tokenizer(self._make_tokenizer())
      return state
    prepare_settings.check_unused(self.output)
    # Nothing is written before there is a tokenizer: a wrong source or size
    # then leaves no settings behind that the corrected command would offend.
    model = self._make_tokenizer()
    state = rounds.first_state(
        self.config, self.source.fingerprint, hashlib.sha256(model).hexdigest()
    )
    # In this order: a tokenizer in a directory without settings is not ours.
    shards.write_json(path, state)
    self._write_tokenizer(model)
    return state

  def _write_tokenizer(self, model: bytes) -> None:
    path = self.output / shards.TOKENIZER
    shards.write_file(path, lambda f: f.write(model))

  def _make_tokenizer(self) -> bytes:
    """The given model, or one of the beginning of the training split."""
    if self.settings.tokenizer:
      return self.settings.tokenizer.model
    rejects = collections.Counter()
    with contextlib.closing(self._training_texts(rejects)) as texts:
      first = next(texts, None)
      if first is None:
        raise ValueError(
            f'{self.source.spec} has no document to train on; rejected records:'
            f' {counts_text(rejects)}.'
        )
      vocab_size = self.config['vocab_size']
      self.report(f'Training {vocab_size:,} word pieces.')
      return tokenizer_lib.train(itertools.chain([first], texts), vocab_size)

  def _training_texts(self, rejects: collections.Counter) -> Iterator[str]:
    remaining = self.config['tokenizer_bytes']
    processed = self._processed(self._reader(), 0, self.config['max_documents'])
    for record in itertools.chain.from_iterable(processed):
      if isinstance(record, Reject):
        rejects[record.reason] += 1
      elif self._is_training(record):
        yield record
        remaining -= len(record.encode('utf-8'))
        if remaining <= 0:
          return

  def _is_training(self, text: str) -> bool:
    fraction, seed = self.config['validation_fraction'], self.config['seed']
    return processing.split_of(text, fraction, seed) == 'train'

  def _write_rounds(self, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    done = sum(split['documents'] for split in state['splits'].values())
    total = self.config['max_documents']
    if done == total:
      return
    encoder = processing.Encoder(
        self._reader(),
        tokenizer,
        self.config['validation_fraction'],
        self.config['seed'],
    )
    left = None if total is None else total - done
    dtype = shards.token_dtype(tokenizer.vocab_size)
    writer = rounds.RoundWriter(self.output, state, dtype)
    with rounds.Progress(done, total, self.report) as progress:
      writer.run(
          self._processed(encoder, state['position'], left),
          self.config['shard_tokens'],
          progress.advance,
      )

  def _reader(self) -> processing.Reader:
    return processing.Reader(self.source, self.settings.filters)

  def _processed(
      self, process: Callable[[list], list], start: int, limit: int | None
  ) -> Iterator[list]:
    """Batches from record `start` to the `limit`-th document, processed."""
    raw = rounds.batches(self.source.raw(start))
    return rounds.first_documents(self.workers.map(process, raw), limit)
