"""Trains the runs of a study that are not done: one process, or several.

A run belongs to whoever locks its directory. Of several processes (`--jobs`)
each has its share of the CPU cores.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from codistill_jax import gin_utils
from codistill_jax.storage import files, leases

from .. import cli
from ..cli import StopRequest
from ..running import processes
from . import study_plan as plan_lib
from .study_plan import PlannedRun, StudyPlan

if TYPE_CHECKING:
  from .runs import Trainer


_FLAGS = flags.FLAGS
# The flags below belong to the binary that asks for them.
flags.disclaim_key_flags()


def define_flags() -> None:
  """Defines the flags of the binaries that train a study."""
  cli.define_path(
      'workdir',
      None,
      'Directory of the study: its runs, and what came of them. Default of'
      ' reproduce: runs/STUDY_SCALE.',
  )
  cli.define_path(
      'output',
      None,
      'Directory of tables, page and plots; default: report/ in --workdir, or'
      ' nowhere if there is none.',
  )
  flags.DEFINE_string(
      'note', '', 'A sentence for the page, such as on the data.'
  )
  flags.DEFINE_integer(
      'replicas', 1, 'Devices to use, by every group in turn; 0 means all.'
  )
  flags.DEFINE_integer(
      'jobs',
      1,
      'Processes that train runs side by side. With more than one, each has its'
      ' share of the CPU cores for itself.',
  )
  cli.define_compile_cache()
  flags.DEFINE_string(
      'worker', '', 'Set by --jobs for each process: its number/their number.'
  )


def check_least(**least: int) -> None:
  """Raises ValueError if a flag that is given is less than its least."""
  for flag, number in (least | {'jobs': 1, 'replicas': 0}).items():
    value = _FLAGS[flag].value
    if value is not None and value < number:
      raise ValueError(f'--{flag}={value}; set it to {number} or more')


def positive(flag: str, what: str) -> list[float]:
  """Returns the numbers of a flag; raises ValueError unless all are above 0."""
  numbers = []
  for text in _FLAGS[flag].value:
    try:
      numbers.append(float(text))
    except ValueError:
      numbers.append(0.0)
    if not 0 < numbers[-1] < float('inf'):
      raise ValueError(
          f'--{flag}: {text!r} is no {what}; give numbers above 0, such as'
          f' --{flag}=1,3'
      )
  return numbers


def refuse(names: Sequence[str], why: str) -> None:
  """Raises ValueError for a flag that is given and would act nowhere."""
  for name in names:
    if _FLAGS[name].present:
      raise ValueError(f'--{name} {why}; leave it out')


def train(
    module: str,
    workdir: files.PathLike,
    plan: StudyPlan,
    one_program: str = 'no',
) -> None:
  """Trains all runs that are not done; the same command again goes on.

  Args:
    module: The binary, such as 'experiments.churn'.
    workdir: Of the study.
    plan: Of it.
    one_program: Of seeds, as of `--one_program`.

  Raises:
    Stopped: If asked to stop.
  """
  jobs, replicas = _FLAGS.jobs, _FLAGS.replicas
  if jobs > 1 and not _FLAGS.worker:
    _run_side_by_side(module, workdir, jobs, StopRequest().install())
    return
  jobs = _take_cores(_FLAGS.worker)
  stop = StopRequest(cli.STOPPED).install()
  # Not at the top: what only lists, or draws a page, needs no jax.
  import jax

  from ..running import job as job_lib
  from . import configurations, runs

  cli.keep_programs(_FLAGS.compile_cache)
  if replicas > 1:
    job_lib.use_replicas(replicas)
  configured = configurations.Configurations(
      workdir, plan, gin_utils.flag_values()[1]
  )
  configurations.claim(configured, replicas or jax.local_device_count())
  if one_program == 'auto':
    one_program = 'no' if jax.devices()[0].platform == 'cpu' else 'yes'
  trainer = runs.Trainer(configured, replicas, stop, one_program == 'yes')
  _Worker(workdir, plan, trainer, stop, jobs).train_all()
  stop.uninstall()


def _run_side_by_side(
    module: str, workdir: files.PathLike, jobs: int, stop: StopRequest
) -> None:
  """Runs this command `jobs` times, with `--worker=<i>/<jobs>`, to the end.

  The others start once the first has accepted the flags, so that a mistake is
  said once.

  Raises:
    Stopped: If asked to stop, and all of them have saved everything.
    SystemExit: With the worst status of theirs, who have said why.
  """
  begun = plan_lib.begun_at(workdir)
  environment = {**os.environ, cli.COMMAND_VARIABLE: cli.own_command()}
  command = [sys.executable, '-m', module, *sys.argv[1:]]
  start = lambda i: processes.popen(
      [*command, f'--worker={i}/{jobs}'], env=environment
  )
  workers = [start(0)]
  try:
    while None in [worker.poll() for worker in workers]:
      if stop() or any(worker.returncode for worker in workers):
        break
      if len(workers) < jobs and plan_lib.begun_at(workdir) != begun:
        workers += map(start, range(1, jobs))
      time.sleep(0.1)
  finally:
    for worker in workers:
      processes.ask_to_leave(worker)
    for worker in workers:
      processes.wait_or_kill(worker, processes.PACE.grace)
  if any(worker.returncode < 0 for worker in workers):
    line = 'error: a process was killed; what it had not saved is lost'
    cli.tell(line, error=True)
  worst = processes.worst_status(worker.returncode for worker in workers)
  if stop() and not 0 < worst < 128:
    raise cli.Stopped(cli.STOPPED, stop.signal_number)
  if worst:
    sys.exit(worst)


def _take_cores(worker: str) -> int:
  """Keeps to the share of process `<i>/<jobs>`; gives the number of jobs.

  Before jax makes its threads, as many as there are cores.
  """
  if not worker:
    return 1
  index, jobs = map(int, worker.split('/'))
  if hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    if jobs <= len(cores):
      share = len(cores) // jobs
      os.sched_setaffinity(0, cores[index * share : (index + 1) * share])
  return jobs


# --- One process -------------------------------------------------------------

_POLL_SECONDS = 1.0
_SAY_EVERY_SECONDS = 30.0
# A round of two groups does two updates and asks a teacher for each.
_TEACHER_COST = 1.3


class _Worker:
  """Trains runs of one study in this process."""

  def __init__(
      self,
      workdir: files.PathLike,
      plan: StudyPlan,
      trainer: 'Trainer',
      stop: StopRequest,
      jobs: int,
  ):
    self._workdir = workdir
    self._plan = plan
    self._trainer = trainer
    self._stop = stop
    self._jobs = jobs
    self._say_next = 0.0

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
        if self._stop():
          raise cli.Stopped(cli.STOPPED, self._stop.signal_number)
        ready = all(map(self._done, self._plan.needed(run)))
        together = [run]
        if ready and self._trainer.trains_together(run):
          together = [r for r in left if r.arm == run.arm and not r.tuning]
        if ready and (trained := self._train_if_free(together)):
          break
      if left and not trained:
        time.sleep(_POLL_SECONDS)  # Others are at what is left.

  def _done(self, run: PlannedRun) -> bool:
    return plan_lib.read_outcome(self._workdir, run) is not None

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
        except leases.HeldError:
          continue
        if not self._done(run):
          ours.append(run)
      if ours:
        self._train(ours)
    return bool(ours)

  def _train(self, runs: Sequence[PlannedRun]) -> None:
    first = runs[0]
    if self._plan.arm(first.arm).taught_by:
      teachers = self._plan.teachers(first)
      outcome = plan_lib.read_outcome(self._workdir, teachers)
      if outcome['diverged_at'] is not None:
        self._finish(first, _never_begun(first))
        return
    self._say_next = time.monotonic() + _SAY_EVERY_SECONDS
    say = functools.partial(self._say, first)
    self._trainer(runs, say, self._finish)

  def _finish(self, run: PlannedRun, outcome: dict[str, Any]) -> None:
    """Writes outcome.json: the run is done."""
    directory = plan_lib.run_dir(self._workdir, run)
    files.write_json(plan_lib.outcome_path(directory), outcome)
    at = outcome['diverged_at']
    ending = f'done, loss {outcome["loss"]:.4f}'
    cli.tell(
        self._line(run, ending if at is None else f'diverged at step {at:,}')
    )

  def _say(self, run: PlannedRun, what: str) -> None:
    if time.monotonic() >= self._say_next:
      self._say_next = time.monotonic() + _SAY_EVERY_SECONDS
      cli.tell(self._line(run, what))

  def _line(self, run: PlannedRun, what: str) -> str:
    """Returns where the study stands, by its files."""
    runs = self._plan.runs()
    outcomes = [plan_lib.read_outcome(self._workdir, run) for run in runs]
    done = [(r, o) for r, o in zip(runs, outcomes) if o]
    text = f'{len(done)} of {len(runs)} runs done; {run.name}: {what}'
    left = sum(self._cost(r) for r, o in zip(runs, outcomes) if not o)
    if not done or not left:
      return text
    took = sum(o['ended'] - o['began'] for _, o in done)
    pace = took / sum(self._cost(r) for r, _ in done)
    return f'{text}; about {left * pace / self._jobs / 60:.0f} min left'

  def _cost(self, run: PlannedRun) -> float:
    """Returns the cost in trainings of one group alone."""
    groups = self._plan.arm(run.arm).num_groups
    return 1.0 if groups == 1 else _TEACHER_COST * groups


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
