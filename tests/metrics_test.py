"""Metrics: they add up over batches, and padding counts nowhere."""

import functools

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
  assert np.isnan(metrics.mean(values, np.zeros(6)).value)
  np.testing.assert_allclose(
      metrics.mean(values, WEIGHTS).value, weighted(values), rtol=1e-6
  )


def test_mean_ignores_what_padding_holds():
  values = jnp.array([1.0, jnp.nan, 3.0])
  got = metrics.mean(values, np.array([1.0, 0.0, 1.0]))
  assert (got.total, got.count) == (4.0, 2.0)
  grad = jax.grad(lambda v: metrics.mean(v, np.array([1.0, 0.0, 1.0])).total)
  np.testing.assert_array_equal(grad(values), [1, 0, 1])


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


# -- of a sigmoid output ------------------------------------------------------


# Compiled as a whole, as in a run: operations one by one take far longer.
auc, calibration, calibration_error = map(
    jax.jit, (metrics.auc, metrics.calibration, metrics.calibration_error)
)


def exact_auc(logits, labels):
  """By comparing every pair; ties count a half."""
  difference = logits[labels == 1][:, None] - logits[labels == 0][None, :]
  return np.mean((difference > 0) + 0.5 * (difference == 0))


def scores(size=2000, seed=0, scale=2.0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(2, size=size)
  logits = (rng.normal(size=size) + labels - 1.5) * scale
  return logits.astype(np.float32), labels


@pytest.mark.parametrize('scale', [0.01, 0.5, 2.0, 30.0])
def test_auc_is_that_of_all_pairs_within_its_bound(scale):
  logits, labels = scores(scale=scale)
  found = auc(logits, labels)
  bound = found.error_bound()
  assert abs(found.number() - exact_auc(logits, labels)) <= bound + 1e-9
  assert bound < {0.5: 1e-2, 2.0: 1e-2}.get(scale, 0.5)
  if scale == 2.0:
    np.testing.assert_allclose(found.number(), 0.76, atol=0.03)


def test_auc_is_exact_where_predictions_are_bins_apart():
  rng = np.random.default_rng(0)
  # Many ties, but none between predictions that differ.
  logits = rng.integers(-1000, 1000, size=3000) / 256.0
  labels = rng.integers(2, size=3000)
  np.testing.assert_allclose(
      auc(logits, labels).number(),
      exact_auc(logits, labels),
      rtol=1e-12,
  )
  assert auc(np.zeros(9), np.arange(9) % 2).number() == 0.5
  assert auc(np.array([-20.0, 20.0]), np.array([0, 1])).number() == 1
  assert auc(np.array([-0.01, 0.0]), np.array([1, 0])).number() == 0


SIGMOID_METRICS = [auc, calibration, calibration_error]


@pytest.mark.parametrize('metric', SIGMOID_METRICS)
def test_batches_add_up_and_padding_is_ignored(metric):
  logits, labels = scores(1000)
  whole = metric(logits, labels)
  sums = []
  for start in range(0, 1000, 300):
    x, y = logits[start : start + 300], labels[start : start + 300]
    pad = (0, 300 - len(x))
    sums.append(
        metric(
            np.pad(x, pad, constant_values=np.nan),
            np.pad(y.astype(float), pad, constant_values=np.nan),
            np.pad(np.ones(len(x), np.float32), pad),
        )
    )
  added = functools.reduce(metrics.merge, sums)
  np.testing.assert_allclose(added.number(), whole.number(), rtol=1e-5)
  for a, b in zip(added, whole):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('metric', SIGMOID_METRICS)
def test_examples_count_by_their_weights(metric):
  logits, labels = scores(50)
  weights = np.arange(50) % 3
  repeated = np.repeat(np.arange(50), weights)
  np.testing.assert_allclose(
      metric(logits, labels, weights).number(),
      metric(logits[repeated], labels[repeated]).number(),
      rtol=1e-5,
  )


def test_calibration_compares_mean_prediction_and_share_of_positives():
  probs = np.array([0.1, 0.2, 0.6, 0.9])
  logits = np.log(probs / (1 - probs))
  labels = np.array([0, 0, 1, 0])
  found = calibration(logits, labels)
  np.testing.assert_allclose(found.number(), 1.8 / 1.0, rtol=1e-5)
  expected = (0.1 + 0.2 + 0.4 + 0.9) / 4  # Each in a bin of its own.
  np.testing.assert_allclose(
      calibration_error(logits, labels).number(), expected, rtol=1e-5
  )
  # Bins are a twentieth wide, ...
  probs = np.array([0.52, 0.58])
  found = calibration_error(np.log(probs / (1 - probs)), np.array([1, 0]))
  np.testing.assert_allclose(found.number(), (0.48 + 0.58) / 2, rtol=1e-5)
  # and certainty is in the last one.
  found = calibration_error(np.full(2, 88.0), np.array([1, 0]))
  assert found.number() == 0.5
  # In one bin errors make up for each other.
  found = calibration_error(np.zeros(4), np.array([0, 1, 1, 0]))
  assert found.number() == 0


@pytest.mark.parametrize('metric', SIGMOID_METRICS)
def test_extreme_predictions_are_counted_and_no_number_is_no_number(metric):
  logits = np.array([np.inf, -np.inf, 1e30, -1e30, 88.0, -88.0])
  labels = np.array([1, 0, 1, 0, 1, 0])
  assert np.isfinite(metric(logits, labels).number())
  for label in (0, 1):
    damaged = metric(np.array([np.nan, *logits]), np.array([label, *labels]))
    assert np.isnan(damaged.number())
  assert np.isnan(metric(logits, labels, np.zeros(6)).number())


@pytest.mark.parametrize('metric', SIGMOID_METRICS)
def test_scores_are_of_arrays_of_one_shape(metric):
  x = np.zeros((2, 3))
  assert metric(x, x.astype(int), np.ones((2, 3))).number() is not None
  for args in ((x, x[0]), (x, x, np.ones(2)), (x, x[:, :, None])):
    with pytest.raises(ValueError, match=r'of the logits, \(2, 3\), got \('):
      metric(*args)


def test_without_both_labels_there_is_no_area():
  assert np.isnan(auc(np.ones(3), np.ones(3, int)).number())
  assert np.isnan(auc(np.ones(3), np.zeros(3, int)).number())
  assert np.isnan(calibration(np.ones(3), np.zeros(3, int)).number())


def test_quality_of_a_sigmoid_output_and_of_classes():
  logits, labels = scores(100)
  assert set(metrics.quality(logits, labels)) == {
      'eval/accuracy',
      'eval/auc',
      'eval/calibration',
      'eval/calibration_error',
  }
  own = lambda logits, labels, weights: metrics.mean(logits > labels, weights)
  own.__name__ = 'own'
  more = metrics.quality(logits, labels, own=[own])
  assert set(more) == {*metrics.quality(logits, labels), 'eval/own'}
  assert more['eval/own'].number() == pytest.approx(np.mean(logits > labels))
  for name, gives, message in [
      ('auc', own, 'eval/auc already; rename'),
      ('loss', own, 'eval/loss already'),
      ('mine', lambda *args: jnp.zeros(3), r'mine gave float32\[3\], expected'),
  ]:
    wrong = lambda *args, gives=gives: gives(*args)
    wrong.__name__ = name
    with pytest.raises(ValueError, match=message):
      metrics.quality(logits, labels, own=[wrong])
  two = base.two_class_logits(logits)
  (found,) = metrics.quality(two, labels).items()
  assert found[0] == 'eval/accuracy'
  np.testing.assert_allclose(
      found[1].number(), np.mean((logits > 0) == labels), rtol=1e-6
  )
