r"""Submits the groups of a run as jobs: to SLURM, or to this machine.

    python -m experiments.launch --num_groups=4 --workdir=/shared/runs/four \
        --gin_file=gin_configs/tasks/bible_lm.gin \
        --slurm=gpus_per_node=8 --slurm=partition=gpu

A job for each group, by submitit (the extra `launch`). One that is preempted,
reaches its time limit or dies starts again and goes on; a clear error ends it.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from codistill_jax import gin_utils, run_directory
from codistill_jax.storage import files

from . import cli
from .running import processes

_FLAGS = flags.FLAGS
_STARTS = 50  # Of a group that dies again and again.
# A clear error; and what somebody has asked for: `scancel` sends SIGTERM.
_FINAL = cli.CLEAR_ERROR, 128 + signal.SIGTERM, 128 + signal.SIGINT


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  cli.define_run_flags(num_groups=2)
  flags.DEFINE_enum(
      'cluster', 'slurm', ['slurm', 'local'], 'Where: SLURM, or this machine.'
  )
  flags.DEFINE_integer(
      'minutes', 24 * 60, 'Time limit of a job, which goes on in a new one.'
  )
  flags.DEFINE_integer(
      'nodes', 1, 'Nodes of each group, a process on each.', lower_bound=1
  )
  flags.DEFINE_multi_string(
      'slurm',
      [],
      'Anything else for sbatch: gpus_per_node=8, cpus_per_task=16,'
      ' partition=gpu, account=me, exclusive. Repeatable.',
  )


class Group:
  """Trains a group in a process; what submitit pickles, calls and requeues."""

  def __init__(
      self, command: Sequence[str], environment: Mapping[str, str], starts: int
  ):
    """Takes what it has besides the job's; and how often it may die."""
    self._command, self._environment = list(command), dict(environment)
    self._starts = starts

  def __call__(self) -> None:
    environment = {**os.environ, **self._environment}
    self._process = subprocess.Popen(self._command, env=environment)
    status = self._process.wait()
    if status in _FINAL or (status and not self._starts):
      raise RuntimeError(f'ended with status {status}; see the log')
    if status:
      self._starts -= 1
      # To submitit, as if preempted: it asks for another start.
      signal.raise_signal(signal.SIGUSR2)

  def checkpoint(self) -> Any:
    """Returns what goes on, once the process has saved and left.

    The signal may have reached it too: soon after each other, two are one.
    """
    import submitit

    if self._process.returncode is None:
      with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(self._process.pid, signal.SIGUSR2)
        # Not by `Popen`, whose own wait the signal has interrupted.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
    again = Group(self._command, self._environment, self._starts)
    return submitit.helpers.DelayedSubmission(again)


def main(argv: Sequence[str]) -> None:
  del argv
  cli.check_installed('submitit')
  pairs = [word.partition('=') for word in _FLAGS.slurm]
  more = {name: value or True for name, _, value in pairs}
  environments = [{} for _ in range(_FLAGS.num_groups)]
  replicas = 0
  if _FLAGS.cluster == 'local':
    if more or _FLAGS.nodes > 1:
      raise ValueError('--slurm and --nodes are for --cluster=slurm')
    environments, replicas = processes.share_devices(
        _FLAGS.num_groups, 1, cli.StopRequest()
    )
  if _FLAGS.dry_run:
    command = processes.group_command(0, '--dry_run')
    sys.exit(subprocess.call(command))
  files.check_writable(run_directory.groups_root(_FLAGS.workdir))
  common = f'--replicas={replicas}', f'--num_processes={_FLAGS.nodes == 1:d}'
  groups = [
      Group(processes.group_command(group_id, *common), environment, _STARTS)
      for group_id, environment in enumerate(environments)
  ]
  try:
    jobs = _submit(groups, {'requeue': True, **more})
  except RuntimeError as e:
    raise ValueError(f'{_FLAGS.cluster} has refused the jobs: {e}') from e
  for group_id, job in enumerate(jobs):
    cli.tell(f'group {group_id}: job {job.job_id}, log {job.paths.stdout}')
  status = f'python -m {cli.module_of("status")} --workdir={_FLAGS.workdir}'
  cli.tell(f'where they are: {status}')


def _submit(groups: Sequence[Group], more: Mapping[str, Any]) -> list[Any]:
  """Returns the job of each group."""
  import submitit

  executor = submitit.AutoExecutor(
      # Its pickles run as code: not where others may write, the run directory.
      os.path.abspath(os.path.join('jobs', os.path.basename(_FLAGS.workdir))),
      cluster=_FLAGS.cluster,
      slurm_max_num_timeout=10**6,
  )
  executor.update_parameters(
      name=os.path.basename(_FLAGS.workdir),
      timeout_min=_FLAGS.minutes,
      nodes=_FLAGS.nodes,
      tasks_per_node=1,
      stderr_to_stdout=True,
      slurm_signal_delay_s=120,
      # srun does not take over --cpus-per-task by itself.
      slurm_setup=['export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}'],
      slurm_additional_parameters=dict(more),
  )
  with executor.batch():
    return [executor.submit(group) for group in groups]


if __name__ == '__main__':
  define_flags()
  cli.run(main)
