"""Augmentation of images: pure functions of uniform draws.

Shape suffixes: B or N images, H height, W width, C channels, K draws.
"""

import numpy as np

_CROP_TRIES = 10
CROP_DRAWS = 2 * _CROP_TRIES  # Then 2 for the place, 1 for the flip, 1 unused.
RESIZED_CROP_DRAWS = CROP_DRAWS + 4
PAD_CROP_DRAWS = 4
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # Of random parts.

Box = tuple[float, float, float, float]  # Left, top, right, bottom; pixels.


def pad_crop_flip(
    images_NHWC: np.ndarray, draws_NK: np.ndarray, *, pad: int, flip: bool
) -> np.ndarray:
  """Crops each padded image at random and mirrors every second one.

  The augmentation of CIFAR of He et al. 2016, section 4.2 (pad 4); the border
  is black.

  Args:
    images_NHWC: Any dtype.
    draws_NK: Uniform in [0, 1), K >= 3: top, left, mirror.
    pad: Pixels added on each side; 0 does not crop.
    flip: Whether to mirror left and right.

  Returns:
    Images of the same shape and dtype.
  """
  if not pad and not flip:
    return images_NHWC
  _, height, width, _ = images_NHWC.shape
  padded = np.pad(images_NHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  tops, lefts = (draws_NK[:, :2] * (2 * pad + 1)).astype(int).T.tolist()
  mirrored = (draws_NK[:, 2] < 0.5).tolist()
  out = np.empty_like(images_NHWC)
  # A copy for each image: to index pixels takes four times as long.
  for i, (top, left) in enumerate(zip(tops, lefts)):
    crop = padded[i, top : top + height, left : left + width]
    out[i] = crop[:, ::-1] if flip and mirrored[i] else crop
  return out


def random_resized_box(
    width: int,
    height: int,
    draws_K: np.ndarray,
) -> Box:
  """Returns a random part of an image, to be resized to a square.

  The augmentation of Szegedy et al. 2015 that Goyal et al. 2017 use: 8 % to all
  of the area, uniform, width / height from 3 / 4 to 4 / 3, log-uniform. What
  does not fit into the image is drawn again, up to 10 times; then the largest
  centred part of a permitted aspect.

  Args:
    width: Of the image, in pixels.
    height: Of the image, in pixels.
    draws_K: Uniform in [0, 1); RESIZED_CROP_DRAWS of them.

  Returns:
    Whole pixels, at least one each way.
  """
  tries = draws_K[:CROP_DRAWS].reshape(-1, 2)
  areas = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * tries[:, 0])
  low, high = np.log(_ASPECT)
  ratios = np.exp(low + (high - low) * tries[:, 1])
  widths = np.rint(np.sqrt(areas * ratios)).astype(int)
  heights = np.rint(np.sqrt(areas / ratios)).astype(int)
  fits = (widths <= width) & (heights <= height)
  fits &= (widths > 0) & (heights > 0)
  if not fits.any():
    w = max(1, min(width, round(height * _ASPECT[1])))
    h = max(1, min(height, round(width / _ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
  first = int(np.argmax(fits))
  w, h = int(widths[first]), int(heights[first])
  left = int(draws_K[CROP_DRAWS] * (width - w + 1))
  top = int(draws_K[CROP_DRAWS + 1] * (height - h + 1))
  return left, top, left + w, top + h


def is_mirrored(draws_K: np.ndarray) -> bool:
  """Returns whether the random part is mirrored, as every second one is."""
  return bool(draws_K[CROP_DRAWS + 2] < 0.5)


def centre_box(width: int, height: int, size: int, resize: int) -> Box:
  """Returns the part of an image that evaluation sees.

  Resizing the shorter side to `resize` pixels and cutting `size` x `size` out
  of the centre, as one resize of this part of the original (which spares the
  rounding of the longer side between the two).
  """
  side = min(width, height) * size / resize
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def normalise(
    images: np.ndarray,
    mean_C: np.typing.ArrayLike,
    std_C: np.typing.ArrayLike,
    out: np.ndarray | None = None,
) -> np.ndarray:
  """Returns images of mean 0 and deviation 1, float32 (..., W, C).

  Args:
    images: uint8 (..., W, C).
    mean_C: Of the training set, of pixels in 0..1.
    std_C: Likewise, the standard deviation.
    out: Where to write it, contiguous.
  """
  *leading, width, channels = images.shape
  # Whole lines at a time: over 3 channels numpy takes seven times as long.
  lines = (*leading, width * channels)
  along = (
      lambda x_C: np.tile(x_C, width)
      .astype(np.float32)
      .reshape((1,) * len(leading) + (-1,))
  )
  mean_C, std_C = np.asarray(mean_C), np.asarray(std_C)
  if out is None:
    out = np.empty(images.shape, np.float32)
  flat = out.reshape(lines)
  scale = along(1 / (255 * std_C))
  np.multiply(images.reshape(lines), scale, out=flat, dtype=np.float32)
  np.subtract(flat, along(mean_C / std_C), out=flat)
  return out
