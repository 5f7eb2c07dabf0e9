"""Metrics as sums and counts, so that batches of any size add up. Pure.

Every metric is a pytree of sums whose leaves add up over batches; `number()`
makes a float of them, in float64, on the host.

Weights are per example and 0 for padding, whose values are ignored, be they
NaN. Logits of the shape of their labels belong to a sigmoid output; all others
have a class axis C at the end.

Scores of a sigmoid output, ranking (AUC) and calibration, take logits and
labels of one shape (...), flat inside.

Shape suffixes: C classes; `...` any axes of examples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base


class Metric(Protocol):
  """A metric in the making: a pytree of sums over examples."""

  def number(self) -> float:
    """Returns what the sums come to; NaN if nothing was counted."""


class Mean(NamedTuple):
  """A weighted mean in the making: a pytree of two float32 scalars."""

  total: base.Array
  count: base.Array

  @property
  def value(self) -> jax.Array:
    """Returns the mean; NaN if nothing was counted."""
    return jnp.divide(self.total, self.count)

  def number(self) -> float:
    """Returns the mean; NaN if nothing was counted."""
    return _ratio(self.total, self.count)


def merge(a: base.PyTree, b: base.PyTree) -> base.PyTree:
  """Returns the sum of two pytrees of metrics: those of both batches."""
  return jax.tree.map(jnp.add, a, b)


def mean(values: base.Array, weights: base.Array | None = None) -> Mean:
  """Weighted mean over all axes.

  Args:
    values: (...).
    weights: (...) of the same shape; 1 everywhere if None. The value of an
      example of weight 0 is ignored, be it NaN.

  Raises:
    ValueError: If the shapes disagree.
  """
  values = jnp.asarray(values, jnp.float32)
  if weights is None:
    return Mean(jnp.sum(values), jnp.float32(values.size))
  weights = jnp.asarray(weights, jnp.float32)
  _check_same_shape('values', values, 'weights', weights)
  weighted = jnp.where(weights == 0, 0.0, values) * weights
  return Mean(jnp.sum(weighted), jnp.sum(weights))


def accuracy(
    logits: base.Array, labels: base.Array, weights: base.Array | None = None
) -> Mean:
  """Fraction of examples whose label has the highest logit."""
  logits = class_logits(logits, labels)
  return mean(jnp.argmax(logits, axis=-1) == jnp.asarray(labels), weights)


def cross_entropy(
    logits: base.Array, labels: base.Array, weights: base.Array | None = None
) -> Mean:
  """Log loss in nats against integer labels; of a sigmoid output too."""
  log_probs = jax.nn.log_softmax(class_logits(logits, labels))
  index = jnp.asarray(labels, jnp.int32)[..., None]
  # A negative one would count from the end.
  index = jnp.where(index < 0, log_probs.shape[-1], index)
  picked = jnp.take_along_axis(log_probs, index, axis=-1, mode='fill')
  return mean(-picked[..., 0], weights)


def perplexity(task_loss: Mean) -> jax.Array:
  """exp of a mean task loss in nats.

  Of the task loss only: the exp of a loss that has a distillation term, or
  label smoothing, in it is no perplexity.
  """
  return jnp.exp(task_loss.value)


def churn(
    probs_a: base.Array,
    probs_b: base.Array,
    weights: base.Array | None = None,
) -> Mean:
  """Mean absolute difference of two models' predictions on the same examples.

  For C classes this is the total variation, half the L1 distance: the most by
  which the two models can differ on the probability of any event. For two
  classes it is |p_a - p_b| of the positive class, the mean absolute difference
  of Anil et al. 2018.

  Args:
    probs_a: Probabilities (..., C).
    probs_b: Probabilities (..., C).
    weights: (...).
  """
  probs_a, probs_b = _pair(probs_a, probs_b)
  return mean(0.5 * jnp.sum(jnp.abs(probs_a - probs_b), axis=-1), weights)


def relative_difference(
    probs_a: base.Array,
    probs_b: base.Array,
    weights: base.Array | None = None,
) -> Mean:
  """2 |p_a - p_b| / (p_a + p_b) of two sigmoid outputs, probabilities (...).

  In [0, 2]; 0 where both are 0 (Shamir & Coviello 2020).
  """
  probs_a, probs_b = _pair(probs_a, probs_b)
  both = probs_a + probs_b
  relative = 2.0 * jnp.abs(probs_a - probs_b) / jnp.where(both > 0, both, 1.0)
  return mean(relative, weights)


def quality(
    logits: base.Array,
    labels: base.Array,
    weights: base.Array | None = None,
    own: Sequence[Callable[..., Metric]] = (),
) -> dict[str, Metric]:
  """Returns the metrics of one model's predictions besides the loss, by key.

  'eval/accuracy'; and of a sigmoid output, whose logits have the shape of the
  labels, 'eval/auc', 'eval/calibration' and 'eval/calibration_error'.

  Args:
    logits: (..., C), or (...) of a sigmoid output.
    labels: (...).
    weights: (...).
    own: Further metrics, `f(logits, labels, weights)`; 'eval/<name of f>'.

  Raises:
    ValueError: If one of `own` has a name that is taken, or gives no metric.
  """
  found: dict[str, Metric] = {
      'eval/accuracy': accuracy(logits, labels, weights)
  }
  if jnp.shape(logits) == jnp.shape(labels):
    args = logits, labels, weights
    found['eval/auc'] = auc(*args)
    found['eval/calibration'] = calibration(*args)
    found['eval/calibration_error'] = calibration_error(*args)
  for metric in own:
    key = f'eval/{metric.__name__}'
    if key in (*found, 'eval/loss', 'eval/examples', 'eval/perplexity'):
      raise ValueError(f'There is a metric {key} already; rename the function.')
    found[key] = metric(logits, labels, weights)
    if not hasattr(found[key], 'number'):
      raise ValueError(
          f'{metric.__name__} gave {base.form_of(found[key])}, expected sums'
          ' over examples, such as metrics.mean(values, weights).'
      )
  return found


def disagreement(
    logits_a: base.Array,
    logits_b: base.Array,
    weights: base.Array | None = None,
) -> Mean:
  """Fraction of examples where the argmax over C differs.

  Logits or probabilities (..., C); see `base.two_class_logits` for a sigmoid.
  """
  logits_a, logits_b = _pair(logits_a, logits_b)
  differ = jnp.argmax(logits_a, axis=-1) != jnp.argmax(logits_b, axis=-1)
  return mean(differ, weights)


def class_logits(logits: base.Array, labels: base.Array) -> jax.Array:
  """Float32 logits (..., C) for labels (...), of a sigmoid output too.

  Raises:
    ValueError: If the shapes fit neither.
  """
  logits = jnp.asarray(logits, jnp.float32)
  if logits.shape == jnp.shape(labels):
    return base.two_class_logits(logits)
  if logits.shape[:-1] != jnp.shape(labels):
    raise ValueError(
        'Expected logits (..., C) or (...) for labels (...), got'
        f' {logits.shape} and {jnp.shape(labels)}.'
    )
  return logits


def _pair(a, b):
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  _check_same_shape('one model', a, 'the other', b)
  return a, b


def _check_same_shape(name_a, a, name_b, b):
  if a.shape != b.shape:
    raise ValueError(
        f'Expected one shape, got {a.shape} for {name_a} and {b.shape} for'
        f' {name_b}.'
    )


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
    """Returns the area; NaN without examples of both labels."""
    positives, negatives = self._float64()
    below = np.cumsum(negatives) - negatives
    won = np.sum(positives * (below + 0.5 * negatives))
    return _ratio(won, positives.sum() * negatives.sum())

  def error_bound(self) -> float:
    """Returns the most by which `number` differs from the exact area."""
    positives, negatives = self._float64()
    together = np.sum(positives * negatives)
    return _ratio(0.5 * together, positives.sum() * negatives.sum())

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
    """Returns the ratio; NaN without positives."""
    return _ratio(self.predicted, self.observed)


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
    """Returns the error, in [0, 1]; NaN if nothing was counted."""
    difference = np.subtract(self.predicted, self.observed, dtype=float)
    return _ratio(np.sum(np.abs(difference)), self.count)


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


def _ratio(total: base.Array, count: base.Array) -> float:
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
