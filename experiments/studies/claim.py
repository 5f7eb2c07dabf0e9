"""What study.json says of a study, and who may go on with it."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils
from codistill_jax.storage import files
from experiments import cli
from experiments.studies import plan as plan_lib
from experiments.studies.configurations import Configurations
from experiments.studies.plan import PlannedRun

_OF_A_RUN = ('.seed', '.data_seed', 'FixedTeachers.runs', 'RATE')
# What cannot differ between the runs of one study.
_FIXED = (
    'study',
    'scale',
    'configurations',
    'identity',
    'data',
    'replicas',
    'platform',
)


def claim(configurations: Configurations, num_replicas: int) -> None:
  """Writes study.json, or checks that it is of this very study.

  More seeds and arms may be asked for later, and an arm of which no run has
  begun may be corrected.

  Raises:
    ValueError: If the workdir holds a study of another configuration.
  """
  workdir, plan = configurations.workdir, configurations.plan
  ours = describe(configurations, num_replicas)
  path = plan_lib.study_path(workdir)
  theirs = files.read_json(path) or {}
  done = [
      run.arm
      for run in plan.runs()
      if plan_lib.read_outcome(workdir, run) is not None
  ]
  if done:
    _check_same(workdir, theirs, ours, set(done))
  together = theirs.get('configurations', {}) | ours['configurations']
  files.write_json(path, {**ours, 'configurations': together})


def describe(
    configurations: Configurations, num_replicas: int
) -> dict[str, Any]:
  """What study.json says."""
  plan, by_arm = configurations.plan, {}
  for arm in plan.trained:
    configurations.parse(_any_run(arm.name))
    by_arm[arm.name] = [
        text
        for text in gin_utils.configuration()
        if not text.split(' = ')[0].endswith(_OF_A_RUN)
    ]
  baseline = plan.arm(plan.study.baseline)
  experiment = configurations.configure(_any_run(baseline.name))
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


def _name_of(model: Any) -> str:
  """Module and name of what makes the model."""
  return f'{model.__module__.split(".")[-1]}.{model.__name__}'


def _any_run(arm: str) -> PlannedRun:
  return PlannedRun(arm, 0, 1.0, False)


def _check_same(
    workdir: files.PathLike,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    done: set[str],
) -> None:
  for key in _FIXED:
    old, new = theirs.get(key), ours[key]
    if key == 'configurations':
      pairs = [(old.get(a, new[a]), new[a]) for a in new if a in done]
    else:
      pairs = [([f'{key}={old}'], [f'{key}={new}'])]
    for a, b in pairs:
      if a != b:
        missing = 'no such binding'
        raise ValueError(
            f'{os.fspath(workdir)} holds another study: it has'
            f' {next((s for s in a if s not in b), missing)}, this one has'
            f' {next((s for s in b if s not in a), missing)}; use another'
            ' --workdir, or the first flags'
        )
