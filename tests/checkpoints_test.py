"""Storage: what is read back is what was written, or an error."""

import concurrent.futures
import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
import textwrap
import threading
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from waits import PATIENCE

from codistill_jax.storage import checkpoints, files

STEP = 7
MARK = 'commit_success.txt'


def a_tree():
  rng = np.random.default_rng(0)
  return {
      'params': {
          'kernel': rng.normal(size=(16, 8)).astype(np.float32),
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


def files_of(directory):
  return sorted(p for p in pathlib.Path(directory).rglob('*') if p.is_file())


def test_every_kind_of_array_comes_back_with_the_same_bits(saved):
  assert_same(read(saved), a_tree())


def test_a_record_says_what_there_is(saved):
  record = checkpoints.load_record(saved, STEP)
  assert record.facts == {'note': [1, None, 'x']}
  without = [(leaf.path, leaf.shape, leaf.dtype) for leaf in record.leaves]
  described = checkpoints.describe(a_tree())
  assert without == [(d.path, d.shape, d.dtype) for d in described]
  kernel = next(x for x in described if x.path == 'params/kernel')
  assert str(kernel) == 'params/kernel float32[16, 8]'
  assert kernel.num_bytes == 16 * 8 * 4


def test_an_array_of_many_chunks_comes_back(tmp_path):
  tree = {'x': np.arange(3_000_000, dtype=np.float32).reshape(3, -1)}
  checkpoints.save(tmp_path, 1, tree, {})
  assert_same(read(tmp_path, 1, tree), tree)


def test_layout_of_memory_does_not_matter(tmp_path):
  x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
  checkpoints.save(tmp_path, 1, {'x': x.T}, {})
  assert_same(read(tmp_path, 1, {'x': x.T}), {'x': np.ascontiguousarray(x.T)})


def test_nan_and_negative_zero_keep_their_bits(tmp_path):
  bits = np.array([0x7FC00001, 0x80000000, 0xFF800000], np.uint32)
  tree = {'x': bits.view(np.float32)}
  checkpoints.save(tmp_path, 1, tree, {})
  assert_same(read(tmp_path, 1, tree), tree)


def damage(path, how, rng):
  data = bytearray(path.read_bytes())
  if how == 'deleted':
    path.unlink()
    return
  if how == 'emptied':
    data = b''
  elif how == 'truncated':
    data = data[: len(data) // 2]
  elif data:
    start = int(rng.integers(max(len(data) - 8, 1)))
    for i in range(start, min(start + 8, len(data))):
      data[i] ^= 0xFF
  path.write_bytes(bytes(data))


@pytest.mark.parametrize('how', ['flipped', 'truncated', 'emptied', 'deleted'])
def test_damage_is_never_read_as_data(saved, tmp_path, how):
  """Each file in turn: an error of ours, or the very same arrays."""
  rng = np.random.default_rng(1)
  noticed = []
  for i, original in enumerate(files_of(saved)):
    for trial in range(2 if how == 'flipped' else 1):
      directory = tmp_path / f'{i}_{trial}'
      shutil.copytree(saved, directory)
      damage(directory / original.relative_to(saved), how, rng)
      try:
        found = read(directory)
      except (checkpoints.DamagedError, checkpoints.MissingError) as e:
        noticed.append(original.relative_to(saved).as_posix())
        assert '\n' not in str(e) and str(directory) in str(e)
      else:
        assert_same(found, a_tree())
  # Not vacuous: the arrays, at least, were hit.
  assert any('/arrays/' in name for name in noticed)
  assert any('record.json' in name for name in noticed)


def rewrite(path, old, new):
  data = path.read_bytes()
  assert old in data
  path.write_bytes(data.replace(old, new))


def test_an_altered_record_is_noticed(copy):
  path = copy / str(STEP) / 'record.json'
  rewrite(path, b'"note"', b'"nope"')
  with pytest.raises(checkpoints.DamagedError, match='record was altered'):
    checkpoints.load_record(copy, STEP)


@pytest.mark.parametrize(
    'change',
    [
        {'files': {'../../stolen': [1, 'x']}},
        {'files': {'/stolen': [1, 'x']}},
        {'files': {'d': [1]}},
        {'files': {'d': ['1', 'x']}},
        {'files': None},
        {'facts': [1]},
        {'leaves': [{'path': 'a', 'shape': [-1], 'dtype': 'int8'}]},
        {'leaves': [{'path': 'a', 'shape': [1.5], 'dtype': 'int8'}]},
        {'leaves': [{'path': 'a', 'shape': 3, 'dtype': 'int8'}]},
        {'leaves': [{'path': 'a', 'shape': [3], 'dtype': 'int9'}]},
        {'leaves': [{'path': 'a', 'shape': [3], 'dtype': 'f4'}]},
        {'leaves': [{'path': 1, 'shape': [3], 'dtype': 'int8'}]},
        {'leaves': [{'path': 'a', 'shape': [3], 'dtype': 'int8', 'more': 1}]},
    ],
)
def test_a_record_that_says_what_cannot_be_is_damaged(copy, change):
  """By a faulty writer: its checksum is right."""
  record = checkpoints.load_record(copy, STEP)
  content = {**dataclasses.asdict(record), **change}

  class Faulty:
    pass

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints.dataclasses, 'asdict', lambda _: content)
    data = checkpoints.encode(Faulty())
  (copy / str(STEP) / 'record.json').write_bytes(data)
  with pytest.raises(checkpoints.DamagedError, match='record was altered'):
    checkpoints.load_record(copy, STEP)


@pytest.mark.parametrize('data', [b'[' * 100_000, b'{}', b'3', b'\xff', b''])
def test_a_record_that_is_none_is_damaged(copy, data):
  (copy / str(STEP) / 'record.json').write_bytes(data)
  with pytest.raises(checkpoints.DamagedError, match='record was altered'):
    checkpoints.load_record(copy, STEP)


def test_arrays_of_another_checkpoint_are_noticed(copy):
  """As if two writers had finished one step together."""
  tree = a_tree()
  tree['params']['kernel'] = tree['params']['kernel'] + 1
  checkpoints.save(copy, STEP + 1, tree, {})
  shutil.rmtree(copy / str(STEP) / 'arrays')
  shutil.copytree(copy / str(STEP + 1) / 'arrays', copy / str(STEP) / 'arrays')
  with pytest.raises(checkpoints.DamagedError, match=r'arrays/.* '):
    read(copy)


def faulty_save(directory, tree, claimed):
  """Saves a tree with the leaves of another in the record."""
  record = checkpoints.save(directory, STEP, tree, {})
  other = checkpoints.save(directory, STEP + 1, claimed, {})
  mixed = dataclasses.replace(record, leaves=other.leaves)
  path = directory / str(STEP) / 'record.json'
  path.write_bytes(checkpoints.encode(mixed))


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
  faulty_save(tmp_path, tree, claimed)
  with pytest.raises(checkpoints.DamagedError):
    read(tmp_path, like=claimed)


def test_damaged_arrays_never_reach_orbax(copy, monkeypatch):
  for path in (copy / str(STEP) / 'arrays').rglob('d/*'):
    damage(path, 'flipped', np.random.default_rng(0))
  monkeypatch.setattr(
      checkpoints, '_restore', lambda *_: pytest.fail('reached')
  )
  with pytest.raises(checkpoints.DamagedError, match='was altered'):
    read(copy)


def test_orbax_alone_reads_the_arrays(saved):
  path = saved / str(STEP) / 'arrays'
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(path, a_tree())
  assert_same(found, a_tree())


def test_only_completed_steps_are_listed(copy):
  (copy / '9').mkdir()
  (copy / '8.orbax-checkpoint-tmp').mkdir()
  (copy / 'restart_step.json').write_text('{}')
  for name in ('\u00b2', '007', '-4', '5.damaged'):
    shutil.copytree(copy / str(STEP), copy / name)
  checkpoints.save(copy, 12, a_tree(), {})
  checkpoints.save(copy, 3, a_tree(), {})
  assert checkpoints.completed_steps(copy) == [3, STEP, 12]
  assert checkpoints.completed_steps(copy / 'nowhere') == []


def test_what_a_killed_writer_left_is_deleted_and_nothing_else(copy):
  shutil.copytree(copy / str(STEP), copy / '9')
  (copy / '9' / 'commit_success.txt').unlink()
  (copy / '8.orbax-checkpoint-tmp' / 'arrays').mkdir(parents=True)
  (copy / 'restart_step.json').write_text('{}')
  checkpoints.delete_torn(copy)
  assert sorted(p.name for p in copy.iterdir()) == [
      str(STEP),
      'restart_step.json',
  ]
  assert_same(read(copy), a_tree())
  checkpoints.delete_torn(copy / 'nowhere')


def test_a_torn_step_is_replaced(copy):
  (copy / str(STEP) / 'commit_success.txt').unlink()
  tree = {'x': np.ones(3, np.float32)}
  checkpoints.save(copy, STEP, tree, {})
  assert_same(read(copy, like=tree), tree)


def test_a_missing_step_is_missing_not_damaged(saved, copy):
  with pytest.raises(checkpoints.MissingError, match='is not there'):
    checkpoints.load_record(saved, STEP + 1)
  record = checkpoints.load_record(copy, STEP)
  checkpoints.delete(copy, [STEP, 99])  # Between the record and the arrays.
  assert checkpoints.completed_steps(copy) == []
  with pytest.raises(checkpoints.MissingError):
    checkpoints.load_tree(copy, STEP, record, a_tree())


def test_a_delete_hides_the_step_before_it_takes_anything_away(
    copy, monkeypatch
):
  seen = []
  original = files.remove_tree

  def remove_tree(path):
    seen.append(checkpoints.completed_steps(copy))
    original(path)

  monkeypatch.setattr(files, 'remove_tree', remove_tree)
  checkpoints.delete(copy, [STEP])
  assert seen == [[]] and not (copy / str(STEP)).exists()


def test_the_mark_is_written_last(tmp_path, monkeypatch):
  states = []
  original = files.write_bytes

  def write_bytes(path, data):
    before = {p: p.read_bytes() for p in files_of(path.parent)}
    original(path, data)
    after = {p: p.read_bytes() for p in files_of(path.parent)}
    states.append((before, after))

  monkeypatch.setattr(files, 'write_bytes', write_bytes)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  _, (before, after) = states  # The record, the mark.
  mark = tmp_path / str(STEP) / MARK
  assert mark not in before
  assert {p: x for p, x in after.items() if p != mark} == before
  assert {p: p.read_bytes() for p in files_of(tmp_path)} == after


def test_no_directory_is_renamed(tmp_path, monkeypatch):
  for name in ('rename', 'replace', 'renames'):
    original = getattr(os, name)

    def rename(source, target, original=original):
      assert not os.path.isdir(source)
      original(source, target)

    monkeypatch.setattr(os, name, rename)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  assert_same(read(tmp_path), a_tree())


def test_a_deletion_is_called_off_if_the_step_turns_out_to_be_needed(copy):
  """The reader says that it needs the step, then looks for the mark."""
  asked = []

  def needed():
    asked.append(checkpoints.completed_steps(copy))
    return True

  made = checkpoints.completed_at(copy, STEP)
  checkpoints.delete_unless(copy, STEP, needed)
  assert asked == [[]]  # Without its mark when it is asked.
  assert_same(read(copy), a_tree())
  assert checkpoints.completed_at(copy, STEP) == made  # It is the same one.
  checkpoints.delete_unless(copy, STEP, lambda: False)
  assert not (copy / str(STEP)).exists()
  checkpoints.delete_unless(copy, STEP, lambda: False)  # Gone already.


def test_when_it_was_completed(tmp_path):
  assert checkpoints.completed_at(tmp_path, STEP) is None
  before = time.time()
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  made = checkpoints.completed_at(tmp_path, STEP)
  # Of the file system's clock, which may be some milliseconds behind.
  assert before - 0.1 <= made <= time.time() + 0.1
  time.sleep(0.05)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  assert checkpoints.completed_at(tmp_path, STEP) > made  # Another one.
  for text in ('', 'nonsense', 'nan', '\u00b2'):
    (tmp_path / str(STEP) / MARK).write_text(text)
    assert checkpoints.completed_at(tmp_path, STEP) == 0.0


def test_a_damaged_one_is_set_aside_where_nobody_reads_it(copy):
  checkpoints.set_aside(copy, STEP)
  assert checkpoints.completed_steps(copy) == []
  assert (copy / f'{STEP}.damaged' / 'record.json').exists()
  checkpoints.delete_torn(copy)
  assert (copy / f'{STEP}.damaged').exists()
  checkpoints.save(copy, STEP, a_tree(), {})
  checkpoints.set_aside(copy, STEP)  # Once more: the older one gives way.
  assert checkpoints.completed_steps(copy) == []


# --- A file system that fails ------------------------------------------------


class Failing:
  """Opening a file fails some times, with some errno."""

  def __init__(self, monkeypatch, code, times, only=''):
    self.left, self.calls = times, 0
    kind = type(files.epath.Path('/'))
    original = kind.open

    def open_(path, mode='r', **kwargs):
      if only in str(path):
        self.calls += 1
        if self.left:
          self.left -= 1
          raise OSError(code, os.strerror(code))
      return original(path, mode, **kwargs)

    monkeypatch.setattr(kind, 'open', open_)


PASSING = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOSPC]
PASSING += [errno.ETIMEDOUT, errno.EPERM, errno.EBUSY, errno.ENOTCONN]


@pytest.mark.parametrize('code', [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_an_error_that_passes_is_survived(copy, monkeypatch, code):
  record = checkpoints.load_record(copy, STEP)
  Failing(monkeypatch, code, 1, 'arrays')
  assert_same(checkpoints.load_tree(copy, STEP, record, a_tree()), a_tree())


@pytest.mark.parametrize('code', PASSING)
@pytest.mark.parametrize('where', ['arrays', 'record'])
def test_a_file_system_that_refuses_is_not_a_damaged_step(
    copy, monkeypatch, code, where
):
  failing = Failing(monkeypatch, code, -1, where)
  with pytest.raises(OSError, match='cannot be read') as e:
    read(copy)
  assert e.value.errno == code and failing.calls == 2
  assert '\n' not in str(e.value) and str(copy) in str(e.value)
  monkeypatch.undo()
  assert_same(read(copy), a_tree())


@pytest.mark.parametrize(
    'text, kind',
    [
        ("DATA_LOSS: x [os_error_code='5']", OSError),
        ("NOT_FOUND: x [os_error_code='2']", checkpoints.DamagedError),
        ('PERMISSION_DENIED: x', OSError),
        ('FAILED_PRECONDITION: x', checkpoints.DamagedError),
    ],
)
def test_what_tensorstore_says_is_understood(copy, monkeypatch, text, kind):
  def restore(*_, **__):
    raise ValueError(text)

  monkeypatch.setattr(checkpoints, '_restore', restore)
  with pytest.raises(kind, match='cannot be read'):
    read(copy)


def test_a_mark_that_cannot_be_looked_at_is_no_reason_to_delete(
    copy, monkeypatch
):
  original = os.stat

  def stat(path, **kwargs):
    if str(path).endswith(MARK):
      raise PermissionError(errno.EACCES, 'Permission denied')
    return original(path, **kwargs)

  monkeypatch.setattr(os, 'stat', stat)
  with pytest.raises(PermissionError):
    checkpoints.delete_torn(copy)
  with pytest.raises(PermissionError):
    checkpoints.completed_steps(copy)
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


def test_an_attempt_that_failed_does_not_come_in_the_way(tmp_path, monkeypatch):
  """Its last thread makes the directory again that was deleted."""
  save, late = checkpoints._save, []

  def save_after_it(path, tree):
    if len(late) < 3:
      late.append(path)
      path.mkdir(parents=True)
    save(path, tree)

  monkeypatch.setattr(checkpoints, '_save', save_after_it)
  monkeypatch.setattr(checkpoints, '_PAUSE_SECONDS', 0.0)
  checkpoints.save(tmp_path, STEP, a_tree(), {})
  assert len(late) == 3
  monkeypatch.undo()
  assert_same(read(tmp_path), a_tree())


def test_the_file_system_is_asked_why_orbax_could_not_write(
    tmp_path, monkeypatch
):
  """Of several writes that fail, orbax may report one that missed another."""

  def fail():
    raise ValueError('NOT_FOUND: Error reading "a/.zarray"')

  full = OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(checkpoints, '_checkpointer', fail)
  with pytest.raises(OSError, match='NOT_FOUND'):
    checkpoints.save(tmp_path, STEP, a_tree(), {})
  monkeypatch.setattr(checkpoints, '_why_not_writable', lambda _: full)
  with pytest.raises(OSError, match='cannot be written: No space left') as e:
    checkpoints.save(tmp_path, STEP, a_tree(), {})
  assert e.value.errno == errno.ENOSPC
  assert checkpoints.completed_steps(tmp_path) == []


def test_a_directory_that_is_a_file_is_one_clear_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot be written') as e:
    checkpoints.save(tmp_path / 'file', STEP, a_tree(), {})
  assert '\n' not in str(e.value)


def test_a_mistake_of_the_caller_is_not_blamed_on_the_disk(tmp_path):
  with pytest.raises(TypeError):
    checkpoints.save(tmp_path, STEP, a_tree(), {'fact': object()})
  assert checkpoints.completed_steps(tmp_path) == []


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
  few = {'x': np.ones(3, np.float32)}

  def save(name, tree):
    for step in range(8):
      checkpoints.save(tmp_path / name, step, tree, {})

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for future in [
        pool.submit(save, 'few', few),
        pool.submit(save, 'many', a_tree()),
    ]:
      future.result(PATIENCE)
  for step in range(8):
    assert_same(read(tmp_path / 'few', step, few), few)
    assert_same(read(tmp_path / 'many', step), a_tree())
