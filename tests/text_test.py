"""Lanes, resets and weights of the language model's batches.

Data sets here are made of arbitrary tokens, without a tokenizer: nothing in
this file needs TensorFlow.
"""

import concurrent.futures
import hashlib
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import MODEL, unlike_documents, write_data

from codistill_jax.data import order, shards, text
from codistill_jax.data.tokenizer import END_ID, START_ID

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {'group_id': 0, 'num_groups': 1, 'group_batch': 3, 'unroll': 4}


def in_memory(documents, vocab_size=10**6):
  documents = [np.asarray([START_ID, *d, END_ID]) for d in documents]
  offsets = np.cumsum([0] + [len(d) for d in documents])
  return shards.TokenData(
      [np.concatenate(documents)], [offsets], vocab_size, 'hash'
  )


@pytest.fixture(scope='module')
def data():
  lengths = np.random.default_rng(0).integers(0, 30, 40)
  return in_memory(unlike_documents(lengths))


def naive_lanes(data, settings, seed, epoch):
  """What the stream promises, written down without haste."""
  mine = order.group_rows(
      len(data),
      group_id=settings['group_id'],
      num_groups=settings['num_groups'],
      partition=settings.get('partition', 'shared'),
      seed=seed,
      held=True,
  )
  row_of = order.epoch_order(
      mine.size,
      seed=seed,
      group_id=settings['group_id'],
      epoch=epoch,
      held=True,
  )
  tokens = []
  for document in mine.row_of(row_of(np.arange(mine.size))):
    start = data.starts[document]
    places = np.arange(start, start + data.lengths[document])
    tokens.extend(data.gather(places).tolist())
  lane = len(tokens) // settings['group_batch']
  return [
      tokens[row * lane : (row + 1) * lane]
      for row in range(settings['group_batch'])
  ]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=6, max_size=20),
    group_batch=st.integers(1, 4),
    unroll=st.integers(1, 5),
    kind=st.sampled_from(['shared', 'disjoint']),
    seed=st.integers(0, 5),
)
def test_stream_reads_its_lanes(lengths, group_batch, unroll, kind, seed):
  data = in_memory(unlike_documents(lengths))
  options = {
      'group_id': 1,
      'num_groups': 2,
      'group_batch': group_batch,
      'unroll': unroll,
      'partition': kind,
  }
  try:
    stream = text.TokenStream(data, seed=seed, **options)
  except ValueError as e:
    lanes = naive_lanes(data, options, seed, 0)
    assert 'use more data' in str(e) and len(lanes[0]) < unroll + 1
    return
  for epoch in range(2):
    lanes = naive_lanes(data, options, seed, epoch)
    steps = range(0, len(lanes[0]) - unroll, unroll)
    assert stream.steps_per_epoch == len(steps)
    for i, at in enumerate(steps):
      batch = stream.batch(epoch * stream.steps_per_epoch + i)
      inputs = [lane[at : at + unroll] for lane in lanes]
      labels = [lane[at + 1 : at + unroll + 1] for lane in lanes]
      np.testing.assert_array_equal(batch['inputs'], inputs)
      np.testing.assert_array_equal(batch['labels'], labels)


def test_batch_keeps_its_contract(data):
  stream = text.TokenStream(data, **SETTINGS)
  for step in range(2 * stream.steps_per_epoch + 1):
    batch = stream.batch(step)
    assert {name: array.dtype for name, array in batch.items()} == {
        'inputs': np.int32,
        'labels': np.int32,
        'weights': np.float32,
        'resets': bool,
    }
    assert all(array.shape == (3, 4) for array in batch.values())
    np.testing.assert_array_equal(
        batch['weights'], np.where(batch['labels'] == START_ID, 0.0, 1.0)
    )
    resets = batch['inputs'] == START_ID
    if step % stream.steps_per_epoch == 0:
      resets[:, 0] = True
    np.testing.assert_array_equal(batch['resets'], resets)


def test_batches_do_not_depend_on_what_threads_read_before(data):
  stream = text.TokenStream(data, **SETTINGS)
  steps = np.random.default_rng(0).integers(0, 300, 200).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    batches = list(pool.map(stream.batch, steps))
  for step, batch in zip(steps, batches):
    fresh = text.TokenStream(data, **SETTINGS).batch(step)
    for name, array in batch.items():
      np.testing.assert_array_equal(array, fresh[name])
  with pytest.raises(ValueError, match='step must be 0 or more; got -1'):
    stream.batch(-1)


@given(cuts=st.lists(st.integers(0, 7), max_size=3), step=st.integers(0, 99))
def test_slices_of_rows_make_the_whole_batch(data, cuts, step):
  options = SETTINGS | {'group_batch': 7}
  whole = text.TokenStream(data, **options).batch(step)
  edges = [0, *sorted(cuts), 7]
  parts = [
      text.TokenStream(data, rows=slice(a, b), **options).batch(step)
      for a, b in itertools.pairwise(edges)
  ]
  for name, array in whole.items():
    together = np.concatenate([part[name] for part in parts])
    np.testing.assert_array_equal(together, array)


def test_too_little_data_says_how_much_is_needed():
  data = in_memory([[5, 6, 7]] * 2)  # 10 tokens.
  text.TokenStream(data, **SETTINGS | {'group_batch': 2})
  with pytest.raises(
      ValueError, match=r'10 tokens.*group_batch=3.*unroll=4 needs 15'
  ):
    text.TokenStream(data, **SETTINGS)


def test_sizes_must_be_positive(data):
  for name in ('group_batch', 'unroll'):
    with pytest.raises(ValueError, match=f'{name}=0'):
      text.TokenStream(data, **SETTINGS | {name: 0})
  sizes = {'batch_size': 1, 'unroll': 1, 'max_batches': 1}
  for name in sizes:
    with pytest.raises(ValueError, match=f'{name} must be 1 or more; got 0'):
      text.DocumentBatches(data, **sizes | {name: 0})


def test_a_batch_costs_no_call_for_each_of_its_rows():
  """Milliseconds on any machine, were they measured."""
  rng = np.random.default_rng(0)
  data = in_memory([rng.integers(3, 9, 300) for _ in range(4000)])
  stream = text.TokenStream(
      data, group_id=0, num_groups=1, group_batch=128, unroll=32
  )
  stream.batch(0)
  calls = []
  count = lambda frame, event, arg: calls.append(event)
  sys.setprofile(count)
  try:
    for step in range(1, 30):
      stream.batch(step)
  finally:
    sys.setprofile(None)
  made = sum(event in ('call', 'c_call') for event in calls)
  assert 29 < made < 29 * 100


# --- validation ---


def predictions(batches):
  """Every label with its input, and which of the two are at a reset."""
  pairs, after_reset = [], []
  for batch in batches:
    for row in range(len(batch['inputs'])):
      for t in np.flatnonzero(batch['weights'][row]):
        label = int(batch['labels'][row, t])
        pairs.append((int(batch['inputs'][row, t]), label))
        if batch['resets'][row, t]:
          after_reset.append(label)
  return sorted(pairs), sorted(after_reset)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=15),
    batch_size=st.integers(1, 6),
    unroll=st.integers(1, 5),
)
def test_validation_predicts_every_label_once(lengths, batch_size, unroll):
  documents = unlike_documents(lengths)
  batches = text.DocumentBatches(
      in_memory(documents), batch_size, unroll=unroll
  )
  expected, first = [], []
  for document in documents:
    tokens = [START_ID, *document, END_ID]
    expected += itertools.pairwise(tokens)
    first.append(tokens[1])
  assert predictions(batches) == (sorted(expected), sorted(first))
  for batch in batches:
    assert all(a.shape == (batch_size, unroll) for a in batch.values())
    assert set(np.unique(batch['weights'])) <= {0.0, 1.0}


def test_validation_rows_carry_whole_documents():
  documents = unlike_documents([9, 2, 14, 6, 0, 11])
  batches = text.DocumentBatches(in_memory(documents), 2, unroll=4)
  rows = np.concatenate([batch['inputs'] for batch in batches], axis=1)
  resets = np.concatenate([batch['resets'] for batch in batches], axis=1)
  np.testing.assert_array_equal(resets, rows == START_ID)
  read = []
  for row in rows:
    starts = [*np.flatnonzero(row == START_ID), len(row)]
    assert starts[0] == 0
    for a, b in itertools.pairwise(starts):
      read.append([t for t in row[a:b].tolist() if t > END_ID])
  assert sorted(read) == sorted(documents)


def test_validation_lanes_are_balanced():
  lengths = np.random.default_rng(0).integers(1, 100, 200)
  data = in_memory(unlike_documents(lengths))
  batches = text.DocumentBatches(data, 8, unroll=5)
  assert len(batches) <= 1.05 * data.num_tokens / (8 * 5) + 1


def test_validation_is_a_sequence_and_can_be_capped(data):
  batches = text.DocumentBatches(data, 4, unroll=8)
  capped = text.DocumentBatches(data, 4, unroll=8, max_batches=3)
  assert len(capped) == 3 < len(batches)
  assert len(list(capped)) == 3
  assert len(text.DocumentBatches(data, 4, unroll=8, max_batches=999)) == len(
      batches
  )
  np.testing.assert_array_equal(
      batches[-1]['inputs'], list(batches)[-1]['inputs']
  )
  for index in (len(batches), -len(batches) - 1):
    with pytest.raises(IndexError):
      batches[index]


@pytest.mark.parametrize('batch_size', [1, 4, 16])
@pytest.mark.parametrize('length', [3, 40, 5000])
def test_a_capped_validation_has_no_empty_lane(batch_size, length):
  data = in_memory(unlike_documents([length] * 50))
  capped = text.DocumentBatches(data, batch_size, unroll=8, max_batches=2)
  for batch in capped:
    assert (batch['weights'][:, : length - 1].any(axis=1)).all()


@pytest.mark.parametrize('batch_size', [1, 4, 16])
@pytest.mark.parametrize('max_batches', [4, 12])
def test_a_capped_validation_is_a_sample_of_the_split(batch_size, max_batches):
  """Not its beginning: here the pieces rise from document to document."""
  lengths = np.random.default_rng(0).integers(1, 30, 3000)
  data = in_memory(unlike_documents(lengths))
  capped = text.DocumentBatches(
      data, batch_size, unroll=16, max_batches=max_batches
  )
  found = predictions(capped)[0]
  room = max_batches * batch_size * 16
  assert 0.7 * room < len(found) <= room
  # Of a uniform distribution, whole documents counting as one draw.
  places = np.array([a for a, _ in found if a > END_ID]) / sum(lengths)
  documents = len(found) / 15
  assert abs(places.mean() - 0.5) < 3.5 * np.sqrt(1 / 12 / documents)
  again = text.DocumentBatches(
      data, batch_size, unroll=16, max_batches=max_batches
  )
  np.testing.assert_array_equal(again[-1]['inputs'], capped[-1]['inputs'])


# --- the task and its files ---


def test_task_speaks_the_contract(tmp_path):
  write_data(tmp_path, [unlike_documents([30, 20, 25])])
  task = text.language_model_task(
      tmp_path, unroll=4, partition='disjoint', seed=2, max_eval_batches=1
  )
  digest = hashlib.sha256(MODEL).hexdigest()
  assert task.num_classes == 5000
  assert task.example_name == 'token'
  assert task.identity == {
      'task': 'language_model',
      'vocab_size': '5000',
      'tokenizer': digest,
  }
  whole = task.train_stream(group_id=1, num_groups=2, group_batch=2)
  part = task.train_stream(
      group_id=1, num_groups=2, group_batch=2, rows=slice(1, 2)
  )
  np.testing.assert_array_equal(
      whole.batch(1)['inputs'][1:], part.batch(1)['inputs']
  )
  data = shards.open_tokens(tmp_path, 'train')
  direct = text.TokenStream(
      data,
      group_id=1,
      num_groups=2,
      group_batch=2,
      unroll=4,
      partition='disjoint',
      seed=2,
  )
  np.testing.assert_array_equal(
      whole.batch(5)['inputs'], direct.batch(5)['inputs']
  )
  batches = task.eval_batches(2)
  assert len(batches) == 1 and batches[0]['inputs'].shape == (2, 4)


def test_training_needs_no_data_package(tmp_path, python):
  write_data(tmp_path, [unlike_documents([30])])
  program = (
      'import sys\n'
      'for name in ("tensorflow", "tensorflow_text", "datasets",\n'
      '             "sentencepiece"):\n'
      '  sys.modules[name] = None\n'
      'from codistill_jax.data import text\n'
      f'task = text.language_model_task({str(tmp_path)!r}, unroll=4)\n'
      'stream = task.train_stream(group_id=0, num_groups=1, group_batch=2)\n'
      'print(stream.batch(0)["inputs"].shape, len(task.eval_batches(1)))\n'
  )
  output = subprocess.run(
      [python, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert output.stdout.strip() == '(2, 4) 1', output.stderr


def test_token_outside_the_vocabulary_is_noticed(tmp_path):
  write_data(tmp_path, [[[5, 99, 6, 7, 8, 9]]], vocab_size=99)
  stream = text.TokenStream(
      shards.open_tokens(tmp_path, 'train'),
      **SETTINGS | {'group_batch': 1},
  )
  with pytest.raises(ValueError, match=r'hold token 99, .* vocabulary has 99'):
    stream.batch(0)
