"""The one look of all plots: colours, figures, lines, legends, saving.

Colours belong to arms (Okabe and Ito's palette, told apart by colour-blind
readers too). Drawn into PNG bytes without a display: whatever imports this
needs matplotlib, but none of its interactive backends.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .pages import Plot

# The two arms that nearly every page has keep their colours on all pages.
ONE, TWO = '#D55E00', '#0072B2'
_ARM_COLOURS = {'baseline': ONE, 'codistillation': TWO}
PALETTE = ('#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
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


def style() -> Any:
  """Returns the context in which all plots are drawn."""
  return matplotlib.rc_context(_STYLE)


def arm_colours(names: Iterable[str]) -> dict[str, str]:
  """Returns a colour for every arm, by name."""
  others = [name for name in names if name not in _ARM_COLOURS]
  return _ARM_COLOURS | {
      name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)
  }


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
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
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
  figure.legend(
      handles=handles,
      loc='outside lower center',
      ncols=-(-len(handles) // rows),  # Rows of one length, if it can be.
  )


def save(figure: Figure, name: str, title: str, caption: str) -> Plot:
  """Returns the figure as PNG, with the words that go below it."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', facecolor='white')
  return Plot(name, title, caption, buffer.getvalue())
