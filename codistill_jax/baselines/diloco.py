"""Local SGD and DiLoCo: workers that average their parameters now and then.

Each of M workers updates a copy of its own, with its own inner optimiser, on
its own rows. After every H updates the difference between where the workers
began and the mean of where they are is taken for a gradient, the outer one; an
outer optimiser, SGD with Nesterov momentum, applies it to where they began, and
all workers go on from there (Douillard et al. 2023, arXiv 2311.08105, algorithm
1, where the inner optimiser is AdamW, the rate 0.7 and the momentum 0.9). With
rate 1 and no momentum that is the mean itself: local SGD (Stich 2019).

One step is one update of all workers, and the group batch is what they take
together: row i belongs to worker i mod M, on however many replicas.

What is evaluated and published is the mean of the workers: after an outer step
that is the outer parameters. In between it is what an outer step of rate 1 and
no momentum would give, which keeps the curve on the axis of steps of the other
methods, and makes a single worker with such an outer step plain training at
every step. But nobody has sent it: take an `eval_every` that is a multiple of H
where communication counts.

Shape suffixes: B rows of the group batch (here: of one replica), M workers,
P peers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from codistill_jax import jaxprs, step
from codistill_jax.base import (
    Array,
    Batch,
    Metrics,
    Model,
    PyTree,
    TrainState,
    Variables,
    with_keys,
    without_keys,
)
from codistill_jax.baselines.method import Method, check_workers, copies


class LocalState(struct.PyTreeNode):
  """What the workers hold.

  Attributes:
    workers: Variables (M, ...) of each.
    inner: State (M, ...) of the inner optimiser of each; no outer step resets
      it.
    begun: Parameters that all began with after the last outer step.
    outer: State of the outer optimiser.
  """

  workers: Variables
  inner: PyTree
  begun: PyTree
  outer: PyTree


@dataclasses.dataclass(frozen=True)
class Diloco(Method):
  """DiLoCo, or local SGD, with M workers.

  A worker receives one all-reduced outer gradient, of the size of the
  parameters, in every H updates; nothing in between.

  The inner optimiser is that of the experiment. The losses are means over the
  workers, each of which takes the mean over its own examples, however many of
  its rows are padding. `local/divergence` is the root mean square, over the
  workers, of the distance of their parameters from their mean, before they are
  averaged.

  Attributes:
    workers: M; 1 is the control, of an outer optimiser without any averaging.
    inner_steps: H, updates between outer steps.
    outer_rate: Learning rate of the outer optimiser.
    outer_momentum: Its Nesterov momentum.
  """

  workers: int = 4
  inner_steps: int = 50
  outer_rate: float = 0.7
  outer_momentum: float = 0.9

  def __post_init__(self):
    check_workers('Diloco', self.workers)
    if type(self.inner_steps) is not int or self.inner_steps < 1:
      raise ValueError(
          f'Diloco.inner_steps={self.inner_steps!r}; set it to a whole number'
          ' of at least 1'
      )
    if not _is_number(self.outer_rate) or self.outer_rate <= 0:
      raise ValueError(
          f'Diloco.outer_rate={self.outer_rate!r}; set it to a number above 0'
      )
    if not _is_number(self.outer_momentum) or not 0 <= self.outer_momentum < 1:
      raise ValueError(
          f'Diloco.outer_momentum={self.outer_momentum!r}; set it to a number'
          ' from 0 to below 1'
      )

  def check(self, group_batch: int, num_replicas: int) -> None:
    parts = self.workers * num_replicas
    if group_batch < 1 or group_batch % parts:
      raise ValueError(
          f'group_batch={group_batch} is not divisible by the'
          f' workers={self.workers} of Diloco on {num_replicas} replicas; set'
          f' group_batch to a multiple of {parts}'
      )

  def init_state(
      self, tx: optax.GradientTransformation, state: TrainState
  ) -> TrainState:
    """Gives all workers the same variables; carries stay (B, ...)."""
    del tx
    params = state.variables.params
    return state.replace(
        opt_state=LocalState(
            workers=copies(state.variables, self.workers),
            inner=copies(state.opt_state, self.workers),
            # A buffer of its own, or they could not both be donated.
            begun=jax.tree.map(jnp.copy, params),
            outer=self._outer().init(params),
        )
    )

  def make_train_step(
      self,
      model: Model,
      tx: optax.GradientTransformation,
      *,
      num_steps: int,
      **kwargs: Any,
  ) -> step.TrainStep:
    """Makes one update of all workers, and the outer step where it is due."""
    del num_steps
    inner_step = step.make_train_step(model, tx, **kwargs)
    outer = self._outer()

    def train_step(
        state: TrainState, batch: Batch, teachers: Any, distill_weight: Array
    ) -> tuple[TrainState, Metrics]:
      each = lambda worker, rows: inner_step(
          worker, rows, teachers, distill_weight
      )
      workers_M = _split_state(state, self.workers)
      batch_M = _split_rows(dict(batch), self.workers)
      workers_M, metrics_M = _map_workers(model, each, workers_M, batch_M)
      metrics = jax.tree.map(lambda x: jnp.mean(x, 0), metrics_M)
      metrics['optim/fault'] = jnp.max(metrics_M['optim/fault'])
      metrics['local/divergence'] = _spread(workers_M.variables.params)
      held = state.opt_state.replace(
          workers=workers_M.variables, inner=workers_M.opt_state
      )
      variables, held = jax.lax.cond(
          (state.step + 1) % self.inner_steps == 0,
          lambda held: _outer_step(outer, held),
          lambda held: (_mean(held.workers), held),
          held,
      )
      return (
          state.replace(
              step=state.step + 1,
              variables=variables,
              opt_state=held,
              carry=_merge_rows(workers_M.carry, 0),
              teacher_carry=_merge_rows(workers_M.teacher_carry, 1),
          ),
          metrics,
      )

    return train_step

  def _outer(self) -> optax.GradientTransformation:
    momentum = self.outer_momentum or None
    return optax.sgd(self.outer_rate, momentum, nesterov=True)


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool)


def _outer_step(
    outer: optax.GradientTransformation, held: LocalState
) -> tuple[Variables, LocalState]:
  """Returns the new outer variables, with which all workers go on."""
  mean = _mean(held.workers)
  grads = jax.tree.map(jnp.subtract, held.begun, mean.params)
  updates, outer_state = outer.update(grads, held.outer, held.begun)
  # The same as `begun + updates`, but exactly the mean for a rate of 1 without
  # momentum.
  params = jax.tree.map(
      lambda x, g, u: x + (g + u), mean.params, grads, updates
  )
  variables = mean.replace(params=params)
  count = len(jax.tree.leaves(held.workers.params)[0])
  return variables, held.replace(
      workers=copies(variables, count), begun=params, outer=outer_state
  )


def _mean(variables_M: Variables) -> Variables:
  """Returns the mean; counters are the same in all workers."""
  return jax.tree.map(
      lambda x: (
          _mean_of(x) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]
      ),
      variables_M,
  )


def _mean_of(x_M: Array | Sequence[Array]) -> jax.Array:
  # Worker by worker: a reduction over the leading axis takes XLA on CPU forty
  # times as long.
  return sum(x_M[m] for m in range(len(x_M))) / len(x_M)


def _spread(params_M: PyTree) -> jax.Array:
  """Returns the root mean square distance from the mean, over the workers."""

  def squares(x_M: Array) -> jax.Array:
    mean = _mean_of(x_M)
    return _mean_of([jnp.square(x_M[m] - mean) for m in range(len(x_M))])

  return jnp.sqrt(sum(jnp.sum(squares(x)) for x in jax.tree.leaves(params_M)))


def _split_state(state: TrainState, workers: int) -> TrainState:
  """Returns the state of each worker, along a leading axis."""
  held = state.opt_state
  # The first as it is: a single worker draws what plain training draws.
  rng = with_keys(state.rng)
  rngs = [rng] + [jax.random.fold_in(rng, m) for m in range(1, workers)]
  return TrainState(
      step=jnp.broadcast_to(state.step, (workers,)),
      variables=held.workers,
      opt_state=held.inner,
      rng=without_keys(jnp.stack(rngs)),
      carry=_split_rows(state.carry, workers),
      teacher_carry=_split_rows(state.teacher_carry, workers, 1),
  )


def _split_rows(tree: PyTree, workers: int, axis: int = 0) -> PyTree:
  """Reshapes (B, ...) to (M, B / M, ...), or (P, B, ...) to (M, P, B / M, ...).

  Row by row to the workers in turn: as long as each has equally many rows of
  each replica, it has the same ones on any number of replicas.
  """

  def split(x: Array) -> Array:
    rows = x.shape[axis]
    if rows % workers:
      raise ValueError(
          f'{rows} rows cannot be shared by workers={workers} of Diloco; set'
          ' group_batch to a multiple of workers times replicas'
      )
    shape = (*x.shape[:axis], rows // workers, workers, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.reshape(x, shape), axis + 1, 0)

  return jax.tree.map(split, tree)


def _merge_rows(tree_M: PyTree, axis: int) -> PyTree:
  """Undoes `_split_rows`."""

  def merge(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, axis + 1)
    return jnp.reshape(x, (*x.shape[:axis], -1, *x.shape[axis + 2 :]))

  return jax.tree.map(merge, tree_M)


def _map_workers(
    model: Model,
    each: Callable[..., tuple[TrainState, Metrics]],
    workers_M: TrainState,
    batch_M: Batch,
) -> tuple[TrainState, Metrics]:
  """Applies `each` to every worker."""
  first = jax.tree.map(lambda x: x[0], (workers_M, batch_M))
  if len(workers_M.step) == 1:
    # Not as a batch of one, whose products may round otherwise.
    return jax.tree.map(lambda x: x[None], each(*first))
  worker, rows = first
  forward = lambda variables, rows, carry: model.apply(
      variables, rows, carry, None, False
  )
  if jaxprs.has_convolution(forward, worker.variables, rows, worker.carry):
    # With a kernel for each worker they would become grouped convolutions, the
    # slow ones. It holds the activations of one worker at a time, too.
    return jax.lax.map(lambda x: each(*x), (workers_M, batch_M))
  return jax.vmap(each)(workers_M, batch_M)
