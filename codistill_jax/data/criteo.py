"""Criteo Display Advertising Challenge (Kaggle, 2014): lines -> rows on disk.

A line has 40 columns separated by tabs: the label, 0 or 1; the integers I1 to
I13; the categories C1 to C26, 8 hexadecimal digits each. An empty field is a
missing value. There is no header.

Lines that do not fit the format are counted by reason and left out.

Rows on disk, which `prepare_clicks` writes and the task reads:

  <data_dir>/meta.json              written last; sizes, settings, checksums
  <data_dir>/train/00000.rows.npy   uint32 (rows, 40); see `Parsed`
  <data_dir>/validation/...         the same
  <data_dir>/test/...               the same
  <data_dir>/counts/C01.u32         uint32 pairs (value, count): the values of
                                    C1 in the training split, rising, without
                                    missing ones

A shard without rows has no file. A row lies in one place, so that one taken at
random costs one page of the disk.

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

Shape suffixes: N lines or rows, S splits.
"""

import collections
import functools
import io
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax.data import (
    order,
    prepare,
    prepared_files,
    records,
    sources,
)
from codistill_jax.data.prepare import Map
from codistill_jax.data.records import Reject
from codistill_jax.data.sources import Source
from codistill_jax.data.tables import MISSING
from codistill_jax.storage import files

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
COLUMNS = 1 + NUM_INTEGERS + NUM_CATEGORIES
MISSING_INTEGER = np.iinfo(np.int32).min

SPLITS = ('train', 'validation', 'test')
SPLIT_BY = ('time', 'hash')
DEFAULT_SHARD_LINES = 1 << 20

_MAX_LINE = 4096  # Bytes; a longer one is 'too_long', and never held.
_RUNS = 'runs'
_BLOCK = 4096  # Lines that are parsed at once: a megabyte.
_SPLIT_KEY = 6  # The next after those of order.py.


# --- lines -------------------------------------------------------------------


# Label and integers; categories; either end of a line, or the end of the file.
_LINE = re.compile(
    rb'([01](?:\t(?:-?[0-9]{1,10}+)?+){13})'
    rb'((?:\t(?:[0-9a-fA-F]{8})?+){26})\r?\n?'
)
_INTEGER = re.compile(rb'(-?[0-9]{1,10})?')
_LARGEST = np.iinfo(np.int32).max
_NONE = 10**10  # In place of a missing integer; more digits than one may have.


class Parsed(NamedTuple):
  """What some lines hold.

  Attributes:
    rows: uint32 (good lines, 40): label; integers as the bits of an int32,
      `MISSING_INTEGER` if missing; categories, 0 if missing.
    places: int64 (good lines,): the place of each among the lines.
    rejects: How many lines were left out for which reason, see `_reason`.
  """

  rows: np.ndarray
  places: np.ndarray
  rejects: collections.Counter


def parse(lines: Sequence[bytes | Reject]) -> Parsed:
  """Parses lines; the category 00000000 is read as 00000001.

  0 stands for a missing one.
  """
  heads, tails, places = [], [], []
  rejects: collections.Counter[str] = collections.Counter()
  for place, line in enumerate(lines):
    if isinstance(line, bytes) and (fields := _LINE.fullmatch(line)):
      heads.append(fields[1])
      tails.append(fields[2])
      places.append(place)
    else:
      rejects[_reason(line)] += 1
  heads, tails = b'\t'.join([*heads, b'']), b''.join([*tails, b'\t'])
  integers = np.fromstring(_filled(heads, b'%d' % _NONE), np.int64, sep='\t')
  integers = integers.reshape(-1, 1 + NUM_INTEGERS)
  missing = integers == _NONE
  good = (missing | (np.abs(integers) <= _LARGEST)).all(axis=1)
  if not good.all():
    rejects['bad_integer'] += int((~good).sum())
  # White space between hexadecimal digits is passed over.
  tails = tails.replace(b'\t00000000', b'\t00000001')
  categories = bytes.fromhex(_filled(tails, b'00000000').decode('ascii'))
  rows = np.empty((len(places), COLUMNS), np.uint32)
  rows[:, :-NUM_CATEGORIES] = np.where(missing, MISSING_INTEGER, integers)
  rows[:, -NUM_CATEGORIES:] = np.frombuffer(categories, '>u4').reshape(
      -1, NUM_CATEGORIES
  )
  return Parsed(rows[good], np.asarray(places, np.int64)[good], rejects)


def _filled(fields: bytes, value: bytes) -> bytes:
  """Puts a value into the fields between tabs that are empty."""
  for _ in range(2):  # Of three tabs the second ends one and begins another.
    fields = fields.replace(b'\t\t', b'\t%b\t' % value)
  return fields


def _reason(line: bytes | Reject) -> str:
  """Says why a line is left out: the most telling reason."""
  if isinstance(line, Reject):
    return line.reason
  try:
    line.decode('utf-8')
  except UnicodeDecodeError:
    return 'not_utf8'
  fields = line.removesuffix(b'\n').removesuffix(b'\r').split(b'\t')
  if len(fields) != COLUMNS:
    return 'wrong_columns'
  if fields[0] not in (b'0', b'1'):
    return 'bad_label'
  for field in fields[1 : 1 + NUM_INTEGERS]:
    if not _INTEGER.fullmatch(field) or abs(int(field or 0)) > _LARGEST:
      return 'bad_integer'
  return 'bad_category'


# --- rows on disk -----------------------------------------------------------


def rows_name(split: str, shard: int) -> str:
  return f'{split}/{shard:05d}.rows.npy'


def counts_name(column: int) -> str:
  return f'counts/C{column + 1:02d}.u32'


def _files(meta: dict[str, Any]) -> dict[str, str]:
  """Returns the SHA-256 of each file."""
  rows = {
      rows_name(split, i): shard['sha256']
      for split in SPLITS
      for i, shard in enumerate(meta['splits'][split]['shards'])
      if shard['rows']
  }
  return rows | {
      counts_name(i): count['sha256'] for i, count in enumerate(meta['counts'])
  }


KIND = prepared_files.DataKind(
    'prepare_clicks',
    1,
    frozenset({'counts'}),
    _files,
    '--source=criteo:train.txt ',
)


def read_meta(data_dir: str | os.PathLike) -> dict[str, Any]:
  """Reads `meta.json`.

  Raises:
    FileNotFoundError, ValueError: As `prepared_files.read_meta`.
  """
  return prepared_files.read_meta(files.on_disk(data_dir), KIND)


def open_rows(data_dir: str | os.PathLike, split: str) -> prepared_files.Stack:
  """Opens the rows of one split, uint32 (rows, 40), if they are as described.

  Raises:
    FileNotFoundError: If there is no finished data set, or a file is missing.
    ValueError: If a file is damaged, or the split is empty.
  """
  described = read_meta(data_dir)['splits'][split]
  if not described['rows']:
    raise ValueError(
        f'The {split} split of {data_dir} is empty; prepare the data again'
        ' with other fractions or more lines.'
    )
  return prepared_files.Stack(
      [
          prepared_files.open_array(
              files.on_disk(data_dir) / rows_name(split, i),
              (shard['rows'], COLUMNS),
              np.dtype(np.uint32),
              KIND,
          )
          for i, shard in enumerate(described['shards'])
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
  path = files.on_disk(data_dir) / counts_name(column)
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


# --- preparation -------------------------------------------------------------


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
    max_rejected: float = 0.05,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares clicks, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: 'criteo:PATH_OR_GLOB'.
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
  output = files.on_disk(output)
  recipe = prepare.Recipe(
      kind=KIND,
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
      max_rejected=max_rejected,
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
  split = functools.partial(records.lines, limit=_MAX_LINE)
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
    assert total_lines is not None  # They were counted.
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
    piece: Sequence[Any],
) -> dict[str, Any]:
  """Writes the rows of a piece, a shard for each split, and its run."""
  rows, places_N, rejects = _parse(piece)
  first = None
  for place in np.setdiff1d(np.arange(len(piece)), places_N)[:1].tolist():
    first = prepare.rejected(place, _reason(piece[place]), piece[place])
  numbers_N = places_N + number * config['shard_lines']
  split_N = split_of(numbers_N, config, total_lines)
  splits: dict[str, dict[str, Any]] = {}
  for i, name in enumerate(SPLITS):
    part = rows[split_N == i]
    splits[name] = {'rows': len(part), 'positives': int(part[:, 0].sum())}
    if len(part):
      path = output / rows_name(name, number)
      splits[name]['sha256'] = prepared_files.write_array(path, part)
      if name == 'train':
        _write_run(_run_path(output, number), part)
  return {
      'records': len(piece),
      'rejects': rejects,
      'first': first,
      'splits': splits,
  }


def _parse(piece: Sequence[bytes | Reject]) -> Parsed:
  """Parses a piece, a block at a time."""
  starts = range(0, max(1, len(piece)), _BLOCK)
  parsed = [parse(piece[start : start + _BLOCK]) for start in starts]
  return Parsed(
      np.concatenate([block.rows for block in parsed]),
      np.concatenate([s + block.places for s, block in zip(starts, parsed)]),
      sum((block.rejects for block in parsed), collections.Counter()),
  )


# --- counts of values --------------------------------------------------------


def _run_path(output: pathlib.Path, number: int) -> pathlib.Path:
  return output / _RUNS / f'{number:05d}.npz'


def _write_run(path: pathlib.Path, rows: np.ndarray) -> None:
  """Counts the values of each column; the missing one is left out."""
  columns = []
  for values_N in rows[:, -NUM_CATEGORIES:].T:
    values, counts = np.unique(values_N, return_counts=True)
    pairs = np.stack([values, counts.astype(np.uint32)], axis=1)
    columns.append(pairs[values != MISSING])
  run = io.BytesIO()
  np.savez(run, *columns)
  prepared_files.write_file(path, run.getbuffer())


def _merge(
    output: pathlib.Path, runs: Sequence[int], column: int
) -> dict[str, Any]:
  """Writes the value counts of one column; describes the file.

  All runs of the column are held in memory.
  """
  parts = [np.zeros((0, 2), np.uint32)]
  for number in runs:
    with np.load(_run_path(output, number)) as run:
      parts.append(run[f'arr_{column}'])
  values_N, counts_N = np.concatenate(parts).T
  values, place_N = np.unique(values_N, return_inverse=True)
  # Weights are float64, which counts exactly up to 2**53.
  counts = np.bincount(place_N, weights=counts_N)
  total = np.stack([values, counts.astype(np.uint32)], axis=1)
  path = output / counts_name(column)
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
  for name, fraction in zip(SPLITS, fractions):
    split = meta['splits'].get(name, {})
    rows, positives = split.get('rows', 0), split.get('positives', 0)
    fault = None
    if fraction and not rows:
      fault = (
          f'Of {meta["records"]:,} lines, none that is good fell into the'
          f' {name} split'
      )
    elif rows and positives in (0, rows):
      fault = (
          f'All {rows:,} rows of the {name} split have the label'
          f' {int(positives > 0)}'
      )
    if fault:
      raise ValueError(
          f'{fault} (rejects: {prepare.counts_text(meta["rejects"])}); check'
          ' the source, or choose other fractions, and another output.'
      )
  report('Counting the values of each column.')
  train = meta['splits']['train']['shards']
  runs = [number for number, shard in enumerate(train) if shard['rows']]
  columns = range(NUM_CATEGORIES)
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
