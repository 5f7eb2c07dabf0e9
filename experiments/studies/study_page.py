"""Writes what a study has found: a page, its plots, and CSV files.

Files: page.md, page.html, PNG plots, study.csv (a row per arm and measure) and
curves.csv (a row per evaluation).
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from codistill_jax.storage import files

from .. import cli
from ..reports import pages
from ..reports.pages import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Table,
    count,
    sentence_start,
)
from . import analysis, costs, words
from .analysis import (
    DIVERGED,
    MEASURED,
    NOT_REACHED,
    Analysis,
    Band,
    Cell,
    Effect,
    Run,
)
from .costs import Latency, TargetMap, WallTime
from .study_plan import MEASURES, Arm, Study

# How much longer than the median one step in a hundred is.
_TAILS = (1.2, 1.5, 2.0, 3.0, 5.0)

# What all runs have in common, see `outcomes`.
Settings = Mapping[str, Any]


def report(
    study: Study,
    settings: Settings,
    runs: Sequence[Run],
    output: files.PathLike,
    latency: Latency | None = None,
) -> list[words.Verdict]:
  """Analyses the runs of a study; prints, and writes everything about them.

  Args:
    study: Its declaration.
    settings: What all runs have in common, see `outcomes`.
    runs: Of all arms and seeds, those for tuning among them; in any order.
    output: Directory; what lies there under the same names is replaced.
    latency: What is assumed of workers and network, for the view 'latency'.

  Returns:
    A verdict on each comparison of the study.
  """
  found = analysis.analyse(study, runs)
  judged = [words.judge(found, c) for c in study.comparisons]
  said = [*(v.sentence for v in judged), *_divergences(found)]
  directory = epath.Path(output)
  made = _blocks(found, settings, said, latency or Latency())
  pages.write(directory, 'page', study.title, made)
  write_csv(directory / 'study.csv', _study_csv(found))
  write_csv(directory / 'curves.csv', _curves(found))
  cli.tell(f'\n{as_text(_short_table(found))}\n')
  for line in said:
    cli.tell(line)
  cli.tell(f'page: {os.fspath(directory / "page.md")}')
  return judged


def as_text(frame: pd.DataFrame) -> str:
  """Returns a table for a terminal."""
  return pages.to_text(list(frame), frame.to_numpy().tolist())


def write_csv(path: epath.Path, frame: pd.DataFrame) -> None:
  text = frame.to_csv(index=False, lineterminator='\n')
  files.write_bytes(path, text.encode())


def _blocks(
    found: Analysis, settings: Settings, said: Sequence[str], latency: Latency
) -> list[Block]:
  """Returns all of the page, in order."""
  from . import study_plots  # Needs matplotlib.

  study, views = found.study, found.study.views
  baseline = _title(study, study.baseline)
  rules = words.paragraphs('rules', window=found.window, baseline=baseline)
  example = settings['example']
  drawn = []
  if not study.factors:  # More arms than can be told apart; see curves.csv.
    drawn = [
        *study_plots.curves(found, example),
        study_plots.against_axis(found),
    ]
  groups = sorted({arm.num_groups for arm in study.arms})
  made = [
      Paragraph(study.question),
      Paragraph(claim(study)),
      _said(
          'settings',
          s=settings,
          groups=' to '.join(map(str, dict.fromkeys([groups[0], groups[-1]]))),
          baseline=baseline,
      ),
  ]
  if said:
    made += [Heading('Verdict'), Bullets(said)]
  made += [
      Heading('Arms'),
      Table(arms_table(found, settings)),
      _said('targets', targets=found.targets, example=example),
  ]
  if found.trained:
    made.append(Heading('Steps to the target, seed by seed'))
    made.append(Table(_seeds_table(found)))
  for plot in filter(None, drawn):
    made += [Heading(plot.title), plot]
  if 'bytes' in views:
    made += _bytes(found, example)
  if 'map' in views:
    made += map_blocks(found, settings)
  if study.factors:
    made += factor_blocks(found)
  if 'latency' in views:
    made += wall_time_blocks(found, settings, latency)
  made += _rates(found, settings)
  made += [
      Heading('Rules'),
      Bullets([*rules, *words.paragraphs('verdict_rules')]),
  ]
  if study.notes:
    made += [Heading('Notes'), *map(Paragraph, study.notes)]
  return [
      *made,
      Heading('How to make it again'),
      Code(settings['command']),
      _said('minutes', s=settings),
  ]


def _said(macro: str, **values: Any) -> Paragraph:
  return Paragraph(words.paragraph(macro, **values))


# --- Settings and runs ------------------------------------------------------


def claim(study: Study) -> str:
  """Returns what the paper says, or whoever else does."""
  ours = study.source.startswith(words.NOT_OF_THE_PAPER)
  return f'The {"claim" if ours else "paper"} ({study.source}): {study.claim}'


def _title(study: Study, name: str) -> str:
  return next((a.title for a in study.arms if a.name == name), name)


def _divergences(found: Analysis) -> list[str]:
  """Returns a sentence for each arm of which a run diverged."""
  lines = []
  for arm in found.study.arms:
    runs = found.runs[arm.name]
    at = [analysis.diverged_at(run) for run in runs]
    steps = [f'{step:,}' for step in at if step is not None]
    if steps:
      rest = '; its means are of the others' if len(steps) < len(runs) else ''
      together = ' and '.join(filter(None, [', '.join(steps[:-1]), steps[-1]]))
      lines.append(
          f'{sentence_start(arm.title)} diverged at step {together} in'
          f' {len(steps)} of {count(len(runs), "seed")}{rest}.'
      )
  return lines


# --- Tables ------------------------------------------------------------------


def arms_table(found: Analysis, settings: Settings) -> pd.DataFrame:
  """Returns all arms by all measures, with intervals."""
  return pd.DataFrame(
      {
          'arm': arm.title,
          'G': str(arm.num_groups),
          f'{settings["example"]}s per update of a group': _batch(found, arm),
          'seeds': str(len(found.runs[arm.name])),
          'learning rate': _used_rates(found.runs[arm.name]),
          **_cells(found, arm, _measures(found)),
      }
      for arm in found.study.arms
  )


def _short_table(found: Analysis) -> pd.DataFrame:
  """Returns the table for a terminal: without intervals."""
  measures = [m for m in _measures(found) if m != 'compute_to_target']
  return pd.DataFrame(
      {
          'arm': arm.title,
          'seeds': str(len(found.runs[arm.name])),
          **_cells(found, arm, measures, interval=False),
      }
      for arm in found.study.arms
  )


def _measures(found: Analysis) -> list[str]:
  """Returns those of the runs; with teachers' steps where there are any."""
  has = {
      'total_steps_to_target': any(r.prior_steps for r in found.all_runs),
      'final_accuracy': any(len(r.accuracy_N) for r in found.all_runs),
      'churn': False,
      'log_loss': False,
  }
  return [key for key in MEASURES if has.get(key, True)]


def _batch(found: Analysis, arm: Arm) -> str:
  """Returns examples; of an ensemble, those of its members."""
  groups = {a.name: a.num_groups for a in found.study.arms}
  groups = groups.get(arm.ensemble_of, arm.num_groups)
  runs = found.runs[arm.name]
  sizes = sorted({run.examples_per_step / groups for run in runs})
  return ', '.join(f'{size:,.0f}' for size in sizes) or '-'


def _cells(
    found: Analysis, arm: Arm, measures: Sequence[str], interval: bool = True
) -> dict[str, str]:
  return {
      MEASURES[m].column: _cell(
          analysis.cell(found, arm.name, m), MEASURES[m].form, interval
      )
      for m in measures
  }


def _cell(cell: Cell, form: str, interval: bool) -> str:
  seeds, diverged = len(cell.scores), cell.count(DIVERGED)
  if diverged == seeds:
    return 'diverged' if seeds else 'not trained'
  if cell.estimate is not None:
    text = words.estimate(cell.estimate, form, spread=True, interval=interval)
    left = seeds - diverged
    return f'{text} ({left} of {seeds} seeds)' if diverged else text
  if not cell.count(NOT_REACHED):
    return '-'
  reached = cell.count(MEASURED)
  return f'reached in {reached} of {seeds} seeds' if reached else NOT_REACHED


def _seeds_table(found: Analysis) -> pd.DataFrame:
  """Returns steps to the target of every run, and what was not reached."""
  seeds = sorted({run.seed for run in found.all_runs})
  rows = []
  for arm in found.study.arms:
    scores = analysis.cell(found, arm.name, 'steps_to_target').scores
    of_seed = {
        s.seed: (
            {
                MEASURED: f'{s.value:,.0f}',
                NOT_REACHED: f'not reached in {s.at_least:,.0f}',
            }.get(s.state, s.state)
        )
        for s in scores
    }
    row = {f'seed {seed}': of_seed.get(seed, '-') for seed in seeds}
    rows.append({'arm': arm.title} | row)
  return pd.DataFrame(rows)


# --- Learning rates ----------------------------------------------------------


def _rates(found: Analysis, settings: Settings) -> list[Block]:
  tuned = any(found.tuning.values())
  heading = Heading('Learning rates')
  said = _said('rates', s=settings, tuned=tuned)
  if not tuned:
    return [heading, said]
  table = pd.DataFrame(
      {
          'arm': arm.title,
          **{f'{r:g}': _tried(found, arm, r) for r in settings['rates']},
          'chosen': _chosen(found, arm, settings),
      }
      for arm in found.study.arms
  )
  return [heading, Table(table), said]


def _used_rates(runs: Sequence[Run]) -> str:
  known = {run.rate for run in runs if not math.isnan(run.rate)}
  return ', '.join(f'{rate:g}' for rate in sorted(known)) or '-'


def _tried(found: Analysis, arm: Arm, rate: float) -> str:
  """Returns losses at a rate: of one run, unless more seeds were tried."""
  cells = []
  for run in found.tuning[arm.name]:
    if np.isclose(run.rate, rate):
      best = analysis.score(found, run, 'best_loss')
      last = analysis.score(found, run, 'final_loss')
      losses = f'{best.value:.4f} / {last.value:.4f}'
      cells.append(losses if best.state == MEASURED else best.state)
  return ', '.join(cells) or '-'


def _chosen(found: Analysis, arm: Arm, settings: Settings) -> str:
  runs = found.runs[arm.name]
  used, source = _used_rates(runs), arm.tuned_as or arm.ensemble_of
  if source:
    return f'{used}, that of {_title(found.study, source)}'
  ends = [
      f(settings['rates']) for f in (min, max) if len(settings['rates']) > 1
  ]
  at_the_edge = any(math.isclose(r.rate, end) for r in runs for end in ends)
  if found.tuning[arm.name] and at_the_edge:
    return f'{used}, at the edge of the grid'
  return used


# --- Views -------------------------------------------------------------------


def _bytes(found: Analysis, example: str) -> list[Block]:
  from . import study_plots

  plot = study_plots.against_bytes(found, example)
  if plot is None:
    return []
  return [
      Heading(plot.title),
      plot,
      Table(_bytes_table(found)),
      _said('equal_bytes'),
      Bullets(words.paragraphs('formulas')),
  ]


def _bytes_table(found: Analysis) -> pd.DataFrame:
  """Returns losses at the last evaluation within budgets of bytes.

  The budgets are what each arm has received in all, so that each column has an
  arm at its end.
  """
  bands = {
      a.title: analysis.band(found, a.name, 'bytes') for a in found.trained
  }
  ends = sorted(band.x_N[-1] for band in bands.values() if band is not None)
  # Those that look the same are the same.
  budgets = {pages.number(end, 'bytes'): end for end in ends if end > 0}
  return pd.DataFrame(
      {
          'arm': title,
          **{f'at {said}': _within(band, b) for said, b in budgets.items()},
      }
      for title, band in bands.items()
  )


def _within(band: Band | None, budget: float) -> str:
  if band is None:
    return '-'
  # A sum of many updates may be a rounding error above the same product.
  at = np.flatnonzero(band.x_N <= budget * (1 + 1e-9))
  return f'{band.mean_N[at[-1]]:.4f}' if len(at) else '-'


def wall_time_blocks(
    found: Analysis, settings: Settings, latency: Latency
) -> list[Block]:
  """Returns plot, words and assumptions; a sentence if runs do not suffice."""
  from . import study_plots

  model = costs.measure(found, latency)
  said = [
      Heading('Wall time, on paper'),
      _said('wall_time', model=model),
  ]
  if model.fit is None:
    return said
  table = Table(times_table(model), names=0)
  made = [*said, study_plots.wall_time(model), table]
  if model.at:
    made.append(Paragraph('The same for shorter and longer tails:'))
    made.append(Table(tails_table(model), names=0))
  received = pages.number(settings['bytes_of_model'], 'bytes')
  assumptions = words.paragraphs('assumptions', model=model, received=received)
  return [*made, Bullets(assumptions)]


def map_blocks(found: Analysis, settings: Settings) -> list[Block]:
  """Returns where a second group pays: plot, words, and a row per point."""
  from . import study_plots

  maps = costs.map_of_batches(found)
  # Rows of a worker: the group batch of the baseline is that of its workers.
  workers = next(
      a.workers for a in found.study.arms if a.name == found.study.baseline
  )
  rows = settings['group_batch'] / workers
  plot = study_plots.batch_map(maps, rows)
  return [
      Heading('Where a second group pays'),
      *([plot] if plot else []),
      Bullets([words.paragraph('batch_map', map=m, rows=rows) for m in maps]),
      Table(map_table(maps, rows), names=1),
      _said('batch_map_rules'),
  ]


def map_table(maps: Sequence[TargetMap], rows: float) -> pd.DataFrame:
  """Returns ratios of steps to one group by target and batch.

  Args:
    maps: A target each.
    rows: Of the batch of one worker.
  """
  lines = []
  for found in maps:
    for workers in found.ratios['two groups']:
      steps = found.steps.get(workers)
      critical = workers / found.fit.critical if found.fit else None
      line = {
          'target': found.name,
          'group batch': f'{workers * rows:,.0f}',
          'batch / critical': pages.number(critical, '.2f'),
          'steps, one group': pages.number(steps, ',.0f'),
      }
      for kind, effects in found.ratios.items():
        line[kind] = _ratio(effects.get(workers))
      line['two groups / twice the batch'] = _ratio(found.pays.get(workers))
      lines.append(line)
  return pd.DataFrame(lines)


def factor_blocks(found: Analysis) -> list[Block]:
  """Returns what each changed setting makes of codistillation."""
  from . import study_plots

  effects = analysis.factor_effects(found)
  points = dict.fromkeys(e.factor.point for e in effects)
  rows = [
      {
          'where': e.factor.point,
          'change': e.factor.change,
          'steps, over one group': _ratio(e.steps),
          'loss at the end, over one group': _ratio(e.loss, '+.4f'),
          'that over no change': (
              '-' if e.change is None else words.estimate(e.change, '+.4f')
          ),
      }
      for e in effects
  ]
  said = [
      words.paragraph(
          'factors',
          point=point,
          **{
              direction: [
                  e.factor.change
                  for e in effects
                  if (e.factor.point, e.direction) == (point, direction)
              ]
              for direction in ('better', 'worse')
          },
      )
      for point in points
  ]
  plot = study_plots.factors(effects)
  return [
      Heading('What it depends on'),
      *([plot] if plot else []),
      Bullets(said),
      Table(pd.DataFrame(rows), names=2),
      _said('factor_rules'),
  ]


def _ratio(effect: Effect | None, form: str = '.2f') -> str:
  if effect is None or not effect.ours:
    return 'not trained'
  if effect.estimate is None:
    return 'not reached' if effect.ratio else 'diverged'
  return words.estimate(effect.estimate, form)


def times_table(model: WallTime) -> pd.DataFrame:
  """Returns steps and times by number of workers."""
  rows = []
  for workers in model.doublings():
    paper = '' if workers in model.one else ' (fit)'
    row = {
        'workers in all': f'{workers:,}',
        'steps, one group': f'{model.steps(workers):,.0f}{paper}',
        'time of an update': f'{model.update(workers):.2f}',
        'time to target, one group': f'{model.time_of_one(workers):,.0f}',
    }
    if model.at:
      row['two groups of half as many'] = (
          '-' if workers % 2 else f'{model.time_of_two(workers // 2):,.0f}'
      )
    rows.append(row)
  return pd.DataFrame(rows)


def tails_table(model: WallTime) -> pd.DataFrame:
  """Returns the crossover for shorter and longer tails."""
  rows = []
  for tail in _TAILS:
    assumed = model.assumed._replace(tail=tail, sample=())
    other = model._replace(assumed=assumed)
    first, (*_, gain) = other.crossover(), other.gains().values()
    rows.append(
        {
            '99th percentile / median': f'{tail:g}',
            'two groups faster from W': f'{first:,}' if first else '-',
            'factor at the largest W': f'{gain:.2f}',
        }
    )
  return pd.DataFrame(rows)


# --- CSV ---------------------------------------------------------------------


def _study_csv(found: Analysis) -> pd.DataFrame:
  """Returns a row per arm and measure; empty where there is no mean."""
  rows = []
  for arm in found.study.arms:
    for measure in MEASURES:
      cell = analysis.cell(found, arm.name, measure)
      numbers = cell.estimate or (np.nan,) * 4
      values = [f'{s.seed}:{_exact(s.value)}' for s in cell.scores]
      row: dict[str, Any] = {'arm': arm.name, 'measure': measure}
      row |= zip(('mean', 'half_range', 'low', 'high'), map(_exact, numbers))
      row |= {
          'seeds': len(cell.scores),
          'measured': cell.count(MEASURED),
          'not_reached': cell.count(NOT_REACHED),
          'diverged': cell.count(DIVERGED),
          'values': ' '.join(values),
      }
      rows.append(row)
  return pd.DataFrame(rows)


def _curves(found: Analysis) -> pd.DataFrame:
  """Returns a row per evaluation of every run that is reported; raw."""
  rows = []
  for run in found.all_runs:
    accuracy_N = run.accuracy_N
    if not len(accuracy_N):
      accuracy_N = np.full(len(run.steps_N), np.nan)
    columns = (run.steps_N, run.flops_N, run.bytes_N, run.loss_N, accuracy_N)
    for values in zip(*columns, strict=True):
      rows.append([run.arm, run.seed, *map(_exact, values)])
  header = ['arm', 'seed', 'step', 'flops', 'bytes', 'loss', 'accuracy']
  return pd.DataFrame(rows, columns=header)


def _exact(value: float) -> str:
  value = float(value)
  if np.isnan(value):
    return ''
  return str(int(value)) if value.is_integer() else repr(value)
