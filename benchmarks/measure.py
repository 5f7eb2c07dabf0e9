"""What the benchmarks measure with: arms in turn, medians, goals, lines.

An arm is `arm(n) -> seconds`: it does its work n times and says how long that
took. Arms are measured in turn, forth and back, so that what else happens on
the machine meets them alike; a ratio is the median of the ratios of the
repeats, in each of which both arms ran within seconds of each other.
"""

import concurrent.futures
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Arm = Callable[[int], float]

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def brief(value: float) -> float:
  """Returns the number with three digits that count."""
  return float(f'{value:.3g}')


def timed(call: Callable[[], Any]) -> Arm:
  """Returns an arm of a function that gives jax arrays, for which it waits."""
  import jax

  def arm(times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
      result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - start

  return arm


def in_turn(arms: Iterable[Any], repeat: int) -> list[Any]:
  """Returns the arms, in the other direction in every second repeat."""
  return list(arms)[:: -1 if repeat % 2 else 1]


def alternate(
    arms: Mapping[str, Arm],
    repeats: int,
    *,
    least_seconds: float = 0.2,
    most_calls: int = 100,
) -> dict[str, list[float]]:
  """Seconds per call of each arm, `repeats` of them, measured in turn.

  Args:
    arms: By name. Each is called once to warm up, if `warm_up` has not done
      that, and once to see how long it takes.
    repeats: Measurements of each.
    least_seconds: A measurement calls an arm as often as this takes.
    most_calls: But not more often.
  """
  calls = {}
  for name, arm in arms.items():
    arm(1)
    wanted = math.ceil(least_seconds / max(arm(1), 1e-9))
    calls[name] = min(max(wanted, 1), most_calls)
  seconds = {name: [] for name in arms}
  for repeat in range(repeats):
    for name in in_turn(arms, repeat):
      seconds[name].append(arms[name](calls[name]) / calls[name])
  return seconds


def warm_up(arms: Mapping[str, Arm]) -> None:
  """Calls each once, at the same time: they compile beside each other."""
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda arm: arm(1), arms.values()))


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Returns the median and quartiles, and of how many."""
  return {
      'median': brief(statistics.median(values)),
      'quartiles': [brief(x) for x in _quartiles(values)],
      'repeats': len(values),
  }


def milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
  """Returns the median and quartiles, in milliseconds."""
  return spread([1e3 * x for x in seconds])


def ratio(
    numerator: Sequence[float], denominator: Sequence[float]
) -> dict[str, Any]:
  """Returns the median and quartiles of the ratios, repeat by repeat."""
  return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
  if len(values) == 1:
    return values[0], values[0]
  low, _, high = statistics.quantiles(values, n=4, method='inclusive')
  return low, high


def goal(
    value: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
  """Returns a goal in numbers, and whether it is met."""
  if at_most is not None:
    return {'at_most': at_most, 'value': brief(value), 'met': value <= at_most}
  return {'at_least': at_least, 'value': brief(value), 'met': value >= at_least}


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
  """Returns the exponent e of y = a x^e: least squares of the logarithms.

  Returns:
    `exponent`, and `residual`: by which share of it a value of y is off the
    line, as the root of the mean square.
  """
  import numpy as np

  log_x, log_y = np.log(x), np.log(y)
  exponent, offset = np.polyfit(log_x, log_y, 1)
  off = log_y - (exponent * log_x + offset)
  residual = float(np.exp(np.sqrt(np.mean(off**2))) - 1)
  return {'exponent': brief(exponent), 'residual': brief(residual)}


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
  """Returns the straight line y = intercept + slope x of least squares.

  Returns:
    Both, and `residual`: the root of the mean square distance, as a share of
    the mean of y.
  """
  import numpy as np

  gradient, intercept = np.polyfit(x, y, 1)
  off = np.asarray(y) - (gradient * np.asarray(x) + intercept)
  residual = float(np.sqrt(np.mean(off**2)) / np.mean(y))
  return {
      'slope': brief(gradient),
      'intercept': brief(intercept),
      'residual': brief(residual),
  }


def machine() -> dict[str, Any]:
  """Returns what a reader needs to know of the machine; uses its devices."""
  import jax

  return {
      'device': jax.devices()[0].device_kind,
      'cores': cores(),
      'load': load(),
      'python': platform.python_version(),
      'versions': versions(_PACKAGES),
  }


def versions(packages: Iterable[str]) -> dict[str, str]:
  """Returns the versions of the packages that are there."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def load() -> float:
  """Processes that ran in the minute before, on average."""
  return brief(os.getloadavg()[0])
