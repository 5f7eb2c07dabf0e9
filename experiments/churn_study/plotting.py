"""The plot of a churn study: log loss against churn, arm by arm."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments import report_style
from experiments.churn_study import run_files
from experiments.churn_study.figures import Row
from experiments.churn_study.results import ENSEMBLE
from experiments.report_style import Plot

_COLOURS = {
    run_files.SINGLE: '#D55E00',
    ENSEMBLE: '#009E73',
}
_CODISTILLED = '#0072B2'
_OTHERS = ('#CC79A7', '#E69F00', '#56B4E9', '#000000')
_MARKERS = {run_files.SINGLE: 's', ENSEMBLE: 'D'}


def make_plot(rows: Sequence[Row], chosen: str | None, split: str) -> Plot:
  """Draws all arms, those of several weights as one line."""
  with report_style.look():
    figure, (ax,) = report_style.figure_of(1)
    ax.set_xlabel(f'{split} log loss (nats)')
    ax.set_ylabel('churn: mean absolute difference\nbetween retrains')
    ax.xaxis.set_major_formatter('{x:.4g}')
    colours = _colours(rows)
    weighted = [r for r in rows if run_files.weight_of(r.arm) is not None]
    ax.plot(*_points(weighted), color=_CODISTILLED, lw=1.2, zorder=2)
    for row in rows:
      _draw(ax, row, colours[row.arm], row.arm == chosen)
    churn = [r.figures['churn'] for r in rows]
    highest = np.nanmax([[f.mean, f.high] for f in churn])
    ax.set_ylim(0, 1.08 * highest or 1.0)
    ax.margins(x=0.12)
    handles = [
        report_style.line(
            colours[r.arm], r.title, ls='', marker=_MARKERS.get(r.arm, '^')
        )
        for r in rows
        if r not in weighted
    ]
    if weighted:
      title = weighted[0].title.partition(',')[0]
      label = f'{title}, by distill weight'
      handles.append(report_style.line(_CODISTILLED, label, marker='o', lw=1.2))
    report_style.legend_below(figure, handles)
    png = report_style.save(figure)
  return Plot('churn', 'Log loss against churn', _caption(rows, split), png)


def _colours(rows: Sequence[Row]) -> Mapping[str, str]:
  others = [
      r.arm
      for r in rows
      if r.arm not in _COLOURS and run_files.weight_of(r.arm) is None
  ]
  colours = {arm: _OTHERS[i % len(_OTHERS)] for i, arm in enumerate(others)}
  return {r.arm: _CODISTILLED for r in rows} | colours | _COLOURS


def _points(rows: Sequence[Row]) -> list[list[float]]:
  return [[r.figures[key].mean for r in rows] for key in ('log_loss', 'churn')]


def _draw(ax: Axes, row: Row, colour: str, is_chosen: bool) -> None:
  x, y = row.figures['log_loss'], row.figures['churn']
  weight = run_files.weight_of(row.arm)
  marker = 'o' if weight is not None else _MARKERS.get(row.arm, '^')
  bars = [
      None if np.isnan(f.low) else [[f.mean - f.low], [f.high - f.mean]]
      for f in (x, y)
  ]
  ax.errorbar(
      x.mean,
      y.mean,
      xerr=bars[0],
      yerr=bars[1],
      color=colour,
      marker=marker,
      ms=5.5,
      lw=1.0,
      capsize=2.5,
      zorder=3,
  )
  if is_chosen:
    ax.plot(x.mean, y.mean, 'o', ms=12, mfc='none', mec=colour, zorder=4)
  if weight is not None:
    ax.annotate(
        f'{weight:g}',
        (x.mean, y.mean),
        xytext=(9, 5),
        textcoords='offset points',
        color=colour,
        fontsize=8.5,
    )


def _caption(rows: Sequence[Row], split: str) -> str:
  weighted = any(run_files.weight_of(r.arm) is not None for r in rows)
  return (
      f'Both on the {split} split; lower and further left is better. Points are'
      ' means over retrains and over pairs of them, bars their 95 % intervals'
      ' (bootstrap of retrains); the axis of log loss does not start at zero.'
      + (
          ' Numbers are distill weights; the ring is the one chosen on'
          ' validation.'
          if weighted
          else ''
      )
  )
