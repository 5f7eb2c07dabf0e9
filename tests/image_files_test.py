"""Readers of image files: folders, the hub's format, idx, CIFAR-10."""

import gzip
import logging
import os
import shutil

import numpy as np
import pytest
from made_images import (
    BLUE,
    GREEN,
    RED,
    encode,
    plain,
    write_cifar_archive,
    write_cifar_binary,
    write_fashion,
    write_folder,
    write_hub,
    write_idx,
)

from codistill_jax.data import examples, image_files


class TestFolder:

  def test_classes_and_images_are_in_the_order_of_their_names(self, tmp_path):
    write_folder(tmp_path, 'train', {'n02': 2, 'n01': 3})
    split = image_files.read_folder(tmp_path / 'train')
    assert split.classes == ('n01', 'n02')
    assert split.labels.tolist() == [0, 0, 0, 1, 1]
    assert split.labels.dtype == np.int32
    assert [split.name(i)[-10:] for i in (0, 4)] == ['n01/0.JPEG', 'n02/1.JPEG']
    path = tmp_path / 'train' / 'n02' / '1.JPEG'
    assert split.encoded(4) == path.read_bytes()

  def test_what_begins_with_a_dot_is_no_class_and_no_image(self, tmp_path):
    write_folder(tmp_path, 'train', {'a': 1, '.ipynb_checkpoints': 1})
    shutil.copy(
        tmp_path / 'train' / 'a' / '0.JPEG',
        tmp_path / 'train' / 'a' / '._0.JPEG',  # As macOS leaves them.
    )
    split = image_files.read_folder(tmp_path / 'train')
    assert split.classes == ('a',) and split.labels.tolist() == [0]

  def test_another_split_has_the_classes_of_training(self, tmp_path):
    write_folder(tmp_path, 'validation', {'c': 1})
    classes = ('a', 'b', 'c')
    split = image_files.read_folder(tmp_path / 'validation', classes)
    assert split.classes == classes and split.labels.tolist() == [2]
    with pytest.raises(ValueError, match='validation/c is no class of the'):
      image_files.read_folder(tmp_path / 'validation', ('a', 'b'))

  def test_missing_and_flat_directories(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'expected .*train/<class>'):
      image_files.read_folder(tmp_path / 'train')
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / '1.JPEG').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'but 1 files; .*/<class>/'):
      image_files.read_folder(tmp_path / 'train')

  @pytest.mark.parametrize(
      'held, words',
      [
          ([], 'nothing'),
          (['x.heic', 'y.HEIC', 'notes'], r'2 \.heic, 1 no ending'),
          (['.hidden.JPEG'], 'nothing'),
          (['images/1.JPEG', 'boxes.txt'], r'1 \.txt, 1 folder'),
      ],
  )
  @pytest.mark.parametrize('name', ['__MACOSX', 'a0', 'z'])
  def test_a_class_without_images_is_named(self, tmp_path, name, held, words):
    write_folder(tmp_path, 'train', {'a': 1, 'b': 2})
    empty = tmp_path / 'train' / name
    empty.mkdir()
    for path in held:
      (empty / path).parent.mkdir(exist_ok=True)
      (empty / path).write_bytes(b'x')
    for classes in (None, ('a', 'b', name)):  # Of training; of another split.
      with pytest.raises(ValueError, match=rf'train/{name} \({words}\)'):
        image_files.read_folder(tmp_path / 'train', classes)

  def test_what_is_read_and_passed_over_is_counted(self, tmp_path, caplog):
    write_folder(tmp_path, 'train', {'a': 1, 'b': 2})
    train = tmp_path / 'train'
    for path in ('a/x.heic', 'b/x.heic', 'b/y.txt', 'list.csv', 'a/.DS_Store'):
      (train / path).write_bytes(b'x')
    (train / 'b' / 'more.png').mkdir()
    os.mkfifo(train / 'b' / 'pipe.png')
    for ending in ('jfif', 'avif', 'WebP', 'tIFf'):
      (train / 'a' / f'x.{ending}').write_bytes(b'x')
    with caplog.at_level(logging.WARNING, 'absl'):  # As of the binaries.
      assert len(image_files.read_folder(train).labels) == 7
    (said,) = [r.getMessage() for r in caplog.records]
    assert '7 images of 2 classes' in said
    passed = said.partition('passed over: ')[2].split(', ')
    assert sorted(passed) == [
        '1 .csv',
        '1 .png',
        '1 .txt',
        '1 folder',
        '2 .heic',
    ]

  def test_names_are_bytes_in_any_encoding(self, tmp_path, caplog):
    names = 'chat', 'été', 'été'.encode('latin-1'), '猫'.encode('euc-jp')
    root = os.fsencode(tmp_path)
    for split in (b'train', b'validation'):
      for name in names:
        folder = os.path.join(root, split, os.fsencode(name))
        os.makedirs(folder)
        for file in (b'1.jpg', b'\xff.jpg'):
          with open(os.path.join(folder, file), 'wb') as f:
            f.write(os.path.join(folder, file))
    train = image_files.read_folder(tmp_path / 'train')
    other = image_files.read_folder(tmp_path / 'validation', train.classes)
    assert (
        train.labels.tolist()
        == other.labels.tolist()
        == [0, 0, 1, 1, 2, 2, 3, 3]
    )
    for i in range(8):
      path = train.encoded(i)
      assert os.fsencode(train.classes[train.labels[i]]) in path
      train.name(i).encode('utf-8')
    examples.label_space(train.classes)


class TestHuggingFace:
  """With Parquet files for a data set; the test set-up forbids the network."""

  @pytest.fixture
  def folder(self, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(
        datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
    )
    splits = {'train': [1, 0, 1], 'test': [0, -1], 'validation': [0, None]}
    write_hub(tmp_path / 'data', splits)
    return str(tmp_path / 'data')

  def split(self, folder, split='train', **keys):
    keys = {'image_key': 'image', 'label_key': 'label'} | keys
    return image_files.read_hugging_face(folder, None, split, **keys)

  def test_images_stay_encoded_and_in_order(self, folder):
    split = self.split(folder)
    assert split.classes == ('cat', 'dog', 'emu')
    assert split.labels.tolist() == [1, 0, 1]
    files = [encode(plain(c)) for c in (RED, GREEN, BLUE)]
    assert [split.encoded(i) for i in (2, 0, 1)] == [files[2], *files[:2]]
    assert split.name(2) == f'image 2 of {folder}, split train'

  @pytest.mark.parametrize(
      'arguments, message',
      [
          (
              {'image_key': 'photo'},
              "no column 'photo' but image, label, number",
          ),
          ({'label_key': 'number'}, 'expected class labels with names'),
          ({'image_key': 'number'}, 'expected images'),
          ({'split': 'test'}, 'has no labels'),
          ({'split': 'validation'}, 'has no labels'),
      ],
  )
  def test_what_does_not_fit(self, folder, arguments, message):
    with pytest.raises(ValueError, match=message):
      self.split(folder, **arguments)

  @pytest.mark.parametrize(
      'name, split',
      [('nobody/nothing', 'train'), ('not a name!', 'train'), (None, 'dev')],
  )
  def test_unreachable_is_one_line(self, folder, name, split):
    with pytest.raises(OSError, match=r'Cannot read split .* Check') as raised:
      self.split(name or folder, split)
    assert '\n' not in str(raised.value)


class TestIdx:

  @pytest.mark.parametrize('ending', ['', '.gz'])
  def test_reads_what_was_written(self, tmp_path, ending):
    array = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / f'x{ending}', array)
    np.testing.assert_array_equal(
        image_files.read_idx(tmp_path / f'x{ending}'), array
    )

  @pytest.mark.parametrize(
      'content, message',
      [
          (b'', 'expected magic 00 00 08 and a rank, got'),
          (b'\x00\x00\x0d\x01\x00\x00\x00\x01x', 'got 00 00 0d'),
          (b'<html>', 'got 3c 68 74'),
          (b'\x00\x00\x08\x01\x00\x00\x00\x05xxx', r'size 3 into shape \(5,\)'),
          (b'\x00\x00\x08\x01\x00\x00\x00\x02xxx', r'size 3 into shape \(2,\)'),
          (b'\x00\x00\x08\x03\x00\x00', 'is damaged'),
          (gzip.compress(b'x' * 99, mtime=0)[:-9], 'is damaged'),
          (gzip.compress(b'x' * 99, mtime=0)[:12] + b'\xff' * 20, 'is damaged'),
      ],
  )
  def test_damaged_files_are_one_line(self, tmp_path, content, message):
    path = tmp_path / 'x'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
      image_files.read_idx(path)
    assert str(path) in str(raised.value) and '\n' not in str(raised.value)

  def test_images_and_labels_must_fit(self, tmp_path):
    write_fashion(tmp_path)
    classes = tuple('0123456789')
    data = image_files.read_idx_split(tmp_path, 'train', classes)
    assert data.images.shape == (40, 28, 28, 1)
    labels = tmp_path / 'train-labels-idx1-ubyte.gz'
    with pytest.raises(ValueError, match=r'labels 0..9, expected 0..8'):
      image_files.read_idx_split(tmp_path, 'train', classes[:9])
    write_idx(labels, np.zeros(39))
    with pytest.raises(ValueError, match='40 images, but 39 labels'):
      image_files.read_idx_split(tmp_path, 'train', classes)
    shutil.copy(tmp_path / 'train-images-idx3-ubyte.gz', labels)
    with pytest.raises(ValueError, match='rank 1, got 3 and 3'):
      image_files.read_idx_split(tmp_path, 'train', classes)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r'neither .*ubyte nor .*gz'):
      image_files.read_idx_split(tmp_path, 'train', classes)


class TestCifar:

  def test_archive_of_jpeg(self, tmp_path):
    write_cifar_archive(tmp_path, 'train')
    data = image_files.read_cifar10(tmp_path, 'train')
    assert data.images.shape == (30, 32, 32, 3)
    assert data.classes == tuple(f'class {i}' for i in range(10))
    np.testing.assert_allclose(
        data.images.mean((1, 2, 3)), 20 * data.labels, atol=2
    )

  def test_damaged_archives(self, tmp_path):
    write_cifar_archive(tmp_path, 'test')
    path = tmp_path / 'cifar10_test_jpeg.npz'
    with np.load(path) as archive:
      content = dict(archive)

    def read(**changes):
      np.savez(path, **{**content, **changes})
      with pytest.raises(ValueError) as raised:
        image_files.read_cifar10(tmp_path, 'test')
      assert str(path) in str(raised.value) and '\n' not in str(raised.value)
      return str(raised.value)

    offsets = content['offsets'].copy()
    offsets[4] = offsets[5] + 1
    assert 'offsets do not rise' in read(offsets=offsets)
    assert 'offsets do not rise' in read(offsets=offsets[:0])
    assert '29 labels' in read(labels=content['labels'][1:])
    assert 'labels 0..99' in read(labels=content['labels'] * 11)
    assert 'image 0 of 30' in read(jpeg=np.zeros_like(content['jpeg']))
    small = np.frombuffer(encode(plain(RED, (5, 4))), np.uint8)
    offsets = np.arange(31) * len(small)
    jpeg = np.tile(small, 30)
    assert 'image 0 of 30' in read(jpeg=jpeg, offsets=offsets)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match='is damaged'):
      image_files.read_cifar10(tmp_path, 'test')

  @pytest.mark.parametrize('place', ['.', 'cifar-10-batches-bin'])
  def test_binary_version(self, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    write_cifar_binary(tmp_path / place)
    data = image_files.read_cifar10(tmp_path, 'train')
    assert data.images.shape == (20, 32, 32, 3)
    assert data.labels.tolist() == [f + i for f in range(5) for i in range(4)]
    assert data.classes[2] == 'bird'
    assert data.images[3, 5, 6].tolist() == [30, 0, 0]
    assert data.images[3, 1, 2].tolist() == [30, 200, 0]
    assert len(image_files.read_cifar10(tmp_path, 'test').labels) == 4

  def test_damaged_and_missing_files(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='binary version'):
      image_files.read_cifar10(tmp_path, 'train')
    write_cifar_binary(tmp_path)
    path = tmp_path / 'data_batch_3.bin'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'data_batch_3\.bin is damaged'):
      image_files.read_cifar10(tmp_path, 'train')
