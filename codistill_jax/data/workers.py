"""A function applied to many items by several processes, in order.

Not `concurrent.futures`: its workers outlive a parent that leaves by `os._exit`
or is killed, as each of them holds both ends of the queue that it waits at.
Here a worker holds one end of a pipe of its own, so it hears at once that its
parent has gone, and the parent that a worker has died; neither needs a signal.

Processes are spawned, not forked: the parent may have threads, and a fork of
their locks may hang. A script that asks for more than one worker therefore
needs the usual `if __name__ == '__main__'`.
"""

import contextlib
import errno
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')

# Items that wait in the parent for an earlier one to be done, for each worker.
_AHEAD = 4
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Workers:
  """Processes, or this one if one is enough.

  Use it in a `with` statement: at its end the processes are gone. One is
  started when an item comes and all others are busy: little work has few.
  """

  def __init__(self, number: int):
    """Starts nothing yet.

    Raises:
      ValueError: If `number` is less than 1.
    """
    if number < 1:
      raise ValueError(f'workers must be 1 or more; got {number}.')
    self._number = number
    self._processes: dict[connection.Connection, Any] = {}
    self._busy: set[connection.Connection] = set()

  def __enter__(self) -> 'Workers':
    return self

  def __exit__(self, *unused: Any) -> None:
    self._stop()

  def map(
      self, function: Callable[[Item], Result], items: Iterable[Item]
  ) -> Iterator[Result]:
    """`function` of each item, in the order of the items.

    The next items are fetched while the workers are busy, a bounded number.

    Args:
      function: Can be pickled; sent to each worker once for each `map`.
      items: Can be pickled; iterated over in this process.

    Raises:
      Whatever the function does; OSError if a worker dies.
    """
    if self._number == 1:
      yield from map(function, items)
      return
    while self._busy:  # With what a `map` that was given up has asked for.
      self._next_results()
    for pipe in self._processes:
      self._send(pipe, ('function', function))
    yield from self._in_order(function, enumerate(items))

  def _in_order(
      self, function: Callable, items: Iterator[tuple[int, Any]]
  ) -> Iterator[Any]:
    done: dict[int, Any] = {}
    sent, wanted, more = 0, 0, True
    while True:
      while (
          more
          and len(self._busy) < self._number
          and sent - wanted < _AHEAD * self._number
      ):
        item = next(items, None)
        more = item is not None
        if more:
          pipe = self._idle(function)
          self._send(pipe, ('item', item))
          self._busy.add(pipe)
          sent += 1
      if wanted in done:
        yield done.pop(wanted)
        wanted += 1
      elif self._busy:
        done.update(self._next_results())
      else:
        return

  def _idle(self, function: Callable) -> connection.Connection:
    for pipe in self._processes:
      if pipe not in self._busy:
        return pipe
    pipe = self._start()
    self._send(pipe, ('function', function))
    return pipe

  def _next_results(self) -> list[tuple[int, Any]]:
    results = []
    for pipe in connection.wait(self._busy):
      self._busy.remove(pipe)
      results.append(self._receive(pipe))
    return results

  def _send(self, pipe: connection.Connection, message: Any) -> None:
    try:
      pipe.send(message)
    except OSError:
      raise self._death(pipe) from None

  def _receive(self, pipe: connection.Connection) -> tuple[int, Any]:
    try:
      kind, content = pipe.recv()
    except (EOFError, OSError):
      raise self._death(pipe) from None
    if kind == 'error':
      raise content
    return content

  def _death(self, pipe: connection.Connection) -> OSError:
    process = self._processes[pipe]
    process.join(5)
    code = process.exitcode
    how = f'by signal {-code}' if code and code < 0 else f'with status {code}'
    error = OSError(
        f'A worker process ended {how}, which the system does when memory is'
        ' short; the same command goes on from the last whole shard, perhaps'
        ' with fewer --workers.'
    )
    error.errno = errno.EAGAIN  # It may pass.
    return error

  def _start(self) -> connection.Connection:
    context = multiprocessing.get_context('spawn')
    # It would unblock the signals below when it starts by itself.
    resource_tracker.ensure_running()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs,), name='worker', daemon=True
    )
    with _blocked(_SIGNALS):
      process.start()
    theirs.close()  # Or the death of the worker would go unheard.
    self._processes[ours] = process
    return ours

  def _stop(self) -> None:
    # Nothing that a worker does needs to be brought to an end.
    for process in self._processes.values():
      process.kill()
    for pipe, process in self._processes.items():
      process.join()
      pipe.close()
    self._processes.clear()
    self._busy.clear()


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
    while True:
      kind, content = pipe.recv()
      if kind == 'function':
        function = content
        continue
      number, item = content
      pipe.send(_outcome(function, number, item))
  except (EOFError, OSError):
    os._exit(0)  # Nothing is left to be cleaned up, or to be said.


def _outcome(function: Callable, number: int, item: Any) -> tuple[str, Any]:
  try:
    return 'result', (number, function(item))
  except Exception as e:
    e.add_note(f'In a worker process:\n{traceback.format_exc()}')
    return 'error', e
