"""Tests of statistics: churn against brute force, intervals against chance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from codistill_jax import metrics, statistics

PAIRS = list(itertools.combinations(range(4), 2))


def sigmoids(count=4, size=60):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=size) + 0.5 * rng.normal(size=(count, size))
  return list(1 / (1 + np.exp(-logits)))


def softmaxes(count=4, size=60, classes=5):
  logits = np.random.default_rng(0).normal(size=(count, size, classes))
  return list(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def labels_for(size=60, classes=2):
  return np.random.default_rng(9).integers(classes, size=size)


# --- Churn -------------------------------------------------------------------


def test_churn_of_a_sigmoid_is_that_of_a_loop_over_examples():
  models, labels = sigmoids(), labels_for()
  found = statistics.measure(models, labels)
  for k, p in enumerate(models):
    loss = [-np.log(x if y else 1 - x) for x, y in zip(p, labels)]
    assert found.log_loss_K[k] == pytest.approx(np.mean(loss))
    wrong = [(x > 0.5) != bool(y) for x, y in zip(p, labels)]
    assert found.error_K[k] == pytest.approx(np.mean(wrong))
  for a, b in PAIRS:
    both = list(zip(models[a], models[b]))
    for matrix, expected in (
        (found.churn_KK, [abs(p - q) for p, q in both]),
        (found.relative_KK, [2 * abs(p - q) / (p + q) for p, q in both]),
        (found.disagreement_KK, [(p > 0.5) != (q > 0.5) for p, q in both]),
    ):
      assert matrix[a, b] == matrix[b, a] == pytest.approx(np.mean(expected))
      assert matrix[a, a] == 0


def test_churn_of_a_softmax_is_that_of_the_metrics():
  models, labels = softmaxes(), labels_for(classes=5)
  found = statistics.measure(models, labels)
  rows = np.arange(60)
  for a, b in PAIRS:
    p, q = models[a], models[b]
    relative = metrics.relative_difference(p[rows, labels], q[rows, labels])
    for matrix, expected in (
        (found.churn_KK, metrics.churn(p, q)),
        (found.relative_KK, relative),
        (found.disagreement_KK, metrics.disagreement(p, q)),
    ):
      assert matrix[a, b] == pytest.approx(float(expected.value), rel=1e-5)
  loss = metrics.cross_entropy(np.log(models[1]), labels)
  assert found.log_loss_K[1] == pytest.approx(float(loss.value), rel=1e-5)


def test_a_sigmoid_and_a_softmax_of_two_classes_give_the_same_numbers():
  models, labels = sigmoids(), labels_for()
  two_classes = [np.stack([1 - p, p], axis=1) for p in models]
  a, b = (statistics.measure(x, labels) for x in (models, two_classes))
  for x, y in zip(a, b):
    np.testing.assert_allclose(x, y, rtol=1e-9)


def test_without_labels_churn_is_the_same_and_losses_are_not_there():
  found = statistics.measure(softmaxes())
  assert found.log_loss_K is found.error_K is found.relative_KK is None
  labelled = statistics.measure(softmaxes(), labels_for(classes=5))
  assert (found.churn_KK == labelled.churn_KK).all()


def test_certain_and_impossible_predictions_have_finite_numbers():
  ends = [np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0])]
  found = statistics.measure(ends, np.array([1, 1, 0]))
  assert np.isfinite(found.log_loss_K).all()
  assert found.relative_KK[0, 1] == pytest.approx(2 / 3)  # 0 where both are 0.


def test_ensembles_share_no_member_and_mean_probabilities():
  models = sigmoids(6)
  found = statistics.ensembles(models)
  assert len(found) == 3
  for k, probs in enumerate(found):
    np.testing.assert_allclose(probs, (models[k] + models[k + 3]) / 2)
  with pytest.raises(ValueError, match='5 models cannot be shared'):
    statistics.ensembles(models[:5])


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int8, np.float16])
def test_answers_of_any_dtype_are_probabilities(dtype):
  models = [np.array(x, dtype) for x in ([0, 1, 0, 0], [1, 1, 0, 1])]
  found = statistics.measure(models, np.array([1, 1, 0, 0]))
  assert found.churn_KK[0, 1] == 0.5
  assert found.relative_KK[0, 1] == 1.0
  assert found.error_K.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    'array, words',
    [
        ([0.5, np.nan], r'1 of 2 predictions are NaN.*row 1'),
        ([0.5, 1.5], r'not probabilities: row 1 holds 1.5.*sigmoid'),
        ([[0.5, 0.4]], r'2 classes of row 0 sum to 0.9'),
        ([], r'shape \(N,\) or \(N, C\), got shape \(0,\)'),
        (np.zeros((2, 2, 2)), r'got shape \(2, 2, 2\)'),
        (['a', 'b'], 'expected numbers'),
    ],
)
def test_what_is_no_probability_is_refused(array, words):
  with pytest.raises(ValueError, match=f'mine: .*{words}'):
    statistics.check_probabilities(np.array(array), 'mine')


HALVES = [np.full(3, 0.5)] * 2


@pytest.mark.parametrize(
    'models, labels, words',
    [
        (HALVES, [0, 1], r'labels of shape \(2,\)'),
        (HALVES, [0, 1, 2], 'label 2 in row 2'),
        (HALVES, [0, 0.5, 1], 'label 0.5 in row 1'),
        (HALVES, [0, np.nan, 1], 'label nan in row 1'),
        (HALVES, ['a', 'b', 'c'], 'expected whole numbers'),
        (HALVES[:1], [0, 1, 1], 'at least 2, got 1'),
        ([HALVES[0], HALVES[0][1:]], [0, 1, 1], r'retrain 1 has \(2,\)'),
    ],
)
def test_models_and_labels_that_do_not_fit_are_refused(models, labels, words):
  with pytest.raises(ValueError, match=words):
    statistics.measure(models, np.array(labels))


# --- Intervals ---------------------------------------------------------------


def distances(scales, size=300, seed=0):
  """Churn (K, K) of models whose distance to the others is their own."""
  rng = np.random.default_rng(seed)
  models = [0.5 + 0.02 * s * rng.normal(size=size) for s in scales]
  return statistics.measure(models).churn_KK


def half(found):
  return (found.high - found.low) / 2


def test_means_and_half_ranges_are_those_of_the_paper():
  values_KK = statistics.symmetric([1.0, 2.0, 6.0], 3)
  found = statistics.mean_over_pairs(values_KK)
  assert (found.mean, found.half_range) == (3.0, 2.5)
  assert found.values == (1.0, 2.0, 6.0)
  found = statistics.mean_over_retrains([0.1, 0.5, 0.3])
  assert (found.mean, found.half_range) == pytest.approx((0.3, 0.2))


def test_retrains_are_resampled_and_none_is_compared_with_itself():
  """All 27 draws of three retrains, less the three that have no pair."""
  values_KK = distances([1.0, 1.5, 3.0])
  draws = []
  for draw in itertools.product(range(3), repeat=3):
    pairs = [values_KK[a, b] for a, b in itertools.combinations(draw, 2)]
    found = [d for d in pairs if d]  # A distance of 0 is to itself.
    if found:
      draws.append(np.mean(found))
  assert len(draws) == 24
  expected = np.std(draws) * stats.t.ppf(0.975, 2) * np.sqrt(3 / 2)
  got = half(statistics.mean_over_pairs(values_KK))
  assert got == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize('retrains', [3, 6, 20])
def test_the_interval_of_a_mean_of_retrains_is_students(retrains):
  values = np.random.default_rng(0).normal(size=retrains)
  found = statistics.mean_over_retrains(values)
  expected = stats.t.interval(
      0.95, retrains - 1, values.mean(), stats.sem(values)
  )
  np.testing.assert_allclose([found.low, found.high], expected)
  same = statistics.mean_over_retrains([0.3] * retrains)
  assert (same.low, same.high) == pytest.approx((0.3, 0.3))


def test_intervals_are_a_function_of_the_seed():
  values_KK = distances([1, 2, 3, 4])
  a, b, c = (statistics.mean_over_pairs(values_KK, seed) for seed in (0, 0, 1))
  assert a == b
  assert (a.mean, a.values) == (c.mean, c.values) and a.low != c.low


def test_two_retrains_have_no_interval():
  for found in (
      statistics.mean_over_pairs(distances([1, 2])),
      statistics.mean_over_retrains([1.0, 2.0]),
      statistics.change_of_churn(distances([1, 2]), distances([1, 1])),
  ):
    assert np.isfinite(found.mean)
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize('retrains', [3, 5, 10])
def test_intervals_cover_what_they_should(retrains):
  """In 150 studies of models of random quality, whose true churn is known."""
  rng = np.random.default_rng(retrains)
  draw = lambda size: 1 + 0.15 * rng.normal(size=size)
  truth = 0.02 * np.sqrt(2 / np.pi) * np.hypot(*draw((2, 100_000))).mean()
  hits = []
  for study in range(150):
    arm_KK = distances(draw(retrains), seed=[study, 1])
    base_KK = distances(2 * draw(retrains), seed=[study, 2])
    churn = statistics.mean_over_pairs(arm_KK, study, 500)
    change = statistics.change_of_churn(arm_KK, base_KK, study, 500)
    covers = lambda found, true: found.low <= true <= found.high
    hits.append([covers(churn, truth), covers(change, -0.5)])
  covered = np.mean(hits, axis=0)
  # 0.95 less or more what 150 studies can tell, and a little.
  assert (covered >= 0.88).all() and (covered < 1).all(), covered


def test_the_change_of_churn_is_one_of_means():
  arm_KK, base_KK = distances([1, 2, 3]), distances([4, 5, 6], seed=1)
  mean = lambda m: np.mean([m[0, 1], m[0, 2], m[1, 2]])
  change = statistics.change_of_churn(arm_KK, base_KK)
  assert change.mean == pytest.approx(mean(arm_KK) / mean(base_KK) - 1)
  assert change.low < change.mean < change.high


def test_arms_of_common_seeds_are_resampled_together():
  """An arm of 0.6 times the churn in whatever retrains has exactly that."""
  base_KK = distances([1, 2, 3, 4, 5])
  change = statistics.change_of_churn(0.6 * base_KK, base_KK)
  assert half(change) == pytest.approx(0, abs=1e-12)
  assert change.mean == pytest.approx(-0.4)
  apart = statistics.change_of_churn(0.6 * base_KK[:4, :4], base_KK)
  assert half(apart) > 0.05


def test_arms_without_churn_compare_to_nothing():
  still_KK = np.zeros((3, 3))
  assert np.isnan(statistics.change_of_churn(still_KK, still_KK).mean)
  assert statistics.mean_over_pairs(still_KK).mean == 0
