"""Publications: the variables of one group at one step, for its peers.

    <root>/group_<id>/<step>/

A reader trusts nothing: not the model that the peer trains, not the disk, and
not the numbers.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

from codistill_jax import storage
from codistill_jax.base import PyTree, Variables, cast_floats
from codistill_jax.storage import DamagedError, Leaf


class MismatchError(ValueError):
  """A peer trains something else: another architecture, tokenizer, task."""


@dataclasses.dataclass(frozen=True)
class Publication:
  """What is known of one publication besides its arrays.

  Attributes:
    group_id: Who published.
    step: Updates done by the published variables.
    time: Unix seconds at which the training loop published.
    identity: What peers must share (tokenizer hash, number of classes, ...).
    num_bytes: Size of all its arrays.
  """

  group_id: int
  step: int
  time: float
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_bytes: int = 0


def group_directory(root: epath.PathLike, group_id: int) -> epath.Path:
  """Where a group publishes."""
  return epath.Path(root) / f'group_{group_id}'


def published_steps(root: epath.PathLike, group_id: int) -> list[int]:
  """Completed publications of one group, ascending; [] if there are none."""
  return storage.completed_steps(group_directory(root, group_id))


def write(
    root: epath.PathLike, publication: Publication, variables: Variables
) -> Publication:
  """Writes one publication (numpy variables, in the dtype to publish).

  A completed publication of that step is left alone: a restarted group comes
  by the steps of its earlier life; in lockstep these are the same bits,
  otherwise peers may be reading them right now.

  Returns:
    The publication with its size.
  """
  directory = group_directory(root, publication.group_id)
  if publication.step in storage.completed_steps(directory):
    return publication
  facts = {
      'group_id': publication.group_id,
      'step': publication.step,
      'time': publication.time,
      'identity': dict(publication.identity),
  }
  record = storage.save(directory, publication.step, _as_dict(variables), facts)
  return dataclasses.replace(publication, num_bytes=_size(record.leaves))


def read(
    root: epath.PathLike,
    group_id: int,
    step: int,
    *,
    like: Variables,
    identity: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> tuple[Publication, Variables]:
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
    storage.MissingError: If it is not there, or vanished while it was read.
    storage.DamagedError: If anything in it is unreadable, altered or not
      finite.
    MismatchError: If the peer trains another architecture or task.
  """
  directory = group_directory(root, group_id)
  record = storage.load_record(directory, step)
  publication = Publication(**record.facts, num_bytes=_size(record.leaves))
  if (publication.group_id, publication.step) != (group_id, step):
    raise DamagedError(
        f'{directory / str(step)} was published by group'
        f' {publication.group_id} at step {publication.step}'
    )
  if identity is not None:
    _check_identity(publication, identity)
  _check_leaves(group_id, record.leaves, storage.describe(_as_dict(like)))
  tree = storage.load_tree(directory, step, record, _as_dict(like))
  for leaf, (_, x) in zip(record.leaves, storage.flatten(tree), strict=True):
    if not _is_finite(x):
      raise DamagedError(f'{directory / str(step)}: {leaf} is not finite')
  variables = Variables(tree['params'], tree['model_state'])
  return publication, cast_floats(variables, dtype)


def _check_identity(publication: Publication, ours: Mapping[str, str]) -> None:
  theirs = publication.identity
  for key in sorted(theirs.keys() | ours.keys()):
    if theirs.get(key) != ours.get(key):
      raise MismatchError(
          f'group {publication.group_id} trains with {key}={theirs.get(key)},'
          f' this group with {key}={ours.get(key)}; all groups need the same'
          ' task and the same prepared data'
      )


def _check_leaves(
    group_id: int, theirs: tuple[Leaf, ...], ours: tuple[Leaf, ...]
) -> None:
  for i in range(max(len(theirs), len(ours))):
    their_leaf = theirs[i] if i < len(theirs) else None
    our_leaf = ours[i] if i < len(ours) else None
    if not their_leaf or not our_leaf or not _same(their_leaf, our_leaf):
      raise MismatchError(
          f'group {group_id} trains another architecture: the first differing'
          f' leaf is {their_leaf or "missing"} there and'
          f' {our_leaf or "missing"} here; give all groups the same model'
          ' configuration'
      )


def _same(a: Leaf, b: Leaf) -> bool:
  """Equal but for the width of floats, which each side chooses."""
  floats = all(jnp.issubdtype(x.dtype, np.floating) for x in (a, b))
  return (a.path, a.shape) == (b.path, b.shape) and (
      floats or a.dtype == b.dtype
  )


def _is_finite(x: np.ndarray) -> bool:
  if not jnp.issubdtype(x.dtype, np.floating):
    return True
  with np.errstate(invalid='ignore'):
    # One pass, no array of booleans: a finite sum has finite terms.
    return bool(np.isfinite(np.sum(x, dtype=np.float64)))


def _as_dict(variables: Variables) -> dict[str, PyTree]:
  return {'params': variables.params, 'model_state': variables.model_state}


def _size(leaves: tuple[Leaf, ...]) -> int:
  return sum(leaf.num_bytes for leaf in leaves)
