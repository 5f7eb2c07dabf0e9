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
from codistill_jax.storage.checkpoints import DamagedError, MismatchError

IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}
SENT = Publication(group_id=1, step=20, time=12.5, identity=IDENTITY)
LATER = dataclasses.replace(SENT, time=99.0)
FACTS = {'group_id': 1, 'step': 20, 'time': 12.5, 'identity': IDENTITY}


def variables_of(value=0.5, width=3, dtype=np.float32, **params):
  return Variables(
      {
          'a': {'kernel': np.full((2, width), value, dtype)},
          'b': np.arange(4, dtype=dtype),
          **params,
      },
      {
          'mean': np.full((width,), 2.0, dtype),
          'count': np.array(7, np.int32),
      },
  )


def publish(root, variables=None, publication=SENT):
  return publications.write(root, publication, variables or variables_of())


def publish_unchecked(root, variables, **facts):
  """As a faulty publisher would; all checksums are right."""
  tree = {'params': variables.params, 'model_state': variables.model_state}
  checkpoints.save(root / 'group_1', 20, tree, FACTS | facts)


def read(root, group_id=1, step=20, like=None, identity=IDENTITY, **kwargs):
  like = like or variables_of(0.0)
  return publications.read(
      root, group_id, step, like=like, identity=identity, **kwargs
  )


def assert_same(found, expected):
  pairs = zip(checkpoints.flatten(found), checkpoints.flatten(expected))
  for (path, a), (_, b) in pairs:
    assert a.dtype == b.dtype, path
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    'sent',
    [
        variables_of(),
        Variables({'w': np.ones(2, np.float32)}),  # A model without state.
        Variables({'w': np.full(4, np.finfo(np.float32).max)}),
        # The largest finite numbers; their sum is infinite.
        Variables({'w': np.full(4, np.finfo(np.float64).max)}),
    ],
)
def test_what_is_published_is_what_is_read(tmp_path, sent):
  written = publish(tmp_path, sent)
  found, variables = read(tmp_path, like=sent)
  size = sum(x.nbytes for _, x in checkpoints.flatten(sent))
  assert found == written == dataclasses.replace(SENT, num_bytes=size)
  assert_same(variables, sent)
  assert publications.published_steps(tmp_path, 1) == [20]
  assert publications.published_steps(tmp_path, 0) == []


@pytest.mark.parametrize('published', ['float32', 'bfloat16'])
@pytest.mark.parametrize('wanted', [None, 'float32', 'bfloat16'])
def test_the_reader_chooses_the_width_of_floats(tmp_path, published, wanted):
  publish(tmp_path, variables_of(dtype=jnp.dtype(published)))
  _, variables = read(tmp_path, dtype=wanted)
  assert_same(variables, variables_of(dtype=jnp.dtype(wanted or published)))


# --- One that is there already -----------------------------------------------


def test_a_sound_step_is_left_alone(tmp_path, monkeypatch):
  """A restarted group comes by it again; peers may be reading it."""
  first = publish(tmp_path, variables_of(1.0))
  assert publish(tmp_path, variables_of(2.0), LATER) == first

  def load_tree(*_):
    raise PermissionError(13, 'Permission denied')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'load_tree', load_tree)
    with pytest.raises(PermissionError):  # No reason to replace it.
      publish(tmp_path, variables_of(2.0))
  found, variables = read(tmp_path)
  assert found == first
  assert_same(variables, variables_of(1.0))


def with_files(change, pattern):
  def spoil(root):
    for path in (root / 'group_1' / '20').rglob(pattern):
      data = bytearray(path.read_bytes())
      path.unlink()
      if change is not None:
        path.write_bytes(change(data))

  return spoil


def flipped(data):
  data[len(data) // 2] ^= 1
  return data


def unchecked(variables=None, **facts):
  return lambda root: publish_unchecked(
      root, variables or variables_of(), **facts
  )


@pytest.mark.parametrize(
    'spoil',
    [
        with_files(flipped, 'd/*'),
        with_files(None, 'd/*'),
        with_files(lambda data: data.replace(b'toy', b'Toy'), 'record.json'),
        with_files(None, 'commit_success.txt'),
        unchecked(variables_of(np.nan)),
        unchecked(step=30),
        unchecked(variables_of(width=4)),
        unchecked(identity={'task': 'other'}),
    ],
    ids=['flip', 'file', 'record', 'mark', 'nan', 'step', 'model', 'task'],
)
def test_one_that_no_peer_would_take_is_replaced(tmp_path, spoil):
  publish(tmp_path, variables_of(1.0))
  spoil(tmp_path)
  written = publish(tmp_path, variables_of(2.0), LATER)
  found, variables = read(tmp_path)
  assert found == written and found.time == 99.0
  assert_same(variables, variables_of(2.0))


# --- What is refused ---------------------------------------------------------


def without_b(**params):
  return variables_of().replace(
      params={'a': variables_of().params['a'], **params}
  )


@pytest.mark.parametrize(
    'ours, differing',
    [
        (
            variables_of(width=4),
            'model_state/mean float32[3] where this run has'
            ' model_state/mean float32[4]',
        ),
        (
            Variables(
                variables_of().params,
                variables_of().model_state | {'count': np.float32(7)},
            ),
            'model_state/count int32[] where this run has'
            ' model_state/count float32[]',
        ),
        (
            without_b(c=None),
            'params/b float32[4] where this run has nothing',
        ),
        (
            variables_of(z=np.ones(2)),
            'nothing where this run has params/z float64[2]',
        ),
    ],
)
def test_another_architecture_is_named_by_its_first_leaf(
    tmp_path, ours, differing
):
  publish(tmp_path)
  with pytest.raises(MismatchError) as e:
    read(tmp_path, like=ours)
  assert str(e.value) == (
      'publication 20 of group 1 is of another configuration: it holds'
      f' {differing}; give all groups the same model, task and prepared data'
  )


@pytest.mark.parametrize(
    'ours, message',
    [
        (IDENTITY | {'tokenizer': 'xyz'}, 'tokenizer=abc.*tokenizer=xyz'),
        ({'task': 'toy'}, 'tokenizer=abc.*tokenizer=None'),
        (IDENTITY | {'vocab': '5'}, 'vocab=None.*vocab=5'),
    ],
)
def test_a_peer_with_other_data_is_refused(tmp_path, ours, message):
  publish(tmp_path)
  with pytest.raises(MismatchError, match=message):
    read(tmp_path, identity=ours)
  read(tmp_path, identity=None)  # Whoever asks for none gets any.


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
  with pytest.raises(DamagedError, match='params/b is not finite'):
    read(tmp_path)


@pytest.mark.parametrize(
    'facts',
    [
        {'life': (1 << 63) - 1},
        *({'time': x} for x in (np.nan, np.inf, 10**400, '12', True, None)),
        *({'step': x} for x in (20.0, '20', True, -20)),
        *({'group_id': x} for x in (None, 1.0)),
        *({'identity': x} for x in (None, ['task'], {'task': 3})),
        {'surprise': 1},
    ],
    ids=str,
)
def test_metadata_that_is_none_is_rejected(tmp_path, facts):
  publish_unchecked(tmp_path, variables_of(), **facts)
  with pytest.raises(DamagedError, match='expected group_id, step'):
    read(tmp_path)


def test_metadata_that_is_missing_is_rejected(tmp_path):
  tree = {'params': {'w': np.ones(2)}}
  checkpoints.save(tmp_path / 'group_1', 20, tree, {'step': 20})
  with pytest.raises(DamagedError, match='expected group_id, step'):
    read(tmp_path)


@pytest.mark.parametrize('there', ['group_1/30', 'group_2/20'])
def test_a_publication_in_the_wrong_place_is_rejected(tmp_path, there):
  """As a copy made by hand would be."""
  with pytest.raises(checkpoints.MissingError):
    read(tmp_path)
  publish(tmp_path)
  shutil.copytree(tmp_path / 'group_1' / '20', tmp_path / there)
  with pytest.raises(DamagedError, match='published by group 1 at step 20'):
    read(tmp_path, int(there[6]), int(there[8:]))
