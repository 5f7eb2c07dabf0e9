"""The exchange when a disk is full, slow, torn or hangs: nothing is lost."""

import errno
import json
import threading
import time
import types
import weakref

import checkpoint_exchange_test
import numpy as np
import pytest
from checkpoint_exchange_test import (
    IDENTITY,
    Disk,
    fetch_until,
    publish,
    steps_in_use,
    variables_of,
)
from waits import PATIENCE, until

from codistill_jax.base import ALONE, Agreement, cast_floats
from codistill_jax.exchange import (
    checkpoint_exchange,
    fetching,
    publications,
    publisher,
)
from codistill_jax.exchange.fetching import Waiting
from codistill_jax.exchange.memory_exchange import Mirror, memory_exchanges
from codistill_jax.exchange.protocol import Interrupted
from codistill_jax.storage import checkpoints, leases
from codistill_jax.storage.background import Troubles

join = checkpoint_exchange_test.join

WAIT = {'max_staleness_steps': 20, 'staleness_policy': 'wait'}
# Not `ALONE`: the way of a group of several processes.
OF_ONE = Agreement(True, lambda x: x, lambda x: x)


def refuse(*args, **kwargs):
  raise OSError(errno.EIO, 'bad sector')


def restarts_at(root, group_id, step):
  """As a reader says that it has a resume checkpoint."""
  directory = root / f'group_{group_id}'
  directory.mkdir(exist_ok=True)
  (directory / publisher.RESTART_FILE).write_text(json.dumps({'step': step}))


def marks(root, name, text):
  """As a process of group 1 says what it reads."""
  directory = root / 'group_1'
  directory.mkdir(exist_ok=True)
  (directory / name).write_text(text)


def reads(step):
  return json.dumps({'nonce': 'a', 'steps': {'0': step}})


def publish_one_by_one(exchange, *steps):
  for step in steps:
    assert exchange.publish_if_due(step, variables_of(step))
    assert exchange._publisher.flush(PATIENCE)


class Gate:
  """Holds calls of a function of `publications` up until it is opened."""

  def __init__(self, monkeypatch, name, held=lambda *args: True):
    self.entered = threading.Event()
    self._opened = threading.Event()
    self._held = held
    self._call = getattr(publications, name)
    monkeypatch.setattr(publications, name, self)

  def __call__(self, *args, **kwargs):
    if self._held(*args):
      self.entered.set()
      assert self._opened.wait(PATIENCE)
    return self._call(*args, **kwargs)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._opened.set()


class Living:
  """How many of some variables are in memory."""

  def __init__(self):
    self._seen = []

  def add(self, variables):
    self._seen.append(weakref.ref(variables.params['w']))

  @property
  def number(self):
    return sum(one() is not None for one in self._seen)


# --- Pruning -----------------------------------------------------------------


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
@pytest.mark.parametrize('broken', ['completed_steps', 'delete_unless'])
def test_an_error_while_pruning_does_not_end_training_and_is_said(
    join, tmp_path, monkeypatch, mode, broken
):
  troubles = Troubles()
  restarts_at(tmp_path, 1, 90)
  exchange = join(mode=mode, keep=1, troubles=troubles)
  with monkeypatch.context() as patch:
    pruning = types.SimpleNamespace(**vars(checkpoints) | {broken: refuse})
    patch.setattr(publisher, 'checkpoints', pruning)
    publish_one_by_one(exchange, 10, 20, 30)
    (trouble,) = troubles.now
    assert trouble.doing == 'deleting old publications'
    assert 'bad sector' in trouble.reason
  assert publications.published_steps(tmp_path, 0) == [10, 20, 30]
  publish_one_by_one(exchange, 40)
  assert publications.published_steps(tmp_path, 0) == [40]
  assert troubles.now == ()


def test_in_lockstep_pruning_frees_a_full_disk_between_tries(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch, refusals=0)

  def write(root, publication, variables):
    room = len(publications.published_steps(root, 0)) < 3
    disk.left = 0 if room else 1
    return disk(root, publication, variables)

  monkeypatch.setattr(publications, 'write', write)
  exchange = join(mode='lockstep', keep=1)
  for step in (10, 20, 30, 40):
    exchange.publish_if_due(step, variables_of(step))
  until(lambda: disk.tried.count(40) > 1)
  assert publications.published_steps(tmp_path, 0) == [10, 20, 30]
  restarts_at(tmp_path, 1, 40)  # The reader needs nothing before it any more.
  assert exchange._publisher.flush(PATIENCE)
  assert publications.published_steps(tmp_path, 0) == [40]


def test_a_torn_mark_of_one_process_does_not_drop_those_of_the_others(
    join, tmp_path
):
  marks(tmp_path, 'reading.json', '{"nonce"')
  marks(tmp_path, 'process_1_reading.json', reads(10))
  marks(tmp_path, 'process_2_reading.json', '[3]')
  marks(tmp_path, 'process_3_reading.json', reads(20))
  exchange = join(keep=1)
  publish_one_by_one(exchange, 10, 20, 30, 40)
  assert publications.published_steps(tmp_path, 0) == [10, 20, 40]


def test_a_mark_that_is_torn_counts_as_it_was_before(join, tmp_path):
  exchange = join(keep=1)
  for step, text in (
      (10, reads(10)),
      (20, reads(10)),
      (30, '{"nonce"'),
  ):
    marks(tmp_path, 'reading.json', text)
    publish_one_by_one(exchange, step)
  assert publications.published_steps(tmp_path, 0) == [10, 30]
  marks(tmp_path, 'reading.json', '{"nonce": "b", "steps": {}}')
  publish_one_by_one(exchange, 40)
  assert publications.published_steps(tmp_path, 0) == [40]


# --- Before a resume checkpoint ----------------------------------------------


def test_a_checkpoint_does_not_wait_for_publications_after_it(
    join, tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint_exchange, '_SETTLE_SECONDS', PATIENCE)
  exchange = join(mode='lockstep')
  after = lambda root, publication, variables: publication.step > 10
  with Gate(monkeypatch, 'write', after) as gate:
    for step in (10, 20, 30):  # One more is always on its way.
      exchange.publish_if_due(step, variables_of(step))
    exchange.settle(10)
    assert publications.published_steps(tmp_path, 0) == [10]
    assert gate.entered.wait(PATIENCE)
    exchange.settle(19)
    monkeypatch.setattr(checkpoint_exchange, '_SETTLE_SECONDS', 0.05)
    with pytest.raises(TimeoutError, match='up to step 20 are not complete'):
      exchange.settle(20)


def of_memory(root):
  mirror = Mirror(root, variables_of(0), IDENTITY)
  return memory_exchanges(2, every=1, mirror=mirror)[0]


def test_in_memory_a_checkpoint_writes_what_the_disk_has_refused(
    tmp_path, monkeypatch
):
  exchange = of_memory(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(publications, 'write', refuse)
    for step in (1, 2):
      exchange.publish_if_due(step, variables_of(step))
    with pytest.raises(OSError, match='2 publications of group 0'):
      exchange.settle(2)
  exchange.settle(2)  # Nobody publishes any more, as after a stop.
  assert publications.published_steps(tmp_path, 0) == [1, 2]


def test_in_memory_what_no_restart_needs_does_not_wait_for_the_disk(
    tmp_path, monkeypatch
):
  exchange = of_memory(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(publications, 'write', refuse)
    for step in range(1, 42):
      exchange.publish_if_due(step, variables_of(step))
    waiting = [publication.step for publication, _ in exchange._unwritten]
    # The next checkpoint needs its own; a restart makes the others again.
    assert waiting == [40, 41]
  exchange.settle(41)
  assert publications.published_steps(tmp_path, 0) == [40, 41]


# --- Closing -----------------------------------------------------------------


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_closing_waits_for_a_write_that_is_only_slow(
    join, tmp_path, monkeypatch, mode
):
  monkeypatch.setattr(publisher, '_CLOSE_SECONDS', 0.05)
  exchange = join(mode=mode)
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    opens = threading.Timer(0.4, gate.__exit__)
    opens.start()
    exchange.close()
    opens.join()
  assert publications.published_steps(tmp_path, 0) == [10]
  assert leases.peek(tmp_path / 'group_0') is None


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_the_lease_is_kept_while_a_write_hangs(
    join, tmp_path, monkeypatch, mode
):
  monkeypatch.setattr(publisher, '_CLOSE_SECONDS', 0.05)
  monkeypatch.setattr(publisher, '_SLOW_SECONDS', 0.05)
  exchange = join(mode=mode)
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    assert gate.entered.wait(PATIENCE)
    if mode == 'lockstep':
      with pytest.raises(TimeoutError, match='group 0 could not publish'):
        exchange.close()
    else:
      exchange.close()
    assert leases.peek(tmp_path / 'group_0') is not None
  until(lambda: exchange._publisher.finished)
  exchange.close()
  assert leases.peek(tmp_path / 'group_0') is None


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_closing_does_not_sleep_on_after_a_failure(
    join, tmp_path, monkeypatch, mode
):
  Disk(monkeypatch, refusals=1)
  monkeypatch.setattr(publisher, '_CLOSE_SECONDS', PATIENCE)
  monkeypatch.setattr(publisher, '_FIRST_RETRY_SECONDS', 10 * PATIENCE)
  exchange = join(mode=mode)
  exchange.publish_if_due(10, variables_of(1))
  until(lambda: exchange._publisher._failing)
  exchange.close()  # One that slept on would give up.
  assert publications.published_steps(tmp_path, 0) == [10]


def test_an_exchange_that_could_not_be_made_holds_no_lease(
    join, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'delete_torn', refuse)
    with pytest.raises(OSError, match='bad sector'):
      join()
  assert leases.peek(tmp_path / 'group_0') is None
  join()


# --- Copies on the host ------------------------------------------------------


def test_freshest_needs_the_memory_of_two_copies_however_often_it_publishes(
    join, tmp_path, monkeypatch
):
  """Of the one that is written, and of the newest; which are never the same."""
  copies = []  # Alive, so that no two of them have one address by chance.
  original = publisher.host_copy

  def host_copy(variables, into):
    copies.append(original(variables, into=into).params['w'])
    return variables.replace(params={'w': copies[-1]})

  monkeypatch.setattr(publisher, 'host_copy', host_copy)
  exchange = join()
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    assert gate.entered.wait(PATIENCE)
    for step in (20, 30, 40, 50):
      exchange.publish_if_due(step, variables_of(step))
    written, *waiting = copies
    assert all(x is waiting[0] for x in waiting)
    assert waiting[0] is not written
  exchange.flush()
  exchange.publish_if_due(60, variables_of(60))
  exchange.flush()
  assert copies[-1] is waiting[0]
  assert publications.published_steps(tmp_path, 0) == [10, 50, 60]
  for step, value in ((10, 1.0), (50, 50.0), (60, 60.0)):
    _, found = publications.read(tmp_path, 0, step, like=variables_of(0))
    np.testing.assert_array_equal(found.params['w'], value)


def test_the_host_holds_a_few_peers_at_a_time(join, tmp_path, monkeypatch):
  living, at_once = Living(), []
  original = publications.read

  def read(*args, **kwargs):
    publication, variables = original(*args, **kwargs)
    living.add(variables)
    at_once.append(living.number)
    return publication, variables

  num_groups = 2 * fetching._AT_ONCE + 2
  for peer in range(1, num_groups):
    publish(tmp_path, peer, 10, value=peer)
  monkeypatch.setattr(publications, 'read', read)
  exchange = join(num_groups=num_groups)
  teachers = fetch_until(exchange, 10, (10,) * (num_groups - 1))
  assert teachers.variables.params['w'][:, 0].tolist() == [
      float(peer) for peer in range(1, num_groups)
  ]
  assert len(at_once) == num_groups - 1
  assert max(at_once) == fetching._AT_ONCE


def test_a_cast_copies_only_where_the_dtype_differs():
  variables = variables_of(1)
  variables.model_state['n'] = np.int32([3])
  same = cast_floats(variables, 'float32')
  assert np.shares_memory(same.params['w'], variables.params['w'])
  other = cast_floats(variables, 'bfloat16')
  assert other.params['w'].dtype == 'bfloat16'
  assert np.shares_memory(other.model_state['n'], variables.model_state['n'])


# --- Reading -----------------------------------------------------------------


@pytest.mark.parametrize('agreement', [ALONE, OF_ONE])
def test_a_wait_ends_by_a_stop_and_by_its_limit_though_a_read_hangs(
    join, tmp_path, monkeypatch, agreement
):
  publish(tmp_path, 1, 100)
  with Gate(monkeypatch, 'read') as gate:
    for group_id, waiting, error in (
        (0, Waiting(600.0, gate.entered.is_set), Interrupted),
        (2, Waiting(0.1), TimeoutError),
    ):
      exchange = join(group_id, 3, waiting=waiting, agreement=agreement, **WAIT)
      # The gate is still closed when it ends.
      with pytest.raises(error, match='stale at step 100'):
        exchange.fetch(100)
    assert gate.entered.wait(PATIENCE)


def test_a_read_that_hangs_does_not_stop_publishing(
    join, tmp_path, monkeypatch
):
  publish(tmp_path, 1, 10)
  exchange = join()
  exchange._turns._seconds = 0.1
  with Gate(monkeypatch, 'read') as gate:
    exchange.fetch(10)
    assert gate.entered.wait(PATIENCE)
    publish_one_by_one(exchange, 10, 20)
    assert publications.published_steps(tmp_path, 0) == [10, 20]


@pytest.mark.parametrize('policy', ['wait', 'fail'])
def test_who_needs_a_teacher_now_ends_the_pause_between_two_looks(
    join, tmp_path, monkeypatch, policy
):
  monkeypatch.setattr(fetching, '_POLL_SECONDS', PATIENCE)
  monkeypatch.setattr(Waiting, 'go_on', lambda *args: time.sleep(0.01))
  looked = threading.Event()
  exchange = join(**WAIT | {'staleness_policy': policy})
  original = exchange._fetcher.read_newest

  def read_newest(*args):
    found = original(*args)
    looked.set()
    return found

  monkeypatch.setattr(exchange._fetcher, 'read_newest', read_newest)
  assert exchange.fetch(0) is None
  assert looked.wait(PATIENCE)
  time.sleep(0.1)  # It sleeps now.
  publish(tmp_path, 1, 10)
  start = time.monotonic()
  assert exchange.fetch(21) is not None
  assert time.monotonic() - start < PATIENCE / 2
  assert steps_in_use(exchange) == (10,)


def test_a_peer_that_is_found_does_not_postpone_another(join, tmp_path):
  exchange = join(num_groups=3, every=1000)
  publish(tmp_path, 1, 1000)
  fetch_until(exchange, 1000, (1000, None))
  publish(tmp_path, 2, 1000)  # A moment later.
  fetch_until(exchange, 1001, (1000, 1000))
  publish(tmp_path, 1, 2000)
  publish(tmp_path, 2, 2000)
  fetch_until(exchange, 2000, (2000, 2000))


@pytest.mark.parametrize('agreement', [ALONE, OF_ONE])
def test_a_restart_without_teachers_reads_nothing(
    join, tmp_path, monkeypatch, agreement
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 2, 10)
  exchange = join(num_groups=3, agreement=agreement)
  read = []
  with monkeypatch.context() as patch:
    patch.setattr(publications, 'read', lambda *args, **kwargs: read.append(1))
    exchange.restore(20, [None, None])
  assert not read and steps_in_use(exchange) == (None, None)
  exchange.restore(20, [10, None])
  assert steps_in_use(exchange) == (10, None)
