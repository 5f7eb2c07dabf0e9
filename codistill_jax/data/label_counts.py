"""Frequencies of labels in a training split: the unigram distribution.

Shape suffixes: C classes, N labels of a piece.
"""

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from codistill_jax.data import shards
from codistill_jax.data.tokenizer import START_ID
from codistill_jax.storage import files


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
  path = data_dir / 'train' / f'label_counts_{_key(data_dir)}.npy'
  try:
    counts_V = np.load(io.BytesIO(path.read_bytes()))
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    counts_V = data.count_tokens()  # There are none, or damaged ones.
    counts_V[START_ID] = 0
    _write(path, counts_V)
  return _shares(counts_V)


def _shares(counts_C: np.ndarray) -> np.ndarray:
  if not counts_C.any():
    raise ValueError('there are no training labels to count')
  return counts_C / counts_C.sum()


def _key(data_dir: Path) -> str:
  """Returns a key that is another one for other tokens."""
  meta = shards.read_meta(data_dir)
  # The tokenizer too: which of the pieces there are is not in the tokens.
  known = [meta['tokenizer_sha256']]
  for shard in meta['splits']['train']['shards']:
    if shard['documents']:
      known.append(shard['tokens_sha256'])
  return hashlib.sha256('\n'.join(known).encode()).hexdigest()[:16]


def _write(path: Path, counts_V: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, counts_V)
  with contextlib.suppress(OSError):
    # A disk that is full or may not be written: the next one counts.
    files.write_bytes(path, buffer.getvalue())
