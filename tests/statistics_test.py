"""Tests of statistics: churn against brute force, intervals against chance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from codistill_jax import metrics, statistics


def sigmoids(count=4, size=60, seed=0):
  rng = np.random.default_rng(seed)
  base = rng.normal(size=size)
  logits = [base + 0.5 * rng.normal(size=size) for _ in range(count)]
  return [1 / (1 + np.exp(-x)) for x in logits]


def softmaxes(count=3, size=40, classes=5, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(count, size, classes))
  return list(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def labels_for(size, classes=2):
  return np.random.default_rng(9).integers(classes, size=size)


def two_classes(probs):
  return np.stack([1 - probs, probs], axis=1)


# --- Figures -----------------------------------------------------------------


def test_figures_of_a_sigmoid_are_those_of_a_loop_over_examples():
  models, labels = sigmoids(), labels_for(60)
  found = statistics.measure(models, labels)
  for k, p in enumerate(models):
    loss = [-np.log(x if y else 1 - x) for x, y in zip(p, labels)]
    assert found.log_loss_K[k] == pytest.approx(np.mean(loss))
    wrong = [(x > 0.5) != bool(y) for x, y in zip(p, labels)]
    assert found.error_K[k] == pytest.approx(np.mean(wrong))
  for a, b in itertools.combinations(range(4), 2):
    pairs = list(zip(models[a], models[b]))
    for matrix, expected in (
        (found.churn_KK, [abs(p - q) for p, q in pairs]),
        (found.relative_KK, [2 * abs(p - q) / (p + q) for p, q in pairs]),
        (found.disagreement_KK, [(p > 0.5) != (q > 0.5) for p, q in pairs]),
    ):
      assert matrix[a, b] == matrix[b, a] == pytest.approx(np.mean(expected))
      assert matrix[a, a] == 0


def test_figures_are_those_of_the_metrics():
  models, labels = softmaxes(), labels_for(40, 5)
  found = statistics.measure(models, labels)
  for a, b in itertools.combinations(range(3), 2):
    p, q = models[a], models[b]
    assert found.churn_KK[a, b] == pytest.approx(
        float(metrics.churn(p, q).value), rel=1e-5
    )
    assert found.disagreement_KK[a, b] == pytest.approx(
        float(metrics.disagreement(p, q).value)
    )
    rows = np.arange(40)
    relative = metrics.relative_difference(p[rows, labels], q[rows, labels])
    assert found.relative_KK[a, b] == pytest.approx(
        float(relative.value), rel=1e-5
    )
  loss = metrics.cross_entropy(np.log(models[1]), labels)
  assert found.log_loss_K[1] == pytest.approx(float(loss.value), rel=1e-5)


def test_a_sigmoid_and_a_softmax_of_two_classes_give_the_same_figures():
  models, labels = sigmoids(), labels_for(60)
  a = statistics.measure(models, labels)
  b = statistics.measure([two_classes(p) for p in models], labels)
  for x, y in zip(a, b):
    np.testing.assert_allclose(x, y, rtol=1e-9)


def test_without_labels_churn_is_the_same_and_losses_are_not_there():
  models = softmaxes()
  found = statistics.measure(models)
  assert found.log_loss_K is found.error_K is found.relative_KK is None
  assert (
      found.churn_KK == statistics.measure(models, labels_for(40)).churn_KK
  ).all()


def test_certain_and_impossible_predictions_have_finite_figures():
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
  # A change of one model changes one ensemble.
  other = statistics.ensembles([1 - models[0], *models[1:]])
  assert [bool((a != b).any()) for a, b in zip(found, other)] == [1, 0, 0]
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


@pytest.mark.parametrize(
    'labels, words',
    [
        ([0, 1], r'labels of shape \(2,\)'),
        ([0, 1, 2], 'label 2 in row 2'),
        ([0, 0.5, 1], 'label 0.5 in row 1'),
        ([0, np.nan, 1], 'label nan in row 1'),
        (['a', 'b', 'c'], 'expected whole numbers'),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, words):
  with pytest.raises(ValueError, match=words):
    statistics.measure([np.full(3, 0.5)] * 2, np.array(labels))


def test_churn_needs_two_models_of_the_same_examples():
  with pytest.raises(ValueError, match='at least 2, got 1'):
    statistics.measure(sigmoids(1))
  with pytest.raises(ValueError, match=r'retrain 1 has \(59,\)'):
    statistics.measure([sigmoids(1)[0], sigmoids(1)[0][1:]])


# --- Intervals ---------------------------------------------------------------


def distances(scales, size=300, seed=0):
  """Churn (K, K) of models whose distance to the others is their own."""
  rng = np.random.default_rng(seed)
  models = [0.5 + 0.02 * s * rng.normal(size=size) for s in scales]
  return statistics.measure(models).churn_KK


def half(figure):
  return (figure.high - figure.low) / 2


def test_means_and_half_ranges_are_those_of_the_paper():
  values_KK = np.array([[0, 1, 2], [1, 0, 6], [2, 6, 0.0]])
  figure = statistics.mean_over_pairs(values_KK)
  assert (figure.mean, figure.half_range) == (3.0, 2.5)
  assert figure.values == (1.0, 2.0, 6.0)
  figure = statistics.mean_over_retrains([0.1, 0.5, 0.3])
  assert figure.mean == pytest.approx(0.3)
  assert figure.half_range == pytest.approx(0.2)


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
  assert half(statistics.mean_over_pairs(values_KK)) == pytest.approx(
      expected, rel=0.03
  )


def test_pairs_are_not_taken_for_independent():
  values_KK = distances([1, 1, 1, 1, 1, 4])
  figure = statistics.mean_over_pairs(values_KK)
  naive = 1.96 * np.std(figure.values) / np.sqrt(len(figure.values))
  assert half(figure) > 1.5 * naive


@pytest.mark.parametrize('retrains', [3, 6, 20])
def test_the_interval_of_a_mean_of_retrains_is_students(retrains):
  values = np.random.default_rng(0).normal(size=retrains)
  found = statistics.mean_over_retrains(values)
  np.testing.assert_allclose(
      [found.low, found.high],
      stats.t.interval(0.95, retrains - 1, values.mean(), stats.sem(values)),
      rtol=0.05,
  )
  same = statistics.mean_over_retrains([0.3] * retrains)
  assert same.low == pytest.approx(0.3) and same.high == pytest.approx(0.3)


def test_intervals_are_a_function_of_the_seed():
  values_KK = distances([1, 2, 3, 4])
  a, b, c = (statistics.mean_over_pairs(values_KK, seed) for seed in (0, 0, 1))
  assert a == b
  assert (a.mean, a.values) == (c.mean, c.values) and a.low != c.low


def test_two_retrains_have_no_interval():
  for figure in (
      statistics.mean_over_pairs(distances([1, 2])),
      statistics.mean_over_retrains([1.0, 2.0]),
      statistics.change_of_churn(distances([1, 2]), distances([1, 1])),
  ):
    assert np.isfinite(figure.mean)
    assert np.isnan([figure.low, figure.high]).all()


@pytest.mark.parametrize('retrains', [3, 5, 10])
def test_intervals_cover_what_they_should(retrains):
  """In 150 studies of models of random quality, whose true churn is known."""
  rng = np.random.default_rng(retrains)
  draw = lambda size: 1 + 0.15 * rng.normal(size=size)
  many = draw((2, 100_000))
  truth = 0.02 * np.sqrt(2 / np.pi) * np.hypot(*many).mean()
  hits = []
  for study in range(150):
    arm_KK = distances(draw(retrains), seed=[study, 1])
    base_KK = distances(2 * draw(retrains), seed=[study, 2])
    churned = statistics.mean_over_pairs(arm_KK, study, resamples=500)
    change = statistics.change_of_churn(arm_KK, base_KK, study, resamples=500)
    hits.append(
        [
            churned.low <= truth <= churned.high,
            change.low <= -0.5 <= change.high,
        ]
    )
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
