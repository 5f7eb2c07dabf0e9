"""What is read back of a study: bytes, divergence, rates."""

import types

import numpy as np
import pytest

from codistill_jax.exchange.plan import Plan
from experiments.reports import records as records_lib
from experiments.studies import load
from experiments.studies.declaration import Arm
from experiments.studies.plan import PlannedRun

SETTINGS = {'publish_dtype': 'bfloat16', 'model_parameters': 10}


@pytest.mark.parametrize('every, burn_in', [(5, 0), (5, 10), (10, 3), (7, 100)])
def test_bytes_are_those_of_the_publications_that_were_fetched(every, burn_in):
  arm = Arm('two', 'two groups', communication='exchange', workers=1)
  outcome = {'exchange_every': every, 'burn_in_steps': burn_in, 'peers': 3.0}
  steps_N = np.arange(1, 61)
  plan = Plan(every=every, mode='lockstep')
  # By the rule of the exchange itself.
  fetched_N = [
      len({plan.asked(s) for s in range(burn_in, n) if plan.asked(s)})
      for n in steps_N
  ]
  found = load._bytes(arm, outcome, SETTINGS, steps_N)
  np.testing.assert_allclose(found, 3 * 2 * 10 * np.array(fetched_N))


def test_workers_of_a_group_receive_what_they_reduce_besides():
  arm = Arm('two', 'two groups', communication='exchange', workers=4)
  outcome = {'exchange_every': 5, 'burn_in_steps': 100, 'peers': 1.0}
  found = load._bytes(arm, outcome, SETTINGS, np.array([2]))
  np.testing.assert_allclose(found, [2 * (2 * 3 / 4) * 20])


def group_of(values):
  records = [
      {'step': 10 * (i + 1), 'async/diverged': x} for i, x in enumerate(values)
  ]
  return records_lib.Group(0, records_lib.to_frame(records))


@pytest.mark.parametrize(
    'values, expected',
    [
        ([0, 0, 0], None),
        ([0, 1, 0], None),  # It came back.
        ([0, 1, 0, 1, 1], 40),
        ([1, 1], 10),
        ([], None),
    ],
)
def test_a_loss_that_went_up_for_good_is_divergence(values, expected):
  found = load._diverged_at({'diverged_at': None}, [group_of(values)])
  assert found == expected
  assert load._diverged_at({'diverged_at': 7}, [group_of(values)]) == 7


def test_an_arm_at_two_rates_is_no_arm():
  runs = {
      PlannedRun('two', seed, None, False): types.SimpleNamespace(rate=rate)
      for seed, rate in enumerate((0.1, 0.1, 0.2))
  }
  with pytest.raises(
      ValueError, match=r'arm two at learning rates 0.1 and 0.2'
  ):
    load._check_rates('runs/x', runs)
  tuning = {
      PlannedRun('two', 1000, rate, True): types.SimpleNamespace(rate=rate)
      for rate in (0.1, 0.2)
  }
  load._check_rates('runs/x', tuning)
