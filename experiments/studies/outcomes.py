"""Reads what the runs of a study have written; numpy only.

Shape suffix: N evaluations of a run.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codistill_jax import run_directory
from codistill_jax.storage import files

from ..reports import run_records
from . import costs
from . import study_plan as plan_lib
from .analysis import Run
from .study_plan import Arm, PlannedRun, StudyPlan

_BYTES = {'float32': 4, 'bfloat16': 2}


def load(
    workdir: files.PathLike, plan: StudyPlan
) -> tuple[dict[str, Any], list[Run]]:
  """Reads the runs that are done, and what they have in common.

  Returns:
    What study.json says (see `configurations`), with `bytes_of_model` (of one
    publication), `seeds` and `rates` of the plan, how many of its `runs` are
    `done`, and `minutes` of all of them; and the runs.

  Raises:
    FileNotFoundError: If there is no study, or nothing of it is done.
  """
  settings = files.read_json(plan_lib.study_path(workdir))
  if settings is None:
    raise FileNotFoundError(
        f'{os.fspath(workdir)} holds no study; train it first, without'
        ' --report_only'
    )
  plan_lib.check_known(workdir, settings)
  for key, ours in (('study', plan.study.name), ('scale', plan.scale_name)):
    if settings[key] != ours:
      raise ValueError(
          f'{os.fspath(workdir)} holds a study with {key} {settings[key]!r},'
          f' not {ours!r}; give --{key}={settings[key]}'
      )
  size = _BYTES[settings['publish_dtype']] * settings['model_parameters']
  settings = {
      **settings,
      'bytes_of_model': size,
      'seeds': plan.scale.seeds,
      'rates': plan.scale.rates,
      'runs': len(plan.runs()),
  }
  runs: dict[PlannedRun, Run] = {}
  for planned in plan.runs():
    outcome = plan_lib.read_outcome(workdir, planned)
    if outcome is not None:
      found = _read_run(workdir, plan, planned, outcome, settings)
      runs[planned] = _with_teachers(found, plan, planned, runs)
  _check_rates(workdir, runs)
  if not runs:
    raise FileNotFoundError(
        f'no run of {os.fspath(workdir)} is done; start it again, without'
        ' --report_only'
    )
  ensembles = [
      _ensemble(workdir, arm, planned, run)
      for arm in plan.study.arms
      if arm.ensemble_of
      for planned, run in runs.items()
      if planned.arm == arm.ensemble_of and not planned.tuning
  ]
  found = [*runs.values(), *(run for run in ensembles if run is not None)]
  seconds = sum(run.seconds for run in runs.values())
  return {**settings, 'done': len(runs), 'minutes': seconds / 60}, found


def _check_rates(
    workdir: files.PathLike, runs: Mapping[PlannedRun, Run]
) -> None:
  """Raises ValueError if more rates have changed the choice of an arm."""
  of_arm: dict[str, set[float]] = {}
  for planned, run in runs.items():
    if not planned.tuning and math.isfinite(run.rate):
      of_arm.setdefault(planned.arm, set()).add(run.rate)
  for arm, rates in of_arm.items():
    if len(rates) > 1:
      raise ValueError(
          f'{os.fspath(workdir)} holds runs of arm {arm} at learning rates'
          f' {" and ".join(f"{x:g}" for x in sorted(rates))}, as --rates was'
          f' changed between them; delete runs/{arm}/seed_* and train again'
      )


def _read_run(
    workdir: files.PathLike,
    plan: StudyPlan,
    planned: PlannedRun,
    outcome: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Run:
  arm = plan.arm(planned.arm)
  directory = plan_lib.run_dir(workdir, planned)
  groups = [
      run_records.read_group(path, group_id)
      for group_id in range(arm.num_groups)
      if files.exists(path := run_directory.metrics_path(directory, group_id))
  ]
  losses = run_records.mean_curve(g.curve('eval/loss') for g in groups)
  accuracies = run_records.mean_curve(g.curve('eval/accuracy') for g in groups)
  steps_N = losses.index.to_numpy()
  # Between outer steps nobody has the mean of the workers.
  at_N = steps_N % outcome.get('outer_every', 1) == 0
  steps_N = steps_N[at_N]
  return Run(
      arm=arm.name,
      seed=planned.seed,
      rate=float('nan') if outcome['rate'] is None else outcome['rate'],
      tuning=planned.tuning,
      steps_N=steps_N,
      loss_N=losses.to_numpy()[at_N],
      accuracy_N=accuracies.to_numpy()[at_N[: len(accuracies)]],
      examples_per_step=outcome.get('examples_per_step', float('nan')),
      flops_N=sum((_flops(g, steps_N) for g in groups), np.zeros(len(steps_N))),
      bytes_N=_bytes(arm, outcome, settings, steps_N),
      diverged_at=_diverged_at(outcome, groups),
      # The groups took turns, and seeds of one program the same time.
      seconds=max(map(run_records.training_seconds, groups), default=0.0)
      / outcome['together'],
  )


def _diverged_at(
    outcome: Mapping[str, Any], groups: Sequence[run_records.GroupRecords]
) -> int | None:
  """Returns the step at which loss or gradient were lost for good."""
  if outcome['diverged_at'] is not None:
    return outcome['diverged_at']
  for group in groups:
    curve = group.curve('async/diverged')
    calm = np.flatnonzero(curve == 0)
    first = calm[-1] + 1 if len(calm) else 0
    if first < len(curve):
      return int(curve.index[first])
  return None


def _flops(group: run_records.GroupRecords, steps_N: np.ndarray) -> np.ndarray:
  """Adds up FLOPs until each evaluation, from those on record."""
  curve = group.curve('perf/model_flops_per_step')
  if curve.empty:
    return np.full(len(steps_N), np.nan)
  spent = np.cumsum(np.diff(curve.index, prepend=0) * curve.to_numpy())
  return np.interp(steps_N, np.append(0, curve.index), np.append(0.0, spent))


def _bytes(
    arm: Arm,
    outcome: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps_N: np.ndarray,
) -> np.ndarray:
  """Returns bytes that a worker or group has received at evaluations."""
  size = settings['bytes_of_model']
  within_N = steps_N * costs.bytes_per_update(
      arm.communication,
      size,
      workers=arm.workers,
      outer_every=outcome.get('outer_every', 1),
  )
  if arm.communication != 'exchange':
    return within_N
  every, burn_in = outcome['exchange_every'], outcome['burn_in_steps']
  # Publications are fetched after burn-in, and none is made at step 0.
  first = max(burn_in // every, 1)
  fetches_N = np.maximum((steps_N - 1) // every - first + 1, 0)
  fetches_N = np.where(steps_N > burn_in, fetches_N, 0)
  return within_N + fetches_N * outcome['peers'] * size


def _with_teachers(
    run: Run,
    plan: StudyPlan,
    planned: PlannedRun,
    runs: Mapping[PlannedRun, Run],
) -> Run:
  """Adds what its teachers have cost before a run began."""
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
  """Returns what the groups do together; None if nobody looked."""
  path = plan_lib.ensemble_path(plan_lib.run_dir(workdir, planned))
  if not files.exists(path):
    return None
  group = run_records.read_group(path, 0)
  losses = group.curve('eval/loss')
  at = np.isin(run.steps_N, losses.index)
  return run._replace(
      arm=arm.name,
      steps_N=losses.index.to_numpy(),
      loss_N=losses.to_numpy(),
      accuracy_N=group.curve('eval/accuracy').to_numpy(),
      flops_N=run.flops_N[at],
      bytes_N=run.bytes_N[at],
      seconds=float('nan'),
  )
