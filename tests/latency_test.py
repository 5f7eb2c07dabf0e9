"""Tests of studies/latency and wall_time: maxima, fits and the crossover."""

import itertools
import math

import numpy as np
import pytest

from experiments.studies import costs
from experiments.studies.costs import (
    Empirical,
    Fit,
    Latency,
    LogNormal,
    WallTime,
)

WORKERS = [1, 2, 3, 16, 256, 4096]
Z99 = 2.3263478740408408  # The normal quantile of 99 %.


# --- Maxima ------------------------------------------------------------------


def test_the_larger_of_one_and_two_log_normals_are_known():
  sigma = math.log(3.0) / Z99
  mean = 2.0 * math.exp(sigma**2 / 2)
  one, two = (costs.expected_maximum(LogNormal(2.0, 6.0), w) for w in (1, 2))
  assert one == pytest.approx(mean, rel=1e-8)
  assert two == pytest.approx(mean * (1 + math.erf(sigma / 2)), rel=1e-8)


def test_log_normal_maxima_agree_with_draws():
  rng = np.random.default_rng(0)
  sigma = math.log(2.0) / Z99
  draws = np.exp(sigma * rng.standard_normal((20_000, 64))).max(axis=1)
  got = costs.expected_maximum(LogNormal(1.0, 2.0), 64)
  error = draws.std() / math.sqrt(len(draws))
  assert abs(got - draws.mean()) < 4 * error


def test_the_maximum_of_a_sample_is_exact():
  sample = (3.0, 1.0, 4.0, 1.5)
  for workers in (1, 2, 3):
    all_draws = itertools.product(sample, repeat=workers)
    expected = np.mean([max(draw) for draw in all_draws])
    got = costs.expected_maximum(Empirical(sample), workers)
    assert got == pytest.approx(expected)
  most = costs.expected_maximum(Empirical(sample), 10**6)
  assert most == pytest.approx(4.0)


def test_a_sample_is_in_units_of_its_median():
  sample = costs.from_sample([20.0, 10.0, 40.0])
  assert sample == Empirical((1.0, 0.5, 2.0))


def test_more_workers_and_longer_tails_take_longer():
  short, long = (
      [costs.expected_maximum(LogNormal(1.0, p99), w) for w in WORKERS]
      for p99 in (1.5, 3.0)
  )
  assert short == sorted(short) and long == sorted(long)
  assert all(a < b for a, b in zip(short, long))
  without = costs.expected_maximum(LogNormal(1.0, 1.0), 1000)
  assert without == pytest.approx(1.0)


def test_a_step_adds_the_all_reduce():
  assumed = Latency(LogNormal(1.0, 1.0), alpha=0.5, model_time=1.0)
  assert costs.step_time(assumed, 1) == pytest.approx(1.0)
  assert costs.step_time(assumed, 4) == pytest.approx(3.0)
  assert costs.step_time(assumed, 4, compute=1.5) == pytest.approx(3.5)


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: costs.from_sample([1.0, 0.0]), 'all positive'),
        (
            lambda: costs.expected_maximum(LogNormal(2.0, 1.0), 3),
            '0 < median <= p99',
        ),
        (
            lambda: costs.expected_maximum(LogNormal(1.0, 2.0), 0),
            'at least 1 worker',
        ),
        (
            lambda: costs.expected_maximum(Empirical(()), 2),
            'at least one finite',
        ),
        (lambda: costs.fit_steps([1, 2], [10, 5]), 'three or more'),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()


# --- Fits --------------------------------------------------------------------


def test_a_fit_finds_what_made_the_steps():
  workers = [1, 2, 4, 8, 16, 32]
  fit = costs.fit_steps(workers, [430 * (1 + 5.3 / w) for w in workers])
  assert fit == pytest.approx((430, 5.3, 0), rel=1e-5, abs=1e-5)
  assert fit.steps(10**6) >= fit.floor


def test_a_fit_is_the_least_of_squares():
  workers, steps = np.array([1, 2, 4, 8]), np.array([1000, 700, 400, 380])
  fit = costs.fit_steps(workers, steps)

  def error(floor, critical):
    rest = np.log(steps) - np.log(floor * (1 + critical / workers))
    return np.sqrt(np.mean(rest**2))

  assert error(fit.floor, fit.critical) == pytest.approx(fit.error)
  for a, b in itertools.product((0.99, 1.01), (0.99, 1.01)):
    assert error(a * fit.floor, b * fit.critical) > fit.error


# --- Crossover ---------------------------------------------------------------


FIT = Fit(1.0, 8.0, 0.0)


def model(ratio, compute=1.0, tail=1.0, one=((1, 9.0),), fit=FIT):
  assumed = Latency(
      LogNormal(1.0, tail), alpha=0.0, model_time=0.0, most_workers=1024
  )
  return WallTime(dict(one), {}, 1, ratio, compute, fit, assumed)


def test_the_crossover_is_where_it_can_be_worked_out():
  # No tail, no network: two groups win where ratio S(W) < S(2 W), which for
  # S = 1 + 8 / W and a ratio of 0.75 is 0.75 + 6 / W < 1 + 4 / W: W > 8.
  found = model(0.75)
  assert list(found.gains()) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
  assert found.gains()[16] == pytest.approx((1 + 8 / 32) / (0.75 * 1.5))
  assert found.crossover() == 16


def test_a_second_group_that_brings_nothing_never_wins():
  assert model(1.0).crossover() is None
  # Nor one whose teachers eat up what it brings.
  assert model(0.75, compute=4 / 3).crossover() is None


def test_a_tail_brings_the_crossover_nearer():
  assert model(0.9, tail=4.0).crossover() < model(0.9).crossover()


def test_the_crossover_is_where_two_groups_stay_ahead():
  # At 2 workers by chance, then not, then for good.
  one = {1: 8.0, 2: 4.0, 4: 4.0, 8: 2.0}
  found = model(0.8, one=one.items(), fit=Fit(2.0, 0.0, 0.0))
  ahead = [gain > 1 for gain in found.gains().values()]
  assert ahead[:4] == [False, True, False, True]
  assert found.crossover() == 8
