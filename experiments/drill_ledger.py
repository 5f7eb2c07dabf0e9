"""What the groups of a drill reported, and whether it breaks a promise."""

import collections
import dataclasses
import itertools
import json
import os
import socket
import threading
from typing import Any

# Names the socket that a drilled process reports to.
SOCKET_VARIABLE = 'CODISTILL_DRILL_SOCKET'


@dataclasses.dataclass
class Life:
  """One process of a group, from its start to its end.

  Attributes:
    pid: The process.
    start: The step it went on from; None if it did not get that far.
    step: The newest update done.
    saving: The step whose resume checkpoint is being written, if one is.
  """

  pid: int
  start: int | None = None
  step: int | None = None
  saving: int | None = None


class Ledger:
  """Receives events and keeps the books."""

  def __init__(self, address: str):
    self.address = address
    self.lives: dict[int, list[Life]] = collections.defaultdict(list)
    self.uses = 0
    self.publications = 0
    self.bad_uses: list[str] = []
    self._offered: dict[tuple[int, int], set[str]] = collections.defaultdict(
        set
    )
    self._lock = threading.Lock()
    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    self._socket.bind(address)
    threading.Thread(target=self._receive, name='ledger', daemon=True).start()

  def step_of(self, group: int) -> int:
    """The newest step that a group is known to have reached."""
    with self._lock:
      steps = [life.step or life.start or 0 for life in self.lives[group]]
    return steps[-1] if steps else 0

  def losses(self, group: int) -> list[tuple[int, int]]:
    """For each restart: steps lost, and how many of them may be.

    More than one interval may be lost only while the disk refused to save: then
    what has been done since the save that was under way does not count.
    """
    with self._lock:
      lives = [x for x in self.lives[group] if x.start is not None]
    found = []
    for before, after in itertools.pairwise(lives):
      done = before.start if before.step is None else before.step
      waived = 0 if before.saving is None else done - before.saving
      found.append((done - after.start, waived))
    return found

  def close(self) -> None:
    self._socket.close()
    os.unlink(self.address)

  def _receive(self) -> None:
    while True:
      try:
        event = json.loads(self._socket.recv(65536))
      except OSError:
        return
      with self._lock:
        self._book(event)

  def _book(self, event: dict[str, Any]) -> None:
    kind, group = event['event'], event['group']
    if kind == 'alive':
      self.lives[group].append(Life(event['pid']))
      return
    if kind == 'offered':
      self._offered[group, event['step']].add(event['digest'])
      return
    if kind == 'published':
      self.publications += 1
      return
    if kind == 'used':
      self.uses += 1
      source = (event['peer'], event['step'])
      if event['digest'] not in self._offered[source]:
        self.bad_uses.append(
            f'group {group} used publication {source[1]} of group {source[0]}'
            ' with bits that were never published'
        )
      return
    life = next(x for x in reversed(self.lives[group]) if x.pid == event['pid'])
    if kind == 'start':
      life.start = event['step']
    elif kind == 'step':
      life.step = event['step']
    elif event.get('kind') == 'checkpoint' and kind == 'saving':
      life.saving = event['step']
    elif event.get('kind') == 'checkpoint' and kind == 'saved':
      life.saving = None
