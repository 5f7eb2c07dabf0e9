"""Records -> token shards: the part of a preparation that takes long.

The work goes in *rounds*, of *batches* of records, which may be processed by
several processes and come back in order: what is written does not depend on
their number. A round goes on until it has about `shard_tokens` tokens, writes
one shard of each split and then, last, `progress.json`, which says what is
done. What a killed round left behind is written again, byte by byte the same,
by the next run with the same settings.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from codistill_jax.data import shards
from codistill_jax.data.processing import Document
from codistill_jax.data.records import Raw, Reject

PROGRESS = 'progress.json'

# What a worker gets at a time. Rounds consist of whole batches, so with another
# number here a preparation that is continued ends with other shards (of the
# same documents) than one that was not interrupted.
_BATCH_RECORDS = 1024
_BATCH_SIZE = 1 << 20  # Bytes or characters.


def first_state(
    config: dict[str, Any], source_fingerprint: str, tokenizer_sha256: str
) -> dict[str, Any]:
  """The state of a preparation before its first round.

  Keys: `position`, records read; `rejects`, a count for each reason; `splits`,
  the sizes of each split and of its shards; and the three arguments.
  """
  sizes = {'documents': 0, 'words': 0, 'bytes': 0, 'tokens': 0}
  return {
      'config': config,
      'source_fingerprint': source_fingerprint,
      'tokenizer_sha256': tokenizer_sha256,
      'position': 0,
      'rejects': {},
      'splits': {split: {**sizes, 'shards': []} for split in shards.SPLITS},
  }


class RoundWriter:
  """Writes documents into shards below `output`, round by round.

  Attributes:
    state: See `first_state`; on disk as it was at the end of the last round.
  """

  def __init__(
      self, output: shards.Path, state: dict[str, Any], dtype: np.dtype
  ):
    self.state = state
    self._output = output
    self._dtype = dtype
    self._documents = {split: [] for split in shards.SPLITS}

  def run(
      self,
      batches: Iterable[Sequence[Document | Reject]],
      shard_tokens: int,
      advance: Callable[[int], None],
  ) -> None:
    """All rounds that are left; `advance(n)` hears of n more documents."""
    tokens = 0
    for batch in batches:
      documents = [one for one in batch if not isinstance(one, Reject)]
      self._count(batch)
      for document in documents:
        self._add(document)
        tokens += len(document.tokens)
      advance(len(documents))
      if tokens >= shard_tokens:
        self._end_round()
        tokens = 0
    self._end_round()

  def _count(self, batch: Sequence[Document | Reject]) -> None:
    self.state['position'] += len(batch)
    rejects = self.state['rejects']
    for record in batch:
      if isinstance(record, Reject):
        rejects[record.reason] = rejects.get(record.reason, 0) + 1

  def _add(self, document: Document) -> None:
    self._documents[document.split].append(document.tokens)
    sizes = self.state['splits'][document.split]
    sizes['documents'] += 1
    sizes['words'] += document.words
    sizes['bytes'] += document.size
    sizes['tokens'] += len(document.tokens)

  def _end_round(self) -> None:
    """Writes the shards of the round, then that they are written."""
    for split, documents in self._documents.items():
      if documents:
        done = self.state['splits'][split]['shards']
        done.append(
            shards.write_shard(
                self._output, split, len(done), documents, self._dtype
            )
        )
        documents.clear()
    shards.write_json(self._output / PROGRESS, self.state)


def batches(records: Iterable[Raw]) -> Iterator[list[Raw]]:
  """Cuts records into what is processed at a time."""
  batch, size = [], 0
  for record in records:
    batch.append(record)
    if not isinstance(record, Reject):
      size += len(record)
    if len(batch) >= _BATCH_RECORDS or size >= _BATCH_SIZE:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def first_documents(
    processed: Iterable[list[Any]], limit: int | None
) -> Iterator[list[Any]]:
  """Batches up to the `limit`-th document of them; None: all."""
  left = limit
  for batch in processed:
    if left is not None:
      batch, left = _cut(batch, left)
    yield batch
    if left == 0:
      return


def _cut(batch: list[Any], limit: int) -> tuple[list[Any], int]:
  """The batch up to its `limit`-th document, and how many are left then."""
  for i, record in enumerate(batch):
    limit -= not isinstance(record, Reject)
    if limit == 0:
      return batch[: i + 1], 0
  return batch, limit


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
