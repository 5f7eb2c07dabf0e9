"""Random parts of the same JPEG files, by other loaders: tf.data and grain.

All get the same files and the same boxes, and give the same batches, float32
and normalised: before anything is timed, their pixels are compared with ours.
Measured in turn, by the processor time of all threads: it counts what a loader
does beside the calling thread, and hardly depends on what else is running.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import command, measure

Batches = Callable[[int], Iterator[Any]]  # So many of them.
_BATCH, _BATCHES, _SIZE = 64, 8, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Levels of 0..255, on average: tf.data decodes no more than the part.
_TOLERANCE = 2.0


class Parts(NamedTuple):
  """What to read: N parts of images, mirrored or not."""

  files: list[str]
  draws: Any  # (N, K)
  boxes: Any  # (N, 4), int32.
  mirrored: Any  # (N,)


def rows(
    directory: pathlib.Path, options: command.Options
) -> Iterator[dict[str, Any]]:
  """Yields one row for each rival.

  Args:
    directory: With a folder of images for each class.
    options: How to measure.
  """
  batch, batches = (2, 1) if options.quick else (_BATCH, _BATCHES)
  parts = _parts(directory, batch * batches)
  ours = _ours(parts, batch)
  for name, package, make in (
      ('tf.data', 'tensorflow', _tf_data),
      ('grain', 'grain', _grain),
  ):
    title = f'JPEG folder, beside {name}'
    if not measure.versions([package]):
      yield command.skipped(title, f"needs the extra 'bench': {package}")
      continue
    theirs = make(parts, batch)
    seconds = measure.alternate(
        {'ours': _arm(ours), 'theirs': _arm(theirs)},
        options.times(5),
        least_seconds=100.0,
        most_calls=batches,
    )
    rates = {k: [batch / s for s in x] for k, x in seconds.items()}
    ratio = measure.ratio(rates['ours'], rates['theirs'])
    yield {
        'name': title,
        'unit': 'image',
        'version': measure.versions([package])[package],
        'deviation': _deviation(ours, theirs, name),
        'per_core': measure.spread(rates['ours']),
        'their_per_core': measure.spread(rates['theirs']),
        'ratio': ratio,
        'goal': measure.goal(ratio['median'], at_least=1.0),
    }


def _parts(directory: pathlib.Path, count: int) -> Parts:
  import numpy as np
  from PIL import Image

  from codistill_jax.data import augment

  found = sorted(map(str, directory.glob('*/*')))
  rng = np.random.default_rng(0)
  files = [found[i] for i in rng.integers(0, len(found), count)]
  draws = rng.random((count, augment.RESIZED_CROP_DRAWS))
  boxes = [
      augment.random_resized_box(*Image.open(file).size, drawn)
      for file, drawn in zip(files, draws)
  ]
  mirrored = np.asarray([augment.is_mirrored(drawn) for drawn in draws])
  return Parts(files, draws, np.asarray(boxes, np.int32), mirrored)


def _arm(make: Batches) -> measure.Arm:
  def arm(times: int) -> float:
    start = time.process_time()
    for _ in make(times):
      pass
    return time.process_time() - start

  return arm


def _deviation(ours: Batches, theirs: Batches, name: str) -> float:
  """Returns how many of 255 levels pixels differ by, on average.

  Raises:
    ValueError: If they are not of the same images.
  """
  import numpy as np

  (mine,), (other,) = ours(1), theirs(1)
  levels = np.abs(np.asarray(mine) - np.asarray(other)) * _STD * 255
  if mine.shape != other.shape or not levels.mean() <= _TOLERANCE:
    raise ValueError(
        f'{name} gives {other.shape}, we give {mine.shape}, and pixels differ'
        f' by {levels.mean():.1f} of 255; expected {_TOLERANCE} at most'
    )
  return measure.brief(float(levels.mean()))


def _ours(parts: Parts, batch: int) -> Batches:
  import numpy as np

  from codistill_jax.data import image_decode

  images = image_decode.EncodedImages(
      image_decode.Encoded(
          lambda i: pathlib.Path(parts.files[i]).read_bytes(),
          lambda i: parts.files[i],
          np.zeros(len(parts.files), np.int32),
          ('any',),
      ),
      size=_SIZE,
      resize=_SIZE,
      mean=_MEAN,
      std=_STD,
      workers=measure.cores(),
  )

  def batches(count: int) -> Iterator[Any]:
    for rows in np.arange(count * batch).reshape(count, batch):
      yield images.read(rows, parts.draws[rows])['inputs']

  return batches


def _tf_data(parts: Parts, batch: int) -> Batches:
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')
  cores = measure.cores()

  def load(file: Any, box: Any, mirrored: Any) -> Any:
    left, top, right, bottom = tf.unstack(box)
    image = tf.image.decode_and_crop_jpeg(
        tf.io.read_file(file), [top, left, bottom - top, right - left], 3
    )
    image = tf.image.resize(image, (_SIZE, _SIZE), antialias=True)
    image = tf.cond(mirrored, lambda: image[:, ::-1], lambda: image)
    return (image / 255 - _MEAN) / _STD

  # No more is read than is asked for, all of which counts; what is traced once
  # does not.
  @functools.cache
  def dataset(count: int) -> Any:
    some = (parts.files, parts.boxes, parts.mirrored)
    data = tf.data.Dataset.from_tensor_slices(some).take(count * batch)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    data = data.map(load, num_parallel_calls=cores).batch(batch)
    return data.with_options(options)

  return lambda count: dataset(count).as_numpy_iterator()


def _grain(parts: Parts, batch: int) -> Batches:
  import grain

  from codistill_jax.data import augment, image_decode

  # Grain has no decoder: ours.
  def load(i: int) -> Any:
    image = image_decode.decode_part(
        pathlib.Path(parts.files[i]).read_bytes(),
        lambda w, h: parts.boxes[i],
        _SIZE,
        parts.mirrored[i],
    )
    return augment.normalise(image, _MEAN, _STD)

  options = grain.ReadOptions(measure.cores(), measure.cores())

  def batches(count: int) -> Iterator[Any]:
    source = grain.MapDataset.source(range(count * batch))
    return iter(source.map(load).batch(batch).to_iter_dataset(options))

  return batches
