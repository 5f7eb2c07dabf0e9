"""The recurrence's own gradient against that of a plain scan."""

import fast
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import jaxprs
from codistill_jax.models import lstm, recurrence

T, B, E, D = 5, 3, 4, 8


def plain_layer(params, x_TBE, carry, resets_TB, dtype):
  """The equations of models/lstm.py, differentiated by jax."""
  layer_norm = 'x_norm_scale' in params
  row = lambda vector, like: vector.reshape((1,) * (like.ndim - 1) + (-1,))

  def dot(x, kernel):
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)

  def norm(x, name):
    if not layer_norm:
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


def value_and_gradients(apply, weights, params, x, carry):
  def loss(params, x, carry):
    found = apply(params, x, carry)
    return sum(
        jnp.sum(a.astype(jnp.float32) * w)
        for a, w in zip(jax.tree.leaves(found), jax.tree.leaves(weights))
    )

  return fast.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, x, carry)


def both(layer_norm, dtype='float32', with_resets=True, units=D):
  """What the layer gives and what the plain scan gives, at the same point."""
  layer, params, x, carry, resets, weights = problem(layer_norm, dtype, units)
  none = np.zeros_like(resets)
  ours = lambda p, x, c: layer.apply(
      {'params': p}, x, c, resets if with_resets else None
  )
  plain = lambda p, x, c: plain_layer(
      p, x, c, resets if with_resets else none, layer.dtype
  )
  run = lambda f: value_and_gradients(f, weights, params, x, carry)
  return run(ours), run(plain)


@pytest.mark.parametrize('with_resets', [True, False])
@pytest.mark.parametrize('layer_norm', [True, False])
def test_value_and_gradients_are_those_of_a_plain_scan(layer_norm, with_resets):
  ours, plain = both(layer_norm, with_resets=with_resets)
  assert_close(ours, plain, 2e-5)


@pytest.mark.parametrize('layer_norm', [True, False])
def test_in_bfloat16_errors_are_those_of_a_plain_scan(layer_norm):
  # Normalised cells of a few units would blow up any rounding.
  (_, ours), (_, plain) = both(layer_norm, 'bfloat16', units=64)
  exact = both(layer_norm, units=64)[1][1]
  errors, plain_errors = error(ours, exact), error(plain, exact)
  assert errors.max() < 0.05
  assert (errors / plain_errors).max() < 2.5


def error(found, exact):
  """Of each array, as a part of its size; in root mean squares."""
  size = lambda x: np.sqrt(np.mean(np.square(x)))
  arrays = [
      (np.asarray(a, np.float32), np.asarray(b, np.float32))
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact))
  ]
  return np.array([size(a - b) / size(b) for a, b in arrays])


def test_a_product_by_columns_is_the_same(monkeypatch):
  by_rows, plain = both(layer_norm=True)
  used = []

  def watched(*args, by_columns=recurrence._times_by_columns):
    used.append(len(args[0]))
    return by_columns(*args)

  monkeypatch.setattr(recurrence, '_LARGE_KERNEL', 1)
  monkeypatch.setattr(recurrence, '_times_by_columns', watched)
  by_columns, _ = both(layer_norm=True)
  assert used and set(used) == {B}
  assert_close(by_columns, by_rows, 2e-5)
  assert_close(by_columns, plain, 2e-5)


def assert_close(ours, plain, tolerance):
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


def scans(jaxpr):
  """The scans of a traced function, at any depth."""
  return [e for e in jaxprs.equations(jaxpr) if e.primitive.name == 'scan']


def stacked_and_carried(scan):
  """Shapes of what a scan stacks, and of what it carries."""
  shapes = [v.aval.shape for v in scan.outvars]
  return shapes[scan.params['num_carry'] :], shapes[: scan.params['num_carry']]


def trace(differentiated):
  layer, params, x, carry, resets, weights = problem(layer_norm=True)
  apply = lambda p: layer.apply({'params': p}, x, carry, resets)
  loss = lambda p: jnp.sum(apply(p)[0] * weights[0])
  function = jax.grad(loss) if differentiated else apply
  return list(scans(jax.make_jaxpr(function)(params).jaxpr))


def test_nothing_is_stacked_for_a_gradient_that_is_not_asked_for():
  (scan,) = trace(differentiated=False)
  assert stacked_and_carried(scan)[0] == [(T, B, D)]


def test_no_scan_carries_the_gradient_of_the_kernel():
  found = trace(differentiated=True)
  assert len(found) == 2  # Forwards and back.
  for scan in found:
    stacked, carried = stacked_and_carried(scan)
    assert carried == [(B, D), (B, D)]
    # Gates, states and one scale for each row: not the kernel, T times.
    assert set(stacked) <= {(T, B, 4 * D), (T, B, D), (T, B, 1)}


def test_a_row_of_zeros_has_a_finite_gradient():
  loss = lambda x: jnp.sum(recurrence.unit_size(x) * jnp.arange(4.0)[None])
  gradient = jax.grad(loss)(jnp.zeros((2, 4)))
  assert np.isfinite(gradient).all()
