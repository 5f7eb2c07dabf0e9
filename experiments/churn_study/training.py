"""Trains one run of a churn study and asks it for its predictions.

The groups of a run are stepped in turn through memory, in lockstep. What was
compiled for one run serves all others: a seed and a distill weight are data.

Shape suffixes: B examples of a batch, C classes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from codistill_jax import base, group, metrics
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.base import Variables
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.experiment import Experiment
from codistill_jax.replicas import PmapStep
from experiments.churn_study.run_files import Run
from experiments.running import driver
from experiments.running.job import Job

# Of a study that keeps the predictions of dozens of models.
_MOST_BYTES = 2**30


class Trainer(NamedTuple):
  """One configuration, compiled.

  Attributes:
    experiment: In lockstep.
    model: Its model.
    train_step: On the replicas.
    predict: `predict(variables, batch, carry) -> (probabilities, carry)`.
  """

  experiment: Experiment
  model: base.Model
  train_step: PmapStep
  predict: Callable


def make_trainer(
    experiment: Experiment, devices: Sequence[jax.Device] | None = None
) -> Trainer:
  """Compiles nothing yet.

  Raises:
    ValueError: If groups would not exchange parameters.
  """
  if not isinstance(experiment.exchange, Checkpoints):
    raise ValueError(
        'the arms of a churn study exchange parameters, but Experiment.exchange'
        f' is {experiment.exchange}; set exchange=@exchange.Checkpoints()'
    )
  experiment = experiment_lib.in_lockstep(experiment)
  model = experiment_lib.make_model(experiment)
  return Trainer(
      experiment,
      model,
      experiment_lib.make_replicated_step(experiment, model, devices),
      jax.jit(make_predict_step(model)),
  )


def make_predict_step(model: base.Model) -> Callable:
  """`predict(variables, batch, carry) -> (probabilities, carry)`, pure.

  Probabilities are (B,) of a sigmoid output, else (B, C).
  """

  def predict(variables, batch, carry):
    outputs, updates = model.apply(variables, batch, carry, None, False)
    logits = base.logits_of(outputs)
    if logits.shape == batch['labels'].shape:
      return jax.nn.sigmoid(logits), updates.carry
    logits = metrics.class_logits(logits, batch['labels'])
    return jax.nn.softmax(logits), updates.carry

  return predict


def split_batches(experiment: Experiment, split: str):
  """The batches of a split; those of validation if there is no test split."""
  task = experiment.task
  if split == 'test' and task.test_batches is not None:
    return task.test_batches(experiment.eval_batch)
  return task.eval_batches(experiment.eval_batch)


def labels_of(experiment: Experiment, split: str) -> np.ndarray:
  """The labels (N,) of a split, without padding."""
  return np.concatenate(
      [
          np.asarray(batch['labels'])[step_lib.example_weights(batch) > 0]
          for batch in split_batches(experiment, split)
      ]
  )


# --- One run -----------------------------------------------------------------


def configured(experiment: Experiment, run: Run) -> Experiment:
  """The experiment of one run: its seeds, and its weight."""
  order = experiment.data_seed
  order = experiment.seed if order is None else order
  schedule = experiment.distill_weight
  if run.weight is not None:
    schedule = with_weight(schedule, run.weight, experiment.num_steps)
  return dataclasses.replace(
      experiment,
      seed=experiment.seed + run.init,
      data_seed=order + run.order,
      distill_weight=schedule,
  )


def with_weight(
    schedule: Callable[[int], float], weight: float, num_steps: int
) -> Callable[[int], float]:
  """The schedule, with another weight at its end: its burn-in and ramp stay."""
  last = float(schedule(num_steps - 1))
  if not last:
    raise ValueError(
        'the distill weight of the configuration is 0 at its last step, so'
        ' --weights cannot scale it; bind schedules.distill_weight.weight to 1'
    )
  return lambda step: weight * (float(schedule(step)) / last)


def train(
    trainer: Trainer, run: Run, tick: Callable[[int], None]
) -> list[Variables]:
  """Trains all groups of a run; what each has learnt, as numpy copies.

  Args:
    trainer: Of the run's configuration.
    run: What to train.
    tick: Called with the step after each round; may raise to end it all.

  Raises:
    ValueError: If the groups of a codistilled arm never taught each other.
    FloatingPointError: If a group ends with parameters that are not finite.
  """
  experiment = configured(trainer.experiment, run)
  with contextlib.ExitStack() as stack:
    groups = [
        stack.enter_context(contextlib.closing(g))
        for g in _groups(trainer, experiment, run)
    ]
    taught = False
    for results in zip(*groups, strict=True):
      taught |= any('loss/distill' in result.metrics for result in results)
      tick(results[0].step)
    if run.weight is not None and not taught:
      raise ValueError(
          f'{run.name} never had a teacher in {experiment.num_steps} steps: it'
          f' is no codistillation; every={experiment.exchange.every}'
          ' and burn_in_steps must be shorter'
      )
    learnt = [base.host_copy(result.state.variables) for result in results]
  for group_id, variables in enumerate(learnt):
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(variables)):
      raise FloatingPointError(
          f'group {group_id} of {run.name} has parameters that are not finite;'
          ' lower the learning rate or the distill weight'
      )
  return learnt


def _groups(
    trainer: Trainer, experiment: Experiment, run: Run
) -> Iterable[Iterator[group.StepResult]]:
  alone = run.num_groups == 1
  exchanges = (
      [None]
      if alone
      else memory_exchanges(run.num_groups, plan=experiment.exchange)
  )
  for group_id, exchange in enumerate(exchanges):
    job = Job(
        experiment=experiment,
        model=trainer.model,
        train_step=trainer.train_step,
        workdir='',  # Nothing is written before the end.
        group_id=group_id,
        num_groups=run.num_groups,
    )
    start = driver.new_state(job)
    yield group.run_group(
        trainer.train_step,
        start.state,
        start.stream,
        num_steps=experiment.num_steps,
        exchange=exchange,
        distill_weight=experiment.distill_weight,
    )


def predict(trainer: Trainer, variables: Variables, split: str) -> np.ndarray:
  """Probabilities (N,) or (N, C) on a split, float32, without padding."""
  parts, carry, size = [], None, 0
  for batch in split_batches(trainer.experiment, split):
    if carry is None:
      carry = trainer.model.init_carry(len(batch['labels']))
    probs, carry = trainer.predict(variables, dict(batch), carry)
    probs = np.asarray(probs)[step_lib.example_weights(batch) > 0]
    parts.append(probs)
    size += probs.nbytes
    if size > _MOST_BYTES:
      raise ValueError(
          f'the predictions of one model on the {split} split are more than'
          f' {_MOST_BYTES >> 20} MB; take a smaller split, such as by'
          ' max_eval_batches'
      )
  return np.concatenate(parts)
