"""Gradient accumulation: the rows of one device in microbatches, in turn.

So replicas are simulated: with K microbatches on each of R devices a group
updates as K x R real replicas would, by one gradient, that of the mean over the
group batch; each microbatch normalises by its own batch statistics and draws
its own noise. The activations of one exist at a time, so the group batch is not
bounded by what the devices hold.

Shape suffixes: K microbatches of a replica, B rows of a replica, P peers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from codistill_jax import jaxprs
from codistill_jax.base import (
    Array,
    Batch,
    Metrics,
    Model,
    PyTree,
    TrainState,
    Variables,
    with_keys,
)


class Accumulated(NamedTuple):
  """What the examples of a microbatch, or of all, make of the state.

  Attributes:
    grads: Of their share in the objective of the whole group.
    sums: Of losses over them.
    model_state: The new running statistics.
    carry: The recurrent state after them.
    teacher_carry: That of each teacher.
  """

  grads: PyTree
  sums: Metrics
  model_state: PyTree
  carry: PyTree
  teacher_carry: PyTree


def accumulate(
    of_microbatch: Callable[[TrainState, PyTree, int | Array], Accumulated],
    state: TrainState,
    rows: PyTree,
    num_microbatches: int,
) -> Accumulated:
  """Runs the microbatches in turn and accumulates what they make.

  Args:
    of_microbatch: `(state, rows, index)` of one -> `Accumulated`; its state
      differs from `state` in the carries alone.
    state: Of this replica, with carries (B, ...) and (P, B, ...).
    rows: Arrays (B, ...): its batch, weights.
    num_microbatches: K. One is no loop.

  Returns:
    Sums of `grads` and `sums`, the mean `model_state` (of its floats; counters
    are the same in all), and the carries of all rows.

  Raises:
    ValueError: If K does not divide B.
  """
  if num_microbatches == 1:
    return of_microbatch(state, rows, 0)
  microbatches_K = (
      jax.tree.map(
          lambda x: _split(x, 0, num_microbatches), (rows, state.carry)
      ),
      jax.tree.map(
          lambda x: _split(x, 1, num_microbatches), state.teacher_carry
      ),
      jnp.arange(num_microbatches, dtype=jnp.int32),
  )

  def add(total: tuple[PyTree, PyTree], x: tuple) -> tuple[tuple, tuple]:
    (rows, carry), teacher_carry, index = x
    mine = state.replace(carry=carry, teacher_carry=teacher_carry)
    part = of_microbatch(mine, rows, index)
    grads, model_state = total
    total = (
        jax.tree.map(jnp.add, grads, part.grads),
        jax.tree.map(_add_floats, model_state, part.model_state),
    )
    return total, (part.sums, part.carry, part.teacher_carry)

  like = state.variables.params, state.variables.model_state
  start = jax.tree.map(jnp.zeros_like, like)
  (grads, model_state), (sums_K, carry_K, teacher_carry_K) = jax.lax.scan(
      add, start, microbatches_K
  )
  return Accumulated(
      grads,
      jax.tree.map(lambda x: jnp.sum(x, axis=0), sums_K),
      jax.tree.map(lambda x: _divide_floats(x, num_microbatches), model_state),
      jax.tree.map(lambda x: _merge(x, 0), carry_K),
      jax.tree.map(lambda x: _merge(x, 1), teacher_carry_K),
  )


def check_model(
    model: Model,
    state: TrainState,
    batch: Batch,
    axis_name: str | None,
    num_microbatches: int,
) -> None:
  """Raises ValueError if the model itself looks over all replicas.

  Such as batch normalisation over them: it would see one part of each replica,
  and not the other parts.

  Args:
    model: Of the student.
    state: Any state of it; only shapes matter, as of `batch`.
    batch: Rows of a replica.
    axis_name: The axis of the replicas; None for a single one.
    num_microbatches: K.
  """
  if axis_name is None or num_microbatches == 1:
    return

  def apply(variables: Variables, batch: Batch, carry: PyTree) -> PyTree:
    return model.apply(variables, batch, carry, with_keys(state.rng), True)

  args = state.variables, dict(batch), state.carry
  for equation in jaxprs.equations(jax.make_jaxpr(apply)(*args).jaxpr):
    if axis_name in jaxprs.axes_of(equation):
      raise ValueError(
          f'simulated_replicas={num_microbatches}, but the model computes'
          f' over the axis {axis_name!r} of all replicas (by'
          f' {equation.primitive.name}), as batch normalisation over'
          ' them does, and simulated ones run one after another; normalise'
          ' within a replica, or set simulated_replicas=1'
      )


def _split(x: Array, axis: int, num_microbatches: int) -> jax.Array:
  """(..., B, ...) -> (K, ..., B / K, ...)."""
  rows = x.shape[axis]
  if rows % num_microbatches:
    raise ValueError(
        f'{rows} rows of a replica are not divisible by'
        f' simulated_replicas={num_microbatches}; set group_batch to a'
        ' multiple of the replicas times that'
    )
  shape = (
      *x.shape[:axis],
      num_microbatches,
      rows // num_microbatches,
      *x.shape[axis + 1 :],
  )
  return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)


def _merge(x_K: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_split`."""
  x = jnp.moveaxis(x_K, 0, axis)
  shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1])
  return jnp.reshape(x, (*shape, *x.shape[axis + 2 :]))


def _add_floats(total: jax.Array, value: jax.Array) -> jax.Array:
  return total + value if _is_float(value) else value


def _divide_floats(total: jax.Array, count: int) -> jax.Array:
  return total / count if _is_float(total) else total


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)
