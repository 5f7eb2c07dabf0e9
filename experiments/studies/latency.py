"""Wall time of synchronous training from a tail-latency model; no jax.

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
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import communication

_P99 = 0.99


class LogNormal(NamedTuple):
  """Step times of a worker: median and 99th percentile.

  In any unit of time; all times of one `Latency` share theirs.
  """

  median: float
  p99: float


class Empirical(NamedTuple):
  """Step times of a worker as they were measured; see `from_sample`.

  Beyond the sample there is no tail: with many workers the model is too kind.
  """

  sample: tuple[float, ...]


Distribution = LogNormal | Empirical


def from_sample(times: Sequence[float]) -> Empirical:
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
  return Empirical(tuple((times / np.median(times)).tolist()))


class Latency(NamedTuple):
  """What is assumed of workers and network; the unit is a median step.

  Attributes:
    steps: Of one worker, without the all-reduce.
    alpha: Time of an all-reduce that does not depend on its size.
    model_time: Time in which a worker receives as many bytes as one model.
    most_workers: Up to how many workers the model is drawn.
  """

  steps: Distribution = LogNormal(1.0, 2.0)
  alpha: float = 0.05
  model_time: float = 0.05
  most_workers: int = 4096


# --- Time of an update -------------------------------------------------------


@functools.lru_cache(maxsize=1024)  # Tables, tails and the plot ask again.
def expected_maximum(distribution: Distribution, workers: int) -> float:
  """Returns the expected largest of so many independent step times.

  Raises:
    ValueError: If the distribution or the number makes no sense.
  """
  if workers < 1:
    raise ValueError(f'Expected at least 1 worker, got {workers}.')
  if isinstance(distribution, Empirical):
    return _maximum_of_sample(np.array(distribution.sample), workers)
  return _maximum_of_log_normal(*distribution, workers)


def _maximum_of_log_normal(median: float, p99: float, workers: int) -> float:
  from scipy import integrate, special

  if not 0 < median <= p99:
    raise ValueError(
        f'Expected 0 < median <= p99, got median={median}, p99={p99}.'
    )
  sigma = math.log(p99 / median) / special.ndtri(_P99)
  if not sigma:
    return median
  # Over z = log(x / median) / sigma: 1 - F^W keeps its digits in the tail.
  exceeded = lambda z: -np.expm1(workers * special.log_ndtr(z))
  weighed = lambda z: exceeded(z) * sigma * np.exp(sigma * z)
  # Below, all workers are slower; beyond, the tail weighs nothing.
  low, high = special.ndtri(1e-18 ** (1 / workers)), 12.0 + sigma
  rest, _ = integrate.quad(
      weighed, low, high, epsabs=0, epsrel=1e-10, limit=200
  )
  return float(median * (math.exp(sigma * low) + rest))


def _maximum_of_sample(sample_N: np.ndarray, workers: int) -> float:
  """Returns that of draws with replacement: P(max <= i-th) = (i / N)^W."""
  if not len(sample_N) or not np.isfinite(sample_N).all():
    raise ValueError('Expected a sample of at least one finite step time.')
  below = (np.arange(len(sample_N) + 1) / len(sample_N)) ** workers
  return float(np.sort(sample_N) @ np.diff(below))


def step_time(latency: Latency, workers: int, compute: float = 1.0) -> float:
  """Returns the expected time of one synchronous update.

  Args:
    latency: What is assumed.
    workers: W, of one group.
    compute: Factor of the step time of a worker, such as for teachers.
  """
  slowest = compute * expected_maximum(latency.steps, workers)
  if workers == 1:
    return slowest
  models = communication.all_reduce_bytes(1.0, workers)
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
  """Fits log steps; in one dimension, since the floor is solved for.

  Raises:
    ValueError: For fewer than three points, or values that are not positive.
  """
  from scipy import optimize

  workers_K, steps_K = np.asarray(workers_K, float), np.asarray(steps_K, float)
  if len(workers_K) < 3 or (steps_K <= 0).any() or (workers_K <= 0).any():
    raise ValueError(
        'Expected steps, all positive, at three or more numbers of workers, got'
        f' {steps_K.tolist()} at {workers_K.tolist()}.'
    )
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
