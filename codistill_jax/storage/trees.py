"""Checkpoints that can be trusted: orbax, plus a record of every file.

    <directory>/<step>/arrays/             the tree, readable by orbax alone
    <directory>/<step>/record.json         facts; leaves and files, with digests
    <directory>/<step>/commit_success.txt  the mark: written last, deleted first

The only module that imports orbax. Orbax restores flipped bits without a word
and lists directories that were never finished; here a step exists when its mark
does, and what is read back is what was written, or an error. No step is ever
renamed into being.

Files and leaves are both checked. The files before orbax sees a byte of them:
what is damaged cannot crash a C++ library, hang it, or make it allocate without
bounds. The leaves after it, for a file that changes between the two readings
and a writer that mixed up two trees. For 100 MB of float32 on one core: SHA-256
of the files 0.06 s, CRC-32 of the leaves 0.03 s, the restore 0.25 s.

A path that is not local (`gs://...`) is staged: orbax works in a temporary
directory, and `etils.epath` copies the files. So any backend of it will do.
"""

import contextlib
import inspect
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from codistill_jax.base import PyTree
from codistill_jax.storage import records, remote
from codistill_jax.storage.files import is_remote
from codistill_jax.storage.orbax_noise import quiet
from codistill_jax.storage.records import Leaf, Record, describe, flatten
from codistill_jax.storage.remote import Digest
from codistill_jax.storage.steps import (
    complete,
    completed_at,
    completed_steps,
    delete,
    delete_at,
    delete_torn,
    delete_unless,
    is_complete,
    path_of,
    set_aside,
)

__all__ = [
    'DamagedError',
    'Leaf',
    'MissingError',
    'Record',
    'absolute',
    'completed_at',
    'completed_steps',
    'delete',
    'delete_torn',
    'delete_unless',
    'describe',
    'flatten',
    'load_part',
    'load_record',
    'load_tree',
    'save',
    'set_aside',
]

_RECORD = 'record.json'
_ARRAYS = 'arrays'

# Orbax numbers the saves of a process in one global variable. Of two saves at
# once, a publication and a resume checkpoint, one waits for the directories of
# the other and then writes into its own before they are made.
_SAVING = threading.Lock()

_T = TypeVar('_T')


def _numpy_handler() -> ocp.type_handlers.NumpyHandler:
  """By default orbax copies every array before it writes it.

  Those that come here are copies already. Releases before 0.12.6 always copy.
  """
  handler = ocp.type_handlers.NumpyHandler
  if 'deepcopy_host_arrays' in inspect.signature(handler).parameters:
    return handler(deepcopy_host_arrays=False)
  return handler()


# Orbax would read or write 96 GB at a time.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, _numpy_handler()),
    (jax.Array, ocp.type_handlers.ArrayHandler()),  # Missed aloud otherwise.
)
_BUFFERS_GB = 1
# To write where an attempt that failed may not have come to rest.
_ATTEMPTS = 10
_PAUSE_SECONDS = 0.1


class DamagedError(ValueError):
  """A checkpoint is there, but must not be used."""


class MissingError(ValueError):
  """A checkpoint is not there (any more)."""


def absolute(path: epath.PathLike) -> epath.Path:
  """The path as orbax wants it; one that is not local is left alone."""
  path = epath.Path(path)
  return path if is_remote(path) or path.is_absolute() else path.resolve()


def save(
    directory: epath.PathLike,
    step: int,
    tree: PyTree,
    facts: Mapping[str, Any],
) -> Record:
  """Writes one checkpoint; returns when it is complete.

  Args:
    directory: Absolute; made if it is missing.
    step: Names the checkpoint. What is there of that step is replaced.
    tree: Nested dicts of numpy arrays.
    facts: JSON values.

  Raises:
    OSError: If the file system refuses; then the step is not there.
  """
  leaves = tuple(
      Leaf(path, x.shape, x.dtype.name, records.checksum(x))
      for path, x in flatten(tree)
  )
  path = path_of(directory, step)
  try:
    digests = _write_anew(path, tree)
    record = Record(dict(facts), leaves, digests)
    remote.write_bytes(path / _RECORD, records.encode(record))
    complete(path)
  except Exception as e:
    # What was written of it would only fill the disk.
    with contextlib.suppress(OSError):
      delete_at(path)
    refusal = remote.refusal_of(e, f'{path} cannot be written')
    if refusal is None:
      raise
    raise refusal from e
  return record


def load_record(directory: epath.PathLike, step: int) -> Record:
  """The record of one checkpoint.

  Raises:
    MissingError: If that step is not there.
    DamagedError: If it cannot be read, or was altered.
    OSError: If the file system refuses to give it.
  """
  path = path_of(directory, step)
  if not is_complete(path):
    raise MissingError(f'{path} is not there')

  def read() -> Record:
    data = remote.read_bytes(path / _RECORD)
    try:
      return records.decode(data)
    except ValueError as e:
      raise DamagedError(f'{path}: its record was altered ({e})') from e

  return _read_twice(path, read)


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
    OSError: If the file system refuses to give it.
  """
  return _load(path_of(directory, step), record, record.leaves, like)


def load_part(
    directory: epath.PathLike,
    step: int,
    record: Record,
    like: PyTree,
    name: str,
) -> PyTree:
  """One entry of the outermost dict of a checkpoint; the rest may be anything.

  Args:
    directory: Where.
    step: Which.
    record: From `load_record`.
    like: A tree of the structure of that entry (arrays or their shapes).
    name: The key of the entry.

  Raises:
    As `load_tree`, which verifies as much.
  """
  leaves = [x for x in record.leaves if x.path.startswith(f'{name}/')]
  path = path_of(directory, step)
  return _load(path, record, leaves, {name: like})[name]


def _load(
    path: epath.Path, record: Record, leaves: Sequence[Leaf], like: PyTree
) -> PyTree:
  shapes, treedef = jax.tree.flatten(like)
  targets = [
      np.empty(x.shape, leaf.dtype)
      for x, leaf in zip(shapes, leaves, strict=True)
  ]
  target = treedef.unflatten(targets)
  partial = len(leaves) < len(record.leaves)

  def read() -> PyTree:
    with _verified_arrays(path, record) as arrays:
      tree = _restore(arrays, target, partial)
    _check_leaves(path, leaves, tree)
    return tree

  return _read_twice(path, read)


def _read_twice(path: epath.Path, read: Callable[[], _T]) -> _T:
  """Reads what may be damaged, vanish meanwhile, or fail for a moment."""
  for last in (False, True):
    try:
      return read()
    except MemoryError:
      raise
    except Exception as e:  # Whatever a library makes of what it finds.
      # If the writer deleted the step meanwhile, that is the reason.
      if not is_complete(path):
        raise MissingError(f'{path} is not there') from e
      if last and isinstance(e, DamagedError):
        raise
      if last:
        raise _what_it_means(path, e) from e
  raise AssertionError('not reached')


def _what_it_means(path: epath.Path, error: Exception) -> Exception:
  said = f'{path} cannot be read'
  refusal = remote.refusal_of(error, said)
  if refusal is None or isinstance(refusal, remote.ABSENCE):
    # The step stands, so something was taken out of it.
    return DamagedError(f'{said}: {remote.one_line(error)}')
  return refusal


def _write_anew(path: epath.Path, tree: PyTree) -> dict[str, Digest]:
  """Writes the arrays of a step in the place of what is there of it.

  Of an attempt that failed, threads of orbax may still be at work, and make
  directories again that were deleted, which orbax would then refuse.
  """
  for left in reversed(range(_ATTEMPTS)):
    delete_at(path)
    try:
      return _write_arrays(path / _ARRAYS, tree)
    except (FileExistsError, ValueError) as e:
      # The latter if it was there before orbax began.
      if not left or 'exists' not in str(e):
        raise
      time.sleep(_PAUSE_SECONDS)
  raise AssertionError  # Not reached.


def _write_arrays(path: epath.Path, tree: PyTree) -> dict[str, Digest]:
  """Writes the files of a tree; says what they are."""
  if not is_remote(path):
    _save(path, tree)
    return {name: remote.digest(path / name) for name in _files_of(path)}
  with _temporary_directory() as temporary:
    _save(temporary / _ARRAYS, tree)
    return {
        name: remote.digest(temporary / _ARRAYS / name, path / name)
        for name in _files_of(temporary / _ARRAYS)
    }


@contextlib.contextmanager
def _verified_arrays(path: epath.Path, record: Record) -> Iterator[epath.Path]:
  """A local directory with the files of the record, and with what it says."""
  with contextlib.ExitStack() as stack:
    arrays, into = path / _ARRAYS, None
    if is_remote(path):
      into = stack.enter_context(_temporary_directory())
    for name, expected in record.files.items():
      found = remote.digest(arrays / name, into / name if into else None)
      if found != expected:
        raise DamagedError(
            f'{path}: {_ARRAYS}/{name} was altered: {expected.size} bytes were'
            f' written, {found.size} are there, and the checksum is wrong'
        )
    yield into or arrays


def _check_leaves(
    path: epath.Path, leaves: Sequence[Leaf], tree: PyTree
) -> None:
  for leaf, (_, x) in zip(leaves, flatten(tree), strict=True):
    if (x.shape, x.dtype.name) != (leaf.shape, leaf.dtype):
      raise DamagedError(f'{path}: {leaf} was saved as {x.dtype}{x.shape}')
    if records.checksum(x) != leaf.checksum:
      raise DamagedError(f'{path}: the checksum of {leaf} is wrong')


@contextlib.contextmanager
def _temporary_directory() -> Iterator[epath.Path]:
  with tempfile.TemporaryDirectory(prefix='codistill_') as name:
    yield epath.Path(name)


def _files_of(directory: epath.Path) -> list[str]:
  """The files below a local directory."""

  def fail(error: OSError) -> None:
    raise error

  return sorted(
      os.path.relpath(os.path.join(parent, name), directory)
      for parent, _, names in os.walk(directory, onerror=fail)
      for name in names
  )


# --- Orbax -------------------------------------------------------------------


def _save(path: epath.Path, tree: PyTree) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with _SAVING, quiet(), _checkpointer() as checkpointer:
      # Numpy scalars would need a handler of their own.
      arrays = jax.tree.map(np.asarray, tree)
      checkpointer.save(path, ocp.args.PyTreeSave(arrays))
  except Exception as e:
    # Of several writes that fail at once, orbax may report one that missed
    # what another could not write. The file system knows better.
    refusal = remote.why_not_writable(path.parent)
    if refusal is None:
      raise
    raise refusal from e


def _restore(path: epath.Path, target: PyTree, partial: bool) -> PyTree:
  with quiet(), _checkpointer() as checkpointer:
    return checkpointer.restore(
        path,
        ocp.args.PyTreeRestore(
            target,
            restore_args=jax.tree.map(
                lambda x: ocp.RestoreArgs(np.ndarray, dtype=x.dtype), target
            ),
            partial_restore=partial,
        ),
    )


def _checkpointer() -> ocp.Checkpointer:
  # Only this process takes part: otherwise orbax would wait for the other
  # processes of the group at barriers that they never reach.
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
      primary_host=me,
      active_processes={me},
      barrier_sync_key_prefix=f'codistill_{me}',
  )
  return ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(
          save_concurrent_gb=_BUFFERS_GB,
          restore_concurrent_gb=_BUFFERS_GB,
          multiprocessing_options=options,
          type_handler_registry=_HANDLERS,
      ),
      multiprocessing_options=options,
      # Straight into its directory, which is never renamed.
      atomicity_options=ocp.options.AtomicityOptions(
          mode=ocp.options.AtomicityMode.COMMIT_FILE
      ),
  )
