"""Retrains for a study of churn: which there are, and what came out of them.

    <workdir>/labels_<split>.npy                           in the order of it
    <workdir>/runs/<arm>/seed_<k>/group_<g>_<split>.npy    probabilities

beside what any run of a study leaves. All that is chosen is chosen on the
validation split; the table is of the test split. Nothing here imports jax.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codistill_jax import run_directory, statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files

from . import study_plan as plan_lib
from .study_plan import Arm, PlannedRun, StudyPlan

SPLITS = ('validation', 'test')
SINGLE, ENSEMBLE = 'single', 'ensemble'
REPEAT = 'repeat_'  # Of the arm that is trained again with the same seeds.
_CONTROLS = FIXED_INIT, FIXED_ORDER = 'fixed_init', 'fixed_order'
CONTROL_RETRAINS = 3
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')
_WAYS = {2: 'two'}


def arms(
    weights: Sequence[float],
    num_groups: int,
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


def with_controls(plan: StudyPlan, control_retrains: int) -> StudyPlan:
  """Returns the plan of a study of churn with all of its retrains.

  The single models are as many times more as an ensemble has members, so that
  as many ensembles share none of them.

  Args:
    plan: Of the arms that are compared.
    control_retrains: Of the controls with one seed fixed; 0 for none.
  """
  count = plan.scale.seeds
  single = plan.arm(SINGLE)
  size = plan.arm(ENSEMBLE).num_groups
  first = single._replace(seeds=tuple(range(size * count)))
  # Retrain 0 of both would be the first single model.
  others = tuple(range(1, control_retrains))
  weighted = [arm for arm in plan.study.arms if arm.weight is not None]
  compared = {SINGLE, ENSEMBLE, *(arm.name for arm in weighted)}
  arms = (
      first,
      plan.arm(ENSEMBLE),
      _again(single),
      *weighted,
      *map(_again, weighted[:1]),
      single._replace(name=FIXED_INIT, fixed='parameters', seeds=others),
      single._replace(name=FIXED_ORDER, fixed='order', seeds=others),
      *(arm for arm in plan.study.arms if arm.name not in compared),
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
  for arm in sorted(files.names(root)):
    numbers = [x.removeprefix('seed_') for x in files.names(root / arm)]
    for seed in sorted(int(n) for n in numbers if n.isdecimal()):
      run = PlannedRun(arm, seed)
      outcome = plan_lib.read_outcome(workdir, run)
      if outcome is not None:
        yield arm, seed, outcome


def write_predictions(
    directory: files.PathLike, group_id: int, split: str, array: np.ndarray
) -> None:
  """Writes what a group of a run directory predicts."""
  _write(_path(directory, group_id, split), array)


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
  run = PlannedRun(arm, seed)
  return _load(_path(plan_lib.run_dir(workdir, run), group_id, split))


def read_labels(workdir: files.PathLike, split: str) -> np.ndarray:
  """Returns the labels of a split."""
  return _load(epath.Path(workdir) / f'labels_{split}.npy')


def keep_labels(
    workdir: files.PathLike, split: str, labels: np.ndarray
) -> None:
  """Writes the labels of a split, or checks that they are still the same."""
  path = epath.Path(workdir) / f'labels_{split}.npy'
  if not files.exists(path) or not any(done(workdir)):
    _write(path, labels)
  if not np.array_equal(_load(path), labels):
    raise ValueError(
        f'the {split} split is not the one of {os.fspath(workdir)}: its labels'
        ' differ; use another --workdir'
    )


def _path(directory: files.PathLike, group_id: int, split: str) -> epath.Path:
  return epath.Path(directory) / f'group_{group_id}_{split}.npy'


def _write(path: epath.Path, array: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  files.write_bytes(path, buffer.getvalue())


def _load(path: epath.Path) -> np.ndarray:
  try:
    return load_array(path)
  except ValueError as e:
    raise ValueError(
        f'{e}; delete it, and the outcome.json beside it, if any, and both are'
        ' made again'
    ) from e


def load_array(path: files.PathLike) -> np.ndarray:
  """Reads a .npy; its header may lie, but the file is as long as it is.

  Raises:
    ValueError: If it is no array of numbers, or not as long as it says.
    OSError: If it cannot be read.
  """
  data = files.content(path)
  file = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, in_columns, dtype = read_header(file)
    found = np.frombuffer(data, dtype, offset=file.tell())
    if min(shape, default=0) < 0:
      raise ValueError(f'shape {shape}')
    return found.reshape(shape, order='F' if in_columns else 'C')
  # Numpy evaluates the header, and that raises what parsers raise.
  except Exception as e:
    raise ValueError(
        f'{os.fspath(path)} is damaged, or no array of numbers:'
        f' {e or type(e).__name__}'
    ) from e


# --- Figures -----------------------------------------------------------------


class Row(NamedTuple):
  """One arm.

  Attributes:
    arm: Its name in files.
    title: Its name for people.
    retrains: K.
    figures: Estimates of 'log_loss' and 'error' (over retrains), 'churn',
      'relative' and 'disagreement' (over pairs); without those that cannot be
      had.
    change_of_churn: Against the baseline's; None for the baseline.
  """

  arm: str
  title: str
  retrains: int
  figures: Mapping[str, Estimate]
  change_of_churn: Estimate | None


class Repeat(NamedTuple):
  """A run that was trained twice with the same seeds.

  Attributes:
    arm: Of both.
    different: Predictions that are not the same bits, over all groups.
    total: Predictions compared.
    largest: The largest difference.
    same_cores: Whether both had as many cores.
  """

  arm: str
  different: int
  total: int
  largest: float
  same_cores: bool


class Retrains(NamedTuple):
  """All figures.

  Attributes:
    settings: What study.json says.
    examples: By split, how many.
    rows: By split, the rows of all arms, the single model first.
    chosen: The arm chosen on validation among the codistilled ones, or None.
    rule: How it was chosen.
    controls: On the test split, with one of the two seeds fixed.
    repeats: The deterministic controls.
    runs: Outcome of each, with its 'arm' and which 'retrain' of it.
    configurations: Operative gin configurations, by the names of files: that of
      the single model, and those of arms with gin files of their own.
  """

  settings: Mapping[str, Any]
  examples: Mapping[str, int]
  rows: Mapping[str, Sequence[Row]]
  chosen: str | None
  rule: str
  controls: Sequence[Row]
  repeats: Sequence[Repeat]
  runs: Sequence[Mapping[str, Any]]
  configurations: Mapping[str, str]

  @property
  def table(self) -> list[Row]:
    """Returns the test rows of Table 1: only the chosen weight."""
    return [
        row
        for row in self.rows['test']
        if weight_of(row.arm) is None or row.arm == self.chosen
    ]


def summarise(
    arms: Mapping[str, Sequence[np.ndarray]],
    labels: np.ndarray | None,
    titles: Mapping[str, str] | None = None,
) -> list[Row]:
  """Returns a row for each arm; churn is compared with that of the first.

  Args:
    arms: By name, the predictions of its K >= 2 independent retrains.
    labels: (N,), or None.
    titles: Names for people.

  Raises:
    ValueError: What `statistics.measure` raises, with the name of the arm.
  """
  rows: list[Row] = []
  for name, predictions in arms.items():
    try:
      found = statistics.measure(predictions, labels)
    except ValueError as e:
      raise ValueError(f'{name}: {e}') from e
    figures = {
        'log_loss': (statistics.mean_over_retrains, found.log_loss_K),
        'error': (statistics.mean_over_retrains, found.error_K),
        'churn': (statistics.mean_over_pairs, found.churn_KK),
        'relative': (statistics.mean_over_pairs, found.relative_KK),
        'disagreement': (statistics.mean_over_pairs, found.disagreement_KK),
    }
    if not rows:
      baseline_KK, change = found.churn_KK, None
    else:
      change = statistics.change_of_churn(found.churn_KK, baseline_KK)
    rows.append(
        Row(
            arm=name,
            title=(titles or {}).get(name, name),
            retrains=len(found.churn_KK),
            figures={
                key: mean(values)
                for key, (mean, values) in figures.items()
                if values is not None
            },
            change_of_churn=change,
        )
    )
  return rows


def load_study(workdir: files.PathLike) -> Retrains:
  """Returns all figures of the runs that are done.

  Raises:
    ValueError: If there is no study, or fewer than two single models.
  """
  settings = files.read_json(plan_lib.study_path(workdir))
  plan_lib.check_known(workdir, settings)
  runs = list(done(workdir))
  seeds: dict[str, list[int]] = {}
  for arm, seed, _ in runs:
    seeds.setdefault(arm, []).append(seed)
  size = settings['num_groups'] if settings else 2
  if len(seeds.get(SINGLE, ())) < 2 * size:
    raise ValueError(
        f'{workdir} holds {len(seeds.get(SINGLE, ()))} single models, but'
        f' churn of ensembles of {size} needs {2 * size}; train them first'
    )
  examples, rows = {}, {}
  for split in SPLITS:
    labels = read_labels(workdir, split)
    arms = load_arms(workdir, seeds, split, size)
    rows[split] = summarise(arms, labels, titles_of(list(arms), size))
    examples[split] = len(labels)
  configurations = {}
  for arm in (SINGLE, *_others(seeds)):
    directory = plan_lib.run_dir(workdir, PlannedRun(arm, seeds[arm][0]))
    path = run_directory.config_path(directory)
    if files.exists(path):
      name = 'config.gin' if arm == SINGLE else f'config_{arm}.gin'
      configurations[name] = files.content(path).decode()
  return Retrains(
      settings,
      examples,
      rows,
      *choose(rows['validation']),
      controls=_controls(workdir, seeds),
      repeats=_repeats(workdir, runs),
      runs=[{'arm': arm, 'retrain': k, **record} for arm, k, record in runs],
      configurations=configurations,
  )


def _others(arms: Iterable[str]) -> list[str]:
  """Returns the arms with gin files of their own."""
  return sorted(
      arm
      for arm in arms
      if arm not in (SINGLE, *_CONTROLS)
      and weight_of(arm) is None
      and not arm.startswith(REPEAT)
  )


def load_arms(
    workdir: files.PathLike,
    seeds: Mapping[str, Sequence[int]],
    split: str,
    size: int,
) -> dict[str, list[np.ndarray]]:
  """Returns predictions by arm: single, ensemble, codistilled, then others.

  All arms have as many retrains: the single models beyond are members of
  ensembles only.
  """
  read = lambda arm: [
      read_predictions(workdir, arm, k, split) for k in seeds[arm]
  ]
  singles = read(SINGLE)
  count = len(singles) // size
  arms = {
      SINGLE: singles[:count],
      ENSEMBLE: statistics.ensembles(singles[: count * size], size),
  }
  weighted = [a for a in seeds if weight_of(a) is not None]
  for arm in sorted(weighted, key=weight_of) + _others(seeds):
    if len(seeds[arm]) > 1:
      arms[arm] = read(arm)
  return arms


def choose(rows: Sequence[Row]) -> tuple[str | None, str]:
  """Returns the codistilled arm for the table, by validation alone."""
  weighted = [r for r in rows if weight_of(r.arm) is not None]
  if not weighted:
    return None, ''
  loss = lambda row: row.figures['log_loss'].mean
  limit = next(loss(row) for row in rows if row.arm == ENSEMBLE)
  good = [row for row in weighted if loss(row) <= limit]
  if good:
    row = min(good, key=lambda row: row.figures['churn'].mean)
    return row.arm, (
        'of the weights whose mean validation log loss is no worse than that of'
        f' the ensemble ({limit:.4f}), the one with the lowest churn on'
        ' validation'
    )
  return min(weighted, key=loss).arm, (
      'no weight has a mean validation log loss as low as that of the ensemble'
      f' ({limit:.4f}), so the one with the lowest'
  )


# --- Controls ----------------------------------------------------------------


def _controls(workdir, seeds) -> list[Row]:
  """Returns rows of retrains that differ in one seed only.

  The first of each is single model 0.
  """
  labels = read_labels(workdir, 'test')
  read = lambda arm, k: read_predictions(workdir, arm, k, 'test')
  arms = {
      arm: [read(SINGLE, 0), *(read(arm, k) for k in seeds[arm])]
      for arm in _CONTROLS
      if arm in seeds
  }
  if not arms:
    return []
  # Against single models as many, and the same seeds, as of each control.
  count = min(len(found) for found in arms.values())
  arms = {SINGLE: [read(SINGLE, k) for k in range(count)], **arms}
  return summarise(arms, labels, titles_of((), 2))


def _repeats(workdir, runs) -> list[Repeat]:
  outcomes = {(arm, k): outcome for arm, k, outcome in runs}
  found = []
  for again in sorted(arm for arm, _ in outcomes if arm.startswith(REPEAT)):
    arm = again.removeprefix(REPEAT)
    if (arm, 0) not in outcomes:
      continue
    different, total, largest = 0, 0, 0.0
    for group_id in range(outcomes[again, 0]['num_groups']):
      for split in SPLITS:
        a, b = (
            read_predictions(workdir, x, 0, split, group_id)
            for x in (arm, again)
        )
        different += int(np.sum(a != b))
        total += a.size
        largest = max(largest, float(np.max(np.abs(a - b))))
    cores = {outcomes[x, 0]['cores'] for x in (arm, again)}
    found.append(Repeat(arm, different, total, largest, len(cores) == 1))
  return found
