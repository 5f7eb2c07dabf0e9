"""Crops stay inside and are where they were drawn; nothing else changes."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codistill_jax.data import image_decode


@pytest.mark.parametrize('pad, flip', [(2, True), (2, False), (0, True)])
def test_pad_crop_flip_does_it_one_by_one(pad, flip):
  rng = np.random.default_rng(0)
  images = rng.integers(1, 255, (200, 5, 6, 2)).astype(np.uint8)
  drawn = rng.random((200, 4))
  found = image_decode.pad_crop_flip(images, drawn, pad=pad, flip=flip)
  assert found.dtype == np.uint8
  places = np.floor(drawn[:, :2] * (2 * pad + 1)).astype(int)
  # Every place is used, the last one too.
  for place in places.T:
    assert set(place.tolist()) == set(range(2 * pad + 1))
  for i, (top, left) in enumerate(places):
    padded = np.zeros((5 + 2 * pad, 6 + 2 * pad, 2), np.uint8)
    padded[pad : pad + 5, pad : pad + 6] = images[i]
    expected = padded[top : top + 5, left : left + 6]
    if flip and drawn[i, 2] < 0.5:
      expected = expected[:, ::-1]
    np.testing.assert_array_equal(found[i], expected)


def test_without_pad_and_flip_images_are_left_alone():
  images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
  found = image_decode.pad_crop_flip(
      images, np.zeros((2, 4)), pad=0, flip=False
  )
  np.testing.assert_array_equal(found, images)


@hypothesis.given(
    width=st.integers(1, 800),
    height=st.integers(1, 800),
    seed=st.integers(0, 1000),
)
def test_random_part_is_inside_the_image(width, height, seed):
  drawn = np.random.default_rng(seed).random(image_decode.RESIZED_CROP_DRAWS)
  left, top, right, bottom = image_decode.random_resized_box(
      width, height, drawn
  )
  assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_parts_have_the_areas_and_aspects_that_were_asked_for():
  rng = np.random.default_rng(0)
  boxes = np.asarray(
      [
          image_decode.random_resized_box(500, 375, row)
          for row in rng.random((4000, image_decode.RESIZED_CROP_DRAWS))
      ]
  )
  widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  areas, aspects = widths * heights / (500 * 375), widths / heights
  assert 0.079 < areas.min() < 0.085 and 0.97 < areas.max() <= 1
  assert 0.74 < aspects.min() < 0.76 and 1.32 < aspects.max() < 1.345
  # Wide and high parts are equally frequent among the small ones, which fit.
  small = areas < 0.4
  assert abs(np.mean(np.log(aspects[small]))) < 0.02
  # Uniform area, among those that fit with any aspect.
  assert abs(np.mean(areas[small]) - 0.24) < 0.01
  # Every place is possible, up to the border.
  assert boxes[:, :2].min() == 0 and boxes[:, 2].max() == 500
  assert boxes[:, 3].max() == 375
  mirrored = [image_decode.is_mirrored(row) for row in rng.random((2000, 24))]
  assert 0.45 < np.mean(mirrored) < 0.55


@pytest.mark.parametrize(
    'width, height, box',
    [
        (1000, 30, (480, 0, 520, 30)),
        (30, 1000, (0, 480, 30, 520)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_a_ribbon_gives_its_centre(width, height, box):
  drawn = np.full(image_decode.RESIZED_CROP_DRAWS, 0.9)
  assert image_decode.random_resized_box(width, height, drawn) == box


def test_centre_is_what_a_resize_and_a_cut_give():
  # 512 x 384 resized to 341.3 x 256; the centre is 224 of it, 336 before.
  assert image_decode.centre_box(512, 384, 224, 256) == (88, 24, 424, 360)
  assert image_decode.centre_box(384, 512, 224, 256) == (24, 88, 360, 424)
  assert image_decode.centre_box(300, 200, 8, 8) == (50, 0, 250, 200)


def test_normalise_gives_mean_0_and_deviation_1():
  images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3))
  images = images.astype(np.uint8)
  pixels = images / 255
  mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
  found = image_decode.normalise(images, mean, std)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, (pixels - mean) / std, atol=1e-5)
  out = np.zeros_like(found)
  image_decode.normalise(images, mean, std, out)
  np.testing.assert_array_equal(out, found)
