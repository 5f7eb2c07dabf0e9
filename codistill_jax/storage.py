"""Checkpoints that can be trusted: orbax, plus a checksum of every array.

    <directory>/<step>/arrays   the tree, readable by orbax alone
    <directory>/<step>/record   JSON: facts, and path, shape, dtype, checksum

The only module that imports orbax. Orbax restores flipped bits without a word
and lists directories that were never finished; here a step exists when its
commit mark does, and what is read back is what was written, or an error.
"""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from codistill_jax.base import PyTree

# In the directory before orbax renames it to its final name; `delete` takes it
# away first.
_COMMITTED = 'commit_success.txt'

# Orbax numbers the saves of a process in one global variable. Of two saves at
# once, a publication and a resume checkpoint, one waits for the directories of
# the other and then writes into its own before they are made.
_SAVING = threading.Lock()


class DamagedError(ValueError):
  """A checkpoint is there, but must not be used."""


class MissingError(ValueError):
  """A checkpoint is not there (any more)."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a checkpoint."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  checksum: str = ''

  def __str__(self) -> str:
    return f'{self.path} {self.dtype}{list(self.shape)}'

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of a checkpoint without reading its arrays."""

  facts: Mapping[str, Any]
  leaves: tuple[Leaf, ...]


def absolute(path: epath.PathLike) -> epath.Path:
  """The path as orbax wants it."""
  path = epath.Path(path)
  return path if path.is_absolute() else path.resolve()


def completed_steps(directory: epath.PathLike) -> list[int]:
  """The steps of all completed checkpoints, ascending; [] if there are none."""
  try:
    steps = [
        int(path.name)
        for path in epath.Path(directory).iterdir()
        if path.name.isdigit() and (path / _COMMITTED).exists()
    ]
  except FileNotFoundError:
    return []
  return sorted(steps)


def describe(tree: PyTree) -> tuple[Leaf, ...]:
  """The leaves of `tree` (arrays or their shapes), without checksums."""
  return tuple(
      Leaf(path, tuple(x.shape), np.dtype(x.dtype).name)
      for path, x in flatten(tree)
  )


def save(
    directory: epath.PathLike,
    step: int,
    tree: PyTree,
    facts: Mapping[str, Any],
) -> Record:
  """Writes one checkpoint; returns when it is complete.

  Args:
    directory: Absolute; made if it is missing.
    step: Names the checkpoint. One that was never completed is replaced.
    tree: Nested dicts of numpy arrays.
    facts: JSON values.
  """
  leaves = tuple(
      Leaf(path, x.shape, x.dtype.name, _checksum(x))
      for path, x in flatten(tree)
  )
  record = Record(dict(facts), leaves)
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with _SAVING, _checkpointer(write=True) as checkpointer:
    checkpointer.save(
        directory / str(step),
        ocp.args.Composite(
            arrays=ocp.args.StandardSave(tree),
            record=ocp.args.JsonSave(_to_json(record)),
        ),
        force=True,
    )
  return record


def load_record(directory: epath.PathLike, step: int) -> Record:
  """The record of one checkpoint.

  Raises:
    MissingError: If that step is not there.
    DamagedError: If it cannot be read, or was altered.
  """
  restored = _restore(directory, step, record=ocp.args.JsonRestore()).record
  try:
    return _from_json(restored)
  except (KeyError, TypeError, ValueError) as e:
    raise DamagedError(
        f'{epath.Path(directory) / str(step)}: its record was altered'
    ) from e


def load_tree(
    directory: epath.PathLike, step: int, record: Record, like: PyTree
) -> PyTree:
  """The arrays of one checkpoint, verified; numpy.

  Args:
    directory: Where.
    step: Which.
    record: From `load_record`.
    like: A tree of the same structure (arrays or their shapes).

  Raises:
    MissingError: If that step is not there (any more).
    DamagedError: If an array cannot be read, or differs from what was saved.
  """
  shapes, treedef = jax.tree.flatten(like)
  targets = [
      np.empty(x.shape, leaf.dtype)
      for x, leaf in zip(shapes, record.leaves, strict=True)
  ]
  tree = _restore(
      directory,
      step,
      arrays=ocp.args.StandardRestore(treedef.unflatten(targets)),
  ).arrays
  for leaf, (_, x) in zip(record.leaves, flatten(tree), strict=True):
    if _checksum(x) != leaf.checksum:
      raise DamagedError(
          f'{epath.Path(directory) / str(step)}: the checksum of {leaf} is'
          ' wrong'
      )
  return tree


def delete(directory: epath.PathLike, steps: Sequence[int]) -> None:
  """Deletes checkpoints; the commit mark first, so that no reader begins."""
  for step in steps:
    path = epath.Path(directory) / str(step)
    try:
      (path / _COMMITTED).unlink(missing_ok=True)
      path.rmtree(missing_ok=True)
    except OSError as e:
      # A reader on NFS may still hold a file. Without its mark the step is gone
      # for everybody, and `delete_torn` removes the rest.
      logging.warning('Could not delete all of %s: %s', path, e)


def set_aside(directory: epath.PathLike, step: int) -> None:
  """Renames a damaged checkpoint to `<step>.damaged`, which nobody reads."""
  path = epath.Path(directory) / str(step)
  aside = path.with_name(f'{step}.damaged')
  aside.rmtree(missing_ok=True)
  path.replace(aside)


def delete_torn(directory: epath.PathLike) -> None:
  """Deletes what a killed writer left half-written; for the writer only."""
  directory = epath.Path(directory)
  if not directory.exists():
    return
  for path in directory.iterdir():
    torn_step = path.name.isdigit() and not (path / _COMMITTED).exists()
    if torn_step or '.orbax-checkpoint-tmp' in path.name:
      path.rmtree(missing_ok=True)


def _restore(directory: epath.PathLike, step: int, **items: Any) -> Any:
  path = epath.Path(directory) / str(step)
  try:
    with _checkpointer(write=False) as checkpointer:
      return checkpointer.restore(path, ocp.args.Composite(**items))
  except (OSError, ValueError, KeyError, TypeError) as e:
    # Whatever orbax raises: if the writer deleted the step meanwhile, that is
    # the reason; if the step still stands, it cannot be read.
    if step not in completed_steps(directory):
      raise MissingError(f'{path} is not there') from e
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise DamagedError(f'{path} cannot be read: {reason}') from e


def _checkpointer(*, write: bool) -> ocp.Checkpointer:
  # Only this process takes part: otherwise orbax would wait for the other
  # processes of the group at barriers that they never reach.
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
      primary_host=me if write else None,
      active_processes={me},
      barrier_sync_key_prefix=f'codistill_{me}',
  )
  return ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(
          composite_options=ocp.CompositeOptions(
              multiprocessing_options=options
          )
      ),
      multiprocessing_options=options,
  )


def flatten(tree: PyTree) -> list[tuple[str, Any]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
      (jax.tree_util.keystr(path, simple=True, separator='/'), x)
      for path, x in leaves
  ]


def _checksum(x: np.ndarray) -> str:
  digest = hashlib.blake2b(digest_size=16)
  digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _to_json(record: Record) -> dict[str, Any]:
  content = dataclasses.asdict(record)
  return {'content': content, 'checksum': _text_checksum(content)}


def _from_json(written: dict[str, Any]) -> Record:
  content = written['content']
  if written['checksum'] != _text_checksum(content):
    raise ValueError('checksum')
  leaves = tuple(
      Leaf(**{**leaf, 'shape': tuple(leaf['shape'])})
      for leaf in content['leaves']
  )
  return Record(content['facts'], leaves)


def _text_checksum(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
