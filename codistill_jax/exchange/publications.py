"""Publications: the variables of one group at one step, for its peers.

    <root>/group_<id>/<step>/

A reader trusts nothing: not the model that the peer trains, not the disk, and
not the numbers.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from codistill_jax.base import PyTree, Variables, cast_floats
from codistill_jax.storage import checkpoints
from codistill_jax.storage.checkpoints import (
    DamagedError,
    Leaf,
    MismatchError,
    Record,
)

_FOREVER = 1e12  # Unix seconds; so neither NaN nor infinite.


@dataclasses.dataclass(frozen=True)
class Publication:
  """What is known of one publication besides its arrays.

  Attributes:
    group_id: Who published.
    step: Updates done by the published variables.
    time: Unix seconds at which the training loop published.
    identity: What peers must share (tokenizer hash, number of classes, ...).
    num_bytes: Size of all its arrays.
    life: Of the group, from its first update on. That of a group which was
      started again from the beginning is greater, however few steps it has.
  """

  group_id: int
  step: int
  time: float
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_bytes: int = 0
  life: int = 0


Slot = tuple[Publication, Variables]


def group_directory(root: epath.PathLike, group_id: int) -> epath.Path:
  """Returns where a group publishes."""
  return epath.Path(root) / f'group_{group_id}'


def published_steps(root: epath.PathLike, group_id: int) -> list[int]:
  """Returns the completed publications of one group, ascending."""
  return checkpoints.completed_steps(group_directory(root, group_id))


def life_of(root: epath.PathLike, group_id: int, steps: Iterable[int]) -> int:
  """Returns the latest life of which some publications tell; 0 if none does."""
  lives, directory = [0], group_directory(root, group_id)
  for step in steps:
    with contextlib.suppress(OSError, ValueError):
      record = checkpoints.load_record(directory, step)
      lives.append(_described_by(record, directory).life)
  return max(lives)


def check_own(
    root: epath.PathLike,
    group_id: int,
    step: int,
    like: Variables,
    identity: Mapping[str, str],
) -> None:
  """Raises MismatchError if a group has published another model or task."""
  directory = group_directory(root, group_id)
  try:
    record = checkpoints.load_record(directory, step)
    publication = _described_by(record, directory)
  except (checkpoints.MissingError, DamagedError):
    return
  checkpoints.check_match(
      f'publication {step} of group {group_id}, by an earlier run,',
      identity=publication.identity,
      leaves=record.leaves,
      our_identity=identity,
      like=_as_dict(like),
      advice=f'use another workdir, or delete {directory} to begin anew',
      any_float=True,
  )


def write(
    root: epath.PathLike, publication: Publication, variables: Variables
) -> Publication:
  """Writes one publication (numpy variables, in the dtype to publish).

  A sound publication of that step is left alone: a restarted group comes by the
  steps of its earlier life; in lockstep these are the same bits, otherwise
  peers may be reading them right now. One that no peer would take is replaced.

  Returns:
    The publication that is there now, with its size.

  Raises:
    FloatingPointError: If the variables are not finite; nothing is written.
    OSError: If the file system refuses.
  """
  check_finite(publication, variables)
  tree = _as_dict(variables)
  there = _sound_one(root, publication, variables)
  if there is not None:
    return there
  facts = {
      'group_id': publication.group_id,
      'step': publication.step,
      'time': publication.time,
      'identity': dict(publication.identity),
      'life': publication.life,
  }
  directory = group_directory(root, publication.group_id)
  record = checkpoints.save(directory, publication.step, tree, facts)
  return dataclasses.replace(publication, num_bytes=_size(record.leaves))


def check_form(
    publication: Publication, variables: Variables, like: Variables
) -> None:
  """Raises MismatchError unless the variables have the leaves of `like`."""
  checkpoints.check_match(
      f'what group {publication.group_id} has at step {publication.step}',
      identity={},
      leaves=checkpoints.describe(_as_dict(variables)),
      our_identity={},
      like=_as_dict(like),
      advice=(
          'give all groups one model, whose parameters and state keep their'
          ' structure, shapes and dtypes'
      ),
  )


def check_finite(publication: Publication, variables: Variables) -> None:
  """Raises FloatingPointError if no peer should learn from the variables."""
  for path, x in checkpoints.flatten(_as_dict(variables)):
    if not is_finite(x):
      raise FloatingPointError(
          f'group {publication.group_id} does not publish step'
          f' {publication.step}: {path} is not finite'
      )


def _sound_one(
    root: epath.PathLike, publication: Publication, variables: Variables
) -> Publication | None:
  """Returns what is there of that step, if a peer would take it."""
  if publication.step not in published_steps(root, publication.group_id):
    return None
  try:
    there, _ = read(
        root,
        publication.group_id,
        publication.step,
        like=variables,
        identity=publication.identity,
    )
  except (checkpoints.MissingError, DamagedError, MismatchError):
    return None
  return there


def read(
    root: epath.PathLike,
    group_id: int,
    step: int,
    *,
    like: Variables,
    identity: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Slot:
  """Reads and verifies one publication.

  Args:
    root: Directory of the exchange; absolute.
    group_id: The peer.
    step: Which publication.
    like: The reader's own variables (arrays or their shapes).
    identity: What the peer must share; None accepts any.
    dtype: Floating dtype of the result; None keeps the published one.

  Returns:
    The publication and its variables as numpy arrays.

  Raises:
    checkpoints.MissingError: If it is not there, or vanished while it was read.
    checkpoints.DamagedError: If anything in it is unreadable, altered or not
      finite.
    MismatchError: If the peer trains another architecture or task.
    OSError: If the file system refuses to give it.
  """
  directory = group_directory(root, group_id)
  record = checkpoints.load_record(directory, step)
  publication = _described_by(record, directory / str(step))
  if (publication.group_id, publication.step) != (group_id, step):
    raise DamagedError(
        f'{directory / str(step)} was published by group'
        f' {publication.group_id} at step {publication.step}'
    )
  tree = load_sound(
      directory,
      step,
      record,
      _as_dict(like),
      who=f'publication {step} of group {group_id}',
      theirs=publication.identity,
      ours=publication.identity if identity is None else identity,
  )
  return publication, cast_floats(Variables(**tree), dtype)


def load_sound(
    directory: epath.Path,
    step: int,
    record: Record,
    like: PyTree,
    *,
    who: str,
    theirs: Mapping[str, str],
    ours: Mapping[str, str],
    part: str | None = None,
    advice: str = 'give all groups the same model, task and prepared data',
) -> PyTree:
  """Reads the arrays of a checkpoint for a model to predict with.

  Args:
    directory: Where.
    step: Which.
    record: From `checkpoints.load_record`.
    like: A tree of the same structure; floats may differ in width.
    who: Whose checkpoint it is, in errors.
    theirs: The identity of its writer.
    ours: That of this process.
    part: As of `checkpoints.load_tree`.
    advice: What to do about another architecture or task, in the error.

  Raises:
    MismatchError: If it is of another architecture or task.
    DamagedError: If it cannot be read, was altered or is not finite.
    checkpoints.MissingError, OSError: As of `checkpoints.load_tree`.
  """
  prefix = f'{part}/' if part else ''
  checkpoints.check_match(
      who,
      identity=theirs,
      leaves=[
          dataclasses.replace(leaf, path=leaf.path.removeprefix(prefix))
          for leaf in record.leaves
          if leaf.path.startswith(prefix)
      ],
      our_identity=ours,
      like=like,
      advice=advice,
      any_float=True,
  )
  tree = checkpoints.load_tree(directory, step, record, like, part)
  for path, x in checkpoints.flatten(tree):
    if not is_finite(x):
      raise DamagedError(
          f'{directory / str(step)}: {path} is not finite; take an earlier'
          ' step, or train it again'
      )
  return tree


def _described_by(record: Record, where: epath.Path) -> Publication:
  facts = {'life': 0, **record.facts}
  identity = facts.get('identity')
  if (
      facts.keys() != {'group_id', 'step', 'time', 'identity', 'life'}
      or not all(_is_count(facts[key]) for key in ('group_id', 'step', 'life'))
      or type(facts['time']) not in (int, float)
      or not abs(facts['time']) < _FOREVER
      or not facts['life'] < _FOREVER  # A later one has to be possible.
      or not isinstance(identity, dict)
      or not all(type(value) is str for value in identity.values())
  ):
    raise DamagedError(
        f'{where}: expected group_id, step, time and identity of a'
        f' publication, got {str(dict(facts))[:200]}'
    )
  return Publication(**facts, num_bytes=_size(record.leaves))


def _is_count(value: Any) -> bool:
  return type(value) is int and value >= 0


def is_finite(x: np.ndarray) -> bool:
  """Returns whether all floats of an array are finite."""
  if not jnp.issubdtype(x.dtype, np.floating):
    return True
  with np.errstate(invalid='ignore', over='ignore'):
    # One pass, no array of booleans: a finite sum has finite terms.
    if np.isfinite(np.sum(x, dtype=np.float64)):
      return True
  return bool(np.isfinite(x).all())  # Finite float64 may add up to infinity.


def _as_dict(variables: Variables) -> dict[str, PyTree]:
  return {'params': variables.params, 'model_state': variables.model_state}


def _size(leaves: tuple[Leaf, ...]) -> int:
  return sum(leaf.num_bytes for leaf in leaves)
