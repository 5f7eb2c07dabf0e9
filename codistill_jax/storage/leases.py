"""Who may write in a directory: one process, on whatever machine.

The holder keeps `<directory>/lease.json` and changes it every few seconds. A
newcomer of the same machine looks whether the holder's process lives; one from
elsewhere watches the file, and if nothing changes for a while by its own clock,
the holder is dead. The clocks of two machines are never compared, nothing is
locked, and no rename needs to be atomic: NFS and object stores will do.

Two newcomers: each writes, waits a little, and reads again. Whoever comes back
from writing later than that (it may have been suspended before) takes its file
away again, because another may have read its own by then.

A holder that was suspended for long may find that it has been replaced, so it
asks `check()` before it writes anything.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from codistill_jax.storage import files, holders
from codistill_jax.storage.holders import Holder

# From writing to reading again. A newcomer that takes longer to write starts
# over, so it must be longer than a write mostly takes.
_SETTLE_SECONDS = 0.1
_REMOTE_SETTLE_SECONDS = 2.0
_BEATS_PER_TTL = 5
_POLL_SECONDS = 0.5


class HeldError(ValueError):
  """Another holds the lease, and lives."""


class LostError(ValueError):
  """Another has taken the lease over."""


class Interrupted(Exception):
  """The process was asked to stop while it waited for a lease."""


class Lease:
  """The right to write in a directory, renewed by a thread until released.

  Attributes:
    holder: This process, as others see it.
  """

  def __init__(self, path: epath.Path, holder: Holder):
    """Not to be called: see `acquire`."""
    self.holder = holder
    self._path = path
    self._lock = threading.Lock()
    self._lost = ''  # To whom, in words.
    self._looked = time.monotonic()
    self._released = threading.Event()
    threading.Thread(target=self._beat, name='lease', daemon=True).start()

  def __enter__(self) -> 'Lease':
    return self

  def __exit__(self, *unused: Any) -> None:
    self.release()

  def check(self) -> None:
    """Makes sure that nobody has taken over; reads one small file.

    A file that is gone or damaged is written again, and a disk that fails is
    no reason to stop: neither names another holder.

    Raises:
      LostError: If another holds the lease, or this one was released; if the
        file is gone after this process was suspended for long, because another
        may have come and gone.
    """
    self._look(renew=False)
    if self._lost:
      raise LostError(self._lost)
    if self._released.is_set():
      raise LostError(
          f'the lease of {os.fspath(self._path.parent)} is released'
      )

  def release(self) -> None:
    """Lets others have it; a second time does nothing."""
    with self._lock:
      if self._released.is_set():
        return
      self._released.set()
      _remove(self._path, self.holder)
      holders.live.discard(self.holder.nonce)

  def _beat(self) -> None:
    period = self.holder.ttl_seconds / _BEATS_PER_TTL
    while not self._lost and not self._released.wait(period):
      self._look(renew=True)

  def _look(self, renew: bool) -> None:
    with self._lock:
      if self._released.is_set() or self._lost:
        return
      try:
        self._lost = self._find_out(renew)
      except Exception as e:  # Object stores have errors of their own.
        # The next look may go better; other writers complain of the disk.
        logging.info('A lease cannot be renewed: %s', e)
      if self._lost:
        logging.warning('Lost: %s', self._lost)

  def _find_out(self, renew: bool) -> str:
    """Why the lease is lost; if it is not, '', and the file is in order."""
    found = holders.read(self._path)
    silent = time.monotonic() - self._looked
    self._looked += silent
    other = found and found.holder
    if other and other.nonce != self.holder.nonce:
      return (
          f'{holders.sentence(other, self._path)}: it has taken over from this'
          f' process, {self.holder.pid} on host {self.holder.host}, which had'
          ' been silent for long; leave the run to it, or end it'
      )
    if found is None and silent > self.holder.ttl_seconds:
      return (
          f'{os.fspath(self._path)} is gone, and this process had been silent'
          f' for {silent:.0f} s: another may have taken over and ended since;'
          ' start the same command again'
      )
    if renew or not other:
      self.holder = self.holder._replace(beat=self.holder.beat + 1)
      holders.write(self._path, self.holder)
    return ''


def acquire(
    directory: epath.PathLike,
    doing: str,
    *,
    ttl_seconds: float = 30.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Lease:
  """Becomes the one that may write in a directory.

  Takes a fraction of a second, or `ttl_seconds` where the last holder was on
  another machine and has not released it.

  Args:
    directory: Made if it is missing; local, mounted, or an object store.
    doing: What for, in the error of whoever comes second, who reads '... has
      been <doing> <directory> since ...'.
    ttl_seconds: After how long a holder elsewhere that gives no sign of life
      counts as dead.
    interrupted: Polled while waiting.

  Raises:
    HeldError: If a living process holds it, be it this one; names it.
    Interrupted: If `interrupted` returned true.
    OSError: If the file cannot be read or written.
  """
  if not 0 < ttl_seconds <= holders.LONGEST_TTL:
    raise ValueError(
        f'ttl_seconds={ttl_seconds:g} is no time for a lease; set it to more'
        f' than 0 and at most {holders.LONGEST_TTL:g}'
    )
  path = _lease_path(directory)
  own = holders.newcomer(doing, ttl_seconds)
  holders.live.add(own.nonce)
  try:
    _contend(path, own, interrupted)
  except BaseException:
    _remove(path, own)
    holders.live.discard(own.nonce)
    raise
  return Lease(path, own)


def peek(directory: epath.PathLike) -> Holder | None:
  """Who holds a directory, dead or alive; None if nobody or unreadable.

  Raises:
    OSError: If the disk fails.
  """
  found = holders.read(_lease_path(directory))
  return found and found.holder


# --- Becoming the holder -----------------------------------------------------


def _contend(
    path: epath.Path, own: Holder, interrupted: Callable[[], bool]
) -> None:
  """Returns once `own` stands in the file and no newcomer can be on its way."""
  remote = files.is_remote(path)
  settle = _REMOTE_SETTLE_SECONDS if remote else _SETTLE_SECONDS
  while True:
    looked = _wait_until_free(path, own.ttl_seconds, interrupted)
    holders.write(path, own)
    took = time.monotonic() - looked
    if took <= settle:
      # All who saw the file free before this was written have written by then,
      # or will find themselves late.
      _pause(settle, interrupted)
      found = holders.read(path)
      if found is not None and found.holder == own:
        return
    else:
      # Perhaps written over a holder. It puts its file back at its next beat,
      # which on a busy machine may be late.
      _remove(path, own)
      _pause(2 * own.ttl_seconds / _BEATS_PER_TTL + settle, interrupted)
      settle = 3 * took  # On a disk as slow as that it would never end.


def _wait_until_free(
    path: epath.Path, ttl: float, interrupted: Callable[[], bool]
) -> float:
  """Returns when nobody alive holds the file: the time before that look.

  Raises:
    HeldError: If the holder gives a sign of life.
  """
  first, quiet, last = None, 0.0, time.monotonic()
  pause = min(_POLL_SECONDS, ttl / 20)
  while True:
    looked = time.monotonic()
    # If this process was suspended, so may have been the holder.
    quiet, last = quiet + min(looked - last, 2 * pause), looked
    found = holders.read(path)
    if found is None:
      return looked
    alive = holders.is_alive(found.holder)
    if alive is False:
      return looked
    changed = first is not None and found.raw != first.raw
    if alive or (changed and found.holder is not None):
      other = holders.sentence(found.holder, path)
      raise HeldError(f'{other}; end it, or wait until it is done')
    if first is None:
      _say_waiting(path, found.holder, ttl)
    if first is None or changed:
      first, quiet = found, 0.0
    silence = found.holder.ttl_seconds if found.holder else ttl
    if quiet > max(ttl, silence):
      return looked
    _pause(pause, interrupted)


def _say_waiting(path: epath.Path, holder: Holder | None, ttl: float) -> None:
  who = f'{holder} holds it, or did' if holder else 'its lease is damaged'
  logging.warning(
      'Waiting up to %g s for a sign of life in %s: %s',
      max(ttl, holder.ttl_seconds) if holder else ttl,
      os.fspath(path.parent),
      who,
  )


def _pause(seconds: float, interrupted: Callable[[], bool]) -> None:
  deadline = time.monotonic() + seconds
  while True:
    if interrupted():
      raise Interrupted('asked to stop while waiting for a lease')
    left = deadline - time.monotonic()
    if left <= 0:
      return
    time.sleep(min(left, 0.1))


def _lease_path(directory: epath.PathLike) -> epath.Path:
  return epath.Path(directory) / 'lease.json'


def _remove(path: epath.Path, own: Holder) -> None:
  """Removes the file if it is our own; not at any price."""
  try:
    found = holders.read(path)
    if found and found.holder and found.holder.nonce == own.nonce:
      path.unlink(missing_ok=True)
  except Exception as e:  # As above.
    logging.warning('The lease %s stays behind: %s', os.fspath(path), e)
