"""The view 'latency': wall time of the measured steps, and beyond, on paper.

Measured steps to the target, with a fit beyond them, times the expected time of
an update, see `latency`. Words and tables; `study_plots` draws it.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.reports import pages
from experiments.studies import analysis, latency, results
from experiments.studies.analysis import Analysis
from experiments.studies.declaration import Arm
from experiments.studies.latency import Crossover, Empirical, Fit, Latency

ONE, TWO = 'one group', 'two groups'
# How much longer than the median one step in a hundred is.
_TAILS = (1.2, 1.5, 2.0, 3.0, 5.0)


class Measured(NamedTuple):
  """What the runs give to the model.

  Attributes:
    one: Mean steps to the target by workers, of one group.
    two: Those of each of two groups, by workers of each.
    ratio: Steps of two groups over those of one, at `at` workers; NaN if no
      number of workers was measured with both.
    compute: FLOPs of an update of a group of two over those of one alone.
    at: The largest number of workers with both; 0 without.
  """

  one: dict[int, float]
  two: dict[int, float]
  ratio: float
  compute: float
  at: int


class WallTime(NamedTuple):
  """Steps, measured and fitted, under assumptions of latency.

  Attributes:
    measured: What the runs give.
    fit: Of the steps of one group.
    assumed: The latency.
  """

  measured: Measured
  fit: Fit
  assumed: Latency

  def steps(self, workers: int) -> float:
    """Returns steps of one group: as measured, or else by the fit."""
    return self.measured.one.get(workers, self.fit.steps(workers))

  def update(self, workers: int) -> float:
    """Returns the time of an update of one group."""
    return latency.step_time(self.assumed, workers)

  def taught_update(self, workers: int) -> float:
    """Returns the time of an update of each of two groups."""
    return latency.step_time(self.assumed, workers, self.measured.compute)

  def doublings(self) -> list[int]:
    """Returns numbers of workers: those measured, then twice as many."""
    workers = sorted(self.measured.one)
    while 2 * workers[-1] <= self.assumed.most_workers:
      workers.append(2 * workers[-1])
    return workers

  def crossover(self) -> Crossover | None:
    """Compares one group with two; None without a measured ratio."""
    if not self.measured.at:
      return None
    return latency.crossover(
        self.steps,
        self.measured.ratio,
        self.measured.compute,
        self.assumed,
        smallest=min(self.measured.one),
    )


def measure(found: Analysis) -> Measured:
  """Returns steps to the target where all seeds reach it; ratio and cost."""
  arms = {
      series: {a.workers: a for a in found.study.arms if a.series == series}
      for series in (ONE, TWO)
  }
  one, two = (_steps(found, arms[series]) for series in (ONE, TWO))
  both = sorted(one.keys() & two.keys())
  if not both:
    return Measured(one, two, float('nan'), float('nan'), 0)
  at = both[-1]
  effect = analysis.effect(
      found, arms[TWO][at].name, arms[ONE][at].name, 'steps_to_target'
  )
  ratio = effect.estimate.mean if effect.estimate else two[at] / one[at]
  costs = [_flops_per_update(found, arms[series][at]) for series in (TWO, ONE)]
  return Measured(one, two, ratio, costs[0] / costs[1], at)


def _steps(found: Analysis, arms: dict[int, Arm]) -> dict[int, float]:
  steps = {}
  for workers, arm in sorted(arms.items()):
    estimate = analysis.cell(found, arm.name, 'steps_to_target').estimate
    if estimate is not None and estimate.mean > 0:
      steps[workers] = estimate.mean
  return steps


def _flops_per_update(found: Analysis, arm: Arm) -> float:
  """Returns those of one group; with teachers, burn-in averaged in."""
  runs = [r for r in found.runs[arm.name] if results.diverged_at(r) is None]
  rates = [r.flops_N[-1] / r.steps_N[-1] for r in runs]
  return float(np.mean(rates)) / arm.num_groups


def fitted(measured: Measured, assumed: Latency) -> WallTime | None:
  """Fits the steps of one group; None for fewer than three of them."""
  if len(measured.one) < 3:
    return None
  fit = latency.fit_steps(list(measured.one), list(measured.one.values()))
  return WallTime(measured, fit, assumed)


# --- Words -------------------------------------------------------------------


def too_few(measured: Measured) -> str:
  """Says why there is no wall time."""
  return (
      'No wall time: the target was reached in every seed at'
      f' {len(measured.one)} number(s) of workers of one group, and the curve'
      ' of steps needs three.'
  )


def summary(model: WallTime) -> str:
  """Says what was measured, and from where on two groups are faster."""
  measured, fit, found = model.measured, model.fit, model.crossover()
  text = (
      f'Steps to the target were measured up to {max(measured.one):,} workers'
      ' of one group; beyond, on paper, they follow'
      f' S(W) = {fit.floor:,.0f} (1 + {fit.critical:.3g} / W), fitted to'
      f' {len(measured.one)} points (root mean square error {fit.error:.1%}).'
  )
  if found is None:
    return (
        f'{text} No number of workers was measured with one and with two'
        ' groups, so there is no crossover to compute.'
    )
  text += (
      f' At {measured.at:,} workers each of two groups needs'
      f' {measured.ratio:.2f} times the steps of one.'
  )
  largest = 2 * found.workers_K[-1]
  if found.first is None:
    return (
        f'{text} With that, two groups of W never stay ahead of one group of'
        f' 2 W up to 2 W = {largest:,} workers.'
    )
  on_paper = '' if 2 * found.first <= max(measured.one) else ' (on paper)'
  return (
      f'{text} With that, two groups of W are faster than one group of 2 W from'
      f' W = {found.first:,} on{on_paper}; at 2 W = {largest:,} by a factor of'
      f' {found.gain:.2f}.'
  )


def assumptions(model: WallTime, bytes_of_model: int) -> list[str]:
  """Says what the model takes for granted."""
  measured, fit, assumed = model
  received = pages.number(bytes_of_model, 'bytes')
  unknown = (
      ''
      if max(measured.one) > fit.critical
      else ' No number of workers that was measured is above the fitted'
      f' {fit.critical:.3g}, so the fit says little of that floor.'
  )
  lines = [
      f'Assumed: {_distribution(assumed)}; an all-reduce takes'
      f' {assumed.alpha:g} and {assumed.model_time:g} for each {received} (one'
      ' model) that a worker receives. Time is in median steps of one worker.',
      'Step times of workers are independent and all alike; every update waits'
      ' for the slowest; the all-reduce does not overlap with computation, and'
      ' its fixed cost does not grow with W.',
      'Each worker keeps its batch, so the group batch grows with W.',
      f'Steps do not fall below the fitted {fit.floor:,.0f}.{unknown}',
  ]
  if measured.at:
    lines.append(
        f'The ratio of {measured.ratio:.2f} holds at every W, though it was'
        f' measured at {measured.at:,}; an update with teachers costs'
        f' {measured.compute:.2f} times one without, as the FLOPs of the runs'
        ' say; groups do not wait for each other, and exchanges cost no time.'
    )
  return lines


def _distribution(assumed: Latency) -> str:
  if isinstance(assumed.steps, Empirical):
    return (
        f'step times as in a sample of {len(assumed.steps.sample):,}, with no'
        ' tail beyond it'
    )
  median, p99 = assumed.steps
  return f'log-normal step times, median {median:g}, 99th percentile {p99:g}'


# --- Tables ------------------------------------------------------------------


def times_table(model: WallTime) -> pd.DataFrame:
  """Returns steps and times by number of workers."""
  measured, rows = model.measured, []
  taught = lambda w: measured.ratio * model.steps(w) * model.taught_update(w)
  for workers in model.doublings():
    steps, update = model.steps(workers), model.update(workers)
    paper = '' if workers in measured.one else ' (fit)'
    row = {
        'workers in all': f'{workers:,}',
        'steps, one group': f'{steps:,.0f}{paper}',
        'time of an update': f'{update:.2f}',
        'time to target, one group': f'{steps * update:,.0f}',
    }
    if measured.at:
      row['two groups of half as many'] = (
          '-' if workers % 2 else f'{taught(workers // 2):,.0f}'
      )
    rows.append(row)
  return pd.DataFrame(rows)


def tails_table(model: WallTime) -> pd.DataFrame:
  """Returns the crossover for shorter and longer tails."""
  rows = []
  for tail in _TAILS:
    steps = latency.LogNormal(1.0, tail)
    other = model._replace(assumed=model.assumed._replace(steps=steps))
    found = other.crossover()
    rows.append(
        {
            '99th percentile / median': f'{tail:g}',
            'two groups faster from W': (
                '-' if found.first is None else f'{found.first:,}'
            ),
            'factor at the largest W': f'{found.gain:.2f}',
        }
    )
  return pd.DataFrame(rows)
