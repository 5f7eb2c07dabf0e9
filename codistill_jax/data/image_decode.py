"""JPEG and other image files to arrays, on several cores.

By Pillow in a pool of threads: a random part of a 500 x 375 JPEG, to 224 x 224,
takes 1.9 ms of a core, 0.1 ms of them with the interpreter's lock. It reads
every format, resizes with antialiasing, and decodes large JPEG files at a half,
a quarter or an eighth of their size. OpenCV would save a fifth for a wheel of
60 MB; tf.data and grain cannot give batch n without having made those before,
or load in parallel only behind an iterator with a state of its own, where the
contract here is `batch(step)`. (`benchmarks/input.py` measures it anywhere.)

Shape suffixes: B images, H height, W width, C channels, K draws.
"""

import concurrent.futures
import io
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from codistill_jax import base
from codistill_jax.data import augment, process_pool

_NAMED = 20  # Damaged images that are named in the log; the others are counted.


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
      encoded: Callable[[int], bytes],
      name: Callable[[int], str],
      labels: np.ndarray,
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
      encoded: The content of an image's file.
      name: What to call an image in a message.
      labels: int32, of all images.
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
    self._encoded, self._name, self._labels = encoded, name, labels
    self._size, self._resize = size, resize
    self._mean, self._std = mean, std
    self._workers = workers or process_pool.usable_cores()
    self._max_damaged = max(1, int(max_damaged * len(labels)))
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
        'labels': self._labels[indices_B],
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
      image = decode_part(self._encoded(index), box_of, self._size, mirror)
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
    count, name = len(self.damaged), self._name(index)
    said = f'{count} of {len(self._labels)} images so far'
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


def decode_all(
    files: Sequence[bytes], shape: tuple[int, int, int]
) -> np.ndarray:
  """Decodes small images of one size into memory: uint8 (N, H, W, 3).

  Raises:
    ValueError: If an image is damaged or not of this shape; it names the
      number.
  """
  from PIL import Image

  images = np.empty((len(files), *shape), np.uint8)
  for i, file in enumerate(files):
    try:
      image = np.asarray(to_rgb(Image.open(io.BytesIO(file))))
    except Exception as e:  # As in `EncodedImages`.
      raise ValueError(
          f'image {i} of {len(files)} cannot be decoded: {e}'
      ) from e
    if image.shape != shape:
      raise ValueError(
          f'image {i} of {len(files)} has shape {image.shape}; expected {shape}'
      )
    images[i] = image
  return images
