r"""Trains all groups in one process, in lockstep, through memory.

For small models and studies: the result is a function of the configuration
alone, bit for bit the one of `train_group` in lockstep mode. Or, with
Experiment.exchange=@exchange.Predictions(), as one program whose groups see the
same batches and learn from each other's predictions of them.

    python -m experiments.train_lockstep --workdir=runs/two --num_groups=2 \
        --gin_file=gin_configs/tasks/bible_lm.gin
"""

from collections.abc import Sequence

from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils
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
  cli.define_run_flags(num_groups=2)
  cli.define_process_flags()


def main(argv: Sequence[str]) -> None:
  del argv
  num_groups = _FLAGS.num_groups
  stop = cli.StopRequest(cli.STOPPED, _FLAGS.grace_seconds).install()
  latch = job_lib.Latch(stop)
  cli.keep_programs(_FLAGS.compile_cache)
  gin_utils.parse_flags()
  job_lib.use_replicas(_FLAGS.replicas)
  experiment = experiment_lib.in_lockstep(
      gin_utils.make(experiment_lib.Experiment)
  )
  model = gin_utils.call(experiment_lib.make_model, experiment)
  train_steps, shared_stream = job_lib.train_steps_of(
      experiment, model, num_groups, _FLAGS.replicas
  )
  jobs = [
      Job(
          experiment=experiment,
          model=model,
          train_step=train_steps[group_id],
          workdir=_FLAGS.workdir,
          group_id=group_id,
          num_groups=num_groups,
          stop=latch,
          troubles=Troubles(f'group {group_id}: '),
          arm=_FLAGS.arm,
          init_from=_FLAGS.init_from,
          exchange_dir=_FLAGS.exchange_dir,
          shared_stream=shared_stream,
          # One trace has all that a process does.
          profile=range(0) if group_id else _FLAGS.profile_steps or range(0),
      )
      for group_id in range(num_groups)
  ]
  start = driver.new_state(jobs[0])
  if not _FLAGS.dry_run:
    check_workdir(jobs[0], start.state)
  driver.check_start(jobs[0], start)
  if _FLAGS.dry_run:
    print_dry_run(jobs[0], start.state)
    return
  job_lib.keep_common_checkpoints(jobs)
  exchanges = experiment.exchange.join_all(
      jobs[0], start.state.variables, start.examples
  )
  del start
  job_lib.train_in_turn(
      [
          driver.train(
              job,
              lambda variables, exchange=exchange: exchange,
              group_writer(job, progress=True),
          )
          for job, exchange in zip(jobs, exchanges)
      ],
      latch,
  )
  cli.tell(
      f'all groups have reached step {experiment.num_steps}; see'
      f' {_FLAGS.workdir}'
  )


if __name__ == '__main__':
  define_flags()
  cli.run(main)
