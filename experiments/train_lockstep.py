r"""Trains all groups in one process, in lockstep, through memory.

For small models and studies: the result is a function of the configuration
alone, bit for bit the one of `train_group` in lockstep mode. Or, with
Experiment.exchange='predictions', as one program whose groups see the same
batches and learn from each other's predictions of them.

    python -m experiments.train_lockstep --workdir=runs/two --num_groups=2 \
        --gin_file=gin_configs/tasks/bible_lm.gin
"""

import dataclasses
import os
from collections.abc import Sequence

from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils
from codistill_jax.exchange.protocol import peers_of
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Troubles
from experiments import claims, cli, devices, driver, lockstep
from experiments.job import Job
from experiments.stopping import Rescue, StopRequest
from experiments.watch import group_writer

flags.adopt_module_key_flags(gin_utils)

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory.', required=True)
_NUM_GROUPS = flags.DEFINE_integer('num_groups', 2, 'Groups of the run.')
_REPLICAS = flags.DEFINE_integer(
    'replicas',
    0,
    'Devices to use, by every group in turn; 0 means all. On a machine without'
    ' accelerator that many fake CPU devices are made. With'
    " exchange='predictions' groups are spread over further devices, if any.",
)
_ARM = flags.DEFINE_string(
    'arm', '', 'Name of the run in reports; default: the name of --workdir.'
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the configuration and stop; write nothing.'
)


def main(argv: Sequence[str]) -> None:
  del argv
  num_groups = _NUM_GROUPS.value
  peers_of(0, num_groups)  # Raises if there are too few.
  workdir = os.fspath(checkpoints.absolute(_WORKDIR.value))
  stop = StopRequest(Rescue(cli.NOT_BEGUN)).install()
  latch = lockstep.Latch(stop)
  gin_utils.parse_flags()
  devices.use_replicas(_REPLICAS.value)
  experiment = dataclasses.replace(
      gin_utils.make(experiment_lib.Experiment), exchange_mode='lockstep'
  )
  model = gin_utils.call(experiment_lib.make_model, experiment)
  train_steps, shared_stream = lockstep.train_steps_of(
      experiment, model, num_groups, _REPLICAS.value
  )
  jobs = [
      Job(
          experiment=experiment,
          model=model,
          train_step=train_steps[group_id],
          workdir=workdir,
          group_id=group_id,
          num_groups=num_groups,
          stop=latch,
          rescue=stop.rescue,
          troubles=Troubles(f'group {group_id}: '),
          arm=_ARM.value,
          shared_stream=shared_stream,
      )
      for group_id in range(num_groups)
  ]
  start = driver.new_state(jobs[0])
  if _DRY_RUN.value:
    claims.print_dry_run(jobs[0], start.state)
    return
  claims.check_workdir(jobs[0], start.state)
  lockstep.keep_common_checkpoints(jobs)
  exchanges = lockstep.exchanges_of(jobs, start)
  del start
  lockstep.train_in_turn(
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
      f'all groups have reached step {experiment.num_steps}; see {workdir}'
  )


if __name__ == '__main__':
  cli.run(main)
