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
    PeerPredictions,
    Teachers,
    Variables,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.topology import Topology, peers_of, readers_of
from codistill_jax.exchange.topology import check as check_topology

MODES = ('freshest', 'lockstep')
POLICIES = ('drop', 'wait', 'fail')
DTYPES = ('float32', 'bfloat16')


class Interrupted(RuntimeError):
  """A wait was given up because the process was asked to stop."""


class StaleError(ValueError):
  """A teacher is older than allowed, and the policy is to fail."""


class Exchange(Protocol):
  """How one group gives its variables to its peers and gets theirs.

  Attributes:
    peers: The ids of the peers, in the order of the teachers' axis P.
    in_use: Per peer, the publication that its teacher is, or None for a peer
      that is absent: it has published nothing, or nothing young enough.
    rejected: How many publications were found bad and skipped.
    last_rejection: Which one was the last, and why; '' if there is none.
  """

  peers: tuple[int, ...]
  in_use: tuple[Publication | None, ...]
  rejected: int
  last_rejection: str

  def due(self, step: int) -> bool:
    """Whether this process publishes at `step`."""

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    """Publishes at multiples of the interval; says whether it did.

    Args:
      step: Updates done by `variables`.
      variables: What to publish.
      metrics: Of the update that made them, if one did.

    Raises:
      FloatingPointError: If loss or gradient were not finite: nothing is
        published.
    """

  def fetch(self, step: int) -> Teachers | PeerPredictions | None:
    """The teachers of the update that follows `step`; None if there are none.

    Returns the same object until a teacher changes.

    Raises:
      TimeoutError: In lockstep, if a peer does not publish in time.
      Interrupted: While waiting, if the process was asked to stop.
      StaleError: If a teacher is too old and the policy is `fail`.
      checkpoints.MismatchError: In lockstep, if a peer trains something else.
    """

  def metrics(self, step: int) -> dict[str, float]:
    """All `exchange/*` values of the update after `step`; after its fetch."""

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Takes up what was in use at the resume checkpoint of `step`."""

  def settle(self, step: int) -> None:
    """Called before resume checkpoint `step` is written, from another thread.

    A group that restarts makes no publication from before its checkpoint again,
    so those that peers will ask for must be complete first.

    Raises:
      OSError: If that takes long; it is tried again.
    """

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
    max_staleness_steps: In freshest, the age in steps beyond which a teacher
      is not used; None for any age. A peer that has published nothing counts
      as if it had published at step 0.
    staleness_policy: What happens then. 'drop': the peer is left out of the
      mean until it publishes again. 'wait': training waits for it. 'fail': an
      error ends the run.
    topology: Who learns from whom; see `topology`.
    topology_seed: Of a random topology.
  """

  every: int = 50
  mode: str = 'freshest'
  staleness: int = 0
  publish_dtype: str = 'float32'
  teacher_dtype: str = 'float32'
  max_staleness_steps: int | None = None
  staleness_policy: str = 'drop'
  topology: Topology = 'all'
  topology_seed: int = 0

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
    check_topology(self.topology)
    self._check_limit()

  def _check_limit(self) -> None:
    if self.staleness_policy not in POLICIES:
      raise ValueError(
          f'staleness_policy {self.staleness_policy!r} is not one of'
          f' {", ".join(POLICIES)}'
      )
    limit = self.max_staleness_steps
    if limit is None:
      if self.staleness_policy != 'drop':
        raise ValueError(
            f'staleness_policy={self.staleness_policy!r} acts nowhere without'
            ' max_staleness_steps; set that too'
        )
      return
    if self.mode == 'lockstep':
      raise ValueError(
          f'max_staleness_steps={limit} in lockstep: there the age of a teacher'
          ' is given by staleness; leave max_staleness_steps=None'
      )
    if type(limit) is not int or limit < 2 * self.every:
      raise ValueError(
          f'max_staleness_steps={limit!r}; set it to at least twice'
          f' exchange_every={self.every}: a teacher ages by that much between'
          ' exchanges, and the next one takes a while to come'
      )

  def peers_of(self, group_id: int, num_groups: int) -> tuple[int, ...]:
    """The groups that `group_id` learns from."""
    return peers_of(group_id, num_groups, self.topology, self.topology_seed)

  def readers_of(self, group_id: int, num_groups: int) -> tuple[int, ...]:
    """The groups that learn from `group_id`."""
    return readers_of(group_id, num_groups, self.topology, self.topology_seed)

  def too_old(self, step: int, published: Publication | None) -> bool:
    """Whether a teacher is past its limit in the update after `step`."""
    if self.max_staleness_steps is None:
      return False
    born = 0 if published is None else published.step
    return step - born > self.max_staleness_steps

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
) -> dict[str, float]:
  """Age of the teachers used in the update after `step`.

  Returns:
    Peers present; per present peer, and as mean and maximum over them, own step
    minus published step; the same in seconds since publication, by the clocks
    of both hosts. Without a present peer only `exchange/peers_present`.
  """
  present = [p for p in in_use if p is not None]
  metrics = {'exchange/peers_present': float(len(present))}
  if not present:
    return metrics
  now = time.time()
  steps = [float(step - p.step) for p in present]
  seconds = [now - p.time for p in present]
  for p, age, age_seconds in zip(present, steps, seconds):
    metrics[f'exchange/staleness_steps_group_{p.group_id}'] = age
    metrics[f'exchange/staleness_seconds_group_{p.group_id}'] = age_seconds
  metrics['exchange/staleness_steps'] = sum(steps) / len(steps)
  metrics['exchange/staleness_steps_max'] = max(steps)
  metrics['exchange/staleness_seconds'] = sum(seconds) / len(seconds)
  return metrics


def check_finite(group_id: int, step: int, metrics: Metrics | None) -> None:
  """Raises FloatingPointError if the update that made `step` went wrong.

  Its parameters may look sound: a clipped gradient hides a loss of infinity.
  """
  for key in ('loss/total', 'optim/grad_norm'):
    if metrics and key in metrics and not np.isfinite(float(metrics[key])):
      raise FloatingPointError(
          f'{key} of group {group_id} is {float(metrics[key])} at step {step};'
          ' nothing is published, and the last checkpoint is kept; lower the'
          ' learning rate or the distill weight'
      )


class NoExchange:
  """A group without peers that publishes nothing."""

  peers: tuple[int, ...] = ()
  in_use: tuple[Publication | None, ...] = ()
  rejected = 0
  last_rejection = ''

  def due(self, step: int) -> bool:
    del step
    return False

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    del step, variables, metrics
    return False

  def metrics(self, step: int) -> dict[str, float]:
    del step
    return {}

  def fetch(self, step: int) -> None:
    del step

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    del step, teacher_steps

  def settle(self, step: int) -> None:
    del step

  def checkpointed(self, step: int) -> None:
    del step

  def close(self) -> None:
    pass
