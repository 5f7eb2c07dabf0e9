"""Publications: a reader trusts neither the peer, nor the disk, nor numbers."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints
from codistill_jax.storage.checkpoints import MismatchError

IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}
SENT = Publication(group_id=1, step=20, time=12.5, identity=IDENTITY)


def variables_of(value=0.5, width=3, dtype=np.float32):
  return Variables(
      params={
          'a': {'kernel': np.full((2, width), value, dtype)},
          'b': np.arange(4, dtype=dtype),
      },
      model_state={
          'mean': np.full((width,), 2.0, dtype),
          'count': np.array(7, np.int32),
      },
  )


def publish(root, variables=None, publication=SENT):
  return publications.write(root, publication, variables or variables_of())


def read(root, *, group_id=1, step=20, like=None, identity=IDENTITY, **kwargs):
  like = like or variables_of(0.0)
  return publications.read(
      root, group_id, step, like=like, identity=identity, **kwargs
  )


def test_what_is_published_is_what_is_read(tmp_path):
  written = publish(tmp_path)
  found, variables = read(tmp_path)
  assert found == written
  assert found == dataclasses.replace(SENT, num_bytes=4 * (6 + 4 + 3 + 1))
  for (path, a), (_, b) in zip(
      checkpoints.flatten(variables), checkpoints.flatten(variables_of())
  ):
    assert a.dtype == b.dtype, path
    np.testing.assert_array_equal(a, b)
  assert publications.published_steps(tmp_path, 1) == [20]
  assert publications.published_steps(tmp_path, 0) == []


def test_a_model_without_state_is_published_too(tmp_path):
  bare = Variables({'w': np.ones(2, np.float32)})
  publish(tmp_path, bare)
  _, variables = read(tmp_path, like=bare)
  assert variables.model_state == {}


@pytest.mark.parametrize('published', ['float32', 'bfloat16'])
@pytest.mark.parametrize('wanted', [None, 'float32', 'bfloat16'])
def test_the_reader_chooses_the_width_of_floats(tmp_path, published, wanted):
  publish(tmp_path, variables_of(dtype=jnp.dtype(published)))
  _, variables = read(tmp_path, dtype=wanted)
  assert variables.params['b'].dtype == jnp.dtype(wanted or published)
  assert variables.model_state['count'].dtype == np.int32
  np.testing.assert_array_equal(
      variables.params['b'].astype(np.float32), [0, 1, 2, 3]
  )


def test_a_sound_step_is_left_alone(tmp_path):
  """A restarted group comes by it again; peers may be reading it."""
  first = publish(tmp_path, variables_of(1.0))
  later = dataclasses.replace(SENT, time=99.0)
  assert publish(tmp_path, variables_of(2.0), later) == first
  found, variables = read(tmp_path)
  assert found == first
  assert variables.params['a']['kernel'][0, 0] == 1.0


def flip(root):
  for path in (root / 'group_1' / '20' / 'arrays').rglob('d/*'):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def lose_a_file(root):
  next((root / 'group_1' / '20' / 'arrays').rglob('d/*')).unlink()


def alter_the_record(root):
  path = root / 'group_1' / '20' / 'record.json'
  path.write_bytes(path.read_bytes().replace(b'toy', b'Toy'))


def lose_the_mark(root):
  (root / 'group_1' / '20' / 'commit_success.txt').unlink()


def put_nan(root):
  variables = variables_of()
  variables.params['b'][0] = np.nan
  publish_unchecked(root, variables)


def claim_another_step(root):
  publish_unchecked(root, variables_of(), step=30)


def make_it_of_another_model(root):
  publish_unchecked(root, variables_of(width=4))


def make_it_of_another_task(root):
  publish_unchecked(root, variables_of(), identity={'task': 'other'})


@pytest.mark.parametrize(
    'spoil',
    [
        flip,
        lose_a_file,
        alter_the_record,
        lose_the_mark,
        put_nan,
        claim_another_step,
        make_it_of_another_model,
        make_it_of_another_task,
    ],
)
def test_one_that_no_peer_would_take_is_replaced(tmp_path, spoil):
  publish(tmp_path, variables_of(1.0))
  spoil(tmp_path)
  later = dataclasses.replace(SENT, time=99.0)
  written = publish(tmp_path, variables_of(2.0), later)
  found, variables = read(tmp_path)
  assert found == written and found.time == 99.0
  assert variables.params['a']['kernel'][0, 0] == 2.0


def test_a_file_system_that_refuses_is_no_reason_to_replace(
    tmp_path, monkeypatch
):
  publish(tmp_path, variables_of(1.0))

  def load_tree(*_):
    raise PermissionError(13, 'Permission denied')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'load_tree', load_tree)
    with pytest.raises(PermissionError):
      publish(tmp_path, variables_of(2.0))
  _, variables = read(tmp_path)
  assert variables.params['a']['kernel'][0, 0] == 1.0


def other_shape():
  return variables_of(width=4)


def other_dtype():
  variables = variables_of()
  variables.model_state['count'] = np.array(7.0, np.float32)
  return variables


def other_name():
  variables = variables_of()
  return variables.replace(params={'a': variables.params['a'], 'c': None})


def one_more():
  variables = variables_of()
  return variables.replace(params={**variables.params, 'z': np.ones(2)})


@pytest.mark.parametrize(
    'ours, differing',
    [
        (
            other_shape,
            'model_state/mean float32[3] where this run has'
            ' model_state/mean float32[4]',
        ),
        (
            other_dtype,
            'model_state/count int32[] where this run has'
            ' model_state/count float32[]',
        ),
        (other_name, 'params/b float32[4] where this run has nothing'),
        (one_more, 'nothing where this run has params/z float64[2]'),
    ],
)
def test_another_architecture_is_named_by_its_first_leaf(
    tmp_path, ours, differing
):
  publish(tmp_path)
  with pytest.raises(MismatchError) as e:
    read(tmp_path, like=ours())
  assert str(e.value) == (
      'publication 20 of group 1 is of another configuration: it holds'
      f' {differing}; give all groups the same model, task and prepared data'
  )


@pytest.mark.parametrize(
    'ours, message',
    [
        ({'task': 'toy', 'tokenizer': 'xyz'}, 'tokenizer=abc.*tokenizer=xyz'),
        ({'task': 'toy'}, 'tokenizer=abc.*tokenizer=None'),
        (
            {'task': 'toy', 'tokenizer': 'abc', 'vocab': '5'},
            'vocab=None.*vocab=5',
        ),
    ],
)
def test_a_peer_with_other_data_is_refused(tmp_path, ours, message):
  publish(tmp_path)
  with pytest.raises(MismatchError, match=message):
    read(tmp_path, identity=ours)
  read(tmp_path, identity=None)  # Whoever asks for none gets any.


def publish_unchecked(root, variables, **facts):
  """As a faulty publisher would; all checksums are right."""
  tree = {'params': variables.params, 'model_state': variables.model_state}
  facts = {
      'group_id': 1,
      'step': 20,
      'time': 12.5,
      'identity': IDENTITY,
  } | facts
  checkpoints.save(publications.group_directory(root, 1), 20, tree, facts)


@pytest.mark.parametrize('bad', [[np.nan], [np.inf], [-np.inf, np.inf]])
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_numbers_that_are_not_finite_are_neither_sent_nor_taken(
    tmp_path, bad, dtype
):
  variables = variables_of(dtype=dtype)
  variables.params['b'][: len(bad)] = bad
  with pytest.raises(FloatingPointError) as e:
    publish(tmp_path, variables)
  assert str(e.value) == (
      'group 1 does not publish step 20: params/b is not finite'
  )
  assert not list(tmp_path.iterdir())
  publish_unchecked(tmp_path, variables)
  with pytest.raises(
      checkpoints.DamagedError, match=r'params/b .*is not finite'
  ):
    read(tmp_path)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_the_largest_finite_numbers_are_accepted(tmp_path, dtype):
  # Of float64 the sum is infinite.
  bare = Variables({'w': np.full(4, np.finfo(dtype).max)})
  publish(tmp_path, bare)
  _, variables = read(tmp_path, like=bare)
  np.testing.assert_array_equal(variables.params['w'], bare.params['w'])


@pytest.mark.parametrize(
    'facts',
    [
        {'time': np.nan},
        {'time': np.inf},
        {'time': 10**400},
        {'time': '12'},
        {'time': True},
        {'time': None},
        {'step': 20.0},
        {'step': '20'},
        {'step': True},
        {'group_id': None},
        {'group_id': 1.0},
        {'identity': None},
        {'identity': ['task']},
        {'identity': {'task': 3}},
        {'surprise': 1},
    ],
)
def test_metadata_that_is_none_is_rejected(tmp_path, facts):
  publish_unchecked(tmp_path, variables_of(), **facts)
  with pytest.raises(checkpoints.DamagedError, match='expected group_id, step'):
    read(tmp_path)


def test_metadata_that_is_missing_is_rejected(tmp_path):
  directory = publications.group_directory(tmp_path, 1)
  checkpoints.save(directory, 20, {'params': {'w': np.ones(2)}}, {'step': 20})
  with pytest.raises(checkpoints.DamagedError, match='expected group_id, step'):
    read(tmp_path)


@pytest.mark.parametrize('there', ['group_1/30', 'group_2/20'])
def test_a_publication_in_the_wrong_place_is_rejected(tmp_path, there):
  """As a copy made by hand would be."""
  publish(tmp_path)
  shutil.copytree(tmp_path / 'group_1' / '20', tmp_path / there)
  group_id, step = int(there[6]), int(there[8:])
  with pytest.raises(
      checkpoints.DamagedError, match='published by group 1 at step 20'
  ):
    read(tmp_path, group_id=group_id, step=step)


def test_a_missing_publication_is_missing(tmp_path):
  with pytest.raises(checkpoints.MissingError):
    read(tmp_path)
