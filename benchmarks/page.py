r"""The page of the benchmarks, made from the JSON of `benchmarks.run_all`.

    python -m benchmarks.page --input=docs/results/bench_cpu.json

What limits a figure whose goal is missed is written by hand, in the file of
`--notes`, which is only read here. Its sections are found by their headings:

    ## step_cost                  below the tables of that benchmark
    ## step_cost / LSTM           for missed rows whose name begins like that;
                                  the longest heading that fits is taken
    ## step_cost / LSTM / gpu     on that device only
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks import figures

Run = Mapping[str, Any]  # What `run_all` writes.

_HEAD = """\
# Benchmarks

Made by `benchmarks/page.py` from the JSON of the commands below: do not
edit it here. What limits a figure is in [{notes_name}]({notes_name}).

Medians, with the quartiles in parentheses; a ratio is the median of the ratios
within a repeat, in which all arms ran in turn.
"""
_UNKNOWN = 'What limits it is not written down yet.'


class Note(NamedTuple):
  """A section of the notes; empty strings mean any."""

  benchmark: str
  row: str
  device: str
  text: str


def main(argv: Sequence[str]) -> None:
  del argv
  write(flags.FLAGS.input, flags.FLAGS.notes, flags.FLAGS.page)


def write(inputs: Sequence[str], notes: str, page: str) -> None:
  """Makes the page anew.

  Raises:
    ValueError: If an input is not of `run_all`.
    OSError: If an input cannot be read. Notes need not exist.
  """
  runs = [read_run(path) for path in inputs]
  path = pathlib.Path(notes)
  text = path.read_text() if path.exists() else ''
  pathlib.Path(page).write_text(make(runs, read_notes(text), path.name))


def read_run(path: str | os.PathLike[str]) -> Run:
  """Returns the JSON of a run.

  Raises:
    ValueError: If it is not of `run_all`.
  """
  try:
    run = json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f'{path} is no JSON: {e}') from e
  if not isinstance(run, dict) or 'benchmarks' not in run:
    raise ValueError(
        f'{path} is not of benchmarks.run_all: it has no benchmarks; give its'
        ' --output'
    )
  return run


def read_notes(text: str) -> list[Note]:
  """Returns the sections of the notes."""
  notes = []
  for part in ('\n' + text).split('\n## ')[1:]:
    heading, _, body = part.partition('\n')
    names = [*(name.strip() for name in heading.split(' / ')), '', '']
    notes.append(Note(*names[:3], body.strip()))
  return notes


def make(
    runs: Sequence[Run],
    notes: Sequence[Note],
    notes_name: str = 'benchmarks_notes.md',
) -> str:
  """Returns the whole page, in Markdown."""
  parts = [_HEAD.format(notes_name=notes_name), _machines(runs)]
  parts.append(_overview(runs))
  for figure in figures.FIGURES:
    parts.append(_section(figure, runs, notes))
  return '\n'.join(parts)


def _machines(runs: Sequence[Run]) -> str:
  lines = []
  for run in runs:
    for record in list(run['benchmarks'].values())[:1]:
      machine = record['machine']
      versions = ', '.join(f'{k} {v}' for k, v in machine['versions'].items())
      quick = ' **A quick run: sizes are tiny.**' if run.get('quick') else ''
      took = f', in {run["seconds"] / 60:.0f} min' if 'seconds' in run else ''
      lines.append(
          f'* {run["device"]}: {machine["device"]}, {machine["cores"]} cores;'
          f' {run["made"][:10]}; Python {machine["python"]}, {versions};'
          f' `{run["command"]}`{took}.{quick}'
      )
  return '\n'.join(lines) + '\n'


def _overview(runs: Sequence[Run]) -> str:
  """Returns which goals are met, for each figure and device."""
  devices = [run['device'] for run in runs]
  table = [['figure', 'goal', *devices]]
  for figure in figures.FIGURES:
    cells = [_met(run, figure.benchmark) for run in runs]
    table.append([figure.title, figure.goal, *cells])
  return markdown_table(table)


def _met(run: Run, benchmark: str) -> str:
  rows = run['benchmarks'].get(benchmark, {}).get('results', [])
  rows = [row for row in rows if 'skipped' not in row]
  goals = [row for row in rows if row.get('goal')]
  if not rows:
    return 'not run'
  if not goals:
    return 'measured'
  missed = [row['name'] for row in goals if not row['goal']['met']]
  said = f'{len(goals) - len(missed)} of {len(goals)} met'
  return f'{said}; not {"; ".join(missed)}' if missed else said


def _section(
    figure: figures.Figure, runs: Sequence[Run], notes: Sequence[Note]
) -> str:
  parts = [f'## {figure.title}\n', f'`benchmarks/{figure.benchmark}.py`.']
  if figure.goal:
    parts.append(f'Goal: {figure.goal}.')
  text = [' '.join(parts[1:]) + f' {figure.text}\n']
  for run in runs:
    record = run['benchmarks'].get(figure.benchmark)
    if record is None:
      why = run.get('not_run', {}).get(figure.benchmark, 'not chosen')
      text.append(f'On {run["device"]}: not run ({why}).\n')
      continue
    text += _results(figure, run['device'], record, notes)
    if figure.benchmark in run.get('not_run', {}):
      text.append(f'Ended early: {run["not_run"][figure.benchmark]}.\n')
  about = find_note(notes, figure.benchmark, '', '')
  text += [about + '\n'] if about else []
  return '\n'.join([parts[0], *text])


def _results(
    figure: figures.Figure,
    device: str,
    record: Mapping[str, Any],
    notes: Sequence[Note],
) -> list[str]:
  rows = [row for row in record['results'] if 'skipped' not in row]
  repeats = max((_repeats(row) for row in rows), default=0)
  said = f', {repeats} repeats' if repeats else ''
  took = f'{record.get("seconds", 0):.0f} s'
  text = [
      f'On {device}, load {record["machine"]["load"]} at the start; took'
      f' {took}{said}.\n'
  ]
  if rows:
    text.append(_table(figure, rows))
  for row in record['results']:
    if 'skipped' in row:
      text.append(f'* {row["name"]}: not measured, {row["skipped"]}.\n')
  missed = [r for r in rows if r.get('goal') and not r['goal']['met']]
  return text + _missed(figure.benchmark, device, missed, notes)


def _repeats(row: Mapping[str, Any]) -> int:
  return max(
      (x.get('repeats', 0) for x in row.values() if isinstance(x, dict)),
      default=0,
  )


def _table(figure: figures.Figure, rows: Sequence[Mapping[str, Any]]) -> str:
  columns = [
      (title, key)
      for title, key in figure.columns
      if any(cell(row.get(key)) for row in rows)
  ]
  with_goal = any(row.get('goal') for row in rows)
  head = ['', *(title for title, _ in columns)]
  table = [head + (['goal', 'met'] if with_goal else [])]
  for row in rows:
    cells = [row['name'], *(cell(row.get(key)) for _, key in columns)]
    table.append(cells + (_goal_cells(row.get('goal')) if with_goal else []))
  return markdown_table(table)


def _goal_cells(goal: Mapping[str, Any] | None) -> list[str]:
  if not goal:
    return ['', '']
  return [f'{_goal_text(goal)}: {cell(goal["value"])}', _yes(goal['met'])]


def _goal_text(goal: Mapping[str, Any]) -> str:
  if 'at_most' in goal:
    return f'≤ {cell(goal["at_most"])}'
  return f'≥ {cell(goal["at_least"])}'


def _yes(met: bool) -> str:
  return 'yes' if met else '**no**'


def _missed(
    benchmark: str,
    device: str,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[Note],
) -> list[str]:
  """Returns the missed goals, those of one note together."""
  by_note: dict[str, list[str]] = {}
  for row in rows:
    note = find_note(notes, benchmark, row['name'], device) or _UNKNOWN
    goal = row['goal']
    said = f'{row["name"]} ({cell(goal["value"])}, goal {_goal_text(goal)})'
    by_note.setdefault(note, []).append(said)
  return [
      f'Missed: {"; ".join(names)}.\n\n{note}\n'
      for note, names in by_note.items()
  ]


def find_note(
    notes: Sequence[Note], benchmark: str, row: str, device: str
) -> str:
  """Returns the text of the note that fits best; '' if none does.

  Args:
    notes: All.
    benchmark: Its name.
    row: Name of the row; '' for the note on the whole benchmark.
    device: 'cpu' or 'gpu'.
  """
  fitting = [
      note
      for note in notes
      if note.benchmark == benchmark
      and bool(note.row) == bool(row)
      and row.startswith(note.row)
      and note.device in ('', device)
  ]
  best = max(fitting, key=lambda n: (len(n.row), n.device), default=None)
  return best.text if best else ''


def cell(value: Any) -> str:
  """Returns a value of the JSON as a reader likes it."""
  if value is None:
    return ''
  if isinstance(value, dict) and 'median' in value:
    low, high = (cell(x) for x in value['quartiles'])
    middle = cell(value['median'])
    return middle if low == high == middle else f'{middle} ({low}-{high})'
  if isinstance(value, dict):
    return ', '.join(f'{k} {cell(x)}' for k, x in value.items())
  if isinstance(value, list | tuple):
    return ', '.join(cell(x) for x in value)
  if isinstance(value, int | float):
    # Three digits that count, and no exponent.
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
  return str(value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
  """Returns a table: a row of heads, and numbers from the second column on."""
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  lines.insert(1, '|' + '---|' * len(rows[0]))
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  flags.DEFINE_multi_string(
      'input', ['docs/results/bench_cpu.json'], 'JSON of a run; repeatable.'
  )
  flags.DEFINE_string(
      'notes', 'docs/benchmarks_notes.md', 'What is written by hand; only read.'
  )
  flags.DEFINE_string('page', 'docs/benchmarks.md', 'The page to make.')
  app.run(main)
