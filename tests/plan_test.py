"""Plans: who learns from whom, when, from which publication."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.base import Variables
from codistill_jax.exchange import plan as plan_lib
from codistill_jax.exchange.plan import Plan, peers_of, readers_of
from codistill_jax.exchange.publications import Publication

SIZES = range(1, 17)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'every': 0}, 'every=0; set it to at least 1 step'),
        ({'mode': 'newest'}, "'newest' is not one of freshest, lockstep"),
        (
            {'mode': 'lockstep', 'staleness': 7},
            'not a multiple of every',
        ),
        ({'mode': 'lockstep', 'staleness': 5.0}, 'staleness=5.0 is not a mult'),
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
            '=9; set it to at least twice every',
        ),
        ({'max_staleness_steps': 10.0}, '=10.0; set it to at least twice ev'),
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
    every=st.integers(1, 20),
    ages=st.integers(0, 4),
    start=st.integers(0, 300),
    later=st.integers(0, 100),
)
def test_what_is_asked_for_was_published_is_kept_and_has_the_age(
    every, ages, start, later
):
  plan = Plan(every, 'lockstep', ages * every)
  step = start + later
  asked = plan.asked(step)
  if asked is None:
    # Before the first publication of that age; none is made at step 0.
    assert step < every * (ages + 1)
  else:
    assert plan.due(asked)
    assert ages * every <= step - asked < (ages + 1) * every
    # A run from `start` needs nothing older than is kept for it.
    assert plan.keep_from(start) <= asked
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


def test_a_random_topology_is_a_function_of_its_seed():
  peers = lambda seed: [
      Plan(topology='random-3', topology_seed=seed).peers_of(g, 16)
      for g in range(16)
  ]
  assert peers(5) == peers(5) != peers(6)
  assert Plan(topology='ring').readers_of(0, 4) == (1,)


def test_staleness_is_measured_over_the_peers_that_are_present(monkeypatch):
  now = 1e9
  monkeypatch.setattr(plan_lib, 'time', types.SimpleNamespace(time=lambda: now))
  in_use = (
      Publication(1, step=90, time=now - 10.0),
      None,
      Publication(3, step=60, time=now - 40.0),
  )
  found = plan_lib.staleness_metrics(100, in_use)
  for key, age in (('', 25.0), ('_group_1', 10.0), ('_group_3', 40.0)):
    assert found.pop(f'exchange/staleness_seconds{key}') == age
  assert found == {
      'exchange/peers_present': 2.0,
      'exchange/staleness_steps': 25.0,
      'exchange/staleness_steps_max': 40.0,
      'exchange/staleness_steps_group_1': 10.0,
      'exchange/staleness_steps_group_3': 40.0,
  }
  nobody = plan_lib.staleness_metrics(100, (None, None))
  assert nobody == {'exchange/peers_present': 0.0}


def test_a_group_without_an_exchange_has_no_peers_and_publishes_nothing():
  nothing = plan_lib.NoExchange()
  assert nothing.publish_if_due(50, Variables({})) is False
  assert nothing.fetch(50) is None
  assert nothing.restore(50, ()) is None and nothing.checkpointed(50) is None
  assert not nothing.due(50) and nothing.metrics(50) == {}
  assert nothing.last_rejection == ''
  assert nothing.peers == nothing.in_use == () and nothing.rejected == 0
  nothing.close()


# -- who learns from whom -----------------------------------------------------


def graph(num_groups, name='all', seed=0):
  return [peers_of(g, num_groups, name, seed) for g in range(num_groups)]


def everybody_hears(edges):
  """Whether what one group learns reaches every other one in the end."""
  known = [{g} for g in range(len(edges))]
  for _ in edges:
    known = [
        k.union(*(known[p] for p in edges[g])) for g, k in enumerate(known)
    ]
  return all(len(k) == len(edges) for k in known)


@pytest.mark.parametrize('num_groups', SIZES)
def test_all_is_everybody_else_and_a_ring_one_circle(num_groups):
  for g, peers in enumerate(graph(num_groups)):
    assert sorted([*peers, g]) == list(range(num_groups))
  ring = graph(num_groups, 'ring')
  assert [len(peers) for peers in ring] == [min(num_groups - 1, 1)] * num_groups
  assert everybody_hears(ring)


@given(data=st.data())
def test_random_has_k_peers_and_k_readers_and_cuts_nobody_off(data):
  num_groups = data.draw(st.integers(2, 16))
  k = data.draw(st.integers(1, num_groups - 1))
  seed = data.draw(st.integers(0, 1000))
  edges = graph(num_groups, f'random-{k}', seed)
  for g, peers in enumerate(edges):
    assert len(set(peers)) == k and g not in peers
    assert peers == tuple(sorted(peers))
    readers = readers_of(g, num_groups, f'random-{k}', seed)
    assert len(readers) == k
    assert all(g in edges[reader] for reader in readers)
  assert everybody_hears(edges)


def test_a_baseline_needs_no_other_configuration():
  for name in ('all', 'ring', 'random-3'):
    assert graph(1, name) == [()]


def test_lists_say_it_group_by_group():
  pairs = [[1], [0], [3], [2]]
  assert graph(4, pairs) == [(1,), (0,), (3,), (2,)]
  # A teacher that learns from nobody, and a group that hears of two.
  star = ((), [0], [1, 0])
  assert graph(3, star) == [(), (0,), (0, 1)]
  assert readers_of(0, 3, star) == (1, 2)
  assert readers_of(2, 3, star) == ()


@pytest.mark.parametrize(
    'name, message',
    [
        ('star', "'star' is not one of all, ring, random-<k>"),
        ('random-0', "'random-0' is not one of"),
        ('random', "'random' is not one of"),
        (3, '3 is neither a name nor a list of lists'),
        ([1, 0], r'\[1, 0\] is neither a name nor a list of lists'),
        ([[0], [0]], 'gives group 0 the peer 0; .* a peer is another one'),
        ([[1], [2]], 'gives group 1 the peer 2; with lists for 2 groups'),
        ([[True], [0]], 'gives group 0 the peer True'),
        ([[1, 1], [0]], r'gives group 0 a peer twice: \[1, 1\]'),
    ],
)
def test_a_topology_that_makes_no_sense_is_refused_in_one_line(name, message):
  with pytest.raises(ValueError, match=message) as error:
    plan_lib.check_topology(name)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            (2, 2),
            r'group_id=2 is out of range: .*num_groups=2 it lies in 0\.\.1',
        ),
        ((-1, 2), 'group_id=-1 is out of range'),
        ((0, 0), 'num_groups=0; set it to at least 1'),
        ((0, 2.0), r'num_groups=2\.0; set it to'),
        ((0, 3, 'random-3'), 'needs more than 3 groups.*random-2 at most'),
        ((0, 3, [[1], [0]]), 'lists the peers of 2 groups, but num_groups=3'),
    ],
)
def test_what_does_not_suit_the_groups_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    peers_of(*arguments)
