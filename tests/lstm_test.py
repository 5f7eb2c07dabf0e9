"""The LSTM against a plain scan, its own gradients, and what they cost.

See models_test.py for what it keeps to as a model. Shapes as in recurrence.py.
"""

import fast
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base, jaxprs
from codistill_jax.models import lstm, recurrence

VOCAB, LAYERS = 11, 2
T, B, E, D = 5, 3, 4, 8


def plain_layer(params, x_TBE, carry, resets_TB, dtype=jnp.float32):
  """The equations of models/lstm.py, differentiated by jax."""
  row = lambda vector, like: vector.reshape((1,) * (like.ndim - 1) + (-1,))

  def dot(x, kernel):
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)

  def norm(x, name):
    if 'x_norm_scale' not in params:
      return x
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    x = x * row(params[f'{name}_scale'], x)
    return x + row(params.get(f'{name}_shift', jnp.zeros(1)), x)

  def step(state, now):
    x_BE, resets_B = now
    c, h = (jnp.where(resets_B[:, None], 0.0, s) for s in state)
    inputs = norm(dot(x_BE, params['x_kernel']), 'x_norm')
    inputs = (inputs + row(params['bias'], inputs)).astype(dtype)
    gates = norm(dot(h, params['h_kernel']), 'h_norm')
    f, i, o, g = jnp.split(gates + inputs.astype(jnp.float32), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(norm(c, 'c_norm'))
    return (c, h), h.astype(dtype)

  carry, h_TBD = jax.lax.scan(step, carry, (x_TBE, resets_TB))
  return h_TBD, carry


# --- The language model -------------------------------------------------------


def small(**kwargs):
  return lstm.language_model(
      VOCAB, layers=LAYERS, units=D, embedding=E, **kwargs
  )


def tokens():
  rng = np.random.default_rng(0)
  return {
      'inputs': rng.integers(VOCAB, size=(B, T)).astype(np.int32),
      'resets': rng.random((B, T)) < 0.3,
  }


MODEL = small()
VARIABLES = fast.random_variables(MODEL, tokens())
CARRY = jax.tree.map(
    lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype('f4'),
    MODEL.init_carry(B),
)


@pytest.mark.parametrize('layer_norm', [True, False])
def test_it_is_an_embedding_plain_layers_and_a_head(layer_norm):
  model, batch = small(layer_norm=layer_norm), tokens()
  variables = fast.random_variables(model, batch)
  p, last = variables.params, []
  x_TBD = p['Embed_0']['embedding'][batch['inputs'].T]
  for i in range(LAYERS):
    x_TBD, state = plain_layer(
        p[f'lstm_{i}'], x_TBD, CARRY[i], batch['resets'].T
    )
    last.append(state)
  logits = jnp.swapaxes(x_TBD, 0, 1) @ p['head_kernel']
  outputs, updates = model.apply(variables, batch, CARRY, None, False)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      (base.logits_of(outputs) - p['head_bias'][None, None], updates.carry),
      (logits, tuple(last)),
  )


def test_forget_gates_start_open():
  params = jax.jit(MODEL.init)(jax.random.key(0), tokens()).params
  for i in range(LAYERS):
    bias = params[f'lstm_{i}']['bias']
    np.testing.assert_array_equal(bias, np.repeat([1, 0], [D, 3 * D]))


def test_the_state_stays_float32():
  model = small(dtype='bfloat16')
  outputs, updates = jax.eval_shape(
      lambda c: model.apply(VARIABLES, tokens(), c, None, False), CARRY
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

  with nn.intercept_methods(watch):
    small(dropout=0.5).apply(
        VARIABLES, tokens(), CARRY, jax.random.key(0), True
    )
  assert dropped == [(B, T, E)] + [(T, B, D)] * LAYERS


# --- A layer and its gradient -------------------------------------------------


def problem(layer_norm, dtype='float32', units=D):
  """A layer, its parameters, what it is given, and weights of its outputs."""
  layer = lstm.LSTM(units, layer_norm, jnp.dtype(dtype))
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x = normal(T, B, E).astype(dtype)
  carry = normal(B, units), normal(B, units)
  resets = np.zeros((T, B), bool)
  resets[[0, 2, 3], [1, 0, 1]] = True
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, carry, resets)
  params = jax.tree.map(lambda s: 0.5 * normal(*s.shape), shapes['params'])
  params = {k: v + ('scale' in k) for k, v in params.items()}
  weights = normal(T, B, units), (normal(B, units), normal(B, units))
  return layer, params, x, carry, resets, weights


def both(layer_norm, dtype='float32', with_resets=True, units=D):
  """Value and gradients of the layer, and of the plain scan."""
  layer, *point, resets, weights = problem(layer_norm, dtype, units)
  none = np.zeros_like(resets)

  def run(apply):
    def loss(*point):
      found = jax.tree.leaves(apply(*point))
      return sum(
          jnp.sum(a.astype(jnp.float32) * w)
          for a, w in zip(found, jax.tree.leaves(weights))
      )

    return fast.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*point)

  ours = lambda p, x, c: layer.apply(
      {'params': p}, x, c, resets if with_resets else None
  )
  plain = lambda p, x, c: plain_layer(
      p, x, c, resets if with_resets else none, layer.dtype
  )
  return run(ours), run(plain)


def assert_close(ours, plain, tolerance=2e-5):
  """Each array within that part of its largest value."""
  assert jax.tree.structure(ours) == jax.tree.structure(plain)
  for (path, a), b in zip(
      jax.tree.leaves_with_path(ours), jax.tree.leaves(plain)
  ):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(b).max() > 1e-3, path
    np.testing.assert_allclose(
        a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=str(path)
    )


@pytest.mark.parametrize('with_resets', [True, False])
@pytest.mark.parametrize('layer_norm', [True, False])
def test_value_and_gradients_are_those_of_a_plain_scan(layer_norm, with_resets):
  assert_close(*both(layer_norm, with_resets=with_resets))


@pytest.mark.parametrize('layer_norm', [True, False])
def test_in_bfloat16_errors_are_those_of_a_plain_scan(layer_norm):
  def errors(found):
    """Of each array, as a part of its size; in root mean squares."""
    size = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float32))))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact))
    return np.array([size(a - b) / size(b) for a, b in pairs])

  # Normalised cells of a few units would blow up any rounding.
  (_, ours), (_, plain) = both(layer_norm, 'bfloat16', units=64)
  exact = both(layer_norm, units=64)[1][1]
  assert errors(ours).max() < 0.05
  assert (errors(ours) / errors(plain)).max() < 2.5


@pytest.mark.parametrize(
    'rows, units, by_columns', [(3, 768, True), (33, 768, False), (3, 8, False)]
)
def test_few_rows_times_a_large_kernel_are_multiplied_by_columns(
    rows, units, by_columns
):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, kernel = normal(rows, units), normal(units, 4 * units)
  args = x, kernel, np.ascontiguousarray(kernel.T)
  np.testing.assert_allclose(
      recurrence.times(*args), x @ kernel, rtol=1e-3, atol=1e-3
  )
  traced = jaxprs.equations(jax.make_jaxpr(recurrence.times)(*args).jaxpr)
  barriers = [e for e in traced if e.primitive.name == 'optimization_barrier']
  assert bool(barriers) == by_columns


@pytest.mark.parametrize('differentiated', [False, True])
def test_nothing_is_stacked_that_is_not_needed(differentiated):
  """And no scan carries the gradient of the kernel."""
  layer, params, x, carry, resets, weights = problem(layer_norm=True)
  apply = lambda p: layer.apply({'params': p}, x, carry, resets)
  loss = lambda p: jnp.sum(apply(p)[0] * weights[0])
  traced = jax.make_jaxpr(jax.grad(loss) if differentiated else apply)(params)
  found = [
      e for e in jaxprs.equations(traced.jaxpr) if e.primitive.name == 'scan'
  ]
  assert len(found) == (2 if differentiated else 1)
  for scan in found:
    shapes = [v.aval.shape for v in scan.outvars]
    assert shapes[:2] == [(B, D), (B, D)]  # What the scan carries.
    # Gates, states and one scale for each row: not the kernel, T times.
    assert set(shapes[2:]) <= {(T, B, 4 * D), (T, B, D), (T, B, 1)}
    if not differentiated:
      assert shapes[2:] == [(T, B, D)]


def test_a_row_of_zeros_has_a_finite_gradient():
  loss = lambda x: jnp.sum(recurrence.unit_size(x) * jnp.arange(4.0)[None])
  gradient = jax.grad(loss)(jnp.zeros((2, 4)))
  assert np.isfinite(gradient).all()


# --- Products whose gradients are laid out by hand ----------------------------

N, F = 6, 10


def arrays(x_dtype='float32', kernel_dtype='float32'):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, kernel = normal(N, E).astype(x_dtype), normal(E, F).astype(kernel_dtype)
  return x, kernel, normal(N, F)


def gradients(product, x, kernel, weights):
  loss = lambda x, kernel: jnp.sum(product(x, kernel) * weights)
  return jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)


def products(*args):
  """The products of `dot` and of its gradient."""
  traced = jax.make_jaxpr(lambda *args: gradients(recurrence.dot, *args))
  found = jaxprs.equations(traced(*args).jaxpr)
  return [e for e in found if e.primitive.name == 'dot_general']


def test_a_product_has_the_value_and_gradients_of_jax():
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      gradients(recurrence.dot, *arrays()),
      gradients(jnp.dot, *arrays()),
  )


@pytest.mark.parametrize('x_dtype', ['float32', 'bfloat16'])
def test_gradients_are_multiplied_in_the_dtype_of_the_kernel(x_dtype):
  args = arrays(x_dtype, 'bfloat16')
  found = products(*args)
  assert len(found) == 3
  assert {v.aval.dtype.name for e in found for v in e.invars} == {'bfloat16'}
  assert {e.outvars[0].aval.dtype.name for e in found} == {'float32'}
  _, (d_x, d_kernel) = gradients(recurrence.dot, *args)
  assert (d_x.dtype, d_kernel.dtype) == (x_dtype, jnp.bfloat16)


def test_the_larger_side_is_never_transposed():
  # Over axis 0 of x: as the left side, it is x that XLA transposes.
  *_, last = products(*arrays())
  assert [v.aval.shape for v in last.invars] == [(N, E), (N, F)]
  assert last.params['dimension_numbers'][0] == ((0,), (0,))


@pytest.mark.parametrize(
    'dtype, tolerance', [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)]
)
def test_a_dense_layer_is_that_of_flax(dtype, tolerance):
  x = arrays()[0].reshape(2, 3, E)

  def run(product):
    layer = nn.Dense(F, use_bias=False, dtype=dtype, dot_general=product)
    params = layer.init(jax.random.key(0), x)
    apply = lambda p, x: layer.apply(p, x).astype(jnp.float32)
    loss = lambda p, x: jnp.sum(jnp.sin(apply(p, x)))
    assert layer.apply(params, x).dtype == dtype
    return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
      run(recurrence.dense),
      run(None),
  )
