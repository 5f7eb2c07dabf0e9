"""What the groups of a drill reported, and which promises that breaks."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Names the socket that a drilled process reports to.
SOCKET_VARIABLE = 'CODISTILL_DRILL_SOCKET'

# What a healthy disk may take for a save, on a machine that is overloaded.
SLOW_SAVE_SECONDS = 10.0

# How long after such a fault began saves may still be behind.
HINDERED_SECONDS = 40.0

# How long a process may publish nothing at all.
SILENT_SECONDS = 45.0

# Faults during which a save may fail, or take long.
_HINDERING = {'slow_disk', 'read_only_disk', 'full_disk', 'suspend'}

_CLEAR_ERROR, _MAY_PASS = 1, 75  # As in `cli`.


@dataclasses.dataclass
class Life:
  """One process of a group, from its start to its end.

  Attributes:
    pid: The process.
    start: The step it went on from; None if it did not get that far.
    step: The newest update done.
    unsaved: The checkpoints that were asked for and are not complete, nor
      any after them: the step of each, and when that was, in monotonic seconds.
    ended_at: When it was seen to have ended, in monotonic seconds.
    published: Its newest publication, or where it began: the step, and when, in
      monotonic seconds. None once it was found to be silent.
  """

  pid: int
  start: int | None = None
  step: int | None = None
  unsaved: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  ended_at: float | None = None
  published: tuple[int, float] | None = None

  @property
  def reached(self) -> int:
    return (self.start or 0) if self.step is None else self.step


class Loss(NamedTuple):
  """What one restart cost.

  Attributes:
    reached: The step that the process before had reached.
    start: The step that this one went on from.
    excused: Of the steps between, those that a save which was hindered or still
      under way would have kept.
    saved: Whether the process before had said that it had saved everything.
  """

  reached: int
  start: int
  excused: int
  saved: bool

  @property
  def steps(self) -> int:
    return self.reached - self.start

  def broken(self, interval: int) -> str:
    """Which promise this breaks, or ''."""
    if self.steps < 0:
      return f'went on from step {self.start}, having reached {self.reached}'
    # One update may be under way while a process saves and leaves.
    if self.saved and self.steps > 1:
      return (
          f'was stopped at step {self.reached} and said that it had saved, but'
          f' went on from step {self.start}'
      )
    if self.steps - self.excused > interval:
      return (
          f'went on from step {self.start}, having reached {self.reached}:'
          f' more than the checkpoint interval of {interval} is lost'
      )
    return ''


class Ledger:
  """Receives events and keeps the books.

  Attributes:
    address: Of the socket.
    lives: The processes of each group.
    uses: How often a publication of a peer was read and taken for sound.
    refused: By group, how many publications it rejected.
    publications: How many were completed.
    forged: How many were completed that no peer may use.
    troubles: By group and by what failed, how often it did.
    bad_uses: A sentence for each use of bits that were never published.
    silent: A sentence for each process that published nothing for long.
  """

  def __init__(
      self,
      address: str,
      on_published: Callable[[int, int], None] = lambda group, step: None,
      every: int = 10,
  ):
    """Listens from now on.

    Args:
      address: Path of the socket to make; at most about 100 characters.
      on_published: Called with group and step as soon as a publication is
        complete, in the thread that listens.
      every: Updates between publications.
    """
    self.address = address
    self.lives: dict[int, list[Life]] = collections.defaultdict(list)
    self.uses = 0
    self.publications = 0
    self.forged = 0
    self.refused: collections.Counter[int] = collections.Counter()
    self.troubles: dict[int, collections.Counter[str]] = (
        collections.defaultdict(collections.Counter)
    )
    self.bad_uses: list[str] = []
    self.silent: list[str] = []
    self._on_published = on_published
    self._every = every
    self._published: dict[int, list[tuple[float, int]]] = (
        collections.defaultdict(list)
    )
    self._newest_use: dict[tuple[int, int], int] = {}
    self._last_step: dict[int, float] = {}
    self._faults: dict[int, list[tuple[float, str]]] = collections.defaultdict(
        list
    )
    self._statuses: dict[int, int] = {}
    self._offered: dict[tuple[int, int], set[str]] = collections.defaultdict(
        set
    )
    self._lock = threading.RLock()
    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    self._socket.bind(address)
    threading.Thread(target=self._receive, name='ledger', daemon=True).start()

  def close(self) -> None:
    """Listens no more."""
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)
    self._socket.close()
    with contextlib.suppress(OSError):
      os.unlink(self.address)

  # --- What the drill itself knows --------------------------------------------

  def struck(self, pid: int | None, fault: str) -> None:
    """Notes a fault that a process has to bear."""
    with self._lock:
      if pid is not None:
        self._faults[pid].append((time.monotonic(), fault))

  def ended(self, group: int, pid: int, status: int) -> None:
    """Notes how a process ended; below 0: by that signal."""
    with self._lock:
      self._statuses[pid] = status
      for life in self.lives[group]:
        if life.pid == pid and life.ended_at is None:
          life.ended_at = time.monotonic()

  # --- Questions --------------------------------------------------------------

  def step_of(self, group: int) -> int:
    """The newest step that a group is known to have reached."""
    with self._lock:
      lives = [x for x in self.lives[group] if x.start is not None]
      return lives[-1].reached if lives else 0

  def trains(self, group: int) -> bool:
    """Whether its newest process has made an update and is not known to end."""
    with self._lock:
      lives = self.lives[group]
      return (
          bool(lives) and lives[-1].step is not None and not lives[-1].ended_at
      )

  def losses(self, group: int) -> list[Loss]:
    """For each restart that got as far as training."""
    with self._lock:
      lives = [x for x in self.lives[group] if x.start is not None]
      return [
          Loss(
              before.reached,
              after.start,
              self._excused(before),
              self._statuses.get(before.pid) == 128 + signal.SIGTERM,
          )
          for before, after in itertools.pairwise(lives)
      ]

  def endings(self) -> dict[str, int]:
    """How many processes ended how."""
    with self._lock:
      names = [
          f'signal {-status}' if status < 0 else f'status {status}'
          for status in self._statuses.values()
      ]
    return dict(sorted(collections.Counter(names).items()))

  def unasked_endings(self, num_steps: int) -> list[str]:
    """Sentences on processes that ended in a way no fault had asked for."""
    found = []
    with self._lock:
      for group, lives in sorted(self.lives.items()):
        for life in lives:
          status = self._statuses.get(life.pid)
          if status and not self._asked_for(life, status, num_steps):
            how = f'signal {-status}' if status < 0 else f'status {status}'
            found.append(
                f'group {group} ended with {how} at step {life.reached}, which'
                ' no fault had asked for; see its log.txt'
            )
    return found

  def starved(self, since: float, patience: float) -> list[str]:
    """Sentences on groups that do not take what their peers publish.

    Args:
      since: When all was well again, in monotonic seconds.
      patience: Seconds that a reader may need.
    """
    found = []
    with self._lock:
      for group, end in sorted(self._last_step.items()):
        for peer, published in sorted(self._published.items()):
          steps = [
              step for at, step in published if since < at < end - patience
          ]
          used = self._newest_use.get((group, peer), -1)
          if peer != group and steps and used < max(steps):
            found.append(
                f'group {group} went on for {patience:g} s and more without'
                f' publication {max(steps)} of group {peer}, though nothing was'
                f' broken any more; the newest it read is {used}'
            )
    return found

  def all_read_since(self, since: float) -> bool:
    """Whether each group has read what a peer published since then.

    Args:
      since: In monotonic seconds.
    """
    with self._lock:
      new = {
          peer: min(
              (step for at, step in published if at > since), default=None
          )
          for peer, published in self._published.items()
      }
      return len(new) > 1 and all(
          step is not None and self._newest_use.get((group, peer), -1) >= step
          for peer, step in new.items()
          for group in new
          if group != peer
      )

  def _asked_for(self, life: Life, status: int, num_steps: int) -> bool:
    faults = self._names(life.pid)
    if status == -signal.SIGKILL:
      return 'kill' in faults
    if status in (-signal.SIGTERM, 128 + signal.SIGTERM):
      return 'terminate' in faults
    # A broken disk ends nobody in the middle of training, and nobody by an
    # error that a supervisor takes for final.
    at_rest = life.step in (None, num_steps) or 'terminate' in faults
    return status == _MAY_PASS and at_rest and bool(faults & _HINDERING)

  def _excused(self, life: Life) -> int:
    if not life.unsaved:
      return 0
    step, since = life.unsaved[0]
    end = time.monotonic() if life.ended_at is None else life.ended_at
    lately = self._names(life.pid, end - HINDERED_SECONDS) & _HINDERING
    if lately or end - since < SLOW_SAVE_SECONDS:
      return life.reached - step
    return 0

  def _names(self, pid: int, since: float = 0.0) -> set[str]:
    """The faults that a process had to bear since then."""
    return {name for at, name in self._faults[pid] if at >= since}

  # --- In the thread ----------------------------------------------------------

  def _receive(self) -> None:
    while True:
      try:
        data = self._socket.recv(65536)
      except OSError:
        return
      if not data:
        return
      event = json.loads(data)
      self.book(event)
      if event['event'] == 'published':
        self._on_published(event['group'], event['step'])

  def book(self, event: dict[str, Any]) -> None:
    """Notes one event of a group: `event`, `group`, `pid`, and what it says."""
    with self._lock:
      getattr(self, f'_book_{event["event"]}')(event)

  def _life(self, event: dict[str, Any]) -> Life:
    lives = reversed(self.lives[event['group']])
    return next(life for life in lives if life.pid == event['pid'])

  def _book_alive(self, event: dict[str, Any]) -> None:
    self.lives[event['group']].append(Life(event['pid']))

  def _book_start(self, event: dict[str, Any]) -> None:
    life = self._life(event)
    life.start = event['step']
    life.published = (event['step'], time.monotonic())

  def _book_step(self, event: dict[str, Any]) -> None:
    life = self._life(event)
    life.step = event['step']
    self._look_for_silence(event['group'], life)
    self._last_step[event['group']] = time.monotonic()

  def _look_for_silence(self, group: int, life: Life) -> None:
    """A process whose disk works must publish."""
    if life.published is None:
      return
    step, since = life.published
    now = time.monotonic()
    if (
        now - since > SILENT_SECONDS
        and life.reached >= step + 3 * self._every
        and not self._names(life.pid, now - SILENT_SECONDS) & _HINDERING
    ):
      life.published = None
      self.silent.append(
          f'group {group} has published nothing from step {step} to step'
          f' {life.reached}, {SILENT_SECONDS:g} s and more, though its disk'
          ' works'
      )

  def _book_saving(self, event: dict[str, Any]) -> None:
    self._life(event).unsaved.append((event['step'], time.monotonic()))

  def _book_saved(self, event: dict[str, Any]) -> None:
    life = self._life(event)
    life.unsaved = [x for x in life.unsaved if x[0] > event['step']]

  def _book_offered(self, event: dict[str, Any]) -> None:
    self._offered[event['group'], event['step']].add(event['digest'])

  def _book_published(self, event: dict[str, Any]) -> None:
    self.publications += 1
    self._life(event).published = (event['step'], time.monotonic())
    self._published[event['group']].append((time.monotonic(), event['step']))

  def _book_forged(self, event: dict[str, Any]) -> None:
    self.forged += 1
    self._life(event).published = (event['step'], time.monotonic())

  def _book_refused(self, event: dict[str, Any]) -> None:
    self.refused[event['group']] += 1

  def _book_trouble(self, event: dict[str, Any]) -> None:
    self.troubles[event['group']][event['doing']] += 1

  def _book_used(self, event: dict[str, Any]) -> None:
    self.uses += 1
    group, peer, step = event['group'], event['peer'], event['step']
    self._newest_use[group, peer] = step
    if event['digest'] not in self._offered[peer, step]:
      self.bad_uses.append(
          f'group {group} used publication {step} of group {peer} with bits'
          ' that were never published'
      )
