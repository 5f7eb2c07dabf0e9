r"""Trains one group of a codistillation run: the production entry point.

Start one per group, on whatever machines see the same --workdir:

    python -m experiments.train_group --workdir=runs/two --num_groups=2 \
        --group_id=0 --gin_file=gin_configs/tasks/bible_lm.gin

The same command again goes on from the last resume checkpoint. A group of
several processes is started with --coordinator, --num_processes and
--process_id, one command per process.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, replicas, run_directory
from codistill_jax.base import Variables
from codistill_jax.exchange.checkpoint_exchange import (
    CheckpointExchange,
    Waiting,
)
from codistill_jax.exchange.protocol import Exchange, peers_of
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Troubles
from experiments import claims, cli, companions, devices, driver, lockstep
from experiments.job import Job
from experiments.stopping import Rescue, StopRequest
from experiments.watch import group_writer

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
    ' before the others end, with status 75. If one dies they end at once.',
    lower_bound=2,
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the configuration and stop; write nothing.'
)

_LOSS_KNOWN_SECONDS = 2.0
_LAST_LOOK_SECONDS = 3.0


def main(argv: Sequence[str]) -> None:
  del argv
  peers_of(_GROUP_ID.value, _NUM_GROUPS.value)  # Raises if out of range.
  stop = StopRequest(Rescue(cli.NOT_BEGUN)).install()
  gin_utils.parse_flags()
  devices.use_replicas(_REPLICAS.value)
  if _NUM_PROCESSES.value > 1:
    _join_processes()
  experiment = gin_utils.make(experiment_lib.Experiment)
  if experiment.exchange == 'predictions':
    raise ValueError(
        "Experiment.exchange='predictions' is for groups that are one program;"
        ' use experiments.train_lockstep, which trains all groups in one'
        " process, or set exchange='checkpoints'"
    )
  model = gin_utils.call(experiment_lib.make_model, experiment)
  job = Job(
      experiment=experiment,
      model=model,
      train_step=experiment_lib.make_replicated_step(
          experiment, model, devices.chosen_devices(_REPLICAS.value)
      ),
      workdir=os.fspath(checkpoints.absolute(_WORKDIR.value)),
      group_id=_GROUP_ID.value,
      num_groups=_NUM_GROUPS.value,
      agreement=replicas.agreement(),
      stop=stop,
      rescue=stop.rescue,
      troubles=Troubles(f'group {_GROUP_ID.value}: '),
      arm=_ARM.value,
  )
  with _watching(job):
    _train(job)


def _train(job: Job) -> None:
  state = driver.new_state(job).state
  if _DRY_RUN.value:
    claims.print_dry_run(job, state)
    return
  claims.check_workdir(job, state)
  progress = job.agreement.is_primary
  for _ in driver.train(
      job, _exchange_of(job), group_writer(job, progress=progress)
  ):
    pass
  if progress:
    cli.tell(
        f'group {job.group_id} has reached step {job.experiment.num_steps};'
        f' see {run_directory.group_dir(_WORKDIR.value, job.group_id)}'
    )


def _exchange_of(job: Job):
  def make(variables: Variables) -> Exchange:
    if job.experiment.exchange == 'fixed':
      return lockstep.fixed_exchange(job, variables)
    return CheckpointExchange(
        run_directory.exchange_root(job.workdir),
        job.group_id,
        job.num_groups,
        like=variables,
        plan=job.experiment.plan,
        identity=job.identity,
        waiting=Waiting(job.experiment.exchange_timeout_seconds, job.stop),
        agreement=job.agreement,
        process=jax.process_index(),
        put=job.train_step.place_teachers,
        troubles=job.troubles,
    )

  return make


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
      # Twice: what is noticed here is to be noticed before jax aborts.
      heartbeat_seconds=2 * _HEARTBEAT_SECONDS.value,
  )


@contextlib.contextmanager
def _watching(job: Job) -> Iterator[None]:
  """Ends this process if another one of its group is lost."""
  if _NUM_PROCESSES.value == 1:
    yield
    return
  others = companions.watch(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      job.agreement,
      limit_seconds=_HEARTBEAT_SECONDS.value,
      lost=functools.partial(_leave, job),
  )
  try:
    yield
  except cli.Stopped:
    others.close()  # They stop as well.
    raise
  except jax.errors.JaxRuntimeError:
    # Perhaps a collective without one that is lost: soon that is known.
    time.sleep(_LOSS_KNOWN_SECONDS)
    others.close(failed=True)
    raise
  except Exception:
    others.close(failed=True)
    raise
  others.close()


def _leave(job: Job, what: str) -> None:
  """Ends this process of a group that has lost another one."""
  # Whatever the disk does.
  threading.Timer(_LAST_LOOK_SECONDS, os._exit, [cli.MAY_PASS]).start()
  directory = run_directory.checkpoints_dir(job.workdir, job.group_id)
  try:
    step = max(checkpoints.completed_steps(directory), default=0)
    where = f'step {step}'
  except OSError:
    where = 'their newest resume checkpoint'
  cli.tell(
      f'error: group {job.group_id} has lost one of its processes ({what});'
      f' start all of them again, they go on from {where}',
      error=True,
  )
  os._exit(cli.MAY_PASS)


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
