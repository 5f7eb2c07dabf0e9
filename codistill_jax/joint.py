"""Groups that update together: one program, and each group's own turns.

`run_group` drives one group. Here every group has a seat that takes the place
of its `PmapStep`: the first one to ask for update n makes it for all, and the
others find theirs made. Nothing is copied or stacked between updates.

    update = JointUpdate(population, mix_GG)
    runs = [run_group(seat, state, stream, ...) for seat, ... in ...]
    for results in zip(*runs):  # In turn, after all have begun.
"""

import threading
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from codistill_jax.base import (
    Array,
    Batch,
    Metrics,
    PeerPredictions,
    Stream,
    TrainState,
    Variables,
)
from codistill_jax.population import Population


class GroupState:
  """One group's part of a stacked state, sliced when it is read.

  Attributes:
    turn: How many joint updates made it.
  """

  def __init__(
      self, update: 'JointUpdate', group_id: int, turn: int, stacked: TrainState
  ):
    self._update = update
    self._group_id = group_id
    self._stacked = stacked
    self.turn = turn

  @property
  def variables(self) -> Variables:
    """On one of the group's devices."""
    return self._update.population.variables(self._stacked, self._group_id)

  def collect(self) -> TrainState:
    """The whole state, as numpy copies."""
    return self._update.population.collect(self._stacked, self._group_id)


class Scalar:
  """One group's value of a metric, read when it is asked for."""

  def __init__(self, values_G: jax.Array, group_id: int):
    self._values_G = values_G
    self._group_id = group_id

  def __array__(
      self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy  # Of a single number; the stack is read once for all groups.
    return np.asarray(np.asarray(self._values_G)[self._group_id], dtype)

  def __float__(self) -> float:
    return float(np.asarray(self))


class Seat:
  """One group's place at a joint update; made by `JointUpdate`.

  To the loop it is what a `PmapStep` is to a group by itself.

  Attributes:
    num_replicas: Replicas of the group.
    peers: Its teachers, as the update gives them to its pure step.
  """

  def __init__(self, update: 'JointUpdate', group_id: int):
    self._update = update
    self._group_id = group_id
    self.num_replicas = update.population.num_replicas
    self.peers = update.peers_of(group_id)
    # As of a `PmapStep`.
    self.device_kind = update.population.device_kind
    self.train_step = update.population.train_step
    self.axis_sizes = update.population.axis_sizes

  @property
  def num_traces(self) -> int:
    return self._update.population.num_traces

  def place(self, state: TrainState) -> GroupState | None:
    """Registers the group; of the last one on, states are on the devices."""
    return self._update.register(self._group_id, state)

  def place_teachers(self, teachers: PeerPredictions) -> PeerPredictions:
    return teachers  # The joint update has them all.

  def collect(self, state: GroupState) -> TrainState:
    return state.collect()

  def __call__(
      self,
      state: GroupState,
      batch: Batch,
      teachers: PeerPredictions | None,
      distill_weight: float | Array,
  ) -> tuple[GroupState, Metrics]:
    """As the pure step. All groups must ask before one asks again.

    Raises:
      ValueError: If a group has not begun or not caught up, or has been given
        something else than the others.
    """
    told = (batch, teachers is not None, float(distill_weight))
    return self._update.turn(self._group_id, state, *told)


class JointUpdate:
  """One update for all groups.

  Attributes:
    population: The step that makes it.
    seats: By group, what takes the place of its `PmapStep`.
  """

  def __init__(
      self,
      population: Population,
      mix_GG: Array,
      top_k: int | None = None,
  ):
    """Waits for all groups to begin.

    Args:
      population: The step, with a shared batch.
      mix_GG: Who learns from whom; `predictions.mixing_matrix`.
      top_k: As in `PeerPredictions`.
    """
    self.population = population
    self._mix_GG = np.asarray(mix_GG, np.float32)
    self._peers = population.peers(mix_GG, top_k)
    self._begun: dict[int, TrainState] = {}
    self._state: TrainState | None = None
    self._metrics: Metrics = {}
    self._turn = 0
    self._told: tuple[Batch, bool, float] = ({}, False, 0.0)
    self._waiting: set[int] = set()  # Who has yet to take the last update.
    self.seats = [Seat(self, g) for g in range(population.num_groups)]

  def peers_of(self, group_id: int) -> PeerPredictions:
    """The teachers of one group."""
    return self._peers.replace(mix_G=self._mix_GG[group_id])

  def register(self, group_id: int, state: TrainState) -> GroupState:
    """A group begins with this state; a run may begin again."""
    self._state = None
    self._waiting = set()
    self._begun[group_id] = state
    return _Begun(self, group_id, self._turn, state)

  def turn(
      self,
      group_id: int,
      state: GroupState,
      batch: Batch,
      codistilled: bool,
      weight: float,
  ) -> tuple[GroupState, Metrics]:
    """The update of one group; made for all by the first that asks."""
    told = (batch, codistilled, weight)
    if state.turn == self._turn:
      self._advance(group_id, told)
    elif group_id not in self._waiting:
      raise ValueError(
          f'group {group_id} is {self._turn - state.turn} updates behind the'
          ' others; step all groups in turn'
      )
    elif not _same(told, self._told):
      raise ValueError(
          f'group {group_id} got another batch or distill weight than the first'
          ' group of its turn; give all groups the same stream (partition'
          " 'shared', one order) and schedule"
      )
    self._waiting.discard(group_id)
    metrics = {k: Scalar(x, group_id) for k, x in self._metrics.items()}
    return GroupState(self, group_id, self._turn, self._state), metrics

  def _advance(self, group_id: int, told: tuple[Batch, bool, float]) -> None:
    if self._waiting:
      raise ValueError(
          f'group {group_id} asks for its next update before group(s)'
          f' {_names(self._waiting)} took the last one; step all groups in turn'
      )
    if self._state is None:
      self._state = self._place()
    batch, codistilled, weight = told
    teachers = self._peers if codistilled else None
    self._state, self._metrics = self.population(
        self._state, batch, teachers, weight
    )
    self._told = told
    self._turn += 1
    self._waiting = set(range(self.population.num_groups))

  def _place(self) -> TrainState:
    missing = set(range(self.population.num_groups)) - self._begun.keys()
    if missing:
      raise ValueError(
          f'group(s) {_names(missing)} have not begun; call run_group for all'
          ' groups before the first update of any'
      )
    steps = sorted({int(state.step) for state in self._begun.values()})
    if len(steps) > 1:
      raise ValueError(
          f'the groups begin at steps {", ".join(map(str, steps))}; groups that'
          ' update together begin at one step'
      )
    begun = [self._begun[g] for g in range(self.population.num_groups)]
    self._begun = {}  # No second copy of what is on the devices.
    return self.population.place(begun)


def _same(told: tuple, before: tuple) -> bool:
  (batch, *rest), (batch_before, *rest_before) = told, before
  if rest != rest_before:
    return False
  if batch is batch_before:  # As of a `SharedStream`.
    return True
  (leaves, tree), (leaves_before, tree_before) = (
      jax.tree.flatten(dict(x)) for x in (batch, batch_before)
  )
  return tree == tree_before and all(
      np.array_equal(x, y) for x, y in zip(leaves, leaves_before)
  )


def _names(groups: Iterable[int]) -> str:
  return ', '.join(map(str, sorted(groups)))


class _Begun(GroupState):
  """The state that a group begins with, before it is on the devices."""

  @property
  def variables(self) -> Variables:
    return self._stacked.variables

  def collect(self) -> TrainState:
    return self._stacked


class SharedStream:
  """One stream for several groups, each of which loads ahead: read once."""

  _KEPT = 8  # More than any group is ahead of another.

  def __init__(self, stream: Stream):
    self._stream = stream
    self._made: dict[int, dict[str, Array]] = {}
    self._lock = threading.Lock()

  def batch(self, step: int) -> dict[str, Array]:
    with self._lock:
      if step not in self._made:
        self._made[step] = self._stream.batch(step)
        for old in sorted(self._made)[: -self._KEPT]:
          del self._made[old]
      return self._made[step]
