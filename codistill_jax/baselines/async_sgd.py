"""Asynchronous SGD: W workers, each with the parameters it last pulled.

A faithful simulation of a parameter server, as a pure compiled function. One
call is one update of the server. A worker computes the gradient of its own
batch at the parameters that it last pulled; the server applies that gradient
with its (stateful) optimiser to the parameters that it has by now; then the
worker pulls. Whose turn it is comes from a table, see `Turns`.

The step is counted in updates of the server, and the group batch is what one
worker contributes to one: W workers for n updates see as many examples as one
for n.

Running batch statistics live on the server, as moving averages of a parameter
server do: what a worker's forward pass (at its old parameters) finds of its
batch is averaged into the server's current statistics.

Shape suffixes: B rows of a worker's batch (here: of one replica), W workers,
P peers.
"""

import dataclasses
import fractions
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from codistill_jax import optimizers, step
from codistill_jax.base import (
    Array,
    Batch,
    Metrics,
    Model,
    PyTree,
    Stream,
    TrainState,
    Variables,
)
from codistill_jax.baselines.method import Method, check_workers, copies

# A run has diverged while its loss is so many times that of its first update.
DIVERGED = 2.0
_LOSS_MEMORY = 0.95

ORDERS = ('round_robin', 'random')
STREAMS = 8  # At most so many of a group, where workers can share them.


class Turns(NamedTuple):
  """Whose turn each update is.

  Attributes:
    worker_N: int32; who computes the gradient.
    batch_N: int64; how many gradients it has computed before.
    joining_N: int32; the worker that pulls for the first time, before the
      gradient; -1 for none.
  """

  worker_N: np.ndarray
  batch_N: np.ndarray
  joining_N: np.ndarray


@functools.lru_cache(maxsize=8)
def worker_turns(
    workers: int,
    num_steps: int,
    order: str = 'round_robin',
    seed: int = 0,
    ramp_up_steps: int = 0,
) -> Turns:
  """Returns the turns of the first updates; of more, these are the first.

  In each round every worker that has joined has one turn.

  Args:
    workers: W.
    num_steps: N.
    order: 'round_robin', in the same order in each round; or 'random', in an
      order of its own in each.
    seed: Of the random orders.
    ramp_up_steps: Updates after which the last worker joins; the others join
      one by one before, the first at once. 0: all at once.
  """
  joins_W = np.array(
      [
          math.ceil(fractions.Fraction(w * ramp_up_steps, max(workers - 1, 1)))
          for w in range(workers)
      ]
  )
  rounds: list[np.ndarray] = []
  made = 0
  while made < num_steps:
    present = int(np.count_nonzero(joins_W <= made))
    turns = np.arange(present)
    if order == 'random':
      turns = np.random.default_rng([seed, len(rounds)]).permutation(present)
    rounds.append(turns)
    made += present
  worker_N = np.concatenate(rounds)[:num_steps].astype(np.int32)
  batch_N = np.zeros(num_steps, np.int64)
  joining_N = np.full(num_steps, -1, np.int32)
  for w in range(workers):
    turns_of_w = np.flatnonzero(worker_N == w)
    batch_N[turns_of_w] = np.arange(len(turns_of_w))
    if ramp_up_steps and joins_W[w] < num_steps:
      joining_N[joins_W[w]] = w
  return Turns(worker_N, batch_N, joining_N)


class WorkerStreams:
  """The batch of whoever has the turn.

  A stream may hold much, such as the order of all documents. So workers that
  read the same batch at about the same time share one, and what it gives.
  """

  def __init__(
      self,
      stream_of: Callable[[int], Stream],
      turns: Turns,
      together: int,
      rows: int,
  ):
    """Makes no stream before it is read.

    Args:
      stream_of: Number of a stream -> the rows of its workers, in order.
      turns: Whose turn each update is.
      together: Workers of a stream.
      rows: Of each worker.
    """
    self._turns = turns
    self._together = together
    self._rows = rows
    self._stream_of = functools.cache(stream_of)
    # In a round every stream is read at one place; if workers are by
    # themselves, none is read there twice.
    size = STREAMS if together > 1 else 1
    self._read = functools.lru_cache(size)(self._read_batch)

  def batch(self, step: int) -> dict[str, Array]:
    _check_turn(step, len(self._turns.worker_N))
    number, place = divmod(int(self._turns.worker_N[step]), self._together)
    batch = self._read(number, int(self._turns.batch_N[step]))
    rows = slice(place * self._rows, (place + 1) * self._rows)
    return jax.tree.map(lambda x: x[rows], dict(batch))

  def _read_batch(self, number: int, index: int) -> Batch:
    return self._stream_of(number).batch(index)


class AsyncState(struct.PyTreeNode):
  """What server and workers hold besides the server's variables.

  Attributes:
    server: State of the server's optimiser.
    pulled: Parameters (W, ...) that each worker last pulled.
    pulled_at_W: int32; the updates that the server had done then.
    first_loss: Of the first update, in nats.
    recent_loss: A moving average of it.
  """

  server: PyTree
  pulled: PyTree
  pulled_at_W: Array
  first_loss: Array
  recent_loss: Array


@dataclasses.dataclass(frozen=True)
class AsynchronousSgd(Method):
  """Asynchronous SGD with W workers.

  A worker receives one set of parameters, 4 bytes each in float32, in each of
  its own updates, so once in W updates of the server, and sends one gradient
  of that size. It holds no barrier. This process holds W + 1 sets.

  The metric `async/staleness_steps` is how many updates the server did between
  a worker's pull and its gradient: W - 1 in round-robin, and on average in a
  random order, once all are there. `async/loss_over_start` is a moving average
  of the task's loss, over that of the first update; `async/diverged` is 1 while
  it is more than `DIVERGED`.

  Attributes:
    workers: W.
    order: 'round_robin' or 'random'; see `turns`.
    seed: Of the random order, which is the same in all groups.
    ramp_up_steps: Updates until all workers have joined; 0: at once.
  """

  workers: int = 8
  order: str = 'round_robin'
  seed: int = 0
  ramp_up_steps: int = 0

  def __post_init__(self):
    check_workers('AsynchronousSgd', self.workers)
    if self.order not in ORDERS:
      raise ValueError(
          f'AsynchronousSgd.order={self.order!r} is not one of'
          f' {", ".join(ORDERS)}'
      )
    for name in ('seed', 'ramp_up_steps'):
      value = getattr(self, name)
      if type(value) is not int or value < 0:
        raise ValueError(
            f'AsynchronousSgd.{name}={value!r}; set it to a whole number of at'
            ' least 0'
        )
    if 0 < self.ramp_up_steps < self.workers - 1:
      raise ValueError(
          f'AsynchronousSgd.ramp_up_steps={self.ramp_up_steps} is too short for'
          f' workers={self.workers} to join one by one; set it to 0 or to at'
          f' least {self.workers - 1}'
      )

  def turns(self, num_steps: int) -> Turns:
    """Returns whose turn each update of a run is."""
    return worker_turns(
        self.workers, num_steps, self.order, self.seed, self.ramp_up_steps
    )

  def init_state(
      self, tx: optax.GradientTransformation, state: TrainState
  ) -> TrainState:
    """Pulls the first parameters for all workers; carries (B, W, ...)."""
    del tx
    return state.replace(
        opt_state=AsyncState(
            server=state.opt_state,
            pulled=copies(state.variables.params, self.workers),
            pulled_at_W=jnp.zeros(self.workers, jnp.int32),
            first_loss=jnp.zeros((), jnp.float32),
            recent_loss=jnp.zeros((), jnp.float32),
        ),
        carry=copies(state.carry, self.workers, axis=1),
        teacher_carry=copies(state.teacher_carry, self.workers, axis=2),
    )

  def train_stream(
      self,
      make: Callable[..., Stream],
      *,
      group_batch: int,
      num_steps: int,
      rows: slice | None,
  ) -> Stream:
    """Makes a stream of W x B rows, of which each worker reads its own.

    So the n-th batch of worker w are rows w B to (w + 1) B of batch n of that
    stream, and a document of a language model stays with its worker.
    """
    # Whoever joined later is at an earlier batch than the others.
    at_one_batch = rows is None and not self.ramp_up_steps
    together = -(-self.workers // STREAMS) if at_one_batch else 1
    start, stop, _ = (rows or slice(None)).indices(group_batch)

    def stream_of(number: int) -> Stream:
      first = number * together
      last = min(first + together, self.workers) - 1
      return make(
          group_batch=self.workers * group_batch,
          rows=slice(first * group_batch + start, last * group_batch + stop),
      )

    return WorkerStreams(
        stream_of, self.turns(num_steps), together, stop - start
    )

  def make_train_step(
      self,
      model: Model,
      tx: optax.GradientTransformation,
      *,
      num_steps: int,
      **kwargs: Any,
  ) -> step.TrainStep:
    """Makes one update of the server, with the gradient of one worker.

    There are `num_steps` turns. Whoever asks for another update is refused, or
    finds losses that are NaN where the step is compiled and cannot refuse.
    """
    turns = self.turns(num_steps)
    gradient_step = step.make_train_step(model, _KEEP_GRADIENT, **kwargs)

    def train_step(
        state: TrainState, batch: Batch, teachers: Any, distill_weight: Array
    ) -> tuple[TrainState, Metrics]:
      if not isinstance(state.step, jax.core.Tracer):
        _check_turn(int(state.step), num_steps)
      worker = jnp.asarray(turns.worker_N)[state.step]
      if self.ramp_up_steps:
        joining = jnp.asarray(turns.joining_N)[state.step]
        state = _join(state, joining)
      answer, metrics = gradient_step(
          _as_seen_by(worker, state), batch, teachers, distill_weight
      )
      metrics['async/staleness_steps'] = (
          state.step - state.opt_state.pulled_at_W[worker]
      )
      for key in ('loss/task', 'loss/total'):
        metrics[key] = jnp.where(state.step < num_steps, metrics[key], jnp.nan)
      return _serve(tx, state, worker, answer, metrics)

    train_step.num_steps = num_steps  # type: ignore[attr-defined]
    return train_step


def _check_turn(step: int, num_steps: int) -> None:
  if step >= num_steps:
    raise ValueError(
        f'asynchronous SGD has turns for num_steps={num_steps} updates, and'
        f' this would be number {step + 1}; make step and stream for more'
    )


# Applies nothing: of a step with this optimiser, the new `opt_state` is the
# gradient, summed over the replicas.
_KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: (),
    lambda grads, state, params=None: (
        jax.tree.map(jnp.zeros_like, grads),
        grads,
    ),
)


def _take(tree: PyTree, index: Array, axis: int) -> PyTree:
  return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False),
      tree,
  )


def _put(tree: PyTree, part: PyTree, index: Array, axis: int) -> PyTree:
  return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, axis),
      tree,
      part,
  )


def _join(state: TrainState, joining: Array) -> TrainState:
  """Pulls what the server has for the worker that joins; -1: nobody joins."""
  held, index = state.opt_state, jnp.maximum(joining, 0)
  here = joining >= 0
  part = jax.tree.map(
      lambda new, old: jnp.where(here, new, old),
      (state.variables.params, state.step),
      _take((held.pulled, held.pulled_at_W), index, 0),
  )
  pulled, pulled_at_W = _put((held.pulled, held.pulled_at_W), part, index, 0)
  return state.replace(
      opt_state=held.replace(pulled=pulled, pulled_at_W=pulled_at_W)
  )


def _as_seen_by(worker: Array, state: TrainState) -> TrainState:
  """Returns the state of a worker: its parameters, the carries of its rows."""
  params = _take(state.opt_state.pulled, worker, 0)
  return state.replace(
      variables=Variables(params, state.variables.model_state),
      opt_state=params,  # Of the form of the gradient, which takes its place.
      carry=_take(state.carry, worker, 1),
      teacher_carry=_take(state.teacher_carry, worker, 2),
  )


def _serve(
    tx: optax.GradientTransformation,
    state: TrainState,
    worker: Array,
    answer: TrainState,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
  """Applies a worker's gradient to the server; then the worker pulls."""
  held = state.opt_state
  params, server = optimizers.update(
      tx,
      answer.opt_state,
      held.server,
      state.variables.params,
      metrics['loss/total'],
  )
  loss, first = metrics['loss/task'], state.step == 0
  first_loss = jnp.where(first, loss, held.first_loss)
  recent_loss = jnp.where(
      first, loss, _LOSS_MEMORY * held.recent_loss + (1 - _LOSS_MEMORY) * loss
  )
  over = recent_loss / jnp.maximum(first_loss, 1e-9)
  metrics |= {
      'async/loss_over_start': over,
      'async/diverged': jnp.float32(over > DIVERGED),
  }
  state = state.replace(
      step=answer.step,
      variables=Variables(params, answer.variables.model_state),
      opt_state=AsyncState(
          server=server,
          pulled=_put(held.pulled, params, worker, 0),
          pulled_at_W=held.pulled_at_W.at[worker].set(answer.step),
          first_loss=first_loss,
          recent_loss=recent_loss,
      ),
      carry=_put(state.carry, answer.carry, worker, 1),
      teacher_carry=_put(state.teacher_carry, answer.teacher_carry, worker, 2),
  )
  return state, metrics
