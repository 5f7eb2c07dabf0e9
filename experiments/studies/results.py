"""What a study has measured, and the validation curves of its runs.

Numpy only. Shape suffix: N evaluations of a run, in order.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WINDOW = 3
_FEW = 12


class Run(NamedTuple):
  """One training of one arm, or what an ensemble of its groups would do.

  Attributes:
    arm: Its name.
    seed: Its seed; runs of one seed in different arms see the same data order.
    rate: Learning rate.
    tuning: Whether it was only there to choose the rate.
    steps_N: Updates done at each evaluation, of each group.
    loss_N: Validation loss in nats, the mean over groups.
    accuracy_N: Validation accuracy; empty for a task without it.
    examples_per_step: Of all groups together.
    flops_N: FLOPs spent until each evaluation, by all groups, with teachers.
    bytes_N: Bytes that one worker or group has received until then.
    prior_steps: Steps that had to be done before the first one: of teachers
      that were trained before, all of them together.
    prior_flops: Their FLOPs.
    diverged_at: The step at which loss or gradient were no longer finite; the
      run ends there. None if that did not happen.
    seconds: Wall time of the training, on the machine that it ran on.
  """

  arm: str
  seed: int
  rate: float
  tuning: bool
  steps_N: np.ndarray
  loss_N: np.ndarray
  accuracy_N: np.ndarray
  examples_per_step: float
  flops_N: np.ndarray
  bytes_N: np.ndarray
  prior_steps: float = 0.0
  prior_flops: float = 0.0
  diverged_at: int | None = None
  seconds: float = float('nan')


# --- Curves ------------------------------------------------------------------


class Band(NamedTuple):
  """A curve over seeds: mean and range at the evaluations that all have."""

  x_N: np.ndarray
  mean_N: np.ndarray
  low_N: np.ndarray
  high_N: np.ndarray


def window_of(baseline: Sequence[Run]) -> int:
  """Returns k: 3, or 1 where the baseline has fewer than 12 evaluations."""
  counts = [len(r.loss_N) for r in baseline if diverged_at(r) is None]
  return _WINDOW if counts and min(counts) >= _FEW else 1


def smooth(values_N: np.ndarray, window: int) -> np.ndarray:
  """Returns trailing means over `window` evaluations, fewer at the start."""
  values_N = np.asarray(values_N, np.float64)
  starts = [max(0, i - window + 1) for i in range(len(values_N))]
  return np.array([values_N[s : i + 1].mean() for i, s in enumerate(starts)])


def diverged_at(run: Run) -> int | None:
  """Returns the step of divergence, also if only an evaluation shows it."""
  if run.diverged_at is not None:
    return run.diverged_at
  bad = np.flatnonzero(~np.isfinite(run.loss_N))
  return int(run.steps_N[bad[0]]) if len(bad) else None


def band(
    runs: Sequence[Run], window: int, x: str, y: str = 'loss'
) -> Band | None:
  """Returns a smoothed curve over the runs of an arm that did not diverge.

  Args:
    runs: Of one arm.
    window: k.
    x: 'steps', 'flops' (with those of the teachers before) or 'bytes'.
    y: 'loss' or 'accuracy'.

  Returns:
    None if no run has such values, or they share no evaluation.
  """
  runs = [
      r for r in runs if diverged_at(r) is None and len(getattr(r, f'{y}_N'))
  ]
  if not runs:
    return None
  steps = functools.reduce(np.intersect1d, [r.steps_N for r in runs])
  if not len(steps):
    return None
  at = [np.searchsorted(r.steps_N, steps) for r in runs]
  ys = [smooth(getattr(r, f'{y}_N'), window)[i] for r, i in zip(runs, at)]
  before = [r.prior_flops if x == 'flops' else 0.0 for r in runs]
  xs = [getattr(r, f'{x}_N')[i] + b for r, i, b in zip(runs, at, before)]
  mean, low, high = (f(ys, axis=0) for f in (np.mean, np.min, np.max))
  return Band(np.mean(xs, axis=0), mean, low, high)
