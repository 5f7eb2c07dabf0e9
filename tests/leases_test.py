"""Leases: one writer at a time; the dead are replaced, the living named."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_run
from etils import epath
from waits import Clock, until

from codistill_jax.storage import files, holders, leases

TTL = 1.0

# Holds a lease until it is killed; says how that went.
HOLD = """
import sys, time
from codistill_jax.storage import leases
leases._SETTLE_SECONDS = float(sys.argv[2])
try:
  lease = leases.acquire(sys.argv[1], 'training in', ttl_seconds=600)
except leases.HeldError as e:
  print('held', e, flush=True)
  sys.exit(1)
print('got', flush=True)
time.sleep(1000)
"""


@pytest.fixture
def clock(monkeypatch):
  """The time that leases are waited for; it passes at once."""
  made = Clock()
  monkeypatch.setattr(leases, 'time', made)
  return made


@pytest.fixture
def hold():
  """Starts processes that hold, or want, the lease of a directory."""
  started = []

  def start(directory, settle_seconds=0.1):
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(directory), str(settle_seconds)],
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
def acquire(tmp_path):
  """Acquires the lease of tmp_path; what was acquired is released."""
  with contextlib.ExitStack() as stack:

    def act(directory=tmp_path, ttl_seconds=TTL, **kwargs):
      lease = leases.acquire(
          directory, 'training in', ttl_seconds=ttl_seconds, **kwargs
      )
      return stack.enter_context(lease)

    yield act


def lease_file(directory):
  return pathlib.Path(directory) / 'lease.json'


def forge(directory, **changes):
  """Writes the lease of a process of another machine; gives it."""
  own = holders.newcomer('training in', TTL)
  holder = own._replace(host='far', machine='another', pid=7)._replace(
      **changes
  )
  files.write_json(lease_file(directory), holder._asdict())
  return holder


def beating(directory, clock, seconds=0.2, **changes):
  """Another machine that lives, and whose process keeps its lease."""
  holder = forge(directory, **changes)
  beat = lambda n: forge(directory, **holder._replace(beat=n)._asdict())
  clock.every(seconds, beat)
  return holder


# --- The living --------------------------------------------------------------


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, hold, clock):
  first = hold(tmp_path)
  assert first.stdout.readline() == 'got\n'
  holder = leases.peek(tmp_path)
  assert holder.pid == first.pid
  since = time.strftime('%Y-%m-%d %H:%M', time.gmtime(holder.since))
  start = clock.now
  with pytest.raises(leases.HeldError) as e:
    leases.acquire(tmp_path, 'training in')
  assert clock.now == start  # It need not be watched: it is here.
  message = str(e.value)
  assert message.startswith(
      f'process {first.pid} on host {holder.host} has been training in'
      f' {tmp_path} since {since}'
  )
  assert message.endswith('; end it, or wait until it is done')
  assert isinstance(e.value, ValueError)


def test_a_stopped_process_of_this_machine_is_alive(tmp_path, hold):
  """SIGSTOP: it may be continued at any time, and would go on writing."""
  first = hold(tmp_path)
  assert first.stdout.readline() == 'got\n'
  first.send_signal(signal.SIGSTOP)
  time.sleep(0.1)
  # Whatever its file looks like: the process is there.
  with pytest.raises(leases.HeldError, match=f'process {first.pid} '):
    leases.acquire(tmp_path, 'training in', ttl_seconds=0.01)


def test_a_killed_process_of_this_machine_is_replaced_at_once(
    tmp_path, hold, acquire, clock
):
  first = hold(tmp_path)
  assert first.stdout.readline() == 'got\n'
  first.kill()  # Not waited for: a zombie is dead, too.
  until(lambda: holders._process_stat(first.pid)[:2] == ('Z', 1))
  start = clock.now
  acquire(ttl_seconds=600.0).check()
  assert clock.now - start < 5


def state_of(pid):
  return stat_of(pid).rpartition(')')[2].split()[0]


def test_a_process_that_is_gone_is_replaced_at_once(tmp_path, acquire, clock):
  process = subprocess.Popen(['true'])
  own = holders.newcomer('training in', TTL)
  forge(tmp_path, machine=own.machine, pid=process.pid, started=own.started)
  process.wait()
  start = clock.now
  acquire(ttl_seconds=20.0).check()
  assert clock.now - start < 5


def test_containers_of_one_kernel_are_different_machines():
  machine = holders.newcomer('training in', TTL).machine
  assert os.readlink('/proc/self/ns/pid') in machine.split()


def test_a_process_number_that_was_given_away_is_not_the_holder(
    tmp_path, acquire
):
  """Process ids come again, soon in containers; start times do not."""
  own = holders.newcomer('training in', TTL)
  parent = os.getppid()
  forge(tmp_path, machine=own.machine, pid=parent, started=1)
  acquire(ttl_seconds=600.0).check()


def test_what_an_earlier_process_of_our_number_left_is_free(tmp_path, acquire):
  own = holders.newcomer('training in', TTL)
  forge(tmp_path, machine=own.machine, pid=own.pid, started=own.started)
  acquire(ttl_seconds=600.0).check()


def test_hidden_processes_are_watched_not_taken_for_dead(
    tmp_path, monkeypatch, acquire, clock
):
  own = holders.newcomer('training in', TTL)
  forge(tmp_path, machine=own.machine, pid=os.getppid())
  monkeypatch.setattr(holders, '_process_stat', lambda pid: None)
  start = clock.now
  acquire()
  assert clock.now - start >= TTL


@pytest.mark.parametrize(
    'stat, alive',
    [
        (('R', 1, 5), True),
        (('T', 1, 5), True),  # Stopped.
        (('Z', 1, 5), False),
        (('Z', 2, 5), None),  # Its last thread may be in the middle of a write.
        (('R', 1, 6), False),  # Another process.
        (None, None),  # Hidden.
    ],
)
@pytest.mark.parametrize('foreign', [False, True])
def test_what_linux_says_of_a_process(monkeypatch, stat, alive, foreign):
  def kill(pid, number):
    assert (pid, number) == (os.getppid(), 0)
    if foreign:
      raise PermissionError

  monkeypatch.setattr(holders.os, 'kill', kill)
  stat = stat and holders._Stat(*stat)
  monkeypatch.setattr(holders, '_process_stat', lambda pid: stat)
  own = holders.newcomer('training in', TTL)
  holder = own._replace(pid=os.getppid(), started=5)
  assert holders.is_alive(holder) is alive


def test_a_process_may_have_any_name(tmp_path):
  """Its name stands in /proc before the numbers."""
  program = tmp_path / 'a) S 1 (b c)'
  program.symlink_to('/bin/sleep')
  process = subprocess.Popen([str(program), '600'])
  try:
    until(lambda: 'sleep' not in stat_of(process.pid) and state_of(process.pid))
    stat = holders._process_stat(process.pid)
    assert (stat.state in 'RSD', stat.threads) == (True, 1)
    assert stat.started >= holders._process_stat(os.getpid()).started
  finally:
    process.kill()
    process.wait()


def stat_of(pid):
  return pathlib.Path(f'/proc/{pid}/stat').read_text()


def test_the_threads_of_one_process_exclude_each_other(tmp_path, acquire):
  first = acquire()
  with pytest.raises(leases.HeldError, match=r'\(this one\)'):
    acquire()
  first.release()
  acquire().check()


def test_directories_do_not_exclude_each_other(tmp_path, acquire):
  acquire(tmp_path / 'a').check()
  acquire(tmp_path / 'b').check()


# --- Other machines ----------------------------------------------------------


@pytest.mark.parametrize('skew', [-1e9, 0.0, 1e9, 1e300])
def test_a_holder_elsewhere_lives_if_its_file_changes(
    tmp_path, acquire, clock, skew
):
  holder = beating(tmp_path, clock, since=time.time() + skew)
  with pytest.raises(leases.HeldError, match='process 7 on host far'):
    acquire()
  assert leases.peek(tmp_path).nonce == holder.nonce  # It was left alone.


@pytest.mark.parametrize('skew', [-1e9, 0.0, 1e9])
def test_a_silent_holder_elsewhere_is_replaced_in_time(
    tmp_path, acquire, clock, skew
):
  forge(tmp_path, since=time.time() + skew)
  start = clock.now
  lease = acquire()
  assert TTL <= clock.now - start < 1.5 * TTL
  assert leases.peek(tmp_path) == lease.holder


def test_a_holder_that_promised_less_is_given_its_own_time(
    tmp_path, acquire, clock
):
  """Another configuration: it beats more seldom than we would."""
  forge(tmp_path, ttl_seconds=15.0)
  start = clock.now
  acquire(ttl_seconds=2.0)
  assert clock.now - start >= 15.0


def test_a_container_of_this_machine_is_watched(tmp_path, acquire, clock):
  """Its process ids are not ours, though host and kernel are."""
  own = holders.newcomer('training in', TTL)
  forge(tmp_path, machine=own.machine + '0', pid=2**22 + 7, host=own.host)
  start = clock.now
  acquire()
  assert clock.now - start >= TTL


def test_our_own_suspension_proves_nothing(
    tmp_path, monkeypatch, acquire, clock
):
  """A whole cluster may have been frozen; only what we watched counts."""
  forge(tmp_path)
  looks = []
  read = holders.read

  def read_after_a_long_sleep(path):
    looks.append(path)
    if len(looks) == 3:
      clock.now += 1000.0
    if len(looks) == 5:
      forge(tmp_path, beat=1)  # The holder has woken up as well.
    return read(path)

  monkeypatch.setattr(holders, 'read', read_after_a_long_sleep)
  with pytest.raises(leases.HeldError):
    acquire()


def test_waiting_can_be_interrupted(tmp_path, clock):
  forge(tmp_path)
  asked = []
  clock.later(0.3, lambda: asked.append(1))
  start = clock.now
  with pytest.raises(leases.Interrupted):
    leases.acquire(
        tmp_path,
        'training in',
        ttl_seconds=60.0,
        interrupted=lambda: bool(asked),
    )
  assert clock.now - start < 1
  assert leases.peek(tmp_path).host == 'far'


def test_interrupted_on_the_last_yards_it_leaves_nothing(tmp_path, clock):
  with pytest.raises(leases.Interrupted):
    leases.acquire(tmp_path, 'training in', interrupted=lambda: True)
  assert not lease_file(tmp_path).exists()


# --- Races -------------------------------------------------------------------


@pytest.mark.parametrize('start', ['nothing', 'dead'])
def test_of_eight_threads_one_wins(tmp_path, monkeypatch, start):
  # Who is slower than that has to start over: seldom, on any machine.
  monkeypatch.setattr(leases, '_SETTLE_SECONDS', 0.5)
  places = [tmp_path / str(n) for n in range(4)]
  if start == 'dead':
    for place in places:
      forge(place, machine=holders.newcomer('', 1.0).machine, pid=os.getpid())
  outcomes = {place: [] for place in places}
  barrier = threading.Barrier(8 * len(places))

  def run(place):
    barrier.wait()
    try:
      lease = leases.acquire(place, 'training in', ttl_seconds=10.0)
    except leases.HeldError:
      lease = None
    outcomes[place].append(lease)

  threads = [threading.Thread(target=run, args=[p]) for p in 8 * places]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for place, found in outcomes.items():
    won = [lease for lease in found if lease is not None]
    try:
      assert (len(won), len(found)) == (1, 8)
      won[0].check()
      assert leases.peek(place).nonce == won[0].holder.nonce
    finally:
      for lease in won:
        lease.release()


def test_of_eight_processes_one_wins_the_lease_of_a_dead_one(tmp_path, hold):
  own = holders.newcomer('training in', TTL)
  forge(tmp_path, machine=own.machine, pid=os.getppid(), started=1)
  processes = [hold(tmp_path, settle_seconds=1.0) for _ in range(8)]
  said = [process.stdout.readline() for process in processes]
  winners = [p.pid for p, line in zip(processes, said) if line == 'got\n']
  assert len(winners) == 1
  assert leases.peek(tmp_path).pid == winners[0]
  # Who comes second is told of whom it found: the winner, or one that lost to
  # it a moment later.
  for line in said:
    named = [p.pid for p in processes if f'process {p.pid} on host' in line]
    assert line == 'got\n' or len(named) == 1


def test_two_newcomers_of_other_machines_one_wins(
    tmp_path, monkeypatch, acquire, clock
):
  """The other's file appears between our writing and our second look."""
  forge(tmp_path)
  write = holders.write
  rival = []

  def write_and_be_overwritten(path, holder):
    write(path, holder)
    if not rival:
      rival.append(beating(tmp_path, clock, nonce='rival'))

  monkeypatch.setattr(holders, 'write', write_and_be_overwritten)
  with pytest.raises(leases.HeldError, match='host far'):
    acquire()
  assert leases.peek(tmp_path).nonce == 'rival'


def test_a_newcomer_that_writes_late_gives_way(tmp_path, monkeypatch, clock):
  """It saw a free file, was suspended, and wrote over one who had won."""
  write = holders.write
  winner, late = [], []

  def write_late(path, holder):
    if late or threading.current_thread() is not threading.main_thread():
      write(path, holder)
      return
    late.append(holder)
    thread = threading.Thread(
        target=lambda: winner.append(
            leases.acquire(tmp_path, 'training in', ttl_seconds=600.0)
        )
    )
    thread.start()
    thread.join()
    # As its thread does, with the time of the other clock.
    clock.every(120.0, lambda n: winner[0]._look(renew=True))
    clock.sleep(1.0)
    write(path, holder)

  monkeypatch.setattr(holders, 'write', write_late)
  with pytest.raises(leases.HeldError):
    leases.acquire(tmp_path, 'training in', ttl_seconds=600.0)
  try:
    winner[0].check()
    assert leases.peek(tmp_path).nonce == winner[0].holder.nonce
  finally:
    winner[0].release()


def test_a_slow_disk_costs_one_more_try(tmp_path, monkeypatch, acquire, clock):
  write = holders.write
  writes = []

  def write_slowly(path, holder):
    writes.append(holder)
    clock.now += 0.2
    write(path, holder)

  monkeypatch.setattr(holders, 'write', write_slowly)
  lease = acquire(ttl_seconds=600.0)
  assert len(writes) == 2
  lease.check()


# --- Holding -----------------------------------------------------------------


def test_the_file_changes_while_it_is_held(tmp_path, acquire):
  lease = acquire(ttl_seconds=0.25)
  seen = {lease_file(tmp_path).read_bytes() for _ in range(1)}
  until(lambda: seen.add(lease_file(tmp_path).read_bytes()) or len(seen) > 3)
  assert leases.peek(tmp_path).nonce == lease.holder.nonce


def test_a_holder_that_was_replaced_learns_it_at_the_next_check(
    tmp_path, acquire
):
  lease = acquire(ttl_seconds=600.0)
  lease.check()
  forge(tmp_path, pid=11, host='new')
  with pytest.raises(leases.LostError) as e:
    lease.check()
  assert 'process 11 on host new has been training in' in str(e.value)
  assert isinstance(e.value, ValueError)
  with pytest.raises(leases.LostError):
    lease.check()  # For ever.
  lease.release()
  assert leases.peek(tmp_path).host == 'new'  # Not ours to remove.


def test_another_may_have_come_and_gone_during_a_long_suspension(
    tmp_path, acquire, clock
):
  """It trained to the end and released: our state is older than its."""
  lease = acquire(ttl_seconds=600.0)
  clock.now += 599.0
  lease_file(tmp_path).unlink()
  lease.check()
  assert lease_file(tmp_path).exists()
  clock.now += 701.0
  lease_file(tmp_path).unlink()
  with pytest.raises(leases.LostError, match='silent for 701 s'):
    lease.check()
  assert not lease_file(tmp_path).exists()


def test_a_long_suspension_alone_loses_nothing(tmp_path, acquire, clock):
  lease = acquire(ttl_seconds=600.0)
  clock.now += 1300.0
  lease.check()
  assert leases.peek(tmp_path).nonce == lease.holder.nonce


class StoreError(Exception):
  """Not an OSError, as of some object stores."""


@pytest.mark.parametrize('error', [OSError(5, 'Input/output'), StoreError()])
def test_no_error_of_a_store_ends_the_renewal(
    tmp_path, monkeypatch, acquire, error
):
  failures = []

  def fail(*unused):
    failures.append(1)
    raise error

  lease = acquire(ttl_seconds=0.25)
  with monkeypatch.context() as patch:
    patch.setattr(holders, 'read', fail)
    until(lambda: len(failures) > 2)
    lease.check()
  before = leases.peek(tmp_path).beat
  until(lambda: leases.peek(tmp_path).beat > before + 1)


def test_the_thread_of_a_replaced_holder_leaves_the_file_alone(
    tmp_path, acquire
):
  lease = acquire(ttl_seconds=0.1)
  with lease._lock:  # Or its thread might write over that once.
    forge(tmp_path, host='new')
  before = lease_file(tmp_path).read_bytes()
  time.sleep(0.3)
  assert lease_file(tmp_path).read_bytes() == before
  lease_file(tmp_path).unlink()  # The other one is done: we have lost still.
  with pytest.raises(leases.LostError, match='host new'):
    lease.check()
  assert not lease_file(tmp_path).exists()


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


def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path, monkeypatch, acquire
):
  lease = acquire(ttl_seconds=0.25)
  failures = []

  def fail(*unused):
    failures.append(1)
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_json', fail)
    until(lambda: len(failures) > 2)
    lease.check()
    patch.setattr(epath.Path('x').__class__, 'read_bytes', fail)
    until(lambda: len(failures) > 5)
    lease.check()
  before = leases.peek(tmp_path).beat
  until(lambda: leases.peek(tmp_path).beat > before + 1)
  lease.check()


def test_a_released_lease_is_gone_and_allows_nothing(tmp_path, acquire):
  lease = acquire(ttl_seconds=0.1)
  lease.release()
  lease.release()
  assert not lease_file(tmp_path).exists()
  with pytest.raises(leases.LostError, match='released'):
    lease.check()
  time.sleep(0.1)
  assert not lease_file(tmp_path).exists()  # Its thread has stopped, too.
  assert leases.peek(tmp_path) is None


def test_a_block_releases_whatever_happens_in_it(tmp_path):
  with pytest.raises(RuntimeError), leases.acquire(tmp_path, 'x') as lease:
    lease.check()
    raise RuntimeError
  assert not lease_file(tmp_path).exists()


# --- Damage, disks and stores ------------------------------------------------


DAMAGED = (
    b'',
    b'{',
    b'[1]',
    b'"x"',
    b'\xff\xfe',
    b'[' * 100_000,
    json.dumps({'pid': 1}).encode(),
)


@pytest.mark.parametrize('damage', DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_watched_then_replaced(
    tmp_path, acquire, clock, damage
):
  lease_file(tmp_path).write_bytes(damage)
  assert leases.peek(tmp_path) is None
  start = clock.now
  acquire(ttl_seconds=4.0).check()
  assert clock.now - start >= 4.0


@pytest.mark.parametrize(
    'change',
    [
        {'pid': 'x'},
        {'pid': 0},
        {'pid': -1},
        {'pid': 1 << 40},
        {'nonce': None},
        {'beat': 'x'},
        {'since': '?'},
        {'ttl_seconds': 1e9},
        {'ttl_seconds': -1.0},
        {'machine': 3},
    ],
)
def test_fields_of_no_sense_are_damage(tmp_path, change):
  forge(tmp_path, **change)
  assert leases.peek(tmp_path) is None


def test_a_damaged_file_that_is_mended_has_a_holder(tmp_path, acquire, clock):
  """As when a file was read while it was being written."""
  lease_file(tmp_path).write_bytes(b'{"pid"')
  clock.later(0.2, lambda: forge(tmp_path))
  with pytest.raises(leases.HeldError, match='host far'):
    acquire()


def test_damage_that_changes_is_a_sign_of_life(tmp_path, monkeypatch, clock):
  """Somebody writes, though it cannot be read; as in another version."""
  monkeypatch.setattr(holders, 'write', lambda *_: pytest.fail('taken over'))
  lease_file(tmp_path).write_bytes(b'')
  clock.every(1.0, lambda n: lease_file(tmp_path).write_bytes(b'%d' % n))
  start = clock.now
  with pytest.raises(leases.Interrupted):
    leases.acquire(
        tmp_path,
        'training in',
        ttl_seconds=8.0,
        interrupted=lambda: clock.now - start > 24.0,
    )


def test_a_later_version_may_add_fields(tmp_path):
  holder = forge(tmp_path)
  files.write_json(lease_file(tmp_path), {**holder._asdict(), 'mood': 'fine'})
  assert leases.peek(tmp_path) == holder


def test_a_disk_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path, acquire
):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file'):
    acquire(tmp_path / 'file' / 'group_0')


@pytest.mark.parametrize('ttl', [0.0, -1.0, 601.0])
def test_a_time_to_live_of_no_sense_is_refused(acquire, ttl):
  with pytest.raises(ValueError, match='ttl_seconds'):
    acquire(ttl_seconds=ttl)


def test_without_linux_there_is_still_one_holder(
    tmp_path, monkeypatch, acquire, clock
):
  """No /proc: everything is watched, except one's own leases."""
  monkeypatch.setattr(holders, '_machine', lambda: None)
  monkeypatch.setattr(holders, '_process_stat', lambda pid: None)
  first = acquire()
  with pytest.raises(leases.HeldError, match=r'\(this one\)'):
    acquire()
  first.release()
  forge(tmp_path, machine=None, started=None, pid=2**22 + 7)
  start = clock.now
  acquire().check()
  assert clock.now - start >= TTL


def test_an_object_store_will_do(tmp_path, monkeypatch, clock):
  """No rename, objects that appear as a whole, and a longer second look."""
  monkeypatch.setattr(files, 'is_remote', lambda path: True)

  def no_rename(*unused):
    raise NotImplementedError

  monkeypatch.setattr(type(epath.Path(tmp_path)), 'replace', no_rename)
  start = clock.now
  with leases.acquire(tmp_path, 'training in', ttl_seconds=TTL) as lease:
    assert clock.now - start >= leases._REMOTE_SETTLE_SECONDS
    with pytest.raises(leases.HeldError):
      leases.acquire(tmp_path, 'training in', ttl_seconds=TTL)
    lease.check()
  assert leases.peek(tmp_path) is None
