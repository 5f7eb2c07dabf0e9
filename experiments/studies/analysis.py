"""From the runs of a study to numbers: targets, outcomes, paired effects.

The rules, the same for all arms and said on every page by `wording`:
* Losses are smoothed by a trailing mean over k evaluations.
* The target of a seed is the best smoothed loss of the baseline of that seed;
  an arm reaches it at its first evaluation at or under it, not in between.
* What was not reached stays 'not reached', and there is no mean over the rest.
* A run that diverged is reported, and left out of means.

Numpy only. Shape suffix: N evaluations of a run.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codistill_jax import statistics
from codistill_jax.statistics import Estimate
from experiments.studies import curves
from experiments.studies.curves import Band, diverged_at, smooth
from experiments.studies.declaration import MEASURES, Study
from experiments.studies.results import Run

ACCURACY = 'final_accuracy'
ALL_MEASURES = {**MEASURES, ACCURACY: 'validation accuracy at the end'}

# Compared as ratios, on a logarithmic scale; all others as differences.
RATIOS = ('steps_to_target', 'total_steps_to_target', 'compute_to_target')

MEASURED = 'measured'
NOT_REACHED = 'not reached'
DIVERGED = 'diverged'
NO_TARGET = 'no target'
ABSENT = 'not measured'


class Outcome(NamedTuple):
  """One run by one measure.

  Attributes:
    seed: Of the run.
    value: NaN unless the state is `MEASURED`.
    state: One of the states above.
    at_least: Where the target was not reached, the value at the last
      evaluation; else NaN.
    resolution: Of a target that was reached, the distance to the evaluation
      before: by how much the value may be too high; else NaN.
  """

  seed: int
  value: float
  state: str
  at_least: float = float('nan')
  resolution: float = float('nan')


class Cell(NamedTuple):
  """One arm by one measure.

  Attributes:
    outcomes: By seed, in order.
    figure: Over the runs that did not diverge; None unless all those are
      measured.
  """

  outcomes: tuple[Outcome, ...]
  figure: Estimate | None

  def count(self, state: str) -> int:
    """How many seeds are in a state."""
    return sum(o.state == state for o in self.outcomes)


class Effect(NamedTuple):
  """One arm against another, seed by seed.

  Attributes:
    ratio: Whether the figure is a ratio, else a difference.
    ours: Outcomes of the arm, of the seeds that both have.
    theirs: Those of the other, in the same order.
    figure: Of ratios the geometric mean, with its interval; None if a pair is
      not measured for any other reason than divergence.
    mean: Of the arm over the pairs that count; NaN without.
    baseline: Of the other.
    resolution: The largest of theirs: what lies no further apart may be the
      spacing of evaluations.
  """

  ratio: bool
  ours: tuple[Outcome, ...]
  theirs: tuple[Outcome, ...]
  figure: Estimate | None
  mean: float = float('nan')
  baseline: float = float('nan')
  resolution: float = float('nan')

  @property
  def pairs(self) -> int:
    """Over how many seeds the figure is."""
    return len(self.figure.values) if self.figure else 0

  @property
  def one_side_diverged(self) -> str:
    """'more' if all of ours diverged and none of theirs; 'less'; or ''."""
    ours, theirs = (
        {o.state == DIVERGED for o in side} for side in (self.ours, self.theirs)
    )
    return {(True, False): 'more', (False, True): 'less'}.get(
        (*ours, *theirs) if len(ours) == len(theirs) == 1 else (), ''
    )

  @property
  def within_resolution(self) -> bool:
    """Whether the two are no more than one evaluation apart."""
    return abs(self.mean - self.baseline) <= self.resolution


class Analysis(NamedTuple):
  """The runs of a study, sorted, with the targets.

  Attributes:
    study: As declared.
    window: k, evaluations that a loss is averaged over.
    targets: Nats, by seed; without those whose baseline is missing or diverged.
    runs: By arm, in the order of seeds; every arm of the study is a key.
    tuning: Those that were only there to choose a learning rate.
  """

  study: Study
  window: int
  targets: Mapping[int, float]
  runs: Mapping[str, tuple[Run, ...]]
  tuning: Mapping[str, tuple[Run, ...]]


def analyse(study: Study, runs: Iterable[Run]) -> Analysis:
  """Sorts runs and finds the targets.

  Raises:
    ValueError: If a run is of no arm of the study, two runs are of one arm and
      seed, or the arrays of a run disagree in length.
  """
  runs = list(runs)
  _check(study, runs)
  final = _by_arm(study, [r for r in runs if not r.tuning])
  tuning = _by_arm(study, [r for r in runs if r.tuning])
  window = curves.window_of(final.get(study.baseline, ()))
  targets = {
      run.seed: float(smooth(run.loss_N, window).min())
      for run in final.get(study.baseline, ())
      if diverged_at(run) is None and len(run.loss_N)
  }
  return Analysis(study, window, targets, final, tuning)


def _check(study: Study, runs: Sequence[Run]) -> None:
  names = [arm.name for arm in study.arms]
  seen = set()
  for run in runs:
    if run.arm not in names:
      raise ValueError(
          f'A run is of arm {run.arm!r}, but {study.name} has'
          f' {", ".join(names)}.'
      )
    key = (run.arm, run.seed, run.rate if run.tuning else None)
    if key in seen:
      raise ValueError(
          f'Two runs are of arm {run.arm!r} and seed {run.seed}; give one.'
      )
    seen.add(key)
    lengths = {
        'loss_N': len(run.loss_N),
        'flops_N': len(run.flops_N),
        'bytes_N': len(run.bytes_N),
    }
    if len(run.accuracy_N):
      lengths['accuracy_N'] = len(run.accuracy_N)
    for name, length in lengths.items():
      if length != len(run.steps_N):
        raise ValueError(
            f'Arm {run.arm!r}, seed {run.seed}: {name} has {length} values for'
            f' {len(run.steps_N)} evaluations.'
        )


def _by_arm(study: Study, runs: Sequence[Run]) -> dict[str, tuple[Run, ...]]:
  ordered = sorted(runs, key=lambda r: (r.seed, r.rate))
  return {
      arm.name: tuple(r for r in ordered if r.arm == arm.name)
      for arm in study.arms
  }


# --- Outcomes ----------------------------------------------------------------


def outcome(analysis: Analysis, run: Run, measure: str) -> Outcome:
  """One run by one measure.

  Raises:
    ValueError: If there is no such measure.
  """
  if measure not in ALL_MEASURES:
    raise ValueError(
        f'No measure {measure!r}; there are {", ".join(ALL_MEASURES)}.'
    )
  if diverged_at(run) is not None:
    return Outcome(run.seed, np.nan, DIVERGED)
  if measure in RATIOS:
    return _to_target(analysis, run, measure)
  value = _level(run, measure, analysis.window)
  state = ABSENT if np.isnan(value) else MEASURED
  return Outcome(run.seed, value, state)


def _level(run: Run, measure: str, window: int) -> float:
  if measure == 'final_loss' and len(run.loss_N):
    return float(run.loss_N[-1])
  if measure == 'best_loss' and len(run.loss_N):
    return float(smooth(run.loss_N, window).min())
  if measure == ACCURACY and len(run.accuracy_N):
    return float(run.accuracy_N[-1])
  return float('nan')  # Churn among them: it is no number of one run.


def _to_target(analysis: Analysis, run: Run, measure: str) -> Outcome:
  target = analysis.targets.get(run.seed)
  if target is None:
    return Outcome(run.seed, np.nan, NO_TARGET)
  if not len(run.loss_N):
    return Outcome(run.seed, np.nan, ABSENT)
  costs_N = {
      'steps_to_target': run.steps_N,
      'total_steps_to_target': run.steps_N + run.prior_steps,
      'compute_to_target': run.flops_N + run.prior_flops,
  }[measure]
  at = np.flatnonzero(smooth(run.loss_N, analysis.window) <= target)
  if not len(at):
    return Outcome(run.seed, np.nan, NOT_REACHED, float(costs_N[-1]))
  value = float(costs_N[at[0]])
  prior = {
      'steps_to_target': 0.0,
      'total_steps_to_target': run.prior_steps,
      'compute_to_target': run.prior_flops,
  }[measure]
  before = float(costs_N[at[0] - 1]) if at[0] else prior
  if np.isnan(value):  # Of FLOPs that are not on record.
    return Outcome(run.seed, np.nan, ABSENT)
  return Outcome(run.seed, value, MEASURED, resolution=value - before)


def cell(analysis: Analysis, arm: str, measure: str) -> Cell:
  """One arm by one measure."""
  outcomes = tuple(
      outcome(analysis, run, measure) for run in analysis.runs[arm]
  )
  counted = [o for o in outcomes if o.state != DIVERGED]
  figure = None
  if counted and all(o.state == MEASURED for o in counted):
    figure = _over_seeds(tuple(o.value for o in counted))
  return Cell(outcomes, figure)


# --- Effects -----------------------------------------------------------------


def effect(analysis: Analysis, arm: str, against: str, measure: str) -> Effect:
  """One arm against another over the seeds that both have."""
  ours = {o.seed: o for o in cell(analysis, arm, measure).outcomes}
  theirs = {o.seed: o for o in cell(analysis, against, measure).outcomes}
  seeds = sorted(ours.keys() & theirs.keys())
  pairs = [(ours[s], theirs[s]) for s in seeds]
  counted = [p for p in pairs if DIVERGED not in (p[0].state, p[1].state)]
  ratio = measure in RATIOS
  sides = (tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
  if not counted or any(o.state != MEASURED for p in counted for o in p):
    return Effect(ratio, *sides, None)
  values = np.array([[a.value, b.value] for a, b in counted])
  figure = _ratio(values) if ratio else _difference(values)
  resolution = max(o.resolution for p in counted for o in p)
  return Effect(ratio, *sides, figure, *values.mean(0).tolist(), resolution)


def _ratio(values: np.ndarray) -> Estimate | None:
  if (values <= 0).any():
    return None  # Reached before the first update: no ratio.
  # On logarithms, so that a against b is one over b against a.
  logs = np.log(values[:, 0]) - np.log(values[:, 1])
  found = _over_seeds(tuple(logs))
  ratios = np.exp(logs)
  return Estimate(
      mean=float(np.exp(found.mean)),
      half_range=float(np.ptp(ratios) / 2),
      low=float(np.exp(found.low)),
      high=float(np.exp(found.high)),
      values=tuple(map(float, ratios)),
  )


def _difference(values: np.ndarray) -> Estimate:
  return _over_seeds(tuple(values[:, 0] - values[:, 1]))


@functools.lru_cache(maxsize=4096)  # Tables and plots ask for the same.
def _over_seeds(values: tuple[float, ...]) -> Estimate:
  return statistics.mean_over_retrains(np.array(values))


def band(analysis: Analysis, arm: str, x: str, y: str = 'loss') -> Band | None:
  """A smoothed curve of an arm over seeds; see `curves.band`."""
  return curves.band(analysis.runs[arm], analysis.window, x, y)
