"""Criteo's format: good lines are read, bad ones counted; what is prepared."""

import collections
import gzip
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from prepared import (
    expected_row,
    lines,
    run_clicks,
    shared,
    write_clicks,
    write_lines,
)

from codistill_jax.data import clicks, criteo, prepared_files


def ended(texts):
  return [(t.encode() if isinstance(t, str) else t) + b'\n' for t in texts]


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
    'two faults': (with_field(GOOD, 0, 'x')[:-1] + 'x', 'bad_label'),
    'two others': (with_field(GOOD, 1, 'x')[:-1] + 'x', 'bad_integer'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_damaged_line_is_counted_and_harms_no_other(name):
  bad, reason = BAD[name]
  others = lines(3, seed=1)
  found = criteo.parse(ended([others[0], bad, *others[1:], bad]))
  assert found.rows.tolist() == [expected_row(t) for t in others]
  assert found.places.tolist() == [0, 2, 3]
  assert found.rejects == {reason: 2}


def test_what_is_missing_negative_or_zero_is_told_apart():
  text = '\t'.join(['1', '', '-1', '0', '007', *[''] * 9])
  text += '\t' + '\t'.join(['00000000', 'FFFFFFFF', 'ffffffff', *[''] * 23])
  (row,) = criteo.parse(ended([text])).rows
  assert row[:5].view(np.int32).tolist() == [1, -(2**31), -1, 0, 7]
  assert row[14:18].tolist() == [1, 2**32 - 1, 2**32 - 1, 0]


def test_windows_line_ends_and_no_lines():
  texts = lines(3)
  found = criteo.parse(ended([f'{text}\r' for text in texts]))
  assert found.rows.tolist() == [expected_row(t) for t in texts]
  assert not found.rejects
  for data, count in (([], 0), ([b'\n', b'\n'], 2)):
    found = criteo.parse(data)
    assert found.rows.shape == (0, 40)
    assert found.rejects.total() == count


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_whatever_happens_to_bytes_each_line_is_read_or_counted(data):
  raw = bytearray(b''.join(ended(lines(4, data.draw(st.integers(0, 20))))))
  for _ in range(data.draw(st.integers(0, 6))):
    place = data.draw(st.integers(0, len(raw) - 2))
    raw[place] = data.draw(st.sampled_from(b'\t\n\r-0f\xc3\xa9\x00 9g'))
  texts = bytes(raw).split(b'\n')[:-1]
  found = criteo.parse(ended(texts))
  assert len(found.rows) + sum(found.rejects.values()) == len(texts)
  for row, number in zip(found.rows.tolist(), found.places.tolist()):
    text = texts[number].removesuffix(b'\r').decode('ascii')
    assert row == expected_row(text)


def test_the_first_rows_of_the_real_file():
  path = shared('criteo-kaggle-10k/train_head10k.txt.gz')
  data = gzip.decompress(path.read_bytes())
  parsed = criteo.parse(data.splitlines(keepends=True))
  assert parsed.rows.shape == (10_000, 40) and not parsed.rejects
  assert parsed.rows[:, 0].sum() == 2182
  texts = data.decode().splitlines()
  assert parsed.rows[::97].tolist() == [expected_row(t) for t in texts[::97]]


# --- Preparation -------------------------------------------------------------

LINES = 500


def prepare(output, path, **changes):
  return run_clicks(output, f'criteo:{path}', **changes)[0]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  source = write_clicks(tmp_path_factory.mktemp('source'))
  output = tmp_path_factory.mktemp('prepared') / 'data'
  return output, run_clicks(output, source)[0]


def rows_of(output):
  splits = {}
  for name in criteo.SPLITS:
    data = criteo.open_rows(output, name)
    splits[name] = data.take(np.arange(len(data)))
  return splits


def test_all_good_lines_arrive_in_their_order(tmp_path):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  meta = prepare(tmp_path / 'data', tmp_path / 'a.txt')
  splits = rows_of(tmp_path / 'data')
  # In the order of time: training, validation, test.
  assert [len(splits[s]) for s in criteo.SPLITS] == [350, 50, 100]
  found = np.concatenate(list(splits.values())).tolist()
  assert found == [expected_row(t) for t in texts]
  for name, rows in splits.items():
    assert meta['splits'][name]['positives'] == rows[:, 0].sum()
  assert criteo.summary(meta).startswith('train: 350 rows, ')


def test_a_split_by_hash_is_disjoint_and_covers_everything(tmp_path):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  found = {}
  for seed in (0, 1):
    output = tmp_path / f'data{seed}'
    prepare(output, tmp_path / 'a.txt', split='hash', seed=seed)
    found[seed] = {k: v.tolist() for k, v in rows_of(output).items()}
    everything = [row for rows in found[seed].values() for row in rows]
    assert sorted(everything) == sorted(expected_row(t) for t in texts)
    sizes = [len(found[seed][s]) / LINES for s in criteo.SPLITS]
    np.testing.assert_allclose(sizes, [0.7, 0.1, 0.2], atol=0.06)
  assert found[0]['test'] != found[1]['test']


@pytest.mark.parametrize('split', ['time', 'hash'])
def test_a_line_keeps_its_split_whatever_lies_around_it(tmp_path, split):
  """Lines of a shard; bad ones, held and parsed or neither; those left out."""
  texts = write_lines(tmp_path / 'a.txt', LINES)
  whole = [expected_row(text) for text in texts]
  found = []
  for bad, shard_lines in (('x', 64), ('x' * 5000, 64), ('x', 7)):
    texts[5] = bad
    (tmp_path / 'a.txt').write_text('\n'.join(texts))
    output = tmp_path / f'{len(bad)}-{shard_lines}'
    prepare(output, tmp_path / 'a.txt', split=split, shard_lines=shard_lines)
    found.append({k: v.tolist() for k, v in rows_of(output).items()})
  assert found[0] == found[1] == found[2]
  meta = prepare(tmp_path / 'd', tmp_path / 'a.txt', max_lines=90, split=split)
  assert meta['records'] == 90
  rows = np.concatenate(list(rows_of(tmp_path / 'd').values())).tolist()
  assert sorted(rows) == sorted(whole[:5] + whole[6:90])


def test_a_large_piece_is_read_like_many_small_ones(tmp_path):
  texts = [*lines(10), 'x'] * 500
  (tmp_path / 'a.txt').write_text('\n'.join(texts))
  found = []
  for size in (10**6, 700):
    options = {'split': 'hash', 'shard_lines': size}
    prepare(tmp_path / str(size), tmp_path / 'a.txt', **options)
    found.append(
        {k: v.tolist() for k, v in rows_of(tmp_path / str(size)).items()}
    )
  assert found[0] == found[1]


def test_damage_is_counted_and_not_fatal(prepared):
  _, meta = prepared
  assert meta['rejects'] == {'damaged_file': 1, 'wrong_columns': 3}
  rows = sum(split['rows'] for split in meta['splits'].values())
  assert rows == meta['records'] - 4
  assert 450 < meta['records'] < 650
  assert '1 damaged_file, 3 wrong_columns' in criteo.summary(meta)


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'split': 'random'}, 'split must be one of'),
        ({'test_fraction': 0.95}, 'below 1'),
        ({'test_fraction': float('nan')}, 'below 1'),
        ({'max_lines': 0}, 'max_lines'),
        ({'shard_lines': 0}, 'shard_lines'),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, changes, words):
  with pytest.raises(ValueError, match=words):
    prepare(tmp_path / 'data', tmp_path, **changes)
  with pytest.raises(ValueError, match='Unknown source'):
    run_clicks(tmp_path / 'data', 'kaggle:x')
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize(
    'labels, changes, words',
    [
        (
            '01' * 5,
            {'validation_fraction': 0.01},
            'none that is good fell into',
        ),
        ('', {}, 'Of 0 lines'),
        ('1' * 90, {}, 'All 63 rows of the train split have the label 1'),
        ('01' * 40 + '0' * 20, {}, 'All 20 rows of the test .* label 0'),
        ('01' * 35 + '1' * 10 + '01' * 10, {}, 'All 10 rows of the valid.* 1'),
    ],
)
def test_a_split_without_rows_or_of_one_class_is_refused(
    tmp_path, labels, changes, words
):
  texts = [
      with_field(text, 0, label)
      for label, text in zip(labels, lines(len(labels)))
  ]
  (tmp_path / 'a.txt').write_bytes(b''.join(ended(texts)))
  with pytest.raises(ValueError, match=words):
    prepare(tmp_path / 'data', tmp_path / 'a.txt', **changes)
  assert not (tmp_path / 'data' / 'meta.json').exists()


@pytest.mark.parametrize(
    'labels',
    [('-1', '1'), ('1', '2'), ('no', 'yes'), ('0.0', '1.0'), ('0', '')],
)
def test_other_labels_than_0_and_1_are_no_few_broken_lines(tmp_path, labels):
  texts = [
      with_field(text, 0, labels[i % 3 == 0])
      for i, text in enumerate(lines(200))
  ]
  (tmp_path / 'a.txt').write_bytes(b''.join(ended(texts)))
  bad = next(
      label for label in (labels[1], labels[0]) if label not in ('0', '1')
  )
  with pytest.raises(ValueError, match='broken, more than') as raised:
    prepare(tmp_path / 'data', tmp_path / 'a.txt', max_rejected=0.05)
  assert f'bad_label: {bad + chr(9)!r}'[:-1] in str(raised.value)
  assert '\n' not in str(raised.value)
  with pytest.raises(ValueError, match=r'have the label|none that is good'):
    prepare(tmp_path / 'all', tmp_path / 'a.txt', max_rejected=1.0)


def test_damaged_data_are_refused_and_named(tmp_path):
  output = tmp_path / 'data'
  write_lines(tmp_path / 'a.txt', LINES)
  prepare(output, tmp_path / 'a.txt')
  path = output / criteo.rows_name('train', 1)
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(ValueError, match=r'00001\.rows\.npy'):
    clicks.criteo_task(output)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'00001\.rows\.npy is missing'):
    clicks.criteo_task(output)
  counts = output / criteo.counts_name(4)
  counts.write_bytes(counts.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'C05\.u32'):
    criteo.open_counts(output, 4)
  meta = output / prepared_files.META
  meta.write_text('{')
  with pytest.raises(ValueError, match=r'meta\.json is damaged'):
    clicks.criteo_task(output)
  meta.write_text(json.dumps({'splits': {}}))
  with pytest.raises(ValueError, match='not that of prepare_clicks'):
    clicks.criteo_task(output)
  meta.unlink()
  with pytest.raises(FileNotFoundError, match='prepare_clicks --source'):
    clicks.criteo_task(output)


@pytest.mark.parametrize('lines', [10, 1000])
def test_counts_are_those_of_the_training_split(tmp_path, lines):
  """However many runs are merged."""
  output = tmp_path / 'data'
  write_lines(tmp_path / 'a.txt', LINES)
  prepare(output, tmp_path / 'a.txt', shard_lines=lines)
  rows = rows_of(output)['train']
  for k in range(26):
    values, counts = criteo.open_counts(output, k)
    expected = collections.Counter(rows[:, 14 + k].tolist())
    del expected[0]
    assert dict(zip(values.tolist(), counts.tolist())) == expected
    assert (np.diff(values.astype(np.int64)) > 0).all()


def test_a_batch_holds_the_features_of_its_rows(prepared):
  output, _ = prepared
  task = clicks.criteo_task(output, categories='vocabulary', min_count=20)
  rows = rows_of(output)['train']
  made = task.train_stream(group_id=1, num_groups=2, group_batch=10)
  batch = made.batch(3)
  chosen = rows[made.row_numbers(3)]
  np.testing.assert_array_equal(batch['labels'], chosen[:, 0])
  raw = chosen[:, 1:14].astype(np.int64)
  raw[raw >= 2**31] -= 2**32
  missing = raw == -(2**31)
  integers = batch['inputs']['integers']
  assert integers.shape == (10, 26) and integers.dtype == np.float32
  expected = np.where(missing, 0, np.sign(raw) * np.log1p(np.abs(raw)))
  np.testing.assert_allclose(integers[:, :13], expected, rtol=1e-6)
  np.testing.assert_array_equal(integers[:, 13:], missing)
  for k in range(26):
    count = collections.Counter(rows[:, 14 + k].tolist())
    kept = sorted(v for v, n in count.items() if v and n >= 20)
    ids = [
        0 if v == 0 else kept.index(v) + 2 if v in kept else 1
        for v in chosen[:, 14 + k].tolist()
    ]
    assert batch['inputs']['categories'][:, k].tolist() == ids
    assert task.model_arguments['table_sizes'][k] == len(kept) + 2


def test_sizes_and_splits_of_criteo(prepared):
  output, _ = prepared
  task = clicks.criteo_task(output, buckets=100)
  assert task.model_arguments == {
      'table_sizes': (101,) * 26,
      'num_integers': 26,
  }
  few = clicks.criteo_task(output, max_eval_examples=5)
  assert sum(b['weights'].sum() for b in few.eval_batches(4)) == 5
  no_test = output.parent / 'no_test'
  write_lines(output.parent / 'b.txt', 50)
  prepare(no_test, output.parent / 'b.txt', test_fraction=0.0)
  assert clicks.criteo_task(no_test).test_batches is None
