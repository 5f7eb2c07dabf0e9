"""What an `Experiment` must be like, each rule with its words."""

from typing import Any

from codistill_jax import losses, objectives
from codistill_jax.base import Task
from codistill_jax.baselines.method import Method
from codistill_jax.exchange import Kind

_RENAMED = {
    'checkpoints': '@exchange.Checkpoints()',
    'predictions': '@exchange.Predictions()',
    'fixed': '@exchange.FixedTeachers()',
}


def check(experiment: Any) -> None:
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
  objectives.check_smoothing(
      experiment.task,
      experiment.label_smoothing,
      experiment.smoothing_distribution,
  )
  _check_exchange(experiment)
  _check_method(experiment)


def _check_method(experiment: Any) -> None:
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


def _check_exchange(experiment: Any) -> None:
  chosen = experiment.exchange
  if isinstance(chosen, str) and chosen in _RENAMED:
    raise ValueError(
        f'Experiment.exchange={chosen!r} is now {_RENAMED[chosen]}; bind that,'
        ' with "from codistill_jax import exchange"'
    )
  if isinstance(chosen, type) or not isinstance(chosen, Kind):
    raise ValueError(
        f'Experiment.exchange={chosen!r}; bind it to a kind of exchange:'
        ' @exchange.Checkpoints(), @exchange.Predictions() or'
        ' @exchange.FixedTeachers(), with "from codistill_jax import exchange"'
    )
  chosen.check(experiment)
