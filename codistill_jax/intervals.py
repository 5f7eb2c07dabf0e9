"""Means over retrains and over pairs of them, with bootstrap intervals.

Retrains are resampled, not pairs: the K (K - 1) / 2 pairs of K retrains are not
independent, and a retrain drawn twice makes no pair with itself. Numpy only.

Shape suffixes: K retrains, S resamples.
"""

from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


class Figure(NamedTuple):
  """A mean, how far it spreads, and how far it can be trusted.

  Attributes:
    mean: Over retrains, or over pairs of different retrains.
    half_range: (max - min) / 2 of the values: the +- of Anil et al. 2018.
    low: Lower end of the 95 % interval of the mean, by the standard error of
      the bootstrap and Student's t; NaN for fewer than three retrains.
    high: Its upper end.
    values: One per retrain, or per pair (a, b), a < b, in order.
  """

  mean: float
  half_range: float
  low: float
  high: float
  values: tuple[float, ...]


def over_retrains(values_K: np.ndarray, seed: int = 0) -> Figure:
  """The mean over retrains, such as of their log losses."""
  values_K = np.asarray(values_K, np.float64)
  counts_SK = _resample(len(values_K), seed, different=1)
  return _figure(values_K, _mean(counts_SK, values_K), len(values_K))


def over_pairs(values_KK: np.ndarray, seed: int = 0) -> Figure:
  """The mean over pairs of different retrains, such as of their churn."""
  retrains = len(values_KK)
  values = values_KK[np.triu_indices(retrains, 1)]
  counts_SK = _resample(retrains, seed)
  return _figure(values, _pair_mean(counts_SK, values_KK), retrains)


def change_of_churn(
    arm_KK: np.ndarray, baseline_KK: np.ndarray, seed: int = 0
) -> Figure:
  """Mean churn of an arm over that of a baseline, minus 1: -0.38 is 38 % less.

  Arms of as many retrains are resampled together, retrain by retrain: those of
  one number share their seeds. Others are resampled apart.

  Returns:
    A figure without spread; `values` is the change alone.
  """
  counts_SK = _resample(len(arm_KK), seed)
  same = len(arm_KK) == len(baseline_KK)
  other_SK = counts_SK if same else _resample(len(baseline_KK), seed + 1)
  whole = lambda matrix: matrix[np.triu_indices(len(matrix), 1)].mean()
  # Two deterministic arms have no churn to compare.
  with np.errstate(divide='ignore', invalid='ignore'):
    change = np.divide(whole(arm_KK), whole(baseline_KK)) - 1
    resampled_S = (
        _pair_mean(counts_SK, arm_KK) / _pair_mean(other_SK, baseline_KK) - 1
    )
  retrains = min(len(arm_KK), len(baseline_KK))
  return _figure(np.array([change]), resampled_S, retrains)


# --- Bootstrap ---------------------------------------------------------------


def _resample(retrains: int, seed: int, different: int = 2) -> np.ndarray:
  """How often each retrain is drawn, (S, K); at least so many of them."""
  rng = np.random.default_rng(seed)
  if retrains < 2:
    return np.ones((1, retrains), np.int64)
  counts_SK = np.zeros((0, retrains), np.int64)
  while len(counts_SK) < _RESAMPLES:
    drawn_SK = rng.multinomial(
        retrains, np.full(retrains, 1 / retrains), size=_RESAMPLES
    )
    # One retrain drawn K times has a mean, but no pair.
    drawn_SK = drawn_SK[np.count_nonzero(drawn_SK, axis=1) >= different]
    counts_SK = np.concatenate([counts_SK, drawn_SK])[:_RESAMPLES]
  return counts_SK


def _mean(counts_SK: np.ndarray, values_K: np.ndarray) -> np.ndarray:
  return counts_SK @ values_K / counts_SK.sum(axis=1)


def _pair_mean(counts_SK: np.ndarray, values_KK: np.ndarray) -> np.ndarray:
  """The mean over pairs; a retrain drawn twice is no pair with itself."""
  between_KK = 1.0 - np.eye(len(values_KK))
  total_S = np.sum(counts_SK @ (values_KK * between_KK) * counts_SK, axis=1)
  return total_S / np.sum(counts_SK @ between_KK * counts_SK, axis=1)


def _figure(
    values: np.ndarray, resampled_S: np.ndarray, retrains: int
) -> Figure:
  mean = values.mean()
  # One retrain has no spread, and of two there is one pair only.
  reach = np.nan if retrains < 3 else _reach(retrains) * resampled_S.std()
  return Figure(
      mean=float(mean),
      half_range=float(np.ptp(values) / 2),
      low=float(mean - reach),
      high=float(mean + reach),
      values=tuple(map(float, values)),
  )


def _reach(retrains: int, share: float = 0.025) -> float:
  """How many standard errors of the bootstrap make half a 95 % interval.

  The bootstrap of K values is too narrow by (K - 1) / K in variance, and five
  values know their own spread badly: Student's t takes that in. Percentiles of
  the bootstrap cover 83 % where these intervals cover 92 to 96 (churn_test).
  """
  from scipy import special  # Comes with jax.

  freedom = retrains - 1
  quantile = -special.stdtrit(freedom, share)
  return float(quantile * np.sqrt(retrains / freedom))
