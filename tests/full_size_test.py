"""Every full-size configuration is made and stepped once, at a tiny batch.

The table says how many parameters each has by its architecture, counted here
by hand. A task that has a configuration of its own goes into the table, too.
"""

import dataclasses
import math

import fast
import jax
import numpy as np
import pytest

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, losses
from codistill_jax import step as step_lib
from codistill_jax.base import Task

PAPER_VOCAB = 24_006
ROWS = 2


class Repeated:
  """A stream of one batch."""

  def __init__(self, batch):
    self._batch = batch

  def batch(self, step):
    del step
    return self._batch


def task_of(batch, num_classes):
  """A task that hands out one batch; what the configuration is tried on."""
  return Task(
      train_stream=lambda **kwargs: Repeated(batch),
      eval_batches=lambda batch_size: [batch],
      num_classes=num_classes,
      identity={'task': 'full size'},
      example_name='example',
  )


def text(vocab=PAPER_VOCAB, unroll=4):
  rng = np.random.default_rng(0)
  tokens = rng.integers(vocab, size=(2, ROWS, unroll)).astype(np.int32)
  resets = rng.random((ROWS, unroll)) < 0.3
  batch = {'inputs': tokens[0], 'labels': tokens[1], 'resets': resets}
  return task_of(batch, vocab)


def images(size, num_classes, channels=3):
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(ROWS, size, size, channels)).astype(np.float32)
  labels = rng.integers(num_classes, size=ROWS).astype(np.int32)
  return task_of({'inputs': pixels, 'labels': labels}, num_classes)


def lstm(vocab=PAPER_VOCAB, embedding=256, units=1024):
  # x_kernel, h_kernel; bias and two scales of the gates; scale, shift of c.
  layer = lambda d: (d + units) * 4 * units + 3 * 4 * units + 2 * units
  head = units * vocab + vocab
  return vocab * embedding + layer(embedding) + layer(units) + head


def transformer(vocab=PAPER_VOCAB, layers=6, units=512, hidden=1408):
  # Query, key, value, output; gate, up, down; two scales.
  layer = 4 * units**2 + 3 * units * hidden + 2 * units
  return 2 * vocab * units + layers * layer + units


def resnet50(classes=1000):
  total, d = 7 * 7 * 3 * 64 + 2 * 64, 64
  for blocks, w in [(3, 64), (4, 128), (6, 256), (3, 512)]:
    # Three convolutions and their scales and shifts; the first block projects.
    rest = 9 * w * w + w * 4 * w + 2 * (w + w + 4 * w)
    total += d * w + rest + d * 4 * w + 2 * 4 * w
    total += (blocks - 1) * (4 * w * w + rest)
    d = 4 * w
  return total + d * classes + classes


@dataclasses.dataclass(frozen=True)
class Full:
  """A configuration at full size.

  Attributes:
    files: Gin files, in order, after `BASE`.
    task: What it is stepped on.
    by_hand: Number of parameters from the architecture.
    parameters: The same as a literal.
    loss: What the first loss is about: that of knowing nothing.
    in_place: Whether `task` is in place of one that the files configure, whose
      bindings then act nowhere.
  """

  files: tuple[str, ...]
  task: Task
  by_hand: int
  parameters: int
  loss: float
  in_place: bool = False


def model_file(name):
  return (f'gin_configs/models/{name}.gin',)


FULL = {
    'lstm': Full(
        files=model_file('lstm_paper'),
        task=text(),
        by_hand=lstm(),
        parameters=44_411_846,
        loss=math.log(PAPER_VOCAB),
    ),
    'transformer': Full(
        files=model_file('transformer'),
        task=text(),
        by_hand=transformer(),
        parameters=43_856_384,
        loss=math.log(PAPER_VOCAB),
    ),
    'resnet50': Full(
        files=model_file('resnet50'),
        # Smaller pixels, the same parameters.
        task=images(32, 1000),
        by_hand=resnet50(),
        parameters=25_557_032,
        loss=math.log(1000),
    ),
}
# Before the files: what those of a model leave to a task.
BASE = """
from __gin__ import dynamic_registration
import optax
from codistill_jax import experiment
include 'gin_configs/base.gin'
experiment.Experiment.optimizer = @optax.sgd()
optax.sgd.learning_rate = 1e-3
"""


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def configured(full, tmp_path):
  """The experiment of a configuration and its model."""
  base = tmp_path / 'base.gin'
  base.write_text(BASE)
  gin_utils.parse([str(base), *full.files])
  experiment = gin_utils.make(experiment_lib.Experiment, full.task)
  return experiment, gin_utils.call(experiment_lib.make_model, experiment)


def step_once(full, tmp_path):
  """The state before and after one update, in numpy, and its metrics."""
  experiment, model = configured(full, tmp_path)
  batch = experiment_lib.train_stream(experiment, 0, 1).batch(0)
  tx, output = experiment.optimizer, experiment.task.output
  init = lambda key, batch: step_lib.init_state(model, tx, key, batch)
  train_step = step_lib.make_train_step(
      model,
      tx,
      task_loss=losses.task_loss_of(output),
      distill_loss=losses.distill_loss(experiment.distill_loss, output),
  )
  before = fast.jit(init)(jax.random.PRNGKey(0), batch)
  after, metrics = fast.jit(train_step)(before, batch, None, 0.0)
  if not full.in_place:
    gin_utils.check_no_dead_bindings()
  return jax.tree.map(np.asarray, (before, after, metrics))


@pytest.mark.parametrize('full', FULL.values(), ids=FULL)
def test_a_full_size_configuration_takes_a_step(full, tmp_path):
  before, after, metrics = step_once(full, tmp_path)
  assert size(before.variables.params) == full.by_hand == full.parameters
  assert abs(metrics['loss/task'] - full.loss) < 1.5
  for leaf in jax.tree.leaves((after.variables, metrics)):
    assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
  moved = [
      np.any(a != b)
      for a, b in zip(
          jax.tree.leaves(before.variables.params),
          jax.tree.leaves(after.variables.params),
      )
  ]
  # Of a block that starts with a scale of 0 only the last scale and shift.
  assert np.mean(moved) > 0.3
  assert after.step == 1


@pytest.mark.slow
def test_resnet50_takes_a_step_at_the_size_of_imagenet(tmp_path):
  full = dataclasses.replace(FULL['resnet50'], task=images(224, 1000))
  _, after, metrics = step_once(full, tmp_path)
  assert size(after.variables.params) == full.by_hand
  assert abs(metrics['loss/task'] - full.loss) < 1.5
