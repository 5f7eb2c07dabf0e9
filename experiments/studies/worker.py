"""Trains the runs of a study, each a run directory as of any other training.

All groups of a run are stepped in turn through memory, in lockstep. What was
compiled for one seed serves all others. Several processes may work on one
study: a run belongs to whoever locks its directory.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from codistill_jax import base, evaluate, gin_utils, run_directory, writers
from codistill_jax import experiment as experiment_lib
from codistill_jax.base import Variables
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files, locks
from experiments import cli, driver, lockstep
from experiments.job import Job
from experiments.stopping import Rescue, StopRequest
from experiments.studies import plan as plan_lib
from experiments.studies.declaration import Arm
from experiments.studies.plan import Plan, PlannedRun
from experiments.studies.progress import Progress

_POLL_SECONDS = 1.0
LAST = 3  # Evaluations that the loss at the end is the mean of.


class _Compiled(NamedTuple):
  """What runs that differ in their seeds alone have in common."""

  experiment: Experiment
  model: base.Model
  train_steps: Sequence[Any]
  shared_stream: base.Stream | None


class Worker:
  """Trains runs of one study in this process."""

  def __init__(
      self,
      workdir: files.PathLike,
      plan: Plan,
      *,
      bindings: Sequence[str] = (),
      stop: StopRequest,
      replicas: int = 1,
      jobs: int = 1,
  ):
    """Looks at nothing yet.

    Args:
      workdir: Of the study.
      plan: What to train.
      bindings: Of `--gin`, on top of all files and arms.
      stop: Whether to leave.
      replicas: Devices of a group; 0 for all.
      jobs: Processes that share the work, for the time that is left.
    """
    self._workdir = workdir
    self._plan = plan
    self._bindings = tuple(bindings)
    self._replicas = replicas
    self._stop = stop
    self._jobs = jobs
    self._compiled: dict[tuple, _Compiled] = {}

  @property
  def num_replicas(self) -> int:
    """R of every group."""
    return self._replicas or jax.local_device_count()

  # --- What to train next ----------------------------------------------------

  def train_all(self) -> None:
    """Trains until every run is done, by whatever process.

    Raises:
      Stopped: If asked to stop; what is done stays, and the run in hand goes on
        from here.
      ValueError: If something is configured wrongly.
    """
    left = self._plan.runs()
    while left:
      left = [run for run in left if not self._done(run)]
      trained = False
      for run in left:
        self._leave_if_asked()
        ready = all(map(self._done, self._plan.needed(run)))
        if ready and (trained := self._train_if_free(run)):
          break
      if left and not trained:
        time.sleep(_POLL_SECONDS)  # Others are at what is left.

  def _done(self, run: PlannedRun) -> bool:
    return plan_lib.read_outcome(self._workdir, run) is not None

  def _leave_if_asked(self) -> None:
    if self._stop():
      raise cli.Stopped(
          'stopped; the same command goes on from here',
          self._stop.signal_number,
      )

  def _train_if_free(self, run: PlannedRun) -> bool:
    """False if another process has it in hand."""
    directory = plan_lib.run_dir(self._workdir, run)
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(locks.exclusive(directory, 'training in'))
      except ValueError:
        return False
      if not self._done(run):
        progress = Progress(self._workdir, self._plan, run, self._jobs)
        outcome = self._train(run, progress)
        files.write_json(plan_lib.outcome_path(directory), outcome)
        cli.tell(progress.line(_ending(outcome)))
    return True

  # --- One run ---------------------------------------------------------------

  def configure(self, run: PlannedRun) -> Experiment:
    """Makes the configuration of a run that of this process, and what it says.

    Raises:
      ValueError: If it cannot be made as configured.
    """
    self.parse(run)
    return gin_utils.make(Experiment)

  def parse(self, run: PlannedRun) -> None:
    """Makes the configuration of a run that of this process."""
    plan, arm = self._plan, self._plan.arm(run.arm)
    rate, rows = self._rate(run), plan.group_batch(arm)
    of_run = [
        f'Experiment.seed={run.seed}',
        f'Experiment.data_seed={run.seed}',
        "Experiment.exchange_mode='lockstep'",
    ]
    if rate is not None:
      of_run.append(f'RATE={rate!r}')
    if rows is not None:
      of_run.append(f'Experiment.group_batch={rows}')
    if arm.taught_by:
      teachers = plan_lib.run_dir(self._workdir, plan.teachers(run))
      of_run.append(f'Experiment.teacher_runs=({str(teachers)!r},)')
    gin_utils.parse(
        [*plan.scale.gin_files, *arm.gin_files],
        [*of_run, *plan.scale.bindings, *arm.bindings, *self._bindings],
    )

  def _rate(self, run: PlannedRun) -> float | None:
    """The learning rate of a run; None for that of the configuration."""
    plan, rates = self._plan, self._plan.scale.rates
    if run.rate is not None or not rates:
      return run.rate
    arm = plan.arm(run.arm)
    tuned = plan.arm(arm.tuned_as) if arm.tuned_as else arm
    if not plan.grid(tuned):
      return rates[0]
    return plan_lib.choose_rate(
        plan, tuned, read_tuning(self._workdir, plan, tuned)
    )

  def _compile(self, run: PlannedRun, experiment: Experiment) -> _Compiled:
    """The step of a run, or that of an earlier one that differs in seeds."""
    # Under this configuration, even if it is thrown away: what makes no model
    # would have dead bindings.
    model = gin_utils.call(experiment_lib.make_model, experiment)
    key = (run.arm, self._rate(run), experiment.exchange == 'fixed')
    groups = self._plan.arm(run.arm).num_groups
    if key not in self._compiled or experiment.exchange == 'predictions':
      self._compiled.clear()  # One program at a time is enough of memory.
      steps, stream = lockstep.train_steps_of(
          experiment, model, groups, self._replicas
      )
      self._compiled[key] = _Compiled(experiment, model, steps, stream)
    return self._compiled[key]

  def _train(self, run: PlannedRun, progress: Progress) -> dict[str, Any]:
    """Trains a run to its end; what outcome.json says of it."""
    arm = self._plan.arm(run.arm)
    experiment = self.configure(run)
    compiled = self._compile(run, experiment)
    # The same optimiser, model and step: nothing is compiled again.
    experiment = dataclasses.replace(
        experiment, optimizer=compiled.experiment.optimizer
    )
    directory = str(plan_lib.run_dir(self._workdir, run).resolve())
    latch = lockstep.Latch(self._stop)
    ensemble = _ensemble(self._plan, arm, compiled.model, experiment, directory)
    jobs = [
        Job(
            experiment=experiment,
            model=compiled.model,
            train_step=compiled.train_steps[group_id],
            workdir=directory,
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
    exchanges = lockstep.exchanges_of(jobs, start)
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
        lockstep.train_in_turn([rounds.counted(g) for g in groups], latch)
      except FloatingPointError:
        diverged_at = rounds.newest + 1
    return {
        'run': run._asdict(),
        'rate': self._rate(run),
        'seed': experiment.seed,
        'data_seed': experiment.data_seed,
        'num_steps': experiment.num_steps,
        'exchange_every': experiment.exchange_every,
        'peers': np.mean(
            [
                experiment_lib.num_teachers(experiment, g, arm.num_groups)
                for g in range(arm.num_groups)
            ]
        ),
        'outer_every': getattr(experiment.method, 'inner_steps', 1),
        'examples_per_step': start.examples * arm.num_groups,
        'diverged_at': diverged_at,
        'loss': last_loss(directory, arm.num_groups),
        'began': began,
        'ended': time.time(),
        'jax': jax.__version__,
    }


def read_tuning(
    workdir: files.PathLike, plan: Plan, arm: Arm
) -> dict[float, dict[str, Any]]:
  """The outcomes of the tuning runs of an arm, as far as they are done."""
  found = {}
  for rate in plan.grid(arm):
    run = PlannedRun(arm.name, plan_lib.TUNING_SEED, rate, True)
    outcome = plan_lib.read_outcome(workdir, run)
    if outcome is not None:
      found[rate] = outcome
  return found


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


def _ending(outcome: dict[str, Any]) -> str:
  if outcome['diverged_at'] is not None:
    return f'diverged at step {outcome["diverged_at"]:,}'
  return f'done, loss {outcome["loss"]:.4f}'


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
  """The newest step of any group; and a sign of life now and then."""

  def __init__(self, progress: Progress, num_steps: int):
    self._progress = progress
    self._num_steps = num_steps
    self.newest = 0

  def counted(self, steps: Iterator[int]) -> Iterator[int]:
    for step in steps:
      self.newest = max(self.newest, step)
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


def _ensemble(
    plan: Plan,
    arm: Arm,
    model: base.Model,
    experiment: Experiment,
    directory: str,
) -> _Ensemble | _NoEnsemble:
  if all(other.ensemble_of != arm.name for other in plan.arms):
    return _NoEnsemble()
  path = plan_lib.ensemble_path(directory)
  return _Ensemble(model, experiment, path, arm.num_groups)
