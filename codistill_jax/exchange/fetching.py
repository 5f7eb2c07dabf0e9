"""When a group reads publications, and which teachers it then has.

`Freshest` takes whatever is newest: a thread looks and reads beside training,
the loop swaps a reference. `Lockstep` waits for the publication of exactly one
step. A group of several processes does the same by an `Agreement`: the primary
chooses, every process reads, all swap at one step. `Teaching` holds what was
read, and shows what is young enough.

Shape suffix: P peers.
"""

import concurrent.futures
import contextlib
import math
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np
from absl import logging

from codistill_jax.base import (
    ALONE,
    Agreement,
    Array,
    Teachers,
    Variables,
    cast_floats,
)
from codistill_jax.exchange.plan import Plan, StaleError, Waiting
from codistill_jax.exchange.publications import Publication, Slot
from codistill_jax.exchange.stores import Store
from codistill_jax.storage import background, checkpoints
from codistill_jax.storage.background import Patience, Troubles

AT_ONCE = 4  # Peers whose variables the host holds at a time.
_ABSENT = -1  # In place of a step, where processes agree on steps.
_LONGEST_REASON = 400  # Characters; tensorstore tells its whole state.
_OVER = object()

Put = Callable[[Array], Array]


class Swap(NamedTuple):
  """The state that changes when a teacher does.

  Attributes:
    held: Per peer, the publication that its teacher is, or None.
    teachers: All of them.
  """

  held: tuple[Publication | None, ...]
  teachers: Any  # None before the first.


class Teaching:
  """Teachers held of each peer, and those shown to the training step.

  Attributes:
    peers: The ids of the peers.
    held: Per peer, the publication held, however old.
    in_use: Per peer, the publication in use at the step last shown.
    shown: The teachers at that step, the same object until they change; None
      if no peer is present.
  """

  def __init__(
      self, group_id: int, peers: tuple[int, ...], plan: Plan, put: Put
  ):
    """Holds nothing yet.

    Args:
      group_id: The group that learns.
      peers: From whom.
      plan: Its age limit.
      put: Puts one array on the devices.
    """
    self.peers = peers
    self.held: tuple[Publication | None, ...] = (None,) * len(peers)
    self.in_use: tuple[Publication | None, ...] = self.held
    self.shown: Teachers | None = None
    self._plan = plan
    self._put = put
    self._teachers: Any = None  # Teachers, once there are some.
    self._group_id = group_id
    self._alone = False  # As was said.
    self._patient_until: int | None = None

  @property
  def held_steps(self) -> dict[int, int | None]:
    """Returns the step of the publication held, by peer."""
    return {
        peer: None if p is None else p.step
        for peer, p in zip(self.peers, self.held)
    }

  def prepare(
      self, found: Mapping[int, Slot], onto: Swap | None = None
  ) -> Swap | None:
    """Teachers with those of some peers replaced; nothing changes yet.

    Safe beside training, as long as nothing is taken meanwhile.

    Args:
      found: By peer; if it is empty the result is `onto`.
      onto: What was prepared before; None for what is held.
    """
    if not found:
      return onto
    before = onto or Swap(self.held, self._teachers)
    slots = {self.peers.index(peer): slot for peer, slot in found.items()}
    held = list(before.held)
    for slot, (publication, _) in slots.items():
      held[slot] = publication
    teachers = merge_teachers(
        before.teachers,
        {slot: variables for slot, (_, variables) in slots.items()},
        [p is not None for p in held],
        self._put,
    )
    return Swap(tuple(held), teachers)

  def restrict(self, swap: Swap | None, peers: Collection[int]) -> Swap | None:
    """Returns of what was prepared only the teachers of some peers."""
    found = {}
    for slot, peer in enumerate(self.peers):
      if swap and peer in peers:
        variables = jax.tree.map(
            lambda x, slot=slot: _slot(x, slot), swap.teachers.variables
        )
        found[peer] = (cast(Publication, swap.held[slot]), variables)
    return self.prepare(found)

  def take(self, swap: Swap | None) -> None:
    """Swaps the references."""
    if swap is not None:
      self.held, self._teachers = swap
      self.shown = None  # Of what was held before.

  def too_old(self, step: int) -> list[int]:
    """Returns the peers whose teachers are past their limit at `step`."""
    return [
        peer
        for peer, p in zip(self.peers, self.held)
        if self._plan.too_old(step, p)
    ]

  def lacking(self, step: int) -> list[int]:
    """Returns the peers without a teacher that can be used at `step`."""
    return [
        peer for peer, p in zip(self.peers, self._usable(step)) if p is None
    ]

  def _usable(self, step: int) -> tuple[Publication | None, ...]:
    return tuple(
        p
        if p
        and not self._plan.too_old(step, p)
        and p.step <= self._plan.newest_used(step)
        else None
        for p in self.held
    )

  def show(self, step: int) -> Teachers | None:
    """Returns the teachers of the update after `step` that are not too old."""
    in_use = self._usable(step)
    if in_use == self.in_use and self.shown is not None:
      return self.shown
    self.in_use = in_use
    if not any(in_use):
      self.shown = None
    elif in_use == self.held:
      self.shown = self._teachers
    else:
      # The variables stay where they are: a peer that comes or goes changes P
      # numbers.
      present = np.array([p is not None for p in in_use], np.float32)
      self.shown = self._teachers.replace(present_P=self._put(present))
    return self.shown

  def say_if_alone(self, step: int) -> None:
    """Logs once that no peer is present, and once that one is again."""
    present = ', '.join(str(p.group_id) for p in self.in_use if p is not None)
    if self._patient_until is None:
      # At the start nobody has published yet; that is nothing to speak of.
      self._patient_until = step + 2 * self._plan.every
    if present:
      if self._alone:
        logging.warning(
            'group %d has teachers again at step %d: those of group %s',
            self._group_id,
            step,
            present,
        )
      self._alone, self._patient_until = False, step
    elif not self._alone and step >= self._patient_until:
      self._alone = True
      logging.warning(
          'group %d trains alone from step %d on: there is no publication of'
          ' its peers (group %s) that is young enough; it takes them back when'
          ' they publish',
          self._group_id,
          step,
          ', '.join(map(str, self.peers)),
      )


def merge_teachers(
    old: Teachers | None,
    found: Mapping[int, Variables],
    present: Sequence[bool],
    put: Put = lambda array: array,
) -> Teachers:
  """Returns new teachers, some slots replaced; the old ones stay as they are.

  Leaf by leaf: besides `found` the host holds one stacked leaf at a time.

  Args:
    old: What the other slots keep; None if there is nothing.
    found: Slot -> variables; at least one.
    present: For each of the P slots, whether it counts.
    put: Puts one array on the devices.
  """
  slots = sorted(found)

  def merge(*leaves: Array) -> Array:
    new = dict(zip(slots, leaves))
    if len(new) == len(present) == 1:
      return put(leaves[0][None])  # No copy.
    # A slot that never held anything gets a copy of another one: finite,
    # whatever the model does with it, and not counted.
    kept = lambda i: leaves[0] if old is None else _slot(leaves[-1], i)
    return put(
        np.stack([new[i] if i in new else kept(i) for i in range(len(present))])
    )

  trees = [found[slot] for slot in slots]
  trees += [] if old is None else [old.variables]
  return Teachers(
      variables=jax.tree.map(merge, *trees),
      present_P=put(np.array(present, np.float32)),
  )


def _slot(array: Array, slot: int) -> np.ndarray:
  """Returns one slot, on the host."""
  if isinstance(array, jax.Array):
    # Of one device: the processes of a group need not meet. Indexed there:
    # jax remembers the host copy of an array as long as that lives.
    array = array.addressable_shards[0].data
  return np.asarray(array[slot])


class Reader:
  """Reads publications of peers; what is bad is named, counted, not used.

  It is looked at again only if its writer has made it again. Each peer has its
  time to answer: what hangs is asked nothing more until it has come back, and
  holds up nobody else.

  Attributes:
    rejected: How many publications were bad.
    last_rejection: Which one was the last, and why; '' if there is none.
  """

  def __init__(
      self,
      store: Store,
      teacher_dtype: str,
      troubles: Troubles,
      patience: Patience,
  ):
    self.rejected = 0
    self.last_rejection = ''
    self._store = store
    self._dtype = teacher_dtype
    self._troubles = troubles
    self._seconds = patience.answer
    # Of step n of a peer: when that which was bad had been made.
    self._bad: dict[tuple[int, int], float | None] = {}
    # By peer: what it was asked and has not answered in time.
    self._late: dict[int, tuple[tuple, concurrent.futures.Future]] = {}

  def newest(
      self,
      peer: int,
      held: Publication | None = None,
      most: float = math.inf,
  ) -> int | None:
    """Returns the newest step that may be better than what is held.

    Args:
      peer: Whose.
      held: What is held of it.
      most: The last step that is of use.
    """
    in_hand = self._in_hand(peer)
    if in_hand is not None:
      return in_hand  # A newer one would take as long.
    for step in reversed(self._ask(peer, self._store.steps) or ()):
      if held is not None and step == held.step:
        return None
      if step <= most and not self.is_bad(peer, step):
        # One before what is held is better if the peer has begun anew.
        if held is None or step > held.step:
          return step
        return step if self._began_anew(peer, step, held) else None
    return None

  def _began_anew(self, peer: int, step: int, held: Publication) -> bool:
    """Returns whether a publication is of a later life than what is held."""
    life = self._ask(peer, self._store.life, step)
    return life is not None and life > held.life

  def is_bad(self, peer: int, step: int) -> bool:
    """Returns whether that one was rejected and is still the same one."""
    key = (peer, step)
    return key in self._bad and self._bad[key] == self._ask(
        peer, self._store.made, step
    )

  def hangs(self, peer: int) -> bool:
    """Returns whether a peer has not answered what it was asked."""
    return peer in self._late

  def read(self, steps: Mapping[int, int]) -> dict[int, Slot]:
    """Reads step `steps[peer]` of each peer; leaves out what cannot be used."""
    found = {}
    for peer, step in steps.items():
      with contextlib.suppress(checkpoints.MismatchError):
        slot = self._read(peer, step)
        if slot is not None:
          found[peer] = slot
    return found

  def read_if_there(self, peer: int, step: int) -> Slot | None:
    """Reads one; None if it is not there yet, or cannot be used.

    Raises:
      checkpoints.MismatchError: If the peer trains something else.
    """
    if self._in_hand(peer) != step and (
        step not in (self._ask(peer, self._store.steps) or ())
        or self.is_bad(peer, step)
    ):
      return None
    with self._store.reading({peer: step}):
      return self._read(peer, step)

  def _in_hand(self, peer: int) -> int | None:
    """Returns which one has been read meanwhile, too late for who asked."""
    asked, answer = self._late.get(peer, (('',), None))
    reading = asked[0] == self._read_now.__name__
    if reading and answer and answer.done():
      return asked[1]
    return None

  def _read(self, peer: int, step: int) -> Slot | None:
    read = self._ask(peer, self._read_now, step)
    if read is None:
      return None
    made, slot = read
    if isinstance(slot, checkpoints.MissingError):
      return None  # The peer is faster than this reader: there is a newer one.
    if isinstance(slot, Exception):
      self._reject(peer, step, made, slot)
      if isinstance(slot, checkpoints.MismatchError):
        raise slot
      return None
    return slot

  def _read_now(
      self, peer: int, step: int
  ) -> tuple[float | None, Slot | Exception]:
    made = self._store.made(peer, step)  # It may be made again meanwhile.
    try:
      publication, variables = self._store.read(peer, step)
    except (
        checkpoints.MissingError,
        checkpoints.DamagedError,
        checkpoints.MismatchError,
    ) as e:
      return made, e
    return made, (publication, cast_floats(variables, self._dtype))

  def _ask(self, peer: int, question: Callable[..., Any], *args: Any) -> Any:
    """Returns an answer about a peer; None if there is none (in time)."""
    if self._store.at_hand:
      return question(peer, *args)
    asked = (question.__name__, *args)
    before, answer = self._late.pop(peer, (asked, None))
    if answer is None or (answer.done() and before != asked):
      before, answer = asked, background.submit(question, peer, *args)
      concurrent.futures.wait([answer], self._seconds)
    reads = before[0] == self._read_now.__name__
    verb = 'reading' if reads else 'listing'
    doing = f'{verb} publications of group {peer}'
    if not answer.done():
      self._late[peer] = before, answer
      error = TimeoutError(f'it hangs: no answer in {self._seconds:g} s')
      self._troubles.failed(doing, error)
      return None
    try:
      found = answer.result()
    except OSError as e:  # The file system, not the peer: it may pass.
      self._troubles.failed(doing, e)
      return None
    self._troubles.worked(doing)
    return found

  def _reject(
      self, peer: int, step: int, made: float | None, error: Exception
  ) -> None:
    self._bad[peer, step] = made
    self.rejected += 1
    self.last_rejection = textwrap.shorten(str(error), _LONGEST_REASON)
    logging.warning(
        'Rejected publication %d of group %d: %s',
        step,
        peer,
        self.last_rejection,
    )


class Means(NamedTuple):
  """Parts that both ways of fetching work with.

  Attributes:
    teaching: What is held, and swapped.
    reader: Of publications.
    store: Where they are.
    plan: When to fetch what.
    agreement: How the processes of this group decide together.
    waiting: How long peers are waited for.
    patience: Time limits.
  """

  teaching: Teaching
  reader: Reader
  store: Store
  plan: Plan
  agreement: Agreement
  waiting: Waiting
  patience: Patience

  def submit(
      self, function: Callable[..., Any], *args: Any
  ) -> concurrent.futures.Future:
    """Runs beside training, if there is something to wait for."""
    return background.submit(function, *args, inline=self.store.at_hand)


class Fetching(Protocol):
  """Brings publications into a `Teaching`."""

  def fetch(self, step: int) -> None:
    """Takes what there is for the update after `step`."""

  def wait(self, step: int) -> None:
    """Waits until every peer has a teacher for the update after `step`."""

  def restore(self, steps: Mapping[int, int | None]) -> None:
    """Takes what was in use, by peer; the newest where that is gone."""

  def close(self) -> None:
    """Ends the thread."""


class _Read(NamedTuple):
  """Whose publications one process has read, and the teachers with them."""

  found: frozenset[int]
  swap: Swap | None


class Freshest:
  """Takes what is newest; waits for nothing but by the policy of the plan.

  The processes of a group meet at exchange steps, and after 1, 2, 4, 8, ...
  steps more: few meetings, and a publication waits for one at most as long as
  it took to read.
  """

  def __init__(self, group_id: int, means: Means):
    self._group_id = group_id
    self._means = means
    self._teaching = means.teaching
    self._running: concurrent.futures.Future | None = None
    self._poll_seconds = means.patience.poll
    self._most = math.inf  # The last step that is of use.
    self._hurry = threading.Event()  # Ends the pause between two looks.
    # The peers of whom something newer is looked for.
    self._wanted = set(means.teaching.peers)
    self._bringing: Iterator[concurrent.futures.Future] | None = None

  def fetch(self, step: int) -> None:
    self._most = self._means.plan.newest_used(step)
    if self._meets(step):
      if self._means.plan.due(step):
        self._wanted = set(self._teaching.peers)
      if self._bringing is None and self._wanted:
        self._bringing = self._bring(self._wanted)
      if self._bringing and next(self._bringing, _OVER) is _OVER:
        self._bringing = None
    policy = self._means.plan.staleness_policy
    if policy != 'drop' and self._teaching.too_old(step):
      self._look_again(self._teaching.too_old, self._stale, step)

  def wait(self, step: int) -> None:
    self._most = self._means.plan.newest_used(step)
    if self._teaching.lacking(step):
      self._look_again(self._teaching.lacking, self._untaught, step)

  def restore(self, steps: Mapping[int, int | None]) -> None:
    used = {peer: step for peer, step in steps.items() if step is not None}
    if not used:
      return
    self._take(self._read(self._choose(used)))
    held = self._teaching.held_steps
    self._finish(self._bring([peer for peer in used if held[peer] is None]))

  def close(self) -> None:
    self._hurry.set()
    if self._running is not None:
      concurrent.futures.wait([self._running], self._means.patience.read)

  def _meets(self, step: int) -> bool:
    since = step % self._means.plan.every
    # Alone a process meets at every step; else at 0 and at powers of two.
    return self._means.agreement is ALONE or not since & (since - 1)

  def _bring(
      self, peers: Collection[int]
  ) -> Iterator[concurrent.futures.Future]:
    """Looks, reads and takes; yields what it waits for, again and again."""
    while peers:
      look = self._running = self._means.submit(self._look, sorted(peers))
      while not self._all(look.done()):
        yield look
      steps = self._choose(look.result())
      if not steps:
        return
      read = self._running = self._means.submit(self._read, steps)
      while not self._all(read.done()):
        # A process that has failed counts as done, and fails when it takes.
        yield read
      taken = self._take(read.result())
      self._wanted -= taken
      peers = steps.keys() - taken  # What was bad: there may be one before it.

  def _look(self, peers: Sequence[int]) -> dict[int, int]:
    """Returns the newest of each peer; in the thread, of the primary."""
    held = dict(zip(self._teaching.peers, self._teaching.held))
    found = {}
    if self._means.agreement.is_primary:
      for peer in peers:
        step = self._means.reader.newest(peer, held[peer], self._most)
        if step is not None:
          found[peer] = step
    patience = self._means.patience
    quiet = self._means.store.at_hand or not self._means.agreement.is_primary
    if found or quiet:
      self._poll_seconds = patience.poll
    else:
      # The loop asks again at once; a peer that is done or dead never answers.
      self._hurry.wait(self._poll_seconds)
      self._poll_seconds = min(2 * self._poll_seconds, patience.longest_poll)
    return found

  def _read(self, steps: Mapping[int, int]) -> _Read:
    """Reads onto the devices, a few peers at a time; in the thread."""
    found: set[int] = set()
    swap, peers = None, list(steps)
    store, reader = self._means.store, self._means.reader
    with store.turn(), store.reading(steps):
      for first in range(0, len(peers), AT_ONCE):
        some = {p: steps[p] for p in peers[first : first + AT_ONCE]}
        slots = reader.read(some)
        swap = self._teaching.prepare(slots, swap)
        found |= slots.keys()
        del slots
    return _Read(frozenset(found), swap)

  def _take(self, read: _Read) -> frozenset[int]:
    """Takes what every process could read; returns whose that was."""
    peers = self._teaching.peers
    here = np.array([peer in read.found for peer in peers])
    everywhere = self._means.agreement.all_true(here)
    agreed = frozenset(p for p, there in zip(peers, everywhere) if there)
    swap = read.swap
    if agreed != read.found:
      swap = self._teaching.restrict(swap, agreed)
    self._teaching.take(swap)
    return agreed

  def _choose(self, steps: Mapping[int, int]) -> dict[int, int]:
    """Returns the primary's choice, by peer; the same in all processes."""
    peers = self._teaching.peers
    wanted = np.array([steps.get(p, _ABSENT) for p in peers], np.int32)
    chosen = np.asarray(self._means.agreement.choose(wanted))
    return {p: int(s) for p, s in zip(peers, chosen) if s != _ABSENT}

  def _all(self, here: bool) -> bool:
    return bool(self._means.agreement.all_true(np.array(here)))

  def _finish(
      self,
      bringing: Iterator[concurrent.futures.Future],
      go_on: Callable[[], None] = lambda: None,
  ) -> None:
    """Goes through a `_bring` at once, in the foreground."""
    self._hurry.set()
    try:
      for future in bringing:
        go_on()
        concurrent.futures.wait([future], self._means.patience.poll)
    finally:
      self._hurry.clear()

  def _look_again(
      self,
      missing: Callable[[int], list[int]],
      why: Callable[[int], str],
      step: int,
  ) -> None:
    """Looks, in the foreground, until no peer is missing, or a time limit.

    Raises:
      StaleError: If the policy is `fail`, after one look at who is too old.
    """
    start, means = time.monotonic(), self._means

    def go_on() -> None:
      means.waiting.go_on(start, why(step), means.agreement)

    while True:
      # The look under way may have begun too early.
      if self._bringing is not None:
        self._finish(self._bringing, go_on)
        self._bringing = None
      self._finish(self._bring(self._teaching.peers), go_on)
      if not missing(step):
        return
      if means.plan.staleness_policy == 'fail' and self._teaching.too_old(step):
        raise StaleError(
            f'{self._stale(step)}; see whether these groups run, or set'
            ' staleness_policy to drop or wait'
        )
      go_on()
      means.store.wait(means.patience.poll)

  def _untaught(self, step: int) -> str:
    peers = ', '.join(map(str, self._teaching.lacking(step)))
    return (
        f'group {self._group_id} has no teacher of group {peers} that can be'
        f' used at step {step}. {self._means.store.advice}'
    )

  def _stale(self, step: int) -> str:
    held = self._teaching.held_steps
    ages = ', '.join(
        f'group {peer} by {step - (held[peer] or 0)} steps'
        for peer in self._teaching.too_old(step)
    )
    return (
        f'teachers of group {self._group_id} are stale at step {step}: {ages},'
        f' and max_staleness_steps={self._means.plan.max_staleness_steps}'
    )


class Lockstep:
  """Takes the publications of exactly the step asked for, and waits."""

  def __init__(self, means: Means):
    self._means = means
    self._asked: int | None = None
    self._ahead: tuple[int, concurrent.futures.Future] | None = None

  def fetch(self, step: int) -> None:
    teaching, plan = self._means.teaching, self._means.plan
    asked = plan.asked(step)
    if asked is None or asked == self._asked:
      return
    found = self._read_before(asked)
    for peer in teaching.peers:
      found[peer] = self._read_when_there(peer, asked, found.get(peer))
    self._asked = asked
    teaching.take(teaching.prepare(found))
    if plan.staleness:
      # The next one is published already, or soon; well before it is needed.
      ahead = asked + plan.every
      self._ahead = (ahead, self._means.submit(self._read_ahead, ahead))

  def wait(self, step: int) -> None:
    self.fetch(step)

  def restore(self, steps: Mapping[int, int | None]) -> None:
    """Does nothing: what is in use follows from the step alone."""

  def close(self) -> None:
    if self._ahead is not None:
      concurrent.futures.wait([self._ahead[1]], self._means.patience.read)

  def _read_ahead(self, step: int) -> dict[int, Slot]:
    found = {}
    for peer in self._means.teaching.peers:
      slot = self._means.reader.read_if_there(peer, step)
      if slot is not None:
        found[peer] = slot
    return found

  def _read_before(self, asked: int) -> dict[int, Slot]:
    ahead, self._ahead = self._ahead, None
    if ahead is None or ahead[0] != asked:
      return {}
    return ahead[1].result()

  def _read_when_there(self, peer: int, step: int, slot: Slot | None) -> Slot:
    means, reader = self._means, self._means.reader
    start = time.monotonic()
    overtaken = None  # Since when a later publication is there.
    limit = min(means.patience.out_of_order, means.waiting.timeout_seconds)
    while True:
      slot = slot or reader.read_if_there(peer, step)
      if means.agreement.all_true(np.array(slot is not None)):
        return cast(Slot, slot)
      means.store.raise_failure()
      newest = reader.newest(peer)
      now = time.monotonic()
      in_vain, failure = None, means.store.failure(peer)
      if failure:
        in_vain = f'group {peer} has ended: {failure}'
      elif newest is None or newest < step or reader.is_bad(peer, step):
        overtaken = None
      elif overtaken is None:
        overtaken = now
      elif now - overtaken > limit:
        in_vain = (
            f'group {peer} has published step {newest} but not, or no longer,'
            f' step {step}, which lockstep asks for; all groups need the same'
            ' every, and publications must not be deleted by hand'
        )
      why = self._why(peer, step, newest)
      means.waiting.go_on(start, why, means.agreement, in_vain)
      means.store.wait(means.patience.poll)

  def _why(self, peer: int, step: int, newest: int | None) -> str:
    if self._means.reader.hangs(peer):
      return f'reading what group {peer} has published hangs'
    if self._means.reader.is_bad(peer, step):
      return (
          f'publication {step} of group {peer} is damaged'
          f' ({self._means.reader.last_rejection}); started again from before'
          ' that step, the group makes it again'
      )
    return (
        f'group {peer} has not published step {step}; its newest is'
        f' {"none" if newest is None else f"step {newest}"}.'
        f' {self._means.store.advice}'
    )
