"""The one look of all plots: colours, figures, legends, readable curves.

Colours belong to arms (Okabe and Ito's palette, told apart by colour-blind
readers too). Drawn into PNG bytes without a display: whatever imports this
needs matplotlib, but none of its interactive backends.
"""

import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .pages import Plot
from .run_records import EMPTY, finite

# Arms, and series of them, that keep their colours on all pages.
ONE, TWO = '#D55E00', '#0072B2'
_KEPT = dict.fromkeys(('baseline', 'one group', 'single'), ONE)
_KEPT |= dict.fromkeys(('codistillation', 'two groups'), TWO)
_KEPT |= {'ensemble': '#009E73'}
_PALETTE = ('#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# Levels and marks that belong to no arm.
GREY = '#555555'
DOTTED = (0, (2, 2))
# Told apart in one colour: the groups of an arm, the series of a study.
DASHES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))

_STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'axes.titlesize': 9.5,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '#666666',
    'axes.linewidth': 0.8,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#E6E6E6',
    'grid.linewidth': 0.7,
    'xtick.color': '#444444',
    'ytick.color': '#444444',
    'legend.frameon': False,
    'legend.fontsize': 8.5,
    'legend.handlelength': 2.4,
    'lines.solid_capstyle': 'round',
    'figure.dpi': 100,
    'savefig.dpi': 170,
    # An arm or a data set may have dollars in its name.
    'text.parse_math': False,
}
_ROW = 0.18  # Inches of a row of the legend.


def style() -> Any:
  """Returns the context in which all plots are drawn."""
  return matplotlib.rc_context(_STYLE)


def arm_colours(names: Iterable[str]) -> dict[str, str]:
  """Returns a colour for every arm, by name, whatever their order."""
  names = set(names)
  kept = {name: _KEPT[name] for name in names & _KEPT.keys()}
  free = [colour for colour in _PALETTE if colour not in kept.values()]
  others = sorted(names - kept.keys())
  return kept | dict(zip(others, itertools.cycle(free)))


# --- Figures and axes --------------------------------------------------------


def figure_of(
    panels: int, columns: int = 2, x_label: str = 'step'
) -> tuple[Figure, list[Axes]]:
  """Returns a figure with so many axes, at most `columns` in a row."""
  columns = min(panels, columns)
  rows = -(-panels // columns)
  width = 6.0 if columns == 1 else 9.2
  height = 3.5 if columns < 3 else 2.1
  figure = Figure(
      figsize=(width, height * rows - 0.3 * (rows - 1)), layout='constrained'
  )
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for ax in axes[panels:]:
    ax.set_visible(False)
  for i, ax in enumerate(axes[:panels]):
    if columns < 3 or i + columns >= panels:
      ax.set_xlabel(x_label)
    ticks = 6 if columns < 3 else 3
    ax.xaxis.set_major_locator(
        MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10])
    )
    ax.xaxis.set_major_formatter('{x:,.0f}')
  return figure, axes[:panels]


def zoom(ax: Axes, values: Iterable[float], below: float, above: float) -> None:
  """Sets vertical limits around values, with margins as parts of their span."""
  values = list(values)
  if values and max(values) > min(values):
    span = max(values) - min(values)
    ax.set_ylim(min(values) - below * span, max(values) + above * span)


def line(colour: str, label: str, **kwargs) -> Line2D:
  """Returns an entry of a legend."""
  return Line2D([], [], color=colour, label=label, **kwargs)


def legend_below(
    figure: Figure, handles: Sequence[Line2D] | None = None
) -> None:
  """Draws a legend under the axes, no wider than the figure.

  Args:
    figure: Where to draw.
    handles: Its entries; by default every label of the figure, in order.
  """
  if handles is None:
    labelled = (zip(*ax.get_legend_handles_labels()) for ax in figure.axes)
    by_label = {label: h for entries in labelled for h, label in entries}
    handles = [by_label[label] for label in sorted(by_label)]
  widest = max(len(str(handle.get_label())) for handle in handles)
  fitting = max(1, int(figure.get_figwidth() / (0.65 + 0.085 * widest)))
  rows = -(-len(handles) // fitting)
  # The axes keep their room.
  figure.set_figheight(figure.get_figheight() + _ROW * max(rows - 2, 0))
  figure.legend(
      handles=handles,
      loc='outside lower center',
      ncols=-(-len(handles) // rows),  # Rows of one length, if it can be.
  )


def save(figure: Figure, name: str, title: str, *caption: str) -> Plot:
  """Returns the figure as PNG, with the words that go below it."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', facecolor='white')
  return Plot(name, title, ' '.join(caption), buffer.getvalue())


def plot(ax: Axes, curve: pd.Series, **style: Any) -> None:
  """Draws a line; of a long one what would be seen of it."""
  places = np.arange(len(curve))
  if len(curve) > 4 * _COLUMNS:
    # Of each column of pixels the lowest and the highest, and a gap or else the
    # first.
    width = -(-len(curve) // _COLUMNS)
    missing = _COLUMNS * width - len(curve)
    values = np.pad(curve, (0, missing), 'edge').reshape(_COLUMNS, width)
    gap = np.isnan(values)
    found = [
        np.where(gap, np.inf, values).argmin(1),
        np.where(gap, -np.inf, values).argmax(1),
        gap.argmax(1),
    ]
    seen = np.arange(0, values.size, width) + np.stack(found)
    places = np.unique(np.minimum([*seen.flat, values.size], places[-1]))
  ax.plot(curve.iloc[places], **style)


_COLUMNS = 500

# --- Curves -------------------------------------------------------------------

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
