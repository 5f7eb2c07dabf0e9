r"""Does loading keep up with training? Batches per second against the step.

    python -m benchmarks.input --need=2500

Every pipeline is a line of `PIPELINES`: a configuration of the project on data
of the usual size, which are made here (noise, in the true formats). Each is
read as training reads it, `stream.batch(step)` for one step after another, in
turn with the others; and one update of its model is timed on one device,
without teachers, which is when it asks for most. Files are in the page cache:
a disk is not measured.

Prints JSON, and a table to stderr: medians over repeats. `per_core` is what a
second of processor time gives, which hardly depends on what else runs on the
machine; `headroom` is how many examples are loaded while the step takes one,
each alone on the machine; `cores_needed` are those that load for `--need`;
`load` is the mean number of running processes in the minute before.
"""

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from benchmarks import input_data, measure

_FLAGS = flags.FLAGS


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
    *(
        Pipeline(
            f'jpeg folder, {workers} worker(s)',
            'imagenet_resnet50.gin',
            'image',
            input_data.jpeg_folder,
            (
                "images.image_folder_task.directory='{}'",
                f'images.image_folder_task.workers={workers}',
                'experiment.Experiment.group_batch=64',
            ),
            # Compared with `--need`: no processor is meant to train it.
            step=False,
        )
        for workers in (1, 2, 4)
    ),
)


class Measured(NamedTuple):
  """What is measured of a pipeline."""

  pipeline: Pipeline
  experiment: Any
  stream: Any
  units: int  # Of a batch.
  rates: list[float]  # Batches per second.
  core_rates: list[float]  # Batches per second of processor time.
  steps: list[float]  # Seconds.


def main(argv: Sequence[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  machine, opened, skipped = measure.machine(), [], {}
  wanted = lambda p: any(word in p.name for word in _FLAGS.only or [''])
  with tempfile.TemporaryDirectory() as root:
    for pipeline in filter(wanted, PIPELINES):
      try:
        opened.append(_open(pipeline, pathlib.Path(root)))
      except (ValueError, OSError) as e:
        skipped[pipeline.name] = str(e)
    for repeat in range(_FLAGS.repeats):
      for one in measure.in_turn(opened, repeat):
        _load(one)
    for one in opened:
      if _FLAGS.step and one.pipeline.step:
        one.steps.extend(_time_step(one))
  results = list(map(_result, opened))
  found = {
      'benchmark': 'input',
      **machine,
      'repeats': _FLAGS.repeats,
      'seconds': _FLAGS.seconds,
      'need': _FLAGS.need,
      'results': results,
      'skipped': skipped,
  }
  print(json.dumps(found, indent=2))
  import pandas as pd

  table = pd.DataFrame(results).drop(columns=['config', 'step_ms'])
  print(table.to_string(index=False, na_rep='-'), file=sys.stderr)
  for name, reason in skipped.items():
    print(f'skipped {name}: {reason}', file=sys.stderr)


def _open(pipeline: Pipeline, root: pathlib.Path) -> Measured:
  """Makes the data, unless another pipeline has made them, and the stream."""
  from codistill_jax import experiment as experiment_lib
  from codistill_jax import gin_utils

  directory = root / pipeline.config
  if not directory.exists():
    directory.mkdir()
    if pipeline.data:
      pipeline.data(directory)
  gin_utils.parse(
      [f'gin_configs/tasks/{pipeline.config}'],
      [binding.format(directory) for binding in pipeline.bindings],
  )
  experiment = gin_utils.make(experiment_lib.Experiment)
  stream = experiment_lib.train_stream(experiment, 0, 1)
  units = stream.batch(0)['labels'].size
  return Measured(pipeline, experiment, stream, units, [], [], [])


def _load(one: Measured) -> None:
  """Reads for some seconds, where the last measurement stopped reading."""
  start, cpu, count = time.perf_counter(), time.process_time(), 0
  first = 1 + 1000 * len(one.rates)
  while not count or time.perf_counter() - start < _FLAGS.seconds:
    one.stream.batch(first + count)
    count += 1
  one.rates.append(count / (time.perf_counter() - start))
  one.core_rates.append(count / (time.process_time() - cpu))


def _time_step(one: Measured) -> list[float]:
  """Seconds of one update on one device, after two that warm up."""
  import jax

  from codistill_jax import experiment as experiment_lib
  from codistill_jax import step as step_lib

  model = experiment_lib.make_model(one.experiment)
  train_step = experiment_lib.make_replicated_step(
      one.experiment, model, jax.local_devices()[:1]
  )
  batch = one.stream.batch(0)
  state = train_step.place(
      jax.device_get(
          step_lib.init_state(
              model, one.experiment.optimizer, jax.random.PRNGKey(0), batch
          )
      )
  )
  seconds = []
  for _ in range(2 + max(3, _FLAGS.repeats)):
    start = time.perf_counter()
    state, metrics = train_step(state, batch, None, 0.0)
    jax.block_until_ready((state.step, metrics))
    seconds.append(time.perf_counter() - start)
  return seconds[2:]


def _result(one: Measured) -> dict[str, Any]:
  rate, per_core = map(statistics.median, (one.rates, one.core_rates))
  result = {
      'name': one.pipeline.name,
      'config': one.pipeline.config,
      'unit': one.pipeline.unit,
      'batch': one.units,
      'batches_per_sec': measure.brief(rate),
      'per_sec': round(rate * one.units),
      'per_core': round(per_core * one.units),
      'step_ms': None,
      'step_needs_per_sec': None,
      'headroom': None,
  }
  if one.steps:
    step = statistics.median(one.steps)
    result['step_ms'] = round(1e3 * step, 2)
    result['step_needs_per_sec'] = round(one.units / step)
    result['headroom'] = measure.brief(rate * step)
  if _FLAGS.need and one.pipeline.unit == 'image':
    result['share_of_need'] = measure.brief(rate * one.units / _FLAGS.need)
    result['cores_needed'] = measure.brief(_FLAGS.need / (per_core * one.units))
  return result


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_float(
      'need', None, 'Examples per second that an accelerator takes, to compare.'
  )
  flags.DEFINE_multi_string(
      'only',
      [],
      'Measure only pipelines with this in their name; repeatable.',
  )
  flags.DEFINE_integer('repeats', 3, 'Measurements of each pipeline.')
  flags.DEFINE_float('seconds', 1.0, 'Length of each measurement.')
  flags.DEFINE_bool('step', True, "Time each model's update too.")


if __name__ == '__main__':
  define_flags()
  app.run(main)
