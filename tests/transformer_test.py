"""The transformer against a slow one; what a token sees, and what it must not.

Shapes as in transformer.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import SGD

from codistill_jax import base
from codistill_jax import step as step_lib
from codistill_jax.models import transformer

VOCAB, LAYERS, UNITS, HEADS, HIDDEN, MEMORY = 11, 2, 12, 3, 10, 8
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


def perturbed(model, seed=0):
  """Variables in which no scale is 1."""
  variables = jax.jit(model.init)(jax.random.key(seed), tokens())
  rng = np.random.default_rng(seed)
  noise = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(noise, variables)


@functools.cache
def compiled(model):
  def apply(variables, batch, carry):
    outputs, updates = model.apply(variables, batch, carry, None, False)
    return base.logits_of(outputs), updates.carry

  return jax.jit(apply)


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


VARIABLES = perturbed(small())
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
  variables, batch = perturbed(model), tokens(length=12)
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


@pytest.mark.parametrize('cuts', [[T], [2, 5, 9], list(range(1, 9))])
def test_windows_with_the_carry_between_equal_one_long_window(cuts):
  batch = tokens(length=cuts[-1] + 3, resets=0.1)
  model = small(memory=16)
  whole, last = run(VARIABLES, batch, model=model)
  parts, carry = in_windows(VARIABLES, batch, cuts, model)
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


@pytest.mark.parametrize('cuts', [[], [4], [7], [5, 6]])
def test_nothing_passes_a_document_boundary(cuts):
  """In a window, through the memory, and through the memory of a memory."""
  batch = tokens(length=10, resets=0.0)
  batch['resets'][0, 5] = True
  other = batch['inputs'].copy()
  other[:, :5] = (other[:, :5] + 1) % VOCAB
  before, a = in_windows(VARIABLES, batch, cuts)
  after, b = in_windows(VARIABLES, batch | {'inputs': other}, cuts)
  np.testing.assert_array_equal(before[0, 5:], after[0, 5:])
  # The rows without a boundary do look back over it.
  assert (np.abs(before[1:, 5:] - after[1:, 5:]).max(-1) > 1e-5).all()
  ages = MEMORY - 1 - np.arange(MEMORY)  # Of a slot; the last token's is 0.
  np.testing.assert_array_equal(a.live[0], ages < 5)
  assert a.live[1:].all() and (a.live == b.live).all()
  fresh, _ = run(VARIABLES, window(batch, 5, 10))
  assert_close(before[0, 5:], fresh[0])


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
  model, peers = small(), [perturbed(small(), seed) for seed in (1, 2)]
  teachers = base.Teachers(
      jax.tree.map(lambda *x: np.stack(x), *peers), np.ones(2, np.float32)
  )
  train_step = jax.jit(step_lib.make_train_step(model, SGD))
  state = step_lib.init_state(
      model, SGD, jax.random.PRNGKey(0), tokens(), num_peers=2
  )
  carries = [None, None]
  for seed in range(3):
    batch = tokens(seed)
    state, metrics = train_step(state, batch, teachers, 1.0)
    assert np.isfinite(metrics['loss/total'])
    carries = [run(v, batch, c)[1] for v, c in zip(peers, carries)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *carries)
  jax.tree.map(assert_close, state.teacher_carry, stacked)


def loss_of(model, batch, carry):
  """A loss of parameters, through one window."""

  def loss(params, carry=carry):
    outputs, updates = model.apply(
        base.Variables(params), batch, carry, None, False
    )
    log_probs = jax.nn.log_softmax(base.logits_of(outputs))
    return -jnp.sum(log_probs[..., 0]), updates.carry

  return loss


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tied', [False, True])
def test_gradients_are_finite_and_reach_every_parameter(dtype, tied):
  model = small(dtype=dtype, tied=tied)
  loss = loss_of(model, tokens(), model.init_carry(B))
  grad, _ = jax.jit(jax.grad(loss, has_aux=True))(perturbed(model).params)
  for path, x in jax.tree.leaves_with_path(grad):
    assert np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path


def test_no_gradient_flows_into_the_memory():
  model = small()
  first, second = tokens(0, resets=0.0), tokens(1, resets=0.0)

  @jax.jit
  def through_both(params):
    _, carry = loss_of(model, first, model.init_carry(B))(params)
    return (
        jax.grad(
            lambda p: loss_of(model, second, None)(
                p, loss_of(model, first, model.init_carry(B))(p)[1]
            )[0]
        )(params),
        carry,
    )

  grad, carry = through_both(VARIABLES.params)
  assert carry.live[:, -T:].all()
  alone = loss_of(model, second, carry)
  jax.tree.map(
      assert_close, grad, jax.grad(lambda p: alone(p)[0])(VARIABLES.params)
  )


def test_bfloat16_stays_close_and_keeps_parameters_in_float32():
  model = small(dtype='bfloat16')
  variables = jax.jit(model.init)(jax.random.key(0), tokens())
  outputs, _ = model.apply(
      variables, tokens(), model.init_carry(B), None, False
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
  model = small(dropout=0.5)
  batch, carry = tokens(), model.init_carry(B)

  def logits(seed, train):
    key = jax.random.key(seed) if train else None
    outputs, _ = model.apply(VARIABLES, batch, carry, key, train)
    return base.logits_of(outputs)

  plain, _ = run(VARIABLES, batch)
  assert_close(logits(0, False), plain)
  np.testing.assert_array_equal(logits(0, True), logits(0, True))
  assert np.abs(logits(0, True) - logits(1, True)).max() > 0.1


def test_at_the_start_it_knows_next_to_nothing():
  """Logits of about unit size, tied or not, however deep."""
  for kwargs in ({}, {'tied': True}, {'layers': 6}):
    model = small(units=96, hidden=None, memory=0, **kwargs)
    variables = jax.jit(model.init)(jax.random.key(0), tokens())
    batch = tokens(rows=8)
    # Of tied logits that of the input itself is large: its own embedding.
    logits, _ = run(variables, batch, model=model)
    assert 0.3 < np.std(logits) < 4.0, kwargs


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
