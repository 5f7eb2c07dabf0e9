"""The unigram distribution of each kind of task: of all training labels."""

import numpy as np
import pytest
from token_files import write_data

from codistill_jax.data import (
    criteo,
    examples,
    images,
    prepared_files,
    shards,
    text,
)
from codistill_jax.data.image_files import Labelled
from codistill_jax.data.tokenizer import END_ID
from codistill_jax.storage import files

VOCABULARY = 12
DOCUMENTS = [[[5, 6, 5], [7]], [[5, 11, 11, 11]]]  # In two shards.


@pytest.fixture
def data_dir(tmp_path):
  return write_data(tmp_path, DOCUMENTS, [[8, 8]], VOCABULARY)


def counted(data_dir):
  task = text.language_model_task(data_dir, unroll=2)
  return task.label_frequencies()


@pytest.fixture
def no_counting(monkeypatch):
  """Fails if tokens are counted while it holds."""

  def count(self):
    raise AssertionError('counted')

  return lambda: monkeypatch.setattr(shards.TokenData, 'count_tokens', count)


# `</s>` is predicted at the end of each document, `<s>` never.
EXPECTED = np.zeros(VOCABULARY)
EXPECTED[[END_ID, 5, 6, 7, 11]] = np.array([3, 3, 1, 1, 3]) / 11


def test_word_pieces_of_all_training_documents_count(data_dir):
  np.testing.assert_allclose(counted(data_dir), EXPECTED)
  data = shards.open_tokens(data_dir, 'train')
  for most in (1, 3, 100):
    np.testing.assert_array_equal(data.count_tokens(most), data.count_tokens())


def test_the_counts_are_kept_beside_the_data(data_dir, no_counting):
  first = counted(data_dir)
  no_counting()
  np.testing.assert_array_equal(counted(data_dir), first)


def test_counts_of_other_tokens_are_not_taken(data_dir):
  counted(data_dir)
  write_data(data_dir, [[[9]]], vocab_size=VOCABULARY)
  assert counted(data_dir)[9] == 0.5


@pytest.mark.parametrize('damage', [b'', b'PK\x03\x04 and no more', b'[]'])
def test_damaged_counts_are_made_again(data_dir, damage):
  counted(data_dir)
  (path,) = (data_dir / 'train').glob('*counts*')
  path.write_bytes(damage)
  np.testing.assert_allclose(counted(data_dir), EXPECTED)
  assert path.stat().st_size > len(damage)


def test_where_nobody_may_write_the_counts_stay_in_memory(
    data_dir, monkeypatch, no_counting
):
  def refused(*arguments):
    raise PermissionError

  monkeypatch.setattr(files, 'write_bytes', refused)
  task = text.language_model_task(data_dir, unroll=2)
  np.testing.assert_allclose(task.label_frequencies(), EXPECTED)
  no_counting()
  np.testing.assert_allclose(task.label_frequencies(), EXPECTED)
  assert not list((data_dir / 'train').glob('*counts*'))


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
  write_data(tmp_path, [[[12]]], vocab_size=VOCABULARY)
  with pytest.raises(ValueError, match='hold token 12, but the vocabulary has'):
    counted(tmp_path)


def test_images_of_the_training_split_count():
  """And none of those that were carved from it for validation."""
  labels = np.array([0] * 29 + [2] * 11, np.int32)
  data = Labelled(np.zeros((40, 4, 4, 1), np.uint8), labels, ('a', 'b', 'c'))
  task = images.task_in_memory(
      'toy',
      data,
      lambda: data,
      ((0.5,), (0.5,)),
      validation_fraction=0.5,
      pad=0,
      flip=False,
      partition='disjoint',
      seed=0,
  )
  seen = np.concatenate(
      [
          task.train_stream(group_id=g, num_groups=2, group_batch=10).batch(0)[
              'labels'
          ]
          for g in (0, 1)
      ]
  )
  expected = np.bincount(seen, minlength=3) / 20
  # Of all images it is 29 / 40, which 20 of them cannot have.
  np.testing.assert_allclose(task.label_frequencies(), expected)


def test_labels_of_clicks_are_read_piece_by_piece():
  rows = np.zeros((7, criteo.COLUMNS), np.uint32)
  rows[:, 0] = [1, 0, 0, 1, 0, 0, 1]
  rows[:, 1:] = 2**32 - 1
  data = prepared_files.Stack([rows[:4], rows[4:]])
  pieces = [block[:, 0] for block in data.blocks(3)]
  assert [piece.tolist() for piece in pieces] == [[1, 0, 0], [1], [0, 0, 1]]
  np.testing.assert_allclose(
      examples.label_frequencies(pieces, 2), [4 / 7, 3 / 7]
  )


def test_labels_that_are_no_classes_are_refused():
  pieces = [np.array([0, 1]), np.array([], int), np.array([-1])]
  with pytest.raises(ValueError, match=r'labels -1..-1 .* expected 0..1'):
    examples.label_frequencies(pieces, 2)
  with pytest.raises(ValueError, match='no training labels'):
    examples.label_frequencies([], 2)
