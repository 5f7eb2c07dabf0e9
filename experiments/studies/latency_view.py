"""The view 'latency': wall time of the measured steps, and beyond, on paper."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.report_pages import Block, Bullets, Heading, Paragraph, Table
from experiments.report_table import size
from experiments.studies import analysis, curves, latency
from experiments.studies.analysis import Analysis
from experiments.studies.declaration import Arm
from experiments.studies.latency import Crossover, Empirical, Fit, Latency
from experiments.studies.results import Setting

ONE, TWO = 'one group', 'two groups'
# How much longer than the median one step in a hundred is.
_TAILS = (1.2, 1.5, 2.0, 3.0, 5.0)


class Measured(NamedTuple):
  """What the runs give to the model.

  Attributes:
    one: Mean steps to the target by workers, of one group.
    two: Those of each of two groups, by workers of each.
    ratio: Steps of two groups over those of one, at `at` workers; NaN if no
      number of workers was measured with both.
    compute: FLOPs of an update of a group of two over those of one alone.
    at: The largest number of workers with both; 0 without.
  """

  one: dict[int, float]
  two: dict[int, float]
  ratio: float
  compute: float
  at: int


def measure(found: Analysis) -> Measured:
  """Steps to the target where all seeds reach it; their ratio and cost."""
  arms = {
      series: {a.workers: a for a in found.study.arms if a.series == series}
      for series in (ONE, TWO)
  }
  one, two = (_steps(found, arms[series]) for series in (ONE, TWO))
  both = sorted(one.keys() & two.keys())
  if not both:
    return Measured(one, two, float('nan'), float('nan'), 0)
  at = both[-1]
  effect = analysis.effect(
      found, arms[TWO][at].name, arms[ONE][at].name, 'steps_to_target'
  )
  ratio = effect.figure.mean if effect.figure else two[at] / one[at]
  costs = [_flops_per_update(found, arms[series][at]) for series in (TWO, ONE)]
  return Measured(one, two, ratio, costs[0] / costs[1], at)


def _steps(found: Analysis, arms: dict[int, Arm]) -> dict[int, float]:
  steps = {}
  for workers, arm in sorted(arms.items()):
    figure = analysis.cell(found, arm.name, 'steps_to_target').figure
    if figure is not None and figure.mean > 0:
      steps[workers] = figure.mean
  return steps


def _flops_per_update(found: Analysis, arm: Arm) -> float:
  """Of one group; with teachers, burn-in averaged in."""
  runs = [r for r in found.runs[arm.name] if curves.diverged_at(r) is None]
  rates = [r.flops_N[-1] / r.steps_N[-1] for r in runs]
  return float(np.mean(rates)) / arm.num_groups


def blocks(found: Analysis, setting: Setting, assumed: Latency) -> list[Block]:
  """Plot, words and assumptions; one sentence if the runs do not suffice."""
  from experiments.studies import latency_plot

  measured = measure(found)
  heading = Heading('Wall time, on paper')
  if len(measured.one) < 3:
    return [
        heading,
        Paragraph(
            'No wall time: the target was reached in every seed at'
            f' {len(measured.one)} number(s) of workers of one group, and the'
            ' curve of steps needs three.'
        ),
    ]
  fit = latency.fit_steps(list(measured.one), list(measured.one.values()))
  crossing = cross(measured, fit, assumed, setting.bytes_of_model)
  made = [heading, Paragraph(_said(measured, fit, crossing))]
  made.append(latency_plot.make_plot(measured, fit, assumed, setting, crossing))
  made.append(Table(*_times(measured, fit, assumed, setting), names=0))
  if crossing is not None:
    made.append(Paragraph('The same for shorter and longer tails:'))
    made.append(Table(*_tails(measured, fit, assumed, setting), names=0))
  made.append(Bullets(_assumptions(measured, fit, assumed, setting)))
  return made


def steps_of_one(measured: Measured, fit: Fit, workers: int) -> float:
  """As measured; beyond and between by the fit."""
  return measured.one.get(workers, fit.steps(workers))


def cross(
    measured: Measured, fit: Fit, assumed: Latency, parameter_bytes: float
) -> Crossover | None:
  """One group against two; None without a measured ratio."""
  if not measured.at:
    return None
  return latency.crossover(
      lambda workers: steps_of_one(measured, fit, workers),
      measured.ratio,
      measured.compute,
      assumed,
      parameter_bytes,
      smallest=min(measured.one),
  )


# --- Words -------------------------------------------------------------------


def _said(measured: Measured, fit: Fit, found: Crossover | None) -> str:
  largest = max(measured.one)
  text = (
      f'Steps to the target were measured up to {largest:,} workers of one'
      f' group; beyond, on paper, they follow S(W) = {fit.floor:,.0f} (1 +'
      f' {fit.critical:.3g} / W), fitted to {len(measured.one)} points (root'
      f' mean square error {fit.error:.1%}).'
  )
  if found is None:
    return (
        f'{text} No number of workers was measured with one and with two'
        ' groups, so there is no crossover to compute.'
    )
  text += (
      f' At {measured.at:,} workers each of two groups needs'
      f' {measured.ratio:.2f} times the steps of one.'
  )
  if found.first is None:
    return (
        f'{text} With that, two groups of W never stay ahead of one group of'
        f' 2 W up to 2 W = {2 * found.workers_K[-1]:,} workers.'
    )
  on_paper = '' if 2 * found.first <= largest else ' (on paper)'
  gain = found.one_K[-1] / found.two_K[-1]
  return (
      f'{text} With that, two groups of W are faster than one group of 2 W from'
      f' W = {found.first:,} on{on_paper}; at 2 W ='
      f' {2 * found.workers_K[-1]:,} by a factor of {gain:.2f}.'
  )


def _assumptions(
    measured: Measured, fit: Fit, assumed: Latency, setting: Setting
) -> list[str]:
  lines = [
      f'Assumed: {_distribution(assumed)}; an all-reduce takes'
      f' {assumed.alpha:g} and {_per_byte(assumed, setting)}. Time is in median'
      ' steps of one worker.',
      'Step times of workers are independent and all alike; every update waits'
      ' for the slowest; the all-reduce does not overlap with computation, and'
      ' its fixed cost does not grow with W.',
      'Each worker keeps its batch, so the group batch grows with W.',
      f'Steps do not fall below the fitted {fit.floor:,.0f}.'
      + _floor_unknown(measured, fit),
  ]
  if measured.at:
    lines.append(
        f'The ratio of {measured.ratio:.2f} holds at every W, though it was'
        f' measured at {measured.at:,}; an update with teachers costs'
        f' {measured.compute:.2f} times one without, as the FLOPs of the runs'
        ' say; groups do not wait for each other, and exchanges cost no time.'
    )
  return lines


def _floor_unknown(measured: Measured, fit: Fit) -> str:
  if max(measured.one) > fit.critical:
    return ''
  return (
      ' No number of workers that was measured is above the fitted'
      f' {fit.critical:.3g}, so the fit says little of that floor.'
  )


def _distribution(assumed: Latency) -> str:
  if isinstance(assumed.steps, Empirical):
    return (
        f'step times as in a sample of {len(assumed.steps.sample):,}, with no'
        ' tail beyond it'
    )
  median, p99 = assumed.steps
  return f'log-normal step times, median {median:g}, 99th percentile {p99:g}'


def _per_byte(assumed: Latency, setting: Setting) -> str:
  model = size(setting.bytes_of_model)
  if assumed.beta is None:
    time = f'{assumed.model_time:g}'
  else:
    time = f'{assumed.beta * setting.bytes_of_model:.3g}'
  return f'{time} for each {model} (one model) that a worker receives'


# --- Tables ------------------------------------------------------------------


def doublings(measured: Measured, assumed: Latency) -> list[int]:
  """Numbers of workers: those measured, then twice as many each time."""
  workers = sorted(measured.one)
  while 2 * workers[-1] <= assumed.most_workers:
    workers.append(2 * workers[-1])
  return workers


def _times(
    measured: Measured, fit: Fit, assumed: Latency, setting: Setting
) -> tuple[list[str], list[list[str]]]:
  header = ['workers in all', 'steps, one group', 'time of an update']
  header += ['time to target, one group']
  if measured.at:
    header.append('two groups of half as many')
  rows = []
  for workers in doublings(measured, assumed):
    steps = steps_of_one(measured, fit, workers)
    update = latency.step_time(assumed, workers, setting.bytes_of_model)
    paper = '' if workers in measured.one else ' (fit)'
    row = [f'{workers:,}', f'{steps:,.0f}{paper}', f'{update:.2f}']
    row.append(f'{steps * update:,.0f}')
    if measured.at:
      row.append(_half_each(measured, fit, assumed, setting, workers))
    rows.append(row)
  return header, rows


def _half_each(measured, fit, assumed, setting, workers: int) -> str:
  if workers % 2:
    return '-'
  time = time_of_two(measured, fit, assumed, setting, workers // 2)
  return f'{time:,.0f}'


def time_of_two(
    measured: Measured,
    fit: Fit,
    assumed: Latency,
    setting: Setting,
    workers: int,
) -> float:
  """Time to the target of two groups of so many workers each."""
  steps = measured.ratio * steps_of_one(measured, fit, workers)
  return steps * latency.step_time(
      assumed, workers, setting.bytes_of_model, measured.compute
  )


def _tails(
    measured: Measured, fit: Fit, assumed: Latency, setting: Setting
) -> tuple[list[str], list[list[str]]]:
  header = ['99th percentile / median', 'two groups faster from W']
  header += ['factor at the largest W']
  rows = []
  for tail in _TAILS:
    other = assumed._replace(steps=latency.LogNormal(1.0, tail))
    found = cross(measured, fit, other, setting.bytes_of_model)
    gain = found.one_K[-1] / found.two_K[-1]
    first = '-' if found.first is None else f'{found.first:,}'
    rows.append([f'{tail:g}', first, f'{gain:.2f}'])
  return header, rows


def measured_two(
    measured: Measured, assumed: Latency, parameter_bytes: float
) -> tuple[Sequence[int], Sequence[float]]:
  """Workers in all and time to the target, where two groups were measured."""
  workers = [2 * w for w in measured.two]
  times = [
      steps * latency.step_time(assumed, w, parameter_bytes, measured.compute)
      for w, steps in measured.two.items()
  ]
  return workers, times
