"""Trains the runs of a study that are not done, one after another.

Several processes may work on one study: a run belongs to whoever locks its
directory.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from codistill_jax.storage import files, locks
from experiments import cli
from experiments.cli import StopRequest
from experiments.studies import one_program
from experiments.studies import plan as plan_lib
from experiments.studies.configurations import Configurations
from experiments.studies.plan import PlannedRun
from experiments.studies.progress import Progress
from experiments.studies.training import Trainer

_POLL_SECONDS = 1.0


class Worker:
  """Trains runs of one study in this process."""

  def __init__(
      self,
      configurations: Configurations,
      *,
      stop: StopRequest,
      replicas: int = 1,
      jobs: int = 1,
      together: bool = False,
  ):
    """Looks at nothing yet.

    Args:
      configurations: Of all runs.
      stop: Whether to leave.
      replicas: Devices of a group; 0 for all.
      jobs: Processes that share the work, for the time that is left.
      together: Whether all seeds of an arm are trained as one program, where
        that can be.
    """
    self._configurations = configurations
    self._workdir = configurations.workdir
    self._plan = configurations.plan
    self._stop = stop
    self._replicas = replicas
    self._jobs = jobs
    self._together = together
    self._trainer = Trainer(configurations, replicas, stop)

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
        if ready and (trained := self._train_if_free(self._with(run, left))):
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

  def _with(
      self, run: PlannedRun, left: Sequence[PlannedRun]
  ) -> list[PlannedRun]:
    """The run, and those that can be trained in the same program."""
    if not self._together or run.tuning or self._replicas > 1:
      return [run]
    if not one_program.possible(self._configurations, run):
      return [run]
    return [
        other for other in left if other.arm == run.arm and not other.tuning
    ]

  def _train_if_free(self, runs: Sequence[PlannedRun]) -> bool:
    """Trains those that no other process has in hand; whether there were any.

    If there is more than one, they are trained as one program.
    """
    with contextlib.ExitStack() as stack:
      ours = []
      for run in runs:
        directory = plan_lib.run_dir(self._workdir, run)
        try:
          stack.enter_context(locks.exclusive(directory, 'training in'))
        except ValueError:
          continue
        if not self._done(run):
          ours.append(run)
      if ours:
        self._train(ours)
    return bool(ours)

  def _without_teachers(self, run: PlannedRun) -> bool:
    """Whether the run that it would learn from came to nothing."""
    if not self._plan.arm(run.arm).taught_by:
      return False
    teachers = self._plan.teachers(run)
    outcome = plan_lib.read_outcome(self._workdir, teachers)
    return outcome['diverged_at'] is not None

  def _train(self, runs: Sequence[PlannedRun]) -> None:
    progress = Progress(self._workdir, self._plan, runs[0], self._jobs)
    if len(runs) > 1:
      outcomes = one_program.train(
          self._configurations, runs, self._stop, self._replicas, progress
      )
    elif self._without_teachers(runs[0]):
      outcomes = [_never_begun(runs[0])]
    else:
      outcomes = [self._trainer(runs[0], progress)]
    for run, outcome in zip(runs, outcomes):
      directory = plan_lib.run_dir(self._workdir, run)
      files.write_json(plan_lib.outcome_path(directory), outcome)
      progress = Progress(self._workdir, self._plan, run, self._jobs)
      cli.tell(progress.line(_ending(outcome)))


def _never_begun(run: PlannedRun) -> dict[str, Any]:
  now = time.time()
  return {
      'run': run._asdict(),
      'rate': run.rate,
      'diverged_at': 0,
      'loss': float('nan'),
      'why': 'its teachers diverged',
      'began': now,
      'ended': now,
      'together': 1,
  }


def trains_together(choice: str) -> bool:
  """Whether --one_program says so, 'auto': on an accelerator."""
  if choice == 'auto':
    return jax.devices()[0].platform != 'cpu'
  return choice == 'yes'


def _ending(outcome: dict[str, Any]) -> str:
  if outcome['diverged_at'] is not None:
    return f'diverged at step {outcome["diverged_at"]:,}'
  return f'done, loss {outcome["loss"]:.4f}'
