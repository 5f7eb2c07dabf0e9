"""Resume checkpoints: bit-exact, or an error that says what to do."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from codistill_jax import step as step_lib
from codistill_jax import storage
from codistill_jax.checkpoint import Checkpoints

# See storage_test.py: 2026-11, noise of orbax 0.12 about damaged arrays.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)

IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}


def make_state(tx=None, num_peers=2, units=6, rows=8):
  """A state of random numbers; nothing is compiled for it."""
  shapes = jax.eval_shape(
      lambda: step_lib.init_state(
          toy.recurrent_model(units=units),
          tx or optax.adam(1e-3),
          jax.random.PRNGKey(3),
          toy.Tokens(rows).batch(0),
          num_peers=num_peers,
      )
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: np.asarray(100 * rng.random(x.shape)).astype(x.dtype), shapes
  )


@pytest.fixture(scope='module')
def state():
  return make_state()


def at(state, step, value=1.0):
  """A state of that step, with other numbers in each leaf."""
  changed = jax.tree.map(lambda x: (x + value).astype(x.dtype), state)
  return changed.replace(step=np.array(step, np.int32))


def open_checkpoints(directory, **kwargs):
  return Checkpoints(directory / 'checkpoints', identity=IDENTITY, **kwargs)


def save_all(directory, states, **kwargs):
  checkpoints = open_checkpoints(directory, **kwargs)
  for state in states:
    checkpoints.save(state, [int(state.step) - 1, None])
  checkpoints.close()
  return checkpoints


def assert_same_state(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), (_, y) in zip(storage.flatten(a), storage.flatten(b)):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert x.tobytes() == y.tobytes(), path


@pytest.mark.parametrize(
    'tx',
    [
        optax.sgd(0.1),
        optax.adam(1e-3),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.linear_schedule(1.0, 0.0, 10)),
            optax.trace(0.9),
        ),
        optax.multi_transform(
            {'a': optax.adam(0.1), 'b': optax.sgd(0.1, momentum=0.9)},
            {'embed': 'a', 'recur': 'b', 'head': 'a'},
        ),
    ],
    ids=['sgd', 'adam', 'chain', 'multi'],
)
def test_a_state_comes_back_bit_for_bit(tmp_path, tx):
  fresh = make_state(tx)
  saved = at(fresh, 7, 0.1)
  save_all(tmp_path, [saved])
  resume = open_checkpoints(tmp_path).restore(fresh)
  assert_same_state(resume.state, saved)
  assert resume.teacher_steps == (6, None)


def test_half_precision_parameters_come_back(tmp_path, state):
  half = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, state
  )
  save_all(tmp_path, [at(half, 1)])
  resume = open_checkpoints(tmp_path).restore(half)
  assert_same_state(resume.state, at(half, 1))


def test_a_group_without_peers_comes_back(tmp_path):
  fresh = make_state(num_peers=0)
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(at(fresh, 3))
  checkpoints.close()
  resume = open_checkpoints(tmp_path).restore(fresh)
  assert_same_state(resume.state, at(fresh, 3))
  assert resume.teacher_steps == ()


def test_nothing_there_is_none_and_writes_nothing(tmp_path, state):
  checkpoints = open_checkpoints(tmp_path)
  assert checkpoints.restore(state) is None
  assert checkpoints.newest_step is None and checkpoints.saved_step is None
  assert checkpoints.wait() is None
  checkpoints.close()
  assert list(tmp_path.iterdir()) == []


def test_the_newest_are_kept(tmp_path, state):
  checkpoints = save_all(
      tmp_path, [at(state, n) for n in (2, 10, 100, 101)], keep=3
  )
  assert checkpoints.steps() == [10, 100, 101]
  assert checkpoints.newest_step == 101
  assert int(checkpoints.restore(state).state.step) == 101


def test_saved_step_names_what_is_on_disk(tmp_path, state):
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(at(state, 5))
  assert checkpoints.saved_step in (None, 5)  # It may still be under way.
  assert checkpoints.wait() == 5 and checkpoints.saved_step == 5
  assert checkpoints.steps() == [5]
  checkpoints.close()
  again = open_checkpoints(tmp_path)
  again.restore(state)
  assert again.saved_step == 5


def break_one(tmp_path, step):
  """Flips bits in the data files of a checkpoint; orbax reads only some."""
  arrays = pathlib.Path(tmp_path / 'checkpoints' / str(step) / 'arrays')
  for path in arrays.rglob('d/*'):
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 4, 3 * len(content) // 4):
      content[i] ^= 0xFF
    path.write_bytes(bytes(content))


def test_a_damaged_one_falls_back_to_the_one_before(tmp_path, state, caplog):
  save_all(tmp_path, [at(state, 10, 0.1), at(state, 20, 0.2)])
  break_one(tmp_path, 20)
  checkpoints = open_checkpoints(tmp_path)
  with caplog.at_level(logging.WARNING, logger='absl'):
    resume = checkpoints.restore(state)
  assert_same_state(resume.state, at(state, 10, 0.1))
  assert 'Skipped a damaged resume checkpoint' in caplog.text
  # The run comes by step 20 again, and must be able to save there.
  assert checkpoints.steps() == [10] and checkpoints.newest_step == 10
  checkpoints.save(at(state, 20, 0.3))
  checkpoints.close()
  resume = open_checkpoints(tmp_path).restore(state)
  assert_same_state(resume.state, at(state, 20, 0.3))


def test_a_half_written_one_is_passed_over(tmp_path, state):
  save_all(tmp_path, [at(state, 10), at(state, 20)])
  (tmp_path / 'checkpoints' / '20' / 'commit_success.txt').unlink()
  (tmp_path / 'checkpoints' / '30.orbax-checkpoint-tmp').mkdir()
  checkpoints = open_checkpoints(tmp_path)
  assert int(checkpoints.restore(state).state.step) == 10
  checkpoints.save(at(state, 15))
  checkpoints.close()
  names = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(names) == ['10', '15']


def test_if_all_are_damaged_it_says_what_to_do(tmp_path, state):
  save_all(tmp_path, [at(state, 10), at(state, 20)])
  break_one(tmp_path, 10)
  break_one(tmp_path, 20)
  with pytest.raises(ValueError, match='none of the resume') as e:
    open_checkpoints(tmp_path).restore(state)
  assert 'delete the directory' in str(e.value)
  assert not isinstance(e.value, storage.DamagedError)
  # Nothing was deleted: a person may still rescue it.
  assert open_checkpoints(tmp_path).steps() == [10, 20]


@pytest.mark.parametrize(
    'other, differing',
    [
        ({'units': 5}, r'carry float32\[8, 6\] where .* float32\[8, 5\]'),
        ({'rows': 4}, r'carry float32\[8, 6\] where .* float32\[4, 6\]'),
        ({'num_peers': 1}, r'teacher_carry float32\[2, .*float32\[1, '),
        ({'tx': optax.sgd(0.1)}, r'opt_state/0/count'),
    ],
)
def test_another_configuration_is_refused(tmp_path, state, other, differing):
  save_all(tmp_path, [at(state, 10)])
  with pytest.raises(ValueError, match=differing) as e:
    open_checkpoints(tmp_path).restore(make_state(**other))
  assert 'another configuration' in str(e.value)
  assert 'use another workdir' in str(e.value)
  assert open_checkpoints(tmp_path).steps() == [10]


def test_another_tokenizer_is_refused(tmp_path, state):
  save_all(tmp_path, [at(state, 10)])
  other = Checkpoints(
      tmp_path / 'checkpoints', identity={**IDENTITY, 'tokenizer': 'xyz'}
  )
  with pytest.raises(ValueError, match=r'tokenizer=abc.*tokenizer=xyz'):
    other.restore(state)


@pytest.mark.parametrize('ask', ['save', 'wait', 'saved_step', 'close'])
def test_an_error_in_the_background_comes_to_light(
    tmp_path, state, monkeypatch, ask
):
  def fail(*args, **kwargs):
    raise OSError('no space left on device')

  checkpoints = open_checkpoints(tmp_path)
  monkeypatch.setattr(storage, 'save', fail)
  checkpoints.save(at(state, 1))
  checkpoints._saving.exception()  # It is over.
  with pytest.raises(OSError, match='no space left'):
    if ask == 'save':
      checkpoints.save(at(state, 2))
    elif ask == 'saved_step':
      _ = checkpoints.saved_step
    else:
      getattr(checkpoints, ask)()
  checkpoints.close()


def test_discard_after_keeps_the_step_itself(tmp_path, state):
  checkpoints = save_all(tmp_path, [at(state, n) for n in (10, 20, 30)])
  checkpoints.discard_after(20)
  assert checkpoints.steps() == [10, 20]
  checkpoints.discard_after(-1)
  assert checkpoints.steps() == []
