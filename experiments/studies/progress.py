"""Says how far a study is, and about how long it will take."""

import time

from codistill_jax.storage import files
from experiments import cli
from experiments.studies import plan as plan_lib
from experiments.studies.plan import Plan, PlannedRun

_SAY_EVERY_SECONDS = 30.0
# A round of two groups does two updates and asks a teacher for each.
_TEACHER_COST = 1.3


class Progress:
  """The lines of one run, on the background of all."""

  def __init__(
      self, workdir: files.PathLike, plan: Plan, run: PlannedRun, jobs: int
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
    self._jobs = jobs
    self._next = time.monotonic() + _SAY_EVERY_SECONDS

  def say(self, what: str) -> None:
    """A line, unless there was one a moment ago."""
    if time.monotonic() >= self._next:
      self._next = time.monotonic() + _SAY_EVERY_SECONDS
      cli.tell(self.line(what))

  def line(self, what: str) -> str:
    """Where the study stands, by its files."""
    runs = self._plan.runs()
    outcomes = [plan_lib.read_outcome(self._workdir, run) for run in runs]
    done = [(r, o) for r, o in zip(runs, outcomes) if o]
    text = f'{len(done)} of {len(runs)} runs done; {self._run.name}: {what}'
    left = sum(self._cost(r) for r, o in zip(runs, outcomes) if not o)
    if not done or not left:
      return text
    took = sum(o['ended'] - o['began'] for _, o in done)
    pace = took / sum(self._cost(r) for r, _ in done)
    return f'{text}; about {left * pace / self._jobs / 60:.0f} min left'

  def _cost(self, run: PlannedRun) -> float:
    """In trainings of one group alone."""
    groups = self._plan.arm(run.arm).num_groups
    return 1.0 if groups == 1 else _TEACHER_COST * groups
