"""The table of a report that tells what the time of each group went into."""

from collections.abc import Sequence

import numpy as np

from experiments.report_data import Arm, Group

TITLES = (
    'arm',
    'model',
    'steps/s',
    'examples/s',
    'model FLOPs per step',
    'model FLOP/s',
    'teacher share',
    'utilisation',
)
NOTES = (
    (
        'Rates are means over the time spent on the recorded steps, without'
        ' compilation and evaluation; the other numbers are those of the last'
        ' record.'
    ),
    (
        'Model FLOPs are two for each multiply-add of the matrix products and'
        ' convolutions of the whole group, of teachers too; the teacher share'
        ' is their part of them.'
    ),
    (
        "Utilisation is the part of what the group's devices could do of that"
        ' by their data sheet; it is not known of CPUs.'
    ),
)
_PREFIXES = ('', 'k', 'M', 'G', 'T', 'P', 'E')


def rows(arms: Sequence[Arm]) -> list[list[str]]:
  """One row for each group; none if no run has recorded its rates."""
  groups = [(arm, group) for arm in arms for group in arm.groups]
  if not any(g.curve('perf/examples_per_sec').steps.size for _, g in groups):
    return []
  return [
      [arm.name, f'group {group.group_id}', *_row(group)]
      for arm, group in groups
  ]


def _row(group: Group) -> list[str]:
  share = '{:.1%}'.format
  return [
      _text(mean_rate(group, 'perf/steps_per_sec'), '{:.3g}'.format),
      _text(mean_rate(group, 'perf/examples_per_sec'), '{:,.0f}'.format),
      _text(_last(group, 'perf/model_flops_per_step'), _flops),
      _text(mean_rate(group, 'perf/model_flops_per_sec'), _flops),
      _text(_last(group, 'perf/teacher_share'), share),
      _text(_last(group, 'perf/utilisation'), share),
  ]


def mean_rate(group: Group, key: str) -> float | None:
  """Mean of a metric per second over the time of the steps that have it."""
  speed, rate = group.curve('perf/steps_per_sec'), group.curve(key)
  taken = np.diff(speed.steps, prepend=0)
  good = np.isfinite(speed.values) & (speed.values > 0)
  good &= np.isin(speed.steps, rate.steps)
  seconds = taken[good] / speed.values[good]
  values = rate.values[np.isin(rate.steps, speed.steps[good])]
  good = np.isfinite(values)
  if not good.any():
    return None
  return float(np.average(values[good], weights=seconds[good]))


def _last(group: Group, key: str) -> float | None:
  values = group.curve(key).values
  return float(values[-1]) if values.size else None


def _text(value: float | None, form) -> str:
  return '-' if value is None else form(value)


def _flops(value: float) -> str:
  """Such as `1.23 T`."""
  for prefix in _PREFIXES[:-1]:
    # What would round up to 1000 takes the next prefix.
    if value < 999.5:
      return f'{value:.3g} {prefix}'.rstrip()
    value /= 1000
  return f'{value:.3g} {_PREFIXES[-1]}'
