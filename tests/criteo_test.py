"""Criteo's format: every good line is read, every bad one is counted."""

import gzip
import os
import pathlib

import hypothesis
import numpy as np
import pytest
from click_files import expected_row, lines, write_lines
from etils import epath
from hypothesis import strategies as st

from codistill_jax.data import criteo
from codistill_jax.data.records import Reject

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(
    os.environ.get('CODISTILL_SHARED_DATA', ROOT.parent / 'shared' / 'data')
)


def joined(texts):
  return b''.join(
      (t.encode() if isinstance(t, str) else t) + b'\n' for t in texts
  )


def with_field(text, column, value):
  fields = text.split('\t')
  fields[column] = value
  return '\t'.join(fields)


GOOD = lines(1, seed=5)[0]
BAD = {
    'no columns': ('', 'wrong_columns'),
    'a column less': (GOOD.rpartition('\t')[0], 'wrong_columns'),
    'a column more': (GOOD + '\t', 'wrong_columns'),
    'two lines in one': (GOOD + GOOD, 'wrong_columns'),
    'other separators': (GOOD.replace('\t', ','), 'wrong_columns'),
    'no label': (with_field(GOOD, 0, ''), 'bad_label'),
    'label 2': (with_field(GOOD, 0, '2'), 'bad_label'),
    'label 01': (with_field(GOOD, 0, '01'), 'bad_label'),
    'a fraction': (with_field(GOOD, 1, '1.5'), 'bad_integer'),
    'a word': (with_field(GOOD, 13, 'NULL'), 'bad_integer'),
    'a sign alone': (with_field(GOOD, 2, '-'), 'bad_integer'),
    'two signs': (with_field(GOOD, 2, '--1'), 'bad_integer'),
    'a plus': (with_field(GOOD, 2, '+1'), 'bad_integer'),
    'beyond int32': (with_field(GOOD, 3, '2147483648'), 'bad_integer'),
    'the missing one': (with_field(GOOD, 3, '-2147483648'), 'bad_integer'),
    'many digits': (with_field(GOOD, 3, '1' * 30), 'bad_integer'),
    'a space': (with_field(GOOD, 4, ' 1'), 'bad_integer'),
    'seven digits': (with_field(GOOD, 14, '1234567'), 'bad_category'),
    'nine digits': (with_field(GOOD, 39, '123456789'), 'bad_category'),
    'no digit': (with_field(GOOD, 20, '1234567g'), 'bad_category'),
    'a NUL': (with_field(GOOD, 20, '1234567\0'), 'bad_category'),
    'an accent': (with_field(GOOD, 20, '123456é'), 'bad_category'),
    'Latin-1': (with_field(GOOD, 20, '123456é').encode('latin1'), 'not_utf8'),
    'bytes': (b'\xff\xfe\x00', 'not_utf8'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_damaged_line_is_counted_and_harms_no_other(name):
  bad, reason = BAD[name]
  others = lines(3, seed=1)
  found = criteo.parse(joined([others[0], bad, *others[1:], bad]))
  assert found.rows.tolist() == [expected_row(t) for t in others]
  assert found.lines.tolist() == [0, 2, 3]
  assert found.rejects == {reason: 2}


def test_a_line_with_several_faults_counts_once_for_the_first():
  text = with_field(with_field(GOOD, 0, 'x'), 20, 'x')
  assert criteo.parse(joined([text])).rejects == {'bad_label': 1}
  text = with_field(with_field(GOOD, 1, 'x'), 20, 'x')
  assert criteo.parse(joined([text])).rejects == {'bad_integer': 1}


def test_what_is_missing_negative_or_zero_is_told_apart():
  text = '\t'.join(['1', '', '-1', '0', '007', *[''] * 9])
  text += '\t' + '\t'.join(['00000000', 'FFFFFFFF', 'ffffffff', *[''] * 23])
  (row,) = criteo.parse(joined([text])).rows
  assert row[:5].view(np.int32).tolist() == [1, -(2**31), -1, 0, 7]
  assert row[14:18].tolist() == [1, 2**32 - 1, 2**32 - 1, 0]


def test_windows_line_ends_are_line_ends():
  texts = lines(3)
  data = b''.join(t.encode() + b'\r\n' for t in texts)
  found = criteo.parse(data)
  assert found.rows.tolist() == [expected_row(t) for t in texts]
  assert not found.rejects


def test_no_lines_are_no_rows():
  found = criteo.parse(b'')
  assert found.rows.shape == (0, 40) and not found.rejects
  found = criteo.parse(b'\n\n')
  assert found.rows.shape == (0, 40)
  assert found.rejects == {'wrong_columns': 2}


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_whatever_happens_to_bytes_each_line_is_read_or_counted(data):
  raw = bytearray(joined(lines(4, seed=data.draw(st.integers(0, 20)))))
  for _ in range(data.draw(st.integers(0, 6))):
    place = data.draw(st.integers(0, len(raw) - 2))
    raw[place] = data.draw(st.sampled_from(b'\t\n\r-0f\xc3\xa9\x00 9g'))
  raw = bytes(raw)
  found = criteo.parse(raw)
  texts = raw.split(b'\n')[:-1]
  assert len(found.rows) + sum(found.rejects.values()) == len(texts)
  for row, number in zip(found.rows.tolist(), found.lines.tolist()):
    text = texts[number].removesuffix(b'\r').decode('ascii')
    assert row == expected_row(text)


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(st.binary(max_size=300))
def test_any_bytes_are_lines_that_are_read_or_counted(raw):
  found = criteo.parse(raw + b'\n')
  count = raw.count(b'\n') + 1
  assert len(found.rows) + sum(found.rejects.values()) == count


# -- files --------------------------------------------------------------------


def read(*paths):
  """Lines of files, without their ends."""
  source = criteo.open_source(f'criteo:{paths[0].parent}/*')
  assert list(source.files) == [epath.Path(path) for path in paths]
  return [
      line if isinstance(line, Reject) else line.rstrip(b'\n')
      for line in source.raw()
  ]


DAMAGED = Reject('damaged_file')


def test_the_last_line_needs_no_end_and_a_mark_at_the_start_is_none(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'\xef\xbb\xbfone\n\ntwo')
  assert read(path) == [b'one', b'', b'two']


@pytest.mark.parametrize('kept', [0, 2, 5, 11, 200, 900, -1, -9])
def test_a_truncated_gzip_file_gives_what_it_has(tmp_path, kept):
  first, second = tmp_path / '0.gz', tmp_path / '1.gz'
  expected = [t.encode() for t in write_lines(first, 30)]
  more = [t.encode() for t in write_lines(second, 3, seed=1)]
  first.write_bytes(first.read_bytes()[:kept])
  found = read(first, second)
  assert found[-3:] == more
  # An empty file is an empty gzip file.
  own = found[:-4] if kept else found[:-3]
  assert found[len(own) : -3] == ([DAMAGED] if kept else [])
  assert own == expected[: len(own)]
  if kept in (-1, -9):
    assert len(own) >= 29
  if kept == 900:
    assert own


def test_the_first_rows_of_the_real_file():
  path = SHARED / 'criteo-kaggle-10k' / 'train_head10k.txt.gz'
  if not path.exists():
    pytest.skip(f'{path} is missing: real data are not part of the project')
  data = gzip.decompress(path.read_bytes())
  parsed = criteo.parse(data)
  assert parsed.rows.shape == (10_000, 40) and not parsed.rejects
  assert parsed.rows[:, 0].sum() == 2182
  texts = data.decode().splitlines()
  assert parsed.rows[::97].tolist() == [expected_row(t) for t in texts[::97]]
