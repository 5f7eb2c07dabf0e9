"""The plots of a report: losses and speed; with those of the exchange, all.

Drawn into PNG bytes without a display, see `report_style`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments import (
    report_curves,
    report_data,
    report_exchange_plots,
    report_style,
)
from experiments.report_data import Arm, Curve
from experiments.report_style import Entries, Plot, arm_colours, line

# The zoom on the later part of a run shows what follows this share of it.
_LATER_PART = 0.4


def make_plots(arms: Sequence[Arm]) -> list[Plot]:
  """All plots for which there are records, in the order of the report."""
  with report_style.look():
    plots = [
        _plot_validation(arms),
        _plot_training(arms),
        *report_exchange_plots.make_plots(arms),
        _plot_speed(arms),
    ]
  return [plot for plot in plots if plot is not None]


def _per_example(arms: Sequence[Arm]) -> str:
  return f'nats per {report_data.example_name(arms)}'


# --- Validation loss ---------------------------------------------------------


def _plot_validation(arms: Sequence[Arm]) -> Plot | None:
  arms = [a for a in arms if report_data.validation_curve(a)]
  if not arms:
    return None
  figure, (whole, later) = report_style.figure_of(2)
  for ax in (whole, later):
    ax.set_ylabel(f'validation loss ({_per_example(arms)})')
    for arm in arms:
      _draw_validation(ax, arm, arm_colours(arms)[arm.name])
  whole.set_title('Whole run')
  later.set_title('Later part, enlarged')
  _zoom_later(later, arms)
  handles, said = _mark_target(later, arms)
  report_style.legend_below(figure, _validation_legend(arms) + handles)
  caption = (
      'Validation loss against the step of each group. Thick lines are means'
      ' over the groups of an arm, thin lines single groups.'
      f' On the right the same curves from {_LATER_PART:.0%} of the steps on;'
      f' that axis does not start at zero.{said}'
  )
  png = report_style.save(figure)
  return Plot('validation_loss', 'Validation loss', caption, png)


def _draw_validation(ax: Axes, arm: Arm, colour: str) -> None:
  if len(arm.groups) > 1:
    for group in arm.groups:
      curve = group.curve('eval/loss')
      style = report_style.style_of(arm, group)
      if not report_style.is_crowded(arm):
        style |= {'lw': 0.9, 'alpha': 0.65}
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
    handles.append(line(colour, label, lw=2))
    if arm.ensemble.get('eval/loss') is not None:
      label = f'{arm.name}, ensemble'
      handles.append(line(colour, label, ls='', marker='*', ms=9))
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
  return [line('#555555', label, **style)], said


# --- Training losses ---------------------------------------------------------


def _plot_training(arms: Sequence[Arm]) -> Plot | None:
  panels = [
      ('Task loss', 'task loss', report_style.curves_of(arms, 'loss/task')),
      ('Distillation loss', 'distillation loss', _distillation(arms)),
  ]
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return None
  figure, axes = report_style.figure_of(len(panels))
  for ax, (title, label, entries) in zip(axes, panels):
    ax.set_title(title)
    ax.set_ylabel(f'{label} ({_per_example(arms)})')
    _zoom_losses(ax, _draw_smoothed(ax, arms, entries))
  _mark_burn_in(axes, arms)
  report_style.whole_run(axes, arms)
  drawn = [a for a in arms if report_style.of_arm(panels[0][2], a)]
  report_style.legend(figure, drawn)
  caption = (
      'Losses on the training batches:'
      f' {_smoothed([e for _, _, entries in panels for e in entries])}'
      ' High values of the first steps lie above the frame.'
      + report_style.crowded_note(arms)
  )
  if len(panels) > 1:
    caption += (
        ' The distillation loss is drawn where its weight is above 0. A dotted'
        ' vertical is the end of burn-in.'
    )
  png = report_style.save(figure)
  return Plot('training_loss', 'Training losses', caption, png)


def _distillation(arms: Sequence[Arm]) -> Entries:
  return report_style.recorded(
      [(a, g, report_curves.distill_curve(g)) for a in arms for g in a.groups]
  )


def _draw_smoothed(
    ax: Axes, arms: Sequence[Arm], entries: Entries
) -> list[Curve]:
  """Draws running means; of up to four groups the records too, faint."""
  smooth = [(arm, group, _smooth(curve)) for arm, group, curve in entries]
  report_style.draw_groups(ax, arms, smooth)
  colours = arm_colours(arms)
  for arm, _, curve in entries:
    if not report_style.is_crowded(arm):
      style = {'color': colours[arm.name], 'lw': 0.6, 'alpha': 0.18}
      ax.plot(curve.steps, curve.values, zorder=1, **style)
  return [curve for _, _, curve in smooth]


def _smooth(curve: Curve) -> Curve:
  window = report_curves.smoothing_window(curve)
  return report_curves.running_mean(curve, window)


def _smoothed(entries: Entries) -> str:
  """How `_draw_smoothed` has treated these curves, for a caption."""
  windows = [report_curves.window_in_steps(curve) for _, _, curve in entries]
  low, high = min(windows), max(windows)
  steps = f'{low:,}' if low == high else f'{low:,} to {high:,}'
  many = all(report_style.is_crowded(arm) for arm, _, _ in entries)
  records = '' if many else 'records faint, and their '
  return f'{records}centred running mean over {steps} steps.'


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
    if burn_in and _distillation([arm]):
      for ax in axes:
        ax.axvline(burn_in, color=colours[arm.name], lw=0.9, ls=(0, (1, 2)))


# --- Speed -------------------------------------------------------------------


def _plot_speed(arms: Sequence[Arm]) -> Plot | None:
  entries = report_style.curves_of(arms, 'perf/steps_per_sec')
  if not entries:
    return None
  arms = [a for a in arms if report_style.of_arm(entries, a)]
  figure, (ax,) = report_style.figure_of(1)
  ax.set_ylabel('speed of one group (steps/s)')
  smooth = _draw_smoothed(ax, arms, entries)
  ax.set_ylim(0, 1.15 * max(float(np.nanmax(c.values)) for c in smooth))
  report_style.whole_run([ax], arms)
  report_style.legend(figure, arms)
  caption = (
      f'Updates per second of each group: {_smoothed(entries)} Groups that'
      ' share a machine share its speed.' + report_style.crowded_note(arms)
  )
  return Plot('speed', 'Speed', caption, report_style.save(figure))
