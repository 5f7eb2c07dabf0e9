"""The checkpoint format: orbax, a record of every file and leaf, and a mark.

    <directory>/<step>/arrays/             the tree, readable by orbax alone
    <directory>/<step>/record.json         facts; leaves and files, with digests
    <directory>/<step>/commit_success.txt  the mark: written last, deleted first

The only module that imports orbax. Orbax restores flipped bits without a word
and lists directories that were never finished; here a step exists when its mark
does, and what is read back is what was written, or an error. So no reader ever
believes half a checkpoint, and no directory is renamed, on any file system.

Files and leaves are both checked. The files before orbax sees a byte of them:
what is damaged cannot crash a C++ library, hang it, or make it allocate without
bounds. The leaves after it, for a file that changes between the two readings
and a writer that mixed up two trees. For 100 MB of float32 on one core: SHA-256
of the files 0.06 s, CRC-32 of the leaves 0.03 s, the restore 0.25 s.

Before the mark is written, the arrays are read back and compared, and data and
directories are on the disk: a checkpoint that is listed can be restored, also
after a power cut, and none is pruned for one that cannot.

A path that is not local (`gs://...`) is staged: orbax works in a temporary
directory, and `etils.epath` copies the files. So any backend of it will do.
Orbax takes brackets in a path for a pattern, and TensorStore takes Unicode
only: what is not plain gets a name that is, by a symbolic link.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging as std_logging
import math
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath

from codistill_jax.base import PyTree
from codistill_jax.storage import files
from codistill_jax.storage.files import Digest, is_remote

_RECORD = 'record.json'
_ARRAYS = 'arrays'
_MARK = 'commit_success.txt'
# To write where an attempt that failed may not have come to rest.
_ATTEMPTS = 10
_PAUSE_SECONDS = 0.1

# Random keys with a type; saved as the numbers they are.
_KEYS = {
    'key<fry>': 'threefry2x32',
    'key<rbg>': 'rbg',
    'key<urbg>': 'unsafe_rbg',
}
_PLAIN = re.compile(r'[\w./ @+,=:-]*', re.ASCII)

_T = TypeVar('_T')


class DamagedError(ValueError):
  """A checkpoint is there, but must not be used."""


class MissingError(ValueError):
  """A checkpoint is not there (any more)."""


class MismatchError(ValueError):
  """A checkpoint is of another task, tokenizer, architecture, ..."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Metadata of one array of a checkpoint."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  checksum: str = ''

  def __str__(self) -> str:
    return f'{self.path} {self.dtype}{list(self.shape)}'

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * _stored_as(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Record:
  """Metadata of a checkpoint: what is known without reading its arrays.

  Attributes:
    facts: JSON values of the caller.
    leaves: The arrays.
    files: The files that hold them; path below `arrays` -> content.
  """

  facts: Mapping[str, Any]
  leaves: tuple[Leaf, ...]
  files: Mapping[str, Digest] = dataclasses.field(default_factory=dict)


def flatten(tree: PyTree) -> list[tuple[str, Any]]:
  """Returns (path, leaf) of each leaf, such as ('params/kernel', array)."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
      (jax.tree_util.keystr(path, simple=True, separator='/'), x)
      for path, x in leaves
  ]


def describe(tree: PyTree) -> tuple[Leaf, ...]:
  """Returns the leaves of a tree of arrays or shapes, without checksums.

  Raises:
    ValueError: If a checkpoint cannot hold one, or tell two of them apart.
  """
  leaves = tuple(_describe(path, x) for path, x in flatten(tree))
  names: dict[str, str] = {}
  for leaf in leaves:
    other = names.setdefault(leaf.path.replace('/', '.'), leaf.path)
    if other is not leaf.path:
      raise ValueError(
          f'{leaf.path} and {other} have one name in a checkpoint; rename one'
      )
  return leaves


def _describe(path: str, x: Any) -> Leaf:
  try:
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      name = np.dtype(x.dtype).name
      ts.dtype(name)
      return Leaf(path, tuple(x.shape), name)
    _KEYS[str(x.dtype)]
  except (ValueError, KeyError):
    raise ValueError(
        f'{path} is an array of type {x.dtype}, which a checkpoint cannot hold;'
        ' make it one of numbers, or a random key of type'
        f' {", ".join(_KEYS.values())}'
    ) from None
  return Leaf(path, jax.eval_shape(jax.random.key_data, x).shape, str(x.dtype))


def _stored_as(dtype: str) -> np.dtype:
  """Returns the dtype of the numbers of a leaf."""
  return np.dtype(np.uint32 if dtype in _KEYS else dtype)


def _numbers(x: Any) -> np.ndarray:
  """Returns the numbers of an array, or of a random key."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x)


# --- Writing and reading -----------------------------------------------------


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
    tree: Nested dicts of numpy arrays, or of random keys; of size 0, too.
    facts: JSON values.

  Raises:
    OSError: If the file system refuses; then the step is not there.
    DamagedError: If what was written cannot be read back; likewise.
    ValueError: If a checkpoint cannot hold it; see `describe`.
  """
  leaves, tree = describe(tree), jax.tree.map(_numbers, tree)
  leaves = tuple(
      dataclasses.replace(leaf, checksum=_checksum(x))
      for leaf, (_, x) in zip(leaves, flatten(tree), strict=True)
  )
  path = _path_of(directory, step)
  try:
    record = Record(dict(facts), leaves, _write_anew(path, tree))
    files.write_bytes(path / _RECORD, encode(record), sync=True)
    mark = f'Completed at Unix time {time.time()!r}\n'
    files.write_bytes(path / _MARK, mark.encode(), sync=True)
  except Exception as e:
    # What was written of it would only fill the disk.
    with contextlib.suppress(OSError):
      _delete(path)
    if isinstance(e, DamagedError):
      raise DamagedError(f'{path} cannot be used as it was written: {e}') from e
    refusal = _refusal_of(e, f'{path} cannot be written')
    if refusal is None:
      raise
    raise refusal from e
  return record


def load_record(directory: epath.PathLike, step: int) -> Record:
  """Reads the record of one checkpoint.

  Raises:
    MissingError: If that step is not there.
    DamagedError: If it cannot be read, or was altered.
    OSError: If the file system refuses to give it.
  """
  path = _path_of(directory, step)
  if not _is_complete(path):
    raise MissingError(f'{path} is not there')

  def read() -> Record:
    data = files.read_bytes(path / _RECORD)
    try:
      return decode(data)
    except ValueError as e:
      raise DamagedError(f'{path}: its record was altered ({e})') from e

  return _read_twice(path, read)


def load_tree(
    directory: epath.PathLike,
    step: int,
    record: Record,
    like: PyTree,
    part: str | None = None,
) -> PyTree:
  """Reads the arrays of one checkpoint, verified; numpy.

  Args:
    directory: Where.
    step: Which.
    record: From `load_record`.
    like: A tree of the same structure (arrays or their shapes).
    part: Only this entry of the outermost dict, of which `like` tells the
      structure; the rest may be anything.

  Raises:
    MissingError: If that step is not there (any more).
    DamagedError: If an array cannot be read, or differs from what was saved.
    OSError: If the file system refuses to give it.
  """
  path, leaves = _path_of(directory, step), record.leaves
  if part is not None:
    leaves = [x for x in leaves if x.path.startswith(f'{part}/')]
    like = {part: like}
  wanted, treedef = jax.tree.flatten(like)
  target = treedef.unflatten(
      np.empty(leaf.shape, _stored_as(leaf.dtype))
      for _, leaf in zip(wanted, leaves, strict=True)
  )

  def read() -> PyTree:
    with _verified_arrays(path, record) as arrays:
      tree = _restore(arrays, _without_empty(target), partial=part is not None)
    tree = jax.tree.map(lambda x, y: y if x.size else x, target, tree)
    _check_leaves(path, leaves, tree)
    return tree

  arrays = jax.tree.leaves(_read_twice(path, read))
  tree = treedef.unflatten(
      jax.random.wrap_key_data(x, impl=_KEYS[leaf.dtype])
      if leaf.dtype in _KEYS
      else x
      for leaf, x in zip(leaves, arrays)
  )
  return tree if part is None else tree[part]


def check_match(
    who: str,
    *,
    identity: Mapping[str, str],
    leaves: Sequence[Leaf],
    our_identity: Mapping[str, str],
    like: PyTree,
    advice: str,
    any_float: bool = False,
) -> None:
  """Makes sure that a checkpoint is of this task and this model.

  Args:
    who: Whose checkpoint it is, in the error.
    identity: What its writer is (task, tokenizer hash, ...).
    leaves: Its arrays.
    our_identity: What this process is.
    like: The arrays of this process, or their shapes.
    advice: What to change, in the error.
    any_float: Floats may differ in width.

  Raises:
    MismatchError: If it is not; names the first difference.
  """
  for key in sorted(identity.keys() | our_identity.keys()):
    if identity.get(key) != our_identity.get(key):
      raise MismatchError(
          f'{who} has {key}={identity.get(key)}, this run has'
          f' {key}={our_identity.get(key)}; {advice}'
      )
  for theirs, ours in itertools.zip_longest(leaves, describe(like)):
    if not theirs or not ours or not _same(theirs, ours, any_float):
      raise MismatchError(
          f'{who} is of another configuration: it holds'
          f' {theirs or "nothing"} where this run has {ours or "nothing"};'
          f' {advice}'
      )


def _same(a: Leaf, b: Leaf, any_float: bool) -> bool:
  floats = any_float and all(
      jnp.issubdtype(x.dtype, np.floating) for x in (a, b)
  )
  return (a.path, a.shape) == (b.path, b.shape) and (
      floats or a.dtype == b.dtype
  )


def _read_twice(path: epath.Path, read: Callable[[], _T]) -> _T:
  """Reads what may be damaged, vanish meanwhile, or fail for a moment."""
  for last in (False, True):
    try:
      return read()
    except MemoryError:
      raise
    except Exception as e:  # Whatever a library makes of what it finds.
      # If the writer deleted the step meanwhile, that is the reason.
      if not _is_complete(path):
        raise MissingError(f'{path} is not there') from e
      if last and isinstance(e, DamagedError):
        raise
      if last:
        raise _what_it_means(path, e) from e
  raise AssertionError('not reached')


def _what_it_means(path: epath.Path, error: Exception) -> Exception:
  said = f'{path} cannot be read'
  refusal = _refusal_of(error, said)
  absence = FileNotFoundError, NotADirectoryError, IsADirectoryError
  if refusal is None or isinstance(refusal, absence):
    # The step stands, so something was taken out of it.
    return DamagedError(f'{said}: {files.one_line(error)}')
  return refusal


def _write_anew(path: epath.Path, tree: PyTree) -> dict[str, Digest]:
  """Writes the arrays of a step in the place of what is there of it.

  Of an attempt that failed, threads of orbax may still be at work: they make
  directories again that were deleted, which orbax would then refuse, and write
  a manifest of files that were deleted, in the place of the new one.
  """
  for left in reversed(range(_ATTEMPTS)):
    try:
      _delete(path)
      return _write_arrays(path / _ARRAYS, tree)
    except (OSError, ValueError) as e:
      # ValueError if it was there before orbax began, and of TensorStore.
      late = re.search('exists|NOT_FOUND', str(e)) is not None
      late = late or getattr(e, 'errno', 0) == errno.ENOTEMPTY
      if not left or not late:
        raise
      time.sleep(_PAUSE_SECONDS)
  raise AssertionError  # Not reached.


def _write_arrays(path: epath.Path, tree: PyTree) -> dict[str, Digest]:
  """Writes the files of a tree, for good; returns what they are."""
  if not is_remote(path):
    _save(path, tree)
    for parent, _, names in os.walk(path):
      for name in [*names, '']:
        files.to_disk(os.path.join(parent, name))
    return {name: files.digest(path / name) for name in _files_of(path)}
  with _temporary_directory() as temporary:
    _save(temporary / _ARRAYS, tree)
    found = {
        name: files.digest(temporary / _ARRAYS / name, path / name)
        for name in _files_of(temporary / _ARRAYS)
    }
  for name, digest in found.items():
    if (size := files.size(path / name)) != digest.size:
      raise DamagedError(f'{path / name} has {size} bytes of {digest.size}')
  return found


def _read_back(path: epath.Path, tree: PyTree) -> None:
  """Raises DamagedError unless orbax finds what it has written."""
  leaves, treedef = jax.tree.flatten(tree)
  names = [name for name, _ in flatten(tree)]
  start = 0
  while start < len(leaves):
    # In pieces: training needs the memory.
    end, size = start, 0
    while end < len(leaves) and size < _BATCH_BYTES:
      end, size = end + 1, size + leaves[end].nbytes
    target = treedef.unflatten(
        x if start <= n < end else ocp.PLACEHOLDER for n, x in enumerate(leaves)
    )
    try:
      found = jax.tree.leaves(_restore(path, target))
    except Exception as e:  # Whatever a library makes of what it finds.
      raise DamagedError(f'it cannot be read back: {files.one_line(e)}') from e
    for n in range(start, end):
      if _checksum(found[n]) != _checksum(leaves[n]):
        raise DamagedError(f'{names[n]} is read back as other numbers')
    start = end


@contextlib.contextmanager
def _verified_arrays(path: epath.Path, record: Record) -> Iterator[epath.Path]:
  """Gives a local directory with the files of the record, each verified."""
  with contextlib.ExitStack() as stack:
    arrays, into = path / _ARRAYS, None
    if is_remote(path):
      into = stack.enter_context(_temporary_directory())
    for name, expected in record.files.items():
      found = files.digest(
          arrays / name, into / name if into else None, expected.size
      )
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
    if (x.shape, x.dtype) != (leaf.shape, _stored_as(leaf.dtype)):
      raise DamagedError(f'{path}: {leaf} was saved as {x.dtype}{x.shape}')
    if _checksum(x) != leaf.checksum:
      raise DamagedError(f'{path}: the checksum of {leaf} is wrong')


@contextlib.contextmanager
def _temporary_directory() -> Iterator[epath.Path]:
  with tempfile.TemporaryDirectory(prefix='codistill_') as name:
    if not _PLAIN.fullmatch(name):
      raise ValueError(
          f'the temporary directory {name!r} has characters that orbax reads as'
          ' a pattern; set TMPDIR to another one'
      )
    yield epath.Path(name)


@contextlib.contextmanager
def _plainly_named(path: epath.Path) -> Iterator[epath.Path]:
  """Gives a name of a local path that orbax and TensorStore take as it is."""
  if _PLAIN.fullmatch(os.fspath(path)):
    yield path
    return
  with _temporary_directory() as temporary:
    os.symlink(path.parent, temporary / 'parent')
    yield temporary / 'parent' / path.name


def _files_of(directory: epath.Path) -> list[str]:
  """Lists the files below a local directory."""

  def fail(error: OSError) -> None:
    raise error

  return sorted(
      os.path.relpath(os.path.join(parent, name), directory)
      for parent, _, names in os.walk(directory, onerror=fail)
      for name in names
  )


# --- Which checkpoints a directory has ---------------------------------------


def completed_steps(directory: epath.PathLike) -> list[int]:
  """Lists the steps of all completed checkpoints, ascending.

  Raises:
    OSError: If the file system does not tell.
  """
  directory = epath.Path(directory)
  return sorted(
      int(name)
      for name in files.names(directory)
      if files.is_step(name) and _is_complete(directory / name)
  )


def completed_at(directory: epath.PathLike, step: int) -> float | None:
  """Returns when a checkpoint was completed (Unix seconds), or None.

  By the clock of its writer: a bucket does not know when a file was written.
  """
  try:
    text = files.read_bytes(_path_of(directory, step) / _MARK)
  except (OSError, files.RefusedError):
    return None
  try:
    seconds = float(text.split()[-1])
  except (ValueError, IndexError):
    seconds = math.nan
  return seconds if math.isfinite(seconds) else 0.0


def delete(directory: epath.PathLike, steps: Sequence[int]) -> None:
  """Deletes checkpoints; the mark first, so that no reader begins."""
  for step in steps:
    _try_to_delete(_path_of(directory, step))


def delete_unless(
    directory: epath.PathLike, step: int, needed: Callable[[], bool]
) -> None:
  """Deletes a checkpoint, unless it turns out to be needed.

  The mark goes first, then `needed` is asked, and if so the mark comes back.
  Whoever says that it needs a step and then finds the mark can rely on it.
  """
  path = _path_of(directory, step)
  mark = path / _MARK
  try:
    content = files.read_bytes(mark)
    files.remove(mark)
    if needed():
      files.write_bytes(mark, content)
      return
  except (OSError, files.RefusedError) as e:
    logging.warning('Could not delete %s: %s', path, files.one_line(e))
    return
  _try_to_delete(path)


def set_aside(directory: epath.PathLike, step: int) -> None:
  """Takes a damaged checkpoint out of the way of the run.

  On a disk it is renamed to `<step>.damaged`, for a person to look at; without
  its mark, and nobody reads it. In a bucket it is deleted.
  """
  path = _path_of(directory, step)
  if is_remote(path):
    _delete(path)
    return
  files.remove(path / _MARK)
  aside = path.with_name(f'{step}.damaged')
  with contextlib.suppress(OSError):
    files.remove_tree(aside)
    os.replace(path, aside)


def delete_torn(directory: epath.PathLike) -> None:
  """Deletes what a killed writer left half-written; for the writer only.

  Raises:
    OSError: If the file system does not tell what there is.
  """
  directory = epath.Path(directory)
  for name in files.names(directory):
    if files.is_step(name) and not _is_complete(directory / name):
      _try_to_delete(directory / name)


def clear_up(directory: epath.PathLike) -> int:
  """Deletes what earlier lives of the writer left behind, at its start.

  Half-written files and steps, and what was set aside.

  Returns:
    How much was found.

  Raises:
    OSError: If the file system does not tell what there is.
  """
  directory = epath.Path(directory)
  there = files.names(directory)
  aside = [name for name in there if re.fullmatch(r'\d+\.damaged', name)]
  for name in aside:
    _try_to_delete(directory / name)
  steps = set(map(str, completed_steps(directory)))
  torn = [name for name in there if files.is_step(name) and name not in steps]
  delete_torn(directory)
  return len(aside) + len(torn) + files.remove_leftovers(directory)


def _path_of(directory: epath.PathLike, step: int) -> epath.Path:
  return epath.Path(directory) / str(step)


def _is_complete(path: epath.Path) -> bool:
  return files.exists(path / _MARK)


def _delete(path: epath.Path) -> None:
  files.remove(path / _MARK)
  files.remove_tree(path)


def _try_to_delete(path: epath.Path) -> None:
  try:
    _delete(path)
  except OSError as e:
    # A reader on NFS may still hold a file. Without its mark the step is gone
    # for everybody, and `delete_torn` removes the rest.
    logging.warning('Could not delete all of %s: %s', path, files.one_line(e))


# --- The record as a file ----------------------------------------------------


def encode(record: Record) -> bytes:
  """Returns the record as JSON, with a checksum of itself."""
  content = dataclasses.asdict(record)
  written = {'content': content, 'checksum': _text_checksum(content)}
  return (json.dumps(written, indent=1) + '\n').encode()


def decode(data: bytes) -> Record:
  """Undoes `encode`.

  Raises:
    ValueError: If it is not what `encode` wrote, or says what cannot be.
  """
  try:
    written = json.loads(data)
    content = written['content']
    if written['checksum'] != _text_checksum(content):
      raise ValueError('its checksum is wrong')
    if not isinstance(content['facts'], dict):
      raise ValueError('its facts are none')
    return Record(
        content['facts'],
        tuple(map(_decode_leaf, content['leaves'])),
        {name: _decode_digest(name, x) for name, x in content['files'].items()},
    )
  except (KeyError, TypeError, AttributeError, RecursionError) as e:
    raise ValueError(f'{type(e).__name__} {e}') from e


def _decode_leaf(written: Mapping[str, Any]) -> Leaf:
  leaf = Leaf(**{**written, 'shape': tuple(written['shape'])})
  texts = (leaf.path, leaf.dtype, leaf.checksum)
  if (
      not all(type(text) is str for text in texts)
      or not all(type(n) is int and n >= 0 for n in leaf.shape)
      or (leaf.dtype not in _KEYS and np.dtype(leaf.dtype).name != leaf.dtype)
  ):
    raise ValueError(f'{leaf} is no array')
  return leaf


def _decode_digest(name: str, written: list[Any]) -> Digest:
  # Copied below a directory of the reader: nobody writes elsewhere through it.
  parts = pathlib.PurePosixPath(name).parts
  if not parts or name.startswith('/') or '..' in parts or '\\' in name:
    raise ValueError(f'{name!r} is no name of a file')
  size, sha256 = written
  if type(size) is not int or type(sha256) is not str:
    raise ValueError(f'the digest of {name!r} is none')
  return Digest(size, sha256)


def _text_checksum(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _checksum(x: np.ndarray) -> str:
  """Returns CRC-32 of the bits of an array, whatever its layout in memory."""
  data = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
  return f'{zlib.crc32(data):08x}'


# --- Orbax -------------------------------------------------------------------

# Orbax numbers the saves of a process in one global variable. Of two saves at
# once, a publication and a resume checkpoint, one waits for the directories of
# the other and then writes into its own before they are made.
_SAVING = threading.Lock()
# Orbax would copy every array before it writes it; those that come here are
# copies already.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, ocp.type_handlers.ArrayHandler()),  # Missed aloud otherwise.
)
_BUFFERS_GB = 1  # Orbax would read or write 96 GB at a time.
_PROBE_BYTES = 1 << 20
_BATCH_BYTES = 64 << 20  # That are read back at a time.
_SAID = {
    'RESOURCE_EXHAUSTED|No space left': errno.ENOSPC,
    'Disk quota': errno.EDQUOT,
    'File too large': errno.EFBIG,
    'PERMISSION_DENIED|Permission denied': errno.EACCES,
    'Read-only file system': errno.EROFS,
    'NOT_FOUND|No such file': errno.ENOENT,
}


def _without_empty(tree: PyTree) -> PyTree:
  """Drops arrays of size 0, which orbax refuses; the record tells all."""
  return jax.tree.map(lambda x: x if x.size else {}, tree)


def _save(path: epath.Path, tree: PyTree) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    arrays = _without_empty(tree)
    with (
        _SAVING,
        _quiet(),
        _plainly_named(path) as plain,
        _checkpointer() as checkpointer,
    ):
      checkpointer.save(plain, ocp.args.PyTreeSave(arrays))
    _read_back(path, arrays)
  except DamagedError:
    raise
  except Exception as e:
    # Of several writes that fail at once, orbax may report one that missed
    # what another could not write. The file system knows better.
    refusal = _why_not_writable(path.parent)
    if refusal is None:
      raise
    raise refusal from e


def _restore(
    path: epath.Path, target: PyTree, *, partial: bool = False
) -> PyTree:
  with (
      _quiet(),
      _plainly_named(path) as plain,
      _checkpointer() as checkpointer,
  ):
    return checkpointer.restore(
        plain,
        ocp.args.PyTreeRestore(
            target,
            restore_args=jax.tree.map(
                lambda x: ocp.RestoreArgs(
                    np.ndarray, dtype=getattr(x, 'dtype', None)
                ),
                target,
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


def _why_not_writable(directory: epath.Path) -> OSError | None:
  """Returns what the file system says to a file in a local directory."""
  path = os.path.join(directory, '.probe')
  try:
    with open(path, 'wb') as f:
      f.write(bytes(_PROBE_BYTES))
    os.unlink(path)
  except OSError as e:
    with contextlib.suppress(OSError):
      os.unlink(path)
    return e
  return None


def _refusal_of(error: BaseException, said: str) -> OSError | None:
  """Returns the OSError that an error is or means, or None.

  It is one line that begins with `said`. What TensorStore raises of a full disk
  is a ValueError with the number in its text.
  """
  text = files.one_line(error)
  if isinstance(error, OSError):
    missing = isinstance(error, FileNotFoundError)
    code = error.errno or (errno.ENOENT if missing else errno.EIO)
    return OSError(code, f'{said}: {text}')
  number = re.search(r"os_error_code='(\d+)'", text)
  if number:
    code = int(number[1])
    return OSError(code, f'{said}: {os.strerror(code)}')
  for pattern, code in _SAID.items():
    if re.search(pattern, text):
      return OSError(code, f'{said}: {text}')
  return None


# Where one array of several cannot be read or written, orbax logs the traceback
# in each of its threads, then raises; it closes its event loop while the work
# on the other arrays still reports to it, which prints 'Event loop is closed';
# and it leaves tasks behind that failed as well, of which asyncio complains
# (2026-11, orbax 0.12). On a full disk that is a hundred lines at every try.


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps orbax from printing what it also raises, now and a little later."""
  std_logging.getLogger('absl').addFilter(_is_news)  # Where orbax logs; once.
  try:
    yield
  except BaseException:
    std_logging.getLogger('asyncio').addFilter(_is_not_of_orbax)
    if not isinstance(sys.unraisablehook, _Hook):
      sys.unraisablehook = _Hook(sys.unraisablehook)
    raise


def _is_news(record: std_logging.LogRecord) -> bool:
  raised_as_well = '_SignalingThread.run() raised' in str(record.msg)
  return not (raised_as_well and record.exc_info)


def _is_not_of_orbax(record: std_logging.LogRecord) -> bool:
  text = record.getMessage()
  return 'exception was never retrieved' not in text or '/orbax/' not in text


class _Hook:
  """Passes on all but reports to a closed event loop."""

  def __init__(self, passed_on: Callable[[Any], Any]):
    self._passed_on = passed_on

  def __call__(self, unraisable: Any) -> None:
    traceback = unraisable.exc_traceback
    if not (
        isinstance(unraisable.exc_value, RuntimeError)
        and str(unraisable.exc_value) == 'Event loop is closed'
        and traceback is not None
        and traceback.tb_frame.f_code.co_name == 'call_soon_threadsafe'
    ):
      self._passed_on(unraisable)
