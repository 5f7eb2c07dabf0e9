"""Stores of publications: a directory, a dictionary, or both.

A store knows where publications are, how long they are kept, and what a reader
may rely on; `fetching` knows which of them a group wants. All groups of a run
see the same publications; each has a store of its own, which writes for it.
"""

import contextlib
import dataclasses
import functools
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from absl import logging
from etils import epath

from codistill_jax.base import Variables, cast_floats
from codistill_jax.exchange import publications
from codistill_jax.exchange.plan import Plan, Waiting
from codistill_jax.exchange.publications import Publication, Slot
from codistill_jax.storage import checkpoints, files, leases
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    BackgroundWriter,
    Mutex,
    Patience,
    Troubles,
)

RESTART_FILE = 'restart_step.json'
READING_FILE = 'reading.json'
FAILED_FILE = 'failed.json'
# Of READING_FILE.
_MARK: dict[str, Any] = {'nonce': files.TEXT, 'steps': {...: files.WHOLE}}
_FOREVER = 3600.0  # Seconds; of a test or a notebook that flushes.

# The writers of this process that are open, by directory.
_OPEN: dict[str, 'DirectoryStore'] = {}


class Store(Protocol):
  """Where the publications of all groups are, for one of them.

  What derives from it does nothing where it says nothing.

  Attributes:
    writes: Whether this process publishes.
    at_hand: Whether reading takes no time; then it needs no thread.
    advice: What to do where a publication does not come.
    replaced: Whether another one of this process took its place.
  """

  writes: bool
  at_hand: bool
  advice: str
  replaced: bool = False

  def steps(self, group_id: int) -> list[int]:
    """Returns the steps that a group has published, ascending."""

  def read(self, group_id: int, step: int) -> Slot:
    """Reads one publication, in the dtype in which it is.

    Raises:
      checkpoints.MissingError: If it is not there, or no longer.
      checkpoints.DamagedError: If it cannot be trusted.
      checkpoints.MismatchError: If the peer trains something else.
      OSError: If the file system refuses to give it.
    """

  def check(self, publication: Publication, variables: Variables) -> None:
    """Raises ValueError if peers could not use it, by its leaves alone."""

  def write(self, publication: Publication, variables: Variables) -> None:
    """Takes one publication, and its numpy arrays for good.

    Raises:
      What writing before has raised, unless the file system only refused.
    """

  def raise_failure(self) -> None:
    """Raises what writing has raised, as `write` would."""

  def fail(self, error: Exception) -> None:
    """Tells the peers why this group will publish no more."""

  def failure(self, group_id: int) -> str:
    """Returns why a group publishes no more; '' if it may."""

  def spare(self) -> Variables | None:
    """Returns arrays whose memory the next publication may take, if any."""

  def made(self, group_id: int, step: int) -> float | None:
    """Returns when a publication was made; another one has another time."""

  def life(self, group_id: int, step: int) -> int | None:
    """Returns the life of a publication, if it is known; see `Publication`."""

  def reading(
      self, steps: Mapping[int, int]
  ) -> contextlib.AbstractContextManager[None]:
    """Keeps what is read inside, by group, from being deleted."""

  def turn(self) -> contextlib.AbstractContextManager[None]:
    """Lets one thread at a time hold copies of variables."""

  def wait(self, seconds: float) -> None:
    """Waits for something to change, but no longer than that."""

  def begin(self, step: int) -> None:
    """Takes out of the way what the group published before it began anew."""

  def restore(self, groups: Sequence[int], first: int, last: int) -> None:
    """Brings back what a run needs that goes on from step `last`."""

  def settle(self, step: int) -> None:
    """Raises OSError unless a restart from `step` will find what it needs."""

  def checkpointed(self, step: int) -> None:
    """Tells that a restart would begin at `step` or later."""

  def flush(self) -> None:
    """Waits until all is written; raises what that raised."""

  def metrics(self) -> dict[str, float]:
    """Returns the `exchange/*` values of what was published."""

  def close(self) -> None:
    """Finishes what is under way."""


# --- A directory -------------------------------------------------------------


class DirectoryStore(Store):
  """Orbax checkpoints under `root/group_<id>/<step>/`, for one group.

  A thread serialises, uploads and prunes: at most one publication is being
  written. What the file system refuses is tried again, and training goes on.

      <root>/group_<id>/restart_step.json  where a restart may begin
      <root>/group_<id>/reading.json       what is being read at this moment
      <root>/group_<id>/failed.json        why the group publishes no more
  """

  at_hand = False

  def __init__(
      self,
      root: epath.PathLike,
      group_id: int,
      num_groups: int,
      *,
      like: Variables,
      plan: Plan,
      identity: Mapping[str, str],
      keep: int = 5,
      mirrored: int = 0,
      writes: bool = True,
      process: int = 0,
      waiting: Waiting | None = None,
      troubles: Troubles | None = None,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    """Clears up after a killed writer of this group.

    Args are those of `CheckpointExchange`, but:
      mirrored: If it mirrors a dictionary: how many may wait to be written.
      writes: Whether this process publishes.
    """
    plan.peers_of(group_id, num_groups)  # Raises before anything is written.
    waiting = waiting or Waiting()
    self.root = epath.Path(files.absolute(root))
    self.writes = writes
    self.advice = f'Is it running, with the same workdir ({self.root})?'
    self._group_id = group_id
    self._directory = publications.group_directory(self.root, group_id)
    self._like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like
    )
    self._plan = plan
    self._identity = dict(identity)
    self._keep = keep
    self._troubles = troubles or Troubles(f'group {group_id}: ')
    self._patience = patience
    prefix = f'process_{process}_' if process else ''
    self._mark = self._directory / f'{prefix}{READING_FILE}'
    self._readers = plan.readers_of(group_id, num_groups)
    self._marks = _ReadingMarks(
        self.root, self._readers, waiting.timeout_seconds, self._troubles
    )
    self._restart_step: int | None = None
    self._newest: Publication | None = None  # Complete, made by this process.
    self._failures = 0
    self._life = 0
    self._unwritten: set[int] = set()
    self._spare: Variables | None = None
    # Beside training there is one copy of variables at a time, on its way out
    # or in.
    self.turn = Mutex(patience).held
    # In lockstep peers wait for every one, so a disk that is slower than the
    # interval holds training up; else only the newest one counts.
    self._all_needed = plan.mode == 'lockstep' and not mirrored
    self._lease: leases.Lease | None = None
    if writes and not mirrored:
      _replace(str(self._directory), group_id)
      self._lease = leases.acquire(
          self._directory,
          f'publishing for group {group_id} in',
          interrupted=waiting.interrupted,
          patience=patience,
      )
    try:
      if writes:
        files.remove(self._directory / FAILED_FILE)
        checkpoints.clear_up(self._directory)
    except BaseException:
      self._release()
      raise
    self._writer = BackgroundWriter(
        self._write,
        'publishing',
        self._troubles,
        room=None if self._all_needed else mirrored or 1,
        patience=patience,
        interrupted=waiting.interrupted,
    )
    if self._lease is not None:
      _OPEN[str(self._directory)] = self

  # --- Reading ---

  def steps(self, group_id: int) -> list[int]:
    return publications.published_steps(self.root, group_id)

  def read(self, group_id: int, step: int) -> Slot:
    return publications.read(
        self.root, group_id, step, like=self._like, identity=self._identity
    )

  def made(self, group_id: int, step: int) -> float | None:
    directory = publications.group_directory(self.root, group_id)
    return checkpoints.completed_at(directory, step)

  def life(self, group_id: int, step: int) -> int | None:
    return publications.life_of(self.root, group_id, [step])

  @contextlib.contextmanager
  def reading(self, steps: Mapping[int, int]) -> Iterator[None]:
    """Marks what is read inside, so that its writer does not delete it."""
    try:
      self._set_mark(steps)
      yield
    finally:
      self._set_mark({})

  def wait(self, seconds: float) -> None:
    time.sleep(seconds)

  def _set_mark(self, steps: Mapping[int, int]) -> None:
    mark = {
        'nonce': secrets.token_hex(8),
        'steps': {str(peer): step for peer, step in steps.items()},
    }
    # Without it a writer may be faster than this reader; which then reads
    # something newer.
    with self._troubles.noted('marking what is being read'):
      files.write_json(self._mark, mark)

  # --- Writing ---

  def begin(self, step: int) -> None:
    if not self.writes:
      return
    old = self.steps(self._group_id)
    self._life = publications.life_of(self.root, self._group_id, old)
    if step:
      return
    # Later than all before it, also of another directory.
    self._life = max(self._life + 1, int(time.time()))
    for newest in old[-1:]:
      publications.check_own(
          self.root, self._group_id, newest, self._like, self._identity
      )
    files.remove(self._directory / RESTART_FILE)
    checkpoints.delete(self._directory, old)
    if old:
      logging.warning(
          'group %d begins anew: publications %d to %d of it are deleted',
          self._group_id,
          old[0],
          old[-1],
      )

  def write(self, publication: Publication, variables: Variables) -> None:
    if self._plan.mode == 'lockstep':
      self._unwritten.add(publication.step)
    self._writer.put(publication.step, (publication, variables))

  def check(self, publication: Publication, variables: Variables) -> None:
    publications.check_form(publication, variables, self._like)

  def raise_failure(self) -> None:
    self._writer.raise_failure()

  def fail(self, error: Exception) -> None:
    with self._troubles.noted('telling peers of an error'):
      reason = files.one_line(error)
      files.write_json(self._directory / FAILED_FILE, {'reason': reason})

  def failure(self, group_id: int) -> str:
    directory = publications.group_directory(self.root, group_id)
    with self._troubles.noted(
        f'reading whether group {group_id} has failed', (OSError, ValueError)
    ):
      failed = files.read_json(directory / FAILED_FILE, {'reason': files.TEXT})
      return (failed or {}).get('reason', '')
    return ''

  def spare(self) -> Variables | None:
    # Nobody needs what the next one is newer than; it goes before the copy.
    waiting = self._writer.withdraw()
    if waiting is not None:
      return waiting[1]
    spare, self._spare = self._spare, None
    return spare

  def flush(self) -> None:
    self._writer.wait(failing=_FOREVER, slow=_FOREVER)

  def settle(self, step: int) -> None:
    """Raises OSError unless publications up to `step` are complete.

    A group that restarts there makes none of them again, and in lockstep peers
    will ask for those.
    """
    if self._plan.mode == 'freshest':
      return
    limit = self._patience.settle
    self._writer.wait(failing=limit, slow=limit, up_to=step)
    first = self._plan.keep_from(step)
    if any(first <= s <= step for s in self._unwritten.copy()):
      raise TimeoutError(
          f'publications of group {self._group_id} up to step {step} are not'
          ' complete yet'
      )

  def checkpointed(self, step: int) -> None:
    """Tells the writers of other groups where this one may restart."""
    if not self.writes or step == self._restart_step:
      return
    # While that fails, peers keep more than is needed.
    with self._troubles.noted('saying where a restart may begin'):
      files.write_json(self._directory / RESTART_FILE, {'step': step})
      self._restart_step = step

  def metrics(self) -> dict[str, float]:
    if not self.writes:
      return {}
    found = {'exchange/publish_failures': float(self._failures)}
    if self._newest is not None:
      found['exchange/publication_bytes'] = float(self._newest.num_bytes)
    return found

  def close(self) -> None:
    """Waits for what is under way, within limits; raises what it raised.

    Raises:
      OSError: In lockstep, if a publication could not be written: peers wait
        for it. Otherwise it is only said.
    """
    try:
      # What is only slow is waited for longer, if not for ever.
      self._writer.wait(slow=self._patience.slow)
    finally:
      unwritten = self._writer.give_up()
      self._writer.close()
      # A write that hangs keeps it: nobody else may write meanwhile.
      if self._writer.finished:
        self._release()
    if unwritten is not None and self._all_needed:
      reason = f': {unwritten.error}' if unwritten.error else ''
      raise TimeoutError(
          f'group {self._group_id} could not publish to {self._directory}'
          f' in time{reason}'
      )

  def _release(self) -> None:
    if self._lease is not None:
      self._lease.release()
    if _OPEN.get(str(self._directory)) is self:
      del _OPEN[str(self._directory)]

  # --- In the thread ---

  def _write(self, step: int, item: Slot) -> None:
    publication, variables = item
    try:
      with self.turn():
        if self._lease is not None:
          self._lease.check()
        self._newest = publications.write(
            self.root,
            dataclasses.replace(publication, life=self._life),
            cast_floats(variables, self._plan.publish_dtype),
        )
    except OSError:
      self._failures += 1
      # The file system may be full of publications that readers have left.
      self._prune(step)
      raise
    except leases.LostError:
      raise
    except Exception as e:  # No later try would do better.
      self.fail(e)
      raise
    self._unwritten.discard(step)
    self._spare = variables
    self._prune(step)

  def _prune(self, newest: int) -> None:
    with self._troubles.noted('deleting old publications'):
      self._delete_old(newest)

  def _delete_old(self, newest: int) -> None:
    # Those beyond it are of a life that was killed, and count for nothing.
    steps = [s for s in self.steps(self._group_id) if s <= newest]
    old = steps[: -self._keep]
    if self._plan.mode == 'lockstep' and self._readers:
      needed = min(map(self._needed_by, self._readers))
      old = [step for step in old if step < needed]
    read_now = lambda: self._marks.read_now(self._group_id)
    is_read = lambda step: step in read_now()
    read = read_now()
    for step in old:
      # A reader sets its mark and then looks whether the step is there; the
      # step is taken away and then the marks are looked at. So one of the two
      # sees the other.
      if step not in read:
        checkpoints.delete_unless(
            self._directory, step, functools.partial(is_read, step)
        )

  def _needed_by(self, reader: int) -> int:
    """Returns the oldest publication that a reader may ask for again."""
    path = publications.group_directory(self.root, reader) / RESTART_FILE
    with self._troubles.noted(
        f'reading where group {reader} may restart', (OSError, ValueError)
    ):
      mark = files.read_json(path, {'step': files.WHOLE}) or {}
      return self._plan.keep_from(mark.get('step', 0))
    return 0  # It would start from the beginning, for all that is known.


def _replace(directory: str, group_id: int) -> None:
  """Closes the writer that this process has in a directory, if any.

  A cell of a notebook that is run again has not closed what it made before.
  """
  before = _OPEN.get(directory)
  if before is None:
    return
  logging.warning(
      'group %d: another exchange takes the place of one in %s, which is'
      ' closed',
      group_id,
      directory,
  )
  before.replaced = True
  try:
    before.close()
  except Exception as e:  # Of a run that nobody goes on with.
    logging.warning('group %d: closing it: %s', group_id, e)


class _ReadingMarks:
  """The marks by which readers say what they are reading."""

  def __init__(
      self,
      root: epath.Path,
      readers: Sequence[int],
      limit_seconds: float,
      troubles: Troubles,
  ):
    self._root = root
    self._troubles = troubles
    self._readers = tuple(readers)
    self._limit = limit_seconds
    # By our own clock; those of other hosts may be wrong.
    self._seen: dict[tuple[str, str], float] = {}
    self._last: dict[str, dict] = {}

  def read_now(self, group_id: int) -> set[int]:
    """Returns the steps of `group_id` that are read, within the limit."""
    steps, now, seen = set(), time.monotonic(), {}
    for path, mark in self._all_marks():
      key = (str(path), mark.get('nonce', ''))
      seen[key] = self._seen.get(key, now)
      step = mark.get('steps', {}).get(str(group_id))
      if step is not None and now - seen[key] <= self._limit:
        steps.add(step)
    self._seen = seen
    return steps

  def _all_marks(self) -> Iterator[tuple[epath.Path, dict]]:
    for reader in self._readers:
      directory = publications.group_directory(self._root, reader)
      bad: Exception | None = None
      # One for each process of the reader.
      for name in files.names(directory):
        if name.endswith(READING_FILE):
          path = directory / name
          try:
            self._last[str(path)] = files.read_json(path, _MARK) or {}
          except (OSError, ValueError) as e:
            bad = e  # Or torn, as it is being replaced: as it was before.
          yield path, self._last.get(str(path), {})
      doing = f'reading what group {reader} reads now'
      if bad:
        self._troubles.failed(doing, bad)
      else:
        self._troubles.worked(doing)


# --- A dictionary, which a directory may mirror ------------------------------


class Mirror(NamedTuple):
  """Where publications are kept besides memory, so that a run can resume.

  Attributes:
    root: The directory of the exchange, as of `CheckpointExchange`.
    like: Variables of the model, or their shapes.
    identity: What all groups share.
  """

  root: epath.PathLike
  like: Variables
  identity: Mapping[str, str]


class Board:
  """The publications of all groups of a process; safe from any thread."""

  def __init__(self, num_groups: int, keep: int):
    self.keep = keep
    self.changed = threading.Condition()
    self.shelves: list[dict[int, Slot]] = [{} for _ in range(num_groups)]
    self.failures: dict[int, str] = {}
    self.like: Variables | None = None  # What all groups publish, by example.

  def put(self, publication: Publication, variables: Variables) -> None:
    """Adds a publication; the oldest goes where there are too many."""
    with self.changed:
      shelf = self.shelves[publication.group_id]
      shelf[publication.step] = (publication, variables)
      for step in sorted(shelf)[: -self.keep]:
        del shelf[step]
      self.changed.notify_all()


class MemoryStore(Store):
  """A dictionary that all groups of one process share.

  Training needs nothing else: a full disk under a mirror holds it up only where
  a resume checkpoint would need what is not on it.
  """

  writes = True
  at_hand = True
  advice = (
      'Step all groups in turn, or run them in threads with a timeout_seconds'
  )
  reading: Any = staticmethod(contextlib.nullcontext)
  turn: Any = staticmethod(contextlib.nullcontext)

  def __init__(
      self,
      board: Board,
      group_id: int,
      plan: Plan,
      mirror: Store | None = None,
  ):
    self._board = board
    self._group_id = group_id
    self._plan = plan
    self._mirror = mirror = mirror or _Nowhere()
    self._num_bytes = 0
    self.begin = mirror.begin
    self.settle = mirror.settle
    self.checkpointed = mirror.checkpointed
    self.flush = mirror.flush
    self.close = mirror.close

  def steps(self, group_id: int) -> list[int]:
    with self._board.changed:
      return sorted(self._board.shelves[group_id])

  def read(self, group_id: int, step: int) -> Slot:
    with self._board.changed:
      slot = self._board.shelves[group_id].get(step)
    if slot is None:
      raise checkpoints.MissingError(
          f'there is no publication {step} of group {group_id}'
      )
    return slot

  def check(self, publication: Publication, variables: Variables) -> None:
    if self._board.like is None:
      self._board.like = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables
      )
    publications.check_form(publication, variables, self._board.like)

  def fail(self, error: Exception) -> None:
    with self._board.changed:
      self._board.failures[self._group_id] = files.one_line(error)
      self._board.changed.notify_all()

  def failure(self, group_id: int) -> str:
    return self._board.failures.get(group_id, '')

  def write(self, publication: Publication, variables: Variables) -> None:
    variables = cast_floats(variables, self._plan.publish_dtype)
    try:
      publications.check_finite(publication, variables)
    except FloatingPointError as e:
      self.fail(e)
      raise
    self._num_bytes = sum(x.nbytes for x in jax.tree.leaves(variables))
    self._board.put(publication, variables)
    self._mirror.write(publication, variables)

  def restore(self, groups: Sequence[int], first: int, last: int) -> None:
    """Reads what the groups had published from step `first` to `last`.

    Later ones, of a life that was killed, will be made again.
    """
    for group_id in groups:
      for step in self._mirror.steps(group_id):
        if first <= step <= last:
          self._board.put(*self._mirror.read(group_id, step))

  def wait(self, seconds: float) -> None:
    with self._board.changed:
      self._board.changed.wait(seconds)

  def metrics(self) -> dict[str, float]:
    if not self._num_bytes:
      return {}
    return {'exchange/publication_bytes': float(self._num_bytes)}


class _Nowhere(Store):
  """The mirror of a dictionary that has none."""

  def steps(self, group_id: int) -> list[int]:
    return []
