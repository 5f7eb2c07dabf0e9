"""Locks on directories that the kernel lets go of, however a process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def exclusive(directory: epath.PathLike, doing: str) -> Iterator[None]:
  """Makes a directory and keeps other processes out of it meanwhile.

  Args:
    directory: A local or mounted one; others are not locked.
    doing: What for, in the error of whoever comes second.

  Raises:
    ValueError: If another process is in it.
  """
  epath.Path(directory).mkdir(parents=True, exist_ok=True)
  if '://' in os.fspath(directory):
    yield
    return
  handle = os.open(directory, os.O_RDONLY)
  try:
    try:
      # The kernel lets go of the lock whenever and however we end.
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(
          f'Another process is {doing} {os.fspath(directory)}; wait for it, end'
          ' it, or choose another directory.'
      ) from e
    yield
  finally:
    os.close(handle)
