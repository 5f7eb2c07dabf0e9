"""The loop of one group, and groups together: algorithm 1 over a whole run."""

import dataclasses
import functools
import itertools
import threading
import time

import algorithm1
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from waits import PATIENCE, until

from codistill_jax import step as step_lib
from codistill_jax.base import Variables, host_copy
from codistill_jax.exchange.plan import NoExchange, PeerError, Plan
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.group import prefetch, run_group
from codistill_jax.replicas import PmapStep
from codistill_jax.schedules import distill_weight
from codistill_jax.storage.resume import ResumeCheckpoints

EVERY = 4
TWO_LAYERS, RECURRENT = toy.TWO_LAYERS, toy.RECURRENT
OPTIMISERS = {TWO_LAYERS: toy.SGD, RECURRENT: toy.ADAM}


def shared_step(model):
  return toy.on_replicas(model, OPTIMISERS[model])


def start(model, group_id, num_peers=1):
  return toy.start(model, OPTIMISERS[model], group_id, num_peers)


def groups_of(model, exchanges, **kwargs):
  """The generators of all groups."""
  return [
      run_group(
          shared_step(model),
          start(model, g, len(exchange.peers)),
          toy.stream_of(model, g),
          exchange=exchange,
          **kwargs,
      )
      for g, exchange in enumerate(exchanges)
  ]


def in_turn(groups, order=None):
  """Steps groups in turn; gives the results of each turn in group order."""
  order = order or range(len(groups))
  for turn in zip(*(groups[g] for g in order)):
    yield [turn[list(order).index(g)] for g in range(len(groups))]


def last(iterator):
  *_, result = iterator
  return result


class Watched:
  """An exchange that notes what it gives, by step."""

  def __init__(self, exchange):
    self.exchange = exchange
    self.given = {}
    self.peers = exchange.peers

  @property
  def in_use(self):
    return self.exchange.in_use

  def begin(self, step):
    self.exchange.begin(step)

  def due(self, step):
    return self.exchange.due(step)

  def publish_if_due(self, step, variables, metrics=None):
    return self.exchange.publish_if_due(step, variables, metrics)

  def metrics(self, step):
    return self.exchange.metrics(step)

  def fail(self, error):
    self.exchange.fail(error)

  def fetch(self, step):
    self.given[step] = self.exchange.fetch(step)
    return self.given[step]


# -- algorithm 1 --------------------------------------------------------------


@pytest.mark.parametrize('num_groups', [2, 4])
@pytest.mark.parametrize('staleness', [0, EVERY])
def test_a_run_is_algorithm_1(num_groups, staleness):
  burn_in, num_steps, weight = 6, 15, 0.8
  plan = Plan(EVERY, 'lockstep', staleness)
  groups = groups_of(
      TWO_LAYERS,
      memory_exchanges(num_groups, plan=plan),
      num_steps=num_steps,
      distill_weight=distill_weight(weight, burn_in),
  )
  expected, losses = algorithm1.train(
      [
          algorithm1.as_float64(start(TWO_LAYERS, g).variables.params)
          for g in range(num_groups)
      ],
      lambda g, step: toy.stream_of(TWO_LAYERS, g).batch(step),
      num_steps=num_steps,
      burn_in_steps=burn_in,
      every=EVERY,
      weight=weight,
      learning_rate=1.0,
      staleness=staleness,
  )
  for turn, values in zip(in_turn(groups), losses, strict=True):
    for result, (phi, psi) in zip(turn, values):
      np.testing.assert_allclose(result.metrics['loss/task'], phi, rtol=1e-4)
      found = result.metrics.get('loss/distill', 0.0)
      np.testing.assert_allclose(found, psi, rtol=1e-4)
  for result, theta in zip(turn, expected):
    found = algorithm1.as_float64(result.state.variables.params)
    toy.assert_same(found, theta, rtol=1e-4, atol=1e-5)


# -- lockstep -----------------------------------------------------------------


@pytest.mark.parametrize('order', [(2, 1, 0), (1, 2, 0)])
def test_the_order_of_groups_does_not_matter(order):
  def run(order):
    exchanges = memory_exchanges(3, every=EVERY)
    groups = groups_of(RECURRENT, exchanges, num_steps=11)
    turn = last(in_turn(groups, order))
    collect = shared_step(RECURRENT).collect
    return [collect(result.state) for result in turn]

  toy.assert_same(run(order), run((0, 1, 2)))


def test_groups_may_be_apart_by_the_staleness():
  plan = Plan(EVERY, 'lockstep', 2 * EVERY)
  num_steps = 9 * EVERY

  def run(pattern):
    groups = groups_of(
        RECURRENT, memory_exchanges(2, plan=plan), num_steps=num_steps
    )
    ends = {}
    for g, turns in pattern:
      for result in itertools.islice(groups[g], turns):
        if result.step == num_steps:
          ends[g] = shared_step(RECURRENT).collect(result.state)
    return [ends[0], ends[1]]

  even = [(0, 1), (1, 1)] * num_steps
  # Each runs on until it needs what its peer has not published yet: the peer
  # of a group at n is then anywhere from n - 3 * EVERY to n + 3 * EVERY.
  far = 3 * EVERY
  blocks = [(0, far), (1, 2 * far), (0, 2 * far), (1, far)]
  toy.assert_same(run(blocks), run(even))


@pytest.mark.parametrize('staleness', [0, EVERY, 3 * EVERY])
def test_staleness_is_exactly_what_was_asked(staleness):
  plan = Plan(EVERY, 'lockstep', staleness)
  exchanges = [Watched(e) for e in memory_exchanges(2, plan=plan)]
  groups = groups_of(TWO_LAYERS, exchanges, num_steps=20)
  # What each group was, by step.
  was = [
      {0: jax.tree.map(np.array, start(TWO_LAYERS, g).variables)}
      for g in range(2)
  ]
  for turn in in_turn(groups):
    for g, result in enumerate(turn):
      was[g][result.step] = jax.tree.map(np.array, result.state.variables)
      own = result.step - 1  # Updates done before this one.
      age = own % EVERY + staleness
      teachers = exchanges[g].given[own]
      if own - age <= 0:
        # Nobody was taught by parameters that were never trained.
        assert teachers is None
        assert result.metrics['distill/weight'] == 0.0
        assert 'loss/distill' not in result.metrics
        assert 'exchange/staleness_steps' not in result.metrics
        continue
      assert result.metrics['distill/weight'] == 1.0
      assert result.metrics['exchange/staleness_steps'] == age
      assert result.metrics['exchange/staleness_steps_max'] == age
      assert result.metrics['exchange/peers_present'] == 1.0
      assert 0 <= result.metrics['exchange/staleness_seconds'] < 60
      # Not the label alone: the very numbers of the peer.
      peer = jax.tree.map(lambda x: x[0], teachers.variables)
      toy.assert_same(peer, was[1 - g][own - age])


def test_a_teacher_keeps_its_carry_when_its_parameters_are_swapped():
  exchanges = [Watched(e) for e in memory_exchanges(2, every=EVERY)]
  groups = groups_of(RECURRENT, exchanges, num_steps=11)
  evaluated = jax.jit(
      lambda *args: RECURRENT.apply(*args, None, False)[1].carry
  )
  before = np.zeros((8, 6), np.float32)
  for result, _ in in_turn(groups):
    state = shared_step(RECURRENT).collect(result.state)
    teachers = exchanges[0].given[result.step - 1]
    if teachers is None:
      assert not np.any(state.teacher_carry)
      continue
    teacher = jax.tree.map(lambda x: x[0], teachers.variables)
    batch = toy.stream_of(RECURRENT, 0).batch(result.step - 1)
    np.testing.assert_allclose(
        state.teacher_carry[0],
        evaluated(teacher, batch, before),
        rtol=1e-4,
        atol=1e-5,
    )
    before = state.teacher_carry[0]
  assert len({id(t) for t in exchanges[0].given.values() if t}) == 2


def test_teachers_go_to_the_devices_once_per_exchange(monkeypatch):
  step, placed, used = shared_step(TWO_LAYERS), [], []

  def place_teachers(teachers):
    placed.append(PmapStep.place_teachers(step, teachers))
    return placed[-1]

  def call(self, state, batch, teachers, weight):
    used.append(teachers)
    return plain(self, state, batch, teachers, weight)

  plain = PmapStep.__call__
  monkeypatch.setattr(step, 'place_teachers', place_teachers, raising=False)
  monkeypatch.setattr(PmapStep, '__call__', call)
  groups = groups_of(
      TWO_LAYERS, memory_exchanges(2, every=EVERY), num_steps=3 * EVERY
  )
  for _ in in_turn(groups):
    pass
  assert len(placed) == 2 * 2  # Two groups, two exchanges with teachers.
  mine = used[::2]
  assert mine[:EVERY] == [None] * EVERY
  assert all(t is placed[0] for t in mine[EVERY : 2 * EVERY])
  assert all(t is placed[2] for t in mine[2 * EVERY :])


# -- burn-in and compilations -------------------------------------------------


def test_burn_in_neither_fetches_nor_teaches():
  exchanges = [Watched(e) for e in memory_exchanges(2, every=EVERY)]
  groups = groups_of(
      TWO_LAYERS,
      exchanges,
      num_steps=12,
      distill_weight=distill_weight(0.5, 9),
  )
  for turn in in_turn(groups):
    for exchange, result in zip(exchanges, turn):
      taught = result.step > 9
      assert list(exchange.given) == list(range(9, result.step))
      assert result.metrics['distill/weight'] == (0.5 if taught else 0.0)
      # With None for teachers, of which step_test says that nothing is
      # evaluated.
      assert ('loss/distill' in result.metrics) == taught
      assert ('exchange/staleness_steps' in result.metrics) == taught


class Flickering(Watched):
  """An exchange whose second peer, and then both, are gone for a while."""

  def fetch(self, step):
    teachers = super().fetch(step)
    if 14 <= step < 16:
      teachers = None
    elif 10 <= step < 14:
      teachers = dataclasses.replace(teachers, present_P=np.float32([1, 0]))
    self.given[step] = teachers
    return teachers


def test_a_run_compiles_its_step_twice():
  # Burn-in and codistillation; not for a weight that rises in a ramp, a peer
  # that vanishes and comes back, new teachers, another group, or a resumption.
  step = toy.replicated(RECURRENT, toy.ADAM)
  streams = [toy.stream_of(RECURRENT, g) for g in range(3)]
  states = [start(RECURRENT, g, num_peers=2) for g in range(3)]
  exchanges = [Flickering(e) for e in memory_exchanges(3, every=EVERY)]

  def run(states, num_steps):
    groups = [
        run_group(
            step,
            state,
            stream,
            num_steps=num_steps,
            exchange=exchange,
            distill_weight=distill_weight(1.0, 6, ramp_steps=8),
        )
        for state, stream, exchange in zip(states, streams, exchanges)
    ]
    return [[r.metrics['distill/weight'] for r in t] for t in in_turn(groups)]

  with toy.compilations() as programs:
    weights = run(states, 22)
    # Everything that XLA compiled meanwhile, whatever its name.
    assert len(programs) == 2, programs
    assert step.num_traces == 2
    half = jax.tree.map(np.array, states)
    half = [state.replace(step=np.int32(22)) for state in half]
    run(half, 25)
    assert len(programs) == 2, programs
  # Or nothing of the kind has happened.
  assert len({first for first, *_ in weights}) == 1 + 9  # 0, a ramp, 1.
  given = exchanges[0].given.values()
  assert {t and float(t.present_P.sum()) for t in given} == {None, 1.0, 2.0}


# -- the loop -----------------------------------------------------------------


class Recorded:
  """A stream that notes what it was asked for; fails at one step."""

  def __init__(self, stream, fails_at=None):
    self.stream = stream
    self.asked = []
    self.fails_at = fails_at

  def batch(self, step):
    self.asked.append(step)
    if step == self.fails_at:
      raise OSError('no such shard')
    return self.stream.batch(step)


def test_a_run_makes_exactly_the_updates_that_were_asked():
  stream = Recorded(toy.stream_of(TWO_LAYERS, 0))
  step = shared_step(TWO_LAYERS)
  results = list(run_group(step, start(TWO_LAYERS, 0), stream, num_steps=7))
  assert [r.step for r in results] == list(range(1, 8))
  assert stream.asked == list(range(7))
  assert int(results[-1].state.step) == 7
  again = step.collect(results[-1].state)
  assert not list(run_group(step, again, stream, num_steps=7))
  assert stream.asked == list(range(7))


@pytest.mark.parametrize('model', [TWO_LAYERS, RECURRENT])
def test_a_run_resumes_from_a_collected_state_to_the_same_bits(model):
  step = shared_step(model)
  run = lambda state: run_group(
      step, state, toy.stream_of(model, 0), num_steps=9
  )
  states = [step.collect(result.state) for result in run(start(model, 0))]
  resumed = [step.collect(result.state) for result in run(states[3])]
  toy.assert_same(resumed, states[4:])


KEYS = {
    'plain': jax.random.PRNGKey,
    **{
        impl: functools.partial(jax.random.key, impl=impl)
        for impl in ('threefry2x32', 'rbg', 'unsafe_rbg')
    },
}


@pytest.mark.parametrize('make', KEYS.values(), ids=KEYS)
def test_a_key_of_any_generator_trains_is_saved_and_resumed(make, tmp_path):
  """That of the dropout, and one in the state of the optimiser."""
  typed = jax.random.key if make is jax.random.PRNGKey else make
  tx = optax.noisy_sgd(0.1, key=typed(5))
  step = toy.replicated(toy.NOISE, tx, 2)
  stream = toy.stream_of(toy.NOISE)
  init = lambda seed: step_lib.init_state(
      toy.NOISE, tx, make(seed), stream.batch(0)
  )
  run = lambda state: list(
      step.collect(r.state) for r in run_group(step, state, stream, num_steps=4)
  )
  states = run(init(0))
  saved = ResumeCheckpoints(tmp_path)
  saved.save(states[1])
  saved.close()
  resumed = saved.read(2, jax.eval_shape(lambda: init(0))).state
  toy.assert_same(run(resumed), states[2:])
  other = run(init(1))
  assert not np.array_equal(other[0].carry, states[0].carry)
  assert not np.array_equal(states[0].carry, states[1].carry)


def test_a_typed_key_of_the_default_generator_is_the_plain_one():
  batch = toy.stream_of(toy.NOISE).batch(0)
  a, b = (
      step_lib.init_state(toy.NOISE, toy.SGD, make(3), batch)
      for make in (jax.random.key, jax.random.PRNGKey)
  )
  toy.assert_same(a, b)


@pytest.mark.parametrize(
    'rng',
    [
        0,
        np.zeros(2, np.int32),
        np.zeros(4, np.uint32),
        jax.random.split(jax.random.key(0), 2),
    ],
)
def test_what_is_no_key_is_refused_by_name(rng):
  batch = toy.stream_of(TWO_LAYERS).batch(0)
  with pytest.raises(ValueError, match='rng: expected one random key, got'):
    step_lib.init_state(TWO_LAYERS, toy.SGD, rng, batch)


def test_a_typed_key_in_the_state_of_a_model_is_refused_by_name():
  init = lambda rng, batch: Variables({'w': jnp.ones(())}, {'drop': rng})
  model = TWO_LAYERS._replace(init=init)
  with pytest.raises(ValueError, match=r"typed random key at .*'drop'"):
    step_lib.init_state(
        model, toy.SGD, jax.random.key(0), toy.stream_of(TWO_LAYERS).batch(0)
    )


def test_a_start_state_serves_more_than_one_run():
  # It is neither donated nor altered.
  step, state = shared_step(TWO_LAYERS), start(TWO_LAYERS, 0)
  kept = jax.tree.map(np.array, state)
  ends = []
  for _ in range(2):
    stream = toy.stream_of(TWO_LAYERS, 0)
    result = last(run_group(step, state, stream, num_steps=3))
    ends.append(step.collect(result.state))
  toy.assert_same(*ends)
  toy.assert_same(state, kept)


def test_alone_and_without_a_weight_are_plain_training():
  step, stream = shared_step(TWO_LAYERS), toy.stream_of(TWO_LAYERS, 0)
  alone = last(run_group(step, start(TWO_LAYERS, 0), stream, num_steps=9))
  found = alone.metrics
  assert found['distill/weight'] == 0.0 and 'loss/distill' not in found
  assert found['exchange/stall_ms'] >= 0.0
  groups = groups_of(
      TWO_LAYERS,
      memory_exchanges(2, every=EVERY),
      num_steps=9,
      distill_weight=distill_weight(0.0),
  )
  unweighted, _ = last(in_turn(groups))
  toy.assert_same(*(step.collect(r.state) for r in (alone, unweighted)))


class Slow(NoExchange):
  """Holds the loop for 30 ms in each turn."""

  def fetch(self, step):
    time.sleep(0.02)

  def due(self, step):
    return True

  def publish_if_due(self, step, variables, metrics=None):
    time.sleep(0.01)


def test_the_stall_is_the_time_that_the_exchange_held_the_loop():
  results, total = [], 0.0
  begin = time.perf_counter()
  for result in run_group(
      shared_step(TWO_LAYERS),
      start(TWO_LAYERS, 0),
      toy.stream_of(TWO_LAYERS, 0),
      num_steps=2,
      exchange=Slow(),
  ):
    results.append(result.metrics['exchange/stall_ms'])
  total = 1000.0 * (time.perf_counter() - begin)
  assert len(results) == 2 and min(results) >= 30.0
  assert sum(results) <= total


def test_what_a_stream_raises_comes_up_at_its_own_step():
  stream = Recorded(toy.stream_of(TWO_LAYERS, 0), fails_at=4)
  run = run_group(
      shared_step(TWO_LAYERS), start(TWO_LAYERS, 0), stream, num_steps=9
  )
  seen = []
  with pytest.raises(OSError, match='no such shard'):
    seen.extend(result.step for result in run)
  assert seen == [1, 2, 3, 4]  # What was loaded before is not lost.
  until(lambda: not loaders())


def loaders():
  return [t for t in threading.enumerate() if t.name.startswith('load')]


class Numbers:
  """A stream of step numbers; waits for leave to give the later ones."""

  def __init__(self, free=0):
    self.asked = []
    self.given = []
    self.free = free
    self.leave = threading.Event()

  def batch(self, step):
    self.asked.append(step)
    if step >= self.free:
      assert self.leave.wait(PATIENCE)
    self.given.append(step)
    return {'step': step}


def test_prefetch_loads_ahead_but_not_far():
  stream = Numbers(free=99)
  batches = prefetch(stream, 0, 50)
  assert next(batches) == {'step': 0}
  until(lambda: len(stream.asked) >= 3)  # While the first is in use.
  time.sleep(0.05)
  assert stream.asked == [0, 1, 2]
  batches.close()


def test_a_generator_that_is_closed_early_loads_no_more():
  until(lambda: not loaders())  # Of tests before.
  stream = Numbers(free=1)
  batches = prefetch(stream, 0, 50)
  next(batches)
  until(lambda: stream.asked == [0, 1])
  start_time = time.monotonic()
  batches.close()
  # At once, though a batch is under way.
  assert stream.given == [0] and time.monotonic() - start_time < PATIENCE / 2
  stream.leave.set()
  until(lambda: not loaders())
  assert stream.asked == [0, 1]


def test_a_run_that_is_left_early_leaves_no_thread():
  until(lambda: not loaders())
  stream = Recorded(toy.stream_of(TWO_LAYERS, 0))
  run = run_group(
      shared_step(TWO_LAYERS), start(TWO_LAYERS, 0), stream, num_steps=50
  )
  next(run)
  assert loaders()
  run.close()
  until(lambda: not loaders())
  assert len(stream.asked) <= 4


def test_what_an_exchange_raises_ends_the_run():
  run = groups_of(TWO_LAYERS, memory_exchanges(2, every=EVERY), num_steps=9)[0]
  steps = []
  with pytest.raises(TimeoutError, match='group 1 has not published step 4'):
    steps.extend(result.step for result in run)
  assert steps == [1, 2, 3, 4]


class Spoilt(Recorded):
  """Says something wrong in some batches."""

  def __init__(self, steps, key='labels', value=-1):
    super().__init__(toy.stream_of(TWO_LAYERS, 0))
    self._spoils = {'steps': steps, 'key': key, 'value': value}

  def batch(self, step):
    batch = super().batch(step)
    if step in self._spoils['steps']:
      batch[self._spoils['key']][:] = self._spoils['value']
    return batch


def steps_of(stream, num_steps=20, model=TWO_LAYERS, tx=toy.SGD):
  """Steps of a group alone, and what ends it."""
  step, steps = toy.on_replicas(model, tx), []
  try:
    for result in run_group(
        step, toy.start(model, tx), stream, num_steps=num_steps
    ):
      steps.append(result.step)
  except (FloatingPointError, ValueError) as e:
    return len(steps), str(e)
  return len(steps), ''


@pytest.mark.parametrize('first, seen', [(0, 0), (2, 10), (15, 19), (19, 19)])
@pytest.mark.parametrize('key', ['labels', 'weights'])
def test_a_group_alone_names_what_is_wrong_of_its_data(first, seen, key):
  """At once in its first and last update, a few later in between."""
  found, said = steps_of(Spoilt([first], key))
  assert (found, said[: len(f'update {first + 1}: ')]) == (
      seen,
      f'update {first + 1}: ',
  )
  assert f' {key} are ' in said


def test_an_optimiser_may_leave_out_what_is_not_finite_for_a_while():
  def overflowing(variables, batch, *args):
    logits, updates = TWO_LAYERS.apply(variables, batch, *args)
    return logits / (batch['inputs'][:, :1] < 1e30), updates

  model = TWO_LAYERS._replace(apply=overflowing)
  for tx, passes in ((optax.apply_if_finite(toy.SGD, 100), 1), (toy.SGD, 0)):
    stream = Spoilt([3, 4, 5], 'inputs', 1e31)
    found, said = steps_of(stream, model=model, tx=tx)
    assert (found, said[:10]) == ((20, '') if passes else (19, 'update 4: '))


@pytest.mark.parametrize(
    'wrong, message',
    [
        (
            {'train_step': jax.jit(lambda *a: a)},
            r'train_step .*; give PmapStep\(',
        ),
        (
            {'state': {}},
            'state is of type dict; give the TrainState of init_st',
        ),
        ({'stream': toy.Clusters}, 'stream is of type a class; give an object'),
        ({'stream': iter([])}, r'stream .*; give an object with batch\(step\)'),
        (
            {'exchange': memory_exchanges(2)},
            'exchange .* list; give that of one',
        ),
        ({'distill_weight': 1.0}, 'distill_weight .* float; give lambda step'),
        ({'num_steps': 2.0}, 'num_steps is of type float; give a whole number'),
    ],
)
def test_parts_of_other_kinds_are_refused_at_the_call(wrong, message):
  parts = {
      'train_step': shared_step(TWO_LAYERS),
      'state': start(TWO_LAYERS, 0),
      'stream': toy.stream_of(TWO_LAYERS),
      **wrong,
  }
  with pytest.raises(ValueError, match=f'^run_group: {message}'):
    run_group(**{'num_steps': 2, **parts})


def test_an_update_that_went_wrong_ends_the_run_and_is_not_published():
  class Poisoned(Recorded):

    def batch(self, step):
      batch = super().batch(step)
      if step == 6:
        batch['inputs'][0, 0] = np.inf
      return batch

  exchanges = memory_exchanges(2, every=EVERY)
  run = run_group(
      shared_step(TWO_LAYERS),
      start(TWO_LAYERS, 0),
      Poisoned(toy.stream_of(TWO_LAYERS, 0)),
      num_steps=20,
      exchange=exchanges[0],
      distill_weight=lambda step: 0.0,
  )
  steps = []
  with pytest.raises(ValueError, match='update 7: 1 numbers in the in'):
    steps.extend(result.step for result in run)
  assert steps == [1, 2, 3, 4, 5, 6, 7]
  assert exchanges[1].fetch(4) is not None
  with pytest.raises(PeerError, match='group 0 has ended: update 7: 1 numbers'):
    exchanges[1].fetch(8)


@pytest.mark.parametrize('topology', ['ring', 'random-2', [[1], [0], [3], [2]]])
def test_groups_learn_from_their_peers_in_the_topology(topology):
  plan = Plan(every=EVERY, mode='lockstep', topology=topology)
  exchanges = [Watched(e) for e in memory_exchanges(4, plan=plan)]
  groups = [
      run_group(
          shared_step(TWO_LAYERS),
          start(TWO_LAYERS, g, num_peers=len(exchange.peers)),
          toy.stream_of(TWO_LAYERS, g),
          num_steps=EVERY + 1,
          exchange=exchange,
      )
      for g, exchange in enumerate(exchanges)
  ]
  published = {}
  for turn in zip(*groups):
    for g, result in enumerate(turn):
      if result.step == EVERY:
        published[g] = host_copy(result.state.variables)
  for exchange in exchanges:
    teachers = exchange.given[EVERY]
    assert exchange.peers == tuple(p.group_id for p in exchange.in_use)
    for slot, peer in enumerate(exchange.peers):
      toy.assert_same(
          jax.tree.map(lambda x, s=slot: x[s], teachers.variables),
          published[peer],
      )
