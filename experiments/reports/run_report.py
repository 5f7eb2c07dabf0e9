"""The report of runs: what stands on its page, in order; its words and numbers.

What it says stands in `run_report.jinja`, made from the numbers alone.
"""

import datetime
import math
import os
import pathlib
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files

from .. import cli
from . import pages, run_plots, run_records
from .pages import Block, Bullets, Code, Heading, Table, number
from .run_records import GroupRecords, RunRecords

_write = pages.prose(__file__)
_SAMPLES, _CHARACTERS = 3, 600  # Shown of each run, and of each sample.


def write(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
) -> epath.Path:
  """Writes plots and pages.

  Args:
    arms: As `run_records.load_arms` gives them.
    output: Where to; report/ in the first arm's run directory if None.

  Returns:
    The path of report.html.
  """
  directory = output or run_directory.report_dir(arms[0].workdir)
  title = 'Run report: ' + ', '.join(arm.name for arm in arms)
  return pages.write(directory, 'report', title, blocks(arms, output))


def blocks(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
) -> list[Block]:
  """Returns what stands in a report, in order."""
  headline, *beside = summary(arms)
  made: list[Block] = [
      pages.Paragraph(headline),
      Bullets(beside),
      Heading('Results'),
      Table(results(arms), names=2),
      Bullets(notes(arms)),
      *samples(arms),
  ]
  for plot in run_plots.make_plots(arms):
    made += [Heading(plot.title), plot]
  for title, frame, about in (
      ('Speed and arithmetic', speed(arms), 'speed_notes'),
      ('Exchange health', health(arms), 'health_notes'),
  ):
    if frame is not None:
      made += [Heading(title), Table(frame, names=2), Bullets(_write(about))]
  if run_records.exchanging(arms):
    title = 'The method'
    image = pathlib.Path(__file__).with_name('method.svg').read_bytes()
    (caption,) = _write('method')
    made += [Heading(title), pages.Plot('method', title, caption, image)]
  made += [Heading('Settings'), Table(settings(arms), names=1 + len(arms))]
  made += [
      Code(_portable_text(arm.config), f'config.gin of {arm.name}')
      for arm in arms
      if arm.config
  ]
  again = '\n'.join(commands(arms, output))
  return [*made, Heading('How to make it again'), Code(again)]


# --- Words -------------------------------------------------------------------


def summary(arms: Sequence[RunRecords]) -> list[str]:
  """Returns what the runs show: a headline, and what to know beside it."""
  baseline, target = run_records.find_target(arms)
  known = {arm.name: _known(arm, target) for arm in arms}
  return _write(
      'summary',
      arms=list(known.values()),
      baseline=baseline and known[baseline.name],
      example=run_records.example_name(arms),
      one_batch=len({arm.run.get('group_batch') for arm in arms}) == 1
      and len({len(arm.groups) for arm in arms}) > 1,
  )


def _known(arm: RunRecords, target: float | None) -> dict[str, Any]:
  """Returns what the summary needs to know of an arm."""
  curve = run_records.validation_curve(arm)
  singles = [m['eval/loss'] for m in arm.models.values() if 'eval/loss' in m]
  last = [final_metrics(arm, group).get('eval/loss') for group in arm.groups]
  return {
      'name': arm.name,
      'groups': len(arm.groups),
      'example': run_records.example_name([arm]),
      'final': None if None in last else float(np.mean(last)),
      'best': run_records.best(curve),
      'last_step': max(group.last_step for group in arm.groups),
      'reached': None if target is None else reached(curve, target),
      'ensemble': arm.ensemble.get('eval/loss'),
      'single': np.mean(singles) if singles else None,
      'disagreement': pair_mean(arm, 'churn/disagreement'),
      'churn': pair_mean(arm, 'churn/mean_abs'),
  }


class Reached(NamedTuple):
  """When a curve comes under a loss.

  Attributes:
    step: On a line between two evaluations.
    before: The last that is above; None if the first is not.
    at: The first that is at or under.
  """

  step: float
  before: int | None
  at: int


def reached(curve: pd.Series, target: float) -> Reached | None:
  """Returns when a curve comes to a loss for the first time, if it does."""
  curve = run_records.finite(curve)
  at = run_records.first_at_or_under(curve, target)
  if at is None:
    return None
  above = curve[curve.index < at]
  if above.empty:
    return Reached(at, None, at)
  before, high, low = int(above.index[-1]), above.iloc[-1], curve[at]
  share = (high - target) / (high - low)
  return Reached(before + share * (at - before), before, at)


def notes(arms: Sequence[RunRecords]) -> list[str]:
  """Returns how to read the results, and what was odd in the records."""
  odd = []
  for arm in arms:
    for group in arm.groups:
      keys = ('loss/task', 'loss/distill', 'eval/loss')
      curves = {key: group.curve(key) for key in keys}
      bad = {k: c.index[~np.isfinite(c)].tolist() for k, c in curves.items()}
      who = f'{arm.name}, group {group.group_id}'
      odd.append((who, group.damaged, bad))
  unreadable = [(arm.name, why) for arm in arms for why in arm.unreadable]
  return _write('results_notes', odd=odd, unreadable=unreadable)


def samples(arms: Sequence[RunRecords]) -> list[Block]:
  """Returns what the models of the arms have written, the first of each."""
  made: list[Block] = []
  ways = []
  for arm in arms:
    for one in arm.samples[:_SAMPLES]:
      how = [one.get(key) for key in ('temperature', 'top_k', 'seed')]
      ways += _write('drawing', *map(_short, how))
      where = (_short(one.get(key)) for key in ('group', 'step'))
      who = '{}, group {}, step {}'.format(arm.name, *where)
      lines = one['text'][:_CHARACTERS].splitlines()
      text = '\n'.join(textwrap.fill(line, 88) for line in lines)
      made += [pages.Paragraph(f'{who}:'), Code(text)]
  if not made:
    return []
  (about,) = _write('samples', drawn=list(dict.fromkeys(ways)))
  return [Heading('What the models write'), pages.Paragraph(about), *made]


def _short(value: Any) -> str:
  """Returns a setting of a sample as text, whatever it is; '' for None."""
  return '' if value is None else str(value)[:20]


# --- Commands ----------------------------------------------------------------


def commands(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
) -> list[str]:
  """Returns the commands that make the runs and the report again.

  Paths under the working directory are relative; of others on this machine only
  the last part is kept, since the rest means nothing on another one.
  """
  lines = []
  for arm in arms:
    command = str(arm.run.get('command') or '')
    for path in (files.absolute(arm.workdir), os.fspath(arm.workdir)):
      command = command.replace(path, _portable(path))
    lines.append(_portable_text(command))
  report = [f'python -m {cli.module_of("report")}']
  for arm in arms:
    label = f'{arm.name}={_portable(arm.workdir)}'
    report.append(f'--workdir={shlex.quote(label)}')
  if output is not None:
    report.append(f'--output={shlex.quote(_portable(output))}')
  return [*filter(None, dict.fromkeys(lines)), ' '.join(report)]


def _portable_text(text: str) -> str:
  """Returns it with the paths under the working directory relative."""
  return text.replace(os.getcwd() + os.sep, '')


def _portable(path: files.PathLike) -> str:
  path = files.absolute(path)
  if files.is_remote(path):
    return path
  relative = os.path.relpath(path)
  outside = relative.startswith(os.pardir)
  return epath.Path(path).name if outside else relative


# --- Tables -------------------------------------------------------------------

# What stands in a column, of a group.
Cell = Callable[[RunRecords, GroupRecords], str]


def _rows(arms: Iterable[RunRecords], cells: Mapping[str, Cell]) -> list[dict]:
  """Returns a row per group, by the titles of the columns."""
  return [
      {
          'arm': arm.name,
          'model': f'group {group.group_id}',
          **{title: cell(arm, group) for title, cell in cells.items()},
      }
      for arm in arms
      for group in arm.groups
  ]


def _newest(curve: pd.Series, form: str) -> str:
  curve = run_records.finite(curve)
  return number(float(curve.iloc[-1]) if len(curve) else None, form)


def _mean_and_most(mean: pd.Series, form: str, *more: pd.Series) -> str:
  """Returns the mean of a curve, and the largest value of it and of others."""
  mean = run_records.finite(mean)
  if mean.empty:
    return '-'
  most = run_records.finite(pd.concat([mean, *more])).max()
  return f'{mean.mean():.1f} / {most:{form}}'


# --- Results -----------------------------------------------------------------

# Title and format of what is shown of a model.
_QUALITY = {
    'eval/loss': ('validation loss', '.4f'),
    'eval/perplexity': ('perplexity', '.2f'),
    'eval/bits_per_byte': ('bits per byte', '.3f'),
    'eval/accuracy': ('accuracy', '.2%'),
    'eval/auc': ('AUC', '.4f'),
    'eval/calibration': ('calibration', '.3f'),
    'eval/examples': ('examples', ',.0f'),
}
_LEFT_OUT = ('eval/calibration_error', 'eval/perplexity')
_STALENESS = 'staleness, steps: mean / max'
_STALL = 'stall, ms per exchange (share)'
# For a terminal of some 110 columns.
_SHORT = {
    'validation loss': 'valid.\nloss',
    'perplexity': 'perp-\nlexity',
    'bits per byte': 'bits per\nbyte',
    'accuracy': 'accu-\nracy',
    'calibration': 'cali-\nbration',
    'examples': 'exam-\nples',
    _STALENESS: 'staleness\nmean / max',
    _STALL: 'stall, ms per\nexchange',
    'disagreement': 'disagree-\nment',
}


def results(arms: Sequence[RunRecords]) -> pd.DataFrame:
  """Returns a row per group, and one per ensemble."""
  shown = _shown_quality(arms)
  cells: dict[str, Cell] = {
      'steps': lambda _, group: str(group.last_step),
      **{
          title: lambda arm, group, key=key, form=form: number(
              final_metrics(arm, group).get(key), form
          )
          for key, (title, form) in shown.items()
      },
      _STALENESS: lambda _, group: staleness(group, 'steps', '.0f'),
      _STALL: _stall_per_exchange,
  }
  rows = []
  for arm in arms:
    rows += _rows([arm], cells)
    if arm.ensemble or arm.pairs:
      metrics = _with_perplexity(arm.ensemble, arm)
      row = {t: number(metrics.get(k), form) for k, (t, form) in shown.items()}
      row['disagreement'] = number(pair_mean(arm, 'churn/disagreement'), '.2%')
      row['churn'] = number(pair_mean(arm, 'churn/mean_abs'), '.2g')
      rows.append({'arm': arm.name, 'model': 'ensemble', **row})
  columns = ['arm', 'model', *cells, 'disagreement', 'churn']
  return pd.DataFrame(rows, columns=columns, dtype=object).fillna('-')


def results_text(arms: Sequence[RunRecords]) -> str:
  """Returns the results for a terminal, some 110 columns wide at most."""
  frame = results(arms)
  frame['arm'] = [
      name if len(name) <= 16 else name[:13] + '...' for name in frame['arm']
  ]
  # An arm is named once, in its first row.
  frame['arm'] = frame['arm'].mask(frame['arm'] == frame['arm'].shift(), '')
  header = [_SHORT.get(title, title) for title in frame.columns]
  return pages.to_text(header, frame.to_numpy(), names=2)


def final_metrics(arm: RunRecords, group: GroupRecords) -> Mapping[str, Any]:
  """Returns the final evaluation of a model, else its last in training."""
  found = arm.models.get(group.group_id)
  if found is None:
    curves = {key: group.curve(key) for key in _QUALITY}
    found = {k: float(c.iloc[-1]) for k, c in curves.items() if len(c)}
  return _with_perplexity(found, arm)


def _with_perplexity(
    metrics: Mapping[str, Any], arm: RunRecords
) -> Mapping[str, Any]:
  """Works it out for tokens where it was not recorded."""
  loss = metrics.get('eval/loss')
  if loss is None or run_records.example_name([arm]) != 'token':
    return metrics
  return {'eval/perplexity': math.exp(min(loss, 700.0)), **metrics}


def _shown_quality(arms: Sequence[RunRecords]) -> dict[str, tuple[str, str]]:
  """Returns what is shown of a model: of a sigmoid output no perplexity."""
  found = {k for a in arms for g in a.groups for k in final_metrics(a, g)}
  found |= {'eval/loss', 'eval/accuracy'}
  if 'eval/auc' not in found:
    found.add('eval/perplexity')
  shown = {key: shown for key, shown in _QUALITY.items() if key in found}
  # Metrics of one's own.
  own = sorted(k for k in found - shown.keys() if k not in _LEFT_OUT)
  return shown | {
      k: (k.removeprefix('eval/'), '.4f') for k in own if 'eval/' in k
  }


def pair_mean(arm: RunRecords, key: str) -> float | None:
  """Returns the mean over the pairs of models of an arm, if there are any."""
  values = [p[key] for p in arm.pairs if key in p]
  return float(np.mean(values)) if values else None


# --- Speed -------------------------------------------------------------------


def _rate(key: str, form: str) -> Cell:
  return lambda _, group: number(
      run_records.mean_rate(group, f'perf/{key}'), form
  )


def _last(key: str, form: str) -> Cell:
  return lambda _, group: _newest(group.curve(f'perf/{key}'), form)


_SPEED: dict[str, Cell] = {
    'steps/s': _rate('steps_per_sec', '.3g'),
    'examples/s': _rate('examples_per_sec', ',.0f'),
    'model FLOPs per step': _last('model_flops_per_step', 'SI'),
    'model FLOP/s': _rate('model_flops_per_sec', 'SI'),
    'teacher share': _last('teacher_share', '.1%'),
    'utilisation': _last('utilisation', '.1%'),
}


def speed(arms: Sequence[RunRecords]) -> pd.DataFrame | None:
  """Returns a row per group; None if no run has recorded its rates."""
  if not any(len(c) for a in arms for c in a.curves('perf/examples_per_sec')):
    return None
  return pd.DataFrame(_rows(arms, _SPEED))


# --- Exchange ----------------------------------------------------------------


def staleness(group: GroupRecords, unit: str, form: str) -> str:
  """Returns mean and largest, over all records and all teachers."""
  key = f'exchange/staleness_{unit}'
  # The largest of any single teacher; in old runs only the means are known.
  most = [group.curve(f'{key}_max'), *run_records.by_peer(group, unit).values()]
  return _mean_and_most(group.curve(key), form, *most)


def _peers_present(arm: RunRecords, group: GroupRecords) -> str:
  curve = group.curve('exchange/peers_present')
  # In burn-in nobody is asked for.
  burn_in = arm.run.get('burn_in_steps') or 0
  return _mean_and_most(curve[curve.index > burn_in], '.0f')


def _exchanges(arm: RunRecords, steps: int) -> int | None:
  """Returns how many exchanges were due by a step."""
  every = arm.run.get('exchange_every')
  return steps // every if every else None


def _count(key: str) -> Cell:
  return lambda _, group: _newest(run_records.counted(group, key), ',.0f')


def _stall_per_exchange(arm: RunRecords, group: GroupRecords) -> str:
  stall = group.curve('exchange/stall_ms')
  # With nothing to exchange a recorded 0 would say too much.
  if arm.run.get('num_groups', len(arm.groups)) < 2 or stall.empty:
    return '-'
  exchanges = _exchanges(arm, int(stall.index[-1]))
  each = float(stall.sum()) / exchanges if exchanges else None
  return number(each, '.1f') + _share(stall, group)


def _stall_in_all(_: RunRecords, group: GroupRecords) -> str:
  stall = run_records.finite(group.curve('exchange/stall_ms'))
  if stall.empty:
    return '-'
  return number(float(stall.sum()) / 1000.0, '.2f') + _share(stall, group)


def _share(stall_ms: pd.Series, group: GroupRecords) -> str:
  seconds = run_records.training_seconds(group)
  return f' ({stall_ms.sum() / 1000.0 / seconds:.1%})' if seconds else ''


_HEALTH: dict[str, Cell] = {
    'exchanges': lambda a, g: number(_exchanges(a, g.last_step), ','),
    _STALENESS: lambda _, g: staleness(g, 'steps', '.0f'),
    'staleness, s: mean / max': lambda _, g: staleness(g, 'seconds', '.1f'),
    'peers present: mean / max': _peers_present,
    'rejected': _count(run_records.REJECTED),
    'failed to publish': _count(run_records.FAILURES),
    'stall, s (share)': _stall_in_all,
    'publication': lambda _, g: _newest(
        g.curve('exchange/publication_bytes'), 'bytes'
    ),
    'restarts seen': lambda _, g: str(g.restarts or '-'),
}


def health(arms: Sequence[RunRecords]) -> pd.DataFrame | None:
  """Returns how the exchange of each group went; None if there was none."""
  exchanging = run_records.exchanging(arms)
  return pd.DataFrame(_rows(exchanging, _HEALTH)) if exchanging else None


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
_NO_SETTINGS = ('arm', 'command', 'config_sha256', 'example')


def settings(arms: Sequence[RunRecords]) -> pd.DataFrame:
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


def _last_record(arm: RunRecords) -> str:
  times = [time.max() for time in arm.curves('time') if len(time)]
  if not times:
    return '-'
  moment = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
  return f'{moment:%Y-%m-%d %H:%M}'


def _minutes(arm: RunRecords) -> str:
  seconds = max(map(run_records.training_seconds, arm.groups))
  return f'{seconds / 60:.1f}' if seconds else '-'
