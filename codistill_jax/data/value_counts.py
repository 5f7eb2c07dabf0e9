"""Counts of the values of very many rows, exact and in bounded memory.

As an external sort does it: every round leaves a *run*, the different values of
each column and how often it has them; in the end the runs are merged, a column
at a time, and of the column as many values at a time as the memory may hold.

Shape suffixes: N rows, K columns.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from codistill_jax.data import criteo, shards

Pairs = np.ndarray  # uint32 (n, 2): values, rising, and counts.

# Pairs that are merged at once: some 100 MB.
_MERGED = 1 << 21


class Counts(NamedTuple):
  """A part of a run's column: arrays on disk, of one length."""

  values: np.ndarray
  counts: np.ndarray

  def between(self, start: int, stop: int) -> 'Counts':
    return Counts(self.values[start:stop], self.counts[start:stop])


def run_path(data_dir: Path, number: int) -> Path:
  return data_dir / 'runs' / f'{number:05d}.u32'


def write_run(path: Path, values_NK: np.ndarray) -> None:
  """Counts the values of each column; the missing one is left out.

  The file holds K numbers of values, then of each column the values and their
  counts.
  """
  lengths, arrays = [], []
  for k in range(values_NK.shape[1]):
    values, counts = np.unique(values_NK[:, k], return_counts=True)
    known = values != criteo.MISSING
    arrays += [values[known], counts[known]]
    lengths.append(np.count_nonzero(known))

  def write(file: IO[bytes]) -> None:
    for array in [np.asarray(lengths), *arrays]:
      file.write(array.astype('<u4').tobytes())

  shards.write_file(path, write)


def read_run(path: Path, num_columns: int, column: int) -> Counts:
  """One column of a run, memory-mapped."""
  mapped = np.asarray(np.memmap(path, '<u4', 'r'))
  lengths = mapped[:num_columns].tolist()
  start = num_columns + 2 * sum(lengths[:column])
  middle, end = start + lengths[column], start + 2 * lengths[column]
  return Counts(mapped[start:middle], mapped[middle:end])


def merged_column(
    paths: Sequence[Path], num_columns: int, column: int, most: int = _MERGED
) -> Iterator[Pairs]:
  """The counts of one column in all runs together, in blocks, rising.

  Args:
    paths: The runs.
    num_columns: K.
    column: Which one.
    most: Pairs of all runs that are merged at once.
  """
  runs = [read_run(path, num_columns, column) for path in paths]
  yield from _merge([run for run in runs if len(run.values)], most)


def _merge(runs: list[Counts], most: int) -> Iterator[Pairs]:
  if not runs:
    return
  total = sum(len(run.values) for run in runs)
  low = min(int(run.values[0]) for run in runs)
  high = max(int(run.values[-1]) for run in runs)
  if total <= most or low == high:
    yield _sum(runs)
    return
  # Values are hashes, hence even: halves of the range are halves of them.
  middle = np.uint32(low + (high - low) // 2)
  below, above = [], []
  for run in runs:
    cut = np.searchsorted(run.values, middle, side='right')
    below.append(run.between(0, cut))
    above.append(run.between(cut, len(run.values)))
  for half in (below, above):
    yield from _merge([run for run in half if len(run.values)], most)


def _sum(runs: list[Counts]) -> Pairs:
  values, place = np.unique(
      np.concatenate([run.values for run in runs]), return_inverse=True
  )
  # Weights are float64, which counts exactly up to 2**53.
  counts = np.bincount(
      place, weights=np.concatenate([run.counts for run in runs])
  )
  return np.stack([values, counts.astype(np.uint32)], axis=1)
