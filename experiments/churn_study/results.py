"""What came out of a churn study, from the files it wrote; no jax.

All that is chosen is chosen on the validation split; the table is of the test
split.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codistill_jax import statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files
from experiments.churn_study import run_files
from experiments.churn_study.run_files import (
    FIXED_INIT,
    FIXED_ORDER,
    REPEAT,
    SINGLE,
)

ENSEMBLE = 'ensemble'
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
    runs: (arm, retrain, record) of all.
  """

  settings: Mapping[str, Any]
  examples: Mapping[str, int]
  rows: Mapping[str, Sequence[Row]]
  chosen: str | None
  reason: str
  controls: Sequence[Row]
  repeats: Sequence[Repeat]
  runs: Sequence[tuple[str, int, Mapping[str, Any]]]

  @property
  def table(self) -> list[Row]:
    """The test rows of Table 1: of all weights only the chosen one."""
    return [
        row
        for row in self.rows['test']
        if run_files.weight_of(row.arm) is None or row.arm == self.chosen
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
  """All figures of the runs that are done.

  Raises:
    ValueError: If there is no study, or fewer than two single models.
  """
  settings = files.read_json(run_files.study_path(workdir))
  runs = list(run_files.done(workdir))
  retrains = _retrains(runs)
  size = settings['num_groups'] if settings else 2
  if len(retrains.get(SINGLE, ())) < 2 * size:
    raise ValueError(
        f'{workdir} holds {len(retrains.get(SINGLE, ()))} single models, but'
        f' churn of ensembles of {size} needs {2 * size}; train them first'
    )
  examples, rows = {}, {}
  for split in run_files.SPLITS:
    labels = run_files.read_labels(workdir, split)
    arms = load_arms(workdir, retrains, split, size)
    rows[split] = summarise(arms, labels, titles_of(arms, size))
    examples[split] = len(labels)
  chosen, reason = choose(rows['validation'])
  return Retrains(
      settings=settings,
      examples=examples,
      rows=rows,
      chosen=chosen,
      reason=reason,
      controls=_controls(workdir, retrains),
      repeats=_repeats(workdir, runs, size),
      runs=runs,
  )


def _retrains(runs) -> dict[str, list[int]]:
  found: dict[str, list[int]] = {}
  for arm, retrain, _ in runs:
    found.setdefault(arm, []).append(retrain)
  return found


def load_arms(
    workdir: files.PathLike,
    retrains: Mapping[str, Sequence[int]],
    split: str,
    size: int,
) -> dict[str, list[np.ndarray]]:
  """Predictions by arm: single, ensemble, codistilled by weight, then others.

  All arms have as many retrains: the single models beyond are members of
  ensembles only.
  """
  read = lambda arm: [
      run_files.read_predictions(workdir, arm, k, split)
      for k in sorted(retrains[arm])
  ]
  singles = read(SINGLE)
  count = len(singles) // size
  arms = {
      SINGLE: singles[:count],
      ENSEMBLE: statistics.ensembles(singles[: count * size], size),
  }
  weighted = [a for a in retrains if run_files.weight_of(a) is not None]
  others = sorted(
      arm
      for arm in retrains
      if arm not in (SINGLE, *_CONTROLS, *weighted) and REPEAT not in arm
  )
  for arm in sorted(weighted, key=run_files.weight_of) + others:
    if len(retrains[arm]) > 1:
      arms[arm] = read(arm)
  return arms


def titles_of(arms: Sequence[str], size: int) -> dict[str, str]:
  """Names for people."""
  ways = {2: 'two'}.get(size, str(size))
  titles = {
      SINGLE: 'single model',
      ENSEMBLE: f'ensemble of {ways}',
      FIXED_INIT: 'same parameters at the start, other order of data',
      FIXED_ORDER: 'same order of data, other parameters at the start',
  }
  for arm in arms:
    weight = run_files.weight_of(arm)
    if weight is not None:
      titles[arm] = f'{ways}-way codistilled, weight {weight:g}'
  return titles


def choose(rows: Sequence[Row]) -> tuple[str | None, str]:
  """The codistilled arm for the table, by validation figures alone."""
  weighted = [r for r in rows if run_files.weight_of(r.arm) is not None]
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


def _controls(workdir, retrains) -> list[Row]:
  """Retrains that differ in one seed only; the first is single model 0."""
  labels = run_files.read_labels(workdir, 'test')
  read = lambda arm, k: run_files.read_predictions(workdir, arm, k, 'test')
  arms = {
      arm: [read(SINGLE, 0), *(read(arm, k) for k in retrains[arm])]
      for arm in _CONTROLS
      if arm in retrains
  }
  if not arms:
    return []
  # Against single models as many, and the same seeds, as of each control.
  count = min(len(found) for found in arms.values())
  arms = {SINGLE: [read(SINGLE, k) for k in range(count)], **arms}
  return summarise(arms, labels, titles_of((), 2))


def _repeats(workdir, runs, size: int) -> list[Repeat]:
  records = {(arm, k): record for arm, k, record in runs}
  return [
      _repeat(workdir, arm, records)
      for arm, _, _ in runs
      if arm.startswith(REPEAT) and (arm.removeprefix(REPEAT), 0) in records
  ]


def _repeat(workdir, arm: str, records) -> Repeat:
  first = arm.removeprefix(REPEAT)
  groups = records[arm, 0]['run']['num_groups']
  different, total, largest = 0, 0, 0.0
  for group_id in range(groups):
    for split in run_files.SPLITS:
      a, b = (
          run_files.read_predictions(workdir, x, 0, split, group_id)
          for x in (first, arm)
      )
      different += int(np.sum(a != b))
      total += a.size
      largest = max(largest, float(np.max(np.abs(a - b))))
  cores = {records[x, 0]['cores'] for x in (first, arm)}
  return Repeat(first, different, total, largest, len(cores) == 1)
