"""Data of the usual size and form for `benchmarks.input`, made of noise."""

import hashlib
import pathlib

import numpy as np

_JPEG_FILES = 256


def token_shards(directory: pathlib.Path, documents: int = 20_000) -> None:
  """Writes ten million tokens in documents of 500, or that many documents."""
  from codistill_jax.data import prepared_files, shards, tokenizer

  rng = np.random.default_rng(0)
  splits = {}
  for split, count in (('train', documents), ('validation', 100)):
    texts = rng.integers(3, 2048, (count, 500)).astype(np.uint16)
    texts[:, 0], texts[:, -1] = tokenizer.START_ID, tokenizer.END_ID
    described = shards.write_shard(
        directory, split, 0, list(texts), shards.token_dtype(2048)
    )
    splits[split] = {'shards': [described]}
  model = b'stands for a tokenizer'
  (directory / shards.TOKENIZER).write_bytes(model)
  meta = {
      'format_version': shards.KIND.version,
      'vocab_size': 2048,
      'tokenizer_sha256': hashlib.sha256(model).hexdigest(),
      'splits': splits,
  }
  prepared_files.write_json(directory / prepared_files.META, meta)


def cifar_files(directory: pathlib.Path) -> None:
  """CIFAR-10 in its binary version."""
  rng = np.random.default_rng(0)
  names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
  for name in names:
    rows = rng.integers(0, 256, (10_000, 3073), np.uint8)
    rows[:, 0] %= 10
    rows.tofile(directory / name)


def fashion_files(directory: pathlib.Path) -> None:
  """Four plain idx files."""
  rng = np.random.default_rng(0)
  for prefix, count in (('train', 60_000), ('t10k', 10_000)):
    images = rng.integers(0, 256, (count, 28, 28), np.uint8)
    labels = rng.integers(0, 10, (count,), np.uint8)
    for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
      head = bytes([0, 0, 8, array.ndim])
      head += np.asarray(array.shape, '>u4').tobytes()
      (directory / f'{prefix}-{kind}-ubyte').write_bytes(head + array.tobytes())


def jpeg_folder(directory: pathlib.Path) -> None:
  """Like ImageNet: 500 x 375, some 90 kB."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for split, count in (('train', _JPEG_FILES), ('validation', 8)):
    for i in range(count):
      coarse = rng.integers(0, 256, (31, 42, 3), np.uint8)
      image = Image.fromarray(coarse).resize((500, 375), Image.BICUBIC)
      noise = rng.normal(0, 9, (375, 500, 3))
      pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
      path = directory / split / f'class{i % 4}' / f'{i}.JPEG'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(path, quality=92)
