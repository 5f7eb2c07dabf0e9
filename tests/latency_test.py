"""Tests of studies/latency: maxima, fits and the crossover."""

import itertools
import math

import numpy as np
import pytest

from experiments.studies import latency
from experiments.studies.latency import Empirical, Latency, LogNormal

WORKERS = [1, 2, 3, 16, 256, 4096]


# --- Maxima ------------------------------------------------------------------


def test_one_log_normal_worker_has_its_mean():
  sigma = math.log(3.0) / 2.3263478740408408  # Of the 99th percentile.
  got = latency.expected_maximum(LogNormal(2.0, 6.0), 1)
  assert got == pytest.approx(2.0 * math.exp(sigma**2 / 2), rel=1e-8)


def test_the_larger_of_two_log_normals_is_known():
  sigma = math.log(3.0) / 2.3263478740408408
  mean, phi = 2.0 * math.exp(sigma**2 / 2), math.erf(sigma / 2)
  got = latency.expected_maximum(LogNormal(2.0, 6.0), 2)
  assert got == pytest.approx(mean * (1 + phi), rel=1e-8)


def test_log_normal_maxima_agree_with_draws():
  rng = np.random.default_rng(0)
  sigma = math.log(2.0) / 2.3263478740408408
  draws = np.exp(sigma * rng.standard_normal((20_000, 64))).max(axis=1)
  got = latency.expected_maximum(LogNormal(1.0, 2.0), 64)
  error = draws.std() / math.sqrt(len(draws))
  assert abs(got - draws.mean()) < 4 * error


def test_the_maximum_of_a_sample_is_exact():
  sample = (3.0, 1.0, 4.0, 1.5)
  for workers in (1, 2, 3):
    all_draws = itertools.product(sample, repeat=workers)
    expected = np.mean([max(draw) for draw in all_draws])
    got = latency.expected_maximum(Empirical(sample), workers)
    assert got == pytest.approx(expected)
  assert latency.expected_maximum(Empirical(sample), 10**6) == (
      pytest.approx(4.0)
  )


def test_a_sample_is_in_units_of_its_median():
  sample = latency.from_sample([20.0, 10.0, 40.0])
  assert sample == Empirical((1.0, 0.5, 2.0))
  with pytest.raises(ValueError, match='all positive'):
    latency.from_sample([1.0, 0.0])


def test_more_workers_and_longer_tails_take_longer():
  times = [
      latency.expected_maximum(LogNormal(1.0, p99), w)
      for p99 in (1.5, 3.0)
      for w in WORKERS
  ]
  assert times[:6] == sorted(times[:6]) and times[6:] == sorted(times[6:])
  assert all(short < long for short, long in zip(times[:6], times[6:]))


def test_without_a_tail_nobody_waits():
  assert latency.expected_maximum(LogNormal(1.0, 1.0), 1000) == (
      pytest.approx(1.0)
  )


def test_a_step_adds_the_all_reduce():
  assumed = Latency(LogNormal(1.0, 1.0), alpha=0.5, model_time=1.0)
  assert latency.step_time(assumed, 1) == pytest.approx(1.0)
  assert latency.step_time(assumed, 4) == pytest.approx(3.0)
  slower = latency.step_time(assumed, 4, compute=1.5)
  assert slower == pytest.approx(3.5)


def test_distributions_that_make_no_sense_are_refused():
  with pytest.raises(ValueError, match='0 < median <= p99'):
    latency.expected_maximum(LogNormal(2.0, 1.0), 3)
  with pytest.raises(ValueError, match='at least 1 worker'):
    latency.expected_maximum(LogNormal(1.0, 2.0), 0)
  with pytest.raises(ValueError, match='at least one finite'):
    latency.expected_maximum(Empirical(()), 2)


# --- Fits --------------------------------------------------------------------


def test_a_fit_finds_what_made_the_steps():
  workers = [1, 2, 4, 8, 16, 32]
  fit = latency.fit_steps(workers, [430 * (1 + 5.3 / w) for w in workers])
  assert fit.floor == pytest.approx(430, rel=1e-5)
  assert fit.critical == pytest.approx(5.3, rel=1e-5)
  assert fit.error < 1e-5


def test_a_fit_never_goes_below_its_floor():
  rng = np.random.default_rng(0)
  for _ in range(5):
    steps = 500 * (1 + 4 / np.array([1, 2, 4, 8])) * rng.lognormal(0, 0.2, 4)
    fit = latency.fit_steps([1, 2, 4, 8], steps)
    assert fit.steps(10**6) >= fit.floor > 0


def test_a_fit_is_the_least_of_squares():
  workers, steps = [1, 2, 4, 8], [1000, 700, 400, 380]
  fit = latency.fit_steps(workers, steps)
  error = lambda floor, critical: np.sqrt(
      np.mean(
          [
              (math.log(s) - math.log(floor * (1 + critical / w))) ** 2
              for w, s in zip(workers, steps)
          ]
      )
  )
  assert error(fit.floor, fit.critical) == pytest.approx(fit.error)
  for a, b in itertools.product((0.99, 1.01), (0.99, 1.01)):
    assert error(a * fit.floor, b * fit.critical) > fit.error


def test_two_points_are_no_curve():
  with pytest.raises(ValueError, match='three or more'):
    latency.fit_steps([1, 2], [10, 5])


# --- Crossover ---------------------------------------------------------------


def crossing(steps, ratio, compute=1.0, tail=1.0, **kwargs):
  assumed = Latency(
      LogNormal(1.0, tail), alpha=0.0, model_time=0.0, most_workers=1024
  )
  return latency.crossover(steps, ratio, compute, assumed, **kwargs)


def test_the_crossover_is_where_it_can_be_worked_out():
  # No tail, no network: two groups win where ratio S(W) < S(2 W), which for
  # S = 1 + 8 / W and a ratio of 0.75 is 0.75 + 6 / W < 1 + 4 / W: W > 8.
  found = crossing(lambda w: 1 + 8 / w, 0.75)
  assert found.workers_K == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
  assert found.first == 16


def test_a_second_group_that_brings_nothing_never_wins():
  assert crossing(lambda w: 1 + 8 / w, 1.0).first is None
  # Nor one whose teachers eat up what it brings.
  assert crossing(lambda w: 1 + 8 / w, 0.75, compute=4 / 3).first is None


def test_a_tail_brings_the_crossover_nearer():
  steps = lambda w: 1 + 8 / w
  assert crossing(steps, 0.9, tail=4.0).first < crossing(steps, 0.9).first


def test_the_first_is_the_one_from_which_on_it_stays():
  # At 2 workers by chance, then not, then for good.
  steps = {1: 8.0, 2: 4.0, 4: 4.0, 8: 2.0}
  found = crossing(lambda w: steps.get(w, 2.0), 0.8)
  ahead = [two < one for one, two in zip(found.one_K, found.two_K)]
  assert ahead[:4] == [False, True, False, True]
  assert found.first == 8
