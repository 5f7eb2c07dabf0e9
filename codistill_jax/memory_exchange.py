"""The exchange of groups that live in one process: notebooks, studies, tests.

In lockstep its trajectories are, bit for bit, those of `CheckpointExchange`.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from codistill_jax import publications, storage
from codistill_jax.base import Teachers, Variables, cast_floats, host_copy
from codistill_jax.exchange import Plan, peers_of, stack_teachers
from codistill_jax.publications import Publication


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
) -> list['MemoryExchange']:
  """One `MemoryExchange` per group, connected with each other.

  Args:
    num_groups: G; each group has the G - 1 others as peers.
    plan: Interval, mode, staleness and dtypes; replaces `every` and `mode`.
    every: Steps between exchanges.
    mode: 'lockstep' or 'freshest'.
    timeout_seconds: How long a lockstep fetch waits, for groups that run in
      threads; 0 suits groups that are stepped in turn.
    mirror: Also keep publications on disk; None, in memory only.
  """
  plan = plan or Plan(every=every, mode=mode)
  # While one group is at an exchange, another can be `staleness` before or
  # behind it, and then asks for what is `staleness` older still.
  keep = 2 * (plan.staleness // plan.every) + 2
  board = _Board(num_groups, keep, timeout_seconds)
  return [MemoryExchange(board, g, plan, mirror) for g in range(num_groups)]


class MemoryExchange:
  """The exchange of one group in one run; made by `memory_exchanges`."""

  def __init__(
      self, board: '_Board', group_id: int, plan: Plan, mirror: Mirror | None
  ):
    self._board = board
    self._group_id = group_id
    self._plan = plan
    self._mirror = mirror
    self._restart_step = 0
    self._teachers: Teachers | None = None
    self.peers = peers_of(group_id, len(board.shelves))
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)
    self.rejected = 0

  def publish_if_due(self, step: int, variables: Variables) -> bool:
    if not self._plan.due(step):
      return False
    variables = cast_floats(host_copy(variables), self._plan.publish_dtype)
    identity = self._mirror.identity if self._mirror else {}
    publication = Publication(self._group_id, step, time.time(), identity)
    if self._mirror:
      publications.write(
          storage.absolute(self._mirror.root), publication, variables
      )
    self._board.add(publication, variables)
    return True

  def fetch(self, step: int) -> Teachers | None:
    if not self.peers:
      return None
    if not self._plan.due(step) and self._teachers is not None:
      return self._teachers
    if self._plan.mode == 'lockstep':
      asked = self._plan.asked(step)
      if asked is None:
        return None
      found = [self._board.exactly(peer, asked) for peer in self.peers]
    else:
      found = [self._board.newest(peer) for peer in self.peers]
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

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Puts the peers' publications on the board that a run from `step` needs.

    Those that a killed run made after `step` are left out: they will be made
    again.
    """
    del teacher_steps  # They follow from the step.
    if not self._mirror:
      return
    root = storage.absolute(self._mirror.root)
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

  def checkpointed(self, step: int) -> None:
    """Deletes publications that no restart needs, but for the newest."""
    if not self._mirror or step == self._restart_step:
      return
    # The other groups may restart one checkpoint earlier.
    needed = self._plan.keep_from(self._restart_step)
    self._restart_step = step
    directory = publications.group_directory(
        storage.absolute(self._mirror.root), self._group_id
    )
    steps = storage.completed_steps(directory)[:-1]
    storage.delete(directory, [s for s in steps if s < needed])

  def close(self) -> None:
    pass


class _Board:
  """The newest publications of all groups of one process."""

  def __init__(self, num_groups: int, keep: int, timeout_seconds: float):
    peers_of(0, num_groups)  # Raises if there are too few groups.
    self.shelves: list[dict[int, tuple[Publication, Variables]]] = [
        {} for _ in range(num_groups)
    ]
    self._keep = keep
    self._timeout = timeout_seconds
    self._changed = threading.Condition()

  def add(self, publication: Publication, variables: Variables) -> None:
    with self._changed:
      shelf = self.shelves[publication.group_id]
      shelf[publication.step] = (publication, variables)
      for step in sorted(shelf)[: -self._keep]:
        del shelf[step]
      self._changed.notify_all()

  def newest(self, group_id: int) -> tuple[Publication, Variables] | None:
    with self._changed:
      shelf = self.shelves[group_id]
      return shelf[max(shelf)] if shelf else None

  def exactly(self, group_id: int, step: int) -> tuple[Publication, Variables]:
    with self._changed:
      shelf = self.shelves[group_id]
      self._changed.wait_for(lambda: step in shelf, self._timeout)
      if step not in shelf:
        raise TimeoutError(
            f'group {group_id} has not published step {step} within'
            f' {self._timeout:g} s; its newest is step'
            f' {max(shelf, default="none")}. Step all groups in turn, or run'
            ' them in threads with a timeout_seconds'
        )
      return shelf[step]
