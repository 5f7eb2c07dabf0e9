"""Binaries leave within seconds of a signal, in every phase, and lose nothing.

Each process is signalled while its main thread is inside C code for long.
"""

import pathlib
import shutil
import signal

import pytest
import stuck
import tiny_run

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  return tiny_run.reference(tmp_path_factory)


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


@pytest.fixture
def launch(tmp_path_factory):
  with tiny_run.launcher(tmp_path_factory) as launch:
    yield launch


class Run:
  """A run directory, and the command that goes on in it."""

  def __init__(self, launch, binary, gin_file, workdir, patch, **flags):
    self.workdir = workdir
    self._mark = workdir.with_suffix('.mark')
    self._command = lambda: launch(
        binary, workdir=workdir, gin_file=gin_file, num_groups=2, **flags
    )
    self._patch = patch

  def start_stuck(self, where, limit=0.5):
    """Starts it; later, `stop` waits until it is stuck there."""
    self._patch.setenv(stuck.LIMIT, str(limit))
    self._patch.setenv(stuck.MARK, str(self._mark))
    self._patch.setenv(stuck.WHERE, where)
    self._process = self._command()
    self._patch.delenv(stuck.WHERE)

  def stop(self, number=signal.SIGTERM, twice=False):
    """Signals it; its last line. Fails if it is slow, or ends otherwise."""
    tiny_run.until(self._mark.exists, process=self._process)
    self._process.send(number)
    if twice:
      tiny_run.until(lambda: not self._pending(), process=self._process)
      self._process.send(number)
    output = self._process.wait(128 + number)
    assert 'Traceback' not in output
    return output.splitlines()[-1] if output else ''

  def _pending(self):
    """Signals that it has not yet been given (Linux)."""
    status = pathlib.Path(f'/proc/{self._process.pid}/status').read_text()
    masks = [x.split()[1] for x in status.splitlines() if 'Pnd:' in x]
    return any(int(mask, 16) for mask in masks)

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


def test_a_group_that_compiles_leaves_and_loses_no_update(make_run, reference):
  """In the first trace, the second one, and that of the evaluation."""
  first, second, evaluating = (
      make_run('train_group', name, group_id=0)
      for name in ('first', 'second', 'evaluating')
  )
  first.start_stuck('train-1')
  second.start_stuck('train-2')
  # The teacher of the second trace is applied in eval mode before, twice.
  evaluating.start_stuck('eval-3')

  line = first.stop(signal.SIGINT)
  assert (
      line == 'stopped before training began; the same command starts it again'
  )
  assert first.saved() == []
  line = second.stop()
  assert 'group 0 stopped and saved at step 10' in line
  assert second.saved() == [10]
  line = evaluating.stop()
  assert 'group 0 stopped and saved at step 25' in line
  assert evaluating.saved()[-1] == 25

  for run in (second, evaluating):
    run.go_on()
  for run in (second, evaluating):
    run.assert_ends_as(reference[1])


def test_groups_of_one_process_are_saved_at_one_step(make_run, reference):
  run = make_run('train_lockstep')
  run.start_stuck('train-2')
  line = run.stop()
  assert 'group 1 stopped and saved at step 10' in line
  assert run.saved(0) == run.saved(1) == [10]
  run.go_on()
  run.assert_ends_as(reference[1], (0, 1))


def test_a_second_signal_leaves_at_once_and_saves_nothing(make_run):
  run = make_run('train_group', group_id=0)
  run.start_stuck('train-2', limit=1000.0)
  run.stop(twice=True)
  assert run.saved() == []
