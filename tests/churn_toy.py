"""A task of seconds with two classes, for tests of the churn study."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from codistill_jax import base
from codistill_jax.models.linen import from_linen

GIN = """\
from __gin__ import dynamic_registration
import optax
import churn_toy
from codistill_jax import exchange
from codistill_jax import experiment
from codistill_jax import schedules

experiment.Experiment.task = @churn_toy.task()
experiment.Experiment.model = @churn_toy.model
RATE = 1e-2
STEPS = 6
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = %RATE
experiment.Experiment.distill_weight = @schedules.distill_weight()
experiment.Experiment.num_steps = %STEPS
experiment.Experiment.group_batch = 16
experiment.Experiment.exchange = @exchange.Checkpoints()
exchange.Checkpoints.every = 2
experiment.Experiment.log_every = 2
experiment.Experiment.eval_every = 2
experiment.Experiment.eval_batch = 64
experiment.Experiment.checkpoint_every = 4
"""
FEATURES, TRAIN, EVAL = 6, 512, 150
# Of this process; at the end of them it is killed, as far as one can tell.
batches_left = 10**9


def task(
    output='sigmoid',
    seed=0,
    test_split=True,
    data=0,
    bad_seed=None,
):
  """Points of two noisy half-spaces.

  Args:
    output: 'sigmoid' or 'softmax'.
    seed: Of the order of examples.
    test_split: Whether there is one.
    data: Seed of the data themselves.
    bad_seed: Where it is that of the order, training diverges at step 4.
  """
  rng = np.random.default_rng(data)
  inputs = rng.normal(size=(TRAIN + 2 * EVAL, FEATURES)).astype(np.float32)
  noise = rng.normal(size=len(inputs))
  labels = (inputs[:, 0] * inputs[:, 1] + noise > 0).astype(np.int32)
  part = lambda a, b: (inputs[a:b], labels[a:b])
  validation = part(TRAIN, TRAIN + EVAL)
  test = part(TRAIN + EVAL, TRAIN + 2 * EVAL)
  return base.Task(
      train_stream=lambda group_id, num_groups, group_batch, rows, seed=seed: (
          _Stream(
              part(0, TRAIN),
              (seed, group_id),
              group_batch,
              seed == bad_seed,
          )
      ),
      eval_batches=lambda size: _batches(*validation, size),
      test_batches=(lambda size: _batches(*test, size)) if test_split else None,
      num_classes=2,
      identity={'task': 'toy'},
      example_name='point',
      description='toy points',
      output=output,
  )


_TOO_LARGE = 1e30  # For the model, which then diverges.


class _Stream:

  def __init__(self, data, key, size, bad):
    self._data, self._key, self._size = data, key, size
    self._bad = bad

  def batch(self, step):
    global batches_left
    batches_left -= 1
    if batches_left < 0:
      raise KeyboardInterrupt
    rng = np.random.default_rng([*self._key, step])
    rows = rng.integers(TRAIN, size=self._size)
    inputs, labels = (x[rows] for x in self._data)
    if self._bad and step >= 3:
      inputs = np.full_like(inputs, _TOO_LARGE)
    return {'inputs': inputs, 'labels': labels}


def _batches(inputs, labels, size):
  """Padded with NaN, which nobody may look at."""
  found = []
  for start in range(0, len(labels), size):
    rows = slice(start, start + size)
    pad = max(start + size - len(labels), 0)
    found.append(
        {
            'inputs': np.pad(
                inputs[rows], ((0, pad), (0, 0)), constant_values=np.nan
            ),
            'labels': np.pad(labels[rows], (0, pad)),
            'weights': np.pad(np.ones(len(labels[rows]), np.float32), (0, pad)),
        }
    )
  return found


class _Net(nn.Module):
  outputs: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    too_large = x[:, :1] >= _TOO_LARGE
    x = nn.Dense(self.outputs)(nn.tanh(nn.Dense(self.hidden)(x)))
    x = jnp.where(too_large, jnp.inf, x)
    return x[:, 0] if self.outputs == 1 else x


def model(num_classes, outputs=1, hidden=8):
  """One hidden layer; `outputs=1` is a sigmoid."""
  del num_classes
  return from_linen(_Net(outputs, hidden))
