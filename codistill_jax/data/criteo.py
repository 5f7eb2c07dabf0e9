"""Criteo Display Advertising Challenge (Kaggle, 2014): lines -> rows on disk.

A line has 40 columns separated by tabs: the label, 0 or 1; the integers I1 to
I13; the categories C1 to C26, 8 hexadecimal digits each. An empty field is a
missing value. There is no header.

A block of lines is parsed at once, with numpy: a few microseconds a row. Lines
that do not fit the format are counted by reason and left out.

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

Shape suffixes: N lines or rows, F fields of some lines, I 13, K 26, S splits.
"""

import collections
import functools
import io
import itertools
import os
import pathlib
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
from codistill_jax.data.records import Raw, Reject
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

# Why a line is left out, most telling first; 'not_utf8' before them all.
REASONS = (
    'wrong_columns',
    'bad_label',
    'bad_integer',
    'bad_category',
)

_MAX_LINE = 4096  # Bytes; a longer one is 'too_long', and never held.
_HEX_DIGITS = 8
_MAX_DIGITS = 10  # Of an int32.

_RUNS = 'runs'
_PARSED = 4096  # Lines that are parsed at once: a megabyte.
_SPLIT_KEY = 6  # The next after those of order.py.


# --- lines -------------------------------------------------------------------


class Parsed(NamedTuple):
  """What a block of lines holds.

  Attributes:
    rows: uint32 (good lines, 40): label; integers as the bits of an int32,
      `MISSING_INTEGER` if missing; categories, 0 if missing.
    lines: int64 (good lines,): the place of each among the block's lines.
    rejects: How many lines were left out for which reason.
  """

  rows: np.ndarray
  lines: np.ndarray
  rejects: collections.Counter


def parse(data: bytes) -> Parsed:
  """Parses whole lines, each with a newline at its end.

  The category 00000000 is read as 00000001, since 0 stands for a missing one.
  """
  # Some bytes more, so that 8 can be read from any place.
  text = np.frombuffer(data + bytes(_HEX_DIGITS), np.uint8)
  starts_N, ends_N = _lines(text[: len(data)])
  tabs = np.flatnonzero(text == ord('\t'))
  first_tab_N = np.searchsorted(tabs, starts_N)
  tabs_N = np.searchsorted(tabs, ends_N) - first_tab_N
  reason_N = np.full(len(starts_N), -1, np.int8)
  reason_N[tabs_N != COLUMNS - 1] = REASONS.index('wrong_columns')

  whole = np.flatnonzero(reason_N < 0)
  inner = tabs[first_tab_N[whole, None] + np.arange(COLUMNS - 1)[None, :]]
  begins = np.concatenate([starts_N[whole, None], inner + 1], axis=1)
  ends = np.concatenate([inner, ends_N[whole, None]], axis=1)
  rows, bad = _fields(text, begins, ends - begins)
  good = np.full(len(whole), True)
  for name, bad_lines in bad.items():
    reason_N[whole[bad_lines & good]] = REASONS.index(name)
    good &= ~bad_lines
  rejects = _count(data, starts_N, ends_N, reason_N)
  return Parsed(rows[good], whole[good], rejects)


def _lines(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Finds where lines start and end, without line ends of either kind."""
  ends_N = np.flatnonzero(text == ord('\n'))
  starts_N = np.concatenate([[0], ends_N[:-1] + 1])[: len(ends_N)]
  returns_N = (ends_N > starts_N) & (text[ends_N - 1] == ord('\r'))
  return starts_N, ends_N - returns_N


def _fields(
    text: np.ndarray, begins: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Parses lines with 40 fields: rows, and which lines are bad, by reason."""
  label = text[begins[:, 0]]
  bad_label = (lengths[:, 0] != 1) | ((label != ord('0')) & (label != ord('1')))
  middle, last = slice(1, 1 + NUM_INTEGERS), slice(1 + NUM_INTEGERS, None)
  integers, bad_integer = _per_line(
      _integers, MISSING_INTEGER, text, begins, lengths, middle
  )
  categories, bad_category = _per_line(
      _categories, MISSING, text, begins, lengths, last
  )
  rows = np.empty((len(begins), COLUMNS), np.uint32)
  rows[:, 0] = label == ord('1')
  rows[:, middle] = integers.astype(np.int32).view(np.uint32)
  rows[:, last] = categories
  return rows, {
      'bad_label': bad_label,
      'bad_integer': bad_integer,
      'bad_category': bad_category,
  }


def _per_line(parse_fields, missing, text, begins, lengths, columns):
  """Parses some columns: values, and the lines in which one is bad.

  `parse_fields(text, begins_F, lengths_F) -> (values_F, bad_F)` gets the fields
  that are not empty.
  """
  begins, lengths = begins[:, columns], lengths[:, columns]
  values = np.full(begins.shape, missing, np.int64)
  bad = np.zeros(begins.shape, bool)
  filled = lengths > 0
  values[filled], bad[filled] = parse_fields(
      text, begins[filled], lengths[filled]
  )
  return values, bad.any(axis=1)


def _integers(text, begins_F, lengths_F):
  negative_F = text[begins_F] == ord('-')
  begins_F, lengths_F = begins_F + negative_F, lengths_F - negative_F
  bad_F = (lengths_F < 1) | (lengths_F > _MAX_DIGITS)
  values_F = np.zeros(len(begins_F), np.int64)
  longest = min(_MAX_DIGITS, int(lengths_F.max(initial=0)))
  for place in range(longest):
    # Most integers are short: fewer and fewer have a digit at this place.
    here = np.flatnonzero(lengths_F > place)
    digits = text[begins_F[here] + place] - np.uint8(ord('0'))  # Wraps.
    bad_F[here] |= digits > 9
    values_F[here] = values_F[here] * 10 + digits
  bad_F |= values_F > np.iinfo(np.int32).max
  return np.where(negative_F, -values_F, values_F), bad_F


_NO_DIGIT = 0xFF
_DIGIT = np.full(256, _NO_DIGIT, np.uint8)
for _value, _character in enumerate(b'0123456789abcdef'):
  _DIGIT[_character] = _value
  _DIGIT[ord(chr(_character).upper())] = _value


def _categories(text, begins_F, lengths_F):
  # All 8 characters of a field at once, as one number of 64 bits.
  windows = np.ndarray(
      (len(text) - _HEX_DIGITS + 1,), '<u8', buffer=text, strides=(1,)
  )
  characters = np.take(windows, begins_F)
  digits = _DIGIT[characters.view(np.uint8)].view('<u8')
  bad_F = (digits & np.uint64(0xF0F0F0F0F0F0F0F0)) != 0
  bad_F |= lengths_F != _HEX_DIGITS
  # The first digit is in the lowest byte: pairs become bytes, in every other.
  pairs = (digits << np.uint64(4)) | (digits >> np.uint64(8))
  pairs &= np.uint64(0x00FF00FF00FF00FF)
  values_F = pairs.view('<u2').astype(np.uint8).view('>u4').astype(np.uint32)
  return np.where(values_F == MISSING, 1, values_F), bad_F


def _count(data, starts_N, ends_N, reason_N) -> collections.Counter:
  """Counts bad lines by reason."""
  rejects: collections.Counter[str] = collections.Counter()
  for line in np.flatnonzero(reason_N >= 0).tolist():
    try:
      data[starts_N[line] : ends_N[line]].decode('utf-8')
    except UnicodeDecodeError:
      rejects['not_utf8'] += 1
    else:
      rejects[REASONS[reason_N[line]]] += 1
  return rejects


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
    piece: Sequence[Raw],
) -> dict[str, Any]:
  """Writes the rows of a piece, a shard for each split, and its run."""
  rows, numbers_N, rejects = _parse(piece)
  bad = np.setdiff1d(np.arange(len(piece)), numbers_N)
  numbers_N += number * config['shard_lines']
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
      'first': _rejected(piece, int(bad[0])) if len(bad) else None,
      'splits': splits,
  }


def _rejected(piece: Sequence[Raw], place: int) -> tuple[int, str, str]:
  (reason,) = _parse(piece[place : place + 1])[2]
  return prepare.rejected(place, reason, piece[place])


def _parse(
    piece: Sequence[Raw],
) -> tuple[np.ndarray, np.ndarray, collections.Counter]:
  """Returns the rows of good lines, their places, and what was left out."""
  rows = [np.zeros((0, COLUMNS), np.uint32)]
  places = [np.zeros(0, np.int64)]
  rejects: collections.Counter[str] = collections.Counter()
  for start in range(0, len(piece), _PARSED):
    lines: Any = piece[start : start + _PARSED]
    bad = [line for line in lines if isinstance(line, Reject)]
    lines_N = np.arange(start, start + len(lines))
    if bad:
      rejects.update(line.reason for line in bad)
      good = [not isinstance(line, Reject) for line in lines]
      lines, lines_N = list(itertools.compress(lines, good)), lines_N[good]
    data = b''.join(lines)
    if data.count(b'\n') < len(lines):  # The last one of a file has no end.
      data = b''.join(line.removesuffix(b'\n') + b'\n' for line in lines)
    parsed = parse(data)
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
