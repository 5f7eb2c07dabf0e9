"""Large-batch optimisers: whom they decay, and their steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codistill_jax import optimizers
from codistill_jax.models import lstm, resnet, transformer

# A kernel, and one of everything that is none.
PARAMS = {
    'conv': {'kernel': np.float32([[3.0, -4.0]])},
    'norm': {'scale': np.float32([2.0]), 'bias': np.float32([-1.0])},
    'dense': {'kernel': np.float32([[1.0], [2.0]]), 'bias': np.float32([0.5])},
}


def gradients(seed):
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(draw, PARAMS)


def names_of(mask, value):
  return {
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, x in jax.tree.leaves_with_path(mask)
      if x is value
  }


def params_of(model, **batch):
  return jax.eval_shape(model.init, jax.random.key(0), batch).params


IMAGES = {'inputs': np.zeros((1, 32, 32, 3), np.float32)}
TOKENS = {'inputs': np.zeros((1, 2), np.int32)}


@pytest.mark.parametrize('make', [resnet.resnet20, resnet.resnet50])
def test_of_a_residual_network_the_convolutions_and_the_head_decay(make):
  params = params_of(make(10), **IMAGES)
  mask = optimizers.kernels(params)
  decayed, spared = names_of(mask, True), names_of(mask, False)
  assert len(decayed) + len(spared) == len(jax.tree.leaves(params))
  shapes = {
      jax.tree_util.keystr(path, simple=True, separator='/'): x.shape
      for path, x in jax.tree.leaves_with_path(params)
  }
  assert {len(shapes[name]) for name in decayed} == {2, 4}
  assert {len(shapes[name]) for name in spared} == {1}
  assert {name.split('/')[-1] for name in decayed} == {'kernel'}
  assert {name.split('/')[-1] for name in spared} == {'scale', 'bias'}


def test_of_language_models_the_matrices_decay_but_not_the_embedding():
  params = params_of(lstm.language_model(7, layers=1), **TOKENS)
  assert names_of(optimizers.kernels(params), True) == {
      'lstm_0/x_kernel',
      'lstm_0/h_kernel',
      'head_kernel',
  }
  model = transformer.language_model(7, layers=1, units=8, heads=2)
  found = names_of(optimizers.kernels(params_of(model, **TOKENS)), False)
  assert found == {
      'embed/embedding',
      'layer_0/attention_norm/scale',
      'layer_0/feed_norm/scale',
      'norm/scale',
  }


def test_a_model_without_kernels_is_refused():
  with pytest.raises(ValueError, match='end in kernel, got b, weights; rename'):
    optimizers.momentum_sgd(0.1).init({'weights': jnp.ones(2), 'b': 1.0})


def descend(tx, steps):
  """Parameters after each of the steps."""
  params, state, path = PARAMS, tx.init(PARAMS), []
  for step in range(steps):
    updates, state = tx.update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return path


def by_hand(steps, direction):
  """w' = w - direction(is_kernel, w, g, u, rate), which also gives u'."""
  is_kernel = optimizers.kernels(PARAMS)
  params = jax.tree.map(np.float64, PARAMS)
  past = jax.tree.map(np.zeros_like, params)
  for step in range(steps):
    rate = RATE(step)
    both = jax.tree.map(
        lambda k, w, g, u, rate=rate: direction(k, w, np.float64(g), u, rate),
        is_kernel,
        params,
        gradients(step),
        past,
    )
    move, past = jax.tree.transpose(
        jax.tree.structure(params), jax.tree.structure((0, 0)), both
    )
    params = jax.tree.map(np.subtract, params, move)
    yield params


RATE = lambda step: 0.5 / (1.0 + step)  # A rate that changes.


def assert_same_path(found, expected):
  for a, b in zip(found, expected, strict=True):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        a,
        b,
    )


@pytest.mark.parametrize('nesterov', [False, True])
def test_momentum_sgd_is_the_formula_of_goyal(nesterov):
  def direction(is_kernel, w, g, u, rate):
    g = g + 0.01 * w if is_kernel else g
    u = 0.8 * u + g
    return rate * (g + 0.8 * u if nesterov else u), u

  tx = optimizers.momentum_sgd(
      RATE, momentum=0.8, nesterov=nesterov, weight_decay=0.01
  )
  assert_same_path(descend(tx, 3), by_hand(3, direction))


def test_the_defaults_are_those_of_the_paper():
  def direction(is_kernel, w, g, u, rate):
    u = 0.9 * u + g + (1e-4 * w if is_kernel else 0.0)
    return rate * u, u

  tx = optimizers.momentum_sgd(RATE)
  assert_same_path(descend(tx, 2), by_hand(2, direction))


def test_lars_is_the_formula_of_you():
  def direction(is_kernel, w, g, u, rate):
    if is_kernel:
      d = g + 0.05 * w
      g = 0.02 * np.linalg.norm(w) / np.linalg.norm(d) * d
    u = 0.8 * u + rate * g
    return u, u

  tx = optimizers.lars(
      RATE, momentum=0.8, weight_decay=0.05, trust_coefficient=0.02
  )
  assert_same_path(descend(tx, 3), by_hand(3, direction))


def test_one_step_of_lars_in_numbers():
  params = {'kernel': np.float32([3.0, 4.0]), 'bias': np.float32([3.0, 4.0])}
  grads = {'kernel': np.float32([0.0, 2.0]), 'bias': np.float32([0.0, 2.0])}
  tx = optimizers.lars(10.0, weight_decay=0.0, trust_coefficient=0.001)
  updates, _ = tx.update(grads, tx.init(params), params)
  # 10 * 0.001 * |w| / |g| * g = 0.01 * 5 / 2 * 2.
  np.testing.assert_allclose(updates['kernel'], [0.0, -0.05], rtol=1e-6)
  np.testing.assert_allclose(updates['bias'], [0.0, -20.0], rtol=1e-6)
