"""The configuration of each run of a study, as that of this process."""

from collections.abc import Sequence
from typing import Any

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files
from experiments.studies import plan as plan_lib
from experiments.studies.declaration import Arm
from experiments.studies.plan import Plan, PlannedRun


class Configurations:
  """Parses what a run is made of: its scale, its arm, its seed and rate.

  Attributes:
    workdir: Of the study.
    plan: All runs.
  """

  def __init__(
      self, workdir: files.PathLike, plan: Plan, bindings: Sequence[str] = ()
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
      _check_free(binding)
    self._bindings = tuple(bindings)

  def configure(self, run: PlannedRun) -> Experiment:
    """Makes the configuration of a run that of this process, and what it says.

    Raises:
      ValueError: If it cannot be made as configured.
    """
    self.parse(run)
    return experiment_lib.in_lockstep(gin_utils.make(Experiment))

  def parse(self, run: PlannedRun) -> None:
    """Makes the configuration of a run that of this process."""
    plan, arm = self.plan, self.plan.arm(run.arm)
    rate, rows = self.rate(run), plan.group_batch(arm)
    of_run = [
        f'Experiment.seed={run.seed}',
        f'Experiment.data_seed={run.seed}',
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
    """The learning rate of a run; None for that of the configuration."""
    plan, rates = self.plan, self.plan.scale.rates
    if run.rate is not None or not rates:
      return run.rate
    arm = plan.arm(run.arm)
    tuned = plan.arm(arm.tuned_as) if arm.tuned_as else arm
    if not plan.grid(tuned):
      return rates[0]
    return plan_lib.choose_rate(read_tuning(self.workdir, plan, tuned))


# What the study says of each run, by the flag that changes it.
_OF_RUNS = {
    'RATE': '--rates',
    'Experiment.seed': '--seeds',
    'Experiment.data_seed': '--seeds',
    'Experiment.group_batch': '--worker_rows',
    'Checkpoints.mode': 'no flag: studies are in lockstep',
    'FixedTeachers.runs': 'no flag: they are those of the study',
}


def _check_free(binding: str) -> None:
  """Raises ValueError if a binding of `--gin` would be overridden, or worse."""
  name = '.'.join(binding.split('=')[0].strip().split('.')[-2:])
  if name in _OF_RUNS:
    last = name.split('.')[-1]
    raise ValueError(
        f'--gin={binding}: the study sets {last} of each run; change it by'
        f' {_OF_RUNS[name]}'
    )


def read_tuning(
    workdir: files.PathLike, plan: Plan, arm: Arm
) -> dict[float, dict[str, Any]]:
  """The outcomes of the tuning runs of an arm, as far as they are done."""
  found = {}
  for rate in plan.grid(arm):
    run = PlannedRun(arm.name, plan_lib.TUNING_SEED, rate, True)
    outcome = plan_lib.read_outcome(workdir, run)
    if outcome is not None:
      found[rate] = outcome
  return found
