"""Tests of experiments/status: a live, dead, finished and empty run."""

import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from codistill_jax import run_directory, writers
from experiments import status
from experiments.reports import pages, run_status

NOW = 10_000.0
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def save(directory, step: int) -> None:
  (directory / str(step)).mkdir(parents=True, exist_ok=True)
  (directory / str(step) / 'commit_success.txt').write_text('')


def teachers(*peers) -> list[dict]:
  """Of a group at step 60: p steps and p minutes older than 20 and 5 s."""
  return [
      {'peer': p, 'step': 40 - p, 'time': NOW - 5.0 - 60.0 * p} for p in peers
  ]


def make_groups(workdir, num_groups: int, /, **changes) -> None:
  """Groups at step 60 of 100, each taught by all others."""
  for g in range(num_groups):
    save(run_directory.publications_dir(workdir, g), 40)
    save(run_directory.checkpoints_dir(workdir, g), 30)
    peers = [p for p in range(num_groups) if p != g]
    sign = {
        'step': 60,
        'num_steps': 100,
        'time': NOW,
        'phase': 'training',
        'steps_per_sec': 4.0,
        'num_groups': num_groups,
        'peers': peers,
        'teachers': teachers(*peers),
        'rejected': 0,
        'last_rejection': '',
        'troubles': [],
        'host': 'host-a',
        'replicas': 4,
        'device': 'TPU v4',
        'pid': 4200 + g,
    }
    made = {k: v for k, v in (sign | changes).items() if v != 'absent'}
    run_directory.write_status(workdir, g, made)


def finish(workdir, group_id: int) -> None:
  run_directory.done_path(workdir, group_id).write_text('')


def write_records(workdir, group_id: int, records, at: float = NOW) -> None:
  path = run_directory.metrics_path(workdir, group_id)
  writer = writers.JsonlWriter(path, clock=lambda: at)
  for step, metrics in records:
    writer.write(step, metrics)
  writer.close()


def look(workdir) -> tuple[str, bool]:
  view, done = run_status.look(str(workdir), NOW)
  return pages.plain(view), done


def cells(text: str) -> list[dict[str, str]]:
  """The rows of the table of one run, by column."""
  lines = text.partition('\n\n')[0].splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith('group'))
  split = [line.split('  ') for line in lines[start:]]
  header, *rows = [[c.strip() for c in row if c.strip()] for row in split]
  return [dict(zip(header, row)) for row in rows]


# --- The table ---------------------------------------------------------------


def test_a_live_group_shows_all_it_says(tmp_path):
  make_groups(tmp_path, 2, time=NOW - 2, rejected='absent')
  write_records(
      tmp_path, 0, [(50, {'eval/loss': 5.4321}), (55, {'loss/task': 5.0})], 0.0
  )
  text, done = look(tmp_path)
  assert not done
  assert cells(text)[0] == {
      'group': '0',
      'step': '60/100',
      'phase': 'training',
      'steps/s': '4.0',
      'ETA': '10 s',
      'eval/loss': '5.432',
      'published': '40',
      'teachers': '1 of 1',
      'staleness': '21 steps, 63 s',
      'rejected': '-',
      'checkpoint': '30',
      'last seen': '2 s ago',
  }
  # And there is nothing to say but where it runs.
  title, notes = text.split('\n\n')
  assert title.startswith(str(tmp_path))
  assert notes == (
      'on host-a: pid 4200 (group 0, 4 x TPU v4), 4201 (group 1, 4 x TPU v4)'
  )


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({'time': NOW - 59}, {'last seen': '59 s ago', 'ETA': '10 s'}),
        ({'time': NOW - 61}, {'last seen': 'SILENT 61 s ago', 'ETA': '-'}),
        (
            {'teachers': teachers(2, 3)},
            {'teachers': '2 of 3', 'staleness': '22..23 steps, 2 min..3 min'},
        ),
        # Peers are those of the topology.
        ({'peers': [3], 'teachers': teachers(3)}, {'teachers': '1 of 1'}),
        # Who has none rejects nothing.
        ({'peers': []}, {'teachers': '-', 'rejected': '-', 'staleness': '-'}),
        # As in an older run.
        ({'peers': 'absent'}, {'teachers': '3 of 3'}),
        ({'rejected': 'absent'}, {'rejected': '2'}),
        (
            {'phase': 'stopped', 'time': NOW - 3600},
            {'phase': 'stopped', 'ETA': '-', 'last seen': 'STOPPED 60 min ago'},
        ),
        (
            {'phase': 'failed'},
            {'phase': 'failed', 'ETA': '-', 'last seen': 'FAILED 0 s ago'},
        ),
        ({'steps_per_sec': None}, {'steps/s': '2.0', 'ETA': '20 s'}),
    ],
)
def test_a_row_tells_what_the_group_says(tmp_path, changes, expected):
  make_groups(tmp_path, 4, **changes)
  recorded = {'exchange/rejected': 2.0, 'perf/steps_per_sec': 2.0}
  write_records(tmp_path, 0, [(50, recorded), (51, {})], 0.0)
  row = cells(look(tmp_path)[0])[0]
  assert {key: row[key] for key in expected} == expected


def test_a_run_is_done_once_every_group_is(tmp_path):
  make_groups(tmp_path, 1, num_groups=2, time=NOW - 600)
  finish(tmp_path, 0)
  text, done = look(tmp_path)
  assert cells(text)[0]['last seen'] == 'DONE 10 min ago'
  assert 'pid' not in text  # Its process has ended.
  assert not done  # Group 1 has not made its directory yet.
  make_groups(tmp_path, 2)
  assert not look(tmp_path)[1]
  finish(tmp_path, 1)
  assert look(tmp_path)[1]


def test_metrics_stand_in_for_a_missing_status(tmp_path):
  write_records(tmp_path, 0, [(7, {'perf/steps_per_sec': 2.0})], NOW - 3)
  (row,) = cells(look(tmp_path)[0])
  assert (row['step'], row['steps/s']) == ('7/-', '2.0')
  assert (row['phase'], row['last seen']) == ('?', '3 s ago')


@pytest.mark.parametrize('sign', [{}, {'teachers': [{'peer': 1}], 'step': 3}])
def test_a_group_that_says_little_gets_dashes(tmp_path, sign):
  run_directory.write_status(tmp_path, 0, sign)
  (row,) = cells(look(tmp_path)[0])
  assert (row['staleness'], row['last seen']) == ('-', 'none yet')


def test_an_empty_directory_says_so(tmp_path):
  text, done = look(tmp_path)
  assert 'no group has started yet' in text and not done
  with pytest.raises(FileNotFoundError, match='No run directory at'):
    look(tmp_path / 'absent')


# --- Below the table ---------------------------------------------------------


@pytest.mark.parametrize('num_groups', [2, 4, 16])
def test_every_staleness_is_shown_and_the_page_stays_narrow(
    tmp_path, num_groups
):
  make_groups(tmp_path, num_groups)
  text = look(tmp_path)[0]
  assert max(map(len, text.splitlines())) <= 140
  assert len(cells(text)) == num_groups
  starts = ('staleness of each', 'and in time')
  tables = [t for t in text.split('\n\n') if t.startswith(starts)]
  # Of one teacher the row says it all; many need a table of times besides.
  assert len(tables) == {2: 0, 4: 1, 16: 2}[num_groups]
  rows = [[line for line in t.splitlines() if line[:2] == '0 '] for t in tables]
  shown = ' '.join(row.replace(',', '') for (row,) in rows)
  for p in range(1, num_groups) if tables else ():
    assert f' {20 + p} ' in f'{shown} '
  if tables:
    assert '65 s' in shown and f'{num_groups - 1} min' in shown


TROUBLE = {
    'doing': 'saving a resume checkpoint',
    'reason': 'No space\x1b[2J\nleft\x07 on \u202edevice',
    'since': NOW - 180,
    'count': 14,
}
ALONE = 'group 2 trains alone: of its peers (0, 1, 3) none teaches'


@pytest.mark.parametrize(
    'changes, said',
    [
        (
            {'troubles': [TROUBLE]},
            'group 2: saving a resume checkpoint fails since 3 min, 14 times:'
            r' No space\x1b[2J left\x07 on \u202edevice',
        ),
        (
            {'rejected': 3, 'last_rejection': 'group 1: NaN'},
            'group 2: last rejection: group 1: NaN',
        ),
        ({'teachers': teachers(3)}, 'group 2 goes without the teacher(s) 0, 1'),
        ({'teachers': []}, ALONE),
        ({'teachers': [], 'step': 50}, None),  # The end of burn-in.
        ({'teachers': [], 'peers': []}, None),
        ({'teachers': [], 'phase': 'stopped'}, None),
        (
            {'phase': 'failed', 'reason': 'loss is\nnan'},
            'group 2 has failed: loss is nan',
        ),
        ({'teachers': [], 'phase': 'compiling'}, None),
        ({}, None),
    ],
)
def test_what_is_wrong_is_told(tmp_path, changes, said):
  run_directory.write_run(tmp_path, {'burn_in_steps': 50})
  make_groups(tmp_path, 4, **changes)
  text = look(tmp_path)[0]
  told = [line for line in text.splitlines() if line.startswith('group 2')]
  assert told == ([said] if said else [])
  # Without a known burn-in nobody is called alone.
  run_directory.run_path(tmp_path).unlink()
  assert 'alone' not in look(tmp_path)[0]


@pytest.mark.parametrize(
    'weight, changes, why',
    [
        (1.0, {}, None),
        (0.0, {}, 'none of its peers (1) had published what it could use'),
        (0.0, {'last_rejection': 'NaN'}, 'NaN'),
        (0.0, {'troubles': [TROUBLE]}, 'saving a resume checkpoint fails: No'),
        (0.0, {'step': 50, 'num_steps': 50}, None),  # All of it is burn-in.
        (0.0, {'peers': []}, None),
    ],
)
def test_who_never_had_a_teacher_is_named_and_why(
    tmp_path, weight, changes, why
):
  run_directory.write_run(tmp_path, {'burn_in_steps': 50})
  make_groups(tmp_path, 2, phase='done', **{'teachers': []} | changes)
  records = [(50, {'distill/weight': 0.0}), (55, {'distill/weight': weight})]
  write_records(tmp_path, 0, [*records, (60, {'distill/weight': 0.0})])
  lines = run_status.never_taught(str(tmp_path))
  said = [line for line in lines if line.startswith('group 0')]
  begin = f'group 0 has never had a teacher, because {why}'
  assert [line[: len(begin)] for line in said] == ([begin] if why else [])


# --- Damage ------------------------------------------------------------------


@pytest.mark.parametrize('data', [b'', b'{"step": 6', b'[]', b'\xff\xfe\x00'])
def test_a_damaged_status_is_named_and_the_others_are_shown(tmp_path, data):
  run_directory.write_run(tmp_path, {'num_groups': 2, 'burn_in_steps': 0})
  make_groups(tmp_path, 2)
  run_directory.status_path(tmp_path, 0).write_bytes(data)
  write_records(tmp_path, 0, [(50, {'loss/task': 5.0})])
  text, done = look(tmp_path)
  damaged, sound = cells(text)
  assert damaged['phase'] == '?' and sound['phase'] == 'training'
  # Nobody knows whether it has teachers.
  assert damaged['teachers'] == '? of 1' and not done
  assert not any(s in text for s in ('absent', 'goes without', 'alone'))
  assert 'group 0: cannot be read: Expected' in text
  assert str(run_directory.status_path(tmp_path, 0)) in text.replace('\n', '')


def test_a_damaged_run_json_is_named_and_does_not_end_a_watch(tmp_path):
  make_groups(tmp_path, 1, num_groups=2)
  run_directory.run_path(tmp_path).write_text('{"arm": ')
  finish(tmp_path, 0)
  text, done = look(tmp_path)
  assert 'cannot be read: Expected JSON in' in text and 'run.json' in text
  # Group 1, of which status.json of group 0 knows, is not done.
  assert len(cells(text)) == 1 and not done


def test_a_file_system_that_refuses_is_named(tmp_path):
  make_groups(tmp_path, 2)
  run_directory.metrics_path(tmp_path, 0).mkdir()  # No file to be read.
  text = look(tmp_path)[0]
  assert 'group 0: cannot be read: ' in text
  assert 'metrics.jsonl is no regular file' in ' '.join(text.split())
  assert cells(text)[0]['phase'] == 'training'


_STRANGE = [None, 'x', -1, 1.5, [], [None], {}, [{}], [{'peer': 'a'}], True]


@pytest.mark.parametrize('value', _STRANGE)
def test_values_of_the_wrong_kind_end_nothing(tmp_path, value):
  make_groups(tmp_path, 1, peers=[1], troubles=[TROUBLE])
  sound = json.loads(run_directory.status_path(tmp_path, 0).read_text())
  for key in sound:
    run_directory.write_status(tmp_path, 0, sound | {key: value})
    assert len(cells(look(tmp_path)[0])) == 1
  run_directory.write_status(tmp_path, 0, dict.fromkeys(sound, value))
  run_directory.write_run(
      tmp_path, dict.fromkeys(('num_groups', 'burn_in_steps', 'arm'), value)
  )
  assert len(cells(look(tmp_path)[0])) == 1


# --- The binary --------------------------------------------------------------


def test_a_group_that_claims_thousands_of_teachers_delays_nobody(tmp_path):
  make_groups(tmp_path, 2, teachers=teachers(*range(5000)))
  start = time.process_time()
  assert len(cells(look(tmp_path)[0])) == 2
  assert time.process_time() - start < 2.0


def test_commas_and_repetition_name_the_same_directories():
  found = status.split_commas(['/a,/b', ' s3://c ', 'd,'])
  assert found == ['/a', '/b', 's3://c', os.path.abspath('d')]
  assert status.split_commas(None) == []


def test_a_terminal_shows_what_is_wrong_in_colour(tmp_path):
  make_groups(tmp_path, 1, time=NOW - 3600, host='[red]not markup[/red]')
  console = Console(force_terminal=True, color_system='standard', width=200)
  with console.capture() as shown:
    console.print(run_status.look(str(tmp_path), NOW)[0])
  assert '\x1b[1;31mSILENT 60 min ago' in shown.get()
  assert '[red]not markup[/red]' in shown.get()


def run(python, *args: str) -> subprocess.CompletedProcess:
  # What the requirements of a training run do not install is missing.
  code = (
      'import runpy, sys\n'
      'missing = ("jax", "jinja2", "matplotlib", "pandas", "tensorboardX")\n'
      'sys.modules |= dict.fromkeys(missing)\n'
      'runpy.run_module("experiments.status", run_name="__main__")'
  )
  command = [python, '-W', 'error', '-c', code, *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_binary_watches_until_all_is_done_and_survives_damage(
    tmp_path, python
):
  make_groups(tmp_path, 1)
  finish(tmp_path, 0)
  done = run(python, f'--workdir={tmp_path}', '--watch=0.1')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'DONE' in done.stdout and '\x1b' not in done.stdout
  run_directory.status_path(tmp_path, 0).write_text('{')
  run_directory.run_path(tmp_path).write_text('{')
  done = run(python, f'--workdir={tmp_path}')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.count('cannot be read') == 2


def test_a_process_that_has_died_is_silent_at_once(tmp_path):
  make_groups(tmp_path, 2)
  child = subprocess.Popen(
      [
          *(sys.executable, '-c'),
          'import sys; from codistill_jax.storage import leases\n'
          'lease = leases.acquire(sys.argv[1], "training in")\n'
          'print(flush=True); sys.stdin.read()',
          run_directory.group_dir(tmp_path, 1),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=ROOT,
  )
  with child:
    child.stdout.readline()
    seen = lambda: [row['last seen'] for row in cells(look(tmp_path)[0])]
    assert seen() == ['0 s ago', '0 s ago']
    child.kill()
    child.wait()
    assert seen() == ['0 s ago', 'SILENT 0 s ago']
