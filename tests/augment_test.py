"""Draws have random access; crops stay inside; nothing else changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.data import augment

KEY = {'seed': 3, 'group_id': 1, 'epoch': 2}


@given(start=st.integers(0, 40), count=st.integers(1, 20))
def test_draws_of_a_place_do_not_depend_on_where_reading_starts(start, count):
  whole = augment.draws(0, 60, 8, **KEY)
  part = augment.draws(start, start + count, 8, **KEY)
  np.testing.assert_array_equal(part, whole[start : start + count])


def test_draws_are_uniform_and_depend_on_every_part_of_the_key():
  found = {}
  for name in KEY:
    for value in (0, 7):
      drawn = augment.draws(0, 500, 4, **{**KEY, name: value})
      found[name, value] = drawn
      assert drawn.min() >= 0 and drawn.max() < 1
      # Five standard deviations of the mean of 2,000 numbers.
      assert abs(drawn.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
  values = list(found.values())
  for i, a in enumerate(values):
    assert not any(np.intersect1d(a, b).size for b in values[:i])


def test_draws_are_the_same_on_every_machine():
  # If these numbers change, resumed runs read other batches.
  drawn = augment.draws(5, 6, 4, seed=0, group_id=0, epoch=0)
  expected = [[0.23194784809791424, 0.01625969302011321]]
  np.testing.assert_allclose(drawn[:, :2], expected, rtol=1e-12)


def test_draws_come_in_fours():
  with pytest.raises(ValueError, match='multiple of 4; got 3'):
    augment.draws(0, 1, 3, **KEY)


def naive_pad_crop_flip(image, top, left, mirrored, pad):
  height, width, channels = image.shape
  padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), image.dtype)
  padded[pad : pad + height, pad : pad + width] = image
  crop = padded[top : top + height, left : left + width]
  return crop[:, ::-1] if mirrored else crop


@pytest.mark.parametrize('pad, flip', [(2, True), (2, False), (0, True)])
def test_pad_crop_flip_does_it_one_by_one(pad, flip):
  rng = np.random.default_rng(0)
  images = rng.integers(1, 255, (200, 5, 6, 2)).astype(np.uint8)
  drawn = rng.random((200, 4))
  found = augment.pad_crop_flip(images, drawn, pad=pad, flip=flip)
  assert found.dtype == np.uint8
  tops, lefts = (np.floor(drawn[:, i] * (2 * pad + 1)) for i in (0, 1))
  # Every place is used, the last one too.
  assert set(tops) == set(lefts) == set(range(2 * pad + 1))
  mirrored = (drawn[:, 2] < 0.5) & flip
  for i in range(200):
    expected = naive_pad_crop_flip(
        images[i], int(tops[i]), int(lefts[i]), mirrored[i], pad
    )
    np.testing.assert_array_equal(found[i], expected)


def test_without_pad_and_flip_images_are_left_alone():
  images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
  found = augment.pad_crop_flip(images, np.zeros((2, 4)), pad=0, flip=False)
  np.testing.assert_array_equal(found, images)


@given(
    width=st.integers(1, 800),
    height=st.integers(1, 800),
    seed=st.integers(0, 1000),
)
def test_random_part_is_inside_the_image(width, height, seed):
  drawn = np.random.default_rng(seed).random(augment.RESIZED_CROP_DRAWS)
  left, top, right, bottom = augment.random_resized_box(width, height, drawn)
  assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_parts_have_the_areas_and_aspects_that_were_asked_for():
  rng = np.random.default_rng(0)
  boxes = np.asarray(
      [
          augment.random_resized_box(500, 375, row)
          for row in rng.random((4000, augment.RESIZED_CROP_DRAWS))
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
  mirrored = [augment.is_mirrored(row) for row in rng.random((2000, 24))]
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
  drawn = np.full(augment.RESIZED_CROP_DRAWS, 0.9)
  assert augment.random_resized_box(width, height, drawn) == box


def test_centre_is_what_a_resize_and_a_cut_give():
  # 512 x 384 resized to 341.3 x 256; the centre is 224 of it, 336 before.
  assert augment.centre_box(512, 384, 224, 256) == (88, 24, 424, 360)
  assert augment.centre_box(384, 512, 224, 256) == (24, 88, 360, 424)
  assert augment.centre_box(300, 200, 8, 8) == (50, 0, 250, 200)


def test_normalise_gives_mean_0_and_deviation_1():
  images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3))
  images = images.astype(np.uint8)
  pixels = images / 255
  mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
  found = augment.normalise(images, mean, std)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, (pixels - mean) / std, atol=1e-5)
  out = np.zeros_like(found)
  augment.normalise(images, mean, std, out)
  np.testing.assert_array_equal(out, found)
