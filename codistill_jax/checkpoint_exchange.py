"""The exchange of groups that share nothing but a directory.

Serialising runs in a background thread: the training loop is held for a
device-to-host copy. Reading runs in the background too, but for lockstep, which
waits by definition, and for a group of several processes, which swap teachers
at the same step.

Shape suffix: P peers.
"""

import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from codistill_jax import publications, storage
from codistill_jax.base import (
    ALONE,
    Agreement,
    Teachers,
    Variables,
    cast_floats,
    host_copy,
)
from codistill_jax.exchange import Interrupted, Plan, peers_of, stack_teachers
from codistill_jax.publications import Publication

_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 5.0
# On NFS a publication may become visible after a later one of the same peer.
_SETTLE_SECONDS = 60.0
_RESTART_FILE = 'restart_step.json'
_ABSENT = -1  # In place of a step, where processes agree on steps.

Slot = tuple[Publication, Variables]


class _Swap(NamedTuple):
  """All that changes when a teacher does."""

  in_use: tuple[Publication | None, ...]
  slots: list[Variables | None]
  teachers: Teachers


@dataclasses.dataclass(frozen=True)
class Waiting:
  """How long a lockstep fetch waits for a peer.

  Attributes:
    timeout_seconds: Then it raises TimeoutError.
    interrupted: Polled while waiting; true gives the wait up.
  """

  timeout_seconds: float = 600.0
  interrupted: Callable[[], bool] = lambda: False


class CheckpointExchange:
  """Publications as orbax checkpoints under `root/group_<id>/<step>/`.

  For one run: another run gets another root, and another exchange.
  """

  def __init__(
      self,
      root: epath.PathLike,
      group_id: int,
      num_groups: int,
      *,
      like: Variables,
      plan: Plan | None = None,
      identity: Mapping[str, str] | None = None,
      keep: int = 5,
      waiting: Waiting | None = None,
      agreement: Agreement = ALONE,
      place: Callable[[Teachers], Teachers] = lambda teachers: teachers,
  ):
    """Joins the exchange.

    Args:
      root: The directory that all groups see: a local disk, NFS, a bucket.
      group_id: This group.
      num_groups: G.
      like: This group's variables, or their shapes; what peers must match.
      plan: Interval, mode and dtypes; the same for all groups.
      identity: What peers must share besides shapes (tokenizer hash, ...).
      keep: Publications to keep at least; in lockstep also every one that a
        restart of any group may still ask for. A writer that keeps one only
        loses its readers' reads.
      waiting: Time limit of lockstep.
      agreement: How the processes of this group decide together.
      place: Puts teachers on the devices; called in the background.
    """
    self.peers = peers_of(group_id, num_groups)
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)
    self.rejected = 0
    self._root = storage.absolute(root)
    self._group_id = group_id
    self._plan = plan or Plan()
    self._like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like
    )
    self._identity = dict(identity or {})
    self._keep = keep
    self._waiting = waiting or Waiting()
    self._agreement = agreement
    self._place = place
    self._slots: list[Variables | None] = [None] * len(self.peers)
    self._teachers: Teachers | None = None
    self._asked: int | None = None
    self._reading: concurrent.futures.Future | None = None
    self._poll_seconds = _POLL_SECONDS
    self._closing = threading.Event()
    self._due = True
    self._restart_step: int | None = None
    self._writing: list[concurrent.futures.Future] = []
    self._bad: set[tuple[int, int]] = set()
    self._directory = publications.group_directory(self._root, group_id)
    if agreement.is_primary:
      storage.delete_torn(self._directory)
    self._writer = concurrent.futures.ThreadPoolExecutor(1, 'publish')
    self._reader = concurrent.futures.ThreadPoolExecutor(1, 'fetch')

  # -- publish ----------------------------------------------------------------

  def publish_if_due(self, step: int, variables: Variables) -> bool:
    if not self._plan.due(step) or not self._agreement.is_primary:
      return False
    self._check_writes()
    if self._plan.mode == 'freshest':
      # Nobody needs what is still waiting: this is newer.
      self._writing = [f for f in self._writing if not f.cancel()]
    elif len(self._writing) > 1:
      # Every one is needed, so a disk that is slower than the interval holds
      # training up; else copies would pile up in memory.
      self._writing[0].result()
    publication = Publication(self._group_id, step, time.time(), self._identity)
    copy = host_copy(variables)
    self._writing.append(self._writer.submit(self._write, publication, copy))
    return True

  def _write(self, publication: Publication, variables: Variables) -> None:
    publications.write(
        self._root,
        publication,
        cast_floats(variables, self._plan.publish_dtype),
    )
    self._prune()

  def _check_writes(self, *, wait: bool = False) -> None:
    """Raises what a background write raised."""
    if wait:
      concurrent.futures.wait(self._writing)
    done = [f for f in self._writing if f.done()]
    self._writing = [f for f in self._writing if not f.done()]
    for future in done:
      if not future.cancelled():
        future.result()

  def _prune(self) -> None:
    steps = storage.completed_steps(self._directory)
    old = steps[: -self._keep]
    if self._plan.mode == 'lockstep' and self.peers:
      needed = min(map(self._needed_by, self.peers))
      old = [step for step in old if step < needed]
    storage.delete(self._directory, old)

  def _needed_by(self, peer: int) -> int:
    """The oldest publication that `peer` may ask for after a restart."""
    path = publications.group_directory(self._root, peer) / _RESTART_FILE
    try:
      return self._plan.keep_from(int(json.loads(path.read_text())['step']))
    except (OSError, ValueError, KeyError, TypeError):
      return 0  # It would start from the beginning, for all that is known.

  def checkpointed(self, step: int) -> None:
    if step == self._restart_step or not self._agreement.is_primary:
      return
    self._restart_step = step
    self._directory.mkdir(parents=True, exist_ok=True)
    path = self._directory / _RESTART_FILE
    temporary = self._directory / f'{_RESTART_FILE}.tmp'
    temporary.write_text(json.dumps({'step': step}))
    temporary.replace(path)

  # -- fetch ------------------------------------------------------------------

  def fetch(self, step: int) -> Teachers | None:
    if not self.peers:
      return None
    if self._plan.mode == 'lockstep':
      self._fetch_exactly(self._plan.asked(step))
    elif self._agreement is ALONE:
      self._fetch_beside_training(step)
    elif self._plan.due(step):
      self._fetch_together()
    return self._teachers

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    del step
    if self._plan.mode == 'lockstep':
      return  # What is in use follows from the step alone.
    chosen = [
        self._newest_untried(peer) if used is None else used
        for peer, used in zip(self.peers, teacher_steps)
    ]
    self._use(self._read_everywhere(chosen))
    # If the checkpoint is old, what was in use is pruned: then the newest.
    missing = [
        self._newest_untried(peer) if used is None else None
        for peer, used in zip(self.peers, self.in_use)
    ]
    self._use(self._read_everywhere(missing))

  def _fetch_exactly(self, asked: int | None) -> None:
    if asked == self._asked:
      return
    found = {}
    for slot, peer in enumerate(self.peers):
      self._wait_for(peer, asked)
      found[slot] = self._read(peer, asked)
    self._asked = asked
    self._use(found)

  def _wait_for(self, peer: int, step: int) -> None:
    start = time.monotonic()
    overtaken = None  # Since when a later publication is there.
    while True:
      steps = publications.published_steps(self._root, peer)
      # Together: a process that went on alone would wait for the others.
      there, go_on = self._agreement.all_true(
          np.array([step in steps, not self._waiting.interrupted()])
      )
      if there:
        return
      if not go_on:
        raise Interrupted(f'stopped while waiting for group {peer}')
      now = time.monotonic()
      newest = max(steps, default=None)
      if newest is None or newest < step:
        overtaken = None
      elif overtaken is None:
        overtaken = now
      elif now - overtaken > min(
          _SETTLE_SECONDS, self._waiting.timeout_seconds
      ):
        raise FileNotFoundError(
            f'group {peer} has published step {newest} but not, or no longer,'
            f' step {step}, which lockstep asks for; all groups need the same'
            ' exchange_every, and publications must not be deleted by hand'
        )
      if now - start > self._waiting.timeout_seconds:
        raise TimeoutError(
            f'group {peer} has not published step {step} within'
            f' {self._waiting.timeout_seconds:g} s; its newest is'
            f' {"none" if newest is None else f"step {newest}"}. Is it running,'
            f' with the same workdir ({self._root})?'
        )
      time.sleep(_POLL_SECONDS)

  def _fetch_beside_training(self, step: int) -> None:
    """Takes up what the last look has found; starts another when due."""
    self._due = self._due or self._plan.due(step)
    if self._reading is not None and self._reading.done():
      swap = self._reading.result()
      self._reading = None
      if swap is not None:
        self._due = False
        self._take(swap)
    if self._due and self._reading is None:
      self._reading = self._reader.submit(self._look)

  def _look(self) -> _Swap | None:
    """Reads something newer and sound of each peer, onto the devices."""
    try:
      found = self._read_newest()
    except OSError as e:  # The file system, not the peer: it may pass.
      logging.warning('Could not look for publications: %s', e)
      found = {}
    if not found:
      # The loop asks again at once; a peer that is done or dead never answers.
      self._closing.wait(self._poll_seconds)
      self._poll_seconds = min(2 * self._poll_seconds, _SLOWEST_POLL_SECONDS)
      return None
    self._poll_seconds = _POLL_SECONDS
    return self._swap(found)

  def _fetch_together(self) -> None:
    """All processes of the group swap to the same teachers at this step."""
    newest = [self._newest_untried(peer) for peer in self.peers]
    self._use(self._read_everywhere(newest))

  def _read_everywhere(self, steps: Sequence[int | None]) -> dict[int, Slot]:
    """What every process of the group could read of the primary's choice."""
    wanted = np.array([_ABSENT if s is None else s for s in steps], np.int32)
    chosen = [
        None if s == _ABSENT else int(s) for s in self._agreement.choose(wanted)
    ]
    found = self._read_chosen(chosen)
    read = np.array([slot in found for slot in range(len(self.peers))])
    everywhere = self._agreement.all_true(read)
    return {slot: x for slot, x in found.items() if everywhere[slot]}

  def _newest_untried(self, peer: int) -> int | None:
    """The newest publication that is newer than the one in use, and not bad."""
    used = self.in_use[self.peers.index(peer)]
    steps = [
        step
        for step in publications.published_steps(self._root, peer)
        if (peer, step) not in self._bad and (used is None or step > used.step)
    ]
    return max(steps, default=None)

  def _read_newest(self) -> dict[int, Slot]:
    """Per slot, something newer and sound; peers without it are left out."""
    found = {}
    for slot, peer in enumerate(self.peers):
      while (step := self._newest_untried(peer)) is not None:
        one = self._read_chosen({slot: step})
        if one:
          found |= one
          break
    return found

  def _read_chosen(
      self, steps: Sequence[int | None] | Mapping[int, int]
  ) -> dict[int, Slot]:
    """Reads `steps[slot]` of each peer; what is damaged is skipped for good."""
    items = steps.items() if isinstance(steps, Mapping) else enumerate(steps)
    found = {}
    for slot, step in items:
      if step is None:
        continue
      try:
        found[slot] = self._read(self.peers[slot], step)
      except storage.MissingError:
        continue  # The peer is faster than this reader; there is a newer one.
      except storage.DamagedError as e:
        self._bad.add((self.peers[slot], step))
        self.rejected += 1
        logging.warning('Skipped: %s', e)
    return found

  def _read(self, peer: int, step: int) -> Slot:
    return publications.read(
        self._root,
        peer,
        step,
        like=self._like,
        identity=self._identity,
        dtype=self._plan.teacher_dtype,
    )

  def _swap(self, found: Mapping[int, Slot]) -> _Swap:
    """The teachers, with those of some slots replaced."""
    in_use, slots = list(self.in_use), list(self._slots)
    for slot, (publication, variables) in found.items():
      in_use[slot], slots[slot] = publication, variables
    return _Swap(tuple(in_use), slots, self._place(stack_teachers(slots)))

  def _take(self, swap: _Swap) -> None:
    self.in_use, self._slots, self._teachers = swap

  def _use(self, found: Mapping[int, Slot]) -> None:
    if found:
      self._take(self._swap(found))

  def close(self) -> None:
    """Waits for publications under way; raises what the last one raised."""
    self._closing.set()
    self._reader.shutdown(wait=True, cancel_futures=True)
    self._writer.shutdown(wait=True)
    self._check_writes(wait=True)
