"""Trains a study: in this process, or in several that share the CPU cores."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from codistill_jax import gin_utils
from codistill_jax.storage import files

from .. import cli
from ..cli import StopRequest
from ..running import processes
from . import study_plan as plan_lib
from .study_plan import StudyPlan

WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Directory of the study: its runs, and what came of them. Default of'
    ' reproduce: runs/STUDY_SCALE.',
)
OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Directory of tables, page and plots; default: report/ in --workdir, or'
    ' nowhere if there is none.',
)
NOTE = flags.DEFINE_string(
    'note', '', 'A sentence for the page, such as on the data.'
)
REPLICAS = flags.DEFINE_integer(
    'replicas', 1, 'Devices to use, by every group in turn; 0 means all.'
)
JOBS = flags.DEFINE_integer(
    'jobs',
    1,
    'Processes that train runs side by side. With more than one, each has its'
    ' share of the CPU cores for itself.',
)
WORKER = flags.DEFINE_string(
    'worker', '', 'Set by --jobs for each process: its number/their number.'
)


def check_least(*least: tuple[flags.FlagHolder, int]) -> None:
  """Raises ValueError if a flag that is given is less than its least."""
  for flag, number in (*least, (JOBS, 1), (REPLICAS, 0)):
    if flag.value is not None and flag.value < number:
      raise ValueError(
          f'--{flag.name}={flag.value}; set it to {number} or more'
      )


def absolute(workdir: str) -> str:
  """Returns a directory wherever this process goes."""
  return workdir if files.is_remote(workdir) else os.path.abspath(workdir)


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
  jobs, replicas = JOBS.value, REPLICAS.value
  if jobs > 1 and not WORKER.value:
    _run_side_by_side(module, workdir, jobs, StopRequest().install())
    return
  jobs = _take_cores(WORKER.value)
  stop = StopRequest(cli.STOPPED).install()
  # Not at the top: what only lists, or draws a page, needs no jax.
  import jax

  from ..running import job as job_lib
  from . import configurations
  from . import worker as worker_lib

  if replicas > 1:
    job_lib.use_replicas(replicas)
  configured = configurations.Configurations(
      workdir, plan, gin_utils.flag_values()[1]
  )
  configurations.claim(configured, replicas or jax.local_device_count())
  worker_lib.Worker(
      configured,
      stop=stop,
      replicas=replicas,
      jobs=jobs,
      together=worker_lib.trains_together(one_program),
  ).train_all()
  stop.uninstall()


def _run_side_by_side(
    module: str, workdir: files.PathLike, jobs: int, stop: StopRequest
) -> None:
  """Runs this command `jobs` times, with `--worker=<i>/<jobs>`, to the end.

  The others start once the first has accepted the flags, so that a mistake is
  said once.

  Raises:
    Stopped: If asked to stop.
    SystemExit: With the status of the first that failed, which has said why.
  """
  begun = plan_lib.begun_at(workdir)
  environment = {**os.environ, cli.COMMAND_VARIABLE: cli.own_command()}
  command = [sys.executable, '-m', module, *sys.argv[1:]]
  start = lambda i: processes.popen(
      [*command, f'--worker={i}/{jobs}'], env=environment
  )
  workers = [start(0)]
  try:
    while any(worker.poll() is None for worker in workers):
      if stop():
        raise cli.Stopped(cli.STOPPED, stop.signal_number)
      _leave_with(workers)
      if len(workers) < jobs and plan_lib.begun_at(workdir) != begun:
        workers += map(start, range(1, jobs))
      time.sleep(0.1)
    _leave_with(workers)
  finally:
    for worker in workers:
      processes.ask_to_leave(worker)
    for worker in workers:
      processes.wait_or_kill(worker, processes.PACE.grace)


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


def _leave_with(workers: Sequence[subprocess.Popen]) -> None:
  """Ends as the first process that failed."""
  for worker in workers:
    if worker.returncode:
      sys.exit(worker.returncode % 256)
