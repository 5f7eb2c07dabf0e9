"""Jobs: one group of one run, its configuration and its run.json."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from codistill_jax import gin_utils, one_program, replicas, run_directory
from codistill_jax.base import (
    ALONE,
    Agreement,
    Model,
    Stream,
    TrainState,
    Variables,
)
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    Patience,
    Troubles,
)

from .. import cli


def _ignore(group_id: int, step: int, variables: Variables) -> None:
  del group_id, step, variables


@dataclasses.dataclass(frozen=True)
class Job:
  """One group of one run.

  Attributes:
    experiment: The configuration.
    model: Its model.
    train_step: On the replicas of this group.
    workdir: The run directory.
    group_id: This group.
    num_groups: G.
    agreement: How the processes of this group decide together.
    stop: True once the process was asked to stop; it also knows what would be
      lost.
    troubles: What this group cannot do at the moment, such as saving.
    patience: How long a disk is waited for.
    arm: Name of the run in reports; '' for the name of the workdir.
    shared_stream: The batches of all groups, if these update together; each
      then yields once before its first update, so that all have begun.
    configuration: Gives what run.json and config.gin say that was configured;
      of a process that trains several runs at once, that of this one.
    evaluated: Called with the group, the step and the variables after each
      evaluation, and once more if the run goes on from there; they are intact
      until the group's next update.
  """

  experiment: Experiment
  model: Model
  train_step: replicas.PmapStep | one_program.Seat
  workdir: str
  group_id: int
  num_groups: int
  agreement: Agreement = ALONE
  stop: cli.StopRequest = dataclasses.field(default_factory=cli.StopRequest)
  troubles: Troubles = dataclasses.field(default_factory=Troubles)
  patience: Patience = DEFAULT_PATIENCE
  arm: str = ''
  shared_stream: Stream | None = None
  configuration: Callable[[], gin_utils.Configuration] = gin_utils.current
  evaluated: Callable[[int, int, Variables], None] = _ignore

  @property
  def directory(self) -> str:
    """Returns the directory of the group."""
    return os.fspath(run_directory.group_dir(self.workdir, self.group_id))

  @property
  def identity(self) -> dict[str, str]:
    return {k: str(v) for k, v in self.experiment.task.identity.items()}


def describe_run(job: Job, state: TrainState) -> dict[str, Any]:
  """Returns the content of run.json; see `run_directory.write_run`."""
  experiment = job.experiment
  sizes = [x.size for x in jax.tree.leaves(state.variables.params)]
  simulated = experiment.simulated_replicas
  burn_in = (
      n for n in range(experiment.num_steps) if experiment.distill_weight(n)
  )
  return {
      'arm': job.arm or os.path.basename(os.path.normpath(job.workdir)),
      'num_groups': job.num_groups,
      'replicas': job.train_step.num_replicas,
      # Few runs simulate any: the others do not speak of it.
      'simulated_replicas': simulated if simulated > 1 else None,
      'group_batch': experiment.group_batch,
      'seed': experiment.seed,
      'num_steps': experiment.num_steps,
      'burn_in_steps': next(burn_in, experiment.num_steps),
      **experiment.exchange.describe(),
      'example': experiment.task.example_name,
      'data': experiment.task.description,
      'model_parameters': int(sum(sizes)),
      'command': os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
      'configuration': job.configuration().bindings,
  }


def print_dry_run(job: Job, state: TrainState) -> None:
  """Prints what would be trained."""
  gin_utils.check_no_dead_bindings()
  print(gin_utils.operative_configuration())
  run = describe_run(job, state)
  print(
      f'{run["model_parameters"]:,} parameters; {run["num_groups"]} groups of'
      f' {run["replicas"]} replicas; dry run, nothing written'
  )


def check_workdir(job: Job, state: TrainState) -> None:
  """Raises ValueError if the workdir holds a run of another configuration."""
  before = run_directory.read_run(job.workdir)
  if before:
    _check_same_run(job.workdir, before, describe_run(job, state))


def claim_workdir(job: Job, state: TrainState) -> None:
  """Writes run.json and config.gin, once; after the first update.

  Not before: a mistake that the first update brings out would leave a workdir
  that refuses the corrected configuration.

  Raises:
    ValueError: If the run directory belongs to another configuration.
  """
  if not job.agreement.is_primary:
    return
  if not run_directory.read_run(job.workdir):
    run_directory.write_run(job.workdir, describe_run(job, state))
  # Read again: another group may have claimed it at the same moment.
  check_workdir(job, state)
  config = run_directory.config_path(job.workdir)
  if not config.exists():
    files.write_bytes(config, job.configuration().operative.encode())


def _check_same_run(workdir: str, before: dict, now: dict) -> None:
  theirs, ours = (
      [f'num_groups={run.get("num_groups")}', *run.get('configuration', [])]
      for run in (before, now)
  )
  run_directory.check_same_configuration(
      f'{workdir} holds a run of another configuration',
      theirs,
      ours,
      'use another --workdir, or the first configuration',
  )
