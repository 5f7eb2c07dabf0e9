"""Decoding: any mode to RGB, the right part, damaged files, threads."""

import logging

import jax
import numpy as np
import pytest
from made_images import BLUE, GREEN, RED, encode, gradient, plain
from PIL import Image

from codistill_jax.data import image_decode

WHOLE = lambda width, height: (0, 0, width, height)
DRAWS = image_decode.RESIZED_CROP_DRAWS


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


def deep_grey():
  return Image.fromarray(np.full((12, 16), 40_000, np.uint16))


def palette_with_transparency():
  image = plain(RED).convert('P')
  image.info['transparency'] = bytes(range(256))
  return image


@pytest.mark.parametrize(
    'content, colour',
    [
        (lambda: encode(plain(RED), 'JPEG'), RED),
        (lambda: encode(plain(GREEN), 'PNG'), GREEN),
        (lambda: encode(plain(BLUE), 'WEBP', lossless=True), BLUE),
        (lambda: encode(plain(BLUE), 'BMP'), BLUE),
        (lambda: encode(plain(RED).convert('CMYK'), 'JPEG'), RED),
        (lambda: encode(plain((90, 90, 90)).convert('L'), 'JPEG'), (90,) * 3),
        (lambda: encode(plain((90, 90, 90)).convert('LA')), (90,) * 3),
        (lambda: encode(plain((255, 255, 255)).convert('1')), (255,) * 3),
        (lambda: encode(plain(GREEN).convert('RGBA')), GREEN),
        (lambda: encode(plain(RED).convert('P'), 'GIF'), RED),
        (lambda: encode(palette_with_transparency()), RED),
        (lambda: encode(deep_grey()), (40_000 // 256,) * 3),
        (lambda: encode(deep_grey(), 'TIFF'), (40_000 // 256,) * 3),
    ],
)
def test_every_mode_becomes_rgb(content, colour):
  found = decode(content())
  assert found.shape == (8, 8, 3) and found.dtype == np.uint8
  assert np.abs(found.astype(int) - colour).max() <= 30  # Palettes, CMYK.


def test_the_right_part_is_read_the_right_way_round():
  encoded = encode(gradient(120, 80))
  found = decode(encoded, 4, lambda w, h: (60, 40, 120, 80)).astype(int)
  # Red rises to the right from its middle, green downwards.
  assert abs(found[..., 0].min() - 143) < 4 and found[..., 0].max() > 230
  np.testing.assert_allclose(found[0, :, 0], found[3, :, 0], atol=2)
  np.testing.assert_allclose(found[:, 0, 1], found[:, 3, 1], atol=2)
  assert (np.diff(found[0, :, 0]) > 20).all()
  assert (np.diff(found[:, 0, 1]) > 20).all()


@pytest.mark.parametrize('shrink', [2, 5, 9, 16])
def test_a_jpeg_decoded_small_looks_the_same(shrink):
  image = gradient(33 * shrink, 21 * shrink + 1)
  box_of = lambda w, h: (w // 4, h // 5, w, h)
  small = decode(encode(image, 'JPEG', quality=95), 12, box_of)
  whole = decode(encode(image), 12, box_of)  # A PNG is always decoded whole.
  assert np.abs(small.astype(int) - whole).max() <= 6


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
  images = images_of(files, size=8, resize=10)
  (centre,) = images.read(np.asarray([0]))['inputs']
  expected = decode(files[0], 8, lambda w, h: (21, 6, 69, 54))
  np.testing.assert_allclose(centre, expected / 255, atol=1e-6)
  drawn = np.random.default_rng(1).random((1, DRAWS))
  for flip in (0.4, 0.6):
    drawn[0, image_decode.CROP_DRAWS + 2] = flip
    (part,) = images.read(np.asarray([0]), drawn)['inputs']
    box = image_decode.random_resized_box(90, 60, drawn[0])
    expected = decode(files[0], 8, lambda w, h, box=box: box)
    if flip < 0.5:
      expected = expected[:, ::-1]
    np.testing.assert_allclose(part, expected / 255, atol=1e-6)


def test_images_are_normalised():
  images = images_of([encode(plain(RED))], mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
  (found,) = images.read(np.asarray([0]))['inputs']
  expected = (np.asarray(RED) / 255 - (0.1, 0.2, 0.3)) / (1, 2, 4)
  np.testing.assert_allclose(
      found, np.broadcast_to(expected, found.shape), atol=1e-5
  )


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


def test_a_file_that_is_gone_is_damaged_too():
  images = images_of({}, count=5, workers=1)
  assert images.read(np.asarray([3]))['weights'].tolist() == [0]


def test_too_many_damaged_images_are_an_error():
  files = [GOOD] * 10 + [b''] * 10
  images = images_of(files, max_damaged=0.2, workers=1)
  assert images.read(np.arange(14))['weights'].sum() == 10
  with pytest.raises(OSError, match='5 of 20 images so far, now file 14'):
    images.read(np.arange(10, 20))


def test_only_the_first_damaged_images_are_named(caplog):
  images = images_of([b''] * 50, max_damaged=1.0)
  with caplog.at_level(logging.WARNING):
    images.read(np.arange(50))
  assert len(caplog.records) == 20
  assert 'others will not be named' in caplog.records[-1].getMessage()
  assert len(images.damaged) == 50


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
