"""Validation curves of runs: smoothed, checked for divergence, over seeds.

Numpy only. Shape suffix: N evaluations of a run.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.studies.results import Run

_WINDOW = 3
_FEW = 12


def window_of(baseline: Sequence[Run]) -> int:
  """k: 3, or 1 where the baseline has fewer than 12 evaluations."""
  counts = [len(r.loss_N) for r in baseline if diverged_at(r) is None]
  return _WINDOW if counts and min(counts) >= _FEW else 1


def smooth(values_N: np.ndarray, window: int) -> np.ndarray:
  """Trailing mean over `window` evaluations, fewer at the start; (N,)."""
  values_N = np.asarray(values_N, np.float64)
  starts = [max(0, i - window + 1) for i in range(len(values_N))]
  return np.array([values_N[s : i + 1].mean() for i, s in enumerate(starts)])


def diverged_at(run: Run) -> int | None:
  """The step at which a run diverged, also if only an evaluation shows it."""
  if run.diverged_at is not None:
    return run.diverged_at
  bad = np.flatnonzero(~np.isfinite(run.loss_N))
  return int(run.steps_N[bad[0]]) if len(bad) else None


class Band(NamedTuple):
  """A curve over seeds: mean and range at the evaluations that all have."""

  x_N: np.ndarray
  mean_N: np.ndarray
  low_N: np.ndarray
  high_N: np.ndarray


def band(
    runs: Sequence[Run], window: int, x: str, y: str = 'loss'
) -> Band | None:
  """A smoothed curve over the runs of an arm that did not diverge.

  Args:
    runs: Of one arm.
    window: k.
    x: 'steps', 'flops' (with those of the teachers before) or 'bytes'.
    y: 'loss' or 'accuracy'.

  Returns:
    None if no run has such values, or they share no evaluation.
  """
  runs = [r for r in runs if diverged_at(r) is None]
  runs = [r for r in runs if len(getattr(r, f'{y}_N'))]
  if not runs:
    return None
  steps = functools.reduce(np.intersect1d, [r.steps_N for r in runs])
  if not len(steps):
    return None
  at = [np.searchsorted(r.steps_N, steps) for r in runs]
  ys = [smooth(getattr(r, f'{y}_N'), window)[i] for r, i in zip(runs, at)]
  xs = [_places(r, x)[i] for r, i in zip(runs, at)]
  mean, low, high = (f(ys, axis=0) for f in (np.mean, np.min, np.max))
  return Band(np.mean(xs, axis=0), mean, low, high)


def _places(run: Run, x: str) -> np.ndarray:
  before = run.prior_flops if x == 'flops' else 0.0
  return getattr(run, f'{x}_N') + before
