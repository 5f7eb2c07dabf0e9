"""CheckpointExchange: freshest never waits, lockstep waits for one step."""

import concurrent.futures
import dataclasses
import json
import logging
import pathlib
import shutil
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from waits import PATIENCE, until

from codistill_jax.base import Agreement, Variables
from codistill_jax.exchange import (
    checkpoint_exchange,
    fetching,
    protocol,
    publications,
    publisher,
)
from codistill_jax.exchange.checkpoint_exchange import CheckpointExchange
from codistill_jax.exchange.fetching import Waiting
from codistill_jax.exchange.protocol import Interrupted, Plan, StaleError
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints, leases
from codistill_jax.storage.checkpoints import MismatchError

IDENTITY = {'task': 'toy'}


def variables_of(value, width=3):
  return Variables({'w': np.full((width,), value, np.float32)})


def publish(root, group_id, step, value=None, *, at=None, **kwargs):
  publications.write(
      root,
      Publication(group_id, step, time.time() if at is None else at, IDENTITY),
      variables_of(step if value is None else value, **kwargs),
  )


def publish_nan(root, group_id, step):
  """As a publisher does that checks nothing."""
  facts = {
      'group_id': group_id,
      'step': step,
      'time': time.time(),
      'identity': IDENTITY,
  }
  tree = {'params': variables_of(np.nan).params, 'model_state': {}}
  directory = publications.group_directory(root, group_id)
  checkpoints.save(directory, step, tree, facts)


@pytest.fixture
def join(tmp_path):
  """Makes exchanges in one directory; closes them at the end."""
  made = []

  def make(group_id=0, num_groups=2, mode='freshest', every=10, **kwargs):
    fields = {f.name for f in dataclasses.fields(Plan)}
    plan = {k: kwargs.pop(k) for k in list(kwargs) if k in fields}
    made.append(
        CheckpointExchange(
            tmp_path,
            group_id,
            num_groups,
            like=variables_of(0),
            plan=Plan(every=every, mode=mode, **plan),
            identity=IDENTITY,
            **kwargs,
        )
    )
    return made[-1]

  yield make
  for exchange in made:
    exchange.close()


def steps_in_use(exchange):
  return tuple(None if p is None else p.step for p in exchange.in_use)


def fetch_until(exchange, step, wanted):
  """Fetches, as a loop does, until these steps are in use."""
  deadline = time.monotonic() + PATIENCE
  while True:
    teachers = exchange.fetch(step)
    if steps_in_use(exchange) == wanted:
      return teachers
    assert time.monotonic() < deadline, steps_in_use(exchange)
    time.sleep(0.005)


def values(teachers):
  return np.asarray(teachers.variables.params['w'])[:, 0].tolist()


def flip(directory):
  for path in pathlib.Path(directory).rglob('arrays/**/d/*'):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 4, 3 * len(data) // 4):
      data[i] ^= 0xFF
    path.write_bytes(bytes(data))


# --- Publishing --------------------------------------------------------------


def test_publishes_at_multiples_of_the_interval_and_nowhere_else(
    join, tmp_path
):
  exchange = join(every=10)
  said = [n for n in range(31) if exchange.publish_if_due(n, variables_of(n))]
  exchange.close()
  assert said == [10, 20, 30]
  # What still waits when something newer comes is not written at all.
  steps = publications.published_steps(tmp_path, 0)
  assert steps[-1] == 30 and set(steps) <= {10, 20, 30}


def test_lockstep_writes_every_publication(join, tmp_path):
  exchange = join(mode='lockstep')
  for n in (10, 20, 30, 40):
    exchange.publish_if_due(n, variables_of(n))
  exchange.close()
  assert publications.published_steps(tmp_path, 0) == [10, 20, 30, 40]


def test_what_is_published_does_not_follow_the_training(
    join, tmp_path, monkeypatch
):
  """The arrays are copied: the next step may reuse their memory at once."""
  go_on = threading.Event()
  original = publisher.cast_floats

  def late(*args):
    assert go_on.wait(PATIENCE)
    return original(*args)

  monkeypatch.setattr(publisher, 'cast_floats', late)
  exchange = join()
  variables = variables_of(1.0)
  exchange.publish_if_due(10, variables)
  variables.params['w'][:] = 99.0
  go_on.set()
  exchange.close()
  _, found = publications.read(tmp_path, 0, 10, like=variables)
  assert found.params['w'].tolist() == [1.0, 1.0, 1.0]


def test_publishing_is_no_longer_than_the_copy(join, monkeypatch):
  """Writing happens beside training."""
  begun, go_on = threading.Event(), threading.Event()
  original = publications.write

  def slow(*args):
    begun.set()
    assert go_on.wait(PATIENCE)
    return original(*args)

  monkeypatch.setattr(publications, 'write', slow)
  exchange = join()
  assert exchange.publish_if_due(10, variables_of(1))
  assert begun.wait(PATIENCE)  # It writes, and the loop goes on.
  go_on.set()


def test_publications_are_in_the_dtype_asked_for(join, tmp_path):
  exchange = join(publish_dtype='bfloat16')
  exchange.publish_if_due(10, variables_of(1 / 3))
  exchange.close()
  _, found = publications.read(tmp_path, 0, 10, like=variables_of(0))
  assert found.params['w'].dtype == jnp.bfloat16
  fetching = join(group_id=1, teacher_dtype='float32')
  teachers = fetch_until(fetching, 20, (10,))
  assert teachers.variables.params['w'].dtype == np.float32
  assert values(teachers) == [float(jnp.bfloat16(1 / 3))]


@pytest.mark.parametrize('ask', ['publish', 'flush', 'close'])
def test_an_error_while_writing_comes_to_light(join, monkeypatch, ask):
  def fail(*args):
    raise FloatingPointError(
        'group 0 does not publish step 10: w is not finite'
    )

  exchange = join(mode='lockstep')
  monkeypatch.setattr(publications, 'write', fail)
  exchange.publish_if_due(10, variables_of(1))
  assert exchange._publisher.flush()
  with pytest.raises(FloatingPointError, match='does not publish step 10'):
    if ask == 'publish':
      exchange.publish_if_due(20, variables_of(2))
    elif ask == 'flush':
      exchange.flush()
    else:
      exchange.close()


class Disk:
  """`publications.write` on a disk that is full for so many writes."""

  def __init__(self, monkeypatch, refusals):
    self.left = refusals
    self.tried = []
    self._write = publications.write
    monkeypatch.setattr(publications, 'write', self)
    monkeypatch.setattr(publisher, '_FIRST_RETRY_SECONDS', 0.01)

  def __call__(self, root, publication, variables):
    self.tried.append(publication.step)
    if self.left:
      self.left -= 1
      raise OSError(28, 'No space left on device')
    return self._write(root, publication, variables)


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_what_a_full_disk_refuses_is_tried_again_and_said_once(
    join, tmp_path, monkeypatch, caplog, mode
):
  disk = Disk(monkeypatch, refusals=3)
  exchange = join(mode=mode)
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert exchange.publish_if_due(10, variables_of(1))  # Training goes on.
    exchange.flush()
  assert disk.tried == [10] * 4
  assert publications.published_steps(tmp_path, 0) == [10]
  assert caplog.text.count('publishing fails') == 1
  assert caplog.text.count('publishing works again') == 1
  assert exchange.metrics(10)['exchange/publish_failures'] == 3


def test_a_newer_publication_replaces_one_that_the_disk_refuses(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch, refusals=10**6)
  exchange = join()
  for n in (10, 20, 30):
    exchange.publish_if_due(n, variables_of(n))
    until(lambda n=n: n in disk.tried)
  assert disk.tried == sorted(disk.tried)  # The old one is not tried again.
  disk.left = 0
  exchange.flush()
  assert publications.published_steps(tmp_path, 0) == [30]


def test_lockstep_holds_training_up_rather_than_fill_the_memory(
    join, tmp_path, monkeypatch
):
  disk = Disk(monkeypatch, refusals=10**6)
  stop = threading.Event()
  exchange = join(mode='lockstep', waiting=Waiting(600.0, stop.is_set))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    training = pool.submit(
        lambda: [
            exchange.publish_if_due(n, variables_of(n)) for n in (10, 20, 30)
        ]
    )
    until(lambda: disk.tried and exchange._publisher._waiting)
    time.sleep(0.05)
    assert not training.done()  # One is written, one waits, one is held up.
    stop.set()  # But not a stop.
    assert training.result(PATIENCE) == [True] * 3
  disk.left = 0
  exchange.flush()
  assert publications.published_steps(tmp_path, 0) == [10, 20, 30]


def test_closing_gives_a_full_disk_up_after_a_while(join, monkeypatch):
  Disk(monkeypatch, refusals=10**6)
  monkeypatch.setattr(publisher, '_CLOSE_SECONDS', 0.1)
  exchange = join(group_id=1)
  exchange.publish_if_due(10, variables_of(1))
  exchange.close()  # The run is over; nobody waits for it.
  exchange = join(mode='lockstep')
  exchange.publish_if_due(10, variables_of(1))
  with pytest.raises(TimeoutError, match=r'could not publish .*No space left'):
    exchange.close()


@pytest.mark.parametrize('key', ['loss/total', 'optim/grad_norm'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_an_update_that_went_wrong_is_not_published(join, tmp_path, key, value):
  exchange = join(group_id=1)
  metrics = {'loss/total': 1.0, 'optim/grad_norm': 1.0, key: value}
  exchange.publish_if_due(11, variables_of(1), metrics)  # Not an exchange step.
  with pytest.raises(FloatingPointError, match=f'{key} of group 1 .* step 10'):
    exchange.publish_if_due(10, variables_of(1), metrics)
  exchange.flush()
  assert publications.published_steps(tmp_path, 1) == []


def test_parameters_that_are_not_finite_are_not_published(join, tmp_path):
  exchange = join()
  exchange.publish_if_due(10, variables_of(np.nan), {'loss/total': 1.0})
  with pytest.raises(FloatingPointError, match=r'group 0 .* step 10.*w'):
    exchange.flush()
  assert publications.published_steps(tmp_path, 0) == []


def test_the_size_of_publications_is_measured(join):
  exchange = join(publish_dtype='bfloat16')
  assert 'exchange/publication_bytes' not in exchange.metrics(0)
  exchange.publish_if_due(10, variables_of(1))
  exchange.flush()
  assert exchange.metrics(10)['exchange/publication_bytes'] == 3 * 2


def test_two_writers_of_one_group_are_refused(join):
  join()
  with pytest.raises(leases.HeldError, match='publishing for group 0'):
    join()


def test_a_writer_that_was_taken_over_writes_no_more(
    join, tmp_path, monkeypatch
):
  exchange = join()

  def lost():
    raise leases.LostError('process 7 on host b has taken over')

  monkeypatch.setattr(exchange._publisher, '_check_lease', lost)
  exchange.publish_if_due(10, variables_of(1))
  with pytest.raises(leases.LostError, match='process 7 on host b'):
    exchange.flush()
  assert publications.published_steps(tmp_path, 0) == []


def test_a_step_published_before_is_left_alone(join, tmp_path):
  publish(tmp_path, 0, 10, value=1.0)
  exchange = join()
  exchange.publish_if_due(10, variables_of(2.0))
  exchange.close()
  _, found = publications.read(tmp_path, 0, 10, like=variables_of(0))
  assert found.params['w'][0] == 1.0


def test_joining_clears_up_after_a_killed_writer_of_this_group(join, tmp_path):
  for group in (0, 1):
    publish(tmp_path, group, 10)
    (tmp_path / f'group_{group}' / '20').mkdir()
  join(group_id=0)
  names = lambda group: sorted(
      p.name for p in (tmp_path / f'group_{group}').iterdir()
  )
  assert names(0) == ['10', 'lease.json']
  assert names(1) == ['10', '20']  # Its own group may be writing it.


# --- Retention ---------------------------------------------------------------


def test_freshest_keeps_the_newest_five(join, tmp_path):
  exchange = join(every=1)
  for n in range(1, 9):
    exchange.publish_if_due(n, variables_of(n))
    exchange.flush()
  assert publications.published_steps(tmp_path, 0) == [4, 5, 6, 7, 8]


def publish_many(exchange, last):
  for n in range(10, last + 1, 10):
    exchange.publish_if_due(n, variables_of(n))
    exchange.flush()


def test_lockstep_keeps_all_while_a_peer_may_start_anew(join, tmp_path):
  exchange = join(num_groups=3, mode='lockstep', keep=2)
  join(group_id=1, num_groups=3, mode='lockstep').checkpointed(60)
  publish_many(exchange, 80)  # Group 2 has no resume checkpoint yet.
  assert publications.published_steps(tmp_path, 0) == list(range(10, 90, 10))


@pytest.mark.parametrize(
    'staleness, restarts, oldest',
    [
        (0, (60, 45), 40),
        (0, (70, 70), 70),
        (20, (60, 45), 20),
        (0, (5, 60), 10),
    ],
)
def test_lockstep_keeps_what_a_restart_may_ask_for(
    join, tmp_path, staleness, restarts, oldest
):
  peers = [
      join(group_id=g, num_groups=3, mode='lockstep', staleness=staleness)
      for g in (1, 2)
  ]
  for peer, step in zip(peers, restarts):
    peer.checkpointed(step)
  exchange = join(num_groups=3, mode='lockstep', keep=2, staleness=staleness)
  publish_many(exchange, 80)
  kept = publications.published_steps(tmp_path, 0)
  assert kept == list(range(oldest, 90, 10))
  # Indeed: each peer, restarted there, finds what it asks for.
  for step in restarts:
    asked = Plan(every=10, mode='lockstep', staleness=staleness).asked(step)
    assert asked is None or asked in kept


def test_lockstep_keeps_at_least_five_though_nobody_needs_them(join, tmp_path):
  join(group_id=1, mode='lockstep').checkpointed(80)
  publish_many(join(mode='lockstep'), 80)
  assert publications.published_steps(tmp_path, 0) == [40, 50, 60, 70, 80]


def test_a_damaged_restart_file_keeps_everything(join, tmp_path):
  join(group_id=1, mode='lockstep').checkpointed(80)
  (tmp_path / 'group_1' / 'restart_step.json').write_text('{"st')
  publish_many(join(mode='lockstep', keep=2), 50)
  assert publications.published_steps(tmp_path, 0) == [10, 20, 30, 40, 50]


def test_the_restart_step_is_written_for_peers(join, tmp_path):
  exchange = join(mode='lockstep')
  path = tmp_path / 'group_0' / 'restart_step.json'
  for step in (20, 20, 40, 20):  # Back, after a damaged checkpoint.
    exchange.checkpointed(step)
    assert json.loads(path.read_text()) == {'step': step}
  names = {p.name for p in path.parent.iterdir()}
  assert names == {path.name, 'lease.json'}


def test_nothing_is_deleted_that_a_peer_is_reading(join, tmp_path, monkeypatch):
  begun, go_on = threading.Event(), threading.Event()
  writer, reader = join(group_id=1), join()
  original = reader._fetcher._read

  def slow(peer, step):
    begun.set()
    assert go_on.wait(PATIENCE)
    return original(peer, step)

  monkeypatch.setattr(reader._fetcher, '_read', slow)
  publish_many(writer, 10)
  reader.fetch(0)
  assert begun.wait(PATIENCE)
  publish_many(writer, 80)
  assert publications.published_steps(tmp_path, 1) == [10, *range(40, 90, 10)]
  go_on.set()
  # Read whole, though it is long overtaken.
  assert values(fetch_until(reader, 5, (10,))) == [10.0]
  fetch_until(reader, 10, (80,))
  publish_many(writer, 90)
  assert publications.published_steps(tmp_path, 1) == list(range(50, 100, 10))


def test_a_reader_that_died_is_waited_for_only_so_long(
    join, tmp_path, monkeypatch
):
  writer = join(group_id=1, waiting=Waiting(timeout_seconds=100.0))
  publish_many(writer, 10)
  now = time.monotonic()
  monkeypatch.setattr(time, 'monotonic', lambda: now)
  (tmp_path / 'group_0').mkdir()
  (tmp_path / 'group_0' / 'reading.json').write_text(
      '{"nonce": "a", "steps": {"1": 10}}'
  )
  writer._publisher._keep = 1
  for step, later, kept in (
      (20, 0, [10, 20]),
      (30, 99, [10, 30]),
      (40, 102, [40]),
  ):
    monkeypatch.setattr(time, 'monotonic', lambda later=later: now + later)
    writer.publish_if_due(step, variables_of(step))
    writer.flush()
    assert publications.published_steps(tmp_path, 1) == kept


@pytest.mark.parametrize('text', ['', '{"ste', '[]', '{"steps": 3}'])
def test_a_torn_reading_mark_does_no_harm(join, tmp_path, text):
  writer = join(group_id=1)
  (tmp_path / 'group_0').mkdir()
  (tmp_path / 'group_0' / 'reading.json').write_text(text)
  publish_many(writer, 70)
  assert publications.published_steps(tmp_path, 1) == [30, 40, 50, 60, 70]


def test_lockstep_keeps_for_its_readers_and_nobody_else(join, tmp_path):
  # In a ring of three group 0 is read by group 1 alone.
  ring = {'num_groups': 3, 'mode': 'lockstep', 'topology': 'ring'}
  join(group_id=1, **ring).checkpointed(60)
  publish_many(join(keep=2, **ring), 80)
  assert publications.published_steps(tmp_path, 0) == [60, 70, 80]


# --- Freshest ----------------------------------------------------------------


def test_freshest_without_publications_has_no_teachers(join):
  exchange = join()
  assert [exchange.fetch(n) for n in range(25)] == [None] * 25
  assert exchange.in_use == (None,)


def test_freshest_never_waits_for_a_slow_disk(join, tmp_path, monkeypatch):
  """A read that hangs holds no step up; it is used once it is there."""
  publish(tmp_path, 1, 10)
  begun, go_on = threading.Event(), threading.Event()
  original = publications.read

  def slow(*args, **kwargs):
    begun.set()
    assert go_on.wait(PATIENCE)
    return original(*args, **kwargs)

  monkeypatch.setattr(publications, 'read', slow)
  exchange = join()
  exchange.fetch(0)
  assert begun.wait(PATIENCE)
  assert [exchange.fetch(n) for n in range(1, 40)] == [None] * 39
  go_on.set()
  assert values(fetch_until(exchange, 40, (10,))) == [10.0]


def test_freshest_takes_the_newest_and_only_moves_forward(join, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 30)
  exchange = join()
  teachers = fetch_until(exchange, 10, (30,))
  assert values(teachers) == [30.0]
  assert teachers.present_P.tolist() == [1.0]
  # A peer that was restarted comes by older steps, and its newest vanishes.
  checkpoints.delete(tmp_path / 'group_1', [30])
  publish(tmp_path, 1, 20)
  for n in range(20, 60):
    assert exchange.fetch(n) is teachers
    time.sleep(0.002)
  assert steps_in_use(exchange) == (30,)
  publish(tmp_path, 1, 40)
  assert values(fetch_until(exchange, 60, (40,))) == [40.0]


def test_freshest_looks_again_only_at_its_interval(join, tmp_path):
  publish(tmp_path, 1, 10)
  exchange = join(every=10)
  teachers = fetch_until(exchange, 11, (10,))
  publish(tmp_path, 1, 20)
  for n in range(12, 20):
    assert exchange.fetch(n) is teachers
    time.sleep(0.01)
  fetch_until(exchange, 20, (20,))


def test_freshest_follows_a_peer_that_publishes_and_prunes(join, tmp_path):
  """No read is lost, no value is torn, no step goes back."""
  writer, reader = join(group_id=1, every=1), join(every=1)
  over = threading.Event()
  seen = []

  def train():
    for n in range(1, 40):
      writer.publish_if_due(n, variables_of(n))
      # However slow the reader is, it gets to see some on the way.
      while n % 10 == 0 and n > 10 * len(set(seen)) and not over.is_set():
        time.sleep(0.001)
    writer.flush()

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    training = pool.submit(train)
    n = 0
    try:
      while not training.done() or not seen or seen[-1] != 39:
        n += 1
        teachers = reader.fetch(n)
        if teachers is not None:
          seen.append(steps_in_use(reader)[0])
          assert values(teachers) == [seen[-1]]
        assert n < 1_000_000
        time.sleep(0.001)
    finally:
      over.set()
    training.result(PATIENCE)
  assert seen == sorted(seen)
  assert len(set(seen)) > 2
  assert reader.rejected == 0


def test_a_peer_that_is_not_there_yet_is_absent(join, tmp_path):
  exchange = join(group_id=1, num_groups=3)
  publish(tmp_path, 2, 10)
  teachers = fetch_until(exchange, 10, (None, 10))
  assert exchange.peers == (0, 2)
  assert teachers.present_P.tolist() == [0.0, 1.0]
  assert np.isfinite(teachers.variables.params['w']).all()
  publish(tmp_path, 0, 20)
  teachers = fetch_until(exchange, 20, (20, 10))
  assert values(teachers) == [20.0, 10.0]
  assert teachers.present_P.tolist() == [1.0, 1.0]


def test_damage_is_skipped_counted_once_and_the_one_before_taken(
    join, tmp_path, caplog
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  publish_nan(tmp_path, 1, 30)
  flip(tmp_path / 'group_1' / '20')
  exchange = join()
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert values(fetch_until(exchange, 10, (10,))) == [10.0]
  assert exchange.rejected == 2
  assert caplog.text.count('Rejected publication') == 2
  assert 'Rejected publication 20 of group 1' in caplog.text
  assert exchange.metrics(10)['exchange/rejected'] == 2
  for n in range(20, 40):
    exchange.fetch(n)
    time.sleep(0.005)
  assert exchange.rejected == 2 and steps_in_use(exchange) == (10,)
  publish(tmp_path, 1, 40)
  fetch_until(exchange, 40, (40,))


def test_a_publication_that_vanishes_is_not_called_damaged(
    join, tmp_path, monkeypatch
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  original = publications.read

  def read(root, peer, step, **kwargs):
    if step == 20:
      checkpoints.delete(tmp_path / 'group_1', [20])
    return original(root, peer, step, **kwargs)

  monkeypatch.setattr(publications, 'read', read)
  exchange = join()
  fetch_until(exchange, 10, (10,))
  assert exchange.rejected == 0


def test_a_peer_of_another_architecture_is_named_and_not_used(join, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20, width=4)
  exchange = join()
  assert values(fetch_until(exchange, 10, (10,))) == [10.0]
  assert exchange.rejected == 1
  assert 'w float32[4] where this run has' in exchange.last_rejection
  assert 'params/w float32[3];' in exchange.last_rejection


def test_a_bad_publication_that_was_made_again_is_read_again(join, tmp_path):
  publish(tmp_path, 1, 10)
  flip(tmp_path / 'group_1' / '10')
  exchange = join()
  for n in range(10):
    exchange.fetch(n)
    time.sleep(0.005)
  until(lambda: exchange.rejected)
  time.sleep(0.01)
  publish(tmp_path, 1, 10)
  assert values(fetch_until(exchange, 10, (10,))) == [10.0]
  assert exchange.rejected == 1


def test_a_disk_that_cannot_be_read_is_not_the_peers_fault(
    join, tmp_path, monkeypatch, caplog
):
  publish(tmp_path, 1, 10)
  original, failures = publications.read, [OSError(5, 'Input/output error')] * 2

  def read(*args, **kwargs):
    if failures:
      raise failures.pop()
    return original(*args, **kwargs)

  monkeypatch.setattr(publications, 'read', read)
  exchange = join()
  with caplog.at_level(logging.WARNING, logger='absl'):
    fetch_until(exchange, 10, (10,))
  assert exchange.rejected == 0
  assert caplog.text.count('reading publications fails') == 1
  assert caplog.text.count('reading publications works again') == 1


# --- Staleness and its limit -------------------------------------------------


def test_a_peer_past_the_limit_is_dropped_and_taken_back(
    join, tmp_path, caplog
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 2, 30)
  exchange = join(num_groups=3, max_staleness_steps=20)
  teachers = fetch_until(exchange, 30, (10, 30))
  assert teachers.present_P.tolist() == [1.0, 1.0]
  assert exchange.fetch(30) is teachers
  with caplog.at_level(logging.WARNING, logger='absl'):
    one = exchange.fetch(31)
    assert one.present_P.tolist() == [0.0, 1.0]
    assert one.variables is teachers.variables  # Nothing is copied.
    assert exchange.fetch(32) is one
    assert steps_in_use(exchange) == (None, 30)
    assert exchange.metrics(32)['exchange/peers_present'] == 1.0
    assert 'alone' not in caplog.text
    assert [exchange.fetch(n) for n in range(51, 90)] == [None] * 39
    assert caplog.text.count('group 0 trains alone from step 51 on') == 1
    publish(tmp_path, 1, 90)
    back = fetch_until(exchange, 90, (90, None))
    assert back.present_P.tolist() == [1.0, 0.0]
    assert values(back) == [90.0, 30.0]
    assert caplog.text.count('has teachers again at step 90') == 1


def test_without_a_limit_a_teacher_serves_for_ever(join, tmp_path):
  publish(tmp_path, 1, 10)
  exchange = join()
  teachers = fetch_until(exchange, 10, (10,))
  assert exchange.fetch(10**6) is teachers


def test_a_group_says_once_that_nobody_comes(join, caplog):
  exchange = join()
  with caplog.at_level(logging.WARNING, logger='absl'):
    for n in range(100):
      exchange.fetch(n)
      if n == 19:
        assert 'alone' not in caplog.text
  assert caplog.text.count('group 0 trains alone from step 20') == 1


def test_the_policy_fail_ends_the_run_but_looks_first(join, tmp_path):
  exchange = join(max_staleness_steps=20, staleness_policy='fail')
  assert exchange.fetch(20) is None  # As old as the start of its peer.
  publish(tmp_path, 1, 30)
  assert values(exchange.fetch(50)) == [30.0]
  with pytest.raises(StaleError) as error:
    exchange.fetch(51)
  assert str(error.value) == (
      'teachers of group 0 are stale at step 51: group 1 by 21 steps, and'
      ' max_staleness_steps=20; see whether these groups run, or set'
      ' staleness_policy to drop or wait'
  )


def test_the_policy_wait_waits(join, tmp_path):
  limits = {'max_staleness_steps': 20, 'staleness_policy': 'wait'}
  exchange = join(waiting=Waiting(600.0), **limits)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching_now = pool.submit(exchange.fetch, 31)
    time.sleep(0.1)
    assert not fetching_now.done()
    publish(tmp_path, 1, 10)  # Still too old.
    until(lambda: exchange._teaching.held_steps[1] == 10)
    assert not fetching_now.done()
    publish(tmp_path, 1, 20)
    assert values(fetching_now.result(PATIENCE)) == [20.0]


def test_the_policy_wait_has_a_limit_and_heeds_a_stop(join):
  limits = {'max_staleness_steps': 20, 'staleness_policy': 'wait'}
  exchange = join(waiting=Waiting(0.1), **limits)
  with pytest.raises(TimeoutError, match=r'group 1 by 30 steps.*steps=20'):
    exchange.fetch(30)
  stop = threading.Event()
  exchange = join(group_id=1, waiting=Waiting(600.0, stop.is_set), **limits)
  stop.set()
  with pytest.raises(Interrupted, match='stale at step 30: group 0 by 30'):
    exchange.fetch(30)


def test_teachers_are_put_on_the_devices_beside_training(join, tmp_path):
  publish(tmp_path, 1, 10)
  threads = []

  def put(array):
    threads.append(threading.current_thread())
    return jnp.asarray(array)

  exchange = join(put=put)
  teachers = fetch_until(exchange, 10, (10,))
  assert isinstance(teachers.variables.params['w'], jax.Array)
  assert threading.main_thread() not in threads


def test_teachers_of_some_peers_are_replaced_and_the_old_stay_whole(
    join, tmp_path
):
  for peer in (1, 2, 3):
    publish(tmp_path, peer, 10, value=peer)
  exchange = join(num_groups=4, put=jnp.asarray)
  before = fetch_until(exchange, 10, (10, 10, 10))
  publish(tmp_path, 2, 20, value=5.0)
  after = fetch_until(exchange, 20, (10, 20, 10))
  assert values(before) == [1.0, 2.0, 3.0]  # In use until the swap.
  assert values(after) == [1.0, 5.0, 3.0]


def test_a_restart_takes_up_what_was_in_use(join, tmp_path):
  for step in (10, 20, 30):
    publish(tmp_path, 1, step)
  exchange = join(num_groups=3)
  exchange.restore(25, [20, None])
  assert steps_in_use(exchange) == (20, None)
  assert values(exchange.fetch(25)) == [20.0, 20.0]


def test_a_restart_takes_the_newest_where_what_was_in_use_is_gone(
    join, tmp_path
):
  publish(tmp_path, 1, 30)
  exchange = join(num_groups=3)
  exchange.restore(25, [20, 20])
  assert steps_in_use(exchange) == (30, None) and exchange.rejected == 0


def test_staleness_is_own_step_minus_published_step(
    join, tmp_path, monkeypatch
):
  clock = types.SimpleNamespace(time=lambda: 1100.0)
  monkeypatch.setattr(protocol, 'time', clock)
  publish(tmp_path, 1, 10, at=1000.0)
  publish(tmp_path, 2, 40, at=1090.0)
  exchange = join(num_groups=4)
  fetch_until(exchange, 30, (10, 40, None))
  metrics = exchange.metrics(35)
  assert metrics['exchange/peers_present'] == 2.0
  assert metrics['exchange/staleness_steps'] == ((35 - 10) + (35 - 40)) / 2
  assert metrics['exchange/staleness_steps_max'] == 25.0
  assert metrics['exchange/staleness_steps_group_1'] == 25.0
  assert metrics['exchange/staleness_steps_group_2'] == -5.0
  assert 'exchange/staleness_steps_group_3' not in metrics
  assert metrics['exchange/staleness_seconds_group_1'] == 100.0
  assert metrics['exchange/staleness_seconds'] == 55.0


@pytest.mark.parametrize('topology, peers', [('ring', (15,)), ('all', 15)])
def test_sixteen_groups(join, tmp_path, topology, peers):
  for g in range(1, 16):
    publish(tmp_path, g, 10, value=g)
  exchange = join(num_groups=16, topology=topology)
  peers = tuple(range(1, 16)) if peers == 15 else peers
  assert exchange.peers == peers
  teachers = fetch_until(exchange, 10, (10,) * len(peers))
  assert values(teachers) == list(map(float, peers))


# --- Lockstep ----------------------------------------------------------------


def test_lockstep_takes_exactly_the_step_asked_for(join, tmp_path):
  for step in (10, 20, 30):
    publish(tmp_path, 1, step)
  exchange = join(mode='lockstep')
  taken = {}
  for n in range(10, 30):
    exchange.fetch(n)
    taken[n] = steps_in_use(exchange)[0]
  assert taken == {n: n - n % 10 for n in range(10, 30)}


def test_lockstep_with_staleness_takes_older_ones(join, tmp_path):
  for step in (10, 20, 30, 40):
    publish(tmp_path, 1, step)
  exchange = join(mode='lockstep', staleness=20)
  assert [exchange.fetch(n) for n in (0, 10, 20, 29)] == [None] * 4
  for n, wanted in ((30, 10), (39, 10), (40, 20)):
    teachers = exchange.fetch(n)
    assert steps_in_use(exchange) == (wanted,)
    assert values(teachers) == [wanted]


def test_lockstep_waits_for_a_slow_peer(join, tmp_path):
  exchange = join(mode='lockstep', waiting=Waiting(600.0))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching = pool.submit(exchange.fetch, 10)
    publish(tmp_path, 1, 10)
    assert values(fetching.result(PATIENCE)) == [10.0]


def test_lockstep_gives_up_and_says_on_whom_it_waited(join, tmp_path):
  publish(tmp_path, 1, 10)
  exchange = join(mode='lockstep', waiting=Waiting(0.05))
  with pytest.raises(TimeoutError) as e:
    exchange.fetch(20)
  assert str(e.value) == (
      'after 0.05 s of waiting: group 1 has not published step 20; its newest'
      f' is step 10. Is it running, with the same workdir ({tmp_path})?'
  )
  exchange.close()
  exchange = join(
      mode='lockstep', num_groups=3, waiting=Waiting(0.0), group_id=2
  )
  with pytest.raises(TimeoutError, match='its newest is none'):
    exchange.fetch(10)


def test_lockstep_with_different_intervals_is_an_error(
    join, tmp_path, monkeypatch
):
  monkeypatch.setattr(fetching, '_SETTLE_SECONDS', 0.0)
  publish(tmp_path, 1, 15)
  publish(tmp_path, 1, 30)
  exchange = join(mode='lockstep', every=10)
  with pytest.raises(FileNotFoundError, match='same exchange_every'):
    exchange.fetch(20)


def test_lockstep_bears_that_publications_appear_out_of_order(
    join, tmp_path, monkeypatch
):
  """As they may on a network file system."""
  monkeypatch.setattr(fetching, '_SETTLE_SECONDS', 600.0)
  publish(tmp_path, 1, 30)
  exchange = join(mode='lockstep', waiting=Waiting(600.0))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching_now = pool.submit(exchange.fetch, 20)
    time.sleep(0.1)
    publish(tmp_path, 1, 20)
    assert values(fetching_now.result(PATIENCE)) == [20.0]


def test_lockstep_does_not_step_over_damage(join, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  flip(tmp_path / 'group_1' / '10')
  exchange = join(mode='lockstep', waiting=Waiting(0.3))
  with pytest.raises(
      TimeoutError, match='publication 10 of group 1 is damaged'
  ):
    exchange.fetch(10)
  assert exchange.rejected == 1 and exchange.in_use == (None,)


def test_lockstep_goes_on_when_the_damaged_one_is_made_again(join, tmp_path):
  publish(tmp_path, 1, 10)
  flip(tmp_path / 'group_1' / '10')
  exchange = join(mode='lockstep', waiting=Waiting(600.0))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(exchange.fetch, 10)
    until(lambda: exchange.rejected)
    publish(tmp_path, 1, 10)  # As the group does that starts again.
    assert values(waiting.result(PATIENCE)) == [10.0]


def test_lockstep_refuses_a_peer_of_another_architecture(join, tmp_path):
  publish(tmp_path, 1, 10, width=4)
  exchange = join(mode='lockstep')
  with pytest.raises(MismatchError, match=r'w float32\[4\] .*w float32\[3\]'):
    exchange.fetch(10)


def test_lockstep_with_staleness_reads_ahead(join, tmp_path, monkeypatch):
  for step in (10, 20):
    publish(tmp_path, 1, step)
  exchange = join(mode='lockstep', staleness=10)
  exchange.fetch(20)
  threads = []
  original = publications.read

  def read(*args, **kwargs):
    threads.append(threading.current_thread())
    return original(*args, **kwargs)

  until(lambda: exchange._fetching._ahead[1].done())
  monkeypatch.setattr(publications, 'read', read)
  assert values(exchange.fetch(30)) == [20.0]  # Read already.
  assert threading.main_thread() not in threads
  publish(tmp_path, 1, 30)  # Later than the look ahead.
  assert values(exchange.fetch(40)) == [30.0]


def test_a_stop_request_ends_the_wait(join):
  asked = []
  asking = threading.Event()  # Not before the lease is there.
  waiting = Waiting(
      600.0,
      lambda: asking.is_set() and (len(asked) == 3 or asked.append(0)),
  )
  exchange = join(mode='lockstep', waiting=waiting)
  asking.set()
  with pytest.raises(Interrupted, match='waiting: group 1 has'):
    exchange.fetch(10)


def test_what_is_there_is_taken_also_when_asked_to_stop(join, tmp_path):
  publish(tmp_path, 1, 10)
  stop = threading.Event()
  exchange = join(mode='lockstep', waiting=Waiting(600.0, stop.is_set))
  stop.set()
  assert values(exchange.fetch(10)) == [10.0]


def test_a_group_alone_publishes_and_has_no_teachers(join, tmp_path):
  exchange = join(num_groups=1, mode='lockstep', keep=2)
  publish_many(exchange, 40)
  assert exchange.fetch(40) is None and exchange.in_use == ()
  assert publications.published_steps(tmp_path, 0) == [30, 40]


# --- A group of several processes --------------------------------------------


class Together:
  """Two processes of a group, as threads that meet at every decision."""

  def __init__(self):
    self._barrier = threading.Barrier(2, timeout=PATIENCE)
    self._said = [None, None]

  def _exchange(self, process, value):
    self._said[process] = np.asarray(value)
    self._barrier.wait()
    said = list(self._said)
    self._barrier.wait()
    return said

  def agreement(self, process):
    return Agreement(
        is_primary=process == 0,
        choose=lambda x: self._exchange(process, x)[0],
        all_true=lambda x: np.all(self._exchange(process, x), axis=0),
    )


def fetch_on_both(processes, *steps):
  def fetch(process):
    for step in steps:
      teachers = process.fetch(step)
      reading = process._fetching._reading
      if reading is not None:
        concurrent.futures.wait([reading], PATIENCE)
    return teachers

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(fetch, processes))


@pytest.fixture
def processes(join):
  together = Together()
  return [
      join(agreement=together.agreement(i), process=i, num_groups=3)
      for i in (0, 1)
  ]


def test_only_the_primary_writes(processes, tmp_path):
  primary, other = processes
  assert not other.publish_if_due(10, variables_of(1))
  other.checkpointed(20)
  other.close()
  (path,) = (tmp_path / 'group_0').iterdir()
  assert path.name == 'lease.json'  # Of the primary.
  assert primary.publish_if_due(10, variables_of(0))
  primary.checkpointed(10)
  primary.close()
  _, found = publications.read(tmp_path, 0, 10, like=variables_of(0))
  assert found.params['w'][0] == 0.0
  restart = tmp_path / 'group_0' / 'restart_step.json'
  assert json.loads(restart.read_text()) == {'step': 10}


def test_processes_swap_to_what_the_primary_chose(
    processes, tmp_path, monkeypatch
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  # The other process sees a newer one already.
  monkeypatch.setattr(
      processes[0]._fetcher,
      'newest',
      lambda peer, after: 10 if peer == 1 and after is None else None,
  )
  teachers = fetch_on_both(processes, 10, 11)
  for process, found in zip(processes, teachers):
    assert steps_in_use(process) == (10, None)
    assert values(found) == [10.0, 10.0]
    assert found.present_P.tolist() == [1.0, 0.0]


def test_processes_swap_all_or_none(processes, tmp_path, monkeypatch):
  """One of them cannot read it: then none of them uses it."""
  publish(tmp_path, 1, 10)
  publish(tmp_path, 2, 10)
  original = processes[1]._fetcher._read
  monkeypatch.setattr(
      processes[1]._fetcher,
      '_read',
      lambda peer, step: None if peer == 1 else original(peer, step),
  )
  fetch_on_both(processes, 10, 11)
  for process in processes:
    assert steps_in_use(process) == (None, 10)


def test_processes_read_in_the_background_and_swap_at_the_same_step(
    processes, tmp_path, monkeypatch
):
  publish(tmp_path, 1, 10)
  go_on = threading.Event()
  original = processes[1]._fetcher._read

  def slow(peer, step):
    assert go_on.wait(PATIENCE)
    return original(peer, step)

  monkeypatch.setattr(processes[1]._fetcher, '_read', slow)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    on_both = lambda step: list(pool.map(lambda p: p.fetch(step), processes))
    for step in (10, 11, 12, 13, 14):
      assert on_both(step) == [None, None]  # Nobody waits, nobody swaps.
    go_on.set()
    for process in processes:
      concurrent.futures.wait([process._fetching._reading], PATIENCE)
    on_both(15)  # No meeting 5 steps after an exchange step.
    assert [steps_in_use(p)[0] for p in processes] == [None, None]
    on_both(18)
    assert [steps_in_use(p)[0] for p in processes] == [10, 10]


def test_processes_meet_only_now_and_then(processes, tmp_path):
  publish(tmp_path, 1, 10)
  # Alone: at other steps nobody may wait for another process.
  for step in (13, 15, 16, 17, 19):
    assert processes[0].fetch(step) is None
  fetch_on_both(processes, 20, 21)
  for step in (23, 25, 26, 27, 29):
    assert processes[0].fetch(step) is not None


def test_processes_restore_and_wait_together(processes, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda p: p.restore(25, [10, None]), processes))
  assert [steps_in_use(p) for p in processes] == [(10, None)] * 2


@pytest.mark.parametrize('policy', ['fail', 'wait'])
def test_processes_apply_a_policy_together(join, tmp_path, policy):
  together = Together()
  processes = [
      join(
          agreement=together.agreement(i),
          process=i,
          max_staleness_steps=20,
          staleness_policy=policy,
          # One of them is late with its own clock: both give up.
          waiting=Waiting(0.1 if i and policy == 'wait' else 600.0),
      )
      for i in (0, 1)
  ]
  publish(tmp_path, 1, 10)
  if policy == 'wait':  # Or they might give up before they have read it.
    fetch_on_both(processes, 10, 11)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    fetches = [pool.submit(p.fetch, 31) for p in processes]
    for one in fetches:
      error = StaleError if policy == 'fail' else TimeoutError
      with pytest.raises(error, match='group 1 by 21 steps'):
        one.result(PATIENCE)


def test_copies_made_by_hand_are_not_trusted(join, tmp_path):
  publish(tmp_path, 1, 10)
  shutil.copytree(tmp_path / 'group_1' / '10', tmp_path / 'group_1' / '20')
  exchange = join()
  fetch_until(exchange, 10, (10,))
  assert exchange.rejected == 1


# --- Before a resume checkpoint ----------------------------------------------


def test_in_lockstep_a_checkpoint_waits_for_the_publications_before_it(
    join, monkeypatch
):
  """After a kill nobody makes them again, and peers will ask for them."""
  disk = Disk(monkeypatch, refusals=10**6)
  monkeypatch.setattr(checkpoint_exchange, '_SETTLE_SECONDS', 0.05)
  exchange = join(mode='lockstep')
  exchange.settle(9)
  exchange.publish_if_due(10, variables_of(1))
  exchange.settle(9)  # Of an earlier step: it does not wait.
  with pytest.raises(TimeoutError, match='of group 0 up to step 10 are not'):
    exchange.settle(10)
  disk.left = 0
  exchange.flush()
  exchange.settle(10)


def test_in_freshest_no_checkpoint_waits_for_a_publication(join, monkeypatch):
  disk = Disk(monkeypatch, refusals=10**6)
  exchange = join()
  exchange.publish_if_due(10, variables_of(1))
  exchange.settle(10)
  disk.left = 0
