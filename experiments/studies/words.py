"""What pages of studies say: estimates as text, and the prose of `words.jinja`.

Nothing is escaped here; that is the matter of `reports.pages`.
"""

import math
from typing import Any

from codistill_jax.statistics import Estimate

from ..reports import pages


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


paragraphs = pages.prose(
    __file__, {'number': number, 'estimate': estimate, 'percent': percent}
)


def paragraph(macro: str, **values: Any) -> str:
  """Returns the one paragraph that a macro of `words.jinja` makes of values."""
  (found,) = paragraphs(macro, **values)
  return found
