"""Tests of run_directory: readers beside a live, dead or absent writer."""

import json
import math
import os

import pytest

from codistill_jax import run_directory
from codistill_jax.storage import files


def _record(step: int, **metrics: float) -> bytes:
  return json.dumps({'step': step, 'time': 1.5, **metrics}).encode() + b'\n'


def test_paths_are_those_of_the_contract(tmp_path):
  expected = {
      (run_directory.config_path,): 'config.gin',
      (run_directory.run_path,): 'run.json',
      (run_directory.exchange_root,): 'exchange',
      (run_directory.report_dir,): 'report',
      (run_directory.publications_dir, 3): 'exchange/group_3',
      (run_directory.group_dir, 3): 'groups/group_3',
      (run_directory.metrics_path, 3): 'groups/group_3/metrics.jsonl',
      (run_directory.checkpoints_dir, 3): 'groups/group_3/checkpoints',
      (run_directory.done_path, 3): 'groups/group_3/DONE',
      (run_directory.comparison_path,): 'report/comparison.json',
      (run_directory.comparison_path, 40): 'report/comparison_40.json',
      (
          run_directory.comparison_path,
          None,
          'test',
      ): 'report/comparison_test.json',
      (
          run_directory.comparison_path,
          40,
          'test',
      ): 'report/comparison_test_40.json',
  }
  for (function, *args), path in expected.items():
    assert os.fspath(function(tmp_path, *args)) == str(tmp_path / path)


def test_groups_are_listed_by_number_and_nothing_else_is(tmp_path):
  for name in ('group_10', 'group_2', 'group_x', 'group_1.tmp', 'other'):
    (tmp_path / 'groups' / name).mkdir(parents=True)
  assert run_directory.list_groups(tmp_path) == [2, 10]


def test_no_run_directory_is_an_error_and_an_empty_one_is_not(tmp_path):
  assert run_directory.list_groups(tmp_path) == []
  with pytest.raises(FileNotFoundError, match=r'No run directory at .*absent'):
    run_directory.list_groups(tmp_path / 'absent')


def test_torn_last_line_is_left_out_and_damaged_lines_are_counted(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  damaged = [b'{"step": 2, "ti\n', b'[1]\n', b'{"time": 3}\n', b'\xff\xfe\n']
  path.write_bytes(
      _record(1) + b''.join(damaged) + b'\n' + _record(3) + b'{"step": 4'
  )
  log = run_directory.read_metrics(path)
  assert [r['step'] for r in log.records] == [1, 3]
  assert log.damaged == len(damaged)


def test_missing_metrics_read_as_empty(tmp_path):
  assert run_directory.read_metrics(tmp_path / 'no.jsonl') == ([], 0)


def test_tail_gives_the_last_whole_lines_at_every_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [_record(step) for step in range(8, 12)]
  path.write_bytes(b''.join(lines))
  size = path.stat().st_size
  for cut in range(size + 2):
    log = run_directory.read_metrics(path, tail_bytes=cut)
    # The longest run of last lines that fits in `cut` bytes.
    fits = [n for n in range(5) if sum(map(len, lines[4 - n :])) <= cut]
    assert [r['step'] for r in log.records] == list(range(12 - max(fits), 12))
    assert log.damaged == 0


def test_absent_json_files_are_empty_and_damaged_ones_are_named(tmp_path):
  assert run_directory.read_run(tmp_path) == {}
  assert run_directory.read_comparison(tmp_path) == {}
  assert run_directory.read_status(tmp_path, 0) is None
  run_directory.group_dir(tmp_path, 0).mkdir(parents=True)
  run_directory.report_dir(tmp_path).mkdir()
  readers = {
      run_directory.run_path(tmp_path): run_directory.read_run,
      run_directory.comparison_path(tmp_path): run_directory.read_comparison,
      run_directory.status_path(tmp_path, 0): lambda workdir: (
          run_directory.read_status(workdir, 0)
      ),
  }
  for path, read in readers.items():
    path.write_text('{"arm": ')
    with pytest.raises(ValueError, match=rf'Expected .*{path.name}'):
      read(tmp_path)


def test_what_is_written_is_read(tmp_path):
  run_directory.write_run(tmp_path, {'arm': 'a'})
  run_directory.write_status(tmp_path, 3, {'step': 7, 'mood': 'fine'})
  assert run_directory.read_run(tmp_path) == {'arm': 'a'}
  found = run_directory.read_status(tmp_path, 3)
  assert found == {'step': 7}
  figures = {'models': {'a/group_0': {'eval/loss': math.inf}}}
  files.write_json(run_directory.comparison_path(tmp_path), figures)
  assert run_directory.read_comparison(tmp_path) == figures


def test_only_finished_steps_count_as_saved(tmp_path):
  assert run_directory.newest_saved(tmp_path / 'absent') is None
  for step in (9, 10, 11):
    (tmp_path / str(step)).mkdir()
  assert run_directory.newest_saved(tmp_path) is None
  (tmp_path / '12.orbax-checkpoint-tmp').mkdir()
  for step in (9, 10):
    (tmp_path / str(step) / 'commit_success.txt').write_text('')
  assert run_directory.newest_saved(tmp_path) == 10


@pytest.mark.parametrize(
    'planted',
    [
        {'num_groups': 10**15},
        *({'exchange_dir': x} for x in ('ftp://far/run', 'a\0b', '\ud800')),
    ],
    ids=['groups', 'scheme', 'nul', 'surrogate'],
)
def test_a_run_that_leads_a_reader_astray_is_refused_by_name(tmp_path, planted):
  run_directory.write_run(tmp_path, planted)
  with pytest.raises(ValueError, match=f'run.json: {next(iter(planted))} is '):
    run_directory.read_run(tmp_path)
  default = run_directory.exchange_root(tmp_path)
  assert default == tmp_path / 'exchange'
