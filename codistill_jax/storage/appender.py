"""Appends to a file, through a disk that fails for a while."""

import contextlib
import os

from absl import logging
from etils import epath

from codistill_jax.storage import files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    BackgroundWriter,
    Patience,
    Troubles,
)

MAX_PENDING = 10_000


class Appender:
  """Appends pieces as a whole; keeps them in memory while that fails."""

  def __init__(
      self,
      path: epath.PathLike,
      doing: str,
      troubles: Troubles,
      *,
      patience: Patience = DEFAULT_PATIENCE,
      room: int = MAX_PENDING,
  ):
    """Opens the file.

    Args:
      path: In a directory that exists; this process alone writes to it.
      doing: The name of this as a trouble.
      troubles: Where a disk that fails is noted.
      patience: Time limits.
      room: How many pieces are kept while the disk fails; the newest.

    Raises:
      OSError: If it cannot be opened.
    """
    self._path = epath.Path(path)
    self._patience = patience
    self._count = 0
    self._file = self._path.open('ab')
    self._size = self._file.seek(0, os.SEEK_END)
    self._writer = BackgroundWriter(
        self._write, doing, troubles, room=room, patience=patience
    )

  def append(self, piece: bytes) -> None:
    """Writes a piece before it returns, unless the disk fails."""
    self._count += 1
    self._writer.put(self._count, piece)
    self._writer.wait(failing=0.0)

  def close(self) -> None:
    """Tries once more, and closes.

    Raises:
      TimeoutError: If pieces are left that could not be written.
    """
    written = self._writer.wait(2 * self._patience.retry)
    unwritten = None if written else self._writer.give_up()
    self._writer.close()
    if self._writer.finished:  # Or it hangs in a write, and so would closing.
      self._drop_file()
    if self._writer.dropped:
      logging.warning(
          '%d pieces of %s are lost', self._writer.dropped, self._path
      )
    if unwritten is not None:
      raise TimeoutError(
          f'{len(unwritten.steps)} records could not be written to'
          f' {os.fspath(self._path)} ({unwritten.error}); see to the disk, and'
          ' start the same command again'
      ) from unwritten.error

  def _write(self, number: int, piece: bytes) -> None:
    """In the thread."""
    del number
    try:
      if self._file is None:
        self._reopen()
      self._file.write(piece)
      self._file.flush()
    except OSError:
      self._drop_file()
      raise
    self._size += len(piece)

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
