"""Statistics of independent retrains: prediction churn, means, intervals.

Churn compares arrays of probabilities, of any framework. A sigmoid output is
the probability of the positive class, (N,); a softmax output is (N, C). Both
give the same numbers for the same two classes.

Intervals of a mean over retrains are Student's. The K (K - 1) / 2 pairs of K
retrains are not independent, so that for means over pairs the retrains are
resampled, not the pairs; a retrain drawn twice makes no pair with itself.

Shape suffixes: K retrains, N examples, C classes, S resamples.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of a probability in float32: 1 - 6e-8 is the largest below 1.
_SMALLEST = 1e-7
_TOLERANCE = 1e-3  # Of a probability and of a sum of them, for rounding.
_RESAMPLES = 10_000


class Measured(NamedTuple):
  """What K retrains predict, reduced to a number for each and for each pair.

  Attributes:
    log_loss_K: Nats per example; None without labels.
    error_K: Fraction of wrong answers; None without labels.
    churn_KK: Mean absolute difference; total variation of C classes.
    relative_KK: Mean of 2 |p - q| / (p + q); None for more than two classes
      without labels.
    disagreement_KK: Fraction of examples with other answers.
  """

  log_loss_K: np.ndarray | None
  error_K: np.ndarray | None
  churn_KK: np.ndarray
  relative_KK: np.ndarray | None
  disagreement_KK: np.ndarray


class Estimate(NamedTuple):
  """A mean, how far it spreads, and how far it can be trusted.

  Attributes:
    mean: Over retrains, or over pairs of different retrains.
    half_range: (max - min) / 2 of the values: the +- of Anil et al. 2018.
    low: Lower end of the 95 % interval of the mean; NaN for fewer than three
      retrains.
    high: Its upper end.
    values: One per retrain, or per pair (a, b), a < b, in order.
  """

  mean: float
  half_range: float
  low: float
  high: float
  values: tuple[float, ...]


# --- Predictions -------------------------------------------------------------


def check_probabilities(
    array: np.ndarray, name: str = 'predictions'
) -> np.ndarray:
  """Returns the predictions of one model as floats (N,) or (N, C >= 2).

  Raises:
    ValueError: If these are no probabilities.
  """
  array = np.asarray(array)
  if array.ndim == 2 and array.shape[1] == 1:
    array = array[:, 0]
  if array.ndim not in (1, 2) or not array.size:
    raise ValueError(
        f'{name}: expected probabilities of shape (N,) or (N, C), got shape'
        f' {array.shape}'
    )
  if array.dtype.kind not in 'fiub':
    raise ValueError(f'{name}: expected numbers, got dtype {array.dtype}')
  if array.dtype not in (np.float32, np.float64):
    # Differences of unsigned integers wrap, and half floats are coarse.
    array = array.astype(np.float64)
  wrong = ~np.isfinite(array)
  if wrong.any():
    raise ValueError(
        f'{name}: {wrong.sum():,} of {array.size:,} predictions are NaN or'
        f' infinite, the first in row {_first_row(wrong):,}'
    )
  wrong = (array < -_TOLERANCE) | (array > 1 + _TOLERANCE)
  if wrong.any():
    row = _first_row(wrong)
    raise ValueError(
        f'{name}: not probabilities: row {row:,} holds {array[row]}; apply the'
        ' sigmoid or softmax to logits first'
    )
  if array.ndim == 2:
    sums = array.sum(axis=1, dtype=np.float64)
    wrong = np.abs(sums - 1) > _TOLERANCE
    if wrong.any():
      row = _first_row(wrong)
      raise ValueError(
          f'{name}: not probabilities: the {array.shape[1]} classes of row'
          f' {row:,} sum to {sums[row]:.6g}, not to 1'
      )
  return array.clip(0, 1)


def check_labels(
    labels: np.ndarray, probs: np.ndarray, name: str = 'labels'
) -> np.ndarray:
  """Returns labels (N,) as integers; ValueError unless they suit `probs`."""
  labels = np.asarray(labels)
  if labels.shape != probs.shape[:1]:
    raise ValueError(
        f'{name}: {len(probs):,} predictions, but labels of shape'
        f' {labels.shape}; give one label for each'
    )
  if labels.dtype.kind not in 'fiub':
    raise ValueError(
        f'{name}: expected whole numbers, got dtype {labels.dtype}'
    )
  classes = 2 if probs.ndim == 1 else probs.shape[1]
  # A NaN is not equal to what it is cast to.
  with np.errstate(invalid='ignore'):
    whole = labels.astype(np.int64)
  wrong = (whole != labels) | (whole < 0) | (whole >= classes)
  if wrong.any():
    row = _first_row(wrong)
    raise ValueError(
        f'{name}: label {labels[row]} in row {row:,} is not a class; expected'
        f' whole numbers from 0 to {classes - 1}'
    )
  return whole


def _first_row(wrong: np.ndarray) -> int:
  return int(np.argwhere(wrong)[0][0])


def ensembles(
    predictions: Sequence[np.ndarray], size: int = 2
) -> list[np.ndarray]:
  """Returns mean probabilities of disjoint ensembles of single models.

  Of K x `size` models, ensemble k has the members k, k + K, ...: no model is in
  two of them, so that the ensembles are independent retrains.

  Raises:
    ValueError: If the models cannot be shared out evenly.
  """
  if not predictions or len(predictions) % size:
    raise ValueError(
        f'{len(predictions)} models cannot be shared out to disjoint ensembles'
        f' of {size}; train a multiple of {size}'
    )
  count = len(predictions) // size
  return [
      np.asarray(np.mean(predictions[k::count], axis=0, dtype=np.float64))
      for k in range(count)
  ]


# --- One model, and two ------------------------------------------------------


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean of -log p(label) in nats; p is kept above 1e-7."""
  picked = np.clip(_of_labels(probs, labels), _SMALLEST, 1.0)
  return float(-np.log(picked).mean())


def error(probs: np.ndarray, labels: np.ndarray) -> float:
  """Returns the fraction whose most probable class is not the label."""
  return float(np.mean(_answers(probs) != labels))


def churn(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean absolute difference of (N,), or total variation."""
  difference = np.abs(a - b).mean(dtype=np.float64)
  return float(difference * (1 if a.ndim == 1 else 0.5 * a.shape[1]))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean of 2 |p - q| / (p + q) of one event; 0 where both are 0.

  Shamir & Coviello 2020.
  """
  both = np.add(a, b, dtype=np.float64)
  relative = 2 * np.abs(a - b) / np.where(both > 0, both, 1.0)
  return float(relative.mean())


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the fraction whose most probable classes differ."""
  return float(np.mean(_answers(a) != _answers(b)))


def _answers(probs: np.ndarray) -> np.ndarray:
  """Returns the most probable class; the first of equals, as argmax has it."""
  return probs > 0.5 if probs.ndim == 1 else probs.argmax(axis=1)


def _of_labels(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns p(label), (N,), in float64."""
  if probs.ndim == 1:
    probs = probs.astype(np.float64)
    return np.where(labels == 1, probs, 1 - probs)
  picked = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0]
  return picked.astype(np.float64)


def _event(probs: np.ndarray, labels: np.ndarray | None) -> np.ndarray | None:
  """Returns the probability of which relative differences are taken, (N,).

  Of the positive class; of the label, if there are more than two classes.
  """
  if probs.ndim == 1:
    return probs
  if probs.shape[1] == 2:
    return probs[:, 1]
  return None if labels is None else _of_labels(probs, labels)


# --- K retrains --------------------------------------------------------------


def measure(
    predictions: Sequence[np.ndarray], labels: np.ndarray | None = None
) -> Measured:
  """Compares each retrain with the labels and with every other retrain.

  Args:
    predictions: K >= 2 arrays of one shape, (N,) or (N, C): one model of each
      independent run.
    labels: (N,) whole numbers below C.

  Raises:
    ValueError: If these are no probabilities, or shapes or labels do not fit.
  """
  predictions = [
      check_probabilities(p, f'retrain {k}') for k, p in enumerate(predictions)
  ]
  if len(predictions) < 2:
    raise ValueError(
        f'churn is between models: expected at least 2, got {len(predictions)}'
    )
  for k, p in enumerate(predictions):
    if p.shape != predictions[0].shape:
      raise ValueError(
          f'retrain 0 has shape {predictions[0].shape}, retrain {k} has'
          f' {p.shape}; predict the same examples in the same order'
      )
  losses = errors = None
  if labels is not None:
    labels = check_labels(labels, predictions[0])
    losses = np.array([log_loss(p, labels) for p in predictions])
    errors = np.array([error(p, labels) for p in predictions])
  events = [_event(p, labels) for p in predictions]
  return Measured(
      log_loss_K=losses,
      error_K=errors,
      churn_KK=_pairwise(churn, predictions),
      relative_KK=(
          None if events[0] is None else _pairwise(relative_difference, events)
      ),
      disagreement_KK=_pairwise(disagreement, predictions),
  )


def _pairwise(distance, arrays) -> np.ndarray:
  """Returns distances (K, K), symmetric; 0 of each array to itself."""
  return symmetric(
      [distance(a, b) for k, a in enumerate(arrays) for b in arrays[k + 1 :]],
      len(arrays),
  )


def symmetric(values: Sequence[float], retrains: int) -> np.ndarray:
  """Returns values of pairs (a, b), a < b, in order, as a matrix (K, K)."""
  matrix_KK = np.zeros((retrains, retrains))
  matrix_KK[np.triu_indices(retrains, 1)] = values
  return matrix_KK + matrix_KK.T


def _of_pairs(matrix_KK: np.ndarray) -> np.ndarray:
  return matrix_KK[np.triu_indices(len(matrix_KK), 1)]


# --- Means and intervals -----------------------------------------------------


def mean_over_retrains(values_K: Sequence[float]) -> Estimate:
  """Estimates the mean over retrains, such as of their log losses."""
  values_K = np.asarray(values_K, np.float64)
  retrains = len(values_K)
  deviation = values_K.std(ddof=1) if retrains > 1 else 0.0
  return _estimate(values_K, deviation / np.sqrt(retrains), retrains)


def mean_over_pairs(
    values_KK: np.ndarray, seed: int = 0, resamples: int = _RESAMPLES
) -> Estimate:
  """Estimates the mean over pairs of retrains, such as of their churn."""
  counts_SK = _resample(len(values_KK), seed, resamples)
  retrains = len(values_KK)
  deviation = _bootstrap_error(_pair_mean(counts_SK, values_KK), retrains)
  return _estimate(_of_pairs(values_KK), deviation, retrains)


def change_of_churn(
    arm_KK: np.ndarray,
    baseline_KK: np.ndarray,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Estimate:
  """Estimates mean churn over that of a baseline, minus 1: -0.38 is 38 % less.

  Arms of as many retrains are resampled together, retrain by retrain: those of
  one number share their seeds. Others are resampled apart.

  Returns:
    An estimate without spread; `values` is the change alone.
  """
  counts_SK = _resample(len(arm_KK), seed, resamples)
  same = len(arm_KK) == len(baseline_KK)
  other_SK = (
      counts_SK if same else _resample(len(baseline_KK), seed + 1, resamples)
  )
  # Two deterministic arms have no churn to compare.
  with np.errstate(divide='ignore', invalid='ignore'):
    change = np.divide(_of_pairs(arm_KK).mean(), _of_pairs(baseline_KK).mean())
    resampled_S = _pair_mean(counts_SK, arm_KK)
    resampled_S = resampled_S / _pair_mean(other_SK, baseline_KK)
  retrains = min(len(arm_KK), len(baseline_KK))
  deviation = _bootstrap_error(resampled_S, retrains)
  return _estimate(np.array([change - 1]), deviation, retrains)


def _estimate(values: np.ndarray, deviation: float, retrains: int) -> Estimate:
  """Returns mean and interval; `deviation` is that of the mean."""
  from scipy import special

  # Not `stats.t.interval`: that is NaN where all values are the same. One
  # retrain has no spread, and of two there is one pair only.
  quantile = special.stdtrit(retrains - 1, 0.975) if retrains > 2 else np.nan
  mean, reach = values.mean(), quantile * deviation
  return Estimate(
      mean=float(mean),
      half_range=float(np.ptp(values) / 2),
      low=float(mean - reach),
      high=float(mean + reach),
      values=tuple(map(float, values)),
  )


def _bootstrap_error(resampled_S: np.ndarray, retrains: int) -> float:
  """Returns the standard error; a bootstrap's is (K - 1) / K in variance.

  With the quantile of Student's t, its intervals cover 92 to 96 % where the
  percentiles of the bootstrap cover 83 (statistics_test).
  """
  return resampled_S.std() * np.sqrt(retrains / max(retrains - 1, 1))


@functools.lru_cache(maxsize=16)  # Most arms have as many retrains.
def _resample(retrains: int, seed: int, resamples: int) -> np.ndarray:
  """Returns how often each is drawn, (S, K); at least two of them."""
  rng = np.random.default_rng(seed)
  counts_SK = np.zeros((0, retrains), np.int64)
  while len(counts_SK) < resamples:
    drawn_SK = rng.multinomial(
        retrains, np.full(retrains, 1 / retrains), size=resamples
    )
    # One retrain drawn K times has a mean, but no pair.
    drawn_SK = drawn_SK[np.count_nonzero(drawn_SK, axis=1) > 1]
    counts_SK = np.concatenate([counts_SK, drawn_SK])[:resamples]
  return counts_SK


def _pair_mean(counts_SK: np.ndarray, values_KK: np.ndarray) -> np.ndarray:
  """Returns means over pairs; a retrain drawn twice is no pair with itself."""
  between_KK = 1.0 - np.eye(len(values_KK))
  total_S = np.sum(counts_SK @ (values_KK * between_KK) * counts_SK, axis=1)
  return total_S / np.sum(counts_SK @ between_KK * counts_SK, axis=1)
