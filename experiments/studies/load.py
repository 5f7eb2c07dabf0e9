"""Reads what the runs of a study have written; numpy only.

Shape suffix: N evaluations of a run.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codistill_jax import run_directory
from codistill_jax.storage import files
from experiments import report_data
from experiments.studies import communication
from experiments.studies import plan as plan_lib
from experiments.studies.declaration import Arm
from experiments.studies.plan import Plan, PlannedRun
from experiments.studies.results import Run, Setting

_BYTES = {'float32': 4, 'bfloat16': 2}


def load(workdir: files.PathLike, plan: Plan) -> tuple[Setting, list[Run]]:
  """The runs of a study that are done, and what they have in common.

  Raises:
    FileNotFoundError: If there is no study, or nothing of it is done.
  """
  settings = files.read_json(plan_lib.study_path(workdir))
  if settings is None:
    raise FileNotFoundError(
        f'{os.fspath(workdir)} holds no study; train it first, without'
        ' --report_only'
    )
  runs: dict[PlannedRun, Run] = {}
  seconds = 0.0
  for planned in plan.runs():
    outcome = plan_lib.read_outcome(workdir, planned)
    if outcome is not None:
      found = _read_run(workdir, plan, planned, outcome, settings)
      runs[planned] = _with_teachers(found, plan, planned, runs)
      seconds += found.seconds
  if not runs:
    raise FileNotFoundError(
        f'no run of {os.fspath(workdir)} is done; start it again, without'
        ' --report_only'
    )
  ensembles = [
      _ensemble(workdir, arm, planned, run)
      for arm in plan.arms
      if arm.ensemble_of
      for planned, run in runs.items()
      if planned.arm == arm.ensemble_of and not planned.tuning
  ]
  found = [*runs.values(), *(run for run in ensembles if run is not None)]
  return _setting(settings, plan, seconds), found


def _read_run(
    workdir: files.PathLike,
    plan: Plan,
    planned: PlannedRun,
    outcome: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Run:
  arm = plan.arm(planned.arm)
  directory = plan_lib.run_dir(workdir, planned)
  groups = _groups(directory, arm)
  losses = report_data.mean_curve([g.curve('eval/loss') for g in groups])
  accuracies = report_data.mean_curve(
      [g.curve('eval/accuracy') for g in groups]
  )
  return Run(
      arm=arm.name,
      seed=planned.seed,
      rate=_number(outcome['rate']),
      tuning=planned.tuning,
      steps_N=losses.steps,
      loss_N=losses.values,
      accuracy_N=accuracies.values,
      examples_per_step=outcome['examples_per_step'],
      flops_N=sum(_flops(g, losses.steps) for g in groups),
      bytes_N=losses.steps * _bytes_per_step(arm, outcome, settings),
      diverged_at=outcome['diverged_at'],
      seconds=sum(report_data.training_seconds(g) for g in groups),
  )


def _groups(directory: files.PathLike, arm: Arm) -> list[report_data.Group]:
  paths = (
      run_directory.metrics_path(directory, group_id)
      for group_id in range(arm.num_groups)
  )
  return [
      report_data.Group(i, run_directory.read_metrics(path))
      for i, path in enumerate(paths)
      if path.exists()
  ]


def _flops(group: report_data.Group, steps_N: np.ndarray) -> np.ndarray:
  """FLOPs until each evaluation, from those on record of the steps before."""
  curve = group.curve('perf/model_flops_per_step')
  if not curve:
    return np.full(len(steps_N), np.nan)
  spent = np.cumsum(np.diff(curve.steps, prepend=0) * curve.values)
  return np.interp(steps_N, np.append(0, curve.steps), np.append(0.0, spent))


def _bytes_per_step(
    arm: Arm, outcome: Mapping[str, Any], settings: Mapping[str, Any]
) -> float:
  return communication.bytes_per_update(
      arm.communication,
      _BYTES[settings['publish_dtype']] * settings['model_parameters'],
      workers=arm.workers,
      exchange_every=outcome['exchange_every'],
      peers=outcome['peers'],
      outer_every=outcome['outer_every'],
  )


def _with_teachers(
    run: Run,
    plan: Plan,
    planned: PlannedRun,
    runs: Mapping[PlannedRun, Run],
) -> Run:
  """With what its teachers have cost before it began."""
  if not plan.arm(planned.arm).taught_by:
    return run
  teachers = runs.get(plan.teachers(planned))
  if teachers is None or not len(teachers.steps_N):
    return run
  num_teachers = plan.arm(teachers.arm).num_groups
  return run._replace(
      prior_steps=float(num_teachers * teachers.steps_N[-1]),
      prior_flops=float(teachers.flops_N[-1]),
  )


def _ensemble(
    workdir: files.PathLike, arm: Arm, planned: PlannedRun, run: Run
) -> Run | None:
  """What the groups of a run would do together; None if nobody looked."""
  path = plan_lib.ensemble_path(plan_lib.run_dir(workdir, planned))
  if not path.exists():
    return None
  group = report_data.Group(0, run_directory.read_metrics(path))
  losses = group.curve('eval/loss')
  at = np.isin(run.steps_N, losses.steps)
  return run._replace(
      arm=arm.name,
      steps_N=losses.steps,
      loss_N=losses.values,
      accuracy_N=group.curve('eval/accuracy').values,
      flops_N=run.flops_N[at],
      bytes_N=run.bytes_N[at],
      seconds=float('nan'),
  )


def _setting(
    settings: Mapping[str, Any], plan: Plan, seconds: float
) -> Setting:
  on_cpu = settings['platform'] == 'cpu'
  per_row = settings['examples_per_row']
  example = settings['example']
  rates = plan.scale.rates
  return Setting(
      data=settings['data'],
      example=example,
      rows=f'{per_row} {example}s' if per_row > 1 else '',
      group_batch=settings['group_batch'],
      num_steps=settings['num_steps'],
      exchange_every=settings['exchange_every'],
      replicas=settings['replicas'],
      model_parameters=settings['model_parameters'],
      model=settings['model'],
      bytes_of_model=_BYTES[settings['publish_dtype']]
      * settings['model_parameters'],
      cores=settings['cores'] if on_cpu else 0,
      device=settings['device'],
      command=settings['command'],
      scale=plan.scale_name,
      seeds=plan.scale.seeds,
      rates=rates,
      selection=_selection(rates),
      minutes=seconds / 60,
  )


def _selection(rates: Sequence[float]) -> str:
  if len(rates) > 1:
    return (
        'For each arm, the rate of the grid with the lowest validation loss at'
        ' the end (mean of the last three evaluations, over groups) of a run'
        ' with one further seed, of which nothing else is reported.'
    )
  return 'The same learning rate in all arms; nothing was tuned.'


def _number(value: float | None) -> float:
  return float('nan') if value is None else value
