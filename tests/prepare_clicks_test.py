"""Preparing clicks: all rows arrive, however it is killed; exact counts."""

import collections
import json
import os
import pathlib
import random
import subprocess
import time

import numpy as np
import pytest
from click_files import expected_row, write_lines

from codistill_jax.data import (
    click_shards,
    clicks,
    prepare_clicks,
    value_counts,
)
from codistill_jax.storage import leases

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINES, SHARD = 500, 64


def prepare(output, source, **changes):
  arguments = {
      'validation_fraction': 0.1,
      'test_fraction': 0.2,
      'shard_lines': SHARD,
      'report': lambda line: None,
      **changes,
  }
  return prepare_clicks.prepare(output, f'criteo:{source}', **arguments)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
  """Nobody pulls the plug here, and on a busy disk syncing takes long."""
  monkeypatch.setattr(os, 'fsync', lambda handle: None)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Three files; the second is truncated, the third has bad lines."""
  directory = tmp_path_factory.mktemp('source')
  write_lines(directory / '0.txt', 200)
  write_lines(directory / '1.gz', 200, seed=1)
  data = (directory / '1.gz').read_bytes()
  (directory / '1.gz').write_bytes(data[: len(data) // 2])
  texts = write_lines(directory / '2.txt', 250, seed=2)
  for place in (3, 77, 249):
    texts[place] = texts[place][:-1] + 'x\t'
  (directory / '2.txt').write_text('\n'.join(texts))
  return directory / '*'


@pytest.fixture(scope='module')
def prepared(source, tmp_path_factory):
  output = tmp_path_factory.mktemp('prepared') / 'data'
  return output, prepare(output, source)


def files_of(directory):
  return {
      path.relative_to(directory).as_posix(): path.read_bytes()
      for path in directory.rglob('*')
      if path.is_file()
  }


def rows_of(output):
  splits = {}
  for name in click_shards.SPLITS:
    data = click_shards.open_rows(output, name)
    splits[name] = data.gather(np.arange(len(data)))
  return splits


def test_all_good_lines_arrive_in_their_order(tmp_path):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  meta = prepare(tmp_path / 'data', tmp_path / 'a.txt')
  splits = rows_of(tmp_path / 'data')
  # In the order of time: training, validation, test.
  assert [len(splits[s]) for s in click_shards.SPLITS] == [350, 50, 100]
  found = np.concatenate(list(splits.values())).tolist()
  assert found == [expected_row(t) for t in texts]
  for name, rows in splits.items():
    assert meta['splits'][name]['positives'] == rows[:, 0].sum()
  assert prepare_clicks.summary(meta).startswith('train: 350 rows, ')


def test_a_split_by_hash_is_disjoint_and_covers_everything(tmp_path):
  texts = write_lines(tmp_path / 'a.txt', LINES)
  found = {}
  for seed in (0, 1):
    output = tmp_path / f'data{seed}'
    prepare(output, tmp_path / 'a.txt', split='hash', seed=seed)
    found[seed] = {k: v.tolist() for k, v in rows_of(output).items()}
    everything = [row for rows in found[seed].values() for row in rows]
    assert sorted(everything) == sorted(expected_row(t) for t in texts)
    sizes = [len(found[seed][s]) / LINES for s in click_shards.SPLITS]
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
    for name in click_shards.SPLITS:
      np.testing.assert_array_equal(found[0][name], found[1][name])


def test_damage_is_counted_and_not_fatal(prepared):
  _, meta = prepared
  assert meta['rejects'] == {'wrong_columns': 3}
  assert meta['damaged_files'] == [1]
  rows = sum(split['rows'] for split in meta['splits'].values())
  assert rows == meta['lines'] - 3
  assert 450 < meta['lines'] < 650
  assert '1 damaged_file, 3 wrong_columns' in prepare_clicks.summary(meta)


def test_a_damaged_file_at_the_very_end_is_counted_once(tmp_path):
  write_lines(tmp_path / 'a.gz', SHARD)
  data = (tmp_path / 'a.gz').read_bytes()
  (tmp_path / 'a.gz').write_bytes(data[:-6])  # All lines, no checksum.
  for split in ('time', 'hash'):
    meta = prepare(tmp_path / split, tmp_path / 'a.gz', split=split)
    assert meta['lines'] == SHARD and meta['damaged_files'] == [0]


class Killed(BaseException):
  pass


@pytest.mark.parametrize('split', ['time', 'hash'])
def test_killed_at_any_write_it_ends_with_the_same_files(
    source, tmp_path, monkeypatch, split
):
  whole = tmp_path / 'whole'
  prepare(whole, source, split=split)
  expected = files_of(whole)
  rng = random.Random(0)
  write_file = prepare_clicks.shards.write_file

  def torn(path, write):
    if rng.random() < 0.12:
      if rng.random() < 0.5:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + '.tmp').write_bytes(b'torn')
      raise Killed
    digest = write_file(path, write)
    if rng.random() < 0.04:
      raise Killed
    return digest

  monkeypatch.setattr(prepare_clicks.shards, 'write_file', torn)
  done, kills = None, 0
  while done is None and kills < 300:
    try:
      done = prepare(tmp_path / 'killed', source, split=split)
    except Killed:
      kills += 1
  assert done is not None and kills > 5
  assert files_of(tmp_path / 'killed') == expected
  click_shards.verify(tmp_path / 'killed')


@pytest.mark.slow
def test_a_real_kill(source, tmp_path, python):
  code = (
      'from codistill_jax.data import prepare_clicks as p;'
      f'p.prepare({str(tmp_path / "k")!r}, "criteo:{source}",'
      ' validation_fraction=0.1, test_fraction=0.2, shard_lines=8)'
  )
  for delay in (0.3, 0.5, 0.7):
    process = subprocess.Popen([python, '-c', code])
    time.sleep(delay)
    process.kill()
    process.wait()
  prepare(tmp_path / 'k', source, shard_lines=8)
  prepare(tmp_path / 'whole', source, shard_lines=8)
  assert files_of(tmp_path / 'k') == files_of(tmp_path / 'whole')


def test_a_finished_one_is_not_touched(prepared, source):
  output, meta = prepared
  before = files_of(output)
  said = []
  assert prepare(output, source, report=said.append) == {
      'format_version': 1,
      'kind': 'criteo',
      **meta,
  }
  assert 'nothing to do' in said[0] and files_of(output) == before


def test_a_finished_one_outlives_its_source_but_does_not_hide_a_change(
    tmp_path,
):
  write_lines(tmp_path / 'a.txt', 50)
  prepare(tmp_path / 'data', tmp_path / 'a.txt')
  write_lines(tmp_path / 'a.txt', 51)
  with pytest.raises(ValueError, match='have changed'):
    prepare(tmp_path / 'data', tmp_path / 'a.txt')
  (tmp_path / 'a.txt').unlink()
  prepare(tmp_path / 'data', tmp_path / 'a.txt')


def test_other_settings_files_or_company_are_refused(
    prepared, source, tmp_path
):
  output, _ = prepared
  with pytest.raises(ValueError, match=r'validation_fraction=0\.1, now it is'):
    prepare(output, source, validation_fraction=0.3)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('')
  with pytest.raises(ValueError, match=r'holds thesis\.txt'):
    prepare(tmp_path / 'mine', source)
  with (
      leases.exclusive(tmp_path / 'busy', 'preparing'),
      pytest.raises(ValueError, match='Another process'),
  ):
    prepare(tmp_path / 'busy', source)
  write_lines(tmp_path / 'a.txt', 10)
  with pytest.raises(ValueError, match='none that is good fell into'):
    prepare(tmp_path / 'few', tmp_path / 'a.txt', validation_fraction=0.01)
  write_lines(tmp_path / 'a.txt', 20)
  with pytest.raises(ValueError, match='have changed'):
    prepare(tmp_path / 'few', tmp_path / 'a.txt', validation_fraction=0.01)


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'split': 'random'}, 'split must be one of'),
        ({'test_fraction': 0.95}, 'below 1'),
        ({'max_lines': 0}, 'max_lines'),
        ({'shard_lines': 0}, 'shard_lines'),
        ({'seed': -1}, 'seed'),
    ],
)
def test_a_wrong_argument_is_named(source, tmp_path, changes, words):
  with pytest.raises(ValueError, match=words):
    prepare(tmp_path / 'data', source, **changes)
  with pytest.raises(ValueError, match='Unknown source'):
    prepare_clicks.prepare(tmp_path / 'data', 'kaggle:x')
  assert not (tmp_path / 'data').exists()


def test_max_lines_ends_it(source, tmp_path):
  meta = prepare(tmp_path / 'data', source, max_lines=90)
  assert meta['lines'] == 90 and meta['total_lines'] == 90


def test_damaged_data_are_refused_and_named(source, tmp_path):
  output = tmp_path / 'data'
  prepare(output, source)
  path = click_shards.rows_path(output, 'train', 1)
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(bytes(data))
  with pytest.raises(ValueError, match=r'00001\.rows\.npy has changed'):
    click_shards.verify(output)
  path.write_bytes(bytes(data[:-5]))
  with pytest.raises(ValueError, match=r'00001\.rows\.npy'):
    clicks.criteo_task(output)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'00001\.rows\.npy is missing'):
    clicks.criteo_task(output)
  counts = click_shards.counts_path(output, 4)
  counts.write_bytes(counts.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'C05\.u32'):
    click_shards.open_counts(output, 4)
  meta = output / click_shards.META
  meta.write_text('{')
  with pytest.raises(ValueError, match=r'meta\.json is damaged'):
    clicks.criteo_task(output)
  meta.write_text(json.dumps({'splits': {}}))
  with pytest.raises(ValueError, match='not that of prepared clicks'):
    clicks.criteo_task(output)
  meta.unlink()
  with pytest.raises(FileNotFoundError, match='prepare_clicks --source'):
    clicks.criteo_task(output)


def test_the_binary_prepares_and_says_what_is_wrong_in_one_line(
    source, tmp_path, python
):
  run = lambda *flags: subprocess.run(
      [python, '-m', 'experiments.prepare_clicks', *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=600,
  )
  output = f'--output={tmp_path / "data"}'
  done = run(f'--source=criteo:{source}', output, '--verify')
  assert done.returncode == 0, done.stderr
  assert 'rejected lines: 1 damaged_file, 3 wrong_columns' in done.stdout
  assert 'files are as written' in done.stdout
  done = run('--source=criteo:nowhere.txt', output + '2')
  assert done.returncode == 1
  (line,) = (done.stdout + done.stderr).splitlines()
  assert line == 'error: There is no file nowhere.txt.'


# -- counts -------------------------------------------------------------------


def test_counts_are_those_of_the_training_split(prepared):
  output, _ = prepared
  rows = rows_of(output)['train']
  for k in range(26):
    values, counts = click_shards.open_counts(output, k)
    expected = collections.Counter(rows[:, 14 + k].tolist())
    del expected[0]
    assert dict(zip(values.tolist(), counts.tolist())) == expected
    assert (np.diff(values.astype(np.int64)) > 0).all()


@pytest.mark.parametrize('most', [1, 7, 100, 10**6])
def test_counts_do_not_depend_on_how_many_are_merged_at_once(tmp_path, most):
  rng = np.random.default_rng(0)
  columns, paths = [], []
  for number, size in enumerate((100, 1, 0, 400)):
    values = rng.integers(0, 50, size=(size, 2), dtype=np.uint32)
    values[:, 1] *= 80_000_000
    columns.append(values)
    paths.append(value_counts.run_path(tmp_path, number))
    value_counts.write_run(paths[-1], values)
  for k in (0, 1):
    blocks = list(value_counts.merged_column(paths, 2, k, most))
    assert max(map(len, blocks)) <= max(most, 1)
    found = np.concatenate(blocks)
    values, counts = np.unique(
        np.concatenate(columns)[:, k], return_counts=True
    )
    assert found[:, 0].tolist() == values[values > 0].tolist()
    assert found[:, 1].tolist() == counts[values > 0].tolist()


# -- the task -----------------------------------------------------------------


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


def test_values_unseen_in_training_have_an_id_at_evaluation(tmp_path):
  texts = write_lines(tmp_path / 'a.txt', 100)
  for i in range(70, 100):
    texts[i] = texts[i].rpartition('\t')[0] + '\tdeadbeef'
  (tmp_path / 'a.txt').write_text('\n'.join(texts) + '\n')
  prepare(tmp_path / 'data', tmp_path / 'a.txt')
  for categories, expected in (('vocabulary', {1}), ('hash', None)):
    task = clicks.criteo_task(
        tmp_path / 'data', categories=categories, min_count=1, buckets=50
    )
    for batches in (task.eval_batches(7), task.test_batches(7)):
      for batch in batches:
        ids = batch['inputs']['categories']
        sizes = np.asarray(task.model_arguments['table_sizes'])
        assert (ids < sizes[None]).all() and ids.min() >= 0
        if expected:
          assert set(ids[:, 25]) == expected


def test_streams_of_criteo_are_those_of_any_clicks(prepared):
  output, _ = prepared
  task = clicks.criteo_task(output, partition='disjoint', buckets=100)
  whole = task.train_stream(group_id=0, num_groups=2, group_batch=12)
  part = task.train_stream(
      group_id=0, num_groups=2, group_batch=12, rows=slice(4, 8)
  )
  for step in (0, 40, 7):
    np.testing.assert_array_equal(
        part.batch(step)['inputs']['categories'],
        whole.batch(step)['inputs']['categories'][4:8],
    )
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
