"""What the groups of a run predict in the end, for a study of churn.

Shape suffixes: N examples of a split, B of a batch, C classes.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from codistill_jax import base, metrics
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.base import Batch, Model, Variables
from codistill_jax.exchange import kinds
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files

from . import retrains

# Of a study that keeps the predictions of dozens of models.
_MOST_BYTES = 2**30


def leave(
    workdir: files.PathLike,
    directory: files.PathLike,
    experiment: Experiment,
    model: Model,
) -> None:
  """Writes the predictions of all groups of a run, and the labels.

  Args:
    workdir: Of the study.
    directory: Of the run, which has ended.
    experiment: Its configuration.
    model: Its model.

  Raises:
    ValueError: If the labels are not those of the runs before.
  """
  like = jax.eval_shape(
      model.init,
      jax.random.PRNGKey(0),
      experiment_lib.first_row(experiment, 1),
  )
  identity = {k: str(v) for k, v in experiment.task.identity.items()}
  for source in kinds.find_teachers([directory]):
    loaded = kinds.load_teachers([source], like, identity)
    variables = jax.tree.map(lambda x: x[0], loaded.variables)
    for split in retrains.SPLITS:
      found, labels = predict(experiment, model, variables, split)
      retrains.keep_labels(workdir, split, labels)
      retrains.write_predictions(directory, source.group_id, split, found)


def predict(
    experiment: Experiment, model: Model, variables: Variables, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns predictions and labels on a split, without padding.

  Predictions are float32 probabilities, (N,) of a sigmoid output, else (N, C).
  """
  step = _predict_step(model)
  parts, labels, carry, size = [], [], None, 0
  for batch in _batches(experiment, split):
    if carry is None:
      carry = model.init_carry(len(batch['labels']))
    probs, carry = step(variables, dict(batch), carry)
    real = step_lib.example_weights(batch) > 0
    parts.append(np.asarray(probs)[real])
    labels.append(np.asarray(batch['labels'])[real])
    size += parts[-1].nbytes
    if size > _MOST_BYTES:
      raise ValueError(
          f'the predictions of one model on the {split} split are more than'
          f' {_MOST_BYTES >> 20} MB; take a smaller split, such as by'
          ' max_eval_batches'
      )
  return np.concatenate(parts), np.concatenate(labels)


def _batches(experiment: Experiment, split: str) -> Iterator[Batch]:
  """Returns the batches of a split; of validation if there is no test."""
  task = experiment.task
  there = split if split != 'test' or task.test_batches else 'validation'
  return experiment_lib.split_batches(task, there, experiment.eval_batch)


# Compiled once for all runs of a model.
@functools.lru_cache(maxsize=4)
def _predict_step(model: Model) -> Callable[..., tuple]:
  def predict(variables, batch, carry):
    outputs, updates = model.apply(variables, batch, carry, None, False)
    logits = base.logits_of(outputs)
    if logits.shape == batch['labels'].shape:
      return jax.nn.sigmoid(logits), updates.carry
    logits = metrics.class_logits(logits, batch['labels'])
    return jax.nn.softmax(logits), updates.carry

  return jax.jit(predict)
