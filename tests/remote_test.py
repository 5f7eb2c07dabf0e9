"""Everything that groups exchange and resume from may live in a bucket."""

import errno
import os
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
import remote as buckets

from codistill_jax.base import TrainState, Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.checkpoint_exchange import (
    CheckpointExchange,
    Waiting,
)
from codistill_jax.exchange.protocol import Plan
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints, files, leases
from codistill_jax.storage.resume import ResumeCheckpoints

ROOT = 's3://bucket/run/exchange'
IDENTITY = {'task': 'toy'}
STEP = 7


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """A bucket; and nothing is left on the disk of this machine."""
  here, scratch = tmp_path / 'here', tmp_path / 'scratch'
  here.mkdir()
  scratch.mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setattr(tempfile, 'tempdir', str(scratch))
  monkeypatch.setattr(leases, '_REMOTE_SETTLE_SECONDS', 0.05)
  for name in ('rename', 'replace', 'renames'):
    monkeypatch.setattr(os, name, lambda *_: pytest.fail('renamed'))
  with buckets.bucket(monkeypatch) as made:
    yield made
  assert not list(tmp_path.rglob('*/*'))


def a_tree(value=1.0):
  rng = np.random.default_rng(0)
  return {
      'w': rng.normal(size=(300, 40)).astype(np.float32) + np.float32(value),
      'half': np.full(5, value, jnp.bfloat16),
      'count': np.array(3, np.int32),
      'nothing': {},
  }


def read(step=STEP, directory=ROOT):
  record = checkpoints.load_record(directory, step)
  return checkpoints.load_tree(directory, step, record, a_tree())


def assert_same(a, b):
  for (path, x), (_, y) in zip(
      checkpoints.flatten(a), checkpoints.flatten(b), strict=True
  ):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), path
    assert x.tobytes() == y.tobytes(), path


def names_of(bucket, step=STEP):
  start = f'/bucket/run/exchange/{step}/'
  return sorted(x.removeprefix(start) for x in bucket.store if start in x)


# --- Storage -----------------------------------------------------------------


def test_what_is_saved_is_what_is_read(bucket):
  assert checkpoints.completed_steps(ROOT) == []
  checkpoints.save(ROOT, STEP, a_tree(), {'note': 1})
  assert checkpoints.completed_steps(ROOT) == [STEP]
  assert checkpoints.load_record(ROOT, STEP).facts == {'note': 1}
  assert_same(read(), a_tree())
  assert checkpoints.completed_at(ROOT, STEP) > 0
  checkpoints.save(ROOT, STEP, a_tree(2.0), {})
  assert_same(read(), a_tree(2.0))


def test_large_files_go_in_pieces(bucket, monkeypatch):
  monkeypatch.setattr(files, '_CHUNK_BYTES', 1000)
  checkpoints.save(ROOT, STEP, a_tree(), {})
  assert_same(read(), a_tree())


def test_the_path_is_left_alone(bucket):
  assert os.fspath(checkpoints.absolute(ROOT)) == ROOT
  here = pathlib.Path.cwd()
  assert os.fspath(checkpoints.absolute('there')) == str(here / 'there')


def test_the_mark_goes_up_last_and_away_first(bucket, monkeypatch):
  written, deleted = [], []
  monkeypatch.setattr(
      bucket,
      'pipe_file',
      lambda path, data: (
          written.append(path),
          type(bucket).pipe_file(bucket, path, data),
      ),
  )
  monkeypatch.setattr(
      bucket,
      'rm_file',
      lambda path: (deleted.append(path), type(bucket).rm_file(bucket, path)),
  )
  checkpoints.save(ROOT, STEP, a_tree(), {})
  mark = f'/bucket/run/exchange/{STEP}/commit_success.txt'
  assert written[-1] == mark and written.count(mark) == 1
  assert written[-2].endswith('/record.json')
  checkpoints.delete(ROOT, [STEP])
  assert deleted[0] == mark and not bucket.store


def test_half_an_upload_is_no_checkpoint_and_is_replaced(bucket):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  del bucket.store[f'/bucket/run/exchange/{STEP}/commit_success.txt']
  assert checkpoints.completed_steps(ROOT) == []
  with pytest.raises(checkpoints.MissingError):
    read()
  checkpoints.save(ROOT, STEP, a_tree(2.0), {})
  assert_same(read(), a_tree(2.0))
  checkpoints.save(ROOT, 9, a_tree(), {})
  del bucket.store['/bucket/run/exchange/9/commit_success.txt']
  checkpoints.delete_torn(ROOT)
  assert names_of(bucket, 9) == []
  assert_same(read(), a_tree(2.0))


def test_damage_is_noticed_on_the_way_down(bucket, monkeypatch):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  before = {path: x.getvalue() for path, x in bucket.store.items()}
  monkeypatch.setattr(
      checkpoints, '_restore', lambda *_: pytest.fail('reached')
  )
  for name in names_of(bucket):
    if not name.startswith('arrays/'):
      continue
    path = f'/bucket/run/exchange/{STEP}/{name}'
    for spoiled in (b'', before[path][:-1], before[path] + b'x', None):
      if spoiled is None:
        del bucket.store[path]
      else:
        bucket.pipe_file(path, spoiled)
      with pytest.raises(checkpoints.DamagedError):
        read()
    bucket.pipe_file(path, before[path])


def test_a_damaged_one_is_set_aside_by_deleting_it(bucket):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  checkpoints.set_aside(ROOT, STEP)
  assert not bucket.store


def test_a_deletion_is_called_off(bucket):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  made = checkpoints.completed_at(ROOT, STEP)
  checkpoints.delete_unless(ROOT, STEP, lambda: True)
  assert_same(read(), a_tree())
  assert checkpoints.completed_at(ROOT, STEP) == made
  checkpoints.delete_unless(ROOT, STEP, lambda: False)
  assert not bucket.store


class CloudError(Exception):
  """As TensorFlow and the clients of clouds have their own."""


class NotFoundError(CloudError):
  """So called by TensorFlow."""


def fail_with(monkeypatch, bucket, error, only):
  original = type(bucket)._open

  def open_(self, path, mode='rb', **kwargs):
    if only in path:
      raise error
    return original(self, path, mode, **kwargs)

  monkeypatch.setattr(type(bucket), '_open', open_)


@pytest.mark.parametrize('error', [CloudError('no\nroute'), TimeoutError()])
def test_a_cloud_that_refuses_is_an_os_error(bucket, monkeypatch, error):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  with monkeypatch.context() as patch:
    fail_with(patch, bucket, error, '/d/')
    with pytest.raises(OSError, match='cannot be read') as e:
      read()
    assert '\n' not in str(e.value) and e.value.errno == errno.EIO
    with pytest.raises(OSError, match='cannot be written') as e:
      checkpoints.save(ROOT, 9, a_tree(), {})
    assert '\n' not in str(e.value)
  assert checkpoints.completed_steps(ROOT) == [STEP]
  assert names_of(bucket, 9) == []
  assert_same(read(), a_tree())


def test_what_a_cloud_calls_missing_is_damage_while_the_step_stands(
    bucket, monkeypatch
):
  checkpoints.save(ROOT, STEP, a_tree(), {})
  fail_with(monkeypatch, bucket, NotFoundError('gone'), '/d/')
  with pytest.raises(checkpoints.DamagedError, match='gone'):
    read()


@pytest.mark.parametrize('error', [NotFoundError, FileNotFoundError])
def test_a_directory_that_is_missing_is_empty(bucket, monkeypatch, error):
  def ls(*_, **__):
    raise error('no such directory')

  monkeypatch.setattr(type(bucket), 'ls', ls)
  assert checkpoints.completed_steps(ROOT) == []


def test_a_cloud_that_does_not_tell_is_not_empty(bucket, monkeypatch):
  def ls(*_, **__):
    raise CloudError('no route')

  monkeypatch.setattr(type(bucket), 'ls', ls)
  with pytest.raises(OSError, match='no route'):
    checkpoints.completed_steps(ROOT)


# --- The exchange ------------------------------------------------------------


def variables_of(value):
  return Variables(
      {'w': np.full((30, 20), value, np.float32)}, {'n': np.array(3, np.int32)}
  )


def join(group_id, **plan):
  return CheckpointExchange(
      ROOT,
      group_id,
      2,
      like=variables_of(0),
      plan=Plan(every=10, **plan),
      identity=IDENTITY,
      keep=2,
      waiting=Waiting(20.0),
  )


def value_of(teachers):
  return float(np.asarray(teachers.variables.params['w'])[0, 0, 0])


def test_two_groups_exchange_in_lockstep(bucket):
  groups = [join(g, mode='lockstep') for g in (0, 1)]
  try:
    for step in range(10, 60, 10):
      for g, exchange in enumerate(groups):
        exchange.publish_if_due(step, variables_of(100 * g + step))
      for g, exchange in enumerate(groups):
        assert value_of(exchange.fetch(step)) == 100 * (1 - g) + step
        exchange.checkpointed(step)
  finally:
    for exchange in groups:
      exchange.close()
  # Pruned, but for what is kept.
  for g in (0, 1):
    steps = publications.published_steps(ROOT, g)
    assert steps[-1] == 50 and 2 <= len(steps) < 5
  assert all(exchange.rejected == 0 for exchange in groups)


def test_a_restarted_group_takes_what_it_used(bucket):
  for step in (10, 20):
    publications.write(
        ROOT, Publication(1, step, 12.5, IDENTITY), variables_of(step)
    )
  exchange = join(0, mode='freshest')
  try:
    exchange.restore(20, [10])
    assert exchange.in_use[0].step == 10
    assert value_of(exchange.fetch(20)) in (10, 20)
  finally:
    exchange.close()


def test_a_damaged_publication_is_named_and_not_used(bucket):
  for step in (10, 20):
    publications.write(
        ROOT, Publication(1, step, 12.5, IDENTITY), variables_of(step)
    )
  start = '/bucket/run/exchange/group_1/20/arrays/'
  for path in [x for x in bucket.store if x.startswith(start)]:
    bucket.pipe_file(path, bucket.store[path].getvalue()[:-1])
  exchange = join(0, mode='freshest')
  try:
    exchange.restore(20, [20])
    assert exchange.in_use[0].step == 10
    assert exchange.rejected == 1 and 'group_1/20' in exchange.last_rejection
  finally:
    exchange.close()


# --- Resume ------------------------------------------------------------------


def state_of(step):
  return TrainState(
      step=np.array(step, np.int32),
      variables=variables_of(step),
      opt_state={'m': np.full(3, step, np.float32)},
      carry={},
      teacher_carry={},
      rng=np.array([1, 2], np.uint32),
  )


def test_a_group_resumes_from_a_bucket(bucket):
  directory = 's3://bucket/run/checkpoints'
  checkpoints = ResumeCheckpoints(directory, identity=IDENTITY, keep=2)
  for step in (10, 20, 30):
    checkpoints.save(state_of(step), [step - 1])
    checkpoints.wait()
  checkpoints.close()
  again = ResumeCheckpoints(directory, identity=IDENTITY)
  assert again.steps() == [20, 30]
  resume = again.restore(state_of(0))
  assert_same(resume.state, state_of(30))
  assert resume.teacher_steps == (29,)
  # A damaged one is passed over, and is then out of the way.
  start = '/bucket/run/checkpoints/30/arrays/'
  for path in [x for x in bucket.store if x.startswith(start)]:
    bucket.pipe_file(path, b'')
  again = ResumeCheckpoints(directory, identity=IDENTITY)
  assert_same(again.restore(state_of(0)).state, state_of(20))
  assert again.steps() == [20]
