"""Tokens on disk: what `prepare_data` writes and the streams read.

  <data_dir>/meta.json                     written last; sizes and settings
  <data_dir>/tokenizer.model               the sentencepiece model
  <data_dir>/train/00000.tokens.npy        uint16, or uint32 if V > 65,536
  <data_dir>/train/00000.offsets.npy       int64, documents + 1: where each
                                           document starts, and the end
  <data_dir>/validation/...                the same
  <data_dir>/test/...                      the same, if one was asked for

A document is stored as `<s> pieces </s>` and never divided between shards. A
shard without documents has no files. `meta.json` has the SHA-256 of every file.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill_jax.data import prepared_files
from codistill_jax.storage import files

SPLITS = ('train', 'validation', 'test')
TOKENIZER = 'tokenizer.model'


def _files(meta: dict[str, Any]) -> dict[str, str]:
  """Returns the SHA-256 of each file."""
  found = {TOKENIZER: meta['tokenizer_sha256']}
  for split, described in meta['splits'].items():
    for i, shard in enumerate(described['shards']):
      if shard['documents']:
        found[tokens_name(split, i)] = shard['tokens_sha256']
        found[offsets_name(split, i)] = shard['offsets_sha256']
  return found


KIND = prepared_files.DataKind(
    'prepare_data', 1, frozenset({'vocab_size', 'tokenizer_sha256'}), _files
)


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type that holds every token."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokens_name(split: str, shard: int) -> str:
  return f'{split}/{shard:05d}.tokens.npy'


def offsets_name(split: str, shard: int) -> str:
  return f'{split}/{shard:05d}.offsets.npy'


def write_shard(
    data_dir: Path,
    split: str,
    shard: int,
    documents: Sequence[np.ndarray],
    dtype: np.dtype,
) -> dict[str, Any]:
  """Writes one shard of documents that carry their `<s>` and `</s>`.

  Returns:
    What `meta.json` says of it: 'documents', 'tokens', and the SHA-256 of its
    two files.
  """
  if not documents:
    return {'documents': 0, 'tokens': 0}
  lengths = [0] + [len(document) for document in documents]
  offsets = np.cumsum(lengths, dtype=np.int64)
  tokens = np.concatenate(documents).astype(dtype)
  save = prepared_files.write_array
  return {
      'documents': len(documents),
      'tokens': len(tokens),
      'tokens_sha256': save(data_dir / tokens_name(split, shard), tokens),
      'offsets_sha256': save(data_dir / offsets_name(split, shard), offsets),
  }


class TokenData:
  """All documents of one split, memory-mapped.

  Attributes:
    vocab_size: V; every token is below it.
    tokenizer_sha256: Identifies the vocabulary.
    starts: int64 (documents,): place of each document's `<s>` among all tokens
      of the split.
    lengths: int64 (documents,): tokens of each document, with `<s>`, `</s>`.
    num_tokens: Of all documents.
    bytes_per_label: Of text, in the mean, for each token that is predicted, so
      not for `<s>`; None: unknown.
  """

  def __init__(
      self,
      shards: Sequence[np.ndarray],
      offsets: Sequence[np.ndarray],
      vocab_size: int,
      tokenizer_sha256: str,
      num_bytes: int | None = None,
  ):
    self._tokens = prepared_files.Stack(shards)
    self.vocab_size = vocab_size
    self.tokenizer_sha256 = tokenizer_sha256
    self.lengths = np.concatenate([np.diff(offset) for offset in offsets])
    # Documents lie one after another, without a gap.
    self.starts = np.cumsum(self.lengths) - self.lengths
    self.num_tokens = len(self._tokens)
    labels = self.num_tokens - len(self.starts)
    self.bytes_per_label = num_bytes / labels if num_bytes else None

  def __len__(self) -> int:
    """Returns the number of documents."""
    return len(self.starts)

  def gather(self, positions: np.ndarray) -> np.ndarray:
    """Reads the tokens at `positions` among all: int32 of the same shape.

    Raises:
      ValueError: If a token is outside the vocabulary.
    """
    return self._checked(self._tokens.take(positions)).astype(np.int32)

  def count_tokens(self, most: int = 1 << 22) -> np.ndarray:
    """Counts each token of the split: int64 (V,).

    Reads all of it, at most so many tokens at a time.

    Raises:
      ValueError: If a token is outside the vocabulary.
    """
    counts = np.zeros(self.vocab_size, np.int64)
    for block in self._tokens.blocks(most):
      counts += np.bincount(self._checked(block), minlength=self.vocab_size)
    return counts

  def _checked(self, tokens: np.ndarray) -> np.ndarray:
    # Unseen, such a token would be clamped by the embedding's look-up.
    if tokens.size and tokens.max() >= self.vocab_size:
      raise ValueError(
          f'The token files hold token {tokens.max()}, but the vocabulary has'
          f' {self.vocab_size}; {KIND.remedy}'
      )
    return tokens


def open_tokens(data_dir: str | os.PathLike, split: str) -> TokenData:
  """Opens one split and checks that its files belong together.

  Raises:
    FileNotFoundError: If there is no finished data set, or a file of it is
      missing.
    ValueError: If a file is damaged, of another format version, or of another
      tokenizer; or if the split is unknown or empty.
  """
  if split not in SPLITS:
    raise ValueError(
        f'split must be one of {", ".join(SPLITS)}; got {split!r}.'
    )
  data_dir = files.on_disk(data_dir)
  meta = read_meta(data_dir)
  dtype = token_dtype(meta['vocab_size'])
  tokens, offsets = [], []
  described = meta['splits'].get(split, {'shards': ()})
  for i, shard in enumerate(described['shards']):
    size = shard['documents']
    if not size:
      continue
    open_array = prepared_files.open_array
    path = data_dir / tokens_name(split, i)
    tokens.append(open_array(path, (shard['tokens'],), dtype, KIND))
    path = data_dir / offsets_name(split, i)
    offsets.append(open_array(path, (size + 1,), np.dtype(np.int64), KIND))
    lengths = np.diff(offsets[-1])
    if (
        offsets[-1][0] != 0
        or offsets[-1][-1] != len(tokens[-1])
        or lengths.min() < 2
    ):
      raise ValueError(f'{path} does not fit its token file; {KIND.remedy}')
  if not tokens:
    raise ValueError(
        f'The {split} split of {data_dir} is empty; prepare the data again with'
        f' --{split}_fraction, --{split}_source or more documents.'
    )
  return TokenData(
      tokens,
      offsets,
      meta['vocab_size'],
      meta['tokenizer_sha256'],
      described.get('bytes'),
  )


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """Reads `meta.json` of a finished data set; checks version and tokenizer.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it cannot be used.
  """
  data_dir = files.on_disk(data_dir)
  meta = prepared_files.read_meta(data_dir, KIND)
  path = data_dir / TOKENIZER
  try:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {KIND.remedy}') from e
  if digest != meta['tokenizer_sha256']:
    raise ValueError(
        f'{path} is not the tokenizer that made these tokens (sha256'
        f' {digest[:12]}, expected {meta["tokenizer_sha256"][:12]});'
        f' {KIND.remedy}'
    )
  return meta
