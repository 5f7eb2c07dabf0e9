"""The teachers that a group holds, and which of them are young enough to use.

Shape suffix: P peers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from codistill_jax.base import Array, Teachers, Variables
from codistill_jax.exchange.plan import Plan
from codistill_jax.exchange.publications import Publication, Slot

Put = Callable[[Array], Array]


class Swap(NamedTuple):
  """The state that changes when a teacher does.

  Attributes:
    held: Per peer, the publication that its teacher is, or None.
    teachers: All of them.
  """

  held: tuple[Publication | None, ...]
  teachers: Teachers


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
    self.in_use = self.held
    self.shown: Teachers | None = None
    self._plan = plan
    self._put = put
    self._teachers: Teachers | None = None
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
      if peer in peers:
        variables = jax.tree.map(
            lambda x, slot=slot: _slot(x, slot), swap.teachers.variables
        )
        found[peer] = (swap.held[slot], variables)
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

  def show(self, step: int) -> Teachers | None:
    """Returns the teachers of the update after `step` that are not too old."""
    in_use = tuple(
        None if self._plan.too_old(step, p) else p for p in self.held
    )
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
