r"""Trains all groups of one machine, each as processes of its own.

    python -m experiments.train_local --workdir=runs/two --num_groups=2 \
        --gin_file=gin_configs/tasks/bible_lm.gin

Shares out the accelerators (or makes fake CPU devices), shows progress, starts
a group again that dies, and ends with an evaluation and a report. The same
command again goes on where everything stopped.
"""

import sys
from collections.abc import Sequence

from absl import flags

from codistill_jax import gin_utils, run_directory
from codistill_jax.storage import files

from . import cli
from .reports import run_status
from .running import processes

_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  cli.define_run_flags(num_groups=2)
  flags.DEFINE_integer(
      'cpu_replicas',
      2,
      'Replicas (fake devices) of each group where there is no accelerator.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'max_restarts',
      5,
      'How often a group may die without a new resume checkpoint before the run'
      ' is given up.',
      lower_bound=0,
  )
  flags.DEFINE_bool(
      'report',
      True,
      'Evaluate the groups together and write a report at the end; this needs'
      ' the extra `report`.',
  )


def main(argv: Sequence[str]) -> None:
  del argv
  stop = cli.StopRequest().install()
  environments, replicas = processes.share_devices(
      _FLAGS.num_groups, _FLAGS.cpu_replicas, stop
  )
  command = lambda g: processes.group_command(g, f'--replicas={replicas}')
  if _FLAGS.dry_run:
    dry = [*command(0), '--dry_run']
    sys.exit(processes.call(dry, stop).returncode)
  if _FLAGS.report:
    cli.check_installed('jinja2', 'matplotlib', 'pandas')
  files.check_writable(run_directory.groups_root(_FLAGS.workdir))
  logs = processes.log_directory(_FLAGS.workdir)
  groups = [
      processes.Group(
          _FLAGS.workdir,
          group_id,
          command(group_id),
          extra,
          logs=logs,
      )
      for group_id, extra in enumerate(environments)
  ]
  cli.tell(
      f'{_FLAGS.num_groups} group(s) of {replicas} replica(s); what they say is'
      f' in {logs}/group_*/log.txt'
  )
  processes.supervise(groups, stop, _FLAGS.max_restarts)
  cli.tell(f'all groups are done; see {_FLAGS.workdir}')
  try:
    if _FLAGS.report:
      _evaluate_and_report(stop)
  finally:
    for line in run_status.never_taught(_FLAGS.workdir):
      cli.tell(f'warning: {line}', error=True)


def _evaluate_and_report(stop: cli.StopRequest) -> None:
  for binary in ('evaluate', 'report'):
    command = [sys.executable, '-m', cli.module_of(binary)]
    command.append(f'--workdir={_FLAGS.workdir}')
    if binary == 'evaluate':
      files_given, _ = gin_utils.flag_values()
      modules = sorted(gin_utils.imported_by(files_given))
      command += [f'--trust={module}' for module in modules]
    status = processes.call(command, stop).returncode
    if status:
      raise ValueError(
          f'all groups are trained, but {binary} ended with'
          f' status {status}; see above, and start it again by itself'
      )


if __name__ == '__main__':
  define_flags()
  cli.run(main)
