"""All seeds of an arm as one program: a seat for each group, and an exchange.

Seeds are runs that know nothing of each other; the groups of a seed codistil
in lockstep. On an accelerator, where a small model leaves most of the machine
idle, that takes about as long as one run. Each group is driven by
`driver.train` like any other, from a `Seat` at one `JointUpdate`. Publications
never leave the devices: one is a copy of all variables, and teachers are
gathered from it.

Shape suffixes: N = S * G members, seed by seed; S seeds, G groups, P peers.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import experiment as experiment_lib
from codistill_jax.base import (
    Array,
    Metrics,
    Model,
    Stream,
    Teachers,
    Variables,
    cast_floats,
)
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.exchange.plan import (
    NoExchange,
    Plan,
    check_finite,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.experiment import Experiment
from codistill_jax.one_program import JointUpdate, Seat, SharedStream

# What a group of a seed has in the program, in place of its step, and its
# exchange, which is through the devices.
Place = tuple[Seat, 'StackedExchange']


def possible(experiment: Experiment, num_groups: int) -> bool:
  """Returns whether seeds of the experiment can be one program.

  Not if each seed has teachers of its own, nor if groups differ in how many
  peers they have.
  """
  peers = {
      experiment.exchange.num_teachers(g, num_groups) for g in range(num_groups)
  }
  return isinstance(experiment.exchange, Checkpoints) and len(peers) == 1


def make_places(
    experiments: Sequence[Experiment],
    model: Model,
    num_groups: int,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[list[list[Place]], Stream]:
  """Returns the places of the groups of each seed, and the stream of all.

  Args:
    experiments: S of them, which differ in their seeds alone.
    model: Of all.
    num_groups: G.
    devices: As of `Population`.
  """
  update = JointUpdate(
      experiment_lib.make_population(
          experiments[0],
          model,
          len(experiments) * num_groups,
          devices,
          shared_batch=False,
      )
  )
  exchanges = exchanges_of(update, experiments[0].exchange, num_groups)
  members = list(zip(update.seats, exchanges))
  places = [
      members[first : first + num_groups]
      for first in range(0, len(members), num_groups)
  ]
  stream = _Stacked(
      [
          experiment_lib.train_stream(experiment, group_id, num_groups)
          for experiment in experiments
          for group_id in range(num_groups)
      ]
  )
  return places, SharedStream(stream)


def exchanges_of(
    update: JointUpdate, plan: Plan, num_groups: int
) -> list['StackedExchange']:
  """Returns the exchange of each member of an update, by the plan of a run."""
  shelf = _Shelf(update, plan, num_groups)
  return [StackedExchange(shelf, n) for n in range(len(update.seats))]


def can_resume(plan: Plan, step: int) -> bool:
  """Returns whether a run from `step` needs no publication from before it.

  There are none on disk; that of `step` itself is made again.
  """
  return not any(map(plan.due, range(plan.keep_from(step), step)))


class StackedExchange(NoExchange):
  """The exchange of one group of one seed; see `Exchange`."""

  def __init__(self, shelf: '_Shelf', member: int):
    """Has published nothing yet.

    Args:
      shelf: Of all members.
      member: Which of the N.
    """
    self._shelf = shelf
    self._member = member
    self._group_id = member % shelf.num_groups
    self.peers = shelf.plan.peers_of(self._group_id, shelf.num_groups)
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)

  def due(self, step: int) -> bool:
    return bool(self.peers) and self._shelf.plan.due(step)

  def publish_if_due(
      self, step: int, variables: Variables, metrics: Metrics | None = None
  ) -> bool:
    if not self.due(step):
      return False
    check_finite(self._group_id, step, metrics)
    self._shelf.publish(self._member, step, variables)
    return True

  def fetch(self, step: int) -> Teachers | None:
    """Returns the teachers of all members (N, P, ...), on the devices."""
    if not self.peers:
      return None
    teachers, published = self._shelf.teachers(step)
    if published is not None:
      self.in_use = tuple(Publication(p, *published) for p in self.peers)
    return teachers

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use) | {'exchange/rejected': 0.0}
    if self._shelf.num_bytes:
      metrics['exchange/publication_bytes'] = float(self._shelf.num_bytes)
    return metrics


class _Shelf:
  """The publications of all members, stacked on the devices.

  Attributes:
    plan: Of each run.
    num_groups: G.
    num_bytes: Of one publication of one member; 0 before the first.
  """

  def __init__(self, update: JointUpdate, plan: Plan, num_groups: int):
    self.plan = plan
    self.num_groups = num_groups
    self.num_bytes = 0
    self._update = update
    members = range(update.population.num_groups)
    self._peers_NP = np.array(
        [
            [
                n - n % num_groups + peer
                for peer in plan.peers_of(n % num_groups, num_groups)
            ]
            for n in members
        ],
        np.int32,
    )
    self._published: dict[int, tuple[Variables, float]] = {}
    self._begun: dict[int, Variables] = {}
    self._shown: tuple[int, float] | None = None
    self._teachers: Teachers | None = None
    sharding = update.population.sharding
    self._copy = jax.jit(
        _copied, static_argnames='dtype', out_shardings=sharding
    )
    self._gather = jax.jit(
        _gathered, static_argnames='dtype', out_shardings=sharding
    )

  def publish(self, member: int, step: int, variables: Variables) -> None:
    """Publishes for all members when the first of them does."""
    stacked = self._update.variables
    if stacked is None:  # A run that goes on, before its first update.
      self._begun[member] = variables
      if len(self._begun) < len(self._peers_NP):
        return
      begun = [self._begun.pop(n) for n in range(len(self._peers_NP))]
      stacked = self._update.population.stack(begun)
    elif step in self._published:
      return
    copied = self._copy(stacked, dtype=self.plan.publish_dtype)
    self._published[step] = copied, time.time()
    # Nothing is asked for that is older than what a run from here on needs.
    oldest = self.plan.keep_from(step)
    for old in [s for s in self._published if s < oldest]:
      del self._published[old]
    size = sum(x.nbytes for x in jax.tree.leaves(copied))
    self.num_bytes = size // len(self._peers_NP)

  def teachers(
      self, step: int
  ) -> tuple[Teachers | None, tuple[int, float] | None]:
    """Returns the teachers after `step`; of which step, and made when."""
    asked = self.plan.asked(step)
    if asked is not None and (self._shown is None or self._shown[0] != asked):
      published, seconds = self._published[asked]
      self._teachers = self._gather(
          published, self._peers_NP, dtype=self.plan.teacher_dtype
      )
      self._shown = asked, seconds
    return self._teachers, self._shown


def _copied(variables: Variables, dtype: str) -> Variables:
  # What needs no cast would else be the very array that the next update is
  # given to write over.
  return cast_floats(jax.tree.map(jnp.copy, variables), dtype)


def _gathered(published: Variables, peers_NP: Array, dtype: str) -> Teachers:
  taken = jax.tree.map(lambda x: x[peers_NP], published)
  present_NP = jnp.ones(peers_NP.shape, jnp.float32)
  return Teachers(cast_floats(taken, dtype), present_NP)


class _Stacked:
  """The streams of all members as one, of batches (N, B, ...)."""

  def __init__(self, streams: Sequence[Stream]):
    self._streams = streams

  def batch(self, step: int) -> dict[str, Any]:
    batches = [dict(stream.batch(step)) for stream in self._streams]
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)
