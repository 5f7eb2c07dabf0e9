"""The exchange of publications through a store: a directory, or memory.

Publishing holds the loop for a device-to-host copy, fetching for the swap of a
reference; lockstep waits by definition. In lockstep trajectories are the same
bits, whatever the store.

Shape suffix: P peers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from codistill_jax.base import (
    ALONE,
    Agreement,
    Array,
    Metrics,
    Teachers,
    Variables,
    host_copy,
)
from codistill_jax.exchange.fetching import (
    Fetching,
    Freshest,
    Lockstep,
    Means,
    Reader,
    Teaching,
)
from codistill_jax.exchange.plan import (
    Plan,
    Waiting,
    check_finite,
    peers_of,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.stores import (
    Board,
    DirectoryStore,
    MemoryStore,
    Mirror,
    Store,
)
from codistill_jax.storage import leases
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    Interrupted,
    Patience,
    Troubles,
)


class StoreExchange:
  """The exchange of one group in one run; see `Exchange`."""

  def __init__(
      self,
      store: Store,
      group_id: int,
      num_groups: int,
      *,
      plan: Plan,
      identity: Mapping[str, str],
      waiting: Waiting,
      agreement: Agreement = ALONE,
      put: Callable[[Array], Array] = lambda array: array,
      troubles: Troubles | None = None,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    self.peers = plan.peers_of(group_id, num_groups)
    self._store = store
    self._group_id = group_id
    self._step = 0  # That the run has come to.
    self._closed = False
    self._plan = plan
    self._identity = dict(identity)
    self._speaks = agreement.is_primary and plan.mode == 'freshest'
    self._reader = Reader(
        store, plan.teacher_dtype, troubles or Troubles(), patience
    )
    self._teaching = Teaching(group_id, self.peers, plan, put)
    means = Means(
        self._teaching, self._reader, store, plan, agreement, waiting, patience
    )
    self._fetching: Fetching = (
        Lockstep(means)
        if plan.mode == 'lockstep'
        else Freshest(group_id, means)
    )

  @property
  def in_use(self) -> tuple[Publication | None, ...]:
    return self._teaching.in_use

  @property
  def rejected(self) -> int:
    return self._reader.rejected

  @property
  def last_rejection(self) -> str:
    return self._reader.last_rejection

  def begin(self, step: int) -> None:
    self._go_on(step)
    self._store.begin(step)

  def due(self, step: int) -> bool:
    return self._store.writes and self._plan.due(step)

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    if not self.due(step):
      return False
    self._go_on(step)
    publication = Publication(self._group_id, step, time.time(), self._identity)
    try:
      check_finite(self._group_id, step, metrics)
      self._store.check(publication, variables)
    except (FloatingPointError, ValueError) as e:
      self.fail(e)
      raise
    copy = host_copy(variables, into=self._store.spare())
    self._store.write(publication, copy)
    return True

  def _go_on(self, step: int) -> None:
    """Raises ValueError unless `step` is of the run that this is for."""
    if self._store.replaced:
      raise ValueError(
          f'another exchange for group {self._group_id} was made in this'
          ' process, in the same directory, and this one is closed; each group'
          ' has a group_id of its own, and each run a root'
      )
    if step < self._step or self._closed:
      closed = ' after it was closed' if self._closed else ''
      raise ValueError(
          f'the exchange of group {self._group_id} has served a run up to step'
          f' {self._step}, and is asked for step {step}{closed}; make new'
          ' exchanges for another run, of all its groups'
      )
    self._step = step

  def fetch(self, step: int) -> Teachers | None:
    self._go_on(step)
    if not self.peers:
      return None
    self._fetching.fetch(step)
    shown = self._teaching.show(step)
    if self._speaks:
      self._teaching.say_if_alone(step)
    return shown

  def wait_for_teachers(self, step: int) -> Teachers | None:
    """Waits until every peer teaches in the update after `step`.

    In freshest a fetch never waits, so that the first update with a weight may
    have no teacher yet: call this between two turns of `run_group`, after the
    first publication, such as at the end of burn-in. Lockstep waits by itself.

    Returns:
      The teachers; None without peers, and in lockstep before the first
      publication that it asks for.

    Raises:
      TimeoutError: After `Waiting.timeout_seconds`, with who is missing.
      StaleError: If one is too old and the policy is `fail`.
    """
    self._go_on(step)
    if self.peers:
      self._fetching.wait(step)
    return self.fetch(step)

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    self._go_on(step)
    self._store.restore(self.peers, self._plan.keep_from(step), step)
    self._fetching.restore(dict(zip(self.peers, teacher_steps)))
    self._teaching.show(step)

  def settle(self, step: int) -> None:
    self._store.settle(step)

  def checkpointed(self, step: int) -> None:
    self._store.checkpointed(step)

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    metrics['exchange/rejected'] = float(self.rejected)
    return metrics | self._store.metrics()

  def flush(self) -> None:
    """Waits until everything published is written; raises what that raised."""
    self._store.flush()

  def fail(self, error: Exception) -> None:
    # What may pass is no reason to wait no more.
    if not isinstance(error, OSError | Interrupted | leases.LostError):
      self._store.fail(error)

  def close(self) -> None:
    """Waits for publications under way; raises what the last one raised."""
    self._closed = True
    try:
      self._fetching.close()
    finally:
      self._store.close()


class CheckpointExchange(StoreExchange):
  """Through a directory that all groups see, a group in each process.

  For one run: another run gets another root, and another exchange. One that is
  made again in the same process, as by a cell that is run twice, takes the
  place of the one before.
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
      process: int = 0,
      put: Callable[[Array], Array] = lambda array: array,
      troubles: Troubles | None = None,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    """Joins the exchange.

    Args:
      root: The directory that all groups see: a local disk, NFS, a bucket.
      group_id: This group.
      num_groups: G.
      like: This group's variables, or their shapes; what peers must match.
      plan: Interval, mode, dtypes, topology; the same for all groups.
      identity: What peers must share besides shapes (tokenizer hash, ...).
      keep: Publications to keep at least; besides, every one that a peer is
        reading, and in lockstep every one that a restart of any reader may
        still ask for.
      waiting: Time limits for peers.
      agreement: How the processes of this group decide together.
      process: Which of them this is.
      put: Puts one array on the devices; called in the background.
      troubles: Is told what the file system refuses.
      patience: Time limits for the file system.

    Raises:
      leases.HeldError: If another process publishes for this group.
    """
    shared: dict[str, Any] = {
        'plan': (plan or Plan()).with_mode('freshest'),
        'identity': identity or {},
        'waiting': waiting or Waiting(),
        'troubles': troubles or Troubles(f'group {group_id}: '),
        'patience': patience,
    }
    store = DirectoryStore(
        root,
        group_id,
        num_groups,
        like=like,
        keep=keep,
        writes=agreement.is_primary,
        process=process,
        **shared,
    )
    super().__init__(
        store, group_id, num_groups, agreement=agreement, put=put, **shared
    )


def memory_exchanges(
    num_groups: int,
    *,
    plan: Plan | None = None,
    every: int | None = None,
    mode: str | None = None,
    timeout_seconds: float = 0.0,
    mirror: Mirror | None = None,
    troubles: Troubles | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> list[StoreExchange]:
  """Returns one exchange for each group of this process, through memory.

  Args:
    num_groups: G.
    plan: Interval, mode, staleness, topology and dtypes. By default a `Plan` of
      `every` and `mode`: each group has the G - 1 others as peers.
    every: As of a `Plan`, if there is no `plan`.
    mode: Likewise.
    timeout_seconds: How long a fetch that must wait does so, for groups that
      run in threads; 0 suits groups that are stepped in turn.
    mirror: Also keep publications on disk; None, in memory only.
    troubles: Is told what the disk of the mirror refuses.
    patience: Time limits for that disk.
  """
  peers_of(0, num_groups)  # Raises if there are too few groups.
  fields: dict[str, Any] = {'every': every, 'mode': mode}
  given = {name: x for name, x in fields.items() if x is not None}
  if not isinstance(plan, Plan | None):
    raise ValueError(
        f'memory_exchanges: plan is of type {type(plan).__name__}; give a Plan,'
        ' as Plan(every=50)'
    )
  if plan and given:
    raise ValueError(
        f'memory_exchanges has a plan and also {", ".join(given)}; set'
        f' {"it" if len(given) == 1 else "them"} in the plan'
    )
  plan = (plan or Plan(**given)).with_mode('lockstep')
  # While one group is at an exchange, another can be `staleness` before or
  # behind it, and then asks for what is `staleness` older still.
  keep = 2 * (plan.staleness // plan.every) + 2
  board = Board(num_groups, keep)
  shared: dict[str, Any] = {
      'plan': plan,
      'identity': mirror.identity if mirror else {},
      'troubles': troubles,
      'patience': patience,
  }

  def store_of(group_id: int) -> Store:
    directory = mirror and DirectoryStore(
        mirror.root,
        group_id,
        num_groups,
        like=mirror.like,
        mirrored=keep,
        **shared,
    )
    return MemoryStore(board, group_id, plan, directory)

  return [
      StoreExchange(
          store_of(group_id),
          group_id,
          num_groups,
          waiting=Waiting(timeout_seconds),
          **shared,
      )
      for group_id in range(num_groups)
  ]
