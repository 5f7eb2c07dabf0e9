"""A function applied to many items by several processes, in order.

Not `concurrent.futures`: its workers outlive a parent that leaves by `os._exit`
or is killed, as each of them holds both ends of the queue that it waits at.
Here a worker holds one end of a pipe of its own, so it hears at once that its
parent has gone, and the parent that a worker has died; neither needs a signal.

Processes are spawned, not forked: the parent may have threads, and a fork of
their locks may hang. A script that asks for more than one worker therefore
needs the usual `if __name__ == '__main__'`.
"""

import collections
import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, reduction, resource_tracker
from typing import Any, TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')

# Items fetched for each worker and not yet given to the caller, at most.
_AHEAD = 4
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_NAME = 'codistill worker'
_NO_GUARD = (
    'A script that asks for several workers needs `if __name__ =='
    " '__main__':` around what it does, as each of them imports it."
)


class Workers:
  """Processes, or this one if one is enough.

  Use it in a `with` statement: at its end the processes are gone. One is
  started when an item comes and all others are busy: little work has few.
  """

  def __init__(self, number: int):
    """Starts nothing yet.

    Raises:
      ValueError: If `number` is less than 1.
      RuntimeError: In a worker, which runs the script of its parent once more
        if that has no `if __name__ == '__main__'`.
    """
    if number < 1:
      raise ValueError(f'workers must be 1 or more; got {number}.')
    if number > 1 and multiprocessing.current_process().name == _NAME:
      raise RuntimeError(_NO_GUARD)
    self._number = number
    self._processes: dict[connection.Connection, Any] = {}
    # What each was given last.
    self._functions: dict[connection.Connection, Callable] = {}
    # Each process is in one of these.
    self._starting: set[connection.Connection] = set()
    self._working: set[connection.Connection] = set()
    self._idle: list[connection.Connection] = []

  def __enter__(self) -> 'Workers':
    return self

  def __exit__(self, *unused: Any) -> None:
    self._stop()

  def map(
      self, function: Callable[[Item], Result], items: Iterable[Item]
  ) -> Iterator[Result]:
    """`function` of each item, in the order of the items.

    The next items are fetched while the workers are busy, a bounded number. An
    error comes where its result would have come: what is asked for before it
    does not depend on the number of workers.

    Args:
      function: Can be pickled; sent to each worker once for each `map`.
      items: Can be pickled; iterated over in this process.

    Raises:
      Whatever the function or the items do; OSError if a worker dies.
    """
    if self._number == 1:
      yield from map(function, items)
      return
    while self._working:  # At what a `map` that was given up has asked for.
      self._hear()
    yield from self._in_order(function, _Feed(items))

  def _in_order(self, function: Callable, feed: '_Feed') -> Iterator[Any]:
    """What keeps the workers busy comes first, waiting for them last."""
    ready: collections.deque[tuple[int, Any]] = collections.deque()
    done: dict[int, tuple[str, Any]] = {}
    wanted = 0
    while True:
      self._hand_out(function, ready)
      room = feed.more and feed.count - wanted < _AHEAD * self._number
      if room and len(ready) < self._number - len(self._working):
        ready.extend(feed.fetch())
      elif wanted in done:
        yield _value(*done.pop(wanted))
        wanted += 1
      elif room and len(ready) < self._number and not self._heard(0):
        ready.extend(feed.fetch())
      elif ready or self._working:
        done.update(self._hear())
      elif feed.error is not None:
        raise feed.error
      else:
        return

  def _hand_out(self, function: Callable, ready: collections.deque) -> None:
    while ready and self._idle:
      pipe = self._idle.pop()
      if self._functions.get(pipe) is not function:
        self._send(pipe, ('function', function))
        self._functions[pipe] = function
      self._send(pipe, ('item', ready.popleft()))
      self._working.add(pipe)
    # Side by side: each takes a while to begin.
    while (
        len(self._starting) < len(ready) and len(self._processes) < self._number
    ):
      self._start()

  def _heard(self, timeout: float | None) -> list[connection.Connection]:
    return connection.wait(self._starting | self._working, timeout)

  def _hear(self) -> dict[int, tuple[str, Any]]:
    """Waits for workers; what they have done, by the number of the item."""
    done = {}
    for pipe in self._heard(None):
      message = self._receive(pipe)
      self._starting.discard(pipe)
      self._working.discard(pipe)
      self._idle.append(pipe)
      if message is not None:
        number, kind, content = message
        done[number] = kind, content
    return done

  def _send(self, pipe: connection.Connection, message: Any) -> None:
    try:
      pipe.send(message)
    except OSError:
      raise self._death(pipe) from None

  def _receive(self, pipe: connection.Connection) -> Any:
    try:
      return pipe.recv()
    except (EOFError, OSError):
      raise self._death(pipe) from None

  def _death(self, pipe: connection.Connection) -> OSError:
    process = self._processes[pipe]
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
      error = OSError(
          f'A worker process ended by signal {-code}, which the system does'
          ' when memory is short; the same command goes on from the last whole'
          ' shard, perhaps with fewer --workers.'
      )
      error.errno = errno.EAGAIN  # It may pass.
      return error
    hint = f' {_NO_GUARD}' if pipe in self._starting else ''
    return OSError(
        f'A worker process ended with status {code}; what it wrote above says'
        f' why.{hint}'
    )

  def _start(self) -> None:
    context = multiprocessing.get_context('spawn')
    # It would unblock the signals below when it starts by itself.
    resource_tracker.ensure_running()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs,), name=_NAME, daemon=True
    )
    with _blocked(_SIGNALS):
      process.start()
    theirs.close()  # Or the death of the worker would go unheard.
    self._processes[ours] = process
    self._starting.add(ours)

  def _stop(self) -> None:
    # Nothing that a worker does needs to be brought to an end.
    for process in self._processes.values():
      process.kill()
    for pipe, process in self._processes.items():
      process.join()
      pipe.close()
    for held in (
        self._processes,
        self._functions,
        self._starting,
        self._working,
        self._idle,
    ):
      held.clear()


class _Feed:
  """Items and their numbers; what goes wrong with them is kept for later."""

  def __init__(self, items: Iterable[Any]):
    self._items = iter(items)
    self.count = 0
    self.more = True
    self.error: Exception | None = None

  def fetch(self) -> list[tuple[int, Any]]:
    """The next one, if there is one."""
    try:
      item = next(self._items)
    except StopIteration:
      self.more = False
      return []
    except Exception as e:
      self.more, self.error = False, e
      return []
    self.count += 1
    return [(self.count - 1, item)]


def _value(kind: str, content: Any) -> Any:
  if kind == 'error':
    raise content
  return content


@contextlib.contextmanager
def _blocked(signals: set[int]) -> Iterator[None]:
  """Child processes inherit it: what is sent to all of them is for us alone."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: connection.Connection) -> None:
  """The life of a worker: until its parent closes the pipe, or is gone."""
  function = None
  try:
    pipe.send(None)  # Ready.
    while True:
      kind, content = pipe.recv()
      if kind == 'function':
        function = content
        continue
      number, item = content
      pipe.send_bytes(_outcome(function, number, item))
  except (EOFError, OSError):
    os._exit(0)  # Nothing is left to be cleaned up, or to be said.


def _outcome(function: Callable, number: int, item: Any) -> Any:
  """The message (number, 'result' or 'error', content), pickled."""
  try:
    return reduction.ForkingPickler.dumps((number, 'result', function(item)))
  except Exception as e:
    e.add_note(f'In a worker process:\n{traceback.format_exc()}')
    return reduction.ForkingPickler.dumps((number, 'error', _sendable(e)))


def _sendable(error: Exception) -> Exception:
  """The error, or one that says the same where it cannot be sent."""
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:  # Of classes of others; whatever their code does.
    return RuntimeError('\n'.join([repr(error), *error.__notes__]))
  return error
