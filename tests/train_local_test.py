"""train_local as a whole, and how it shares out devices."""

import os
import signal
import sys
import time

import pytest
import tiny_run
from absl import flags

from codistill_jax import run_directory
from codistill_jax.storage import trees
from experiments import cli, processes

_before = set(flags.FLAGS)
from experiments import train_local  # noqa: E402

# Other binaries of this test process define the same flags.
for _name in set(flags.FLAGS) - _before:
  delattr(flags.FLAGS, _name)


@pytest.fixture
def launch(tmp_path_factory):
  with tiny_run.launcher(tmp_path_factory) as launch:
    yield launch


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


class Stop:
  """Asked to stop after a while; None: never."""

  signal_number = signal.SIGINT

  def __init__(self, seconds=None):
    self._at = None if seconds is None else time.monotonic() + seconds

  def __call__(self):
    return self._at is not None and time.monotonic() > self._at


def pretend_python(monkeypatch, tmp_path, script):
  """Another program is started in place of Python."""
  path = tmp_path / 'python'
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(path))
  # Tests have a jax with threads, which warns when it is forked.
  monkeypatch.setattr(processes, '_die_with_parent', None)


def test_a_stop_ends_the_look_at_the_devices(monkeypatch, tmp_path):
  """It may hang: on a driver, or waiting for an accelerator."""
  pretend_python(monkeypatch, tmp_path, 'exec sleep 60')
  start = time.monotonic()
  with pytest.raises(cli.Stopped) as e:
    train_local.share_devices(2, 2, Stop(0.3))
  assert e.value.exit_status == 130
  assert time.monotonic() - start < 10


def test_devices_are_known_by_the_last_line(monkeypatch, tmp_path):
  pretend_python(monkeypatch, tmp_path, 'echo Welcome to jax; echo gpu 4')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  environments, replicas = train_local.share_devices(2, 1, Stop())
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
    train_local.share_devices(2, 1, Stop())
  assert str(e.value) == f'jax does not start here: {reason}'


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

  # Stopped while both compile: each leaves, with what it has or with nothing.
  process = start()
  tiny_run.until(lambda: status(0) and status(1), process=process)
  process.send(signal.SIGTERM)
  output = process.wait(143)
  assert 'stopped; the same command goes on from here' in output
  assert tiny_run.processes_of(workdir) == []
  for group_id in (0, 1):
    log = (run_directory.group_dir(workdir, group_id) / 'log.txt').read_text()
    directory = run_directory.checkpoints_dir(workdir, group_id)
    if trees.completed_steps(directory):
      assert 'stopped and saved at step' in log
    else:
      assert 'stopped before training began' in log
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

  # Again, and stopped while it evaluates what is trained already.
  process = start()
  tiny_run.until(
      lambda: 'all groups are done' in process.output, process=process
  )
  tiny_run.until(lambda: tiny_run.processes_of(workdir)[1:], process=process)
  begin = time.monotonic()
  process.send(signal.SIGINT)
  output = process.wait(130, timeout=30)
  assert time.monotonic() - begin < 10
  assert output.splitlines()[-1] == (
      'stopped; the same command goes on from here'
  )
  assert 'Traceback' not in output
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
