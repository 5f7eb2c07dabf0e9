"""The exchange of groups that live in one process: notebooks, studies, tests.

In lockstep its trajectories are, bit for bit, those of `CheckpointExchange`.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from etils import epath

from codistill_jax.base import (
    Metrics,
    Teachers,
    Variables,
    cast_floats,
    host_copy,
)
from codistill_jax.exchange import publications
from codistill_jax.exchange.protocol import (
    Plan,
    StaleError,
    check_finite,
    peers_of,
    stack_teachers,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints
from codistill_jax.storage.background import Troubles


class Mirror(NamedTuple):
  """Where publications are kept besides memory, so that a run can resume.

  Attributes:
    root: The directory of the exchange, as of `CheckpointExchange`.
    like: Variables of the model, or their shapes.
    identity: What all groups share.
  """

  root: epath.PathLike
  like: Variables
  identity: Mapping[str, str]


def memory_exchanges(
    num_groups: int,
    *,
    plan: Plan | None = None,
    every: int = 50,
    mode: str = 'lockstep',
    timeout_seconds: float = 0.0,
    mirror: Mirror | None = None,
    troubles: Troubles | None = None,
) -> list['MemoryExchange']:
  """One `MemoryExchange` per group, connected with each other.

  Args:
    num_groups: G.
    plan: Interval, mode, staleness, topology and dtypes; replaces `every` and
      `mode`. Without it each group has the G - 1 others as peers.
    every: Steps between exchanges.
    mode: 'lockstep' or 'freshest'.
    timeout_seconds: How long a fetch that must wait does so, for groups that
      run in threads; 0 suits groups that are stepped in turn.
    mirror: Also keep publications on disk; None, in memory only.
    troubles: Is told what the disk of the mirror refuses.
  """
  plan = plan or Plan(every=every, mode=mode)
  # While one group is at an exchange, another can be `staleness` before or
  # behind it, and then asks for what is `staleness` older still.
  keep = 2 * (plan.staleness // plan.every) + 2
  board = _Board(num_groups, keep, timeout_seconds)
  troubles = troubles or Troubles()
  return [
      MemoryExchange(board, g, plan, mirror, troubles)
      for g in range(num_groups)
  ]


class MemoryExchange:
  """The exchange of one group in one run; made by `memory_exchanges`."""

  def __init__(
      self,
      board: '_Board',
      group_id: int,
      plan: Plan,
      mirror: Mirror | None,
      troubles: Troubles,
  ):
    self._board = board
    self._group_id = group_id
    self._plan = plan
    self._mirror = mirror
    self._troubles = troubles
    self._unwritten: list[tuple[Publication, Variables]] = []
    self._writing = threading.Lock()
    self._num_bytes = 0
    self._restart_step = 0
    self._teachers: Teachers | None = None
    self.peers = plan.peers_of(group_id, len(board.shelves))
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)
    self.rejected = 0
    self.last_rejection = ''

  def due(self, step: int) -> bool:
    return self._plan.due(step)

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    if not self.due(step):
      return False
    check_finite(self._group_id, step, metrics)
    variables = cast_floats(host_copy(variables), self._plan.publish_dtype)
    identity = self._mirror.identity if self._mirror else {}
    self._num_bytes = sum(x.nbytes for x in jax.tree.leaves(variables))
    publication = Publication(
        self._group_id, step, time.time(), identity, self._num_bytes
    )
    if self._mirror:
      self._unwritten.append((publication, variables))
      self._write_mirror()
    self._board.add(publication, variables)
    return True

  def _write_mirror(self) -> None:
    root = checkpoints.absolute(self._mirror.root)
    with self._writing:
      self._forget_unneeded()
      while self._unwritten:
        try:
          publications.write(root, *self._unwritten[0])
        except OSError as e:
          # Training needs the board alone; a restart needs the mirror.
          self._troubles.failed('keeping publications on disk', e)
          return
        self._troubles.worked('keeping publications on disk')
        del self._unwritten[0]

  def _forget_unneeded(self) -> None:
    """Bounds what a disk that stays full holds back in memory.

    A restart makes all publications after its checkpoint again. So those are
    needed that it will ask for from before, and the newest, for the next one.
    """
    last = self._restart_step
    first = self._plan.keep_from(last)
    newest = {x[0].step for x in self._unwritten[-self._board.keep :]}
    self._unwritten = [
        (publication, variables)
        for publication, variables in self._unwritten
        if first <= publication.step <= last or publication.step in newest
    ]

  def fetch(self, step: int) -> Teachers | None:
    if not self.peers:
      return None
    due = self._plan.due(step) or self._plan.max_staleness_steps is not None
    if not due and self._teachers is not None:
      return self._teachers
    found = self._find(step)
    in_use = tuple(None if f is None else f[0] for f in found)
    if in_use != self.in_use:
      self.in_use = in_use
      self._teachers = stack_teachers(
          [
              None if f is None else cast_floats(f[1], self._plan.teacher_dtype)
              for f in found
          ]
      )
    return self._teachers

  def _find(self, step: int) -> list[tuple[Publication, Variables] | None]:
    """What each peer teaches in the update after `step`."""
    if self._plan.mode == 'lockstep':
      asked = self._plan.asked(step)
      if asked is None:
        return [None] * len(self.peers)
      return [self._board.exactly(peer, asked) for peer in self.peers]
    found = []
    for peer in self.peers:
      newest = self._board.newest(peer)
      if self._plan.too_old(step, newest and newest[0]):
        newest = self._replace_old(peer, step)
      found.append(newest)
    return found

  def _replace_old(
      self, peer: int, step: int
  ) -> tuple[Publication, Variables] | None:
    """What stands in for a teacher past its limit, by the policy."""
    limit = self._plan.max_staleness_steps
    if self._plan.staleness_policy == 'wait':
      return self._board.newest(peer, at_least=step - limit)
    if self._plan.staleness_policy == 'fail':
      raise StaleError(
          f'at step {step} of group {self._group_id} the newest publication of'
          f' group {peer} is more than max_staleness_steps={limit} old; step'
          ' all groups in turn, or set staleness_policy to drop or wait'
      )
    return None

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    metrics['exchange/rejected'] = float(self.rejected)
    if self._num_bytes:
      metrics['exchange/publication_bytes'] = float(self._num_bytes)
    return metrics

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Puts the peers' publications on the board that a run from `step` needs.

    Those that a killed run made after `step` are left out: they will be made
    again.
    """
    del teacher_steps  # They follow from the step.
    if not self._mirror:
      return
    root = checkpoints.absolute(self._mirror.root)
    for peer in self.peers:
      for published in publications.published_steps(root, peer):
        if self._plan.keep_from(step) <= published <= step:
          self._board.add(
              *publications.read(
                  root,
                  peer,
                  published,
                  like=self._mirror.like,
                  identity=self._mirror.identity,
              )
          )

  def settle(self, step: int) -> None:
    if self._mirror:
      self._write_mirror()
    missing = [x for x in self._unwritten if x[0].step <= step]
    if missing:
      raise OSError(
          f'{len(missing)} publications of group {self._group_id}'
          ' before it are not on disk yet'
      )

  def checkpointed(self, step: int) -> None:
    """Deletes publications that no restart needs, but for the newest."""
    if not self._mirror or step == self._restart_step:
      return
    # The other groups may restart one checkpoint earlier.
    needed = self._plan.keep_from(self._restart_step)
    self._restart_step = step
    self._write_mirror()
    directory = publications.group_directory(
        checkpoints.absolute(self._mirror.root), self._group_id
    )
    steps = checkpoints.completed_steps(directory)[:-1]
    checkpoints.delete(directory, [s for s in steps if s < needed])

  def close(self) -> None:
    pass


class _Board:
  """The newest publications of all groups of one process."""

  def __init__(self, num_groups: int, keep: int, timeout_seconds: float):
    peers_of(0, num_groups)  # Raises if there are too few groups.
    self.shelves: list[dict[int, tuple[Publication, Variables]]] = [
        {} for _ in range(num_groups)
    ]
    self.keep = keep
    self._timeout = timeout_seconds
    self._changed = threading.Condition()

  def add(self, publication: Publication, variables: Variables) -> None:
    with self._changed:
      shelf = self.shelves[publication.group_id]
      shelf[publication.step] = (publication, variables)
      for step in sorted(shelf)[: -self.keep]:
        del shelf[step]
      self._changed.notify_all()

  def newest(
      self, group_id: int, at_least: int = 0
  ) -> tuple[Publication, Variables] | None:
    """The newest publication; waits for one of `at_least` that step."""
    if at_least > 0:
      newest = lambda shelf: max(shelf, default=-1)
      self._wait(group_id, at_least, lambda s: newest(s) >= at_least)
    with self._changed:
      shelf = self.shelves[group_id]
      return shelf[max(shelf)] if shelf else None

  def exactly(self, group_id: int, step: int) -> tuple[Publication, Variables]:
    self._wait(group_id, step, lambda shelf: step in shelf)
    return self.shelves[group_id][step]

  def _wait(self, group_id: int, step: int, there: Callable) -> None:
    with self._changed:
      shelf = self.shelves[group_id]
      if not self._changed.wait_for(lambda: there(shelf), self._timeout):
        raise TimeoutError(
            f'group {group_id} has not published step {step} within'
            f' {self._timeout:g} s; its newest is step'
            f' {max(shelf, default="none")}. Step all groups in turn, or run'
            ' them in threads with a timeout_seconds'
        )
