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
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, joint, run_directory
from codistill_jax.base import Model, Stream
from codistill_jax.exchange.memory_exchange import Mirror, memory_exchanges
from codistill_jax.exchange.prediction_exchange import PredictionExchange
from codistill_jax.exchange.protocol import Exchange, peers_of
from codistill_jax.predictions import bytes_per_example, mixing_matrix
from codistill_jax.replicas import PmapStep
from codistill_jax.storage import trees
from codistill_jax.storage.checkpoint import Checkpoints
from codistill_jax.storage.troubles import Troubles
from experiments import claims, cli, devices, driver
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
  workdir = os.fspath(trees.absolute(_WORKDIR.value))
  stop = StopRequest(Rescue(cli.NOT_BEGUN)).install()
  latch = Latch(stop)
  gin_utils.parse_flags()
  devices.use_replicas(_REPLICAS.value)
  experiment = dataclasses.replace(
      gin_utils.make(experiment_lib.Experiment), exchange_mode='lockstep'
  )
  model = gin_utils.call(experiment_lib.make_model, experiment)
  train_steps, shared_stream = train_steps_of(
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
  keep_common_checkpoints(jobs)
  exchanges = exchanges_of(jobs, start)
  del start
  train_in_turn(
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


def train_steps_of(
    experiment: experiment_lib.Experiment,
    model: Model,
    num_groups: int,
    num_replicas: int,
) -> tuple[Sequence[PmapStep | joint.Seat], Stream | None]:
  """What updates each group; and the stream of all, if they update together."""
  chosen = devices.chosen_devices(num_replicas)
  if experiment.exchange == 'checkpoints':
    step = experiment_lib.make_replicated_step(experiment, model, chosen)
    return [step] * num_groups, None  # Compiled once for all.
  if num_groups < 2:
    raise ValueError(
        "Experiment.exchange='predictions' with --num_groups=1: there is nobody"
        ' to exchange with; set --num_groups to at least 2, or'
        " exchange='checkpoints' for a baseline"
    )
  population = experiment_lib.make_population(
      experiment,
      model,
      num_groups,
      num_replicas=num_replicas or jax.local_device_count(),
  )
  plan = experiment.plan
  peers = [
      plan.peers_of(group_id, num_groups) for group_id in range(num_groups)
  ]
  update = joint.JointUpdate(
      population, mixing_matrix(peers), experiment.prediction_top_k
  )
  stream = experiment_lib.train_stream(experiment, 0, num_groups)
  return update.seats, joint.SharedStream(stream)


def exchanges_of(
    jobs: Sequence[Job], start: driver.Start
) -> Sequence[Exchange]:
  """The exchange of each group, through memory."""
  job = jobs[0]
  experiment, num_groups = job.experiment, job.num_groups
  if experiment.exchange == 'checkpoints':
    return memory_exchanges(
        num_groups,
        plan=experiment.plan,
        mirror=Mirror(
            run_directory.exchange_root(job.workdir),
            start.state.variables,
            job.identity,
        ),
    )
  size = bytes_per_example(
      experiment.task.num_classes,
      experiment.prediction_top_k,
      experiment.task.output,
  )
  return [
      PredictionExchange(
          group_id,
          num_groups,
          experiment.plan,
          top_k=experiment.prediction_top_k,
          bytes_to_peer=start.examples * size,
      )
      for group_id in range(num_groups)
  ]


class Latch:
  """A stop request that all groups of a round see alike."""

  def __init__(self, request: StopRequest):
    self._request = request
    self._stop = False

  def __call__(self) -> bool:
    # Asked only now, and not in `update`: until a group is about to save, the
    # main thread may be stuck in an update, and others have to save for it.
    return self._stop and self._request()

  def update(self) -> None:
    self._stop = self._request.signal_number is not None

  @property
  def signal_number(self) -> int | None:
    return self._request.signal_number


def train_in_turn(groups: Sequence[Iterator[int]], latch: Latch) -> None:
  """Steps all groups, one update each, until all are done."""
  running = list(groups)
  while running:
    latch.update()
    stopped = None
    for group in list(running):
      try:
        next(group)
      except StopIteration:
        running.remove(group)
      except cli.Stopped as e:
        stopped = e  # The others save at this step too.
    if stopped is not None:
      raise stopped


def keep_common_checkpoints(jobs: Sequence[Job]) -> None:
  """All groups restart at one step: the newest that all of them have."""
  stores = [
      Checkpoints(run_directory.checkpoints_dir(job.workdir, job.group_id))
      for job in jobs
  ]
  steps = [set(store.steps()) for store in stores]
  common = set.intersection(*steps)
  if all(steps) and not common:
    raise ValueError(
        f'the groups of {jobs[0].workdir} have no step in common among their'
        ' resume checkpoints; use another --workdir to start again'
    )
  start = max(common, default=-1)
  for job, store in zip(jobs, stores):
    if store.newest_step not in (None, start):
      # It goes back with the others, also if it had reached its last step.
      run_directory.done_path(job.workdir, job.group_id).unlink(missing_ok=True)
      store.discard_after(start)
    store.close()


if __name__ == '__main__':
  cli.run(main)
