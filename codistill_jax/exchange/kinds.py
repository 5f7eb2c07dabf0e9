"""Kinds of exchange: the values of `Experiment.exchange`.

Each owns its settings, says how many teachers a group has, and makes the
exchange of a group, or of all groups of one process.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from codistill_jax import peer_predictions, run_directory
from codistill_jax.base import Agreement, PeerPredictions, Variables
from codistill_jax.exchange import fixed_teachers
from codistill_jax.exchange.plan import (
    DTYPES,
    Exchange,
    NoExchange,
    Plan,
    Topology,
    Waiting,
    check_topology,
    peers_of,
    readers_of,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.store_exchange import (
    CheckpointExchange,
    memory_exchanges,
)
from codistill_jax.exchange.stores import Mirror
from codistill_jax.storage.background import Troubles


class Member(Protocol):
  """A group that takes part, as `experiments.running.job.Job` is it."""

  experiment: Any
  train_step: Any
  workdir: str
  group_id: int
  num_groups: int
  identity: Mapping[str, str]
  agreement: Agreement
  stop: Callable[[], bool]
  troubles: Troubles


@runtime_checkable
class Kind(Protocol):
  """What the groups of a run give each other; the same for all of them.

  Attributes:
    every: Steps between exchanges; None if there are none.
    teacher_dtype: Floating dtype of teachers.
    one_program: Whether all groups update together, in one program.
  """

  every: int | None
  teacher_dtype: str
  one_program: bool = False

  def num_teachers(self, group_id: int, num_groups: int) -> int:
    """Returns P, the models that a group runs beside its own."""

  def due(self, step: int) -> bool:
    """Returns whether publications of `step` are exchanged."""
    return False

  def in_lockstep(self) -> 'Kind':
    """Returns this kind as a function of the seeds alone."""
    return self

  def describe(self) -> dict[str, Any]:
    """Returns what run.json says of it; see `run_directory.write_run`."""

  def check(self, experiment: Any) -> None:
    """Raises ValueError if the rest of an `Experiment` does not suit it."""

  def join(self, member: Member, like: Variables) -> Exchange:
    """Makes the exchange of one group, in a process of its own.

    Args:
      member: The group.
      like: Its variables.
    """

  def join_all(
      self, member: Member, like: Variables, examples: int
  ) -> Sequence[Exchange]:
    """Makes the exchanges of all groups of a process that steps them in turn.

    Args:
      member: Group 0.
      like: Variables of any group.
      examples: That a group takes in an update.
    """


@dataclasses.dataclass(frozen=True)
class Checkpoints(Plan, Kind):
  """Parameters, as checkpoints, now and then; see `Plan`.

  Attributes:
    timeout_seconds: How long a peer is waited for, in lockstep and by the
      policy 'wait'; and how long a publication that a peer reads is kept.
  """

  timeout_seconds: float = 600.0

  def __post_init__(self):
    super().__post_init__()
    timeout = self.timeout_seconds
    if not isinstance(timeout, int | float) or timeout < 0:
      raise ValueError(
          f'exchange.Checkpoints.timeout_seconds={timeout!r}; set it to a'
          ' number of seconds'
      )

  def num_teachers(self, group_id: int, num_groups: int) -> int:
    return len(self.peers_of(group_id, num_groups))

  def in_lockstep(self) -> 'Checkpoints':
    return dataclasses.replace(self, mode='lockstep')

  def describe(self) -> dict[str, Any]:
    return {'exchange_every': self.every, 'mode': self.mode}

  def join(self, member: Member, like: Variables) -> Exchange:
    return CheckpointExchange(
        run_directory.exchange_root(member.workdir),
        member.group_id,
        member.num_groups,
        like=like,
        plan=self,
        identity=member.identity,
        waiting=Waiting(self.timeout_seconds, member.stop),
        agreement=member.agreement,
        process=jax.process_index(),
        put=member.train_step.place_teachers,
        troubles=member.troubles,
    )

  def join_all(
      self, member: Member, like: Variables, examples: int
  ) -> Sequence[Exchange]:
    del examples
    root = run_directory.exchange_root(member.workdir)
    return memory_exchanges(
        member.num_groups,
        plan=self,
        mirror=Mirror(root, like, member.identity),
    )


@dataclasses.dataclass(frozen=True)
class Predictions(Kind):
  """Predictions of the same batch in every step; no second forward pass.

  All groups are one program (`train_lockstep`) and read one stream.

  Attributes:
    top_k: Classes sent of each prediction, and one number for the rest; None
      sends all.
    topology: Who learns from whom; see `plan`.
    topology_seed: Of a random topology.
  """

  top_k: int | None = None
  topology: Topology = 'all'
  topology_seed: int = 0

  every: ClassVar[int] = 1
  teacher_dtype: ClassVar[str] = 'float32'
  one_program: ClassVar[bool] = True

  def __post_init__(self):
    check_topology(self.topology)

  def peers_of(self, group_id: int, num_groups: int) -> tuple[int, ...]:
    """Returns the groups that `group_id` learns from."""
    return peers_of(group_id, num_groups, self.topology, self.topology_seed)

  def num_teachers(self, group_id: int, num_groups: int) -> int:
    self.peers_of(group_id, num_groups)  # Raises if there are too few groups.
    return 0  # The peers run themselves.

  def describe(self) -> dict[str, Any]:
    return {'exchange_every': 1, 'mode': 'predictions'}

  def check(self, experiment: Any) -> None:
    if experiment.method is not None:
      raise ValueError(
          'Experiment.exchange=@exchange.Predictions() needs synchronous SGD in'
          f' every group, but method={experiment.method!r}; leave one of them'
          ' out'
      )
    if experiment.distill_target != 'mean':
      raise ValueError(
          f'Experiment.distill_target={experiment.distill_target!r} with'
          ' Experiment.exchange=@exchange.Predictions(), where groups send each'
          " other one mean; set distill_target='mean', or"
          ' exchange=@exchange.Checkpoints()'
      )
    peer_predictions.check(
        experiment.distillation, self.top_k, experiment.task.num_classes
    )
    if experiment.task.partition != 'shared':
      raise ValueError(
          'Experiment.exchange=@exchange.Predictions() needs the same batches'
          ' in all groups, but the task has'
          f' partition={experiment.task.partition!r}; set the partition of the'
          " task to 'shared'"
      )

  def join(self, member: Member, like: Variables) -> Exchange:
    raise ValueError(
        'Experiment.exchange=@exchange.Predictions() is for groups that are one'
        ' program; use train_lockstep, which trains all groups in'
        ' one process, or set exchange=@exchange.Checkpoints()'
    )

  def join_all(
      self, member: Member, like: Variables, examples: int
  ) -> Sequence[Exchange]:
    del like
    task = member.experiment.task
    size = peer_predictions.bytes_per_example(
        task.num_classes, self.top_k, task.output
    )
    return [
        PredictionExchange(
            group_id, member.num_groups, self, bytes_to_peer=examples * size
        )
        for group_id in range(member.num_groups)
    ]


@dataclasses.dataclass(frozen=True)
class FixedTeachers(Kind):
  """Nothing: all groups learn from the groups of runs that have ended.

  Attributes:
    runs: The run directories; every group in them is a teacher.
    step: Of which step; None for the newest resume checkpoint of each.
    teacher_dtype: Floating dtype in which they are held.
  """

  runs: Sequence[str] = ()
  step: int | None = None
  teacher_dtype: str = 'float32'

  every: ClassVar[None] = None

  def __post_init__(self):
    runs, step = self.runs, self.step
    if not isinstance(runs, list | tuple) or not all(
        isinstance(run, str) and run for run in runs
    ):
      raise ValueError(
          f'exchange.FixedTeachers.runs={runs!r}; set it to a list of run'
          " directories, such as ['runs/teachers']"
      )
    if not runs:
      raise ValueError(
          'exchange.FixedTeachers has no teachers; set'
          ' exchange.FixedTeachers.runs to the run directories that they were'
          " trained in, such as ['runs/teachers']"
      )
    if step is not None and (type(step) is not int or step < 1):
      raise ValueError(
          f'exchange.FixedTeachers.step={step!r}; set it to the step of a'
          ' resume checkpoint, or None for the newest'
      )
    if self.teacher_dtype not in DTYPES:
      raise ValueError(
          f'exchange dtype {self.teacher_dtype!r} is not one of'
          f' {", ".join(DTYPES)}'
      )

  def num_teachers(self, group_id: int, num_groups: int) -> int:
    del group_id, num_groups
    return len(self.sources())

  def sources(self) -> tuple[fixed_teachers.TeacherSource, ...]:
    """Returns what the teachers are made of.

    Raises:
      ValueError: If a teacher run is not there or has not ended.
    """
    return fixed_teachers.find(self.runs, self.step)

  def describe(self) -> dict[str, Any]:
    """Returns also what was spent on the teachers before the first step."""
    sources = self.sources()
    workdirs = {os.fspath(source.workdir): [] for source in sources}
    for source in sources:
      workdirs[os.fspath(source.workdir)].append(source.step)
    # Teachers may have been taught so themselves.
    before = [run_directory.read_run(w).get('prior_steps', 0) for w in workdirs]
    return {
        'exchange_every': None,
        'mode': 'fixed',
        'teacher_runs': [
            {'workdir': workdir, 'steps': steps}
            for workdir, steps in workdirs.items()
        ],
        'prior_steps': sum(source.step for source in sources) + sum(before),
    }

  def join(self, member: Member, like: Variables) -> Exchange:
    sources = self.sources()
    teachers = fixed_teachers.load(
        sources, like, member.identity, self.teacher_dtype
    )
    return fixed_teachers.FixedExchange(
        sources, member.train_step.place_teachers(teachers)
    )

  def join_all(
      self, member: Member, like: Variables, examples: int
  ) -> Sequence[Exchange]:
    del examples
    return [self.join(member, like)] * member.num_groups  # On the devices once.


class PredictionExchange(NoExchange):
  """The exchange of a group that is part of one program; publishes nothing.

  A peer's predictions are in the update itself, see `peer_predictions` and
  `one_program`. What remains is whose they are.

  Attributes:
    peers: The ids of the peers.
    in_use: What taught in the last update: predictions as old as itself.
  """

  def __init__(
      self,
      group_id: int,
      num_groups: int,
      kind: Predictions | None = None,
      *,
      bytes_to_peer: int = 0,
  ):
    """Has peers from the first fetch on.

    Args:
      group_id: This group.
      num_groups: G.
      kind: Who learns from whom, and how much is sent.
      bytes_to_peer: What the group sends to one peer in an update.
    """
    kind = kind or Predictions()
    self.peers = kind.peers_of(group_id, num_groups)
    self.in_use: tuple[Publication | None, ...] = (None,) * len(self.peers)
    mix_G = np.zeros(num_groups, np.float32)
    mix_G[list(self.peers)] = 1.0 / max(len(self.peers), 1)
    self._teachers = PeerPredictions(mix_G, top_k=kind.top_k)
    readers = readers_of(
        group_id, num_groups, kind.topology, kind.topology_seed
    )
    self._bytes_sent = float(bytes_to_peer * len(readers))

  def fetch(self, step: int) -> PeerPredictions | None:
    """Returns the peers, who all teach after `step`; None without any."""
    if not self.peers:
      return None
    now = time.time()
    self.in_use = tuple(Publication(peer, step, now) for peer in self.peers)
    return self._teachers

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    metrics['exchange/prediction_bytes'] = self._bytes_sent
    return metrics
