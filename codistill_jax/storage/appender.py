"""Appends to a file, through a disk that fails for a while."""

import collections
import contextlib
import os

from absl import logging
from etils import epath

from codistill_jax.storage import files
from codistill_jax.storage.troubles import Troubles

MAX_PENDING = 10_000


class Appender:
  """Appends pieces as a whole; keeps them in memory while that fails."""

  def __init__(self, path: epath.PathLike, doing: str, troubles: Troubles):
    """Opens the file.

    Args:
      path: In a directory that exists; this process alone writes to it.
      doing: The name of this as a trouble.
      troubles: Where a disk that fails is noted.

    Raises:
      OSError: If it cannot be opened.
    """
    self._path = epath.Path(path)
    self._doing = doing
    self._troubles = troubles
    self._pending: collections.deque[bytes] = collections.deque()
    self._lost = 0
    self._file = self._path.open('ab')
    self._size = self._file.seek(0, os.SEEK_END)

  def append(self, piece: bytes) -> None:
    """Writes a piece, after those that wait; never raises an OSError."""
    if len(self._pending) >= MAX_PENDING:
      self._pending.popleft()
      self._lost += 1
    self._pending.append(piece)
    self._try()

  def close(self) -> None:
    """Tries once more, and closes.

    Raises:
      TimeoutError: If pieces are left that could not be written.
    """
    error = self._try()
    self._drop_file()
    if self._lost:
      logging.warning('%d pieces of %s are lost', self._lost, self._path)
    if error is not None:
      raise TimeoutError(
          f'{len(self._pending)} records could not be written to'
          f' {os.fspath(self._path)} ({error}); see to the disk, and start the'
          ' same command again'
      ) from error

  def _try(self) -> OSError | None:
    """Writes what waits; the error if it could not."""
    if not self._pending:
      return None
    data = b''.join(self._pending)
    try:
      if self._file is None:
        self._reopen()
      self._file.write(data)
      self._file.flush()
    except OSError as e:
      self._drop_file()
      self._troubles.failed(self._doing, e)
      return e
    self._size += len(data)
    self._pending.clear()
    self._troubles.worked(self._doing)
    return None

  def _drop_file(self) -> None:
    # Closing tries to write what is buffered; `_reopen` cuts that off.
    file, self._file = self._file, None
    if file is not None:
      with contextlib.suppress(OSError):
        file.close()

  def _reopen(self) -> None:
    """Opens the file again, without what was written of a piece."""
    self._file = self._path.open('ab')
    size = self._file.seek(0, os.SEEK_END)
    if size > self._size and not files.is_remote(self._path):
      size = self._file.truncate(self._size)
    self._size = size
