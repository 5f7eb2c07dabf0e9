"""Rows of clicks on disk: what `prepare_clicks` writes and the task reads.

  <data_dir>/meta.json              written last; sizes, settings, checksums
  <data_dir>/train/00000.rows.npy   uint32 (rows, 40); see `criteo.Parsed`
  <data_dir>/validation/...         the same
  <data_dir>/test/...               the same
  <data_dir>/counts/C01.u32         uint32 pairs (value, count): the values of
                                    C1 in the training split, rising, without
                                    missing ones

Files are memory-mapped: they must lie on a local or mounted file system. A row
lies in one place, so that one taken at random costs one page of the disk.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill_jax.data import criteo, shards

FORMAT_VERSION = 1
SPLITS = ('train', 'validation', 'test')
META = 'meta.json'

_META_KEYS = {'format_version', 'kind', 'splits', 'counts', 'config'}
_KIND = 'criteo'
_PIECE = 1 << 20  # Rows whose labels are read at once.
_REMEDY = 'delete the directory and run prepare_clicks again.'


def rows_path(data_dir: Path, split: str, shard: int) -> Path:
  return data_dir / split / f'{shard:05d}.rows.npy'


def counts_path(data_dir: Path, column: int) -> Path:
  return data_dir / 'counts' / f'C{column + 1:02d}.u32'


def write_meta(data_dir: Path, meta: Mapping[str, Any]) -> None:
  known = {'format_version': FORMAT_VERSION, 'kind': _KIND}
  shards.write_json(data_dir / META, {**known, **meta})


def read_json(path: Path) -> dict[str, Any]:
  """As `shards.read_json`, of what `prepare_clicks` wrote."""
  return shards.read_json(path, _REMEDY)


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """`meta.json` of a finished data set.

  Raises:
    FileNotFoundError: If the data set is missing or not finished.
    ValueError: If it cannot be used.
  """
  data_dir = Path(data_dir)
  try:
    meta = read_json(data_dir / META)
  except (FileNotFoundError, NotADirectoryError) as e:
    raise FileNotFoundError(
        f'{data_dir} holds no prepared clicks (no {META}); make them with:'
        ' python -m experiments.prepare_clicks --source=criteo:train.txt'
        f' --output={data_dir}'
    ) from e
  missing = _META_KEYS - meta.keys()
  if missing or meta['kind'] != _KIND:
    raise ValueError(
        f'{data_dir / META} is not that of prepared clicks'
        f' (lacks {", ".join(sorted(missing)) or "nothing"}); {_REMEDY}'
    )
  if meta['format_version'] != FORMAT_VERSION:
    raise ValueError(
        f'{data_dir / META} has format version {meta["format_version"]}, this'
        f' program reads {FORMAT_VERSION}; prepare the data again.'
    )
  return meta


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
          _load(rows_path(data_dir, split, i), shard['rows'])
          for i, shard in enumerate(described)
      ]
  )


def _load(path: Path, size: int) -> np.ndarray:
  try:
    array = np.load(path, mmap_mode='r')
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {_REMEDY}') from e
  except (ValueError, EOFError) as e:
    raise ValueError(f'{path} is damaged ({e}); {_REMEDY}') from e
  shape = (size, criteo.COLUMNS)
  if array.shape != shape or array.dtype != np.uint32:
    raise ValueError(
        f'{path} holds {array.dtype} {array.shape}, expected uint32 {shape};'
        f' {_REMEDY}'
    )
  # A plain array on the same memory: the subclass makes indexing slow.
  return np.asarray(array)


def open_counts(
    data_dir: str | os.PathLike, column: int
) -> tuple[np.ndarray, np.ndarray]:
  """Values of a categorical column in the training split, and their counts.

  Raises:
    FileNotFoundError: If the file is missing.
    ValueError: If it is damaged.
  """
  data_dir = Path(data_dir)
  path = counts_path(data_dir, column)
  values = read_meta(data_dir)['counts'][column]['values']
  try:
    size = path.stat().st_size
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{path} is missing; {_REMEDY}') from e
  if size != 8 * values:
    raise ValueError(
        f'{path} has {size} bytes, expected {8 * values}; {_REMEDY}'
    )
  if not values:
    return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
  pairs = np.memmap(path, '<u4', 'r', shape=(values, 2))
  return pairs[:, 0], pairs[:, 1]


def verify(data_dir: str | os.PathLike) -> int:
  """Reads every file and compares it with its checksum.

  Returns:
    The number of files.

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
  }
  for column, described in enumerate(meta['counts']):
    expected[counts_path(data_dir, column)] = described['sha256']
  for path, digest in expected.items():
    try:
      with open(path, 'rb') as f:
        found = hashlib.file_digest(f, 'sha256').hexdigest()
    except FileNotFoundError as e:
      raise FileNotFoundError(f'{path} is missing; {_REMEDY}') from e
    if found != digest:
      raise ValueError(
          f'{path} has changed since it was written (sha256 {found[:12]},'
          f' expected {digest[:12]}); {_REMEDY}'
      )
  return len(expected)
