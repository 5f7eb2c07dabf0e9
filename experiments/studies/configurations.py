"""The configuration of each run of a study; and what study.json says of all."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files

from .. import cli
from . import study_plan as plan_lib
from .study_plan import Arm, PlannedRun, StudyPlan

# What the study says of each run, by the flag that changes it.
_OF_RUNS = {
    'RATE': '--rates',
    'Experiment.seed': '--seeds (of experiments.churn: --retrains)',
    'Experiment.data_seed': '--seeds (of experiments.churn: --retrains)',
    'Experiment.group_batch': '--worker_rows',
    'Checkpoints.mode': 'no flag: studies are in lockstep',
    'FixedTeachers.runs': 'no flag: they are those of the study',
}
# Statements that differ between the runs of one arm.
_OF_SEEDS = ('.seed', '.data_seed', 'FixedTeachers.runs')
# What cannot differ between the runs of one study.
_FIXED = ('study', 'scale', 'identity', 'data', 'replicas', 'platform')


class Configurations:
  """Parses what a run is made of: its scale, its arm, its seed and rate.

  Attributes:
    workdir: Of the study.
    plan: All runs.
  """

  def __init__(
      self,
      workdir: files.PathLike,
      plan: StudyPlan,
      bindings: Sequence[str] = (),
  ):
    """Parses nothing yet.

    Args:
      workdir: Of the study.
      plan: All runs.
      bindings: Of `--gin`, on top of all files and arms.
    """
    self.workdir = workdir
    self.plan = plan
    for binding in bindings:
      _check_free(binding, plan)
    self._bindings = tuple(bindings)

  def configure(self, run: PlannedRun) -> Experiment:
    """Makes the configuration of a run that of this process, and what it says.

    Raises:
      ValueError: If it cannot be made as configured.
    """
    self.parse(run)
    experiment = experiment_lib.in_lockstep(gin_utils.make(Experiment))
    weight = self.plan.arm(run.arm).weight
    return experiment if weight is None else _weighted(experiment, run, weight)

  def parse(self, run: PlannedRun) -> None:
    """Makes the configuration of a run that of this process."""
    plan, arm = self.plan, self.plan.arm(run.arm)
    rate, rows = self.rate(run), plan.group_batch(arm)
    of_run = [
        f'Experiment.seed={0 if arm.fixed == "parameters" else run.seed}',
        f'Experiment.data_seed={0 if arm.fixed == "order" else run.seed}',
    ]
    if rate is not None:
      of_run.append(f'RATE={rate!r}')
    if rows is not None:
      of_run.append(f'Experiment.group_batch={rows}')
    if arm.taught_by:
      teachers = plan_lib.run_dir(self.workdir, plan.teachers(run))
      of_run.append(f'FixedTeachers.runs=({str(teachers)!r},)')
    gin_utils.parse(
        [*plan.scale.gin_files, *arm.gin_files],
        [*of_run, *plan.scale.bindings, *arm.bindings, *self._bindings],
    )

  def rate(self, run: PlannedRun) -> float | None:
    """Returns the learning rate of a run; None: as the configuration has it."""
    plan, rates = self.plan, self.plan.scale.rates
    if run.rate is not None or not rates:
      return run.rate
    arm = plan.arm(run.arm)
    tuned = plan.arm(arm.tuned_as) if arm.tuned_as else arm
    if not plan.grid(tuned):
      return rates[0]
    return plan_lib.choose_rate(read_tuning(self.workdir, plan, tuned))


def shared_by_seeds() -> list[str]:
  """Returns the configuration of this process, but for what seeds differ in."""
  return [
      text
      for text in gin_utils.configuration()
      if not text.split(' = ')[0].endswith(_OF_SEEDS)
  ]


def read_tuning(
    workdir: files.PathLike, plan: StudyPlan, arm: Arm
) -> dict[float, dict[str, Any]]:
  """Returns the outcomes of the tuning runs of an arm that are done."""
  found = {}
  for rate in plan.grid(arm):
    run = PlannedRun(arm.name, plan_lib.TUNING_SEED, rate, True)
    outcome = plan_lib.read_outcome(workdir, run)
    if outcome is not None:
      found[rate] = outcome
  return found


def _check_free(binding: str, plan: StudyPlan) -> None:
  """Raises ValueError if a binding of `--gin` would be overridden, or worse."""
  name = '.'.join(binding.split('=')[0].strip().split('.')[-2:])
  free = {
      'RATE': not plan.scale.rates,
      'Experiment.group_batch': not plan.scale.worker_rows,
  }
  if name in _OF_RUNS and not free.get(name):
    last = name.split('.')[-1]
    raise ValueError(
        f'--gin={binding}: the study sets {last} of each run; change it by'
        f' {_OF_RUNS[name]}'
    )


def _weighted(
    experiment: Experiment, run: PlannedRun, weight: float
) -> Experiment:
  """Returns the experiment with another distill weight in the end."""
  made = dataclasses.replace(
      experiment,
      distill_weight=with_weight(
          experiment.distill_weight, weight, experiment.num_steps
      ),
  )
  exchange, steps = made.exchange, range(made.num_steps)
  if isinstance(exchange, Checkpoints) and not any(
      made.distill_weight(step) and exchange.asked(step) for step in steps
  ):
    raise ValueError(
        f'{run.name} would never have a teacher in {made.num_steps} steps: it'
        f' is no codistillation; Checkpoints.every={exchange.every} and'
        ' burn_in_steps must be shorter'
    )
  return made


def with_weight(
    schedule: Callable[[int], float], weight: float, num_steps: int
) -> Callable[[int], float]:
  """Returns the schedule with another weight at its end.

  Its burn-in and ramp stay.

  Raises:
    ValueError: If its weight is 0 at the end.
  """
  last = float(schedule(num_steps - 1))
  if not last:
    raise ValueError(
        'the distill weight of the configuration is 0 at its last step, so it'
        ' cannot be scaled to that of an arm; bind'
        ' schedules.distill_weight.weight to 1'
    )
  return lambda step: weight * (float(schedule(step)) / last)


# --- study.json --------------------------------------------------------------


def claim(configurations: Configurations, num_replicas: int) -> None:
  """Writes study.json, or checks that it is of this very study.

  More seeds and arms may be asked for later, and an arm of which no run is
  done may be corrected.

  Raises:
    ValueError: If the workdir holds a study of another configuration.
  """
  workdir, plan = configurations.workdir, configurations.plan
  ours = describe(configurations, num_replicas)
  path = plan_lib.study_path(workdir)
  theirs = files.read_json(path) or {}
  plan_lib.check_known(workdir, theirs)
  done = {
      run.arm: outcome
      for run in plan.runs()
      if (outcome := plan_lib.read_outcome(workdir, run)) is not None
  }
  if done:
    old, new = (_fixed_of(x, plan, done) for x in (theirs, ours))
    for arm, outcome in done.items():
      # Before it was on record, an arm's groups were not checked.
      num_groups = plan.arm(arm).num_groups
      old.append(f'groups of {arm}={outcome.get("num_groups", num_groups)}')
      new.append(f'groups of {arm}={num_groups}')
    run_directory.check_same_configuration(
        f'{os.fspath(workdir)} holds another study',
        old,
        new,
        'use another --workdir, or the first flags',
    )
  together = theirs.get('configurations', {}) | ours['configurations']
  files.write_json(path, {**ours, 'configurations': together})


def _fixed_of(
    described: Mapping[str, Any], plan: StudyPlan, arms: Mapping[str, Any]
) -> list[str]:
  """Returns what runs of these arms, which are done, were made with."""
  return [f'{key}={described.get(key)}' for key in _FIXED] + [
      f'{arm}: {statement}'
      for arm in arms
      for statement in described['configurations'].get(arm, ())
  ]


def describe(
    configurations: Configurations, num_replicas: int
) -> dict[str, Any]:
  """Returns what study.json says."""
  plan, by_arm = configurations.plan, {}
  for arm in plan.trained:
    configurations.parse(_any_run(plan, arm))
    # Of a grid each run says which of its rates it has.
    by_arm[arm.name] = [
        x for x in shared_by_seeds() if not (plan.scale.rates and _is_rate(x))
    ]
  baseline = plan.arm(plan.study.baseline)
  experiment = configurations.configure(_any_run(plan, baseline))
  model = gin_utils.call(experiment_lib.make_model, experiment)
  row = experiment_lib.first_row(experiment, baseline.num_groups)
  variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), row)
  count = sum(x.size for x in jax.tree.leaves(variables.params))
  labels = int(np.prod(np.shape(row['labels'])[1:]))
  task = experiment.task
  return {
      'study': plan.study.name,
      'scale': plan.scale_name,
      'configurations': by_arm,
      'identity': {k: str(v) for k, v in task.identity.items()},
      'data': task.description,
      'headline': ' '.join(map(gin_utils.headline, plan.scale.gin_files[:1])),
      'example': task.example_name,
      'examples_per_row': labels,
      'has_test_split': task.test_batches is not None,
      'num_groups': max(arm.num_groups for arm in plan.arms),
      'group_batch': experiment.group_batch,
      'num_steps': experiment.num_steps,
      'exchange_every': experiment.exchange.every,
      'publish_dtype': getattr(experiment.exchange, 'publish_dtype', 'float32'),
      'model': _name_of(experiment.model),
      'model_parameters': int(count),
      'replicas': num_replicas,
      'device': jax.devices()[0].device_kind,
      'platform': jax.devices()[0].platform,
      'cores': os.cpu_count() or 1,
      'command': os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
  }


def _is_rate(statement: str) -> bool:
  return statement.split(' = ')[0].endswith('RATE')


def _name_of(model: Any) -> str:
  """Returns module and name of what makes the model."""
  return f'{model.__module__.split(".")[-1]}.{model.__name__}'


def _any_run(plan: StudyPlan, arm: Arm) -> PlannedRun:
  return PlannedRun(arm.name, 0, 1.0 if plan.scale.rates else None, False)
