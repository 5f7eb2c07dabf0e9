"""Background work: one writer with retries and back-off, and what it needs.

Whoever hands something to a `BackgroundWriter` goes on at once. A disk that
fails is tried again until it works, or until something newer takes the place of
what waits. `Troubles` says what fails at the moment, `Patience` holds all time
limits of storage and exchange.

All threads here are daemons. Those of `concurrent.futures` are joined when the
interpreter ends: one that hangs in a dead network disk would keep the process
alive for ever.
"""

import atexit
import collections
import concurrent.futures.thread
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging


@dataclasses.dataclass(frozen=True)
class Patience:
  """Time limits of storage and exchange, in seconds; tests pass short ones.

  Attributes:
    retry: First pause after a failure; each further one is twice as long, but
      no longer than this while somebody waits for the end.
    longest_retry: Longest pause.
    hold: How long training is held up so that fewer states are skipped, where
      the disk is slower than they come.
    failing: How long a disk that fails is tried when there is nothing else left
      to do: at the last step, or when the process was asked to stop.
    slow: How long one that is only slow is waited for, at the end of the
      exchange.
    join: How long a thread may take to end that has nothing left to do.
    turn: How long one holder of large copies waits for another.
    lease_settle: From writing a lease to reading it again. A newcomer that
      takes longer to write starts over, so it must be longer than a write
      mostly takes.
    remote_lease_settle: The same in an object store.
    lease_poll: Longest pause between two looks at a lease.
    settle: How long a resume checkpoint waits for the publications before it.
    poll: First pause between two looks for a publication.
    longest_poll: Longest one.
    out_of_order: How long a publication may stay invisible after a later one of
      the same peer is seen, as on NFS.
    read: How long a read under way may take when the exchange is closed.
    answer: How long what one peer has published may take to be listed or read,
      before the other peers go first.
  """

  retry: float = 1.0
  longest_retry: float = 30.0
  hold: float = 2.0
  failing: float = 20.0
  slow: float = 300.0
  join: float = 5.0
  turn: float = 5.0
  lease_settle: float = 0.1
  remote_lease_settle: float = 2.0
  lease_poll: float = 0.5
  settle: float = 5.0
  poll: float = 0.05
  longest_poll: float = 5.0
  out_of_order: float = 60.0
  read: float = 10.0
  answer: float = 30.0


DEFAULT_PATIENCE = Patience()


class Interrupted(RuntimeError):
  """A wait was given up because the process was asked to stop."""


class Trouble(NamedTuple):
  """A failure that lasts.

  Attributes:
    doing: What fails, such as 'saving a resume checkpoint'.
    reason: Why it failed last, in one line.
    since: Unix seconds of the first failure in a row.
    count: Failures in a row.
  """

  doing: str
  reason: str
  since: float
  count: int  # type: ignore[assignment]


class Troubles:
  """Keeps what a process cannot do at the moment; safe from any thread.

  A full disk fails at every save: it is said once when that begins and once
  when it ends, so that the log is not filled.
  """

  def __init__(self, who: str = ''):
    """Begins without troubles.

    Args:
      who: Stands before every line of the log, such as 'group 3: '.
    """
    self._who = who
    self._lock = threading.Lock()
    self._now: dict[str, Trouble] = {}
    self.failures = 0

  def failed(self, doing: str, error: BaseException) -> None:
    """Notes a failure; says so if it is the first in a row."""
    reason = ' '.join(str(error).split()) or type(error).__name__
    with self._lock:
      self.failures += 1
      before = self._now.get(doing)
      since, count = (before.since, before.count) if before else (0.0, 0)
      self._now[doing] = Trouble(doing, reason, since or time.time(), count + 1)
    if before is None:
      logging.warning(
          '%s%s fails (%s); training goes on, and it is tried again',
          self._who,
          doing,
          reason,
      )

  def worked(self, doing: str) -> None:
    """Notes a success; says so if it failed before."""
    with self._lock:
      before = self._now.pop(doing, None)
    if before is not None:
      logging.warning(
          '%s%s works again, after %d failures', self._who, doing, before.count
      )

  @contextlib.contextmanager
  def noted(
      self, doing: str, passing: tuple[type[Exception], ...] = (OSError,)
  ) -> Iterator[None]:
    """Notes whether a block works.

    Args:
      doing: What the block does.
      passing: The errors that end the block, and no more.
    """
    try:
      yield
    except passing as e:
      self.failed(doing, e)
    else:
      self.worked(doing)

  @property
  def now(self) -> tuple[Trouble, ...]:
    """Returns what fails at this moment, the oldest first."""
    with self._lock:
      return tuple(sorted(self._now.values(), key=lambda t: t.since))


class Unwritten(NamedTuple):
  """Steps that a `BackgroundWriter` has given up.

  Attributes:
    steps: What was not written, the oldest first.
    error: Why; None if it only took too long.
  """

  steps: tuple[int, ...]
  error: OSError | None


class _Work(NamedTuple):
  step: int
  item: Any


class BackgroundWriter:
  """Writes one thing at a time, in a thread that retries with back-off.

  Attributes:
    saved: The step that was written last, or None. A step that is saved,
      being written or waiting is not taken once more.
    dropped: How many steps gave way to newer ones.
  """

  def __init__(
      self,
      write: Callable[[int, Any], None],
      doing: str,
      troubles: Troubles,
      *,
      room: int | None = 1,
      patience: Patience = DEFAULT_PATIENCE,
      interrupted: Callable[[], bool] = lambda: False,
  ):
    """Starts no thread before there is something to write.

    Args:
      write: `write(step, item)`, called in the thread. An OSError is tried
        again; what else it raises, the next call of the owner raises.
      doing: The name of this as a trouble.
      troubles: Where a disk that fails is noted.
      room: How many may wait behind the one that is being written. If there are
        more, the oldest gives way, be it the one whose write fails. So 1 writes
        the newest. None: every one is needed, and `put` waits until nothing
        waits.
      patience: Time limits: `retry`, `longest_retry`, `hold`, `failing`,
        `join`.
      interrupted: Polled where `put` waits without limit; true ends that.
    """
    self.saved: int | None = None
    self.dropped = 0
    self._write = write
    self._doing = doing
    self._troubles = troubles
    self._room = room
    self._patience = patience
    self._interrupted = interrupted
    # All below is read and written under this condition.
    self._changed = threading.Condition()
    self._thread: threading.Thread | None = None
    self._waiting: collections.deque[_Work] = collections.deque()
    self._busy: int | None = None  # The step that is being written.
    self._error: OSError | None = None  # Why it is not yet written.
    self._failure: BaseException | None = None  # To raise in the owner.
    self._hurried = 0  # How many wait for the end.
    self._abandoned = self._closed = False

  def put(self, step: int, item: Any) -> None:
    """Hands something over; raises what a write before raised.

    Where there is no room because the disk is slow, it gets a moment: fewer
    steps are skipped then.
    """
    with self._changed:
      self.raise_failure()
      if self._closed:
        raise ValueError(
            f'{self._doing} of step {step}, after it was closed; make a new'
            ' one for another run'
        )
      if self._has(step):
        return
      self._make_room()
      self.raise_failure()  # There may be one by now.
      self._waiting.append(_Work(step, item))
      if self._thread is None:
        self._thread = threading.Thread(
            target=self._run, name=self._doing, daemon=True
        )
        self._thread.start()
      self._changed.notify_all()

  def withdraw(self) -> Any:
    """Takes back the newest that waits, so that its memory can be used again.

    Returns:
      The item, or None if nothing waits, or if every one is needed.
    """
    with self._changed:
      if self._room is None or not self._waiting:
        return None
      self.dropped += 1
      return self._waiting.pop().item

  def wait(
      self,
      failing: float | None = None,
      slow: float = math.inf,
      up_to: int | None = None,
  ) -> bool:
    """Waits until all is written; false if that takes too long.

    Args:
      failing: Seconds to wait for a write that has failed; `patience.failing`
        by default. It is tried at once, and more often meanwhile.
      slow: Seconds to wait for one that has not.
      up_to: Only for steps up to this one.

    Raises:
      What `write` raised, unless it was an OSError.
    """
    start = time.monotonic()
    failing = self._patience.failing if failing is None else failing
    with self._changed:
      self._hurried += 1
      self._changed.notify_all()
      try:
        while self._unwritten(up_to):
          limit = slow if self._error is None else failing
          left = start + limit - time.monotonic()
          if left <= 0:
            return False
          self._changed.wait(None if left == math.inf else left)
      finally:
        self._hurried -= 1
    self.raise_failure()
    return True

  def finish(self, failing: float | None = None) -> Unwritten | None:
    """Waits as `wait` does, then gives up what is not written, if anything."""
    return None if self.wait(failing) else self.give_up()

  def give_up(self) -> Unwritten | None:
    """Drops what is not written; returns it, or None if there is nothing."""
    with self._changed:
      steps = self._unwritten()
      if not steps:
        return None
      self._abandoned = self._busy is not None
      self._waiting.clear()
      self._changed.notify_all()
      return Unwritten(steps, self._error)

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
      thread = self._thread
    if thread is not None:
      thread.join(self._patience.join)

  @property
  def finished(self) -> bool:
    """Returns whether nothing is written any more, nor will be by itself."""
    with self._changed:
      return self._thread is None

  # --- Under the condition ---------------------------------------------------

  def _has(self, step: int) -> bool:
    return step == self.saved or step in self._unwritten()

  def _unwritten(self, up_to: int | None = None) -> tuple[int, ...]:
    steps = [work.step for work in self._waiting]
    if self._busy is not None and not self._abandoned:
      steps.insert(0, self._busy)
    return tuple(s for s in steps if up_to is None or s <= up_to)

  def _full(self) -> bool:
    return self._room is not None and len(self._waiting) >= self._room

  def _make_room(self) -> None:
    if self._room is None:
      # Or copies would pile up in memory.
      while self._waiting and not self._interrupted():
        self._changed.wait(0.1)
      return
    self._changed.wait_for(
        lambda: not self._full() or self._error, self._patience.hold
    )
    if self._full():
      self._waiting.popleft()
      self.dropped += 1

  # --- In the thread ---------------------------------------------------------

  def _run(self) -> None:
    while (work := self._next()) is not None:
      self._attend(work)
      del work  # Or it would live until the next one comes.

  def _next(self) -> _Work | None:
    with self._changed:
      while not self._waiting and not self._closed:
        self._changed.wait()
      if not self._waiting:
        self._thread = None
        return None
      work = self._waiting.popleft()
      self._busy = work.step
      self._changed.notify_all()
      return work

  def _attend(self, work: _Work) -> None:
    written, failure = False, None
    try:
      written = self._insist(work)
    except BaseException as e:  # Raised by the next call of the owner.
      failure = e
    with self._changed:
      if written:
        self.saved = work.step
      elif failure is None:
        self.dropped += 1
      elif not self._abandoned:
        self._failure = failure
        self._waiting.clear()
      self._busy, self._error, self._abandoned = None, None, False
      self._changed.notify_all()

  def _insist(self, work: _Work) -> bool:
    """Writes; false if it gave way to something newer, or was given up."""
    pause = self._patience.retry
    while True:
      try:
        with _at_work():
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
      pause = min(2 * pause, self._patience.longest_retry)

  def _pause(self, seconds: float) -> bool:
    """Waits before another try; false if there is to be none."""
    start, hurried = time.monotonic(), self._hurried
    while not self._full() and not self._abandoned:
      if self._hurried > hurried:  # Somebody has begun to wait for it.
        return True
      if self._hurried:
        seconds = min(seconds, self._patience.retry)
      left = start + seconds - time.monotonic()
      if left <= 0:
        return True
      self._changed.wait(left)
    return False


# What is at work in a thread, by its end.
_AT_WORK: set[threading.Event] = set()
_AT_EXIT_SECONDS = 10.0


@contextlib.contextmanager
def _at_work() -> Iterator[None]:
  end = threading.Event()
  _AT_WORK.add(end)
  try:
    yield
  finally:
    _AT_WORK.discard(end)
    end.set()


def _let_finish() -> None:
  # A thread that the interpreter ends in the middle of C++ aborts the process.
  start = time.monotonic()
  for end in list(_AT_WORK):
    end.wait(max(0.0, start + _AT_EXIT_SECONDS - time.monotonic()))


# Before the thread pools of others are shut (for which that module has to be
# loaded first), if there is a way to.
getattr(threading, '_register_atexit', atexit.register)(_let_finish)


def submit(
    function: Callable[..., Any], *args: Any, inline: bool = False
) -> concurrent.futures.Future:
  """Runs `function(*args)` in a thread, or at once; returns its future."""
  future: concurrent.futures.Future[Any] = concurrent.futures.Future()

  def run() -> None:
    try:
      with _at_work():
        result = function(*args)
      future.set_result(result)
    except BaseException as e:  # Raised by `result`.
      future.set_exception(e)

  if inline:
    run()
  else:
    threading.Thread(target=run, name=function.__name__, daemon=True).start()
  return future


class Mutex:
  """Lets threads hold large copies one after another, unless one hangs."""

  def __init__(self, patience: Patience = DEFAULT_PATIENCE):
    self._lock = threading.Lock()
    self._seconds = patience.turn

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Waits for the others, but not for ever: a dead disk must not halt all."""
    mine = self._lock.acquire(timeout=self._seconds)
    try:
      yield
    finally:
      if mine:
        self._lock.release()
