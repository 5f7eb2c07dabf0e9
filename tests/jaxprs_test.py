"""Counted FLOPs against XLA's count, and against sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from codistill_jax import jaxprs


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def xla_count(function, *args):
  """XLA's own count, which is right where there is no loop."""
  return jax.jit(function).lower(*args).cost_analysis()['flops']


def test_products_equal_xlas_count():
  product = lambda a, b: jnp.einsum('bij,bjk->bik', a, b)
  args = shape(3, 4, 5), shape(3, 5, 6)
  found = jaxprs.flops(product, *args)
  assert found == jaxprs.Flops({'float32': 2.0 * 3 * 4 * 5 * 6})
  assert found.total == xla_count(product, *args)


@pytest.mark.parametrize(
    'kernel, settings',
    [
        ((3, 3, 4, 8), {}),
        ((3, 3, 4, 8), {'padding': 'SAME'}),
        ((3, 2, 4, 8), {'padding': 'SAME', 'window_strides': (2, 3)}),
        ((3, 3, 2, 8), {'feature_group_count': 2}),
        ((3, 3, 4, 8), {'rhs_dilation': (2, 1)}),
        ((3, 3, 4, 8), {'lhs_dilation': (2, 3), 'padding': [(2, 1), (0, 3)]}),
        ((3, 3, 4, 8), {'batch_group_count': 2}),
    ],
)
def test_convolutions_equal_xlas_count(kernel, settings):
  settings = {'window_strides': (1, 1), 'padding': 'VALID'} | settings
  convolve = functools.partial(
      jax.lax.conv_general_dilated,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      **settings,
  )
  args = shape(2, 9, 8, 4), shape(*kernel)
  assert jaxprs.flops(convolve, *args).total == xla_count(convolve, *args) > 0


def test_the_gradient_of_a_strided_convolution_takes_twice_as_much():
  convolve = lambda x, k: jax.lax.conv_general_dilated(
      x, k, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  loss = lambda x, k: jnp.sum(jnp.square(convolve(x, k)))
  args = shape(2, 9, 8, 4), shape(3, 3, 4, 8)
  forward = jaxprs.flops(convolve, *args).total
  step = jaxprs.flops(jax.grad(loss, argnums=(0, 1)), *args).total
  assert step == 3 * forward


def power(x, length):
  step = lambda c, _: (c @ x, None)
  return jax.lax.scan(step, x, None, length=length)[0]


def test_a_scan_counts_as_often_as_it_runs_and_xla_counts_it_once():
  once = 2 * 8**3
  run = lambda x: power(x, 10)
  assert jaxprs.flops(run, shape(8, 8)).total == 10 * once
  assert xla_count(run, shape(8, 8)) == pytest.approx(once, abs=10)
  nested = lambda x: jax.lax.map(lambda a: power(a, 5), jnp.stack([x] * 3))
  assert jaxprs.flops(nested, shape(8, 8)).total == 15 * once
  gradient = jax.grad(lambda x: jnp.sum(run(x)))
  assert jaxprs.flops(gradient, shape(8, 8)).total == 30 * once


def test_a_condition_counts_as_its_dearest_branch():
  branches = lambda x: jax.lax.cond(
      x[0, 0] > 0, lambda x: x, lambda x: power(x, 3), x
  )
  assert jaxprs.flops(branches, shape(8, 8)).total == 3 * 2 * 8**3


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  body = lambda c: (c[0] + 1, c[1] @ c[1])
  loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 7, body, (0, x))[1]
  assert jaxprs.flops(loop, shape(8, 8)) == jaxprs.Flops({'float32': 1024.0}, 1)
  twice = lambda x: loop(x) + loop(x)
  assert jaxprs.flops(twice, shape(8, 8)).unknown_loops == 2


def test_functions_within_functions_are_entered():
  @jax.custom_vjp
  def own(x):
    return x @ x

  # A gradient dearer than that of jax, to be told apart.
  own.defvjp(lambda x: (own(x), x), lambda x, d: (power(d, 5) @ x,))
  once = 2 * 8**3
  inner = jax.jit(jax.checkpoint(lambda x: jnp.sum(own(x))))
  assert jaxprs.flops(inner, shape(8, 8)).total == once
  # The forward pass is not needed again: its residual is x.
  assert jaxprs.flops(jax.grad(inner), shape(8, 8)).total >= 6 * once


def test_the_work_of_all_devices_counts():
  devices = jax.devices()[:4]
  once = 2 * 8**3
  mapped = jax.pmap(lambda x: x @ x, devices=devices)
  assert jaxprs.flops(mapped, shape(4, 8, 8)).total == 4 * once
  sharded = jax.shard_map(
      lambda x: x @ x.T,
      mesh=Mesh(np.array(devices), ('data',)),
      in_specs=PartitionSpec('data'),
      out_specs=PartitionSpec('data'),
  )
  assert jaxprs.flops(sharded, shape(32, 8)).total == 4 * once


def test_flops_are_told_apart_by_dtype():
  def both(a, b):
    return jnp.sum(a @ a) + jnp.sum(b @ b) + jnp.sum(jnp.dot(a, b))

  args = shape(8, 8, dtype=jnp.bfloat16), shape(8, 8)
  found = jaxprs.flops(both, *args)
  assert found.by_dtype == {'bfloat16': 1024.0, 'float32': 2048.0}
  assert found.total == 3072


@pytest.mark.parametrize(
    'kind, bfloat16',
    [
        ('NVIDIA H100 80GB HBM3', 989.5),
        ('NVIDIA H100 PCIe', 756.0),
        ('NVIDIA A100-SXM4-80GB', 312.0),
        ('NVIDIA L4', 121.0),
        ('TPU v5 lite', 197.0),
        ('TPU v5', 459.0),
        ('NVIDIA L40', None),
        ('cpu', None),
    ],
)
def test_the_least_time_on_a_device(kind, bfloat16):
  found = jaxprs.least_seconds({'bfloat16': 1e12}, kind)
  if bfloat16 is None:
    assert np.isnan(found)
  else:
    assert found == pytest.approx(1 / bfloat16)


def test_the_least_time_adds_up_over_dtypes_and_needs_all_of_them():
  both = jaxprs.least_seconds(
      {'bfloat16': 1e12, 'float32': 1e12}, 'NVIDIA H200'
  )
  assert both == pytest.approx(1 / 989.5 + 1 / 494.7)
  tesla = jaxprs.least_seconds(
      {'float32': 1e12, 'bfloat16': 1.0}, 'Tesla V100-SXM2-16GB'
  )
  assert np.isnan(tesla)
