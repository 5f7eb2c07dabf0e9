"""Tables of churn as text: Table 1 of Anil et al. 2018, intervals, files."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from codistill_jax.statistics import Estimate
from experiments.churn_study.figures import TITLES, Row

_DIGITS = {'relative': 3}

# For a terminal.
SHORT = TITLES | {
    'churn': 'churn',
    'relative': 'relative',
    'disagreement': 'disagree',
}

Cells = list[list[str]]


def number(key: str, value: float) -> str:
  """A value with the digits of its kind."""
  return f'{value:.{_DIGITS.get(key, 4)}f}'


def spread(key: str, figure: Estimate | None) -> str:
  """`0.4480 ± 0.0001`, the convention of the paper."""
  if figure is None:
    return '-'
  if len(figure.values) < 2:
    return number(key, figure.mean)
  return f'{number(key, figure.mean)} ± {number(key, figure.half_range)}'


def interval(key: str, figure: Estimate | None) -> str:
  """`0.4480 [0.4478, 0.4482]`."""
  if figure is None:
    return '-'
  mean = number(key, figure.mean)
  if math.isnan(figure.low):
    return f'{mean} [-]'
  return f'{mean} [{number(key, figure.low)}, {number(key, figure.high)}]'


def percent(figure: Estimate | None) -> str:
  """`-38 % [-41, -35]`."""
  if figure is None or not math.isfinite(figure.mean):
    return '-'
  mean = f'{100 * figure.mean:+.0f} %'
  if math.isnan(figure.low):
    return mean
  return f'{mean} [{100 * figure.low:+.0f}, {100 * figure.high:+.0f}]'


def present(rows: Sequence[Row]) -> list[str]:
  """The keys that some row has, in order."""
  return [key for key in TITLES if any(key in row.figures for row in rows)]


def table_1(
    rows: Sequence[Row], prefix: str = '', titles: Mapping[str, str] = TITLES
) -> tuple[list[str], Cells]:
  """Header and rows: mean ± half range, and the change of churn.

  Args:
    rows: The arms.
    prefix: Before 'log loss' and 'error', such as 'test '.
    titles: Of the figures.
  """
  header, cells = ['arm', 'retrains'], [
      [row.title, str(row.retrains)] for row in rows
  ]
  compared = any(row.change is not None for row in rows)
  for key in present(rows):
    before = prefix if key in ('log_loss', 'error') else ''
    header.append(before + titles[key])
    for line, row in zip(cells, rows):
      line.append(spread(key, row.figures.get(key)))
    if key == 'churn' and compared:
      header.append('change [95 %]')
      for line, row in zip(cells, rows):
        line.append(percent(row.change))
  return header, cells


def interval_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
  """Header and rows: mean and 95 % interval."""
  keys = present(rows)
  return ['arm', *(TITLES[key] for key in keys)], [
      [row.title, *(interval(key, row.figures.get(key)) for key in keys)]
      for row in rows
  ]


def weight_table(
    rows: Mapping[str, Sequence[Row]], chosen: str | None
) -> tuple[list[str], Cells]:
  """Header and rows of all arms: validation beside test."""
  header, cells = ['arm'], []
  for split in rows:
    header += [f'{split} log loss', f'{split} churn', 'change']
  for both in zip(*rows.values()):
    line = [both[0].title + (' (chosen)' if both[0].arm == chosen else '')]
    for row in both:
      line += [
          spread('log_loss', row.figures.get('log_loss')),
          spread('churn', row.figures['churn']),
          percent(row.change),
      ]
    cells.append(line)
  return header, cells


# --- For programs ------------------------------------------------------------


def to_csv(rows: Mapping[str, Sequence[Row]]) -> str:
  """One line per split, arm and figure."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(
      [
          'split',
          'arm',
          'retrains',
          'figure',
          'mean',
          'half_range',
          'low',
          'high',
      ]
  )
  for split, arms in rows.items():
    for row in arms:
      figures = dict(row.figures)
      if row.change is not None:
        figures['change_of_churn'] = row.change
      for key, f in figures.items():
        writer.writerow(
            [split, row.arm, row.retrains, key]
            + [repr(x) for x in (f.mean, f.half_range, f.low, f.high)]
        )
  return out.getvalue()


def to_tree(row: Row) -> dict[str, Any]:
  """A row with the figures of every retrain and pair, for JSON."""
  return {
      'arm': row.arm,
      'title': row.title,
      'retrains': row.retrains,
      'figures': {key: f._asdict() for key, f in row.figures.items()},
      'change_of_churn': None if row.change is None else row.change._asdict(),
  }
