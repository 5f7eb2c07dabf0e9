"""The paper's language model as configured: sizes, data, scaling."""

import inspect

import gin
import pytest
from token_files import unlike_documents, write_data

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils
from codistill_jax.models import lstm

VOCABULARY = 24_006
TASKS = 'gin_configs/tasks'


@pytest.fixture(autouse=True)
def clean():
  yield
  gin.clear_config()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  documents = unlike_documents([1500] * 8)
  return write_data(folder, [documents], vocab_size=VOCABULARY)


def configured(name, data_dir, *bindings):
  data = f"text.language_model_task.data_dir = '{data_dir}'"
  gin_utils.parse([f'{TASKS}/{name}.gin'], [data, *bindings])
  return gin_utils.make(experiment_lib.Experiment)


@pytest.mark.parametrize(
    ('name', 'folder'),
    [('common_crawl_lm', 'data/common_crawl'), ('c4_lm', 'data/c4')],
)
def test_the_paper_s_settings(name, folder, data_dir):
  gin_utils.parse([f'{TASKS}/{name}.gin'])
  for setting, value in {
      'text.language_model_task.data_dir': folder,
      'text.language_model_task.unroll': 32,
      'text.language_model_task.partition': 'disjoint',
  }.items():
    assert gin.query_parameter(setting) == value
  experiment = configured(name, data_dir)
  assert experiment.exchange.every == 50
  assert experiment.group_batch % 128 == 0
  assert experiment.task.num_classes == VOCABULARY


def test_replicas_scale_the_group_batch(data_dir):
  rows = 2 * 128
  binding = f'experiment.Experiment.group_batch = {rows}'
  experiment = configured('c4_lm', data_dir, binding)
  stream = experiment.task.train_stream(
      group_id=0, num_groups=1, group_batch=experiment.group_batch
  )
  assert stream.batch(0)['inputs'].shape == (rows, 32)


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
