"""Teachers are replaced slot by slot, and left out where they are too old."""

import numpy as np
import pytest

from codistill_jax.base import Variables
from codistill_jax.exchange.fetching import Teaching, merge_teachers
from codistill_jax.exchange.plan import Plan
from codistill_jax.exchange.publications import Publication


def variables(value):
  params = {'w': np.full((2, 3), value, np.float32)}
  return Variables(params, {'calls': np.array(value, np.int32)})


def values(teachers):
  w = teachers.variables.params['w']
  assert w.shape[1:] == (2, 3) and (w == w[:, :1, :1]).all()
  assert teachers.variables.model_state['calls'].tolist() == w[:, 0, 0].tolist()
  return w[:, 0, 0].tolist()


def test_slots_are_replaced_and_the_old_teachers_stay_as_they_are():
  first = merge_teachers(None, {1: variables(5)}, [False, True, False])
  assert values(first) == [5, 5, 5]  # Finite, and not counted.
  assert first.present_P.tolist() == [0, 1, 0]
  assert first.present_P.dtype == np.float32
  found = {0: variables(1), 2: variables(2)}
  second = merge_teachers(first, found, [True, True, True])
  assert values(second) == [1, 5, 2] and values(first) == [5, 5, 5]
  third = merge_teachers(second, {1: variables(7)}, [True, True, True])
  assert values(third) == [1, 7, 2]


def test_one_peer_is_not_copied_on_the_host():
  found = variables(1)
  teachers = merge_teachers(None, {0: found}, [True])
  assert np.shares_memory(teachers.variables.params['w'], found.params['w'])


def test_every_array_is_put_on_the_devices():
  put = []
  merge_teachers(None, {0: variables(1)}, [True, False], put.append)
  assert sorted(x.shape for x in put) == [(2,), (2,), (2, 2, 3)]


@pytest.fixture
def teaching():
  plan = Plan(every=10, max_staleness_steps=20)
  return Teaching(0, (1, 2), plan, lambda array: array)


def take(teaching, **steps):
  found = {
      int(peer[1:]): (Publication(int(peer[1:]), step, 0.0), variables(step))
      for peer, step in steps.items()
  }
  swap = teaching.prepare(found)
  teaching.take(swap)


def test_nothing_changes_before_a_swap_is_taken(teaching):
  take(teaching, _1=10)
  shown = teaching.show(10)
  swap = teaching.prepare({2: (Publication(2, 20, 0.0), variables(20))})
  assert teaching.held_steps == {1: 10, 2: None}
  assert teaching.show(10) is shown and values(shown) == [10, 10]
  teaching.take(swap)
  assert teaching.held_steps == {1: 10, 2: 20}
  assert values(teaching.show(10)) == [10, 20]
  assert teaching.prepare({}) is None
  teaching.take(None)
  assert teaching.held_steps == {1: 10, 2: 20}


def test_what_is_shown_changes_only_with_who_is_present(teaching):
  take(teaching, _1=10, _2=15)
  shown = [teaching.show(n) for n in range(15, 40)]
  present = [None if t is None else t.present_P.tolist() for t in shown]
  assert present == [[1, 1]] * 16 + [[0, 1]] * 5 + [None] * 4
  assert len({id(t) for t in shown}) == 3
  assert teaching.too_old(30) == [] and teaching.too_old(31) == [1]
  assert teaching.too_old(36) == [1, 2]
  # A clock that goes back, as for a restart: they are there again.
  assert teaching.show(20).present_P.tolist() == [1, 1]


def test_of_what_was_prepared_some_may_be_left_out(teaching):
  """As of a group of which one process could not read a peer."""
  take(teaching, _1=10, _2=10)
  found = {
      peer: (Publication(peer, 20, 0.0), variables(20 + peer))
      for peer in (1, 2)
  }
  swap = teaching.prepare(found)
  teaching.take(teaching.restrict(swap, {2}))
  assert teaching.held_steps == {1: 10, 2: 20}
  assert values(teaching.show(20)) == [10, 22]
  assert teaching.restrict(swap, set()) is None
  assert teaching.restrict(None, set()) is None
