"""One update of one replica, and one evaluation step; pure functions.

The only module that differentiates. What is static (model, optimiser, losses,
axis name) is bound once, in a `StepConfig`; arrays go in and come out, so jit,
pmap and vmap are the caller's choice. Read `update`, then `objective`.

Shape suffixes: B examples of this replica, C classes, P peers. A language
model has T tokens behind B; losses and weights then have shape (B, T).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import (
    blocks,
    jaxprs,
    losses,
    microbatches,
    optimizers,
    peer_predictions,
    programs,
)
from codistill_jax import metrics as metrics_lib
from codistill_jax.base import (
    REPLICA_AXIS,
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
    Updates,
    Variables,
    check_form,
    checked_batch,
    form_of,
    forward,
    is_typed_key,
    logits_of,
    with_keys,
    without_keys,
)

# What can go wrong in an update, in the order in which it does. What is wrong
# of `data` is so whatever the parameters are.
FAULTS = {
    'inputs': (
        'numbers in the inputs are not finite; clean the data, or give'
        ' such rows any finite inputs and the weight 0'
    ),
    'labels': (
        'labels are outside [0, C), the classes of the logits; count'
        ' classes from 0, or give labels to be ignored the weight 0'
    ),
    'weights': 'weights are negative or not finite; 0 is that of padding',
    'logits': (
        'logits or features of sound inputs are not finite: the'
        ' parameters were not, or the model overflows; lower the learning rate,'
        ' or look for inputs (as tokens) beyond the vocabulary of the model'
    ),
    'loss/task': (
        'task loss of finite logits is not finite; look at the task'
        ' loss and its labels'
    ),
    'loss/distill': (
        'distillation loss is not finite: look at what the'
        ' teachers predict, or lower the distill weight'
    ),
    'loss/total': 'distill weight is not finite',
    'gradient': (
        'gradient of a finite loss is not finite; lower the learning'
        ' rate or clip gradients'
    ),
}
_DATA_FAULTS = ('inputs', 'labels', 'weights')
_CODES = 16  # More than there are faults: a count and a code are one number.
_LARGEST_COUNT = 2.0**19  # So that float32 holds both.

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
  """Returns the state before the first update.

  Args:
    model: The model of every group.
    tx: The optimiser.
    rng: Key, `jax.random.key(seed)` of any generator or `PRNGKey(seed)`; groups
      that should start from different parameters are given different keys.
    batch: Any batch of the task; only shapes and dtypes matter. One row of it
      is given to `model.init`: the whole may be larger than a device.
    num_peers: P, the length of the teachers' axis; 0 trains alone.
    group_batch: Rows of the whole group, if `batch` holds only some of them.

  Returns:
    A `TrainState` whose carries have one row for each row of the group batch.

  Raises:
    ValueError: If the key is none, if the state of the model holds a typed one,
      or if the optimiser asks for what an update does not have.
  """
  _check_parts(model=model, tx=tx)
  rows = group_batch or len(jax.tree.leaves(checked_batch(batch))[0])
  rng = _checked_key(rng)
  row = jax.tree.map(lambda x: x[:1], dict(batch))
  return _init_of(model, tx, rows, num_peers)(rng, row)


# Compiled once for all groups and seeds of a process; a few models at a time.
@functools.lru_cache(maxsize=8)
def _init_of(
    model: Model, tx: optax.GradientTransformation, rows: int, num_peers: int
) -> Callable[[Array, dict], TrainState]:
  def init(rng: Array, batch: Batch) -> TrainState:
    init_rng, step_rng = jax.random.split(rng)
    if jax.random.key_impl(rng) == jax.config.jax_default_prng_impl:
      step_rng = jax.random.key_data(step_rng)
    variables = model.init(init_rng, batch)
    if not isinstance(variables, Variables):
      raise ValueError(
          'Model.init returns Variables(params, model_state), got'
          f' {form_of(variables)}'
      )
    carry = model.init_carry(rows)
    for path, x in jax.tree.leaves_with_path((variables, carry)):
      if is_typed_key(x):
        raise ValueError(
            f'the model holds a typed random key at'
            f' {jax.tree_util.keystr(path[1:])}; hold'
            ' jax.random.key_data of it, or take the key that apply is given'
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizers.init(tx, variables.params),
        rng=without_keys(step_rng),
        carry=carry,
        teacher_carry=_stack_copies(carry, num_peers),
    )

  return programs.shared(jax.jit(init))


def _checked_key(rng: Array) -> Array:
  """Returns a single key, typed or of `PRNGKey`; else raises ValueError."""
  plain = jax.eval_shape(jax.random.PRNGKey, 0)
  is_plain = (np.shape(rng), getattr(rng, 'dtype', '')) == (
      plain.shape,
      plain.dtype,
  )
  if not is_plain and not (is_typed_key(rng) and not rng.shape):
    raise ValueError(
        f'rng: expected one random key, got {form_of(rng)}; give'
        ' jax.random.key(seed), or a jax.random.PRNGKey(seed) of the generator'
        f' that jax has by default ({jax.config.jax_default_prng_impl})'
    )
  return jnp.asarray(rng)


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What is static in an update; see `make_train_step`."""

  model: Model
  tx: optax.GradientTransformation
  task_loss: Callable[[Array, Array], Array]
  distill_loss: Callable[..., Array]
  axis_name: str | None
  fused: bool
  fused_bytes: int | None
  teacher_model: Model
  simulated_replicas: int


class TeacherSignal(NamedTuple):
  """What an update learns from besides its labels.

  Attributes:
    outputs: Of the teachers, (P, ...); None without, or of `PeerPredictions`.
    by: Presence of the teachers (P,), or `PeerPredictions`; None for nobody.
    distill_weight: Factor of the distillation loss, float32.
  """

  outputs: Outputs | None
  by: Array | PeerPredictions | None
  distill_weight: Array


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    task_loss: Callable[[Array, Array], Array] = losses.task_loss,
    distill_loss: Callable[..., Array] = losses.cross_entropy,
    axis_name: str | None = None,
    fused: bool = True,
    fused_bytes: int | None = None,
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
    fused_bytes: Temporary memory that these blocks may take: the largest that
      fit. None: those that are fastest.
    teacher_model: The same model, computed more cheaply, for the teachers (in
      bfloat16, say); default: `model`. It takes the same parameters.
    simulated_replicas: Into how many parts, one after another, a replica
      divides its rows (gradient accumulation); see `microbatches`. The update
      is that of so many times as many real replicas, to rounding.

  Returns:
    `train_step(state, batch, teachers, distill_weight) -> (state, metrics)`,
    which is `update`. With `teachers=None` (burn-in, or a group without peers)
    no teacher is evaluated and the metrics have no `loss/distill`. `state.rng`
    is never advanced: the step folds in `state.step` and the replica's index.
    With `PeerPredictions` none is evaluated either: the soft target is what
    the other groups of the program predict in the same step.
  """
  _check_parts(
      tx=tx, task_loss=task_loss, distill_loss=distill_loss, model=model
  )
  if teacher_model is not None:
    _check_parts(model=teacher_model)
  if type(simulated_replicas) is not int or simulated_replicas < 1:
    raise ValueError(
        f'simulated_replicas={simulated_replicas!r}; set it to a whole number'
        ' of at least 1'
    )
  if fused_bytes is not None and type(fused_bytes) is not int:
    raise ValueError(
        f'fused_loss_bytes={fused_bytes!r}; set it to a whole number of bytes,'
        ' or to None for the blocks that are fastest'
    )
  config = StepConfig(
      model,
      tx,
      task_loss,
      distill_loss,
      axis_name,
      fused,
      fused_bytes,
      teacher_model or model,
      simulated_replicas,
  )
  return functools.partial(update, config)


def update(
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    teachers: Teachers | PeerPredictions | None,
    distill_weight: Array,
) -> tuple[TrainState, Metrics]:
  """Updates one replica: algorithm 1 of Anil et al. 2018, one step of it.

  Args:
    config: What is static.
    state: Before the update.
    batch: Rows of this replica, (B, ...).
    teachers: As `make_train_step` says.
    distill_weight: Factor of the distillation loss.

  Returns:
    The state after it, and metrics over the whole group batch: `loss/task`,
    `loss/distill` (with teachers), `loss/total`, `optim/grad_norm`, and
    `optim/fault`: 0, or what was first not finite; see `fault_of`.

  Raises:
    ValueError: While it is traced, if parts, shapes or dtypes do not fit.
  """
  axis_name, simulated = config.axis_name, config.simulated_replicas
  _check_axis(axis_name)
  if not isinstance(state, TrainState):
    raise ValueError(f'Expected a TrainState, got {form_of(state)}')
  if not isinstance(teachers, Teachers | PeerPredictions | None):
    raise ValueError(
        'teachers must be Teachers (stacked Variables and presence),'
        f' PeerPredictions or None, got {form_of(teachers)}'
    )
  weights = example_weights(batch)
  count = _psum(jnp.sum(weights), axis_name)
  count = jnp.where(count == 0, 1.0, count)  # Then all sums are 0, too.
  distill_weight = jnp.asarray(distill_weight, jnp.float32)
  microbatches.check_model(config.model, state, batch, axis_name, simulated)
  found = microbatches.accumulate(
      functools.partial(_gradient, config, teachers, distill_weight, count),
      state,
      (batch, weights),
      simulated,
  )
  grads = _psum(found.grads, axis_name)
  sums = _psum(found.sums, axis_name)
  faults = sums.pop('faults')
  metrics = {key: x / count for key, x in sums.items()}
  metrics['optim/grad_norm'] = _norm(grads)
  metrics['optim/fault'] = _fault(faults, metrics)
  params, opt_state = optimizers.update(
      config.tx,
      grads,
      state.opt_state,
      state.variables.params,
      metrics['loss/total'],
  )
  check_form('opt_state', state.opt_state, opt_state)
  after = TrainState(
      step=state.step + 1,
      variables=Variables(params, _pmean_floats(found.model_state, axis_name)),
      opt_state=opt_state,
      rng=state.rng,
      carry=found.carry,
      teacher_carry=found.teacher_carry,
  )
  return after, metrics


def objective(
    params: PyTree,
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    weights: Array,
    rng: Array,
    teaching: TeacherSignal,
    count: Array,
) -> tuple[Array, tuple[Metrics, Updates]]:
  """Returns the share of some rows in the objective of the whole group.

  Args:
    params: What is differentiated; those of `state` are not looked at.
    config: What is static.
    state: With the carries of these rows.
    batch: Rows that share a forward pass, (B, ...).
    weights: Of the examples, shaped as the labels.
    rng: Key of that pass.
    teaching: What they learn from besides the labels.
    count: Total weight of the *group*. The sum of the replicas' gradients is
      then the gradient of the group's mean, however padding falls on them.

  Returns:
    The share, the sums of losses over the rows, and what the model updates.
  """
  variables = state.variables.replace(params=params)
  outputs, updates = forward(
      config.model, variables, batch, state.carry, rng, True
  )
  losses_of = functools.partial(
      _summed_losses, config.task_loss, config.distill_loss
  )
  rows = batch['labels'], weights
  taught = teaching.outputs
  shared = teaching.by, teaching.distill_weight
  if config.fused and isinstance(outputs, HeadOutputs):
    total, sums = blocks.summed(
        losses_of, outputs, taught, rows, shared, most_bytes=config.fused_bytes
    )
  else:
    if taught is not None:
      taught = jax.vmap(logits_of)(taught)
    total, sums = losses_of(logits_of(outputs), taught, rows, shared)
  sums |= {'loss/total': total, 'faults': _count_faults(config, batch, outputs)}
  return total / count, (sums, updates)


def make_eval_step(
    model: Model,
    *,
    task_loss: Callable[[Array, Array], Array] | None = None,
    metrics: Sequence[Callable[..., metrics_lib.Metric]] = (),
) -> EvalStep:
  """Builds `eval_step(variables, batch, carry) -> (sums, carry)`.

  The sums are metrics in the making: `eval/loss` (nats per example, of the task
  alone) and those of `metrics.quality`, with `metrics` of your own; add them
  over batches, then take their `number()`.
  """
  loss_fn = task_loss or losses.task_loss
  _check_parts(model=model, task_loss=loss_fn)

  def qualities(
      logits: Array, teacher_logits: Array | None, rows: Any, shared: Any
  ) -> tuple[Any, dict[str, metrics_lib.Metric]]:
    del teacher_logits, shared
    logits, (labels, weights) = jnp.asarray(logits, jnp.float32), rows
    return 0.0, {
        'eval/loss': metrics_lib.mean(loss_fn(logits, labels), weights),
        **metrics_lib.quality(logits, labels, weights, metrics),
    }

  def eval_step(
      variables: Variables, batch: Batch, carry: PyTree
  ) -> tuple[dict[str, metrics_lib.Metric], PyTree]:
    outputs, updates = forward(model, variables, batch, carry, None, False)
    rows = batch['labels'], example_weights(batch)
    if isinstance(outputs, HeadOutputs):
      _, sums = blocks.summed(qualities, outputs, None, rows, None)
    else:
      _, sums = qualities(outputs, None, rows, None)
    return sums, updates.carry

  return eval_step


def example_weights(batch: Batch) -> jax.Array:
  """Returns the batch's weights, or 1 for each example: float32, as labels.

  One that is negative or no number is NaN, so that the loss is.

  Raises:
    ValueError: If there are no labels, or weights of another shape.
  """
  labels: Any = checked_batch(batch).get('labels')
  if not hasattr(labels, 'shape'):
    raise ValueError(
        f"Expected a batch with 'labels', an array, got {form_of(batch)}"
    )
  if 'weights' not in batch:
    return jnp.ones(np.shape(labels), jnp.float32)
  weights = batch['weights']
  real = not jnp.iscomplexobj(weights)
  if getattr(weights, 'shape', None) != labels.shape or not real:
    raise ValueError(
        'Expected one weight for each label, got weights'
        f' {form_of(weights)} and labels {form_of(labels)}; give them one shape'
    )
  weights = jnp.asarray(weights, jnp.float32)
  return jnp.where((weights >= 0) & (weights < jnp.inf), weights, jnp.nan)


def fault_of(metrics: Metrics) -> tuple[str, str]:
  """Returns what was first not finite in an update, and a sentence on it.

  Args:
    metrics: Of a train step; reading them waits for the update.

  Returns:
    A key of `FAULTS`, and which, how many, and what to do; '' and '' if loss
    and gradient are finite. Of a step without `optim/fault`, a key of metrics.
  """
  code = int(float(metrics.get('optim/fault', 0)))
  if code:
    name = list(FAULTS)[code % _CODES - 1]
    count = f'{code // _CODES} ' if code // _CODES else 'the '
    return name, f'{count}{FAULTS[name]}'
  for key in ('loss/total', 'optim/grad_norm'):
    if key in metrics and not np.isfinite(value := float(metrics[key])):
      return key, f'{key} is {value}; lower the learning rate'
  return '', ''


def fault_error(name: str, said: str) -> Exception:
  """Returns what to raise of a fault: data that are wrong did not diverge."""
  return (ValueError if name in _DATA_FAULTS else FloatingPointError)(said)


def _count_faults(
    config: StepConfig, batch: Batch, outputs: Outputs
) -> jax.Array:
  """Counts what is wrong of the data and outputs of some rows, by `FAULTS`."""
  count = lambda wrong: jnp.sum(wrong, dtype=jnp.float32)
  rest = {k: x for k, x in batch.items() if k not in ('labels', 'weights')}
  inputs = sum(
      count(~jnp.isfinite(x))
      for x in jax.tree.leaves(rest)
      if jnp.issubdtype(jnp.result_type(x), jnp.floating)
  )
  weights, labels = example_weights(batch), jnp.asarray(batch['labels'])
  if isinstance(outputs, HeadOutputs):
    said, classes = outputs.features, outputs.bias.shape[0]
  elif outputs.shape == labels.shape:
    said, classes = outputs, 2  # One logistic output.
  else:
    said, classes = outputs, outputs.shape[-1]
  # A loss of somebody else may know what to do with other numbers.
  own = getattr(config.task_loss, 'func', config.task_loss)
  wrong = ~jnp.isfinite(labels)
  if own is losses.sigmoid_task_loss or labels.dtype.kind in 'iub':
    wrong = ~((labels >= 0) & (labels.astype(jnp.float32) <= classes - 1))
  # A logit of minus infinity is that of a padded class.
  odd = jnp.isnan(said) | (said == jnp.inf)
  counts = inputs, wrong & (weights != 0), jnp.isnan(weights), odd
  return jnp.stack([count(x) for x in counts])


def _norm(grads: PyTree) -> jax.Array:
  """Returns the norm of all gradients together."""
  if jax.default_backend() == 'cpu':
    # Else XLA's CPU backend writes the squares, as Adam wants them as well, and
    # reads them again; behind a barrier it sums as it squares.
    grads = jax.lax.optimization_barrier(grads)
  return optax.tree.norm(grads)


def _fault(counts: Array, metrics: Metrics) -> jax.Array:
  """Returns the first of `FAULTS` and how many, in one number; 0 for none."""
  values = [metrics.get(key, jnp.float32(0)) for key in list(FAULTS)[4:7]]
  values.append(metrics['optim/grad_norm'])
  odd = [~jnp.isfinite(x) for x in values]
  first = jnp.argmax(jnp.concatenate([counts > 0, jnp.stack(odd)]))
  count = jnp.pad(counts, (0, len(odd)))[first]
  code = _CODES * jnp.minimum(count, _LARGEST_COUNT) + first + 1
  return jnp.where(odd[2] | odd[3], code, 0.0).astype(jnp.float32)


def _check_axis(axis_name: str | None) -> None:
  try:
    if axis_name is not None:
      jax.lax.axis_size(axis_name)
  except NameError as e:
    raise ValueError(
        f'make_train_step(axis_name={axis_name!r}) makes a step that sums over'
        ' that axis, and there is none; run it in a PmapStep, whose axis is'
        f' {REPLICA_AXIS!r}, or leave axis_name out'
    ) from e


def _check_parts(**parts: Any) -> None:
  """Raises ValueError if an argument is no model, optimiser or loss."""
  for name, part in parts.items():
    if name == 'model' and not isinstance(part, Model):
      raise ValueError(
          f'Expected a Model, got {type(part).__name__}; wrap a flax.linen'
          ' module by from_linen(module)'
      )
    if name == 'tx' and not callable(getattr(part, 'update', None)):
      raise ValueError(
          f'tx={part!r} is no optimiser; give an optax transformation, such as'
          ' optax.adam(1e-3)'
      )
    if name.endswith('loss') and not callable(part):
      raise ValueError(
          f'{name}={part!r} is no function; give one of codistill_jax.losses,'
          ' such as losses.DISTILL_LOSSES[name]'
      )


def _weighted_sum(values: Array, weights: Array) -> jax.Array:
  if jnp.shape(values) != weights.shape:
    raise ValueError(
        f'Expected a loss for each label, of shape {weights.shape}, got'
        f' {form_of(values)}'
    )
  # A loss of weight 0 is ignored, be it NaN: padding may hold any label. (Its
  # inputs must be finite: no mask helps the gradient of what is not.)
  return jnp.sum(jnp.where(weights == 0, 0.0, values) * weights)


def _gradient(
    config: StepConfig,
    teachers: Teachers | PeerPredictions | None,
    distill_weight: Array,
    count: Array,
    state: TrainState,
    rows: tuple[Batch, Array],
    index: int | Array,
) -> microbatches.Accumulated:
  """Returns what microbatch `index` adds to gradient, losses, statistics."""
  batch, weights = rows
  outputs, taught_by, teacher_carry = None, teachers, state.teacher_carry
  if isinstance(teachers, Teachers):
    _check_carries(state, teachers)
    # Outside the differentiated function: no residual of a teacher is kept.
    outputs, teacher_carry = _teacher_outputs(
        config.teacher_model, teachers, batch, state.teacher_carry
    )
    taught_by = teachers.present_P
  grads, (sums, updates) = jax.grad(objective, has_aux=True)(
      state.variables.params,
      config,
      state,
      batch,
      weights,
      _step_rng(state, config, index),
      TeacherSignal(outputs, taught_by, distill_weight),
      count,
  )
  return microbatches.Accumulated(
      grads, sums, updates.model_state, updates.carry, teacher_carry
  )


def _summed_losses(
    task_loss: Callable[[Array, Array], Array],
    distill_loss: Callable[..., Array],
    logits: Array,
    teacher_logits: Array | None,
    rows: tuple[Array, Array],
    shared: tuple[Array | PeerPredictions | None, Array],
) -> tuple[jax.Array, Metrics]:
  """Sums the losses of a block of rows: a `blocks.BlockLoss`, once bound."""
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
  return total + distill_weight * sums['loss/distill'], sums


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


def _teacher_outputs(
    model: Model, teachers: Teachers, batch: Batch, carry_PB: PyTree
) -> tuple[Outputs, PyTree]:
  """Outputs (P, ...) of the teachers in eval mode, and their new carries.

  Of a model with a head the features, hidden states, rather than the logits.
  """

  def one(variables: Variables, carry: PyTree) -> tuple[Outputs, PyTree]:
    outputs, updates = forward(model, variables, batch, carry, None, False)
    return outputs, updates.carry

  many = jax.vmap(one)
  first = jax.tree.map(lambda x: x[0], (teachers.variables, carry_PB))
  if jaxprs.has_convolution(one, *first):
    # With a kernel for each teacher they would become grouped convolutions,
    # the slow ones: of three teachers on CPU they take seven times as long.
    many = lambda *args: jax.lax.map(lambda x: one(*x), args)
  return jax.lax.stop_gradient(many(teachers.variables, carry_PB))


def _step_rng(
    state: TrainState, config: StepConfig, index: int | Array
) -> Array:
  """The key of this step on this replica, real or simulated."""
  rng = jax.random.fold_in(with_keys(state.rng), state.step)
  replica = 0
  if config.axis_name is not None:
    replica = jax.lax.axis_index(config.axis_name)
  if config.simulated_replicas > 1:
    # Numbered as real replicas would be, that have these rows.
    replica = replica * config.simulated_replicas + index
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
