"""Groups that share a directory: what is written, kept, read and trusted."""

import concurrent.futures
import json
import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchange_kit import (
    Gate,
    fetch_until,
    flip,
    kept,
    marks,
    publish,
    publish_all,
    publish_nan,
    reads,
    restarts_at,
    shown,
    steps_in_use,
    variables_of,
)
from exchange_kit import join as join
from waits import PATIENCE, until

from codistill_jax.base import Agreement
from codistill_jax.exchange import publications
from codistill_jax.exchange.plan import PeerError, Plan, StaleError, Waiting
from codistill_jax.storage import checkpoints, leases
from codistill_jax.storage.background import Patience

# --- Writing -----------------------------------------------------------------


@pytest.mark.parametrize('close', [False, True])
def test_an_error_while_writing_comes_to_light(join, close):
  exchange = join(mode='lockstep')
  exchange.publish_if_due(10, variables_of(np.nan))
  with pytest.raises(FloatingPointError, match='does not publish step 10'):
    if close:
      exchange.close()
    for n in range(20, 10**4, 10):  # By then it is known.
      exchange.publish_if_due(n, variables_of(n))


def test_a_writer_that_is_made_again_takes_the_place_of_the_one_before(
    join, tmp_path
):
  """Of one process, as by a cell that is run twice; what was under way ends."""
  first = join()
  first.begin(0)
  publish_all(first, 10)
  first.publish_if_due(20, variables_of(20))
  second = join()
  for left in (lambda: first.fetch(20), lambda: publish_all(first, 30)):
    with pytest.raises(ValueError, match='another exchange for group 0'):
      left()
  second.begin(0)
  publish_all(second, 10)
  assert kept(tmp_path) == [10]
  first.close()  # Leaves the lease alone.
  publish_all(second, 20)


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_the_first_teacher_can_be_waited_for(join, tmp_path, mode):
  exchange = join(num_groups=3, mode=mode)
  publish(tmp_path, 1, 10)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waited = pool.submit(exchange.wait_for_teachers, 10)
    assert not concurrent.futures.wait([waited], 0.1).done
    publish(tmp_path, 2, 10)
    assert shown(waited.result(PATIENCE)) == [10, 10]
  assert shown(exchange.fetch(11)) == [10, 10]
  hasty = join(group_id=1, num_groups=3, mode=mode, waiting=Waiting(0.01))
  with pytest.raises(TimeoutError, match=r'group 0.*step 10'):
    hasty.wait_for_teachers(10)


def test_without_peers_nobody_waits(join):
  alone = join(num_groups=2, topology=[[], [0]])
  assert alone.wait_for_teachers(10) is None


def test_a_writer_that_was_taken_over_writes_no_more(
    join, tmp_path, monkeypatch
):
  exchange = join()

  def lost(lease):
    raise leases.LostError('process 7 on host b has taken over')

  with monkeypatch.context() as patch:
    patch.setattr(leases.Lease, 'check', lost)
    exchange.publish_if_due(10, variables_of(1))
    with pytest.raises(leases.LostError, match='process 7 on host b'):
      exchange.flush()
  assert kept(tmp_path) == []


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

STEPS = range(10, 90, 10)


@pytest.mark.parametrize('keep, oldest', [(5, 40), (1, 80)])
def test_freshest_keeps_the_newest(join, tmp_path, keep, oldest):
  publish_all(join(keep=keep), *STEPS)
  assert kept(tmp_path) == list(range(oldest, 90, 10))


@pytest.mark.parametrize(
    'staleness, restarts, oldest',
    [
        (0, (60, 45), 40),
        (0, (70, 70), 70),
        (20, (60, 45), 20),
        (0, (5, 60), 10),
        (0, (60, None), 10),  # Group 2 has no resume checkpoint yet.
        (0, (60, 'torn'), 10),
    ],
)
def test_lockstep_keeps_what_a_restart_may_ask_for(
    join, tmp_path, staleness, restarts, oldest
):
  run = {'num_groups': 3, 'mode': 'lockstep', 'staleness': staleness}
  for g, step in zip((1, 2), restarts):
    if step == 'torn':
      (tmp_path / f'group_{g}').mkdir()
      (tmp_path / f'group_{g}' / 'restart_step.json').write_text('{"st')
    elif step is not None:
      join(group_id=g, **run).checkpointed(step)
  publish_all(join(keep=2, **run), *STEPS)
  assert kept(tmp_path) == list(range(oldest, 90, 10))
  # Indeed: each peer, restarted there, finds what it asks for.
  for step in restarts:
    if isinstance(step, int):
      asked = Plan(every=10, mode='lockstep', staleness=staleness).asked(step)
      assert asked is None or asked in kept(tmp_path)


@pytest.mark.parametrize(
    'num_groups, topology, keep, restart, oldest',
    [
        # In a ring of three group 0 is read by group 1 alone.
        (3, 'ring', 2, 60, 60),
        # Some are kept though nobody needs them.
        (2, 'all', 5, 80, 40),
        (1, 'all', 2, 80, 70),
    ],
)
def test_lockstep_keeps_for_its_readers_and_nobody_else(
    join, tmp_path, num_groups, topology, keep, restart, oldest
):
  restarts_at(tmp_path, 1, restart)
  run = {'mode': 'lockstep', 'topology': topology, 'keep': keep}
  publish_all(join(0, num_groups, **run), *STEPS)
  assert kept(tmp_path) == list(range(oldest, 90, 10))


def test_the_restart_step_is_written_for_peers(join, tmp_path):
  exchange = join(mode='lockstep')
  path = tmp_path / 'group_0' / 'restart_step.json'
  for step in (20, 20, 40, 20):  # Back, after a damaged checkpoint.
    exchange.checkpointed(step)
    assert json.loads(path.read_text()) == {'step': step}
  names = {p.name for p in path.parent.iterdir()}
  assert names == {path.name, 'lease.json'}


def test_nothing_is_deleted_that_a_peer_is_reading(join, tmp_path, monkeypatch):
  writer, reader = join(group_id=1), join()
  publish_all(writer, 10)
  reading = lambda root, peer, *_: peer == 1
  with Gate(monkeypatch, 'read', reading) as gate:
    while not gate.entered.is_set():
      reader.fetch(0)
    publish_all(writer, *range(20, 90, 10))
    assert kept(tmp_path, 1) == [10, *range(40, 90, 10)]
  # Read whole, though it is long overtaken.
  assert shown(fetch_until(reader, 5, 10)) == [10.0]
  fetch_until(reader, 10, 80)
  publish_all(writer, 90)
  assert kept(tmp_path, 1) == list(range(50, 100, 10))


def test_a_reader_that_died_is_waited_for_only_so_long(
    join, tmp_path, monkeypatch
):
  writer = join(waiting=Waiting(timeout_seconds=100.0), keep=1)
  publish_all(writer, 10)
  now = time.monotonic()
  marks(tmp_path, reads(10))
  for step, later, there in (
      (20, 0, [10, 20]),
      (30, 99, [10, 30]),
      (40, 102, [40]),
  ):
    monkeypatch.setattr(time, 'monotonic', lambda later=later: now + later)
    publish_all(writer, step)
    assert kept(tmp_path) == there


@pytest.mark.parametrize('text', ['', '{"nonce"', '[]', '{"steps": 3}'])
def test_a_mark_that_is_torn_counts_as_it_was_before(join, tmp_path, text):
  exchange = join(keep=1)
  for name in ('reading.json', 'process_2_reading.json'):
    marks(tmp_path, text, name)  # It never was anything else.
  marks(tmp_path, reads(20), 'process_3_reading.json')
  mark = 'process_1_reading.json'
  marks(tmp_path, reads(10), mark)
  publish_all(exchange, 10, 20)
  if text in ('', '{"nonce"'):
    marks(tmp_path, text, mark)
  publish_all(exchange, 30)
  assert kept(tmp_path) == [10, 20, 30]
  marks(tmp_path, '{"nonce": "b", "steps": {}}', mark)
  publish_all(exchange, 40)
  assert kept(tmp_path) == [20, 40]


# --- Reading, freshest -------------------------------------------------------


def test_freshest_never_waits_for_a_slow_disk(join, tmp_path, monkeypatch):
  """A read that hangs holds no step up; it is used once it is there."""
  publish(tmp_path, 1, 10)
  with Gate(monkeypatch, 'read') as gate:
    exchange = join()
    while not gate.entered.is_set():
      assert exchange.fetch(0) is None
    assert [exchange.fetch(n) for n in range(1, 40)] == [None] * 39
  assert shown(fetch_until(exchange, 40, 10)) == [10.0]


def test_freshest_follows_a_peer_that_publishes_and_prunes(join, tmp_path):
  """No read is lost, no value is torn, no step goes back."""
  writer, reader = join(group_id=1, every=1), join(every=1)
  seen = []

  def train():
    for n in range(1, 40):
      writer.publish_if_due(n, variables_of(n))
      # However slow the reader is, it gets to see some on the way.
      until(lambda n=n: n % 10 or len(set(seen)) >= n // 10)
    writer.flush()

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    training = pool.submit(train)
    n = 0
    while not training.done() or not seen or seen[-1] != 39:
      n += 1
      teachers = reader.fetch(n)
      if teachers is not None:
        seen.append(steps_in_use(reader)[0])
        assert shown(teachers) == [seen[-1]]
      assert n < 1_000_000
      time.sleep(0.001)
    training.result(PATIENCE)
  assert seen == sorted(seen) and len(set(seen)) > 2
  assert reader.rejected == 0


def test_damage_is_skipped_counted_once_and_the_one_before_taken(
    join, tmp_path, caplog
):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  publish_nan(tmp_path, 1, 30)
  flip(tmp_path / 'group_1' / '20')
  exchange = join()
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert shown(fetch_until(exchange, 10, 10)) == [10.0]
  assert exchange.rejected == 2
  assert caplog.text.count('Rejected publication') == 2
  assert 'Rejected publication 20 of group 1' in caplog.text
  assert exchange.metrics(10)['exchange/rejected'] == 2
  for n in range(20, 60):
    exchange.fetch(n)
    time.sleep(0.002)
  assert exchange.rejected == 2 and steps_in_use(exchange) == (10,)
  publish(tmp_path, 1, 40)
  fetch_until(exchange, 60, 40)


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
  fetch_until(exchange, 10, 10)
  assert exchange.rejected == 0


def test_a_peer_of_another_architecture_is_named_and_not_used(join, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20, width=4)
  exchange = join()
  assert shown(fetch_until(exchange, 10, 10)) == [10.0]
  assert exchange.rejected == 1
  assert 'w float32[4] where this run has' in exchange.last_rejection
  with pytest.raises(checkpoints.MismatchError, match=r'w float32\[4\] .*\[3'):
    join(2, 3, mode='lockstep', topology='ring').fetch(20)


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_a_bad_publication_that_was_made_again_is_read_again(
    join, tmp_path, mode
):
  publish(tmp_path, 1, 10)
  flip(tmp_path / 'group_1' / '10')
  exchange = join(mode=mode, waiting=Waiting(PATIENCE))

  def fetch():
    return fetch_until(exchange, 10, 10)

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching = pool.submit(fetch)
    until(lambda: exchange.rejected)
    time.sleep(0.01)  # Another time of its mark.
    publish(tmp_path, 1, 10)  # As the group does that starts again.
    assert shown(fetching.result(PATIENCE)) == [10.0]
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
    fetch_until(exchange, 10, 10)
  assert exchange.rejected == 0
  assert caplog.text.count('reading publications of group 1 fails') == 1
  assert caplog.text.count('of group 1 works again') == 1


def test_teachers_are_put_on_the_devices_beside_training(join, tmp_path):
  publish(tmp_path, 1, 10)
  threads = []

  def put(array):
    threads.append(threading.current_thread())
    return jnp.asarray(array)

  exchange = join(put=put)
  teachers = fetch_until(exchange, 10, 10)
  assert isinstance(teachers.variables.params['w'], jax.Array)
  assert threading.main_thread() not in threads
  publish(tmp_path, 1, 20, value=5.0)
  after = fetch_until(exchange, 20, 20)
  assert shown(teachers) == [10.0] and shown(after) == [5.0]


@pytest.mark.parametrize('there, taken', [((10, 20, 30), 20), ((30,), 30)])
def test_a_restart_takes_up_what_was_in_use_or_the_newest(
    join, tmp_path, there, taken
):
  for step in there:
    publish(tmp_path, 1, step)
  exchange = join(num_groups=3)
  exchange.restore(25, [20, None])
  assert steps_in_use(exchange) == (taken, None) and exchange.rejected == 0
  assert shown(exchange.fetch(25)) == [taken, None]


# --- Lives of a group --------------------------------------------------------


@pytest.mark.parametrize('mode', ['freshest', 'lockstep'])
def test_a_group_that_begins_anew_is_not_muted_by_its_earlier_life(
    join, tmp_path, mode
):
  first, reader = join(1, mode=mode), join()
  first.begin(0)
  publish_all(first, *STEPS)
  first.checkpointed(80)
  fetch_until(reader, 80, 80)
  first.close()
  for life in range(2):
    again = join(1, mode=mode, keep=2)
    again.begin(0)
    assert kept(tmp_path, 1) == []
    assert not (tmp_path / 'group_1' / 'restart_step.json').exists()
    reader.fetch(90 + 100 * life)
    assert steps_in_use(reader) == (80 if life == 0 else 30,)  # Till it has.
    for step in (10, 20, 30):
      assert again.publish_if_due(step, variables_of(-step))
      again.flush()
      assert step in kept(tmp_path, 1)
      now = 90 + 100 * life + step
      assert shown(fetch_until(reader, now, step)) == [-step]
    again.close()
  assert reader.rejected == 0


def test_what_another_run_has_published_is_not_deleted(join, tmp_path):
  publish(tmp_path, 0, 10, width=4)
  with pytest.raises(checkpoints.MismatchError, match='to begin anew') as e:
    join().begin(0)
  assert 'w float32[4] where this run has' in str(e.value)
  assert kept(tmp_path) == [10]


def test_a_group_that_goes_on_keeps_its_life_and_what_it_published(
    join, tmp_path
):
  first, reader = join(1), join()
  first.begin(0)
  publish_all(first, *STEPS)
  fetch_until(reader, 80, 80)
  first.close()
  again = join(1, keep=2)
  again.begin(20)
  publish_all(again, 30, 40)
  assert kept(tmp_path, 1) == list(STEPS)[2:]
  reader.fetch(90)
  publish_all(again, 50)
  assert steps_in_use(reader) == (80,)  # No step back in one life.
  publish_all(again, 60, 70, 80, 90)
  assert kept(tmp_path, 1) == [80, 90]
  fetch_until(reader, 100, 90)


@pytest.mark.parametrize('step', [10**15, 2**31])
def test_a_forged_step_is_neither_used_nor_in_the_way(join, tmp_path, step):
  for group_id in (0, 1):
    publish(tmp_path, group_id, step, value=1.0)
  publish(tmp_path, 1, 10)
  exchange = join(keep=2)
  assert shown(fetch_until(exchange, 10, 10)) == [10.0]
  publish(tmp_path, 1, 20)
  fetch_until(exchange, 20, 20)
  publish_all(exchange, 20, 30, 40)
  assert kept(tmp_path) == [30, 40] and exchange.rejected == 0


def test_a_teacher_is_not_used_that_is_far_ahead(join, tmp_path):
  exchange = join(max_staleness_steps=20)
  for step in (40, 100):
    publish(tmp_path, 1, step)
  seen = {}
  for step in range(10, 140):
    until(lambda n=step: exchange.fetch(n) or n < 20 or 60 < n < 80 or n > 120)
    seen[step] = steps_in_use(exchange)[0]
  used = lambda n: 40 if 20 <= n <= 60 else 100 if 80 <= n <= 120 else None
  assert seen == {n: used(n) for n in range(10, 140)}


# --- Reading, lockstep -------------------------------------------------------


def test_lockstep_with_different_intervals_is_an_error(join, tmp_path):
  publish(tmp_path, 1, 15)
  publish(tmp_path, 1, 30)
  exchange = join(mode='lockstep', patience=Patience(out_of_order=0.0))
  with pytest.raises(PeerError, match='the same every'):
    exchange.fetch(20)


def test_lockstep_bears_that_publications_appear_out_of_order(join, tmp_path):
  """As they may on a network file system."""
  publish(tmp_path, 1, 30)
  exchange = join(
      mode='lockstep',
      waiting=Waiting(PATIENCE),
      patience=Patience(poll=0.002, out_of_order=PATIENCE),
  )
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching_now = pool.submit(exchange.fetch, 20)
    with pytest.raises(TimeoutError):
      fetching_now.result(0.1)
    publish(tmp_path, 1, 20)
    assert shown(fetching_now.result(PATIENCE)) == [20.0]


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


def test_lockstep_with_staleness_reads_ahead(join, tmp_path, monkeypatch):
  for step in (10, 20):
    publish(tmp_path, 1, step)
  read_now = []
  original = publications.read

  def read(root, peer, step, **kwargs):
    read_now.append(step)
    return original(root, peer, step, **kwargs)

  monkeypatch.setattr(publications, 'read', read)
  exchange = join(mode='lockstep', staleness=10)
  exchange.fetch(20)
  until(lambda: 20 in read_now)  # Before it is asked for.
  assert shown(exchange.fetch(30)) == [20.0]
  publish(tmp_path, 1, 30)  # Later than the look ahead, perhaps.
  assert shown(exchange.fetch(40)) == [30.0]


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


def on_both(processes, call):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(call, processes))


def both_use(processes, step, *wanted):
  """Meets, as two loops do, until both use these steps; at the same one."""

  def used(process):
    process.fetch(step)
    return steps_in_use(process)

  def agree():
    one, other = on_both(processes, used)
    assert one == other
    return one == wanted

  until(agree)


@pytest.fixture
def processes(join):
  together = Together()
  return [
      join(agreement=together.agreement(i), process=i, num_groups=3)
      for i in (0, 1)
  ]


def test_only_the_primary_writes(processes, tmp_path):
  primary, other = processes
  assert not other.publish_if_due(10, variables_of(1)) and not other.due(10)
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


def test_processes_swap_all_to_what_the_primary_chose(processes, tmp_path):
  publish(tmp_path, 1, 10)
  both_use(processes, 10, 10, None)
  publish(tmp_path, 1, 20)
  publish(tmp_path, 2, 20)
  both_use(processes, 20, 20, 20)
  assert shown(processes[1].fetch(23)) == [20.0, 20.0]


def test_processes_swap_all_or_none(processes, tmp_path, monkeypatch):
  """One of them cannot read it: then none of them uses it."""
  publish(tmp_path, 1, 10)
  publish(tmp_path, 2, 10)
  original, refused, lock = publications.read, [], threading.Lock()

  def read(root, peer, step, **kwargs):
    with lock:
      if peer == 1 and not refused:  # The first process that comes.
        refused.append(threading.current_thread())
    if peer == 1 and threading.current_thread() in refused:
      raise OSError(5, 'Input/output error')
    return original(root, peer, step, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(publications, 'read', read)
    both_use(processes, 10, None, 10)
    for _ in range(20):
      on_both(processes, lambda p: p.fetch(20))
    assert refused
  both_use(processes, 30, 10, 10)
  assert shown(processes[0].fetch(33)) == [10.0, 10.0]


def test_processes_read_in_the_background_and_meet_now_and_then(
    processes, tmp_path, monkeypatch
):
  publish(tmp_path, 1, 10)
  with Gate(monkeypatch, 'read') as gate:
    for step in (10 * n + m for n in range(1, 10**6) for m in (0, 1, 2, 4, 8)):
      if gate.entered.is_set():
        break
      fetched = on_both(processes, lambda p, n=step: p.fetch(n))
      assert fetched == [None, None]  # Nobody waits, nobody swaps.
    base = step - step % 10 + 10
    # Alone: at other steps nobody may wait for another process.
    for step in (3, 5, 6, 7, 9):
      assert processes[0].fetch(base + step) is None
  both_use(processes, base + 10, 10, None)
  for step in (3, 5, 6, 7, 9):
    assert processes[0].fetch(base + 10 + step) is not None


def test_processes_restore_together(processes, tmp_path):
  publish(tmp_path, 1, 10)
  publish(tmp_path, 1, 20)
  on_both(processes, lambda p: p.restore(25, [10, None]))
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
          waiting=Waiting(0.1 if i and policy == 'wait' else PATIENCE),
      )
      for i in (0, 1)
  ]
  publish(tmp_path, 1, 10)
  both_use(processes, 10, 10)
  error = StaleError if policy == 'fail' else TimeoutError
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for one in [pool.submit(p.fetch, 32) for p in processes]:
      with pytest.raises(error, match='group 1 by 22 steps'):
        one.result(PATIENCE)
