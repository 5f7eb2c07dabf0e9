"""CheckpointExchange: freshest never waits, lockstep waits for one step."""

import concurrent.futures
import json
import logging
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import checkpoint_exchange, publications, storage
from codistill_jax.base import Agreement, Variables
from codistill_jax.checkpoint_exchange import (
    CheckpointExchange,
    Interrupted,
    Waiting,
)
from codistill_jax.exchange import Plan, staleness_metrics
from codistill_jax.publications import MismatchError, Publication

# See storage_test.py: 2026-11, noise of orbax 0.12 about damaged arrays.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)

IDENTITY = {'task': 'toy'}


def variables_of(value, width=3):
  return Variables({'w': np.full((width,), value, np.float32)})


def publish(root, group_id, step, value=None, *, seconds_ago=0.0, **kwargs):
  publications.write(
      root,
      Publication(group_id, step, time.time() - seconds_ago, IDENTITY),
      variables_of(step if value is None else value, **kwargs),
  )


@pytest.fixture
def join(tmp_path):
  """Makes exchanges in one directory; closes them at the end."""
  made = []

  def make(group_id=0, num_groups=2, mode='freshest', every=10, **kwargs):
    plan_keys = ('staleness', 'publish_dtype', 'teacher_dtype')
    plan = {k: kwargs.pop(k) for k in plan_keys if k in kwargs}
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


def fetch_until(exchange, step, wanted, seconds=30.0):
  """Fetches, as a loop does, until these steps are in use."""
  deadline = time.monotonic() + seconds
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
  original = checkpoint_exchange.cast_floats

  def late(*args):
    assert go_on.wait(30)
    return original(*args)

  monkeypatch.setattr(checkpoint_exchange, 'cast_floats', late)
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
    assert go_on.wait(30)
    return original(*args)

  monkeypatch.setattr(publications, 'write', slow)
  exchange = join()
  assert exchange.publish_if_due(10, variables_of(1))
  assert begun.wait(30)  # It writes, and the loop goes on.
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


@pytest.mark.parametrize('ask', ['publish', 'close'])
def test_an_error_while_writing_comes_to_light(join, monkeypatch, ask):
  def fail(*args):
    raise OSError('no space left on device')

  exchange = join(mode='lockstep')
  monkeypatch.setattr(publications, 'write', fail)
  exchange.publish_if_due(10, variables_of(1))
  concurrent.futures.wait(exchange._writing)
  with pytest.raises(OSError, match='no space left'):
    if ask == 'publish':
      exchange.publish_if_due(20, variables_of(2))
    else:
      exchange.close()


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
  assert names(0) == ['10']
  assert names(1) == ['10', '20']  # Its own group may be writing it.


# --- Retention ---------------------------------------------------------------


def test_freshest_keeps_the_newest_five(join, tmp_path):
  exchange = join(every=1)
  for n in range(1, 9):
    exchange.publish_if_due(n, variables_of(n))
    exchange._check_writes(wait=True)
  assert publications.published_steps(tmp_path, 0) == [4, 5, 6, 7, 8]


def publish_many(exchange, last):
  for n in range(10, last + 1, 10):
    exchange.publish_if_due(n, variables_of(n))
    exchange._check_writes(wait=True)


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
  assert [p.name for p in path.parent.iterdir()] == [path.name]


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
    assert go_on.wait(30)
    return original(*args, **kwargs)

  monkeypatch.setattr(publications, 'read', slow)
  exchange = join()
  exchange.fetch(0)
  assert begun.wait(30)
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
  storage.delete(tmp_path / 'group_1', [30])
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
  stop = threading.Event()

  def train():
    for n in range(1, 40):
      writer.publish_if_due(n, variables_of(n))
      time.sleep(0.01)
    writer._check_writes(wait=True)
    stop.set()

  seen = []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    training = pool.submit(train)
    n = 0
    while not stop.is_set() or not seen or seen[-1] != 39:
      n += 1
      teachers = reader.fetch(n)
      if teachers is not None:
        seen.append(steps_in_use(reader)[0])
        assert values(teachers) == [seen[-1]]
      assert n < 100_000
      time.sleep(0.001)
    training.result(30)
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
  publish(tmp_path, 1, 30, value=np.nan)
  flip(tmp_path / 'group_1' / '20')
  exchange = join()
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert values(fetch_until(exchange, 10, (10,))) == [10.0]
  assert exchange.rejected == 2
  assert caplog.text.count('Skipped:') == 2
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
      storage.delete(tmp_path / 'group_1', [20])
    return original(root, peer, step, **kwargs)

  monkeypatch.setattr(publications, 'read', read)
  exchange = join()
  fetch_until(exchange, 10, (10,))
  assert exchange.rejected == 0


def test_a_peer_of_another_architecture_stops_the_run(join, tmp_path):
  publish(tmp_path, 1, 10, width=4)
  exchange = join()
  with pytest.raises(MismatchError, match=r'w float32\[4\] .*w float32\[3\]'):
    fetch_until(exchange, 10, (10,))


def test_teachers_are_put_on_the_devices_beside_training(join, tmp_path):
  publish(tmp_path, 1, 10)
  threads = []

  def place(teachers):
    threads.append(threading.current_thread())
    return jax.tree.map(jnp.asarray, teachers)

  exchange = join(place=place)
  teachers = fetch_until(exchange, 10, (10,))
  assert isinstance(teachers.variables.params['w'], jax.Array)
  assert threading.main_thread() not in threads


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


def test_staleness_is_own_step_minus_published_step(join, tmp_path):
  publish(tmp_path, 1, 10, seconds_ago=100.0)
  publish(tmp_path, 2, 40, seconds_ago=10.0)
  exchange = join(num_groups=4)
  fetch_until(exchange, 30, (10, 40, None))
  metrics = staleness_metrics(35, exchange.in_use)
  assert metrics['exchange/peers_present'] == 2.0
  assert metrics['exchange/staleness_steps'] == ((35 - 10) + (35 - 40)) / 2
  assert metrics['exchange/staleness_steps_max'] == 25.0
  assert metrics['exchange/staleness_seconds'] == pytest.approx(55.0, abs=5.0)


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
  exchange = join(mode='lockstep', waiting=Waiting(30.0))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching = pool.submit(exchange.fetch, 10)
    publish(tmp_path, 1, 10)
    assert values(fetching.result(30)) == [10.0]


def test_lockstep_gives_up_and_says_on_whom_it_waited(join, tmp_path):
  publish(tmp_path, 1, 10)
  exchange = join(mode='lockstep', waiting=Waiting(0.05))
  with pytest.raises(TimeoutError) as e:
    exchange.fetch(20)
  assert str(e.value) == (
      'group 1 has not published step 20 within 0.05 s; its newest is step 10.'
      f' Is it running, with the same workdir ({tmp_path})?'
  )
  with pytest.raises(TimeoutError, match='its newest is none'):
    join(mode='lockstep', num_groups=3, waiting=Waiting(0.0), group_id=2).fetch(
        10
    )


def test_lockstep_with_different_intervals_is_an_error(
    join, tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint_exchange, '_SETTLE_SECONDS', 0.0)
  publish(tmp_path, 1, 15)
  publish(tmp_path, 1, 30)
  exchange = join(mode='lockstep', every=10)
  with pytest.raises(FileNotFoundError, match='same exchange_every'):
    exchange.fetch(20)


def test_lockstep_bears_that_publications_appear_out_of_order(join, tmp_path):
  """As they may on a network file system."""
  publish(tmp_path, 1, 30)
  exchange = join(mode='lockstep', waiting=Waiting(30.0))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    fetching = pool.submit(exchange.fetch, 20)
    time.sleep(0.1)
    publish(tmp_path, 1, 20)
    assert values(fetching.result(30)) == [20.0]


def test_lockstep_does_not_step_over_damage(join, tmp_path):
  publish(tmp_path, 1, 10)
  flip(tmp_path / 'group_1' / '10')
  exchange = join(mode='lockstep')
  with pytest.raises(storage.DamagedError):
    exchange.fetch(10)


def test_a_stop_request_ends_the_wait(join):
  asked = []
  waiting = Waiting(
      600.0, interrupted=lambda: len(asked) == 3 or asked.append(0)
  )
  exchange = join(mode='lockstep', waiting=waiting)
  with pytest.raises(Interrupted, match='waiting for group 1'):
    exchange.fetch(10)


def test_what_is_there_is_taken_also_when_asked_to_stop(join, tmp_path):
  publish(tmp_path, 1, 10)
  exchange = join(mode='lockstep', waiting=Waiting(600.0, lambda: True))
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
    self._barrier = threading.Barrier(2, timeout=30)
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


def fetch_on_both(processes, step):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(lambda p: p.fetch(step), processes))


@pytest.fixture
def processes(join):
  together = Together()
  return [join(agreement=together.agreement(i), num_groups=3) for i in (0, 1)]


def test_only_the_primary_writes(processes, tmp_path):
  primary, other = processes
  assert not other.publish_if_due(10, variables_of(1))
  other.checkpointed(20)
  other.close()
  assert list(tmp_path.iterdir()) == []
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
      processes[0],
      '_newest_untried',
      lambda peer: 10 if peer == 1 else None,
  )
  teachers = fetch_on_both(processes, 10)
  for process, found in zip(processes, teachers):
    assert steps_in_use(process) == (10, None)
    assert values(found) == [10.0, 10.0]
    assert found.present_P.tolist() == [1.0, 0.0]


def test_processes_swap_all_or_none(processes, tmp_path, monkeypatch):
  """One of them cannot read it: then none of them uses it."""
  publish(tmp_path, 1, 10)
  publish(tmp_path, 2, 10)
  original = processes[1]._read

  def read(peer, step):
    if peer == 1:
      raise storage.MissingError('pruned meanwhile')
    return original(peer, step)

  monkeypatch.setattr(processes[1], '_read', read)
  fetch_on_both(processes, 10)
  for process in processes:
    assert steps_in_use(process) == (None, 10)


def test_processes_look_only_at_exchange_steps(processes, tmp_path):
  publish(tmp_path, 1, 10)
  # Alone: between exchanges nobody may wait for another process.
  assert processes[0].fetch(15) is None
  fetch_on_both(processes, 20)
  assert processes[0].fetch(25) is not None


def test_copies_made_by_hand_are_not_trusted(join, tmp_path):
  publish(tmp_path, 1, 10)
  shutil.copytree(tmp_path / 'group_1' / '10', tmp_path / 'group_1' / '20')
  exchange = join()
  fetch_until(exchange, 10, (10,))
  assert exchange.rejected == 1
