"""The writing half of `CheckpointExchange`: publications of one group.

The training loop is held for a device-to-host copy. A thread serialises,
uploads and prunes; at most one publication is being written and one waits. What
the file system refuses is tried again, and training goes on.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from codistill_jax.base import Variables, cast_floats, host_copy
from codistill_jax.exchange import publications
from codistill_jax.exchange.protocol import Plan
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.background import Troubles, Turns
from codistill_jax.storage.leases import LostError

RESTART_FILE = 'restart_step.json'
READING_FILE = 'reading.json'

_DOING = 'publishing'
_FIRST_RETRY_SECONDS = 1.0
_SLOWEST_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 20.0  # For what a full disk still holds up at the end, ...
_SLOW_SECONDS = 280.0  # ... and how much longer a slow one has.
_JOIN_SECONDS = 20.0  # For the thread, which has nothing to write any more.

_Waiting = tuple[Publication, Variables]


class Publisher:
  """Writes and prunes the publications of one group.

  Attributes:
    newest: The newest publication that is complete, made by this process.
    failures: How often the file system refused one.
  """

  def __init__(
      self,
      root: epath.Path,
      group_id: int,
      readers: Sequence[int],
      *,
      plan: Plan,
      identity: Mapping[str, str],
      keep: int,
      reader_seconds: float,
      check_lease: Callable[[], None],
      interrupted: Callable[[], bool],
      troubles: Troubles,
      turns: Turns,
  ):
    """Starts the thread.

    Args:
      root: The directory of the exchange.
      group_id: This group.
      readers: The groups that learn from it.
      plan: Interval, mode and dtypes.
      identity: What the readers must share.
      keep: Publications to keep at least.
      reader_seconds: How long a publication is kept that somebody reads.
      check_lease: Raises if another process has taken this group over.
      interrupted: True gives up waiting for the disk.
      troubles: Is told what the disk refuses.
      turns: Of those who hold copies of variables.
    """
    self._turns = turns
    self.newest: Publication | None = None
    self.failures = 0
    self._root = root
    self._group_id = group_id
    self._readers = tuple(readers)
    self._plan = plan
    self._identity = dict(identity)
    self._keep = keep
    self._marks = _ReadingMarks(root, readers, reader_seconds)
    self._check_lease = check_lease
    self._interrupted = interrupted
    self._troubles = troubles
    self._directory = publications.group_directory(root, group_id)
    self._restart_step: int | None = None
    self._changed = threading.Condition()
    self._waiting: list[_Waiting] = []
    self._spare: Variables | None = None  # A copy whose memory is free.
    self._busy: int | None = None  # The step that is being written.
    self._failing = False  # Whether the last try was refused.
    self._closing = False
    self._given_up = False
    self._error: BaseException | None = None
    # A daemon: a file system that hangs must not keep the process alive.
    self._thread = threading.Thread(
        target=self._run, name='publish', daemon=True
    )
    self._thread.start()

  def publish(self, step: int, variables: Variables) -> None:
    """Takes a copy to be written; raises what writing before has raised."""
    self.raise_error()
    if self._plan.mode == 'lockstep':
      # Every one is needed, so a disk that is slower than the interval holds
      # training up; else copies would pile up in memory.
      with self._changed:
        while self._waiting and not self._error and not self._interrupted():
          self._changed.wait(0.1)
    publication = Publication(self._group_id, step, time.time(), self._identity)
    with self._changed:
      if self._plan.mode == 'freshest' and self._waiting:
        # Nobody needs what this one is newer than; it goes before the copy.
        _, self._spare = self._waiting.pop()
        self._waiting.clear()
      spare, self._spare = self._spare, None
    copy = host_copy(variables, into=spare)
    with self._changed:
      self._waiting.append((publication, copy))
      self._changed.notify_all()

  def raise_error(self) -> None:
    """Raises what a write raised, unless it was the file system's refusal."""
    with self._changed:
      error, self._error = self._error, None
    if error is not None:
      raise error

  def flush(self, seconds: float = 3600.0, up_to: int | None = None) -> bool:
    """Waits until nothing waits to be written; false if it took longer.

    Args:
      seconds: How long to wait.
      up_to: Only for publications up to that step.
    """
    with self._changed:
      return self._changed.wait_for(
          lambda: not self._unwritten(up_to) or not self._thread.is_alive(),
          seconds,
      )

  def _unwritten(self, up_to: int | None = None) -> bool:
    steps = [publication.step for publication, _ in self._waiting]
    steps += [] if self._busy is None else [self._busy]
    return any(up_to is None or step <= up_to for step in steps)

  def checkpointed(self, step: int) -> None:
    """Tells the writers of other groups where this one may restart."""
    if step == self._restart_step:
      return
    doing = 'saying where a restart may begin'
    try:
      files.write_json(self._directory / RESTART_FILE, {'step': step})
    except OSError as e:
      self._troubles.failed(doing, e)  # Peers keep more than is needed.
      return
    self._troubles.worked(doing)
    self._restart_step = step

  def close(self) -> None:
    """Waits for what is under way, within limits; raises what it raised.

    Raises:
      OSError: In lockstep, if a publication could not be written: peers wait
        for it. Otherwise it is only said.
    """
    with self._changed:
      self._closing = True
      self._changed.notify_all()
      deadline = time.monotonic() + _CLOSE_SECONDS
      while self._unwritten() and not self._error:
        # What is only slow is waited for, if not for ever.
        limit = deadline + (0 if self._failing else _SLOW_SECONDS)
        left = limit - time.monotonic()
        if left <= 0:
          break
        self._changed.wait(min(left, 0.5))
      done = not self._unwritten()
      self._given_up = True
      self._waiting.clear()
      self._changed.notify_all()
    if done:
      self._thread.join(_JOIN_SECONDS)
    self.raise_error()
    if not done and self._plan.mode == 'lockstep':
      raise TimeoutError(
          f'group {self._group_id} could not publish to {self._directory}'
          f' within {_CLOSE_SECONDS:g} s'
          f'{"".join(f": {t.reason}" for t in self._troubles.now)}'
      )

  @property
  def finished(self) -> bool:
    """Whether nothing more can be written."""
    return not self._thread.is_alive()

  # -- In the thread ----------------------------------------------------------

  def _run(self) -> None:
    while True:
      with self._changed:
        while not self._waiting and not self._closing:
          self._changed.wait()
        if not self._waiting:
          return
        publication, variables = self._waiting.pop(0)
        self._busy = publication.step
        self._changed.notify_all()
      try:
        self._write_until_done(
            publication, cast_floats(variables, self._plan.publish_dtype)
        )
      except BaseException as e:  # The training loop raises it.
        with self._changed:
          self._error = None if self._given_up else e
      finally:
        with self._changed:
          self._spare = variables
          del variables
          self._busy = None
          self._failing = False
          self._changed.notify_all()

  def _write_until_done(
      self, publication: Publication, variables: Variables
  ) -> None:
    """Tries again what is refused, unless something newer waits."""
    pause = _FIRST_RETRY_SECONDS
    while not self._write(publication, variables):
      # The file system may be full of publications that readers have left.
      self._prune()
      with self._changed:
        self._failing = True
        if self._closing:
          pause = min(pause, _FIRST_RETRY_SECONDS)
        # One that is closing tries again at once, and then soon.
        wait_for = self._overtaken if self._closing else self._hurried
        self._changed.wait_for(wait_for, pause)
        if self._overtaken():
          return
        self._failing = False  # This try may be slow again.
      pause = min(2 * pause, _SLOWEST_RETRY_SECONDS)
    self._prune()

  def _write(self, publication: Publication, variables: Variables) -> bool:
    try:
      with self._turns.turn():
        self._check_lease()
        written = publications.write(self._root, publication, variables)
    except (FloatingPointError, LostError):
      raise
    except Exception as e:  # Whatever a library makes of a disk that fails.
      self.failures += 1
      self._troubles.failed(_DOING, e)
      return False
    self._troubles.worked(_DOING)
    self.newest = written
    return True

  def _hurried(self) -> bool:
    return self._closing or self._overtaken()

  def _overtaken(self) -> bool:
    """Whether nobody needs any more what could not be written."""
    newer = self._plan.mode == 'freshest' and bool(self._waiting)
    return newer or self._given_up

  def _prune(self) -> None:
    doing = 'deleting old publications'
    try:
      self._delete_old()
    except OSError as e:
      self._troubles.failed(doing, e)
    else:
      self._troubles.worked(doing)

  def _delete_old(self) -> None:
    steps = checkpoints.completed_steps(self._directory)
    old = steps[: -self._keep]
    if self._plan.mode == 'lockstep' and self._readers:
      needed = min(map(self._needed_by, self._readers))
      old = [step for step in old if step < needed]
    read_now = lambda: self._marks.read_now(self._group_id)
    read = read_now()
    for step in old:
      # A reader sets its mark and then looks whether the step is there; the
      # step is taken away and then the marks are looked at. So one of the two
      # sees the other.
      if step not in read:
        checkpoints.delete_unless(
            self._directory, step, lambda step=step: step in read_now()
        )

  def _needed_by(self, reader: int) -> int:
    """The oldest publication that a reader may ask for after a restart."""
    path = publications.group_directory(self._root, reader) / RESTART_FILE
    try:
      return self._plan.keep_from(int(json.loads(path.read_text())['step']))
    except (OSError, ValueError, KeyError, TypeError):
      return 0  # It would start from the beginning, for all that is known.


class _ReadingMarks:
  """What readers are reading at this moment, by the marks they set."""

  def __init__(
      self, root: epath.Path, readers: Sequence[int], limit_seconds: float
  ):
    self._root = root
    self._readers = tuple(readers)
    self._limit = limit_seconds
    # By our own clock; those of other hosts may be wrong.
    self._seen: dict[tuple[str, str], float] = {}
    self._last: dict[str, dict] = {}

  def read_now(self, group_id: int) -> set[int]:
    """The steps of `group_id` that a reader within its time limit reads."""
    steps, now, seen = set(), time.monotonic(), {}
    for path, mark in self._all_marks():
      key = (str(path), str(mark.get('nonce')))
      seen[key] = self._seen.get(key, now)
      step = mark.get('steps', {}).get(str(group_id))
      if type(step) is int and now - seen[key] <= self._limit:
        steps.add(step)
    self._seen = seen
    return steps

  def _all_marks(self) -> list[tuple[epath.Path, dict]]:
    found = []
    for reader in self._readers:
      directory = publications.group_directory(self._root, reader)
      # One for each process of the reader.
      for name in files.names(directory):
        if name.endswith(READING_FILE):
          mark = self._mark(directory / name)
          if isinstance(mark.get('steps'), dict):
            found.append((directory / name, mark))
    return found

  def _mark(self, path: epath.Path) -> dict:
    # Torn, as it is being replaced, or unreadable: as it was before.
    with contextlib.suppress(OSError, ValueError):
      self._last[str(path)] = files.read_json(path) or {}
    return self._last.get(str(path), {})
