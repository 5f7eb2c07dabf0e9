"""The recurrent part of an LSTM layer, with a gradient of its own.

Differentiated as it stands, a scan over time adds up the gradient of the
recurrent kernel token by token: T small products, and T times reading and
writing 4 D^2 numbers. Here the reverse scan carries no more than the gradient
of the state. It leaves those of the gates stacked, from which those of kernel
and scales are made after it, from all T * B rows at once: one large product.
Where nothing is differentiated, nothing is stacked.

Shape suffixes: B rows, T tokens, D units, F = 4 D gate values;
N rows, E size of an input, F size of an output of a product.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from codistill_jax.base import Array, contract

_EPSILON = 1e-6
# Where it pays to multiply by columns: a gradient at 1024 units took 0.76 times
# as long for 16 rows and 0.87 times for 32; at 512 units it took as long.
_FEW_ROWS = 32
_LARGE_KERNEL = 768 * 3072

State = tuple[Array, Array]  # The cell c_BD and the output h_BD, float32.


class Norms(NamedTuple):
  """Parameters of the layer normalisation within the recurrence, float32.

  Attributes:
    gates_F: Scale of the normalised W_h h.
    cell_D: Scale of the normalised cell.
    shift_D: What is added to that.
  """

  gates_F: Array
  cell_D: Array
  shift_D: Array


def times(x_BK: Array, kernel_KM: Array, kernel_MK: Array) -> jax.Array:
  """Multiplies x by a kernel that is given both ways round.

  XLA's product on CPU first copies its right side into blocks. For a few rows
  that takes as long as to multiply, unless the kernel is the left side.
  """
  plain = lambda x, kernel, _: contract(x, kernel, 1, 0)
  few = isinstance(x_BK.shape[0], int) and x_BK.shape[0] <= _FEW_ROWS
  if not few or kernel_KM.size < _LARGE_KERNEL:  # A symbolic size is not few.
    return plain(x_BK, kernel_KM, kernel_MK)
  return jax.lax.platform_dependent(
      x_BK, kernel_KM, kernel_MK, cpu=_times_by_columns, default=plain
  )


def _times_by_columns(x_BK, kernel_KM, kernel_MK):
  del kernel_KM
  # Without the barriers XLA would put the sides back in order.
  x_KB = jax.lax.optimization_barrier(x_BK.T)
  return jax.lax.optimization_barrier(contract(kernel_MK, x_KB, 1, 0)).T


def _transposed(kernel_DF):
  """Transposes once for all tokens, not in the product of each."""
  return jax.lax.optimization_barrier(kernel_DF.T)


@jax.custom_vjp
def unit_size(x: Array) -> jax.Array:
  """Divides the last axis by its root mean square."""
  return _unit_size_fwd(x)[0]


def _unit_size_fwd(x):
  square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(square + _EPSILON)
  return x * scale, (x * scale, scale)


def _unit_size_bwd(residuals, d):
  unit, scale = residuals
  return (scale * (d - unit * jnp.mean(unit * d, axis=-1, keepdims=True)),)


unit_size.defvjp(_unit_size_fwd, _unit_size_bwd)


def row(vector: Array, ndim: int) -> jax.Array:
  """Reshapes a vector to the last of `ndim` axes."""
  return vector.reshape((1,) * (ndim - 1) + (-1,))


@jax.custom_vjp
def run(
    kernel_DF: Array,
    norms: Norms | None,
    inputs_TBF: Array,
    resets_TB: Array | None,
    state: State,
) -> tuple[jax.Array, State]:
  """Runs a layer: all outputs, in the dtype of its kernel, and the last state.

  Args:
    kernel_DF: W_h. With `norms` each row has mean 0, so that W_h h has.
    norms: None for a layer without normalisation.
    inputs_TBF: What inputs and bias add to the gates f, i, o and g.
    resets_TB: Where the state of a row becomes 0 before the token; None for
      nowhere.
    state: Before the window.
  """
  kernels = kernel_DF, _transposed(kernel_DF)

  def step(state, now):
    inputs_BF, resets_B = now
    state = tuple(_reset(x, resets_B) for x in state)
    product_BF, _ = _recurrent(state[1], kernels, norms)
    state = _update(state, product_BF, inputs_BF, norms)
    return state, state[1].astype(kernel_DF.dtype)

  state, h_TBD = _scan(step, state, (inputs_TBF, resets_TB))
  return h_TBD, state


def _scan(step, state, xs, reverse=False):
  """Scans over tokens.

  On an accelerator a turn of the loop costs as much as a small token: several
  tokens a turn, as many as do not yet take long to compile. On CPU they gain
  nothing.
  """
  unroll = 1 if jax.default_backend() == 'cpu' else 4
  return jax.lax.scan(step, state, xs, reverse=reverse, unroll=unroll)


def _reset(x, resets):
  # Before the token is processed: it is the first of its document.
  return x if resets is None else jnp.where(resets[..., None], 0.0, x)


def _recurrent(h_BD, kernels, norms):
  """Returns W_h h, with `norms` over its size, and that size."""
  kernel_DF, kernel_FD = kernels
  product_BF = times(h_BD.astype(kernel_DF.dtype), kernel_DF, kernel_FD)
  if norms is None:
    return product_BF, None
  unit_BF, (_, scale_B1) = _unit_size_fwd(product_BF)
  return unit_BF, scale_B1


def _update(state, product_BF, inputs_BF, norms):
  *gates, o_BD = _gates(product_BF, inputs_BF, norms)
  c_BD = _new_cell(gates, state[0])
  return c_BD, _output(o_BD, _shown(c_BD, norms))


def _gates(product_BF, inputs_BF, norms):
  """Returns the values that enter the gates f, i, g and o; each (B, D)."""
  if norms is not None:
    product_BF = product_BF * row(norms.gates_F, 2)
  gates_BF = product_BF + inputs_BF.astype(jnp.float32)
  f, i, o, g = jnp.split(gates_BF, 4, axis=-1)
  return f, i, g, o


def _new_cell(gates, c_BD):
  f, i, g = gates
  return jax.nn.sigmoid(f) * c_BD + jax.nn.sigmoid(i) * jnp.tanh(g)


def _shown(c_BD, norms):
  """Returns what of the cell reaches the output gate."""
  if norms is None:
    return c_BD
  return _normal(c_BD) * row(norms.cell_D, 2) + row(norms.shift_D, 2)


def _normal(c):
  return unit_size(c - jnp.mean(c, axis=-1, keepdims=True))


def _output(o_BD, shown_BD):
  return jax.nn.sigmoid(o_BD) * jnp.tanh(shown_BD)


def _run_fwd(kernel_DF, norms, inputs_TBF, resets_TB, state):
  kernels = kernel_DF, _transposed(kernel_DF)

  def step(state, now):
    inputs_BF, resets_B = now
    state = tuple(_reset(x, resets_B) for x in state)
    product_BF, scale_B1 = _recurrent(state[1], kernels, norms)
    state = c_BD, h_BD = _update(state, product_BF, inputs_BF, norms)
    # Of h the next product takes no more than this.
    h_BD = h_BD.astype(kernel_DF.dtype)
    return state, (h_BD, c_BD, product_BF, scale_B1)

  last, stacked = _scan(step, state, (inputs_TBF, resets_TB))
  arguments = (kernel_DF, norms, inputs_TBF, resets_TB, state)
  return (stacked[0], last), (arguments, stacked)


def _run_bwd(residuals, d):
  arguments, (h_TBD, c_TBD, product_TBF, scale_TB1) = residuals
  kernel_DF, norms, inputs_TBF, resets_TB, first = arguments
  d_h_TBD, d_last = d
  kernel_FD = _transposed(kernel_DF)

  def step(d_state, now):
    d_out_BD, inputs_BF, resets_B, c_BD, product_BF, scale_B1 = now
    d_c, d_h = d_state
    *gates, o_BD = _gates(product_BF, inputs_BF, norms)
    new_c, back_to_gates = jax.vjp(_new_cell, gates, c_BD)
    shown, back_to_cell = jax.vjp(lambda c: _shown(c, norms), new_c)
    _, back_to_output = jax.vjp(_output, o_BD, shown)
    d_o, d_shown_BD = back_to_output(d_h + d_out_BD.astype(jnp.float32))
    d_c += back_to_cell(d_shown_BD)[0]
    (d_f, d_i, d_g), d_c = back_to_gates(d_c)
    d_gates_BF = jnp.concatenate([d_f, d_i, d_o, d_g], axis=-1)
    d_product_BF = d_gates_BF
    if norms is not None:
      d_unit_BF = d_gates_BF * row(norms.gates_F, 2)
      (d_product_BF,) = _unit_size_bwd((product_BF, scale_B1), d_unit_BF)
    d_product_BF = d_product_BF.astype(kernel_DF.dtype)
    d_h = times(d_product_BF, kernel_FD, kernel_DF)
    d_state = tuple(_reset(x, resets_B) for x in (d_c, d_h))
    if norms is None:
      return d_state, (d_gates_BF, None, None)
    return d_state, (d_gates_BF, d_product_BF, d_shown_BD)

  before = [_before(x, x_T, resets_TB) for x, x_T in zip(first, (c_TBD, h_TBD))]
  d_first, (d_gates_TBF, d_product_TBF, d_shown_TBD) = _scan(
      step,
      d_last,
      (d_h_TBD, inputs_TBF, resets_TB, before[0], product_TBF, scale_TB1),
      reverse=True,
  )
  d_norms = None
  if norms is None:
    d_product_TBF = d_gates_TBF.astype(kernel_DF.dtype)
  else:
    total = lambda x: jnp.sum(x, axis=(0, 1))
    d_norms = Norms(
        gates_F=total(d_gates_TBF * product_TBF),
        cell_D=total(d_shown_TBD * _normal(c_TBD)),
        shift_D=total(d_shown_TBD),
    )
  d_kernel_DF = kernel_gradient(_rows(before[1]), _rows(d_product_TBF))
  d_inputs_TBF = d_gates_TBF.astype(inputs_TBF.dtype)
  return d_kernel_DF, d_norms, d_inputs_TBF, None, d_first


def _before(first, x_T, resets_TB):
  """Shifts what there is after each token to what there was before it."""
  x_T = jnp.concatenate([first[None].astype(x_T.dtype), x_T[:-1]])
  return _reset(x_T, resets_TB)


def _rows(x_TBD):
  return x_TBD.reshape(-1, x_TBD.shape[-1])


run.defvjp(_run_fwd, _run_bwd)


# --- Products whose gradients are laid out to be fast -------------------------


@jax.custom_vjp
def dot(x_NE: Array, kernel_EF: Array) -> jax.Array:
  """Multiplies in the dtype of the kernel, summed up in float32.

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
  """Returns the gradient (E, F) of a kernel, in the dtype of its product's."""
  return contract(x_NE.astype(d_NF.dtype), d_NF, 0, 0).astype(d_NF.dtype)


def dense(
    x: Array, kernel_EF: Array, dimension_numbers: Any, **unused: Any
) -> jax.Array:
  """Multiplies as `dot`, in the form of `flax.linen.Dense(dot_general=)`."""
  del dimension_numbers, unused  # Always the last axis of x, and defaults.
  x_NE = x.reshape(-1, x.shape[-1])
  return dot(x_NE, kernel_EF).reshape(*x.shape[:-1], -1).astype(x.dtype)
