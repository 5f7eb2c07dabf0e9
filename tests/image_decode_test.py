"""Decoding: any mode to RGB, the right part, damaged files, threads, crops."""

import logging
import struct
import sys

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from made_images import BLUE, GREEN, RED, encode, gradient, plain
from PIL import Image

from codistill_jax.data import augment, image_decode

WHOLE = lambda width, height: (0, 0, width, height)
DRAWS = augment.RESIZED_CROP_DRAWS


def decode(encoded, size=8, box_of=WHOLE):
  return image_decode.decode_part(encoded, box_of, size)


def images_of(files, count=None, **changes):
  arguments = {'size': 8, 'resize': 9, 'mean': (0, 0, 0), 'std': (1, 1, 1)}
  arguments |= {'workers': 2} | changes
  data = image_decode.Encoded(
      lambda i: files[i],
      lambda i: f'file {i}',
      np.arange(count or len(files), dtype=np.int32) % 3,
      ('a', 'b', 'c'),
  )
  return image_decode.EncodedImages(data, **arguments)


def deep(number, dtype=np.uint16):
  return Image.fromarray(np.full((12, 16), number, dtype))


def big_endian(number):
  pixels = np.full((12, 16), number, '>u2').tobytes()
  return Image.frombytes('I;16B', (16, 12), pixels)


def palette_with_transparency():
  image = plain(RED).convert('P')
  image.info['transparency'] = bytes(range(256))
  return image


def pgm(most, number):
  pixels = np.full((12, 16), number, '>u2').tobytes()
  return f'P5 16 12 {most}\n'.encode() + pixels


def twelve_bits(number):
  """A TIFF file of 16 x 12 pixels, two in three bytes."""
  pixels = bytes([number >> 4, (number & 15) << 4 | number >> 8, number & 255])
  pixels *= 16 * 12 // 2
  tags = {256: 16, 257: 12, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1}
  tags |= {278: 12, 279: len(pixels)}
  directory = b''.join(
      struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items()
  )
  head = struct.pack('<2sHI', b'II', 42, 8 + len(pixels))
  return head + pixels + struct.pack('<H', len(tags)) + directory + bytes(4)


GREY = (90, 90, 90)
PHOTOMETRIC = 262  # 0: white is 0.


@pytest.mark.parametrize(
    'content, colour',
    [
        (encode(plain(RED), 'JPEG'), RED),
        (encode(plain(GREEN), 'PNG'), GREEN),
        (encode(plain(BLUE), 'WEBP', lossless=True), BLUE),
        (encode(plain(BLUE), 'BMP'), BLUE),
        (encode(plain(RED).convert('CMYK'), 'JPEG'), RED),
        (encode(plain(RED).convert('CMYK'), 'TIFF'), RED),
        (encode(plain(RED).convert('YCbCr'), 'TIFF'), RED),
        (encode(plain(GREY).convert('L'), 'JPEG'), GREY),
        (encode(plain(GREY).convert('LA')), GREY),
        (encode(plain(GREY).convert('LA'), 'TIFF'), GREY),
        (encode(plain((255, 255, 255)).convert('1')), (255,) * 3),
        (encode(plain((255, 255, 255)).convert('1'), 'TIFF'), (255,) * 3),
        (encode(plain(GREEN).convert('RGBA')), GREEN),
        (encode(Image.new('RGBA', (16, 12), (*GREEN, 0))), GREEN),
        (encode(plain(RED).convert('P'), 'GIF'), RED),
        (encode(palette_with_transparency()), RED),
        (encode(deep(40_000)), (156,) * 3),
        (encode(deep(40_000), 'TIFF'), (156,) * 3),
        (encode(big_endian(40_000), 'TIFF'), (156,) * 3),
        (twelve_bits(2500), (156,) * 3),
        (pgm(65_535, 40_000), (156,) * 3),
        (pgm(1023, 625), (156,) * 3),
        # Nothing says which number is white.
        (encode(deep(200, np.int32), 'TIFF'), None),
        (encode(deep(40_000, np.int32), 'TIFF'), None),
        (encode(deep(0.5, np.float32), 'TIFF'), None),
        (encode(deep(200, np.float32), 'TIFF'), None),
        (encode(deep(9), 'TIFF', tiffinfo={PHOTOMETRIC: 0}), None),
    ],
)
def test_every_mode_becomes_rgb_or_is_damaged(content, colour):
  if colour is None:
    images = images_of([content])
    assert images.read(np.asarray([0]))['weights'].tolist() == [0]
    assert 'which number is white' in images.damaged[0]
    return
  found = decode(content)
  assert found.shape == (8, 8, 3) and found.dtype == np.uint8
  assert np.abs(found.astype(int) - colour).max() <= 30  # Palettes, CMYK.


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', [0, 1, *TURNED, 9])
def test_a_picture_is_read_as_viewers_turn_it(kind, orientation):
  stored = upright = gradient(96, 64)
  if orientation in TURNED:
    stored = upright.transpose(TURNED[orientation])
  exif = Image.Exif()
  exif[0x112] = orientation
  options = {'quality': 95} if kind == 'JPEG' else {}
  encoded = encode(stored, kind, exif=exif, **options)
  for size, box in ((16, (48, 0, 96, 48)), (6, (0, 10, 54, 64))):
    found = decode(encoded, size, lambda w, h, box=box: box)
    expected = decode(encode(upright), size, lambda w, h, box=box: box)
    assert np.abs(found.astype(int) - expected).mean() < 5
  assert image_decode.decode(encoded).shape == (64, 96, 3)


def test_images_of_one_colour_are_counted_and_keep_their_weight(caplog):
  half = np.asarray(plain(RED, (40, 40))).copy()
  half[:, :20] = 0
  files = [encode(plain(RED)), encode(half), encode(deep(9)), encode(deep(0))]
  images = images_of(files)
  drawn = np.zeros((4, DRAWS))  # Small parts, at the upper left.
  with caplog.at_level(logging.WARNING):
    for draws in (None, drawn, drawn):
      assert images.read(np.arange(4), draws)['weights'].tolist() == [1] * 4
  assert set(images.plain) == {0, 2, 3} and not images.damaged
  assert len(caplog.records) == 3
  assert 'one colour only' in caplog.records[0].getMessage()


def test_the_right_part_is_read_the_right_way_round():
  encoded = encode(gradient(120, 80))
  found = decode(encoded, 4, lambda w, h: (60, 40, 120, 80)).astype(int)
  # Red rises to the right from its middle, green downwards.
  assert abs(found[..., 0].min() - 143) < 4 and found[..., 0].max() > 230
  np.testing.assert_allclose(found[0, :, 0], found[3, :, 0], atol=2)
  np.testing.assert_allclose(found[:, 0, 1], found[:, 3, 1], atol=2)
  assert (np.diff(found[0, :, 0]) > 20).all()
  assert (np.diff(found[:, 0, 1]) > 20).all()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_part_of_a_jpeg_looks_as_in_the_whole(data):
  draw = lambda least, most: data.draw(st.integers(least, most))
  exif = Image.Exif()
  exif[0x112] = draw(1, 8)
  file = encode(
      gradient(draw(64, 200), draw(64, 200)),
      'JPEG',
      **dict(quality=95, exif=exif, subsampling=draw(0, 2)),
  )
  whole = image_decode.decode(file)
  height, width, _ = whole.shape
  left, top = draw(0, width - 1), draw(0, height - 1)
  box = left, top, draw(left + 1, width), draw(top + 1, height)
  size = draw(1, 24)
  found = decode(file, size, lambda w, h: box)
  expected = decode(encode(whole), size, lambda w, h: box)
  # Where a decoder shrinks, its last pixels may be of fewer than the others.
  shrunk = min(box[2] - left, box[3] - top) >= 2 * size
  assert np.abs(found.astype(int) - expected).max() <= (10 if shrunk else 1)


def test_a_large_jpeg_is_decoded_small(monkeypatch):
  sizes = []
  to_rgb = image_decode.to_rgb

  def watched(image):
    found = to_rgb(image)
    sizes.append(found.size)
    return found

  monkeypatch.setattr(image_decode, 'to_rgb', watched)
  decode(encode(gradient(320, 160), 'JPEG'), 8)
  decode(encode(gradient(320, 160), 'JPEG'), 80)
  decode(encode(gradient(320, 160), 'JPEG'), 81)
  assert sizes == [(40, 20), (160, 80), (320, 160)]


def test_evaluation_reads_the_centre_and_training_the_drawn_part():
  files = [encode(gradient(90, 60))]
  mean, std = (0.1, 0.2, 0.3), (1, 2, 4)
  images = images_of(files, size=8, resize=10, mean=mean, std=std)
  (centre,) = images.read(np.asarray([0]))['inputs']
  expected = decode(files[0], 8, lambda w, h: (21, 6, 69, 54))
  normal = lambda x: (x / 255 - mean) / std
  np.testing.assert_allclose(centre, normal(expected), atol=1e-6)
  drawn = np.random.default_rng(1).random((1, DRAWS))
  for flip in (0.4, 0.6):
    drawn[0, augment.CROP_DRAWS + 2] = flip
    (part,) = images.read(np.asarray([0]), drawn)['inputs']
    box = augment.random_resized_box(90, 60, drawn[0])
    expected = decode(files[0], 8, lambda w, h, box=box: box)
    if flip < 0.5:
      expected = expected[:, ::-1]
    np.testing.assert_allclose(part, normal(expected), atol=1e-6)


def test_the_number_of_threads_changes_nothing():
  files = [encode(gradient(20 + i, 30), 'JPEG') for i in range(11)]
  indices = np.random.default_rng(0).integers(0, 11, 29)
  drawn = np.random.default_rng(1).random((29, DRAWS))
  one, *others = (
      images_of(files, workers=n).read(indices, drawn) for n in (1, 3, 64)
  )
  np.testing.assert_array_equal(one['labels'], indices % 3)
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def bomb():
  """A file that says it is 200,000 pixels wide and high."""
  header = bytearray(encode(plain(RED), 'BMP'))
  header[18:26] = (200_000).to_bytes(4, 'little') * 2
  return bytes(header)


GOOD = encode(gradient(40, 30), 'JPEG')
PNG = encode(gradient(40, 30))
DAMAGED = {
    'truncated JPEG': GOOD[: len(GOOD) // 2],
    'truncated PNG': PNG[: len(PNG) // 2],
    'flipped PNG': PNG[:60] + bytes(255 - b for b in PNG[60:90]) + PNG[90:],
    'header alone': GOOD[:20],
    'empty': b'',
    'text': b'<html>404 not found</html>',
    'bomb': bomb(),
}


@pytest.mark.parametrize('damaged', DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_image_has_weight_0_and_is_named_once(damaged, caplog):
  images = images_of([GOOD, damaged, GOOD])
  drawn = np.random.default_rng(0).random((4, DRAWS))
  indices = np.asarray([0, 1, 2, 1])
  with caplog.at_level(logging.WARNING):
    for draws in (None, drawn):
      batch = images.read(indices, draws)
      inputs = batch['inputs']
      assert batch['weights'].tolist() == [1, 0, 1, 0]
      assert not inputs[1].any() and not inputs[3].any()
      assert inputs[0].any() and np.isfinite(inputs).all()
  said = [r.getMessage() for r in caplog.records]
  assert len(said) == 1 and 'file 1 cannot be read' in said[0]
  assert '1 of 3 images so far' in said[0] and '\n' not in said[0]
  assert list(images.damaged) == [1] and images.damaged[1]


def test_damaged_images_are_counted_until_they_are_too_many(caplog):
  files = [GOOD] * 10 + [b''] * 50
  images = images_of(files, max_damaged=0.4, workers=1)  # Of 60, 24.
  with caplog.at_level(logging.WARNING):
    assert images.read(np.arange(34))['weights'].sum() == 10
  assert len(caplog.records) == 20 and len(images.damaged) == 24
  assert 'others will not be named' in caplog.records[-1].getMessage()
  with pytest.raises(OSError, match='25 of 60 images so far, now file 34'):
    images.read(np.arange(30, 40))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'size': 8, 'resize': 7}, '1 <= size <= resize'),
        ({'size': 0}, '1 <= size <= resize'),
        ({'size': 8.0}, r'whole numbers .*size=8\.0'),
        ({'workers': 2.0}, r'workers must be .* got 2\.0'),
        ({'workers': 0}, 'workers must be 1 or more, or None; got 0'),
    ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    images_of([GOOD], **changes)


def test_a_decoder_that_is_missing_is_no_damaged_image(monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL', None)
  with pytest.raises(ModuleNotFoundError, match='PIL'):
    images_of([GOOD])


# --- Augmentation ------------------------------------------------------------


@pytest.mark.parametrize(
    'pad, flip', [(2, True), (2, False), (0, True), (0, False)]
)
def test_pad_crop_flip_does_it_one_by_one(pad, flip):
  rng = np.random.default_rng(0)
  images = rng.integers(1, 255, (200, 5, 6, 2)).astype(np.uint8)
  drawn = rng.random((200, 4))
  found = augment.pad_crop_flip(images, drawn, pad=pad, flip=flip)
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


@hypothesis.given(
    width=st.integers(1, 800),
    height=st.integers(1, 800),
    seed=st.integers(0, 1000),
)
def test_random_part_is_inside_the_image(width, height, seed):
  drawn = np.random.default_rng(seed).random(DRAWS)
  left, top, right, bottom = augment.random_resized_box(width, height, drawn)
  assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_parts_have_the_areas_and_aspects_that_were_asked_for():
  rng = np.random.default_rng(0)
  boxes = np.asarray(
      [
          augment.random_resized_box(500, 375, row)
          for row in rng.random((4000, DRAWS))
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
  drawn = np.full(DRAWS, 0.9)
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
