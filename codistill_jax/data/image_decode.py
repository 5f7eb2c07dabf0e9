"""Decoding of images: any format and mode, threads, damaged files.

Decoding is done by Pillow in a pool of threads: a random part of a 500 x 375
JPEG, to 224 x 224, takes 1.4 ms of a core, 0.1 ms of them with the
interpreter's lock. It reads every format, resizes with antialiasing, and
decodes large JPEG files at a half, a quarter or an eighth of their size. OpenCV
would save a fifth for a wheel of 60 MB; tf.data and grain cannot give batch n
without having made those before, or load in parallel only behind an iterator
with a state of its own, where the contract here is `batch(step)`.
(`benchmarks/input.py` measures it anywhere.)

Shape suffixes: B images, N of all, K draws.
"""

import concurrent.futures
import io
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from codistill_jax import base
from codistill_jax.data import augment, prepare

_NAMED = 20  # Images that are named in the log; the others are counted.


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

  An image of one colour only is named too, as something may be wrong with it.

  Attributes:
    damaged: Why, by the index of each image that could not be read.
    plain: The colour, by the index of each image that has no other.
  """

  def __init__(
      self,
      data: Encoded,
      *,
      size: int,
      resize: int,
      mean: np.typing.ArrayLike,
      std: np.typing.ArrayLike,
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
    # Missing, it would make damaged ones of all images.
    import PIL  # noqa: F401

    self.damaged: dict[int, str] = {}
    self.plain: dict[int, str] = {}
    self._data = data
    self._size, self._resize = size, resize
    self._mean, self._std = mean, std
    self._workers = workers or prepare.usable_cores()
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
      encoded = self._data.encoded(index)
      image = decode_part(encoded, box_of, self._size, mirror)
    except Exception as e:
      # Decoders raise whatever they trip over (OSError, SyntaxError, struct
      # and zlib errors, DecompressionBombError, ...): no common base class.
      # Pillow names the buffer in memory that the file was read into.
      reason = re.sub(r'<_io\.BytesIO[^>]*>', '', str(e))
      reason = ' '.join(reason.split()) or type(e).__name__
      self._note(self.damaged, index, reason, 'cannot be read: weight 0')
      return False
    # A part of one colour is common, a whole image is not.
    if _is_plain(image) and index not in self.plain:
      whole = decode(encoded)
      if _is_plain(whole):
        self._note(self.plain, index, str(whole[0, 0]), 'has one colour only')
    augment.normalise(image, self._mean, self._std, out)
    return True

  def _note(
      self, noted: dict[int, str], index: int, reason: str, what: str
  ) -> None:
    """Counts an image; names it in the log, if it is among the first."""
    with self._lock:  # Of the log too: the count rises from line to line.
      if index in noted:
        return
      noted[index] = reason
      count, name = len(noted), self._data.name(index)
      said = f'{count} of {len(self._data.labels)} images so far'
      if noted is self.damaged and count > self._max_damaged:
        raise OSError(
            f'Too many images cannot be read: {said}, now {name}: {reason}. Is'
            ' the disk there? Repair or remove them, or raise max_damaged.'
        )
      if count <= _NAMED:
        last = '; others will not be named' if count == _NAMED else ''
        logging.warning('%s %s: %s (%s)%s', name, what, reason, said, last)


def _is_plain(image: np.ndarray) -> bool:
  first = image[0, 0]  # A line tells nearly all, in a hundredth of the time.
  return bool((image[0] == first).all() and (image == first).all())


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
  turn = _turn(image)
  stored = image.size
  box = box_of(*(stored[::-1] if turn in _SIDEWAYS else stored))
  left, top, right, bottom = _box_as_stored(box, *stored, turn)
  shrink = min(right - left, bottom - top) / size
  scale = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
  if scale > 1:
    # Decoding a JPEG at a half, a quarter or an eighth is cheaper, and leaves
    # at least `size` pixels; other formats ignore it.
    image.draft(None, (image.width // scale, image.height // scale))
    # Not by its size, which is rounded up.
    scale = scale if image.width < stored[0] else 1
  image = to_rgb(image).resize(
      (size, size),
      Image.Resampling.BILINEAR,
      box=(left / scale, top / scale, right / scale, bottom / scale),
  )
  # Only now, when there is least to turn.
  for name in filter(None, (turn, 'FLIP_LEFT_RIGHT' if mirror else None)):
    image = image.transpose(Image.Transpose[name])
  return np.asarray(image)


def _box_as_stored(
    box: augment.Box, width: int, height: int, turn: str | None
) -> augment.Box:
  """Returns a part of an upright image, in the file as it is stored."""
  left, top, right, bottom = box
  if turn in _SIDEWAYS:
    left, top, right, bottom = top, left, bottom, right
  if turn in ('FLIP_LEFT_RIGHT', 'ROTATE_180', 'TRANSVERSE', 'ROTATE_90'):
    left, right = width - right, width - left
  if turn in ('FLIP_TOP_BOTTOM', 'ROTATE_180', 'TRANSVERSE', 'ROTATE_270'):
    top, bottom = height - bottom, height - top
  return left, top, right, bottom


def decode(encoded: bytes) -> np.ndarray:
  """Decodes a whole image: uint8 (H, W, 3); raises whatever it trips over."""
  from PIL import Image

  image = Image.open(io.BytesIO(encoded))
  return np.asarray(_upright(image, _turn(image)))


_SIDEWAYS = ('TRANSPOSE', 'ROTATE_270', 'TRANSVERSE', 'ROTATE_90')
# By the orientation that EXIF says, from 2 on.
_TURNS = ('FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', *_SIDEWAYS)
_EXIF_ORIENTATION = 0x112


def _turn(image: Any) -> str | None:
  """Returns what turns an open image upright, as viewers do; None: nothing."""
  if image.format not in ('JPEG', 'MPO'):  # Which may be decoded smaller.
    image.load()  # Turns TIFF files; PNG may say it at its end.
  try:
    orientation = image.getexif().get(_EXIF_ORIENTATION)
  except Exception:  # As decoders; what is unreadable says nothing.
    return None
  return dict(enumerate(_TURNS, 2)).get(orientation)


def _upright(image: Any, turn: str | None) -> Any:
  from PIL import Image

  image = to_rgb(image)
  return image.transpose(Image.Transpose[turn]) if turn else image


def to_rgb(image: Any) -> Any:
  """Converts an open `PIL.Image` of any mode to RGB.

  Grey is repeated; transparency is dropped; 16 bits become the upper 8
  (Pillow's own conversion would cut off what is above 255).

  Raises:
    ValueError: If nothing says which number is white: wider integers, floats.
  """
  from PIL import Image

  if image.mode == 'F' or image.mode.startswith('I'):
    tags = getattr(image, 'tag_v2', {})
    bits = tags.get(_TIFF_BITS, (16,))[0]
    # PGM and PNG have 16 bits of which 65535 is white, in whatever mode.
    known = image.mode.startswith('I;16') or image.format in ('PNG', 'PPM')
    if image.mode == 'F' or not known or tags.get(_TIFF_WHITE) == 0:
      raise ValueError(
          f'nothing says which number is white in a {image.format} file of'
          f' mode {image.mode}; store 8 bits, or 16 of which 65535 is white'
      )
    high = np.asarray(image).astype(np.int64) >> (bits - 8)
    image = Image.fromarray(high.astype(np.uint8))
  if image.mode == 'P':
    # Directly to RGB, Pillow warns about some kinds of transparency.
    image = image.convert('RGBA')
  return image if image.mode == 'RGB' else image.convert('RGB')


_TIFF_BITS, _TIFF_WHITE = 258, 262  # Of a sample; 0: white is 0.
