"""Offline distillation: the teachers are runs that have ended, and stay so.

The second of two phases (Hinton et al. 2015). In the first, N teachers are
trained alone: the groups of one run without distillation, or of several. In
this one every group of the run learns from all of them, from its first update
with a distill weight on. Nothing is published and nothing grows stale.

Shape suffix: P teachers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath
from flax import serialization

from codistill_jax import run_directory
from codistill_jax.base import Teachers, Variables, cast_floats
from codistill_jax.exchange import publications
from codistill_jax.exchange.plan import NoExchange
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.teaching import merge_teachers
from codistill_jax.storage import checkpoints
from codistill_jax.storage.checkpoints import Leaf, Record

# Where a resume checkpoint holds what `Model.apply` needs.
_VARIABLES = 'variables'


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


def find(
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
      for workdir in map(checkpoints.absolute, teacher_runs)
      for group_id in _groups_of(workdir)
  )


def _groups_of(workdir: epath.Path) -> Sequence[int]:
  """Returns the groups of a run, if all have reached their last step."""
  there = run_directory.list_groups(workdir) if workdir.is_dir() else []
  if not there:
    raise ValueError(
        f'exchange.FixedTeachers.runs: there is no run in {workdir}; train the'
        ' teachers first, or give the --workdir that they were trained in'
    )
  num_groups = run_directory.read_run(workdir).get('num_groups', len(there))
  for group_id in range(num_groups):
    if not run_directory.done_path(workdir, group_id).exists():
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


def load(
    sources: Sequence[TeacherSource],
    like: Variables,
    identity: Mapping[str, str],
    dtype: str = 'float32',
) -> Teachers:
  """Reads and verifies the teachers, as numpy arrays.

  Args:
    sources: From `find`.
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
  found = [
      cast_floats(_read(source, like, identity), dtype) for source in sources
  ]
  return merge_teachers(
      None, dict(enumerate(found)), present=[True] * len(found)
  )


def _read(
    source: TeacherSource, like: Variables, identity: Mapping[str, str]
) -> Variables:
  record = checkpoints.load_record(source.directory, source.step)
  target = serialization.to_state_dict(like)
  checkpoints.check_match(
      str(source),
      identity=record.facts['identity'],
      leaves=_leaves_of(record),
      our_identity=identity,
      like=target,
      advice=(
          'give teachers and students the same model, task and prepared data'
      ),
      any_float=True,
  )
  tree = checkpoints.load_tree(
      source.directory, source.step, record, target, part=_VARIABLES
  )
  for path, x in checkpoints.flatten(tree):
    if not publications.is_finite(x):
      raise checkpoints.DamagedError(
          f'{path} of {source} is not finite at step {source.step}; set'
          ' exchange.FixedTeachers.step to an earlier one, or train it again'
      )
  return serialization.from_state_dict(like, tree)


def _leaves_of(record: Record) -> list[Leaf]:
  """Returns the leaves of the variables, by their paths below."""
  prefix = f'{_VARIABLES}/'
  return [
      dataclasses.replace(leaf, path=leaf.path.removeprefix(prefix))
      for leaf in record.leaves
      if leaf.path.startswith(prefix)
  ]


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
      teachers: From `load`; perhaps on the devices already.
    """
    self._sources = tuple(sources)
    self._teachers = teachers
    self.in_use: tuple[Publication | None, ...] = tuple(
        Publication(
            n,
            source.step,
            checkpoints.completed_at(source.directory, source.step),
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
