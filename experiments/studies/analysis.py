"""From the runs of a study to numbers: targets, scores, paired effects.

The rules, the same for all arms and said on every page by `study_page`:
* Losses are smoothed by a trailing mean over k evaluations.
* The target of a seed is the best smoothed loss of the baseline of that seed;
  an arm reaches it at its first evaluation at or under it, not in between.
* What was not reached stays 'not reached', and there is no mean over the rest.
* A run that diverged is reported, and left out of means.

Shape suffix: N evaluations of a run.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codistill_jax import statistics
from codistill_jax.statistics import Estimate

from .study_plan import MEASURES, Arm, Factor, Study

# Of a run by a measure.
MEASURED = 'measured'
NOT_REACHED = 'not reached'
DIVERGED = 'diverged'
NO_TARGET = 'no target'
ABSENT = 'not measured'

_WINDOW = 3  # Evaluations that a loss is averaged over, ...
_FEW = 12  # ... unless the baseline has fewer than these.


class Run(NamedTuple):
  """One training of one arm, or what an ensemble of its groups would do.

  Attributes:
    arm: Its name.
    seed: Its seed; runs of one seed in different arms see the same data order.
    rate: Learning rate.
    tuning: Whether it was only there to choose the rate.
    steps_N: Updates done at each evaluation, of each group.
    loss_N: Validation loss in nats, the mean over groups.
    accuracy_N: Validation accuracy; empty for a task without it.
    examples_per_step: Of all groups together.
    flops_N: FLOPs spent until each evaluation, by all groups, with teachers.
    bytes_N: Bytes that one worker or group has received until then.
    prior_steps: Steps that had to be done before the first one: of teachers
      that were trained before, all of them together.
    prior_flops: Their FLOPs.
    diverged_at: The step at which loss or gradient were no longer finite; the
      run ends there. None if that did not happen.
    seconds: Wall time of the training, on the machine that it ran on.
  """

  arm: str
  seed: int
  rate: float
  tuning: bool
  steps_N: np.ndarray
  loss_N: np.ndarray
  accuracy_N: np.ndarray
  examples_per_step: float
  flops_N: np.ndarray
  bytes_N: np.ndarray
  prior_steps: float = 0.0
  prior_flops: float = 0.0
  diverged_at: int | None = None
  seconds: float = float('nan')


class Score(NamedTuple):
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
    scores: By seed, in order.
    estimate: Over the runs that did not diverge; None unless all those are
      measured.
  """

  scores: tuple[Score, ...]
  estimate: Estimate | None

  def count(self, state: str) -> int:
    """Returns how many seeds are in a state."""
    return sum(s.state == state for s in self.scores)


class Effect(NamedTuple):
  """One arm against another, seed by seed.

  Attributes:
    ratio: Whether the estimate is of a ratio, else of a difference.
    ours: Outcomes of the arm, of the seeds that both have.
    theirs: Those of the other, in the same order.
    estimate: Of ratios the geometric mean, with its interval; None if a pair is
      not measured for any other reason than divergence.
    mean: Of the arm over the pairs that count; NaN without.
    baseline: Of the other.
    resolution: The largest of theirs: what lies no further apart may be the
      spacing of evaluations.
  """

  ratio: bool
  ours: tuple[Score, ...]
  theirs: tuple[Score, ...]
  estimate: Estimate | None
  mean: float = float('nan')
  baseline: float = float('nan')
  resolution: float = float('nan')

  @property
  def pairs(self) -> int:
    """Over how many seeds the estimate is."""
    return len(self.estimate.values) if self.estimate else 0

  @property
  def differences(self) -> dict[int, float]:
    """Returns ours less theirs by seed, where both are measured."""
    return {
        a.seed: a.value - b.value
        for a, b in zip(self.ours, self.theirs)
        if a.state == b.state == MEASURED
    }

  @property
  def one_side_diverged(self) -> str:
    """'more' if all of ours diverged and none of theirs; 'less'; or ''."""
    ours, theirs = (
        {s.state == DIVERGED for s in side} for side in (self.ours, self.theirs)
    )
    if (ours, theirs) == ({True}, {False}):
      return 'more'
    return 'less' if (ours, theirs) == ({False}, {True}) else ''

  @property
  def within_resolution(self) -> bool:
    """Returns whether the two are at most one evaluation apart."""
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

  @property
  def trained(self) -> list[Arm]:
    """Returns the arms that have runs."""
    return [arm for arm in self.study.arms if self.runs[arm.name]]

  @property
  def all_runs(self) -> list[Run]:
    """Returns the runs of all arms."""
    return [run for runs in self.runs.values() for run in runs]


def analyse(study: Study, runs: Iterable[Run]) -> Analysis:
  """Sorts runs and finds the targets."""
  runs = list(runs)
  final = _by_arm(study, [r for r in runs if not r.tuning])
  tuning = _by_arm(study, [r for r in runs if r.tuning])
  window = _window_of(final.get(study.baseline, ()))
  return with_targets(Analysis(study, window, {}, final, tuning), 1.0)


def with_targets(found: Analysis, share: float) -> Analysis:
  """Returns the analysis with other targets.

  Args:
    found: The runs.
    share: Of each run of the baseline, up to where its best smoothed loss is
      the target.
  """
  targets = {
      run.seed: float(
          smooth(run.loss_N, found.window)[
              : math.ceil(share * len(run.loss_N))
          ].min()
      )
      for run in found.runs.get(found.study.baseline, ())
      if diverged_at(run) is None and len(run.loss_N)
  }
  return found._replace(targets=targets)


def _by_arm(study: Study, runs: Sequence[Run]) -> dict[str, tuple[Run, ...]]:
  ordered = sorted(runs, key=lambda r: (r.seed, r.rate))
  return {
      arm.name: tuple(r for r in ordered if r.arm == arm.name)
      for arm in study.arms
  }


# --- Curves ------------------------------------------------------------------


class Band(NamedTuple):
  """A curve over seeds: mean and range at the evaluations that all have."""

  x_N: np.ndarray
  mean_N: np.ndarray
  low_N: np.ndarray
  high_N: np.ndarray


def _window_of(baseline: Sequence[Run]) -> int:
  """Returns k: 3, or 1 where the baseline has fewer than 12 evaluations."""
  counts = [len(r.loss_N) for r in baseline if diverged_at(r) is None]
  return _WINDOW if counts and min(counts) >= _FEW else 1


def smooth(values_N: np.ndarray, window: int) -> np.ndarray:
  """Returns trailing means over `window` evaluations, fewer at the start."""
  values_N = np.asarray(values_N, np.float64)
  starts = [max(0, i - window + 1) for i in range(len(values_N))]
  return np.array([values_N[s : i + 1].mean() for i, s in enumerate(starts)])


def diverged_at(run: Run) -> int | None:
  """Returns the step of divergence, also if only an evaluation shows it."""
  if run.diverged_at is not None:
    return run.diverged_at
  bad = np.flatnonzero(~np.isfinite(run.loss_N))
  return int(run.steps_N[bad[0]]) if len(bad) else None


def band(analysis: Analysis, arm: str, x: str, y: str = 'loss') -> Band | None:
  """Returns a smoothed curve of an arm over the seeds that did not diverge.

  Args:
    analysis: The runs.
    arm: Its name.
    x: 'steps', 'flops' (with those of the teachers before) or 'bytes'.
    y: 'loss' or 'accuracy'.

  Returns:
    None if no run has such values, or they share no evaluation.
  """
  runs = [
      run
      for run in analysis.runs[arm]
      if diverged_at(run) is None and len(getattr(run, f'{y}_N'))
  ]
  if not runs:
    return None
  steps = functools.reduce(np.intersect1d, [r.steps_N for r in runs])
  if not len(steps):
    return None
  at = [np.searchsorted(r.steps_N, steps) for r in runs]
  ys = [
      smooth(getattr(r, f'{y}_N'), analysis.window)[i] for r, i in zip(runs, at)
  ]
  before = [r.prior_flops if x == 'flops' else 0.0 for r in runs]
  xs = [getattr(r, f'{x}_N')[i] + b for r, i, b in zip(runs, at, before)]
  mean, low, high = (f(ys, axis=0) for f in (np.mean, np.min, np.max))
  return Band(np.mean(xs, axis=0), mean, low, high)


# --- Scores ------------------------------------------------------------------


def cell(analysis: Analysis, arm: str, measure: str) -> Cell:
  """Returns one arm by one measure."""
  scores = tuple(score(analysis, run, measure) for run in analysis.runs[arm])
  counted = [s for s in scores if s.state != DIVERGED]
  estimate = None
  if counted and all(s.state == MEASURED for s in counted):
    estimate = statistics.mean_over_retrains([s.value for s in counted])
  return Cell(scores, estimate)


def score(analysis: Analysis, run: Run, measure: str) -> Score:
  """Returns one run by one measure."""
  if diverged_at(run) is not None:
    return Score(run.seed, np.nan, DIVERGED)
  if MEASURES[measure].ratio:
    return _to_target(analysis, run, measure)
  values_N = {
      'final_loss': run.loss_N[-1:],
      'best_loss': smooth(run.loss_N, analysis.window),
      'final_accuracy': run.accuracy_N[-1:],
  }.get(
      measure, np.zeros(0)
  )  # Churn is no number of one run.
  value = min(values_N.tolist(), default=np.nan)
  return Score(run.seed, value, ABSENT if np.isnan(value) else MEASURED)


def _to_target(analysis: Analysis, run: Run, measure: str) -> Score:
  target = analysis.targets.get(run.seed)
  if target is None:
    return Score(run.seed, np.nan, NO_TARGET)
  if not len(run.loss_N):
    return Score(run.seed, np.nan, ABSENT)
  costs_N, prior = {
      'steps_to_target': (run.steps_N, 0.0),
      'total_steps_to_target': (run.steps_N, run.prior_steps),
      'compute_to_target': (run.flops_N, run.prior_flops),
  }[measure]
  costs_N = costs_N + prior
  reached = np.flatnonzero(smooth(run.loss_N, analysis.window) <= target)
  if not len(reached):
    return Score(run.seed, np.nan, NOT_REACHED, float(costs_N[-1]))
  at = reached[0]
  value = float(costs_N[at])
  if np.isnan(value):  # Of FLOPs that are not on record.
    return Score(run.seed, np.nan, ABSENT)
  before = float(costs_N[at - 1]) if at else prior
  return Score(run.seed, value, MEASURED, resolution=value - before)


# --- Effects -----------------------------------------------------------------


def effect(analysis: Analysis, arm: str, against: str, measure: str) -> Effect:
  """Compares one arm with another over the seeds that both have."""
  ours = {s.seed: s for s in cell(analysis, arm, measure).scores}
  theirs = {s.seed: s for s in cell(analysis, against, measure).scores}
  seeds = sorted(ours.keys() & theirs.keys())
  pairs = [(ours[seed], theirs[seed]) for seed in seeds]
  counted = [p for p in pairs if DIVERGED not in (p[0].state, p[1].state)]
  ratio = MEASURES[measure].ratio
  sides = (tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
  if not counted or any(s.state != MEASURED for p in counted for s in p):
    return Effect(ratio, *sides, None)
  values = np.array([[a.value, b.value] for a, b in counted])
  estimate = (
      _ratio(values)
      if ratio
      else statistics.mean_over_retrains(values[:, 0] - values[:, 1])
  )
  resolution = max(s.resolution for p in counted for s in p)
  return Effect(ratio, *sides, estimate, *values.mean(0).tolist(), resolution)


class FactorEffects(NamedTuple):
  """What a changed setting makes of codistillation.

  Attributes:
    factor: What was changed, and where.
    steps: Of its arm over one group, to the best loss of that one group.
    loss: At the end, over that one group.
    change: How much more that is than without the change, seed by seed; None
      for what is not changed, and where a seed is missing or diverged.
  """

  factor: Factor
  steps: Effect
  loss: Effect
  change: Estimate | None

  @property
  def direction(self) -> str:
    """Returns 'better' or 'worse' by the whole interval of a change; or ''."""
    if self.change is None:
      return ''
    below, above = self.change.high < 0, self.change.low > 0
    return 'better' if below else 'worse' if above else ''


def factor_effects(found: Analysis) -> list[FactorEffects]:
  """Returns the effects of each factor of a study, each to its own target."""
  factors = found.study.factors
  over_one = {f: effect(found, f.arm, f.one, 'final_loss') for f in factors}
  unchanged = {f.arm: over_one[f] for f in factors if f.arm == f.unchanged}
  effects = []
  for factor, loss in over_one.items():
    study = found.study._replace(baseline=factor.one)
    at = with_targets(found._replace(study=study), 1.0)
    steps = effect(at, factor.arm, factor.one, 'steps_to_target')
    values, before = loss.differences, unchanged[factor.unchanged].differences
    change = None
    if (
        factor.arm != factor.unchanged
        and values.keys() == before.keys() != set()
    ):
      change = statistics.mean_over_retrains(
          np.array([values[seed] - before[seed] for seed in sorted(values)])
      )
    effects.append(FactorEffects(factor, steps, loss, change))
  return effects


def _ratio(values: np.ndarray) -> Estimate | None:
  if (values <= 0).any():
    return None  # Reached before the first update: no ratio.
  # On logarithms, so that a against b is one over b against a.
  logs = np.log(values[:, 0]) - np.log(values[:, 1])
  found = statistics.mean_over_retrains(logs)
  ratios = np.exp(logs)
  return Estimate(
      mean=float(np.exp(found.mean)),
      half_range=float(np.ptp(ratios) / 2),
      low=float(np.exp(found.low)),
      high=float(np.exp(found.high)),
      values=tuple(map(float, ratios)),
  )
