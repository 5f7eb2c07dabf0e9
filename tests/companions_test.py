"""companions: a loss is noticed in time, and nothing else is a loss.

Processes are threads here; their agreement is a barrier.
"""

import concurrent.futures
import queue
import socket
import threading
import time

import numpy as np
import pytest

from codistill_jax.base import Agreement
from experiments import companions

LIMIT = 0.5


class Group:
  """Companions of several processes, and what they say is lost."""

  def __init__(self, monkeypatch, count, host='localhost', watch=None):
    monkeypatch.setattr(companions, '_delay_aborts', lambda: None)
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
        limit_seconds=LIMIT,
        lost=self.lost[me].put,
    )

  def _exchange(self, me, x):
    self._said[me] = x
    self._barrier.wait(10)
    everything = list(self._said)
    self._barrier.wait(10)
    return everything

  def die(self, me):
    """As the kernel ends the connections of a process that is killed."""
    for connection in self.all[me]._sockets:
      connection.shutdown(socket.SHUT_RDWR)

  def end(self):
    for one in self.all:
      one.close()
    for thread in threading.enumerate():
      if thread.name == 'companions':
        thread.join(10)
    for one in self.all:
      for connection in one._sockets:
        connection.close()

  def nobody_is_lost(self, *of):
    time.sleep(2 * LIMIT)
    return all(self.lost[i].empty() for i in of or range(len(self.lost)))


@pytest.fixture
def group_of(monkeypatch):
  made = []

  def make(count, **kwargs):
    made.append(Group(monkeypatch, count, **kwargs))
    return made[-1]

  yield make
  for group in made:
    group.end()


def test_who_lives_is_not_lost_and_who_dies_is_at_once(group_of):
  group = group_of(3)
  assert group.nobody_is_lost()
  start = time.monotonic()
  group.die(2)
  assert group.lost[0].get(timeout=5) == 'process 2 has ended'
  assert time.monotonic() - start < LIMIT
  # Which ends process 0, and that the last one.
  group.die(0)
  assert group.lost[1].get(timeout=5) == 'process 0 has ended'


def test_silence_is_a_loss_after_the_limit(group_of):
  group = group_of(2)
  start = time.monotonic()
  group.all[1]._closed.set()  # Its thread ends, its connection does not.
  assert 'process 1 has been silent' in group.lost[0].get(timeout=10)
  assert LIMIT / 2 < time.monotonic() - start < 5 * LIMIT


def test_who_announces_its_end_is_not_lost(group_of):
  group = group_of(2)
  group.all[1].close()
  time.sleep(LIMIT / 2)
  group.all[0].close()
  assert group.nobody_is_lost()


def test_who_outlives_the_end_of_another_for_long_ends_too(group_of):
  """A process that waits for one that is done would wait for ever."""
  group = group_of(2)
  group.all[1].close()
  assert group.lost[0].get(timeout=10) == 'process 1 has ended'


def test_after_a_failure_there_is_time_to_fail_alike(group_of, monkeypatch):
  monkeypatch.setattr(companions, '_AFTER_FAILURE_SECONDS', 3 * LIMIT)
  group = group_of(2)
  group.all[1].close(failed=True)
  assert group.nobody_is_lost()
  assert group.lost[0].get(timeout=10) == 'process 1 has ended'


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
  group = group_of(3)
  assert not any(one._sockets for one in group.all)
  assert 'cannot watch each other (refused)' in caplog.text
