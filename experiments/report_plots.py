"""The plots of a report, as PNG bytes.

One colour per arm (Okabe and Ito's palette, told apart by colour-blind readers
too), one line style per group. Only this file imports matplotlib.
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

from experiments import report_data
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

# Records are smoothed over this share of a run, at least one record.
_SMOOTHING = 1 / 40
# More records than this are drawn as means and ranges over bins.
_MAX_POINTS = 160
_BINS = 40
# The zoom on the later part of a run shows what follows this share of it.
_LATER_PART = 0.4


def make_plots(arms: Sequence[Arm]) -> list[Plot]:
  """All plots for which there are records, in the order of the report."""
  with matplotlib.rc_context(_STYLE):
    plots = [
        _plot_validation(arms),
        _plot_training(arms),
        _plot_staleness(arms),
        _plot_exchange(arms),
        _plot_speed(arms),
    ]
  return [plot for plot in plots if plot is not None]


# --- Curves ------------------------------------------------------------------


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


def _finite(curve: Curve) -> Curve:
  good = np.isfinite(curve.values)
  return Curve(curve.steps[good], curve.values[good])


def distill_curve(group: Group) -> Curve:
  """The distillation loss where it counted: not during burn-in."""
  curve = group.curve('loss/distill')
  weight = group.curve('distill/weight')
  counted = weight.steps[weight.values > 0]
  keep = np.isin(curve.steps, counted) if weight else curve.steps >= 0
  return Curve(curve.steps[keep], curve.values[keep])


# --- Figures and axes --------------------------------------------------------


def arm_colours(arms: Sequence[Arm]) -> dict[str, str]:
  """A colour for every arm, by name."""
  others = [arm.name for arm in arms if arm.name not in _ARM_COLOURS]
  colours = {
      name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)]
      for i, name in enumerate(others)
  }
  return colours | _ARM_COLOURS


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
  figure = Figure(
      figsize=(4.6 * columns if columns > 1 else 6.0, 3.5),
      layout='constrained',
  )
  axes = figure.subplots(1, columns, squeeze=False)[0]
  for ax in axes:
    ax.set_xlabel('step')
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter('{x:,.0f}')
  return figure, list(axes)


def _style_of(group: Group) -> object:
  return _GROUP_STYLES[group.group_id % len(_GROUP_STYLES)]


def _legend(figure: Figure, arms: Sequence[Arm], extra: Sequence[Line2D] = ()):
  """One legend below the plot: a line per arm and group, then `extra`."""
  colours = arm_colours(arms)
  handles = []
  for arm in arms:
    for group in arm.groups:
      label = arm.name
      if len(arm.groups) > 1:
        label += f', group {group.group_id}'
      handles.append(_line(colours[arm.name], label, ls=_style_of(group)))
  _legend_below(figure, [*handles, *extra])


def _legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
  # As many columns as fit: the legend must not be wider than the figure.
  widest = max(len(str(handle.get_label())) for handle in handles)
  columns = int(figure.get_figwidth() / (0.65 + 0.085 * widest))
  figure.legend(
      handles=handles,
      loc='outside lower center',
      ncols=max(1, min(len(handles), columns)),
  )


def _whole_run(axes: Sequence[Axes], arms: Sequence[Arm]) -> None:
  """The same steps on all axes, also where a metric begins later."""
  last = max(group.last_step for arm in arms for group in arm.groups)
  last = max(last, 1)  # A run of step 0 only has a width all the same.
  for ax in axes:
    ax.set_xlim(-0.015 * last, 1.015 * last)


def _line(colour: str, label: str, **kwargs) -> Line2D:
  return Line2D([], [], color=colour, label=label, **kwargs)


def _png(figure: Figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', facecolor='white')
  return buffer.getvalue()


def _per_example(arms: Sequence[Arm]) -> str:
  return f'nats per {report_data.example_name(arms)}'


# --- Validation loss ---------------------------------------------------------


def _plot_validation(arms: Sequence[Arm]) -> Plot | None:
  arms = [a for a in arms if report_data.validation_curve(a)]
  if not arms:
    return None
  figure, (whole, later) = _figure(2)
  for ax in (whole, later):
    ax.set_ylabel(f'validation loss ({_per_example(arms)})')
    for arm in arms:
      _draw_validation(ax, arm, arm_colours(arms)[arm.name])
  whole.set_title('Whole run')
  later.set_title('Later part, enlarged')
  _zoom_later(later, arms)
  handles, said = _mark_target(later, arms)
  _legend_below(figure, _validation_legend(arms) + handles)
  caption = (
      'Validation loss against the step of each group. Thick lines are means'
      ' over the groups of an arm, thin lines single groups.'
      f' On the right the same curves from {_LATER_PART:.0%} of the steps on;'
      f' that axis does not start at zero.{said}'
  )
  return Plot('validation_loss', 'Validation loss', caption, _png(figure))


def _draw_validation(ax: Axes, arm: Arm, colour: str) -> None:
  if len(arm.groups) > 1:
    for group in arm.groups:
      curve = group.curve('eval/loss')
      style = {'ls': _style_of(group), 'lw': 0.9, 'alpha': 0.65}
      ax.plot(curve.steps, curve.values, color=colour, **style)
  mean = report_data.validation_curve(arm)
  few = len(mean.steps) <= 30
  marker = {'marker': 'o', 'ms': 3} if few else {}
  ax.plot(mean.steps, mean.values, color=colour, lw=2.0, **marker)
  ensemble = arm.ensemble.get('eval/loss')
  if ensemble is not None:
    ax.plot(
        [mean.steps[-1]],
        [ensemble],
        marker='*',
        ms=10,
        mec='white',
        mew=0.7,
        color=colour,
        clip_on=False,
        zorder=5,
    )


def _validation_legend(arms: Sequence[Arm]) -> list[Line2D]:
  colours = arm_colours(arms)
  handles = []
  for arm in arms:
    label, colour = arm.name, colours[arm.name]
    if len(arm.groups) > 1:
      label += f', mean of {len(arm.groups)} groups'
    handles.append(_line(colour, label, lw=2))
    if arm.ensemble.get('eval/loss') is not None:
      label = f'{arm.name}, ensemble'
      handles.append(_line(colour, label, ls='', marker='*', ms=9))
  return handles


def _zoom_later(ax: Axes, arms: Sequence[Arm]) -> None:
  last = max(report_data.validation_curve(a).steps[-1] for a in arms)
  values = [a.ensemble.get('eval/loss', np.nan) for a in arms]
  for arm in arms:
    for group in arm.groups:
      curve = group.curve('eval/loss')
      values += curve.values[curve.steps >= _LATER_PART * last].tolist()
  values = [v for v in values if np.isfinite(v)]
  if values and max(values) > min(values):
    margin = 0.06 * (max(values) - min(values))
    ax.set_ylim(min(values) - margin, max(values) + margin)
  if last > 0:
    ax.set_xlim(_LATER_PART * last, last * 1.015)


def _mark_target(ax: Axes, arms: Sequence[Arm]) -> tuple[list[Line2D], str]:
  """Draws the baseline's best loss, and where other arms come under it."""
  baseline = report_data.find_baseline(arms)
  found = baseline and report_data.best(report_data.validation_curve(baseline))
  if not found:
    return [], ''
  target = found[1]
  style = {'ls': (0, (2, 2)), 'lw': 1.0}
  ax.axhline(target, color='#555555', zorder=1, **style)
  for arm in arms:
    step = report_data.first_at_or_under(
        report_data.validation_curve(arm), target
    )
    if arm is not baseline and step is not None:
      colour = arm_colours(arms)[arm.name]
      ax.plot([step, step], [0, target], color=colour, zorder=1, **style)
  label = f'best of {baseline.name}'
  said = (
      f' The dotted level is the best loss of {baseline.name}; dotted verticals'
      ' mark the first evaluation at which the mean of another arm is at or'
      ' under it.'
  )
  return [_line('#555555', label, **style)], said


# --- Training losses ---------------------------------------------------------


def _plot_training(arms: Sequence[Arm]) -> Plot | None:
  panels = [
      ('Task loss', 'task loss', [_of(arms, 'loss/task')]),
      ('Distillation loss', 'distillation loss', [_of_distill(arms)]),
  ]
  panels = [(t, y, c[0]) for t, y, c in panels if c[0]]
  if not panels:
    return None
  figure, axes = _figure(len(panels))
  for ax, (title, label, curves) in zip(axes, panels):
    ax.set_title(title)
    ax.set_ylabel(f'{label} ({_per_example(arms)})')
    smooth = [_draw_smoothed(ax, arms, *entry) for entry in curves]
    _zoom_losses(ax, smooth)
  _mark_burn_in(axes, arms)
  _whole_run(axes, arms)
  _legend(figure, [a for a in arms if any(c[0] is a for c in panels[0][2])])
  windows = {_window_in_steps(c) for _, _, cs in panels for _, _, c in cs}
  caption = (
      'Losses on the training batches: records faint, and their centred running'
      f' mean over {_range(windows)} steps. High values of the first steps lie'
      ' above the frame.'
  )
  if len(panels) > 1:
    caption += (
        ' The distillation loss is drawn where its weight is above 0. A dotted'
        ' vertical is the end of burn-in.'
    )
  return Plot('training_loss', 'Training losses', caption, _png(figure))


Entries = list[tuple[Arm, Group, Curve]]


def _of(arms: Sequence[Arm], key: str) -> Entries:
  found = [(a, g, g.curve(key)) for a in arms for g in a.groups]
  return [entry for entry in found if np.isfinite(entry[2].values).any()]


def _of_distill(arms: Sequence[Arm]) -> Entries:
  found = [(a, g, distill_curve(g)) for a in arms for g in a.groups]
  return [entry for entry in found if np.isfinite(entry[2].values).any()]


def _draw_smoothed(
    ax: Axes, arms: Sequence[Arm], arm: Arm, group: Group, curve: Curve
) -> Curve:
  colour = arm_colours(arms)[arm.name]
  smooth = running_mean(curve, smoothing_window(curve))
  ax.plot(curve.steps, curve.values, color=colour, lw=0.6, alpha=0.18)
  ax.plot(
      smooth.steps, smooth.values, color=colour, lw=1.5, ls=_style_of(group)
  )
  return smooth


def _zoom_losses(ax: Axes, smooth: Sequence[Curve]) -> None:
  """Leaves the steep first tenth of a run above the frame."""
  last = max(c.steps[-1] for c in smooth)
  values = np.concatenate([c.values[c.steps >= 0.1 * last] for c in smooth])
  values = values[np.isfinite(values)]
  if len(values) and values.max() > values.min():
    span = values.max() - values.min()
    ax.set_ylim(values.min() - 0.15 * span, values.max() + 0.1 * span)


def _mark_burn_in(axes: Sequence[Axes], arms: Sequence[Arm]) -> None:
  colours = arm_colours(arms)
  for arm in arms:
    burn_in = arm.run.get('burn_in_steps')
    if burn_in and _of_distill([arm]):
      for ax in axes:
        ax.axvline(burn_in, color=colours[arm.name], lw=0.9, ls=(0, (1, 2)))


def _window_in_steps(curve: Curve) -> int:
  if len(curve.steps) < 2:
    return 1
  spacing = int(np.median(np.diff(curve.steps)))
  return smoothing_window(curve) * spacing


def _range(values: set[int]) -> str:
  low, high = min(values), max(values)
  return f'{low:,}' if low == high else f'{low:,} to {high:,}'


# --- Exchange ----------------------------------------------------------------


def _plot_staleness(arms: Sequence[Arm]) -> Plot | None:
  arms = [a for a in arms if _of([a], 'exchange/staleness_steps')]
  if not arms:
    return None
  units = ('steps', 'seconds')
  units = [u for u in units if _of(arms, f'exchange/staleness_{u}')]
  figure, axes = _figure(len(units))
  # All lines of a figure alike: a mean beside single records misleads.
  long = any(
      len(curve.steps) > _MAX_POINTS
      for _, _, curve in _of(arms, 'exchange/staleness_steps')
  )
  for ax, unit in zip(axes, units):
    ax.set_title(f'In {unit}')
    ax.set_ylabel(f'staleness of the teachers ({unit})')
    for arm, group, curve in _of(arms, f'exchange/staleness_{unit}'):
      colour = arm_colours(arms)[arm.name]
      if long:
        most = group.curve(f'exchange/staleness_{unit}_max')
        _draw_range(ax, curve, most, colour, _style_of(group))
      else:
        drawn = with_gaps(curve)
        style = {'lw': 1.3, 'ls': _style_of(group)}
        ax.plot(drawn.steps, drawn.values, color=colour, **style)
    if ax.dataLim.y0 >= 0:
      ax.set_ylim(bottom=0)
    else:  # A faster peer has published a step that this group has yet to do.
      ax.axhline(0, color='0.4', lw=0.8)
  _whole_run(axes, arms)
  _legend(figure, arms)
  caption = (
      'How old the teachers are when a group uses them: own step minus the step'
      ' they were published at (below 0 where a peer is ahead), and the time'
      ' since then; mean over the peers that are present.'
  )
  if long:
    caption += (
        ' Lines are means over short stretches of steps, bands run from the'
        ' smallest to the largest value in them.'
    )
  return Plot('staleness', 'Staleness', caption, _png(figure))


def _draw_range(
    ax: Axes, curve: Curve, most: Curve, colour: str, style: object
) -> None:
  """Draws a long curve as means over bins and a band from least to most."""
  curve, most = _finite(curve), _finite(most)
  if not np.array_equal(most.steps, curve.steps):
    most = curve
  steps, mean, low, high = binned(curve, most, _BINS)
  ax.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
  ax.plot(steps, mean, color=colour, lw=1.3, ls=style)


def _plot_exchange(arms: Sequence[Arm]) -> Plot | None:
  arms = [
      a
      for a in arms
      if a.run.get('num_groups', len(a.groups)) > 1
      and _of([a], 'exchange/stall_ms')
  ]
  if not arms:
    return None
  has_peers = bool(_of(arms, 'exchange/peers_present'))
  figure, axes = _figure(1 + has_peers)
  colours = arm_colours(arms)
  axes[0].set_title('Time the exchange held the loop')
  axes[0].set_ylabel('stall, all so far (s)')
  for arm, group, curve in _of(arms, 'exchange/stall_ms'):
    held = np.nancumsum(curve.values) / 1000.0
    style = {'color': colours[arm.name], 'lw': 1.5, 'ls': _style_of(group)}
    axes[0].step(curve.steps, held, where='post', **style)
  axes[0].set_ylim(bottom=0)
  if has_peers:
    _draw_peers(axes[1], arms)
  _whole_run(axes, arms)
  _legend(figure, arms)
  caption = (
      'Left: the time for which publishing and fetching held the training loop,'
      ' added up from the first step.'
  )
  if has_peers:
    caption += ' Right: how many peers were present as teachers.'
  return Plot('exchange', 'Exchange', caption, _png(figure))


def _draw_peers(ax: Axes, arms: Sequence[Arm]) -> None:
  ax.set_title('Peers present')
  ax.set_ylabel('peers present')
  colours = arm_colours(arms)
  top = 1.0
  for arm, group, curve in _of(arms, 'exchange/peers_present'):
    style = {'color': colours[arm.name], 'lw': 1.5, 'ls': _style_of(group)}
    ax.step(curve.steps, curve.values, where='post', **style)
    top = max(top, float(np.nanmax(curve.values)))
  ax.set_ylim(-0.05 * top, 1.1 * top)
  ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))


# --- Speed -------------------------------------------------------------------


def _plot_speed(arms: Sequence[Arm]) -> Plot | None:
  arms = [a for a in arms if _of([a], 'perf/steps_per_sec')]
  if not arms:
    return None
  figure, (ax,) = _figure(1)
  ax.set_ylabel('speed of one group (steps/s)')
  entries = _of(arms, 'perf/steps_per_sec')
  top = max(
      float(np.nanmax(_draw_smoothed(ax, arms, *entry).values))
      for entry in entries
  )
  ax.set_ylim(0, 1.15 * top)
  _whole_run([ax], arms)
  _legend(figure, arms)
  windows = {_window_in_steps(curve) for _, _, curve in entries}
  caption = (
      'Updates per second of each group: records faint, and their centred'
      f' running mean over {_range(windows)} steps. Groups that share a machine'
      ' share its speed.'
  )
  return Plot('speed', 'Speed', caption, _png(figure))
