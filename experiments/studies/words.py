"""What pages of studies say: estimates as text, and the prose of `words.jinja`.

Nothing is escaped here; that is the matter of `reports.pages`.
"""

import functools
import math
import pathlib
from typing import Any

import jinja2

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


def percent(found: Estimate | None) -> str:
  """Returns `-38 % [-41, -35]`; '-' for what cannot be compared."""
  if found is None or not math.isfinite(found.mean):
    return '-'
  ends = f' [{100 * found.low:+.0f}, {100 * found.high:+.0f}]'
  known = not math.isnan(found.low)
  return f'{100 * found.mean:+.0f} %{ends if known else ""}'


# --- Prose -------------------------------------------------------------------


def paragraphs(macro: str, **values: Any) -> list[str]:
  """Returns the paragraphs that a macro of `words.jinja` makes of values."""
  text = getattr(_prose(), macro)(**values)
  joined = (' '.join(paragraph.split()) for paragraph in text.split('\n\n'))
  return [paragraph for paragraph in joined if paragraph]


def paragraph(macro: str, **values: Any) -> str:
  """Returns the one paragraph that a macro makes."""
  (found,) = paragraphs(macro, **values)
  return found


@functools.cache
def _prose() -> Any:
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
  )
  environment.filters |= {
      'number': number,
      'estimate': estimate,
      'percent': percent,
      'count': count,
  }
  return environment.get_template('words.jinja').module
