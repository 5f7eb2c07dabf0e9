"""Supervision: watches, restarts, gives up, and leaves no process behind.

With processes that only pretend to train.
"""

import contextlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tiny_run
from waits import PATIENCE, until

from codistill_jax import run_directory
from experiments import cli
from experiments.running import processes

# Tests have a jax with threads, which warns when it is forked.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork')

# The seconds of a supervisor pass quickly; only who is deaf is killed.
PACE = processes.Pace(
    poll=0.01, grace=PATIENCE, first_delay=0.05, longest_delay=0.1
)


@pytest.fixture
def pretend(tmp_path):
  """Makes groups whose process is a few lines of Python."""
  made = []

  def make(*scripts, pace=PACE):
    for group_id, script in enumerate(scripts):
      command = [sys.executable, '-c', script, str(tmp_path)]
      environment = {'GROUP': str(group_id)}
      made.append(
          processes.Group(str(tmp_path), group_id, command, environment, pace)
      )
    return made

  yield make
  for group in made:
    group.end(0.0)


class Stop(cli.StopRequest):
  """Asked to stop once `condition` holds."""

  def __init__(self, condition=lambda: False):
    super().__init__()
    self._condition = condition

  def __call__(self):
    return bool(self._condition())


def supervise(groups, stop=None, max_restarts=1):
  processes.supervise(groups, stop or Stop(), max_restarts)


def given_up(groups, max_restarts=1):
  """Returns why the supervisor gave up."""
  with pytest.raises(ValueError) as e:
    supervise(groups, max_restarts=max_restarts)
  assert not any(group.running for group in groups)
  return str(e.value)


def run_once(group, max_restarts):
  """Starts the process, and lets the group see it end."""
  group.poll(max_restarts)
  until(lambda: not group.running)
  group.poll(max_restarts)


def lines_of(path):
  return path.read_text().split() if path.exists() else []


FINE = 'pass'
FAILS = 'import sys; print("deep trouble"); sys.exit(70)'
KILLED_ONCE = """
import os, pathlib, signal, sys
mark = pathlib.Path(sys.argv[1]) / 'mark'
if not mark.exists():
  mark.write_text('')
  os.kill(os.getpid(), signal.SIGKILL)
"""
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
DEAF = PATIENT.replace('while not asked', 'while True')


def test_all_groups_run_to_their_end(pretend):
  groups = pretend(FINE, 'import os; print("I am", os.environ["GROUP"])')
  supervise(groups, max_restarts=0)
  assert [g.done for g in groups] == [True, True]
  assert 'I am 1' in groups[1].log.read_text()


def test_a_group_that_dies_is_started_again(pretend, capsys):
  groups = pretend(KILLED_ONCE, FINE, pace=PACE._replace(first_delay=1.0))
  supervise(groups)
  assert groups[0].done and groups[0].restarts == 1
  assert (
      'group 0 died (signal 9); starting it again in 0.1 s from step 0'
      in capsys.readouterr().err
  )


def test_a_run_that_goes_nowhere_is_given_up(pretend):
  groups = pretend(FAILS)
  assert given_up(groups) == (
      'group 0 died 2 times without a new resume checkpoint (last: exit status'
      f' 70, "deep trouble"); see {groups[0].log}'
  )


def test_a_clear_error_is_said_at_once_and_the_others_train_on(
    pretend, tmp_path, capsys
):
  waits = """
import pathlib, sys, time
go = pathlib.Path(sys.argv[1]) / 'go'
while not go.exists():
  time.sleep(0.01)
"""
  groups = pretend('import sys; print("error: a typo"); sys.exit(1)', waits)
  said = []

  def go():  # Only once it is said.
    said.append(capsys.readouterr().err)
    if 'group 0: error: a typo; the other groups train on' in ''.join(said):
      (tmp_path / 'go').touch()
    return False

  with pytest.raises(ValueError, match='group 0: error: a typo'):
    supervise(groups, Stop(go))
  assert groups[1].done and not groups[0].restarts


# What a process does to the checkpoints before it dies, and how often it does.
GETS_ON = """
import pathlib, sys
root = pathlib.Path(sys.argv[1]) / 'groups/group_0/checkpoints'
step = len(list(root.iterdir())) if root.exists() else 0
(root / str(step)).mkdir(parents=True)
(root / str(step) / 'commit_success.txt').write_text('')
sys.exit(0 if step == 2 else 70)
"""
LOSES_ONE = """
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


def test_deaths_count_from_the_newest_checkpoint(pretend):
  """A run of weeks may be killed often, if it gets on between."""
  (group,) = pretend(GETS_ON)
  supervise([group])
  assert group.done and group.restarts == 2


def test_going_back_is_no_progress(pretend):
  """A checkpoint that turned out damaged is deleted: not a new one."""
  (group,) = pretend(LOSES_ONE)
  assert 'died 2 times' in given_up([group])
  assert group.restarts == 1


def test_what_may_pass_is_tried_four_times_as_often(pretend, capsys):
  """Exit status 75: a full disk, a peer that did not come."""
  groups = pretend('import sys; print("error: disk full"); sys.exit(75)')
  assert 'died 5 times' in given_up(groups)
  assert groups[0].restarts == 4
  assert (
      'group 0 died (exit status 75, "error: disk full"); starting it again in'
      ' 0.05 s from step 0'
  ) in capsys.readouterr().err


def test_each_death_in_a_row_costs_twice_the_time(pretend, capsys):
  groups = pretend(
      FAILS, pace=PACE._replace(first_delay=0.01, longest_delay=0.06)
  )
  given_up(groups, max_restarts=5)
  said = capsys.readouterr().err.splitlines()
  delays = [float(line.split(' in ')[1].split()[0]) for line in said]
  assert delays == [0.01, 0.02, 0.04, 0.06, 0.06]


def test_a_group_is_not_started_before_its_delay_is_over(pretend):
  (group,) = pretend(
      FAILS, pace=PACE._replace(first_delay=1e4, longest_delay=1e4)
  )
  run_once(group, 5)
  group.poll(5)
  assert group.pid is None and group.restarts == 0


def test_a_command_that_does_not_start_is_given_up_with_its_reason(tmp_path):
  group = processes.Group(str(tmp_path), 0, ['/nowhere/python'], {}, PACE)
  why = given_up([group])
  for words in ('died 2 times', 'could not be started', '/nowhere/python'):
    assert words in why


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
  seen = lambda: (group.pid, group.restarts, group.done, group.exit_status)
  assert seen() == (None, 0, False, None)
  group.poll(1)
  until(lambda: len(pids()) == 1)
  assert seen() == (pids()[0], 0, False, None)
  (tmp_path / 'go').touch()
  until(lambda: group.pid is None)  # At once, not when polled.
  until(lambda: group.poll(1) or len(pids()) == 2)
  assert seen() == (pids()[1], 1, False, 70)
  (tmp_path / 'go').touch()
  until(lambda: group.poll(1) or group.done)
  assert seen() == (None, 1, True, 0)


# --- The end -----------------------------------------------------------------


def stop_when_begun(tmp_path, count):
  return Stop(
      lambda: all(lines_of(tmp_path / f'begun{g}') for g in range(count))
  )


def test_a_stop_asks_each_group_once_and_waits(pretend, tmp_path):
  """A second signal would kill a group that is still saving."""
  groups = pretend(PATIENT, PATIENT)
  with pytest.raises(cli.Stopped) as e:
    supervise(groups, stop_when_begun(tmp_path, 2))
  processes.end_all(groups)
  assert e.value.exit_status == 143
  assert [g.log.read_text() for g in groups] == ['saved after 1\n'] * 2


def test_deaf_groups_are_killed_and_share_the_time_they_are_given(
    pretend, tmp_path
):
  groups = pretend(DEAF, DEAF, DEAF, pace=PACE._replace(grace=0.3))
  with pytest.raises(cli.Stopped, match=r'group 0 \(signal 9.*, group 2 ') as e:
    supervise(groups, stop_when_begun(tmp_path, 3))
  assert e.value.exit_status == cli.MAY_PASS
  assert not any(group.running for group in groups)
  assert [g.exit_status for g in groups] == [-signal.SIGKILL] * 3


# How the other group ends when it is asked, or had ended before.
LOSSES = {
    'asked': ('sys.exit(75)', 75),
    'before': ('sys.exit(75)', 75),
    'a clear error': ('sys.exit(1)', 1),
    'a crash': ('sys.exit(70)', 70),
    'killed': ('os.kill(os.getpid(), 9)', 75),
}


@pytest.mark.parametrize('how', LOSSES)
def test_a_stop_is_no_better_than_the_worst_of_its_groups(
    pretend, tmp_path, how
):
  """With its line; also if it had died before anybody asked the supervisor."""
  end, status = LOSSES[how]
  ends = f"print('error: disk full', flush=True)\n{end}"
  loses = PATIENT.replace('sys.exit(143)', ends)
  if how == 'before':
    loses = loses.replace('while not asked', 'while False')
  groups = pretend(
      PATIENT, loses, pace=PACE._replace(first_delay=1e4, longest_delay=1e4)
  )
  begun = stop_when_begun(tmp_path, 2)
  gone = lambda: how != 'before' or groups[1].exit_status is not None
  with pytest.raises(cli.Stopped) as e:
    supervise(groups, Stop(lambda: begun() and gone()), max_restarts=9)
  assert e.value.exit_status == status
  said = str(e.value)
  assert 'not saved: group 1 (' in said and '"error: disk full"' in said
  assert 'group 0' not in said


def test_who_is_told_to_stop_with_its_groups_reports_no_deaths(pretend, capsys):
  """As by a batch system, which signals all processes of a job."""
  (group,) = pretend('import sys; sys.exit(143)')
  group.poll(5)
  until(lambda: not group.running)
  with pytest.raises(cli.Stopped):
    supervise([group], Stop(lambda: True))
  assert 'died' not in capsys.readouterr().err


def test_a_suspended_group_leaves_when_asked(pretend, tmp_path):
  (group,) = pretend(PATIENT)
  group.poll(0)
  until(lambda: lines_of(tmp_path / 'begun0'))
  os.kill(group.pid, signal.SIGSTOP)
  processes.end_all([group])
  assert group.log.read_text() == 'saved after 1\n'


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux can tell')
def test_no_group_outlives_its_supervisor(tmp_path):
  supervisor = f"""
import sys, time
from experiments.running import processes
command = [sys.executable, '-c', {PATIENT!r}, {str(tmp_path)!r}]
processes.Group({str(tmp_path)!r}, 0, command, {{'GROUP': '0'}}).poll(0)
time.sleep(600)
"""
  begun = tmp_path / 'begun0'
  process = tiny_run.Process(
      [sys.executable, '-c', supervisor],
      tmp_path / 'supervisor.txt',
      {'PYTHONPATH': str(tiny_run.ROOT)},
  )
  try:
    until(lambda: lines_of(begun), process=process)
  finally:
    process.kill()
  until(lambda: not is_running(int(begun.read_text())))


def is_running(pid):
  try:  # Nobody may be there to bury it.
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


# --- What it survives --------------------------------------------------------


def test_of_a_huge_log_the_end_is_read(pretend):
  (group,) = pretend(
      'import sys; print("x" * 10**6); print("error: no"); sys.exit(1)'
  )
  group.log.parent.mkdir(parents=True)
  with group.log.open('wb') as f:
    f.truncate(1 << 36)  # A hole of 64 GiB.
  assert given_up([group]) == 'group 0: error: no'


def test_what_an_earlier_process_said_is_not_taken_for_the_last_word(pretend):
  (group,) = pretend('import sys; sys.exit(70)')
  group.log.parent.mkdir(parents=True)
  group.log.write_text('error: of yesterday\n')
  assert '"it said nothing"' in given_up([group], max_restarts=0)
  assert group.log.read_text() == 'error: of yesterday\n'


def test_a_log_that_cannot_be_written_is_said_once_and_costs_nothing(
    pretend, tmp_path, capsys
):
  (tmp_path / 'groups').write_text('in the way')
  why = given_up(pretend(FAILS))
  assert 'died 2 times' in why and 'log was not writable' in why
  assert capsys.readouterr().err.count('log.txt cannot be written') == 1


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
  assert given_up([group]) == 'group 0: error: I am back'
  assert group.log.read_text() == 'error: I am back\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no full disk')
def test_a_full_disk_under_its_own_output_does_not_end_it(pretend, monkeypatch):
  groups = pretend(KILLED_ONCE, FINE)
  with contextlib.suppress(OSError), open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stderr', full)
    supervise(groups)
  assert all(group.done for group in groups)


def test_an_unreadable_run_directory_does_not_end_it(pretend, monkeypatch):
  def fail(*unused, **kwargs):
    raise OSError(5, 'Input/output error')

  (group,) = pretend(KILLED_ONCE)
  monkeypatch.setattr(run_directory, 'newest_saved', fail)
  monkeypatch.setattr(run_directory, 'read_run', fail)
  write_metrics(group.workdir, 1)
  supervise([group])
  assert group.done


# --- Progress ----------------------------------------------------------------


def write_metrics(workdir, *steps, mode='a', end='\n'):
  path = run_directory.metrics_path(workdir, 0)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open(mode) as f:
    for step in steps:
      line = {'step': step, 'time': 100.0, 'eval/loss': 'NaN'}
      f.write(json.dumps(line) + end)


def shown(progress, capsys):
  progress.update()
  progress.update()
  lines = capsys.readouterr().err.splitlines()
  return [int(line.split('step ')[1].split('/')[0]) for line in lines]


def test_progress_shows_each_record_once_and_only_news(
    pretend, tmp_path, capsys
):
  run_directory.write_run(tmp_path, {'num_steps': 90})
  write_metrics(tmp_path, 1, 2)
  progress = processes.Progress(*pretend(FINE))
  assert shown(progress, capsys) == []
  write_metrics(tmp_path, 3, 4)
  assert shown(progress, capsys) == [3, 4]
  # A restart takes back what came after the checkpoint.
  write_metrics(tmp_path, 1, 2, mode='w')
  assert shown(progress, capsys) == []
  write_metrics(tmp_path, 3)
  assert shown(progress, capsys) == [3]
  # A line that is being written, and then is there.
  write_metrics(tmp_path, 4, end='')
  assert shown(progress, capsys) == []
  metrics = pathlib.Path(run_directory.metrics_path(tmp_path, 0))
  metrics.write_bytes(metrics.read_bytes() + b'\nnonsense\n')
  assert shown(progress, capsys) == [4]


def test_progress_waits_for_the_facts_of_the_run(pretend, tmp_path, capsys):
  """Metrics may come first, when a disk fails now and then."""
  progress = processes.Progress(*pretend(FINE))
  write_metrics(tmp_path, 3)
  assert shown(progress, capsys) == []
  run_directory.run_path(tmp_path).write_text('{"num_st')
  assert shown(progress, capsys) == []
  run_directory.write_run(tmp_path, {'num_steps': 90})
  assert shown(progress, capsys) == [3]


def test_what_a_group_warns_of_at_its_start_is_shown_once(
    pretend, tmp_path, capsys
):
  (group,) = pretend(FINE)
  progress = processes.Progress(group)
  run_directory.write_run(tmp_path, {'num_steps': 90})
  write_metrics(tmp_path, 3)
  group.log.write_text('x\nwarning: eval_every = 500\nstep 3\n')
  for step in (4, 5):
    progress.update()
    write_metrics(tmp_path, step)
  said = capsys.readouterr().err.splitlines()
  assert said[0] == 'warning: eval_every = 500'
  assert sum('warning' in line for line in said) == 1


# --- Commands ----------------------------------------------------------------


def test_a_call_gives_status_and_output():
  code = 'import sys; print("out"); print("err", file=sys.stderr); sys.exit(3)'
  done = processes.call([sys.executable, '-c', code], Stop(), capture=True)
  assert (done.returncode, done.stdout, done.stderr) == (3, 'out\n', 'err\n')


@pytest.mark.parametrize('capture', [False, True])
@pytest.mark.parametrize('script', [PATIENT, DEAF], ids=['patient', 'deaf'])
def test_a_stop_ends_a_call(tmp_path, monkeypatch, script, capture):
  monkeypatch.setenv('GROUP', '0')
  begun = tmp_path / 'begun0'
  with pytest.raises(cli.Stopped) as e:
    processes.call(
        [sys.executable, '-c', script, str(tmp_path)],
        Stop(lambda: lines_of(begun)),
        capture=capture,
        patience=PATIENCE if script == PATIENT else 0.5,
    )
  assert e.value.exit_status == 143
  assert not is_running(int(begun.read_text()))


# --- Devices -----------------------------------------------------------------


def test_whole_gpus_are_shared_out():
  environments, replicas = processes.share_gpus(list('01234567'), 3)
  assert replicas == 2
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == [
      '0,1',
      '2,3',
      '4,5',
  ]


def test_several_groups_share_a_gpu_and_its_memory():
  environments, replicas = processes.share_gpus(['3', '5'], 3)
  assert replicas == 1
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == ['3', '5', '3']
  fractions = [float(e['XLA_PYTHON_CLIENT_MEM_FRACTION']) for e in environments]
  assert sum(fractions[::2]) <= 0.9 + 1e-9


def test_gpus_keep_the_names_that_the_user_gave_them(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-abc')
  assert processes.visible_gpus(2) == ['4', 'GPU-abc']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert processes.visible_gpus(2) == ['0', '1']


def pretend_python(monkeypatch, tmp_path, script):
  """Another program is started in place of Python."""
  path = tmp_path / 'python'
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(path))
  monkeypatch.setattr(processes, 'may_have_accelerator', lambda: True)


def test_a_stop_ends_the_look_at_the_devices(monkeypatch, tmp_path):
  """It may hang: on a driver, or waiting for an accelerator."""
  pretend_python(monkeypatch, tmp_path, 'exec sleep 1000')
  start = time.monotonic()
  with pytest.raises(cli.Stopped):
    processes.share_devices(2, 2, Stop(lambda: time.monotonic() > start + 0.3))
  assert time.monotonic() - start < 500


def test_devices_are_known_by_the_last_line(monkeypatch, tmp_path):
  pretend_python(monkeypatch, tmp_path, 'echo Welcome to jax; echo gpu 4')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  environments, replicas = processes.share_devices(2, 1, Stop())
  assert replicas == 2
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == ['0,1', '2,3']


@pytest.mark.parametrize(
    'script, reason',
    [
        ('echo first >&2; echo no driver >&2; exit 3', 'no driver'),
        ('exit 3', 'it said nothing'),
    ],
)
def test_a_jax_that_does_not_start_is_one_line(
    monkeypatch, tmp_path, script, reason
):
  pretend_python(monkeypatch, tmp_path, script)
  with pytest.raises(OSError) as e:
    processes.share_devices(2, 1, Stop())
  assert str(e.value) == f'jax does not start here: {reason}'


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='variables of glibc'
)
def test_groups_on_cpu_keep_the_memory_of_a_step(monkeypatch):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  code = """
import resource, threading
faults = []
def steps():
  for _ in range(3):
    bytearray(b'x') * (1 << 27)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=steps)
thread.start()
thread.join()
print(faults[2] - faults[1])
"""
  environment = os.environ | processes.large_pages()
  done = subprocess.run(
      [sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE
  )
  assert int(done.stdout) < 20
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=1')
  assert processes.large_pages() == {}


def test_jax_is_asked_only_where_there_may_be_an_accelerator(
    monkeypatch, tmp_path
):
  driver = tmp_path / 'nvidia0'
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setattr(processes, '_DEVICE_FILES', [f'{tmp_path}/nvidia*'])
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  assert not processes.may_have_accelerator()
  monkeypatch.setattr(processes, 'call', None)  # It would fail.
  environments, replicas = processes.share_devices(2, 3, Stop())
  assert (len(environments), replicas) == (2, 3)
  driver.touch()
  assert processes.may_have_accelerator()
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not processes.may_have_accelerator()
  monkeypatch.delenv('JAX_PLATFORMS')
  driver.unlink()
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert processes.may_have_accelerator()
