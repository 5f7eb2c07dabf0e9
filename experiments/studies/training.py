"""Trains one run of a study, a run directory as of any other training.

All groups of a run are stepped in turn through memory, in lockstep. What was
compiled for one seed serves all others.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from codistill_jax import (
    base,
    evaluate,
    gin_utils,
    run_directory,
    writers,
)
from codistill_jax import experiment as experiment_lib
from codistill_jax.base import Variables
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files
from experiments import driver, lockstep
from experiments.job import Job
from experiments.stopping import Rescue, StopRequest
from experiments.studies import plan as plan_lib
from experiments.studies.configurations import Configurations
from experiments.studies.declaration import Arm
from experiments.studies.plan import Plan, PlannedRun
from experiments.studies.progress import Progress

LAST = 3  # Evaluations that the loss at the end is the mean of.


class _Compiled(NamedTuple):
  """What runs that differ in their seeds alone have in common."""

  experiment: Experiment
  model: base.Model
  train_steps: Sequence[Any]
  shared_stream: base.Stream | None


class Trainer:
  """Trains runs, and keeps what it has compiled for the last of them."""

  def __init__(
      self, configurations: Configurations, replicas: int, stop: StopRequest
  ):
    self._configurations = configurations
    self._replicas = replicas
    self._stop = stop
    self._key: tuple | None = None
    self._compiled: _Compiled | None = None

  def __call__(self, run: PlannedRun, progress: Progress) -> dict[str, Any]:
    """Trains a run to its end; what outcome.json says of it.

    Raises:
      Stopped: If asked to stop; it goes on from there.
    """
    plan = self._configurations.plan
    arm = plan.arm(run.arm)
    experiment = self._configurations.configure(run)
    compiled = self._compile(run, experiment)
    # The same optimiser, model and step: nothing is compiled again.
    experiment = dataclasses.replace(
        experiment, optimizer=compiled.experiment.optimizer
    )
    directory = plan_lib.run_dir(self._configurations.workdir, run)
    latch = lockstep.Latch(self._stop)
    ensemble = ensemble_of(plan, arm, compiled.model, experiment, directory)
    jobs = [
        Job(
            experiment=experiment,
            model=compiled.model,
            train_step=compiled.train_steps[group_id],
            workdir=str(directory),
            group_id=group_id,
            num_groups=arm.num_groups,
            stop=latch,
            rescue=self._stop.rescue or Rescue(),
            arm=arm.name,
            shared_stream=compiled.shared_stream,
            evaluated=ensemble,
        )
        for group_id in range(arm.num_groups)
    ]
    lockstep.keep_common_checkpoints(jobs)
    start = driver.new_state(jobs[0])
    start.efficiency.close()
    exchanges = experiment.exchange.join_all(
        jobs[0], start.state.variables, start.examples
    )
    rounds = _Rounds(progress, experiment.num_steps)
    diverged_at, began = None, time.time()
    with contextlib.ExitStack() as stack:
      stack.callback(ensemble.close)
      groups = [
          stack.enter_context(
              contextlib.closing(
                  driver.train(job, _given(exchange), _writer_of(job))
              )
          )
          for job, exchange in zip(jobs, exchanges)
      ]
      try:
        lockstep.train_in_turn(
            [rounds.counted(i, group) for i, group in enumerate(groups)], latch
        )
      except FloatingPointError:
        diverged_at = rounds.failed_at
    return describe(
        run,
        arm,
        experiment,
        directory,
        rate=self._configurations.rate(run),
        examples=start.examples,
        diverged_at=diverged_at,
        began=began,
    )

  def _compile(self, run: PlannedRun, experiment: Experiment) -> _Compiled:
    """The step of a run, or that of the one before if only seeds differ."""
    # Under this configuration, even if it is thrown away: what makes no model
    # would have dead bindings.
    model = gin_utils.call(experiment_lib.make_model, experiment)
    key = run.arm, self._configurations.rate(run)
    # Groups of one program keep a state of their own in their step.
    if key != self._key or experiment.exchange.one_program:
      self._compiled = None  # One program at a time is enough of memory.
      arm = self._configurations.plan.arm(run.arm)
      steps, stream = lockstep.train_steps_of(
          experiment, model, arm.num_groups, self._replicas
      )
      self._compiled = _Compiled(experiment, model, steps, stream)
      self._key = key
    return self._compiled


def describe(
    run: PlannedRun,
    arm: Arm,
    experiment: Experiment,
    directory: files.PathLike,
    *,
    rate: float | None,
    examples: int,
    diverged_at: int | None,
    began: float,
    together: int = 1,
) -> dict[str, Any]:
  """What outcome.json says of a run that has just ended."""
  num_peers = [
      experiment.exchange.num_teachers(g, arm.num_groups)
      for g in range(arm.num_groups)
  ]
  return {
      'run': run._asdict(),
      'rate': rate,
      'seed': experiment.seed,
      'data_seed': experiment.data_seed,
      'num_steps': experiment.num_steps,
      'exchange_every': experiment.exchange.every,
      'burn_in_steps': next(
          filter(experiment.distill_weight, range(experiment.num_steps)),
          experiment.num_steps,
      ),
      'peers': float(np.mean(num_peers)),
      'outer_every': getattr(experiment.method, 'inner_steps', 1),
      'examples_per_step': examples * arm.num_groups,
      'diverged_at': diverged_at,
      'loss': last_loss(directory, arm.num_groups),
      'together': together,
      'began': began,
      'ended': time.time(),
      'jax': jax.__version__,
  }


def last_loss(directory: files.PathLike, num_groups: int) -> float:
  """Validation loss at the end: the mean over groups and last evaluations."""
  found = []
  for group_id in range(num_groups):
    path = run_directory.metrics_path(directory, group_id)
    if path.exists():
      records = run_directory.read_metrics(path).records
      _, losses = run_directory.series(records, 'eval/loss')
      found += losses[-LAST:]
  return float(np.mean(found)) if found else float('nan')


def _given(exchange: Any) -> Callable[[Variables], Any]:
  return lambda variables: exchange


def _writer_of(job: Job) -> Callable[[int], writers.Writer]:
  """JSON lines alone."""

  def make(start: int) -> writers.Writer:
    path = run_directory.metrics_path(job.workdir, job.group_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    return writers.JsonlWriter(path, resume_step=start, troubles=job.troubles)

  return make


class _Rounds:
  """How far the groups of a run are; and a sign of life now and then."""

  def __init__(self, progress: Progress, num_steps: int):
    self._progress = progress
    self._num_steps = num_steps
    self._steps: dict[int, int] = {}

  @property
  def failed_at(self) -> int:
    """The step of the group that did not get through it."""
    return min(self._steps.values(), default=0) + 1

  def counted(self, group_id: int, steps: Iterator[int]) -> Iterator[int]:
    self._steps[group_id] = 0
    for step in steps:
      self._steps[group_id] = step
      self._progress.say(f'step {step:,} of {self._num_steps:,}')
      yield step


class _Ensemble:
  """Evaluates the mean prediction of all groups whenever all are evaluated.

  The groups are stepped in turn, so what the first ones have given is intact
  when the last one comes.
  """

  def __init__(
      self,
      model: base.Model,
      experiment: Experiment,
      path: files.PathLike,
      num_groups: int,
  ):
    self._model = model
    self._experiment = experiment
    self._path = path
    self._num_groups = num_groups
    self._given: dict[int, Variables] = {}
    self._writer: writers.Writer | None = None

  def __call__(self, group_id: int, step: int, variables: Variables) -> None:
    self._given[group_id] = variables
    if len(self._given) < self._num_groups:
      return
    members = [self._given.pop(g) for g in range(self._num_groups)]
    task = self._experiment.task
    found = evaluate.compare(
        self._model, members, task.eval_batches(self._experiment.eval_batch)
    )
    if self._writer is None:
      self._writer = writers.JsonlWriter(self._path, resume_step=step - 1)
    self._writer.write(step, found.ensemble)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


class _NoEnsemble:
  """Of a run that nobody asks for one."""

  def __call__(self, group_id: int, step: int, variables: Variables) -> None:
    del group_id, step, variables

  def close(self) -> None:
    pass


def ensemble_of(
    plan: Plan,
    arm: Arm,
    model: base.Model,
    experiment: Experiment,
    directory: files.PathLike,
) -> _Ensemble | _NoEnsemble:
  """What an arm's ensemble is made of, if the study has one."""
  if not is_in_ensemble(plan, arm):
    return _NoEnsemble()
  path = plan_lib.ensemble_path(directory)
  return _Ensemble(model, experiment, path, arm.num_groups)


def is_in_ensemble(plan: Plan, arm: Arm) -> bool:
  """Whether another arm is the ensemble of its groups."""
  return any(other.ensemble_of == arm.name for other in plan.declared)
