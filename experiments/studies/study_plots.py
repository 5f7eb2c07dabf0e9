"""The plots of studies: curves, bytes, an axis of arms, wall time, churn.

With `reports.plots`, all of the studies that needs matplotlib.
"""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    NullLocator,
)

from codistill_jax.statistics import Estimate

from ..reports import plots
from ..reports.pages import Plot
from . import analysis, retrains, words
from .analysis import Analysis, Band, FactorEffects
from .costs import TargetMap, WallTime
from .retrains import Row
from .study_plan import MEASURES, Arm, Study

_MARKERS = ('o', 's', 'D', '^', 'v', 'P', 'X')
_TARGET = {'color': plots.GREY, 'ls': plots.DOTTED, 'lw': 1.0}
# Curves are shown from about this share of a run on.
_SHOWN_FROM = 0.35
# An arm that ends so many times higher above the best is not in the frame.
_FAR = 3.0
_MARKED = 30  # Evaluations up to which each has a marker.
_MANY = 7  # Arms from which on bands are lighter.


# --- Styles ------------------------------------------------------------------


def styles_of(study: Study) -> dict[str, dict]:
  """Returns colour and dashes of every arm, the same in all plots.

  The arms of a series have its colour, from dark to light along the axis.
  """
  names = list(dict.fromkeys(arm.series or arm.name for arm in study.arms))
  colours = plots.arm_colours(names)
  styles = {}
  for arm in study.arms:
    name = arm.series or arm.name
    before = names[: names.index(name)]
    again = sum(colours[x] == colours[name] for x in before)
    xs = sorted({a.x for a in study.arms if arm.series and a.series == name})
    styles[arm.name] = {
        'color': (
            _shade(colours[name], xs.index(arm.x), len(xs))
            if len(xs) > 1
            else colours[name]
        ),
        'ls': plots.DASHES[again % len(plots.DASHES)],
    }
  return styles


def _shade(colour: str, place: int, places: int) -> str:
  """Returns a colour on the way from half black to half white."""
  at = place / (places - 1) - 0.5
  towards = float(at > 0)
  mixed = [
      x + abs(at) * (towards - x) for x in matplotlib.colors.to_rgb(colour)
  ]
  return matplotlib.colors.to_hex(mixed)


def _legend(found: Analysis, styles: Mapping[str, dict]) -> list[Line2D]:
  """Returns an entry for each arm that was trained."""
  return [
      Line2D([], [], label=arm.title, lw=1.8, **styles[arm.name])
      for arm in found.trained
  ]


# --- Curves ------------------------------------------------------------------


def curves(found: Analysis, example: str) -> list[Plot]:
  """Draws validation loss, and for 'speed-accuracy' validation accuracy."""
  if not any(analysis.band(found, a.name, 'steps') for a in found.study.arms):
    return []
  label = f'validation loss (nats per {example})'
  teachers = any(run.prior_steps for run in found.all_runs)
  caption = words.paragraph(
      'loss_caption', window=found.window, teachers=teachers
  )
  made = [_two_axes(found, 'loss', label, 'Validation loss', caption)]
  accurate = any(len(run.accuracy_N) for run in found.all_runs)
  if accurate and 'speed-accuracy' in found.study.views:
    label, caption = 'validation accuracy', words.paragraph('accuracy_caption')
    title = 'Validation accuracy'
    made.append(_two_axes(found, 'accuracy', label, title, caption))
  return made


def _two_axes(
    found: Analysis, y: str, label: str, title: str, caption: str
) -> Plot:
  styles = styles_of(found.study)
  shade = 0.15 if len(found.study.arms) <= _MANY else 0.08
  with plots.style():
    figure, (left, right) = plots.figure_of(2, x_label='steps of each group')
    for ax, x in ((left, 'steps'), (right, 'flops')):
      for arm in found.study.arms:
        band = analysis.band(found, arm.name, x, y)
        _draw_band(ax, band, styles[arm.name], shade)
      _zoom(ax, found, y)
    left.set_title('Equal steps')
    left.set_ylabel(label)
    right.set_title('Equal compute')
    right.set_xlabel('FLOPs of all groups and teachers')
    right.xaxis.set_major_formatter(EngFormatter(sep=' '))
    _mark_divergence(left, found, styles)
    extra = _draw_target((left, right), found) if y == 'loss' else []
    plots.legend_below(figure, [*_legend(found, styles), *extra])
    return plots.save(figure, y, title, caption)


def _draw_band(
    ax: Axes, band: Band | None, style: dict, shade: float = 0.15
) -> None:
  """Draws a line of means with the range around it; nothing for None."""
  if band is None:
    return
  few = len(band.x_N) <= _MARKED
  marker = {'marker': 'o', 'ms': 2.5} if few else {}
  ax.plot(band.x_N, band.mean_N, lw=1.6, **marker, **style)
  ax.fill_between(
      band.x_N, band.low_N, band.high_N, color=style['color'], alpha=shade, lw=0
  )


def _draw_target(axes: Sequence[Axes], found: Analysis) -> list[Line2D]:
  """Draws the level of the target; returns its entry in the legend."""
  if not found.targets:
    return []
  level = float(np.mean(list(found.targets.values())))
  for ax in axes:
    ax.axhline(level, zorder=1, **_TARGET)
  return [Line2D([], [], label='target', **_TARGET)]


def _zoom(ax: Axes, found: Analysis, y: str) -> None:
  """Sets vertical limits that leave out the start of the runs.

  Half of the arms are in sight from `_SHOWN_FROM` on, and the ends of all but
  those that end far above: one slow arm must not press the others together.
  """
  bands = [analysis.band(found, a.name, 'steps', y) for a in found.study.arms]
  bands = [band for band in bands if band is not None]
  if not bands:
    return
  starts = [b.mean_N[b.x_N >= _SHOWN_FROM * b.x_N[-1]][0] for b in bands]
  ends = [end for b in bands for end in (b.low_N[-1], b.high_N[-1])]
  middle = float(np.median(starts))
  shown = [middle, *ends]
  if y == 'loss':
    shown += found.targets.values()
    far = min(shown) + _FAR * (middle - min(shown))
    shown = [value for value in shown if value <= max(far, middle)]
  plots.zoom(ax, shown, 0.06, 0.06)


def _mark_divergence(ax: Axes, found: Analysis, styles: dict) -> None:
  at_the_top = ax.get_xaxis_transform()
  for name, runs in found.runs.items():
    style = {'color': styles[name]['color'], 'ms': 6, 'mew': 1.6}
    for step in map(analysis.diverged_at, runs):
      if step is not None:
        ax.plot([step], [0.97], 'x', transform=at_the_top, **style)


# --- Bytes -------------------------------------------------------------------


def against_bytes(found: Analysis, example: str) -> Plot | None:
  """Draws loss against bytes received; None if no arm has received any."""
  bands = {a.name: _received(found, a.name) for a in found.study.arms}
  if not any(band is not None for band in bands.values()):
    return None
  styles = styles_of(found.study)
  with plots.style():
    label = 'bytes that one worker or group has received'
    figure, (ax,) = plots.figure_of(1, x_label=label)
    for name, band in bands.items():
      _draw_band(ax, band, styles[name])
    ax.set_xscale('log')
    ax.xaxis.set_major_locator(LogLocator(subs=_ticks(bands.values())))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter(unit='B', sep=' '))
    ax.set_ylabel(f'validation loss (nats per {example})')
    _zoom(ax, found, 'loss')
    extra = _draw_target([ax], found)
    silent = []
    for arm in found.study.arms:
      band = analysis.band(found, arm.name, 'bytes')
      if bands[arm.name] is None and band is not None:
        ax.axhline(band.mean_N[-1], lw=1.2, alpha=0.7, **styles[arm.name])
        silent.append(arm.title)
    plots.legend_below(figure, [*_legend(found, styles), *extra])
    caption = words.paragraph('bytes_caption', silent=silent)
    title = 'Validation loss at equal bytes'
    return plots.save(figure, 'loss_bytes', title, caption)


def _received(found: Analysis, arm: str) -> Band | None:
  """Returns the part of a curve where something has been received."""
  band = analysis.band(found, arm, 'bytes')
  if band is None or not (band.x_N > 0).any():
    return None
  return Band(*(part[band.x_N > 0] for part in band))


def _ticks(bands: Iterable[Band | None]) -> tuple[int, ...]:
  """Returns more ticks in a decade where there are few decades."""
  ends = [x for b in bands if b is not None for x in (b.x_N[0], b.x_N[-1])]
  return (1,) if max(ends) > 100 * min(ends) else (1, 2, 5)


# --- An axis of arms ---------------------------------------------------------

_PANELS = (
    'steps_to_target',
    'compute_to_target',
    'best_loss',
    'final_accuracy',
    'final_loss',
)
_MOST_PANELS = 4


def against_axis(found: Analysis) -> Plot | None:
  """Draws measures against x, a line for each series; None without any x."""
  series: dict[str, list[Arm]] = {}
  for arm in found.trained:
    if arm.x is not None:
      series.setdefault(arm.series, []).append(arm)
  if not found.study.x_label or not series:
    return None
  main = [c.measure for c in found.study.comparisons[:1]]
  panels = [
      measure
      for measure in dict.fromkeys([*main, *_PANELS])
      if any(np.isfinite(point(found, a, measure)[0]) for a in found.study.arms)
  ][:_MOST_PANELS]
  if not panels:
    return None
  others = [arm for arm in found.trained if arm.x is None]
  colours = plots.arm_colours(a.series or a.name for a in found.study.arms)
  with plots.style():
    label = found.study.x_label
    figure, axes = plots.figure_of(len(panels), x_label=label)
    legend = []
    for i, (name, arms) in enumerate(series.items()):
      style = {'color': colours[name], 'marker': _MARKERS[i % len(_MARKERS)]}
      apart = i - (len(series) - 1) / 2
      for ax, measure in zip(axes, panels):
        _draw_series(ax, found, arms, measure, style, apart)
      legend.append(Line2D([], [], label=name or label, lw=1.4, ms=5, **style))
    for ax, measure in zip(axes, panels):
      _finish_panel(ax, found, measure)
    for arm in others:
      style = {'color': colours[arm.name], 'ls': (0, (1.5, 1.5)), 'lw': 1.2}
      for ax, measure in zip(axes, panels):
        estimate = analysis.cell(found, arm.name, measure).estimate
        if estimate is not None:
          ax.axhline(estimate.mean, zorder=1, **style)
      legend.append(Line2D([], [], label=arm.title, **style))
    plots.legend_below(figure, legend)
    caption = words.paragraph(
        'axis_caption', several=len(series) > 1, others=others
    )
    return plots.save(figure, 'against_x', f'Against {label}', caption)


def point(
    found: Analysis, arm: Arm, measure: str
) -> tuple[float, Estimate | None]:
  """Returns the value of an arm, and its estimate if all seeds have one.

  Where a seed has not reached the target, the value is the largest seen.
  """
  cell = analysis.cell(found, arm.name, measure)
  if cell.estimate is not None:
    return cell.estimate.mean, cell.estimate
  seen = [x for s in cell.scores for x in (s.value, s.at_least)]
  return max((x for x in seen if np.isfinite(x)), default=np.nan), None


def _draw_series(
    ax: Axes,
    found: Analysis,
    arms: Sequence[Arm],
    measure: str,
    style: dict,
    apart: float,
) -> None:
  points = [
      # Bars of several lines do not hide each other.
      (arm.x * (1 + 0.03 * apart), *point(found, arm, measure))
      for arm in sorted(arms, key=lambda arm: arm.x)
  ]
  line = [(x, y) for x, y, estimate in points if estimate is not None]
  if line:
    ax.plot(*zip(*line), color=style['color'], lw=1.4)
  for x, y, estimate in points:
    if estimate is not None:
      bars = {'color': style['color'], 'capsize': 2.5, 'lw': 1}
      ax.errorbar(x, y, yerr=_ends(estimate), ms=5, ls='', **style | bars)
    elif np.isfinite(y):
      ax.plot([x], [y], '^', ms=7, mfc='none', mec=style['color'])


def _ends(estimate: Estimate) -> list[list[float]] | None:
  """Returns an interval as the bars of a point; None if there is none."""
  mean, low, high = estimate.mean, estimate.low, estimate.high
  return None if np.isnan(low) else [[mean - low], [high - mean]]


def _finish_panel(ax: Axes, found: Analysis, measure: str) -> None:
  ax.set_ylabel(MEASURES[measure].label)
  places = sorted({a.x for a in found.study.arms if a.x is not None})
  ax.set_xscale('log')
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_locator(FixedLocator(places))
  ax.xaxis.set_major_formatter('{x:,g}')
  if measure == 'compute_to_target':
    ax.yaxis.set_major_formatter(EngFormatter(sep=' '))
  elif MEASURES[measure].ratio:
    ax.yaxis.set_major_formatter('{x:,.0f}')
  if MEASURES[measure].ratio:
    ax.set_ylim(bottom=0)


# --- Wall time ---------------------------------------------------------------

_ONE = {'color': plots.ONE, 'lw': 1.6, 'ms': 5}
_TWO = {'color': plots.TWO, 'lw': 1.6, 'ms': 5}
_PAPER = {'ls': plots.DASHES[1]}


def wall_time(model: WallTime) -> Plot:
  """Draws steps and time to the target over workers; dashed on paper."""
  fit, crossover, workers = model.fit, model.crossover(), model.doublings()
  halves = [w // 2 for w in workers if w % 2 == 0]
  # What each side shows of one group of W, and of each of two.
  sides = {
      'Steps to target': ('steps to target', lambda s, w: s, lambda s, w: s),
      'Wall time to target': (
          'time (median steps of a worker)',
          lambda s, w: s * model.update(w),
          lambda s, w: s * model.taught_update(w),
      ),
  }
  with plots.style():
    figure, axes = plots.figure_of(2, x_label='workers in all')
    for ax, (title, (label, one, two)) in zip(axes, sides.items()):
      ax.set_title(title)
      ax.set_ylabel(label)
      curve = [one(fit.steps(w), w) for w in workers]
      ax.plot(workers, curve, **_ONE, **_PAPER)
      points = [one(s, w) for w, s in model.one.items()]
      ax.plot(list(model.one), points, marker='o', label='one group', **_ONE)
      if model.two:
        x, points = zip(*((2 * w, two(s, w)) for w, s in model.two.items()))
        ax.plot(x, points, marker='s', label='two groups', **_TWO)
      if model.at:
        curve = [two(model.ratio * fit.steps(w), w) for w in halves]
        ax.plot([2 * w for w in halves], curve, **_TWO, **_PAPER)
      _log_axes(ax)
    ax.plot([], [], color=plots.GREY, label='on paper', **_PAPER)
    if crossover:
      label = 'two groups faster from here'
      ax.axvline(2 * crossover, label=label, **_TARGET)
    plots.legend_below(figure, ax.get_legend_handles_labels()[0])
    caption = words.paragraph('latency_caption')
    return plots.save(figure, 'latency', 'Wall time, on paper', caption)


def batch_map(maps: Sequence[TargetMap], rows: float) -> Plot | None:
  """Draws ratios of steps over batches, a shade for each target.

  Args:
    maps: A target each; without a critical batch one is left out.
    rows: Of the batch of one worker.
  """
  drawn = [m for m in maps if m.fit is not None]
  if not drawn:
    return None
  kinds = {'two groups': (plots.TWO, 'o'), 'twice the batch': (plots.ONE, 's')}
  with plots.style():
    label = 'group batch / critical batch of the target'
    figure, (ax,) = plots.figure_of(1, x_label=label)
    for i, found in enumerate(maps):
      for kind, (colour, marker) in kinds.items():
        points = [
            (w / found.fit.critical, e.estimate)
            for w, e in found.ratios[kind].items()
            if found.fit is not None and e.estimate is not None
        ]
        style = {'color': _shade(colour, i, len(maps)), 'marker': marker}
        style['label'] = f'{kind}, {found.name} target'
        ax.plot([x for x, _ in points], [e.mean for _, e in points], **style)
        for x, estimate in points:
          style = {'color': style['color'], 'capsize': 2.5, 'lw': 1}
          ax.errorbar(x, estimate.mean, yerr=_ends(estimate), **style)
    ax.axhline(1.0, **_TARGET)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:,g}')
    ax.set_ylabel('steps, over one group')
    plots.legend_below(figure, ax.get_legend_handles_labels()[0])
    caption = words.paragraph('batch_map_caption')
    return plots.save(figure, 'map', 'Where a second group pays', caption)


def factors(effects: Sequence[FactorEffects]) -> Plot | None:
  """Draws losses over one group by what is changed, a colour for each point."""
  drawn = [e for e in effects if e.loss.estimate is not None]
  if not drawn:
    return None
  changes = list(dict.fromkeys(e.factor.change for e in effects))
  points = list(dict.fromkeys(e.factor.point for e in effects))
  colours = plots.arm_colours(points)
  label = 'loss at the end, over one group (nats)'
  with plots.style():
    figure, (ax,) = plots.figure_of(1, x_label=label)
    figure.set_figheight(0.3 * len(changes) + 1)
    for i, point in enumerate(points):
      found = [e for e in drawn if e.factor.point == point]
      apart = 0.3 * (i / max(len(points) - 1, 1) - 0.5)
      at = [changes.index(e.factor.change) + apart for e in found]
      style = {'color': colours[point], 'capsize': 2.5, 'lw': 1}
      for y, e in zip(at, found):
        loss = e.loss.estimate
        ax.errorbar(loss.mean, y, xerr=_ends(loss), **style)
      means = [e.loss.estimate.mean for e in found]
      style = {'color': colours[point], 'marker': _MARKERS[i], 'label': point}
      ax.plot(means, at, ls='', **style)
    ax.axvline(0.0, **_TARGET)
    ax.xaxis.set_major_formatter('{x:+.2f}')
    ax.set_yticks(range(len(changes)), changes)
    ax.invert_yaxis()
    plots.legend_below(figure, ax.get_legend_handles_labels()[0])
    caption = words.paragraph('factors_caption')
    return plots.save(figure, 'factors', 'What each change makes', caption)


def _log_axes(ax: Axes) -> None:
  ax.set_xscale('log', base=2)
  ax.set_yscale('log')
  ax.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
  ax.xaxis.set_major_formatter('{x:,.0f}')
  ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=30))
  ax.yaxis.set_major_formatter('{x:,.0f}')
  ax.yaxis.set_minor_locator(NullLocator())


# --- Churn -------------------------------------------------------------------


def churn(rows: Sequence[Row], chosen: str | None, split: str) -> Plot:
  """Draws log loss against churn, arms of several weights as one line."""
  weights = {r.arm: retrains.weight_of(r.arm) for r in rows}
  weighted = [r for r in rows if weights[r.arm] is not None]
  colours = plots.arm_colours(r.arm for r in rows if r not in weighted)
  colours |= dict.fromkeys((r.arm for r in weighted), plots.TWO)
  with plots.style():
    label = f'{split} log loss (nats)'
    figure, (ax,) = plots.figure_of(1, x_label=label)
    ax.set_ylabel('churn: mean absolute difference\nbetween retrains')
    ax.xaxis.set_major_formatter('{x:.4g}')
    line = [
        [r.figures[key].mean for r in weighted] for key in ('log_loss', 'churn')
    ]
    ax.plot(*line, color=plots.TWO, lw=1.2, zorder=2)
    markers = {retrains.SINGLE: 's', retrains.ENSEMBLE: 'D'}
    markers |= dict.fromkeys((r.arm for r in weighted), 'o')
    handles = []
    for row in rows:
      x, y = row.figures['log_loss'], row.figures['churn']
      colour, marker = colours[row.arm], markers.get(row.arm, '^')
      style = {'color': colour, 'marker': marker, 'ms': 5.5, 'lw': 1.0}
      bars = {'xerr': _ends(x), 'yerr': _ends(y), 'capsize': 2.5}
      ax.errorbar(x.mean, y.mean, **bars, **style, zorder=3)
      if row.arm == chosen:
        ax.plot(x.mean, y.mean, 'o', ms=12, mfc='none', mec=colour, zorder=4)
      if row not in weighted:
        handles.append(plots.line(colour, row.title, ls='', marker=marker))
        continue
      text = {'color': colour, 'fontsize': 8.5, 'textcoords': 'offset points'}
      at = {'xy': (x.mean, y.mean), 'xytext': (9, 5)}
      ax.annotate(f'{weights[row.arm]:g}', **at, **text)
    found = [r.figures['churn'] for r in rows]
    highest = np.nanmax([[f.mean, f.high] for f in found])
    ax.set_ylim(0, 1.08 * highest or 1.0)
    ax.margins(x=0.12)
    caption = words.paragraph('churn_caption', split=split, weighted=weighted)
    if weighted:
      label = f'{weighted[0].title.partition(",")[0]}, by distill weight'
      handles.append(plots.line(plots.TWO, label, marker='o', lw=1.2))
    plots.legend_below(figure, handles)
    return plots.save(figure, 'churn', 'Log loss against churn', caption)
