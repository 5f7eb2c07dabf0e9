"""Large images that stay encoded until they are read: folders, Hugging Face."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_ENDINGS = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


class EncodedSplit(NamedTuple):
  """A split of encoded images.

  Attributes:
    encoded: The content of the file of image i; any thread may call it.
    name: What to call image i in a message.
    labels: int32, of all images.
    classes: The names of the classes, in the order of their numbers.
  """

  encoded: Callable[[int], bytes]
  name: Callable[[int], str]
  labels: np.ndarray
  classes: tuple[str, ...]


def folder_split(
    directory: str | os.PathLike, classes: tuple[str, ...] | None = None
) -> EncodedSplit:
  """`<directory>/<class>/*.JPEG`, the layout of ImageNet.

  Classes are numbered, and images ordered, by name. What begins with a dot is
  no class and no image: other programs leave such things behind.

  Args:
    directory: Of the split.
    classes: Those of the training split; None: those that are found.

  Raises:
    FileNotFoundError: If there is no such directory, or no image in it.
    ValueError: If there is a class that is not in `classes`.
  """
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise FileNotFoundError(
        f'There is no directory {root}; expected'
        f' {root.parent}/train/<class>/*.JPEG and'
        f' {root.parent}/validation/<class>/*.JPEG.'
    )
  found = sorted(e.name for e in _visible(root) if e.is_dir())
  classes = tuple(found) if classes is None else classes
  unknown = sorted(set(found) - set(classes))
  if unknown:
    raise ValueError(
        f'{root}/{unknown[0]} is no class of the training split (there are'
        f' {len(unknown)} such); move or remove it.'
    )
  names, labels = [], []
  for label, class_name in enumerate(classes):
    if class_name in found:
      files = _images_in(root / class_name)
      names += [f'{class_name}/{file}' for file in files]
      labels += [label] * len(files)
  if not names:
    raise FileNotFoundError(
        f'There is no image in {root}/<class>/ (endings: {" ".join(_ENDINGS)}).'
    )
  prefix = os.fspath(root)
  path_of = lambda i: os.path.join(prefix, names[i])
  return EncodedSplit(
      lambda i: _read(path_of(i)),
      path_of,
      np.asarray(labels, np.int32),
      classes,
  )


def _visible(directory: pathlib.Path) -> list[os.DirEntry]:
  return [e for e in os.scandir(directory) if not e.name.startswith('.')]


def _images_in(directory: pathlib.Path) -> list[str]:
  return sorted(
      e.name for e in _visible(directory) if e.name.lower().endswith(_ENDINGS)
  )


def _read(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


def hugging_face_split(
    name: str,
    config: str | None,
    split: str,
    *,
    image_key: str,
    label_key: str,
) -> EncodedSplit:
  """A split of a Hugging Face data set, as Arrow files on this machine.

  Downloads it on the first use; then images are read at random from disk.

  Args:
    name: On the hub, such as 'ILSVRC/imagenet-1k', or a directory.
    config: Of the data set, if it has several.
    split: Such as 'train'.
    image_key: Column of images.
    label_key: Column of class numbers.

  Raises:
    OSError: If the data set cannot be read.
    ValueError: If it has no such columns, or the package is missing.
  """
  try:
    import datasets
  except ImportError as e:
    raise ValueError(
        f'The data set {name} needs the package datasets: pip install datasets.'
    ) from e
  try:
    rows = datasets.load_dataset(name, config, split=split)
  except Exception as e:
    # Seen in datasets 5.2: errors of the HTTP client that are no OSError,
    # ValueError, StopIteration, pyarrow's. There is no common base class.
    raise _unreadable(name, split, e) from e
  where = f'{name}, split {split}'
  for key in (image_key, label_key):
    if key not in rows.column_names:
      raise ValueError(
          f'{where} has no column {key!r} but {", ".join(rows.column_names)};'
          ' set image_key and label_key.'
      )
  label_feature = rows.features[label_key]
  if not isinstance(label_feature, datasets.ClassLabel):
    raise ValueError(
        f'Column {label_key!r} of {where} is {label_feature}; expected class'
        ' labels with names. Cast it, or choose another with label_key.'
    )
  classes = tuple(label_feature.names)
  column = rows.select_columns([label_key]).with_format('arrow')[:][label_key]
  labels = column.to_numpy().astype(np.int32)
  if not len(labels) or labels.min() < 0:
    raise ValueError(f'{where} is empty or has no labels; choose another.')
  rows = rows.select_columns([image_key]).cast_column(
      image_key, datasets.Image(decode=False)
  )
  return EncodedSplit(
      lambda i: _encoded(rows[i][image_key]),
      lambda i: f'image {i} of {where}',
      labels,
      classes,
  )


def _encoded(image: dict[str, Any]) -> bytes:
  """Some data sets hold the images, others where they are."""
  return image['bytes'] or _read(image['path'])


def _unreadable(name: str, split: str, error: Exception) -> OSError:
  reason = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
  return OSError(
      f'Cannot read split {split} of {name}: {reason}. Check the name, the'
      ' network and, for a gated data set, that you are logged in (hf auth'
      ' login); or use images.image_folder_task.'
  )
