"""Retrains for a study of churn: which there are, and what they have left.

    <workdir>/labels_<split>.npy                           in the order of it
    <workdir>/runs/<arm>/seed_<k>/group_<g>_<split>.npy    probabilities

beside what any run of a study leaves. Nothing here imports jax.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from codistill_jax.storage import files

from . import study_plan as plan_lib
from .declaration import Arm
from .study_plan import PlannedRun, StudyPlan

SPLITS = ('validation', 'test')
SINGLE, ENSEMBLE = 'single', 'ensemble'
REPEAT = 'repeat_'  # Of the arm that is trained again with the same seeds.
FIXED_INIT, FIXED_ORDER = 'fixed_init', 'fixed_order'
CONTROL_RETRAINS = 3
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')
_WAYS = {2: 'two'}


def arms(
    weights: Sequence[float],
    num_groups: int = 2,
    own: Mapping[str, tuple[int, str]] | None = None,
) -> tuple[Arm, ...]:
  """Returns the arms that are compared.

  Args:
    weights: Distill weights; a codistilled arm each.
    num_groups: G of these, and the size of an ensemble.
    own: Groups and gin file of further arms, by name.
  """
  ways = _WAYS.get(num_groups, str(num_groups))
  return (
      Arm(SINGLE, 'single model'),
      Arm(
          ENSEMBLE,
          f'ensemble of {ways}',
          num_groups=num_groups,
          ensemble_of=SINGLE,
      ),
      *(
          Arm(
              f'codistilled_{weight:g}',
              f'{ways}-way codistilled, weight {weight:g}',
              num_groups=num_groups,
              weight=float(weight),
          )
          for weight in weights
      ),
      # Last: each has another configuration than the others.
      *(
          Arm(name, name, gin_files=(path,), num_groups=groups)
          for name, (groups, path) in (own or {}).items()
      ),
  )


def with_controls(
    plan: StudyPlan, control_retrains: int | None = None
) -> StudyPlan:
  """Returns the plan of a study of churn with all of its retrains.

  The single models are as many times more as an ensemble has members, so that
  as many ensembles share none of them.

  Args:
    plan: Of the arms that are compared.
    control_retrains: Of the controls with one seed fixed; 0 for none. None:
      `CONTROL_RETRAINS`, or as many as there are of the other arms.
  """
  count = plan.scale.seeds
  controls = min(CONTROL_RETRAINS, count)
  controls = controls if control_retrains is None else control_retrains
  single = plan.arm(SINGLE)
  size = plan.arm(ENSEMBLE).num_groups
  first = single._replace(seeds=tuple(range(size * count)))
  # Retrain 0 of both would be the first single model.
  others = tuple(range(1, controls))
  weighted = [arm for arm in plan.arms if arm.weight is not None]
  compared = {SINGLE, ENSEMBLE, *(arm.name for arm in weighted)}
  arms = (
      first,
      plan.arm(ENSEMBLE),
      _again(single),
      *weighted,
      *map(_again, weighted[:1]),
      single._replace(name=FIXED_INIT, fixed='parameters', seeds=others),
      single._replace(name=FIXED_ORDER, fixed='order', seeds=others),
      *(arm for arm in plan.arms if arm.name not in compared),
  )
  return plan._replace(study=plan.study._replace(arms=arms))


def _again(arm: Arm) -> Arm:
  return arm._replace(name=REPEAT + arm.name, seeds=(0,))


def weight_of(arm: str) -> float | None:
  """Returns the distill weight in the name of an arm; None of others."""
  found = re.fullmatch(r'codistilled_(.+)', arm)
  return float(found[1]) if found else None


def titles_of(names: Sequence[str], size: int) -> dict[str, str]:
  """Returns names for people, as far as they are not those of files."""
  weights = [w for name in names if (w := weight_of(name)) is not None]
  return {arm.name: arm.title for arm in arms(weights, size)} | {
      FIXED_INIT: 'same parameters at the start, other order of data',
      FIXED_ORDER: 'same order of data, other parameters at the start',
  }


def check_name(arm: str) -> None:
  """Raises ValueError unless an arm of one's own may be called so."""
  taken = (SINGLE, ENSEMBLE, FIXED_INIT, FIXED_ORDER)
  if (
      not _NAME.fullmatch(arm)
      or arm in taken
      or arm.startswith((REPEAT, 'codistilled_'))
  ):
    raise ValueError(
        f'an arm cannot be called {arm!r}; use letters, digits, dots, dashes'
        ' and underscores, and none of the names of the built-in arms'
    )


# --- Files -------------------------------------------------------------------


def done(workdir: files.PathLike) -> Iterator[tuple[str, int, dict[str, Any]]]:
  """Gives arm, seed and outcome of all runs that are done, in order."""
  root = epath.Path(workdir) / 'runs'
  for arm in sorted(p.name for p in root.iterdir()) if root.exists() else ():
    numbers = [p.name.removeprefix('seed_') for p in (root / arm).iterdir()]
    for seed in sorted(int(n) for n in numbers if n.isdecimal()):
      run = PlannedRun(arm, seed, None, False)
      outcome = plan_lib.read_outcome(workdir, run)
      if outcome is not None:
        yield arm, seed, outcome


def write_predictions(
    directory: files.PathLike, group_id: int, split: str, array: np.ndarray
) -> None:
  """Writes what a group of a run directory predicts."""
  files.write_bytes(_path(directory, group_id, split), _npy(array))


def read_predictions(
    workdir: files.PathLike,
    arm: str,
    seed: int,
    split: str,
    group_id: int = 0,
) -> np.ndarray:
  """Returns what a group predicts; by default the one copy that is compared.

  Never two copies of one run: they are no independent retrains.
  """
  run = PlannedRun(arm, seed, None, False)
  return _load(_path(plan_lib.run_dir(workdir, run), group_id, split))


def read_labels(workdir: files.PathLike, split: str) -> np.ndarray:
  """Returns the labels of a split."""
  return _load(epath.Path(workdir) / f'labels_{split}.npy')


def keep_labels(
    workdir: files.PathLike, split: str, labels: np.ndarray
) -> None:
  """Writes the labels of a split, or checks that they are still the same."""
  path = epath.Path(workdir) / f'labels_{split}.npy'
  if not path.exists() or not any(done(workdir)):
    files.write_bytes(path, _npy(labels))
  if not np.array_equal(_load(path), labels):
    raise ValueError(
        f'the {split} split is not the one of {os.fspath(workdir)}: its labels'
        ' differ; use another --workdir'
    )


def _path(directory: files.PathLike, group_id: int, split: str) -> epath.Path:
  return epath.Path(directory) / f'group_{group_id}_{split}.npy'


def _npy(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()


def _load(path: epath.Path) -> np.ndarray:
  data = path.read_bytes()
  try:
    return np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError) as e:
    raise ValueError(
        f'{os.fspath(path)} is damaged ({e}); delete it, and the outcome.json'
        ' beside it, if any, and both are made again'
    ) from e
