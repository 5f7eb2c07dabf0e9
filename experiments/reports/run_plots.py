"""The plots of a run report: losses, the exchange, speed.

Up to four groups have a line style each; more of them are thin lines with
their median.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from . import pages, plots, run_records
from .pages import Plot
from .run_records import GroupRecords, RunRecords

# The zoom on the later part of a run shows what follows this share of it.
_LATER_PART = 0.4
_PEER_COLOUR = '#8A8A8A'
# Bands of more groups than this would lie on each other as a fog.
_MOST_BANDS = 2

_write = pages.prose(__file__)


class Entry(NamedTuple):
  """A curve of a group of an arm."""

  arm: RunRecords
  group: GroupRecords
  curve: pd.Series


class Panel(NamedTuple):
  """One pair of axes of a plot against the steps of the whole run.

  Attributes:
    title: Its heading; captions are made for the panels that are drawn.
    label: What the vertical axis shows; `{unit}` is that of losses.
    curve: A metric, or what gives the curve of a group. Without any finite
      value the panel is left out.
    draw: Draws the entries.
    zero: Whether to draw the panel, too, if all its values are 0.
    constant: The caption says this instead of it where all curves come to one
      value and keep it; '' draws them.
  """

  title: str
  label: str
  curve: str | Callable[[GroupRecords], pd.Series]
  draw: Callable[[Axes, Sequence[Entry]], None]
  zero: bool = True
  constant: str = ''


def make_plots(arms: Sequence[RunRecords]) -> list[Plot]:
  """Returns all plots for which there are records, in order."""
  colours = plots.arm_colours(arm.name for arm in arms)
  arms = [
      arm._replace(
          colour=colours[arm.name],
          # In a legend matplotlib leaves out what begins so.
          name=re.sub('^_', ' _', arm.name),
      )
      for arm in arms
  ]
  exchanging = run_records.exchanging(arms)
  with plots.style():
    made = [
        _draw_validation(arms),
        _draw('training_loss', 'Training losses', _TRAINING, arms),
        _draw('staleness', 'Staleness', _STALENESS, exchanging),
        *(_draw_by_peer(arm, i) for i, arm in enumerate(exchanging)),
        _draw('exchange', 'Exchange', _EXCHANGE, exchanging),
        _draw('speed', 'Speed', _SPEED, arms),
    ]
  return [plot for plot in made if plot is not None]


def _draw(
    name: str, title: str, panels: Iterable[Panel], arms: Sequence[RunRecords]
) -> Plot | None:
  """Draws the panels for which there are records; None for none."""
  found = {p: e for p in panels if (e := _entries(arms, p.curve))}
  shown = {
      panel: entries
      for panel, entries in found.items()
      if panel.zero or any(entry.curve.any() for entry in entries)
  }
  constant = {p: _constant(e) for p, e in shown.items() if p.constant}
  folded = {p: known for p, known in constant.items() if known}
  if len(folded) == len(shown):
    folded = {}
  drawn = {p: entries for p, entries in shown.items() if p not in folded}
  if not drawn:
    return None
  figure, axes = plots.figure_of(len(drawn))
  for ax, (panel, entries) in zip(axes, drawn.items()):
    ax.set_title(panel.title)
    ax.set_ylabel(panel.label.format(unit=_unit(arms)))
    panel.draw(ax, entries)
  every = [entry for entries in drawn.values() for entry in entries]
  arms = list({entry.arm.name: entry.arm for entry in every}.values())
  _show_whole_run(axes, arms)
  plots.legend_below(figure)
  windows = {plots.window_in_steps(entry.curve) for entry in every}
  facts = {
      'panels': [panel.title for panel in drawn],
      'zero': len(shown) < len(found),
      'folded': [p.constant.format(*known) for p, known in folded.items()],
      'windows': sorted({min(windows), max(windows)}),
      'binned': _is_long(entry.curve for entry in every),
      'bands': any(len(arm.groups) <= _MOST_BANDS for arm in arms),
      'any_crowded': any(map(_is_crowded, arms)),
      'all_crowded': all(map(_is_crowded, arms)),
  }
  return plots.save(figure, name, title, *_write(name, f=facts))


def _entries(
    arms: Sequence[RunRecords], get: str | Callable[[GroupRecords], pd.Series]
) -> list[Entry]:
  """Returns one curve of all groups that have a finite value of it."""
  if isinstance(get, str):
    get = functools.partial(GroupRecords.curve, key=get)
  found = [Entry(a, g, get(g)) for a in arms for g in a.groups]
  return [entry for entry in found if np.isfinite(entry.curve).any()]


def _constant(entries: Sequence[Entry]) -> tuple[float, str] | None:
  """Returns the value that all curves keep, and since when, if there is one.

  A curve may rise to it once, as the number of peers does.
  """
  values, since = set(), 0
  for entry in entries:
    curve = run_records.finite(entry.curve)
    kept = curve[curve.index >= curve.idxmax()]
    if kept.nunique() > 1 or not curve.is_monotonic_increasing:
      return None
    values.add(kept.iloc[-1])
    since = max(since, kept.index[0] if len(kept) < len(curve) else 0)
  if len(values) > 1:
    return None
  return values.pop(), f' from step {since:,} on' if since else ''


def _unit(arms: Sequence[RunRecords]) -> str:
  return f'nats per {run_records.example_name(arms)}'


# --- How panels are drawn ----------------------------------------------------


def _draw_losses(ax: Axes, entries: Sequence[Entry]) -> None:
  smooth = _draw_smoothed(ax, entries)
  # The steep first tenth of a run lies above the frame.
  last = max(curve.index[-1] for curve in smooth)
  values = pd.concat([c[c.index >= 0.1 * last] for c in smooth])
  plots.zoom(ax, run_records.finite(values), below=0.15, above=0.1)
  distilled = _entries(
      [entry.arm for entry in entries], run_records.distill_curve
  )
  for arm in {entry.arm.name: entry.arm for entry in distilled}.values():
    if arm.run.get('burn_in_steps'):
      style = {'color': arm.colour, 'lw': 0.9, 'ls': (0, (1, 2))}
      ax.axvline(arm.run['burn_in_steps'], **style)


def _draw_speed(ax: Axes, entries: Sequence[Entry]) -> None:
  smooth = _draw_smoothed(ax, entries)
  ax.set_ylim(0, 1.15 * max(curve.max() for curve in smooth))


def _draw_smoothed(ax: Axes, entries: Sequence[Entry]) -> list[pd.Series]:
  """Draws running means; of up to four groups the records too, faint."""
  smooth = [e._replace(curve=plots.smooth(e.curve)) for e in entries]
  _draw_groups(ax, smooth)
  for arm, _, curve in entries:
    if not _is_crowded(arm):
      style = {'color': arm.colour, 'lw': 0.6, 'alpha': 0.18}
      plots.plot(ax, curve, zorder=1, **style)
  return [entry.curve for entry in smooth]


def _draw_staleness(ax: Axes, entries: Sequence[Entry]) -> None:
  # All lines alike: a mean beside single records misleads.
  binning = _is_long(entry.curve for entry in entries)
  drawn = [plots.drawable(entry.curve, binning) for entry in entries]
  _draw_groups(ax, [e._replace(curve=c) for e, c in zip(entries, drawn)])
  for entry in entries if binning else ():
    _draw_range(ax, entry)
  if ax.dataLim.y0 >= 0:
    ax.set_ylim(0, max(1.08 * ax.dataLim.y1, 1e-3))
  else:  # A faster peer has published a step that this group has yet to do.
    ax.axhline(0, color='0.4', lw=0.8)


def _is_long(curves: Iterable[pd.Series]) -> bool:
  return any(len(curve) > plots.MAX_POINTS for curve in curves)


def _draw_range(ax: Axes, entry: Entry) -> None:
  """Draws a band from the smallest to the largest value, for few groups."""
  if len(entry.arm.groups) > _MOST_BANDS:
    return
  mean = run_records.finite(entry.curve)
  most = run_records.finite(entry.group.curve(f'{entry.curve.name}_max'))
  band = plots.binned(mean, most if most.index.equals(mean.index) else mean)
  style = {'color': entry.arm.colour, 'alpha': 0.12, 'lw': 0}
  ax.fill_between(band.index, band['low'], band['high'], **style)


def _draw_from_zero(
    ax: Axes, entries: Sequence[Entry], steps: bool = False
) -> None:
  _draw_groups(ax, entries, steps)
  top = float(ax.dataLim.y1)
  top = top if np.isfinite(top) and top > 0 else 1.0
  # A line at 0 must not lie under the axis.
  ax.set_ylim(-0.04 * top, 1.12 * top)


def _draw_counts(ax: Axes, entries: Sequence[Entry]) -> None:
  _draw_from_zero(ax, entries, steps=True)
  ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
  ax.yaxis.set_major_formatter('{x:,.0f}')


# --- Panels ------------------------------------------------------------------


_TRAINING = (
    Panel('Task loss', 'task loss ({unit})', 'loss/task', _draw_losses),
    Panel(
        'Distillation loss',
        'distillation loss ({unit})',
        run_records.distill_curve,
        _draw_losses,
    ),
)
_STALENESS = tuple(
    Panel(
        f'In {unit}',
        f'staleness of the teachers ({unit})',
        f'exchange/staleness_{unit}',
        _draw_staleness,
    )
    for unit in ('steps', 'seconds')
)
_EXCHANGE = (
    Panel(
        'Time the exchange held the loop',
        'stall, all so far (s)',
        lambda g: run_records.finite(g.curve('exchange/stall_ms')).cumsum()
        / 1000,
        _draw_from_zero,
    ),
    Panel(
        'Peers present',
        'peers present',
        'exchange/peers_present',
        _draw_counts,
        constant='Every group was taught by {0:.0f} of its peers{1}.',
    ),
    Panel(
        'Rejected publications',
        'rejected, all so far',
        lambda g: run_records.counted(g, run_records.REJECTED),
        _draw_counts,
        zero=False,  # The caption says so; an empty panel says less.
    ),
    Panel(
        'Size of a publication',
        'size (MB)',
        lambda g: g.curve('exchange/publication_bytes') / 1e6,
        _draw_from_zero,
        constant='Every publication has {0:.3g} MB{1}.',
    ),
)
_SPEED = (
    Panel(
        '', 'speed of one group (steps/s)', 'perf/steps_per_sec', _draw_speed
    ),
)

# --- Validation loss ---------------------------------------------------------


def _draw_validation(arms: Sequence[RunRecords]) -> Plot | None:
  arms = [a for a in arms if len(run_records.validation_curve(a))]
  if not arms:
    return None
  figure, (whole, later) = plots.figure_of(2)
  for ax in (whole, later):
    ax.set_ylabel(f'validation loss ({_unit(arms)})')
    for arm in arms:
      _draw_validation_of(ax, arm)
  whole.set_title('Whole run')
  later.set_title('Later part, enlarged')
  _zoom_later(later, arms)
  baseline, target = run_records.find_target(arms)
  if baseline:
    _mark_target(later, arms, baseline, target)
  plots.legend_below(figure)
  name, title = 'validation_loss', 'Validation loss'
  said = {'later_part': _LATER_PART, 'baseline': baseline and baseline.name}
  return plots.save(figure, name, title, *_write(name, **said))


def _draw_validation_of(ax: Axes, arm: RunRecords) -> None:
  label = arm.name
  if len(arm.groups) > 1:
    label += f', mean of {len(arm.groups)} groups'
    for group in arm.groups:
      style = _style_of(arm, group) | {'label': None}
      if not _is_crowded(arm):
        style |= {'lw': 0.9, 'alpha': 0.65}
      plots.plot(ax, group.curve('eval/loss'), **style)
  mean = run_records.validation_curve(arm)
  marker = {'marker': 'o', 'ms': 3} if len(mean) <= 30 else {}
  plots.plot(ax, mean, color=arm.colour, label=label, lw=2.0, **marker)
  ensemble = arm.ensemble.get('eval/loss')
  if ensemble is not None:
    style = {'color': arm.colour, 'label': f'{arm.name}, ensemble', 'ls': ''}
    star = {'marker': '*', 'ms': 10, 'mec': 'white', 'mew': 0.7}
    ax.plot(
        mean.index[-1:], [ensemble], clip_on=False, zorder=5, **style, **star
    )


def _zoom_later(ax: Axes, arms: Sequence[RunRecords]) -> None:
  last = max(run_records.validation_curve(a).index[-1] for a in arms)
  values = [a.ensemble.get('eval/loss', np.nan) for a in arms]
  for arm in arms:
    for curve in arm.curves('eval/loss'):
      values += curve[curve.index >= _LATER_PART * last].tolist()
  plots.zoom(ax, filter(np.isfinite, values), below=0.06, above=0.06)
  if last > 0:
    ax.set_xlim(_LATER_PART * last, last * 1.015)


def _mark_target(
    ax: Axes, arms: Sequence[RunRecords], baseline: RunRecords, target: float
) -> None:
  """Draws the baseline's best loss, and where other arms come under it."""
  style = {'ls': plots.DOTTED, 'lw': 1.0, 'zorder': 1}
  label = f'best of {baseline.name}'
  ax.axhline(target, color=plots.GREY, label=label, **style)
  for arm in arms:
    step = run_records.first_at_or_under(
        run_records.validation_curve(arm), target
    )
    if arm is not baseline and step is not None:
      ax.plot([step, step], [0, target], color=arm.colour, **style)


# --- Staleness by peer -------------------------------------------------------


def _draw_by_peer(arm: RunRecords, index: int) -> Plot | None:
  """Draws a panel per group, a line per peer; None for one peer each."""
  found = {group.group_id: run_records.by_peer(group) for group in arm.groups}
  if max(map(len, found.values()), default=0) < 2:
    return None  # The mean over one peer says the same.
  figure, axes = plots.figure_of(
      len(found), columns=2 if len(found) <= 4 else 4
  )
  binning = _is_long(c for curves in found.values() for c in curves.values())
  peers = sorted({peer for curves in found.values() for peer in curves})
  # Of many one stands out; few have the dashes of their groups.
  few = {} if peers[len(plots.DASHES) :] else dict(zip(peers, plots.DASHES))
  low, high = 0.0, 1.0
  for ax, (group_id, curves) in zip(axes, found.items()):
    drawn = {p: plots.drawable(c, binning) for p, c in curves.items()}
    _draw_peers_of(ax, group_id, drawn, few, arm.colour)
    # Of an empty panel the limits are infinite, and change nothing.
    low, high = min(low, ax.dataLim.y0), max(high, ax.dataLim.y1)
  for ax in axes:  # One scale, so that panels can be compared.
    margin = 0.08 * (high - low)
    ax.set_ylim(low - margin * (low < 0), high + margin)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  _show_whole_run(axes, [arm])
  figure.supylabel('staleness (steps)', fontsize=9)
  plots.legend_below(figure)
  name, title = 'staleness_by_peer', f'Staleness by peer: {arm.name}'
  said = _write(name, arm=arm.name, few=few, binned=binning)
  return plots.save(
      figure, name + (f'_{index + 1}' * (index > 0)), title, *said
  )


def _draw_peers_of(
    ax: Axes,
    group_id: int,
    curves: Mapping[int, pd.Series],
    few: Mapping[int, object],
    colour: str,
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
    if few:
      style = {'color': colour, 'ls': few[peer], 'lw': 1.3}
      style['label'] = f'teacher: group {peer}'
    elif peer == oldest:
      label = 'the stalest peer on average'
      style = {'color': colour, 'label': label, 'lw': 1.5, 'zorder': 3}
    else:
      style = {'color': _PEER_COLOUR, 'label': 'the other peers', 'lw': 0.7}
    plots.plot(ax, curve, **style, **_marker(curve))


# --- Lines of groups ---------------------------------------------------------


def _is_crowded(arm: RunRecords) -> bool:
  """Returns whether an arm has more groups than there are line styles."""
  return len(arm.groups) > len(plots.DASHES)


def _style_of(arm: RunRecords, group: GroupRecords) -> dict:
  if _is_crowded(arm):
    style = {'label': f'{arm.name}, single groups', 'lw': 0.6, 'alpha': 0.35}
    return {'color': arm.colour, **style}
  place = [g.group_id for g in arm.groups].index(group.group_id)
  label = arm.name
  if len(arm.groups) > 1:
    label += f', group {group.group_id}'
  style = {'color': arm.colour, 'label': label}
  return {**style, 'ls': plots.DASHES[place], 'lw': 1.4}


def _draw_groups(
    ax: Axes, entries: Sequence[Entry], steps: bool = False
) -> None:
  """Draws a line per group, and of many a thick one of their median.

  Args:
    ax: Where to draw.
    entries: What to draw.
    steps: Whether a value holds until the next, as a count does.
  """
  drawstyle = 'steps-post' if steps else 'default'
  crowds: dict[tuple[str, str], list[pd.Series]] = {}
  for arm, group, curve in entries:
    style = _style_of(arm, group) | _marker(curve)
    plots.plot(ax, curve, drawstyle=drawstyle, **style)
    if _is_crowded(arm):
      label = f'{arm.name}, median of {len(arm.groups)} groups'
      crowds.setdefault((label, arm.colour), []).append(curve)
  for (label, colour), crowd in crowds.items():
    median = plots.median_curve(crowd)
    style = {'color': colour, 'label': label, 'lw': 2.0} | _marker(median)
    plots.plot(ax, median, drawstyle=drawstyle, **style)


def _marker(curve: pd.Series) -> dict:
  """Returns a marker for a curve of one point, which would be no line."""
  alone = np.isfinite(curve).sum() == 1
  return {'marker': 'o', 'ms': 3.5} if alone else {}


def _show_whole_run(axes: Sequence[Axes], arms: Sequence[RunRecords]) -> None:
  """Sets the same steps on all axes, also where a metric begins later."""
  last = max(group.last_step for arm in arms for group in arm.groups)
  last = max(last, 1)  # A run of step 0 only has a width all the same.
  for ax in axes:
    ax.set_xlim(-0.015 * last, 1.015 * last)
