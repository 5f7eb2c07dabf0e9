"""What one run trains, as one record that gin fills: the root of every config.

experiment.Experiment.task = @text.language_model_task()
experiment.Experiment.model = @lstm.language_model
experiment.Experiment.optimizer = @optax.adam()
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import optax

from codistill_jax import (
    losses,
    one_program,
    replicas,
    schedules,
    step,
)
from codistill_jax.base import (
    Array,
    Batch,
    Model,
    Stream,
    Task,
    TrainState,
    Variables,
)
from codistill_jax.baselines.method import Method, SynchronousSgd
from codistill_jax.exchange.kinds import Checkpoints, Kind

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
    distill_loss: Name in `losses.DISTILL_LOSSES`.
    distill_target: 'mean', one loss towards the peers' mean prediction; or
      'each', the mean of a loss towards each peer; see `losses.towards`.
    label_smoothing: Share of each target, in [0, 1), that training takes from
      the label; evaluation does not.
    smoothing_distribution: What gets it: 'uniform', all classes alike; or
      'unigram', in proportion to their frequencies in the training split.
    fused_loss: Whether the losses of a language model are computed over blocks
      of tokens, see `blocks`; False: all logits at once, for comparison.
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
  """

  task: Task
  model: Callable[[int], Model]
  optimizer: optax.GradientTransformation
  method: Method | None = None
  distill_weight: Callable[[int], float] = dataclasses.field(
      default_factory=schedules.distill_weight
  )
  distill_loss: str = 'cross_entropy'
  distill_target: str = 'mean'
  label_smoothing: float = 0.0
  smoothing_distribution: str = 'uniform'
  fused_loss: bool = True
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
  """Returns the model of every group."""
  task = experiment.task
  return experiment.model(task.num_classes, **task.model_arguments)


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
  """Returns the training batches of one group; see `Task.train_stream`."""
  given = {} if experiment.data_seed is None else {'seed': experiment.data_seed}
  return method_of(experiment).train_stream(
      functools.partial(
          experiment.task.train_stream,
          group_id=group_id,
          num_groups=num_groups,
          **given,
      ),
      group_batch=experiment.group_batch,
      num_steps=experiment.num_steps,
      rows=rows,
  )


def split_batches(task: Task, split: str, batch_size: int) -> Sequence[Batch]:
  """Returns the batches of the 'validation' or 'test' split, in order.

  Raises:
    ValueError: If there is no such split.
  """
  splits = {'validation': task.eval_batches, 'test': task.test_batches}
  if splits.get(split) is None:
    raise ValueError(
        f'the task has no {split} split; it has:'
        f' {", ".join(name for name, batches in splits.items() if batches)}'
    )
  return splits[split](batch_size)


def first_row(experiment: Experiment, num_groups: int) -> Batch:
  """Returns the first row of group 0's first batch, for its shapes.

  The whole batch may be many gigabytes, and take a minute to decode.
  """
  return train_stream(experiment, 0, num_groups, slice(0, 1)).batch(0)


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
  state = step.init_state(
      model,
      experiment.optimizer,
      rng,
      row,
      num_peers=num_peers,
      group_batch=experiment.group_batch,
  )
  if variables is not None:
    state = state.replace(
        variables=variables,
        opt_state=jax.jit(experiment.optimizer.init)(variables.params),
    )
  return method_of(experiment).init_state(experiment.optimizer, state)


def make_eval_step(experiment: Experiment, model: Model) -> step.EvalStep:
  """Returns the evaluation step of the task; jit it."""
  return step.make_eval_step(
      model, task_loss=losses.task_loss_of(experiment.task.output)
  )


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
      teacher_model=make_teacher_model(experiment),
      simulated_replicas=experiment.simulated_replicas,
  )


# -- what is refused ----------------------------------------------------------


def _check(experiment: Experiment) -> None:
  """Raises ValueError, one line, if an `Experiment` makes no sense."""
  if not isinstance(experiment.task, Task):
    raise ValueError(
        f'Experiment.task={experiment.task!r}; bind it to a task, such as'
        ' @text.language_model_task()'
    )
  for name in ('model', 'distill_weight'):
    if not callable(getattr(experiment, name)):
      raise ValueError(
          f'Experiment.{name}={getattr(experiment, name)!r}; bind it to a'
          ' reference, such as @lstm.language_model or'
          ' @schedules.distill_weight()'
      )
  for name in (
      'num_steps',
      'group_batch',
      'simulated_replicas',
      'log_every',
      'eval_every',
      'eval_batch',
      'checkpoint_every',
  ):
    value = getattr(experiment, name)
    if type(value) is not int or value < 1:
      raise ValueError(
          f'Experiment.{name}={value!r}; set it to a whole number of at'
          ' least 1'
      )
  for name in ('seed', 'data_seed'):
    value = getattr(experiment, name)
    if value is None and name == 'data_seed':
      continue
    if type(value) is not int or value < 0:
      raise ValueError(
          f'Experiment.{name}={value!r}; set it to a whole number of at'
          ' least 0'
      )
  losses.task_loss_of(experiment.task.output)  # Raises on an unknown name.
  experiment.distillation  # noqa: B018  Raises on an unknown name.
  losses.check_smoothing(
      experiment.task,
      experiment.label_smoothing,
      experiment.smoothing_distribution,
  )
  _check_exchange(experiment)
  _check_method(experiment)


def _check_method(experiment: Experiment) -> None:
  if experiment.method is None:
    return
  if isinstance(experiment.method, type) or not isinstance(
      experiment.method, Method
  ):
    raise ValueError(
        f'Experiment.method={experiment.method!r}; bind it to a method, such as'
        ' @async_sgd.AsynchronousSgd()'
    )
  if experiment.simulated_replicas > 1:
    raise ValueError(
        f'Experiment.simulated_replicas={experiment.simulated_replicas} are of'
        f' synchronous SGD, but method={experiment.method!r}; leave one of them'
        ' out'
    )
  experiment.method.check(experiment.group_batch, 1)


def _check_exchange(experiment: Experiment) -> None:
  chosen = experiment.exchange
  if isinstance(chosen, str) and chosen in _RENAMED:
    raise ValueError(
        f'Experiment.exchange={chosen!r} is now {_RENAMED[chosen]}; bind that'
        ' in a gin file, with "from codistill_jax import exchange", as those of'
        ' gin_configs/ablations do'
    )
  if isinstance(chosen, type) or not isinstance(chosen, Kind):
    raise ValueError(
        f'Experiment.exchange={chosen!r}; bind it to a kind of exchange:'
        ' @exchange.Checkpoints(), @exchange.Predictions() or'
        ' @exchange.FixedTeachers(), with "from codistill_jax import exchange"'
    )
  chosen.check(experiment)
