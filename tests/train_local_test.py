"""train_local: watches, restarts, gives up, and leaves no process behind."""

import os
import pathlib
import signal
import sys
import time

import pytest
import tiny_run
from absl import flags

from codistill_jax import run_directory, storage
from experiments import cli

_before = set(flags.FLAGS)
from experiments import train_local  # noqa: E402

# Other binaries of this test process define the same flags.
for _name in set(flags.FLAGS) - _before:
  delattr(flags.FLAGS, _name)


@pytest.fixture
def launch(tmp_path_factory):
  with tiny_run.launcher(tmp_path_factory) as launch:
    yield launch


# --- Watching, with processes that only pretend to train ---------------------


@pytest.fixture
def pretend(tmp_path, monkeypatch):
  """Makes groups whose process is a few lines of Python."""
  # It makes `subprocess` fork, which jax warns of once it has threads; in
  # train_local itself it has none.
  monkeypatch.setattr(train_local, '_die_with_parent', None)
  made = []

  def make(*scripts):
    for group_id, script in enumerate(scripts):
      made.append(
          train_local.Group(
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
    self._deadline = time.monotonic() + 60

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
time.sleep(0.5)
print('saved after', len(asked), flush=True)
sys.exit(143)
"""


def test_all_groups_run_to_their_end(pretend):
  groups = pretend(FINE, 'import os; print("I am", os.environ["GROUP"])')
  train_local.watch(groups, Stop(), max_restarts=0)
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
  train_local.watch(groups, Stop(), max_restarts=1)
  assert groups[0].done
  assert (
      'group 0 died (signal 9); starting it again in 1 s from step 0'
      in capsys.readouterr().err
  )


def test_a_run_that_goes_nowhere_is_given_up(pretend):
  groups = pretend('import sys; print("deep trouble"); sys.exit(70)')
  with pytest.raises(ValueError) as e:
    train_local.watch(groups, Stop(), max_restarts=1)
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
  train_local.watch(groups, Stop(), max_restarts=1)
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
    train_local.watch(groups, Stop(), max_restarts=5)
  assert str(e.value) == 'group 0: error: num_steps=0; set it to at least 1'
  train_local.end_all(groups)  # As main does, whatever happened.
  assert not any(group.running for group in groups)
  assert 'saved after 1' in log_of(groups[1])


def test_a_stop_asks_each_group_once_and_waits(pretend, tmp_path):
  """A second signal would kill a group that is still saving."""
  groups = pretend(PATIENT, PATIENT)
  begun = lambda: all((tmp_path / f'begun{g}').exists() for g in (0, 1))
  start = time.monotonic()
  with pytest.raises(cli.Stopped) as e:
    train_local.watch(groups, Stop(begun), max_restarts=5)
  train_local.end_all(groups)
  assert e.value.exit_status == 143
  assert [log_of(g) for g in groups] == ['saved after 1\n'] * 2
  assert not any(group.running for group in groups)
  assert time.monotonic() - start < 30


def test_a_group_that_does_not_leave_is_killed(pretend, tmp_path, monkeypatch):
  monkeypatch.setattr(train_local, '_GRACE_SECONDS', 0.3)
  deaf = PATIENT.replace('while not asked', 'while True')
  groups = pretend(deaf)
  with pytest.raises(cli.Stopped):
    train_local.watch(
        groups, Stop(lambda: (tmp_path / 'begun0').exists()), max_restarts=5
    )
  assert not groups[0].running


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux can tell')
def test_no_group_outlives_its_supervisor(tmp_path):
  supervisor = f"""
import sys, time
from experiments import train_local
group = train_local.Group(
    {str(tmp_path)!r},
    0,
    [sys.executable, '-c', {PATIENT!r}, {str(tmp_path)!r}],
    {{'GROUP': '0'}},
)
group.poll(0)
time.sleep(60)
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
  tiny_run.until(lambda: not is_running(int(begun.read_text())), timeout=30)


def is_running(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return False
  return state.split()[0] != 'Z'  # Nobody may be there to bury it.


# --- Sharing devices ---------------------------------------------------------


def test_whole_gpus_are_shared_out():
  environments, replicas = train_local.share_gpus(list('01234567'), 3)
  assert replicas == 2
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == [
      '0,1',
      '2,3',
      '4,5',
  ]


def test_several_groups_share_a_gpu_and_its_memory():
  environments, replicas = train_local.share_gpus(['3', '5'], 3)
  assert replicas == 1
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == ['3', '5', '3']
  fractions = [float(e['XLA_PYTHON_CLIENT_MEM_FRACTION']) for e in environments]
  assert sum(fractions[::2]) <= 0.9 + 1e-9


def test_gpus_keep_the_names_that_the_user_gave_them(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-abc')
  assert train_local.visible_gpus(2) == ['4', 'GPU-abc']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert train_local.visible_gpus(2) == ['0', '1']


# --- The whole ---------------------------------------------------------------


def test_stopped_killed_and_gone_on_it_ends_with_the_same_bits(
    launch, tmp_path_factory
):
  """Stop it; start it again; kill a group; then results and report are there.

  The end state is that of a run in one process that nobody disturbed.
  """
  gin_file, undisturbed = tiny_run.reference(tmp_path_factory)
  workdir = tmp_path_factory.mktemp('local') / 'run'

  def start(*args):
    return launch(
        'train_local',
        *args,
        workdir=workdir,
        num_groups=2,
        cpu_replicas=4,
        gin_file=gin_file,
    )

  def status(group_id):
    return run_directory.read_status(workdir, group_id) or {}

  # Stopped while both compile: they finish a step, save it and leave.
  process = start()
  tiny_run.until(lambda: status(0) and status(1), process=process)
  process.send(signal.SIGTERM)
  output = process.wait(143)
  assert 'stopped; the same command goes on from here' in output
  assert tiny_run.processes_of(workdir) == []
  for group_id in (0, 1):
    directory = run_directory.checkpoints_dir(workdir, group_id)
    assert storage.completed_steps(directory)
    log = run_directory.group_dir(workdir, group_id) / 'log.txt'
    assert 'stopped and saved at step' in log.read_text()
    assert not run_directory.done_path(workdir, group_id).exists()

  before = status(1)['pid']
  process = start()
  tiny_run.until(lambda: status(1)['pid'] != before, process=process)
  os.kill(status(1)['pid'], signal.SIGKILL)
  output = process.wait()
  assert 'group 1 died (signal 9); starting it again' in output
  for group_id in (0, 1):
    step, arrays = tiny_run.saved_arrays(workdir, group_id)
    assert step == tiny_run.NUM_STEPS
    tiny_run.assert_same_bits(
        arrays, tiny_run.saved_arrays(undisturbed, group_id)[1]
    )

  assert 'report' in output and 'Traceback' not in output
  report = run_directory.report_dir(workdir)
  for name in ('report.html', 'report.md', 'comparison.json'):
    assert (report / name).exists()
  assert list(report.glob('*.png'))
  assert tiny_run.processes_of(workdir) == []


def test_a_mistake_of_the_configuration_is_one_line(launch, tmp_path):
  process = launch(
      'train_local',
      workdir=tmp_path / 'run',
      num_groups=2,
      gin_file=tmp_path / 'nowhere.gin',
  )
  output = process.wait(1)
  assert 'no such file' in output.splitlines()[-1]
  assert output.splitlines()[-1].startswith('error: group ')
  assert 'Traceback' not in output
