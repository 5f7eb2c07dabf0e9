"""What an `Experiment` must be like, each rule with its words."""

import dataclasses
from typing import Any

from codistill_jax import losses, peer_predictions
from codistill_jax.base import Task
from codistill_jax.baselines.method import Method

EXCHANGES = ('checkpoints', 'predictions', 'fixed')
# What acts where groups publish their parameters alone.
_OF_PUBLICATIONS = ('staleness', 'publish_dtype', 'max_staleness_steps')


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
  timeout = experiment.exchange_timeout_seconds
  if not isinstance(timeout, int | float) or timeout < 0:
    raise ValueError(
        f'Experiment.exchange_timeout_seconds={timeout!r}; set it to a number'
        ' of seconds'
    )
  losses.task_loss_of(experiment.task.output)  # Raises on an unknown name.
  experiment.distillation  # noqa: B018  Raises on an unknown name.
  losses.check_smoothing(
      experiment.task,
      experiment.label_smoothing,
      experiment.smoothing_distribution,
  )
  experiment.plan  # noqa: B018  Raises on what does not fit together.
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
  if experiment.exchange == 'predictions':
    raise ValueError(
        "Experiment.exchange='predictions' needs synchronous SGD in every"
        f' group, but method={experiment.method!r}; leave one of them out'
    )
  if experiment.simulated_replicas > 1:
    raise ValueError(
        f'Experiment.simulated_replicas={experiment.simulated_replicas} are of'
        f' synchronous SGD, but method={experiment.method!r}; leave one of them'
        ' out'
    )
  experiment.method.check(experiment.group_batch, 1)


def _check_exchange(experiment: Any) -> None:
  if experiment.exchange not in EXCHANGES:
    raise ValueError(
        f'Experiment.exchange={experiment.exchange!r} is not one of'
        f' {", ".join(EXCHANGES)}'
    )
  _check_fixed(experiment)
  if experiment.exchange != 'predictions':
    if experiment.prediction_top_k is not None:
      raise ValueError(
          f'Experiment.prediction_top_k={experiment.prediction_top_k} acts'
          " nowhere without Experiment.exchange='predictions'; set that too"
      )
    return
  if experiment.distill_target != 'mean':
    raise ValueError(
        f'Experiment.distill_target={experiment.distill_target!r} with'
        " Experiment.exchange='predictions', where groups send each other one"
        " mean; set distill_target='mean', or exchange='checkpoints'"
    )
  peer_predictions.check(
      experiment.distillation,
      experiment.prediction_top_k,
      experiment.task.num_classes,
  )
  _check_unused(experiment, *_OF_PUBLICATIONS, 'teacher_dtype')
  if experiment.task.partition != 'shared':
    raise ValueError(
        "Experiment.exchange='predictions' needs the same batches in all"
        f' groups, but the task has partition={experiment.task.partition!r};'
        " set the partition of the task to 'shared'"
    )


def _check_fixed(experiment: Any) -> None:
  if experiment.exchange != 'fixed':
    _check_unused(experiment, 'teacher_runs', 'teacher_step')
    return
  _check_unused(experiment, *_OF_PUBLICATIONS, 'topology')
  runs = experiment.teacher_runs
  if not isinstance(runs, list | tuple) or not all(
      isinstance(run, str) and run for run in runs
  ):
    raise ValueError(
        f'Experiment.teacher_runs={runs!r}; set it to a list of run'
        " directories, such as ['runs/teachers']"
    )
  if not runs:
    raise ValueError(
        "Experiment.exchange='fixed' needs teachers; set"
        ' Experiment.teacher_runs to the run directories that they were'
        " trained in, such as ['runs/teachers']"
    )
  step = experiment.teacher_step
  if step is not None and (type(step) is not int or step < 1):
    raise ValueError(
        f'Experiment.teacher_step={step!r}; set it to the step of a resume'
        ' checkpoint, or None for the newest'
    )


def _check_unused(experiment: Any, *names: str) -> None:
  """Raises ValueError if one is set that this exchange does not look at."""
  defaults = {f.name: f.default for f in dataclasses.fields(experiment)}
  for name in names:
    value, default = getattr(experiment, name), defaults[name]
    if value != default:
      raise ValueError(
          f'Experiment.{name}={value!r} acts nowhere with'
          f' Experiment.exchange={experiment.exchange!r}; leave it {default!r}'
      )
