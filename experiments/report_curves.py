"""Curves made readable: means over stretches of steps, gaps left open.

Numbers only; nothing here draws.
"""

import numpy as np

from experiments.report_data import Curve, Group

# Records are smoothed over this share of a run, at least one record.
_SMOOTHING = 1 / 40
# More records than this are drawn as means and ranges over bins.
MAX_POINTS = 160
BINS = 40


def running_mean(curve: Curve, window: int) -> Curve:
  """Centred mean over `window` records, narrower at the ends.

  Values that are not finite are left out of the means; where there are no
  others the mean is NaN.
  """
  half = window // 2
  good = np.isfinite(curve.values)
  total = np.cumsum(np.append(0.0, np.where(good, curve.values, 0.0)))
  count = np.cumsum(np.append(0, good))
  index = np.arange(len(curve.steps))
  low = np.maximum(index - half, 0)
  high = np.minimum(index + half + 1, len(index))
  n = count[high] - count[low]
  mean = (total[high] - total[low]) / np.maximum(n, 1)
  return Curve(curve.steps, np.where(n > 0, mean, np.nan))


def smoothing_window(curve: Curve) -> int:
  """How many records a curve is smoothed over: odd, 1 for short curves."""
  return int(len(curve.steps) * _SMOOTHING) // 2 * 2 + 1


def window_in_steps(curve: Curve) -> int:
  """How many steps a curve is smoothed over."""
  if len(curve.steps) < 2:
    return 1
  spacing = int(np.median(np.diff(curve.steps)))
  return smoothing_window(curve) * spacing


def with_gaps(curve: Curve) -> Curve:
  """A NaN wherever records are missing, so that no line runs across.

  Records are missing where the distance to the next one is more than three
  times the usual.
  """
  apart = np.diff(curve.steps)
  if not len(apart):
    return curve
  after = np.flatnonzero(apart > 3 * np.median(apart)) + 1
  return Curve(
      np.insert(curve.steps, after, curve.steps[after - 1] + 1),
      np.insert(curve.values, after, np.nan),
  )


def finite(curve: Curve) -> Curve:
  """The records whose value is finite."""
  good = np.isfinite(curve.values)
  return Curve(curve.steps[good], curve.values[good])


def binned(
    mean: Curve, most: Curve, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Means and ranges of a long curve over equal bins of steps.

  Args:
    mean: The curve, finite and not empty.
    most: Upper values at the same steps, at least `mean`.
    bins: How many.

  Returns:
    Middle step, mean, smallest and largest value, each of shape (bins,); NaN
    where a bin has less than half as many records as usual.
  """
  edges = np.linspace(mean.steps[0], mean.steps[-1] + 1, bins + 1)
  index = np.searchsorted(edges, mean.steps, side='right') - 1
  found = np.full((3, bins), np.nan)
  count = np.bincount(index, minlength=bins)
  # A bin at the edge of a gap may hold the one record after an exchange, whose
  # value says nothing about the stretch.
  for i in np.flatnonzero(2 * count >= np.median(count[count > 0])):
    values = mean.values[index == i]
    found[:, i] = values.mean(), values.min(), most.values[index == i].max()
  middle = (edges[:-1] + edges[1:]) / 2
  return middle, found[0], found[1], found[2]


def drawable(curve: Curve, binning: bool) -> Curve:
  """A curve as a line is drawn: over bins if so told, with gaps left open."""
  if not binning or not finite(curve):
    return with_gaps(curve)
  curve = finite(curve)
  steps, mean, _, _ = binned(curve, curve, BINS)
  return Curve(steps, mean)


def median_curve(curves: list[Curve]) -> Curve:
  """The median over curves at every step that any of them has.

  A curve counts from its first step to its last, with the value of its latest
  record: groups need not record the same steps. Values that are not finite are
  passed over.
  """
  curves = [c for c in map(finite, curves) if c]
  if not curves:
    return Curve(np.zeros(0, np.int64), np.zeros(0))
  steps = np.unique(np.concatenate([c.steps for c in curves]))
  values = np.full((len(curves), len(steps)), np.nan)
  for row, curve in zip(values, curves):
    inside = (steps >= curve.steps[0]) & (steps <= curve.steps[-1])
    latest = np.searchsorted(curve.steps, steps[inside], side='right') - 1
    row[inside] = curve.values[latest]
  # Between two curves that do not overlap there may be nothing.
  covered = np.isfinite(values).any(axis=0)
  median = np.nanmedian(values[:, covered], axis=0)
  return Curve(steps[covered], median)


def distill_curve(group: Group) -> Curve:
  """The distillation loss where it counted: not during burn-in."""
  curve = group.curve('loss/distill')
  weight = group.curve('distill/weight')
  counted = weight.steps[weight.values > 0]
  keep = np.isin(curve.steps, counted) if weight else curve.steps >= 0
  return Curve(curve.steps[keep], curve.values[keep])
