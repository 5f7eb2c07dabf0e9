"""Groups as one program: the same updates, wherever the groups live."""

import functools

import jax
import numpy as np
import pytest
import toy

from codistill_jax import one_program, peer_predictions
from codistill_jax import step as step_lib
from codistill_jax.base import REPLICA_AXIS
from codistill_jax.exchange.kinds import PredictionExchange, Predictions
from codistill_jax.group import run_group

MODEL, TX = toy.RECURRENT, toy.ADAM
G = 4
RING = peer_predictions.mixing_matrix([(3,), (0,), (1,), (2,)])


def make(num_devices=1, num_replicas=1, num_groups=G, model=MODEL, **kwargs):
  step = step_lib.make_train_step(model, TX, axis_name=REPLICA_AXIS)
  return one_program.Population(
      step,
      num_groups,
      devices=jax.devices()[::-1][:num_devices],
      num_replicas=num_replicas,
      **kwargs,
  )


cached = functools.cache(make)


def starts(model=MODEL, num_peers=0, count=G):
  return [toy.start(model, TX, g, num_peers) for g in range(count)]


def trained(step, states, mix=RING, burn_in=1, steps=3, stream=None):
  """States of all groups, and the metrics of the last update."""
  stream = stream or toy.Tokens(8)
  state, peers = step.place(states), step.peers(mix)
  for n in range(steps):
    teachers = None if n < burn_in else peers
    state, found = step(state, stream.batch(n), teachers, 0.7)
  return [step.collect(state, g) for g in range(len(states))], dict(found)


@functools.cache
def on_one_device(burn_in=1):
  return trained(cached(), starts(), burn_in=burn_in)


# -- where groups live --------------------------------------------------------


@pytest.mark.parametrize('num_devices, num_replicas', [(4, 1), (4, 2)])
def test_groups_and_replicas_on_devices_are_one_device(
    num_devices, num_replicas
):
  found = trained(cached(num_devices, num_replicas), starts(), burn_in=0)
  toy.assert_same(found, on_one_device(0), rtol=1e-4, atol=1e-5)


def test_a_burn_in_is_training_alone():
  alone = toy.on_replicas(MODEL, TX, 1)
  found, _ = trained(cached(), starts(), burn_in=3)
  for g, state in enumerate(starts()):
    state = alone.place(state)
    for n in range(3):
      state, _ = alone(state, toy.Tokens(8).batch(n), None, 0.7)
    toy.assert_same(found[g], alone.collect(state), rtol=1e-4, atol=1e-5)


def test_a_burn_in_is_the_same_bits_whoever_else_is_there():
  few = [starts()[0], *starts(count=8)[5:]]
  expected, _ = trained(cached(), starts(), burn_in=3)
  found, _ = trained(cached(), few, burn_in=3)
  toy.assert_same(found[0], expected[0])
  assert np.any(found[1].carry != expected[1].carry)
  # And codistillation is not.
  found, _ = trained(cached(), few)
  assert np.any(found[0].carry != on_one_device()[0][0].carry)


def test_groups_may_have_batches_and_teachers_of_their_own():
  """What a population of runs with stacked published parameters needs."""
  model = toy.TWO_LAYERS
  streams = [toy.Clusters(8, group_id=g) for g in range(2)]
  step = make(num_groups=2, model=model, shared_batch=False)
  teachers = [toy.stacked([x]) for x in toy.peers_of(model, 2)]
  states = starts(model, 1, count=2)
  batch = jax.tree.map(lambda *xs: np.stack(xs), *[s.batch(0) for s in streams])
  state, found = step(step.place(states), batch, step.stack(teachers), 0.7)
  alone = jax.jit(step_lib.make_train_step(model, TX))
  for g in range(2):
    expected, metrics = alone(states[g], streams[g].batch(0), teachers[g], 0.7)
    toy.assert_same(step.collect(state, g), expected, rtol=1e-4, atol=1e-5)
    mine = {key: np.asarray(x)[g] for key, x in found.items()}
    toy.assert_same(mine, dict(metrics), rtol=1e-4)


def test_a_whole_run_compiles_twice_and_keeps_nothing():
  step = make()  # Not one of which memory was given back meanwhile.
  peers, absent = step.peers(RING), step.peers(np.zeros((G, G)))
  trained(step, starts())
  with toy.compilations() as names:
    state = step.place(starts())
    for n, teachers in enumerate([None, peers, absent, None, peers]):
      before = state
      state, _ = step(state, toy.Tokens(8).batch(n), teachers, 0.1 * n)
      assert all(x.is_deleted() for x in jax.tree.leaves(before.variables))
  assert not names and step.num_traces == 2


def test_collect_is_the_inverse_of_place_on_any_devices():
  states = [
      state.replace(
          carry=np.random.default_rng(g).normal(size=(8, 6)).astype(np.float32)
      )
      for g, state in enumerate(starts())
  ]
  for num_devices, num_replicas in [(1, 1), (4, 1), (4, 2)]:
    step = cached(num_devices, num_replicas)
    placed = step.place(states)
    assert len(placed.step.devices()) == num_devices
    for g, state in enumerate(states):
      found = step.collect(placed, g)
      assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
      toy.assert_same(found, state)
      variables = step.variables(placed, g)
      toy.assert_same(variables, state.variables)
      assert all(len(x.devices()) == 1 for x in jax.tree.leaves(variables))


def test_devices_are_used_as_far_as_equal_blocks_of_groups_fit():
  for num_groups, num_devices, num_replicas, used in [
      (3, 4, 1, 3),
      (2, 4, 1, 2),
      (2, 4, 2, 4),
      (3, 4, 2, 2),
      (4, 3, 1, 2),
  ]:
    step = make(num_devices, num_replicas, num_groups)
    placed = step.peers(np.zeros((num_groups, num_groups))).mix_G
    assert len(placed.devices()) == used


@pytest.mark.parametrize(
    'act, message',
    [
        (lambda: make(1, 2), 'num_replicas=2, but there are 1 devices'),
        (lambda: cached().place(starts()[:3]), 'states of 4 groups, got 3'),
        (
            lambda: cached(4, 2).place(starts())
            and trained(cached(4, 2), starts(), stream=toy.Tokens(7)),
            'group_batch=7 is not divisible by the 2 replicas',
        ),
    ],
    ids=['devices', 'groups', 'rows'],
)
def test_what_does_not_fit_is_refused(act, message):
  with pytest.raises(ValueError, match=message):
    act()


# -- turns in the loop --------------------------------------------------------

KIND = Predictions(topology='ring')


def seats(num_groups=G, num_devices=1):
  step = cached(num_devices, num_groups=num_groups)
  mix = RING if num_groups == G else np.zeros((num_groups, num_groups))
  return one_program.JointUpdate(step, mix).seats


def runs(seats, states, stream, num_steps=4, order=None):
  order = order or range(len(seats))
  made = {
      g: run_group(
          seats[g],
          states[g],
          stream,
          num_steps=num_steps,
          exchange=PredictionExchange(g, len(seats), KIND, bytes_to_peer=10),
          distill_weight=lambda step: 0.7 * (step >= 1),
      )
      for g in order
  }
  return [made[g] for g in range(len(seats))]


def test_seats_serve_another_run_as_well_as_the_first():
  again, lives = seats(), []
  for num_steps in (2, 4, 4):
    states = []
    for results in zip(*runs(again, starts(), toy.Tokens(8), num_steps)):
      states = [again[g].collect(r.state) for g, r in enumerate(results)]
    lives.append(states)
    again[1].leave()  # As a group that ended by itself.
  toy.assert_same(lives[1], lives[2])


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_the_loop_makes_the_updates_of_the_program_in_any_order(order):
  groups = runs(seats(), starts(), toy.Tokens(8), 3, order)
  found = [None] * G
  for n in range(3):
    for g in order:
      result = next(groups[g])
      assert result.step == n + 1
      assert ('loss/distill' in result.metrics) == (n >= 1)  # After burn-in.
      found[g] = (seats()[g].collect(result.state), result.metrics)
  states, metrics = on_one_device()
  toy.assert_same([state for state, _ in found], states)
  for g, (_, mine) in enumerate(found):
    for key, value in metrics.items():
      assert (
          float(mine[key]) == np.asarray(value)[g] == jax.device_get(mine)[key]
      )
    assert mine['exchange/staleness_steps'] == 0.0
    assert mine['exchange/peers_present'] == 1.0
    assert mine['exchange/prediction_bytes'] == 10.0


def last_states(places, states, num_steps):
  *_, results = zip(*runs(places, states, toy.Tokens(8), num_steps))
  return [seat.collect(r.state) for seat, r in zip(places, results)]


def test_a_resumed_run_ends_with_the_same_bits():
  places = seats()
  half = last_states(places, starts(), 2)
  resumed = last_states(places, half, 4)  # By the same seats.
  toy.assert_same(resumed, last_states(seats(), starts(), 4))


def test_a_group_that_has_not_begun_or_caught_up_is_named():
  places = seats()
  with pytest.raises(ValueError, match=r'group\(s\) 1, 2, 3 have not begun'):
    next(run_group(places[0], starts()[0], toy.Tokens(8), num_steps=2))
  groups = runs(seats(), starts(), toy.Tokens(8))
  next(groups[0])
  with pytest.raises(ValueError, match=r'group 0 asks .* group\(s\) 1, 2, 3'):
    next(groups[0])


def test_groups_at_different_steps_are_refused():
  states = starts()
  states[2] = states[2].replace(step=np.int32(1))
  with pytest.raises(ValueError, match='begin at steps 0, 1; '):
    next(runs(seats(), states, toy.Tokens(8))[0])


@pytest.mark.parametrize('apart', ['batch', 'weight'])
def test_groups_with_other_batches_or_weights_are_refused(apart):
  places = seats(2)
  first, second = [
      run_group(
          places[g],
          starts()[g],
          toy.Tokens(8, group_id=g * (apart == 'batch')),
          num_steps=2,
          distill_weight=lambda step, g=g: 0.1 * g * (apart == 'weight'),
      )
      for g in range(2)
  ]
  next(first)
  with pytest.raises(ValueError, match=r'group 1 got another batch .*shared'):
    next(second)


def test_a_shared_stream_makes_each_batch_once():
  made = []

  class Stream:

    def batch(self, step):
      made.append(step)
      return {'inputs': np.full(1, step)}

  stream = one_program.SharedStream(Stream())
  for step in range(20):
    assert stream.batch(step) is stream.batch(step)
    assert stream.batch(step)['inputs'] == step
    assert stream.batch(max(step - 3, 0))['inputs'] == max(step - 3, 0)
  assert made == list(range(20))
