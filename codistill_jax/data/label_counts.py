"""Frequencies of labels in a training split: the unigram distribution.

Shape suffixes: C classes, N labels of a piece.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from codistill_jax.data import shards
from codistill_jax.data.tokenizer import START_ID

_CACHE = 'label_counts.npz'


def frequencies(pieces: Iterable[np.ndarray], num_classes: int) -> np.ndarray:
  """Returns the shares of the classes among labels.

  Args:
    pieces: Integers (N,), as many arrays as there are.
    num_classes: C.

  Returns:
    float64 (C,), of sum 1.

  Raises:
    ValueError: If there is no label, or one is outside [0, C).
  """
  counts_C = np.zeros(num_classes, np.int64)
  for labels_N in pieces:
    if (
        labels_N.size
        and not 0 <= labels_N.min() <= labels_N.max() < num_classes
    ):
      raise ValueError(
          f'labels {labels_N.min()}..{labels_N.max()} among the training'
          f' examples, expected 0..{num_classes - 1}'
      )
    counts_C += np.bincount(labels_N, minlength=num_classes)
  return _shares(counts_C)


def token_frequencies(
    data_dir: str | os.PathLike, data: shards.TokenData
) -> np.ndarray:
  """Returns the shares of word pieces among labels of all training documents.

  `<s>` is none, see `text`. The first to ask reads all tokens once, a piece at
  a time, and leaves the counts beside them, if it may write there.

  Args:
    data_dir: What `prepare_data` wrote.
    data: Its training split.

  Returns:
    float64 (V,), of sum 1.

  Raises:
    OSError, ValueError: If the data cannot be used.
  """
  data_dir = Path(data_dir)
  path, key = data_dir / 'train' / _CACHE, _key(data_dir)
  counts_V = _read(path, key, data.vocab_size)
  if counts_V is None:
    counts_V = data.count_tokens()
    counts_V[START_ID] = 0
    _write(path, key, counts_V)
  return _shares(counts_V)


def _shares(counts_C: np.ndarray) -> np.ndarray:
  if not counts_C.any():
    raise ValueError('there are no training labels to count')
  return counts_C / counts_C.sum()


def _key(data_dir: Path) -> str:
  """Returns a key that is another one for other tokens."""
  meta = shards.read_meta(data_dir)
  parts = meta['splits']['train']['shards']
  # The tokenizer too: which of the pieces there are is not in the tokens.
  known = [meta['tokenizer_sha256']]
  known += [part['tokens_sha256'] for part in parts if part['documents']]
  return hashlib.sha256('\n'.join(known).encode()).hexdigest()


def _read(path: Path, key: str, num_classes: int) -> np.ndarray | None:
  """Reads the counts there, if they are whole and of the same tokens."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as found:
      counts_V, of = found['counts'], str(found['key'])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None  # They are counted again.
  fits = counts_V.shape == (num_classes,) and counts_V.dtype == np.int64
  return counts_V if fits and of == key else None


def _write(path: Path, key: str, counts_V: np.ndarray) -> None:
  try:
    # A name of its own: several groups may count at the same time.
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f'{path.name}.', delete=False
    ) as file:
      np.savez(file, counts=counts_V, key=np.array(key))
    os.chmod(file.name, 0o644)  # Others may read it, as they may the tokens.
    os.replace(file.name, path)
  except OSError:
    return  # A disk that is full or may not be written: the next one counts.
