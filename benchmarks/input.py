r"""Does loading keep up with training? Batches per second against the step.

    python -m benchmarks.input

Every pipeline is a line of `PIPELINES`: a configuration of the project on data
of the usual size, which are made here (noise, in the true formats). Each is
read as training reads it, `stream.batch(step)` for one step after another; and
one update of its model is timed on one device, without teachers, which is when
it asks for most. Files are in the page cache: a disk is not measured. Then
`input_rivals` reads the same JPEG files with other loaders.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import command, input_data, input_rivals, measure

_NEED = 2500  # Images per second that an accelerator takes.
_PER_CORE = 450  # JPEG images per second that we mean to decode.
_SECONDS = 1.0  # Of a measurement.


class Pipeline(NamedTuple):
  """Something to measure.

  Attributes:
    name: In the results.
    config: Under gin_configs/tasks.
    unit: What is counted.
    data: Makes the data in an empty directory; None: a package has them.
    bindings: Gin bindings; `{}` stands for that directory.
    step: Whether one update of the model is timed.
  """

  name: str
  config: str
  unit: str
  data: Callable[[pathlib.Path], None] | None = None
  bindings: Sequence[str] = ()
  step: bool = True


PIPELINES = (
    *(
        Pipeline(
            f'JPEG folder, {workers} thread(s)',
            'imagenet_resnet50.gin',
            'image',
            input_data.jpeg_folder,
            (
                "images.image_folder_task.directory='{}'",
                f'images.image_folder_task.workers={workers}',
                'experiment.Experiment.group_batch=64',
            ),
            # Compared with `_NEED`: no processor is meant to train it.
            step=False,
        )
        for workers in (1, 2, 4)
    ),
    Pipeline(
        'token shards',
        'bible_lm.gin',
        'token',
        input_data.token_shards,
        ("text.language_model_task.data_dir='{}'",),
    ),
    Pipeline('flights', 'flights_dnn.gin', 'click'),
    Pipeline('digits', 'digits_resnet.gin', 'image'),
    Pipeline(
        'fashion-mnist',
        'fashion_mnist_resnet20.gin',
        'image',
        input_data.fashion_files,
        ("images.fashion_mnist_task.directory='{}'",),
    ),
    Pipeline(
        'cifar-10',
        'cifar10_resnet20.gin',
        'image',
        input_data.cifar_files,
        ("images.cifar10_task.directory='{}'",),
    ),
)


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each pipeline, then one for each rival."""
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    for pipeline in PIPELINES:
      if not options.quick or pipeline.name == 'digits':
        try:
          yield _row(pipeline, root, options)
        except (ValueError, OSError) as e:
          yield command.skipped(pipeline.name, str(e))
    jpeg = _data(PIPELINES[0], root)
    yield from input_rivals.rows(jpeg / 'train', options)


def _data(pipeline: Pipeline, root: pathlib.Path) -> pathlib.Path:
  """Makes the data, unless another pipeline has made them."""
  directory = root / pipeline.config
  if not directory.exists():
    directory.mkdir()
    if pipeline.data:
      pipeline.data(directory)
  return directory


def _row(
    pipeline: Pipeline, root: pathlib.Path, options: command.Options
) -> dict[str, Any]:
  from codistill_jax import experiment as experiment_lib
  from codistill_jax import gin_utils

  directory = _data(pipeline, root)
  gin_utils.parse(
      [f'gin_configs/tasks/{pipeline.config}'],
      [binding.format(directory) for binding in pipeline.bindings],
  )
  experiment = gin_utils.make(experiment_lib.Experiment)
  stream = experiment_lib.train_stream(experiment, 0, 1)
  units = stream.batch(0)['labels'].size
  seconds = 0.01 if options.quick else _SECONDS
  found = [_load(stream, 1000 * i, seconds) for i in range(options.times(3))]
  rates, core_rates = ([units * rate for rate in some] for some in zip(*found))
  row = {
      'name': pipeline.name,
      'config': pipeline.config,
      'unit': pipeline.unit,
      'batch': units,
      'per_sec': measure.spread(rates),
      'per_core': measure.spread(core_rates),
  }
  per_core = row['per_core']['median']
  if pipeline.unit == 'image':
    row['cores_needed'] = measure.brief(_NEED / per_core)
  if not pipeline.step:
    row['goal'] = measure.goal(per_core, at_least=_PER_CORE)
  elif not options.quick:
    step = measure.spread(_time_step(experiment, stream))['median']
    row['step_ms'] = measure.brief(1e3 * step)
    row['step_needs_per_sec'] = round(units / step)
    row['headroom'] = measure.brief(row['per_sec']['median'] * step / units)
  return row


def _load(stream: Any, step: int, seconds: float) -> tuple[float, float]:
  """Reads from this step on, for some seconds.

  Returns:
    Batches per second, and per second of processor time.
  """
  start, used, count = time.perf_counter(), time.process_time(), 0
  while not count or time.perf_counter() - start < seconds:
    count += 1
    stream.batch(step + count)
  return (
      count / (time.perf_counter() - start),
      count / (time.process_time() - used),
  )


def _time_step(experiment: Any, stream: Any) -> list[float]:
  """Seconds of one update on one device, after two that warm up."""
  import jax

  from codistill_jax import experiment as experiment_lib
  from codistill_jax import step as step_lib

  model = experiment_lib.make_model(experiment)
  train_step = experiment_lib.make_replicated_step(
      experiment, model, jax.local_devices()[:1]
  )
  batch = stream.batch(0)
  state = train_step.place(
      jax.device_get(
          step_lib.init_state(
              model, experiment.optimizer, jax.random.PRNGKey(0), batch
          )
      )
  )
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    state, metrics = train_step(state, batch, None, 0.0)
    jax.block_until_ready((state.step, metrics))
    seconds.append(time.perf_counter() - start)
  return seconds[2:]


if __name__ == '__main__':
  command.run('input', rows)
