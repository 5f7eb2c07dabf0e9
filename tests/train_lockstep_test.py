"""train_lockstep: a killed or stopped run ends with the same bits."""

import shutil
import signal

import paced
import pytest
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints


def train(launch, workdir, gin_file, **flags):
  return launch(
      'train_lockstep',
      workdir=workdir,
      num_groups=2,
      gin_file=gin_file,
      **flags,
  )


def assert_same_end(workdir, reference):
  for group_id in (0, 1):
    step, found = tiny_run.saved_arrays(workdir, group_id)
    assert step == tiny_run.NUM_STEPS
    tiny_run.assert_same_bits(
        found, tiny_run.saved_arrays(reference, group_id)[1]
    )
    assert run_directory.done_path(workdir, group_id).exists()
    records = tiny_run.records(workdir, group_id)
    steps = [r['step'] for r in records if 'loss/task' in r]
    assert steps == list(range(5, tiny_run.NUM_STEPS + 1, 5))


def test_a_stop_saves_all_groups_at_one_step(
    launch, reference, tmp_path, monkeypatch
):
  gin_file, never_stopped = reference
  workdir = tmp_path / 'run'
  monkeypatch.setenv(paced.VARIABLE, str(tmp_path / 'pace'))
  paced.write(tmp_path / 'pace', limit=22)  # It cannot reach its end.
  process = train(launch, workdir, gin_file)
  saved = run_directory.checkpoints_dir(workdir, 0)
  until(lambda: checkpoints.completed_steps(saved), process=process)
  process.send(signal.SIGUSR2)
  assert 'stopped and saved at step' in process.wait(140)
  steps = [
      checkpoints.completed_steps(run_directory.checkpoints_dir(workdir, g))
      for g in (0, 1)
  ]
  assert steps[0] == steps[1] and steps[0]
  paced.write(tmp_path / 'pace')
  train(launch, workdir, gin_file).wait()
  assert_same_end(workdir, never_stopped)


@pytest.mark.parametrize('lost', [[50], [20, 40, 50]])
def test_groups_that_were_killed_apart_go_back_to_one_step(
    launch, reference, tmp_path, lost
):
  """Group 0 has reached its end; checkpoints of group 1 are torn."""
  gin_file, never_killed = reference
  workdir = tmp_path / 'run'
  shutil.copytree(never_killed, workdir)
  run_directory.done_path(workdir, 1).unlink()
  for step in lost:
    torn = run_directory.checkpoints_dir(workdir, 1) / str(step)
    (torn / 'commit_success.txt').unlink()
  train(launch, workdir, gin_file).wait()
  assert_same_end(workdir, never_killed)


def test_groups_without_a_common_checkpoint_lose_none(
    launch, reference, tmp_path
):
  """To begin again from step 0 would delete them all."""
  gin_file, finished = reference
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  for group_id, lost in ((0, (20,)), (1, (40, 50))):
    for step in lost:
      shutil.rmtree(
          run_directory.checkpoints_dir(workdir, group_id) / str(step)
      )
  before = tiny_run.snapshot(workdir)
  output = train(launch, workdir, gin_file).wait(1)
  assert 'no step in common' in output.splitlines()[-1]
  assert tiny_run.snapshot(workdir) == before


def test_a_finished_run_is_left_alone(launch, reference):
  gin_file, workdir = reference
  before = tiny_run.snapshot(workdir)
  assert 'all groups have reached' in train(launch, workdir, gin_file).wait()
  assert tiny_run.snapshot(workdir) == before


def test_a_mistake_is_one_line(launch, reference):
  gin_file, workdir = reference
  before = tiny_run.snapshot(workdir)
  common = [f'--workdir={workdir}', f'--gin_file={gin_file}']
  results = launch.cases(
      'train_lockstep',
      {
          'other_groups': [*common, '--num_groups=3'],
          'word': [*common, 'seed=3'],
      },
  )
  for name, word in [
      ('other_groups', 'num_groups=2'),
      ('word', "unexpected argument 'seed=3'"),
  ]:
    status, output = results[name]
    assert status == 1 and len(output.splitlines()) == 1
    assert word in output
  assert tiny_run.snapshot(workdir) == before
