"""Simulated replicas: the rows of one device in parts, one after another.

With k parts on each of R devices a group updates as k x R real replicas would:
one gradient, that of the mean over the group batch; each part normalises by its
own batch statistics and draws its own noise. Only one part's activations exist
at a time, so the group batch is not bounded by what the devices hold.

Shape suffixes: K parts of a replica, B rows of a replica, P peers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from codistill_jax import flops
from codistill_jax.base import (
    Array,
    Batch,
    Metrics,
    Model,
    PyTree,
    TrainState,
    Variables,
)


class Part(NamedTuple):
  """What the examples of one part make of the state.

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


def one_by_one(
    of_part: Callable[[TrainState, PyTree, int | Array], Part],
    state: TrainState,
    rows: PyTree,
    num_parts: int,
) -> Part:
  """Runs the parts in turn and puts together what they make.

  Args:
    of_part: `(state, rows, index)` of one part -> `Part`; its state differs
      from `state` in the carries alone.
    state: Of this replica, with carries (B, ...) and (P, B, ...).
    rows: Arrays (B, ...): its batch, weights.
    num_parts: K. One part is no loop.

  Returns:
    Sums of `grads` and `sums`, the mean `model_state` (of its floats; counters
    are the same in all parts), and the carries of all rows.

  Raises:
    ValueError: If K does not divide B.
  """
  if num_parts == 1:
    return of_part(state, rows, 0)
  parts_K = (
      jax.tree.map(lambda x: _split(x, 0, num_parts), (rows, state.carry)),
      jax.tree.map(lambda x: _split(x, 1, num_parts), state.teacher_carry),
      jnp.arange(num_parts, dtype=jnp.int32),
  )

  def add(total: tuple[PyTree, PyTree], x: tuple) -> tuple[tuple, tuple]:
    (rows, carry), teacher_carry, index = x
    mine = state.replace(carry=carry, teacher_carry=teacher_carry)
    part = of_part(mine, rows, index)
    grads, model_state = total
    total = (
        jax.tree.map(jnp.add, grads, part.grads),
        jax.tree.map(_add_floats, model_state, part.model_state),
    )
    return total, (part.sums, part.carry, part.teacher_carry)

  like = state.variables.params, state.variables.model_state
  start = jax.tree.map(jnp.zeros_like, like)
  (grads, model_state), (sums_K, carry_K, teacher_carry_K) = jax.lax.scan(
      add, start, parts_K
  )
  return Part(
      grads,
      jax.tree.map(lambda x: jnp.sum(x, axis=0), sums_K),
      jax.tree.map(lambda x: _divide_floats(x, num_parts), model_state),
      jax.tree.map(lambda x: _merge(x, 0), carry_K),
      jax.tree.map(lambda x: _merge(x, 1), teacher_carry_K),
  )


def check_model(
    model: Model,
    state: TrainState,
    batch: Batch,
    axis_name: str | None,
    num_parts: int,
) -> None:
  """Raises ValueError if the model itself looks over all replicas.

  Such as batch normalisation over them: it would see one part of each replica,
  and not the other parts.

  Args:
    model: Of the student.
    state: Any state of it; only shapes matter, as of `batch`.
    batch: Rows of a replica.
    axis_name: The axis of the replicas; None for a single one.
    num_parts: K.
  """
  if axis_name is None or num_parts == 1:
    return

  def apply(variables: Variables, batch: Batch, carry: PyTree) -> PyTree:
    return model.apply(variables, batch, carry, state.rng, True)

  args = state.variables, dict(batch), state.carry
  for equation in flops.equations(jax.make_jaxpr(apply)(*args).jaxpr):
    if axis_name in _axes(equation.params):
      raise ValueError(
          f'simulated_replicas={num_parts}, but the model computes over the'
          f' axis {axis_name!r} of all replicas (by {equation.primitive.name}),'
          ' as batch normalisation over them does, and simulated ones run one'
          ' after another; normalise within a replica, or set'
          ' simulated_replicas=1'
      )


def _axes(params: dict) -> tuple:
  names = []
  for key in ('axes', 'axis_name'):
    found = params.get(key, ())
    names += found if isinstance(found, tuple | list) else [found]
  return tuple(names)


def _split(x: Array, axis: int, num_parts: int) -> jax.Array:
  """(..., B, ...) -> (K, ..., B / K, ...)."""
  rows = x.shape[axis]
  if rows % num_parts:
    raise ValueError(
        f'{rows} rows of a replica are not divisible by'
        f' simulated_replicas={num_parts}; set group_batch to a multiple of the'
        ' replicas times that'
    )
  shape = (*x.shape[:axis], num_parts, rows // num_parts, *x.shape[axis + 1 :])
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
