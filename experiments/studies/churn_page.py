"""Prints and writes what is known of churn: of a study, or of anybody's files.

Files: a page as Markdown and HTML, churn.png, churn.csv (a row per split, arm
and figure) and churn.json (with the figures of every retrain and pair).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from codistill_jax import statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files

from .. import cli
from ..reports import pages
from ..reports.pages import Block, Bullets, Code, Heading, Paragraph, Table
from . import retrains, words
from .analysis import Effect
from .retrains import Repeat, Retrains, Row
from .study_page import as_text, claim, write_csv
from .study_plan import MEASURES, Comparison, Measure, Study

# The figures of an arm, in order.
FIGURES = {
    'log_loss': MEASURES['log_loss'],
    'error': Measure('error', 'error', 'error'),
    'churn': MEASURES['churn'],
    'relative': Measure(
        'relative difference', 'relative', 'relative difference', '.3f'
    ),
    'disagreement': Measure('disagreement', 'disagree', 'disagreement'),
}
_OF_PAIRS = ('churn', 'relative', 'disagreement')

# --- A study -----------------------------------------------------------------


def report(
    found: Retrains,
    output: files.PathLike,
    note: str = '',
    study: Study | None = None,
) -> None:
  """Prints Table 1 of retrains, and writes their page.

  Args:
    found: What they have left.
    output: Directory.
    note: A sentence for the page.
    study: A declaration, whose comparisons are judged; its page is `page`.

  Raises:
    ValueError: After all that, if a deterministic control failed.
  """
  directory = epath.Path(output)
  blocks = _blocks(found, note)
  if study is None:
    cli.tell(f'\n{found.settings["data"]}\n{found.settings["headline"]}')
    cli.tell(
        f'\n{as_text(table_1(found.table, _split_of(found), short=True))}\n'
    )
    for line in (_summary(found), _choice(found)):
      cli.tell(line)
    page = pages.write(directory, 'churn', 'Prediction churn', blocks)
    cli.tell(f'report: {os.fspath(page)}')
  else:
    said = judge(study, found.rows['test'])
    cli.tell(f'\n{as_text(table_1(found.table, short=True))}\n')
    for line in said:
      cli.tell(line)
    head = [Paragraph(study.question), Paragraph(claim(study))]
    blocks = [*head, Heading('Verdict'), Bullets(said), *blocks]
    pages.write(directory, 'page', study.title, blocks)
    cli.tell(f'page: {os.fspath(directory / "page.md")}')
  _write_data(directory, found.rows, found)
  for failure in _failures(found):
    raise ValueError(f'the deterministic control failed: {failure}')


def judge(study: Study, rows: Sequence[Row]) -> list[str]:
  """Returns a sentence for each comparison of arms that have rows."""
  by_arm = {row.arm: row for row in rows}
  return [
      words.of_effect(study, c, _effect(c, *pair)).sentence
      for c in study.comparisons
      if None not in (pair := (by_arm.get(c.arm), by_arm.get(c.against)))
  ]


def _effect(comparison: Comparison, ours: Row, theirs: Row) -> Effect:
  """Compares churn by a ratio, over pairs; log loss by a difference."""
  count = min(ours.retrains, theirs.retrains)
  figures = [row.figures[comparison.measure] for row in (ours, theirs)]
  if comparison.measure != 'churn':
    return _difference(*figures)
  change = statistics.change_of_churn(
      *(
          statistics.symmetric(f.values, row.retrains)
          for f, row in zip(figures, (ours, theirs))
      )
  )
  ratio = Estimate(
      mean=1 + change.mean,
      half_range=0.0,
      low=1 + change.low,
      high=1 + change.high,
      # One ratio, of so many retrains: they have none of their own.
      values=(1 + change.mean,) * count,
  )
  return Effect(True, (), (), ratio, *(f.mean for f in figures))


def _difference(ours: Estimate, theirs: Estimate) -> Effect:
  """Compares retrain by retrain: those of one number share their seeds."""
  count = min(len(ours.values), len(theirs.values))
  a, b = (np.array(f.values[:count]) for f in (ours, theirs))
  difference = statistics.mean_over_retrains(a - b)
  return Effect(False, (), (), difference, a.mean(), b.mean())


def _blocks(found: Retrains, note: str) -> list[Block]:
  """Returns all of the page, in order."""
  from . import study_plots  # Needs matplotlib.

  split = _split_of(found)
  plot = study_plots.churn(found.rows['test'], found.chosen, split.strip())
  controls = [
      Paragraph(words.paragraph('controls')),
      Table(table_1(found.controls, split)),
  ]
  return [
      *(Paragraph(x) for x in (found.settings['headline'], note) if x),
      *(Paragraph(f'FAILED: {x}') for x in _failures(found)),
      Paragraph(_summary(found)),
      Paragraph(_choice(found)),
      Heading('Table 1'),
      Table(table_1(found.table, split)),
      Bullets(words.paragraphs('notes', size=found.settings['num_groups'])),
      Heading('95 % intervals'),
      Table(interval_table(found.table)),
      Heading(plot.title),
      plot,
      Heading('All weights, and what they were chosen on'),
      Table(_weight_table(found)),
      Heading('Controls'),
      Table(_repeat_table(found.repeats)),
      *(controls if found.controls else []),
      Heading('Settings'),
      Table(_settings_table(found), names=2),
      *(Code(text, name) for name, text in found.configurations.items()),
      Heading('How to make it again'),
      Code(found.settings['command']),
  ]


# --- Files of other people's models ------------------------------------------


def report_files(
    rows: Sequence[Row],
    *,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    examples: int,
    joined_by: str,
    paths: Sequence[str],
    output: str | None,
) -> None:
  """Prints the figures of prediction files; writes them if there is an output.

  Args:
    rows: An arm each.
    pairs: By arm, the names of each pair in the order of a figure's values.
    examples: N.
    joined_by: The column of ids; '' if rows were compared with rows.
    paths: Of all files.
    output: Directory, or None.
  """
  between = _pair_table(rows, pairs)
  cli.tell(as_text(table_1(rows, short=True)))
  if len(between) > 1:
    cli.tell('\n' + as_text(between))
  how = f'joined by {joined_by}' if joined_by else 'row by row'
  said = f'{examples:,} examples, {how}; ± is half of maximum minus minimum'
  cli.tell(f'\n{said}')
  if output is None:
    return
  blocks = [
      Table(table_1(rows)),
      Bullets([said, *words.paragraphs('definitions')]),
      Heading('95 % intervals'),
      Table(interval_table(rows)),
      Heading('Pairs'),
      Table(between, names=3),
      Heading('Files'),
      Code('\n'.join(paths)),
      Heading('How to make it again'),
      Code(cli.own_command()),
  ]
  page = pages.write(output, 'churn', 'Prediction churn', blocks)
  tree = {'examples': examples, 'files': paths, 'rows': rows, 'pairs': pairs}
  _write_data(epath.Path(output), {'': rows}, tree)
  cli.tell(f'report: {os.fspath(page)}')


# --- Tables ------------------------------------------------------------------


def _cell(row: Row, key: str, *, spread: bool) -> str:
  """Returns `0.4480 ± 0.0001`, or `0.4480 [0.4478, 0.4482]`."""
  if key not in row.figures:
    return '-'
  return words.estimate(
      row.figures[key], FIGURES[key].form, spread=spread, interval=not spread
  )


def _present(rows: Iterable[Row]) -> list[str]:
  return [key for key in FIGURES if any(key in row.figures for row in rows)]


def table_1(
    rows: Sequence[Row], prefix: str = '', short: bool = False
) -> pd.DataFrame:
  """Returns Table 1 of Anil et al. 2018, with the change of churn.

  Args:
    rows: The arms.
    prefix: Before 'log loss' and 'error', such as 'test '.
    short: Whether titles are for a terminal.
  """
  compared = any(row.change_of_churn is not None for row in rows)
  lines = []
  for row in rows:
    line = {'arm': row.title, 'retrains': str(row.retrains)}
    for key in _present(rows):
      title = FIGURES[key].column if short else FIGURES[key].title
      title = title if key in _OF_PAIRS else prefix + title
      line[title] = _cell(row, key, spread=True)
      if key == 'churn' and compared:
        line['change [95 %]'] = words.percent(row.change_of_churn)
    lines.append(line)
  return pd.DataFrame(lines)


def interval_table(rows: Sequence[Row]) -> pd.DataFrame:
  """Returns means and 95 % intervals."""
  return pd.DataFrame(
      {
          'arm': row.title,
          **{
              FIGURES[key].title: _cell(row, key, spread=False)
              for key in _present(rows)
          },
      }
      for row in rows
  )


def _weight_table(found: Retrains) -> pd.DataFrame:
  """Returns all arms: validation beside test."""
  columns = ['arm']
  for split in found.rows:
    columns += [f'{split} log loss', f'{split} churn', 'change']
  lines = []
  for of_splits in zip(*found.rows.values()):
    arm, title = of_splits[0].arm, of_splits[0].title
    line = [title + (' (chosen)' if arm == found.chosen else '')]
    for row in of_splits:
      line += [_cell(row, key, spread=True) for key in ('log_loss', 'churn')]
      line += [words.percent(row.change_of_churn)]
    lines.append(line)
  return pd.DataFrame(lines, columns=columns)


def _pair_table(
    rows: Sequence[Row], pairs: Mapping[str, Sequence[tuple[str, str]]]
) -> pd.DataFrame:
  """Returns the figures of each pair of files."""

  def value(row: Row, key: str, pair: int) -> str:
    if key not in row.figures:
      return '-'
    return format(row.figures[key].values[pair], FIGURES[key].form)

  return pd.DataFrame(
      {
          'arm': row.title,
          'model': a,
          'and model': b,
          **{FIGURES[k].column: value(row, k, i) for k in _OF_PAIRS},
      }
      for row in rows
      for i, (a, b) in enumerate(pairs[row.arm])
  )


def _repeat_table(repeats: Iterable[Repeat]) -> pd.DataFrame:
  """Returns the deterministic controls."""
  header = ['trained twice with the same seeds', 'predictions']
  header += ['that differ', 'largest difference']
  rows = [
      [r.arm, f'{r.total:,}', f'{r.different:,}', f'{r.largest:g}']
      for r in repeats
  ]
  return pd.DataFrame(rows, columns=header)


def _settings_table(found: Retrains) -> pd.DataFrame:
  """Returns what the study was, one setting a row."""
  s, records = found.settings, found.runs
  known = lambda key: sorted({r[key] for r in records})
  each = lambda key, form: ', '.join(format(x, form) for x in known(key))
  took = max(r['ended'] for r in records) - min(r['began'] for r in records)
  trained = sum(r['ended'] - r['began'] for r in records)
  test = '; no test split'
  if s['has_test_split']:
    test = f', {found.examples["test"]:,} test'
  values = {
      'data set': s['data'],
      'examples compared': f'{found.examples["validation"]:,} validation{test}',
      'groups (G) of a codistilled arm': str(s['num_groups']),
      'replicas per group (R)': str(s['replicas']),
      'group batch': f'{s["group_batch"]:,}',
      'steps of each group': each('num_steps', ','),
      'steps between exchanges': f'{s["exchange_every"]:,}, in lockstep',
      'seeds of parameters': each('seed', ''),
      'seeds of the order of data': each('data_seed', ''),
      'trainings': str(len(records)),
      'cores of a training': each('cores', ','),
      'device': s['device'],
      'first start to last end, minutes': f'{took / 60:.1f}',
      'minutes of all trainings added': f'{trained / 60:.1f}',
      'jax': each('jax', ''),
  }
  return pd.DataFrame(values.items(), columns=['', 'value'])


# --- Words -------------------------------------------------------------------


def _split_of(found: Retrains) -> str:
  """Returns the split of the table, before the name of a figure."""
  return 'test ' if found.settings['has_test_split'] else 'validation '


def _summary(found: Retrains) -> str:
  """Returns the result in a sentence or two."""
  rows = {row.arm: row for row in found.table}
  ensemble, best = rows[retrains.ENSEMBLE], rows.get(found.chosen)
  difference = None
  if best and best.retrains == ensemble.retrains:
    losses = [row.figures['log_loss'] for row in (best, ensemble)]
    difference = _difference(*losses).estimate
  return words.paragraph(
      'churn_summary',
      single=rows[retrains.SINGLE],
      ensemble=ensemble,
      best=best,
      difference=difference,
      split=_split_of(found),
  )


def _choice(found: Retrains) -> str:
  """Says how the weight was chosen."""
  return words.paragraph(
      'choice',
      weight=found.chosen and retrains.weight_of(found.chosen),
      reason=found.rule,
      has_test_split=found.settings['has_test_split'],
  )


def _failures(found: Retrains) -> list[str]:
  """Says what is wrong with the deterministic controls."""
  platform = found.settings['platform']
  return [
      words.paragraph('failure', repeat=repeat, platform=platform)
      for repeat in found.repeats
      if repeat.different
  ]


# --- For programs ------------------------------------------------------------


def _write_data(
    directory: epath.Path, rows: Mapping[str, Sequence[Row]], found: Any
) -> None:
  """Writes churn.csv, and all that was found as churn.json."""
  lines = []
  for split, of_split in rows.items():
    for row in of_split:
      figures = dict(row.figures)
      if row.change_of_churn is not None:
        figures['change_of_churn'] = row.change_of_churn
      for key, figure in figures.items():
        line = {'split': split, 'arm': row.arm, 'retrains': row.retrains}
        numbers = {name: repr(x) for name, x in figure._asdict().items()}
        lines.append(line | {'figure': key} | numbers)
  frame = pd.DataFrame(lines).drop(columns='values')
  write_csv(directory / 'churn.csv', frame)
  files.write_json(directory / 'churn.json', _tree(found))


def _tree(value: Any) -> Any:
  """Returns a value with the fields of its records by name, for JSON."""
  if hasattr(value, '_asdict'):
    value = value._asdict()
  if isinstance(value, Mapping):
    return {key: _tree(x) for key, x in value.items()}
  return list(map(_tree, value)) if isinstance(value, list | tuple) else value
