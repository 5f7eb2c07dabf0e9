"""The processes of one group watch each other: if one is lost, all end.

In a collective a process waits for ever for one that died. jax notices that
itself, but late, and then aborts with pages of text; here a death is noticed
at once, a hang after a time limit, and the process can end as it chooses.

Each process keeps a connection to process 0, and both send a byte now and then.
The end of one that was not announced, or silence, is a loss; one that sees it
ends, so that its own connections tell the rest.
"""

import contextlib
import ctypes
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

import numpy as np
from absl import logging

from codistill_jax.base import Agreement

_ALIVE, _DONE, _FAILED = b'.', b'!', b'?'
_HELLO = struct.Struct('!II')  # The token, and which process.
_BEATS_PER_LIMIT = 10
# What makes one fail mostly makes the others fail, too; they may say so.
_AFTER_FAILURE_SECONDS = 2.0

Lost = Callable[[str], None]


class Companions:
  """The other processes of this one's group."""

  def __init__(self, limit_seconds: float, lost: Lost):
    """Watches nobody yet; see `watch`.

    Args:
      limit_seconds: How long one may be silent.
      lost: Called once, in a thread, with what happened to whom.
    """
    self._limit = limit_seconds
    self._lost = lost
    self._sockets: list[socket.socket] = []
    self._closed = threading.Event()
    self._said = threading.Lock()  # Never released.

  def attend(self, process_id: int, connection: socket.socket) -> None:
    """Begins to watch one that is connected."""
    self._sockets.append(connection)
    threading.Thread(
        target=self._attend,
        args=(f'process {process_id}', connection),
        name='companions',
        daemon=True,
    ).start()

  def close(self, *, failed: bool = False) -> None:
    """Announces the end of this process; nobody counts as lost any more.

    Args:
      failed: The others have to end as well, if they do not anyway.
    """
    self._closed.set()
    for connection in self._sockets:
      with contextlib.suppress(OSError):
        connection.sendall(_FAILED if failed else _DONE)
        connection.shutdown(socket.SHUT_WR)

  def _attend(self, who: str, connection: socket.socket) -> None:
    period = self._limit / _BEATS_PER_LIMIT
    connection.settimeout(period)
    patience, silent, last, sent = 0.0, 0.0, time.monotonic(), 0.0
    while not self._closed.is_set():
      try:
        if time.monotonic() - sent >= period:
          sent = time.monotonic()
          connection.send(_ALIVE)
        data = connection.recv(64)
      except TimeoutError:
        data = None
      except OSError:
        data = b''
      now = time.monotonic()
      # Not more: if this process was suspended, that was no silence.
      silent, last = silent + min(now - last, 2 * period), now
      if data:
        silent = 0.0
        if _DONE in data:
          patience = self._limit
        elif _FAILED in data:
          patience = _AFTER_FAILURE_SECONDS
      elif data == b'':
        # Without it this process gets no further, unless it is done as well.
        self._closed.wait(patience)
        self._say(f'{who} has ended')
        return
      elif silent > self._limit:
        self._say(f'{who} has been silent for {silent:.0f} s')
        return

  def _say(self, what: str) -> None:
    if not self._closed.is_set() and self._said.acquire(blocking=False):
      self._lost(what)


def watch(
    coordinator: str,
    num_processes: int,
    process_id: int,
    agreement: Agreement,
    *,
    limit_seconds: float,
    lost: Lost,
) -> Companions:
  """Watches the other processes; all of a group must call it.

  Where they cannot be connected nobody is watched, with a warning.

  Args:
    coordinator: `host:port` of process 0; it is reached at another port.
    num_processes: Processes of the group.
    process_id: This one.
    agreement: How they decide together.
    limit_seconds: How long one may be silent. One whose interpreter is held up
      for longer by a library is silent, too.
    lost: Called once, in a thread, with what happened to whom; ends the
      process.
  """
  host = coordinator.rpartition(':')[0].strip('[]')
  problem = ''
  with contextlib.ExitStack() as stack:
    server, port = None, 0
    if process_id == 0:
      try:
        server = stack.enter_context(_listen(host))
        port = server.getsockname()[1]
      except OSError as e:
        problem = str(e)
    port, token = map(
        int, agreement.choose(np.array([port, secrets.randbits(31)], np.int32))
    )
    connections = {}
    try:
      if server:
        connections = _accept(server, num_processes - 1, token, limit_seconds)
      elif port:
        connections[0] = _connect(host, port, token, process_id, limit_seconds)
    except OSError as e:
      problem = str(e)
    everywhere = agreement.all_true(np.array(bool(connections)))
  companions = Companions(limit_seconds, lost)
  if not everywhere:
    for connection in connections.values():
      connection.close()
    logging.warning(
        'The processes of the group cannot watch each other%s; jax will notice'
        ' if one is lost, and abort',
        f' ({problem})' if problem else '',
    )
    return companions
  _delay_aborts()
  for other, connection in connections.items():
    companions.attend(other, connection)
  return companions


def _listen(host: str) -> socket.socket:
  family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
  return socket.create_server(('', 0), family=family)


def _accept(
    server: socket.socket, count: int, token: int, seconds: float
) -> dict[int, socket.socket]:
  """Connections of so many processes; TimeoutError if they do not come."""
  found, deadline = {}, time.monotonic() + seconds
  with contextlib.ExitStack() as stack:
    while len(found) < count:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      connection = stack.enter_context(server.accept()[0])
      connection.settimeout(1.0)
      # Anybody may knock at a port.
      with contextlib.suppress(OSError, struct.error):
        came, process_id = _HELLO.unpack(connection.recv(_HELLO.size))
        if came == token:
          found[process_id] = connection.dup()
  return found


def _connect(
    host: str, port: int, token: int, process_id: int, seconds: float
) -> socket.socket:
  connection = socket.create_connection((host, port), timeout=seconds)
  connection.sendall(_HELLO.pack(token, process_id))
  return connection


def _delay_aborts() -> None:
  """An abort of this process is held up for some seconds.

  When process 0 dies, jax aborts the others from a thread of C++, in the same
  moment in which they notice it here. The handler of SIGABRT, called with its
  number, is `sleep`: 6 seconds, in which `lost` can end the process. Any other
  abort goes on then.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal.restype = ctypes.c_void_p
  sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
  libc.signal(signal.SIGABRT, sleep)
