"""Clicks are prepared: all rows arrive, bad ones are counted; exact counts."""

import collections
import json
import os

import numpy as np
import pytest
from click_files import expected_row, write_lines
from prepared import run_clicks, write_clicks

from codistill_jax.data import (
    clicks,
    criteo,
    prepared_files,
)

LINES, SHARD = 500, 64


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
  """Nobody pulls the plug here, and on a busy disk syncing takes long."""
  monkeypatch.setattr(os, 'fsync', lambda handle: None)


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


def test_a_line_keeps_its_split_however_many_lines_a_shard_has(tmp_path):
  write_lines(tmp_path / 'a.txt', LINES)
  for split in ('time', 'hash'):
    found = []
    for shard_lines in (1000, 7):
      output = tmp_path / f'{split}{shard_lines}'
      prepare(output, tmp_path / 'a.txt', split=split, shard_lines=shard_lines)
      found.append(rows_of(output))
    for name in criteo.SPLITS:
      np.testing.assert_array_equal(found[0][name], found[1][name])


@pytest.mark.parametrize('split', ['time', 'hash'])
def test_a_line_keeps_its_split_whichever_others_are_bad(tmp_path, split):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  found = []
  for bad in ('x', 'x' * 5000):  # Held and parsed, or neither.
    texts[5] = bad
    (tmp_path / 'a.txt').write_text('\n'.join(texts))
    output = tmp_path / f'data{len(bad)}'
    prepare(output, tmp_path / 'a.txt', split=split)
    found.append(rows_of(output))
  for name in criteo.SPLITS:
    np.testing.assert_array_equal(found[0][name], found[1][name])


def test_damage_is_counted_and_not_fatal(prepared):
  _, meta = prepared
  assert meta['rejects'] == {'damaged_file': 1, 'wrong_columns': 3}
  rows = sum(split['rows'] for split in meta['splits'].values())
  assert rows == meta['records'] - 4
  assert 450 < meta['records'] < 650
  assert '1 damaged_file, 3 wrong_columns' in criteo.summary(meta)


def test_a_damaged_file_at_the_very_end_is_counted_once(tmp_path):
  write_lines(tmp_path / 'a.gz', SHARD)
  data = (tmp_path / 'a.gz').read_bytes()
  (tmp_path / 'a.gz').write_bytes(data[:-6])  # All lines, no checksum.
  for split in ('time', 'hash'):
    meta = prepare(tmp_path / split, tmp_path / 'a.gz', split=split)
    assert meta['rejects'] == {'damaged_file': 1}
    assert sum(s['rows'] for s in meta['splits'].values()) == SHARD


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


@pytest.mark.parametrize('split', ['time', 'hash'])
def test_max_lines_ends_it(tmp_path, split):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  meta = prepare(tmp_path / 'd', tmp_path / 'a.txt', max_lines=90, split=split)
  assert meta['records'] == 90
  found = np.concatenate(list(rows_of(tmp_path / 'd').values())).tolist()
  assert sorted(found) == sorted(expected_row(t) for t in texts[:90])


def test_a_split_without_rows_is_explained(tmp_path):
  write_lines(tmp_path / 'a.txt', 10)
  with pytest.raises(ValueError, match='none that is good fell into the valid'):
    prepare(tmp_path / 'data', tmp_path / 'a.txt', validation_fraction=0.01)
  (tmp_path / 'a.txt').write_bytes(b'')
  with pytest.raises(ValueError, match='Of 0 lines'):
    prepare(tmp_path / 'none', tmp_path / 'a.txt')


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


@pytest.mark.parametrize('lines', [10, 64, 1000])
def test_counts_are_those_of_the_training_split(tmp_path, lines):
  """However many runs are merged, and at once."""
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
