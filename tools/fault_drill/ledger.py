"""Books of a drill: what groups reported, and which promises that breaks."""

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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import cli

# Names the socket that a drilled process reports to.
SOCKET_VARIABLE = 'CODISTILL_DRILL_SOCKET'

# What a healthy disk may take for a save, on a machine that is overloaded; and
# how long after a fault of the disk began saves may still be behind.
SLOW_SAVE_SECONDS = 10.0
HINDERED_SECONDS = 40.0

# Faults during which a save may fail, or take long.
_HINDERING = {
    'slow_disk',
    'read_only_disk',
    'no_access',
    'full_disk',
    'full_disk_at_stop',
    'suspend',
}
_ASKING = {'terminate', 'full_disk_at_stop'}  # To leave.

_TERMINATED = 128 + signal.SIGTERM


@dataclasses.dataclass
class Life:
  """One process of a group, from its start to its end.

  Attributes:
    group: The group; None until it reports.
    start: The step it went on from; None if it did not get that far.
    step: The newest update done.
    unsaved: The checkpoints that were asked for and are not complete, nor any
      after them: the step of each, and when that was.
    faults: That it had to bear, and since when.
    status: How it ended, below 0 by a signal; None if it has not.
    ended_at: When that was seen.
  """

  group: int | None = None
  start: int | None = None
  step: int | None = None
  unsaved: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  faults: list[tuple[str, float]] = dataclasses.field(default_factory=list)
  status: int | None = None
  ended_at: float | None = None

  @property
  def reached(self) -> int:
    return (self.start or 0) if self.step is None else self.step

  def bore(self, since: float = 0.0) -> set[str]:
    """Returns the faults since then."""
    return {name for name, at in self.faults if at >= since}

  def ended_as_asked(self, num_steps: int) -> bool:
    """Returns whether a fault had asked for its end."""
    faults = self.bore()
    if self.status == -signal.SIGKILL:
      return 'kill' in faults
    if self.status in (-signal.SIGTERM, _TERMINATED):
      return bool(faults & _ASKING)
    # A broken disk ends nobody in the middle of training, and nobody by an
    # error that a supervisor takes for final.
    at_rest = self.step in (None, num_steps)
    may_pass = faults & _ASKING or (at_rest and faults & _HINDERING)
    return not self.status or (self.status == cli.MAY_PASS and bool(may_pass))

  def excused(self) -> int:
    """Returns updates whose save was hindered, or still under way."""
    if not self.unsaved:
      return 0
    step, since = self.unsaved[0]
    end = self.ended_at or time.monotonic()
    hindered = self.bore(end - HINDERED_SECONDS) & _HINDERING
    return (
        self.reached - step
        if hindered or end - since < SLOW_SAVE_SECONDS
        else 0
    )


class Loss(NamedTuple):
  """The cost of one restart.

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
    """Returns which promise this breaks, or ''."""
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
    lives: All processes by their id, in the order in which they began.
    uses: How often a publication of a peer was read and taken for sound.
    publications: How many were completed.
    forged: How many were completed that no peer may use.
    refused: How many publications were rejected.
    troubles: By what failed, how often it did.
    bad_uses: A sentence for each use of bits that were never published.
  """

  def __init__(
      self,
      address: str,
      on_published: Callable[[int, int], None] = lambda group, step: None,
  ):
    """Listens from now on.

    Args:
      address: Path of the socket to make; at most about 100 characters.
      on_published: Called with group and step as soon as a publication is
        complete, in the thread that listens.
    """
    self.address = address
    self.lives: dict[int, Life] = {}
    self.uses = self.publications = self.forged = self.refused = 0
    self.troubles: collections.Counter[str] = collections.Counter()
    self.bad_uses: list[str] = []
    self._on_published = on_published
    self._published: dict[int, dict[int, float]] = collections.defaultdict(dict)
    self._newest_use: dict[tuple[int, int], int] = {}
    self._offered: set[tuple[int, int, str]] = set()
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

  def struck(self, pid: int, fault: str) -> None:
    """Notes a fault that a process has to bear."""
    with self._lock:
      self._life(pid).faults.append((fault, time.monotonic()))

  def ended(self, pid: int, status: int) -> None:
    """Notes how a process ended; below 0: by that signal."""
    with self._lock:
      life = self._life(pid)
      life.status, life.ended_at = status, time.monotonic()

  # --- Questions --------------------------------------------------------------

  def step_of(self, group: int) -> int:
    """Returns the newest step that a group is known to have reached."""
    lives = self._begun(group)
    return lives[-1].reached if lives else 0

  def trains(self, group: int) -> bool:
    """Returns whether its newest process made an update and goes on."""
    with self._lock:
      lives = [x for x in self.lives.values() if x.group == group]
    return bool(lives) and lives[-1].step is not None and not lives[-1].ended_at

  def losses(self, group: int) -> list[Loss]:
    """Returns one for each restart that got as far as training."""
    return [
        Loss(
            before.reached,
            after.start,
            before.excused(),
            before.status == _TERMINATED,
        )
        for before, after in itertools.pairwise(self._begun(group))
    ]

  def endings(self) -> dict[str, int]:
    """Returns how many processes ended how."""
    with self._lock:
      statuses = [x.status for x in self.lives.values()]
    found = collections.Counter(_how(x) for x in statuses if x is not None)
    return dict(sorted(found.items()))

  def unasked_endings(self, num_steps: int) -> list[str]:
    """Returns sentences on processes that ended as no fault had asked for."""
    with self._lock:
      return [
          f'group {life.group} ended with {_how(life.status)} at step'
          f' {life.reached}, which no fault had asked for; see its log.txt'
          for life in self.lives.values()
          if not life.ended_as_asked(num_steps)
      ]

  def unread(self, groups: Sequence[int], since: float) -> list[str]:
    """Returns sentences on groups that took nothing that a peer published.

    Args:
      groups: Those that train.
      since: When all was well again, in monotonic seconds.
    """
    found = []
    with self._lock:
      for peer in groups:
        steps = [x for x, at in self._published[peer].items() if at > since]
        if not steps:
          found.append(
              f'group {peer} has published nothing since all was well again'
          )
          continue
        for group in groups:
          used = self._newest_use.get((group, peer), -1)
          if group != peer and used < min(steps):
            found.append(
                f'group {group} has not read publication {min(steps)} of group'
                f' {peer}, or a newer one, since all was well again'
            )
    return found

  def _begun(self, group: int) -> list[Life]:
    with self._lock:
      lives = [x for x in self.lives.values() if x.group == group]
    return [x for x in lives if x.start is not None]

  def _life(self, pid: int) -> Life:
    return self.lives.setdefault(pid, Life())

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
    name, group, step = event['event'], event['group'], event.get('step')
    with self._lock:
      life = self._life(event['pid'])
      match name:
        case 'alive':
          life.group = group
        case 'start':
          life.start = step
        case 'step':
          life.step = step
        case 'saving':
          life.unsaved.append((step, time.monotonic()))
        case 'saved':
          life.unsaved = [x for x in life.unsaved if x[0] > step]
        case 'offered':
          self._offered.add((group, step, event['digest']))
        case 'published':
          self.publications += 1
          self._published[group][step] = time.monotonic()
        case 'forged':
          self.forged += 1
        case 'refused':
          self.refused += 1
        case 'trouble':
          self.troubles[event['doing']] += 1
        case 'used':
          self._book_use(group, event['peer'], step, event['digest'])

  def _book_use(self, group: int, peer: int, step: int, digest: str) -> None:
    self.uses += 1
    self._newest_use[group, peer] = step
    if (peer, step, digest) not in self._offered:
      self.bad_uses.append(
          f'group {group} used publication {step} of group {peer} with bits'
          ' that were never published'
      )


def _how(status: int) -> str:
  return f'signal {-status}' if status < 0 else f'status {status}'
