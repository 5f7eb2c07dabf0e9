"""A process pool that keeps the order and ends with its parent.

Processes are spawned, not forked: the parent may have threads, and a fork of
their locks may hang. A script that asks for more than one worker therefore
needs the usual `if __name__ == '__main__'`.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import process
from multiprocessing import resource_tracker
from typing import Any

# Like the builtin `map`: a function, which can be pickled, and items.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def usable_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # Not on macOS.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@contextlib.contextmanager
def process_map(workers: int) -> Iterator[Map]:
  """Yields a `map` over so many processes, or over this one for 1.

  Results come in the order of the items, which are fetched a bounded number
  ahead. An error comes where its result would have come: what is never asked
  for is no error, with any number of workers. A process is started when an item
  comes and all others are busy.

  Raises:
    ValueError: If `workers` is less than 1.
    OSError: From the map, if a worker dies.
  """
  if workers < 1:
    raise ValueError(f'workers must be 1 or more; got {workers}.')
  if workers == 1:
    yield map
    return
  _start_quiet_tracker()
  with concurrent.futures.ProcessPoolExecutor(
      workers, multiprocessing.get_context('spawn'), _end_with_parent
  ) as pool:
    try:
      yield functools.partial(_map, pool, workers + 1)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _start_quiet_tracker() -> None:
  """Starts what cleans up after us if we are killed, and would say so."""
  sys.warnoptions.append('ignore:resource_tracker')  # It inherits them.
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.pop()


def _map(
    pool: concurrent.futures.ProcessPoolExecutor,
    ahead: int,
    function: Callable[[Any], Any],
    items: Iterable[Any],
) -> Iterator[Any]:
  """Yields results in order, at most `ahead` of them under way."""
  items, error = iter(items), None
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    while True:
      while error is None and len(waiting) < ahead:
        try:
          item = next(items)
        except Exception as e:  # Also StopIteration: the last one.
          error = e
        else:
          waiting.append(pool.submit(function, item))
      if not waiting:
        break
      yield waiting.popleft().result()
  except process.BrokenProcessPool as e:
    # The pool asks the others to end, and waits: but to that signal they are
    # deaf, and the one that died may have held the lock of their queue.
    for worker in multiprocessing.active_children():
      worker.kill()
    died = OSError(
        'A worker process has died, as when memory is short; the same command'
        ' goes on, perhaps with fewer --workers. (A script that asks for'
        " several needs `if __name__ == '__main__':` around what it does.)"
    )
    died.errno = errno.EAGAIN  # It may pass.
    raise died from e
  finally:
    for future in waiting:
      future.cancel()
  if not isinstance(error, StopIteration):
    raise error


def _end_with_parent() -> None:
  """Makes a new worker deaf to signals, and end when its parent has gone.

  A worker of the stock pool outlives a parent that leaves by `os._exit` or is
  killed, as it holds both ends of the queue that it waits at.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # Sent to all, but for the parent.
  threading.Thread(target=_leave_after_parent, daemon=True).start()


def _leave_after_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)  # Nothing is left to be cleaned up, or to be said.
