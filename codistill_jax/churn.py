"""Prediction churn: how far independent retrains of one arm differ.

Figures from arrays of probabilities, of any framework; numpy only. A sigmoid
output is the probability of the positive class, (N,); a softmax output is
(N, C). Both give the same figures for the same two classes.

Intervals are bootstraps that resample retrains: the pairs of K retrains are not
independent.

Shape suffixes: K retrains, N examples, C classes, S resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of a probability in float32: 1 - 6e-8 is the largest below 1.
_SMALLEST = 1e-7
_RESAMPLES = 10_000
_SUM_TOLERANCE = 1e-3


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

  @property
  def retrains(self) -> int:
    return len(self.churn_KK)


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


# --- Predictions -------------------------------------------------------------


def check_probabilities(array: np.ndarray, name: str = 'predictions'):
  """The predictions of one model as (N,) or (N, C >= 2).

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
  wrong = ~np.isfinite(array)
  if wrong.any():
    raise ValueError(
        f'{name}: {wrong.sum():,} of {array.size:,} predictions are NaN or'
        f' infinite, the first in row {_first_row(wrong):,}'
    )
  wrong = (array < 0) | (array > 1)
  if wrong.any():
    row = _first_row(wrong)
    raise ValueError(
        f'{name}: not probabilities: row {row:,} holds {array[row]}; apply the'
        ' sigmoid or softmax to logits first'
    )
  if array.ndim == 2:
    sums = array.sum(axis=1, dtype=np.float64)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
      row = _first_row(wrong)
      raise ValueError(
          f'{name}: not probabilities: the {array.shape[1]} classes of row'
          f' {row:,} sum to {sums[row]:.6g}, not to 1'
      )
  return array


def _first_row(wrong: np.ndarray) -> int:
  return int(np.argwhere(wrong)[0][0])


def ensembles(
    predictions: Sequence[np.ndarray], size: int = 2
) -> list[np.ndarray]:
  """Mean probabilities of disjoint ensembles of single models.

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
      np.mean(predictions[k::count], axis=0, dtype=np.float64)
      for k in range(count)
  ]


# --- Figures of one model, and of two ----------------------------------------


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
  """Mean of -log p(label) in nats; p is kept above 1e-7."""
  picked = np.clip(_of_labels(probs, labels), _SMALLEST, 1.0)
  return float(-np.log(picked).mean())


def error(probs: np.ndarray, labels: np.ndarray) -> float:
  """Fraction of examples whose most probable class is not the label."""
  return float(np.mean(_answers(probs) != labels))


def churn(a: np.ndarray, b: np.ndarray) -> float:
  """Mean absolute difference of (N,), mean total variation of (N, C)."""
  difference = np.abs(a - b).mean(dtype=np.float64)
  return float(difference * (1 if a.ndim == 1 else 0.5 * a.shape[1]))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
  """Mean of 2 |p - q| / (p + q) of one event each; 0 where both are 0.

  Shamir & Coviello 2020.
  """
  both = np.add(a, b, dtype=np.float64)
  relative = 2 * np.abs(a - b) / np.where(both > 0, both, 1.0)
  return float(relative.mean())


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
  """Fraction of examples whose most probable classes differ."""
  return float(np.mean(_answers(a) != _answers(b)))


def _answers(probs: np.ndarray) -> np.ndarray:
  """The most probable class; the first of equals, as argmax has it."""
  return probs > 0.5 if probs.ndim == 1 else probs.argmax(axis=1)


def _of_labels(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """p(label), (N,), in float64."""
  if probs.ndim == 1:
    probs = probs.astype(np.float64)
    return np.where(labels == 1, probs, 1 - probs)
  return np.take_along_axis(probs, labels[:, None], axis=1)[:, 0].astype(
      np.float64
  )


def _event(probs: np.ndarray, labels: np.ndarray | None) -> np.ndarray | None:
  """The probability of which relative differences are taken, (N,).

  Of the positive class; of the label, if there are more than two classes.
  """
  if probs.ndim == 1:
    return probs
  if probs.shape[1] == 2:
    return probs[:, 1]
  return None if labels is None else _of_labels(probs, labels)


# --- Figures of K retrains ---------------------------------------------------


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
  if labels is not None:
    labels = check_labels(labels, predictions[0])
  events = [_event(p, labels) for p in predictions]
  return Measured(
      log_loss_K=_per_model(log_loss, predictions, labels),
      error_K=_per_model(error, predictions, labels),
      churn_KK=_pairwise(churn, predictions),
      relative_KK=(
          None if events[0] is None else _pairwise(relative_difference, events)
      ),
      disagreement_KK=_pairwise(disagreement, predictions),
  )


def check_labels(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
  """Labels (N,) as integers; ValueError unless they suit the predictions."""
  labels = np.asarray(labels)
  if labels.shape != probs.shape[:1]:
    raise ValueError(
        f'{len(probs):,} predictions, but labels of shape {labels.shape}; give'
        ' one label for each'
    )
  classes = 2 if probs.ndim == 1 else probs.shape[1]
  # A NaN is not equal to what it is cast to.
  with np.errstate(invalid='ignore'):
    whole = labels.astype(np.int64)
  wrong = (whole != labels) | (whole < 0) | (whole >= classes)
  if wrong.any():
    row = _first_row(wrong)
    raise ValueError(
        f'label {labels[row]} in row {row:,} is not a class; expected whole'
        f' numbers from 0 to {classes - 1}'
    )
  return whole


def _per_model(f, predictions, labels) -> np.ndarray | None:
  if labels is None:
    return None
  return np.array([f(p, labels) for p in predictions])


def _pairwise(distance, arrays) -> np.ndarray:
  """Distances (K, K), symmetric; 0 of each array to itself."""
  found = np.zeros((len(arrays), len(arrays)))
  for a in range(len(arrays)):
    for b in range(a + 1, len(arrays)):
      found[a, b] = found[b, a] = distance(arrays[a], arrays[b])
  return found


def over_retrains(values_K: np.ndarray, seed: int = 0) -> Figure:
  """The mean over retrains, such as of their log losses."""
  values_K = np.asarray(values_K, np.float64)
  counts_SK = _resample(len(values_K), seed)
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


def _resample(retrains: int, seed: int) -> np.ndarray:
  """How often each retrain is drawn, (S, K); at least two different ones."""
  rng = np.random.default_rng(seed)
  if retrains < 2:
    return np.ones((1, retrains), np.int64)
  counts_SK = np.zeros((0, retrains), np.int64)
  while len(counts_SK) < _RESAMPLES:
    drawn_SK = rng.multinomial(
        retrains, np.full(retrains, 1 / retrains), size=_RESAMPLES
    )
    # One retrain drawn K times has no pair.
    drawn_SK = drawn_SK[np.count_nonzero(drawn_SK, axis=1) > 1]
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
