"""The curves of a study: loss against steps and against compute.

Drawn into PNG bytes without a display, see `report_style`; the only module of
the studies, with `axis_plot`, `bytes_view` and `latency_plot`, that imports
matplotlib.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from experiments import report_style
from experiments.report_style import Plot
from experiments.studies import analysis, curves
from experiments.studies.analysis import Analysis
from experiments.studies.declaration import Arm, Study
from experiments.studies.results import Setting

TARGET_STYLE = {'color': '#555555', 'ls': (0, (2, 2)), 'lw': 1.0}
_DASHES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))
_COLOURS = 7  # Of `report_style`, before they come again.
# Curves are shown from about this share of a run on.
_SHOWN_FROM = 0.35
# Arms that do not stand on the axis of a study, where others do.
_APART = ('#D55E00', '#CC79A7', '#000000', '#E69F00')
# An arm that ends so many times higher above the best is not in the frame.
_FAR = 3.0
_MARKED = 30  # Evaluations up to which each has a marker.


def make_plots(found: Analysis, setting: Setting) -> list[Plot]:
  """Validation loss, and for 'speed-accuracy' validation accuracy."""
  if not any(analysis.band(found, a.name, 'steps') for a in found.study.arms):
    return []
  with report_style.look():
    plots = [_loss(found, setting)]
    if 'speed-accuracy' in found.study.views and _has_accuracy(found):
      plots.append(_accuracy(found))
  return plots


def _has_accuracy(found: Analysis) -> bool:
  return any(len(r.accuracy_N) for runs in found.runs.values() for r in runs)


def _loss(found: Analysis, setting: Setting) -> Plot:
  label = f'validation loss (nats per {setting.example})'
  png = _two_axes(found, 'loss', label, target=True)
  smoothed = (
      f'trailing means over {found.window} evaluations, as the rule sees them'
      if found.window > 1
      else 'not smoothed'
  )
  caption = (
      'Left at equal steps of each group, right at equal compute: FLOPs of all'
      ' groups, with those of teachers before and during training. Lines are'
      f' means over seeds, bands their range; {smoothed}. The dotted level is'
      ' the target, its mean over seeds. A cross at the top marks the step at'
      ' which a run diverged. The axis of losses does not start at zero, and'
      ' the start of the runs lies above the frame, as do arms that end far'
      ' above the others.'
  )
  runs = [run for runs in found.runs.values() for run in runs]
  if any(run.prior_steps for run in runs):
    caption += ' Steps of teachers that were trained before are not drawn left.'
  return Plot('loss', 'Validation loss', caption, png)


def _accuracy(found: Analysis) -> Plot:
  png = _two_axes(found, 'accuracy', 'validation accuracy', target=False)
  caption = (
      'The same runs by validation accuracy, left at equal steps of each group,'
      ' right at equal compute. Lines are means over seeds, bands their range,'
      ' smoothed as the losses are.'
  )
  return Plot('accuracy', 'Validation accuracy', caption, png)


def _two_axes(found: Analysis, y: str, label: str, target: bool) -> bytes:
  figure, (left, right) = report_style.figure_of(2)
  styles = styles_of(found.study)
  shade = 0.15 if len(found.study.arms) <= _COLOURS else 0.08
  for ax, x in ((left, 'steps'), (right, 'flops')):
    for arm in found.study.arms:
      band = analysis.band(found, arm.name, x, y)
      draw_band(ax, band, styles[arm.name], shade)
    zoom(ax, found, y)
  left.set_title('Equal steps')
  left.set_xlabel('steps of each group')
  left.set_ylabel(label)
  right.set_title('Equal compute')
  flops_axis(right)
  _mark_divergence(left, found, styles)
  extra = draw_target((left, right), found) if target else []
  report_style.legend_below(figure, [*handles(found, styles), *extra])
  return report_style.save(figure)


def flops_axis(ax: Axes) -> None:
  """Names a horizontal axis of compute."""
  ax.set_xlabel('FLOPs of all groups and teachers')
  ax.xaxis.set_major_formatter(EngFormatter(sep=' '))


# --- Styles ------------------------------------------------------------------


def styles_of(study: Study) -> dict[str, dict]:
  """Colour and dashes of every arm.

  Where many arms stand on an axis, colour is the place on it, from dark to
  light, and dashes are the series; else arms have the colours of all reports.
  """
  on_axis = [arm for arm in study.arms if arm.x is not None]
  if study.x_label and len(on_axis) > _COLOURS:
    return _by_place(study, on_axis)
  colours = report_style.arm_colours(study.arms)
  return {
      arm.name: {
          'color': colours[arm.name],
          'ls': _DASHES[i // _COLOURS % len(_DASHES)],
      }
      for i, arm in enumerate(study.arms)
  }


def _by_place(study: Study, on_axis: Sequence[Arm]) -> dict[str, dict]:
  places = sorted({arm.x for arm in on_axis})
  series = list(dict.fromkeys(arm.series for arm in on_axis))
  shades = matplotlib.colormaps['viridis'](np.linspace(0, 0.88, len(places)))
  others = [arm for arm in study.arms if arm.x is None]
  styles = {
      arm.name: {'color': _APART[i % len(_APART)], 'ls': _DASHES[2]}
      for i, arm in enumerate(others)
  }
  for arm in on_axis:
    styles[arm.name] = {
        'color': matplotlib.colors.to_hex(shades[places.index(arm.x)]),
        'ls': _DASHES[series.index(arm.series) % len(_DASHES)],
    }
  return styles


def handles(found: Analysis, styles: dict[str, dict]) -> list[Line2D]:
  """Entries of a legend: arms that were trained."""
  return [
      Line2D([], [], label=arm.title, lw=1.8, **styles[arm.name])
      for arm in found.study.arms
      if found.runs[arm.name]
  ]


# --- Drawing -----------------------------------------------------------------


def draw_band(
    ax: Axes, band: analysis.Band | None, style: dict, shade: float = 0.15
) -> None:
  """A line of means with the range around it; nothing for None."""
  if band is None:
    return
  few = len(band.x_N) <= _MARKED
  marker = {'marker': 'o', 'ms': 2.5} if few else {}
  ax.plot(band.x_N, band.mean_N, lw=1.6, **marker, **style)
  ax.fill_between(
      band.x_N, band.low_N, band.high_N, color=style['color'], alpha=shade, lw=0
  )


def draw_target(axes: Sequence[Axes], found: Analysis) -> list[Line2D]:
  """The level of the target, and its entry in the legend."""
  if not found.targets:
    return []
  level = float(np.mean(list(found.targets.values())))
  for ax in axes:
    ax.axhline(level, zorder=1, **TARGET_STYLE)
  return [Line2D([], [], label='target', **TARGET_STYLE)]


def zoom(ax: Axes, found: Analysis, y: str) -> None:
  """Vertical limits that leave out the start of the runs.

  Half of the arms are in sight from `_SHOWN_FROM` on, and the ends of all but
  those that end far above: one slow arm must not press the others together.
  """
  bands = [analysis.band(found, a.name, 'steps', y) for a in found.study.arms]
  bands = [band for band in bands if band is not None]
  if not bands:
    return
  starts = []
  for band in bands:
    late = np.flatnonzero(band.x_N >= _SHOWN_FROM * band.x_N[-1])
    starts.append(band.mean_N[late[0]])
  ends = [end for b in bands for end in (b.low_N[-1], b.high_N[-1])]
  middle = float(np.median(starts))
  shown = [middle, *ends]
  if y == 'loss':
    shown += found.targets.values()
    far = min(shown) + _FAR * (middle - min(shown))
    shown = [value for value in shown if value <= max(far, middle)]
  if max(shown) > min(shown):
    margin = 0.06 * (max(shown) - min(shown))
    ax.set_ylim(min(shown) - margin, max(shown) + margin)


def _mark_divergence(ax: Axes, found: Analysis, styles: dict) -> None:
  for name, runs in found.runs.items():
    for run in runs:
      step = curves.diverged_at(run)
      if step is not None:
        ax.plot(
            [step],
            [0.97],
            'x',
            ms=6,
            mew=1.6,
            color=styles[name]['color'],
            transform=ax.get_xaxis_transform(),
        )
