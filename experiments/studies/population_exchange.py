"""The lockstep exchange of many runs that are one program; all on the devices.

What `MemoryExchange` does for each group, here for all groups of all seeds: a
publication is a copy of the stacked variables, and teachers are gathered from
it, without a way through the host.

Shape suffixes: N = S * G members, seed by seed; S seeds, G groups, P peers.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax.base import Array, Teachers, Variables, cast_floats
from codistill_jax.exchange.plan import Plan, staleness_metrics
from codistill_jax.exchange.publications import Publication


class StackedExchange:
  """The exchange of S independent runs of G groups each.

  Attributes:
    num_peers: P.
  """

  def __init__(
      self,
      plan: Plan,
      num_seeds: int,
      num_groups: int,
      sharding: jax.sharding.Sharding,
  ):
    """Has published nothing yet.

    Args:
      plan: Of each run, in lockstep.
      num_seeds: S.
      num_groups: G.
      sharding: Of an array with an axis N in front.

    Raises:
      ValueError: If groups have different numbers of peers.
    """
    self._plan = plan
    self._peers = peers_of_all(plan, num_groups)
    self.num_peers = len(self._peers[0])
    self._peers_NP = np.array(
        [
            [seed * num_groups + peer for peer in peers]
            for seed in range(num_seeds)
            for peers in self._peers
        ],
        np.int32,
    ).reshape(num_seeds * num_groups, self.num_peers)
    self._history: dict[int, tuple[Variables, np.ndarray, float]] = {}
    self._shown: tuple[int, np.ndarray, float] | None = None
    self._teachers: Teachers | None = None
    self._num_bytes = 0
    self._copy = jax.jit(
        _copied, static_argnames='dtype', out_shardings=sharding
    )
    self._gather = jax.jit(
        _gathered, static_argnames='dtype', out_shardings=sharding
    )

  def due(self, step: int) -> bool:
    """Whether all publish at `step`."""
    return bool(self.num_peers) and self._plan.due(step)

  def publish(
      self, step: int, variables: Variables, alive_N: Sequence[bool]
  ) -> None:
    """Publishes for all members.

    Args:
      step: Updates done.
      variables: Stacked (N, ...).
      alive_N: False for a member that has diverged. It, and one with parameters
        that are not finite, teaches nobody from here on.
    """
    published, finite_N = self._copy(variables, dtype=self._plan.publish_dtype)
    sound_N = np.asarray(finite_N) & np.asarray(alive_N)
    self._history[step] = published, sound_N, time.time()
    # Nothing is asked for that is older than what a run from here on needs.
    oldest = self._plan.keep_from(step)
    for old in [s for s in self._history if s < oldest]:
      del self._history[old]
    size = sum(x.nbytes for x in jax.tree.leaves(published))
    self._num_bytes = size // len(sound_N)

  def fetch(self, step: int) -> Teachers | None:
    """The teachers (N, P, ...) of the update after `step`, on the devices."""
    if not self.num_peers:
      return None
    if self._teachers is not None and not self._plan.due(step):
      return self._teachers
    asked = self._plan.asked(step)
    if asked is not None and (not self._shown or asked != self._shown[0]):
      published, sound_N, seconds = self._history[asked]
      self._teachers = self._gather(
          published, sound_N, self._peers_NP, dtype=self._plan.teacher_dtype
      )
      self._shown = asked, sound_N, seconds
    return self._teachers

  def metrics(self, step: int, member: int) -> dict[str, float]:
    """The `exchange/*` values of a member in the update after `step`."""
    peers = self._peers[member % len(self._peers)]
    in_use: list[Publication | None] = [None] * len(peers)
    if self._shown is not None:
      published, sound_N, seconds = self._shown
      in_use = [
          Publication(peer, published, seconds) if sound_N[n] else None
          for peer, n in zip(peers, self._peers_NP[member])
      ]
    metrics = staleness_metrics(step, in_use) | {'exchange/rejected': 0.0}
    if self._num_bytes:
      metrics['exchange/publication_bytes'] = float(self._num_bytes)
    return metrics


class StackedTeachers:
  """Fixed teachers in the place of an exchange; see `fixed_teachers`."""

  def __init__(self, teachers: Teachers):
    """Has them from the first fetch on.

    Args:
      teachers: Of each member, stacked on the devices.
    """
    self._teachers = teachers
    self._present_NP = np.asarray(teachers.present_P)

  def due(self, step: int) -> bool:
    del step
    return False

  def publish(
      self, step: int, variables: Variables, alive_N: Sequence[bool]
  ) -> None:
    del step, variables, alive_N

  def fetch(self, step: int) -> Teachers:
    del step
    return self._teachers

  def metrics(self, step: int, member: int) -> dict[str, float]:
    del step
    present = float(self._present_NP[member].sum())
    return {'exchange/peers_present': present}


def peers_of_all(plan: Plan, num_groups: int) -> list[tuple[int, ...]]:
  """The peers of each group of a run.

  Raises:
    ValueError: If not all groups have equally many.
  """
  peers = [plan.peers_of(g, num_groups) for g in range(num_groups)]
  counts = sorted({len(found) for found in peers})
  if len(counts) > 1:
    raise ValueError(
        'groups that are one program have equally many peers, but by'
        f' topology={plan.topology!r} they have'
        f' {" and ".join(map(str, counts))}; train them in turn'
    )
  return peers


def _copied(variables: Variables, dtype: str) -> tuple[Variables, jax.Array]:
  """In the dtype of publications; and whose are finite (N,)."""
  finite = [
      jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
      for x in jax.tree.leaves(variables)
      if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  # What needs no cast would else be the very array that the next update is
  # given to write over.
  copied = jax.tree.map(jnp.copy, variables)
  return cast_floats(copied, dtype), jnp.all(jnp.stack(finite), axis=0)


def _gathered(
    published: Variables, sound_N: Array, peers_NP: Array, dtype: str
) -> Teachers:
  """The peers of each member; zeros for one that is not sound."""
  present_NP = sound_N[peers_NP]

  def gather(x: jax.Array) -> jax.Array:
    x_NP = x[peers_NP]
    rest = (1,) * (x_NP.ndim - 2)
    present = jnp.broadcast_to(
        jnp.reshape(present_NP, (*present_NP.shape, *rest)), x_NP.shape
    )
    return jnp.where(present, x_NP, jnp.zeros_like(x_NP))

  return Teachers(
      cast_floats(jax.tree.map(gather, published), dtype),
      present_NP.astype(jnp.float32),
  )
