"""Metrics: they add up over batches, and padding counts nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base, metrics

RNG = np.random.default_rng(0)
LOGITS_A = RNG.normal(size=(6, 4)).astype(np.float32)
LOGITS_B = LOGITS_A + RNG.normal(size=(6, 4)).astype(np.float32)
LABELS = RNG.integers(4, size=6)
WEIGHTS = np.array([1, 0, 2, 1, 0.5, 1], np.float32)
PROBS_A, PROBS_B = (
    np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (LOGITS_A, LOGITS_B)
)


def weighted(values):
  return (values * WEIGHTS).sum() / WEIGHTS.sum()


def test_mean_is_the_weighted_mean():
  values = np.arange(6.0)
  np.testing.assert_allclose(metrics.mean(values).value, 2.5)
  np.testing.assert_allclose(
      metrics.mean(values, WEIGHTS).value, weighted(values), rtol=1e-6
  )


def test_mean_ignores_what_padding_holds():
  values = jnp.array([1.0, jnp.nan, 3.0])
  got = metrics.mean(values, np.array([1.0, 0.0, 1.0]))
  assert (got.total, got.count) == (4.0, 2.0)
  grad = jax.grad(lambda v: metrics.mean(v, np.array([1.0, 0.0, 1.0])).total)
  np.testing.assert_array_equal(grad(values), [1, 0, 1])


def test_mean_of_nothing_is_nan():
  assert np.isnan(metrics.mean(np.ones(3), np.zeros(3)).value)


def test_merged_parts_are_the_whole():
  whole = {'x': metrics.cross_entropy(LOGITS_A, LABELS, WEIGHTS)}
  parts = [
      {'x': metrics.cross_entropy(LOGITS_A[s], LABELS[s], WEIGHTS[s])}
      for s in (slice(0, 1), slice(1, 6))
  ]
  merged = jax.jit(metrics.merge)(*parts)
  assert isinstance(merged['x'], metrics.Mean)
  np.testing.assert_allclose(merged['x'].value, whole['x'].value, rtol=1e-6)
  # And not the mean of the parts' means.
  halves = np.mean([part['x'].value for part in parts])
  assert abs(halves - whole['x'].value) > 1e-3


def test_accuracy_and_cross_entropy_equal_their_formulas():
  correct = LOGITS_A.argmax(-1) == LABELS
  got = metrics.accuracy(LOGITS_A, LABELS, WEIGHTS).value
  np.testing.assert_allclose(got, weighted(correct), rtol=1e-6)
  loss = -np.log(PROBS_A[np.arange(6), LABELS])
  got = metrics.cross_entropy(LOGITS_A, LABELS, WEIGHTS)
  np.testing.assert_allclose(got.value, weighted(loss), rtol=1e-5)
  np.testing.assert_allclose(
      metrics.perplexity(got), np.exp(weighted(loss)), rtol=1e-5
  )


def test_a_token_axis_is_just_more_examples():
  flat = metrics.accuracy(LOGITS_A, LABELS, WEIGHTS)
  shaped = metrics.accuracy(
      LOGITS_A.reshape(2, 3, 4), LABELS.reshape(2, 3), WEIGHTS.reshape(2, 3)
  )
  assert (flat.total, flat.count) == (shaped.total, shaped.count)


def test_logits_shaped_like_labels_are_a_sigmoid_output():
  z = np.array([-2.0, 0.5, 3.0, -0.1], np.float32)
  y = np.array([0, 0, 1, 1])
  p = 1 / (1 + np.exp(-z.astype(np.float64)))
  np.testing.assert_allclose(metrics.accuracy(z, y).value, 0.5)
  np.testing.assert_allclose(
      metrics.cross_entropy(z, y).value,
      np.mean(-y * np.log(p) - (1 - y) * np.log(1 - p)),
      rtol=1e-6,
  )


def test_churn_is_total_variation():
  tv = 0.5 * np.abs(PROBS_A - PROBS_B).sum(-1)
  got = metrics.churn(PROBS_A, PROBS_B, WEIGHTS).value
  np.testing.assert_allclose(got, weighted(tv), rtol=1e-5)
  apart = metrics.churn(np.eye(2)[[0, 1]], np.eye(2)[[1, 0]])
  assert apart.value == 1.0
  assert metrics.churn(PROBS_A, PROBS_A).value == 0.0


def test_churn_of_two_classes_is_that_of_the_positive_class():
  z_a, z_b = LOGITS_A[:, 0], LOGITS_B[:, 0]
  two = [jax.nn.softmax(base.two_class_logits(z)) for z in (z_a, z_b)]
  one = [jax.nn.sigmoid(z) for z in (z_a, z_b)]
  np.testing.assert_allclose(
      metrics.churn(*two, WEIGHTS).value,
      metrics.binary_churn(*one, WEIGHTS).value,
      rtol=1e-5,
  )


def test_disagreement_is_about_the_argmax_only():
  differ = LOGITS_A.argmax(-1) != LOGITS_B.argmax(-1)
  assert 0 < differ.sum() < 6
  got = metrics.disagreement(LOGITS_A, LOGITS_B, WEIGHTS).value
  np.testing.assert_allclose(got, weighted(differ), rtol=1e-6)
  assert metrics.disagreement(LOGITS_A, 3 * LOGITS_A + 1).value == 0


def test_relative_difference_is_bounded_and_zero_at_zero():
  a, b = np.array([0.0, 0.2, 0.0]), np.array([0.0, 0.1, 0.3])
  got = metrics.relative_difference(a, b)
  np.testing.assert_allclose(got.value, np.mean([0, 2 / 3, 2]), rtol=1e-6)


@pytest.mark.parametrize(
    'call',
    [
        lambda: metrics.mean(np.ones((2, 3)), np.ones(2)),
        lambda: metrics.accuracy(np.ones((2, 3)), np.ones(3, int)),
        lambda: metrics.churn(np.ones((2, 3)), np.ones((2, 4))),
        lambda: metrics.disagreement(np.ones((2, 3)), np.ones((1, 3))),
    ],
)
def test_shapes_that_disagree_are_named(call):
  with pytest.raises(ValueError, match=r'\(2, 3\)'):
    call()
