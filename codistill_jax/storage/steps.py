"""Which checkpoints of a directory exist: those that have their mark.

A writer writes the mark last and deletes it first, so a reader never believes
half a checkpoint, on any file system; nothing here needs a rename.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence

from absl import logging
from etils import epath

from codistill_jax.storage import remote
from codistill_jax.storage.files import is_remote

_COMMITTED = 'commit_success.txt'


def path_of(directory: epath.PathLike, step: int) -> epath.Path:
  """Where a checkpoint is."""
  return epath.Path(directory) / str(step)


def is_complete(path: epath.Path) -> bool:
  """Whether the checkpoint at `path` has its mark."""
  return remote.exists(path / _COMMITTED)


def complete(path: epath.Path) -> None:
  """Sets the mark."""
  mark = f'Completed at Unix time {time.time()!r}\n'
  remote.write_bytes(path / _COMMITTED, mark.encode())


def completed_steps(directory: epath.PathLike) -> list[int]:
  """The steps of all completed checkpoints, ascending; [] if there are none.

  Raises:
    OSError: If the file system does not tell.
  """
  directory = epath.Path(directory)
  return sorted(
      int(name)
      for name in remote.names(directory)
      if _is_step(name) and is_complete(directory / name)
  )


def completed_at(directory: epath.PathLike, step: int) -> float | None:
  """When a checkpoint was completed (Unix seconds); None if it is not there.

  By the clock of its writer: a bucket does not know when a file was written.
  """
  try:
    text = remote.read_bytes(path_of(directory, step) / _COMMITTED)
  except OSError:
    return None
  try:
    seconds = float(text.split()[-1])
  except (ValueError, IndexError):
    seconds = math.nan
  return seconds if math.isfinite(seconds) else 0.0


def delete(directory: epath.PathLike, steps: Sequence[int]) -> None:
  """Deletes checkpoints; the mark first, so that no reader begins."""
  for step in steps:
    _try_to_delete(path_of(directory, step))


def delete_unless(
    directory: epath.PathLike, step: int, needed: Callable[[], bool]
) -> None:
  """Deletes a checkpoint, unless it turns out to be needed.

  The mark goes first, then `needed` is asked, and if so the mark comes back.
  Whoever says that it needs a step and then finds the mark can rely on it.
  """
  path = path_of(directory, step)
  mark = path / _COMMITTED
  try:
    content = remote.read_bytes(mark)
    remote.remove(mark)
    if needed():
      remote.write_bytes(mark, content)
      return
  except OSError as e:
    logging.warning('Could not delete %s: %s', path, remote.one_line(e))
    return
  _try_to_delete(path)


def set_aside(directory: epath.PathLike, step: int) -> None:
  """Takes a damaged checkpoint out of the way of the run.

  On a disk it is renamed to `<step>.damaged`, for a person to look at; without
  its mark, and nobody reads it. In a bucket it is deleted.
  """
  path = path_of(directory, step)
  if not is_remote(path):
    remote.remove(path / _COMMITTED)
    aside = path.with_name(f'{step}.damaged')
    with contextlib.suppress(OSError):
      remote.remove_tree(aside)
      os.replace(path, aside)
      return
  delete_at(path)


def delete_torn(directory: epath.PathLike) -> None:
  """Deletes what a killed writer left half-written; for the writer only.

  Raises:
    OSError: If the file system does not tell what there is.
  """
  directory = epath.Path(directory)
  for name in remote.names(directory):
    path = directory / name
    torn = _is_step(name) and not is_complete(path)
    if torn or '.orbax-checkpoint-tmp' in name:  # Of an orbax that renames.
      _try_to_delete(path)


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdecimal() and str(int(name)) == name


def delete_at(path: epath.Path) -> None:
  """Deletes the checkpoint at `path`, if there is anything; or raises."""
  remote.remove(path / _COMMITTED)
  remote.remove_tree(path)


def _try_to_delete(path: epath.Path) -> None:
  try:
    delete_at(path)
  except OSError as e:
    # A reader on NFS may still hold a file. Without its mark the step is gone
    # for everybody, and `delete_torn` removes the rest.
    logging.warning('Could not delete all of %s: %s', path, remote.one_line(e))
