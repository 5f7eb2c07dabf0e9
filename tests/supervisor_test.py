"""The supervisor: watches, restarts, gives up, and leaves no process behind.

With processes that only pretend to train.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
import types

import pytest
import tiny_run
from waits import PATIENCE, Clock, until

from codistill_jax import run_directory
from experiments import cli
from experiments.running import processes


@pytest.fixture(autouse=True)
def no_fork(monkeypatch):
  """Tests have a jax with threads, which warns when it is forked."""
  monkeypatch.setattr(processes, '_die_with_parent', None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """The seconds of the supervisor pass quickly; only who is deaf is killed."""
  clock = types.SimpleNamespace(
      monotonic=lambda: 20 * time.monotonic(),
      sleep=lambda seconds: time.sleep(seconds / 20),
  )
  monkeypatch.setattr(processes, 'time', clock)
  monkeypatch.setattr(processes, '_GRACE_SECONDS', 20 * PATIENCE)
  monkeypatch.setattr(processes, '_POLL_SECONDS', 0.01)


@pytest.fixture
def pretend(tmp_path):
  """Makes groups whose process is a few lines of Python."""
  made = []

  def make(*scripts):
    for group_id, script in enumerate(scripts):
      made.append(
          processes.Group(
              str(tmp_path),
              group_id,
              [sys.executable, '-c', script, str(tmp_path)],
              {'GROUP': str(group_id)},
          )
      )
    return made

  yield make
  for group in made:
    if group.running:
      group._process.kill()
      group._process.wait()


class Stop:
  """Asked to stop once `condition` holds."""

  signal_number = signal.SIGTERM

  def __init__(self, condition=lambda: False):
    self._condition = condition
    self._deadline = time.monotonic() + PATIENCE

  def __call__(self):
    assert time.monotonic() < self._deadline
    return self._condition()


def log_of(group):
  return group._log.read_text()


FINE = 'pass'
# Says when it began and how often it was asked to leave.
PATIENT = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(here / ('begun' + os.environ['GROUP'])).write_text(str(os.getpid()))
while not asked:
  time.sleep(0.01)
time.sleep(0.2)
print('saved after', len(asked), flush=True)
sys.exit(143)
"""


def test_all_groups_run_to_their_end(pretend):
  groups = pretend(FINE, 'import os; print("I am", os.environ["GROUP"])')
  processes.watch(groups, Stop(), max_restarts=0)
  assert [g.done for g in groups] == [True, True]
  assert 'I am 1' in log_of(groups[1])


def test_a_group_that_dies_is_started_again(pretend, capsys):
  once = """
import os, pathlib, signal, sys
mark = pathlib.Path(sys.argv[1]) / 'mark'
if not mark.exists():
  mark.write_text('')
  os.kill(os.getpid(), signal.SIGKILL)
"""
  groups = pretend(once, FINE)
  processes.watch(groups, Stop(), max_restarts=1)
  assert groups[0].done
  assert (
      'group 0 died (signal 9); starting it again in 1 s from step 0'
      in capsys.readouterr().err
  )


def test_a_run_that_goes_nowhere_is_given_up(pretend):
  groups = pretend('import sys; print("deep trouble"); sys.exit(70)')
  with pytest.raises(ValueError) as e:
    processes.watch(groups, Stop(), max_restarts=1)
  assert str(e.value) == (
      'group 0 died 2 times without a new resume checkpoint (last: exit status'
      f' 70, "deep trouble"); see {groups[0]._log}'
  )


def test_deaths_count_from_the_newest_checkpoint(pretend, tmp_path):
  """A run of weeks may be killed often, if it gets on between."""
  gets_on = """
import pathlib, sys
root = pathlib.Path(sys.argv[1]) / 'groups/group_0/checkpoints'
step = len(list(root.iterdir())) if root.exists() else 0
(root / str(step)).mkdir(parents=True)
(root / str(step) / 'commit_success.txt').write_text('')
sys.exit(0 if step == 2 else 70)
"""
  groups = pretend(gets_on)
  processes.watch(groups, Stop(), max_restarts=1)
  assert groups[0].done


def test_a_clear_error_is_passed_on_and_ends_the_others(pretend, tmp_path):
  wrong = """
import pathlib, sys, time
while not (pathlib.Path(sys.argv[1]) / 'begun1').exists():
  time.sleep(0.01)
print('error: num_steps=0; set it to at least 1')
sys.exit(1)
"""
  groups = pretend(wrong, PATIENT)
  with pytest.raises(ValueError) as e:
    processes.watch(groups, Stop(), max_restarts=5)
  assert str(e.value) == 'group 0: error: num_steps=0; set it to at least 1'
  processes.end_all(groups)  # As main does, whatever happened.
  assert not any(group.running for group in groups)
  assert 'saved after 1' in log_of(groups[1])


def test_a_stop_asks_each_group_once_and_waits(pretend, tmp_path):
  """A second signal would kill a group that is still saving."""
  groups = pretend(PATIENT, PATIENT)
  begun = lambda: all((tmp_path / f'begun{g}').exists() for g in (0, 1))
  with pytest.raises(cli.Stopped) as e:
    processes.watch(groups, Stop(begun), max_restarts=5)
  processes.end_all(groups)
  assert e.value.exit_status == 143
  assert [log_of(g) for g in groups] == ['saved after 1\n'] * 2
  assert not any(group.running for group in groups)


def test_a_group_that_does_not_leave_is_killed(pretend, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_GRACE_SECONDS', 0.3)
  deaf = PATIENT.replace('while not asked', 'while True')
  groups = pretend(deaf)
  with pytest.raises(cli.Stopped):
    processes.watch(
        groups, Stop(lambda: (tmp_path / 'begun0').exists()), max_restarts=5
    )
  assert not groups[0].running


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux can tell')
def test_no_group_outlives_its_supervisor(tmp_path):
  supervisor = f"""
import sys, time
from experiments.running import processes
group = processes.Group(
    {str(tmp_path)!r},
    0,
    [sys.executable, '-c', {PATIENT!r}, {str(tmp_path)!r}],
    {{'GROUP': '0'}},
)
group.poll(0)
time.sleep(600)
"""
  begun = tmp_path / 'begun0'
  process = tiny_run.Process(
      [sys.executable, '-c', supervisor],
      tmp_path / 'supervisor.txt',
      {'PYTHONPATH': str(tiny_run.ROOT)},
  )
  try:
    tiny_run.until(
        lambda: begun.exists() and begun.read_text(), process=process
    )
  finally:
    process.kill()
  until(lambda: not is_running(int(begun.read_text())))


def is_running(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return False
  return state.split()[0] != 'Z'  # Nobody may be there to bury it.


# --- What it tells -----------------------------------------------------------


def test_a_group_can_be_observed(pretend, tmp_path):
  once = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
with (here / 'pids').open('a') as f:
  print(os.getpid(), file=f)
while not (here / 'go').exists():
  time.sleep(0.01)
(here / 'go').unlink()
sys.exit(0 if len((here / 'pids').read_text().split()) == 2 else 70)
"""
  (group,) = pretend(once)
  pids = lambda: list(map(int, lines_of(tmp_path / 'pids')))
  assert (group.pid, group.restarts, group.done) == (None, 0, False)
  group.poll(1)
  tiny_run.until(lambda: len(pids()) == 1)
  assert (group.pid, group.restarts, group.done) == (pids()[0], 0, False)
  (tmp_path / 'go').touch()
  tiny_run.until(lambda: group.pid is None)  # At once, not when polled.
  tiny_run.until(lambda: group.poll(1) or len(pids()) == 2)
  assert (group.pid, group.restarts, group.done) == (pids()[1], 1, False)
  (tmp_path / 'go').touch()
  tiny_run.until(lambda: group.poll(1) or group.done)
  assert (group.pid, group.restarts, group.done) == (None, 1, True)


def lines_of(path):
  return path.read_text().split() if path.exists() else []


def test_what_may_pass_is_tried_again_and_said(pretend, capsys, monkeypatch):
  """Exit status 75: a full disk, a peer that did not come."""
  monkeypatch.setattr(processes, '_LONGEST_DELAY_SECONDS', 1.0)
  script = 'import sys; print("error: disk full"); sys.exit(75)'
  groups = pretend(script)
  with pytest.raises(ValueError) as e:
    processes.watch(groups, Stop(), max_restarts=1)
  assert (
      'group 0 died (exit status 75, "error: disk full"); starting it again in'
      ' 1 s from step 0'
  ) in capsys.readouterr().err
  # Four times as often as a crash.
  assert 'died 5 times' in str(e.value) and groups[0].restarts == 4


def test_each_death_in_a_row_costs_twice_the_time(pretend, monkeypatch, capsys):
  now = [1000.0]
  monkeypatch.setattr(processes.time, 'monotonic', lambda: now[0])
  (group,) = pretend('import sys; sys.exit(70)')
  for _ in range(8):
    group.poll(100)
    group._process.wait()
    group.poll(100)
    before = group.restarts
    group.poll(100)
    assert group.pid is None and group.restarts == before  # Not yet.
    now[0] = group._start_at
  said = capsys.readouterr().err
  delays = [
      float(line.split(' in ')[1].split()[0]) for line in said.splitlines()
  ]
  assert delays == [1, 2, 4, 8, 16, 32, 60, 60]


def test_going_back_is_no_progress(pretend, tmp_path):
  """A checkpoint that turned out damaged is deleted: not a new one."""
  loses_one = """
import pathlib, shutil, sys
root = pathlib.Path(sys.argv[1]) / 'groups/group_0/checkpoints'
steps = sorted(root.iterdir()) if root.exists() else []
if not steps:
  for step in range(5):
    (root / str(step)).mkdir(parents=True)
    (root / str(step) / 'commit_success.txt').write_text('')
else:
  shutil.rmtree(steps[-1])
sys.exit(70)
"""
  groups = pretend(loses_one)
  with pytest.raises(ValueError, match='died 2 times'):
    processes.watch(groups, Stop(), max_restarts=1)
  assert groups[0].restarts == 1


def test_a_command_that_does_not_start_is_given_up_with_its_reason(tmp_path):
  group = processes.Group(str(tmp_path), 0, ['/nowhere/python'], {})
  with pytest.raises(ValueError) as e:
    processes.watch([group], Stop(), max_restarts=1)
  assert 'died 2 times' in str(e.value)
  assert 'could not be started' in str(e.value)
  assert '/nowhere/python' in str(e.value)


# --- What it survives --------------------------------------------------------


def test_of_a_huge_log_the_end_is_read(pretend):
  (group,) = pretend(
      'import sys; print("x" * 10**6); print("error: no"); sys.exit(1)'
  )
  group._log.parent.mkdir(parents=True)
  with group._log.open('wb') as f:
    f.truncate(1 << 36)  # A hole of 64 GiB.
  with pytest.raises(ValueError, match='group 0: error: no'):
    processes.watch([group], Stop(), max_restarts=0)


def test_what_an_earlier_process_said_is_not_taken_for_the_last_word(pretend):
  (group,) = pretend('import sys; sys.exit(70)')
  group._log.parent.mkdir(parents=True)
  group._log.write_text('error: of yesterday\n')
  with pytest.raises(ValueError, match='"it said nothing"'):
    processes.watch([group], Stop(), max_restarts=0)
  assert log_of(group) == 'error: of yesterday\n'


def test_a_log_that_cannot_be_written_is_said_once_and_costs_nothing(
    pretend, tmp_path, capsys
):
  (tmp_path / 'groups').write_text('in the way')
  (group,) = pretend('import sys; print("deep trouble"); sys.exit(70)')
  with pytest.raises(ValueError) as e:
    processes.watch([group], Stop(), max_restarts=1)
  said = capsys.readouterr().err
  assert said.count('log.txt cannot be written') == 1
  assert 'died 2 times' in str(e.value)
  assert 'log was not writable' in str(e.value)


def test_a_log_works_again_once_it_can_be_written(pretend, tmp_path):
  (tmp_path / 'groups').write_text('in the way')
  (group,) = pretend("""
import pathlib, sys
path = pathlib.Path(sys.argv[1]) / 'groups'
print('error: I am back')
if not path.is_file():
  sys.exit(1)
path.unlink()
sys.exit(70)
""")
  with pytest.raises(ValueError, match='group 0: error: I am back'):
    processes.watch([group], Stop(), max_restarts=1)
  assert log_of(group) == 'error: I am back\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no full disk')
def test_a_full_disk_under_its_own_output_does_not_end_it(pretend, monkeypatch):
  groups = pretend(
      """
import os, pathlib, signal, sys
mark = pathlib.Path(sys.argv[1]) / 'mark'
if not mark.exists():
  mark.write_text('')
  os.kill(os.getpid(), signal.SIGKILL)
""",
      FINE,
  )
  with contextlib.suppress(OSError), open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stderr', full)
    processes.watch(groups, Stop(), max_restarts=1)
  assert all(group.done for group in groups)


def test_an_unreadable_run_directory_does_not_end_it(pretend, monkeypatch):
  def fail(*unused, **kwargs):
    raise OSError(5, 'Input/output error')

  groups = pretend(
      'import os, sys; sys.exit(70 * os.path.exists(sys.argv[1] + "/x"))'
  )
  pathlib.Path(groups[0].workdir, 'x').touch()
  monkeypatch.setattr(run_directory, 'newest_saved', fail)
  monkeypatch.setattr(run_directory, 'read_metrics', fail)
  groups[0].poll(1)
  groups[0]._process.wait()
  groups[0].poll(1)
  pathlib.Path(groups[0].workdir, 'x').unlink()
  processes.watch(groups, Stop(), max_restarts=1)
  assert groups[0].done


# --- Progress ----------------------------------------------------------------


def write_metrics(workdir, *records, mode='a'):
  path = run_directory.metrics_path(workdir, 0)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open(mode) as f:
    for step, seconds in records:
      line = {'step': step, 'time': seconds, 'eval/loss': float('nan')}
      f.write(json.dumps(line) + '\n')


def shown(capsys):
  lines = capsys.readouterr().err.splitlines()
  return [int(line.split('step ')[1].split('/')[0]) for line in lines]


def test_progress_shows_each_record_once_and_only_news(
    pretend, tmp_path, capsys
):
  (group,) = pretend(FINE)
  run_directory.write_run(tmp_path, {'num_steps': 90})
  write_metrics(tmp_path, (1, 100.0), (2, 101.0))
  progress = processes._Progress(group)
  progress.update()
  assert shown(capsys) == []
  write_metrics(tmp_path, (3, 102.0), (4, 103.0))
  progress.update()
  progress.update()
  assert shown(capsys) == [3, 4]
  write_metrics(tmp_path, (5, 7.0))  # Somebody has set the clock.
  progress.update()
  assert shown(capsys) == [5]
  write_metrics(tmp_path, (4, 8.0), mode='w')  # Another file.
  progress.update()
  progress.update()
  assert shown(capsys) == [4]


def test_progress_waits_for_the_facts_of_the_run(pretend, tmp_path, capsys):
  """Metrics may come first, when a disk fails now and then."""
  (group,) = pretend(FINE)
  progress = processes._Progress(group)
  write_metrics(tmp_path, (3, 102.0))
  progress.update()
  run_directory.run_path(tmp_path).write_text('{"num_st')
  progress.update()
  run_directory.write_run(tmp_path, {'num_steps': 90})
  progress.update()
  assert shown(capsys) == [3]


# --- The end -----------------------------------------------------------------


def test_who_is_told_to_stop_with_its_groups_reports_no_deaths(pretend, capsys):
  """As by a batch system, which signals all processes of a job."""
  groups = pretend('import sys; sys.exit(143)')
  groups[0].poll(5)
  groups[0]._process.wait()
  with pytest.raises(cli.Stopped):
    processes.watch(groups, Stop(lambda: True), max_restarts=5)
  assert 'died' not in capsys.readouterr().err


def test_a_suspended_group_leaves_when_asked(pretend, tmp_path):
  groups = pretend(PATIENT)
  groups[0].poll(0)
  tiny_run.until(lambda: lines_of(tmp_path / 'begun0'))
  os.kill(groups[0].pid, signal.SIGSTOP)
  processes.end_all(groups)
  assert log_of(groups[0]) == 'saved after 1\n'


def test_deaf_groups_share_the_time_they_are_given(
    pretend, tmp_path, monkeypatch
):
  clock, given = Clock(), []
  monkeypatch.setattr(processes, '_GRACE_SECONDS', 10.0)

  def wait_or_kill(process, seconds):
    given.append(seconds)
    clock.now += 4.0  # As if it took that long.
    process.kill()
    process.wait()

  monkeypatch.setattr(processes, 'time', clock)
  monkeypatch.setattr(processes, 'wait_or_kill', wait_or_kill)
  groups = pretend(*[PATIENT.replace('while not asked', 'while True')] * 3)
  for group in groups:
    group._start()
  until(lambda: all(lines_of(tmp_path / f'begun{g}') for g in range(3)))
  processes.end_all(groups)
  assert given == pytest.approx([10.0, 6.0, 2.0])
  assert not any(group.running for group in groups)


def test_a_call_gives_status_and_output():
  code = 'import sys; print("out"); print("err", file=sys.stderr); sys.exit(3)'
  done = processes.call([sys.executable, '-c', code], Stop(), capture=True)
  assert (done.returncode, done.stdout, done.stderr) == (3, 'out\n', 'err\n')


@pytest.mark.parametrize('deaf', [False, True])
@pytest.mark.parametrize('capture', [False, True])
def test_a_stop_ends_a_call_within_seconds(
    pretend, tmp_path, monkeypatch, deaf, capture
):
  monkeypatch.setattr(processes, '_SOON_SECONDS', 1.0 if deaf else PATIENCE)
  script = PATIENT.replace('while not asked', 'while True') if deaf else PATIENT
  monkeypatch.setenv('GROUP', '0')
  begun = tmp_path / 'begun0'
  start = time.monotonic()
  with pytest.raises(cli.Stopped) as e:
    processes.call(
        [sys.executable, '-c', script, str(tmp_path)],
        Stop(lambda: lines_of(begun)),
        capture=capture,
    )
  assert e.value.exit_status == 143
  assert time.monotonic() - start < PATIENCE
  assert not is_running(int(begun.read_text()))
