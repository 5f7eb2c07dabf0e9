"""How the plots of a report look: colours, figures, lines and legends.

One colour per arm (Okabe and Ito's palette, told apart by colour-blind readers
too). Up to four groups have a line style each; more of them are thin lines
with their median. Only this file and those that draw import matplotlib, and
none of its interactive backends.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments import report_curves
from experiments.report_data import Arm, Curve, Group


class Plot(NamedTuple):
  """A plot with the words that go below it.

  Attributes:
    name: File name without ending.
    title: Its heading.
    caption: What is drawn and how it was treated.
    png: The image.
  """

  name: str
  title: str
  caption: str
  png: bytes


# Curves of the groups of the arms that have recorded something.
Entries = list[tuple[Arm, Group, Curve]]

# The two arms that nearly every report has keep their colours in all reports.
_ARM_COLOURS = {'baseline': '#D55E00', 'codistillation': '#0072B2'}
_OTHER_COLOURS = ('#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_GROUP_STYLES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))

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
}


def look():
  """The context in which all plots are drawn."""
  return matplotlib.rc_context(_STYLE)


# --- Entries -----------------------------------------------------------------


def curves_of(arms: Sequence[Arm], key: str) -> Entries:
  """One metric of all groups that have a finite value of it."""
  return recorded([(a, g, g.curve(key)) for a in arms for g in a.groups])


def recorded(entries: Entries) -> Entries:
  """The entries with at least one finite value."""
  return [entry for entry in entries if np.isfinite(entry[2].values).any()]


def of_arm(entries: Entries, arm: Arm) -> Entries:
  """The entries of one arm."""
  return [entry for entry in entries if entry[0] is arm]


# --- Figures and axes --------------------------------------------------------


def arm_colours(arms: Sequence[Arm]) -> dict[str, str]:
  """A colour for every arm, by name."""
  others = [arm.name for arm in arms if arm.name not in _ARM_COLOURS]
  colours = {
      name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)]
      for i, name in enumerate(others)
  }
  return colours | _ARM_COLOURS


def figure_of(panels: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
  """A figure with so many axes over steps, at most `columns` in a row."""
  columns = min(panels, columns)
  rows = -(-panels // columns)
  width = 6.0 if columns == 1 else 9.2
  height = 3.5 if columns < 3 else 2.1
  figure = Figure(
      figsize=(width, height * rows - 0.3 * (rows - 1)), layout='constrained'
  )
  grid = figure.subplots(rows, columns, squeeze=False)
  axes = list(grid.flat)
  for ax in axes[panels:]:
    ax.set_visible(False)
  for i, ax in enumerate(axes[:panels]):
    if columns < 3 or i + columns >= panels:
      ax.set_xlabel('step')
    ticks = 6 if columns < 3 else 3
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    ax.xaxis.set_major_formatter('{x:,.0f}')
  return figure, axes[:panels]


def whole_run(axes: Sequence[Axes], arms: Sequence[Arm]) -> None:
  """The same steps on all axes, also where a metric begins later."""
  last = max(group.last_step for arm in arms for group in arm.groups)
  last = max(last, 1)  # A run of step 0 only has a width all the same.
  for ax in axes:
    ax.set_xlim(-0.015 * last, 1.015 * last)


def whole_numbers(ax: Axes) -> None:
  """An axis of counts: no ticks at 0.5, and zero in sight."""
  ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
  ax.yaxis.set_major_formatter('{x:,.0f}')


def save(figure: Figure) -> bytes:
  """The figure as PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', facecolor='white')
  return buffer.getvalue()


# --- Lines -------------------------------------------------------------------


def is_crowded(arm: Arm) -> bool:
  """Whether an arm has more groups than there are line styles."""
  return len(arm.groups) > len(_GROUP_STYLES)


def style_of(arm: Arm, group: Group) -> dict:
  """The line style, width and opacity of one group's line."""
  if is_crowded(arm):
    return {'ls': '-', 'lw': 0.6, 'alpha': 0.35}
  place = [g.group_id for g in arm.groups].index(group.group_id)
  return {'ls': _GROUP_STYLES[place], 'lw': 1.4}


def draw_groups(
    ax: Axes, arms: Sequence[Arm], entries: Entries, steps: bool = False
) -> None:
  """A line per group, and where they are many a thick one of their median.

  Args:
    ax: Where to draw.
    arms: All arms of the figure, which decide on the colours.
    entries: What to draw.
    steps: Whether a value holds until the next, as a count does.
  """
  colours = arm_colours(arms)
  drawstyle = 'steps-post' if steps else 'default'
  for arm, group, curve in entries:
    style = style_of(arm, group) | lonely(curve)
    ax.plot(
        curve.steps,
        curve.values,
        color=colours[arm.name],
        drawstyle=drawstyle,
        **style,
    )
  for arm in filter(is_crowded, arms):
    curves = [curve for _, _, curve in of_arm(entries, arm)]
    median = report_curves.median_curve(curves)
    ax.plot(
        median.steps,
        median.values,
        color=colours[arm.name],
        drawstyle=drawstyle,
        lw=2.0,
        **lonely(median),
    )


def lonely(curve: Curve) -> dict:
  """A marker for a curve of one point, which would be no line at all."""
  alone = np.isfinite(curve.values).sum() == 1
  return {'marker': 'o', 'ms': 3.5} if alone else {}


# --- Legends -----------------------------------------------------------------


def line(colour: str, label: str, **kwargs) -> Line2D:
  """An entry of a legend."""
  return Line2D([], [], color=colour, label=label, **kwargs)


def legend(
    figure: Figure, arms: Sequence[Arm], extra: Sequence[Line2D] = ()
) -> None:
  """One legend below the plot: lines of each arm, then `extra`."""
  colours = arm_colours(arms)
  handles = []
  for arm in arms:
    colour = colours[arm.name]
    if is_crowded(arm):
      count = len(arm.groups)
      handles += [
          line(colour, f'{arm.name}, median of {count} groups', lw=2.0),
          line(colour, f'{arm.name}, single groups', lw=0.6, alpha=0.5),
      ]
      continue
    for group in arm.groups:
      label = arm.name
      if len(arm.groups) > 1:
        label += f', group {group.group_id}'
      handles.append(line(colour, label, **style_of(arm, group)))
  legend_below(figure, [*handles, *extra])


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
  """A legend under the axes, never on the data or wider than the figure."""
  widest = max(len(str(handle.get_label())) for handle in handles)
  fitting = max(1, int(figure.get_figwidth() / (0.65 + 0.085 * widest)))
  rows = -(-len(handles) // fitting)
  figure.legend(
      handles=handles,
      loc='outside lower center',
      ncols=-(-len(handles) // rows),  # Rows of one length, if it can be.
  )


def crowded_note(arms: Sequence[Arm]) -> str:
  """What a caption says of the thick lines, if there are any."""
  if not any(map(is_crowded, arms)):
    return ''
  return ' Thin lines are single groups, the thick line their median.'
