"""What one run trains, as one record that gin fills: the root of every config.

experiment.Experiment.task = @text.language_model_task()
experiment.Experiment.model = @lstm.language_model
experiment.Experiment.optimizer = @optax.adam()
"""

import bisect
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import (
    losses,
    one_program,
    optimizers,
    programs,
    replicas,
    schedules,
    step,
)
from codistill_jax.base import (
    Array,
    Batch,
    Model,
    PyTree,
    Stream,
    Task,
    TrainState,
    Variables,
    logits_of,
)
from codistill_jax.baselines.method import Method, SynchronousSgd
from codistill_jax.exchange.kinds import Checkpoints, Kind
from codistill_jax.metrics import Metric
from codistill_jax.writers import Source, Writer

_COUNTS = (
    'num_steps',
    'group_batch',
    'simulated_replicas',
    'log_every',
    'eval_every',
    'eval_batch',
    'checkpoint_every',
)
_FAR = 10**9  # Beyond the last step of any run.

_RENAMED = {
    'checkpoints': '@exchange.Checkpoints()',
    'predictions': '@exchange.Predictions()',
    'fixed': '@exchange.FixedTeachers()',
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The configuration of a run; the same for all of its groups.

  Attributes:
    task: Data; see `base.Task`.
    model: `model(num_classes, **task.model_arguments) -> base.Model`.
    optimizer: An optax transformation.
    method: How a group updates, see `baselines`; None: synchronous SGD.
    distill_weight: Step -> weight of the distillation loss; see
      `schedules.distill_weight`.
    distill_loss: Name in `losses.DISTILL_LOSSES`; or a function, as there.
    distill_target: 'mean', one loss towards the peers' mean prediction; or
      'each', the mean of a loss towards each peer; see `losses.towards`.
    label_smoothing: Share of each target, in [0, 1), that training takes from
      the label; evaluation does not.
    smoothing_distribution: What gets it: 'uniform', all classes alike; or
      'unigram', in proportion to their frequencies in the training split.
    fused_loss: Whether the losses of a language model are computed over blocks
      of tokens, see `blocks`; False: all logits at once, for comparison.
    fused_loss_bytes: Temporary memory that these blocks may take in training,
      the largest that fit; None: those that are fastest.
    num_steps: Updates of each group.
    group_batch: Examples (rows, for a language model) per update of one group.
    simulated_replicas: Replicas that each device stands for, one after another
      (gradient accumulation); see `microbatches`.
    seed: Of parameters; group g starts from `fold_in(seed, g)`.
    data_seed: Of the order of the training data, in place of the task's.
    exchange: What groups give each other: `Checkpoints`, their parameters now
      and then; `Predictions` of the same batch in every step; `FixedTeachers`,
      nothing, all learn from runs that have ended. See `exchange.kinds`.
    log_every: Steps between records of training metrics.
    eval_every: Steps between validation passes; there is one at the end too.
    eval_batch: Rows of a validation batch.
    checkpoint_every: Steps between resume checkpoints.
    metrics: Of evaluations, besides those that are always there: functions
      `f(logits, labels, weights)`, see `metrics.quality`.
    writers: Where metrics go besides files and terminal: functions or classes
      that make a `writers.Writer` of a `writers.Source`.
  """

  task: Task
  model: Callable[..., Model]
  optimizer: optax.GradientTransformation
  method: Method | None = None
  distill_weight: Callable[[int], float] = dataclasses.field(
      default_factory=schedules.distill_weight
  )
  distill_loss: str | Callable[..., jax.Array] = 'cross_entropy'
  distill_target: str = 'mean'
  label_smoothing: float = 0.0
  smoothing_distribution: str = 'uniform'
  fused_loss: bool = True
  fused_loss_bytes: int | None = None
  num_steps: int = 1000
  group_batch: int = 128
  simulated_replicas: int = 1
  seed: int = 0
  data_seed: int | None = None
  exchange: Kind = dataclasses.field(default_factory=Checkpoints)
  log_every: int = 20
  eval_every: int = 200
  eval_batch: int = 128
  checkpoint_every: int = 200
  metrics: Sequence[Callable[..., Metric]] = ()
  writers: Sequence[Callable[[Source], Writer]] = ()

  def __post_init__(self):
    _check(self)

  @property
  def distillation(self) -> Callable[..., jax.Array]:
    """Returns the distillation loss of a step."""
    return losses.towards(
        self.distill_target,
        losses.distill_loss(self.distill_loss, self.task.output),
    )


def method_of(experiment: Experiment) -> Method:
  """Returns how a group updates."""
  return experiment.method or SynchronousSgd()


def in_lockstep(experiment: Experiment) -> Experiment:
  """Returns the experiment as a function of its seeds alone."""
  return dataclasses.replace(
      experiment, exchange=experiment.exchange.in_lockstep()
  )


def check_group_batch(experiment: Experiment, num_replicas: int) -> None:
  """Raises ValueError if the replicas cannot share the rows of an update."""
  rows, simulated = experiment.group_batch, experiment.simulated_replicas
  if simulated > 1:
    replicas.check_group_batch(rows, num_replicas, simulated)
  else:
    method_of(experiment).check(rows, num_replicas)


def make_model(experiment: Experiment) -> Model:
  """Returns the model of every group.

  Raises:
    ValueError: If it is none.
  """
  task = experiment.task
  model = experiment.model(task.num_classes, **task.model_arguments)
  if not isinstance(model, Model):
    raise ValueError(
        f'Experiment.model gave a {type(model).__name__}, expected a'
        ' base.Model; make one of a flax.linen module by from_linen(module)'
    )
  return model


def make_teacher_model(experiment: Experiment) -> Model | None:
  """Returns the model in the dtype of teachers; None if no cheaper."""
  takes = inspect.signature(experiment.model).parameters
  dtype = experiment.exchange.teacher_dtype
  if dtype == 'float32' or 'dtype' not in takes:
    return None
  task = experiment.task
  return experiment.model(task.num_classes, dtype=dtype, **task.model_arguments)


def train_stream(
    experiment: Experiment,
    group_id: int,
    num_groups: int,
    rows: slice | None = None,
) -> Stream:
  """Returns the training batches of one group; see `Task.train_stream`.

  Each is checked to be a mapping of as many rows as were asked for.
  """
  return _train_stream(experiment, group_id, num_groups, rows)


def _train_stream(
    experiment: Experiment,
    group_id: int,
    num_groups: int,
    rows: slice | None,
    or_all: bool = False,
) -> Stream:
  given = {} if experiment.data_seed is None else {'seed': experiment.data_seed}

  def make(group_batch: int, rows: slice | None) -> Stream:
    with naming('Task.train_stream cannot be called'):
      stream = experiment.task.train_stream(
          group_id=group_id,
          num_groups=num_groups,
          group_batch=group_batch,
          rows=rows,
          **given,
      )
    if not callable(getattr(stream, 'batch', None)):
      raise ValueError(
          f'Task.train_stream gave a {type(stream).__name__}, expected an'
          ' object whose batch(step) is the batch of that update'
      )
    expected = len(range(group_batch)[rows or slice(None)])
    return _CheckedStream(
        stream, {expected, group_batch if or_all else expected}
    )

  return method_of(experiment).train_stream(
      make,
      group_batch=experiment.group_batch,
      num_steps=experiment.num_steps,
      rows=rows,
  )


class _CheckedStream(NamedTuple):
  """A stream whose batches have as many rows as were asked for."""

  stream: Stream
  rows: set[int]

  def batch(self, step: int) -> Batch:
    return check_batch(
        self.stream.batch(step), self.rows, f'the training batch of step {step}'
    )


def check_batch(batch: Any, rows: set[int], what: str) -> Batch:
  """Returns a batch; raises ValueError unless it has one of these sizes."""
  if not isinstance(batch, Mapping) or 'labels' not in batch:
    found = type(batch).__name__
    if isinstance(batch, Mapping):
      found += f' of {", ".join(map(str, batch)) or "nothing"}'
    raise ValueError(
        f"{what} is a {found}, expected a mapping of arrays with 'labels'"
    )
  for path, x in jax.tree.leaves_with_path(dict(batch)):
    if np.ndim(x) == 0 or len(x) not in rows:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
          f'{what}: {name} has shape {np.shape(x)}, expected {max(rows)} rows;'
          ' a stream gives the rows that it is asked for, and eval_batches pads'
          ' the last batch with weights of 0'
      )
  return batch


def split_batches(
    task: Task, split: str, batch_size: int, data: str | None = None
) -> Sequence[Batch]:
  """Returns the batches of the 'validation' or 'test' split, in order.

  Args:
    task: The data of a run.
    split: Of these, or of `data`.
    batch_size: Rows of each batch.
    data: Another data set, see `Task.other_data`.

  Raises:
    FileNotFoundError, ValueError: If there is no such split, it can be read but
      once, or the other data do not fit the task.
  """
  splits = {'validation': task.eval_batches, 'test': task.test_batches}
  if data is not None:
    if task.other_data is None:
      raise ValueError(
          f'the task {task.identity.get("task", task.description)} reads no'
          f' other data, got {data!r}; text, tables, Criteo and images do'
      )
    splits = {split: task.other_data(data, split)}
  batches_of = splits.get(split)
  if batches_of is None:
    raise ValueError(
        f'the task has no {split} split; it has:'
        f' {", ".join(name for name, batches in splits.items() if batches)}'
    )
  batches = batches_of(batch_size)
  if not hasattr(batches, '__len__') or not hasattr(batches, '__getitem__'):
    raise ValueError(
        f'the {split} batches of the task are a {type(batches).__name__}, which'
        ' can be read but once, and a run evaluates many times; return a'
        ' sequence, such as a list'
    )
  return batches


def first_row(experiment: Experiment, num_groups: int) -> Batch:
  """Returns the first row of group 0's first batch, for its shapes.

  The whole batch may be many gigabytes, and take a minute to decode.
  """
  with naming('the first training batch cannot be made'):
    # A stream for one process alone may look at no `rows`.
    stream = _train_stream(experiment, 0, num_groups, slice(0, 1), or_all=True)
    return jax.tree.map(lambda x: x[:1], dict(stream.batch(0)))


def check_evaluation(
    experiment: Experiment, model: Model, variables: Variables
) -> None:
  """Traces an evaluation of the first validation batch.

  Raises:
    ValueError: One line, if there is none, or if what the model makes of it
      does not fit its labels.
  """
  task, rows = experiment.task, experiment.eval_batch
  batches = split_batches(task, 'validation', rows)
  if not len(batches):
    raise ValueError('the task has no validation batch; it needs one at least')
  batch = dict(check_batch(batches[0], {rows}, 'the first validation batch'))
  args = variables, batch, model.init_carry(rows)
  with naming('the evaluation cannot be traced'):
    jax.eval_shape(make_eval_step(experiment, model), *args)
    logits = jax.eval_shape(
        lambda *args: logits_of(model.apply(*args, None, False)[0]), *args
    )
  labels = np.shape(batch['labels'])
  expected = labels
  if task.output == 'softmax':
    expected = (*labels, max(task.num_classes, logits.shape[-1]))
  if logits.shape != expected:
    raise ValueError(
        f'the model gives logits of shape {logits.shape} for labels of shape'
        f' {labels}, expected {expected}, as the task has num_classes='
        f"{task.num_classes} and output='{task.output}'"
    )


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
  """Makes one line of what code of a user's own raises inside.

  Raises:
    ValueError: Which names the part, in place of what was raised; `OSError`
      and `ValueError` say enough themselves.
  """
  try:
    yield
  except (OSError, ValueError):
    raise
  except Exception as e:
    reason = ' '.join(str(e).split('\n\n')[0].split())
    raise ValueError(f'{what}: {type(e).__name__}: {reason}') from e


def idle_settings(
    experiment: Experiment, num_groups: int, params: PyTree
) -> list[str]:
  """Returns which numbers act nowhere, or early alone, a text for each.

  Args:
    experiment: The configuration.
    num_groups: G.
    params: Of the model, numpy arrays; a few numbers of each are looked at.
  """
  last, exchange = experiment.num_steps, experiment.exchange
  found, ours = [], {f.name: f for f in dataclasses.fields(experiment)}
  if exchange.one_program or exchange.num_teachers(0, num_groups):
    weight = experiment.distill_weight
    # A weight of 0 for ever is meant.
    if not any(map(weight, range(last))) and weight(_FAR):
      begin = bisect.bisect_left(range(_FAR), True, key=lambda n: weight(n) > 0)
      found.append(f'distillation begins (distill_weight) at step {begin}')
    first = (exchange.every or 0) + getattr(exchange, 'staleness', 0)
    if not exchange.one_program and first >= last:
      found.append(f'the first exchange (exchange.every) is at step {first}')
  for name in ('log_every', 'eval_every', 'checkpoint_every'):
    value = getattr(experiment, name)
    if value > last and value != ours[name].default:
      found.append(f'{name} = {value}')
  for name in ('ramp_up_steps', 'inner_steps'):
    value = getattr(experiment.method, name, 0)
    if value > last:
      found.append(f'{type(experiment.method).__name__}.{name} = {value}')
  # An optimiser may refuse the little that is left of the parameters.
  with contextlib.suppress(ValueError):
    end = _last_change(experiment.optimizer, params, last)
    if end is not None:
      found.append(f'the optimiser changes nothing from step {end} on')
  return found


_QUICK_TO_COMPILE = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
}


def _last_change(
    tx: optax.GradientTransformation, params: PyTree, num_steps: int
) -> int | None:
  """Returns from where on updates are 0 until the end, if that is long."""
  params = jax.tree.map(lambda x: x[(slice(0, 1),) * np.ndim(x)], params)
  grads = jax.tree.map(np.ones_like, params)
  state = optimizers.init(tx, params)

  @functools.cache
  def change(step: int) -> float:
    """Returns the largest change where schedules have come so far."""
    at = jax.tree.map_with_path(
        lambda path, x: (
            np.full_like(x, step)
            if jax.tree_util.keystr(path).endswith('.count')
            else x
        ),
        state,
    )
    return float(largest(at))

  @functools.partial(jax.jit, compiler_options=_QUICK_TO_COMPILE)
  def largest(at: PyTree) -> jax.Array:
    after, _ = optimizers.update(tx, grads, at, params, np.float32(1))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after, params)
    return jnp.stack(jax.tree.leaves(moved)).max()

  begin = (0, 1, 2, num_steps // 100, num_steps // 4)
  still = lambda step: change(step) <= 1e-6 * max(map(change, begin))
  # A few of them: some optimisers move in each k-th step alone.
  tail = range(num_steps - max(num_steps // 20, 1), num_steps)[:9]
  moving = [n for n in begin if not still(n)]
  if not moving or not all(map(still, (num_steps - 1, *tail))):
    return None
  return bisect.bisect_left(range(num_steps), True, lo=max(moving), key=still)


def init_state(
    experiment: Experiment,
    model: Model,
    rng: Array,
    row: Batch,
    *,
    num_peers: int,
    variables: Variables | None = None,
) -> TrainState:
  """Returns the state of a group before its first update.

  Args:
    experiment: The configuration.
    model: Its model.
    rng: Of this group.
    row: A row of its data.
    num_peers: P.
    variables: What it begins with; None: random ones.
  """
  with naming('the model or the optimiser cannot be started on a batch'):
    state = step.init_state(
        model,
        experiment.optimizer,
        rng,
        row,
        num_peers=num_peers,
        group_batch=experiment.group_batch,
    )
  if variables is not None:
    init = functools.partial(optimizers.init, experiment.optimizer)
    state = state.replace(
        variables=variables, opt_state=jax.jit(init)(variables.params)
    )
  return method_of(experiment).init_state(experiment.optimizer, state)


def make_eval_step(experiment: Experiment, model: Model) -> step.EvalStep:
  """Returns the evaluation step of the task, jitted."""
  return _eval_step(experiment.task.output, model, tuple(experiment.metrics))


# Compiled once for all groups and runs of a process.
@functools.lru_cache(maxsize=4)
def _eval_step(
    output: str, model: Model, metrics: tuple[Callable[..., Metric], ...]
) -> step.EvalStep:
  eval_step = step.make_eval_step(
      model, task_loss=losses.task_loss_of(output), metrics=metrics
  )
  return programs.shared(jax.jit(eval_step))


def make_replicated_step(
    experiment: Experiment, model: Model, devices=None
) -> replicas.PmapStep:
  """Returns the train step on all replicas of a group (or `devices`)."""
  return replicas.PmapStep(_train_step(experiment, model), devices)


def make_population(
    experiment: Experiment,
    model: Model,
    num_groups: int,
    devices: Sequence[jax.Device] | None = None,
    num_replicas: int = 1,
    shared_batch: bool = True,
) -> one_program.Population:
  """Returns the train step of all groups as one program."""
  return one_program.Population(
      _train_step(experiment, model),
      num_groups,
      devices=devices,
      num_replicas=num_replicas,
      shared_batch=shared_batch,
  )


def _train_step(experiment: Experiment, model: Model) -> step.TrainStep:
  return method_of(experiment).make_train_step(
      model,
      experiment.optimizer,
      num_steps=experiment.num_steps,
      task_loss=losses.training_loss(
          experiment.task,
          experiment.label_smoothing,
          experiment.smoothing_distribution,
      ),
      distill_loss=experiment.distillation,
      axis_name=replicas.REPLICA_AXIS,
      fused=experiment.fused_loss,
      fused_bytes=experiment.fused_loss_bytes,
      teacher_model=make_teacher_model(experiment),
      simulated_replicas=experiment.simulated_replicas,
  )


# -- what is refused ----------------------------------------------------------


def _check(experiment: Experiment) -> None:
  """Raises ValueError, one line, if an `Experiment` makes no sense."""
  method, chosen = experiment.method, experiment.exchange
  if isinstance(chosen, str) and chosen in _RENAMED:
    raise ValueError(
        f'Experiment.exchange={chosen!r} is now {_RENAMED[chosen]}; bind that,'
        ' in a gin file with "from codistill_jax import exchange"'
    )
  parts = {
      'task': (
          isinstance(experiment.task, Task),
          'a task, such as @text.language_model_task()',
      ),
      'model': (
          callable(experiment.model),
          'a reference, such as @lstm.language_model',
      ),
      'optimizer': (
          callable(getattr(experiment.optimizer, 'init', None))
          and callable(getattr(experiment.optimizer, 'update', None)),
          'an optimiser that was made, such as @optax.adam()',
      ),
      'distill_weight': (
          callable(experiment.distill_weight),
          'a reference, such as @schedules.distill_weight()',
      ),
      'method': (
          method is None or _is_made(method, Method),
          'a method, such as @async_sgd.AsynchronousSgd()',
      ),
      'exchange': (
          _is_made(chosen, Kind),
          'a kind of exchange: @exchange.Checkpoints(),'
          ' @exchange.Predictions() or @exchange.FixedTeachers(), with "from'
          ' codistill_jax import exchange"',
      ),
  }
  for name in ('metrics', 'writers'):
    value = getattr(experiment, name)
    fits = isinstance(value, list | tuple) and all(map(callable, value))
    parts[name] = fits, 'a list of references, such as [@mine.name]'
  for name, (fits, what) in parts.items():
    if not fits:
      value = getattr(experiment, name)
      raise ValueError(f'Experiment.{name}={value!r}; bind it to {what}')
  least = dict.fromkeys(_COUNTS, 1) | {'seed': 0, 'data_seed': 0}
  if experiment.data_seed is None:
    del least['data_seed']
  for name, smallest in least.items():
    value = getattr(experiment, name)
    if type(value) is not int or value < smallest:
      raise ValueError(
          f'Experiment.{name}={value!r}; set it to a whole number of at'
          f' least {smallest}'
      )
  losses.task_loss_of(experiment.task.output)  # Raises on an unknown name.
  experiment.distillation  # noqa: B018  Raises on an unknown name.
  losses.check_smoothing(
      experiment.task,
      experiment.label_smoothing,
      experiment.smoothing_distribution,
  )
  chosen.check(experiment)
  if method is None:
    return
  if experiment.simulated_replicas > 1:
    raise ValueError(
        f'Experiment.simulated_replicas={experiment.simulated_replicas} are of'
        f' synchronous SGD, but method={method!r}; leave one of them out'
    )
  method.check(experiment.group_batch, 1)


def _is_made(value: Any, protocol: type) -> bool:
  return isinstance(value, protocol) and not isinstance(value, type)
