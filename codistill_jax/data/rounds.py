"""Records -> token shards: the part of a preparation that takes long.

The work goes in *rounds*. A round reads records until they fill about
`shard_tokens` tokens, writes one shard of each split and then, last,
`progress.json`, which says what is done. What a killed round left behind is
written again, byte by byte the same, by the next run with the same settings.
"""

import collections
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from codistill_jax.data import shards
from codistill_jax.data.records import Record, Reject
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer

PROGRESS = 'progress.json'

# One call of the tokenizer. Rounds consist of whole batches, so another number
# here changes the shards, and data half prepared before the change are void.
_BATCH_RECORDS = 1024
_BATCH_CHARACTERS = 1 << 20


def first_state(
    config: dict[str, Any], source_fingerprint: str
) -> dict[str, Any]:
  """The state of a preparation before its first round.

  Keys: `position`, records read; `rejects`, a count for each reason; `splits`,
  the sizes of each split and of its shards; and the two arguments.
  """
  sizes = {'documents': 0, 'words': 0, 'bytes': 0, 'tokens': 0}
  return {
      'config': config,
      'source_fingerprint': source_fingerprint,
      'position': 0,
      'rejects': {},
      'splits': {split: {**sizes, 'shards': []} for split in shards.SPLITS},
  }


class RoundWriter:
  """Tokenises records into shards below `output`, round by round.

  Attributes:
    state: See `first_state`; on disk as it was at the end of the last round.
  """

  def __init__(
      self,
      output: shards.Path,
      state: dict[str, Any],
      tokenizer: Tokenizer,
      split_of: Callable[[str], str],
  ):
    self.state = state
    self._output = output
    self._tokenizer = tokenizer
    self._split_of = split_of
    self._dtype = shards.token_dtype(tokenizer.vocab_size)
    self._documents = {split: [] for split in shards.SPLITS}

  def run(
      self,
      records: Iterator[Record],
      shard_tokens: int,
      advance: Callable[[int], None],
  ) -> None:
    """All rounds that are left; `advance(n)` hears of n more documents."""
    tokens = 0
    for batch in _batches(records):
      tokens += self._add(batch)
      advance(len(batch.texts))
      if tokens >= shard_tokens:
        self._end_round()
        tokens = 0
    self._end_round()

  def _add(self, batch: '_Batch') -> int:
    """Adds a batch to the round; returns how many tokens it has."""
    self.state['position'] += batch.records
    rejects = self.state['rejects']
    for reason, count in batch.rejects.items():
      rejects[reason] = rejects.get(reason, 0) + count
    total = 0
    encoded = self._tokenizer.encode_batch(batch.texts)
    for text, pieces in zip(batch.texts, encoded):
      tokens = np.concatenate([[START_ID], pieces, [END_ID]])
      split = self._split_of(text)
      self._documents[split].append(tokens.astype(self._dtype))
      sizes = self.state['splits'][split]
      sizes['documents'] += 1
      sizes['words'] += len(text.split())
      sizes['bytes'] += len(text.encode('utf-8'))
      sizes['tokens'] += len(tokens)
      total += len(tokens)
    return total

  def _end_round(self) -> None:
    """Writes the shards of the round, then that they are written."""
    for split, documents in self._documents.items():
      if documents:
        done = self.state['splits'][split]['shards']
        shards.write_shard(
            self._output, split, len(done), documents, self._dtype
        )
        tokens = sum(map(len, documents))
        done.append({'documents': len(documents), 'tokens': tokens})
        documents.clear()
    shards.write_json(self._output / PROGRESS, self.state)


class _Batch(NamedTuple):
  records: int
  texts: list[str]
  rejects: collections.Counter


def _batches(records: Iterator[Record]) -> Iterator[_Batch]:
  """Cuts records into calls of the tokenizer."""
  count = size = 0
  texts, rejects = [], collections.Counter()
  for record in records:
    count += 1
    if isinstance(record, Reject):
      rejects[record.reason] += 1
    else:
      texts.append(record)
      size += len(record)
    if count >= _BATCH_RECORDS or size >= _BATCH_CHARACTERS:
      yield _Batch(count, texts, rejects)
      count = size = 0
      texts, rejects = [], collections.Counter()
  if count:
    yield _Batch(count, texts, rejects)


class Progress:
  """A bar on a terminal; otherwise a line every few seconds."""

  def __init__(
      self,
      done: int,
      total: int | None,
      report: Callable[[str], None],
      seconds: float = 10.0,
      noun: str = 'documents',
  ):
    """Starts to count.

    Args:
      done: Documents done before.
      total: Documents to do in all; None if unknown.
      report: Writes one line.
      seconds: Between two lines.
      noun: What is counted.
    """
    self._documents = done
    self._noun = noun
    self._report = report
    self._seconds = seconds
    self._began = self._said = time.monotonic()
    self._began_at = done
    self._bar = None
    if sys.stderr.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
          initial=done, total=total, unit=f' {noun}', unit_scale=True
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused: Any) -> None:
    if self._bar is not None:
      self._bar.close()

  def advance(self, documents: int) -> None:
    """Counts so many more documents."""
    self._documents += documents
    if self._bar is not None:
      self._bar.update(documents)
      return
    now = time.monotonic()
    if now - self._said >= self._seconds:
      self._said = now
      rate = (self._documents - self._began_at) / (now - self._began)
      self._report(
          f'{self._documents:,} {self._noun}, {rate:,.0f} {self._noun}/second'
      )
