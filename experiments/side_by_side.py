"""One command as several processes, each with its share of the CPU cores."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from experiments import cli
from experiments.cli import StopRequest
from experiments.running import processes


def run(
    module: str,
    jobs: int,
    stop: StopRequest,
    *,
    accepted: Callable[[], bool],
) -> None:
  """Runs this command `jobs` times, with `--worker=<i>/<jobs>`, to the end.

  Args:
    module: The binary, such as 'experiments.churn'.
    jobs: Processes.
    stop: Asks all of them to leave.
    accepted: Whether the first has accepted the flags; the others start only
      then, so that a mistake is said once.

  Raises:
    Stopped: If asked to stop.
    SystemExit: With the status of the first that failed, which has said why.
  """
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
      if len(workers) < jobs and accepted():
        workers += map(start, range(1, jobs))
      time.sleep(0.1)
    _leave_with(workers)
  finally:
    for worker in workers:
      processes.ask_to_leave(worker)
    for worker in workers:
      processes.wait_or_kill(worker, 10.0)


def take_cores(worker: str) -> int:
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
