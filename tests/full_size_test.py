"""Every full-size configuration is made and stepped once, at a tiny batch.

The table says how many parameters each has by its architecture, counted here
by hand. A task that has a configuration of its own goes into the table, too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import fast
import jax
import numpy as np
import pytest
from click_files import write_lines
from made_images import encode
from token_files import unlike_documents, write_data

from codistill_jax import base, gin_utils, losses
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.data import criteo

PAPER_VOCAB = 24_006
ROWS = 2


def text(directory):
  """As little as fills a batch; returns bindings."""
  documents = unlike_documents([ROWS * 40])
  write_data(directory, [documents], vocab_size=PAPER_VOCAB)
  return [
      f"text.language_model_task.data_dir='{directory}'",
      f'Experiment.group_batch={ROWS}',
  ]


def pixels(directory):
  """An image of each of 1,000 classes; returns bindings."""
  noise = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3))
  contents = [encode(image, 'JPEG') for image in noise.astype(np.uint8)]
  for number in range(1000):
    folder = directory / 'train' / f'n{number:04}'
    folder.mkdir(parents=True)
    (folder / '0.JPEG').write_bytes(contents[number % 8])
  return [
      f"images.image_folder_task.directory='{directory}'",
      f'GROUP_BATCH={ROWS}',
      # Else the rate of the first update is 0.
      'schedules.linear_scaling.warmup_epochs=0',
  ]


def small_pixels(directory):
  """Smaller images, the same parameters."""
  size = 'images.image_folder_task.size=32'
  return [*pixels(directory), size]


def clicks(directory):
  """Two hundred lines; returns bindings."""
  write_lines(directory / 'train.txt', 200)
  criteo.prepare_clicks(
      directory / 'data',
      f'criteo:{directory / "train.txt"}',
      validation_fraction=0.1,
      test_fraction=0.1,
      report=lambda line: None,
  )
  return [
      f"clicks.criteo_task.data_dir='{directory / 'data'}'",
      f'Experiment.group_batch={ROWS}',
  ]


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


def click_model(integers=13, tables=26, rows=32_768 + 1, embedding=16):
  # A value and whether it is missing; an id for what is missing.
  total, d = tables * rows * embedding, 2 * integers + tables * embedding
  for units in (2560, 1024, 256, 1):
    total += d * units + units
    d = units
  return total


@dataclasses.dataclass(frozen=True)
class Full:
  """A configuration at full size.

  Attributes:
    files: Gin files, in order.
    data: Makes the least data in an empty directory; gives bindings.
    by_hand: Number of parameters from the architecture.
    parameters: The same as a literal.
    loss: What the first loss is about: that of knowing nothing.
    teacher: Whether the step has one.
  """

  files: tuple[str, ...]
  data: Callable
  by_hand: int
  parameters: int
  loss: float
  teacher: bool = False


def task(name, *more):
  files = [f'tasks/{name}', *more]
  return tuple(f'gin_configs/{file}.gin' for file in files)


FULL = {
    'common_crawl_lm': Full(
        files=task('common_crawl_lm'),
        data=text,
        by_hand=lstm(),
        parameters=44_411_846,
        loss=math.log(PAPER_VOCAB),
    ),
    'transformer': Full(
        files=task('common_crawl_lm', 'models/transformer'),
        data=text,
        by_hand=transformer(),
        parameters=43_856_384,
        loss=math.log(PAPER_VOCAB),
    ),
    'imagenet_resnet50': Full(
        files=task('imagenet_resnet50'),
        data=small_pixels,
        by_hand=resnet50(),
        parameters=25_557_032,
        loss=math.log(1000),
        teacher=True,
    ),
    'criteo_dnn': Full(
        files=task('criteo_dnn'),
        data=clicks,
        by_hand=click_model(),
        parameters=17_651_105,
        loss=math.log(2),
        teacher=True,
    ),
}


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def configured(full, directory):
  """The experiment of a configuration, its model, and a batch."""
  gin_utils.parse(full.files, full.data(directory))
  experiment = gin_utils.make(experiment_lib.Experiment)
  model = gin_utils.call(experiment_lib.make_model, experiment)
  batch = experiment_lib.train_stream(experiment, 0, 1).batch(0)
  assert len(batch['labels']) == ROWS
  return experiment, model, batch


def start(model, tx, batch, num_peers):
  """A state of the shapes of `init_state`, without compiling and running it."""
  state = jax.eval_shape(
      functools.partial(step_lib.init_state, model, tx, num_peers=num_peers),
      jax.random.PRNGKey(0),
      batch,
  )
  # Of a length that no row of a matrix repeats.
  noise = np.random.default_rng(0).normal(size=1_000_003).astype(np.float32)

  def fill(path, x):
    if x.ndim > 1:
      fan = np.float32(math.prod(x.shape[:-1]))
      return np.resize(noise, x.shape) / np.sqrt(fan)
    ones = str(path[-1].key).endswith(('scale', 'var'))
    return np.full(x.shape, ones, x.dtype)

  variables = jax.tree.map_with_path(fill, state.variables)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return zeros.replace(variables=variables)


def step_once(full, directory):
  """The variables before and after one update, in numpy, and its metrics."""
  experiment, model, batch = configured(full, directory)
  tx, output = experiment.optimizer, experiment.task.output
  train_step = step_lib.make_train_step(
      model,
      tx,
      task_loss=losses.task_loss_of(output),
      distill_loss=losses.distill_loss(experiment.distill_loss, output),
  )
  state = start(model, tx, batch, int(full.teacher))
  before, teachers = state.variables, None
  if full.teacher:
    stacked = jax.tree.map(lambda x: x[None], before)
    teachers = base.Teachers(stacked, np.ones(1, np.float32))
  # Given away: two states of this size at once are a gigabyte more.
  state = jax.device_put(state)
  step = fast.jit(train_step, donate_argnums=0)
  after, metrics = step(state, batch, teachers, 1.0)
  gin_utils.check_no_dead_bindings()
  return before, *jax.tree.map(np.asarray, (after.variables, metrics))


@pytest.mark.parametrize('full', FULL.values(), ids=FULL)
def test_a_full_size_configuration_takes_a_step(full, tmp_path):
  before, after, metrics = step_once(full, tmp_path)
  assert size(before.params) == full.by_hand == full.parameters
  losses_found = {'task': full.loss}
  if full.teacher:
    losses_found['distill'] = full.loss
  for name, loss in losses_found.items():
    assert 0.5 < metrics[f'loss/{name}'] / loss < 1.5
  for leaf in jax.tree.leaves((after, metrics)):
    assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
  moved = jax.tree.map(lambda a, b: np.any(a != b), before, after)
  assert all(jax.tree.leaves(moved)), moved


def test_the_file_of_the_paper_s_model_is_what_the_task_has(tmp_path):
  full = FULL['common_crawl_lm']
  named = dataclasses.replace(
      full, files=task('common_crawl_lm', 'models/lstm_paper')
  )
  shapes = []
  for i, one in enumerate((full, named)):
    (tmp_path / str(i)).mkdir()
    _, model, batch = configured(one, tmp_path / str(i))
    gin_utils.check_no_dead_bindings()
    shapes.append(jax.eval_shape(model.init, jax.random.key(0), batch))
  assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_resnet50_takes_a_step_at_the_size_of_imagenet(tmp_path):
  full = dataclasses.replace(FULL['imagenet_resnet50'], data=pixels)
  _, after, metrics = step_once(full, tmp_path)
  assert size(after.params) == full.by_hand
  assert 0.5 < metrics['loss/task'] / full.loss < 1.5
