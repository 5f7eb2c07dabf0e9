"""What came out of a study of churn, from the files it wrote; no jax.

All that is chosen is chosen on the validation split; the table is of the test
split.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax import run_directory, statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files

from . import retrains
from . import study_plan as plan_lib
from .retrains import (
    ENSEMBLE,
    FIXED_INIT,
    FIXED_ORDER,
    REPEAT,
    SINGLE,
)
from .study_plan import PlannedRun

_CONTROLS = (FIXED_INIT, FIXED_ORDER)


class Row(NamedTuple):
  """One arm.

  Attributes:
    arm: Its name in files.
    title: Its name for people.
    retrains: K.
    figures: Estimates of 'log_loss' and 'error' (over retrains), 'churn',
      'relative' and 'disagreement' (over pairs); without those that cannot be
      had.
    change: Of the churn against the baseline's; None for the baseline.
  """

  arm: str
  title: str
  retrains: int
  figures: Mapping[str, Estimate]
  change: Estimate | None


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
    reason: How it was chosen.
    controls: On the test split, with one of the two seeds fixed.
    repeats: The deterministic controls.
    runs: (arm, retrain, outcome) of all.
    configurations: Operative gin configurations, by the names of files: that of
      the single model, and those of arms with gin files of their own.
  """

  settings: Mapping[str, Any]
  examples: Mapping[str, int]
  rows: Mapping[str, Sequence[Row]]
  chosen: str | None
  reason: str
  controls: Sequence[Row]
  repeats: Sequence[Repeat]
  runs: Sequence[tuple[str, int, Mapping[str, Any]]]
  configurations: Mapping[str, str]

  @property
  def table(self) -> list[Row]:
    """Returns the test rows of Table 1: only the chosen weight."""
    return [
        row
        for row in self.rows['test']
        if retrains.weight_of(row.arm) is None or row.arm == self.chosen
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
  rows, baseline_KK = [], None
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
    change = None
    if baseline_KK is None:
      baseline_KK = found.churn_KK
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
            change=change,
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
  runs = list(retrains.done(workdir))
  seeds = _seeds(runs)
  size = settings['num_groups'] if settings else 2
  if len(seeds.get(SINGLE, ())) < 2 * size:
    raise ValueError(
        f'{workdir} holds {len(seeds.get(SINGLE, ()))} single models, but'
        f' churn of ensembles of {size} needs {2 * size}; train them first'
    )
  examples, rows = {}, {}
  for split in retrains.SPLITS:
    labels = retrains.read_labels(workdir, split)
    arms = load_arms(workdir, seeds, split, size)
    rows[split] = summarise(arms, labels, retrains.titles_of(list(arms), size))
    examples[split] = len(labels)
  chosen, reason = choose(rows['validation'])
  return Retrains(
      settings=settings,
      examples=examples,
      rows=rows,
      chosen=chosen,
      reason=reason,
      controls=_controls(workdir, seeds),
      repeats=_repeats(workdir, runs),
      runs=runs,
      configurations={
          f'config_{arm}.gin' if arm != SINGLE else 'config.gin': text
          for arm in (SINGLE, *_others(seeds))
          if (text := _configuration(workdir, arm, seeds[arm][0]))
      },
  )


def _seeds(runs) -> dict[str, list[int]]:
  """Returns those of each arm, ascending."""
  found: dict[str, list[int]] = {}
  for arm, seed, _ in runs:
    found.setdefault(arm, []).append(seed)
  return found


def _others(arms: Iterable[str]) -> list[str]:
  """Returns the arms with gin files of their own."""
  return sorted(
      arm
      for arm in arms
      if arm not in (SINGLE, *_CONTROLS)
      and retrains.weight_of(arm) is None
      and not arm.startswith(REPEAT)
  )


def _configuration(workdir: files.PathLike, arm: str, seed: int) -> str:
  run = PlannedRun(arm, seed, None, False)
  path = run_directory.config_path(plan_lib.run_dir(workdir, run))
  return path.read_text() if path.exists() else ''


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
      retrains.read_predictions(workdir, arm, k, split) for k in seeds[arm]
  ]
  singles = read(SINGLE)
  count = len(singles) // size
  arms = {
      SINGLE: singles[:count],
      ENSEMBLE: statistics.ensembles(singles[: count * size], size),
  }
  weighted = [a for a in seeds if retrains.weight_of(a) is not None]
  for arm in sorted(weighted, key=retrains.weight_of) + _others(seeds):
    if len(seeds[arm]) > 1:
      arms[arm] = read(arm)
  return arms


def choose(rows: Sequence[Row]) -> tuple[str | None, str]:
  """Returns the codistilled arm for the table, by validation alone."""
  weighted = [r for r in rows if retrains.weight_of(r.arm) is not None]
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
  labels = retrains.read_labels(workdir, 'test')
  read = lambda arm, k: retrains.read_predictions(workdir, arm, k, 'test')
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
  return summarise(arms, labels, retrains.titles_of((), 2))


def _repeats(workdir, runs) -> list[Repeat]:
  outcomes = {(arm, k): outcome for arm, k, outcome in runs}
  return [
      _repeat(workdir, arm, outcomes)
      for arm, _, _ in runs
      if arm.startswith(REPEAT) and (arm.removeprefix(REPEAT), 0) in outcomes
  ]


def _repeat(workdir, arm: str, outcomes) -> Repeat:
  first = arm.removeprefix(REPEAT)
  different, total, largest = 0, 0, 0.0
  for group_id in range(outcomes[arm, 0]['num_groups']):
    for split in retrains.SPLITS:
      a, b = (
          retrains.read_predictions(workdir, x, 0, split, group_id)
          for x in (first, arm)
      )
      different += int(np.sum(a != b))
      total += a.size
      largest = max(largest, float(np.max(np.abs(a - b))))
  cores = {outcomes[x, 0]['cores'] for x in (first, arm)}
  return Repeat(first, different, total, largest, len(cores) == 1)
