r"""Trains one group of a codistillation run: the production entry point.

Start one per group, on whatever machines see the same --workdir:

    python -m experiments.train_group --workdir=runs/two --num_groups=2 \
        --group_id=0 --gin_file=gin_configs/tasks/bible_lm.gin

The same command again goes on from the last resume checkpoint. A group of
several processes is one command per process: with --num_processes=0 under
SLURM, Open MPI, a JobSet or on a TPU pod, or with --coordinator,
--num_processes and --process_id.
"""

import functools
import os
import sys
from collections.abc import Sequence

from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, replicas, run_directory
from codistill_jax.exchange.plan import peers_of
from codistill_jax.storage.background import Troubles

from . import cli
from .running import driver
from .running import job as job_lib
from .running.job import Job, check_workdir, print_dry_run
from .running.watch import group_writer

_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  cli.define_run_flags(num_groups=1)
  cli.define_process_flags()
  flags.DEFINE_integer('group_id', 0, 'This group, from 0 to --num_groups - 1.')
  flags.DEFINE_string(
      'coordinator',
      '',
      'host:port of process 0, for a group of several processes.',
  )
  flags.DEFINE_integer(
      'num_processes',
      1,
      'Processes of this group. 0: those that SLURM, Open MPI, a JobSet or a'
      ' TPU pod has started together; they need no --coordinator and no'
      ' --process_id.',
      lower_bound=0,
  )
  flags.DEFINE_integer(
      'process_id', 0, 'This process, from 0 to --num_processes - 1.'
  )
  flags.DEFINE_integer(
      'heartbeat_seconds',
      20,
      'In a group of several processes: how long one may give no sign of life'
      ' before jax aborts the others; start all of them again then.',
      lower_bound=2,
  )


def main(argv: Sequence[str]) -> None:
  del argv
  peers_of(_FLAGS.group_id, _FLAGS.num_groups)  # Raises if out of range.
  stop = cli.StopRequest(cli.STOPPED, _FLAGS.grace_seconds).install()
  cli.keep_programs(_FLAGS.compile_cache)
  if not _FLAGS['num_processes'].present:
    _warn_of_several()
  gin_utils.parse_flags()
  job_lib.use_replicas(_FLAGS.replicas)
  if _FLAGS.num_processes != 1:
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
          experiment, model, job_lib.chosen_devices(_FLAGS.replicas)
      ),
      workdir=_FLAGS.workdir,
      group_id=_FLAGS.group_id,
      num_groups=_FLAGS.num_groups,
      agreement=replicas.agreement(),
      stop=stop,
      troubles=Troubles(f'group {_FLAGS.group_id}: '),
      arm=_FLAGS.arm,
      init_from=_FLAGS.init_from,
      profile=_FLAGS.profile_steps or range(0),
      exchange_dir=_FLAGS.exchange_dir,
  )
  start = driver.new_state(job)
  if not _FLAGS.dry_run:
    check_workdir(job, start.state)
  driver.check_start(job, start)
  if _FLAGS.dry_run:
    print_dry_run(job, start.state)
    return
  del start
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
        f' see {run_directory.group_dir(_FLAGS.workdir, job.group_id)}'
    )


def _join_processes() -> None:
  if not _FLAGS.num_processes:
    if _FLAGS.coordinator or _FLAGS['process_id'].present:
      raise ValueError(
          '--num_processes=0 finds out the others: leave out --coordinator and'
          ' --process_id, or give --num_processes too'
      )
    replicas.start_processes(
        group_id=_FLAGS.group_id, heartbeat_seconds=_FLAGS.heartbeat_seconds
    )
    return
  if not _FLAGS.coordinator:
    raise ValueError(
        f'--num_processes={_FLAGS.num_processes} needs --coordinator=host:port'
        ' of process 0'
    )
  if not 0 <= _FLAGS.process_id < _FLAGS.num_processes:
    raise ValueError(
        f'--process_id={_FLAGS.process_id} is out of range: with'
        f' --num_processes={_FLAGS.num_processes} it lies in'
        f' 0..{_FLAGS.num_processes - 1}'
    )
  replicas.start_processes(
      _FLAGS.coordinator,
      _FLAGS.num_processes,
      _FLAGS.process_id,
      heartbeat_seconds=_FLAGS.heartbeat_seconds,
  )


def _warn_of_several() -> None:
  """Warns where processes look like one group, and nothing makes them one."""
  started = {
      os.environ.get(name, '1')
      for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  } - {'1'}
  for number in started:
    cli.tell(
        f'warning: {number} processes were started together, and each is a'
        ' group by itself; --num_processes=0 makes them one group, and'
        ' --num_processes=1 says that this is meant',
        error=True,
    )


def _main_of_a_process(argv: Sequence[str]) -> None:
  """Ends a process of several at once when it fails.

  A plain exit would wait at a barrier for processes that wait for this one.
  """
  if _FLAGS.num_processes == 1:
    main(argv)
    return
  status = cli.status_of(main, argv)
  if status:
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
  define_flags()
  cli.run(_main_of_a_process)
