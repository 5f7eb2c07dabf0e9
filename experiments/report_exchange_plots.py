"""The plots of the exchange: staleness, stall, peers, rejections, sizes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments import report_curves, report_exchange, report_style
from experiments.report_curves import MAX_POINTS
from experiments.report_data import Arm, Curve, Group
from experiments.report_style import Entries, Plot, arm_colours, line

# Peers have a colour each while they are few; of many one stands out.
_PEER_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00')
_OLDEST_COLOUR = '#D55E00'
_PEER_COLOUR = '#8A8A8A'
# Bands of more groups than this would lie on each other as a fog.
_MOST_BANDS = 2


def make_plots(arms: Sequence[Arm]) -> list[Plot]:
  """The plots for which there are records, in the order of the report."""
  arms = report_exchange.exchanging(arms)
  by_peer = [_plot_by_peer(arm, i) for i, arm in enumerate(arms)]
  plots = [_plot_staleness(arms), *by_peer, _plot_exchange(arms)]
  return [plot for plot in plots if plot is not None]


# --- Staleness ---------------------------------------------------------------


def _plot_staleness(arms: Sequence[Arm]) -> Plot | None:
  panels = {
      unit: report_style.curves_of(arms, f'exchange/staleness_{unit}')
      for unit in ('steps', 'seconds')
  }
  panels = {unit: entries for unit, entries in panels.items() if entries}
  if not panels:
    return None
  everything = [entry for entries in panels.values() for entry in entries]
  arms = [arm for arm in arms if report_style.of_arm(everything, arm)]
  # All lines of a figure alike: a mean beside single records misleads.
  binning = _is_long(everything)
  figure, axes = report_style.figure_of(len(panels))
  for ax, (unit, entries) in zip(axes, panels.items()):
    ax.set_title(f'In {unit}')
    ax.set_ylabel(f'staleness of the teachers ({unit})')
    drawn = [
        (arm, group, report_curves.drawable(curve, binning))
        for arm, group, curve in entries
    ]
    report_style.draw_groups(ax, arms, drawn)
    if binning:
      _draw_ranges(ax, arms, entries, f'exchange/staleness_{unit}_max')
    _start_at_zero(ax)
  report_style.whole_run(axes, arms)
  report_style.legend(figure, arms)
  caption = (
      'How old the teachers are when a group uses them: own step minus the step'
      ' they were published at (below 0 where a peer is ahead), and the time'
      ' since then; mean over the peers that are present.'
      + report_style.crowded_note(arms)
  )
  if binning:
    caption += ' Lines are means over short stretches of steps'
    if any(len(arm.groups) <= _MOST_BANDS for arm in arms):
      caption += ', bands run from the smallest to the largest value in them'
    caption += '.'
  png = report_style.save(figure)
  return Plot('staleness', 'Staleness', caption, png)


def _is_long(entries: Entries) -> bool:
  return any(len(curve.steps) > MAX_POINTS for _, _, curve in entries)


def _draw_ranges(
    ax: Axes, arms: Sequence[Arm], entries: Entries, most_key: str
) -> None:
  """Bands from the smallest to the largest value, for arms of few groups."""
  for arm, group, curve in entries:
    if len(arm.groups) > _MOST_BANDS:
      continue
    mean = report_curves.finite(curve)
    most = report_curves.finite(group.curve(most_key))
    if not np.array_equal(most.steps, mean.steps):
      most = mean
    steps, _, low, high = report_curves.binned(mean, most, report_curves.BINS)
    colour = arm_colours(arms)[arm.name]
    ax.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)


def _start_at_zero(ax: Axes) -> None:
  if ax.dataLim.y0 >= 0:
    ax.set_ylim(0, max(1.08 * ax.dataLim.y1, 1e-3))
  else:  # A faster peer has published a step that this group has yet to do.
    ax.axhline(0, color='0.4', lw=0.8)


# --- Staleness by peer -------------------------------------------------------


def _plot_by_peer(arm: Arm, index: int) -> Plot | None:
  """A panel per group with a line per peer; None if there is one peer each."""
  curves = [(g, report_exchange.by_peer(g)) for g in arm.groups]
  if max((len(found) for _, found in curves), default=0) < 2:
    return None  # The mean over one peer says the same.
  figure, axes = report_style.figure_of(
      len(curves), columns=2 if len(curves) <= 4 else 4
  )
  binning = any(
      len(c.steps) > MAX_POINTS for _, fs in curves for c in fs.values()
  )
  few = _peer_colours(curves)
  low, high = 0.0, 1.0
  for ax, (group, found) in zip(axes, curves):
    drawn = {p: report_curves.drawable(c, binning) for p, c in found.items()}
    _draw_peers_of(ax, group, drawn, few)
    # Of an empty panel the limits are infinite, and change nothing.
    low, high = min(low, ax.dataLim.y0), max(high, ax.dataLim.y1)
  for ax in axes:  # One scale, so that panels can be compared.
    margin = 0.08 * (high - low)
    ax.set_ylim(low - margin * (low < 0), high + margin)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  report_style.whole_run(axes, [arm])
  figure.supylabel('staleness (steps)', fontsize=9)
  report_style.legend_below(figure, _peer_legend(few))
  caption = (
      f'How old the publication of each peer is when a group of {arm.name} uses'
      ' it, in steps. A line is broken where the peer was not present.'
  )
  if not few:
    caption += ' Each panel names the peer that is stalest on average.'
  if binning:
    caption += ' Lines are means over short stretches of steps.'
  suffix = f'_{index + 1}' if index else ''
  title = f'Staleness by peer: {arm.name}'
  png = report_style.save(figure)
  return Plot(f'staleness_by_peer{suffix}', title, caption, png)


def _peer_colours(
    curves: Sequence[tuple[Group, dict[int, Curve]]],
) -> dict[int, str]:
  """A colour for each peer; none if they are too many to be told apart."""
  peers = sorted({peer for _, found in curves for peer in found})
  if len(peers) > len(_PEER_COLOURS):
    return {}
  return dict(zip(peers, _PEER_COLOURS))


def _peer_legend(few: dict[int, str]) -> list[Line2D]:
  if few:
    return [line(c, f'teacher: group {p}', lw=1.4) for p, c in few.items()]
  return [
      line(_OLDEST_COLOUR, 'the stalest peer on average', lw=1.6),
      line(_PEER_COLOUR, 'the other peers', lw=0.8),
  ]


def _draw_peers_of(
    ax: Axes, group: Group, curves: dict[int, Curve], few: dict[int, str]
) -> None:
  """One panel; of many peers the stalest is in colour and named."""
  title = f'group {group.group_id}'
  oldest = None
  if not curves:
    title += ': no teachers'
  elif not few:
    oldest = max(curves, key=lambda p: float(np.nanmean(curves[p].values)))
    title += f', stalest: {oldest}'
  ax.set_title(title)
  for peer, curve in curves.items():
    style = {'color': _PEER_COLOUR, 'lw': 0.7, 'alpha': 0.8, 'zorder': 2}
    if few:
      style = {'color': few[peer], 'lw': 1.3}
    elif peer == oldest:
      style = {'color': _OLDEST_COLOUR, 'lw': 1.5, 'zorder': 3}
    ax.plot(curve.steps, curve.values, **style, **report_style.lonely(curve))


# --- Stall, peers, rejections, sizes -----------------------------------------


Get = Callable[[Group], Curve]


class _Panel(NamedTuple):
  """One panel: where its values come from, and what a caption says of it."""

  title: str
  label: str
  caption: str
  get: Get
  is_count: bool  # Drawn in steps, over whole numbers.


def _plot_exchange(arms: Sequence[Arm]) -> Plot | None:
  found = {panel: _entries(arms, panel.get) for panel in _PANELS}
  none_rejected = _is_nothing(found[_REJECTED])
  if none_rejected:
    del found[_REJECTED]  # The caption says so; an empty panel says less.
  found = {panel: entries for panel, entries in found.items() if entries}
  if not found:
    return None
  figure, axes = report_style.figure_of(len(found))
  for ax, (panel, entries) in zip(axes, found.items()):
    ax.set_title(panel.title)
    ax.set_ylabel(panel.label)
    report_style.draw_groups(ax, arms, entries, steps=panel.is_count)
    _from_zero(ax, whole=panel.is_count)
  report_style.whole_run(axes, arms)
  report_style.legend(figure, arms)
  caption = ' '.join(panel.caption for panel in found)
  if none_rejected:
    caption += ' No publication was rejected.'
  caption += report_style.crowded_note(arms)
  return Plot('exchange', 'Exchange', caption, report_style.save(figure))


def _entries(arms: Sequence[Arm], get: Get) -> Entries:
  return report_style.recorded([(a, g, get(g)) for a in arms for g in a.groups])


def _stall(group: Group) -> Curve:
  curve = report_curves.finite(group.curve('exchange/stall_ms'))
  return Curve(curve.steps, np.cumsum(curve.values) / 1000.0)


def _megabytes(group: Group) -> Curve:
  curve = group.curve('exchange/publication_bytes')
  return Curve(curve.steps, curve.values / 1e6)


_REJECTED = _Panel(
    'Rejected publications',
    'rejected, all so far',
    'Rejected: publications of peers that were damaged or did not fit, and were'
    ' not used; added up over restarts.',
    lambda group: report_exchange.counted(group, report_exchange.REJECTED),
    is_count=True,
)
_PANELS = (
    _Panel(
        'Time the exchange held the loop',
        'stall, all so far (s)',
        'Stall: the time for which publishing and fetching held the training'
        ' loop, added up from the first step.',
        _stall,
        is_count=False,
    ),
    _Panel(
        'Peers present',
        'peers present',
        'Peers present: how many taught the group.',
        lambda group: group.curve('exchange/peers_present'),
        is_count=True,
    ),
    _REJECTED,
    _Panel(
        'Size of a publication',
        'size (MB)',
        'Size: bytes of one publication, in millions.',
        _megabytes,
        is_count=False,
    ),
)


def _is_nothing(entries: Entries) -> bool:
  """Whether something was counted, and it was nothing."""
  return bool(entries) and not any(c.values.any() for _, _, c in entries)


def _from_zero(ax: Axes, whole: bool) -> None:
  top = float(ax.dataLim.y1)
  top = top if np.isfinite(top) and top > 0 else 1.0
  # A line at 0 must not lie under the axis.
  ax.set_ylim(-0.04 * top, 1.12 * top)
  if whole:
    report_style.whole_numbers(ax)
