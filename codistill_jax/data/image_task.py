"""From images to a `base.Task`: splits, identity, streams.

Shape suffixes: see `image_stream`.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from codistill_jax import base
from codistill_jax.data import image_decode, image_files, label_counts
from codistill_jax.data.image_arrays import ArrayImages, Labelled
from codistill_jax.data.image_stream import (
    EvalImages,
    Images,
    ImageStream,
    subset,
)

Split = tuple[Images, np.ndarray]  # The images, and which of them.
# Mean and deviation of the training pixels in 0..1, by channel.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def _task(
    name: str,
    classes: Sequence[str],
    train: Split,
    validation: Split,
    test: Split | None,
    *,
    partition: str,
    seed: int,
) -> base.Task:
  return base.Task(
      train_stream=functools.partial(
          ImageStream, *train, partition=partition, seed=seed
      ),
      eval_batches=functools.partial(EvalImages, *validation),
      test_batches=None
      if test is None
      else functools.partial(EvalImages, *test),
      num_classes=len(classes),
      identity={
          'task': name,
          'num_classes': str(len(classes)),
          'label_space': label_space(classes),
      },
      example_name='image',
      description=(
          f'{name}: {len(train[1]):,} training images of {len(classes):,}'
          f' classes, {partition} partition'
      ),
      partition=partition,
      label_frequencies=lambda: label_counts.frequencies(
          [train[0].labels[train[1]]], len(classes)
      ),
  )


def label_space(classes: Sequence[str]) -> str:
  """Hash of the names of the classes in order: what a prediction means."""
  return hashlib.sha256('\n'.join(classes).encode('utf-8')).hexdigest()


def _everything(images: Images) -> Split:
  return images, np.arange(len(images.labels))


def _carved(
    images: Images, fraction: float, split_seed: int
) -> tuple[Split, Split]:
  """Training and validation split of the same images."""
  if not 0 < fraction < 1:
    raise ValueError(
        f'validation_fraction must be between 0 and 1; got {fraction}.'
    )
  size = len(images.labels)
  validation, train = subset(
      size, max(1, round(fraction * size)), seed=split_seed
  )
  return (images, train), (images, validation)


def task_in_memory(
    name: str,
    train: Labelled,
    test: Labelled,
    statistics: Statistics,
    *,
    validation_fraction: float,
    pad: int,
    flip: bool,
    partition: str,
    seed: int,
) -> base.Task:
  mean, std = statistics
  images = ArrayImages(train, mean=mean, std=std, pad=pad, flip=flip)
  return _task(
      name,
      train.classes,
      *_carved(images, validation_fraction, 0),
      _everything(ArrayImages(test, mean=mean, std=std)),
      partition=partition,
      seed=seed,
  )


def task_of_files(
    name: str,
    train: image_files.EncodedSplit,
    validation: image_files.EncodedSplit | None,
    test: image_files.EncodedSplit | None,
    statistics: Statistics,
    *,
    size: int,
    resize: int,
    validation_fraction: float,
    max_eval_images: int | None,
    workers: int | None,
    max_damaged: float,
    partition: str,
    seed: int,
) -> base.Task:
  def images_of(split: image_files.EncodedSplit) -> image_decode.EncodedImages:
    return image_decode.EncodedImages(
        split.encoded,
        split.name,
        split.labels,
        size=size,
        resize=resize,
        mean=statistics[0],
        std=statistics[1],
        workers=workers,
        max_damaged=max_damaged,
    )

  def some_of(split: Split) -> Split:
    images, examples = split
    if max_eval_images is None or max_eval_images >= len(examples):
      return split
    if max_eval_images < 1:
      raise ValueError(
          f'max_eval_images must be 1 or more, or None; got {max_eval_images}.'
      )
    # Not the first ones: splits are sorted by class.
    chosen, _ = subset(len(examples), max_eval_images)
    return images, examples[chosen]

  images = images_of(train)
  if validation is None:
    for_training, for_validation = _carved(images, validation_fraction, 0)
  else:
    for_training = _everything(images)
    for_validation = _everything(images_of(validation))
  return _task(
      name,
      train.classes,
      for_training,
      some_of(for_validation),
      None if test is None else _everything(images_of(test)),
      partition=partition,
      seed=seed,
  )
