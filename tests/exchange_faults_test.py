"""The exchange when a disk is full, slow, torn or hangs: nothing is lost."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import threading
import time
import weakref

import numpy as np
import pytest
from exchange_kit import (
    HASTY,
    IDENTITY,
    Disk,
    Gate,
    fetch_until,
    kept,
    publish,
    publish_all,
    restarts_at,
    shown,
    steps_in_use,
    variables_of,
)
from exchange_kit import join as join
from waits import PATIENCE, until

from codistill_jax.base import ALONE, Agreement
from codistill_jax.exchange import fetching, publications
from codistill_jax.exchange.plan import PeerError, Waiting
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.exchange.stores import Mirror
from codistill_jax.storage import checkpoints, leases
from codistill_jax.storage.background import Interrupted, Troubles

WAIT = {'max_staleness_steps': 20, 'staleness_policy': 'wait'}
# Not `ALONE`: the way of a group of several processes.
OF_ONE = Agreement(True, lambda x: x, lambda x: x)

both_modes = pytest.mark.parametrize('mode', ['freshest', 'lockstep'])


def hasty(**limits):
  return dataclasses.replace(HASTY, **limits)


def refuse(*args, **kwargs):
  raise OSError(errno.EIO, 'bad sector')


# --- Writing -----------------------------------------------------------------


@both_modes
def test_what_a_full_disk_refuses_is_tried_again_and_said_once(
    join, tmp_path, monkeypatch, caplog, mode
):
  disk = Disk(monkeypatch, refusals=3)
  exchange = join(mode=mode)
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert exchange.publish_if_due(10, variables_of(1))  # Training goes on.
    exchange.flush()
  assert disk.tried == [10] * 4
  assert kept(tmp_path) == [10]
  assert caplog.text.count('publishing fails') == 1
  assert caplog.text.count('publishing works again') == 1
  assert exchange.metrics(10)['exchange/publish_failures'] == 3


@both_modes
@pytest.mark.parametrize(
    'error',
    [
        ValueError('Cannot save arrays with zero size'),
        RuntimeError('a bug\nof a library'),
        TypeError('no such type'),
    ],
)
def test_what_no_later_try_would_mend_ends_the_group_and_peers_are_told(
    join, tmp_path, monkeypatch, mode, error
):
  exchanges = [join(g, 3, mode, waiting=Waiting(PATIENCE)) for g in range(3)]
  tried, words = [], str(error).split()[-1]

  def write(root, publication, variables):
    tried.append(publication.group_id)
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(publications, 'write', write)
    # Of two that fail at one step none waits for the other.
    for exchange in exchanges[:2]:
      exchange.publish_if_due(10, variables_of(1))
    for exchange in exchanges[:2]:
      if mode == 'lockstep':
        with pytest.raises((type(error), PeerError), match=words):
          exchange.fetch(10)
      # Its own error, if it was not that.
      with contextlib.suppress(type(error)):
        exchange.flush()
        assert mode == 'lockstep'
  assert sorted(tried) == [0, 1]
  reason = ' '.join(str(error).split())
  if mode == 'lockstep':
    with pytest.raises(PeerError, match=f'group 0 has ended: {reason}$'):
      exchanges[2].fetch(10)
    for exchange in exchanges[:2]:
      exchange.close()
    ours = join(0, 3, mode)  # Started again.
    publish_all(ours, 10)
    publish(tmp_path, 1, 10)
    assert shown(exchanges[2].fetch(10)) == [10.0, 10.0]
  else:
    assert exchanges[2].fetch(10) is None  # It waits for nobody.


def test_a_newer_publication_replaces_one_that_the_disk_refuses(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch)
  exchange = join()
  for n in (10, 20, 30):
    exchange.publish_if_due(n, variables_of(n))
    until(lambda n=n: n in disk.tried)
  assert disk.tried == sorted(disk.tried)  # The old one is not tried again.
  disk.left = 0
  exchange.flush()
  assert kept(tmp_path) == [30]


def test_lockstep_holds_training_up_rather_than_fill_the_memory(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch)
  stop = threading.Event()
  exchange = join(mode='lockstep', waiting=Waiting(PATIENCE, stop.is_set))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    training = pool.submit(
        lambda: [
            exchange.publish_if_due(n, variables_of(n)) for n in (10, 20, 30)
        ]
    )
    with pytest.raises(TimeoutError):
      training.result(0.2)  # One is written, one waits, one is held up.
    stop.set()  # But not a stop.
    assert training.result(PATIENCE) == [True] * 3
  disk.left = 0
  exchange.flush()
  assert kept(tmp_path) == [10, 20, 30]


@both_modes
def test_an_error_while_pruning_does_not_end_training_and_is_said(
    join, tmp_path, monkeypatch, mode
):
  troubles = Troubles()
  restarts_at(tmp_path, 1, 90)
  exchange = join(mode=mode, keep=1, troubles=troubles)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'delete_unless', refuse)
    publish_all(exchange, 10, 20, 30)
    (trouble,) = troubles.now
    assert trouble.doing == 'deleting old publications'
    assert 'bad sector' in trouble.reason
  assert kept(tmp_path) == [10, 20, 30]
  publish_all(exchange, 40)
  assert kept(tmp_path) == [40]
  assert troubles.now == ()


def test_in_lockstep_pruning_frees_a_full_disk_between_tries(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch, refusals=0)

  def write(root, publication, variables):
    disk.left = int(len(kept(root)) >= 3)
    return disk(root, publication, variables)

  monkeypatch.setattr(publications, 'write', write)
  exchange = join(mode='lockstep', keep=1)
  for step in (10, 20, 30, 40):
    exchange.publish_if_due(step, variables_of(step))
  until(lambda: disk.tried.count(40) > 1)
  assert kept(tmp_path) == [10, 20, 30]
  restarts_at(tmp_path, 1, 40)  # The reader needs nothing before it any more.
  exchange.flush()
  assert kept(tmp_path) == [40]


# --- Before a resume checkpoint ----------------------------------------------


@both_modes
def test_in_lockstep_a_checkpoint_waits_for_the_publications_before_it(
    join, monkeypatch, mode
):
  """After a kill nobody makes them again, and peers will ask for them."""
  disk = Disk(monkeypatch)
  exchange = join(mode=mode, patience=hasty(settle=0.05))
  exchange.settle(9)
  exchange.publish_if_due(10, variables_of(1))
  exchange.settle(9)  # Of an earlier step: it does not wait.
  if mode == 'lockstep':
    with pytest.raises(TimeoutError, match='of group 0 up to step 10 are not'):
      exchange.settle(10)
  else:
    exchange.settle(10)
  disk.left = 0
  exchange.flush()
  exchange.settle(10)


def test_a_checkpoint_does_not_wait_for_publications_after_it(
    join, tmp_path, monkeypatch
):
  exchange = join(mode='lockstep', patience=hasty(settle=PATIENCE))
  after = lambda root, publication, variables: publication.step > 10
  with Gate(monkeypatch, 'write', after) as gate:
    for step in (10, 20, 30):  # One more is always on its way.
      exchange.publish_if_due(step, variables_of(step))
    for step in (10, 19):
      exchange.settle(step)
      assert kept(tmp_path) == [10]
    assert gate.entered.wait(PATIENCE)


# --- A dictionary that a disk mirrors ----------------------------------------


def mirrored(root, every=1, staleness=0, settle=0.05, **kwargs):
  from codistill_jax.exchange.kinds import Checkpoints

  return memory_exchanges(
      2,
      plan=Checkpoints(every, 'lockstep', staleness),
      mirror=Mirror(root, variables_of(0), IDENTITY),
      patience=hasty(settle=settle),
      **kwargs,
  )


def test_a_full_disk_holds_up_the_mirror_and_not_the_training(
    tmp_path, monkeypatch
):
  troubles = Troubles()
  disk = Disk(monkeypatch)
  ours, theirs = mirrored(tmp_path, troubles=troubles)
  for step in range(1, 42):
    assert theirs.publish_if_due(step, variables_of(step))
    assert shown(ours.fetch(step)) == [step]
  assert kept(tmp_path, 1) == []
  assert [t.doing for t in troubles.now] == ['publishing']
  with pytest.raises(OSError, match='up to step 41 are not complete'):
    theirs.settle(41)  # So no checkpoint is made that would need them.
  disk.left = 0
  theirs.flush()
  theirs.settle(41)
  # The next checkpoint needs its own; a restart makes the others again.
  assert kept(tmp_path, 1) == [40, 41]
  for exchange in (ours, theirs):
    exchange.close()


def test_a_checkpoint_that_needs_what_was_given_up_is_not_made(
    tmp_path, monkeypatch
):
  """A disk was full for so long that a state outlived its publications."""
  disk = Disk(monkeypatch)
  ours, theirs = mirrored(tmp_path, staleness=1)
  for step in range(1, 21):
    ours.publish_if_due(step, variables_of(step))
  disk.left = 0
  ours.flush()
  for step, there in ((10, False), (16, False), (20, True)):
    if there:
      ours.settle(step)
    else:
      with pytest.raises(OSError, match=f'up to step {step} are not complete'):
        ours.settle(step)
  for exchange in (ours, theirs):
    exchange.close()


def test_a_mirror_keeps_what_a_restart_may_ask_for(tmp_path):
  exchanges = mirrored(tmp_path, every=5, staleness=5, settle=PATIENCE)
  for step in range(5, 61, 5):
    for exchange in exchanges:
      exchange.publish_if_due(step, variables_of(step))
      exchange.flush()
    if step == 40:
      assert kept(tmp_path) == list(range(5, 41, 5))
      for exchange in exchanges:
        exchange.checkpointed(20)
  # 15 is the oldest that a restart from 20 asks for.
  assert kept(tmp_path) == list(range(15, 61, 5))
  for exchange in exchanges:
    exchange.close()


def test_a_restart_refuses_peers_of_another_task(tmp_path):
  publish(tmp_path, 1, 1)
  mirror = Mirror(tmp_path, variables_of(0), {'task': 'other'})
  ours, theirs = memory_exchanges(2, every=1, mirror=mirror)
  with pytest.raises(checkpoints.MismatchError, match='task=toy'):
    ours.restore(1, [None])
  for exchange in (ours, theirs):
    exchange.close()


# --- Closing -----------------------------------------------------------------


def test_closing_gives_a_full_disk_up_after_a_while(join, monkeypatch):
  Disk(monkeypatch)
  patience = hasty(failing=0.1)
  exchange = join(group_id=1, patience=patience)
  exchange.publish_if_due(10, variables_of(1))
  exchange.close()  # The run is over; nobody waits for it.
  exchange = join(mode='lockstep', patience=patience)
  exchange.publish_if_due(10, variables_of(1))
  with pytest.raises(TimeoutError, match=r'could not publish .*No space left'):
    exchange.close()


@both_modes
def test_closing_waits_for_a_write_that_is_only_slow(
    join, tmp_path, monkeypatch, mode
):
  exchange = join(mode=mode, patience=hasty(failing=0.05))
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    opens = threading.Timer(0.4, gate.open)
    opens.start()
    exchange.close()
    opens.join()
  assert kept(tmp_path) == [10]
  assert leases.peek(tmp_path / 'group_0') is None


@both_modes
def test_the_lease_is_kept_while_a_write_hangs(
    join, tmp_path, monkeypatch, mode
):
  exchange = join(mode=mode, patience=hasty(failing=0.05, slow=0.05, join=0.05))
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    assert gate.entered.wait(PATIENCE)
    if mode == 'lockstep':
      with pytest.raises(TimeoutError, match='group 0 could not publish'):
        exchange.close()
    else:
      exchange.close()
    assert leases.peek(tmp_path / 'group_0') is not None

  def released():
    exchange.close()
    return leases.peek(tmp_path / 'group_0') is None

  until(released)


def test_an_exchange_that_could_not_be_made_holds_no_lease(
    join, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'clear_up', refuse)
    with pytest.raises(OSError, match='bad sector'):
      join()
  assert leases.peek(tmp_path / 'group_0') is None
  join()


# --- Copies on the host ------------------------------------------------------


def test_freshest_needs_the_memory_of_two_copies_however_often_it_publishes(
    join, tmp_path, monkeypatch
):
  """Of the one that is written, and of the newest; which are never the same."""
  copies, original = {}, publications.write

  def write(root, publication, variables):
    copies[publication.step] = variables.params['w']
    return original(root, publication, variables)

  monkeypatch.setattr(publications, 'write', write)
  exchange = join()
  with Gate(monkeypatch, 'write') as gate:
    exchange.publish_if_due(10, variables_of(1))
    assert gate.entered.wait(PATIENCE)
    for step in (20, 30, 40, 50):
      exchange.publish_if_due(step, variables_of(step))
  exchange.flush()
  exchange.publish_if_due(60, variables_of(60))
  exchange.flush()
  assert copies.keys() == {10, 50, 60}
  assert copies[50] is not copies[10]
  # The memory of one that is written serves another.
  assert copies[60] is copies[50] or copies[60] is copies[10]
  for step, value in ((10, 1.0), (50, 50.0), (60, 60.0)):
    _, found = publications.read(tmp_path, 0, step, like=variables_of(0))
    np.testing.assert_array_equal(found.params['w'], value)


def test_the_host_holds_a_few_peers_at_a_time(join, tmp_path, monkeypatch):
  seen, at_once = [], []
  original = publications.read

  def read(*args, **kwargs):
    publication, variables = original(*args, **kwargs)
    seen.append(weakref.ref(variables.params['w']))
    at_once.append(sum(one() is not None for one in seen))
    return publication, variables

  num_groups = 2 * fetching.AT_ONCE + 2
  for peer in range(1, num_groups):
    publish(tmp_path, peer, 10, value=peer)
  monkeypatch.setattr(publications, 'read', read)
  exchange = join(num_groups=num_groups)
  teachers = fetch_until(exchange, 10, *[10] * (num_groups - 1))
  assert shown(teachers) == list(map(float, range(1, num_groups)))
  assert len(at_once) == num_groups - 1
  assert max(at_once) == fetching.AT_ONCE


# --- Reading -----------------------------------------------------------------


def fifo(path):
  os.mkfifo(path)


def link(path):
  path.symlink_to(path.parent / 'elsewhere')
  (path.parent / 'elsewhere').write_bytes(b'{}')


def sparse(path):
  with open(path, 'wb') as f:
    f.truncate(60 << 30)


def deep(path):
  path.write_text('[' * 100_000)


def directory(path):
  path.mkdir()


def other_numbers(path):
  path.write_text(json.dumps({'step': 10**400, 'nonce': [], 'steps': 'x'}))


def infinite(path):
  path.write_text('{"step": 1e999, "steps": {"0": NaN}}')


ODD_FILES = [fifo, link, sparse, deep, directory, other_numbers, infinite]


@both_modes
@pytest.mark.parametrize('spoil', ODD_FILES)
def test_odd_files_of_one_peer_stop_neither_publishing_nor_the_others(
    join, tmp_path, mode, spoil
):
  for step in (10, 20):
    publish(tmp_path, 1, step)
    publish(tmp_path, 2, step)
  theirs = tmp_path / 'group_2'
  data = max((theirs / '20').rglob('d/*'), key=lambda p: p.stat().st_size)
  for path in (
      *(theirs / 'reading.json', theirs / 'restart_step.json'),
      *(theirs / 'failed.json', theirs / '20' / 'record.json', data),
  ):
    path.unlink(missing_ok=True)
    spoil(path)
  troubles = Troubles()
  peers = [[1, 2], [0], [0]]
  ours = join(0, 3, mode, topology=peers, keep=1, troubles=troubles)
  publish_all(ours, *range(10, 90, 10))
  refused = {'group_2/reading.json'}
  if mode == 'lockstep':
    refused.add('group_2/restart_step.json')
  assert len(troubles.now) == len(refused)
  for name in refused:
    assert any(name in trouble.reason for trouble in troubles.now)
  if mode == 'freshest':
    assert shown(fetch_until(ours, 80, 20, 10)) == [20.0, 10.0]
    assert ours.rejected == 1 and 'group_2/20' in ours.last_rejection
    assert kept(tmp_path) == [80]
  else:
    assert kept(tmp_path) == list(range(10, 90, 10))


def test_a_peer_that_hangs_holds_up_nobody_else_and_is_named(
    join, tmp_path, monkeypatch
):
  for peer in (1, 2, 3):
    publish(tmp_path, peer, 10, value=peer)
  troubles = Troubles()
  hangs = lambda root, peer, *_: peer == 2
  for name in ('published_steps', 'read'):
    with Gate(monkeypatch, name, hangs):
      exchange = join(
          0 if name == 'read' else 4,
          5,
          topology=[[1, 2, 3], [], [], [], [1, 2, 3]],
          troubles=troubles,
          patience=hasty(answer=0.2),
      )
      assert shown(fetch_until(exchange, 10, 10, None, 10)) == [1.0, None, 3.0]
      (trouble,) = troubles.now
      assert trouble.doing.endswith('ing publications of group 2')
      assert 'hangs' in trouble.reason
    # What comes too late is used, if only later.
    assert shown(fetch_until(exchange, 20, 10, 10, 10)) == [1.0, 2.0, 3.0]
    assert not troubles.now


def test_lockstep_names_a_peer_that_hangs(join, tmp_path, monkeypatch):
  publish(tmp_path, 1, 10)
  with Gate(monkeypatch, 'read') as gate:
    exchange = join(
        mode='lockstep', waiting=Waiting(0.5), patience=hasty(answer=0.05)
    )
    with pytest.raises(TimeoutError, match='what group 1 has published hangs'):
      exchange.fetch(10)
    gate.open()
  until(lambda: shown(exchange.fetch(10)) == [10.0])


@pytest.mark.parametrize('agreement', [ALONE, OF_ONE])
def test_a_wait_ends_by_a_stop_and_by_its_limit_though_a_read_hangs(
    join, tmp_path, monkeypatch, agreement
):
  publish(tmp_path, 1, 100)
  with Gate(monkeypatch, 'read') as gate:
    for group_id, waiting, error in (
        (0, Waiting(math.inf, gate.entered.is_set), Interrupted),
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
  exchange = join(patience=hasty(turn=0.1))
  peer = lambda root, group_id, *_: group_id == 1
  with Gate(monkeypatch, 'read', peer) as gate:
    while not gate.entered.is_set():
      exchange.fetch(10)
    publish_all(exchange, 10, 20)
    assert kept(tmp_path) == [10, 20]


@pytest.mark.parametrize('policy', ['wait', 'fail'])
def test_who_needs_a_teacher_now_ends_the_pause_between_two_looks(
    join, tmp_path, monkeypatch, policy
):
  looked = threading.Event()
  original = publications.published_steps

  def published_steps(*args):
    found = original(*args)
    looked.set()
    return found

  # It sleeps for hours after its first look.
  patience = hasty(poll=PATIENCE, longest_poll=PATIENCE)
  exchange = join(
      waiting=Waiting(PATIENCE),
      patience=patience,
      **WAIT | {'staleness_policy': policy},
  )
  with monkeypatch.context() as patch:
    patch.setattr(publications, 'published_steps', published_steps)
    assert exchange.fetch(0) is None
    assert looked.wait(PATIENCE)
  publish(tmp_path, 1, 10)
  start = time.monotonic()
  assert exchange.fetch(21) is not None
  assert time.monotonic() - start < PATIENCE / 2
  assert steps_in_use(exchange) == (10,)


@pytest.mark.parametrize('agreement', [ALONE, OF_ONE])
def test_a_restart_without_teachers_reads_nothing(
    join, tmp_path, monkeypatch, agreement
):
  publish(tmp_path, 1, 10)
  exchange = join(num_groups=3, agreement=agreement)
  with monkeypatch.context() as patch:
    patch.setattr(publications, 'read', refuse)
    exchange.restore(20, [None, None])
  assert exchange.rejected == 0 and steps_in_use(exchange) == (None, None)
  exchange.restore(20, [10, None])
  assert steps_in_use(exchange) == (10, None)
