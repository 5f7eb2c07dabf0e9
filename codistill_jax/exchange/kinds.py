"""Kinds of exchange: the values of `Experiment.exchange`.

Each owns its settings, says how many teachers a group has, and makes the
exchange of a group, or of all groups of one process; that of `Checkpoints` is
in `store_exchange`.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
from etils import epath
from flax import serialization

from codistill_jax import peer_predictions, run_directory
from codistill_jax.base import (
    Agreement,
    Teachers,
    Variables,
    cast_floats,
)
from codistill_jax.exchange.fetching import merge_teachers
from codistill_jax.exchange.plan import (
    DTYPES,
    Exchange,
    NoExchange,
    Plan,
    Topology,
    Waiting,
    check_choice,
    check_topology,
    peers_of,
    readers_of,
    staleness_metrics,
)
from codistill_jax.exchange.publications import Publication, load_sound
from codistill_jax.exchange.store_exchange import (
    CheckpointExchange,
    memory_exchanges,
)
from codistill_jax.exchange.stores import Mirror
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.background import Troubles


class Member(Protocol):
  """A group that takes part, as `experiments.running.job.Job` is it."""

  experiment: Any
  train_step: Any
  workdir: str
  exchange_dir: str
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
    mode = self.with_mode('freshest').mode
    return {'exchange_every': self.every, 'mode': mode}

  def join(self, member: Member, like: Variables) -> Exchange:
    return CheckpointExchange(  # type: ignore[return-value]
        _root_of(member),
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
    return memory_exchanges(  # type: ignore[return-value]
        member.num_groups,
        plan=self,
        mirror=Mirror(_root_of(member), like, member.identity),
    )


def _root_of(member: Member) -> epath.PathLike:
  return member.exchange_dir or run_directory.exchange_root(member.workdir)


@dataclasses.dataclass(frozen=True)
class Predictions(Kind):
  """Predictions of the same batch in every step; no second forward pass.

  All groups are one program (`train_lockstep`) and read one stream.

  Attributes:
    top_k: Classes sent of each prediction, and one number for the rest; None
      sends all, as do groups that share their devices: nothing moves there.
    topology: Who learns from whom; see `plan`.
    topology_seed: Of a random topology.
  """

  top_k: int | None = None
  topology: Topology = 'all'
  topology_seed: int = 0

  every: ClassVar[int] = 1  # type: ignore[misc]
  teacher_dtype: ClassVar[str] = 'float32'  # type: ignore[misc]
  one_program: ClassVar[bool] = True  # type: ignore[misc]

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

  Offline distillation, the second of two phases (Hinton et al. 2015). In the
  first, N teachers are trained alone: the groups of one run without
  distillation, or of several. In this one every group learns from all of them,
  from its first update with a distill weight on. Nothing is published and
  nothing grows stale.

  Attributes:
    runs: The run directories; every group in them is a teacher.
    step: Of which step; None for the newest resume checkpoint of each.
    teacher_dtype: Floating dtype in which they are held.
  """

  runs: Sequence[str | os.PathLike] = ()
  step: int | None = None
  teacher_dtype: str = 'float32'

  every: ClassVar[None] = None  # type: ignore[misc]

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
    check_choice('exchange dtype', self.teacher_dtype, DTYPES)

  def num_teachers(self, group_id: int, num_groups: int) -> int:
    del group_id, num_groups
    return len(find_teachers(self.runs, self.step))

  def describe(self) -> dict[str, Any]:
    """Returns also what was spent on the teachers before the first step."""
    steps: dict[str, list[int]] = {}
    for source in find_teachers(self.runs, self.step):
      steps.setdefault(os.fspath(source.workdir), []).append(source.step)
    # Teachers may have been taught so themselves.
    before = [run_directory.read_run(w).get('prior_steps', 0) for w in steps]
    return {
        'exchange_every': None,
        'mode': 'fixed',
        'teacher_runs': [{'workdir': w, 'steps': s} for w, s in steps.items()],
        'prior_steps': sum(map(sum, steps.values())) + sum(before),
    }

  def join(self, member: Member, like: Variables) -> Exchange:
    sources = find_teachers(self.runs, self.step)
    teachers = load_teachers(sources, like, member.identity, self.teacher_dtype)
    return FixedExchange(sources, member.train_step.place_teachers(teachers))

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
    readers = readers_of(
        group_id, num_groups, kind.topology, kind.topology_seed
    )
    self._bytes_sent = float(bytes_to_peer * len(readers))

  def fetch(self, step: int) -> tuple[int, ...] | None:
    """Returns the peers, who all teach after `step`; None without any.

    Their predictions are where the update is made; see `one_program.Seat`.
    """
    if not self.peers:
      return None
    now = time.time()
    self.in_use = tuple(Publication(peer, step, now) for peer in self.peers)
    return self.peers

  def metrics(self, step: int) -> dict[str, float]:
    metrics = staleness_metrics(step, self.in_use)
    metrics['exchange/prediction_bytes'] = self._bytes_sent
    return metrics


# --- Teachers that have ended ------------------------------------------------


class TeacherSource(NamedTuple):
  """The resume checkpoint that a teacher is made of.

  Attributes:
    workdir: The run directory of the first phase.
    group_id: The group of that run.
    step: Updates that it had done.
  """

  workdir: epath.Path
  group_id: int
  step: int

  @property
  def directory(self) -> epath.Path:
    return run_directory.checkpoints_dir(self.workdir, self.group_id)

  def __str__(self) -> str:
    return f'group {self.group_id} of the teacher run {self.workdir}'


def find_teachers(
    teacher_runs: Sequence[epath.PathLike], step: int | None = None
) -> tuple[TeacherSource, ...]:
  """Returns all groups of the runs, in order; looks at names only.

  Args:
    teacher_runs: Run directories.
    step: The step of all teachers; None for the newest checkpoint of each.

  Raises:
    ValueError: If a run is not there, has not ended, or has no such checkpoint.
    OSError: If the file system does not tell.
  """
  return tuple(
      TeacherSource(workdir, group_id, _step_of(workdir, group_id, step))
      for workdir in map(epath.Path, map(files.absolute, teacher_runs))
      for group_id in _groups_of(workdir)
  )


def _groups_of(workdir: epath.Path) -> Sequence[int]:
  """Returns the groups of a run, if all have reached their last step."""
  there = run_directory.list_groups(workdir) if files.names(workdir) else []
  if not there:
    raise ValueError(
        f'exchange.FixedTeachers.runs: there is no run in {workdir}; train the'
        ' teachers first, or give the --workdir that they were trained in'
    )
  run = run_directory.read_run(workdir)
  num_groups = run.get('num_groups') or len(there)
  for group_id in range(num_groups):
    if not files.exists(run_directory.done_path(workdir, group_id)):
      raise ValueError(
          f'exchange.FixedTeachers.runs: group {group_id} of {workdir} has not'
          ' reached its last step (there is no DONE); start its command again'
          ' and let it end, then train the student'
      )
  return range(num_groups)


def _step_of(workdir: epath.Path, group_id: int, step: int | None) -> int:
  directory = run_directory.checkpoints_dir(workdir, group_id)
  steps = checkpoints.completed_steps(directory)
  wanted = max(steps, default=None) if step is None else step
  if wanted not in steps:
    raise ValueError(
        f'there is no resume checkpoint of step'
        f' {"any" if wanted is None else wanted} in {directory}; there are:'
        f' {", ".join(map(str, steps)) or "none"}. Set'
        ' exchange.FixedTeachers.step to one of them, or train the teachers'
        ' again'
    )
  return wanted


def load_teachers(
    sources: Sequence[TeacherSource],
    like: Variables,
    identity: Mapping[str, str],
    dtype: str = 'float32',
) -> Teachers:
  """Reads and verifies the teachers, as numpy arrays.

  Args:
    sources: From `find_teachers`.
    like: Variables of the student, or their shapes.
    identity: What a teacher must share (task, classes, tokenizer hash, ...).
    dtype: Floating dtype in which they are held.

  Returns:
    `Teachers` with P = the number of sources, all present.

  Raises:
    checkpoints.MismatchError: If one was trained on another task, or is
      another model.
    checkpoints.DamagedError: If one cannot be read, was altered or is not
      finite.
    OSError: If the file system refuses to give one.
  """
  target = serialization.to_state_dict(like)
  found = {}
  for slot, source in enumerate(sources):
    record = checkpoints.load_record(source.directory, source.step)
    tree = load_sound(
        source.directory,
        source.step,
        record,
        target,
        who=str(source),
        theirs=record.facts['identity'],
        ours=identity,
        part='variables',
    )
    variables = serialization.from_state_dict(like, tree)
    found[slot] = cast_floats(variables, dtype)
  return merge_teachers(None, found, present=[True] * len(found))


class FixedExchange(NoExchange):
  """The exchange of a student; see `Exchange`. Nothing is published.

  Attributes:
    peers: Nobody: no group of this run teaches it.
    in_use: Per teacher, what it is made of, at all steps; numbered from 0 over
      all runs.
  """

  def __init__(self, sources: Sequence[TeacherSource], teachers: Teachers):
    """Has its teachers from the first fetch on.

    Args:
      sources: What they are made of.
      teachers: From `load_teachers`; perhaps on the devices already.
    """
    self._sources = tuple(sources)
    self._teachers = teachers
    self.in_use: tuple[Publication | None, ...] = tuple(
        Publication(
            n,
            source.step,
            # None if nobody knows: it is recorded, and no age is made of it.
            checkpoints.completed_at(source.directory, source.step),  # type: ignore[arg-type]
        )
        for n, source in enumerate(sources)
    )

  def fetch(self, step: int) -> Teachers:
    """Returns the same teachers at every step."""
    del step
    return self._teachers

  def metrics(self, step: int) -> dict[str, float]:
    """Returns how many there are; they have no age in steps of this run."""
    del step
    return {'exchange/peers_present': float(len(self._sources))}

  def restore(self, step: int, teacher_steps: Sequence[int | None]) -> None:
    """Raises ValueError if the run up to `step` had other teachers."""
    now = [source.step for source in self._sources]
    # A checkpoint from before the first update with teachers names them too.
    if list(teacher_steps) != now:
      raise ValueError(
          f'up to step {step} the teachers were those of steps'
          f' {list(teacher_steps)}, now they are those of {now}; restore the'
          ' teacher runs, or train the student in another --workdir'
      )
