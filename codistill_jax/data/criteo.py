"""Criteo Display Advertising Challenge (Kaggle, 2014): its lines, its rows.

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

Shape suffixes: N lines, F fields of some lines, I 13, K 26.
"""

import collections
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codistill_jax.data import prepared_files

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
COLUMNS = 1 + NUM_INTEGERS + NUM_CATEGORIES

MAX_LINE = 4096  # Bytes; a longer one is 'too_long', and never held.

# Values of rows that stand for an empty field.
MISSING = 0
MISSING_INTEGER = np.iinfo(np.int32).min

SPLITS = ('train', 'validation', 'test')

# Why a line is left out, most telling first; 'not_utf8' before them all.
REASONS = (
    'wrong_columns',
    'bad_label',
    'bad_integer',
    'bad_category',
)

_HEX_DIGITS = 8
_MAX_DIGITS = 10  # Of an int32.


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
  rejects = collections.Counter()
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


def open_rows(data_dir: str | os.PathLike, split: str) -> prepared_files.Stack:
  """Opens the rows of one split, uint32 (rows, 40), if they are as described.

  Raises:
    FileNotFoundError: If there is no finished data set, or a file is missing.
    ValueError: If a file is damaged.
  """
  data_dir = Path(data_dir)
  described = prepared_files.read_meta(data_dir, KIND)['splits'][split][
      'shards'
  ]
  return prepared_files.Stack(
      [
          prepared_files.open_array(
              data_dir / rows_name(split, i),
              (shard['rows'], COLUMNS),
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
  data_dir = Path(data_dir)
  path = data_dir / counts_name(column)
  values = prepared_files.read_meta(data_dir, KIND)['counts'][column]['values']
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
