"""Trains the runs of a study that are not done, one after another.

Several processes may work on one study: a run belongs to whoever locks its
directory.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from codistill_jax.storage import files, leases

from .. import cli
from ..cli import StopRequest
from . import seeds_together
from . import study_plan as plan_lib
from .configurations import Configurations
from .runs import Outcome, Trainer
from .study_plan import PlannedRun, StudyPlan

_POLL_SECONDS = 1.0
_SAY_EVERY_SECONDS = 30.0
# A round of two groups does two updates and asks a teacher for each.
_TEACHER_COST = 1.3


@dataclasses.dataclass
class Worker:
  """Trains runs of one study in this process.

  Attributes:
    configurations: Of all runs.
    stop: Whether to leave.
    replicas: Devices of a group; 0 for all.
    jobs: Processes that share the work, for the time that is left.
    together: Whether all seeds of an arm are trained as one program, where
      that can be.
  """

  configurations: Configurations
  stop: StopRequest
  replicas: int = 1
  jobs: int = 1
  together: bool = False

  def __post_init__(self):
    self._workdir = self.configurations.workdir
    self._plan = self.configurations.plan
    self._trainer = Trainer(self.configurations, self.replicas, self.stop)

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
    if self.stop():
      raise cli.Stopped(
          cli.STOPPED,
          self.stop.signal_number,
      )

  def _with(
      self, run: PlannedRun, left: Sequence[PlannedRun]
  ) -> list[PlannedRun]:
    """Returns the run, and those that can be in the same program."""
    # Predictions of runs that were trained alike are the same to the bit.
    apart = self._plan.study.predictions
    if apart or not self.together or run.tuning or self.replicas > 1:
      return [run]
    experiment = self.configurations.configure(run)
    arm = self._plan.arm(run.arm)
    if not seeds_together.possible(experiment, arm.num_groups):
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
          stack.enter_context(leases.exclusive(directory, 'training in'))
        except ValueError:
          continue
        if not self._done(run):
          ours.append(run)
      if ours:
        self._train(ours)
    return bool(ours)

  def _train(self, runs: Sequence[PlannedRun]) -> None:
    if self._without_teachers(runs[0]):
      self._finish(runs[0], _never_begun(runs[0]))
    else:
      progress = StudyProgress(self._workdir, self._plan, runs[0], self.jobs)
      self._trainer(runs, progress.say, self._finish)

  def _without_teachers(self, run: PlannedRun) -> bool:
    """Returns whether the run that it would learn from diverged."""
    if not self._plan.arm(run.arm).taught_by:
      return False
    teachers = self._plan.teachers(run)
    outcome = plan_lib.read_outcome(self._workdir, teachers)
    return outcome['diverged_at'] is not None

  def _finish(self, run: PlannedRun, outcome: Outcome) -> None:
    """Writes outcome.json: the run is done."""
    directory = plan_lib.run_dir(self._workdir, run)
    files.write_json(plan_lib.outcome_path(directory), outcome)
    progress = StudyProgress(self._workdir, self._plan, run, self.jobs)
    cli.tell(progress.line(_ending(outcome)))


def trains_together(choice: str) -> bool:
  """Returns whether --one_program says so, 'auto': on an accelerator."""
  if choice == 'auto':
    return jax.devices()[0].platform != 'cpu'
  return choice == 'yes'


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


def _ending(outcome: dict[str, Any]) -> str:
  if outcome['diverged_at'] is not None:
    return f'diverged at step {outcome["diverged_at"]:,}'
  return f'done, loss {outcome["loss"]:.4f}'


class StudyProgress:
  """The lines of one run, on the background of all."""

  def __init__(
      self, workdir: files.PathLike, plan: StudyPlan, run: PlannedRun, jobs: int
  ):
    """Reads nothing yet.

    Args:
      workdir: Of the study.
      plan: All runs.
      run: The one in hand.
      jobs: Processes that share the work.
    """
    self._workdir = workdir
    self._plan = plan
    self._run = run
    self.jobs = jobs
    self._next = time.monotonic() + _SAY_EVERY_SECONDS

  def say(self, what: str) -> None:
    """Prints a line, unless there was one a moment ago."""
    if time.monotonic() >= self._next:
      self._next = time.monotonic() + _SAY_EVERY_SECONDS
      cli.tell(self.line(what))

  def line(self, what: str) -> str:
    """Returns where the study stands, by its files."""
    runs = self._plan.runs()
    outcomes = [plan_lib.read_outcome(self._workdir, run) for run in runs]
    done = [(r, o) for r, o in zip(runs, outcomes) if o]
    text = f'{len(done)} of {len(runs)} runs done; {self._run.name}: {what}'
    left = sum(self._cost(r) for r, o in zip(runs, outcomes) if not o)
    if not done or not left:
      return text
    took = sum(o['ended'] - o['began'] for _, o in done)
    pace = took / sum(self._cost(r) for r, _ in done)
    return f'{text}; about {left * pace / self.jobs / 60:.0f} min left'

  def _cost(self, run: PlannedRun) -> float:
    """Returns the cost in trainings of one group alone."""
    groups = self._plan.arm(run.arm).num_groups
    return 1.0 if groups == 1 else _TEACHER_COST * groups
