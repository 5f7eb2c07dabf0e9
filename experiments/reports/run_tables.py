"""The tables of a run report: results, speed, exchange and settings.

Cells are text; '-' stands for what a run does not tell. Old runs lack most of
what is asked for here.
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.reports import pages, records
from experiments.reports.pages import number
from experiments.reports.records import Arm, Group

# --- Results -----------------------------------------------------------------

# Title and format of what is shown of a model.
_QUALITY = {
    'eval/loss': ('validation loss', '.4f'),
    'eval/perplexity': ('perplexity', '.2f'),
    'eval/accuracy': ('accuracy', '.2%'),
    'eval/auc': ('AUC', '.4f'),
    'eval/calibration': ('calibration', '.3f'),
}
_STALENESS = 'staleness, steps: mean / max'
_STALL = 'stall, ms per exchange (share)'
# For a terminal of some 110 columns.
_SHORT = {
    'validation loss': 'valid.\nloss',
    'perplexity': 'perp-\nlexity',
    'accuracy': 'accu-\nracy',
    'calibration': 'cali-\nbration',
    _STALENESS: 'staleness\nmean / max',
    _STALL: 'stall, ms per\nexchange',
    'disagreement': 'disagree-\nment',
}


def results(arms: Sequence[Arm]) -> pd.DataFrame:
  """Returns a row per group, and one per ensemble."""
  keys = _quality_keys(arms)
  rows = []
  for arm in arms:
    for group in arm.groups:
      rows.append(
          {
              'arm': arm.name,
              'model': f'group {group.group_id}',
              'steps': str(group.last_step),
              **_quality(final_metrics(arm, group), keys),
              _STALENESS: _mean_and_most(staleness(group, 'steps'), '.0f'),
              _STALL: _stall_per_exchange(arm, group),
          }
      )
    if arm.ensemble or arm.pairs:
      disagreement = pair_mean(arm, 'churn/disagreement')
      churn = pair_mean(arm, 'churn/mean_abs')
      rows.append(
          {
              'arm': arm.name,
              'model': 'ensemble',
              **_quality(_with_perplexity(arm.ensemble, arm), keys),
              'disagreement': number(disagreement, '.2%'),
              'churn': number(churn, '.2g'),
          }
      )
  titles = [_QUALITY[key][0] for key in keys]
  last = (_STALENESS, _STALL, 'disagreement', 'churn')
  columns = ['arm', 'model', 'steps', *titles, *last]
  return pd.DataFrame(rows, columns=columns, dtype=object).fillna('-')


def results_text(arms: Sequence[Arm]) -> str:
  """Returns the results for a terminal, some 110 columns wide at most."""
  frame = results(arms)
  frame['arm'] = [
      name if len(name) <= 18 else name[:15] + '...' for name in frame['arm']
  ]
  # An arm is named once, in its first row.
  frame['arm'] = frame['arm'].mask(frame['arm'] == frame['arm'].shift(), '')
  header = [_SHORT.get(title, title) for title in frame.columns]
  return pages.to_text(header, frame.to_numpy(), names=2)


def final_metrics(arm: Arm, group: Group) -> Mapping[str, Any]:
  """Returns the final evaluation of a model, else its last in training."""
  found = arm.models.get(group.group_id)
  if found is None:
    curves = {key: group.curve(key) for key in _QUALITY}
    found = {k: float(c.iloc[-1]) for k, c in curves.items() if len(c)}
  return _with_perplexity(found, arm)


def _with_perplexity(metrics: Mapping[str, Any], arm: Arm) -> Mapping[str, Any]:
  """Works it out for tokens where it was not recorded."""
  loss = metrics.get('eval/loss')
  if loss is None or records.example_name([arm]) != 'token':
    return metrics
  return {'eval/perplexity': math.exp(min(loss, 700.0)), **metrics}


def _quality_keys(arms: Sequence[Arm]) -> list[str]:
  """Returns what is shown of a model: of a sigmoid output no perplexity."""
  found = {k for a in arms for g in a.groups for k in final_metrics(a, g)}
  optional = {'eval/perplexity', 'eval/auc', 'eval/calibration'}
  if 'eval/auc' not in found:
    found.add('eval/perplexity')
  return [key for key in _QUALITY if key in found or key not in optional]


def _quality(metrics: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
  return {
      title: number(metrics.get(key), form)
      for key, (title, form) in _QUALITY.items()
      if key in keys
  }


def pair_mean(arm: Arm, key: str) -> float | None:
  """Returns the mean over the pairs of models of an arm, if there are any."""
  values = [p[key] for p in arm.pairs if key in p]
  return float(np.mean(values)) if values else None


# --- Speed -------------------------------------------------------------------


def speed(arms: Sequence[Arm]) -> pd.DataFrame | None:
  """Returns a row per group; None if no run has recorded its rates."""
  if not any(len(c) for a in arms for c in a.curves('perf/examples_per_sec')):
    return None
  rows = []
  for arm in arms:
    for group in arm.groups:
      rate = lambda key, of=group: records.mean_rate(of, f'perf/{key}')
      last = lambda key, of=group: _last(of.curve(f'perf/{key}'))
      rows.append(
          {
              'arm': arm.name,
              'model': f'group {group.group_id}',
              'steps/s': number(rate('steps_per_sec'), '.3g'),
              'examples/s': number(rate('examples_per_sec'), ',.0f'),
              'model FLOPs per step': number(
                  last('model_flops_per_step'), 'SI'
              ),
              'model FLOP/s': number(rate('model_flops_per_sec'), 'SI'),
              'teacher share': number(last('teacher_share'), '.1%'),
              'utilisation': number(last('utilisation'), '.1%'),
          }
      )
  return pd.DataFrame(rows)


def _last(curve: pd.Series) -> float | None:
  return float(curve.iloc[-1]) if len(curve) else None


# --- Exchange ----------------------------------------------------------------


def health(arms: Sequence[Arm]) -> pd.DataFrame | None:
  """Returns how the exchange of each group went; None if there was none."""
  rows = [
      {
          'arm': arm.name,
          'model': f'group {group.group_id}',
          'exchanges': number(_exchanges(arm, group.last_step), ','),
          _STALENESS: _mean_and_most(staleness(group, 'steps'), '.0f'),
          'staleness, s: mean / max': _mean_and_most(
              staleness(group, 'seconds'), '.1f'
          ),
          'peers present: mean / max': _mean_and_most(
              _present(arm, group), '.0f'
          ),
          'rejected': _count(group, records.REJECTED),
          'failed to publish': _count(group, records.FAILURES),
          'stall, s (share)': _stall_in_all(group),
          'publication': number(
              _last(records.finite(group.curve('exchange/publication_bytes'))),
              'bytes',
          ),
          'restarts seen': str(group.restarts or '-'),
      }
      for arm in records.exchanging(arms)
      for group in arm.groups
  ]
  return pd.DataFrame(rows) if rows else None


def staleness(group: Group, unit: str) -> tuple[float, float] | None:
  """Returns mean and largest, over all records and all teachers."""
  key = f'exchange/staleness_{unit}'
  mean = records.finite(group.curve(key))
  if mean.empty:
    return None
  # The largest of any single teacher; in old runs only the means are known.
  single = records.by_peer(group, unit).values()
  most = pd.concat([mean, group.curve(f'{key}_max'), *single])
  return float(mean.mean()), float(records.finite(most).max())


def _present(arm: Arm, group: Group) -> tuple[float, float] | None:
  curve = records.finite(group.curve('exchange/peers_present'))
  # In burn-in nobody is asked for.
  curve = curve[curve.index > (arm.run.get('burn_in_steps') or 0)]
  return None if curve.empty else (float(curve.mean()), float(curve.max()))


def _mean_and_most(found: tuple[float, float] | None, form: str) -> str:
  return '-' if found is None else f'{found[0]:.1f} / {found[1]:{form}}'


def _exchanges(arm: Arm, steps: int) -> int | None:
  """Returns how many exchanges were due by a step."""
  every = arm.run.get('exchange_every')
  return steps // every if every else None


def _count(group: Group, key: str) -> str:
  count = _last(records.counted(group, key))
  return number(count, ',.0f')


def _stall_per_exchange(arm: Arm, group: Group) -> str:
  stall = group.curve('exchange/stall_ms')
  # With nothing to exchange a recorded 0 would say too much.
  if arm.run.get('num_groups', len(arm.groups)) < 2 or stall.empty:
    return '-'
  exchanges = _exchanges(arm, int(stall.index[-1]))
  each = float(stall.sum()) / exchanges if exchanges else None
  return number(each, '.1f') + _share(stall, group)


def _stall_in_all(group: Group) -> str:
  stall = records.finite(group.curve('exchange/stall_ms'))
  if stall.empty:
    return '-'
  return number(float(stall.sum()) / 1000.0, '.2f') + _share(stall, group)


def _share(stall_ms: pd.Series, group: Group) -> str:
  seconds = records.training_seconds(group)
  share = float(stall_ms.sum()) / 1000.0 / seconds if seconds else None
  return '' if share is None else f' ({share:.1%})'


# --- Settings ----------------------------------------------------------------

_SETTINGS = {
    'data': 'data set',
    'num_groups': 'groups (G)',
    'replicas': 'replicas per group (R)',
    'simulated_replicas': 'simulated replicas per device',
    'group_batch': 'group batch',
    'num_steps': 'steps',
    'burn_in_steps': 'burn-in, steps',
    'exchange_every': 'steps between exchanges',
    'mode': 'exchange mode',
    'prior_steps': 'steps of the teachers before',
    'seed': 'seed',
    'model_parameters': 'model parameters',
}
_NO_SETTINGS = ('arm', 'command', 'example')


def settings(arms: Sequence[Arm]) -> pd.DataFrame:
  """Returns settings, one a row: its name, then its value in every arm."""
  known = dict.fromkeys(_SETTINGS)
  others = {
      key: None
      for arm in arms
      for key, value in arm.run.items()
      # Lists and trees are for programs; config.gin is shown in full anyway.
      if key not in _NO_SETTINGS and isinstance(value, str | int | float)
  }
  rows = {
      _SETTINGS.get(key, key): [_setting(arm.run.get(key)) for arm in arms]
      for key in known | others
  }
  rows['last record (UTC)'] = [_last_record(arm) for arm in arms]
  rows['training, minutes'] = [_minutes(arm) for arm in arms]
  return pd.DataFrame(
      [[title, *row] for title, row in rows.items() if set(row) != {'-'}],
      columns=['', *(arm.name for arm in arms)],
  )


def _setting(value: Any) -> str:
  if value is None:
    return '-'
  if isinstance(value, int) and abs(value) >= 10_000:
    return f'{value:,}'
  return str(value)


def _last_record(arm: Arm) -> str:
  times = [time.max() for time in arm.curves('time') if len(time)]
  if not times:
    return '-'
  moment = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
  return f'{moment:%Y-%m-%d %H:%M}'


def _minutes(arm: Arm) -> str:
  seconds = max(map(records.training_seconds, arm.groups))
  return f'{seconds / 60:.1f}' if seconds else '-'
