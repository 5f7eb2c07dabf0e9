"""What a run directory says of its run, and who may go on with it."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from codistill_jax import gin_utils, run_directory
from codistill_jax.base import TrainState
from codistill_jax.exchange.fixed_teachers import Source
from codistill_jax.experiment import teacher_sources
from codistill_jax.storage import files
from experiments import cli
from experiments.job import Job


def describe_run(job: Job, state: TrainState) -> dict[str, Any]:
  """What run.json says; see `run_directory.write_run`."""
  experiment = job.experiment
  sizes = [x.size for x in jax.tree.leaves(state.variables.params)]
  every, mode = experiment.exchange_every, experiment.exchange_mode
  if experiment.exchange != 'checkpoints':
    every = 1 if experiment.exchange == 'predictions' else None
    mode = experiment.exchange
  sources = teacher_sources(experiment)
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
      'exchange_every': every,
      'mode': mode,
      **(_first_phase(sources) if sources else {}),
      'example': experiment.task.example_name,
      'data': experiment.task.description,
      'model_parameters': int(sum(sizes)),
      'command': os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
      'configuration': job.configuration().bindings,
  }


def _first_phase(sources: Sequence[Source]) -> dict[str, Any]:
  """What was spent on the teachers before the first step of this run."""
  workdirs = {os.fspath(source.workdir): [] for source in sources}
  for source in sources:
    workdirs[os.fspath(source.workdir)].append(source.step)
  # Teachers may have been taught so themselves.
  before = [run_directory.read_run(w).get('prior_steps', 0) for w in workdirs]
  return {
      'teacher_runs': [
          {'workdir': workdir, 'steps': steps}
          for workdir, steps in workdirs.items()
      ],
      'prior_steps': sum(source.step for source in sources) + sum(before),
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
  ours, theirs = now['configuration'], before.get('configuration', [])
  if before.get('num_groups') != now['num_groups']:
    differing = (
        f'num_groups={before.get("num_groups")}',
        f'num_groups={now["num_groups"]}',
    )
  elif ours != theirs:
    differing = (
        next((s for s in theirs if s not in ours), 'no such binding'),
        next((s for s in ours if s not in theirs), 'no such binding'),
    )
  else:
    return
  raise ValueError(
      f'{workdir} holds a run of another configuration: it has {differing[0]},'
      f' this one has {differing[1]}; use another --workdir, or the first'
      ' configuration'
  )
