"""Trains all seeds of an arm as one program, and writes their run directories.

For accelerators; see `population`. What is trained so far is lost if it is
stopped: it begins again.
"""

import time
from collections.abc import Sequence
from typing import Any

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory, writers
from codistill_jax.base import Model
from codistill_jax.exchange import Checkpoints, fixed_teachers
from codistill_jax.storage import files
from experiments import claims, cli, devices, driver
from experiments.job import Job
from experiments.stopping import StopRequest
from experiments.studies import plan as plan_lib
from experiments.studies import population, training
from experiments.studies.configurations import Configurations
from experiments.studies.plan import PlannedRun
from experiments.studies.progress import Progress


def possible(configurations: Configurations, run: PlannedRun) -> bool:
  """Whether the seeds of the run's arm can be one program.

  Not if each seed has teachers of its own, nor if groups differ in how many
  peers they have.
  """
  arm = configurations.plan.arm(run.arm)
  experiment = configurations.configure(run)
  peers = {
      experiment.exchange.num_teachers(g, arm.num_groups)
      for g in range(arm.num_groups)
  }
  return isinstance(experiment.exchange, Checkpoints) and len(peers) == 1


def train(
    configurations: Configurations,
    runs: Sequence[PlannedRun],
    stop: StopRequest,
    replicas: int,
    progress: Progress,
) -> list[dict[str, Any]]:
  """Trains runs that differ in their seeds alone; their outcomes.

  Raises:
    Stopped: If asked to stop; nothing is kept.
  """
  plan = configurations.plan
  arm = plan.arm(runs[0].arm)
  began = time.time()
  first = PlannedRun(arm.name, 0, None, False)
  experiment = configurations.configure(first)
  model = gin_utils.call(experiment_lib.make_model, experiment)
  records = _Records(configurations, runs, progress, experiment.num_steps)
  outcome = population.train_population(
      experiment,
      model,
      [run.seed for run in runs],
      arm.num_groups,
      records,
      stop,
      ensembles=training.is_in_ensemble(plan, arm),
      devices=devices.chosen_devices(replicas),
  )
  records.close()
  if outcome.stopped:
    raise cli.Stopped(
        f'stopped in {runs[0].arm}, whose seeds are one program; the same'
        ' command begins that again',
        stop.signal_number,
    )
  gin_utils.check_no_dead_bindings()
  return [
      _finish(configurations, run, model, outcome, began, len(runs))
      for run in runs
  ]


def _finish(
    configurations: Configurations,
    run: PlannedRun,
    model: Model,
    outcome: population.Outcome,
    began: float,
    together: int,
) -> dict[str, Any]:
  """Writes what a run directory says of itself; its outcome."""
  arm = configurations.plan.arm(run.arm)
  experiment = configurations.configure(run)
  directory = plan_lib.run_dir(configurations.workdir, run)
  job = Job(
      experiment=experiment,
      model=model,
      train_step=experiment_lib.make_replicated_step(
          experiment, model, devices.chosen_devices(1)
      ),
      workdir=str(directory),
      group_id=0,
      num_groups=arm.num_groups,
      arm=arm.name,
  )
  start = driver.new_state(job)
  start.efficiency.close()
  run_directory.write_run(str(directory), claims.describe_run(job, start.state))
  files.write_bytes(
      run_directory.config_path(directory),
      gin_utils.operative_configuration().encode(),
  )
  members = [(run.seed, g) for g in range(arm.num_groups)]
  for seed, group_id in members:
    # Others may be taught by it.
    fixed_teachers.leave(
        directory,
        group_id,
        outcome.step,
        outcome.variables[seed, group_id],
        job.identity,
    )
  at = [outcome.diverged_at[m] for m in members if m in outcome.diverged_at]
  return training.describe(
      run,
      arm,
      experiment,
      directory,
      rate=configurations.rate(run),
      examples=start.examples,
      diverged_at=min(at, default=None),
      began=began,
      together=together,
  )


class _Records:
  """Writes the records of all groups of all seeds where each belongs."""

  def __init__(
      self,
      configurations: Configurations,
      runs: Sequence[PlannedRun],
      progress: Progress,
      num_steps: int,
  ):
    self._directories = {
        run.seed: plan_lib.run_dir(configurations.workdir, run) for run in runs
    }
    self._progress = progress
    self._num_steps = num_steps
    self._writers: dict[tuple[int, int], writers.Writer] = {}

  def __call__(
      self, seed: int, group_id: int, step: int, metrics: dict[str, float]
  ) -> None:
    member = seed, group_id
    if member not in self._writers:
      path = self._path(seed, group_id)
      path.parent.mkdir(parents=True, exist_ok=True)
      self._writers[member] = writers.JsonlWriter(path, resume_step=0)
    self._writers[member].write(step, metrics)
    self._progress.say(f'step {step:,} of {self._num_steps:,}, all seeds')

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()

  def _path(self, seed: int, group_id: int):
    directory = self._directories[seed]
    if group_id == population.ENSEMBLE:
      return plan_lib.ensemble_path(directory)
    return run_directory.metrics_path(directory, group_id)
