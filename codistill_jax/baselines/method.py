"""How one group updates: the seam at which synchronous SGD is replaced.

A run makes its step, its first state and its batches through a `Method`; the
loop, the exchange, evaluation, checkpoints and records know nothing of it.

Shape suffixes: B rows of the group batch, P peers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from codistill_jax import replicas, step
from codistill_jax.base import Model, PyTree, Stream, TrainState


@runtime_checkable
class Method(Protocol):
  """How one group updates; hashable, and the same for all groups of a run.

  What a method does not say otherwise is as in synchronous SGD.
  """

  def check(self, group_batch: int, num_replicas: int) -> None:
    """Raises ValueError if so many rows cannot be shared by the replicas."""
    replicas.check_group_batch(group_batch, num_replicas)

  def init_state(
      self, tx: optax.GradientTransformation, state: TrainState
  ) -> TrainState:
    """Widens what `step.init_state` made by what the method remembers.

    Pure. `variables` stay what is evaluated and published. The leading axis of
    `carry`, and the second of `teacher_carry`, stays the one over rows that
    replicas share; everything else is replicated.
    """
    del tx
    return state

  def make_train_step(
      self,
      model: Model,
      tx: optax.GradientTransformation,
      *,
      num_steps: int,
      **kwargs: Any,
  ) -> step.TrainStep:
    """Makes the step; `kwargs` are those of `step.make_train_step`."""
    del num_steps
    return step.make_train_step(model, tx, **kwargs)

  def train_stream(
      self,
      make: Callable[..., Stream],
      *,
      group_batch: int,
      num_steps: int,
      rows: slice | None,
  ) -> Stream:
    """Makes the stream of a group; rows as in `base.Task.train_stream`.

    Args:
      make: `make(group_batch=, rows=)` gives the task's stream of the group.
      group_batch: B, rows that an update takes.
      num_steps: Updates of the run.
      rows: Which of the B rows this process loads; None: all.
    """
    del num_steps
    return make(group_batch=group_batch, rows=rows)


@dataclasses.dataclass(frozen=True)
class SynchronousSgd(Method):
  """All replicas compute on the same parameters, and all wait for all.

  A replica receives one all-reduced gradient, of the size of the parameters,
  in each update.
  """


def check_workers(name: str, workers: Any) -> None:
  """Raises ValueError unless it is a number of workers."""
  if type(workers) is not int or workers < 1:
    raise ValueError(
        f'{name}.workers={workers!r}; set it to a whole number of at least 1'
    )


@functools.partial(jax.jit, static_argnames=('count', 'axis'))
def copies(tree: PyTree, count: int, axis: int = 0) -> PyTree:
  """Stacks so many copies of each leaf along a new axis."""
  return jax.tree.map(lambda x: jnp.stack([x] * count, axis), tree)
