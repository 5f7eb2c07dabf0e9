"""The LSTM language model against a slow one; see models_test.py, too."""

import fast
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base
from codistill_jax.models import lstm

VOCAB, LAYERS, UNITS, EMBEDDING = 11, 2, 5, 3
B, T = 3, 6


def small(**kwargs):
  return lstm.language_model(
      VOCAB, layers=LAYERS, units=UNITS, embedding=EMBEDDING, **kwargs
  )


def tokens(seed=0, rows=B, length=T):
  rng = np.random.default_rng(seed)
  return {
      'inputs': rng.integers(VOCAB, size=(rows, length)).astype(np.int32),
      'resets': rng.random((rows, length)) < 0.3,
  }


MODEL = small()
VARIABLES = fast.random_variables(MODEL, tokens())


def random_carry(rows=B, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32),
      MODEL.init_carry(rows),
  )


def slow_language_model(params, batch, carry, layer_norm):
  """Token by token, in float64, as the equations are written."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))

  def norm(x, scale, shift=0.0):
    if not layer_norm:
      return x
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-6
    )
    return unit * p_i[scale] + (p_i[shift] if shift else 0.0)

  state = [[np.asarray(s, np.float64) for s in layer] for layer in carry]
  logits = []
  for t in range(batch['inputs'].shape[1]):
    x = p['Embed_0']['embedding'][batch['inputs'][:, t]]
    for i in range(LAYERS):
      p_i = p[f'lstm_{i}']
      c, h = state[i]
      keep = 1.0 - batch['resets'][:, t, None]
      c, h = c * keep, h * keep
      gates = norm(h @ p_i['h_kernel'], 'h_norm_scale')
      gates = gates + norm(x @ p_i['x_kernel'], 'x_norm_scale') + p_i['bias']
      f, in_, o, g = np.split(gates, 4, axis=-1)
      c = sigmoid(f) * c + sigmoid(in_) * np.tanh(g)
      h = sigmoid(o) * np.tanh(norm(c, 'c_norm_scale', 'c_norm_shift'))
      state[i] = [c, h]
      x = h
    logits.append(x @ p['head_kernel'] + p['head_bias'])
  return np.stack(logits, 1), state


@pytest.mark.parametrize('layer_norm', [True, False])
def test_equals_a_slow_lstm(layer_norm):
  model = small(layer_norm=layer_norm)
  variables = fast.random_variables(model, tokens())
  batch, carry = tokens(), random_carry()
  assert 0 < batch['resets'].sum() < B * T
  outputs, updates = model.apply(variables, batch, carry, None, False)
  expected = slow_language_model(variables.params, batch, carry, layer_norm)
  got = base.logits_of(outputs), [list(layer) for layer in updates.carry]
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      got,
      expected,
  )


def test_forget_gates_start_open():
  params = jax.jit(MODEL.init)(jax.random.key(0), tokens()).params
  for i in range(LAYERS):
    bias = params[f'lstm_{i}']['bias']
    np.testing.assert_array_equal(bias, np.repeat([1, 0], [UNITS, 3 * UNITS]))


def test_the_state_stays_float32():
  model = small(dtype='bfloat16')
  outputs, updates = jax.eval_shape(
      lambda c: model.apply(VARIABLES, tokens(), c, None, False), random_carry()
  )
  assert outputs.features.dtype == outputs.kernel.dtype == jnp.bfloat16
  leaves = jax.tree.leaves((updates.carry, outputs.bias))
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}


def test_dropout_acts_on_the_input_of_each_layer_and_on_the_output():
  dropped = []

  def watch(next_call, args, kwargs, context):
    if isinstance(context.module, nn.Dropout):
      dropped.append(args[0].shape)
    return next_call(*args, **kwargs)

  model = small(dropout=0.5)
  key = jax.random.key(0)
  with nn.intercept_methods(watch):
    model.apply(VARIABLES, tokens(), random_carry(), key, True)
  assert dropped == [(B, T, EMBEDDING)] + [(T, B, UNITS)] * LAYERS
