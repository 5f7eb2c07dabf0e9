"""Images that stay encoded until they are read: files, decoding, the hub.

Decoding is done by Pillow in a pool of threads: a random part of a 500 x 375
JPEG, to 224 x 224, takes 1.9 ms of a core, 0.1 ms of them with the
interpreter's lock. It reads every format, resizes with antialiasing, and
decodes large JPEG files at a half, a quarter or an eighth of their size. OpenCV
would save a fifth for a wheel of 60 MB; tf.data and grain cannot give batch n
without having made those before, or load in parallel only behind an iterator
with a state of its own, where the contract here is `batch(step)`.
(`benchmarks/input.py` measures it anywhere.)

Shape suffixes: B images, H height, W width, C channels, K draws.
"""

import concurrent.futures
import io
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from codistill_jax import base
from codistill_jax.data import augment, process_pool
from codistill_jax.storage.files import one_line

_NAMED = 20  # Damaged images that are named in the log; the others are counted.
_ENDINGS = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


class Encoded(NamedTuple):
  """Encoded images and their labels.

  Attributes:
    encoded: The content of the file of image i; any thread may call it.
    name: What to call image i in a message.
    labels: int32 (N,).
    classes: Their names, in order.
  """

  encoded: Callable[[int], bytes]
  name: Callable[[int], str]
  labels: np.ndarray
  classes: tuple[str, ...]


class EncodedImages:
  """Images that are decoded when they are read.

  An image that cannot be read or decoded becomes zeros of weight 0: it counts
  in no loss; batch normalisation sees an image of the mean colour. It is named
  in the log once. Only if too many are damaged, which means that something else
  is wrong, an error ends the run.

  Attributes:
    damaged: Why, by the index of each image that could not be read.
  """

  def __init__(
      self,
      data: Encoded,
      *,
      size: int,
      resize: int,
      mean: np.ndarray,
      std: np.ndarray,
      workers: int | None = None,
      max_damaged: float = 0.01,
  ):
    """Reads nothing yet.

    Args:
      data: The images.
      size: Height and width of what is read, in pixels.
      resize: For evaluation, what the shorter side is resized to before the
        centre is cut out.
      mean: (3,) of pixels in 0..1.
      std: (3,)
      workers: Threads that decode; None: one for each core.
      max_damaged: Share of all images beyond which damaged ones are an error.

    Raises:
      ValueError: If an argument is out of range.
    """
    if not (type(size) is type(resize) is int and 1 <= size <= resize):
      raise ValueError(
          'Expected whole numbers 1 <= size <= resize; got'
          f' size={size!r}, resize={resize!r}.'
      )
    if workers is not None and (type(workers) is not int or workers < 1):
      raise ValueError(f'workers must be 1 or more, or None; got {workers!r}.')
    self.damaged: dict[int, str] = {}
    self._data = data
    self._size, self._resize = size, resize
    self._mean, self._std = mean, std
    self._workers = workers or process_pool.usable_cores()
    self._max_damaged = max(1, int(max_damaged * len(data.labels)))
    self._lock = threading.Lock()
    # Threads start when they are needed.
    self._pool = concurrent.futures.ThreadPoolExecutor(self._workers, 'decode')

  def read(
      self, indices_B: np.ndarray, draws_BK: np.ndarray | None = None
  ) -> base.Batch:
    """Returns a batch: see `examples.Split`.

    Args:
      indices_B: Which images.
      draws_BK: Uniform in [0, 1), for a random part; None: the centre.

    Raises:
      OSError: If too many images are damaged.
    """
    num = len(indices_B)
    inputs = np.zeros((num, self._size, self._size, 3), np.float32)
    weights = np.ones((num,), np.float32)

    def read_some(places: np.ndarray) -> None:
      for i in places:
        draws_K = None if draws_BK is None else draws_BK[i]
        if not self._read_one(int(indices_B[i]), draws_K, inputs[i]):
          weights[i] = 0.0

    # A few parts for each thread, so that all end at about the same time.
    parts = np.array_split(np.arange(num), min(num, 4 * self._workers))
    for _ in self._pool.map(read_some, parts):
      pass  # Raises what was raised there.
    return {
        'inputs': inputs,
        'labels': self._data.labels[indices_B],
        'weights': weights,
    }

  def _read_one(
      self, index: int, draws_K: np.ndarray | None, out: np.ndarray
  ) -> bool:
    if draws_K is None:
      box_of = lambda w, h: augment.centre_box(w, h, self._size, self._resize)
    else:
      box_of = lambda w, h: augment.random_resized_box(w, h, draws_K)
    mirror = draws_K is not None and augment.is_mirrored(draws_K)
    try:
      image = decode_part(self._data.encoded(index), box_of, self._size, mirror)
    except Exception as e:
      # Decoders raise whatever they trip over (OSError, SyntaxError, struct
      # and zlib errors, DecompressionBombError, ...): no common base class.
      with self._lock:  # Of the log too: the count rises from line to line.
        if index not in self.damaged:
          self._note(index, e)
      return False
    augment.normalise(image, self._mean, self._std, out)
    return True

  def _note(self, index: int, error: Exception) -> None:
    # Pillow names the buffer in memory that the file was read into.
    reason = re.sub(r'<_io\.BytesIO[^>]*>', '', str(error))
    reason = ' '.join(reason.split()) or type(error).__name__
    self.damaged[index] = reason
    count, name = len(self.damaged), self._data.name(index)
    said = f'{count} of {len(self._data.labels)} images so far'
    if count > self._max_damaged:
      raise OSError(
          f'Too many images cannot be read: {said}, now {name}: {reason}. Is'
          ' the disk there? Repair or remove them, or raise max_damaged.'
      ) from error
    if count <= _NAMED:
      logging.warning(
          '%s cannot be read and has weight 0: %s (%s)%s',
          name,
          reason,
          said,
          '; others will not be named' if count == _NAMED else '',
      )


def decode_part(
    encoded: bytes,
    box_of: Callable[[int, int], augment.Box],
    size: int,
    mirror: bool = False,
) -> np.ndarray:
  """Decodes a part of an image, resized to a square.

  Args:
    encoded: An image file of any format.
    box_of: Gives the part, from width and height of the image in pixels.
    size: Height and width of the result.
    mirror: Whether left and right are swapped.

  Returns:
    uint8 (size, size, 3), RGB. Resized bilinearly with antialiasing.

  Raises:
    Exception: Whatever the decoder trips over.
  """
  from PIL import Image

  image = Image.open(io.BytesIO(encoded))
  width, height = image.size
  left, top, right, bottom = box_of(width, height)
  shrink = min(right - left, bottom - top) / size
  if shrink >= 2:
    # Decoding a JPEG at a half, a quarter or an eighth is cheaper, and leaves
    # at least `size` pixels; other formats ignore it.
    image.draft(None, (int(width / shrink), int(height / shrink)))
  image = to_rgb(image)
  x, y = image.width / width, image.height / height
  image = image.resize(
      (size, size),
      Image.Resampling.BILINEAR,
      box=(left * x, top * y, right * x, bottom * y),
  )
  if mirror:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def decode(encoded: bytes) -> np.ndarray:
  """Decodes a whole image: uint8 (H, W, 3); raises whatever it trips over."""
  from PIL import Image

  return np.asarray(to_rgb(Image.open(io.BytesIO(encoded))))


def to_rgb(image: Any) -> Any:
  """Converts a `PIL.Image` of any mode to RGB.

  Grey is repeated; transparency is dropped; 16 bits become 8 (Pillow's own
  conversion would cut off what is above 255).
  """
  from PIL import Image

  if image.mode.startswith('I'):
    high = np.clip(np.asarray(image).astype(np.int64) // 256, 0, 255)
    image = Image.fromarray(high.astype(np.uint8))
  if image.mode == 'P':
    # Directly to RGB, Pillow warns about some kinds of transparency.
    image = image.convert('RGBA')
  return image if image.mode == 'RGB' else image.convert('RGB')


# --- Folders ------------------------------------------------------------------


def read_folder(
    directory: str | os.PathLike, classes: tuple[str, ...] | None = None
) -> Encoded:
  """Finds `<directory>/<class>/*.JPEG`, the layout of ImageNet.

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
      files = sorted(
          e.name
          for e in _visible(root / class_name)
          if e.name.lower().endswith(_ENDINGS)
      )
      names += [f'{class_name}/{file}' for file in files]
      labels += [label] * len(files)
  if not names:
    raise FileNotFoundError(
        f'There is no image in {root}/<class>/ (endings: {" ".join(_ENDINGS)}).'
    )
  prefix = os.fspath(root)
  path_of = lambda i: os.path.join(prefix, names[i])
  return Encoded(
      lambda i: _read(path_of(i)),
      path_of,
      np.asarray(labels, np.int32),
      classes,
  )


def _visible(directory: pathlib.Path) -> list[os.DirEntry]:
  return [e for e in os.scandir(directory) if not e.name.startswith('.')]


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
) -> Encoded:
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
        f'Cannot read split {split} of {name}: {one_line(e)}; check the'
        ' name, the network and, for a gated data set, that you are logged in'
        ' (hf auth login); or use images.image_folder_task.'
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
  column = rows.select_columns([label_key]).with_format('arrow')[:][label_key]
  labels = column.to_numpy().astype(np.int32)
  if not len(labels) or labels.min() < 0:
    raise ValueError(f'{where} is empty or has no labels; choose another.')
  rows = rows.select_columns([image_key]).cast_column(
      image_key, datasets.Image(decode=False)
  )
  return Encoded(
      lambda i: _content(rows[i][image_key]),
      lambda i: f'image {i} of {where}',
      labels,
      tuple(label_feature.names),
  )


def _content(image: dict[str, Any]) -> bytes:
  """Reads an image: some data sets hold it, others where it is."""
  return image['bytes'] or _read(image['path'])
