"""The tables of a report: results by arm and group, and settings by arm."""

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from experiments import report_data, report_exchange
from experiments.report_data import Arm, Group
from experiments.report_exchange import Spread


class Column(NamedTuple):
  """A column's title on a page, and in two short lines on a terminal."""

  title: str
  top: str
  bottom: str


_FIRST = (
    Column('arm', '', 'arm'),
    Column('model', '', 'model'),
    Column('steps', '', 'steps'),
)
_QUALITY = {
    'eval/loss': (Column('validation loss', 'valid.', 'loss'), '{:.4f}'),
    'eval/perplexity': (Column('perplexity', 'perp-', 'lexity'), '{:.2f}'),
    'eval/accuracy': (Column('accuracy', 'accu-', 'racy'), '{:.2%}'),
    'eval/auc': (Column('AUC', '', 'AUC'), '{:.4f}'),
    'eval/calibration': (Column('calibration', 'cali-', 'bration'), '{:.3f}'),
}
_LAST = (
    Column('staleness, steps: mean / max', 'staleness', 'mean / max'),
    Column('stall, ms per exchange (share)', 'stall, ms per', 'exchange'),
    Column('disagreement', 'disagree-', 'ment'),
    Column('churn', '', 'churn'),
)


def columns(arms: Sequence[Arm]) -> list[Column]:
  """The columns of `table_rows`."""
  quality = [_QUALITY[key][0] for key in _quality_keys(arms)]
  return [*_FIRST, *quality, *_LAST]


def table_rows(arms: Sequence[Arm]) -> list[list[str]]:
  """The rows of the results, as text; '-' for what a run does not have."""
  keys = _quality_keys(arms)
  rows = []
  for arm in arms:
    rows.extend(_group_row(arm, group, keys) for group in arm.groups)
    if arm.ensemble or arm.pairs:
      rows.append(_ensemble_row(arm, keys))
  return rows


def _quality_keys(arms: Sequence[Arm]) -> list[str]:
  """What is shown of a model: of a sigmoid output AUC, not perplexity."""
  found = [
      _with_perplexity(report_data.final_metrics(arm, group), arm)
      for arm in arms
      for group in arm.groups
  ]
  has = lambda key: any(key in metrics for metrics in found)
  optional = {
      'eval/perplexity': has('eval/perplexity') or not has('eval/auc'),
      'eval/auc': has('eval/auc'),
      'eval/calibration': has('eval/calibration'),
  }
  return [key for key in _QUALITY if optional.get(key, True)]


def _group_row(arm: Arm, group: Group, keys: Sequence[str]) -> list[str]:
  return [
      arm.name,
      f'group {group.group_id}',
      str(group.last_step),
      *_quality(report_data.final_metrics(arm, group), arm, keys),
      _staleness(group),
      _stall(arm, group),
      '-',
      '-',
  ]


def _ensemble_row(arm: Arm, keys: Sequence[str]) -> list[str]:
  disagreement = report_data.pair_mean(arm, 'churn/disagreement')
  churn = report_data.pair_mean(arm, 'churn/mean_abs')
  return [
      arm.name,
      'ensemble',
      '-',
      *_quality(arm.ensemble, arm, keys),
      '-',
      '-',
      _number(disagreement, '{:.2%}'),
      _number(churn, '{:.2g}'),
  ]


def _quality(
    metrics: Mapping[str, Any], arm: Arm, keys: Sequence[str]
) -> list[str]:
  metrics = _with_perplexity(metrics, arm)
  return [_number(metrics.get(key), _QUALITY[key][1]) for key in keys]


def _with_perplexity(metrics: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
  """Works it out for tokens where it was not recorded."""
  found = dict(metrics)
  loss = found.get('eval/loss')
  if loss is not None and report_data.example_name([arm]) == 'token':
    found.setdefault('eval/perplexity', math.exp(min(loss, 700.0)))
  return found


def _staleness(group: Group) -> str:
  return _spread(report_exchange.staleness(group, 'steps'), '{:.0f}')


def _spread(found: Spread | None, most: str) -> str:
  return (
      '-' if found is None else f'{found.mean:.1f} / {most}'.format(found.most)
  )


def _stall(arm: Arm, group: Group) -> str:
  each, share = report_data.exchange_stall(arm, group)
  text = _number(each, '{:.1f}')
  return text if share is None else f'{text} ({share:.1%})'


def _number(value: float | None, form: str) -> str:
  if value is None:
    return '-'
  return form.format(value) if math.isfinite(value) else str(value)


# --- Exchange ----------------------------------------------------------------

HEALTH_TITLES = (
    'arm',
    'model',
    'exchanges',
    'staleness, steps: mean / max',
    'staleness, s: mean / max',
    'peers present: mean / max',
    'rejected',
    'failed to publish',
    'stall, s (share)',
    'publication',
    'restarts seen',
)


def health_rows(arms: Sequence[Arm]) -> list[list[str]]:
  """How the exchange of each group went; no rows if nothing was exchanged."""
  return [
      [arm.name, f'group {group.group_id}', *_health(arm, group)]
      for arm in report_exchange.exchanging(arms)
      for group in arm.groups
  ]


def _health(arm: Arm, group: Group) -> list[str]:
  found = report_exchange.health(arm, group)
  stall = _number(found.stall_seconds, '{:.2f}')
  if found.stall_share is not None:
    stall += f' ({found.stall_share:.1%})'
  return [
      _number(found.exchanges, '{:,}'),
      _spread(found.steps, '{:.0f}'),
      _spread(found.seconds, '{:.1f}'),
      _spread(found.present, '{:.0f}'),
      _number(found.rejected, '{:,}'),
      _number(found.failures, '{:,}'),
      stall,
      '-' if found.bytes is None else size(found.bytes),
      str(found.restarts) if found.restarts else '-',
  ]


def size(count: float) -> str:
  """A number of bytes in the decimal unit that suits it, such as `1.2 MB`."""
  for unit in ('bytes', 'kB', 'MB', 'GB'):
    # What would round up to 1000 takes the next unit.
    if count < 999.5:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'


# --- On a terminal -----------------------------------------------------------


def print_table(arms: Sequence[Arm], file: TextIO | None = None) -> None:
  """Prints the results as aligned text, no wider than some 110 columns.

  Args:
    arms: As `report_data.load_arms` gives them.
    file: Where to; standard output if None.
  """
  rows = [[_shorten(row[0], 18), *row[1:]] for row in table_rows(arms)]
  body = [
      # An arm is named once, in its first row.
      ['' if i and row[0] == rows[i - 1][0] else row[0], *row[1:]]
      for i, row in enumerate(rows)
  ]
  titles = columns(arms)
  header = [[c.top for c in titles], [c.bottom for c in titles]]
  widths = [max(map(len, cells)) for cells in zip(*header, *body)]
  for line in [*header, ['-' * w for w in widths], *body]:
    cells = [
        # Names to the left, numbers to the right.
        cell.ljust(w) if i < 2 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(line, widths))
    ]
    print('  '.join(cells).rstrip(), file=file)


def _shorten(text: str, width: int) -> str:
  return text if len(text) <= width else text[: width - 3] + '...'


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


def settings_rows(arms: Sequence[Arm]) -> list[list[str]]:
  """Settings, one a row: its name, then its value in every arm."""
  keys = dict(_SETTINGS)
  for arm in arms:
    keys |= {k: k for k in arm.run if k not in keys and _is_setting(arm, k)}
  rows = [
      [title, *(_setting(arm.run.get(key)) for arm in arms)]
      for key, title in keys.items()
  ]
  rows.append(['last record (UTC)', *(_last_record(arm) for arm in arms)])
  rows.append(['training, minutes', *(_minutes(arm) for arm in arms)])
  return [row for row in rows if set(row[1:]) != {'-'}]


def _is_setting(arm: Arm, key: str) -> bool:
  # Lists and trees are for programs; config.gin is shown in full anyway.
  return key not in _NO_SETTINGS and isinstance(arm.run[key], str | int | float)


def _setting(value: Any) -> str:
  if value is None:
    return '-'
  if isinstance(value, int) and abs(value) >= 10_000:
    return f'{value:,}'
  return str(value)


def _last_record(arm: Arm) -> str:
  times = [r['time'] for g in arm.groups for r in g.log.records if 'time' in r]
  if not times:
    return '-'
  moment = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
  return f'{moment:%Y-%m-%d %H:%M}'


def _minutes(arm: Arm) -> str:
  seconds = max(report_data.training_seconds(g) for g in arm.groups)
  return f'{seconds / 60:.1f}' if seconds else '-'
