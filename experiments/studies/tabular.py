"""Tables of a study, for its page, a terminal and CSV files."""

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.studies import analysis, formatting, wording
from experiments.studies.analysis import ACCURACY, ALL_MEASURES, Analysis
from experiments.studies.declaration import Arm
from experiments.studies.results import Setting

Table = tuple[list[str], list[list[str]]]

_SHORT = {
    'steps_to_target': 'steps to target',
    'total_steps_to_target': 'with teachers',
    'compute_to_target': 'FLOPs to target',
    'final_loss': 'loss at the end',
    'best_loss': 'best loss',
    ACCURACY: 'accuracy at the end',
}


def measures(found: Analysis) -> list[str]:
  """Those that the runs have; with teachers' steps only where there are any."""
  runs = [run for runs in found.runs.values() for run in runs]
  has = {
      'total_steps_to_target': any(run.prior_steps for run in runs),
      ACCURACY: any(len(run.accuracy_N) for run in runs),
  }
  return [key for key in _SHORT if has.get(key, True)]


def arms_table(found: Analysis, setting: Setting) -> Table:
  """All arms by all measures, with intervals."""
  keys = measures(found)
  header = ['arm', 'G', f'{setting.example}s per update of a group', 'seeds']
  header += ['learning rate', *(_SHORT[k] for k in keys)]
  rows = []
  for arm in found.study.arms:
    runs = found.runs[arm.name]
    cells = [
        formatting.cell(k, analysis.cell(found, arm.name, k)) for k in keys
    ]
    rates = wording.rates(runs) or '-'
    batch = _group_batch(found, arm)
    row = [arm.title, str(arm.num_groups), batch, str(len(runs)), rates]
    rows.append([*row, *cells])
  return header, rows


def _group_batch(found: Analysis, arm: Arm) -> str:
  """In examples; of an ensemble, that of its members."""
  groups = {a.name: a.num_groups for a in found.study.arms}
  groups = groups.get(arm.ensemble_of, arm.num_groups)
  runs = found.runs[arm.name]
  sizes = sorted({run.examples_per_step / groups for run in runs})
  return ', '.join(f'{size:,.0f}' for size in sizes) or '-'


def short_table(found: Analysis) -> Table:
  """For a terminal: without intervals."""
  keys = [k for k in measures(found) if k != 'compute_to_target']
  header = ['arm', 'seeds', *(_SHORT[k] for k in keys)]
  rows = []
  for arm in found.study.arms:
    cells = [
        formatting.cell(k, analysis.cell(found, arm.name, k), interval=False)
        for k in keys
    ]
    rows.append([arm.title, str(len(found.runs[arm.name])), *cells])
  return header, rows


def seeds_table(found: Analysis) -> Table:
  """Steps to the target of every run, what was not reached among them."""
  seeds = sorted({r.seed for runs in found.runs.values() for r in runs})
  header = ['arm', *(f'seed {seed}' for seed in seeds)]
  rows = []
  for arm in found.study.arms:
    outcomes = analysis.cell(found, arm.name, 'steps_to_target').outcomes
    by_seed = {o.seed: o for o in outcomes}
    rows.append([arm.title, *(_outcome(by_seed.get(seed)) for seed in seeds)])
  return header, rows


def _outcome(found: analysis.Outcome | None) -> str:
  if found is None:
    return '-'
  if found.state == analysis.MEASURED:
    return f'{found.value:,.0f}'
  if found.state == analysis.NOT_REACHED:
    return f'not reached in {found.at_least:,.0f}'
  return found.state


# --- Learning rates ----------------------------------------------------------


def rates_table(found: Analysis, setting: Setting) -> Table:
  """Best smoothed and last loss of each arm at each rate of the grid."""
  header = ['arm', *(f'{rate:g}' for rate in setting.rates), 'chosen']
  rows = [
      [arm.title, *_tried(found, arm, setting), _chosen(found, arm, setting)]
      for arm in found.study.arms
  ]
  return header, rows


def _tried(found: Analysis, arm: Arm, setting: Setting) -> list[str]:
  cells = []
  for rate in setting.rates:
    tried = [r for r in found.tuning[arm.name] if np.isclose(r.rate, rate)]
    # One, unless someone has tried more seeds.
    cells.append(', '.join(_trial(found, run) for run in tried) or '-')
  return cells


def _trial(found: Analysis, run) -> str:
  best = analysis.outcome(found, run, 'best_loss')
  last = analysis.outcome(found, run, 'final_loss')
  if best.state != analysis.MEASURED:
    return best.state
  return f'{best.value:.4f} / {last.value:.4f}'


def _chosen(found: Analysis, arm: Arm, setting: Setting) -> str:
  used = wording.rates(found.runs[arm.name]) or '-'
  source = arm.tuned_as or arm.ensemble_of
  if source:
    titles = {a.name: a.title for a in found.study.arms}
    return f'{used}, that of {titles.get(source, source)}'
  if found.tuning[arm.name] and wording.at_the_edge(arm, found, setting):
    return f'{used}, at the edge of the grid'
  return used


# --- CSV ---------------------------------------------------------------------


def study_csv(found: Analysis) -> str:
  """A row per arm and measure; empty where there is no mean."""
  header = ['arm', 'measure', 'mean', 'half_range', 'low', 'high', 'seeds']
  header += ['measured', 'not_reached', 'diverged', 'values']
  rows = []
  for arm in found.study.arms:
    for key in ALL_MEASURES:
      cell = analysis.cell(found, arm.name, key)
      f = cell.figure
      numbers = [f.mean, f.half_range, f.low, f.high] if f else [np.nan] * 4
      states = (analysis.MEASURED, analysis.NOT_REACHED, analysis.DIVERGED)
      rows.append(
          [
              arm.name,
              key,
              *map(_exact, numbers),
              len(cell.outcomes),
              *map(cell.count, states),
              ' '.join(f'{o.seed}:{_exact(o.value)}' for o in cell.outcomes),
          ]
      )
  return _csv([header, *rows])


def curves_csv(found: Analysis) -> str:
  """A row per evaluation of every run that is reported; not smoothed."""
  header = ['arm', 'seed', 'step', 'flops', 'bytes', 'loss', 'accuracy']
  rows = []
  for runs in found.runs.values():
    for run in runs:
      accuracy = run.accuracy_N
      if not len(accuracy):
        accuracy = np.full(len(run.steps_N), np.nan)
      columns = (run.steps_N, run.flops_N, run.bytes_N, run.loss_N, accuracy)
      for values in zip(*columns, strict=True):
        rows.append([run.arm, run.seed, *map(_exact, values)])
  return _csv([header, *rows])


def _exact(value: float) -> str:
  value = float(value)
  if np.isnan(value):
    return ''
  return str(int(value)) if value.is_integer() else repr(value)


def _csv(rows: Iterable[Sequence]) -> str:
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator='\n').writerows(rows)
  return buffer.getvalue()
