"""The plots of a run report: losses, the exchange, speed.

Up to four groups have a line style each; more of them are thin lines with
their median.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reports import curves as curve_lib
from experiments.reports import plots, records
from experiments.reports.pages import Plot
from experiments.reports.records import Arm, Group

# The zoom on the later part of a run shows what follows this share of it.
_LATER_PART = 0.4
# Peers have a colour each while they are few; of many one stands out.
_PEER_COLOURS = (plots.TWO, plots.ONE, *plots.PALETTE[:3])
_OLDEST_COLOUR = plots.ONE
_PEER_COLOUR = '#8A8A8A'
# Bands of more groups than this would lie on each other as a fog.
_MOST_BANDS = 2


class Entry(NamedTuple):
  """A curve of a group of an arm."""

  arm: Arm
  group: Group
  curve: pd.Series


Entries = list[Entry]


class Panel(NamedTuple):
  """One pair of axes, which `draw` fills with curves."""

  title: str
  label: str
  entries: Entries
  draw: Callable[[Axes, Entries], None]


def make_plots(arms: Sequence[Arm]) -> list[Plot]:
  """Returns all plots for which there are records, in order."""
  colours = plots.arm_colours(arm.name for arm in arms)
  arms = [arm._replace(colour=colours[arm.name]) for arm in arms]
  exchanging = records.exchanging(arms)
  with plots.style():
    made = [
        _plot_validation(arms),
        _plot_training(arms),
        _plot_staleness(exchanging),
        *(_plot_by_peer(arm, i) for i, arm in enumerate(exchanging)),
        _plot_exchange(exchanging),
        _plot_speed(arms),
    ]
  return [plot for plot in made if plot is not None]


def _entries(
    arms: Sequence[Arm], get: str | Callable[[Group], pd.Series]
) -> Entries:
  """Returns one curve of all groups that have a finite value of it."""
  if isinstance(get, str):
    get = functools.partial(Group.curve, key=get)
  found = [Entry(a, g, get(g)) for a in arms for g in a.groups]
  return [entry for entry in found if np.isfinite(entry.curve).any()]


def _arms_of(panels: Iterable[Panel]) -> list[Arm]:
  arms = (entry.arm for panel in panels for entry in panel.entries)
  return list({arm.name: arm for arm in arms}.values())


def _draw(panels: Sequence[Panel]) -> Figure:
  """Draws curves of groups against the steps of the whole run."""
  figure, axes = plots.figure_of(len(panels))
  arms = _arms_of(panels)
  for ax, panel in zip(axes, panels):
    ax.set_title(panel.title)
    ax.set_ylabel(panel.label)
    panel.draw(ax, panel.entries)
  _whole_run(axes, arms)
  plots.legend_below(figure)
  return figure


def _per_example(arms: Sequence[Arm]) -> str:
  return f'nats per {records.example_name(arms)}'


# --- Validation loss ---------------------------------------------------------


def _plot_validation(arms: Sequence[Arm]) -> Plot | None:
  arms = [a for a in arms if len(records.validation_curve(a))]
  if not arms:
    return None
  figure, (whole, later) = plots.figure_of(2)
  for ax in (whole, later):
    ax.set_ylabel(f'validation loss ({_per_example(arms)})')
    for arm in arms:
      _draw_validation(ax, arm)
  whole.set_title('Whole run')
  later.set_title('Later part, enlarged')
  _zoom_later(later, arms)
  said = _mark_target(later, arms)
  plots.legend_below(figure)
  caption = (
      'Validation loss against the step of each group. Thick lines are means'
      ' over the groups of an arm, thin lines single groups.'
      f' On the right the same curves from {_LATER_PART:.0%} of the steps on;'
      f' that axis does not start at zero.{said}'
  )
  return plots.save(figure, 'validation_loss', 'Validation loss', caption)


def _draw_validation(ax: Axes, arm: Arm) -> None:
  label = arm.name
  if len(arm.groups) > 1:
    label += f', mean of {len(arm.groups)} groups'
    for group in arm.groups:
      style = _style_of(arm, group) | {'label': None}
      if not _is_crowded(arm):
        style |= {'lw': 0.9, 'alpha': 0.65}
      ax.plot(group.curve('eval/loss'), **style)
  mean = records.validation_curve(arm)
  marker = {'marker': 'o', 'ms': 3} if len(mean) <= 30 else {}
  ax.plot(mean, color=arm.colour, label=label, lw=2.0, **marker)
  ensemble = arm.ensemble.get('eval/loss')
  if ensemble is not None:
    style = {'color': arm.colour, 'label': f'{arm.name}, ensemble', 'ls': ''}
    star = {'marker': '*', 'ms': 10, 'mec': 'white', 'mew': 0.7}
    ax.plot(
        mean.index[-1:], [ensemble], clip_on=False, zorder=5, **style, **star
    )


def _zoom_later(ax: Axes, arms: Sequence[Arm]) -> None:
  last = max(records.validation_curve(a).index[-1] for a in arms)
  values = [a.ensemble.get('eval/loss', np.nan) for a in arms]
  for arm in arms:
    for curve in arm.curves('eval/loss'):
      values += curve[curve.index >= _LATER_PART * last].tolist()
  plots.zoom(ax, filter(np.isfinite, values), below=0.06, above=0.06)
  if last > 0:
    ax.set_xlim(_LATER_PART * last, last * 1.015)


def _mark_target(ax: Axes, arms: Sequence[Arm]) -> str:
  """Draws the baseline's best loss, and where other arms come under it."""
  baseline = records.find_baseline(arms)
  found = baseline and records.best(records.validation_curve(baseline))
  if not found:
    return ''
  target = found[1]
  style = {'ls': plots.DOTTED, 'lw': 1.0, 'zorder': 1}
  label = f'best of {baseline.name}'
  ax.axhline(target, color=plots.GREY, label=label, **style)
  for arm in arms:
    step = records.first_at_or_under(records.validation_curve(arm), target)
    if arm is not baseline and step is not None:
      ax.plot([step, step], [0, target], color=arm.colour, **style)
  return (
      f' The dotted level is the best loss of {baseline.name}; dotted verticals'
      ' mark the first evaluation at which the mean of another arm is at or'
      ' under it.'
  )


# --- Training losses and speed -----------------------------------------------


def _plot_training(arms: Sequence[Arm]) -> Plot | None:
  distilled = _entries(arms, records.distill_curve)

  def draw(ax: Axes, entries: Entries) -> None:
    smooth = _draw_smoothed(ax, entries)
    # The steep first tenth of a run lies above the frame.
    last = max(curve.index[-1] for curve in smooth)
    values = pd.concat([c[c.index >= 0.1 * last] for c in smooth])
    plots.zoom(ax, records.finite(values), below=0.15, above=0.1)
    for arm in {entry.arm.name: entry.arm for entry in distilled}.values():
      if arm.run.get('burn_in_steps'):
        style = {'color': arm.colour, 'lw': 0.9, 'ls': (0, (1, 2))}
        ax.axvline(arm.run['burn_in_steps'], **style)

  losses = {
      'Task loss': _entries(arms, 'loss/task'),
      'Distillation loss': distilled,
  }
  panels = [
      Panel(title, f'{title.lower()} ({_per_example(arms)})', entries, draw)
      for title, entries in losses.items()
      if entries
  ]
  if not panels:
    return None
  caption = (
      f'Losses on the training batches: {_smoothed(panels)}'
      ' High values of the first steps lie above the frame.'
      + _crowded_note(arms)
  )
  if len(panels) > 1:
    caption += (
        ' The distillation loss is drawn where its weight is above 0. A dotted'
        ' vertical is the end of burn-in.'
    )
  title = 'Training losses'
  return plots.save(_draw(panels), 'training_loss', title, caption)


def _plot_speed(arms: Sequence[Arm]) -> Plot | None:
  def draw(ax: Axes, entries: Entries) -> None:
    smooth = _draw_smoothed(ax, entries)
    ax.set_ylim(0, 1.15 * max(curve.max() for curve in smooth))

  entries = _entries(arms, 'perf/steps_per_sec')
  if not entries:
    return None
  panels = [Panel('', 'speed of one group (steps/s)', entries, draw)]
  caption = (
      f'Updates per second of each group: {_smoothed(panels)} Groups that'
      ' share a machine share its speed.' + _crowded_note(_arms_of(panels))
  )
  return plots.save(_draw(panels), 'speed', 'Speed', caption)


def _draw_smoothed(ax: Axes, entries: Entries) -> list[pd.Series]:
  """Draws running means; of up to four groups the records too, faint."""
  smooth = [entry._replace(curve=_smooth(entry.curve)) for entry in entries]
  _draw_groups(ax, smooth)
  for arm, _, curve in entries:
    if not _is_crowded(arm):
      style = {'color': arm.colour, 'lw': 0.6, 'alpha': 0.18}
      ax.plot(curve, zorder=1, **style)
  return [entry.curve for entry in smooth]


def _smooth(curve: pd.Series) -> pd.Series:
  return curve_lib.running_mean(curve, curve_lib.smoothing_window(curve))


def _smoothed(panels: Sequence[Panel]) -> str:
  """Returns how `_draw_smoothed` has treated curves, for a caption."""
  curves = [entry.curve for panel in panels for entry in panel.entries]
  windows = {curve_lib.window_in_steps(curve) for curve in curves}
  steps = ' to '.join(f'{x:,}' for x in sorted({min(windows), max(windows)}))
  many = all(map(_is_crowded, _arms_of(panels)))
  faint = '' if many else 'records faint, and their '
  return f'{faint}centred running mean over {steps} steps.'


# --- Staleness ---------------------------------------------------------------


def _plot_staleness(arms: Sequence[Arm]) -> Plot | None:
  found = {
      unit: _entries(arms, f'exchange/staleness_{unit}')
      for unit in ('steps', 'seconds')
  }
  # All lines of a figure alike: a mean beside single records misleads.
  binning = _is_long(e.curve for entries in found.values() for e in entries)

  def draw(ax: Axes, entries: Entries) -> None:
    draw_line = lambda curve: curve_lib.drawable(curve, binning)
    _draw_groups(ax, [e._replace(curve=draw_line(e.curve)) for e in entries])
    for entry in entries if binning else ():
      _draw_range(ax, entry)
    if ax.dataLim.y0 >= 0:
      ax.set_ylim(0, max(1.08 * ax.dataLim.y1, 1e-3))
    else:  # A faster peer has published a step that this group has yet to do.
      ax.axhline(0, color='0.4', lw=0.8)

  panels = [
      Panel(f'In {unit}', f'staleness of the teachers ({unit})', entries, draw)
      for unit, entries in found.items()
      if entries
  ]
  if not panels:
    return None
  arms = _arms_of(panels)
  caption = (
      'How old the teachers are when a group uses them: own step minus the step'
      ' they were published at (below 0 where a peer is ahead), and the time'
      ' since then; mean over the peers that are present.' + _crowded_note(arms)
  )
  if binning:
    caption += ' Lines are means over short stretches of steps'
    if any(len(arm.groups) <= _MOST_BANDS for arm in arms):
      caption += ', bands run from the smallest to the largest value in them'
    caption += '.'
  return plots.save(_draw(panels), 'staleness', 'Staleness', caption)


def _is_long(curves: Iterable[pd.Series]) -> bool:
  return any(len(curve) > curve_lib.MAX_POINTS for curve in curves)


def _draw_range(ax: Axes, entry: Entry) -> None:
  """Draws a band from the smallest to the largest value, for few groups."""
  if len(entry.arm.groups) > _MOST_BANDS:
    return
  mean = records.finite(entry.curve)
  most = records.finite(entry.group.curve(f'{entry.curve.name}_max'))
  band = curve_lib.binned(mean, most if most.index.equals(mean.index) else mean)
  style = {'color': entry.arm.colour, 'alpha': 0.12, 'lw': 0}
  ax.fill_between(band.index, band['low'], band['high'], **style)


def _plot_by_peer(arm: Arm, index: int) -> Plot | None:
  """Draws a panel per group, a line per peer; None for one peer each."""
  found = {group.group_id: records.by_peer(group) for group in arm.groups}
  if max(map(len, found.values()), default=0) < 2:
    return None  # The mean over one peer says the same.
  figure, axes = plots.figure_of(
      len(found), columns=2 if len(found) <= 4 else 4
  )
  binning = _is_long(c for curves in found.values() for c in curves.values())
  peers = sorted({peer for curves in found.values() for peer in curves})
  few = dict(zip(peers, _PEER_COLOURS)) if len(peers) <= 5 else {}
  low, high = 0.0, 1.0
  for ax, (group_id, curves) in zip(axes, found.items()):
    drawn = {p: curve_lib.drawable(c, binning) for p, c in curves.items()}
    _draw_peers_of(ax, group_id, drawn, few)
    # Of an empty panel the limits are infinite, and change nothing.
    low, high = min(low, ax.dataLim.y0), max(high, ax.dataLim.y1)
  for ax in axes:  # One scale, so that panels can be compared.
    margin = 0.08 * (high - low)
    ax.set_ylim(low - margin * (low < 0), high + margin)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  _whole_run(axes, [arm])
  figure.supylabel('staleness (steps)', fontsize=9)
  plots.legend_below(figure)
  caption = (
      f'How old the publication of each peer is when a group of {arm.name} uses'
      ' it, in steps. A line is broken where the peer was not present.'
  )
  if not few:
    caption += ' Each panel names the peer that is stalest on average.'
  if binning:
    caption += ' Lines are means over short stretches of steps.'
  name = 'staleness_by_peer' + (f'_{index + 1}' if index else '')
  return plots.save(figure, name, f'Staleness by peer: {arm.name}', caption)


def _draw_peers_of(
    ax: Axes,
    group_id: int,
    curves: Mapping[int, pd.Series],
    few: Mapping[int, str],
) -> None:
  """Draws one panel; of many peers the stalest is in colour and named."""
  title = f'group {group_id}'
  oldest = None
  if not curves:
    title += ': no teachers'
  elif not few:
    oldest = max(curves, key=lambda peer: curves[peer].mean())
    title += f', stalest: {oldest}'
  ax.set_title(title)
  for peer, curve in curves.items():
    style = {'color': _PEER_COLOUR, 'label': 'the other peers', 'lw': 0.7}
    if few:
      label = f'teacher: group {peer}'
      style = {'color': few[peer], 'label': label, 'lw': 1.3}
    elif peer == oldest:
      label = 'the stalest peer on average'
      style = {'color': _OLDEST_COLOUR, 'label': label, 'lw': 1.5, 'zorder': 3}
    ax.plot(curve, **style, **_lonely(curve))


# --- Stall, peers, rejections, sizes -----------------------------------------


def _plot_exchange(arms: Sequence[Arm]) -> Plot | None:
  rejected = _entries(arms, lambda g: records.counted(g, records.REJECTED))
  none_rejected = rejected and not any(e.curve.any() for e in rejected)
  panels = {
      'Stall: the time for which publishing and fetching held the training'
      ' loop, added up from the first step.': Panel(
          'Time the exchange held the loop',
          'stall, all so far (s)',
          _entries(arms, _stalled_seconds),
          _draw_from_zero,
      ),
      'Peers present: how many taught the group.': Panel(
          'Peers present',
          'peers present',
          _entries(arms, 'exchange/peers_present'),
          _draw_counts,
      ),
      'Rejected: publications of peers that were damaged or did not fit, and'
      ' were not used; added up over restarts.': Panel(
          'Rejected publications',
          'rejected, all so far',
          # The caption says so; an empty panel says less.
          [] if none_rejected else rejected,
          _draw_counts,
      ),
      'Size: bytes of one publication, in millions.': Panel(
          'Size of a publication',
          'size (MB)',
          _entries(arms, _megabytes),
          _draw_from_zero,
      ),
  }
  panels = {said: panel for said, panel in panels.items() if panel.entries}
  if not panels:
    return None
  said = [*panels, *(['No publication was rejected.'] if none_rejected else [])]
  panels = list(panels.values())
  caption = ' '.join(said) + _crowded_note(_arms_of(panels))
  return plots.save(_draw(panels), 'exchange', 'Exchange', caption)


def _megabytes(group: Group) -> pd.Series:
  return group.curve('exchange/publication_bytes') / 1e6


def _stalled_seconds(group: Group) -> pd.Series:
  return records.finite(group.curve('exchange/stall_ms')).cumsum() / 1000.0


def _draw_from_zero(ax: Axes, entries: Entries, steps: bool = False) -> None:
  _draw_groups(ax, entries, steps)
  top = float(ax.dataLim.y1)
  top = top if np.isfinite(top) and top > 0 else 1.0
  # A line at 0 must not lie under the axis.
  ax.set_ylim(-0.04 * top, 1.12 * top)


def _draw_counts(ax: Axes, entries: Entries) -> None:
  _draw_from_zero(ax, entries, steps=True)
  ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
  ax.yaxis.set_major_formatter('{x:,.0f}')


# --- Lines of groups ---------------------------------------------------------


def _is_crowded(arm: Arm) -> bool:
  """Returns whether an arm has more groups than there are line styles."""
  return len(arm.groups) > len(plots.DASHES)


def _style_of(arm: Arm, group: Group) -> dict:
  if _is_crowded(arm):
    style = {'label': f'{arm.name}, single groups', 'lw': 0.6, 'alpha': 0.35}
    return {'color': arm.colour, **style}
  place = [g.group_id for g in arm.groups].index(group.group_id)
  label = arm.name
  if len(arm.groups) > 1:
    label += f', group {group.group_id}'
  style = {'color': arm.colour, 'label': label}
  return {**style, 'ls': plots.DASHES[place], 'lw': 1.4}


def _draw_groups(ax: Axes, entries: Entries, steps: bool = False) -> None:
  """Draws a line per group, and of many a thick one of their median.

  Args:
    ax: Where to draw.
    entries: What to draw.
    steps: Whether a value holds until the next, as a count does.
  """
  drawstyle = 'steps-post' if steps else 'default'
  crowds: dict[tuple[str, str], list[pd.Series]] = {}
  for arm, group, curve in entries:
    style = _style_of(arm, group) | _lonely(curve)
    ax.plot(curve, drawstyle=drawstyle, **style)
    if _is_crowded(arm):
      label = f'{arm.name}, median of {len(arm.groups)} groups'
      crowds.setdefault((label, arm.colour), []).append(curve)
  for (label, colour), crowd in crowds.items():
    median = curve_lib.median_curve(crowd)
    style = {'color': colour, 'label': label, 'lw': 2.0} | _lonely(median)
    ax.plot(median, drawstyle=drawstyle, **style)


def _lonely(curve: pd.Series) -> dict:
  """Returns a marker for a curve of one point, which would be no line."""
  alone = np.isfinite(curve).sum() == 1
  return {'marker': 'o', 'ms': 3.5} if alone else {}


def _whole_run(axes: Sequence[Axes], arms: Sequence[Arm]) -> None:
  """Sets the same steps on all axes, also where a metric begins later."""
  last = max(group.last_step for arm in arms for group in arm.groups)
  last = max(last, 1)  # A run of step 0 only has a width all the same.
  for ax in axes:
    ax.set_xlim(-0.015 * last, 1.015 * last)


def _crowded_note(arms: Sequence[Arm]) -> str:
  """Returns what a caption says of the thick lines, if there are any."""
  if not any(map(_is_crowded, arms)):
    return ''
  return ' Thin lines are single groups, the thick line their median.'
