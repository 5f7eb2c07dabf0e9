"""The LSTM language model against a slow one, and its handling of state."""

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


def perturbed(model, seed=0):
  """Variables in which no scale is 1 and no shift is 0."""
  variables = jax.jit(model.init)(jax.random.key(seed), tokens())
  rng = np.random.default_rng(seed)
  noise = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(noise, variables)


MODEL = small()
VARIABLES = perturbed(MODEL)


@jax.jit
def run(variables, batch, carry):
  outputs, updates = MODEL.apply(variables, batch, carry, None, False)
  return base.logits_of(outputs), updates.carry


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
  variables = perturbed(model)
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


def test_two_documents_in_a_window_equal_each_alone():
  batch, carry, cut = tokens(), random_carry(), 4
  batch['resets'][:] = False
  batch['resets'][:, cut] = True
  logits, last = run(VARIABLES, batch, carry)
  part = lambda s: {k: v[:, s] for k, v in batch.items()}
  first, _ = run(VARIABLES, part(slice(0, cut)), carry)
  alone = part(slice(cut, None))
  alone['resets'] = np.zeros_like(alone['resets'])
  second, last_alone = run(VARIABLES, alone, MODEL.init_carry(B))
  np.testing.assert_allclose(logits[:, :cut], first, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(logits[:, cut:], second, rtol=1e-5, atol=1e-6)
  for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(last_alone)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_reset_touches_its_own_row_only():
  batch, carry = tokens(), random_carry()
  batch['resets'][:] = False
  plain, _ = run(VARIABLES, batch, carry)
  # A new array: jax may still be reading the first one, without a copy.
  resets = batch['resets'].copy()
  resets[1, 2] = True
  reset, _ = run(VARIABLES, batch | {'resets': resets}, carry)
  np.testing.assert_array_equal(plain[::2], reset[::2])
  np.testing.assert_array_equal(plain[1, :2], reset[1, :2])
  assert (np.abs(plain[1, 2:] - reset[1, 2:]).max(-1) > 1e-5).all()


def test_one_long_window_equals_two_with_the_carry_between():
  batch = tokens(length=2 * T)
  whole, last = run(VARIABLES, batch, random_carry())
  carry, parts = random_carry(), []
  for s in (slice(0, T), slice(T, 2 * T)):
    logits, carry = run(
        VARIABLES, {k: v[:, s] for k, v in batch.items()}, carry
    )
    parts.append(logits)
  np.testing.assert_allclose(
      whole, np.concatenate(parts, 1), rtol=1e-5, atol=1e-6
  )
  for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(carry)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_resets_has_none():
  batch = tokens()
  batch['resets'][:] = False
  with_resets, _ = run(VARIABLES, batch, random_carry())
  without, _ = run(VARIABLES, {'inputs': batch['inputs']}, random_carry())
  np.testing.assert_array_equal(with_resets, without)


def test_no_token_sees_a_later_one():
  batch, carry = tokens(), random_carry()
  before, _ = run(VARIABLES, batch, carry)
  inputs = batch['inputs'].copy()
  inputs[:, 3] = (inputs[:, 3] + 1) % VOCAB
  after, _ = run(VARIABLES, batch | {'inputs': inputs}, carry)
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert (np.abs(before[:, 3] - after[:, 3]).max(-1) > 1e-5).all()


def test_parameters_of_the_papers_size_count_as_by_hand():
  vocab, embedding, units = 24006, 256, 1024
  model = lstm.language_model(vocab)
  variables = jax.eval_shape(
      model.init, jax.random.key(0), {'inputs': np.zeros((1, 2), np.int32)}
  )
  # x_kernel, h_kernel; bias and two scales of the gates; scale and shift of c.
  layer = lambda d: (d + units) * 4 * units + 3 * 4 * units + 2 * units
  by_hand = (
      vocab * embedding
      + layer(embedding)
      + layer(units)
      + units * vocab
      + vocab
  )
  leaves = jax.tree.leaves(variables.params)
  assert sum(x.size for x in leaves) == by_hand == 44_411_846
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
  assert variables.model_state == {}


def test_forget_gates_start_open():
  params = jax.jit(MODEL.init)(jax.random.key(0), tokens()).params
  for i in range(LAYERS):
    bias = params[f'lstm_{i}']['bias']
    np.testing.assert_array_equal(bias, np.repeat([1, 0], [UNITS, 3 * UNITS]))


def test_bfloat16_keeps_state_and_parameters_in_float32():
  model = small(dtype='bfloat16')
  variables = jax.jit(model.init)(jax.random.key(0), tokens())
  apply = lambda v, b, c: model.apply(v, b, c, None, False)
  outputs, updates = jax.jit(apply)(variables, tokens(), random_carry())
  assert outputs.features.dtype == outputs.kernel.dtype == jnp.bfloat16
  leaves = jax.tree.leaves((variables, updates.carry, outputs.bias))
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
  full, _ = run(variables, tokens(), random_carry())
  np.testing.assert_allclose(base.logits_of(outputs), full, atol=0.05)
  assert np.abs(base.logits_of(outputs) - full).max() > 1e-5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_are_finite_and_reach_every_parameter(dtype):
  model = small(dtype=dtype)
  batch = tokens()
  batch['resets'][:, 0] = True  # From zeros, where a variance is 0.

  @jax.jit
  def gradient(variables):
    def loss(params):
      outputs, _ = model.apply(
          variables.replace(params=params),
          batch,
          model.init_carry(B),
          None,
          False,
      )
      log_probs = jax.nn.log_softmax(base.logits_of(outputs))
      return -jnp.sum(log_probs[..., 0])

    return jax.grad(loss)(variables.params)

  for path, x in jax.tree.leaves_with_path(gradient(perturbed(model))):
    assert np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path


def test_dropout_acts_in_training_only():
  model = small(dropout=0.5)
  batch, carry = tokens(), random_carry()

  def logits(seed, train):
    key = jax.random.key(seed) if train else None
    outputs, _ = model.apply(VARIABLES, batch, carry, key, train)
    return base.logits_of(outputs)

  plain, _ = run(VARIABLES, batch, carry)
  np.testing.assert_allclose(logits(0, False), plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(logits(0, True), logits(0, True))
  assert np.abs(logits(0, True) - logits(1, True)).max() > 0.1


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


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'units': 0}, 'units must be a whole number of at least 1'),
        ({'units': 3.5}, 'got 3.5'),
        ({'layers': 0}, 'layers'),
        ({'dropout': 1.0}, 'dropout'),
        ({'dtype': 'float16'}, "got 'float16'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    lstm.language_model(VOCAB, **kwargs)


def test_a_carry_of_another_number_of_rows_is_refused():
  with pytest.raises(ValueError, match='carry has 2 rows, the inputs have 3'):
    MODEL.apply(VARIABLES, tokens(), MODEL.init_carry(2), None, False)
