"""Resume checkpoints: bit-exact, or an error that says what to do."""

import dataclasses
import errno
import logging
import time

import jax
import numpy as np
import optax
import pytest
import toy
from remote import files_of
from waits import PATIENCE, until

from codistill_jax import step as step_lib
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Patience, Troubles
from codistill_jax.storage.resume import ResumeCheckpoints

IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}


def make_state(tx=None, num_peers=2, units=6, rows=8, half=False):
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
      lambda x: np.asarray(100 * rng.random(x.shape)).astype(
          np.float16 if half and x.dtype == np.float32 else x.dtype
      ),
      shapes,
  )


@pytest.fixture(scope='module')
def state():
  return make_state()


def at(state, step, value=1.0):
  """A state of that step, with other numbers in each leaf."""
  changed = jax.tree.map(lambda x: (x + value).astype(x.dtype), state)
  return changed.replace(step=np.array(step, np.int32))


# Tries again at once; holds nothing up.
QUICK = Patience(retry=0.01, hold=PATIENCE, failing=PATIENCE, join=0.01)


def open_checkpoints(directory, patience=QUICK, **kwargs):
  return ResumeCheckpoints(
      directory / 'checkpoints', identity=IDENTITY, patience=patience, **kwargs
  )


def save_all(directory, states, **kwargs):
  store = open_checkpoints(directory, **kwargs)
  for state in states:
    store.save(state, [int(state.step) - 1, None])
    store.wait()
  store.close()
  return store


def assert_same_state(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), (_, y) in zip(checkpoints.flatten(a), checkpoints.flatten(b)):
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


@pytest.mark.parametrize('tx', [optax.sgd(0.1), optax.add_noise(0.1, 0.5, 3)])
def test_typed_keys_of_another_generator_come_back(tmp_path, tx):
  """Of the group, and in the state of an optimiser."""
  key = jax.random.key(7, impl='rbg')
  fresh = make_state(tx).replace(rng=key)
  saved = at(fresh.replace(rng=np.zeros(2, np.uint32)), 7).replace(rng=key)
  save_all(tmp_path, [saved])
  found = open_checkpoints(tmp_path).restore(fresh).state
  assert found.rng.dtype == key.dtype
  as_numbers = lambda state: state.replace(rng=jax.random.key_data(state.rng))
  assert_same_state(as_numbers(found), as_numbers(saved))
  other = fresh.replace(rng=jax.random.key(7))
  with pytest.raises(ValueError, match=r'rng key<rbg>.* rng key<fry>'):
    open_checkpoints(tmp_path).restore(other)


def test_nothing_there_is_none_and_writes_nothing(tmp_path, state):
  store = open_checkpoints(tmp_path)
  assert store.restore(state) is None
  assert store.newest_step is None and store.saved_step is None
  assert store.wait() is None
  store.close()
  assert list(tmp_path.iterdir()) == []


def test_the_newest_are_kept(place, state):
  store = save_all(place, [at(state, n) for n in (2, 10, 100, 101)], keep=3)
  assert store.steps() == [10, 100, 101]
  assert store.newest_step == 101
  assert int(store.restore(state).state.step) == 101


def test_saved_step_names_what_is_on_disk(tmp_path, state):
  store = open_checkpoints(tmp_path)
  store.save(at(state, 5))
  assert store.saved_step in (None, 5)  # It may still be under way.
  assert store.wait() == 5 and store.saved_step == 5
  assert store.steps() == [5]
  store.close()
  again = open_checkpoints(tmp_path)
  again.restore(state)
  assert again.saved_step == 5


def break_one(place, step):
  """Flips bits in the data files of a checkpoint; orbax reads only some."""
  for name, path in files_of(place / 'checkpoints' / str(step)).items():
    if '/d/' in name:
      path.write_bytes(bytes(x ^ 0xFF for x in path.read_bytes()))


def test_a_damaged_one_falls_back_to_the_one_before(place, state, caplog):
  save_all(place, [at(state, 10, 0.1), at(state, 20, 0.2)])
  break_one(place, 20)
  store = open_checkpoints(place)
  with caplog.at_level(logging.WARNING, logger='absl'):
    resume = store.restore(state)
  assert_same_state(resume.state, at(state, 10, 0.1))
  assert 'Skipped a damaged resume checkpoint' in caplog.text
  # The run comes by step 20 again, and must be able to save there.
  assert store.steps() == [10] and store.newest_step == 10
  store.save(at(state, 20, 0.3))
  store.close()
  resume = open_checkpoints(place).restore(state)
  assert_same_state(resume.state, at(state, 20, 0.3))


def test_a_half_written_one_is_passed_over(tmp_path, state):
  save_all(tmp_path, [at(state, 10), at(state, 20)])
  (tmp_path / 'checkpoints' / '20' / 'commit_success.txt').unlink()
  store = open_checkpoints(tmp_path)
  assert int(store.restore(state).state.step) == 10
  store.save(at(state, 15))
  store.close()
  names = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(names) == ['10', '15']


def test_if_all_are_damaged_it_says_what_to_do(tmp_path, state):
  save_all(tmp_path, [at(state, 10), at(state, 20)])
  break_one(tmp_path, 10)
  break_one(tmp_path, 20)
  with pytest.raises(ValueError, match='none of the resume') as e:
    open_checkpoints(tmp_path).restore(state)
  assert 'delete the directory' in str(e.value)
  assert not isinstance(e.value, checkpoints.DamagedError)
  # Nothing was deleted: a person may still rescue it.
  assert open_checkpoints(tmp_path).steps() == [10, 20]


@pytest.mark.parametrize(
    'other, differing',
    [
        ({'num_peers': 0}, r'teacher_carry'),
        ({'half': True}, r'float32\[.*float16\['),
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


@pytest.mark.parametrize(
    'ours, message',
    [
        ({**IDENTITY, 'tokenizer': 'xyz'}, r'tokenizer=abc.*tokenizer=xyz'),
        ({'task': 'toy'}, r'tokenizer=abc.*tokenizer=None'),
        ({**IDENTITY, 'size': '5'}, r'size=None.*size=5'),
    ],
)
def test_another_task_is_refused(tmp_path, state, ours, message):
  save_all(tmp_path, [at(state, 10)])
  other = ResumeCheckpoints(tmp_path / 'checkpoints', identity=ours)
  with pytest.raises(ValueError, match=message):
    other.restore(state)


class Disk:
  """A disk that does not take some steps, and counts tries."""

  def __init__(self, monkeypatch, error=None):
    self.error = error or OSError(errno.ENOSPC, 'disk full')
    self.full, self.tries = True, []
    self._save = checkpoints.save
    monkeypatch.setattr(checkpoints, 'save', self.save)

  def save(self, directory, step, *args):
    self.tries.append(step)
    if self.full:
      raise self.error
    return self._save(directory, step, *args)


@pytest.mark.parametrize('ask', ['wait', 'close'])
def test_in_the_end_a_full_disk_is_an_error_that_may_pass(
    tmp_path, state, monkeypatch, ask
):
  save_all(tmp_path, [at(state, 3)])
  disk = Disk(monkeypatch)
  patience = dataclasses.replace(QUICK, failing=0.1)
  store = open_checkpoints(tmp_path, patience)
  store.restore(state)
  store.save(at(state, 5))
  with pytest.raises(TimeoutError, match=r'step 5 .*disk full.*from step 3'):
    getattr(store, ask)()
  start = time.monotonic()
  store.close()  # It was given up: this does not wait again.
  assert time.monotonic() - start < PATIENCE / 2
  assert len(disk.tries) >= 1 and store.steps() == [3]


@pytest.mark.parametrize('ask', ['save', 'wait', 'saved_step', 'close'])
def test_another_error_in_the_background_comes_to_light(tmp_path, state, ask):
  def check(step):
    raise ValueError(f'a mistake at step {step}')

  store = open_checkpoints(tmp_path, check=check)
  store.save(at(state, 1))

  def act():
    if ask == 'save':
      store.save(at(state, 2))
    elif ask == 'saved_step':
      store.saved_step  # noqa: B018
    else:
      getattr(store, ask)()

  with pytest.raises(ValueError, match='a mistake at step 1'):
    until(act)


def test_trouble_with_old_checkpoints_is_none_with_the_new_one(
    tmp_path, state, monkeypatch
):
  """A save that is complete is not made again."""
  tries, now = Disk(monkeypatch), Troubles()
  tries.full = False
  store = open_checkpoints(tmp_path, troubles=now)

  def fail(directory):
    raise OSError(errno.EIO, 'input/output error')

  monkeypatch.setattr(checkpoints, 'completed_steps', fail)
  store.save(at(state, 5))
  assert store.wait() == 5 and tries.tries == [5]
  assert store.restart_step is None
  assert [t.doing for t in now.now] == ['listing resume checkpoints']
  store.close()


def test_who_may_not_write_any_more_does_not(tmp_path, state, monkeypatch):
  """Also between two tries of one save."""
  disk, allowed = Disk(monkeypatch), [True]

  def check(step):
    del step
    if not allowed[0]:
      raise RuntimeError('taken over')

  store = open_checkpoints(tmp_path, check=check)
  store.save(at(state, 5))
  until(lambda: disk.tries)
  allowed[0] = disk.full = False
  with pytest.raises(RuntimeError, match='taken over'):
    store.wait()
  store.close()
  assert store.steps() == []


def test_discard_after_keeps_the_step_itself(tmp_path, state):
  store = save_all(tmp_path, [at(state, n) for n in (10, 20, 30)])
  store.discard_after(20)
  assert store.steps() == [10, 20]
  store.discard_after(-1)
  assert store.steps() == []


# --- Used twice --------------------------------------------------------------


@pytest.mark.parametrize('new', [False, True])
@pytest.mark.parametrize('step', [1, 9, 10])
def test_another_run_needs_checkpoints_of_its_own(tmp_path, state, step, new):
  store = save_all(tmp_path, [at(state, 10)])
  if new:
    if step == 10:
      return  # Saved again, by the kill that came before it was known.
    store = open_checkpoints(tmp_path)
  else:
    store = open_checkpoints(tmp_path)
    store.restore(state)
  with pytest.raises(ValueError, match=f'come to step 10, and are .* {step};'):
    store.save(at(state, step, 2.0))
    store.wait()
  store.close()
  store = open_checkpoints(tmp_path)
  assert_same_state(store.restore(state).state, at(state, 10))
  store.save(at(state, 11))
  store.close()
  with pytest.raises(ValueError, match='after it was closed; make a new one'):
    store.save(at(state, 12))
