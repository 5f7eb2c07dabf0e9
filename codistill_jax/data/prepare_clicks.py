"""A preparation of clicks: lines of Criteo's format -> rows on disk.

How lines are split:

* 'time': Kaggle's lines are in the order of time, over seven days. The last
  lines are the test split, those before them the validation split: a model is
  judged on what comes after what it learned from, as in use.
* 'hash': by the number of the line, at random: splits of one distribution, as
  in most work on the Kaggle data; it makes the task a little easier.

Lines are numbered with the bad ones, so that a line's split does not depend on
which others are good.

The values of categories are counted as an external sort does it: every piece
leaves a *run*, the different values of each column in its training rows and how
often it has them; in the end the runs are merged, a column at a time.

Shape suffixes: N rows, S splits.
"""

import collections
import functools
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from codistill_jax.data import (
    criteo,
    order,
    prepare,
    prepared_files,
    records,
    sources,
)
from codistill_jax.data.prepare import Map
from codistill_jax.data.records import Raw, Reject
from codistill_jax.data.sources import Source

SPLIT_BY = ('time', 'hash')
DEFAULT_SHARD_LINES = 1 << 20

_RUNS = 'runs'
_MERGED = 8  # Runs that are merged at once.
_PARSED = 4096  # Lines that are parsed at once: a megabyte.
_SPLIT_KEY = 6  # The next after those of order.py.


def prepare_clicks(
    output: str | os.PathLike,
    source: str,
    *,
    split: str = 'time',
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 0,
    max_lines: int | None = None,
    shard_lines: int = DEFAULT_SHARD_LINES,
    source_checksums: str | None = None,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares clicks, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: 'criteo:PATH_OR_GLOB', of files that may end in .gz.
    split: 'time' or 'hash'; see the head of this file.
    source_checksums: --checksums.
    report: Takes a line about what goes on. All others: as the flags of the
      same names of `experiments.prepare_clicks`.

  Returns, raises: As `prepare.run`.
  """
  config = {
      'source': source,
      'split': split,
      'validation_fraction': validation_fraction,
      'test_fraction': test_fraction,
      'seed': seed,
      'max_lines': max_lines,
      'shard_lines': shard_lines,
  }
  _check(config)
  output = pathlib.Path(output)
  recipe = prepare.Recipe(
      kind=criteo.KIND,
      config=config,
      open_source=functools.partial(open_source, source),
      start=functools.partial(_start, config, report),
      cut=lambda source, lines: records.batched(lines, shard_lines),
      make=lambda source, known: functools.partial(
          _write_rows, output, config, known['total_lines']
      ),
      finish=functools.partial(_finish, output, config, report),
      leftovers=(_RUNS,),
  )
  return prepare.run(
      output,
      recipe,
      source_checksums=source_checksums,
      workers=workers,
      report=report,
  )


def _check(config: dict[str, Any]) -> None:
  if config['split'] not in SPLIT_BY:
    raise ValueError(
        f'split must be one of {", ".join(SPLIT_BY)}; got'
        f' {config["split"]!r}.'
    )
  fractions = config['validation_fraction'], config['test_fraction']
  if not (min(fractions) >= 0 and sum(fractions) < 1):
    raise ValueError(
        'validation_fraction and test_fraction must be 0 or more and below 1'
        f' together; got {fractions[0]} and {fractions[1]}.'
    )
  prepare.check_counts(config, 'max_lines', 'shard_lines')


def open_source(spec: str) -> Source:
  """Opens 'criteo:PATH_OR_GLOB'; its records are lines.

  Raises:
    ValueError: If the spec is malformed.
    FileNotFoundError: If no file matches.
  """
  kind, _, pattern = spec.partition(':')
  if kind != 'criteo' or not pattern:
    raise ValueError(f'Unknown source {spec!r}; expected criteo:PATH_OR_GLOB.')
  split = functools.partial(records.lines, limit=criteo.MAX_LINE)
  return sources.file_source(spec, records.expand(pattern), split)


def _start(
    config: dict[str, Any],
    report: Callable[[str], None],
    source: Source,
    process: Map,
) -> prepare.Start:
  """Counts the lines: where the last ones begin is known only then."""
  del process
  total = config['max_lines']
  if config['split'] == 'time':
    report('Counting lines.')
    total = sum(1 for _ in itertools.islice(source.raw(), total))
  return prepare.Start({'total_lines': total}, total)


def split_of(
    numbers_N: np.ndarray, config: dict[str, Any], total_lines: int | None
) -> np.ndarray:
  """Returns the split of each line number, as an index into SPLITS."""
  validation, test = config['validation_fraction'], config['test_fraction']
  if config['split'] == 'time':
    first_test = total_lines - int(total_lines * test)
    first_validation = first_test - int(total_lines * validation)
    bounds_S = np.asarray([first_validation, first_test])
    return np.searchsorted(bounds_S, numbers_N, side='right')
  key = np.random.SeedSequence((_SPLIT_KEY, config['seed'])).generate_state(1)
  shares_S = np.asarray([1 - validation - test, 1 - test])
  low_N, high_N = numbers_N.astype(np.uint32), numbers_N >> 32
  # Twice, so that line numbers beyond 2**32 count too.
  mix = order.mix32
  draw_N = mix(mix(low_N ^ key) ^ high_N.astype(np.uint32))
  return np.searchsorted(shares_S, draw_N / 2.0**32, side='right')


# --- pieces ------------------------------------------------------------------


def _write_rows(
    output: pathlib.Path,
    config: dict[str, Any],
    total_lines: int | None,
    number: int,
    piece: Sequence[Raw],
) -> dict[str, Any]:
  """Writes the rows of a piece, a shard for each split, and its run."""
  rows, numbers_N, rejects = _parse(piece)
  numbers_N += number * config['shard_lines']
  split_N = split_of(numbers_N, config, total_lines)
  splits = {}
  for i, name in enumerate(criteo.SPLITS):
    part = rows[split_N == i]
    splits[name] = {'rows': len(part), 'positives': int(part[:, 0].sum())}
    if len(part):
      path = output / criteo.rows_name(name, number)
      splits[name]['sha256'] = prepared_files.write_array(path, part)
      if name == 'train':
        _write_run(_run_path(output, number), part)
  return {'records': len(piece), 'rejects': rejects, 'splits': splits}


def _parse(
    piece: Sequence[Raw],
) -> tuple[np.ndarray, np.ndarray, collections.Counter]:
  """Returns the rows of good lines, their places, and what was left out."""
  rows = [np.zeros((0, criteo.COLUMNS), np.uint32)]
  places = [np.zeros(0, np.int64)]
  rejects = collections.Counter()
  for start in range(0, len(piece), _PARSED):
    lines = piece[start : start + _PARSED]
    bad = [line for line in lines if isinstance(line, Reject)]
    lines_N = np.arange(start, start + len(lines))
    if bad:
      rejects.update(line.reason for line in bad)
      good = [not isinstance(line, Reject) for line in lines]
      lines, lines_N = list(itertools.compress(lines, good)), lines_N[good]
    data = b''.join(lines)
    if data.count(b'\n') < len(lines):  # The last one of a file has no end.
      data = b''.join(line.removesuffix(b'\n') + b'\n' for line in lines)
    parsed = criteo.parse(data)
    rows.append(parsed.rows)
    places.append(lines_N[parsed.lines])
    rejects += parsed.rejects
  return np.concatenate(rows), np.concatenate(places), rejects


# --- counts of values --------------------------------------------------------


def _run_path(output: pathlib.Path, number: int) -> pathlib.Path:
  return output / _RUNS / f'{number:05d}.npz'


def _write_run(path: pathlib.Path, rows: np.ndarray) -> None:
  """Counts the values of each column; the missing one is left out."""
  columns = []
  for values_N in rows[:, -criteo.NUM_CATEGORIES :].T:
    values, counts = np.unique(values_N, return_counts=True)
    pairs = np.stack([values, counts.astype(np.uint32)], axis=1)
    columns.append(pairs[values != criteo.MISSING])
  run = io.BytesIO()
  np.savez(run, *columns)
  prepared_files.write_file(path, run.getbuffer())


def _merge(
    output: pathlib.Path, runs: Sequence[int], column: int
) -> dict[str, Any]:
  """Writes the value counts of one column; describes the file.

  The different values of the column are held in memory, and a few runs of it.
  """
  total = np.zeros((0, 2), np.uint32)  # Values, rising, and counts.
  for start in range(0, len(runs), _MERGED):
    parts = [total]
    for number in runs[start : start + _MERGED]:
      with np.load(_run_path(output, number)) as run:
        parts.append(run[f'arr_{column}'])
    values, place = np.unique(np.concatenate(parts)[:, 0], return_inverse=True)
    # Weights are float64, which counts exactly up to 2**53.
    counts = np.bincount(place, weights=np.concatenate(parts)[:, 1])
    total = np.stack([values, counts.astype(np.uint32)], axis=1)
  path = output / criteo.counts_name(column)
  digest = prepared_files.write_file(path, total.astype('<u4').tobytes())
  return {'values': len(total), 'sha256': digest}


# --- the result --------------------------------------------------------------


def _finish(
    output: pathlib.Path,
    config: dict[str, Any],
    report: Callable[[str], None],
    meta: dict[str, Any],
    process: Map,
) -> dict[str, Any]:
  """Checks the splits, and counts the values of categories."""
  fractions = 1, config['validation_fraction'], config['test_fraction']
  for name, fraction in zip(criteo.SPLITS, fractions):
    if fraction and not meta['splits'].get(name, {}).get('rows'):
      raise ValueError(
          f'Of {meta["records"]:,} lines, none that is good fell into the'
          f' {name} split (rejects: {prepare.counts_text(meta["rejects"])});'
          ' check the source, or choose other fractions, and another output.'
      )
  report('Counting the values of each column.')
  train = meta['splits']['train']['shards']
  runs = [number for number, shard in enumerate(train) if shard['rows']]
  columns = range(criteo.NUM_CATEGORIES)
  merge = functools.partial(_merge, output, runs)
  return {'counts': list(process(merge, columns))}


def summary(meta: dict[str, Any]) -> str:
  """Returns a few lines about prepared clicks, of their `meta.json`."""
  lines = [
      f'{name}: {split["rows"]:,} rows,'
      f' {split["positives"] / max(1, split["rows"]):.2%} positive,'
      f' {sum(shard["rows"] > 0 for shard in split["shards"])} shards'
      for name, split in meta['splits'].items()
  ]
  values = [count['values'] for count in meta['counts']]
  lines.append(f'rejected lines: {prepare.counts_text(meta["rejects"])}')
  lines.append(
      f'categories: {sum(values):,} values in {len(values)} columns of the'
      f' training split, {max(values):,} in the largest'
  )
  return '\n'.join(lines)
