"""One update of one replica, and one evaluation step; pure functions.

The only module that differentiates. What is static (model, optimiser, losses,
axis name) is closed over; arrays go in and come out, so jit, pmap and vmap are
the caller's choice.

Shape suffixes: B examples of this replica, C classes, P peers. A language
model has T tokens behind B; losses and weights then have shape (B, T).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import (
    blocks,
    jaxprs,
    losses,
    microbatches,
    peer_predictions,
)
from codistill_jax import metrics as metrics_lib
from codistill_jax.base import (
    Array,
    Batch,
    HeadOutputs,
    Metrics,
    Model,
    Outputs,
    PeerPredictions,
    PyTree,
    Teachers,
    TrainState,
    Variables,
    logits_of,
)

TrainStep = Callable[
    [TrainState, Batch, Teachers | PeerPredictions | None, Array],
    tuple[TrainState, Metrics],
]
EvalStep = Callable[
    [Variables, Batch, PyTree],
    tuple[dict[str, metrics_lib.Metric], PyTree],
]


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    rng: Array,
    batch: Batch,
    *,
    num_peers: int = 0,
    group_batch: int | None = None,
) -> TrainState:
  """The state before the first update.

  Args:
    model: The model of every group.
    tx: The optimiser.
    rng: Key, `jax.random.key(seed)` or `PRNGKey(seed)`; groups that should
      start from different parameters are given different keys.
    batch: Any batch of the task; only shapes and dtypes matter. One row of it
      is given to `model.init`: the whole may be larger than a device.
    num_peers: P, the length of the teachers' axis; 0 trains alone.
    group_batch: Rows of the whole group, if `batch` holds only some of them.

  Returns:
    A `TrainState` whose carries have one row for each row of the group batch.
  """
  rows = group_batch or len(jax.tree.leaves(dict(batch))[0])
  rng = jnp.asarray(rng)
  if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    # The state holds plain arrays, which can be copied, placed and saved.
    rng = jax.random.key_data(rng)
  row = jax.tree.map(lambda x: x[:1], dict(batch))
  return _init_of(model, tx, rows, num_peers)(rng, row)


# Compiled once for all groups and seeds of a process; a few models at a time.
@functools.lru_cache(maxsize=8)
def _init_of(
    model: Model, tx: optax.GradientTransformation, rows: int, num_peers: int
) -> Callable[[Array, dict], TrainState]:
  def init(rng: Array, batch: Batch) -> TrainState:
    init_rng, step_rng = jax.random.split(rng)
    variables = model.init(init_rng, batch)
    carry = model.init_carry(rows)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables.params),
        rng=step_rng,
        carry=carry,
        teacher_carry=_stack_copies(carry, num_peers),
    )

  return jax.jit(init)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    task_loss: Callable[[Array, Array], Array] = losses.task_loss,
    distill_loss: Callable[..., Array] = losses.cross_entropy,
    axis_name: str | None = None,
    fused: bool = True,
    teacher_model: Model | None = None,
    simulated_replicas: int = 1,
) -> TrainStep:
  """Builds the update of algorithm 1 of Anil et al. 2018.

  The objective is the mean over the examples of the whole group batch of
  `task + distill_weight * distill`, in float32, where `distill` compares the
  student with the mean probability of the teachers that are present. Examples
  with weight 0 (padding) count nowhere.

  Args:
    model: Pure functions of the model, shared by student and teachers.
    tx: The optimiser.
    task_loss: `(logits (B, C), labels (B,)) -> (B,)`.
    distill_loss: `(student (B, C), teachers (P, B, C), present (P,)) -> (B,)`.
    axis_name: The pmap axis of the replicas, or None for a single one.
    fused: Whether the losses of a model that returns `HeadOutputs` are
      computed over blocks of examples, see `blocks`, so that the logits never
      exist at once. The losses then see any number B of examples in a single
      axis, the tokens of a language model too. False: all logits at once.
    teacher_model: The same model, computed more cheaply, for the teachers (in
      bfloat16, say); default: `model`. It takes the same parameters.
    simulated_replicas: Into how many parts, one after another, a replica
      divides its rows (gradient accumulation); see `microbatches`. The update
      is that of so many times as many real replicas, to rounding.

  Returns:
    `train_step(state, batch, teachers, distill_weight) -> (state, metrics)`.
    With `teachers=None` (burn-in, or a group without peers) no teacher is
    evaluated and the metrics have no `loss/distill`. `state.rng` is never
    advanced: the step folds in `state.step` and the replica's index.
    With `PeerPredictions` none is evaluated either: the soft target is what
    the other groups of the program predict in the same step.
  """

  gradient = _gradient_of(
      model,
      teacher_model or model,
      _summed_losses(task_loss, distill_loss, fused),
  )

  def train_step(
      state: TrainState,
      batch: Batch,
      teachers: Teachers | PeerPredictions | None,
      distill_weight: Array,
  ) -> tuple[TrainState, Metrics]:
    weights = example_weights(batch)
    count = jnp.maximum(_psum(jnp.sum(weights), axis_name), 1e-9)
    shared = teachers, jnp.asarray(distill_weight, jnp.float32), count

    microbatches.check_model(model, state, batch, axis_name, simulated_replicas)

    def of_microbatch(
        state: TrainState, rows: tuple, index: Array
    ) -> microbatches.Accumulated:
      rng = lambda: _step_rng(state, axis_name, index, simulated_replicas)
      return gradient(state, *rows, rng, *shared)

    rows = batch, weights
    found = microbatches.accumulate(
        of_microbatch, state, rows, simulated_replicas
    )
    grads = _psum(found.grads, axis_name)
    sums = _psum(found.sums, axis_name)
    metrics = {key: x / count for key, x in sums.items()}
    metrics['optim/grad_norm'] = optax.tree.norm(grads)
    opt_updates, opt_state = tx.update(
        grads, state.opt_state, state.variables.params
    )
    params = optax.apply_updates(state.variables.params, opt_updates)
    return (
        TrainState(
            step=state.step + 1,
            variables=Variables(
                params, _pmean_floats(found.model_state, axis_name)
            ),
            opt_state=opt_state,
            rng=state.rng,
            carry=found.carry,
            teacher_carry=found.teacher_carry,
        ),
        metrics,
    )

  return train_step


def make_eval_step(
    model: Model, *, task_loss: Callable[[Array, Array], Array] | None = None
) -> EvalStep:
  """Builds `eval_step(variables, batch, carry) -> (sums, carry)`.

  The sums are metrics in the making: `eval/loss` (nats per example, of the task
  alone) and those of `metrics.quality`; add them over batches, then take their
  `number()`.
  """
  loss_fn = task_loss or losses.task_loss

  def qualities(
      logits: Array, teacher_logits: None, rows: tuple, shared: None
  ) -> tuple[float, dict[str, metrics_lib.Metric]]:
    del teacher_logits, shared
    logits, (labels, weights) = jnp.asarray(logits, jnp.float32), rows
    return 0.0, {
        'eval/loss': metrics_lib.mean(loss_fn(logits, labels), weights),
        **metrics_lib.quality(logits, labels, weights),
    }

  def eval_step(
      variables: Variables, batch: Batch, carry: PyTree
  ) -> tuple[dict[str, metrics_lib.Metric], PyTree]:
    outputs, updates = model.apply(variables, batch, carry, None, False)
    rows = batch['labels'], example_weights(batch)
    if isinstance(outputs, HeadOutputs):
      _, sums = blocks.summed(qualities, outputs, None, rows, None)
    else:
      _, sums = qualities(outputs, None, rows, None)
    return sums, updates.carry

  return eval_step


def example_weights(batch: Batch) -> jax.Array:
  """The batch's weights, or 1 for each example; float32, shaped as labels."""
  if 'weights' in batch:
    return jnp.asarray(batch['weights'], jnp.float32)
  return jnp.ones(np.shape(batch['labels']), jnp.float32)


def _weighted_sum(values: Array, weights: Array) -> jax.Array:
  # A loss of weight 0 is ignored, be it NaN: padding may hold any label. (Its
  # inputs must be finite: no mask helps the gradient of what is not.)
  return jnp.sum(jnp.where(weights == 0, 0.0, values) * weights)


def _check_carries(state: TrainState, teachers: Teachers) -> None:
  """Raises ValueError if the state was made for another number of peers."""
  if not jax.tree.leaves(state.carry):
    return
  made_for = max(map(len, jax.tree.leaves(state.teacher_carry)), default=0)
  num_peers = len(teachers.present_P)
  if made_for != num_peers:
    raise ValueError(
        f'the state has recurrent states for {made_for} teachers, but there'
        f' are {num_peers}; give init_state num_peers={num_peers}'
    )


def _gradient_of(
    model: Model, teacher_model: Model, summed_losses: Callable
) -> Callable[..., microbatches.Accumulated]:
  """What some rows add to a group's gradient, losses and statistics.

  Returns:
    `(state, batch, weights, rng, teachers, distill_weight, count) -> Part`, of
    rows that share a forward pass; `rng` makes the key for it.
  """

  def gradient(
      state: TrainState,
      batch: Batch,
      weights: Array,
      rng: Callable[[], Array],
      teachers: Teachers | PeerPredictions | None,
      distill_weight: Array,
      count: Array,
  ) -> microbatches.Accumulated:
    teaching, teacher_carry = teachers, state.teacher_carry
    if isinstance(teachers, Teachers):
      _check_carries(state, teachers)
      # Outside the differentiated function: no residual of a teacher is kept.
      outputs, teacher_carry = _teacher_outputs(
          teacher_model, teachers, batch, state.teacher_carry
      )
      teaching = outputs, teachers.present_P

    def objective(params: PyTree) -> tuple[Array, tuple]:
      outputs, updates = model.apply(
          state.variables.replace(params=params),
          batch,
          state.carry,
          rng(),
          True,
      )
      total, sums = summed_losses(
          outputs, batch['labels'], weights, teaching, distill_weight
      )
      # Divided by the count of the *group*: the sum of the replicas'
      # gradients is then the gradient of the group's mean, however padding
      # falls on the replicas.
      return total / count, (sums | {'loss/total': total}, updates)

    grads, (sums, updates) = jax.grad(objective, has_aux=True)(
        state.variables.params
    )
    return microbatches.Accumulated(
        grads, sums, updates.model_state, updates.carry, teacher_carry
    )

  return gradient


def _teacher_outputs(
    model: Model, teachers: Teachers, batch: Batch, carry_PB: PyTree
) -> tuple[Outputs, PyTree]:
  """Outputs (P, ...) of the teachers in eval mode, and their new carries.

  Of a model with a head the features, hidden states, rather than the logits.
  """

  def one(variables: Variables, carry: PyTree) -> tuple[Outputs, PyTree]:
    outputs, updates = model.apply(variables, batch, carry, None, False)
    return outputs, updates.carry

  many = jax.vmap(one)
  first = jax.tree.map(lambda x: x[0], (teachers.variables, carry_PB))
  if jaxprs.has_convolution(one, *first):
    # With a kernel for each teacher they would become grouped convolutions,
    # the slow ones: of three teachers on CPU they take seven times as long.
    many = lambda *args: jax.lax.map(lambda x: one(*x), args)
  return jax.lax.stop_gradient(many(teachers.variables, carry_PB))


def _summed_losses(
    task_loss: Callable[[Array, Array], Array],
    distill_loss: Callable[..., Array],
    fused: bool,
) -> Callable[..., tuple[jax.Array, Metrics]]:
  """The losses of a step from what student and teachers put out.

  Returns:
    `(outputs, labels, weights, teaching, distill_weight) -> (total, sums)`,
    where `teaching` is None, the teachers' outputs and presence (P,), or
    `PeerPredictions`.
  """

  def losses_of(
      logits: Array, teacher_logits: Array | None, rows: tuple, shared: tuple
  ) -> tuple[jax.Array, Metrics]:
    labels, weights = rows
    taught_by, distill_weight = shared
    total = _weighted_sum(task_loss(logits, labels), weights)
    sums = {'loss/task': total}
    if taught_by is None:
      return total, sums
    if isinstance(taught_by, PeerPredictions):
      distill = peer_predictions.peer_loss(distill_loss, logits, taught_by)
    else:
      distill = distill_loss(logits, teacher_logits, taught_by)
    sums['loss/distill'] = _weighted_sum(distill, weights)
    total += distill_weight * sums['loss/distill']
    return total, sums

  def summed(
      outputs: Outputs,
      labels: Array,
      weights: Array,
      teaching: tuple[Outputs, Array] | PeerPredictions | None,
      distill_weight: Array,
  ) -> tuple[jax.Array, Metrics]:
    teacher_outputs, taught_by = None, teaching
    if isinstance(teaching, tuple):
      teacher_outputs, taught_by = teaching
    rows, shared = (labels, weights), (taught_by, distill_weight)
    if fused and isinstance(outputs, HeadOutputs):
      return blocks.summed(losses_of, outputs, teacher_outputs, rows, shared)
    teacher_logits = None
    if teacher_outputs is not None:
      teacher_logits = jax.vmap(logits_of)(teacher_outputs)
    return losses_of(logits_of(outputs), teacher_logits, rows, shared)

  return summed


def _step_rng(
    state: TrainState,
    axis_name: str | None,
    part: int | Array,
    num_microbatches: int,
) -> Array:
  """The key of this step on this replica, real or simulated."""
  rng = jax.random.fold_in(state.rng, state.step)
  replica = 0 if axis_name is None else jax.lax.axis_index(axis_name)
  if num_microbatches > 1:
    # Numbered as real replicas would be, that have these rows.
    replica = replica * num_microbatches + part
  return jax.random.fold_in(rng, replica)


def _stack_copies(carry: PyTree, num_peers: int) -> PyTree:
  """The start of each teacher's carry (P, B, ...); () without peers."""
  if not num_peers:
    return ()
  return jax.tree.map(lambda x: jnp.stack([x] * num_peers), carry)


def _psum(tree: PyTree, axis_name: str | None) -> PyTree:
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _pmean_floats(tree: PyTree, axis_name: str | None) -> PyTree:
  """Averages running statistics; counters are the same on all replicas."""
  if axis_name is None:
    return tree
  return jax.tree.map(
      lambda x: (
          jax.lax.pmean(x, axis_name)
          if jnp.issubdtype(x.dtype, jnp.floating)
          else x
      ),
      tree,
  )
