"""A comparison in words, by rules that do not know what we hoped for.

An effect is the mean over seeds of the ratio (steps, compute) or difference
(losses, accuracy) of an arm to another, with its 95 % interval; no effect is a
ratio of 1 or a difference of 0.

Where the paper leads us to expect less (or more, the other way round):
* 'as in the paper': the whole interval lies on that side of no effect. It is
  about the direction, not the size.
* "in the paper's direction, but the interval includes no effect": the mean
  does, the interval does not.
* 'no difference seen': the interval includes no effect, and the mean does not
  lie on that side.
* 'opposite to the paper': the whole interval lies on the other side.

Where it leads us to expect the same:
* 'as in the paper': the whole interval lies within 10 % (losses: within 1 % of
  the other's) of no effect.
* 'no difference seen': it is wider than that, but includes no effect.
* 'opposite to the paper': it neither lies within nor includes no effect.

Steps and compute to a target are known to one evaluation: arms whose means are
no further apart than the distance between two have 'no difference seen',
whatever the interval, and are 'as in the paper' where the same is expected only
if that distance is within the 10 % too.

An arm of which every seed of at least three diverged, where none of the other's
did, has more.

'cannot be said (why)': fewer than three seeds, which give no interval; a target
that some seeds reach and others do not; a measure that these runs do not have.
Where in each of at least three seeds one of the two arms reaches the target and
the other, always the same one, does not although it went on for as long, the
direction is known without a ratio: the arm that does not has more.
"""

import math
from typing import NamedTuple

from experiments.studies import analysis, formatting, wording
from experiments.studies.analysis import Analysis, Effect, Outcome
from experiments.studies.declaration import Comparison

AS = 'as in the paper'
TOWARDS = "in the paper's direction, but the interval includes no effect"
NONE = 'no difference seen'
OPPOSITE = 'opposite to the paper'
CANNOT = 'cannot be said'

_EXPECT = ('less', 'more', 'equal')
_LEAST_SEEDS = 3
_RATIO_MARGIN = 0.1
_LOSS_MARGIN = 0.01


class Verdict(NamedTuple):
  """What came of a comparison.

  Attributes:
    comparison: As declared.
    words: One of those above; `CANNOT` with its reason in brackets.
    effect: The numbers.
    sentence: Both, for the page.
  """

  comparison: Comparison
  words: str
  effect: Effect
  sentence: str


def judge(found: Analysis, comparison: Comparison) -> Verdict:
  """Applies the rules.

  Raises:
    ValueError: If an arm or `expect` of the comparison is not known.
  """
  for arm in (comparison.arm, comparison.against):
    if arm not in found.runs:
      raise ValueError(
          f'A comparison names arm {arm!r}, but {found.study.name} has'
          f' {", ".join(found.runs)}.'
      )
  if comparison.expect not in _EXPECT:
    raise ValueError(
        f'Expected expect to be one of {", ".join(_EXPECT)}, got'
        f' {comparison.expect!r}.'
    )
  effect = analysis.effect(
      found, comparison.arm, comparison.against, comparison.measure
  )
  words = words_of(effect, comparison)
  sentence = wording.comparison(found.study, comparison, effect, words)
  return Verdict(comparison, words, effect, sentence)


def words_of(effect: Effect, comparison: Comparison) -> str:
  """The rules, applied to numbers."""
  if len(effect.ours) >= _LEAST_SEEDS and effect.one_side_diverged:
    return AS if comparison.expect == effect.one_side_diverged else OPPOSITE
  if effect.figure is None:
    return _without_figure(effect, comparison)
  if effect.pairs < _LEAST_SEEDS:
    return (
        f'{CANNOT} ({formatting.count(effect.pairs, "seed")} of both arms: an'
        f' interval needs {_LEAST_SEEDS})'
    )
  if comparison.expect == 'equal':
    return _equal(effect)
  if effect.within_resolution:
    return NONE
  sign = 1 if comparison.expect == 'more' else -1
  mean, low, high = _centred(effect)
  ends = (low, high) if sign > 0 else (-high, -low)
  if ends[0] > 0:
    return AS
  if ends[1] < 0:
    return OPPOSITE
  return TOWARDS if sign * mean > 0 else NONE


def _centred(effect: Effect) -> tuple[float, float, float]:
  """Mean, low and high with no effect at 0."""
  f = effect.figure
  values = (f.mean, f.low, f.high)
  if not effect.ratio:
    return values
  # The interval of a ratio may reach below 0.
  return tuple(math.log(v) if v > 0 else -math.inf for v in values)


def _equal(effect: Effect) -> str:
  _, low, high = _centred(effect)
  margin = (
      math.log1p(_RATIO_MARGIN)
      if effect.ratio
      else _LOSS_MARGIN * abs(effect.baseline)
  )
  coarse = effect.resolution > _RATIO_MARGIN * effect.baseline
  if -margin <= low and high <= margin:
    return NONE if coarse else AS
  return NONE if low <= 0 <= high or effect.within_resolution else OPPOSITE


def _without_figure(effect: Effect, comparison: Comparison) -> str:
  pairs = list(zip(effect.ours, effect.theirs))
  if not pairs:
    return f'{CANNOT} (no seed in which both arms were trained)'
  directions = {_direction(a, b) for a, b in pairs}
  if len(pairs) >= _LEAST_SEEDS and directions in ({'less'}, {'more'}):
    return AS if comparison.expect in directions else OPPOSITE
  return f'{CANNOT} ({wording.why_no_figure(effect)})'


def _direction(a: Outcome, b: Outcome) -> str:
  """What is known of a pair of which one has not reached the target."""
  if a.state == analysis.MEASURED and a.value <= b.at_least:
    return 'less'
  if b.state == analysis.MEASURED and b.value <= a.at_least:
    return 'more'
  return ''
