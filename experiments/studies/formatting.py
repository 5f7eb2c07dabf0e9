"""Numbers, figures and cells of a study as text."""

import math

from codistill_jax.statistics import Estimate
from experiments.studies import analysis
from experiments.studies.analysis import Cell


def count(number: int, noun: str) -> str:
  """`1 seed`, `3 seeds`."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def sentence_start(text: str) -> str:
  """With a capital."""
  return text[:1].upper() + text[1:]


def number(measure: str, value: float) -> str:
  """A value with the digits of its measure."""
  if math.isnan(value):
    return '-'
  if measure == 'compute_to_target':
    return f'{value:.3g}'.replace('e+', 'e')
  if measure in analysis.RATIOS:
    return f'{value:,.0f}'
  return f'{value:.2%}' if measure == analysis.ACCURACY else f'{value:.4f}'


def figure(measure: str, found: Estimate, interval: bool = True) -> str:
  """`1,234 ± 56 [1,100, 1,400]`."""
  text = number(measure, found.mean)
  if len(found.values) > 1:
    text += f' ± {number(measure, found.half_range)}'
  if interval and not math.isnan(found.low):
    ends = (number(measure, found.low), number(measure, found.high))
    text += f' [{", ".join(ends)}]'
  return text


def ratio(found: Estimate) -> str:
  """`0.83 [0.78, 0.88]`."""
  if math.isnan(found.low):
    return f'{found.mean:.3g}'
  return f'{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]'


def cell(measure: str, found: Cell, interval: bool = True) -> str:
  """One arm by one measure, for a table."""
  seeds = len(found.outcomes)
  if not seeds:
    return 'not trained'
  diverged = found.count(analysis.DIVERGED)
  if diverged == seeds:
    return 'diverged'
  if found.figure is not None:
    text = figure(measure, found.figure, interval)
    left = seeds - diverged
    return f'{text} ({left} of {seeds} seeds)' if diverged else text
  reached = found.count(analysis.MEASURED)
  missed = found.count(analysis.NOT_REACHED)
  if not missed:
    return '-'
  if not reached:
    return 'not reached'
  return f'reached in {reached} of {seeds} seeds'
