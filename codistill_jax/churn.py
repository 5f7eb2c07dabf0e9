"""Prediction churn: how far independent retrains of one arm differ.

Figures from arrays of probabilities, of any framework; numpy only. A sigmoid
output is the probability of the positive class, (N,); a softmax output is
(N, C). Both give the same figures for the same two classes. `intervals` makes
means with intervals of them.

Shape suffixes: K retrains, N examples, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of a probability in float32: 1 - 6e-8 is the largest below 1.
_SMALLEST = 1e-7
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


# --- Predictions -------------------------------------------------------------


def check_probabilities(
    array: np.ndarray, name: str = 'predictions'
) -> np.ndarray:
  """The predictions of one model as floats (N,) or (N, C >= 2).

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


def check_labels(
    labels: np.ndarray, probs: np.ndarray, name: str = 'labels'
) -> np.ndarray:
  """Labels (N,) as integers; ValueError unless they suit the predictions."""
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
