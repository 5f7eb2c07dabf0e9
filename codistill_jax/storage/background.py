"""One thread for work that may hang, and must then not hold up an exit.

The threads of `concurrent.futures` are joined when the interpreter ends: one
that reads from a dead network disk would keep the process alive for ever.
"""

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE_SECONDS = 5.0

_Task = tuple[concurrent.futures.Future, Callable[..., Any], tuple]


class Worker:
  """Runs what is submitted, in order, in a daemon thread."""

  def __init__(self, name: str):
    self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
    self._thread.start()

  def submit(
      self, function: Callable[..., Any], *args: Any
  ) -> concurrent.futures.Future:
    """`function(*args)` as a future."""
    future = concurrent.futures.Future()
    self._tasks.put((future, function, args))
    return future

  def close(self, seconds: float) -> bool:
    """Lets what was submitted end; false if that takes longer."""
    self._tasks.put(None)
    self._thread.join(seconds)
    return not self._thread.is_alive()

  def _run(self) -> None:
    while (task := self._tasks.get()) is not None:
      future, function, args = task
      if not future.set_running_or_notify_cancel():
        continue
      try:
        future.set_result(function(*args))
      except BaseException as e:  # Raised by `result`.
        future.set_exception(e)
      # Or the last arguments and results would live until the next task.
      del task, future, function, args


class Turns:
  """Lets threads hold large copies one after another; unless one hangs."""

  def __init__(self):
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def turn(self) -> Iterator[None]:
    """Waits for the others, but not for ever: a dead disk must not halt all."""
    mine = self._lock.acquire(timeout=_PATIENCE_SECONDS)
    try:
      yield
    finally:
      if mine:
        self._lock.release()
