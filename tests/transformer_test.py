"""The transformer against a slow one, and its memory; see models_test.py, too.

Shapes as in transformer.py.
"""

import functools

import fast
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base
from codistill_jax.models import transformer

VOCAB, LAYERS, UNITS, HEADS, HIDDEN, MEMORY = 11, 2, 12, 3, 10, 12
B, T = 3, 6


@functools.cache
def small(**kwargs):
  sizes = {
      'layers': LAYERS,
      'units': UNITS,
      'heads': HEADS,
      'hidden': HIDDEN,
      'memory': MEMORY,
  }
  return transformer.language_model(VOCAB, **{**sizes, **kwargs})


def tokens(seed=0, rows=B, length=T, resets=0.15):
  rng = np.random.default_rng(seed)
  return {
      'inputs': rng.integers(VOCAB, size=(rows, length)).astype(np.int32),
      'labels': rng.integers(VOCAB, size=(rows, length)).astype(np.int32),
      'resets': rng.random((rows, length)) < resets,
  }


def window(batch, start, stop):
  return {k: v[:, start:stop] for k, v in batch.items()}


def evaluate(model):
  """`(variables, batch, carry) -> (logits, carry)`."""

  def apply(variables, batch, carry):
    outputs, updates = model.apply(variables, batch, carry, None, False)
    return base.logits_of(outputs), updates.carry

  return apply


@functools.cache
def compiled(model):
  return fast.jit(evaluate(model))


def run(variables, batch, carry=None, model=None):
  model = model or small()
  rows = len(batch['inputs'])
  carry = model.init_carry(rows) if carry is None else carry
  return compiled(model)(variables, batch, carry)


def in_windows(variables, batch, cuts, model=None):
  """Logits and the last carry of a batch read in windows."""
  carry, parts = None, []
  for start, stop in zip([0, *cuts], [*cuts, batch['inputs'].shape[1]]):
    logits, carry = run(variables, window(batch, start, stop), carry, model)
    parts.append(logits)
  return np.concatenate(parts, axis=1), carry


VARIABLES = fast.random_variables(small(), tokens())
assert_close = functools.partial(
    np.testing.assert_allclose, rtol=1e-4, atol=1e-5
)


def slow_language_model(params, batch, reach, tied):
  """Token by token in float64; `reach(t)` is the first that token t may see.

  Rotation is written with complex numbers, attention as a loop over what is
  visible.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  size = UNITS // HEADS
  norm = lambda x, scale: scale * x / np.sqrt(np.mean(x * x) + 1e-6)
  waves = 10_000.0 ** (-np.arange(size // 2) / (size // 2))

  def turned(x, position):
    parts = x.reshape(HEADS, 2, size // 2)
    z = parts[:, 0] + 1j * parts[:, 1]
    return z * np.exp(1j * position * waves)

  def attention(query, keys, values, positions):
    q = turned(query, positions[-1])
    k = np.stack([turned(x, t) for x, t in zip(keys, positions)])
    scores = np.real(np.einsum('nh,snh->ns', q, np.conj(k))) / np.sqrt(size)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    heads = np.stack(values).reshape(-1, HEADS, size)
    return np.einsum('ns,snh->nh', weights, heads).reshape(-1)

  logits = np.zeros((*batch['inputs'].shape, VOCAB))
  for b, row in enumerate(batch['inputs']):
    starts = np.maximum.accumulate(
        np.where(batch['resets'][b], np.arange(len(row)), 0)
    )
    stream = [np.sqrt(UNITS) * p['embed']['embedding'][token] for token in row]
    for i in range(LAYERS):
      q = p[f'layer_{i}']
      kernel = lambda name, q=q: q[name]['kernel']
      read = [norm(x, q['attention_norm']['scale']) for x in stream]
      keys, values = ([x @ kernel(n) for x in read] for n in ('key', 'value'))
      for t in range(len(row)):
        seen = range(max(starts[t], reach(t)), t + 1)
        mixed = attention(
            read[t] @ kernel('query'),
            [keys[s] for s in seen],
            [values[s] for s in seen],
            seen,
        )
        x = stream[t] + mixed @ kernel('attention_out')
        z = norm(x, q['feed_norm']['scale'])
        gate = z @ kernel('gate')
        h = gate / (1 + np.exp(-gate)) * (z @ kernel('up'))
        stream[t] = x + h @ kernel('down')
    head = p['embed']['embedding'].T if tied else p['head_kernel']
    for t, x in enumerate(stream):
      logits[b, t] = norm(x, p['norm']['scale']) @ head
  return logits


@pytest.mark.parametrize('tied', [False, True])
def test_equals_a_slow_transformer(tied):
  model = small(tied=tied)
  variables, batch = fast.random_variables(model, tokens()), tokens(length=12)
  assert batch['resets'][:, 1:].sum() > 0
  got, _ = run(variables, batch, model=model)
  expected = slow_language_model(variables.params, batch, lambda t: 0, tied)
  assert_close(got, expected)


def test_the_memory_reaches_as_far_as_it_says():
  """Three windows of 4 with a memory of 5, against the slow model."""
  model = small(memory=5)
  batch = tokens(length=12, resets=0.05)
  got, _ = in_windows(VARIABLES, batch, [4, 8], model)
  # In one layer a token sees 5 before its window; what it sees there has in
  # turn seen only what its own window reached.
  reach = lambda t: max(4 * (t // 4) - 5, 0)
  assert_close(got, slow_language_model(VARIABLES.params, batch, reach, False))
  # And it does not reach further, nor less far.
  for other in (lambda t: max(reach(t) - 1, 0), lambda t: reach(t) + (t > 9)):
    expected = slow_language_model(VARIABLES.params, batch, other, False)
    assert np.abs(got - expected).max() > 1e-3


def test_without_memory_each_window_stands_alone():
  model = small(memory=0)
  assert model.init_carry(B) == ()
  batch = tokens(length=2 * T)
  got, carry = in_windows(VARIABLES, batch, [T], model)
  assert carry == ()
  alone, _ = run(VARIABLES, window(batch, T, 2 * T), model=small())
  assert_close(got[:, T:], alone)


def test_an_empty_memory_is_never_looked_at():
  garbage = lambda x: np.full(x.shape, 1e9, x.dtype)
  carry = small().init_carry(B)
  assert not carry.live.any()
  filled = carry._replace(inputs=tuple(map(garbage, carry.inputs)))
  expected, _ = run(VARIABLES, tokens())
  got, _ = run(VARIABLES, tokens(), filled)
  np.testing.assert_array_equal(got, expected)


def test_the_leading_axis_of_the_carry_is_that_of_the_rows():
  model = small(dtype='bfloat16')
  carry = model.init_carry(5)
  assert {x.shape[:2] for x in jax.tree.leaves(carry)} == {(5, MEMORY)}
  assert [x.dtype for x in carry.inputs] == LAYERS * [jnp.bfloat16]
  outputs, _ = jax.eval_shape(
      lambda c: model.apply(VARIABLES, tokens(rows=5), c, None, False), carry
  )
  assert outputs.features.dtype == outputs.kernel.dtype == jnp.bfloat16


def test_no_gradient_flows_into_the_memory():
  model, batch = small(layers=1), tokens(length=4, resets=0.0)
  carry = model.init_carry(B)
  carry = carry._replace(live=~carry.live)

  @fast.jit
  @jax.grad
  def gradient(inputs):
    memory = carry._replace(inputs=inputs)
    outputs, _ = model.apply(
        fast.random_variables(model, batch), batch, memory, None, False
    )
    return jnp.sum(jnp.sin(base.logits_of(outputs)))

  found = gradient(tuple(x + 1 for x in carry.inputs))
  assert not any(np.any(x) for x in found)


def test_dropout_acts_on_the_embedding_each_branch_and_the_features():
  masks = []

  def watch(next_call, args, kwargs, context):
    y = next_call(*args, **kwargs)
    if isinstance(context.module, nn.Dropout):
      masks.append(y == 0)
    return y

  model = small(dropout=0.5)

  @fast.jit
  def dropped(variables):
    carry, key = model.init_carry(B), jax.random.key(0)
    with nn.intercept_methods(watch):
      model.apply(variables, tokens(), carry, key, True)
    return tuple(masks)

  found = np.stack(dropped(VARIABLES))
  assert found.shape == (2 * LAYERS + 2, B, T, UNITS)
  # Each drops others, though one module draws for all.
  agreement = (found[:, None] == found[None]).mean((2, 3, 4))
  apart = agreement[~np.eye(len(found), dtype=bool)]
  assert apart.min() > 0.35 and apart.max() < 0.65


def test_it_starts_with_logits_of_unit_size():
  model = small(units=96, hidden=None, tied=True)

  @fast.jit
  def start(key):
    variables = model.init(key, tokens())
    return model.apply(variables, tokens(), model.init_carry(B), None, False)

  logits = base.logits_of(start(jax.random.key(0))[0])
  # An input's own logit is large where its embedding is the head, too.
  others = 1.0 - jax.nn.one_hot(tokens()['inputs'], VOCAB)
  assert 0.3 < np.sqrt(np.sum(others * logits**2) / np.sum(others)) < 2.0


def test_hidden_units_are_eight_thirds_rounded_up():
  for units, hidden in [(96, 256), (512, 1408), (768, 2048)]:
    model = transformer.language_model(7, layers=1, units=units, heads=2)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens()).params
    assert params['layer_0']['up']['kernel'].shape == (units, hidden)
