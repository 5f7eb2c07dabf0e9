"""When publications are made, which is asked for, and what teachers are."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.base import Variables
from codistill_jax.exchange import protocol
from codistill_jax.exchange.protocol import Plan
from codistill_jax.exchange.publications import Publication


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'every': 0}, 'exchange_every=0; set it to at least 1 step'),
        ({'mode': 'newest'}, "'newest' is not one of freshest, lockstep"),
        (
            {'mode': 'lockstep', 'staleness': 7},
            'not a multiple of exchange_eve',
        ),
        ({'mode': 'lockstep', 'staleness': -5}, 'staleness=-5 is not a multip'),
        ({'mode': 'freshest', 'staleness': 5}, 'in lockstep only'),
        ({'publish_dtype': 'float16'}, "'float16' is not one of float32, bfl"),
        ({'teacher_dtype': 'int8'}, "'int8' is not one of float32, bfloat16"),
        ({'topology': 'star'}, "topology 'star' is not one of all, ring"),
        (
            {'staleness_policy': 'ignore'},
            "'ignore' is not one of drop, wait, f",
        ),
        ({'staleness_policy': 'wait'}, "'wait' acts nowhere without max_stal"),
        (
            {'max_staleness_steps': 9},
            '=9; set it to at least twice exchange_eve',
        ),
        ({'max_staleness_steps': 10.0}, '=10.0; set it to at least twice exch'),
        (
            {'max_staleness_steps': 9, 'mode': 'lockstep'},
            'max_staleness_steps=9 in lockstep',
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    Plan(**{'every': 5, **kwargs})
  assert '\n' not in str(error.value)


@given(
    every=st.integers(1, 20), ages=st.integers(0, 4), step=st.integers(0, 300)
)
def test_what_is_asked_for_was_published_and_has_the_age(every, ages, step):
  plan = Plan(every, 'lockstep', ages * every)
  asked = plan.asked(step)
  if asked is None:
    # Before the first publication of that age; none is made at step 0.
    assert step < every * (ages + 1)
    return
  assert plan.due(asked)
  assert ages * every <= step - asked < (ages + 1) * every
  # Peers that are at the same step, or one exchange behind if the staleness
  # allows it, have made it.
  assert asked <= step


@given(
    every=st.integers(1, 20),
    ages=st.integers(0, 4),
    start=st.integers(0, 300),
    later=st.integers(0, 100),
)
def test_a_run_needs_nothing_older_than_is_kept_for_it(
    every, ages, start, later
):
  plan = Plan(every, 'lockstep', ages * every)
  asked = plan.asked(start + later)
  assert asked is None or plan.keep_from(start) <= asked
  # And no more is kept than is needed.
  assert plan.keep_from(start) == (plan.asked(start) or 0)


def test_nothing_is_published_before_the_first_update():
  plan = Plan(every=5)
  assert [step for step in range(16) if plan.due(step)] == [5, 10, 15]


@pytest.mark.parametrize('limit', [None, 10, 12])
def test_a_teacher_is_too_old_beyond_its_limit(limit):
  plan = Plan(every=5, max_staleness_steps=limit)
  for step in range(40):
    old = plan.too_old(step, Publication(1, step=10, time=0.0))
    assert old == (limit is not None and step - 10 > limit)
    # Who has published nothing is as old as its start.
    assert plan.too_old(step, None) == (limit is not None and step > limit)


def test_a_plan_knows_peers_and_readers():
  plan = Plan(topology='ring')
  assert plan.peers_of(0, 4) == (3,) and plan.readers_of(0, 4) == (1,)
  plan = Plan(topology='random-2', topology_seed=3)
  for g in range(5):
    assert all(g in plan.readers_of(peer, 5) for peer in plan.peers_of(g, 5))
  other = Plan(topology='random-2', topology_seed=4)
  assert [plan.peers_of(g, 5) for g in range(5)] != [
      other.peers_of(g, 5) for g in range(5)
  ]


def variables(value):
  params = {'w': np.full((2, 3), value, np.float32)}
  return Variables(params, {'calls': np.array(value, np.int32)})


def test_teachers_are_stacked_in_the_order_of_peers():
  teachers = protocol.stack_teachers([variables(n) for n in (3, 1, 2)])
  np.testing.assert_array_equal(teachers.present_P, [1, 1, 1])
  assert teachers.present_P.dtype == np.float32
  assert teachers.variables.params['w'].shape == (3, 2, 3)
  np.testing.assert_array_equal(
      teachers.variables.params['w'][:, 0, 0], [3, 1, 2]
  )
  np.testing.assert_array_equal(
      teachers.variables.model_state['calls'], [3, 1, 2]
  )


def test_an_absent_peer_keeps_its_slot_and_holds_finite_values():
  # The length P is fixed: a peer that comes or goes does not recompile.
  everyone = protocol.stack_teachers([variables(n) for n in (1, 2, 3)])
  teachers = protocol.stack_teachers([None, variables(2), None])
  np.testing.assert_array_equal(teachers.present_P, [0, 1, 0])
  np.testing.assert_array_equal(teachers.variables.params['w'][1], 2.0)
  shapes = lambda t: [(x.shape, x.dtype) for x in _leaves(t)]
  assert shapes(teachers) == shapes(everyone)
  assert all(np.all(np.isfinite(x)) for x in _leaves(teachers))
  assert protocol.stack_teachers([None, None]) is None
  assert protocol.stack_teachers([]) is None


def _leaves(teachers):
  found = teachers.variables
  return [found.params['w'], found.model_state['calls'], teachers.present_P]


def test_staleness_is_measured_over_the_peers_that_are_present(monkeypatch):
  now = 1e9
  monkeypatch.setattr(protocol, 'time', types.SimpleNamespace(time=lambda: now))
  in_use = (
      Publication(1, step=90, time=now - 10.0),
      None,
      Publication(3, step=60, time=now - 40.0),
  )
  found = protocol.staleness_metrics(100, in_use)
  for key, age in (('', 25.0), ('_group_1', 10.0), ('_group_3', 40.0)):
    assert found.pop(f'exchange/staleness_seconds{key}') == age
  assert found == {
      'exchange/peers_present': 2.0,
      'exchange/staleness_steps': 25.0,
      'exchange/staleness_steps_max': 40.0,
      'exchange/staleness_steps_group_1': 10.0,
      'exchange/staleness_steps_group_3': 40.0,
  }
  nobody = protocol.staleness_metrics(100, (None, None))
  assert nobody == {'exchange/peers_present': 0.0}


def test_a_group_without_an_exchange_has_no_peers_and_publishes_nothing():
  nothing = protocol.NoExchange()
  assert nothing.publish_if_due(50, variables(1)) is False
  assert nothing.fetch(50) is None
  assert nothing.restore(50, ()) is None and nothing.checkpointed(50) is None
  assert not nothing.due(50) and nothing.metrics(50) == {}
  assert nothing.last_rejection == ''
  assert nothing.peers == nothing.in_use == () and nothing.rejected == 0
  nothing.close()
