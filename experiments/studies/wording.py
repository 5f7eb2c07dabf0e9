"""What the page of a study says in words; every number comes from its runs."""

import math
from collections.abc import Iterable, Mapping, Sequence

from codistill_jax.statistics import Estimate
from experiments.studies import analysis, curves
from experiments.studies.analysis import ALL_MEASURES, Analysis, Effect
from experiments.studies.declaration import Arm, Comparison, Study
from experiments.studies.formatting import (
    count,
    number,
    ratio,
    sentence_start,
)
from experiments.studies.results import Run, Setting

VERDICTS = (
    'An effect is the mean over seeds of the ratio (steps, compute; geometric'
    ' mean) or the difference (losses, accuracy) of one arm to another of the'
    ' same seed, with its 95 % interval.',
    "'As in the paper': the whole interval lies on the side that the paper"
    ' leads us to expect; about the direction, not the size. "In the paper\'s'
    ' direction, but the interval includes no effect": the mean does, the'
    " interval does not. 'No difference seen': the interval includes no effect,"
    " and the mean does not lie on that side. 'Opposite to the paper': the"
    ' whole interval lies on the other side.',
    "Where the same is expected: 'as in the paper' if the whole interval lies"
    " within 10 % (losses: 1 %) of no effect, 'no difference seen' if it is"
    " wider but includes no effect, else 'opposite to the paper'.",
    'Steps and compute to a target are known to one evaluation: arms whose'
    " means are no further apart than that have 'no difference seen', whatever"
    ' the interval; and so have arms that should be the same if it is more than'
    ' 10 %.',
    "'Cannot be said': fewer than three seeds, a target that some seeds reach"
    ' and others do not, or a measure that these runs do not have. If in all of'
    ' at least three seeds one arm reaches the target and the other does not,'
    ' though it went on for as long, the direction is known without a ratio.',
    'Intervals are for the mean over seeds: the standard error of a bootstrap'
    " of seeds, with the quantile of Student's t; seeded. Three seeds know"
    ' their own spread badly, so their intervals are wide.',
)


# How the `paper` of a comparison begins that the paper did not make.
_OURS = 'not in the paper'
_EXPECTED = {
    'as in the paper': 'as expected',
    "in the paper's direction": 'in the expected direction',
    'opposite to the paper': 'opposite to what was expected',
}
_LONG = {
    **ALL_MEASURES,
    'total_steps_to_target': (
        "steps to the baseline's best validation loss, with those of the"
        ' teachers before'
    ),
    'compute_to_target': (
        "FLOPs of all groups and teachers to the baseline's best validation"
        ' loss'
    ),
}


# --- Comparisons -------------------------------------------------------------


def comparison(
    study: Study, compared: Comparison, effect: Effect, words: str
) -> str:
  """The sentence of a verdict."""
  titles = {arm.name: arm.title for arm in study.arms}
  paper = f'The paper: {compared.paper}.'
  if compared.paper.startswith(_OURS):
    paper = f'{sentence_start(compared.paper)}.'
    for of_paper, ours in _EXPECTED.items():
      words = words.replace(of_paper, ours)
  return (
      f'{sentence_start(titles[compared.arm])} against'
      f' {titles[compared.against]}, {_LONG[compared.measure]}:'
      f' {_said(compared, effect, titles)}: {words}. {paper}'
  )


def _said(
    compared: Comparison, effect: Effect, titles: Mapping[str, str]
) -> str:
  if effect.figure is None:
    return _reached(effect, titles[compared.against])
  seeds = count(effect.pairs, 'seed')
  left_out = len(effect.ours) - effect.pairs
  if left_out > 0:  # Retrains of churn have no outcomes of their own.
    seeds += f', {left_out} left out for divergence'
  if effect.ratio:
    apart = ', one evaluation apart or less' if effect.within_resolution else ''
    return f'{_times(effect.figure)}{apart} ({seeds})'
  sign = '+' if effect.figure.mean > 0 else ''
  found = effect.figure
  text = sign + number(compared.measure, found.mean)
  if not math.isnan(found.low):
    low, high = (number(compared.measure, x) for x in (found.low, found.high))
    text += f' [{low}, {high}]'
  points = ', in points,' if compared.measure == analysis.ACCURACY else ''
  return f'a difference{points} of {text} ({seeds})'


def _times(found: Estimate) -> str:
  text = f'a ratio of {ratio(found)}'
  if found.mean < 0.995:
    return f'{text}, {1 / found.mean:.2f} times less'
  if found.mean > 1.005:
    return f'{text}, {found.mean:.2f} times as much'
  return text


def _reached(effect: Effect, against: str) -> str:
  outcomes = (effect.ours, effect.theirs)
  states = {o.state for side in outcomes for o in side}
  if effect.one_side_diverged:
    diverged = [o for side in outcomes for o in side if _is_diverged(o)]
    whose = '' if effect.one_side_diverged == 'more' else f'{against} '
    total = count(len(effect.ours), 'seed')
    return f'{whose}diverged in {len(diverged)} of {total}'
  if analysis.NOT_REACHED not in states:
    return 'no number'
  seeds = len(effect.ours)
  reached = [
      sum(o.state == analysis.MEASURED for o in side) for side in outcomes
  ]
  return (
      f'reached in {reached[0]} of {count(seeds, "seed")}, by {against} in'
      f' {reached[1]}; no ratio'
  )


def _is_diverged(outcome: analysis.Outcome) -> bool:
  return outcome.state == analysis.DIVERGED


def why_no_figure(effect: Effect) -> str:
  """The reason in a few words."""
  outcomes = [*effect.ours, *effect.theirs]
  states = {o.state for o in outcomes}
  pairs = zip(effect.ours, effect.theirs)
  if all(
      analysis.DIVERGED in (a.state, b.state) for a, b in pairs
  ):  # Each seed has one that did.
    return 'in every seed one of the two diverged'
  if analysis.NOT_REACHED in states:
    return 'the target was not reached in all seeds'
  if analysis.NO_TARGET in states:
    return 'the baseline of a seed diverged or is missing: no target'
  if analysis.ABSENT in states:
    return 'these runs do not measure it'
  return 'it was reached before the first update'


# --- Settings ----------------------------------------------------------------


def settings(study: Study, setting: Setting) -> str:
  """What all arms have in common, in one line."""
  s = setting
  rows = f' rows of {s.rows}' if s.rows else f' {s.example}s'
  groups = sorted({arm.num_groups for arm in study.arms})
  said = str(groups[0]) if len(groups) == 1 else f'{groups[0]} to {groups[-1]}'
  parts = (
      f'data set: {s.data}',
      f'G = {said} (each arm in the table), R = {s.replicas}',
      f'group batch {s.group_batch:,}{rows} for'
      f' {_title(study, study.baseline)}',
      f'{count(s.seeds, "seed")} of each arm',
      f'{s.num_steps:,} steps of each group'
      f' ({s.num_steps * s.examples:,} {s.example}s for'
      f' {_title(study, study.baseline)})',
      f'exchange every {s.exchange_every:,}',
      f'model: {s.model.rstrip(".")}, {s.model_parameters:,} parameters',
      f'scale {s.scale}, {machine(s)}',
  )
  return sentence_start('; '.join(parts)) + '.'


def claim(study: Study) -> str:
  """What the paper says, or whoever else does."""
  if study.source.startswith(_OURS):
    return f'The claim ({study.source}): {study.claim}'
  return f'The paper ({study.source}): {study.claim}'


def machine(setting: Setting) -> str:
  """Named by its cores only, or the kind of its accelerator."""
  if setting.cores:
    return count(setting.cores, 'CPU core')
  return f'one {setting.device}'


def rules(found: Analysis) -> list[str]:
  """How numbers were made from runs."""
  k = found.window
  smoothing = (
      f'a trailing mean over {k} evaluations, fewer at the start'
      if k > 1
      else 'none, since there are fewer than 12 evaluations'
  )
  title = _title(found.study, found.study.baseline)
  return [
      f'Validation loss is the mean over the groups of a run. Smoothing, the'
      f' same for all arms: {smoothing}.',
      f'The target of a seed is the best smoothed validation loss of {title} of'
      ' the same seed. Steps to it are those of the first evaluation at or'
      ' under it, without interpolation, counted for each group; compute is of'
      ' all groups and teachers. An arm that does not reach it in every seed'
      ' has no mean. An arm as good as the baseline has no fixed number: the'
      ' best of a flat and noisy curve may be early or late.',
      'Loss at the end is that of the last evaluation, not smoothed; the best'
      ' loss is the smallest smoothed one.',
      '± is half of maximum minus minimum over seeds; brackets are 95 %'
      ' intervals of the mean.',
      'A run that diverged (a loss or gradient that is not finite, or a loss'
      ' that went up to twice that of the start for good) is left out'
      ' of means, ratios and curves, and named above.',
  ]


def _title(study: Study, name: str) -> str:
  return next((a.title for a in study.arms if a.name == name), name)


def targets(found: Analysis, setting: Setting) -> str:
  """The target of each seed."""
  if not found.targets:
    return 'There is no target: no run of the baseline ended well.'
  values = ', '.join(
      f'{value:.4f} (seed {seed})' for seed, value in found.targets.items()
  )
  return f'Target, nats per {setting.example}: {values}.'


# --- Divergence --------------------------------------------------------------


def divergences(found: Analysis) -> list[str]:
  """A sentence for each arm of which a run diverged."""
  lines = []
  for arm in found.study.arms:
    runs = found.runs[arm.name]
    at = [curves.diverged_at(run) for run in runs]
    steps = [f'{step:,}' for step in at if step is not None]
    if steps:
      rest = '; its means are of the others' if len(steps) < len(runs) else ''
      lines.append(
          f'{sentence_start(arm.title)} diverged at step {_list(steps)} in'
          f' {len(steps)} of {count(len(runs), "seed")}{rest}.'
      )
  return lines


def _list(words: Iterable[str]) -> str:
  words = list(words)
  if len(words) < 2:
    return ''.join(words)
  return f'{", ".join(words[:-1])} and {words[-1]}'


# --- Learning rates ----------------------------------------------------------


def rates(runs: Sequence[Run]) -> str:
  """Those that were used."""
  known = {run.rate for run in runs if not math.isnan(run.rate)}
  return ', '.join(f'{rate:g}' for rate in sorted(known))


def at_the_edge(arm: Arm, found: Analysis, setting: Setting) -> bool:
  """Whether the chosen rate is the least or the largest of the grid."""
  if len(setting.rates) < 2:
    return False
  ends = (min(setting.rates), max(setting.rates))
  runs = found.runs[arm.name]
  return any(math.isclose(run.rate, end) for run in runs for end in ends)
