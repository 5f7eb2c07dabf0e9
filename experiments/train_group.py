r"""Trains one group of a codistillation run: the production entry point.

Start one per group, on whatever machines see the same --workdir:

    python -m experiments.train_group --workdir=runs/two --num_groups=2 \
        --group_id=0 --gin_file=gin_configs/tasks/bible_lm.gin

The same command again goes on from the last resume checkpoint. A group of
several processes is started with --coordinator, --num_processes and
--process_id, one command per process.
"""

import functools
import os
import sys
from collections.abc import Sequence

from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, replicas, run_directory
from codistill_jax.exchange.plan import peers_of
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Troubles

from . import cli
from .running import driver
from .running import job as job_lib
from .running.job import Job, check_workdir, print_dry_run
from .running.watch import group_writer

flags.adopt_module_key_flags(gin_utils)

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory that all groups see.', required=True
)
_GROUP_ID = flags.DEFINE_integer(
    'group_id', 0, 'This group, from 0 to --num_groups - 1.'
)
_NUM_GROUPS = flags.DEFINE_integer(
    'num_groups', 1, 'Groups of the run; 1 trains a baseline without peers.'
)
_REPLICAS = flags.DEFINE_integer(
    'replicas',
    0,
    'Devices of this process to use; 0 means all. On a machine without'
    ' accelerator that many fake CPU devices are made.',
)
_ARM = flags.DEFINE_string(
    'arm', '', 'Name of the run in reports; default: the name of --workdir.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    '',
    'host:port of process 0, for a group of several processes.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', 1, 'Processes of this group.'
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', 0, 'This process, from 0 to --num_processes - 1.'
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    'heartbeat_seconds',
    20,
    'In a group of several processes: how long one may give no sign of life'
    ' before jax aborts the others; start all of them again then.',
    lower_bound=2,
)
_GRACE_SECONDS = flags.DEFINE_float(
    'grace_seconds',
    20.0,
    'After SIGTERM: how long a compilation or a read of data may last before'
    ' the process leaves without a save, with status 75.',
    lower_bound=0.0,
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the configuration and stop; write nothing.'
)


def main(argv: Sequence[str]) -> None:
  del argv
  peers_of(_GROUP_ID.value, _NUM_GROUPS.value)  # Raises if out of range.
  stop = cli.StopRequest(cli.STOPPED, _GRACE_SECONDS.value).install()
  gin_utils.parse_flags()
  job_lib.use_replicas(_REPLICAS.value)
  if _NUM_PROCESSES.value > 1:
    _join_processes()
  experiment = gin_utils.make(experiment_lib.Experiment)
  if experiment.exchange.one_program:
    raise ValueError(
        f'Experiment.exchange={experiment.exchange} is for groups that are one'
        ' program; use train_lockstep, which trains all groups in'
        ' one process, or set exchange=@exchange.Checkpoints()'
    )
  model = gin_utils.call(experiment_lib.make_model, experiment)
  job = Job(
      experiment=experiment,
      model=model,
      train_step=experiment_lib.make_replicated_step(
          experiment, model, job_lib.chosen_devices(_REPLICAS.value)
      ),
      workdir=os.fspath(checkpoints.absolute(_WORKDIR.value)),
      group_id=_GROUP_ID.value,
      num_groups=_NUM_GROUPS.value,
      agreement=replicas.agreement(),
      stop=stop,
      troubles=Troubles(f'group {_GROUP_ID.value}: '),
      arm=_ARM.value,
  )
  state = driver.new_state(job).state
  if _DRY_RUN.value:
    print_dry_run(job, state)
    return
  check_workdir(job, state)
  del state
  progress = job.agreement.is_primary
  for _ in driver.train(
      job,
      functools.partial(experiment.exchange.join, job),
      group_writer(job, progress=progress),
  ):
    pass
  if progress:
    cli.tell(
        f'group {job.group_id} has reached step {job.experiment.num_steps};'
        f' see {run_directory.group_dir(_WORKDIR.value, job.group_id)}'
    )


def _join_processes() -> None:
  if not _COORDINATOR.value:
    raise ValueError(
        f'--num_processes={_NUM_PROCESSES.value} needs --coordinator=host:port'
        ' of process 0'
    )
  if not 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value:
    raise ValueError(
        f'--process_id={_PROCESS_ID.value} is out of range: with'
        f' --num_processes={_NUM_PROCESSES.value} it lies in'
        f' 0..{_NUM_PROCESSES.value - 1}'
    )
  replicas.start_processes(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      heartbeat_seconds=_HEARTBEAT_SECONDS.value,
  )


def _main_of_a_process(argv: Sequence[str]) -> None:
  """Ends a process of several at once when it fails.

  A plain exit would wait at a barrier for processes that wait for this one.
  """
  if _NUM_PROCESSES.value == 1:
    main(argv)
    return
  status = cli.status_of(main, argv)
  if status:
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
  cli.run(_main_of_a_process)
