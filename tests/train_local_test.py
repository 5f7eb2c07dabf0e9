"""train_local as a whole."""

import errno
import os
import pathlib
import signal
import sys

import paced
import pytest
import run_cases
import tiny_run
from etils import epath
from waits import until

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints
from experiments import train_local

_LONG_EVALUATION = """
import sys, time
if 'experiments.evaluate' in sys.orig_argv:
  time.sleep(1000)
"""


def test_stopped_killed_and_gone_on_it_ends_with_the_same_bits(
    launch, tmp_path_factory, monkeypatch
):
  """Stop it; start it again; kill a group; then results and report are there.

  The end state is that of a run in one process that nobody disturbed.
  """
  gin_file, undisturbed = tiny_run.reference(tmp_path_factory)
  workdir = tmp_path_factory.mktemp('local') / 'run'
  pace = workdir.with_name('pace')
  monkeypatch.setenv(paced.VARIABLE, str(pace))

  def start(*args):
    return launch(
        'train_local',
        *args,
        workdir=workdir,
        num_groups=2,
        cpu_replicas=4,
        gin_file=gin_file,
        profile_steps='28:30',
    )

  def status(group_id):
    return run_directory.read_status(workdir, group_id) or {}

  paced.write(pace, limit=25)  # It cannot reach its end.
  # Stopped while both compile: each leaves, with what it has or with nothing.
  process = start()
  until(lambda: status(0) and status(1), process=process)
  process.send(signal.SIGUSR1)
  output = process.wait(138)
  assert 'stopped; the same command goes on from here' in output
  assert tiny_run.processes_of(workdir) == []
  for group_id in (0, 1):
    log = (run_directory.group_dir(workdir, group_id) / 'log.txt').read_text()
    directory = run_directory.checkpoints_dir(workdir, group_id)
    if checkpoints.completed_steps(directory):
      assert 'stopped and saved at step' in log
    else:
      assert 'stopped; the same command goes on' in log
    assert not run_directory.done_path(workdir, group_id).exists()

  before = status(1)['pid']
  process = start()
  until(lambda: status(1)['pid'] != before, process=process)
  os.kill(status(1)['pid'], signal.SIGKILL)
  paced.write(pace)
  output = process.wait()
  assert 'group 1 died (signal 9); starting it again' in output
  for group_id in (0, 1):
    step, arrays = tiny_run.saved_arrays(workdir, group_id)
    assert step == tiny_run.NUM_STEPS
    traces = pathlib.Path(run_directory.profile_dir(workdir, group_id))
    assert len(list(traces.rglob('*.xplane.pb'))) == 1
    tiny_run.assert_same_bits(
        arrays, tiny_run.saved_arrays(undisturbed, group_id)[1]
    )

  assert 'report' in output and 'Traceback' not in output
  report = run_directory.report_dir(workdir)
  for name in ('report.html', 'report.md', 'comparison.json'):
    assert (report / name).exists()
  assert list(report.glob('*.png'))
  assert tiny_run.processes_of(workdir) == []

  # Again, and stopped while it evaluates what is trained already: for long.
  (workdir.parent / 'sitecustomize.py').write_text(_LONG_EVALUATION)
  launch.python_path.append(str(workdir.parent))
  process = start()
  until(lambda: 'all groups are done' in process.output, process=process)
  until(lambda: tiny_run.processes_of(workdir)[1:], process=process)
  process.send(signal.SIGINT)
  output = process.wait(130)
  assert output.splitlines()[-1] == (
      'stopped; the same command goes on from here'
  )
  assert 'Traceback' not in output
  assert tiny_run.processes_of(workdir) == []


@pytest.mark.parametrize(
    'workdir, missing, words',
    [
        ('{file}/run', None, ['cannot be written', 'Not a directory']),
        ('{tmp}/' + 300 * 'n', None, ['cannot be written', 'too long']),
        ('/proc/none/run', None, ['cannot be written']),
        ('{tmp}/run', errno.EROFS, ['cannot be written', 'Read-only']),
        ('{tmp}/run', errno.EACCES, ['cannot be written', 'Permission']),
        ('{tmp}/run', 'pandas', ['pandas is missing', '[report]']),
    ],
)
def test_what_cannot_work_is_said_before_a_group_is_started(
    tmp_path, monkeypatch, workdir, missing, words
):
  (tmp_path / 'file').touch()
  workdir = workdir.format(file=tmp_path / 'file', tmp=tmp_path)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(train_local.processes, 'supervise', None)
  if isinstance(missing, str):
    monkeypatch.setitem(sys.modules, missing, None)
  elif missing:

    def refuse(*unused, **unused_by_name):
      raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(type(epath.Path()), 'mkdir', refuse)
  status, output = run_cases.run(train_local, [f'--workdir={workdir}'])
  assert status == 1
  (line,) = output.splitlines()
  assert all(word in line for word in words)


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
