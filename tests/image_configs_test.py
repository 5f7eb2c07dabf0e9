"""The image configurations: models fit their data, and can be updated."""

import functools

import jax
import numpy as np
import pytest
from made_images import (
    write_cifar_binary,
    write_fashion,
    write_folder,
)

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, losses, step

_FEW = ('STEPS=60', 'Experiment.eval_batch=4')


def nothing(directory):
  del directory  # The digits come with a package.


def imagenet(directory):
  for split in ('train', 'validation'):
    write_folder(directory, split, {'a': 3, 'b': 2})


# Name, data, bindings, inputs of one image, parameters.
CONFIGS = [
    ('digits_resnet', nothing, (), (8, 8, 1), 269_434),
    (
        'fashion_mnist_resnet20',
        write_fashion,
        ("fashion_mnist_task.directory='{}'", 'Experiment.group_batch=8'),
        (28, 28, 1),
        269_434,
    ),
    (
        'cifar10_resnet20',
        write_cifar_binary,
        ("cifar10_task.directory='{}'", 'Experiment.group_batch=8'),
        (32, 32, 3),
        269_722,
    ),
    (
        'imagenet_resnet50',
        imagenet,
        (
            "image_folder_task.directory='{}'",
            'GROUP_BATCH=4',
            'schedules.linear_scaling.examples_per_epoch=12',
        ),
        (224, 224, 3),
        # Two classes in place of 1,000.
        25_557_032 - 998 * 2049,
    ),
]


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


@pytest.mark.parametrize(
    'name, data, bindings, shape, parameters',
    CONFIGS,
    ids=[config[0] for config in CONFIGS],
)
def test_a_configuration_fits_its_data(
    tmp_path, name, data, bindings, shape, parameters
):
  data(tmp_path)
  gin_utils.parse(
      [f'gin_configs/tasks/{name}.gin'],
      [*(b.format(tmp_path) for b in bindings), *_FEW],
  )
  experiment = gin_utils.make(experiment_lib.Experiment)
  model = experiment_lib.make_model(experiment)
  gin_utils.check_no_dead_bindings()
  batch = experiment_lib.train_stream(experiment, 1, 2).batch(3)
  assert batch['inputs'].shape == (experiment.group_batch, *shape)
  eval_batch = experiment.task.eval_batches(4)[0]
  assert eval_batch['inputs'].shape == (4, *shape)
  # Shapes alone, which is quick.
  init = functools.partial(step.init_state, model, experiment.optimizer)
  state = jax.eval_shape(init, jax.random.PRNGKey(0), batch)
  leaves = jax.tree.leaves(state.variables.params)
  assert sum(x.size for x in leaves) == parameters
  if name == 'imagenet_resnet50':
    return  # full_size_test.py updates it.
  update = step.make_train_step(
      model,
      experiment.optimizer,
      task_loss=losses.task_loss_of(experiment.task.output),
  )
  after, metrics = jax.eval_shape(update, state, batch, None, 0.0)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert metrics['loss/task'].shape == ()


CIFAR = ("cifar10_task.directory='{}'",)
STUDIES = {
    'images_smoke': (nothing, ()),
    'images_cpu': (nothing, ()),
    'images_cifar_cpu': (write_cifar_binary, CIFAR),
    'images_gpu': (write_cifar_binary, CIFAR),
    'images_paper': (imagenet, ("image_folder_task.directory='{}'",)),
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
  import os
  import re
  import subprocess

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
