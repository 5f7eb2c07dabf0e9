"""The configuration of each run of a study; and what study.json says of all."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
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
from .study_plan import PlannedRun, StudyPlan

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
  """Parses what a run is made of: its scale, its arm, its seed and rate."""

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
    arm = self.plan.arm(run.arm)
    if arm.weight is None and arm.communication != 'exchange':
      return experiment
    return _codistilled(experiment, run, arm.weight)

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
    tuning = plan.tuning(plan.tuned(plan.arm(run.arm)))
    if not tuning:
      return rates[0]
    return plan_lib.choose_rate(
        {r.rate: plan_lib.read_outcome(self.workdir, r) for r in tuning}
    )


def shared_by_seeds() -> list[str]:
  """Returns the configuration of this process, but for what seeds differ in."""
  return [
      text
      for text in gin_utils.configuration()
      if not text.split(' = ')[0].endswith(_OF_SEEDS)
  ]


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


def _codistilled(
    experiment: Experiment, run: PlannedRun, weight: float | None
) -> Experiment:
  """Returns the experiment with another distill weight in the end, if any.

  The burn-in and the ramp of its schedule stay.
  """
  schedule, exchange = experiment.distill_weight, experiment.exchange
  steps = range(experiment.num_steps)
  if isinstance(exchange, Checkpoints) and not any(
      schedule(step) and exchange.asked(step) for step in steps
  ):
    said = [f'Checkpoints.every = {exchange.every}'] + [
        statement
        for statement in gin_utils.configuration()
        if 'distill_weight.' in statement
    ]
    raise ValueError(
        f'{run.name} would have no teacher in any of its {len(steps)} steps'
        f' ({", ".join(said)}): it is no codistillation; shorten the burn-in'
        ' and the interval, and set the weight above 0'
    )
  if weight is None:
    return experiment
  last = float(schedule(steps[-1]))
  if not last:
    raise ValueError(
        f'{run.name}: the distill weight is 0 at step {steps[-1]}, the last, so'
        ' it cannot be scaled to that of an arm; let it end above 0'
    )
  return dataclasses.replace(
      experiment,
      distill_weight=lambda step: weight * (float(schedule(step)) / last),
  )


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
  rate = 1.0 if plan.scale.rates else None  # Whatever it will be.
  for arm in plan.trained:
    # What cannot work is said before anything is trained.
    experiment = configurations.configure(PlannedRun(arm.name, 0, rate))
    for group_id in range(0 if arm.taught_by else arm.num_groups):
      experiment.exchange.num_teachers(group_id, arm.num_groups)
    # Of a grid each run says which of its rates it has.
    by_arm[arm.name] = [
        x
        for x in shared_by_seeds()
        if not (plan.scale.rates and x.split(' = ')[0].endswith('RATE'))
    ]
  baseline = plan.arm(plan.study.baseline)
  experiment = configurations.configure(PlannedRun(baseline.name, 0, rate))
  model = gin_utils.call(experiment_lib.make_model, experiment)
  row = experiment_lib.first_row(experiment, baseline.num_groups)
  variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), row)
  count = sum(x.size for x in jax.tree.leaves(variables.params))
  labels = int(np.prod(np.shape(row['labels'])[1:]))
  task, made_by = experiment.task, experiment.model
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
      'num_groups': max(arm.num_groups for arm in plan.study.arms),
      'group_batch': experiment.group_batch,
      'num_steps': experiment.num_steps,
      'exchange_every': experiment.exchange.every,
      'publish_dtype': getattr(experiment.exchange, 'publish_dtype', 'float32'),
      'model': f'{made_by.__module__.split(".")[-1]}.{made_by.__name__}',
      'model_parameters': int(count),
      'replicas': num_replicas,
      'device': jax.devices()[0].device_kind,
      'platform': jax.devices()[0].platform,
      'cores': os.cpu_count() or 1,
      'command': os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
  }
