"""The transformer against a slow one; what a token sees, and what it must not.

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
CUTS = [[6], [4, 8], [4, *range(5, 12)]]  # Where windows of 12 tokens begin.


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


def random_variables(model, seed=0):
  """In which no scale is 1; without the cost of compiling `init`."""
  rng = np.random.default_rng(seed)
  like = jax.eval_shape(model.init, jax.random.key(0), tokens())

  def fill(x):
    noise = rng.normal(size=x.shape)
    noise = noise / np.sqrt(len(x)) if x.ndim > 1 else 1.0 + 0.3 * noise
    return noise.astype(x.dtype)

  return jax.tree.map(fill, like)


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


VARIABLES = random_variables(small())
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
  variables, batch = random_variables(model), tokens(length=12)
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


@pytest.mark.parametrize('cuts', CUTS)
def test_windows_with_the_carry_between_equal_one_long_window(cuts):
  batch = tokens(length=2 * T, resets=0.1)
  whole, last = run(VARIABLES, batch)
  parts, carry = in_windows(VARIABLES, batch, cuts)
  assert_close(whole, parts)
  np.testing.assert_array_equal(last.live, carry.live)
  for a, b in zip(last.inputs, carry.inputs):
    assert_close(*(np.where(last.live[..., None], x, 0) for x in (a, b)))


def test_no_token_sees_a_later_one():
  batch = tokens(resets=0.0)
  before, _ = run(VARIABLES, batch)
  inputs = batch['inputs'].copy()
  inputs[:, 3] = (inputs[:, 3] + 1) % VOCAB
  after, _ = run(VARIABLES, batch | {'inputs': inputs})
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  # The later ones do see it.
  assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-5).all()


@pytest.mark.parametrize('cuts', [[], *CUTS])
def test_nothing_passes_a_document_boundary(cuts):
  """In a window, through the memory, and through the memory of a memory."""
  batch = tokens(length=2 * T, resets=0.0)
  batch['resets'][0, T] = True
  other = batch['inputs'].copy()
  other[:, :T] = (other[:, :T] + 1) % VOCAB
  before, a = in_windows(VARIABLES, batch, cuts)
  after, b = in_windows(VARIABLES, batch | {'inputs': other}, cuts)
  np.testing.assert_array_equal(before[0, T:], after[0, T:])
  # The rows without a boundary do look back over it.
  assert (np.abs(before[1:, T:] - after[1:, T:]).max(-1) > 1e-5).all()
  np.testing.assert_array_equal(a.live[0], np.arange(MEMORY) >= MEMORY - T)
  assert a.live[1:].all() and (a.live == b.live).all()
  fresh, _ = run(VARIABLES, window(batch, T, 2 * T))
  assert_close(before[0, T:], fresh[0])


def test_a_reset_touches_its_own_row_only():
  batch = tokens(resets=0.0)
  _, carry = run(VARIABLES, tokens(seed=1))
  plain, _ = run(VARIABLES, batch, carry)
  resets = batch['resets'].copy()
  resets[1, 2] = True
  reset, _ = run(VARIABLES, batch | {'resets': resets}, carry)
  np.testing.assert_array_equal(plain[::2], reset[::2])
  np.testing.assert_array_equal(plain[1, :2], reset[1, :2])
  assert (np.abs(plain[1, 2:] - reset[1, 2:]).max(-1) > 1e-5).all()


def test_an_empty_memory_is_never_looked_at():
  garbage = lambda x: np.full(x.shape, 1e9, x.dtype)
  carry = small().init_carry(B)
  assert not carry.live.any()
  filled = carry._replace(inputs=tuple(map(garbage, carry.inputs)))
  expected, _ = run(VARIABLES, tokens())
  got, _ = run(VARIABLES, tokens(), filled)
  np.testing.assert_array_equal(got, expected)


def test_a_batch_without_resets_has_none():
  batch = tokens(resets=0.0)
  without = {'inputs': batch['inputs']}
  _, carry = run(VARIABLES, tokens(seed=1))
  expected, _ = run(VARIABLES, batch, carry)
  got, _ = run(VARIABLES, without, carry)
  np.testing.assert_array_equal(got, expected)


def test_rows_may_come_in_any_order():
  order = np.array([2, 0, 1])
  permuted = lambda tree: jax.tree.map(lambda x: np.asarray(x)[order], tree)
  _, carry = run(VARIABLES, tokens(seed=1))
  logits, last = run(VARIABLES, tokens(), carry)
  found, found_last = run(VARIABLES, permuted(tokens()), permuted(carry))
  jax.tree.map(assert_close, found, permuted(logits))
  jax.tree.map(assert_close, found_last, permuted(last))


def test_the_leading_axis_of_the_carry_is_that_of_the_rows():
  carry = small(dtype='bfloat16').init_carry(5)
  assert {x.shape[:2] for x in jax.tree.leaves(carry)} == {(5, MEMORY)}
  assert [x.dtype for x in carry.inputs] == LAYERS * [jnp.bfloat16]


def test_teachers_read_the_same_rows_with_memories_of_their_own():
  peers = [random_variables(small(), seed) for seed in (1, 2)]
  stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
  carries = [run(v, tokens(1))[1] for v in peers]
  together = fast.jit(jax.vmap(evaluate(small()), in_axes=(0, None, 0)))
  found = together(stack(peers), tokens(), stack(carries))
  each = [run(v, tokens(), c) for v, c in zip(peers, carries)]
  jax.tree.map(assert_close, found, stack(each))
  assert np.abs(each[0][0] - each[1][0]).max() > 0.1


@pytest.mark.parametrize(
    'kwargs', [{}, {'tied': True, 'dtype': 'bfloat16'}], ids=str
)
def test_gradients_are_finite_reach_every_parameter_and_no_memory(kwargs):
  model = small(layers=1, **kwargs)
  batch = tokens(length=4)
  batch['resets'][0] = False
  carry = model.init_carry(B)
  carry = carry._replace(
      inputs=tuple(x + jnp.ones((), x.dtype) for x in carry.inputs),
      live=~carry.live,
  )

  def loss(params, inputs):
    outputs, updates = model.apply(
        base.Variables(params),
        batch,
        carry._replace(inputs=inputs),
        None,
        False,
    )
    log_probs = jax.nn.log_softmax(base.logits_of(outputs))
    return -jnp.sum(log_probs[..., 0]), updates

  gradient = fast.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  variables = random_variables(model)
  (of_params, of_memory), _ = gradient(variables.params, carry.inputs)
  for path, x in jax.tree.leaves_with_path(of_params):
    assert np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path
  assert not any(np.any(x) for x in of_memory)


def test_bfloat16_stays_close_and_keeps_parameters_in_float32():
  model = small(dtype='bfloat16')
  variables = random_variables(model)
  run_rough = lambda v, b, c: model.apply(v, b, c, None, False)
  outputs, _ = jax.eval_shape(
      run_rough, variables, tokens(), model.init_carry(B)
  )
  assert outputs.features.dtype == outputs.kernel.dtype == jnp.bfloat16
  leaves = jax.tree.leaves((variables, outputs.bias))
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}
  batch = tokens(length=2 * T)
  full, _ = in_windows(variables, batch, [T])
  rough, _ = in_windows(variables, batch, [T], model)
  np.testing.assert_allclose(rough, full, atol=0.06)
  assert np.abs(rough - full).max() > 1e-5


def test_dropout_acts_in_training_only():
  model = small(dropout=0.5, layers=1)
  variables, carry = random_variables(model), model.init_carry(B)

  @functools.partial(fast.jit, static_argnums=1)
  def logits(seed, train):
    key = jax.random.key(seed)
    outputs, _ = model.apply(variables, tokens(), carry, key, train)
    return base.logits_of(outputs)

  plain, _ = run(variables, tokens(), model=small(layers=1))
  assert_close(logits(0, False), plain)
  np.testing.assert_array_equal(logits(0, True), logits(0, True))
  assert np.abs(logits(0, True) - logits(1, True)).max() > 0.1


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


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'units': 0}, 'units must be a whole number of at least 1'),
        ({'units': 12.0}, 'got 12.0'),
        ({'units': 9}, 'units=9 is no even multiple of heads=3'),
        ({'hidden': 0}, 'hidden'),
        ({'memory': -1}, 'memory must be a whole number of at least 0'),
        ({'dropout': 1.0}, 'dropout'),
        ({'dtype': 'float16'}, "got 'float16'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    small(**kwargs)


def test_a_carry_of_another_number_of_rows_is_refused():
  with pytest.raises(ValueError, match='carry has 2 rows, the inputs have 3'):
    small().apply(VARIABLES, tokens(), small().init_carry(2), None, False)
