"""Tests of experiments/status: a live, dead, finished and empty run."""

import json
import os
import subprocess

import pytest

from codistill_jax import run_directory, writers
from experiments import status
from experiments.reports import pages, run_status

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


def _look(workdir) -> tuple[str, bool]:
  view, done = run_status.look(str(workdir), NOW)
  return pages.plain(view), done


def _describe(workdir) -> str:
  return _look(workdir)[0]


def _cells(text: str) -> list[dict[str, str]]:
  """The rows of the table of one run, by column."""
  lines = text.partition('\n\n')[0].splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith('group'))
  header, *rows = [line.split('  ') for line in lines[start:]]
  clean = [[c.strip() for c in row if c.strip()] for row in (header, *rows)]
  return [dict(zip(clean[0], row)) for row in clean[1:]]


def test_a_live_group_shows_all_it_says(tmp_path):
  _make_group(tmp_path, 0, seen=NOW - 2)
  path = run_directory.metrics_path(tmp_path, 0)
  writer = writers.JsonlWriter(path, clock=lambda: NOW - 20)
  writer.write(50, {'eval/loss': 5.4321})
  writer.write(55, {'loss/task': 5.0})
  writer.close()
  text, done = _look(tmp_path)
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
          'rejected': '-',
          'checkpoint': '30',
          'last seen': '2 s ago',
      }
  ]


def test_a_silent_group_is_flagged_and_has_no_eta(tmp_path):
  _make_group(tmp_path, 0, seen=NOW - 59)
  _make_group(tmp_path, 1, seen=NOW - 61)
  text, _ = _look(tmp_path)
  live, silent = _cells(text)
  assert (live['last seen'], live['ETA']) == ('59 s ago', '10 s')
  assert (silent['last seen'], silent['ETA']) == ('SILENT 61 s ago', '-')


def test_a_run_is_done_once_every_group_is(tmp_path):
  run_directory.write_run(tmp_path, {'arm': 'codistillation', 'num_groups': 2})
  _make_group(tmp_path, 0, seen=NOW - 600)
  run_directory.done_path(tmp_path, 0).write_text('')
  # Group 1 has not made its directory yet.
  text, done = _look(tmp_path)
  assert _cells(text)[0]['last seen'] == 'DONE 10 min ago'
  assert not done
  _make_group(tmp_path, 1, seen=NOW)
  assert not _look(tmp_path)[1]
  run_directory.done_path(tmp_path, 1).write_text('')
  assert _look(tmp_path)[1]


def test_staleness_of_several_teachers_is_a_range(tmp_path):
  teachers = [
      {'peer': peer, 'step': step, 'time': NOW - seconds}
      for peer, step, seconds in [(1, 40, 5.0), (2, 21, 130.0)]
  ]
  _make_group(tmp_path, 0, seen=NOW, num_groups=4, teachers=teachers)
  (row,) = _cells(_describe(tmp_path))
  assert row['teachers'] == '2 of 3'
  assert row['staleness'] == '20..39 steps, 5 s..2 min'


def test_metrics_stand_in_for_a_missing_status(tmp_path):
  path = run_directory.metrics_path(tmp_path, 0)
  writer = writers.JsonlWriter(path, clock=lambda: NOW - 3)
  writer.write(7, {'perf/steps_per_sec': 2.0})
  writer.close()
  (row,) = _cells(_describe(tmp_path))
  assert (row['step'], row['steps/s']) == ('7/-', '2.0')
  assert (row['phase'], row['last seen']) == ('?', '3 s ago')


@pytest.mark.parametrize('sign', [{}, {'teachers': [{'peer': 1}], 'step': 3}])
def test_a_group_that_says_little_gets_dashes(tmp_path, sign):
  run_directory.write_status(tmp_path, 0, sign)
  (row,) = _cells(_describe(tmp_path))
  assert (row['staleness'], row['last seen']) == ('-', 'none yet')


def test_an_empty_directory_says_so(tmp_path):
  text, done = _look(tmp_path)
  assert 'no group has started yet' in text and not done


def _teachers(peers, *, behind: int = 20, seconds: float = 5.0) -> list[dict]:
  """Teachers of a group at step 60, each a step older than the one before."""
  return [
      {'peer': p, 'step': 60 - behind - p, 'time': NOW - seconds - 60.0 * p}
      for p in peers
  ]


def _make_groups(workdir, num_groups: int, **changes) -> None:
  for g in range(num_groups):
    peers = [p for p in range(num_groups) if p != g]
    said = {
        'num_groups': num_groups,
        'peers': peers,
        'teachers': _teachers(peers),
        'rejected': 0,
        'last_rejection': '',
        'troubles': [],
        'host': 'host-a',
        'pid': 4200 + g,
    }
    _make_group(workdir, g, seen=NOW, **(said | changes))


# --- Below the table ---------------------------------------------------------


@pytest.mark.parametrize('num_groups', [4, 16])
def test_every_staleness_is_shown_and_the_page_stays_narrow(
    tmp_path, num_groups
):
  _make_groups(tmp_path, num_groups)
  text = _describe(tmp_path)
  assert max(map(len, text.splitlines())) <= 140
  assert len(_cells(text)) == num_groups
  # Group 0 learns from all others: p steps and p minutes older than the first.
  starts = ('staleness of each', 'and in time')
  tables = [t for t in text.split('\n\n') if t.startswith(starts)]
  rows = [[line for line in t.splitlines() if line[:2] == '0 '] for t in tables]
  shown = ' '.join(row.replace(',', '') for (row,) in rows)
  for p in range(1, num_groups):
    assert f' {20 + p} ' in f'{shown} '
  assert '65 s' in shown
  assert (f'{num_groups - 1} min' in shown) == (num_groups > 2)


def test_two_groups_need_no_second_table(tmp_path):
  _make_groups(tmp_path, 2)
  assert 'staleness of each' not in _describe(tmp_path)


def test_a_sound_run_has_no_notes_but_where_it_runs(tmp_path):
  _make_groups(tmp_path, 2)
  _, notes = _describe(tmp_path).split('\n\n')
  assert notes == 'on host-a: pid 4200 (group 0), 4201 (group 1)'


def test_a_finished_group_has_no_process(tmp_path):
  _make_groups(tmp_path, 1)
  run_directory.done_path(tmp_path, 0).write_text('')
  assert 'pid' not in _describe(tmp_path)


def test_rejections_are_counted_and_the_last_one_is_told(tmp_path):
  _make_groups(tmp_path, 2)
  _make_group(
      tmp_path / 'other', 0, seen=NOW, rejected=3, last_rejection='group 1: NaN'
  )
  text = _describe(tmp_path / 'other')
  assert _cells(text)[0]['rejected'] == '3'
  assert 'group 0: last rejection: group 1: NaN' in text
  assert 'last rejection' not in _describe(tmp_path)


def test_a_group_without_peers_rejects_nothing(tmp_path):
  _make_groups(tmp_path, 1)
  (row,) = _cells(_describe(tmp_path))
  assert (row['teachers'], row['rejected']) == ('-', '-')


def test_rejections_come_from_the_records_of_an_older_run(tmp_path):
  _make_group(tmp_path, 0, seen=NOW)
  writer = writers.JsonlWriter(run_directory.metrics_path(tmp_path, 0))
  writer.write(50, {'exchange/rejected': 2.0})
  writer.close()
  assert _cells(_describe(tmp_path))[0]['rejected'] == '2'


def test_what_fails_is_told_with_since_when_and_how_often(tmp_path):
  trouble = {
      'doing': 'saving a resume checkpoint',
      'reason': 'No space left\non device',
      'since': NOW - 180,
      'count': 14,
  }
  _make_group(tmp_path, 0, seen=NOW - 2, troubles=[trouble])
  assert (
      'group 0: saving a resume checkpoint fails since 3 min, 14 times:'
      ' No space left on device'
  ) in _describe(tmp_path)


@pytest.mark.parametrize(
    'changes, alone',
    [
        ({'teachers': []}, True),
        ({'teachers': [], 'step': 50}, False),  # The end of burn-in.
        ({'teachers': [], 'peers': []}, False),
        ({'teachers': [], 'phase': 'compiling'}, False),
        ({}, False),
    ],
)
def test_a_group_that_trains_alone_is_told(tmp_path, changes, alone):
  run_directory.write_run(tmp_path, {'burn_in_steps': 50})
  _make_groups(tmp_path, 4, **changes)
  text = _describe(tmp_path)
  said = 'group 2 trains alone: of its peers (0, 1, 3) none teaches'
  assert (said in text) == alone
  assert ('trains alone' in text) == alone


def test_without_a_known_burn_in_nobody_is_called_alone(tmp_path):
  _make_groups(tmp_path, 2, teachers=[])
  assert 'alone' not in _describe(tmp_path)


def test_a_missing_teacher_is_named(tmp_path):
  _make_groups(tmp_path, 4, teachers=_teachers([3]))
  text = _describe(tmp_path)
  assert 'group 0 goes without the teacher(s) 1, 2' in text
  assert _cells(text)[0]['teachers'] == '1 of 3'


def test_peers_are_those_of_the_topology(tmp_path):
  _make_group(tmp_path, 5, seen=NOW, num_groups=16, peers=[4])
  assert _cells(_describe(tmp_path))[0]['teachers'] == '1 of 1'


# --- Damage ------------------------------------------------------------------


@pytest.mark.parametrize('data', [b'', b'{"step": 6', b'[]', b'\xff\xfe\x00'])
def test_a_damaged_status_is_named_and_the_others_are_shown(tmp_path, data):
  _make_groups(tmp_path, 2)
  run_directory.status_path(tmp_path, 0).write_bytes(data)
  text, done = _look(tmp_path)
  damaged, sound = _cells(text)
  assert damaged['phase'] == '?' and sound['phase'] == 'training'
  # Nobody knows whether it has teachers.
  assert damaged['teachers'] == '-' and 'alone' not in text
  assert 'group 0: cannot be read: Expected' in text and not done
  assert str(run_directory.status_path(tmp_path, 0)) in text.replace('\n', '')


def test_of_a_group_without_a_sign_of_life_no_teacher_is_called_absent(
    tmp_path,
):
  run_directory.write_run(tmp_path, {'num_groups': 4, 'burn_in_steps': 0})
  _make_groups(tmp_path, 4)
  run_directory.status_path(tmp_path, 2).write_text('{')
  writer = writers.JsonlWriter(run_directory.metrics_path(tmp_path, 2))
  writer.write(50, {'loss/task': 5.0})
  writer.close()
  text = _describe(tmp_path)
  assert _cells(text)[2]['teachers'] == '? of 3'
  assert not any(s in text for s in ('absent', 'goes without', 'alone'))


def test_a_damaged_run_json_is_named_and_does_not_end_a_watch(tmp_path):
  _make_groups(tmp_path, 2)
  run_directory.run_path(tmp_path).write_text('{"arm": ')
  run_directory.group_dir(tmp_path, 1).rename(tmp_path / 'gone')
  run_directory.done_path(tmp_path, 0).write_text('')
  text, done = _look(tmp_path)
  assert 'cannot be read: Expected JSON in' in text and 'run.json' in text
  assert len(_cells(text)) == 1
  # Group 1, of which status.json of group 0 knows, is not done.
  assert not done


def test_a_file_system_that_refuses_is_named(tmp_path):
  _make_groups(tmp_path, 2)
  run_directory.metrics_path(tmp_path, 0).mkdir()  # No file to be read.
  text = _describe(tmp_path)
  assert 'group 0: cannot be read: [Errno' in text and 'metrics.jsonl' in text
  assert _cells(text)[0]['phase'] == 'training'


_STRANGE = [None, 'x', -1, 1.5, [], [None], {}, [{}], [{'peer': 'a'}], True]


@pytest.mark.parametrize('value', _STRANGE)
def test_values_of_the_wrong_kind_end_nothing(tmp_path, value):
  _make_group(tmp_path, 0, seen=NOW)
  path = run_directory.status_path(tmp_path, 0)
  sound = json.loads(path.read_text()) | {
      'peers': [1],
      'rejected': 0,
      'last_rejection': '',
      'troubles': [{'doing': 'a', 'reason': 'b', 'since': NOW, 'count': 1}],
      'host': 'a',
      'pid': 1,
  }
  for key in sound:
    run_directory.write_status(tmp_path, 0, sound | {key: value})
    assert len(_cells(_describe(tmp_path))) == 1
  run_directory.write_status(tmp_path, 0, dict.fromkeys(sound, value))
  run_directory.write_run(
      tmp_path, dict.fromkeys(('num_groups', 'burn_in_steps', 'arm'), value)
  )
  assert len(_cells(_describe(tmp_path))) == 1


# --- Small things ------------------------------------------------------------


def test_commas_and_repetition_name_the_same_directories():
  assert status.split_commas(['a,b', ' c ', 'd,']) == ['a', 'b', 'c', 'd']
  assert status.split_commas(None) == []


def _run(python, *args: str) -> subprocess.CompletedProcess:
  command = [python, '-W', 'error', '-m', 'experiments.status', *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_binary_watches_until_all_is_done(tmp_path, python):
  _make_group(tmp_path, 0, seen=NOW, num_groups=1)
  run_directory.done_path(tmp_path, 0).write_text('')
  done = _run(python, f'--workdir={tmp_path}', '--watch=0.1')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'DONE' in done.stdout and '\x1b' not in done.stdout


def test_the_binary_survives_damage(tmp_path, python):
  _make_groups(tmp_path, 2)
  run_directory.status_path(tmp_path, 0).write_text('{')
  run_directory.run_path(tmp_path).write_text('{')
  done = _run(python, f'--workdir={tmp_path}')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.count('cannot be read') == 2


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
