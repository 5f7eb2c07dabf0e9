"""Loss against bytes received: a plot, and losses at equal bytes."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from experiments import report_style
from experiments.report_style import Plot
from experiments.report_table import size
from experiments.studies import analysis, plotting
from experiments.studies.analysis import Analysis
from experiments.studies.results import Setting


def make_plot(found: Analysis, setting: Setting) -> Plot | None:
  """Loss against bytes; None if no arm has received any."""
  bands = {a.name: _received(found, a.name) for a in found.study.arms}
  if not any(band is not None for band in bands.values()):
    return None
  styles = plotting.styles_of(found.study)
  with report_style.look():
    figure, (ax,) = report_style.figure_of(1)
    for name, band in bands.items():
      plotting.draw_band(ax, band, styles[name])
    ax.set_xscale('log')
    ax.xaxis.set_major_locator(LogLocator(subs=_ticks(bands.values())))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter(unit='B', sep=' '))
    ax.set_xlabel('bytes that one worker or group has received')
    ax.set_ylabel(f'validation loss (nats per {setting.example})')
    plotting.zoom(ax, found, 'loss')
    extra = plotting.draw_target([ax], found)
    silent = [name for name, band in bands.items() if band is None]
    levels = _draw_levels(ax, found, silent, styles)
    legend = plotting.handles(found, styles)
    report_style.legend_below(figure, [*legend, *extra])
    png = report_style.save(figure)
  caption = (
      'Bytes by the formulas below, not measured on a network; the axis is'
      ' logarithmic. Lines are means over seeds, bands their range.'
  )
  if levels:
    caption += (
        ' Levels are arms that receive nothing, at their loss at the end:'
        f' {", ".join(levels)}.'
    )
  return Plot('loss_bytes', 'Validation loss at equal bytes', caption, png)


def _ticks(bands: Iterable[analysis.Band | None]) -> tuple[int, ...]:
  """More in a decade where there are few decades."""
  ends = [x for b in bands if b is not None for x in (b.x_N[0], b.x_N[-1])]
  return (1,) if max(ends) > 100 * min(ends) else (1, 2, 5)


def _draw_levels(
    ax: Axes, found: Analysis, names: Sequence[str], styles: dict
) -> list[str]:
  """Arms that receive nothing; returns their titles."""
  titles = []
  for arm in found.study.arms:
    band = analysis.band(found, arm.name, 'bytes')
    if arm.name in names and band is not None:
      ax.axhline(band.mean_N[-1], lw=1.2, alpha=0.7, **styles[arm.name])
      titles.append(arm.title)
  return titles


def _received(found: Analysis, arm: str) -> analysis.Band | None:
  """The part of a curve where something has been received."""
  band = analysis.band(found, arm, 'bytes')
  if band is None:
    return None
  some = band.x_N > 0
  return analysis.Band(*(part[some] for part in band)) if some.any() else None


def equal_bytes(found: Analysis) -> tuple[list[str], list[list[str]]]:
  """Losses at the last evaluation within budgets of bytes.

  The budgets are what each arm has received in all, so that each column has an
  arm at its end.

  Returns:
    Header and rows; '-' where an arm has received more at its first evaluation
    already. Empty if no arm has received any.
  """
  bands = {a.name: analysis.band(found, a.name, 'bytes') for a in _arms(found)}
  ends = {band.x_N[-1] for band in bands.values() if band is not None}
  budgets = sorted(end for end in ends if end > 0)
  if not budgets:
    return [], []
  # Those that look the same are the same.
  budgets = list({size(b): b for b in budgets}.values())
  header = ['arm', *(f'at {size(b)}' for b in budgets)]
  rows = [
      [arm.title, *(_within(bands[arm.name], b) for b in budgets)]
      for arm in _arms(found)
  ]
  return header, rows


def _arms(found: Analysis):
  return [arm for arm in found.study.arms if found.runs[arm.name]]


def _within(band: analysis.Band | None, budget: float) -> str:
  if band is None:
    return '-'
  # A sum of many updates may be a rounding error above the same product.
  at = np.flatnonzero(band.x_N <= budget * (1 + 1e-9))
  return f'{band.mean_N[at[-1]]:.4f}' if len(at) else '-'
