"""Estimates as text, and small matters of language."""

import math

from codistill_jax.statistics import Estimate
from experiments.reports import pages


def count(number: int, noun: str) -> str:
  """Returns `1 seed`, `3 seeds`."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def sentence_start(text: str) -> str:
  """Returns the text with a capital."""
  return text[:1].upper() + text[1:]


def number(value: float, form: str) -> str:
  """Returns a number; '-' for NaN."""
  return pages.number(value, form, nan='-').replace('e+', 'e')


def estimate(
    found: Estimate, form: str, *, spread: bool = False, interval: bool = True
) -> str:
  """Returns `1,234 ± 56 [1,100, 1,400]`, with what is known and asked for.

  Args:
    found: The estimate.
    form: A format specification.
    spread: Whether to show half of maximum minus minimum.
    interval: Whether to show the 95 % interval.
  """
  text = number(found.mean, form)
  if spread and len(found.values) > 1:
    text += f' ± {number(found.half_range, form)}'
  if interval and not math.isnan(found.low):
    text += f' [{number(found.low, form)}, {number(found.high, form)}]'
  return text
