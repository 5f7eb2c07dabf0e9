"""What is done to each record, in any process: decode, filter, tokenise.

Tokenising is by far the most expensive of these, and Python's part of it holds
the interpreter; so all three run in worker processes, and one process reads,
decompresses and writes. `Tokenizer.encode_batch` needs no TensorFlow and this
module no jax, so a worker takes about 150 MB, English filter included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codistill_jax.data import filters, order, shards
from codistill_jax.data.records import Raw, Record, Reject, Source
from codistill_jax.data.tokenizer import END_ID, START_ID, Tokenizer


class Document(NamedTuple):
  """A document ready to be stored.

  Attributes:
    split: 'train' or 'validation'.
    words: Separated by white space.
    size: In bytes of UTF-8.
    tokens: `<s> pieces </s>`, in the type in which they are stored.
  """

  split: str
  words: int
  size: int
  tokens: np.ndarray


class Reader(NamedTuple):
  """Decodes and filters a batch of raw records."""

  source: Source
  filters: Sequence[filters.Filter]

  def __call__(self, batch: Sequence[Raw]) -> list[Record]:
    return [self._record(raw) for raw in batch]

  def _record(self, raw: Raw) -> Record:
    if isinstance(raw, Reject):
      return raw
    return filters.apply(self.filters, self.source.decode(raw))

  def __reduce__(self):
    # Reading itself stays in one process, and could not be sent to another.
    source = self.source._replace(raw=None, files=())
    return Reader, (source, self.filters)


class Encoder(NamedTuple):
  """Decodes, filters and tokenises a batch of raw records."""

  reader: Reader
  tokenizer: Tokenizer
  validation_fraction: float
  seed: int

  def __call__(self, batch: Sequence[Raw]) -> list[Document | Reject]:
    records = self.reader(batch)
    texts = [text for text in records if not isinstance(text, Reject)]
    pieces = iter(self.tokenizer.encode_batch(texts))
    return [
        record
        if isinstance(record, Reject)
        else self._document(record, next(pieces))
        for record in records
    ]

  def _document(self, text: str, pieces: np.ndarray) -> Document:
    tokens = np.concatenate([[START_ID], pieces, [END_ID]])
    return Document(
        split_of(text, self.validation_fraction, self.seed),
        len(text.split()),
        len(text.encode('utf-8')),
        tokens.astype(shards.token_dtype(self.tokenizer.vocab_size)),
    )


def split_of(text: str, validation_fraction: float, seed: int) -> str:
  """The split of a document."""
  inside = order.in_validation(text, validation_fraction, seed)
  return 'validation' if inside else 'train'
