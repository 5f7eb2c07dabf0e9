"""Asynchronous SGD against a parameter server in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base
from codistill_jax import step as step_lib
from codistill_jax.baselines.async_sgd import AsynchronousSgd, worker_turns
from codistill_jax.group import run_group
from codistill_jax.replicas import REPLICA_AXIS, PmapStep

ROWS, UPDATES = 2, 14
MOMENTUM = optax.sgd(0.3, momentum=0.9)


class Rows:
  """Some rows of a stream."""

  def __init__(self, stream, rows):
    self._stream, self._rows = stream, rows or slice(None)

  def batch(self, step):
    return {k: x[self._rows] for k, x in self._stream.batch(step).items()}


def tokens(group_batch, rows=None):
  return Rows(toy.Tokens(group_batch), rows)


def points(group_batch, rows=None):
  return Rows(toy.Clusters(group_batch, weights=True), rows)


def points_of(group_batch):
  return functools.cache(toy.Clusters(group_batch).batch)


def start(method, model, tx, *, num_peers=0, rows=ROWS):
  state = toy.start(model, tx, num_peers=num_peers)
  carry, teacher_carry = model.init_carry(rows), ()
  if num_peers:
    teacher_carry = jax.tree.map(lambda x: jnp.stack([x] * num_peers), carry)
  state = state.replace(carry=carry, teacher_carry=teacher_carry)
  return base.host_copy(method.init_state(tx, state))


def stream_of(method, make, rows=None, num_steps=UPDATES):
  return method.train_stream(
      make, group_batch=ROWS, num_steps=num_steps, rows=rows
  )


def train(method, model, tx, stream, updates=range(UPDATES), state=None):
  """States and metrics after each update."""
  step = method.make_train_step(model, tx, num_steps=UPDATES)
  state = start(method, model, tx) if state is None else state
  return toy.trained(step, state, stream, updates)


# A second, plain computation of the same, which shares nothing but the model.


def loss_of(model, params, batch, carry):
  outputs, updates = model.apply(
      base.Variables(params), batch, carry, None, True
  )
  log_p = jax.nn.log_softmax(outputs)
  picked = jnp.take_along_axis(log_p, batch['labels'][..., None], -1)[..., 0]
  weights = batch['weights']
  loss = -jnp.sum(picked * weights) / jnp.maximum(jnp.sum(weights), 1e-9)
  return loss, updates.carry


gradient_of = jax.jit(
    jax.grad(functools.partial(loss_of, toy.RECURRENT), has_aux=True)
)


class Worker:

  def __init__(self, number, params):
    self.rows = slice(number * ROWS, (number + 1) * ROWS)
    self.params, self.pulled_at, self.batches = params, 0, 0
    self.carry = toy.RECURRENT.init_carry(ROWS)


def plain_server(workers, order, ramp, tx, seed=0):
  """Parameters and staleness after each update, and the workers at the end."""
  params = toy.start(toy.RECURRENT, tx).variables.params
  opt_state = tx.init(params)
  update = jax.jit(tx.update)
  stream = toy.Tokens(workers * ROWS)
  there, waiting = [], list(range(workers))
  done, ages, turn, rounds = [], [], [], 0
  while len(done) < UPDATES:
    # Worker w joins at w / (W - 1) of the ramp.
    while waiting and len(done) * (workers - 1) >= waiting[0] * ramp:
      worker = Worker(waiting.pop(0), params)
      worker.pulled_at = len(done)
      there.append(worker)
    if not turn:
      turn = list(there)
      if order == 'random':
        rng = np.random.default_rng([seed, rounds])
        turn = [there[n] for n in rng.permutation(len(there))]
      rounds += 1
    worker = turn.pop(0)
    batch = {k: x[worker.rows] for k, x in stream.batch(worker.batches).items()}
    grads, worker.carry = gradient_of(worker.params, batch, worker.carry)
    worker.batches += 1
    ages.append(len(done) - worker.pulled_at)
    updates, opt_state = update(grads, opt_state, params)
    params = jax.tree.map(np.add, params, updates)
    worker.params, worker.pulled_at = params, len(done) + 1
    done.append(params)
  return done, ages, there


@pytest.mark.parametrize(
    'workers, order, ramp, tx',
    [
        (1, 'random', 0, MOMENTUM),
        (3, 'round_robin', 0, toy.ADAM),
        (3, 'round_robin', 7, MOMENTUM),
        (4, 'random', 0, MOMENTUM),
        (4, 'random', 5, toy.ADAM),
    ],
)
def test_it_is_a_parameter_server(workers, order, ramp, tx):
  method = AsynchronousSgd(workers, order, ramp_up_steps=ramp)
  states, metrics = train(method, toy.RECURRENT, tx, stream_of(method, tokens))
  expected, ages, there = plain_server(workers, order, ramp, tx)
  for state, params in zip(states, expected, strict=True):
    toy.assert_same(
        state.variables.params, base.host_copy(params), rtol=1e-5, atol=1e-5
    )
  assert [int(m['async/staleness_steps']) for m in metrics] == ages
  assert len(there) == workers
  for w, worker in enumerate(there):
    np.testing.assert_allclose(
        states[-1].carry[:, w], worker.carry, rtol=1e-5, atol=1e-5
    )
    assert states[-1].opt_state.pulled_at_W[w] == worker.pulled_at


def test_one_worker_is_synchronous_sgd():
  method = AsynchronousSgd(1)
  for model, make in ((toy.RECURRENT, tokens), (toy.STATISTICS, points)):
    states, metrics = train(
        method, model, toy.ADAM, stream_of(method, make), range(4)
    )
    state = toy.start(model, toy.ADAM, num_peers=0)
    expected, plain = toy.trained(
        step_lib.make_train_step(model, toy.ADAM),
        state.replace(carry=model.init_carry(ROWS)),
        make(ROWS),
        range(4),
    )
    for n in range(4):
      assert metrics[n].items() >= plain[n].items()
      toy.assert_same(states[n].variables, expected[n].variables)


@pytest.mark.parametrize('order', ['round_robin', 'random'])
@pytest.mark.parametrize('ramp', [0, 17])
def test_turns_are_rounds_of_all_who_are_there(order, ramp):
  turns = worker_turns(6, 60, order, 3, ramp)
  longer = worker_turns(6, 90, order, 3, ramp)
  for found, more in zip(turns, longer):
    assert np.array_equal(found, more[:60])
  if ramp:
    assert list(turns.joining_N[turns.joining_N >= 0]) == list(range(6))
    assert turns.joining_N[ramp] == 5
    first = [int(np.flatnonzero(turns.worker_N == w)[0]) for w in range(6)]
    joined = [int(np.flatnonzero(turns.joining_N == w)[0]) for w in range(6)]
    # Nobody is early; and nobody waits for more than a round.
    assert all(0 <= f - j < 12 for f, j in zip(first, joined))
  else:
    assert set(turns.joining_N) == {-1}
  # The rounds of all six, whatever the length of those of the ramp.
  begin = next(
      n
      for n in range(31)
      if all(len(set(r)) == 6 for r in turns.worker_N[n:][:30].reshape(5, 6))
  )
  assert begin <= 2 * ramp
  rounds = {tuple(r) for r in turns.worker_N[begin:][:30].reshape(5, 6)}
  assert (len(rounds) > 1) == (order == 'random')
  for w in range(6):
    mine = turns.batch_N[turns.worker_N == w]
    assert np.array_equal(mine, np.arange(len(mine)))


def test_another_seed_is_another_order():
  a, b = (worker_turns(6, 60, 'random', seed).worker_N for seed in (0, 1))
  assert not np.array_equal(a, b)


def test_statistics_of_each_forward_pass_go_to_the_server():
  method = AsynchronousSgd(2)
  stream = stream_of(method, points)
  states, _ = train(method, toy.STATISTICS, toy.SGD, stream, range(5))
  mean = np.zeros(toy.FEATURES)
  for n in range(5):
    inputs = toy.Clusters(2 * ROWS, weights=True).batch(n // 2)['inputs']
    mean = 0.5 * (mean + inputs[n % 2 * ROWS :][:ROWS].mean(axis=0))
    found = states[n].variables.model_state
    np.testing.assert_allclose(found['mean'], mean, rtol=1e-5)
    assert found['calls'] == n + 1


def test_replicas_share_the_rows_of_each_worker():
  method = AsynchronousSgd(3, 'random')
  stream = stream_of(method, tokens)
  alone, metrics = train(method, toy.RECURRENT, MOMENTUM, stream, range(7))
  step = PmapStep(
      method.make_train_step(
          toy.RECURRENT, MOMENTUM, num_steps=UPDATES, axis_name=REPLICA_AXIS
      ),
      jax.devices()[:2],
  )
  state = step.place(start(method, toy.RECURRENT, MOMENTUM))
  for n in range(7):
    state, found = step(state, stream.batch(n), None, 0.0)
    for key, value in metrics[n].items():
      np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)
  assert step.num_traces == 1
  toy.assert_same(step.collect(state), alone[-1], rtol=1e-4, atol=1e-5)


def test_a_process_loads_its_rows_of_every_worker():
  method = AsynchronousSgd(3)
  whole = stream_of(method, tokens)
  half = stream_of(method, tokens, slice(1, 2))
  for n in range(7):
    expected = {k: x[1:2] for k, x in whole.batch(n).items()}
    toy.assert_same(half.batch(n), expected)


@pytest.mark.parametrize('ramp', [0, 40])
def test_many_workers_share_a_few_streams(ramp):
  """And each has rows of its own, read once where all are at one batch."""
  made, read = [], []

  class Counted(Rows):

    def batch(self, step):
      read.append((self._rows, step))
      return super().batch(step)

  def make(group_batch, rows):
    made.append(rows)
    return Counted(toy.Clusters(group_batch), rows)

  method = AsynchronousSgd(19, 'random', ramp_up_steps=ramp)
  stream = stream_of(method, make, num_steps=95)
  assert not made
  turns = method.turns(95)
  whole = points_of(19 * ROWS)
  for n, (w, k) in enumerate(zip(turns.worker_N, turns.batch_N)):
    rows = slice(w * ROWS, (w + 1) * ROWS)
    expected = {key: x[rows] for key, x in whole(int(k)).items()}
    toy.assert_same(stream.batch(n), expected)
  assert len(made) == (19 if ramp else 7)
  assert len(read) == (95 if ramp else 5 * 7)


def test_a_run_goes_on_from_the_middle():
  method = AsynchronousSgd(3, 'random', ramp_up_steps=4)
  stream = stream_of(method, tokens)
  whole, _ = train(method, toy.RECURRENT, toy.ADAM, stream)
  rest, _ = train(
      method, toy.RECURRENT, toy.ADAM, stream, range(5, UPDATES), whole[4]
  )
  toy.assert_same(rest[-1], whole[-1])


def test_teachers_keep_a_carry_for_each_workers_rows():
  method = AsynchronousSgd(2)
  stream = stream_of(method, tokens)
  teachers = toy.stacked(toy.peers_of(toy.RECURRENT, 2))
  step = jax.jit(method.make_train_step(toy.RECURRENT, toy.SGD, num_steps=9))
  state = start(method, toy.RECURRENT, toy.SGD, num_peers=2)
  carries = [toy.RECURRENT.init_carry(ROWS)] * 2
  for n in range(4):
    state, metrics = step(state, stream.batch(n), teachers, 1.0)
    assert metrics['loss/distill'] > 0
    variables = jax.tree.map(lambda x: x[1], teachers.variables)
    _, updates = toy.evaluated(toy.RECURRENT)(
        variables, stream.batch(n), carries[n % 2]
    )
    carries[n % 2] = updates.carry
  for w in range(2):
    np.testing.assert_allclose(
        state.teacher_carry[1, :, w], carries[w], rtol=1e-5, atol=1e-6
    )


def test_a_loss_far_above_the_start_is_reported():
  method = AsynchronousSgd(4)
  wild = optax.sgd(30.0, momentum=0.9)
  stream = stream_of(method, tokens)
  _, metrics = train(method, toy.RECURRENT, wild, stream)
  assert metrics[0]['async/diverged'] == 0
  assert metrics[0]['async/loss_over_start'] == 1
  assert metrics[-1]['async/loss_over_start'] > 2
  assert metrics[-1]['async/diverged'] == 1


def test_beyond_its_last_turn_it_is_refused():
  """All updates would be the last worker's."""
  method = AsynchronousSgd(2)
  stream = stream_of(method, points, num_steps=3)
  update = method.make_train_step(toy.TWO_LAYERS, toy.SGD, num_steps=3)
  state = start(method, toy.TWO_LAYERS, toy.SGD)
  states, metrics = toy.trained(update, state, points(ROWS), range(4))
  assert [bool(np.isfinite(m['loss/task'])) for m in metrics] == 3 * [True] + [
      False
  ]
  assert np.isnan(metrics[-1]['loss/total'])
  with pytest.raises(ValueError, match=r'num_steps=3 .* be number 4; make'):
    update(states[2], stream.batch(0), None, 0.0)
  with pytest.raises(ValueError, match=r'num_steps=3 .* be number 4; make'):
    stream.batch(3)
  with pytest.raises(
      ValueError, match='num_steps=5, but the step was made for'
  ):
    run_group(PmapStep(update), state, stream, num_steps=5)


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'workers': 0}, 'AsynchronousSgd.workers=0; .*at least 1'),
        ({'order': 'fair'}, "order='fair' is not one of round_robin, random"),
        ({'seed': -1}, 'AsynchronousSgd.seed=-1; .*at least 0'),
        ({'ramp_up_steps': 1.5}, 'ramp_up_steps=1.5; .*whole number'),
        ({'workers': 9, 'ramp_up_steps': 7}, 'too short .* at least 8'),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message):
    AsynchronousSgd(**wrong)
