"""Peers that predict the same batch: every group's update is algorithm 1's."""

import functools

import algorithm1
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codistill_jax import blocks, losses, peer_predictions
from codistill_jax import step as step_lib
from codistill_jax.base import (
    GROUP_AXIS,
    HeadOutputs,
    Model,
    PeerPredictions,
    TrainState,
    Updates,
    Variables,
)
from codistill_jax.exchange.plan import peers_of

CLASSES = 6
CE = 'cross_entropy'
BATCH = {
    **toy.Clusters(8).batch(1),
    'weights': np.array([1, 0, 2, 0.5, 0, 1, 1, 3], np.float32),
}


def stack(trees):
  return jax.tree.map(lambda *xs: np.stack(xs), *trees)


@functools.cache
def compiled(model, **kwargs):
  """The step of groups that are one program on one device."""
  step = step_lib.make_train_step(model, toy.SGD, **kwargs)
  return jax.jit(
      jax.vmap(step, in_axes=(0, None, 0, None), axis_name=GROUP_AXIS)
  )


def theta(variables):
  return algorithm1.as_float64(variables.params)


@functools.partial(jax.jit, static_argnames=('name', 'top_k', 'output'))
def mixed(name, logits_GBC, mix_GG, top_k=None, output='softmax'):
  """The loss of every group, (G, B)."""
  loss = losses.distill_loss(name, output)

  def one(logits, mix_G):
    return peer_predictions.peer_loss(
        loss, logits, PeerPredictions(mix_G, top_k=top_k)
    )

  return jax.vmap(one, axis_name=GROUP_AXIS)(logits_GBC, mix_GG)


TWO = peer_predictions.mixing_matrix([(1,), (0,)])

# -- the update ---------------------------------------------------------------

PEERS = {
    'alone': [()],
    'all-3': [(1, 2), (0, 2), (0, 1)],
    'ring-4': [peers_of(g, 4, 'ring') for g in range(4)],
    'all-4': [peers_of(g, 4) for g in range(4)],
    # Group 3 is absent, and learns from nobody.
    'absent': [(1, 2), (0, 2), (0, 1), ()],
}


@pytest.mark.parametrize('peers', PEERS.values(), ids=PEERS)
def test_the_update_of_every_group_is_that_of_algorithm_1(peers):
  states = [toy.start(toy.TWO_LAYERS, seed=g) for g in range(len(peers))]
  thetas = [theta(state.variables) for state in states]
  mix_GG = peer_predictions.mixing_matrix(peers)

  after, found = compiled(toy.TWO_LAYERS)(
      stack(states), BATCH, PeerPredictions(mix_GG), 0.3
  )

  for g, others in enumerate(peers):
    there = [thetas[h] for h in others]
    expected = algorithm1.update(thetas[g], BATCH, there, 0.3)
    got = jax.tree.map(lambda x, g=g: x[g], after.variables)
    toy.assert_same(theta(got), expected, rtol=1e-5, atol=1e-6)
    phi, psi = algorithm1.losses(thetas[g], BATCH, there)
    np.testing.assert_allclose(found['loss/task'][g], phi, rtol=1e-5)
    np.testing.assert_allclose(found['loss/distill'][g], psi, rtol=1e-5)
    total = phi + 0.3 * psi
    np.testing.assert_allclose(found['loss/total'][g], total, rtol=1e-5)


def test_no_gradient_flows_into_peers():
  """Of what one group loses, by the logits of the others."""
  logits = np.random.default_rng(0).normal(size=(3, 2, CLASSES))
  mix_GG = peer_predictions.mixing_matrix(PEERS['all-3'])
  forms = [('jsd', None), ('squared_logits', None), (CE, 2)]

  @jax.jit
  def gradients(logits):
    of = lambda z, n, k: jnp.sum(mixed(n, z, mix_GG, k)[0])
    return [jax.grad(of)(logits, *form) for form in forms]

  for grad in gradients(logits):
    assert np.any(grad[0]) and not np.any(grad[1:])


def test_no_forward_pass_is_made_for_a_teacher():
  states = stack([toy.start(toy.TWO_LAYERS, seed=g) for g in range(3)])
  peers = PeerPredictions(peer_predictions.mixing_matrix(PEERS['all-3']))
  text = str(
      jax.make_jaxpr(compiled(toy.TWO_LAYERS))(states, BATCH, peers, 1.0)
  )
  # Two layers: two products forward, three backward.
  assert text.count(' dot_general[') == 5


def test_a_recurrent_model_keeps_its_state_and_needs_no_other():
  states = [toy.start(toy.RECURRENT, seed=g, num_peers=0) for g in range(2)]
  batch = toy.Tokens(8).batch(0)
  peers = PeerPredictions(TWO)
  after, found = compiled(toy.RECURRENT)(stack(states), batch, peers, 1.0)
  logits = []
  for g, state in enumerate(states):
    out, updates = toy.evaluated(toy.RECURRENT)(
        state.variables, batch, state.carry
    )
    np.testing.assert_allclose(after.carry[g], updates.carry, rtol=1e-5)
    logits.append(out)
  w = batch['weights']
  for g in range(2):
    p, log_q = jax.nn.softmax(logits[1 - g]), jax.nn.log_softmax(logits[g])
    expected = -np.sum(np.sum(p * log_q, axis=-1) * w) / w.sum()
    np.testing.assert_allclose(found['loss/distill'][g], expected, rtol=1e-5)


# -- blocks of examples -------------------------------------------------------


def head_model(classes):
  """Features that are the inputs, and a head for as many classes."""

  def apply(variables, batch, carry, rng, train):
    del rng, train
    p = variables.params
    outputs = HeadOutputs(batch['inputs'], p['kernel'], p['bias'])
    return outputs, Updates({}, carry)

  def start(seed):
    rng = np.random.default_rng(seed)
    shapes = {'kernel': (toy.FEATURES, classes), 'bias': (classes,)}
    params = {
        k: rng.normal(size=n).astype(np.float32) for k, n in shapes.items()
    }
    return TrainState(
        np.int32(0),
        Variables(params),
        toy.SGD.init(params),
        np.zeros(2, 'u4'),
        (),
        (),
    )

  return Model(None, apply), start


@pytest.mark.parametrize('top_k', [None, 2])
def test_blocks_of_examples_give_what_all_at_once_give(top_k, monkeypatch):
  monkeypatch.setattr(blocks, 'block_size', lambda *_: 3)
  model, start = head_model(toy.CLASSES)
  states = stack([start(seed) for seed in range(3)])
  peers = PeerPredictions(
      peer_predictions.mixing_matrix([(1, 2), (2,), ()]), top_k=top_k
  )
  fused, plain = (
      compiled(model, fused=choice)(states, BATCH, peers, 0.7)
      for choice in (True, False)
  )
  toy.assert_same(fused, plain, rtol=1e-5, atol=1e-6)


def test_each_group_takes_one_softmax_whatever_their_number():
  classes, groups = 500, 4
  model, start = head_model(classes)
  states = stack([start(seed) for seed in range(groups)])
  mix_GG = peer_predictions.mixing_matrix(
      [peers_of(g, groups) for g in range(groups)]
  )
  args = states, BATCH, PeerPredictions(mix_GG), 0.7
  cost = compiled(model).lower(*args).compile().cost_analysis()
  exponentials = cost['transcendentals'] / (groups * 8 * classes)
  assert 1 <= exponentials < 1.05


# -- the loss -----------------------------------------------------------------


@pytest.mark.parametrize('output', ['softmax', 'sigmoid'])
def test_each_loss_is_that_of_teachers_that_predict_the_same(output):
  logits = np.random.default_rng(0).normal(0, 3, (4, 2, CLASSES))
  logits = logits.astype(np.float32)
  mix_GG = peer_predictions.mixing_matrix([(1, 2, 3), (0, 2), (1,), ()])
  names = list(losses.DISTILL_LOSSES)
  if output == 'softmax':
    names.remove('sigmoid_cross_entropy')

  @jax.jit  # All at once: one program is compiled faster than many.
  def both(logits, mix_GG):
    found, expected = {}, {}
    for name in names:
      loss = losses.distill_loss(name, output)
      found[name] = mixed(name, logits, mix_GG, output=output)
      expected[name] = jax.vmap(loss, in_axes=(0, None, 0))(
          logits, logits, mix_GG != 0
      )
    return found, expected

  found, expected = both(logits, mix_GG)
  toy.assert_same(found, expected, rtol=1e-4, atol=1e-5)
  assert all(np.any(x[:3]) and not np.any(x[3]) for x in found.values())


def test_many_groups_are_averaged_like_few():
  logits = np.random.default_rng(0).normal(0, 3, (9, 2, CLASSES))
  peers = [peers_of(g, 9) for g in range(9)]
  found = mixed(CE, logits, peer_predictions.mixing_matrix(peers))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for g, others in enumerate(peers):
    mean = np.mean(p[list(others)], axis=0)
    expected = -np.sum(mean * np.log(p[g]), axis=-1)
    np.testing.assert_allclose(found[g], expected, rtol=1e-5)


def test_a_temperature_divides_the_logits_of_all():
  logits = np.random.default_rng(0).normal(0, 3, (2, 3, CLASSES))
  hot = functools.partial(
      losses.kl, temperature=3.0, scale_by_temperature_squared=True
  )
  peers = PeerPredictions(TWO)
  of = functools.partial(peer_predictions.peer_loss, hot)
  found = jax.jit(jax.vmap(of, axis_name=GROUP_AXIS))(logits, peers)
  expected = jax.jit(hot)(logits[0], logits[1:], np.ones(1))
  np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('temperature', [0, -1, np.float32(0), np.inf, np.nan])
def test_a_temperature_is_positive_and_finite(temperature):
  loss = functools.partial(losses.kl, temperature=temperature)
  with pytest.raises(ValueError, match='positive and finite, got'):
    peer_predictions.peer_loss(loss, np.zeros((2, 3)), PeerPredictions(TWO))


@pytest.mark.parametrize('top_k', [None, 2])
def test_a_class_that_nobody_has_does_no_harm(top_k):
  logits = np.random.default_rng(0).normal(size=(2, 3, CLASSES))
  mix_GG = TWO
  padded = np.concatenate([logits, np.full((2, 3, 2), -np.inf)], axis=-1)
  loss = functools.partial(mixed, 'cross_entropy', mix_GG=mix_GG, top_k=top_k)
  sum_of = lambda z: jnp.sum(loss(z))
  found, grad = jax.jit(jax.value_and_grad(sum_of))(padded)
  np.testing.assert_allclose(found, np.sum(loss(logits)), rtol=1e-6)
  assert np.all(np.isfinite(grad)) and not np.any(grad[..., CLASSES:])


@pytest.mark.parametrize('top_k', [None, 2])
def test_a_group_that_diverges_spoils_only_itself_and_its_pupils(top_k):
  logits = np.random.default_rng(0).normal(size=(4, 3, CLASSES))
  mix_GG = peer_predictions.mixing_matrix([(1,), (0,), (3,), (2,)])
  loss = functools.partial(mixed, 'cross_entropy', mix_GG=mix_GG, top_k=top_k)
  sound = loss(logits)
  logits[0] = np.nan
  found = loss(logits)
  np.testing.assert_array_equal(found[2:], sound[2:])
  assert np.all(np.isnan(found[0]))


# -- the K largest ------------------------------------------------------------

LOGITS = hnp.arrays(
    np.float32,
    (2, 2, CLASSES),
    elements=st.floats(-30, 30, width=32),
)


def cross_entropy(logits, top_k):
  return mixed(CE, logits, TWO, top_k)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(LOGITS)
def test_the_rest_is_one_more_class_and_nothing_is_renormalised(logits):
  """Against the definition in float64, with its gradient."""
  found = cross_entropy(logits, 2)
  wide = logits.astype(np.float64)
  for g in range(2):
    q, p = (np.exp(x - x.max(-1, keepdims=True)) for x in wide[[g, 1 - g]])
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    classes = np.asarray(jax.lax.top_k(jax.nn.softmax(logits[1 - g]), 2)[1])
    for b in range(2):
      kept = np.isin(np.arange(CLASSES), classes[b])
      expected = -np.sum(p[b, kept] * np.log(q[b, kept]))
      rest, left = p[b, ~kept].sum(), max(q[b, ~kept].sum(), 1e-6)
      expected -= rest * np.log(left)
      # What is left is 1 less a sum, in float32.
      atol = 1e-5 + rest * 4e-7 / left + 4e-7 * abs(np.log(left))
      np.testing.assert_allclose(found[g, b], expected, rtol=1e-4, atol=atol)


@functools.partial(jax.jit, static_argnums=1)
def gradient(logits, top_k):
  return jax.grad(lambda z: jnp.sum(cross_entropy(z, top_k)))(logits)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(LOGITS)
def test_all_classes_give_the_gradient_of_the_whole(logits):
  few, full = (gradient(logits, k) for k in (CLASSES, None))
  np.testing.assert_allclose(few, full, rtol=1e-5, atol=1e-6)


def test_what_is_sent_is_as_small_as_it_is_said_to_be():
  whole = jax.ShapeDtypeStruct((7, 100), np.float32)
  sent = jax.eval_shape(lambda p: peer_predictions.largest(p, 5), whole)
  size = sum(x.size * x.dtype.itemsize for x in sent)
  assert size == 7 * peer_predictions.bytes_per_example(100, 5, 'softmax')
  assert peer_predictions.bytes_per_example(100, None, 'softmax') == 400


# -- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    'name, top_k, output, message',
    [
        ('kl', 2, 'softmax', 'top_k=2 is there for the .* cross_e'),
        ('cross_entropy', 1, 'sigmoid', 'top_k=1 .* softmax output'),
        ('cross_entropy', 0, 'softmax', 'top_k=0; .* at least 1'),
        ('cross_entropy', 2.0, 'softmax', 'top_k=2.0; '),
        ('cross_entropy', 7, 'softmax', 'top_k=7, but .* 6 classes'),
    ],
)
def test_a_top_k_that_does_not_suit_is_refused(name, top_k, output, message):
  with pytest.raises(ValueError, match=message):
    mixed(name, np.zeros((2, 2, CLASSES)), TWO, top_k, output)


def test_a_loss_of_somebody_else_is_refused():
  def mine(student, teachers, present):
    del teachers, present
    return student[..., 0]

  step = step_lib.make_train_step(toy.TWO_LAYERS, toy.SGD, distill_loss=mine)
  with pytest.raises(ValueError, match=r'mine has no formula .*; use one of'):
    jax.eval_shape(
        step, toy.start(toy.TWO_LAYERS), BATCH, PeerPredictions(np.ones(1)), 1.0
    )


def test_a_mean_over_other_groups_than_there_are_is_refused():
  with pytest.raises(ValueError, match=r'mix_G has 3 groups, but .* has 2'):
    mixed('kl', np.zeros((2, 2, CLASSES)), np.ones((2, 3)))
