"""What training costs, on paper: bytes received, and wall time; no jax.

A synchronous update waits for the slowest of W workers and then all-reduces:

  time(W) = E[max of W step times] + alpha + 2 (W - 1) / W model_time

with step times drawn independently from one distribution of positive numbers:
the expected maximum is the integral of 1 - P(time < x)^W over x > 0; of a
sample it is exact, from order statistics.

Steps to a target against workers follow S(W) = S_min (1 + W_crit / W)
(McCandlish et al. 2018, equation 2.11; Shallue et al. 2019), fitted by least
squares on log S.

Shape suffixes: K measured numbers of workers, N values of a sample.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import analysis
from .analysis import Analysis, Effect
from .study_plan import Arm

# --- Bytes -------------------------------------------------------------------


def bytes_per_update(
    pattern: str,
    parameter_bytes: float,
    *,
    workers: int = 1,
    outer_every: int = 1,
) -> float:
  """Returns bytes received per update; publications of peers come besides.

  Args:
    pattern: As of `Arm.communication`.
    parameter_bytes: b, of one set of parameters or gradients.
    workers: W, of one group.
    outer_every: H, updates between outer steps.
  """
  within = all_reduce_bytes(parameter_bytes, workers)
  return {
      'all_reduce': within,
      'exchange': within,
      'outer': within / outer_every,
      # An update is the work of one worker, whatever W.
      'server': 2.0 * parameter_bytes,
  }[pattern]


def all_reduce_bytes(parameter_bytes: float, workers: int) -> float:
  """Returns what each worker of a ring receives in one all-reduce.

  A ring passes each of W parts on 2 (W - 1) times, W - 1 to add up and W - 1 to
  hand round (Patarasuk & Yuan 2009).
  """
  return 2.0 * (workers - 1) / workers * parameter_bytes


# --- Time of an update -------------------------------------------------------


class Latency(NamedTuple):
  """What is assumed of workers and network; the unit is a median step.

  Attributes:
    tail: 99th percentile of the step times of a worker, without the all-reduce;
      they are log-normal.
    sample: Step times as they were measured, if any, in place of that; see
      `sampled`. Beyond them there is no tail: with many workers the model is
      too kind.
    alpha: Time of an all-reduce that does not depend on its size.
    model_time: Time in which a worker receives as many bytes as one model.
    most_workers: Up to how many workers the model is drawn.
  """

  tail: float = 2.0
  sample: tuple[float, ...] = ()
  alpha: float = 0.05
  model_time: float = 0.05
  most_workers: int = 4096


def sampled(times: Sequence[float]) -> tuple[float, ...]:
  """Returns measured step times of one worker, in units of their median.

  Raises:
    ValueError: If there is none, or one is not positive and finite.
  """
  times = np.asarray(times, np.float64)
  if not len(times) or not (np.isfinite(times) & (times > 0)).all():
    raise ValueError(
        'Expected step times, all positive and finite, got'
        f' {times.tolist()[:5]}.'
    )
  return tuple((times / np.median(times)).tolist())


@functools.lru_cache(maxsize=1024)  # Tables, tails and the plot ask again.
def expected_maximum(latency: Latency, workers: int) -> float:
  """Returns the expected largest of so many independent step times."""
  from scipy import integrate, special

  if latency.sample:
    # Of draws with replacement: P(max <= i-th of N) = (i / N)^W.
    count = len(latency.sample)
    below = (np.arange(count + 1) / count) ** workers
    return float(np.sort(latency.sample) @ np.diff(below))
  sigma = math.log(latency.tail) / special.ndtri(0.99)
  if not sigma:
    return 1.0
  # Over z = log(x) / sigma: 1 - F^W keeps its digits in the tail.
  exceeded = lambda z: -np.expm1(workers * special.log_ndtr(z))
  weighed = lambda z: exceeded(z) * sigma * np.exp(sigma * z)
  # Below, all workers are slower; beyond, the tail weighs nothing.
  low, high = special.ndtri(1e-18 ** (1 / workers)), 12.0 + sigma
  rest, _ = integrate.quad(
      weighed, low, high, epsabs=0, epsrel=1e-10, limit=200
  )
  return float(math.exp(sigma * low) + rest)


def step_time(latency: Latency, workers: int, compute: float = 1.0) -> float:
  """Returns the expected time of one synchronous update.

  Args:
    latency: What is assumed.
    workers: W, of one group.
    compute: Factor of the step time of a worker, such as for teachers.
  """
  slowest = compute * expected_maximum(latency, workers)
  if workers == 1:
    return slowest
  models = all_reduce_bytes(1.0, workers)
  return slowest + latency.alpha + models * latency.model_time


# --- Steps to target ---------------------------------------------------------


class Fit(NamedTuple):
  """S(W) = floor (1 + critical / W).

  Attributes:
    floor: S_min, steps that no number of workers goes below.
    critical: W_crit, workers at which twice the floor is needed.
    error: Root mean square residual of log S.
  """

  floor: float
  critical: float
  error: float

  def steps(self, workers: float) -> float:
    """Returns the steps to the target with so many workers."""
    return self.floor * (1 + self.critical / workers)


def fit_steps(workers_K: Sequence[float], steps_K: Sequence[float]) -> Fit:
  """Fits log steps, in one dimension, since the floor is solved for.

  Args:
    workers_K: Three numbers of workers or more.
    steps_K: Steps to the target, all positive.
  """
  from scipy import optimize

  workers_K, steps_K = np.asarray(workers_K, float), np.asarray(steps_K, float)
  rest_K = lambda g: np.log(steps_K) - np.log1p(math.exp(g) / workers_K)
  error = lambda g: rest_K(g).std()
  # There may be more than one valley: first the deepest, then its bottom.
  grid, apart = np.linspace(
      math.log(workers_K.min() * 1e-4),
      math.log(workers_K.max() * 1e4),
      401,
      retstep=True,
  )
  near = min(grid, key=error)
  found = optimize.minimize_scalar(
      error,
      bounds=(near - apart, near + apart),
      method='bounded',
      options={'xatol': 1e-9},
  )
  floor = math.exp(rest_K(found.x).mean())
  return Fit(floor, math.exp(found.x), float(error(found.x)))


# --- Wall time of a study ----------------------------------------------------

ONE, TWO = 'one group', 'two groups'


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
    return step_time(self.assumed, workers)

  def taught_update(self, workers: int) -> float:
    """Returns the time of an update of each of two groups."""
    return step_time(self.assumed, workers, self.compute)

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
    fit = fit_steps(list(one), list(one.values()))
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


# --- A map of batches and targets --------------------------------------------

# Of each run of the baseline, up to where its best loss is the target.
_TARGETS = {'early': 0.25, 'middle': 0.5, 'late': 1.0}
# What is compared with one group of as many workers: the series of an arm, and
# how many times the workers it has.
_AGAINST_ONE = {
    'twice the batch': (ONE, 2),
    'two groups': (TWO, 1),
    'ensemble': ('ensemble', 1),
}


class TargetMap(NamedTuple):
  """What a second group saves on the way to one target, by workers of a group.

  Attributes:
    name: Of the target.
    nats: Its mean over seeds; NaN without any.
    steps: Mean steps of one group, where all seeds reach it.
    fit: Of these; None for fewer than three.
    ratios: By what is compared with one group ('twice the batch', 'two groups',
      'ensemble'), the ratio of steps by workers.
    pays: By workers, the ratio of steps of two groups to those of twice the
      batch.
  """

  name: str
  nats: float
  steps: Mapping[int, float]
  fit: Fit | None
  ratios: Mapping[str, Mapping[int, Effect]]
  pays: Mapping[int, Effect]

  def where(self, better: bool) -> list[int]:
    """Returns where the whole interval says that a second group is better.

    Args:
      better: Than twice the batch; else where it is worse.
    """
    ends = {
        w: (e.estimate.low, e.estimate.high)
        for w, e in self.pays.items()
        if e.estimate is not None and not e.within_resolution
    }
    return [w for w, (a, b) in ends.items() if (b < 1 if better else a > 1)]


def map_of_batches(found: Analysis) -> list[TargetMap]:
  """Returns a map for each target, of the arms that were trained."""
  arms = {(a.series, a.workers): a for a in found.trained}
  maps = []
  for name, share in _TARGETS.items():
    at = analysis.with_targets(found, share)
    compare = lambda a, b, at=at: analysis.effect(
        at, arms[a].name, arms[b].name, 'steps_to_target'
    )
    groups = {w: arm for (series, w), arm in arms.items() if series == ONE}
    steps = _steps(at, groups)
    ratios = {
        kind: {
            w: compare((series, times * w), (ONE, w))
            for w in sorted(groups)
            if (series, times * w) in arms
        }
        for kind, (series, times) in _AGAINST_ONE.items()
    }
    maps.append(
        TargetMap(
            name,
            float(np.mean(list(at.targets.values()) or np.nan)),
            steps,
            fit_steps(list(steps), list(steps.values()))
            if len(steps) >= 3
            else None,
            ratios,
            pays={
                w: compare((TWO, w), (ONE, 2 * w))
                for w in sorted(groups)
                if (TWO, w) in arms and (ONE, 2 * w) in arms
            },
        )
    )
  return maps
