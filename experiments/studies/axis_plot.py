"""Measures against the axis on which the arms of a study stand."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from experiments import report_style
from experiments.report_style import Plot
from experiments.studies import analysis, formatting
from experiments.studies.analysis import ALL_MEASURES, Analysis
from experiments.studies.declaration import Arm
from experiments.studies.results import Setting

_COLOURS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#000000')
_MARKERS = ('o', 's', 'D', '^', 'v', 'P')
_PANELS = (
    'steps_to_target',
    'compute_to_target',
    'best_loss',
    analysis.ACCURACY,
    'final_loss',
)
_MOST = 4
_LABELS = {
    'steps_to_target': 'steps to target',
    'total_steps_to_target': 'steps to target, with teachers',
    'compute_to_target': 'FLOPs to target',
    'final_loss': 'validation loss at the end',
    'best_loss': 'best validation loss',
}


def make_plot(found: Analysis, setting: Setting) -> Plot | None:
  """Every measure against x, a line for each series; None without arms on x."""
  del setting
  if not found.study.x_label or not _series(found):
    return None
  panels = [m for m in _panels(found) if _any(found, m)][:_MOST]
  if not panels:
    return None
  with report_style.look():
    png = _draw(found, panels)
  caption = (
      'Means over seeds, bars 95 % intervals (a bar is missing for fewer than'
      ' three seeds). An open triangle is an arm that did not reach the target'
      ' in every seed, at the largest value seen; its mean is not known.'
  )
  if len(_series(found)) > 1:
    caption += ' Points of several lines are set apart a little.'
  if _others(found):
    caption += ' Dotted levels are arms that do not stand on the axis.'
  title = f'Against {found.study.x_label}'
  return Plot('against_x', formatting.sentence_start(title), caption, png)


def _panels(found: Analysis) -> list[str]:
  main = [c.measure for c in found.study.comparisons[:1]]
  return list(dict.fromkeys([*main, *_PANELS]))


def _any(found: Analysis, measure: str) -> bool:
  return any(
      np.isfinite(_point(found, arm, measure)[0]) for arm in found.study.arms
  )


def _series(found: Analysis) -> dict[str, list[Arm]]:
  series = {}
  for arm in found.study.arms:
    if arm.x is not None and found.runs[arm.name]:
      series.setdefault(arm.series, []).append(arm)
  return {k: sorted(v, key=lambda arm: arm.x) for k, v in series.items()}


def _place(found: Analysis, arm: Arm, apart: float) -> float:
  """x, moved so that bars of several lines do not hide each other."""
  if found.study.x_log and arm.x > 0:
    return arm.x * (1 + 0.03 * apart)
  places = [a.x for a in found.study.arms if a.x is not None]
  return arm.x + 0.008 * (max(places) - min(places)) * apart


def _point(found: Analysis, arm: Arm, measure: str):
  """Value, low, high, whether it is a mean of all."""
  cell = analysis.cell(found, arm.name, measure)
  if cell.figure is not None:
    return cell.figure.mean, cell.figure.low, cell.figure.high, True
  seen = [x for o in cell.outcomes for x in (o.value, o.at_least)]
  seen = [x for x in seen if np.isfinite(x)]
  return (max(seen) if seen else np.nan), np.nan, np.nan, False


def _draw(found: Analysis, panels: Sequence[str]) -> bytes:
  figure, axes = report_style.figure_of(len(panels))
  series = _series(found)
  legend = []
  for i, (name, arms) in enumerate(series.items()):
    style = {
        'color': _COLOURS[i % len(_COLOURS)],
        'marker': _MARKERS[i % len(_MARKERS)],
    }
    for ax, measure in zip(axes, panels):
      _draw_series(ax, found, arms, measure, style, i - (len(series) - 1) / 2)
    label = name or found.study.x_label
    legend.append(Line2D([], [], label=label, lw=1.4, ms=5, **style))
  for ax, measure in zip(axes, panels):
    _finish(ax, found, measure)
  legend += _levels(axes, found, panels, len(series))
  report_style.legend_below(figure, legend)
  return report_style.save(figure)


def _draw_series(
    ax: Axes,
    found: Analysis,
    arms: Sequence[Arm],
    measure: str,
    style: dict,
    apart: float,
) -> None:
  points = [
      (_place(found, arm, apart), *_point(found, arm, measure)) for arm in arms
  ]
  whole = [(x, y) for x, y, _, _, whole in points if whole]
  if whole:
    ax.plot(*zip(*whole), color=style['color'], lw=1.4)
  for x, mean, low, high, whole in points:
    if whole:
      ax.plot([x], [mean], ms=5, ls='', **style)
      if np.isfinite(low):
        ends = [[mean - low], [high - mean]]
        ax.errorbar(x, mean, yerr=ends, color=style['color'], capsize=2.5, lw=1)
    elif np.isfinite(mean):
      ax.plot([x], [mean], '^', ms=7, mfc='none', mec=style['color'])


def _others(found: Analysis) -> list[Arm]:
  arms = found.study.arms
  return [arm for arm in arms if arm.x is None and found.runs[arm.name]]


def _levels(
    axes: Sequence[Axes], found: Analysis, panels: Sequence[str], used: int
) -> list[Line2D]:
  """Arms without a place on the axis, as levels."""
  legend = []
  for i, arm in enumerate(_others(found), used):
    style = {'color': _COLOURS[i % len(_COLOURS)], 'ls': (0, (1.5, 1.5))}
    for ax, measure in zip(axes, panels):
      figure = analysis.cell(found, arm.name, measure).figure
      if figure is not None:
        ax.axhline(figure.mean, lw=1.2, zorder=1, **style)
    legend.append(Line2D([], [], label=arm.title, lw=1.2, **style))
  return legend


def _finish(ax: Axes, found: Analysis, measure: str) -> None:
  ax.set_xlabel(found.study.x_label)
  ax.set_ylabel(_LABELS.get(measure, ALL_MEASURES[measure]))
  places = sorted({a.x for a in found.study.arms if a.x is not None})
  if found.study.x_log and min(places) > 0:
    ax.set_xscale('log')
    ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_locator(FixedLocator(places))
  ax.xaxis.set_major_formatter('{x:,g}')
  if measure == 'compute_to_target':
    ax.yaxis.set_major_formatter(EngFormatter(sep=' '))
  elif measure in analysis.RATIOS:
    ax.yaxis.set_major_formatter('{x:,.0f}')
  if measure in analysis.RATIOS:
    ax.set_ylim(bottom=0)
