"""The exchange of groups that share nothing but a directory.

Both halves run beside training: `publisher` writes, `fetching` reads. The loop
is held for a device-to-host copy, and swaps a reference when new teachers are
on the devices; lockstep waits by definition.

Shape suffix: P peers.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath

from codistill_jax.base import (
    ALONE,
    Agreement,
    Array,
    Metrics,
    Teachers,
    Variables,
)
from codistill_jax.exchange import publications
from codistill_jax.exchange.fetcher import Fetcher
from codistill_jax.exchange.fetching import (
    BesideTraining,
    Fetching,
    Lockstep,
    Together,
    Waiting,
)
from codistill_jax.exchange.protocol import (
    Plan,
    StaleError,
    check_finite,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.publisher import Publisher
from codistill_jax.exchange.teaching import Teaching
from codistill_jax.storage import checkpoints, leases
from codistill_jax.storage.background import Troubles, Turns

_SETTLE_SECONDS = 5.0


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
      process: int = 0,
      put: Callable[[Array], Array] = lambda array: array,
      troubles: Troubles | None = None,
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
      waiting: Time limits.
      agreement: How the processes of this group decide together.
      process: Which of them this is.
      put: Puts one array on the devices; called in the background.
      troubles: Is told what the file system refuses.

    Raises:
      leases.HeldError: If another process publishes for this group.
    """
    self._plan = plan or Plan()
    self.peers = self._plan.peers_of(group_id, num_groups)
    self._group_id = group_id
    self._root = checkpoints.absolute(root)
    self._waiting = waiting or Waiting()
    self._agreement = agreement
    self._troubles = troubles or Troubles(f'group {group_id}: ')
    self._fetcher = Fetcher(
        self._root,
        group_id,
        like=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like
        ),
        identity=identity or {},
        dtype=self._plan.teacher_dtype,
        process=process,
        troubles=self._troubles,
    )
    # Beside training there is one copy of variables at a time, on its way out
    # or in, and the spare teachers.
    self._turns = Turns()
    self._lease: leases.Lease | None = None
    self._publisher: Publisher | None = None
    if agreement.is_primary:
      readers = self._plan.readers_of(group_id, num_groups)
      self._start_publishing(readers, identity or {}, keep)
    self._teaching = Teaching(group_id, self.peers, self._plan, put)
    self._fetching = self._how_to_fetch()

  def _start_publishing(
      self, readers: Sequence[int], identity: Mapping[str, str], keep: int
  ) -> None:
    directory = publications.group_directory(self._root, self._group_id)
    self._lease = leases.acquire(
        directory,
        f'publishing for group {self._group_id} in',
        interrupted=self._waiting.interrupted,
    )
    try:
      checkpoints.delete_torn(directory)
    except BaseException:
      self._lease.release()
      raise
    self._publisher = Publisher(
        self._root,
        self._group_id,
        readers,
        plan=self._plan,
        identity=identity,
        keep=keep,
        reader_seconds=self._waiting.timeout_seconds,
        check_lease=self._lease.check,
        interrupted=self._waiting.interrupted,
        troubles=self._troubles,
        turns=self._turns,
    )

  def _how_to_fetch(self) -> Fetching:
    teaching, fetcher, plan = self._teaching, self._fetcher, self._plan
    if plan.mode == 'lockstep':
      return Lockstep(teaching, fetcher, plan, self._agreement, self._waiting)
    if self._agreement is ALONE:
      return BesideTraining(teaching, fetcher, plan, self._turns)
    return Together(teaching, fetcher, plan, self._agreement)

  @property
  def in_use(self) -> tuple[Publication | None, ...]:
    return self._teaching.in_use

  @property
  def rejected(self) -> int:
    return self._fetcher.rejected

  @property
  def last_rejection(self) -> str:
    return self._fetcher.last_rejection

  def due(self, step: int) -> bool:
    return self._publisher is not None and self._plan.due(step)

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    if not self.due(step):
      return False
    check_finite(self._group_id, step, metrics)
    self._publisher.publish(step, variables)
    return True

  def checkpointed(self, step: int) -> None:
    if self._publisher is not None:
      self._publisher.checkpointed(step)

  def settle(self, step: int) -> None:
    if self._publisher is None or self._plan.mode == 'freshest':
      return  # Nobody waits for a publication of a certain step.
    if not self._publisher.flush(_SETTLE_SECONDS, up_to=step):
      raise TimeoutError(
          f'publications of group {self._group_id} up to step {step} are not'
          ' complete yet'
      )

  def flush(self) -> None:
    """Waits until everything published is written; raises what that raised."""
    if self._publisher is not None:
      self._publisher.flush()
      self._publisher.raise_error()

  def fetch(self, step: int) -> Teachers | None:
    if not self.peers:
      return None
    self._fetching.fetch(step)
    if self._plan.staleness_policy != 'drop' and self._teaching.too_old(step):
      self._wait_for_younger(step)
    shown = self._teaching.show(step)
    if self._agreement.is_primary and self._plan.mode == 'freshest':
      self._teaching.say_if_alone(step)
    return shown

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    self._fetching.restore(dict(zip(self.peers, teacher_steps)))
    self._teaching.show(step)

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    metrics['exchange/rejected'] = float(self.rejected)
    if self._publisher is not None:
      metrics['exchange/publish_failures'] = float(self._publisher.failures)
      if self._publisher.newest is not None:
        size = self._publisher.newest.num_bytes
        metrics['exchange/publication_bytes'] = float(size)
    return metrics

  def close(self) -> None:
    """Waits for publications under way; raises what the last one raised."""
    try:
      self._fetching.close()
      if self._publisher is not None:
        self._publisher.close()
    finally:
      # A write that hangs keeps it: nobody else may write meanwhile.
      if self._lease is not None and self._publisher.finished:
        self._lease.release()

  def _wait_for_younger(self, step: int) -> None:
    """Looks again, in the foreground: once, or until a time limit."""
    start = time.monotonic()

    def go_on() -> None:
      self._waiting.go_on(start, self._stale(step), self._agreement)

    while True:
      self._fetching.fetch_now(go_on)
      if not self._teaching.too_old(step):
        return
      if self._plan.staleness_policy == 'fail':
        raise StaleError(
            f'{self._stale(step)}; see whether these groups run, or set'
            ' staleness_policy to drop or wait'
        )
      go_on()

  def _stale(self, step: int) -> str:
    held = self._teaching.held_steps
    ages = ', '.join(
        f'group {peer} by {step - (held[peer] or 0)} steps'
        for peer in self._teaching.too_old(step)
    )
    return (
        f'teachers of group {self._group_id} are stale at step {step}: {ages},'
        f' and max_staleness_steps={self._plan.max_staleness_steps}'
    )
