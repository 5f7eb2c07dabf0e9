"""Leases: one writer at a time; the dead are replaced, the living named."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
import tiny_run
from waits import PATIENCE, Clock, until

from codistill_jax.storage import files, leases
from codistill_jax.storage.background import Interrupted, Patience

TTL = 1.0
# Of newcomers that meet, one that is slower than this starts over.
MEETING = Patience(lease_settle=0.5)

# Holds a lease until it is killed; says how that went.
HOLD = """
import sys, time
from codistill_jax.storage import leases
try:
  lease = leases.acquire(
      sys.argv[1],
      'training in',
      ttl_seconds=600,
  )
except leases.HeldError as e:
  print('held', e, flush=True)
  sys.exit(1)
print('got', flush=True)
time.sleep(1000)
"""


@pytest.fixture
def clock():
  """The time that leases are waited for; it passes at once."""
  return Clock()


@pytest.fixture
def hold():
  """Starts processes that hold, or want, the lease of a directory."""
  started = []

  def start(directory):
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(directory)],
        cwd=tiny_run.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def acquire(tmp_path, clock):
  """Acquires the lease of tmp_path; what was acquired is released."""
  with contextlib.ExitStack() as stack:

    def act(directory=tmp_path, ttl_seconds=TTL, **kwargs):
      lease = leases.acquire(
          directory,
          'training in',
          ttl_seconds=ttl_seconds,
          **{'clock': clock, **kwargs},
      )
      return stack.enter_context(lease)

    yield act


def lease_file(directory):
  return pathlib.Path(directory) / 'lease.json'


def forge(directory, **changes):
  """Writes the lease of a process of another machine; gives it."""
  own = leases.this_process('training in', TTL)
  holder = own._replace(host='far', machine='another', pid=7, **{})
  holder = holder._replace(**changes)
  files.write_json(lease_file(directory), holder._asdict())
  return holder


def forge_here(directory, **changes):
  """The lease of another process of this machine."""
  machine = leases.this_process('', TTL).machine
  return forge(
      directory, **{'machine': machine, 'pid': os.getppid(), **changes}
  )


def beating(directory, clock, seconds=0.2, **changes):
  """Another machine that lives, and whose process keeps its lease."""
  holder = forge(directory, **changes)
  beat = lambda n: forge(directory, **holder._replace(beat=n)._asdict())
  clock.every(seconds, beat)
  return holder


def before_writing(monkeypatch, act):
  """Calls `act(holder)` whenever a lease is about to be written."""
  write = files.write_json

  def write_json(path, tree):
    after = act(tree)
    write(path, tree)
    if after is not None:
      after()

  monkeypatch.setattr(files, 'write_json', write_json)


# --- Processes of this machine -----------------------------------------------


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, hold, clock):
  first = hold(tmp_path)
  assert first.stdout.readline() == 'got\n'
  holder = leases.peek(tmp_path)
  since = time.strftime('%Y-%m-%d %H:%M', time.gmtime(holder.since))
  start = clock.now
  with pytest.raises(leases.HeldError) as e:
    leases.acquire(tmp_path, 'training in', clock=clock)
  assert clock.now == start  # It need not be watched: it is here.
  assert str(e.value).startswith(
      f'process {first.pid} on host {holder.host} has been training in'
      f' {tmp_path} since {since}'
  )
  assert str(e.value).endswith('; end it, or wait until it is done')
  # SIGSTOP: it may be continued at any time, and would go on writing.
  first.send_signal(signal.SIGSTOP)
  until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
  with pytest.raises(leases.HeldError, match=f'process {first.pid} '):
    leases.acquire(tmp_path, 'training in', ttl_seconds=0.01)


def test_a_killed_process_is_replaced_at_once(tmp_path, hold, acquire, clock):
  first = hold(tmp_path)
  assert first.stdout.readline() == 'got\n'
  first.kill()  # Not waited for: a zombie is dead, too.
  until(lambda: leases.is_alive(leases.peek(tmp_path)) is False)
  start = clock.now
  acquire(ttl_seconds=600.0).check()
  assert clock.now - start < 5


@pytest.mark.parametrize('number', ['free', 'given to another process'])
def test_a_process_that_is_gone_is_replaced_at_once(
    tmp_path, acquire, clock, number
):
  process = subprocess.Popen(['true'])
  process.wait()
  if number == 'free':
    forge_here(tmp_path, pid=process.pid)
  else:
    forge_here(tmp_path, started=1)
  start = clock.now
  acquire(ttl_seconds=20.0).check()
  assert clock.now - start < 5


# --- Other machines ----------------------------------------------------------


@pytest.mark.parametrize('skew', [-1e9, 0.0, 1e9, 1e300])
def test_a_holder_elsewhere_lives_if_its_file_changes(
    tmp_path, acquire, clock, skew
):
  holder = beating(tmp_path, clock, since=time.time() + skew)
  with pytest.raises(leases.HeldError, match='process 7 on host far'):
    acquire()
  assert leases.peek(tmp_path).nonce == holder.nonce  # It was left alone.


CONTAINER = leases.this_process('', TTL).machine + '0'


@pytest.mark.parametrize(
    'holder, ttl, least',
    [
        *(({'since': time.time() + skew}, TTL, TTL) for skew in (-1e9, 0, 1e9)),
        # Another configuration: it beats more seldom than we would.
        ({'ttl_seconds': 15.0}, 2.0, 15.0),
        # Process ids of a container are not ours, though host and kernel are.
        ({'machine': CONTAINER, 'pid': 2**22 + 7}, TTL, TTL),
        # Where machines are not known, everything is watched.
        ({'machine': None, 'started': None, 'pid': 2**22 + 7}, TTL, TTL),
    ],
)
def test_a_silent_holder_elsewhere_is_replaced_in_time(
    tmp_path, acquire, clock, holder, ttl, least
):
  forge(tmp_path, **holder)
  start = clock.now
  lease = acquire(ttl_seconds=ttl)
  assert least <= clock.now - start < 1.5 * least
  assert leases.peek(tmp_path) == lease.holder


def test_our_own_suspension_proves_nothing(tmp_path, acquire, clock):
  """A whole cluster may have been frozen; only what we watched counts."""
  forge(tmp_path)
  clock.later(0.1, lambda: clock.sleep(1000.0))
  clock.later(1000.2, lambda: forge(tmp_path, beat=1))  # It has woken up too.
  with pytest.raises(leases.HeldError):
    acquire()


def test_the_threads_of_one_process_exclude_each_other(tmp_path, acquire):
  first = acquire()
  with pytest.raises(leases.HeldError, match=r'\(this one\)'):
    acquire()
  first.release()
  acquire().check()


def test_waiting_can_be_interrupted(tmp_path, acquire, clock):
  forge(tmp_path)
  asked = []
  clock.later(0.3, lambda: asked.append(1))
  start = clock.now
  with pytest.raises(Interrupted):
    acquire(ttl_seconds=60.0, interrupted=lambda: bool(asked))
  assert clock.now - start < 1
  assert leases.peek(tmp_path).host == 'far'


# --- Races -------------------------------------------------------------------


@pytest.mark.parametrize('start', ['nothing', 'dead'])
def test_of_eight_threads_one_wins(tmp_path, start):
  places = [tmp_path / str(n) for n in range(4)]
  if start == 'dead':
    for place in places:
      forge_here(place, pid=os.getpid())
  outcomes = {place: [] for place in places}
  barrier = threading.Barrier(8 * len(places))

  def run(place):
    barrier.wait()
    try:
      lease = leases.acquire(
          place, 'training in', ttl_seconds=10.0, patience=MEETING
      )
    except leases.HeldError:
      lease = None
    outcomes[place].append(lease)

  threads = [threading.Thread(target=run, args=[p]) for p in 8 * places]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  with contextlib.ExitStack() as stack:
    for place, found in outcomes.items():
      won = [stack.enter_context(lease) for lease in found if lease]
      assert (len(won), len(found)) == (1, 8)
      won[0].check()
      assert leases.peek(place).nonce == won[0].holder.nonce


def test_two_newcomers_of_other_machines_one_wins(
    tmp_path, monkeypatch, acquire, clock
):
  """The other's file appears between our writing and our second look."""
  rival = []

  def overwrite(tree):
    if not rival:
      rival.append(tree)
      return lambda: beating(tmp_path, clock, nonce='rival')

  before_writing(monkeypatch, overwrite)
  with pytest.raises(leases.HeldError, match='host far'):
    acquire()
  assert leases.peek(tmp_path).nonce == 'rival'


def test_a_newcomer_that_writes_late_gives_way(
    tmp_path, monkeypatch, acquire, clock
):
  """It saw a free file, was suspended, and wrote over one who had won."""
  winner, late = [], []

  def win_meanwhile(tree):
    if late:
      return
    late.append(tree)
    winner.append(acquire(ttl_seconds=600.0))
    # As its thread does, with the time of the other clock.
    clock.every(120.0, lambda n: winner[0].renew())
    clock.sleep(1.0)

  before_writing(monkeypatch, win_meanwhile)
  with pytest.raises(leases.HeldError):
    acquire(ttl_seconds=600.0)
  winner[0].check()
  assert leases.peek(tmp_path).nonce == winner[0].holder.nonce


def test_a_slow_disk_costs_one_more_try(monkeypatch, acquire, clock):
  writes = []

  def write_slowly(tree):
    writes.append(tree)
    clock.now += 0.2

  before_writing(monkeypatch, write_slowly)
  lease = acquire(ttl_seconds=600.0)
  assert len(writes) == 2
  lease.check()


# --- Holding -----------------------------------------------------------------


def test_the_file_changes_while_it_is_held(tmp_path, acquire):
  lease = acquire(ttl_seconds=0.25)
  seen = set()
  until(lambda: seen.add(lease_file(tmp_path).read_bytes()) or len(seen) > 3)
  assert leases.peek(tmp_path).nonce == lease.holder.nonce


def test_a_holder_that_was_replaced_learns_it_at_the_next_check(
    tmp_path, acquire
):
  lease = acquire(ttl_seconds=600.0)
  lease.check()
  forge(tmp_path, pid=11, host='new')
  before = lease_file(tmp_path).read_bytes()
  lease.renew()  # Its thread leaves the file alone, too.
  for _ in range(2):
    with pytest.raises(leases.LostError, match='process 11 on host new has'):
      lease.check()
  lease.release()
  assert lease_file(tmp_path).read_bytes() == before  # Not ours to remove.
  lease_file(tmp_path).unlink()  # The other one is done: we have lost still.
  with pytest.raises(leases.LostError, match='host new'):
    lease.check()
  assert not lease_file(tmp_path).exists()


def test_another_may_have_come_and_gone_during_a_long_suspension(
    tmp_path, acquire, clock
):
  """It trained to the end and released: our state is older than its."""
  lease = acquire(ttl_seconds=600.0)
  clock.now += 1300.0
  lease.check()  # The suspension alone loses nothing.
  clock.now += 599.0
  lease_file(tmp_path).unlink()
  lease.check()
  assert leases.peek(tmp_path).nonce == lease.holder.nonce
  clock.now += 701.0
  lease_file(tmp_path).unlink()
  with pytest.raises(leases.LostError, match='silent for 701 s'):
    lease.check()
  assert not lease_file(tmp_path).exists()


class StoreError(Exception):
  """Not an OSError, as of some object stores."""


@pytest.mark.parametrize('error', [OSError(5, 'Input/output'), StoreError()])
@pytest.mark.parametrize('broken', ['read_bytes', 'write_json'])
def test_no_error_of_a_store_ends_the_renewal(
    tmp_path, monkeypatch, acquire, error, broken
):
  failures = []

  def fail(*unused):
    failures.append(1)
    raise error

  lease = acquire(ttl_seconds=0.25)
  with monkeypatch.context() as patch:
    patch.setattr(files, broken, fail)
    until(lambda: len(failures) > 2)
    lease.check()
  before = leases.peek(tmp_path).beat
  until(lambda: leases.peek(tmp_path).beat > before + 1)
  lease.check()


@pytest.mark.parametrize('damage', [None, b'', b'{"pid": 3}', b'[]', b'\xff'])
def test_a_lease_that_vanished_or_was_damaged_is_written_again(
    tmp_path, acquire, damage
):
  lease = acquire(ttl_seconds=600.0)
  if damage is None:
    lease_file(tmp_path).unlink()
  else:
    lease_file(tmp_path).write_bytes(damage)
  lease.check()
  assert leases.peek(tmp_path).nonce == lease.holder.nonce


def test_a_released_lease_is_gone_and_allows_nothing(tmp_path, acquire):
  with pytest.raises(RuntimeError), acquire() as lease:
    lease.check()
    raise RuntimeError
  lease.release()
  lease.renew()
  with pytest.raises(leases.LostError, match='released'):
    lease.check()
  assert not lease_file(tmp_path).exists() and leases.peek(tmp_path) is None


# --- Damage, disks and stores ------------------------------------------------


@pytest.mark.parametrize(
    'damage',
    [b'', b'{', b'[1]', b'"x"', b'\xff\xfe', b'[' * 100_000, b'{"pid": 1}'],
    ids=range(7),
)
def test_a_damaged_file_is_watched_only_where_others_may_mend_it(
    tmp_path, acquire, clock, damage, monkeypatch
):
  for shared, least, most in ((True, 4.0 / 5, 3.0), (False, 0.0, 0.5)):
    monkeypatch.setattr(leases, 'is_of_one_machine', lambda _, s=shared: not s)
    lease_file(tmp_path).write_bytes(damage)
    assert leases.peek(tmp_path) is None
    start = clock.now
    lease = acquire(ttl_seconds=4.0)
    lease.check()
    # Whoever lives would have mended it at its next beat.
    assert least < clock.now - start < most
    lease.release()


def test_a_damaged_file_of_the_living_is_watched(
    tmp_path, acquire, clock, monkeypatch
):
  monkeypatch.setattr(leases, 'is_of_one_machine', lambda _: True)
  lease = acquire(ttl_seconds=600.0)
  lease_file(tmp_path).write_bytes(b'{')
  # Its process would mend it at its next beat.
  start = clock.now
  clock.later(200.0, lease.renew)
  with pytest.raises(leases.HeldError, match=r'\(this one\)'):
    acquire(ttl_seconds=600.0)
  assert clock.now - start > 199
  # And when it has ended, nobody waits.
  lease.release()
  lease_file(tmp_path).write_bytes(b'{')
  start = clock.now
  acquire(ttl_seconds=4.0).check()
  assert clock.now - start < 0.5


def test_network_file_systems_are_of_many_machines(tmp_path, monkeypatch):
  mount = lambda place, kind: types.SimpleNamespace(
      mountpoint=str(place), fstype=kind
  )
  mounts = [mount('/', 'ext4'), mount(tmp_path / 'net', 'nfs4')]
  mounts += [mount(tmp_path / 'net' / 'scratch', 'xfs')]
  mounts += [mount(tmp_path / 'twice', 'xfs'), mount(tmp_path / 'twice', 'nfs')]
  monkeypatch.setattr(psutil, 'disk_partitions', lambda all: mounts)
  found = {
      name: leases.is_of_one_machine(tmp_path / name)
      for name in ('', 'net', 'net/run', 'network', 'net/scratch/a', 'twice')
  }
  assert [name for name, here in found.items() if not here] == [
      *('net', 'net/run', 'twice')
  ]


def test_fields_of_no_sense_are_damage(tmp_path):
  changes = [('pid', x) for x in ('x', 0, -1, 1 << 40)]
  changes += [('nonce', None), ('beat', 'x'), ('since', '?'), ('machine', 3)]
  changes += [('ttl_seconds', x) for x in (1e9, -1.0)]
  for key, value in changes:
    forge(tmp_path, **{key: value})
    assert leases.peek(tmp_path) is None, (key, value)
  holder = forge(tmp_path)  # But a later version may add some.
  files.write_json(lease_file(tmp_path), {**holder._asdict(), 'mood': 'fine'})
  assert leases.peek(tmp_path) == holder


def test_a_damaged_file_that_is_mended_has_a_holder(
    tmp_path, acquire, clock, monkeypatch
):
  """As when a file was read while it was being written, elsewhere."""
  monkeypatch.setattr(leases, 'is_of_one_machine', lambda _: False)
  lease_file(tmp_path).write_bytes(b'{"pid"')
  clock.later(0.2, lambda: forge(tmp_path))
  with pytest.raises(leases.HeldError, match='host far'):
    acquire()


@pytest.mark.parametrize('ttl', [0.0, -1.0, 601.0])
def test_a_time_to_live_of_no_sense_is_refused(acquire, ttl):
  with pytest.raises(ValueError, match='ttl_seconds'):
    acquire(ttl_seconds=ttl)


# --- Locks of one machine ----------------------------------------------------


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path, python):
  code = (
      'import sys, time\n'
      'from codistill_jax.storage import leases\n'
      'with leases.exclusive(sys.argv[1], "preparing"):\n'
      '  print("in", flush=True)\n'
      '  time.sleep(1000)\n'
  )
  process = subprocess.Popen(
      [python, '-c', code, str(tmp_path / 'new')],
      cwd=tiny_run.ROOT,
      stdout=subprocess.PIPE,
      text=True,
  )
  with process, contextlib.ExitStack() as stack:
    stack.callback(process.kill)
    assert process.stdout.readline() == 'in\n'
    with pytest.raises(
        leases.HeldError, match=r'Another process is preparing .*new'
    ):
      stack.enter_context(leases.exclusive(tmp_path / 'new', 'preparing'))
    process.kill()
    process.wait(PATIENCE)
    with leases.exclusive(tmp_path / 'new', 'preparing'):
      pass
