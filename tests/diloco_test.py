"""DiLoCo and local SGD against numpy, and against plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base
from codistill_jax import step as step_lib
from codistill_jax.baselines.diloco import Diloco
from codistill_jax.replicas import REPLICA_AXIS, PmapStep

ROWS = 8
AVERAGING = {'outer_rate': 1.0, 'outer_momentum': 0.0}


def linear_model():
  def init(rng, batch):
    del rng, batch
    return base.Variables({'kernel': jnp.zeros((toy.FEATURES, toy.CLASSES))})

  def apply(variables, batch, carry, rng, train):
    del rng, train
    logits = batch['inputs'] @ variables.params['kernel']
    return logits, base.Updates(variables.model_state, carry)

  return base.Model(init, apply)


LINEAR = linear_model()


def train(method, model, tx, updates, *, stream=None, teachers=None):
  """States and metrics after each update."""
  plain = toy.start(model, tx, num_peers=1 if teachers else 0)
  return toy.trained(
      method.make_train_step(model, tx, num_steps=99),
      base.host_copy(method.init_state(tx, plain)),
      stream or toy.Clusters(ROWS),
      range(updates),
      teachers,
      1.0,
  )


def train_plainly(model, tx, updates, *, stream=None):
  return toy.trained(
      step_lib.make_train_step(model, tx),
      toy.start(model, tx, num_peers=0),
      stream or toy.Clusters(ROWS),
      range(updates),
  )


# The same in numpy, from the formulas.


def gradient(kernel, inputs, labels):
  logits = inputs @ kernel
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  p[np.arange(len(labels)), labels] -= 1
  return inputs.T @ p / len(labels)


class Sgd:

  def __init__(self, rate):
    self.tx, self._rate = optax.sgd(rate), rate

  def step(self, x, g):
    return x - self._rate * g


class AdamW:

  def __init__(self, rate, decay):
    self.tx = optax.adamw(rate, weight_decay=decay)
    self._rate, self._decay = rate, decay
    self._m = self._v = self._t = 0

  def step(self, x, g):
    self._t += 1
    self._m = 0.9 * self._m + 0.1 * g
    self._v = 0.999 * self._v + 0.001 * g**2
    m, v = self._m / (1 - 0.9**self._t), self._v / (1 - 0.999**self._t)
    return x - self._rate * (m / (np.sqrt(v) + 1e-8) + self._decay * x)


def in_numpy(make_inner, workers, inner_steps, updates, rate, momentum):
  """Mean parameters and divergence after each update."""
  tx = make_inner().tx
  begun = toy.start(LINEAR, tx, num_peers=0).variables.params['kernel']
  begun = begun.astype(np.float64)
  each, inner = [begun] * workers, [make_inner() for _ in range(workers)]
  velocity, means, spreads = 0.0, [], []
  for n in range(updates):
    batch = toy.Clusters(ROWS).batch(n)
    for m in range(workers):
      mine = [batch[k][m::workers] for k in ('inputs', 'labels')]
      each[m] = inner[m].step(each[m], gradient(each[m], *mine))
    mean = sum(each) / workers
    spreads.append(
        np.sqrt(sum(np.sum((x - mean) ** 2) for x in each) / workers)
    )
    if (n + 1) % inner_steps == 0:
      outer_gradient = begun - mean
      velocity = momentum * velocity + outer_gradient
      begun = begun - rate * (outer_gradient + momentum * velocity)
      each = [begun] * workers
      mean = begun
    means.append(mean)
  return means, spreads


@pytest.mark.parametrize(
    'make_inner, workers, inner_steps, outer',
    [
        (lambda: Sgd(0.3), 2, 3, (0.7, 0.9)),
        (lambda: AdamW(0.05, 0.1), 2, 3, (0.7, 0.9)),
        (lambda: Sgd(0.3), 4, 2, (1.0, 0.0)),  # Local SGD: the mean of all.
    ],
)
def test_outer_steps_are_those_of_numpy(
    make_inner, workers, inner_steps, outer
):
  method = Diloco(workers, inner_steps, *outer)
  states, metrics = train(method, LINEAR, make_inner().tx, 8)
  means, spreads = in_numpy(make_inner, workers, inner_steps, 8, *outer)
  for n, state in enumerate(states):
    np.testing.assert_allclose(
        state.variables.params['kernel'], means[n], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        metrics[n]['local/divergence'], spreads[n], rtol=1e-4
    )
    if (n + 1) % inner_steps == 0:
      toy.assert_same(state.opt_state.begun, state.variables.params)


@pytest.mark.parametrize(
    'model, tx, tolerance',
    [
        (toy.RECURRENT, toy.SGD, {}),
        (toy.STATISTICS, toy.SGD, {}),
        (toy.NOISE, toy.SGD, {}),
        # The compiler fuses the arithmetic of Adam with what follows it.
        (toy.RECURRENT, toy.ADAM, {'rtol': 1e-5, 'atol': 1e-7}),
    ],
)
def test_one_averaging_worker_trains_plainly(model, tx, tolerance):
  method = Diloco(workers=1, inner_steps=2, **AVERAGING)
  stream = toy.stream_of(model)
  states, metrics = train(method, model, tx, 5, stream=stream)
  expected, plain = train_plainly(model, tx, 5, stream=stream)
  for n in range(5):
    toy.assert_same(states[n].variables, expected[n].variables, **tolerance)
    toy.assert_same(states[n].carry, expected[n].carry, **tolerance)
    shared = {key: metrics[n][key] for key in plain[n]}
    toy.assert_same(shared, plain[n], **tolerance)
    assert metrics[n]['local/divergence'] == 0


def test_averaging_after_every_step_of_sgd_is_synchronous_sgd():
  method = Diloco(workers=4, inner_steps=1, **AVERAGING)
  states, metrics = train(method, toy.TWO_LAYERS, toy.SGD, 4)
  expected, plain = train_plainly(toy.TWO_LAYERS, toy.SGD, 4)
  for n in range(4):
    toy.assert_same(
        states[n].variables, expected[n].variables, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        metrics[n]['loss/task'], plain[n]['loss/task'], rtol=1e-4
    )


def test_statistics_are_averaged_and_counters_are_not():
  method = Diloco(workers=2, inner_steps=2)
  states, _ = train(method, toy.STATISTICS, toy.SGD, 3)
  mean = np.zeros(toy.FEATURES)
  for n, state in enumerate(states):
    # A mean of rows, and so of the workers' means of theirs.
    inputs = toy.Clusters(ROWS).batch(n)['inputs']
    mean = 0.5 * (mean + inputs.mean(axis=0))
    found = state.variables.model_state
    np.testing.assert_allclose(found['mean'], mean, rtol=1e-5)
    assert found['calls'] == n + 1


def test_each_worker_draws_noise_of_its_own():
  method = Diloco(workers=2, inner_steps=2)
  state = train(method, toy.NOISE, toy.SGD, 1)[0][0]
  # The model shows its noise in the carry.
  assert len(set(state.carry.tolist())) == ROWS


def test_replicas_share_the_rows_of_each_worker():
  method = Diloco(workers=2, inner_steps=2)
  stream = toy.Tokens(ROWS)
  alone, metrics = train(method, toy.RECURRENT, toy.ADAM, 5, stream=stream)
  step = PmapStep(
      method.make_train_step(
          toy.RECURRENT, toy.ADAM, num_steps=99, axis_name=REPLICA_AXIS
      ),
      jax.devices()[:2],
  )
  plain = toy.start(toy.RECURRENT, toy.ADAM, num_peers=0)
  state = step.place(method.init_state(toy.ADAM, plain))
  for n in range(5):
    state, found = step(state, stream.batch(n), None, 0.0)
    for key, value in metrics[n].items():
      np.testing.assert_allclose(found[key], value, rtol=1e-3, err_msg=key)
  assert step.num_traces == 1
  toy.assert_same(step.collect(state), alone[-1], rtol=1e-3, atol=1e-5)


def test_teachers_keep_their_rows():
  method = Diloco(workers=2, inner_steps=2)
  stream, peers = toy.Tokens(ROWS), toy.peers_of(toy.RECURRENT, 1)
  states, metrics = train(
      method,
      toy.RECURRENT,
      toy.SGD,
      3,
      stream=stream,
      teachers=toy.stacked(peers),
  )
  carry = toy.RECURRENT.init_carry(ROWS)
  for n in range(3):
    assert metrics[n]['loss/distill'] > 0
    _, updates = toy.evaluated(toy.RECURRENT)(peers[0], stream.batch(n), carry)
    carry = updates.carry
    np.testing.assert_allclose(
        states[n].teacher_carry[0], carry, rtol=1e-5, atol=1e-6
    )


def test_convolutions_are_mapped_and_give_the_same():
  """One worker after the other, where a batch of them would be slow."""

  def apply(variables, batch, carry, rng, train):
    del rng, train
    kernel = variables.params['kernel']
    # A product, written as a convolution of width 1.
    logits = jax.lax.conv_general_dilated(
        batch['inputs'][:, :, None], kernel.T[:, :, None], (1,), 'VALID'
    )
    return logits[..., 0], base.Updates(variables.model_state, carry)

  model = LINEAR._replace(apply=apply)
  method = Diloco(workers=2, inner_steps=2)
  states, _ = train(method, model, toy.ADAM, 3)
  expected, _ = train(method, LINEAR, toy.ADAM, 3)
  toy.assert_same(
      states[-1].variables, expected[-1].variables, rtol=1e-4, atol=1e-5
  )
  step = method.make_train_step(model, toy.ADAM, num_steps=9)
  text = str(
      jax.make_jaxpr(step)(states[0], toy.Clusters(ROWS).batch(0), None, 0.0)
  )
  assert 'scan[' in text and 'feature_group_count=2' not in text


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'workers': 2.0}, 'Diloco.workers=2.0; .*at least 1'),
        ({'inner_steps': 0}, 'Diloco.inner_steps=0; .*at least 1'),
        ({'outer_rate': 0.0}, 'Diloco.outer_rate=0.0; .*above 0'),
        ({'outer_rate': 'high'}, "Diloco.outer_rate='high'; .*above 0"),
        ({'outer_momentum': 1.0}, 'Diloco.outer_momentum=1.0; .*below 1'),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message):
    Diloco(**wrong)


def test_rows_that_cannot_be_shared_are_refused():
  with pytest.raises(ValueError, match='set group_batch to a multiple of 6'):
    Diloco(workers=3).check(8, 2)
  Diloco(workers=3).check(12, 2)
  step = Diloco(workers=3).make_train_step(LINEAR, toy.SGD, num_steps=9)
  state = Diloco(workers=3).init_state(toy.SGD, toy.start(LINEAR, num_peers=0))
  with pytest.raises(ValueError, match='8 rows cannot be shared by workers=3'):
    step(state, toy.Clusters(8).batch(0), None, 0.0)
