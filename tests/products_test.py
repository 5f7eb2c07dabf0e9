"""Products whose gradients are laid out by hand, against those of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codistill_jax import jaxprs
from codistill_jax.models import recurrence

N, E, F = 6, 4, 8


def arrays(dtype='float32'):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return normal(N, E), normal(E, F), normal(N, F)


def gradients(product, x, kernel, weights):
  loss = lambda x, kernel: jnp.sum(product(x, kernel) * weights)
  return jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)


def test_value_and_gradients_are_those_of_jax():
  found = gradients(recurrence.dot, *arrays())
  expected = gradients(jnp.dot, *arrays())
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      found,
      expected,
  )


@pytest.mark.parametrize('x_dtype', ['float32', 'bfloat16'])
def test_gradients_are_multiplied_in_the_dtype_of_the_kernel(x_dtype):
  x, kernel, weights = arrays()
  x, kernel = x.astype(x_dtype), kernel.astype(jnp.bfloat16)
  traced = jax.make_jaxpr(lambda *args: gradients(recurrence.dot, *args))
  found = dots(traced(x, kernel, weights).jaxpr)
  assert len(found) == 3
  assert {v.aval.dtype.name for e in found for v in e.invars} == {'bfloat16'}
  assert {e.outvars[0].aval.dtype.name for e in found} == {'float32'}
  _, (d_x, d_kernel) = gradients(recurrence.dot, x, kernel, weights)
  assert (d_x.dtype, d_kernel.dtype) == (x_dtype, jnp.bfloat16)


def dots(jaxpr):
  """The products of a traced function, at any depth."""
  found = jaxprs.equations(jaxpr)
  return [e for e in found if e.primitive.name == 'dot_general']


def test_the_larger_side_is_never_transposed():
  # Over axis 0 of x: as the left side, it is x that XLA transposes.
  traced = jax.make_jaxpr(lambda *args: gradients(recurrence.dot, *args))
  *_, last = dots(traced(*arrays()).jaxpr)
  assert [v.aval.shape for v in last.invars] == [(N, E), (N, F)]
  assert last.params['dimension_numbers'][0] == ((0,), (0,))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_dense_layer_is_that_of_flax(dtype):
  x = arrays()[0].reshape(2, 3, E)
  run = {}
  for name, product in [('ours', recurrence.dense), ('flax', None)]:
    layer = nn.Dense(F, use_bias=False, dtype=dtype, dot_general=product)
    params = layer.init(jax.random.key(0), x)
    out = layer.apply(params, x)
    loss = lambda p, x, layer=layer: jnp.sum(
        jnp.sin(layer.apply(p, x).astype(jnp.float32))
    )
    run[name] = out, jax.grad(loss, argnums=(0, 1))(params, x)
  assert run['ours'][0].dtype == run['flax'][0].dtype == dtype
  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          np.asarray(a, np.float32),
          np.asarray(b, np.float32),
          rtol=tolerance,
          atol=tolerance,
      ),
      run['ours'],
      run['flax'],
  )
