"""companions: a loss is noticed in time, and nothing else is a loss.

Processes are threads here; their agreement is a barrier. What depends on time
is asked of one of them alone, with a clock of the test's.
"""

import concurrent.futures
import contextlib
import queue
import socket
import threading
import time

import numpy as np
import pytest
from waits import PATIENCE, Clock

from codistill_jax.base import Agreement
from experiments import companions

LIMIT = 10 * PATIENCE  # No thread is as late as that.


class Group:
  """Companions of several processes, and what they say is lost."""

  def __init__(self, monkeypatch, count, host='localhost', limit=LIMIT):
    monkeypatch.setattr(companions, '_delay_aborts', lambda: None)
    self._limit = limit
    self.lost = [queue.Queue() for _ in range(count)]
    self._barrier = threading.Barrier(count)
    self._said = [None] * count
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      self.all = list(pool.map(lambda i: self._start(i, host), range(count)))

  def _start(self, me, host):
    return companions.watch(
        f'{host}:1',
        len(self.lost),
        me,
        Agreement(
            is_primary=me == 0,
            choose=lambda x: self._exchange(me, x)[0],
            all_true=lambda x: np.all(self._exchange(me, x), axis=0),
        ),
        limit_seconds=self._limit,
        lost=self.lost[me].put,
    )

  def _exchange(self, me, x):
    self._said[me] = x
    self._barrier.wait(PATIENCE)
    everything = list(self._said)
    self._barrier.wait(PATIENCE)
    return everything

  def die(self, me):
    """As the kernel ends the connections of a process that is killed."""
    for connection in self.all[me]._sockets:
      with contextlib.suppress(OSError):  # Who was lost has let go already.
        connection.shutdown(socket.SHUT_RDWR)

  def end(self):
    for one in self.all:
      one.close()
    for thread in threading.enumerate():
      if thread.name == 'companions':
        thread.join(PATIENCE)
    for one in self.all:
      for connection in one._sockets:
        connection.close()

  def nobody_is_lost(self):
    return all(lost.empty() for lost in self.lost)


@pytest.fixture
def group_of(monkeypatch):
  made = []

  def make(count, **kwargs):
    made.append(Group(monkeypatch, count, **kwargs))
    return made[-1]

  yield make
  for group in made:
    group.end()


def test_who_lives_is_not_lost_and_who_dies_is_at_once(group_of, monkeypatch):
  monkeypatch.setattr(companions, '_BEATS_PER_LIMIT', 10 * LIMIT)
  group = group_of(3)
  time.sleep(0.3)
  assert group.nobody_is_lost()
  group.die(2)
  assert group.lost[0].get(timeout=PATIENCE) == 'process 2 has ended'
  # Which ends process 0, and that the last one.
  group.die(0)
  assert group.lost[1].get(timeout=PATIENCE) == 'process 0 has ended'


def test_silence_is_a_loss(group_of):
  group = group_of(2, limit=0.5)
  group.all[1]._closed.set()  # Its thread ends, its connection does not.
  lost = group.lost[0].get(timeout=PATIENCE)
  assert 'process 1 has been silent' in lost


def test_who_announces_its_end_is_not_lost(group_of):
  group = group_of(2)
  group.all[1].close()
  time.sleep(0.1)
  group.all[0].close()
  group.end()
  assert group.nobody_is_lost()


@pytest.mark.parametrize('failed', [False, True])
def test_who_outlives_the_end_of_another_for_long_ends_too(
    group_of, monkeypatch, failed
):
  """A process that waits for one that is done would wait for ever."""
  monkeypatch.setattr(companions, '_AFTER_FAILURE_SECONDS', 0.1)
  # A longer limit than that is not waited for after a failure.
  group = group_of(2, limit=LIMIT if failed else 0.5)
  group.all[0]._closed.wait = (wait := Waits())
  group.all[1].close(failed=failed)
  lost = group.lost[0].get(timeout=PATIENCE)
  if failed:
    assert lost == 'process 1 has ended' and wait.seconds == [0.1]
  else:
    # On a machine that stood still, silence comes first.
    assert lost.startswith('process 1 has ')


class Waits:
  """`Event.wait` that notes how long it was to be; it does not wait."""

  def __init__(self):
    self.seconds = []

  def __call__(self, seconds):
    self.seconds.append(seconds)
    return False


# --- One process, and a clock ------------------------------------------------


class Line(Clock):
  """A connection; and the time, which passes while it is listened to."""

  def __init__(self, script):
    super().__init__()
    self._script = list(script)
    self.sent = []

  def settimeout(self, seconds):
    self._timeout = seconds

  def send(self, data):
    self.sent.append((self.now, data))

  def recv(self, size):
    del size
    what = self._script[0] if self._script else b''
    if isinstance(what, bytes):
      self._script = self._script[1:]
      return what
    if callable(what):
      self._script.pop(0)
      what(self)
      raise TimeoutError
    # A number: so many seconds of silence.
    self._script[0] -= self._timeout
    self.now += self._timeout
    if self._script[0] <= 1e-9:
      self._script.pop(0)
    raise TimeoutError


def suspended(line):
  line.now += 1000.0


def attend(monkeypatch, *script):
  """What is lost in the end, when, and how long an end was waited for."""
  line, lost = Line(script), []
  monkeypatch.setattr(companions, 'time', line)
  start = line.now
  one = companions.Companions(10.0, lambda what: lost.append(what))
  one._closed.wait = (wait := Waits())
  one._attend('process 1', line)
  return lost, line.now - start, wait.seconds, line.sent


def test_beats_are_signs_of_life_and_silence_a_loss_at_the_limit(monkeypatch):
  beats = [9.0, b'.'] * 20
  lost, seconds, _, sent = attend(monkeypatch, *beats, 100.0)
  assert lost == ['process 1 has been silent for 11 s']
  assert 10.0 < seconds - 180.0 < 12.0
  # It sends some of its own meanwhile.
  pauses = np.diff([at for at, _ in sent])
  assert {data for _, data in sent} == {b'.'} and pauses.max() < 5.0


def test_a_suspension_of_this_process_is_no_silence_of_another(monkeypatch):
  lost, seconds, *_ = attend(
      monkeypatch, 5.0, suspended, 2.0, b'.', *[9.0, b'.'] * 2, b''
  )
  assert lost == ['process 1 has ended'] and seconds > 1000.0


@pytest.mark.parametrize(
    'said, patience', [(b'', 0.0), (b'..!', 10.0), (b'.?', 2.0)]
)
def test_who_has_ended_is_waited_for_as_it_said(monkeypatch, said, patience):
  """After a failure, for long enough to fail alike."""
  script = [3.0, said, b''] if said else [3.0, b'']
  lost, _, waits, _ = attend(monkeypatch, *script)
  assert lost == ['process 1 has ended'] and waits == [patience]


def test_strangers_are_not_taken_for_processes(group_of, monkeypatch):
  listen = companions._listen

  def listen_and_be_disturbed(host):
    server = listen(host)
    port = server.getsockname()[1]
    for words in (b'GET / HTTP/1.1', b'', b'12345678'):
      with socket.create_connection((host, port)) as stranger:
        stranger.sendall(words)
    return server

  monkeypatch.setattr(companions, '_listen', listen_and_be_disturbed)
  group = group_of(2)
  assert [len(one._sockets) for one in group.all] == [1, 1]
  assert group.nobody_is_lost()


def test_where_nobody_can_connect_nobody_is_watched(
    group_of, monkeypatch, caplog
):
  def refused(*unused):
    raise ConnectionRefusedError('refused')

  monkeypatch.setattr(companions, '_connect', refused)
  group = group_of(3, limit=0.5)  # Process 0 waits so long for the others.
  assert not any(one._sockets for one in group.all)
  assert 'cannot watch each other (refused)' in caplog.text
