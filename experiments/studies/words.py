"""What pages of studies say: estimates, verdicts, and prose of `words.jinja`.

A comparison is put in words by rules that do not know what we hoped for; pages
have them from 'verdict_rules' in `words.jinja`. Nothing is escaped here; that
is the matter of `reports.pages`.
"""

import math
from typing import Any, NamedTuple

from codistill_jax.statistics import Estimate

from ..reports import pages
from ..reports.pages import count, sentence_start
from . import analysis
from .analysis import DIVERGED, MEASURED, NOT_REACHED, Analysis, Effect, Score
from .study_plan import MEASURES, Comparison, Study


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


# --- Verdicts ----------------------------------------------------------------

AS = 'as in the paper'
TOWARDS = "in the paper's direction, but the interval includes no effect"
NONE = 'no difference seen'
OPPOSITE = 'opposite to the paper'
CANNOT = 'cannot be said'

_LEAST_SEEDS = 3
_RATIO_MARGIN = 0.1
_LOSS_MARGIN = 0.01
# How the `paper` of a comparison begins that the paper did not make.
NOT_OF_THE_PAPER = 'not in the paper'
_OURS = {
    'as in the paper': 'as expected',
    "in the paper's direction": 'in the expected direction',
    'opposite to the paper': 'opposite to what was expected',
}


class Verdict(NamedTuple):
  """What came of a comparison.

  Attributes:
    words: One of those above; `CANNOT` with its reason in brackets.
    effect: The numbers.
    sentence: Both, for the page.
  """

  words: str
  effect: Effect
  sentence: str


def judge(found: Analysis, comparison: Comparison) -> Verdict:
  """Applies the rules."""
  effect = analysis.effect(
      found, comparison.arm, comparison.against, comparison.measure
  )
  return of_effect(found.study, comparison, effect)


def of_effect(study: Study, comparison: Comparison, effect: Effect) -> Verdict:
  """Applies the rules to numbers."""
  verdict = _verdict(effect, comparison.expect)
  sentence = _sentence(study, comparison, effect, verdict)
  return Verdict(verdict, effect, sentence)


# --- Rules -------------------------------------------------------------------


def _verdict(effect: Effect, expect: str) -> str:
  if len(effect.ours) >= _LEAST_SEEDS and effect.one_side_diverged:
    return AS if expect == effect.one_side_diverged else OPPOSITE
  if effect.estimate is None:
    return _without_estimate(effect, expect)
  if effect.pairs < _LEAST_SEEDS:
    return (
        f'{CANNOT} ({count(effect.pairs, "seed")} of both arms: an interval'
        f' needs {_LEAST_SEEDS})'
    )
  mean, low, high = _centred(effect)
  if expect == 'equal':
    return _equal(effect, low, high)
  if effect.within_resolution:
    return NONE
  if expect == 'less':
    mean, low, high = -mean, -high, -low
  if low > 0:
    return AS
  if high < 0:
    return OPPOSITE
  return TOWARDS if mean > 0 else NONE


def _centred(effect: Effect) -> tuple[float, float, float]:
  """Returns mean, low and high with no effect at 0."""
  found = effect.estimate
  values = (found.mean, found.low, found.high)
  if not effect.ratio:
    return values
  # The interval of a ratio may reach below 0.
  return tuple(math.log(v) if v > 0 else -math.inf for v in values)


def _equal(effect: Effect, low: float, high: float) -> str:
  margin = (
      math.log1p(_RATIO_MARGIN)
      if effect.ratio
      else _LOSS_MARGIN * abs(effect.baseline)
  )
  if -margin <= low and high <= margin:
    coarse = effect.resolution > _RATIO_MARGIN * effect.baseline
    return NONE if coarse else AS
  return NONE if low <= 0 <= high or effect.within_resolution else OPPOSITE


def _without_estimate(effect: Effect, expect: str) -> str:
  pairs = list(zip(effect.ours, effect.theirs))
  if not pairs:
    return f'{CANNOT} (no seed in which both arms were trained)'
  directions = {_direction(a, b) for a, b in pairs}
  if len(pairs) >= _LEAST_SEEDS and directions in ({'less'}, {'more'}):
    return AS if expect in directions else OPPOSITE
  return f'{CANNOT} ({_reason(pairs)})'


def _direction(a: Score, b: Score) -> str:
  """Returns what is known of a pair of which one did not reach the target."""
  if a.state == MEASURED and a.value <= b.at_least:
    return 'less'
  if b.state == MEASURED and b.value <= a.at_least:
    return 'more'
  return ''


def _reason(pairs: list[tuple[Score, Score]]) -> str:
  """Says why there is no estimate."""
  states = {s.state for pair in pairs for s in pair}
  if all(DIVERGED in (a.state, b.state) for a, b in pairs):
    return 'in every seed one of the two diverged'
  if NOT_REACHED in states:
    return 'the target was not reached in all seeds'
  if analysis.NO_TARGET in states:
    return 'the baseline of a seed diverged or is missing: no target'
  if analysis.ABSENT in states:
    return 'these runs do not measure it'
  return 'it was reached before the first update'


# --- Sentences ---------------------------------------------------------------


def _sentence(
    study: Study, compared: Comparison, effect: Effect, verdict: str
) -> str:
  titles = {arm.name: arm.title for arm in study.arms}
  against = titles[compared.against]
  paper = f'The paper: {compared.paper}.'
  if compared.paper.startswith(NOT_OF_THE_PAPER):
    paper = f'{sentence_start(compared.paper)}.'
    for of_paper, ours in _OURS.items():
      verdict = verdict.replace(of_paper, ours)
  said = (
      _reached(effect, against)
      if effect.estimate is None
      else _numbers(effect, compared.measure)
  )
  return (
      f'{sentence_start(titles[compared.arm])} against {against},'
      f' {MEASURES[compared.measure].title}: {said}: {verdict}. {paper}'
  )


def _numbers(effect: Effect, measure: str) -> str:
  seeds, found = count(effect.pairs, 'seed'), effect.estimate
  left_out = len(effect.ours) - effect.pairs
  if left_out > 0:  # Retrains of churn have no scores of their own.
    seeds += f', {left_out} left out for divergence'
  if effect.ratio:
    apart = ', one evaluation apart or less' if effect.within_resolution else ''
    return f'{_times(found)}{apart} ({seeds})'
  sign = '+' if found.mean > 0 else ''
  text = sign + estimate(found, MEASURES[measure].form)
  points = ', in points,' if measure == 'final_accuracy' else ''
  return f'a difference{points} of {text} ({seeds})'


def _times(found: Estimate) -> str:
  text = f'a ratio of {estimate(found, ".3g")}'
  if found.mean < 0.995:
    return f'{text}, {1 / found.mean:.2f} times less'
  if found.mean > 1.005:
    return f'{text}, {found.mean:.2f} times as much'
  return text


def _reached(effect: Effect, against: str) -> str:
  sides = (effect.ours, effect.theirs)
  counts = lambda state: [sum(s.state == state for s in side) for side in sides]
  seeds = count(len(effect.ours), 'seed')
  if effect.one_side_diverged:
    whose = '' if effect.one_side_diverged == 'more' else f'{against} '
    return f'{whose}diverged in {sum(counts(DIVERGED))} of {seeds}'
  if not any(counts(NOT_REACHED)):
    return 'no number'
  ours, theirs = counts(MEASURED)
  return f'reached in {ours} of {seeds}, by {against} in {theirs}; no ratio'
