"""The checkpoint format: what is read back is what was written, or an error."""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from remote import files_of
from waits import PATIENCE

from codistill_jax.storage import checkpoints, files

STEP = 7
MARK = 'commit_success.txt'


def a_tree(value=0.0):
  rng = np.random.default_rng(0)
  return {
      'params': {
          'kernel': (
              rng.normal(size=(16, 8)).astype(np.float32) + np.float32(value)
          ),
          'half': rng.normal(size=(5,)).astype(jnp.bfloat16),
          'nothing': {},
      },
      'step': np.array(3, np.int32),
      'scalar': np.array(-0.0, np.float32),
      'key': np.array([1, 2**32 - 1], np.uint32),
      'flags': np.array([True, False]),
      'bytes': np.arange(5, dtype=np.int8),
  }


def read(directory, step=STEP, like=None):
  record = checkpoints.load_record(directory, step)
  return checkpoints.load_tree(directory, step, record, like or a_tree())


def assert_same(a, b):
  a, b = checkpoints.flatten(a), checkpoints.flatten(b)
  assert [path for path, _ in a] == [path for path, _ in b]
  for (path, x), (_, y) in zip(a, b):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert x.tobytes() == y.tobytes(), path


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp('saved')
  checkpoints.save(directory, STEP, a_tree(), {'note': [1, None, 'x']})
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'copy')
  return tmp_path / 'copy'


@pytest.fixture
def restored(monkeypatch):
  """What orbax was asked to restore."""
  asked, restore = [], ocp.Checkpointer.restore

  def noted(self, path, *args, **kwargs):
    asked.append(path)
    return restore(self, path, *args, **kwargs)

  monkeypatch.setattr(ocp.Checkpointer, 'restore', noted)
  return asked


# --- What is saved is what is read -------------------------------------------


def test_every_kind_of_array_comes_back_with_the_same_bits(place):
  assert checkpoints.completed_steps(place) == []
  checkpoints.save(place, STEP, a_tree(1.0), {})
  checkpoints.save(place, STEP, a_tree(), {'note': [1, None, 'x']})
  assert_same(read(place), a_tree())
  assert checkpoints.completed_steps(place) == [STEP]
  record = checkpoints.load_record(place, STEP)
  assert record.facts == {'note': [1, None, 'x']}
  described = checkpoints.describe(a_tree())
  assert described == tuple(
      dataclasses.replace(leaf, checksum='') for leaf in record.leaves
  )
  kernel = next(x for x in described if x.path == 'params/kernel')
  assert str(kernel) == 'params/kernel float32[16, 8]'
  assert kernel.num_bytes == 16 * 8 * 4


@pytest.mark.parametrize(
    'x',
    [
        np.arange(3_000_000, dtype=np.float32).reshape(3, -1),  # Many chunks.
        np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
        np.array([0x7FC00001, 0x80000000, 0xFF800000], 'u4').view(np.float32),
    ],
    ids=['large', 'transposed', 'nan'],
)
def test_neither_size_nor_layout_nor_nan_changes_a_bit(tmp_path, x):
  checkpoints.save(tmp_path, 1, {'x': x}, {})
  found = read(tmp_path, 1, {'x': x})
  assert_same(found, {'x': np.ascontiguousarray(x)})


NAMES = [
    'sweep[1]',
    'a[!b]*?',
    'lr={1,2} ~ $HOME',
    'at 50%20 #1 & "it\'s" <x>|;',
    'back\\slash',
    'two\nlines\tand\x01',
    'Modèle 日本 ☃',
    'not\udcffutf-8',
    '-flag',
    'x:',
]


@pytest.mark.parametrize('name', NAMES)
def test_every_character_that_a_path_may_hold_is_kept(place, name):
  if files.is_remote(place) and ('\udcff' in name):
    pytest.skip('the names of objects are Unicode')
  place = place / name
  for step in (3, STEP):
    checkpoints.save(place, step, a_tree(), {})
  assert_same(read(place), a_tree())
  assert checkpoints.completed_steps(place) == [3, STEP]
  checkpoints.delete(place, [3])
  assert {name.split('/')[0] for name in files_of(place)} == {str(STEP)}
  for _ in range(2):  # The second time, the older one gives way.
    checkpoints.save(place, STEP, a_tree(), {})
    checkpoints.set_aside(place, STEP)
    assert checkpoints.completed_steps(place) == []
    # For a person to look at; a bucket cannot rename, so it is deleted.
    aside = files.exists(place / f'{STEP}.damaged' / 'record.json')
    assert aside != files.is_remote(place)
  assert checkpoints.clear_up(place) == (not files.is_remote(place))
  assert not files_of(place)


def test_a_temporary_directory_of_such_a_name_is_refused(tmp_path, monkeypatch):
  (tmp_path / 'tmp[1]').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp[1]'))
  with pytest.raises(ValueError, match='set TMPDIR to another'):
    checkpoints.save(tmp_path / '[', STEP, a_tree(), {})
  checkpoints.save(tmp_path, STEP, a_tree(), {})  # It needs none.


@pytest.mark.parametrize('shape', [(0,), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'bool'])
def test_arrays_of_size_zero_come_back(place, shape, dtype):
  tree = {'params': {'off': np.zeros(shape, jnp.dtype(dtype))}} | {
      'alone': np.zeros(shape, jnp.dtype(dtype)),
      'step': np.array(3),
  }
  record = checkpoints.save(place, STEP, tree, {})
  assert record.leaves[0].shape == shape
  assert_same(read(place, like=tree), tree)
  found = checkpoints.load_tree(
      place, STEP, record, tree['params'], part='params'
  )
  assert_same(found, tree['params'])


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg', 'unsafe_rbg'])
@pytest.mark.parametrize('typed', [True, False])
def test_random_keys_come_back(tmp_path, impl, typed):
  def keys(seed, impl=impl):
    many = jax.random.split(jax.random.key(seed, impl=impl), 3)
    tree = {'many': many, 'one': many[0]}
    return tree if typed else jax.tree.map(jax.random.key_data, tree)

  record = checkpoints.save(tmp_path, STEP, keys(7), {})
  for like in (keys(0), jax.eval_shape(lambda: keys(0))):
    found = read(tmp_path, like=like)
    for name, key in keys(7).items():
      assert found[name].dtype == key.dtype
      if typed:
        assert jax.random.key_impl(found[name]) == impl
        key, found[name] = map(jax.random.key_data, (key, found[name]))
      np.testing.assert_array_equal(found[name], key)
  other = keys(7, 'threefry2x32' if impl != 'threefry2x32' else 'rbg')
  with pytest.raises(checkpoints.MismatchError, match='it holds many '):
    checkpoints.check_match(
        'this',
        identity={},
        leaves=record.leaves,
        our_identity={},
        like=other,
        advice='change it',
    )


@pytest.mark.parametrize('dtype', ['object', 'S3', 'U3', 'M8[s]', 'uint4'])
def test_an_array_that_no_checkpoint_can_hold_is_named(tmp_path, dtype):
  tree = {'params': {'odd': np.zeros(2, jnp.dtype(dtype))}}
  with pytest.raises(ValueError, match=r'params/odd is an array of type'):
    checkpoints.save(tmp_path, STEP, tree, {})


def test_lists_and_names_with_dots_and_slashes_come_back_or_are_refused(
    tmp_path,
):
  x, y = np.ones(2), np.zeros(3)
  tree = {'a': [x, {'b/c': y}], 'd.e': (x,), '..': y, '[0]*': x, 'none': None}
  checkpoints.save(tmp_path, STEP, tree, {})
  assert_same(read(tmp_path, like=tree), tree)
  for name in ('a.b', 'a/b'):  # One name to orbax.
    with pytest.raises(ValueError, match='and a/b have one name'):
      checkpoints.save(tmp_path, STEP, {name: x, 'a': {'b': y}}, {})


@pytest.mark.parametrize('what', ['lost', 'altered'])
def test_what_cannot_be_read_back_is_no_checkpoint(place, monkeypatch, what):
  """Whatever the reason; and the one before stays."""
  checkpoints.save(place, 3, a_tree(), {})
  save = ocp.Checkpointer.save

  def save_badly(self, path, args):
    item = args.item
    if what == 'altered':
      kernel = item['params']['kernel'] + 1
      item = item | {'params': item['params'] | {'kernel': kernel}}
    save(self, path, ocp.args.PyTreeSave(item))
    if what == 'lost':
      (path / 'manifest.ocdbt').unlink()

  monkeypatch.setattr(ocp.Checkpointer, 'save', save_badly)
  with pytest.raises(checkpoints.DamagedError, match='read back') as e:
    checkpoints.save(place, STEP, a_tree(), {})
  assert str(place) in str(e.value) and '\n' not in str(e.value)
  assert checkpoints.completed_steps(place) == [3]
  assert {name.split('/')[0] for name in files_of(place)} == {'3'}


def test_one_part_is_read_alone(saved):
  record = checkpoints.load_record(saved, STEP)
  like = a_tree()['params']
  found = checkpoints.load_tree(saved, STEP, record, like, part='params')
  assert_same(found, like)


def test_orbax_alone_reads_the_arrays(saved):
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(saved / str(STEP) / 'arrays', a_tree())
  assert_same(found, a_tree())


# --- Damage ------------------------------------------------------------------


def flipped(data):
  start = int(np.random.default_rng(len(data)).integers(max(len(data) - 8, 1)))
  return (
      data[:start]
      + bytes(x ^ 0xFF for x in data[start:][:8])
      + (data[start + 8 :])
  )


DAMAGE = {
    'flipped': flipped,
    'truncated': lambda data: data[: len(data) // 2],
    'longer': lambda data: data + b'x',
    'emptied': lambda data: b'',
    'deleted': lambda data: None,
}


@pytest.mark.parametrize('how', DAMAGE)
def test_damage_is_never_read_as_data(place, restored, how):
  """Each file in turn: an error of ours, or the very same arrays."""
  checkpoints.save(place, STEP, a_tree(), {})
  noticed = set()
  for name, path in files_of(place / str(STEP)).items():
    whole = path.read_bytes()
    damaged = DAMAGE[how](whole)
    if damaged is None:
      path.unlink()
    else:
      path.write_bytes(damaged)
    restored.clear()
    try:
      assert_same(read(place), a_tree())
    except (checkpoints.DamagedError, checkpoints.MissingError) as e:
      noticed.add(name.split('/')[0])
      assert '\n' not in str(e) and str(place) in str(e)
      assert not restored  # It never reaches orbax.
    path.write_bytes(whole)
  assert {'arrays', 'record.json'} <= noticed
  assert_same(read(place), a_tree())


LEAF = {'path': 'a', 'shape': [3], 'dtype': 'int8', 'checksum': ''}


@pytest.mark.parametrize(
    'change',
    [
        *({'files': {name: [1, 'x']}} for name in ('../../stolen', '/stolen')),
        *({'files': files} for files in ({'d': [1]}, {'d': ['1', 'x']}, None)),
        {'facts': [1]},
        *({'leaves': [LEAF | {'shape': x}]} for x in ([-1], [1.5], 3)),
        *({'leaves': [LEAF | {'dtype': x}]} for x in ('int9', 'f4')),
        *({'leaves': [LEAF | x]} for x in ({'path': 1}, {'more': 1})),
    ],
)
def test_a_record_that_says_what_cannot_be_is_damaged(copy, change):
  """By a faulty writer: its checksum is right."""
  path = copy / str(STEP) / 'record.json'
  content = json.loads(path.read_bytes())['content'] | change
  text = json.dumps(content, sort_keys=True)
  checksum = hashlib.sha256(text.encode()).hexdigest()
  files.write_json(path, {'content': content, 'checksum': checksum})
  with pytest.raises(checkpoints.DamagedError, match='record was altered'):
    checkpoints.load_record(copy, STEP)


def test_a_record_that_is_none_or_altered_is_damaged(copy):
  path = copy / str(STEP) / 'record.json'
  altered = path.read_bytes().replace(b'"note"', b'"nope"')
  for data in (altered, b'[' * 100_000, b'{}', b'3', b'\xff', b''):
    path.write_bytes(data)
    with pytest.raises(checkpoints.DamagedError, match='record was altered'):
      checkpoints.load_record(copy, STEP)


@pytest.mark.parametrize(
    'tree',
    [
        {'a': np.ones(3, np.float32), 'b': np.zeros(3, np.float32)},
        {'a': np.zeros(3, np.float32), 'b': np.ones(4, np.float32)},
        {'a': np.zeros(3, np.float32), 'b': np.ones(2, np.float32)},
        {'a': np.zeros(3, np.float32), 'b': np.ones((3, 1), np.float32)},
        {'a': np.zeros(3, np.float32), 'c': np.ones(3, np.float32)},
        {'a': np.zeros(3, np.float32)},
    ],
    ids=['swapped', 'longer', 'shorter', 'reshaped', 'name', 'fewer'],
)
def test_a_writer_that_mixed_up_its_leaves_is_noticed(tmp_path, tree):
  """Every file is as it was written: the checksums of leaves are needed."""
  claimed = {'a': np.zeros(3, np.float32), 'b': np.ones(3, np.float32)}
  record = checkpoints.save(tmp_path, STEP, tree, {})
  other = checkpoints.save(tmp_path, STEP + 1, claimed, {})
  mixed = dataclasses.replace(record, leaves=other.leaves)
  path = tmp_path / str(STEP) / 'record.json'
  path.write_bytes(checkpoints.encode(mixed))
  with pytest.raises(checkpoints.DamagedError):
    read(tmp_path, like=claimed)


# --- Which steps there are ---------------------------------------------------


def test_only_completed_steps_are_listed(copy):
  (copy / '9').mkdir()
  (copy / '8.orbax-checkpoint-tmp').mkdir()
  (copy / 'restart_step.json').write_text('{}')
  for name in ('\u00b2', '007', '-4', '5.damaged', '12', '3'):
    shutil.copytree(copy / str(STEP), copy / name)
  assert checkpoints.completed_steps(copy) == [3, STEP, 12]
  assert checkpoints.completed_steps(copy / 'nowhere') == []


def test_what_a_killed_writer_left_is_replaced_or_deleted(place):
  for step in (STEP, 9, 12):
    checkpoints.save(place, step, a_tree(1.0), {})
  for step in (STEP, 9):
    (place / str(step) / MARK).unlink()
  (place / 'restart_step.json').write_text('{}')
  assert checkpoints.completed_steps(place) == [12]
  with pytest.raises(checkpoints.MissingError):
    read(place)
  checkpoints.save(place, STEP, a_tree(), {})
  assert_same(read(place), a_tree())
  checkpoints.delete_torn(place)
  left = {name.split('/')[0] for name in files_of(place)}
  assert left == {str(STEP), '12', 'restart_step.json'}
  assert_same(read(place, 12), a_tree(1.0))
  checkpoints.delete_torn(place / 'nowhere')


def test_a_missing_step_is_missing_not_damaged(saved, copy):
  with pytest.raises(checkpoints.MissingError, match='is not there'):
    checkpoints.load_record(saved, STEP + 1)
  record = checkpoints.load_record(copy, STEP)
  checkpoints.delete(copy, [STEP, 99])  # Between the record and the arrays.
  assert checkpoints.completed_steps(copy) == []
  with pytest.raises(checkpoints.MissingError):
    checkpoints.load_tree(copy, STEP, record, a_tree())


def test_the_mark_goes_away_first(place, monkeypatch):
  checkpoints.save(place, STEP, a_tree(), {})
  seen, remove_tree = [], files.remove_tree

  def noted(path):
    seen.append((checkpoints.completed_steps(place), len(files_of(place))))
    remove_tree(path)

  monkeypatch.setattr(files, 'remove_tree', noted)
  before = len(files_of(place))
  checkpoints.delete(place, [STEP])
  assert seen[0] == ([], before - 1) and not files_of(place)


def test_the_mark_is_written_last(place, monkeypatch):
  states, write_bytes = [], files.write_bytes

  def noted(path, data, **how):
    before = {x: p.read_bytes() for x, p in files_of(path.parent).items()}
    write_bytes(path, data, **how)
    states.append((path.name, before))

  monkeypatch.setattr(files, 'write_bytes', noted)
  checkpoints.save(place, STEP, a_tree(), {})
  assert [name for name, _ in states] == ['record.json', MARK]
  after = {x: p.read_bytes() for x, p in files_of(place / str(STEP)).items()}
  assert MARK not in states[1][1]
  del after[MARK]
  assert states[1][1] == after


def test_all_is_on_the_disk_before_the_mark(tmp_path, monkeypatch):
  synced, to_disk = [], files.to_disk

  def noted(path):
    if not (tmp_path / str(STEP) / MARK).exists():
      synced.append(os.path.relpath(path, tmp_path / str(STEP)))
    to_disk(path)

  monkeypatch.setattr(files, 'to_disk', noted)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  parts = set(files_of(tmp_path / str(STEP))) - {'record.json', MARK}
  parents = {os.path.dirname(part) for part in parts} | {'.'}
  assert parts | parents <= set(synced)
  assert any(part.startswith('.record.json') for part in synced)


def test_a_deletion_is_called_off_if_the_step_turns_out_to_be_needed(place):
  """The reader says that it needs the step, then looks for the mark."""
  checkpoints.save(place, STEP, a_tree(), {})
  made, asked = checkpoints.completed_at(place, STEP), []

  def needed():
    asked.append(checkpoints.completed_steps(place))
    return True

  checkpoints.delete_unless(place, STEP, needed)
  assert asked == [[]]  # Without its mark when it is asked.
  assert_same(read(place), a_tree())
  assert checkpoints.completed_at(place, STEP) == made  # It is the same one.
  for _ in range(2):  # The second time it is gone already.
    checkpoints.delete_unless(place, STEP, lambda: False)
    assert not files_of(place)


def test_when_it_was_completed(place):
  assert checkpoints.completed_at(place, STEP) is None
  before = time.time()
  checkpoints.save(place, STEP, a_tree(), {})
  made = checkpoints.completed_at(place, STEP)
  assert before <= made <= time.time()
  time.sleep(0.01)
  checkpoints.save(place, STEP, a_tree(), {})
  assert checkpoints.completed_at(place, STEP) > made  # Another one.
  for text in (b'', b'nonsense', b'nan', b'\xc2\xb2'):
    (place / str(STEP) / MARK).write_bytes(text)
    assert checkpoints.completed_at(place, STEP) == 0.0


# --- A file system that fails ------------------------------------------------


@pytest.fixture
def refuse(monkeypatch):
  """Reading a file fails so many times, with some errno; lists the tries."""

  def act(name, word, code, times):
    tries, original = [], getattr(files, name)

    def refused(path, *args):
      if word in str(path):
        tries.append(path)
        if len(tries) <= times:
          raise OSError(code, os.strerror(code))
      return original(path, *args)

    monkeypatch.setattr(files, name, refused)
    return tries

  return act


PASSING = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOSPC]
PASSING += [errno.ETIMEDOUT, errno.EPERM, errno.EBUSY, errno.ENOTCONN]
READS = [('digest', '/arrays/'), ('read_bytes', '/record.json')]


@pytest.mark.parametrize('code', [errno.EIO, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize('name, word', READS)
def test_an_error_that_passes_is_survived(copy, refuse, name, word, code):
  tries = refuse(name, word, code, 1)
  assert_same(read(copy), a_tree())
  assert len(tries) > 1


@pytest.mark.parametrize('code', PASSING)
@pytest.mark.parametrize('name, word', READS)
def test_a_file_system_that_refuses_is_not_a_damaged_step(
    copy, refuse, monkeypatch, name, word, code
):
  tries = refuse(name, word, code, 99)
  with pytest.raises(OSError, match='cannot be read') as e:
    read(copy)
  assert e.value.errno == code and len(tries) == 2
  assert '\n' not in str(e.value) and str(copy) in str(e.value)
  monkeypatch.undo()
  assert_same(read(copy), a_tree())


def test_a_mark_that_cannot_be_looked_at_is_no_reason_to_delete(
    copy, monkeypatch
):
  original = os.stat

  def stat(path, **kwargs):
    if str(path).endswith(MARK):
      raise PermissionError(errno.EACCES, 'Permission denied')
    return original(path, **kwargs)

  monkeypatch.setattr(os, 'stat', stat)
  for act in (checkpoints.delete_torn, checkpoints.completed_steps):
    with pytest.raises(PermissionError):
      act(copy)
  monkeypatch.undo()
  assert_same(read(copy), a_tree())


FULL_DISK = """
    import pathlib, resource, sys, time
    import numpy as np
    from codistill_jax.storage import checkpoints
    directory = pathlib.Path(sys.argv[1])
    rng = np.random.default_rng(0)
    tree = {f'{i}': rng.normal(size=40_000) for i in range(4)}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in (0, 30, 100, 300, 1_000, 3_000, 100_000, 400_000):
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
      try:
        checkpoints.save(directory, 1, tree, {})
        error = None
      except Exception as e:
        error = e
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
      assert isinstance(error, OSError), (limit, error)
      assert 'File too large' in str(error), (limit, error)
      assert str(directory / '1') in str(error), (limit, error)
      assert len(str(error).splitlines()) == 1, (limit, error)
      assert checkpoints.completed_steps(directory) == []
    checkpoints.save(directory, 1, tree, {})
    record = checkpoints.load_record(directory, 1)
    found = checkpoints.load_tree(directory, 1, record, tree)
    assert all((found[k] == tree[k]).all() for k in tree)
    time.sleep(0.2)
"""


def test_a_disk_that_is_full_is_one_clear_error_and_no_step(tmp_path, python):
  """A limit on the size of files stands for the disk; it needs no rights."""
  done = subprocess.run(
      [python, '-c', textwrap.dedent(FULL_DISK), str(tmp_path)],
      capture_output=True,
      text=True,
      timeout=600,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  # Orbax prints tracebacks of what it also raises.
  assert 'Traceback' not in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize('written', ['directory', 'manifest'])
def test_an_attempt_that_failed_does_not_come_in_the_way(
    tmp_path, monkeypatch, written
):
  """Its last thread writes again what was deleted."""
  save, late = ocp.Checkpointer.save, []

  def save_after_it(self, path, *args, **kwargs):
    if len(late) < 3:
      late.append(path)
      if written == 'manifest':  # A race in TensorStore: here only its words.
        raise ValueError('NOT_FOUND: Error opening "zarr" driver')
      path.mkdir(parents=True)
    return save(self, path, *args, **kwargs)

  monkeypatch.setattr(ocp.Checkpointer, 'save', save_after_it)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  assert len(late) == 3
  assert_same(read(tmp_path), a_tree())


def test_a_directory_that_is_a_file_is_one_clear_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot be written') as e:
    checkpoints.save(tmp_path / 'file', STEP, a_tree(), {})
  assert '\n' not in str(e.value)


def test_a_mistake_of_the_caller_is_not_blamed_on_the_disk(tmp_path):
  with pytest.raises(TypeError):
    checkpoints.save(tmp_path, STEP, a_tree(), {'fact': object()})
  assert checkpoints.completed_steps(tmp_path) == []


class CloudError(Exception):
  """As TensorFlow and the clients of clouds have their own."""


class NotFoundError(CloudError):
  """So called by TensorFlow."""


@pytest.fixture
def cloud(bucket, monkeypatch):
  """Opening an object raises; by a word in its path."""
  refusals, original = {}, type(bucket)._open

  def open_(self, path, mode='rb', **kwargs):
    for word, error in refusals.items():
      if word in path:
        raise error
    return original(self, path, mode, **kwargs)

  monkeypatch.setattr(type(bucket), '_open', open_)
  checkpoints.save('s3://bucket', STEP, a_tree(), {})
  return refusals


@pytest.mark.parametrize('error', [CloudError('no\nroute'), TimeoutError()])
def test_a_cloud_that_refuses_is_an_os_error(cloud, error):
  cloud['/d/'] = error
  with pytest.raises(OSError, match='cannot be read') as e:
    read('s3://bucket')
  assert '\n' not in str(e.value) and e.value.errno in (
      errno.EIO,
      errno.ETIMEDOUT,
  )
  with pytest.raises(OSError, match='cannot be written') as e:
    checkpoints.save('s3://bucket', 9, a_tree(), {})
  assert '\n' not in str(e.value)
  cloud.clear()
  assert checkpoints.completed_steps('s3://bucket') == [STEP]
  assert_same(read('s3://bucket'), a_tree())


def test_what_a_cloud_calls_missing_is_damage_while_the_step_stands(cloud):
  cloud['/d/'] = NotFoundError('gone')
  with pytest.raises(checkpoints.DamagedError, match='gone'):
    read('s3://bucket')


@pytest.mark.parametrize(
    'error',
    [NotFoundError('a'), FileNotFoundError('a'), CloudError('no route')],
)
def test_a_cloud_that_does_not_tell_is_not_empty(bucket, monkeypatch, error):
  def ls(*_, **__):
    raise error

  monkeypatch.setattr(type(bucket), 'ls', ls)
  if type(error) is CloudError:
    with pytest.raises(OSError, match='no route'):
      checkpoints.completed_steps('s3://bucket')
  else:  # A directory that is missing is.
    assert checkpoints.completed_steps('s3://bucket') == []


# --- At the same time --------------------------------------------------------


def test_readers_beside_a_pruning_writer_read_whole_steps_or_miss(tmp_path):
  stop = threading.Event()
  counts = {'read': 0, 'missing': 0}

  def tree_of(step):
    return {'a': np.full((64, 64), step, np.float32), 'b': np.array(step)}

  def write():
    # However slow the reader is, it gets to read some.
    step = 0
    while step < 12 or not (counts['read'] or stop.is_set()):
      step += 1
      checkpoints.save(tmp_path, step, tree_of(step), {'step': step})
      checkpoints.delete(tmp_path, checkpoints.completed_steps(tmp_path)[:-1])
    stop.set()

  def follow():
    deadline = time.monotonic() + PATIENCE
    while not stop.is_set() and time.monotonic() < deadline:
      step = max(checkpoints.completed_steps(tmp_path), default=None)
      if step is None:
        continue
      try:
        assert_same(read(tmp_path, step, tree_of(step)), tree_of(step))
        counts['read'] += 1
      except checkpoints.MissingError:
        counts['missing'] += 1

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    try:
      for future in [pool.submit(follow), pool.submit(write)]:
        future.result(2 * PATIENCE)
    finally:
      stop.set()
  assert counts['read'] > 0


def test_two_saves_at_once_are_both_whole(tmp_path):
  """A publication and a resume checkpoint, of different structure."""
  trees = {'few': {'x': np.ones(3, np.float32)}, 'many': a_tree()}

  def save(name):
    for step in range(8):
      checkpoints.save(tmp_path / name, step, trees[name], {})

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for future in [pool.submit(save, name) for name in trees]:
      future.result(PATIENCE)
  for step in range(8):
    for name, tree in trees.items():
      assert_same(read(tmp_path / name, step, tree), tree)
