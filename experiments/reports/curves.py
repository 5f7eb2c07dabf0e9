"""Curves made readable: means over stretches of steps, gaps left open.

A curve is a Series of values by step. Numbers only; nothing here draws.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .run_records import EMPTY, finite

# Records are smoothed over this share of a run, at least one record.
_SMOOTHING = 1 / 40
# More records than this are drawn as means and ranges over bins.
MAX_POINTS = 160
_BINS = 40


def smooth(curve: pd.Series) -> pd.Series:
  """Returns the centred running mean, narrower at the ends.

  Values that are not finite are left out of the means; where there are no
  others the mean is NaN.
  """
  good = curve.where(np.isfinite(curve))
  return good.rolling(_window(curve), center=True, min_periods=1).mean()


def _window(curve: pd.Series) -> int:
  """Returns how many records to smooth over: odd, 1 for short curves."""
  return int(len(curve) * _SMOOTHING) // 2 * 2 + 1


def window_in_steps(curve: pd.Series) -> int:
  """Returns how many steps a curve is smoothed over."""
  if len(curve) < 2:
    return 1
  return _window(curve) * int(np.median(np.diff(curve.index)))


def with_gaps(curve: pd.Series) -> pd.Series:
  """Returns the curve with a NaN where records are missing.

  No line then runs across. Records are missing where the distance to the next
  one is more than three times the usual.
  """
  apart = np.diff(curve.index)
  if not len(apart):
    return curve
  before = curve.index[:-1][apart > 3 * np.median(apart)]
  return pd.concat([curve, pd.Series(np.nan, before + 1)]).sort_index()


def binned(mean: pd.Series, most: pd.Series, bins: int = _BINS) -> pd.DataFrame:
  """Returns means and ranges of a long curve over equal bins of steps.

  Args:
    mean: The curve, finite and not empty.
    most: Upper values at the same steps, at least `mean`.
    bins: How many.

  Returns:
    By the middle step of each bin `mean`, and `low` and `high`, the smallest
    and largest value; NaN where a bin has less than half as many records as
    usual.
  """
  edges = np.linspace(mean.index[0], mean.index[-1] + 1, bins + 1)
  place = np.searchsorted(edges, mean.index, side='right') - 1
  both = pd.DataFrame({'mean': mean, 'most': most}).groupby(place)
  found = both.agg(
      mean=('mean', 'mean'), low=('mean', 'min'), high=('most', 'max')
  )
  # A bin at the edge of a gap may hold the one record after an exchange, whose
  # value says nothing about the stretch.
  found = found[2 * both.size() >= both.size().median()]
  return found.reindex(range(bins)).set_axis((edges[:-1] + edges[1:]) / 2)


def drawable(curve: pd.Series, binning: bool) -> pd.Series:
  """Returns what to draw as a line: means of bins if so told, with gaps."""
  good = finite(curve)
  if not binning or good.empty:
    return with_gaps(curve)
  return binned(good, good)['mean']


def median_curve(curves: Iterable[pd.Series]) -> pd.Series:
  """Returns the median over curves at every step that any of them has.

  A curve counts from its first step to its last, with the value of its latest
  record: groups need not record the same steps. Values that are not finite are
  passed over.
  """
  curves = [c for c in map(finite, curves) if len(c)]
  if not curves:
    return EMPTY
  together = pd.concat(curves, axis=1).sort_index()
  held = together.ffill().where(together.bfill().notna())
  # Between two curves that do not overlap there may be nothing.
  return held.median(axis=1).dropna()
