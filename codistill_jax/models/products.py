"""Products of rows and a kernel whose gradients are laid out to be fast.

Shape suffixes: N rows, E size of an input, F size of an output.
"""

from typing import Any

import jax

from codistill_jax.base import Array, contract


@jax.custom_vjp
def dot(x_NE: Array, kernel_EF: Array) -> jax.Array:
  """Product in the dtype of the kernel, summed up in float32.

  So are the products of its gradient: those of float32 with bfloat16 that jax
  would make run at the speed of float32. And what is transposed for them is x,
  as a rule smaller than the gradient, for which XLA on CPU takes long.
  """
  return contract(x_NE.astype(kernel_EF.dtype), kernel_EF, 1, 0)


def _dot_fwd(x_NE, kernel_EF):
  return dot(x_NE, kernel_EF), (x_NE, kernel_EF)


def _dot_bwd(residuals, d_NF):
  x_NE, kernel_EF = residuals
  d_NF = d_NF.astype(kernel_EF.dtype)
  d_x_NE = contract(d_NF, kernel_EF, 1, 1)
  return d_x_NE.astype(x_NE.dtype), kernel_gradient(x_NE, d_NF)


dot.defvjp(_dot_fwd, _dot_bwd)


def kernel_gradient(x_NE: Array, d_NF: Array) -> jax.Array:
  """The gradient (E, F) of a kernel, in the dtype of that of its product."""
  return contract(x_NE.astype(d_NF.dtype), d_NF, 0, 0).astype(d_NF.dtype)


def dense(
    x: Array, kernel_EF: Array, dimension_numbers: Any, **unused: Any
) -> jax.Array:
  """`dot` in the form that `flax.linen.Dense(dot_general=)` asks for."""
  del dimension_numbers, unused  # Always the last axis of x, and defaults.
  x_NE = x.reshape(-1, x.shape[-1])
  return dot(x_NE, kernel_EF).reshape(*x.shape[:-1], -1).astype(x.dtype)
