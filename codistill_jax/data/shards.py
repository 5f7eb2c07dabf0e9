"""Tokens on disk: what `prepare_data` writes and the streams read.

  <data_dir>/meta.json                     written last; sizes and settings
  <data_dir>/tokenizer.model               the sentencepiece model
  <data_dir>/train/00000.tokens.npy        uint16, or uint32 if V > 65,536
  <data_dir>/train/00000.offsets.npy       int64, documents + 1: where each
                                           document starts, and the end
  <data_dir>/validation/...                the same

A document is stored as `<s> pieces </s>` and never divided between shards.
`meta.json` has the SHA-256 of every file. Opening compares sizes and types
only, which costs nothing; `verify` reads everything. Data prepared before there
were checksums open as well.

Files are memory-mapped: they must lie on a local or mounted file system, and
several processes of a machine share the memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from codistill_jax.data import checksums

FORMAT_VERSION = 1
SPLITS = ('train', 'validation')
META = 'meta.json'
TOKENIZER = 'tokenizer.model'

_META_KEYS = {'format_version', 'vocab_size', 'tokenizer_sha256', 'splits'}
_REMEDY = 'delete the directory and run prepare_data again.'
_PIECE = 1 << 22  # Tokens that are counted at once.


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest type that holds every token."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokens_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.tokens.npy'


def offsets_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.offsets.npy'


def write_file(path: Path, write: Callable[[IO[bytes]], None]) -> str:
  """Writes a file that is either whole or absent, whenever we are killed.

  Returns:
    The SHA-256 of what was written, in hex.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'wb') as f:
    hashing = checksums.HashingWriter(f)
    write(hashing)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
  return hashing.sha256.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(value, indent=2, sort_keys=True) + '\n'
  write_file(path, lambda f: f.write(text.encode('utf-8')))


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
  lengths = [0] + [len(document) for document in documents]
  offsets = np.cumsum(lengths, dtype=np.int64)
  tokens = np.concatenate(documents).astype(dtype)
  save = lambda path, array: write_file(path, lambda f: np.save(f, array))
  return {
      'documents': len(documents),
      'tokens': len(tokens),
      'tokens_sha256': save(tokens_path(data_dir, split, shard), tokens),
      'offsets_sha256': save(offsets_path(data_dir, split, shard), offsets),
  }


def read_json(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
  """Reads a JSON object that a preparation wrote.

  Args:
    path: Of the file.
    remedy: What to do if it is damaged, for the error.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If the file is damaged.
  """
  try:
    value = json.loads(path.read_bytes())
  except ValueError as e:
    raise ValueError(f'{path} is damaged ({e}); {remedy}') from e
  if not isinstance(value, dict):
    raise ValueError(f'{path} is damaged (not a JSON object); {remedy}')
  return value


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
    """The number of documents."""
    return len(self.starts)

  @property
  def num_tokens(self) -> int:
    return int(self._ends[-1])

  def gather(self, positions: np.ndarray) -> np.ndarray:
    """The tokens at `positions` among all tokens: int32 of the same shape.

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
          f' {self.vocab_size}; {_REMEDY}'
      )
    return tokens

  def count_tokens(self) -> np.ndarray:
    """How often each token occurs in the split: int64 (V,).

    Reads all of it, a piece at a time.

    Raises:
      ValueError: If a token is outside the vocabulary.
    """
    counts = np.zeros(self.vocab_size, np.int64)
    for shard in self._shards:
      for start in range(0, len(shard), _PIECE):
        found = np.bincount(shard[start : start + _PIECE])
        if len(found) > self.vocab_size:
          raise ValueError(
              f'The token files hold token {len(found) - 1}, but the vocabulary'
              f' has {self.vocab_size}; {_REMEDY}'
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
  described = meta['splits'][split]['shards']
  if not described:
    raise ValueError(
        f'The {split} split of {data_dir} is empty; prepare the data again with'
        ' another --validation_fraction or more documents.'
    )
  dtype = token_dtype(meta['vocab_size'])
  tokens, offsets = [], []
  for i, shard in enumerate(described):
    tokens.append(
        _load(tokens_path(data_dir, split, i), shard['tokens'], dtype)
    )
    path = offsets_path(data_dir, split, i)
    offsets.append(_load(path, shard['documents'] + 1, np.dtype(np.int64)))
    lengths = np.diff(offsets[-1])
    if (
        offsets[-1][0] != 0
        or offsets[-1][-1] != len(tokens[-1])
        or lengths.min() < 2
    ):
      raise ValueError(f'{path} does not fit its token file; {_REMEDY}')
  return TokenData(
      tokens, offsets, meta['vocab_size'], meta['tokenizer_sha256']
  )


class Verified(NamedTuple):
  """What `verify` has found to be as it was written.

  Attributes:
    files: How many.
    size: Their bytes.
    unknown: How many more have no checksum: prepared before there were any.
  """

  files: int
  size: int
  unknown: int


def verify(data_dir: str | os.PathLike) -> Verified:
  """Reads all files of a data set and compares their SHA-256.

  Raises:
    FileNotFoundError: If the data set or a file of it is missing.
    ValueError: If a file differs.
  """
  data_dir = Path(data_dir)
  meta = read_meta(data_dir)  # Which compares the tokenizer.
  files, size, unknown = 1, (data_dir / TOKENIZER).stat().st_size, 0
  for split in SPLITS:
    for i, shard in enumerate(meta['splits'][split]['shards']):
      for path, key in (
          (tokens_path(data_dir, split, i), 'tokens_sha256'),
          (offsets_path(data_dir, split, i), 'offsets_sha256'),
      ):
        if not path.exists():
          raise FileNotFoundError(f'{path} is missing; {_REMEDY}')
        if key not in shard:
          unknown += 1
          continue
        found = checksums.sha256_of(path)
        if found != shard[key]:
          raise ValueError(
              f'{path} is damaged (SHA-256 {found[:12]}, expected'
              f' {shard[key][:12]}); {_REMEDY}'
          )
        files += 1
        size += path.stat().st_size
  return Verified(files, size, unknown)


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """`meta.json` of a finished data set, after checking version and tokenizer.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it cannot be used.
  """
  data_dir = Path(data_dir)
  try:
    meta = read_json(data_dir / META)
  except (FileNotFoundError, NotADirectoryError) as e:
    raise FileNotFoundError(
        f'{data_dir} holds no prepared data (no {META}); make it with: python'
        f' -m experiments.prepare_data --output={data_dir}'
    ) from e
  missing = _META_KEYS - meta.keys()
  if missing:
    raise ValueError(
        f'{data_dir / META} lacks {", ".join(sorted(missing))}; {_REMEDY}'
    )
  version = meta['format_version']
  if version != FORMAT_VERSION:
    raise ValueError(
        f'{data_dir / META} has format version {version}, this program reads'
        f' {FORMAT_VERSION}; prepare the data again.'
    )
  path = data_dir / TOKENIZER
  try:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {_REMEDY}') from e
  if digest != meta['tokenizer_sha256']:
    raise ValueError(
        f'{path} is not the tokenizer that made these tokens (sha256'
        f' {digest[:12]}, expected {meta["tokenizer_sha256"][:12]}); {_REMEDY}'
    )
  return meta


def _load(path: Path, size: int, dtype: np.dtype) -> np.ndarray:
  """Memory-maps one array and compares it with its description."""
  try:
    array = np.load(path, mmap_mode='r')
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {_REMEDY}') from e
  except (ValueError, EOFError) as e:
    raise ValueError(f'{path} is damaged ({e}); {_REMEDY}') from e
  if array.shape != (size,) or array.dtype != dtype:
    raise ValueError(
        f'{path} holds {array.dtype} {array.shape}, expected {dtype}'
        f' {(size,)}; {_REMEDY}'
    )
  # A plain array on the same memory: the subclass makes indexing slow.
  return np.asarray(array)
