"""Replicas: one pure step on all devices of a group; the only `jax.pmap`.

A group is one process with R devices or several processes with R devices
between them. Outside this module a group's arrays have no replica axis: state
is replicated, and rows (batches, carries) are those of the whole group batch.

Shape suffixes: R replicas of this process, B rows of the group batch,
P peers.
"""

import math
import os
import socket
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codistill_jax import jaxprs, programs
from codistill_jax.base import (
    ALONE,
    REPLICA_AXIS,
    Agreement,
    Array,
    Batch,
    Metrics,
    PyTree,
    Teachers,
    TrainState,
    checked_batch,
    host_copy,
)


def start_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    group_id: int = 0,
    heartbeat_seconds: int = 20,
) -> None:
  """Joins the processes of one group; to be called before any use of jax.

  A process that dies or hangs takes its group with it, so that whoever
  supervises the group can start it again as a whole: jax aborts the others
  (SIGABRT).

  Args:
    coordinator: `host:port` of process 0. None, as the next two: what SLURM,
      Open MPI, a JobSet or a TPU pod says, as jax understands it.
    num_processes: Processes of the group.
    process_id: This one, 0 <= process_id < num_processes.
    group_id: The group, which has a port of its own where jax chooses one.
    heartbeat_seconds: How long a process may give no sign of life.

  Raises:
    ValueError: If nothing is given, and jax finds out nothing.
  """
  # Of the job's number alone jax would make one port for all its groups.
  port = str(_coordinator_port(group_id))
  os.environ.setdefault('JAX_COORDINATOR_PORT', port)
  # Otherwise jax takes SIGTERM for itself and the group cannot be preempted.
  jax.config.update('jax_enable_preemption_service', False)
  # All devices that the process was given: left to itself, jax takes one of
  # them under SLURM and Open MPI, also where the rest is told.
  by_hand = 'JAX_LOCAL_DEVICE_IDS' in os.environ
  chosen: list[int] | None = None if by_hand else []
  try:
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        local_device_ids=chosen,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=15,
        initialization_timeout=120,
    )
  except ValueError as e:
    raise ValueError(
        f'jax cannot tell the processes of this group ({e}); start them by'
        ' srun, mpirun, a JobSet or on a TPU pod, or give the address of'
        ' process 0, the number of processes and the number of this one'
    ) from e


def _coordinator_port(group_id: int) -> int:
  """Returns a port, for all processes of a group and no other of its job.

  From 61440 to 65535, where Linux gives none to whoever asks for any.
  """
  job = os.environ.get('SLURM_ARRAY_JOB_ID') or os.environ.get('SLURM_JOB_ID')
  return 61440 + (zlib.crc32((job or '').encode()) + group_id) % 4096


def hosts() -> list[str]:
  """Returns the machine of each process of the group; all must call it."""
  # Of several nodes on one machine SLURM alone knows the names.
  own = os.environ.get('SLURMD_NODENAME') or socket.gethostname()
  if jax.process_count() == 1:
    return [own]
  codes = np.frombuffer(own.encode().ljust(256, b'\0')[:256], np.uint8)
  return [
      bytes(row).rstrip(b'\0').decode(errors='replace')
      for row in np.asarray(multihost_utils.process_allgather(codes))
  ]


def agreement() -> Agreement:
  """Returns how the processes of this group decide together; after start-up."""
  if jax.process_count() == 1:
    return ALONE
  return Agreement(
      is_primary=jax.process_index() == 0,
      choose=lambda x: np.asarray(multihost_utils.broadcast_one_to_all(x)),
      all_true=lambda x: np.all(multihost_utils.process_allgather(x), axis=0),
  )


def process_rows(group_batch: int) -> slice | None:
  """Returns the rows of the group batch that this process loads (None: all)."""
  processes = jax.process_count()
  if processes == 1:
    return None
  rows = group_batch // processes
  return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def check_group_batch(
    group_batch: int, num_replicas: int, simulated_replicas: int = 1
) -> None:
  """Raises ValueError unless the replicas can share the group batch evenly.

  Args:
    group_batch: Rows of the group.
    num_replicas: Its devices.
    simulated_replicas: Replicas that each of them stands for.
  """
  number = num_replicas * simulated_replicas
  if group_batch < 1 or group_batch % number:
    simulated = f' ({simulated_replicas} simulated on each of {num_replicas})'
    raise ValueError(
        f'group_batch={group_batch} is not divisible by the {number} replicas'
        f' of the group{simulated if simulated_replicas > 1 else ""}; set'
        f' group_batch to a multiple of {number}'
    )


def summing(
    train_step: Callable[..., tuple[TrainState, Metrics]], num_replicas: int
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the step of a replica, which is refused if it does not sum.

  Each replica would else be updated by its own rows, and none would notice.

  Args:
    train_step: From `make_train_step(..., axis_name=REPLICA_AXIS)`.
    num_replicas: How many there are.
  """
  if not callable(train_step) or hasattr(train_step, 'place'):
    raise ValueError(
        'Expected a step from make_train_step(model, tx,'
        f' axis_name=REPLICA_AXIS), got {type(train_step).__name__}'
    )
  if num_replicas == 1:
    return train_step

  def summed(state: TrainState, *args: Any) -> tuple[TrainState, Metrics]:
    step = jax.jit(train_step, inline=True)
    equations = jaxprs.equations(step.trace(state, *args).jaxpr.jaxpr)
    size = sum(
        math.prod(x.aval.shape)
        for equation in equations
        if REPLICA_AXIS in jaxprs.axes_of(equation)
        for x in equation.invars
    )
    if size < sum(map(np.size, jax.tree.leaves(state.variables.params))):
      raise ValueError(
          f'The step sums no gradient over its {num_replicas} replicas: each'
          ' would train on its own rows alone; make it by'
          ' make_train_step(..., axis_name=REPLICA_AXIS)'
      )
    return step(state, *args)  # The trace that has been made.

  return summed


class PmapStep:
  """A train step on all R replicas of a group.

  Called as `step(state, batch, teachers, distill_weight)`, like the pure step,
  with a state that went through `place` once and with this process's rows of
  the group batch. The state passed in is donated: keep what is returned.

  Attributes:
    num_replicas: Replicas of the group, over all its processes.
    device_kind: What its devices are, in jax's words.
    train_step: The pure step of one replica.
    axis_sizes: The named axes within which that is called, for one replica.
    num_traces: How often the step was traced, so compiled; 2 in a whole run.
  """

  def __init__(
      self,
      train_step: Callable[..., tuple[TrainState, Metrics]],
      devices: Sequence[jax.Device] | None = None,
  ):
    """Wraps a step made with `axis_name=REPLICA_AXIS`.

    Args:
      train_step: From `make_train_step(..., axis_name=REPLICA_AXIS)`.
      devices: Devices to use, in a group of one process; default: all.
    """
    if devices is not None and jax.process_count() > 1:
      raise ValueError(
          'devices can be chosen only in a group of one process; a group of'
          f' {jax.process_count()} processes uses all its devices: leave'
          ' devices=None'
      )
    self._devices = list(devices or jax.devices())
    mesh = Mesh(np.array(self._devices), (REPLICA_AXIS,))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._rows = NamedSharding(mesh, PartitionSpec(REPLICA_AXIS))
    self._wait = self._devices[0].platform == 'cpu' and len(self._devices) > 1
    self.num_replicas = len(self._devices)
    self.device_kind = self._devices[0].device_kind
    self.train_step = train_step
    self.axis_sizes = {REPLICA_AXIS: 1}
    self.num_traces = 0
    summed = summing(train_step, self.num_replicas)

    def counted(*args: Any) -> tuple[TrainState, Metrics]:
      self.num_traces += 1  # Runs only while jax traces.
      return summed(*args)

    same: Any = None  # On all replicas.
    axes = TrainState(
        step=same,
        variables=same,
        opt_state=same,
        rng=same,
        carry=0,
        teacher_carry=0,
    )
    # `out_axes=None` does not check that the replicas agree: the step must
    # psum or pmean everything that it returns there.
    step = jax.pmap(
        counted,
        axis_name=REPLICA_AXIS,
        in_axes=(axes, 0, None, None),
        out_axes=(axes, None),
        donate_argnums=(0,),
        devices=devices,
    )
    self._step = programs.Programs(step)

  def __call__(
      self,
      state: TrainState,
      batch: Batch,
      teachers: Teachers | None,
      distill_weight: float | Array,
  ) -> tuple[TrainState, Metrics]:
    state, metrics = self._step(
        state,
        self._split_rows(batch),
        teachers,
        np.float32(distill_weight),
    )
    if self._wait:
      # jax 0.10 on CPU: collectives of several steps in flight on fake
      # devices dead-lock and abort the process after 40 seconds.
      jax.block_until_ready(state)
    return state, metrics

  def place(self, state: TrainState) -> TrainState:
    """Puts a whole group's state on the devices, as the step returns it.

    Arrays that enter the first step laid out otherwise than those that enter
    the second would make it compile twice.

    Args:
      state: Any state, with the carries (B, ...) and (P, B, ...) of the whole
        group. Not altered, and not shared with the result.

    Returns:
      The state for `__call__`; read it back with `collect`.

    Raises:
      ValueError: If the rows cannot be shared evenly by the replicas.
    """
    rest = state.replace(carry=(), teacher_carry=())
    rest = self._put(host_copy(rest), self._replicated)
    return rest.replace(
        carry=jax.tree.map(lambda x: self._place_rows(x, 0), state.carry),
        teacher_carry=jax.tree.map(
            lambda x: self._place_rows(x, 1), state.teacher_carry
        ),
    )

  def place_teachers(self, teachers: Teachers) -> Teachers:
    """Puts teachers on the devices; costs nothing if they are there."""
    return self._put(teachers, self._replicated)

  def expect(self, shapes: Teachers) -> None:
    """Compiles for such teachers beside the updates without; one process."""
    if jax.process_count() > 1:
      return

    def placed(x: Array) -> jax.ShapeDtypeStruct:
      sharding = self._replicated
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    self._step.expect(jax.tree.map(placed, shapes))

  def collect(self, state: TrainState) -> TrainState:
    """Returns the whole group's state as numpy copies; the inverse of `place`.

    In a group of several processes all of them must call it.
    """
    carry, teacher_carry = state.carry, state.teacher_carry
    if jax.process_count() > 1 and jax.tree.leaves(carry):
      carry, teacher_carry = multihost_utils.process_allgather(
          (carry, teacher_carry), tiled=True
      )
    rest = host_copy(state.replace(carry=(), teacher_carry=()))
    return rest.replace(
        carry=jax.tree.map(lambda x: _merge_rows(np.array(x), 0), carry),
        teacher_carry=jax.tree.map(
            lambda x: _merge_rows(np.array(x), 1), teacher_carry
        ),
    )

  def _split_rows(self, batch: Batch) -> dict[str, Array]:
    """(B, ...) of this process -> (R, B / R, ...)."""
    replicas = self.num_replicas // jax.process_count()

    def split(x: Array) -> Array:
      if x.shape[0] % replicas:
        check_group_batch(x.shape[0] * jax.process_count(), self.num_replicas)
      return x.reshape(replicas, x.shape[0] // replicas, *x.shape[1:])

    return jax.tree.map(split, checked_batch(batch))

  def _place_rows(self, x: Array, axis: int) -> jax.Array:
    x = np.array(x)
    check_group_batch(x.shape[axis], self.num_replicas)
    rows = x.shape[axis] // self.num_replicas
    shape = (
        *x.shape[:axis],
        self.num_replicas,
        rows,
        *x.shape[axis + 1 :],
    )
    x = np.moveaxis(x.reshape(shape), axis, 0)
    return self._put(x, self._rows)

  def _put(self, tree: PyTree, sharding: NamedSharding) -> PyTree:
    def put(x: Array) -> jax.Array:
      if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
      x = np.asarray(x)
      # Each process holds all of `x` and hands over the part of its devices.
      return jax.make_array_from_callback(
          x.shape, sharding, lambda index: np.array(x[index])
      )

    return jax.tree.map(put, tree)


def _merge_rows(x: np.ndarray, axis: int) -> np.ndarray:
  """The inverse of `_place_rows` on the host."""
  x = np.moveaxis(x, 0, axis)
  rows = x.shape[axis] * x.shape[axis + 1]
  return x.reshape(*x.shape[:axis], rows, *x.shape[axis + 2 :])
