"""Binaries leave soon after a signal, in every phase, and say what is lost.

Each process is signalled while its main thread is inside C code for long.
"""

import re
import shutil
import signal

import pytest
import stuck
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints
from experiments import cli


@pytest.fixture(scope='module')
def gin_file(reference):
  """The tiny run with a model that can get stuck."""
  text = reference[0].read_text()
  lines = [line for line in text.splitlines() if 'lstm' not in line]
  lines.insert(1, 'import stuck')
  lines.append('experiment.Experiment.model = @stuck.language_model')
  path = reference[0].with_name('stuck.gin')
  path.write_text('\n'.join(lines) + '\n')
  return path


class Run:
  """A run directory, and the command that goes on in it."""

  def __init__(self, launch, binary, gin_file, workdir, patch, **flags):
    self.workdir = workdir
    self._mark = workdir.with_suffix('.mark')
    self._command = lambda **more: launch(
        binary,
        workdir=workdir,
        gin_file=gin_file,
        num_groups=2,
        **flags,
        **more,
    )
    self._patch = patch

  def start_stuck(self, where, grace=0.5):
    """Starts it; later, `stop` waits until the main thread is held there."""
    self._patch.setenv(stuck.MARK, str(self._mark))
    self._patch.setenv(stuck.WHERE, where)
    self._ahead = where.startswith('ahead')
    self._process = self._command(grace_seconds=grace)
    self._patch.delenv(stuck.WHERE)

  def stop(self, status, number=signal.SIGTERM, again=False):
    """Signals it; returns its last line. Fails if it ends otherwise."""
    until(self._is_stuck, process=self._process)
    self._process.send(number)
    if again:
      until(lambda: self._process.send(number) or self._process.ended)
    output = self._process.wait(status)
    assert 'Traceback' not in output
    assert run_directory.read_status(self.workdir, 0)['phase'] == 'stopped'
    return output.splitlines()[-1] if output else ''

  def _is_stuck(self):
    if not self._ahead:
      return self._mark.exists()
    known = run_directory.read_status(self.workdir, 0) or {}
    waits = known.get('phase') == 'compiling' and known['teachers']
    return waits and self._mark.exists()

  def saved(self, group_id=0):
    return checkpoints.completed_steps(
        run_directory.checkpoints_dir(self.workdir, group_id)
    )

  def go_on(self):
    """Starts the same command again."""
    self._process = self._command()

  def assert_ends_as(self, reference, groups=(0,)):
    self._process.wait()
    for group_id in groups:
      tiny_run.assert_same_bits(
          *(
              tiny_run.saved_arrays(w, group_id, tiny_run.NUM_STEPS)[1]
              for w in (self.workdir, reference)
          )
      )


@pytest.fixture
def make_run(launch, gin_file, tmp_path, reference, monkeypatch):
  def make(binary, name='run', **flags):
    workdir = tmp_path / name
    # Beside all publications of the other group, group 0 waits for nobody.
    if binary == 'train_group':
      theirs = run_directory.publications_dir(reference[1], 1)
      shutil.copytree(theirs, run_directory.publications_dir(workdir, 1))
    return Run(launch, binary, gin_file, workdir, monkeypatch, **flags)

  return make


def test_a_group_that_compiles_leaves_and_goes_on_from_its_checkpoint(
    make_run, reference
):
  """In the first program, and where it waits for the second one."""
  first, second = (
      make_run('train_group', name, group_id=0) for name in ('first', 'second')
  )
  first.start_stuck('train-2', grace=1000.0)
  second.start_stuck('ahead-1')

  assert first.stop(130, signal.SIGINT) == cli.STOPPED
  assert first.saved() == []
  line = second.stop(cli.MAY_PASS)
  assert re.search('updates after step 0 of .*/group_0 may be lost', line)

  second.go_on()
  second.assert_ends_as(reference[1])


def test_groups_of_one_process_leave_together(make_run, reference):
  run = make_run('train_lockstep')
  run.start_stuck('ahead-1')
  line = run.stop(cli.MAY_PASS)
  assert re.search('step 0 of .*/group_0, 0 of .*/group_1 may be lost', line)
  run.go_on()
  run.assert_ends_as(reference[1], (0, 1))


def test_another_signal_leaves_at_once(make_run):
  run = make_run('train_group', group_id=0)
  run.start_stuck('ahead-1', grace=1000.0)
  run.stop(cli.MAY_PASS, again=True)
  assert run.saved() == []
