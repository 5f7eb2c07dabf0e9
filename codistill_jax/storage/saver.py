"""Saves in a thread, through a disk that fails for a while.

Whoever hands something over goes on at once. A disk that fails is tried again
until it works, or until something newer takes the place of what waits.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from codistill_jax.storage.troubles import Troubles

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_HURRIED_PAUSE_SECONDS = 1.0
_JOIN_SECONDS = 5.0
_HOLD_SECONDS = 2.0


class GaveUpError(OSError):
  """The disk failed for too long.

  Attributes:
    step: What could not be saved.
    error: Why.
  """

  def __init__(self, step: int, error: OSError):
    super().__init__(f'step {step} could not be saved: {error}')
    self.step = step
    self.error = error


class _Work(NamedTuple):
  step: int
  item: Any


class Saver:
  """One thread that writes the newest of what it is given.

  At most two things are kept: one that is being written and one that waits.

  Attributes:
    saved: The newest step that is on disk, or None.
  """

  def __init__(
      self,
      write: Callable[[int, Any], None],
      doing: str,
      troubles: Troubles,
  ):
    """Starts no thread yet.

    Args:
      write: `write(step, item)`, called in the thread. An OSError is tried
        again; what else it raises, the next call of the owner raises.
      doing: The name of this as a trouble.
      troubles: Where a disk that fails is noted.
    """
    self.saved: int | None = None
    self._write = write
    self._doing = doing
    self._troubles = troubles
    self._thread: threading.Thread | None = None
    # All below is read and written under this condition.
    self._changed = threading.Condition()
    self._waiting: _Work | None = None
    self._busy: int | None = None  # The step that is being written.
    self._error: OSError | None = None  # Why it is not yet written.
    self._failure: BaseException | None = None  # To raise in the owner.
    self._hurried = 0  # How many wait for the end.
    self._abandoned = self._closed = False

  def put(self, step: int, item: Any) -> None:
    """Hands something over, in place of what waits.

    What waits only because the disk is slow gets a moment to begin: few saves
    are skipped then. A step that is written or being written is not written
    once more.
    """
    self.raise_failure()
    with self._changed:
      if self._has(step):
        return
      self._changed.wait_for(
          lambda: not self._waiting or self._error, _HOLD_SECONDS
      )
      self._waiting = _Work(step, item)
      if self._thread is None:
        # A daemon: one that hangs in a dead disk must not hold up an exit.
        self._thread = threading.Thread(
            target=self._run, name='saver', daemon=True
        )
        self._thread.start()
      self._changed.notify_all()

  def wait(self, patience: float) -> None:
    """Waits until all is written.

    Args:
      patience: Seconds to go on trying while the disk fails. What is only slow
        is waited for.

    Raises:
      GaveUpError: If the disk failed for longer; what waited is dropped.
      What `write` raised, unless it was an OSError.
    """
    deadline = time.monotonic() + patience
    with self._changed:
      self._hurried += 1
      self._changed.notify_all()
      try:
        while self._has_work():
          left = deadline - time.monotonic()
          if self._error is None:
            self._changed.wait()
          elif left > 0:
            self._changed.wait(left)
          else:
            raise self._give_up(self._error)
      finally:
        self._hurried -= 1
    self.raise_failure()

  def raise_failure(self) -> None:
    """Raises what `write` raised since the last time, unless an OSError."""
    with self._changed:
      failure, self._failure = self._failure, None
    if failure is not None:
      raise failure

  def close(self) -> None:
    """Ends the thread once it has nothing to write; see `wait`."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
      thread, self._thread = self._thread, None
    if thread is not None:
      thread.join(_JOIN_SECONDS)

  def _has(self, step: int) -> bool:
    busy = None if self._abandoned else self._busy
    waiting = self._waiting.step if self._waiting else None
    return step in (self.saved, busy, waiting)

  def _has_work(self) -> bool:
    if self._failure is not None:
      return False
    busy = self._busy is not None and not self._abandoned
    return busy or self._waiting is not None

  def _give_up(self, error: OSError) -> GaveUpError:
    step = self._waiting.step if self._waiting else self._busy
    self._abandoned, self._waiting = True, None
    self._changed.notify_all()
    return GaveUpError(step, error)

  # --- in the thread ---------------------------------------------------------

  def _run(self) -> None:
    while (work := self._next()) is not None:
      try:
        written = self._insist(work)
      except BaseException as e:  # Raised by the next call of the owner.
        with self._changed:
          self._failure, self._waiting = e, None
        written = False
      with self._changed:
        if written:
          self.saved = work.step
        self._busy = None
        self._changed.notify_all()
      del work  # Or it would live until the next one comes.

  def _next(self) -> _Work | None:
    with self._changed:
      while self._waiting is None and not self._closed:
        self._changed.wait()
      work, self._waiting = self._waiting, None
      self._busy = work.step if work else None
      self._error, self._abandoned = None, False
      self._changed.notify_all()
      return work

  def _insist(self, work: _Work) -> bool:
    """Writes; false if something newer came while that failed."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
      try:
        self._write(work.step, work.item)
      except OSError as e:
        self._troubles.failed(self._doing, e)
        with self._changed:
          self._error = e
          self._changed.notify_all()
          if not self._pause(pause):
            return False
      else:
        self._troubles.worked(self._doing)
        return True
      pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

  def _pause(self, seconds: float) -> bool:
    """Waits before another try; false if there is to be none."""
    start = time.monotonic()
    while self._waiting is None and not self._abandoned:
      if self._hurried:  # Somebody waits for it.
        seconds = min(seconds, _HURRIED_PAUSE_SECONDS)
      left = start + seconds - time.monotonic()
      if left <= 0:
        return True
      self._changed.wait(left)
    return False
