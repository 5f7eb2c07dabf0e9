"""Tests of experiments/status: a live, dead, finished and empty run."""

import os
import subprocess

import pytest

from codistill_jax import run_directory, writers
from experiments import status

NOW = 10_000.0
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _save(directory, step: int) -> None:
  (directory / str(step)).mkdir(parents=True)
  (directory / str(step) / 'commit_success.txt').write_text('')


def _make_group(workdir, group_id: int, *, seen: float, **changes) -> None:
  _save(run_directory.publications_dir(workdir, group_id), 40)
  _save(run_directory.checkpoints_dir(workdir, group_id), 30)
  sign = {
      'step': 60,
      'num_steps': 100,
      'time': seen,
      'phase': 'training',
      'steps_per_sec': 4.0,
      'num_groups': 2,
      'teachers': [{'peer': 1 - group_id, 'step': 37, 'time': seen - 5.0}],
  }
  run_directory.write_status(workdir, group_id, sign | changes)


def _cells(text: str) -> list[dict[str, str]]:
  """The rows of the table of one run, by column."""
  header, *rows = [line.split('  ') for line in text.splitlines()[1:]]
  clean = [[c.strip() for c in row if c.strip()] for row in (header, *rows)]
  return [dict(zip(clean[0], row)) for row in clean[1:]]


def test_a_live_group_shows_all_it_says(tmp_path):
  _make_group(tmp_path, 0, seen=NOW - 2)
  path = run_directory.metrics_path(tmp_path, 0)
  writer = writers.JsonlWriter(path, clock=lambda: NOW - 20)
  writer.write(50, {'eval/loss': 5.4321})
  writer.write(55, {'loss/task': 5.0})
  writer.close()
  text, done = status.describe(str(tmp_path), NOW, silent_after=60)
  assert not done
  assert _cells(text) == [
      {
          'group': '0',
          'step': '60/100',
          'phase': 'training',
          'steps/s': '4.0',
          'ETA': '10 s',
          'eval/loss': '5.432',
          'published': '40',
          'teachers': '1 of 1',
          'staleness': '23 steps, 5 s',
          'checkpoint': '30',
          'last seen': '2 s ago',
      }
  ]


def test_a_silent_group_is_flagged_and_has_no_eta(tmp_path):
  _make_group(tmp_path, 0, seen=NOW - 59)
  _make_group(tmp_path, 1, seen=NOW - 61)
  text, _ = status.describe(str(tmp_path), NOW, silent_after=60)
  live, silent = _cells(text)
  assert (live['last seen'], live['ETA']) == ('59 s ago', '10 s')
  assert (silent['last seen'], silent['ETA']) == ('SILENT 61 s ago', '-')


def test_a_run_is_done_once_every_group_is(tmp_path):
  run_directory.write_run(tmp_path, {'arm': 'codistillation', 'num_groups': 2})
  _make_group(tmp_path, 0, seen=NOW - 600)
  run_directory.done_path(tmp_path, 0).write_text('')
  # Group 1 has not made its directory yet.
  text, done = status.describe(str(tmp_path), NOW, silent_after=60)
  assert _cells(text)[0]['last seen'] == 'DONE 10 min ago'
  assert not done
  _make_group(tmp_path, 1, seen=NOW)
  assert not status.describe(str(tmp_path), NOW, silent_after=60)[1]
  run_directory.done_path(tmp_path, 1).write_text('')
  assert status.describe(str(tmp_path), NOW, silent_after=60)[1]


def test_staleness_of_several_teachers_is_a_range(tmp_path):
  teachers = [
      {'peer': peer, 'step': step, 'time': NOW - seconds}
      for peer, step, seconds in [(1, 40, 5.0), (2, 21, 130.0)]
  ]
  _make_group(tmp_path, 0, seen=NOW, num_groups=4, teachers=teachers)
  (row,) = _cells(status.describe(str(tmp_path), NOW, silent_after=60)[0])
  assert row['teachers'] == '2 of 3'
  assert row['staleness'] == '20 to 39 steps, 5 s to 2 min'


def test_metrics_stand_in_for_a_missing_status(tmp_path):
  path = run_directory.metrics_path(tmp_path, 0)
  writer = writers.JsonlWriter(path, clock=lambda: NOW - 3)
  writer.write(7, {'perf/steps_per_sec': 2.0})
  writer.close()
  (row,) = _cells(status.describe(str(tmp_path), NOW, silent_after=60)[0])
  assert (row['step'], row['steps/s']) == ('7/-', '2.0')
  assert (row['phase'], row['last seen']) == ('?', '3 s ago')


@pytest.mark.parametrize('sign', [{}, {'teachers': [{'peer': 1}], 'step': 3}])
def test_a_group_that_says_little_gets_dashes(tmp_path, sign):
  run_directory.write_status(tmp_path, 0, sign)
  (row,) = _cells(status.describe(str(tmp_path), NOW, silent_after=60)[0])
  assert (row['staleness'], row['last seen']) == ('-', 'none yet')


def test_an_empty_directory_says_so(tmp_path):
  text, done = status.describe_all([str(tmp_path)], NOW)
  assert 'no group has started yet' in text and not done


def test_commas_and_repetition_name_the_same_directories():
  assert status.split_commas(['a,b', ' c ', 'd,']) == ['a', 'b', 'c', 'd']
  assert status.split_commas(None) == []


@pytest.mark.parametrize(
    'seconds, text',
    [(4, '4 s'), (99, '99 s'), (100, '2 min'), (9000, '2.5 h'), (-3, '-3 s')],
)
def test_durations_are_short(seconds, text):
  assert status.duration(seconds) == text


def _run(python, *args: str) -> subprocess.CompletedProcess:
  command = [python, '-W', 'error', '-m', 'experiments.status', *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_binary_watches_until_all_is_done(tmp_path, python):
  _make_group(tmp_path, 0, seen=NOW, num_groups=1)
  run_directory.done_path(tmp_path, 0).write_text('')
  done = _run(python, f'--workdir={tmp_path}', '--watch=0.1')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'DONE' in done.stdout and '\x1b' not in done.stdout


@pytest.mark.parametrize(
    'args, said',
    [
        (['--workdir=absent'], 'No run directory at absent'),
        ([], 'pass --workdir'),
    ],
)
def test_bad_input_is_one_line_and_status_1(python, args, said):
  done = _run(python, *args)
  assert (done.returncode, done.stdout) == (1, '')
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and said in line
