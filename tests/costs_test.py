"""Tests of studies/costs: bytes, maxima of step times, fits, the crossover."""

import itertools
import math

import numpy as np
import pytest

from codistill_jax.statistics import Estimate
from experiments.studies import costs
from experiments.studies.analysis import Effect
from experiments.studies.costs import Fit, Latency, WallTime

WORKERS = [1, 2, 3, 16, 256, 4096]
Z99 = 2.3263478740408408  # The normal quantile of 99 %.


@pytest.mark.parametrize('pattern', ['all_reduce', 'exchange'])
@pytest.mark.parametrize('workers', [1, 2, 3, 8, 256])
def test_an_all_reduce_is_a_ring(pattern, workers):
  # By worker 0, to add up and then to hand round.
  received = 2 * sum(1000.0 / workers for _ in range(workers - 1))
  got = costs.bytes_per_update(pattern, 1000.0, workers=workers)
  assert got == pytest.approx(received)


@pytest.mark.parametrize(
    'pattern, numbers, expected',
    [
        # The server sends and receives, whatever the workers.
        ('server', {'workers': 128}, 2000),
        # An all-reduce now and then.
        ('outer', {'workers': 4}, 1500),
        ('outer', {'workers': 4, 'outer_every': 100}, 15),
    ],
)
def test_bytes_of_an_update(pattern, numbers, expected):
  got = costs.bytes_per_update(pattern, 1000.0, **numbers)
  assert got == pytest.approx(expected)
  thrice = costs.bytes_per_update(pattern, 3000.0, **numbers)
  assert thrice == pytest.approx(3 * got)


# --- Maxima ------------------------------------------------------------------


def test_the_larger_of_one_and_two_log_normals_are_known():
  sigma = math.log(3.0) / Z99
  mean = math.exp(sigma**2 / 2)
  one, two = (costs.expected_maximum(Latency(3.0), w) for w in (1, 2))
  assert one == pytest.approx(mean, rel=1e-8)
  assert two == pytest.approx(mean * (1 + math.erf(sigma / 2)), rel=1e-8)


def test_log_normal_maxima_agree_with_draws():
  rng = np.random.default_rng(0)
  sigma = math.log(2.0) / Z99
  draws = np.exp(sigma * rng.standard_normal((20_000, 64))).max(axis=1)
  got = costs.expected_maximum(Latency(2.0), 64)
  error = draws.std() / math.sqrt(len(draws))
  assert abs(got - draws.mean()) < 4 * error


def test_the_maximum_of_a_sample_is_exact():
  times = (3.0, 1.0, 4.0, 1.5)
  for workers in (1, 2, 3):
    all_draws = itertools.product(times, repeat=workers)
    expected = np.mean([max(draw) for draw in all_draws])
    got = costs.expected_maximum(Latency(sample=times), workers)
    assert got == pytest.approx(expected)
  most = costs.expected_maximum(Latency(sample=times), 10**6)
  assert most == pytest.approx(4.0)


def test_a_sample_is_in_units_of_its_median():
  assert costs.sampled([20.0, 10.0, 40.0]) == (1.0, 0.5, 2.0)
  for times in ([1.0, 0.0], [], [1.0, math.inf]):
    with pytest.raises(ValueError, match='all positive and finite'):
      costs.sampled(times)


def test_more_workers_and_longer_tails_take_longer():
  short, long = (
      [costs.expected_maximum(Latency(tail), w) for w in WORKERS]
      for tail in (1.5, 3.0)
  )
  assert short == sorted(short) and long == sorted(long)
  assert all(a < b for a, b in zip(short, long))
  assert costs.expected_maximum(Latency(1.0), 1000) == 1.0


def test_a_step_adds_the_all_reduce():
  assumed = Latency(1.0, alpha=0.5, model_time=1.0)
  assert costs.step_time(assumed, 1) == pytest.approx(1.0)
  assert costs.step_time(assumed, 4) == pytest.approx(3.0)
  assert costs.step_time(assumed, 4, compute=1.5) == pytest.approx(3.5)


# --- Fits --------------------------------------------------------------------


def test_a_fit_finds_what_made_the_steps():
  workers = [1, 2, 4, 8, 16, 32]
  fit = costs.fit_steps(workers, [430 * (1 + 5.3 / w) for w in workers])
  assert fit == pytest.approx((430, 5.3, 0), rel=1e-5, abs=1e-5)


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
  assumed = Latency(tail, alpha=0.0, model_time=0.0, most_workers=1024)
  return WallTime(dict(one), {}, 1, ratio, compute, fit, assumed)


def test_the_crossover_is_where_it_can_be_worked_out():
  # No tail, no network: two groups win where ratio S(W) < S(2 W), which for
  # S = 1 + 8 / W and a ratio of 0.75 is 0.75 + 6 / W < 1 + 4 / W: W > 8.
  found = model(0.75)
  assert list(found.gains()) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
  assert found.gains()[16] == pytest.approx((1 + 8 / 32) / (0.75 * 1.5))
  assert found.crossover() == 16
  # A second group that brings nothing never wins, nor one whose teachers eat up
  # what it brings; a tail brings the crossover nearer.
  assert model(1.0).crossover() is None
  assert model(0.75, compute=4 / 3).crossover() is None
  assert model(0.9, tail=4.0).crossover() < model(0.9).crossover()


def test_the_crossover_is_where_two_groups_stay_ahead():
  # At 2 workers by chance, then not, then for good.
  one = {1: 8.0, 2: 4.0, 4: 4.0, 8: 2.0}
  found = model(0.8, one=one.items(), fit=Fit(2.0, 0.0, 0.0))
  ahead = [gain > 1 for gain in found.gains().values()]
  assert ahead[:4] == [False, True, False, True]
  assert found.crossover() == 8


# --- A map of batches --------------------------------------------------------


def test_a_second_group_pays_where_the_whole_interval_says_so():
  def effect(*ends, mean=1000.0):
    found = ends and Estimate(sum(ends) / 2, 0.0, *ends, (1.0,) * 3)
    return Effect(True, (), (), found or None, mean, 500.0, 20.0)

  pays = {
      1: effect(0.8, 0.9),
      2: effect(0.9, 1.1),
      4: effect(1.1, 1.2),
      8: effect(),
      16: effect(0.8, 0.9, mean=510.0),  # One evaluation apart.
  }
  found = costs.TargetMap('late', 3.0, {}, None, {}, pays)
  assert (found.where(True), found.where(False)) == ([1], [4])
