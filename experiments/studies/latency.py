"""Wall time of synchronous training from a tail-latency model; numpy only.

A synchronous update waits for the slowest of W workers and then all-reduces:

  time(W) = E[max of W step times] + alpha + 2 (W - 1) / W b beta

with step times drawn independently from one distribution. Of W draws with
quantile function q, the expected maximum is the integral of q(v^(1/W)) over v
in (0, 1); of a sample it is exact, from order statistics.

Steps to a target against workers follow S(W) = S_min (1 + W_crit / W)
(McCandlish et al. 2018, equation 2.11; Shallue et al. 2019), fitted by least
squares on log S.

Shape suffixes: K measured numbers of workers, N values of a sample.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.studies import communication

_CUT = (-45.0, 6.0)  # Of the integral: beyond, the weight is below 1e-19.
_NODES = 4_000
_P99 = 0.01


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
  """Measured step times of one worker, in units of their median.

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
    beta: Time per byte that a worker receives; None for such that one model of
      the study takes `model_time`.
    model_time: Time in which a worker receives as many bytes as one model.
    most_workers: Up to how many workers the model is drawn.
  """

  steps: Distribution = LogNormal(1.0, 2.0)
  alpha: float = 0.05
  beta: float | None = None
  model_time: float = 0.05
  most_workers: int = 4096


# --- Maxima ------------------------------------------------------------------


def expected_maximum(distribution: Distribution, workers: int) -> float:
  """Expected largest of so many independent step times.

  Raises:
    ValueError: If the distribution or the number makes no sense.
  """
  if workers < 1:
    raise ValueError(f'Expected at least 1 worker, got {workers}.')
  if isinstance(distribution, Empirical):
    return _maximum_of_sample(np.array(distribution.sample), workers)
  return maximum_by_quadrature(_upper_quantile(distribution), workers)


def maximum_by_quadrature(
    upper_quantile: Callable[[np.ndarray], np.ndarray], workers: int
) -> float:
  """The integral, for any distribution with a finite mean.

  With v = exp(-t) and t = exp(x) the integrand decays at both ends and the
  trapezoidal rule converges fast; the quantile is asked for by its upper tail,
  which keeps its digits where 1 - p would lose them.

  Args:
    upper_quantile: p -> the value that is exceeded with probability p.
    workers: W.
  """
  x, step = np.linspace(*_CUT, _NODES, retstep=True)
  t = np.exp(x)
  exceeded = -np.expm1(-t / workers)
  weight = np.exp(x - t)
  # Where the weight has vanished the quantile may be anything.
  values = np.where(weight > 0, upper_quantile(exceeded), 0.0)
  return float(np.sum(values * weight) * step)


def _upper_quantile(distribution: LogNormal):
  from scipy import special  # Comes with jax.

  median, p99 = distribution
  if not 0 < median <= p99:
    raise ValueError(
        f'Expected 0 < median <= p99, got median={median}, p99={p99}.'
    )
  sigma = math.log(p99 / median) / -special.ndtri(_P99)
  # Below 1, where the normal quantile is infinite and no tail times it is NaN.
  most = np.nextafter(1.0, 0.0)
  return lambda p: median * np.exp(-sigma * special.ndtri(np.minimum(p, most)))


def _maximum_of_sample(sample_N: np.ndarray, workers: int) -> float:
  """Of draws with replacement: P(max <= i-th of N) = (i / N)^W."""
  if not len(sample_N) or not np.isfinite(sample_N).all():
    raise ValueError('Expected a sample of at least one finite step time.')
  below = (np.arange(len(sample_N) + 1) / len(sample_N)) ** workers
  return float(np.sort(sample_N) @ np.diff(below))


def step_time(
    latency: Latency,
    workers: int,
    parameter_bytes: float,
    compute: float = 1.0,
) -> float:
  """Expected time of one synchronous update.

  Args:
    latency: What is assumed.
    workers: W, of one group.
    parameter_bytes: b.
    compute: Factor of the step time of a worker, such as for teachers.
  """
  slowest = compute * expected_maximum(latency.steps, workers)
  if workers == 1:
    return slowest
  received = communication.all_reduce_bytes(1.0, workers)  # In models.
  model_time = (
      latency.model_time
      if latency.beta is None
      else latency.beta * parameter_bytes
  )
  return slowest + latency.alpha + received * model_time


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
    """Steps to the target with so many workers."""
    return self.floor * (1 + self.critical / workers)


def fit_steps(workers_K: Sequence[float], steps_K: Sequence[float]) -> Fit:
  """Least squares on log steps; one-dimensional, since the floor is solved for.

  Raises:
    ValueError: For fewer than three points, or values that are not positive.
  """
  workers_K, steps_K = np.asarray(workers_K, float), np.asarray(steps_K, float)
  if len(workers_K) < 3 or (steps_K <= 0).any() or (workers_K <= 0).any():
    raise ValueError(
        'Expected steps, all positive, at three or more numbers of workers, got'
        f' {steps_K.tolist()} at {workers_K.tolist()}.'
    )
  low = math.log(workers_K.min() * 1e-4)
  high = math.log(workers_K.max() * 1e4)
  for _ in range(4):  # Each grid is some 200 times finer than the one before.
    grid = np.linspace(low, high, 401)
    errors = [_residual(math.exp(g), workers_K, steps_K)[0] for g in grid]
    best, apart = grid[int(np.argmin(errors))], grid[1] - grid[0]
    low, high = best - apart, best + apart
  critical = math.exp(best)
  error, floor = _residual(critical, workers_K, steps_K)
  return Fit(floor, critical, error)


def _residual(
    critical: float, workers_K: np.ndarray, steps_K: np.ndarray
) -> tuple[float, float]:
  """Root mean square of log residuals with the best floor, and that floor."""
  rest_K = np.log(steps_K) - np.log1p(critical / workers_K)
  return float(rest_K.std()), float(np.exp(rest_K.mean()))


# --- One group or two --------------------------------------------------------


class Crossover(NamedTuple):
  """One group of 2 W workers against two codistilling groups of W.

  Attributes:
    workers_K: W, of each of the two groups.
    one_K: Time to the target of one group of 2 W.
    two_K: Time of two groups of W.
    first: The smallest W from which on two groups are faster; None if they are
      not at the largest W.
  """

  workers_K: tuple[int, ...]
  one_K: tuple[float, ...]
  two_K: tuple[float, ...]
  first: int | None


def crossover(
    steps: Callable[[int], float],
    ratio: float,
    compute: float,
    latency: Latency,
    parameter_bytes: float,
    smallest: int = 1,
) -> Crossover:
  """Where a second group beats doubling the first.

  Args:
    steps: Workers -> steps to the target of one group.
    ratio: Steps of each of two codistilling groups over those of one of the
      same number of workers.
    compute: Cost of an update with teachers over that of one without.
    latency: What is assumed.
    parameter_bytes: b.
    smallest: The least W.
  """
  workers = []
  while smallest * 2 ** (len(workers) + 1) <= latency.most_workers:
    workers.append(smallest * 2 ** len(workers))
  time = lambda w, factor: step_time(latency, w, parameter_bytes, factor)
  one = [steps(2 * w) * time(2 * w, 1.0) for w in workers]
  two = [ratio * steps(w) * time(w, compute) for w in workers]
  first = None
  for w, alone, pair in reversed(list(zip(workers, one, two))):
    if pair >= alone:
      break
    first = w
  return Crossover(tuple(workers), tuple(one), tuple(two), first)
