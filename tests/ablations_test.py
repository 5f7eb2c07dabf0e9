"""Ablations: short, a question first, and each does what it asks about."""

import dataclasses
import pathlib

import all_groups
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import toy

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, losses
from codistill_jax.base import Task
from codistill_jax.baselines import async_sgd, diloco
from experiments.running import job as job_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABLATIONS = sorted((ROOT / 'gin_configs' / 'ablations').glob('*.gin'))

# What a task would configure.
TASK = """
from __gin__ import dynamic_registration
from codistill_jax import experiment
from codistill_jax import optimizers
from codistill_jax import schedules
include 'gin_configs/base.gin'

experiment.Experiment.optimizer = @optimizers.momentum_sgd()
optimizers.momentum_sgd.learning_rate = @schedules.linear_scaling()
schedules.linear_scaling.group_batch = 256
schedules.linear_scaling.examples_per_epoch = 2560
"""
TOKENS = {'inputs': np.zeros((1, 2), np.int32)}
IMAGES = {'inputs': np.zeros((1, 32, 32, 3), np.float32)}


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


def configured(tmp_path, model, *ablations):
  """Experiment and model of a task, a file of a model, and ablations."""
  task = tmp_path / 'task.gin'
  task.write_text(TASK)
  files = [f'gin_configs/ablations/{name}.gin' for name in ablations]
  gin_utils.parse([str(task), f'gin_configs/models/{model}.gin', *files])
  stand_in = Task(
      train_stream=None,
      eval_batches=None,
      num_classes=10,
      identity={},
      example_name='example',
      label_frequencies=lambda: np.array([0.55] + [0.05] * 9),
  )
  experiment = gin_utils.make(experiment_lib.Experiment, stand_in)
  model = gin_utils.call(experiment_lib.make_model, experiment)
  gin_utils.check_no_dead_bindings()
  return experiment, model


@pytest.mark.parametrize('path', ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_is_short_and_opens_with_its_question(path):
  first, *rest = path.read_text().splitlines()
  assert first.startswith('# ') and first.endswith('?')
  assert len(rest) < 15


def test_the_transformer_takes_the_place_of_the_lstm(tmp_path):
  _, model = configured(tmp_path, 'lstm_paper', 'transformer')
  params = jax.eval_shape(model.init, jax.random.key(0), TOKENS).params
  assert {'layer_0', 'layer_2'} < set(params) and 'lstm_0' not in params
  assert params['embed']['embedding'].shape == (10, 128)


def test_no_memory_leaves_a_transformer_without_a_carry(tmp_path):
  _, model = configured(tmp_path, 'transformer')
  shapes = jax.eval_shape(lambda: model.init_carry(3))
  assert shapes.live.shape == (3, 64)
  _, model = configured(tmp_path, 'transformer', 'no_memory')
  assert model.init_carry(3) == ()


def test_batch_normalisation_goes_over_the_replicas(tmp_path):
  def train(ablations):
    _, model = configured(tmp_path, 'resnet50', *ablations)
    like = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    apply = lambda v, b: model.apply(v, b, (), None, True)
    jax.eval_shape(apply, like, IMAGES)

  train([])
  with pytest.raises(ValueError, match='replica'):  # There is no such axis.
    train(['cross_replica_batch_norm'])


def test_lars_takes_the_place_of_sgd(tmp_path):
  experiment, _ = configured(tmp_path, 'resnet20', 'lars')
  tx = experiment.optimizer
  params = {'kernel': np.float32([3.0, 4.0]), 'bias': np.float32([1.0, 1.0])}
  state = tx.init(params)
  # Two steps: the rate of the first is 0.
  for _ in range(2):
    updates, state = tx.update(params, state, params)
  # The warm-up takes 50 steps to a rate of 0.4, of 0.001 |w| for a kernel.
  rate = 0.4 / 50
  np.testing.assert_allclose(updates['bias'], [-rate, -rate], rtol=1e-5)
  expected = -rate * 0.001 * params['kernel']
  np.testing.assert_allclose(updates['kernel'], expected, rtol=1e-5)


@pytest.mark.parametrize(
    'name, frequent, rare',
    [
        ('label_smoothing', 0.1, 0.1),
        ('label_smoothing_unigram', 0.55, 0.05),
    ],
)
def test_label_smoothing_takes_the_place_of_the_peers(
    tmp_path, name, frequent, rare
):
  experiment, _ = configured(tmp_path, 'resnet20', name)
  assert {experiment.distill_weight(step) for step in (0, 999)} == {0.0}
  loss = losses.training_loss(
      experiment.task,
      experiment.label_smoothing,
      experiment.smoothing_distribution,
  )
  logits = jnp.array([[2.0] + [0.0] * 9])
  log_q = jax.nn.log_softmax(logits)[0]
  smooth = frequent * log_q[0] + 9 * rare * log_q[1]
  expected = -0.9 * log_q[1] - 0.1 * smooth
  np.testing.assert_allclose(loss(logits, jnp.array([1])), expected, rtol=1e-5)


def test_separate_losses_are_another_loss_than_that_to_the_mean(tmp_path):
  experiment, _ = configured(tmp_path, 'resnet20', 'separate_losses')
  rng = np.random.default_rng(0)
  student, teachers = rng.normal(size=(1, 10)), rng.normal(size=(2, 1, 10))
  found = experiment.distillation(student, teachers, np.ones(2))
  to_one = [losses.jsd(student, one[None], np.ones(1)) for one in teachers]
  np.testing.assert_allclose(found, sum(to_one) / 2, rtol=1e-5)
  assert np.all(found > 1.05 * losses.jsd(student, teachers, np.ones(2)))


def test_simulated_replicas_share_the_group_batch(tmp_path):
  experiment, _ = configured(tmp_path, 'resnet20', 'simulated_replicas')
  assert experiment.simulated_replicas == 4
  assert experiment.group_batch % experiment.simulated_replicas == 0


def test_deep_mutual_learning_trains_as_one_program(tmp_path):
  """What `train_lockstep` does, of a toy."""
  experiment, _ = configured(tmp_path, 'resnet20', 'deep_mutual_learning')
  assert experiment.distill_loss == 'kl'
  experiment = dataclasses.replace(
      experiment,
      task=toy.TOKEN_TASK,
      model=lambda num_classes: toy.RECURRENT,
      optimizer=toy.ADAM,
      num_steps=2,
      group_batch=4,
      log_every=1,
      eval_batch=2,
  )
  steps, stream = job_lib.train_steps_of(experiment, toy.RECURRENT, 2, 1)
  all_groups.train(
      experiment, toy.RECURRENT, steps, tmp_path / 'run', stream=stream
  )
  for group_id in (0, 1):
    records = tiny_run.records(tmp_path / 'run', group_id)
    records = [r for r in records if 'loss/distill' in r]
    # From the first update on, of peers that are not a step old.
    assert [r['step'] for r in records] == [1, 2]
    assert [r['exchange/staleness_steps'] for r in records] == [0, 0]
    assert 0 < records[0]['loss/distill'] < records[0]['loss/total']


@pytest.mark.parametrize(
    'name, method',
    [
        ('asynchronous_sgd', async_sgd.AsynchronousSgd(8, 'random')),
        ('local_sgd', diloco.Diloco(4, 50, 1.0, 0.0)),
        ('diloco', diloco.Diloco(4, 50, 0.7, 0.9)),
    ],
)
def test_a_method_takes_the_place_of_synchronous_sgd(tmp_path, name, method):
  experiment, _ = configured(tmp_path, 'resnet20', name)
  assert experiment.method == method
