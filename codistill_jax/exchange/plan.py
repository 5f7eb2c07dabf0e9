"""Interface and plan of an exchange: what is published when, and read by whom.

Two modes. *freshest*: a fetch takes whatever is newest and never waits
(production). *lockstep*: a fetch takes the publication of exactly the step
asked for and waits for it, so that a run is a function of its seeds
(reproducible science); then the order in which groups are stepped, their
speed, and the kind of exchange cannot matter.

Who learns from whom, the *topology*, is a directed graph; a name or a list:

* `all`: every group learns from every other one (Anil et al. 2018).
* `ring`: group g learns from group g - 1 alone (the last before group 0). News
  takes G - 1 exchanges around; the cost of teachers does not grow with G.
* `random-<k>`, such as `random-3`: each group has k peers and is the peer of k
  groups, drawn by a seed; all groups hear of each other sooner or later.
* `[[1], [0], [3], [2]]`: entry g lists the peers of group g; here two pairs.

Shape suffix: P peers.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np

from codistill_jax.base import (
    Agreement,
    Metrics,
    PeerPredictions,
    Teachers,
    Variables,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.step import fault_error, fault_of
from codistill_jax.storage.background import Interrupted

Topology = str | Sequence[Sequence[int]]

MODES = ('freshest', 'lockstep')
POLICIES = ('drop', 'wait', 'fail')
DTYPES = ('float32', 'bfloat16')


class StaleError(ValueError):
  """A teacher is older than allowed, and the policy is to fail."""


class PeerError(ValueError):
  """What lockstep asks of a peer will never come."""


class Exchange(Protocol):
  """How one group gives its variables to its peers and gets theirs.

  What derives from it does nothing where it says nothing.

  Attributes:
    peers: The ids of the peers, in the order of the teachers' axis P.
    in_use: Per peer, the publication that its teacher is, or None for a peer
      that is absent: it has published nothing, or nothing young enough.
    rejected: How many publications were found bad and skipped.
    last_rejection: Which one was the last, and why; '' if there is none.
  """

  peers: tuple[int, ...] = ()
  in_use: tuple[Publication | None, ...] = ()
  rejected: int = 0
  last_rejection: str = ''

  def begin(self, step: int) -> None:
    """Learns where a run begins, before all else of it but `restore`.

    Raises:
      ValueError: If it has served a run that was further on.
    """

  def due(self, step: int) -> bool:
    """Returns whether this process publishes at `step`."""
    return False

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
    return False

  def fetch(
      self, step: int
  ) -> Teachers | PeerPredictions | tuple[int, ...] | None:
    """Returns the teachers of the update after `step`; None without any.

    Returns the same object until a teacher changes; the ids of the peers, where
    their predictions are made in the update itself.

    Raises:
      TimeoutError: In lockstep, if a peer does not publish in time.
      PeerError: In lockstep, if it never will.
      Interrupted: While waiting, if the process was asked to stop.
      StaleError: If a teacher is too old and the policy is `fail`.
      checkpoints.MismatchError: In lockstep, if a peer trains something else.
    """

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the `exchange/*` values of the update after `step`."""
    return {}

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Takes up what was in use at the resume checkpoint of `step`."""

  def settle(self, step: int) -> None:
    """Settles `step`, before its checkpoint is written; from another thread.

    A group that restarts makes no publication from before its checkpoint again,
    so those that peers will ask for must be complete first.

    Raises:
      OSError: If that takes long; it is tried again.
    """

  def checkpointed(self, step: int) -> None:
    """Learns that a restart would begin at `step` or later."""

  def fail(self, error: Exception) -> None:
    """Learns what ends the run before its time; tells peers that would wait."""

  def close(self) -> None:
    """Finishes what is under way."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Schedule of an exchange: when it publishes, and what it asks for.

  Attributes:
    every: Steps between exchanges.
    mode: 'freshest' or 'lockstep'. None: lockstep among groups of one process,
      freshest through a directory.
    staleness: In lockstep, the age in steps of a publication when its teacher
      comes into use; a multiple of `every`. Between exchanges a teacher ages
      by up to `every - 1` steps more.
    publish_dtype: Floating dtype of publications.
    teacher_dtype: Floating dtype in which teachers are held.
    max_staleness_steps: In freshest, the age in steps beyond which a teacher
      is not used; None for any age. A peer that has published nothing counts
      as if it had published at step 0. Nor is one used that is ahead by more.
    staleness_policy: What happens if one is too old. 'drop': the peer is left
      out of the mean until it publishes again. 'wait': training waits for it.
      'fail': an error ends the run.
    topology: Who learns from whom; see above.
    topology_seed: Of a random topology.
  """

  every: int = 50
  mode: str | None = None
  staleness: int = 0
  publish_dtype: str = 'float32'
  teacher_dtype: str = 'float32'
  max_staleness_steps: int | None = None
  staleness_policy: str = 'drop'
  topology: Topology = 'all'
  topology_seed: int = 0

  def __post_init__(self):
    if type(self.every) is not int or self.every < 1:
      raise ValueError(f'every={self.every!r}; set it to at least 1 step')
    if self.mode is not None:
      check_choice('exchange mode', self.mode, MODES)
    whole = type(self.staleness) is int and self.staleness >= 0
    if not whole or self.staleness % self.every:
      raise ValueError(
          f'staleness={self.staleness!r} is not a multiple of'
          f' every={self.every}: only those steps are published'
      )
    if self.staleness and self.mode == 'freshest':
      raise ValueError(
          f'staleness={self.staleness} can be asked for in lockstep only; in'
          ' mode freshest it is measured: set staleness=0'
      )
    check_choice('exchange dtype', self.publish_dtype, DTYPES)
    check_choice('exchange dtype', self.teacher_dtype, DTYPES)
    check_choice('staleness_policy', self.staleness_policy, POLICIES)
    check_topology(self.topology)
    self._check_limit()

  def _check_limit(self) -> None:
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
          ' is given by staleness; leave max_staleness_steps=None, or set'
          " mode='freshest'"
      )
    if type(limit) is not int or limit < 2 * self.every:
      raise ValueError(
          f'max_staleness_steps={limit!r}; set it to at least twice'
          f' every={self.every}: a teacher ages by that much between'
          ' exchanges, and the next one takes a while to come'
      )

  def with_mode(self, default: str) -> Self:
    """Returns the plan with a mode: its own, if it has one."""
    return dataclasses.replace(self, mode=self.mode or default)

  def peers_of(self, group_id: int, num_groups: int) -> tuple[int, ...]:
    """Returns the groups that `group_id` learns from."""
    return peers_of(group_id, num_groups, self.topology, self.topology_seed)

  def readers_of(self, group_id: int, num_groups: int) -> tuple[int, ...]:
    """Returns the groups that learn from `group_id`."""
    return readers_of(group_id, num_groups, self.topology, self.topology_seed)

  def too_old(self, step: int, published: Publication | None) -> bool:
    """Returns whether a teacher is past its limit after `step`."""
    if self.max_staleness_steps is None:
      return False
    born = 0 if published is None else published.step
    return step - born > self.max_staleness_steps

  def newest_used(self, step: int) -> float:
    """Returns beyond which step no teacher is used in the update of `step`."""
    if self.max_staleness_steps is None:
      return math.inf
    return step + self.max_staleness_steps

  def due(self, step: int) -> bool:
    """Returns whether `step` is an exchange step; 0 is none."""
    return step > 0 and step % self.every == 0

  def asked(self, step: int) -> int | None:
    """Returns which publication lockstep uses in the update after `step`."""
    asked = step - step % self.every - self.staleness
    return asked if asked > 0 else None

  def keep_from(self, step: int) -> int:
    """Returns the oldest one that lockstep needs from `step` on."""
    return self.asked(step) or 0


@dataclasses.dataclass(frozen=True)
class Waiting:
  """Time limits for peers.

  Attributes:
    timeout_seconds: How long a fetch waits for a peer before it raises
      TimeoutError; and how long a publication is kept that somebody reads.
    interrupted: Polled while waiting; true gives the wait up.
  """

  timeout_seconds: float = 600.0
  interrupted: Callable[[], bool] = lambda: False

  def go_on(
      self,
      start: float,
      why: str,
      agreement: Agreement,
      in_vain: str | None = None,
  ) -> None:
    """Checks a wait that has begun at `start` (monotonic).

    Args:
      start: When it began.
      why: What is waited for.
      agreement: How the processes of the group decide together.
      in_vain: Why it will never come, if that is known.

    Raises:
      Interrupted, TimeoutError: With `why`.
      PeerError: With `in_vain`.
    """
    late = time.monotonic() - start >= self.timeout_seconds
    # Together: a process that went on alone would wait for the others.
    go_on, hopeful, in_time = agreement.all_true(
        np.array([not self.interrupted(), in_vain is None, not late])
    )
    if not go_on:
      raise Interrupted(f'stopped while waiting: {why}')
    if not hopeful:
      raise PeerError(in_vain or f'in vain: {why}')
    if not in_time:
      raise TimeoutError(f'after {self.timeout_seconds:g} s of waiting: {why}')


def staleness_metrics(
    step: int, in_use: Sequence[Publication | None]
) -> dict[str, float]:
  """Returns the age of the teachers used in the update after `step`.

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

  If its data were wrong, ValueError.

  Its parameters may look sound: a clipped gradient hides a loss of infinity.
  """
  name, said = fault_of(metrics or {})
  if said:
    raise fault_error(
        name,
        f'the update of group {group_id} went wrong at step {step}: {said};'
        ' nothing is published, and the last checkpoint is kept',
    )


class NoExchange(Exchange):
  """The exchange of a group without peers, which publishes nothing."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises ValueError if a value is not one of its choices."""
  if value not in choices:
    raise ValueError(f'{name} {value!r} is not one of {", ".join(choices)}')


def check_topology(topology: Topology) -> None:
  """Raises ValueError if no number of groups could make sense of it."""
  if isinstance(topology, str):
    if topology in ('all', 'ring') or re.fullmatch(
        r'random-[1-9]\d*', topology
    ):
      return
    raise ValueError(
        f'topology {topology!r} is not one of all, ring, random-<k> (such as'
        ' random-3) or a list with the peers of each group'
    )
  if not isinstance(topology, list | tuple) or not all(
      isinstance(peers, list | tuple) for peers in topology
  ):
    raise ValueError(
        f'topology {topology!r} is neither a name nor a list of lists; write'
        ' [[1], [0]] to give group 0 the peer 1 and group 1 the peer 0'
    )
  groups = range(len(topology))
  for group_id, peers in enumerate(topology):
    for peer in peers:
      if type(peer) is not int or peer not in groups or peer == group_id:
        raise ValueError(
            f'topology gives group {group_id} the peer {peer!r}; with lists for'
            f' {len(topology)} groups a peer is another one of'
            f' 0..{len(topology) - 1}'
        )
    if len(set(peers)) != len(peers):
      raise ValueError(
          f'topology gives group {group_id} a peer twice: {list(peers)}; name'
          ' each once'
      )


def peers_of(
    group_id: int, num_groups: int, topology: Topology = 'all', seed: int = 0
) -> tuple[int, ...]:
  """Returns the groups that `group_id` learns from, ascending.

  Raises:
    ValueError: For a `group_id` out of range, or a topology that does not suit
      `num_groups`.
  """
  if not isinstance(num_groups, int | np.integer) or num_groups < 1:
    raise ValueError(f'num_groups={num_groups!r}; set it to at least 1')
  if not 0 <= group_id < num_groups:
    raise ValueError(
        f'group_id={group_id} is out of range: with num_groups={num_groups}'
        f' it lies in 0..{num_groups - 1}'
    )
  check_topology(topology)
  if not isinstance(topology, str):
    if len(topology) != num_groups:
      raise ValueError(
          f'topology lists the peers of {len(topology)} groups, but'
          f' num_groups={num_groups}; give one list for each group'
      )
    return tuple(sorted(topology[group_id]))
  if topology == 'all':
    shifts = range(1, num_groups)
  elif topology == 'ring':
    shifts = range(1, min(num_groups, 2))
  else:
    return _random_peers(group_id, num_groups, int(topology[7:]), seed)
  return tuple(sorted((group_id - shift) % num_groups for shift in shifts))


def readers_of(
    group_id: int, num_groups: int, topology: Topology = 'all', seed: int = 0
) -> tuple[int, ...]:
  """Returns the groups that learn from `group_id`, ascending."""
  return tuple(
      g
      for g in range(num_groups)
      if group_id in peers_of(g, num_groups, topology, seed)
  )


def _random_peers(
    group_id: int, num_groups: int, k: int, seed: int
) -> tuple[int, ...]:
  if num_groups == 1:
    return ()  # The baseline of a study needs no other configuration.
  if k >= num_groups:
    raise ValueError(
        f'topology random-{k} needs more than {k} groups, but num_groups='
        f'{num_groups}; use random-{num_groups - 1} at most'
    )
  rng = np.random.default_rng(seed)
  # Groups on a circle in random order; all look back by the same k distances,
  # of which one is 1: in and out degree are k, and nobody is cut off.
  circle = rng.permutation(num_groups)
  others = 2 + rng.permutation(num_groups - 2)[: k - 1]
  place = int(np.flatnonzero(circle == group_id)[0])
  return tuple(
      sorted(
          int(circle[(place - shift) % num_groups]) for shift in (1, *others)
      )
  )
