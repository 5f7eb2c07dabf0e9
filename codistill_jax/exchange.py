"""The exchange between groups: publish and fetch, behind one protocol.

Two modes. *freshest*: a fetch takes whatever is newest and never waits
(production). *lockstep*: a fetch takes the publication of exactly the step
asked for and waits for it, so that a run is a function of its seeds
(reproducible science); then the order in which groups are stepped, their
speed, and the kind of exchange cannot matter.

Shape suffix: P peers.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from codistill_jax.base import (
    Metrics,
    Teachers,
    Variables,
)
from codistill_jax.publications import Publication

MODES = ('freshest', 'lockstep')
DTYPES = ('float32', 'bfloat16')


class Interrupted(RuntimeError):
  """A wait was given up because the process was asked to stop."""


class Exchange(Protocol):
  """How one group gives its variables to its peers and gets theirs.

  Attributes:
    peers: The ids of the peers, in the order of the teachers' axis P.
    in_use: Per peer, the publication that its teacher is, or None.
    rejected: How many publications were found damaged and skipped.
  """

  peers: tuple[int, ...]
  in_use: tuple[Publication | None, ...]
  rejected: int

  def publish_if_due(self, step: int, variables: Variables) -> bool:
    """Publishes at multiples of the interval; says whether it did."""

  def fetch(self, step: int) -> Teachers | None:
    """The teachers of the update that follows `step`; None if there are none.

    Returns the same object until a teacher changes.

    Raises:
      TimeoutError: In lockstep, if a peer does not publish in time.
      Interrupted: In lockstep, if the process was asked to stop meanwhile.
      publications.MismatchError: If a peer trains something else.
    """

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Takes up what was in use at the resume checkpoint of `step`."""

  def checkpointed(self, step: int) -> None:
    """Told that a restart would begin at `step` or later."""

  def close(self) -> None:
    """Finishes what is under way."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """When publications are made and which one is asked for.

  Attributes:
    every: Steps between exchanges.
    mode: 'freshest' or 'lockstep'.
    staleness: In lockstep, the age in steps of a publication when its teacher
      comes into use; a multiple of `every`. Between exchanges a teacher ages
      by up to `every - 1` steps more.
    publish_dtype: Floating dtype of publications.
    teacher_dtype: Floating dtype in which teachers are held.
  """

  every: int = 50
  mode: str = 'freshest'
  staleness: int = 0
  publish_dtype: str = 'float32'
  teacher_dtype: str = 'float32'

  def __post_init__(self):
    if type(self.every) is not int or self.every < 1:
      raise ValueError(
          f'exchange_every={self.every!r}; set it to at least 1 step'
      )
    if self.mode not in MODES:
      raise ValueError(
          f'exchange mode {self.mode!r} is not one of {", ".join(MODES)}'
      )
    if self.staleness < 0 or self.staleness % self.every:
      raise ValueError(
          f'staleness={self.staleness} is not a multiple of'
          f' exchange_every={self.every}: only those steps are published'
      )
    if self.staleness and self.mode == 'freshest':
      raise ValueError(
          f'staleness={self.staleness} can be asked for in lockstep only; in'
          ' mode freshest it is measured: set staleness=0'
      )
    for dtype in (self.publish_dtype, self.teacher_dtype):
      if dtype not in DTYPES:
        raise ValueError(
            f'exchange dtype {dtype!r} is not one of {", ".join(DTYPES)}'
        )

  def due(self, step: int) -> bool:
    """Whether `step` is an exchange step. Nothing is trained at step 0."""
    return step > 0 and step % self.every == 0

  def asked(self, step: int) -> int | None:
    """In lockstep: the publication in use for the update after `step`."""
    asked = step - step % self.every - self.staleness
    return asked if asked > 0 else None

  def keep_from(self, step: int) -> int:
    """In lockstep: the oldest publication needed by a run from `step` on."""
    return max(self.asked(step) or 0, 0)


def peers_of(group_id: int, num_groups: int) -> tuple[int, ...]:
  """All other groups; raises ValueError for a `group_id` out of range."""
  if num_groups < 1:
    raise ValueError(f'num_groups={num_groups}; set it to at least 1')
  if not 0 <= group_id < num_groups:
    raise ValueError(
        f'group_id={group_id} is out of range: with num_groups={num_groups}'
        f' it lies in 0..{num_groups - 1}'
    )
  return tuple(g for g in range(num_groups) if g != group_id)


def stack_teachers(slots: Sequence[Variables | None]) -> Teachers | None:
  """`Teachers` of the present peers; None if no peer is present."""
  present = [slot for slot in slots if slot is not None]
  if not present:
    return None
  # An absent peer's slot holds a copy of another one: finite whatever the
  # model does with it, and not counted.
  filled = [present[0] if slot is None else slot for slot in slots]
  return Teachers(
      variables=jax.tree.map(lambda *xs: np.stack(xs), *filled),
      present_P=np.array([slot is not None for slot in slots], np.float32),
  )


def staleness_metrics(
    step: int, in_use: Sequence[Publication | None]
) -> Metrics:
  """Age of the teachers used in the update after `step`.

  Returns:
    Peers present, and mean and maximum over them of own step minus published
    step; and the mean in seconds since publication. Without a present peer
    only `exchange/peers_present`.
  """
  present = [p for p in in_use if p is not None]
  metrics = {'exchange/peers_present': float(len(present))}
  if present:
    steps = [step - p.step for p in present]
    seconds = [time.time() - p.time for p in present]
    metrics['exchange/staleness_steps'] = float(np.mean(steps))
    metrics['exchange/staleness_steps_max'] = float(max(steps))
    metrics['exchange/staleness_seconds'] = float(np.mean(seconds))
  return metrics


class NoExchange:
  """A group without peers that publishes nothing."""

  peers: tuple[int, ...] = ()
  in_use: tuple[Publication | None, ...] = ()
  rejected = 0

  def publish_if_due(self, step: int, variables: Variables) -> bool:
    del step, variables
    return False

  def fetch(self, step: int) -> None:
    del step

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    del step, teacher_steps

  def checkpointed(self, step: int) -> None:
    del step

  def close(self) -> None:
    pass
