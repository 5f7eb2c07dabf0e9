"""Images that tests make: encoded ones, folders, idx and CIFAR files."""

import gzip
import io
import struct

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (250, 10, 10), (10, 240, 20), (20, 10, 250)


def encode(image, kind='PNG', **options):
  """The file of a PIL image, or of an array."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def plain(colour, size=(16, 12)):
  """An image of one colour."""
  return Image.new('RGB', size, colour)


def gradient(width, height):
  """Red rises from left to right, green from top to bottom: 0..255."""
  x = np.linspace(0, 255, width)[None, :] + np.zeros((height, 1))
  y = np.linspace(0, 255, height)[:, None] + np.zeros((1, width))
  image = np.stack([x, y, np.full_like(x, 128)], axis=-1)
  return Image.fromarray(np.rint(image).astype(np.uint8))


def write_folder(root, split, counts, colours=(RED, GREEN, BLUE)):
  """`<root>/<split>/<class>/<n>.JPEG`; each class has a colour of its own."""
  for colour, (name, count) in zip(colours, counts.items()):
    directory = root / split / name
    directory.mkdir(parents=True)
    for i in range(count):
      content = encode(plain(colour, (20 + i, 16)), 'JPEG', quality=95)
      (directory / f'{i}.JPEG').write_bytes(content)


def write_hub(directory, splits, colours=(RED, GREEN, BLUE)):
  """A data set of Hugging Face, in Parquet: labels of each split's images.

  Image i of a split has colour `colours[i % 3]` and number i.
  """
  import datasets

  datasets.disable_progress_bars()
  directory.mkdir()
  features = datasets.Features(
      {
          'image': datasets.Image(),
          'label': datasets.ClassLabel(names=['cat', 'dog', 'emu']),
          'number': datasets.Value('int64'),
      }
  )
  for split, labels in splits.items():
    numbers = range(len(labels))
    files = [encode(plain(colours[i % 3])) for i in numbers]
    rows = {
        'image': [{'bytes': file, 'path': None} for file in files],
        'label': labels,
        'number': list(numbers),
    }
    datasets.Dataset.from_dict(rows, features).to_parquet(
        directory / f'{split}-0.parquet'
    )


def write_idx(path, array):
  """An idx file of bytes, in gzip if it is named so."""
  magic = bytes([0, 0, 8, array.ndim])
  shape = struct.pack(f'>{array.ndim}I', *array.shape)
  content = magic + shape + array.astype(np.uint8).tobytes()
  path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def write_fashion(directory, train=40, test=12):
  """Fashion-MNIST in little; the first two pixels say the image's number."""
  rng = np.random.default_rng(0)
  for prefix, count, first in (('train', train, 0), ('t10k', test, train)):
    images = rng.integers(0, 255, (count, 28, 28))
    numbers = np.arange(first, first + count)
    images[:, 0, 0], images[:, 0, 1] = numbers // 200, numbers % 200
    write_idx(directory / f'{prefix}-images-idx3-ubyte.gz', images)
    write_idx(directory / f'{prefix}-labels-idx1-ubyte.gz', numbers % 10)


def write_cifar_archive(directory, split, per_class=3):
  """`cifar10_<split>_jpeg.npz`, sorted by class; grey tells the class."""
  labels = np.repeat(np.arange(10), per_class).astype(np.uint8)
  files = [
      encode(plain((20 * x, 20 * x, 20 * x), (32, 32)), 'JPEG') for x in labels
  ]
  np.savez(
      directory / f'cifar10_{split}_jpeg.npz',
      jpeg=np.frombuffer(b''.join(files), np.uint8),
      offsets=np.cumsum([0, *map(len, files)]),
      labels=labels,
      names=np.asarray([f'class {i}' for i in range(10)]),
  )


def write_cifar_binary(directory, per_file=4):
  """The binary version: red, green and blue planes of each image."""
  names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
  for number, name in enumerate(names):
    rows = np.zeros((per_file, 3073), np.uint8)
    rows[:, 0] = np.arange(per_file) + number
    rows[:, 1 : 1 + 1024] = rows[:, :1] * 10  # Red.
    rows[:, 1 + 1024 + 34] = 200  # Green, second row, third column.
    rows.tofile(directory / name)
