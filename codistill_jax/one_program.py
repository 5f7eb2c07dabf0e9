"""Several groups as one compiled program; the only `shard_map`.

The states of all groups are one state with an axis G in front that never leaves
the devices: G groups on one device are a `vmap`, and the same program spreads
them over a mesh of M blocks of groups by R replicas. What a step needs of one
group (a publication, a checkpoint, an evaluation) is sliced when it is read.

`run_group` drives one group. Here every group has a `Seat` that takes the place
of its `PmapStep`: the first one to ask for update n makes it for all, and the
others find theirs made. Nothing is copied or stacked between updates.

    update = JointUpdate(population, mix_GG)
    runs = [run_group(seat, state, stream, ...) for seat, ... in ...]
    for results in zip(*runs):  # In turn, after all have begun.

Shape suffixes: G groups, M blocks of G / M groups on devices of their own,
R replicas of a group, B rows of the group batch, P peers.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from codistill_jax import programs, replicas
from codistill_jax.base import (
    GROUP_AXIS,
    REPLICA_AXIS,
    Array,
    Batch,
    Metrics,
    PeerPredictions,
    PyTree,
    Stream,
    Teachers,
    TrainState,
    Variables,
)

BLOCK_AXIS = 'group_block'  # The mesh axis; `GROUP_AXIS` is within a block.


class Population:
  """The train step of G groups as one program.

  Called as `step(state, batch, teachers, distill_weight)`, like the pure step,
  with a state that went through `place` once. Metrics have a leading axis G.
  The state passed in is donated: keep what is returned.

  Attributes:
    num_groups: G.
    num_replicas: Replicas of each group.
    num_traces: How often the step was traced, so compiled; 2 in a whole run.
    device_kind: What its devices are, in jax's words.
    train_step: The pure step of one replica of one group.
    axis_sizes: The named axes within which that is called, all groups being
      in one block and each on one replica.
  """

  def __init__(
      self,
      train_step: Callable[..., tuple[TrainState, Metrics]],
      num_groups: int,
      *,
      devices: Sequence[jax.Device] | None = None,
      num_replicas: int = 1,
      shared_batch: bool = True,
  ):
    """Wraps a step made with `axis_name=REPLICA_AXIS`.

    Args:
      train_step: From `make_train_step(..., axis_name=REPLICA_AXIS)`.
      num_groups: G.
      devices: Devices to use, as far as blocks of equally many groups fit on
        them; default: all.
      num_replicas: R, devices for each group.
      shared_batch: Whether all groups get the same batch (B, ...); otherwise
        each has its own, (G, B, ...).

    Raises:
      ValueError: If there are too few devices, or several processes.
    """
    devices = list(devices or jax.devices())
    mesh = _mesh(devices, num_groups, num_replicas)
    self.num_groups, self.num_replicas = num_groups, num_replicas
    self.num_traces = 0
    self.device_kind = devices[0].device_kind
    self.train_step = train_step
    self.axis_sizes = {REPLICA_AXIS: 1, BLOCK_AXIS: 1, GROUP_AXIS: num_groups}
    self._wait = devices[0].platform == 'cpu' and mesh.size > 1
    rows = (
        Spec(REPLICA_AXIS) if shared_batch else Spec(BLOCK_AXIS, REPLICA_AXIS)
    )
    self._batch = NamedSharding(mesh, rows)
    self._specs = _state_specs()
    self._mesh = mesh
    summed = replicas.summing(train_step, num_replicas)

    def counted(*args: Any) -> tuple[TrainState, Metrics]:
      self.num_traces += 1  # Runs only while jax traces.
      return summed(*args)

    in_axes = (0, None if shared_batch else 0, 0, None)
    block_step = jax.vmap(counted, in_axes=in_axes, axis_name=GROUP_AXIS)
    groups: Any = Spec(BLOCK_AXIS)
    # The check of what varies over which axis would sum the gradients of the
    # replicas once more; the step has psummed what it returns.
    step = jax.shard_map(
        block_step,
        mesh=mesh,
        in_specs=(self._specs, rows, groups, Spec()),
        out_specs=(self._specs, groups),
        check_vma=False,
    )
    self._step = programs.Programs(jax.jit(step, donate_argnums=(0,)))

  def __call__(
      self,
      state: TrainState,
      batch: Batch,
      teachers: PeerPredictions | Teachers | None,
      distill_weight: float | Array,
  ) -> tuple[TrainState, Metrics]:
    self._check_rows(batch)
    state, metrics = self._step(
        state,
        jax.device_put(dict(batch), self._batch),
        teachers,
        np.float32(distill_weight),
    )
    if self._wait:
      # As in `PmapStep`: steps in flight on fake devices dead-lock.
      jax.block_until_ready(state)
    return state, metrics

  def expect(self, teachers: PeerPredictions | Teachers) -> None:
    """Compiles for such teachers beside the updates without."""
    self._step.expect(teachers)

  def peers(self, mix_GG: Array, top_k: int | None = None) -> PeerPredictions:
    """Returns the `teachers` of all groups, on the devices.

    Args:
      mix_GG: Rows of `peer_predictions.mixing_matrix`.
      top_k: As in `PeerPredictions`, between devices. Where all groups share
        theirs nothing moves, and to pick costs more than to take all.
    """
    if self._mesh.shape[BLOCK_AXIS] == 1:
      top_k = None
    return PeerPredictions(
        jax.device_put(np.asarray(mix_GG, np.float32), self.sharding),
        axis_name=(BLOCK_AXIS, GROUP_AXIS),
        top_k=top_k,
    )

  def stack(self, trees: Sequence[PyTree]) -> PyTree:
    """Stacks a tree of each group, such as its teachers, on the devices."""
    return self._stack(trees, Spec(BLOCK_AXIS))

  @property
  def sharding(self) -> NamedSharding:
    """Returns the sharding of arrays with an axis G in front."""
    return NamedSharding(self._mesh, Spec(BLOCK_AXIS))

  def place(self, states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of all groups on the devices, in the order of groups.

    Args:
      states: As of `PmapStep.place`, one for each group. Not altered, and not
        shared with the result.

    Raises:
      ValueError: If there are not G of them, they differ in shape or in
        what they are made of, or the replicas cannot share the rows evenly.
    """
    if len(states) != self.num_groups:
      raise ValueError(
          f'Expected the states of {self.num_groups} groups, got {len(states)}.'
      )
    for x in jax.tree.leaves(states[0].carry):
      replicas.check_group_batch(len(x), self.num_replicas)
    fields = vars(self._specs)
    parts = {
        name: self._stack([getattr(state, name) for state in states], spec)
        for name, spec in fields.items()
    }
    return TrainState(**parts)

  def collect(self, state: TrainState, group_id: int) -> TrainState:
    """Returns one group's state as numpy copies; `place` takes it back."""
    return jax.tree.map(lambda x: _read(x, group_id), state)

  def variables(self, state: TrainState, group_id: int) -> Variables:
    """Returns one group's variables, on one of its devices."""
    parts, places = [], []
    leaves, treedef = jax.tree.flatten(state.variables)
    for x in leaves:
      shard = next(s for s in x.addressable_shards if _holds(s, group_id, x))
      parts.append(shard.data)
      places.append(group_id - (shard.index[0].start or 0))
    return jax.tree.unflatten(treedef, _rows(parts, np.int32(places[0])))

  def _stack(self, trees: Sequence[PyTree], spec: Spec) -> PyTree:
    return jax.tree.map(lambda *xs: self._put_rows(xs, spec), *trees)

  def _put_rows(self, xs: Sequence[Array], spec: Spec) -> jax.Array:
    """Stacked, leaf by leaf, without a whole stack on the host."""
    xs = [np.asarray(x) for x in xs]
    if len({(x.shape, x.dtype) for x in xs}) > 1:
      raise ValueError(
          'the groups of one program have one shape, but an array is'
          f' {" and ".join(sorted({f"{x.dtype}{list(x.shape)}" for x in xs}))}'
      )
    return jax.make_array_from_callback(
        (len(xs), *xs[0].shape),
        NamedSharding(self._mesh, spec),
        lambda index: np.stack([x[index[1:]] for x in xs[index[0]]]),  # type: ignore[index]
    )

  def _check_rows(self, batch: Batch) -> None:
    rows = self._batch.spec.index(REPLICA_AXIS)
    for x in jax.tree.leaves(dict(batch)):
      replicas.check_group_batch(x.shape[rows], self.num_replicas)


def _mesh(
    devices: Sequence[jax.Device], num_groups: int, num_replicas: int
) -> Mesh:
  """(M, R) of the devices, with the largest M that divides G."""
  if jax.process_count() > 1:
    raise ValueError(
        'groups that are one program are one process, and here are'
        f' {jax.process_count()}; start them without --coordinator'
    )
  if len(devices) < num_replicas:
    raise ValueError(
        f'num_replicas={num_replicas}, but there are {len(devices)} devices'
    )
  blocks = len(devices) // num_replicas
  while num_groups % blocks:
    blocks -= 1
  used = np.array(devices[: blocks * num_replicas])
  return Mesh(used.reshape(blocks, num_replicas), (BLOCK_AXIS, REPLICA_AXIS))


def _state_specs() -> TrainState:
  """How each part of a stacked state is laid out; a prefix of it."""
  groups: Any = Spec(BLOCK_AXIS)
  return TrainState(
      step=groups,
      variables=groups,
      opt_state=groups,
      rng=groups,
      carry=Spec(BLOCK_AXIS, REPLICA_AXIS),
      teacher_carry=Spec(BLOCK_AXIS, None, REPLICA_AXIS),
  )


@jax.jit
def _rows(arrays: list[jax.Array], row: Array) -> list[jax.Array]:
  return [jax.lax.dynamic_index_in_dim(x, row, 0, False) for x in arrays]


def _holds(shard: Any, group_id: int, x: jax.Array) -> bool:
  return group_id in range(*shard.index[0].indices(len(x)))


def _read(x: jax.Array, group_id: int) -> np.ndarray:
  """Row `group_id` of a stacked array, from the devices that hold it."""
  found = np.empty(x.shape[1:], x.dtype)
  for shard in x.addressable_shards:
    # Not x[group_id], which would copy through all devices.
    if shard.replica_id == 0 and _holds(shard, group_id, x):
      row = group_id - (shard.index[0].start or 0)
      found[shard.index[1:]] = np.asarray(shard.data)[row]
  return found


# --- Turns in the loop of each group ------------------------------------------


class GroupState:
  """One group's part of a stacked state, sliced when it is read.

  Attributes:
    turn: How many joint updates made it.
    collect: () -> the whole state, as numpy copies.
  """

  def __init__(
      self,
      turn: int,
      variables: Callable[[], Variables],
      collect: Callable[[], TrainState],
  ):
    self.turn = turn
    self.collect = collect
    self._variables = variables

  @property
  def variables(self) -> Variables:
    """Returns the variables, on one of the group's devices."""
    return self._variables()


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


# Batch, teachers and distill weight of an update.
_Told = tuple[Batch, PeerPredictions | Teachers | None, float]


class Seat:
  """One group's place at a joint update; made by `JointUpdate`.

  To the loop it is what a `PmapStep` is to a group by itself.

  Attributes:
    num_replicas: Replicas of the group.
    peers: Its teachers, as the update gives them to its pure step; None if
      groups bring their own.
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

  def place_teachers(self, teachers: Any) -> PeerPredictions | Teachers:
    """Returns the teachers of all groups: those given, or their predictions."""
    peers = self._update.peers
    return teachers if peers is None else peers

  def expect(self, shapes: Any) -> None:
    """As of a `PmapStep`, for teachers that are the others' predictions."""
    del shapes
    if self._update.peers is not None:
      self._update.population.expect(self._update.peers)

  def collect(self, state: GroupState) -> TrainState:
    return state.collect()

  def __call__(
      self,
      state: GroupState,
      batch: Batch,
      teachers: PeerPredictions | Teachers | None,
      distill_weight: float | Array,
  ) -> tuple[GroupState, Metrics]:
    """As the pure step. All groups must ask before one asks again.

    Batch and teachers are those of all groups, the same for each that asks.

    Raises:
      ValueError: If a group has not begun or not caught up, or has been given
        something else than the others.
    """
    told = (batch, teachers, float(distill_weight))
    return self._update.turn(self._group_id, state, told)

  def leave(self) -> None:
    """Gives up the seat; the update goes on for the other groups."""
    self._update.leave(self._group_id)


class JointUpdate:
  """One update for all groups.

  Attributes:
    population: The step that makes it.
    peers: The teachers of all groups, if they learn from each other's
      predictions; else None.
    seats: By group, what takes the place of its `PmapStep`.
  """

  def __init__(
      self,
      population: Population,
      mix_GG: Array | None = None,
      top_k: int | None = None,
  ):
    """Waits for all groups to begin.

    Args:
      population: The step.
      mix_GG: Who learns from whose predictions, with a shared batch;
        `peer_predictions.mixing_matrix`. None: the exchange of each group gives
        the teachers of all, stacked.
      top_k: As in `Population.peers`.
    """
    self.population = population
    self._mix_GG = mix_GG
    self.peers = None if mix_GG is None else population.peers(mix_GG, top_k)
    self._begun: dict[int, TrainState] = {}
    self._state: TrainState | None = None
    self._metrics: Metrics = {}
    self._turn = 0
    self._told: _Told = ({}, None, 0.0)
    self._waiting: set[int] = set()  # Who has yet to take the last update.
    self._here = set(range(population.num_groups))
    self.seats = [Seat(self, g) for g in range(population.num_groups)]

  @property
  def variables(self) -> Variables | None:
    """Returns those of all groups, stacked; None before the first update.

    They stand until the next update.
    """
    return None if self._state is None else self._state.variables

  def peers_of(self, group_id: int) -> PeerPredictions | None:
    """Returns the teachers of one group."""
    if self.peers is None:
      return None
    mix_G = np.asarray(self._mix_GG, np.float32)[group_id]
    return self.peers.replace(mix_G=mix_G)

  def leave(self, group_id: int) -> None:
    """Waits for a group no more."""
    self._here.discard(group_id)
    self._waiting.discard(group_id)

  def register(self, group_id: int, state: TrainState) -> GroupState:
    """Registers the state that a group begins with; a run may begin again."""
    self._state = None
    self._waiting = set()
    self._here.add(group_id)
    self._begun[group_id] = state
    return GroupState(self._turn, lambda: state.variables, lambda: state)

  def turn(
      self,
      group_id: int,
      state: GroupState,
      told: _Told,
  ) -> tuple[GroupState, Metrics]:
    """Returns the update of one group; made for all by the first that asks."""
    if state.turn == self._turn:
      self._advance(group_id, told)
    elif group_id not in self._waiting:
      raise ValueError(
          f'group {group_id} is {self._turn - state.turn} updates behind the'
          ' others; step all groups in turn'
      )
    elif not _same(told, self._told):
      raise ValueError(
          f'group {group_id} got another batch or distill weight, or other'
          ' teachers, than the first group of its turn; give all groups one'
          " stream (partition 'shared', one order) and one schedule"
      )
    self._waiting.discard(group_id)
    metrics = {k: Scalar(x, group_id) for k, x in self._metrics.items()}
    of_group: Any = (self._state, group_id)
    mine = GroupState(
        self._turn,
        lambda: self.population.variables(*of_group),
        lambda: self.population.collect(*of_group),
    )
    return mine, metrics

  def _advance(self, group_id: int, told: _Told) -> None:
    if self._waiting:
      raise ValueError(
          f'group {group_id} asks for its next update before group(s)'
          f' {_names(self._waiting)} took the last one; step all groups in turn'
      )
    if self._state is None:
      self._state = self._place()
    self._state, self._metrics = self.population(self._state, *told)
    self._told = told
    self._turn += 1
    self._waiting = set(self._here)

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


def _same(told: _Told, before: _Told) -> bool:
  batch, teachers, weight = told
  batch_before, teachers_before, weight_before = before
  if teachers is not teachers_before or weight != weight_before:
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


class SharedStream:
  """One stream for several groups, each of which loads ahead: read once."""

  _KEPT = 8  # More than any group is ahead of another.

  def __init__(self, stream: Stream):
    self._stream = stream
    self._made: dict[int, Batch] = {}
    self._lock = threading.Lock()

  def batch(self, step: int) -> Batch:
    with self._lock:
      if step not in self._made:
        self._made[step] = self._stream.batch(step)
        for old in sorted(self._made)[: -self._KEPT]:
          del self._made[old]
      return self._made[step]
