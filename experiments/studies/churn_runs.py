"""The study of prediction churn: trained by `churn_study`.

Its runs are retrains whose predictions are kept, rather than curves; what it
has in common with the other studies is the declaration and the verdict.
"""

import os
from collections.abc import Sequence

from codistill_jax.storage import files
from experiments import cli, devices
from experiments.churn_study import run_files, worker
from experiments.stopping import StopRequest
from experiments.studies.plan import Plan

_CONTROLS = 3


def is_churn(plan: Plan) -> bool:
  """Whether a study is of this kind."""
  return plan.study.name == 'churn'


def runs(plan: Plan) -> list[run_files.Run]:
  """Its retrains; so many of each arm as there are seeds."""
  weights = [run_files.weight_of(arm.name) for arm in plan.arms]
  return run_files.plan(
      plan.scale.seeds,
      [weight for weight in weights if weight is not None],
      num_groups=max(arm.num_groups for arm in plan.arms),
      control_retrains=min(_CONTROLS, plan.scale.seeds),
  )


def train(
    workdir: files.PathLike,
    plan: Plan,
    bindings: Sequence[str],
    *,
    stop: StopRequest,
    replicas: int,
    jobs: int,
) -> None:
  """Trains what is not done; see `Worker.train_all`."""
  trainers = worker.Trainers(
      workdir,
      plan.scale.gin_files,
      [*plan.scale.bindings, *bindings],
      own={},
      devices=lambda: devices.chosen_devices(replicas),
  )
  study = worker.describe_study(
      trainers,
      num_groups=max(arm.num_groups for arm in plan.arms),
      command=os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
  )
  worker.claim(workdir, study)
  worker.train_all(workdir, runs(plan), trainers, stop, jobs)
