"""Tokens on disk: what `prepare_data` writes and the streams read.

  <data_dir>/meta.json                     written last; sizes and settings
  <data_dir>/tokenizer.model               the sentencepiece model
  <data_dir>/train/00000.tokens.npy        uint16, or uint32 if V > 65,536
  <data_dir>/train/00000.offsets.npy       int64, documents + 1: where each
                                           document starts, and the end
  <data_dir>/validation/...                the same

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

SPLITS = ('train', 'validation')
TOKENIZER = 'tokenizer.model'
KIND = prepared_files.Kind(
    'prepare_data', 1, frozenset({'vocab_size', 'tokenizer_sha256'})
)


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest type that holds every token."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokens_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.tokens.npy'


def offsets_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.offsets.npy'


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
      'tokens_sha256': save(tokens_path(data_dir, split, shard), tokens),
      'offsets_sha256': save(offsets_path(data_dir, split, shard), offsets),
  }


class TokenData:
  """All documents of one split, memory-mapped.

  Attributes:
    vocab_size: V; every token is below it.
    tokenizer_sha256: Identifies the vocabulary.
    starts: int64 (documents,): place of each document's `<s>` among all tokens
      of the split.
    lengths: int64 (documents,): tokens of each document, with `<s>`, `</s>`.
  """

  def __init__(
      self,
      shards: Sequence[np.ndarray],
      offsets: Sequence[np.ndarray],
      vocab_size: int,
      tokenizer_sha256: str,
  ):
    self._shards = list(shards)
    sizes = np.asarray([len(shard) for shard in shards], np.int64)
    self._ends = np.cumsum(sizes)
    bases = self._ends - sizes
    self.vocab_size = vocab_size
    self.tokenizer_sha256 = tokenizer_sha256
    self.starts = np.concatenate(
        [offset[:-1] + base for offset, base in zip(offsets, bases)]
    )
    self.lengths = np.concatenate([np.diff(offset) for offset in offsets])

  def __len__(self) -> int:
    """Returns the number of documents."""
    return len(self.starts)

  @property
  def num_tokens(self) -> int:
    return int(self._ends[-1])

  def gather(self, positions: np.ndarray) -> np.ndarray:
    """Reads the tokens at `positions` among all: int32 of the same shape.

    Raises:
      ValueError: If a token is outside the vocabulary.
    """
    tokens = np.empty(positions.shape, np.int32)
    shard_of = np.searchsorted(self._ends, positions, side='right')
    for i in np.unique(shard_of):
      here = shard_of == i
      base = self._ends[i] - len(self._shards[i])
      tokens[here] = self._shards[i][positions[here] - base]
    # Unseen, such a token would be clamped by the embedding's look-up.
    if tokens.size and tokens.max() >= self.vocab_size:
      raise ValueError(
          f'The token files hold token {tokens.max()}, but the vocabulary has'
          f' {self.vocab_size}; {KIND.remedy}'
      )
    return tokens

  def count_tokens(self, most: int = 1 << 22) -> np.ndarray:
    """Counts each token of the split: int64 (V,).

    Reads all of it, at most so many tokens at a time.

    Raises:
      ValueError: If a token is outside the vocabulary.
    """
    counts = np.zeros(self.vocab_size, np.int64)
    for shard in self._shards:
      for start in range(0, len(shard), most):
        found = np.bincount(shard[start : start + most])
        if len(found) > self.vocab_size:
          raise ValueError(
              f'The token files hold token {len(found) - 1}, but the vocabulary'
              f' has {self.vocab_size}; {KIND.remedy}'
          )
        counts[: len(found)] += found
    return counts


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
  data_dir = Path(data_dir)
  meta = read_meta(data_dir)
  dtype = token_dtype(meta['vocab_size'])
  tokens, offsets = [], []
  for i, shard in enumerate(meta['splits'][split]['shards']):
    size = shard['documents']
    if not size:
      continue
    open_array = prepared_files.open_array
    path = tokens_path(data_dir, split, i)
    tokens.append(open_array(path, (shard['tokens'],), dtype, KIND))
    path = offsets_path(data_dir, split, i)
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
        ' another --validation_fraction or more documents.'
    )
  return TokenData(
      tokens, offsets, meta['vocab_size'], meta['tokenizer_sha256']
  )


def verify(data_dir: str | os.PathLike) -> tuple[int, int]:
  """Reads all files of a data set and compares their SHA-256.

  Returns:
    How many files there are, and their bytes.

  Raises:
    FileNotFoundError: If the data set or a file of it is missing.
    ValueError: If a file differs.
  """
  data_dir = Path(data_dir)
  meta = read_meta(data_dir)
  expected = {data_dir / TOKENIZER: meta['tokenizer_sha256']}
  for split in SPLITS:
    for i, shard in enumerate(meta['splits'][split]['shards']):
      if shard['documents']:
        expected[tokens_path(data_dir, split, i)] = shard['tokens_sha256']
        expected[offsets_path(data_dir, split, i)] = shard['offsets_sha256']
  return len(expected), prepared_files.verify(expected, KIND)


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """Reads `meta.json` of a finished data set; checks version and tokenizer.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it cannot be used.
  """
  data_dir = Path(data_dir)
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
