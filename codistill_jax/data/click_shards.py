"""Rows of clicks on disk: what `prepare_clicks` writes and the task reads.

  <data_dir>/meta.json              written last; sizes, settings, checksums
  <data_dir>/train/00000.rows.npy   uint32 (rows, 40); see `criteo.Parsed`
  <data_dir>/validation/...         the same
  <data_dir>/test/...               the same
  <data_dir>/counts/C01.u32         uint32 pairs (value, count): the values of
                                    C1 in the training split, rising, without
                                    missing ones

A shard without rows has no file. A row lies in one place, so that one taken at
random costs one page of the disk.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill_jax.data import criteo, prepared_files

SPLITS = ('train', 'validation', 'test')
KIND = prepared_files.Kind(
    'prepare_clicks',
    1,
    frozenset({'counts'}),
    '--source=criteo:train.txt ',
)

_PIECE = 1 << 20  # Rows whose labels are read at once.


def rows_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.rows.npy'


def counts_path(data_dir: Path, column: int) -> Path:
  return data_dir / 'counts' / f'C{column + 1:02d}.u32'


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """Reads `meta.json` of a finished data set.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it cannot be used.
  """
  return prepared_files.read_meta(Path(data_dir), KIND)


class RowData:
  """All rows of one split, memory-mapped."""

  def __init__(self, mapped: Sequence[np.ndarray]):
    self._shards = list(mapped)
    sizes = [len(shard) for shard in self._shards]
    self._ends = np.cumsum(np.asarray(sizes, np.int64))

  def __len__(self) -> int:
    """The number of rows."""
    return int(self._ends[-1]) if len(self._ends) else 0

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Rows (B, 40), uint32, of the numbers `rows` (B,)."""
    found = np.empty((len(rows), criteo.COLUMNS), np.uint32)
    shard_of = np.searchsorted(self._ends, rows, side='right')
    for i in np.unique(shard_of):
      here = np.flatnonzero(shard_of == i)
      shard = self._shards[i]
      start = self._ends[i] - len(shard)
      found[here] = shard.take(rows[here] - start, axis=0)
    return found

  def labels(self) -> Iterator[np.ndarray]:
    """All labels in order, uint32, a piece at a time."""
    for shard in self._shards:
      for start in range(0, len(shard), _PIECE):
        yield shard[start : start + _PIECE, 0]


def open_rows(data_dir: str | os.PathLike, split: str) -> RowData:
  """Opens one split and checks that its files are as described.

  Raises:
    FileNotFoundError: If there is no finished data set, or a file is missing.
    ValueError: If a file is damaged.
  """
  data_dir = Path(data_dir)
  described = read_meta(data_dir)['splits'][split]['shards']
  return RowData(
      [
          prepared_files.open_array(
              rows_path(data_dir, split, i),
              (shard['rows'], criteo.COLUMNS),
              np.dtype(np.uint32),
              KIND,
          )
          for i, shard in enumerate(described)
          if shard['rows']
      ]
  )


def open_counts(
    data_dir: str | os.PathLike, column: int
) -> tuple[np.ndarray, np.ndarray]:
  """Opens the values of a category in the training split, and their counts.

  Raises:
    FileNotFoundError: If the file is missing.
    ValueError: If it is damaged.
  """
  path = counts_path(Path(data_dir), column)
  values = read_meta(data_dir)['counts'][column]['values']
  try:
    size = path.stat().st_size
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {KIND.remedy}') from e
  if size != 8 * values:
    raise ValueError(
        f'{path} has {size} bytes, expected {8 * values}; {KIND.remedy}'
    )
  if not values:
    return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
  pairs = np.memmap(path, '<u4', 'r', shape=(values, 2))
  return pairs[:, 0], pairs[:, 1]


def verify(data_dir: str | os.PathLike) -> tuple[int, int]:
  """Reads every file and compares it with its checksum.

  Returns:
    How many files there are, and their bytes.

  Raises:
    FileNotFoundError: If a file is missing.
    ValueError: If a file has changed since it was written.
  """
  data_dir = Path(data_dir)
  meta = read_meta(data_dir)
  expected = {
      rows_path(data_dir, split, i): shard['sha256']
      for split in SPLITS
      for i, shard in enumerate(meta['splits'][split]['shards'])
      if shard['rows']
  }
  for column, described in enumerate(meta['counts']):
    expected[counts_path(data_dir, column)] = described['sha256']
  return len(expected), prepared_files.verify(expected, KIND)
