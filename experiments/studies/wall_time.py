"""The view 'latency': wall time of the measured steps, and beyond, on paper.

Measured steps to the target, with a fit beyond them, times the expected time of
an update, see `latency`. `study_plots` draws it.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from . import analysis, latency
from .analysis import Analysis
from .declaration import Arm
from .latency import Fit, Latency

ONE, TWO = 'one group', 'two groups'
# How much longer than the median one step in a hundred is.
_TAILS = (1.2, 1.5, 2.0, 3.0, 5.0)


class WallTime(NamedTuple):
  """Steps to the target, measured and fitted, under a latency.

  Attributes:
    one: Mean steps to the target by workers, of one group.
    two: Those of each of two groups, by workers of each.
    at: The largest number of workers that was measured with both; 0 without.
    ratio: Steps of two groups over those of one at `at` workers.
    compute: FLOPs of an update of a group of two over those of one alone.
    fit: Of the steps of one group; None for fewer than three points.
    assumed: The latency.
  """

  one: Mapping[int, float]
  two: Mapping[int, float]
  at: int
  ratio: float
  compute: float
  fit: Fit | None
  assumed: Latency

  def steps(self, workers: int) -> float:
    """Returns steps of one group: as measured, or else by the fit."""
    return self.one.get(workers, self.fit.steps(workers))

  def update(self, workers: int) -> float:
    """Returns the time of an update of one group."""
    return latency.step_time(self.assumed, workers)

  def taught_update(self, workers: int) -> float:
    """Returns the time of an update of each of two groups."""
    return latency.step_time(self.assumed, workers, self.compute)

  def time_of_one(self, workers: int) -> float:
    """Returns the time to the target of one group."""
    return self.steps(workers) * self.update(workers)

  def time_of_two(self, workers: int) -> float:
    """Returns that of two groups of so many workers each."""
    return self.ratio * self.steps(workers) * self.taught_update(workers)

  def doublings(self) -> list[int]:
    """Returns numbers of workers: those measured, then twice as many."""
    workers = sorted(self.one)
    while 2 * workers[-1] <= self.assumed.most_workers:
      workers.append(2 * workers[-1])
    return workers

  def gains(self) -> dict[int, float]:
    """Returns, by W, the time of one group of 2 W over that of two of W."""
    workers = min(self.one)
    found = {}
    while 2 * workers <= self.assumed.most_workers:
      found[workers] = self.time_of_one(2 * workers) / self.time_of_two(workers)
      workers *= 2
    return found

  def crossover(self) -> int | None:
    """Returns the least W from which on two groups of W stay ahead, if any."""
    ahead = itertools.takewhile(
        lambda pair: pair[1] > 1, reversed(self.gains().items())
    )
    return min((workers for workers, _ in ahead), default=None)


def measure(found: Analysis, assumed: Latency) -> WallTime:
  """Returns steps to the target where all seeds reach it; ratio and cost."""
  arms = {
      series: {a.workers: a for a in found.study.arms if a.series == series}
      for series in (ONE, TWO)
  }
  one, two = (_steps(found, arms[series]) for series in (ONE, TWO))
  fit = None
  if len(one) >= 3:
    fit = latency.fit_steps(list(one), list(one.values()))
  at = max(one.keys() & two.keys(), default=0)
  ratio = compute = float('nan')
  if at:
    both = [arms[series][at] for series in (TWO, ONE)]
    effect = analysis.effect(found, *(a.name for a in both), 'steps_to_target')
    ratio = effect.estimate.mean if effect.estimate else two[at] / one[at]
    taught, alone = (_flops_per_update(found, arm) for arm in both)
    compute = taught / alone
  return WallTime(one, two, at, ratio, compute, fit, assumed)


def _steps(found: Analysis, arms: dict[int, Arm]) -> dict[int, float]:
  steps = {}
  for workers, arm in sorted(arms.items()):
    estimate = analysis.cell(found, arm.name, 'steps_to_target').estimate
    if estimate is not None and estimate.mean > 0:
      steps[workers] = estimate.mean
  return steps


def _flops_per_update(found: Analysis, arm: Arm) -> float:
  """Returns those of one group; with teachers, burn-in averaged in."""
  runs = [r for r in found.runs[arm.name] if analysis.diverged_at(r) is None]
  rates = [r.flops_N[-1] / r.steps_N[-1] for r in runs]
  return float(np.mean(rates)) / arm.num_groups


# --- Tables ------------------------------------------------------------------


def times_table(model: WallTime) -> pd.DataFrame:
  """Returns steps and times by number of workers."""
  rows = []
  for workers in model.doublings():
    paper = '' if workers in model.one else ' (fit)'
    row = {
        'workers in all': f'{workers:,}',
        'steps, one group': f'{model.steps(workers):,.0f}{paper}',
        'time of an update': f'{model.update(workers):.2f}',
        'time to target, one group': f'{model.time_of_one(workers):,.0f}',
    }
    if model.at:
      row['two groups of half as many'] = (
          '-' if workers % 2 else f'{model.time_of_two(workers // 2):,.0f}'
      )
    rows.append(row)
  return pd.DataFrame(rows)


def tails_table(model: WallTime) -> pd.DataFrame:
  """Returns the crossover for shorter and longer tails."""
  rows = []
  for tail in _TAILS:
    steps = latency.LogNormal(1.0, tail)
    other = model._replace(assumed=model.assumed._replace(steps=steps))
    first, (*_, gain) = other.crossover(), other.gains().values()
    rows.append(
        {
            '99th percentile / median': f'{tail:g}',
            'two groups faster from W': f'{first:,}' if first else '-',
            'factor at the largest W': f'{gain:.2f}',
        }
    )
  return pd.DataFrame(rows)
