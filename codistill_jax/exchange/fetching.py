"""When a group reads, and when it swaps teachers: three ways, one interface.

`BesideTraining`: freshest, in a group of one process; a thread looks, the loop
swaps a reference. `Together`: freshest, in a group of several processes; the
primary chooses, a thread of each reads, all swap at one step. `Lockstep`: waits
for the publication of exactly one step.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codistill_jax.base import Agreement
from codistill_jax.exchange.fetcher import Fetcher
from codistill_jax.exchange.plan import Interrupted, Plan
from codistill_jax.exchange.teaching import Slot, Swap, Teaching
from codistill_jax.storage.background import Turns, Worker

_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 5.0
# On NFS a publication may become visible after a later one of the same peer.
_SETTLE_SECONDS = 60.0
_CLOSE_SECONDS = 10.0  # For a read under way.
_AT_ONCE = 4  # Peers whose variables the host holds at a time.
_ABSENT = -1  # In place of a step, where processes agree on steps.


@dataclasses.dataclass(frozen=True)
class Waiting:
  """How long others are waited for.

  Attributes:
    timeout_seconds: How long a fetch waits for a peer before it raises
      TimeoutError; and how long a publication is kept that somebody reads.
    interrupted: Polled while waiting; true gives the wait up.
  """

  timeout_seconds: float = 600.0
  interrupted: Callable[[], bool] = lambda: False

  def go_on(self, start: float, why: str, agreement: Agreement) -> None:
    """Sleeps a little, in a wait that has begun at `start` (monotonic).

    Raises:
      Interrupted, TimeoutError: With `why`.
    """
    late = time.monotonic() - start > self.timeout_seconds
    # Together: a process that went on alone would wait for the others.
    go_on, in_time = agreement.all_true(
        np.array([not self.interrupted(), not late])
    )
    if not go_on:
      raise Interrupted(f'stopped while waiting: {why}')
    if not in_time:
      raise TimeoutError(f'after {self.timeout_seconds:g} s of waiting: {why}')
    time.sleep(_POLL_SECONDS)


class Fetching(Protocol):
  """Brings publications into a `Teaching`."""

  def fetch(self, step: int) -> None:
    """Takes what there is for the update after `step`."""

  def fetch_now(self, go_on: Callable[[], None]) -> None:
    """Looks for something newer, and takes it.

    Args:
      go_on: Called again and again while that takes; raises to give it up.
    """

  def restore(self, steps: Mapping[int, int | None]) -> None:
    """Takes what was in use, by peer; the newest where that is gone."""

  def close(self) -> None:
    """Ends the thread."""


class BesideTraining:
  """Freshest: never waits, never holds the loop up."""

  def __init__(
      self, teaching: Teaching, fetcher: Fetcher, plan: Plan, turns: Turns
  ):
    self._turns = turns
    self._teaching = teaching
    self._fetcher = fetcher
    self._plan = plan
    self._worker = Worker('fetch')
    self._hurry = threading.Event()  # Ends the pause between two looks.
    self._looking: concurrent.futures.Future | None = None
    # The peers of whom something newer is looked for.
    self._wanted = set(teaching.peers)
    self._poll_seconds = _POLL_SECONDS

  def fetch(self, step: int) -> None:
    if self._plan.due(step):
      self._wanted = set(self._teaching.peers)
    if self._looking is not None and self._looking.done():
      self._take_what_was_found()
    if self._wanted and self._looking is None:
      self._looking = self._worker.submit(self._look, sorted(self._wanted))

  def fetch_now(self, go_on: Callable[[], None]) -> None:
    # The look under way may have begun too early.
    for _ in range(1 if self._looking is None else 2):
      if self._looking is None:
        peers = list(self._teaching.peers)
        self._looking = self._worker.submit(self._look, peers)
      self._hurry.set()
      try:
        while not self._looking.done():
          go_on()
      finally:
        self._hurry.clear()
      self._take_what_was_found()

  def restore(self, steps: Mapping[int, int | None]) -> None:
    wanted = {peer: step for peer, step in steps.items() if step is not None}
    swap = self._teaching.prepare(self._fetcher.read(wanted))
    self._teaching.take(swap)
    held = self._teaching.held_steps
    gone = [peer for peer in wanted if held[peer] is None]
    self._teaching.take(self._read_newest(gone))

  def close(self) -> None:
    self._hurry.set()
    self._worker.close(_CLOSE_SECONDS)

  def _take_what_was_found(self) -> None:
    looking, self._looking = self._looking, None
    swap = looking.result()
    if swap is not None:
      before = self._teaching.held
      self._teaching.take(swap)
      self._wanted -= {
          peer
          for peer, old, new in zip(self._teaching.peers, before, swap.held)
          if old != new
      }

  def _look(self, peers: Sequence[int]) -> Swap | None:
    """In the thread: something newer and sound of each, onto the devices."""
    with self._turns.turn():
      swap = self._read_newest(peers)
    if swap is None:
      # The loop asks again at once; a peer that is done or dead never answers.
      self._hurry.wait(self._poll_seconds)
      self._poll_seconds = min(2 * self._poll_seconds, _SLOWEST_POLL_SECONDS)
    else:
      self._poll_seconds = _POLL_SECONDS
    return swap

  def _read_newest(self, peers: Sequence[int]) -> Swap | None:
    """A few at a time: the host need not hold the variables of all peers."""
    held, swap = self._teaching.held_steps, None
    for start in range(0, len(peers), _AT_ONCE):
      some = peers[start : start + _AT_ONCE]
      found = self._fetcher.read_newest(some, held)
      swap = self._teaching.prepare(found, swap)
      del found
    return swap


class _Read(NamedTuple):
  """What one process of a group has read, and the teachers with it."""

  found: Mapping[int, Slot]
  swap: Swap | None


class Together:
  """Freshest, in a group of several processes.

  They meet at exchange steps, and after 1, 2, 4, 8, ... steps more: few
  meetings, and a publication waits for one at most as long as it took to read.
  """

  def __init__(
      self,
      teaching: Teaching,
      fetcher: Fetcher,
      plan: Plan,
      agreement: Agreement,
  ):
    self._teaching = teaching
    self._fetcher = fetcher
    self._plan = plan
    self._agreement = agreement
    self._worker = Worker('fetch')
    self._reading: concurrent.futures.Future | None = None
    self._due = True

  def fetch(self, step: int) -> None:
    since = step % self._plan.every
    if since & (since - 1):
      return  # Neither 0 nor a power of two.
    self._due = self._due or self._plan.due(step)
    # A process that has failed counts as done, and fails when it takes.
    if self._reading is not None and self._all(self._reading.done()):
      self._take_what_was_read()
    if self._reading is None and self._due:
      steps = self._choose(self._newest_steps())
      if steps:
        self._reading = self._worker.submit(self._read, steps)

  def fetch_now(self, go_on: Callable[[], None]) -> None:
    if self._reading is None:
      steps = self._choose(self._newest_steps())
      if not steps:
        return
      self._reading = self._worker.submit(self._read, steps)
    while not self._all(self._reading.done()):
      go_on()
    self._take_what_was_read()

  def restore(self, steps: Mapping[int, int | None]) -> None:
    self._read_and_take(list(steps.values()))
    held = self._teaching.held_steps
    self._read_and_take(
        [
            None
            if used is None or held[peer] is not None
            else self._fetcher.newest(peer, None)
            for peer, used in steps.items()
        ]
    )

  def close(self) -> None:
    self._worker.close(_CLOSE_SECONDS)

  def _read(self, steps: Mapping[int, int]) -> _Read:
    """In the thread of each process."""
    found = self._fetcher.read(steps)
    return _Read(found, self._teaching.prepare(found))

  def _read_and_take(self, steps: Sequence[int | None]) -> None:
    chosen = self._choose(steps)
    if chosen:
      self._take(self._read(chosen))

  def _take_what_was_read(self) -> None:
    reading, self._reading = self._reading, None
    self._due = not self._take(reading.result())

  def _take(self, read: _Read) -> bool:
    """Takes what every process could read; says whether it was anything."""
    teaching = self._teaching
    here = np.array([peer in read.found for peer in teaching.peers])
    everywhere = dict(zip(teaching.peers, self._agreement.all_true(here)))
    agreed = {peer: x for peer, x in read.found.items() if everywhere[peer]}
    if len(agreed) == len(read.found):
      teaching.take(read.swap)  # On the devices already.
    else:
      teaching.take(teaching.prepare(agreed))
    return bool(agreed)

  def _newest_steps(self) -> list[int | None]:
    held = self._teaching.held_steps
    if not self._agreement.is_primary:
      return [None] * len(held)  # The primary chooses.
    return [self._fetcher.newest(peer, step) for peer, step in held.items()]

  def _choose(self, steps: Sequence[int | None]) -> dict[int, int]:
    """The primary's choice, by peer; the same in all processes."""
    wanted = np.array([_ABSENT if s is None else s for s in steps], np.int32)
    chosen = np.asarray(self._agreement.choose(wanted))
    return {
        peer: int(step)
        for peer, step in zip(self._teaching.peers, chosen)
        if step != _ABSENT
    }

  def _all(self, here: bool) -> bool:
    return bool(self._agreement.all_true(np.array(here)))


class Lockstep:
  """Takes the publications of exactly the step asked for, and waits."""

  def __init__(
      self,
      teaching: Teaching,
      fetcher: Fetcher,
      plan: Plan,
      agreement: Agreement,
      waiting: Waiting,
  ):
    self._teaching = teaching
    self._fetcher = fetcher
    self._plan = plan
    self._agreement = agreement
    self._waiting = waiting
    self._worker = Worker('fetch')
    self._asked: int | None = None
    self._ahead: tuple[int, concurrent.futures.Future] | None = None

  def fetch(self, step: int) -> None:
    asked = self._plan.asked(step)
    if asked == self._asked:
      return
    found = self._read_before(asked)
    for peer in self._teaching.peers:
      found[peer] = self._read_when_there(peer, asked, found.get(peer))
    self._asked = asked
    self._teaching.take(self._teaching.prepare(found))
    if self._plan.staleness:
      # The next one is published already, or soon; well before it is needed.
      step = asked + self._plan.every
      self._ahead = (step, self._worker.submit(self._read_ahead, step))

  def fetch_now(self, go_on: Callable[[], None]) -> None:
    """There is nothing newer than what was asked for."""

  def restore(self, steps: Mapping[int, int | None]) -> None:
    """Nothing: what is in use follows from the step alone."""

  def close(self) -> None:
    self._worker.close(_CLOSE_SECONDS)

  def _read_ahead(self, step: int) -> dict[int, Slot]:
    found = {}
    for peer in self._teaching.peers:
      slot = self._fetcher.read_if_there(peer, step)
      if slot is not None:
        found[peer] = slot
    return found

  def _read_before(self, asked: int) -> dict[int, Slot]:
    ahead, self._ahead = self._ahead, None
    if ahead is None or ahead[0] != asked:
      return {}
    return ahead[1].result()

  def _read_when_there(self, peer: int, step: int, slot: Slot | None) -> Slot:
    start = time.monotonic()
    overtaken = None  # Since when a later publication is there.
    while True:
      slot = slot or self._fetcher.read_if_there(peer, step)
      if self._agreement.all_true(np.array(slot is not None)):
        return slot
      newest = self._fetcher.newest(peer, None)
      now = time.monotonic()
      if newest is None or newest < step or self._fetcher.is_bad(peer, step):
        overtaken = None
      elif overtaken is None:
        overtaken = now
      elif now - overtaken > min(
          _SETTLE_SECONDS, self._waiting.timeout_seconds
      ):
        raise FileNotFoundError(
            f'group {peer} has published step {newest} but not, or no longer,'
            f' step {step}, which lockstep asks for; all groups need the same'
            ' every, and publications must not be deleted by hand'
        )
      self._waiting.go_on(start, self._why(peer, step, newest), self._agreement)

  def _why(self, peer: int, step: int, newest: int | None) -> str:
    if self._fetcher.is_bad(peer, step):
      return (
          f'publication {step} of group {peer} is damaged'
          f' ({self._fetcher.last_rejection}); started again from before that'
          ' step, the group makes it again'
      )
    return (
        f'group {peer} has not published step {step}; its newest is'
        f' {"none" if newest is None else f"step {newest}"}. Is it running,'
        f' with the same workdir ({self._fetcher.root})?'
    )
