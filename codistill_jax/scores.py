"""Scores of a sigmoid output: ranking (AUC) and calibration. Pure.

Like all of `metrics`, which has them too, they are sums that add up over
batches. Logits and labels have one shape (...), flat inside; weights are 0 for
padding, whose logits and labels are ignored, be they NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base

# Bins of `Auc`: of the logit, 1/256 wide, from -16 to 16. Powers of two, so
# that every machine puts a logit into the same bin.
_LOGIT_LIMIT = 16
_BINS_PER_UNIT = 256
_AUC_BINS = 2 * _LOGIT_LIMIT * _BINS_PER_UNIT

# Bins of `CalibrationError`: of the probability.
_CALIBRATION_BINS = 20


class Auc(NamedTuple):
  """The area under the ROC curve in the making: scores by label, in bins.

  The probability that a positive example has a higher logit than a negative
  one, where a pair in one bin counts 1/2, as ties do. Memory is that of the
  bins, and the error is at most `error_bound`: half the share of the pairs that
  share a bin.

  Attributes:
    positives: Weight of the examples of label 1 in each bin, float32 (8192,).
    negatives: Likewise of label 0.
  """

  positives: base.Array
  negatives: base.Array

  def number(self) -> float:
    """The area; NaN without examples of both labels."""
    positives, negatives = self._float64()
    below = np.cumsum(negatives) - negatives
    won = np.sum(positives * (below + 0.5 * negatives))
    return ratio(won, positives.sum() * negatives.sum())

  def error_bound(self) -> float:
    """By how much `number` may differ from the area of the exact scores."""
    positives, negatives = self._float64()
    together = np.sum(positives * negatives)
    return ratio(0.5 * together, positives.sum() * negatives.sum())

  def _float64(self) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(self.positives, float), np.asarray(self.negatives, float)


class Calibration(NamedTuple):
  """Mean prediction over the share of positives, in the making.

  1 is right on the whole, more predicts too many positives.

  Attributes:
    predicted: Sum of the predictions.
    observed: Sum of the labels.
  """

  predicted: base.Array
  observed: base.Array

  def number(self) -> float:
    """The ratio; NaN without positives."""
    return ratio(self.predicted, self.observed)


class CalibrationError(NamedTuple):
  """The expected calibration error in the making (Naeini et al. 2015).

  Over 20 bins of the predicted probability, all of one width: the mean of
  |mean prediction - share of positives|, weighted by the examples in the bin.

  Attributes:
    predicted: Sum of the predictions in each bin, float32 (20,).
    observed: Sum of the labels in each bin, float32 (20,).
    count: Weight of all examples.
  """

  predicted: base.Array
  observed: base.Array
  count: base.Array

  def number(self) -> float:
    """The error, in [0, 1]; NaN if nothing was counted."""
    difference = np.subtract(self.predicted, self.observed, dtype=float)
    return ratio(np.sum(np.abs(difference)), self.count)


def auc(
    logits: base.Array, labels: base.Array, weights: base.Array | None = None
) -> Auc:
  """Area under the ROC curve; see `Auc`.

  Args:
    logits: (...); one that is NaN makes the area NaN.
    labels: (...); 0 or 1.
    weights: (...); 1 everywhere if None, 0 for padding.

  Raises:
    ValueError: If the shapes disagree.
  """
  logits, labels, weights = _flat(logits, labels, weights)
  # No bin is that of a NaN.
  weights = jnp.where(jnp.isnan(logits), jnp.nan, weights)
  logits = jnp.nan_to_num(jnp.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT))
  bins = jnp.floor((logits + _LOGIT_LIMIT) * _BINS_PER_UNIT)
  bins = jnp.clip(bins.astype(jnp.int32), 0, _AUC_BINS - 1)
  return Auc(
      positives=_histogram(bins, weights * labels, _AUC_BINS),
      negatives=_histogram(bins, weights * (1.0 - labels), _AUC_BINS),
  )


def calibration(
    logits: base.Array, labels: base.Array, weights: base.Array | None = None
) -> Calibration:
  """Mean prediction over the share of positives; see `Calibration`."""
  logits, labels, weights = _flat(logits, labels, weights)
  return Calibration(
      predicted=jnp.sum(weights * jax.nn.sigmoid(logits)),
      observed=jnp.sum(weights * labels),
  )


def calibration_error(
    logits: base.Array, labels: base.Array, weights: base.Array | None = None
) -> CalibrationError:
  """Expected calibration error; see `CalibrationError`."""
  logits, labels, weights = _flat(logits, labels, weights)
  probs = jax.nn.sigmoid(logits)
  bins = jnp.floor(jnp.nan_to_num(probs) * _CALIBRATION_BINS).astype(jnp.int32)
  bins = jnp.minimum(bins, _CALIBRATION_BINS - 1)
  return CalibrationError(
      predicted=_histogram(bins, weights * probs, _CALIBRATION_BINS),
      observed=_histogram(bins, weights * labels, _CALIBRATION_BINS),
      count=jnp.sum(weights),
  )


def ratio(total: base.Array, count: base.Array) -> float:
  """total / count in float64; NaN if nothing was counted."""
  return float(np.float64(total) / np.float64(count)) if count else float('nan')


def _flat(logits, labels, weights):
  """Float32 (N,); what padding holds is 0, so that products with it are."""
  logits = jnp.asarray(logits, jnp.float32)
  labels = jnp.asarray(labels, jnp.float32)
  if weights is None:
    weights = jnp.ones_like(logits)
  weights = jnp.asarray(weights, jnp.float32)
  for name, array in (('labels', labels), ('weights', weights)):
    if array.shape != logits.shape:
      raise ValueError(
          f'Expected {name} of the shape of the logits, {logits.shape}, got'
          f' {array.shape}.'
      )
  logits, labels = (jnp.where(weights == 0, 0.0, x) for x in (logits, labels))
  return logits.reshape(-1), labels.reshape(-1), weights.reshape(-1)


def _histogram(bins, weights, size):
  return jnp.zeros((size,), jnp.float32).at[bins].add(weights)
