"""Leases: who may write in a directory is one process, on whatever machine.

The holder keeps `<directory>/lease.json` and changes it every few seconds (a
heartbeat). A newcomer of the same machine looks whether the holder's process
lives; one from elsewhere watches the file, and if nothing changes for a while
by its own clock, the holder is dead. The clocks of two machines are never
compared, nothing is locked, and no rename needs to be atomic: NFS and object
stores will do.

Two newcomers: each writes, waits a little, and reads again. Whoever comes back
from writing later than that (it may have been suspended before) takes its file
away again, because another may have read its own by then. Where a store creates
an object on condition that there is none (S3, Google's), and there is none, who
comes first has it, and nobody waits.

A holder also keeps the kernel's lock of the directory, which ends with its
process. So on a disk of this machine a damaged file is taken over at once if
the lock is free: nobody here lives to mend it. On a network file system, which
need not tell of the locks of others, it is watched. (And nobody elsewhere: one
that used this disk through an export of it would find at its next `check` that
it was replaced.)

A holder that was suspended for long may find that it has been replaced, so it
asks `check()` before it writes anything.

`exclusive` is for processes of one machine: a lock of the kernel. In an object
store, which has none, it is a lease.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
from absl import logging
from etils import epath

from codistill_jax.storage import files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    Interrupted,
    Patience,
)

_BEATS_PER_TTL = 5
_LONGEST_TTL = 600.0


class HeldError(ValueError):
  """Another holds the lease, and lives."""


class LostError(ValueError):
  """Another has taken the lease over."""


class Holder(NamedTuple):
  """Metadata of the process that holds a lease, as in its file.

  Attributes:
    host: Name of its machine, for people.
    pid: Its process.
    started: When the process started, in ticks that only its machine
      understands; None if that is not known.
    machine: Tells machines, and containers on them, apart; None if nothing
      does.
    since: Since when, Unix seconds by its own clock; for people.
    doing: What it does with the directory, such as 'training in'.
    ttl_seconds: How long its file may stay the same while it lives.
    nonce: Tells its lease from all others.
    beat: Counts the changes of its file.
  """

  host: str
  pid: int
  started: int | None
  machine: str | None
  since: int | float
  doing: str
  ttl_seconds: int | float
  nonce: str
  beat: int

  def __str__(self) -> str:
    this = ' (this one)' if self.nonce in _OWN else ''
    return f'process {self.pid}{this} on host {self.host}'


_TYPES = typing.get_type_hints(Holder)
_OWN: set[str] = set()  # The nonces of this process's leases.


class Lease:
  """The right to write in a directory, renewed by a thread until released.

  Attributes:
    holder: This process, as others see it.
  """

  def __init__(self, path: epath.Path, holder: Holder, clock: Any):
    """Not to be called: see `acquire`."""
    self.holder = holder
    self._path = path
    self._clock = clock
    self._lock = threading.Lock()
    self._lost = ''  # To whom, in words.
    self._looked = clock.monotonic()
    self._kernel = _lock(path.parent)
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
    self.renew(only_if_needed=True)
    if self._lost:
      raise LostError(self._lost)
    if self._released.is_set():
      raise LostError(
          f'the lease of {os.fspath(self._path.parent)} is released'
      )

  def renew(self, only_if_needed: bool = False) -> None:
    """Changes the file, unless another has taken over; a heartbeat."""
    with self._lock:
      if self._released.is_set() or self._lost:
        return
      try:
        self._lost = self._find_out(only_if_needed)
      except Exception as e:  # Object stores have errors of their own.
        # The next look may go better; other writers complain of the disk.
        logging.info('A lease cannot be renewed: %s', e)
      if self._lost:
        logging.warning('Lost: %s', self._lost)

  def release(self) -> None:
    """Lets others have it; a second time does nothing."""
    with self._lock:
      if not self._released.is_set():
        self._released.set()
        _remove(self._path, self.holder)
        _unlock(self._kernel)

  def _beat(self) -> None:
    period = self.holder.ttl_seconds / _BEATS_PER_TTL
    while not self._lost and not self._released.wait(period):
      self.renew()

  def _find_out(self, only_if_needed: bool) -> str:
    """Returns why the lease is lost; if it is not, '', and renews the file."""
    if self._kernel is None:
      self._kernel = _lock(self._path.parent)
    raw, other = _read(self._path)
    silent = self._clock.monotonic() - self._looked
    self._looked += silent
    if other and other.nonce != self.holder.nonce:
      return (
          f'{_sentence(other, self._path)}: it has taken over from this'
          f' process, {self.holder.pid} on host {self.holder.host}, which had'
          ' been silent for long; leave the run to it, or end it'
      )
    if raw is None and silent > self.holder.ttl_seconds:
      return (
          f'{os.fspath(self._path)} is gone, and this process had been silent'
          f' for {silent:.0f} s: another may have taken over and ended since;'
          ' start the same command again'
      )
    if not (only_if_needed and other):
      self.holder = self.holder._replace(beat=self.holder.beat + 1)
      files.write_json(self._path, self.holder._asdict())
    return ''


def acquire(
    directory: epath.PathLike,
    doing: str,
    *,
    ttl_seconds: float = 30.0,
    interrupted: Callable[[], bool] = lambda: False,
    patience: Patience = DEFAULT_PATIENCE,
    clock: Any = time,
) -> Lease:
  """Becomes the one that may write in a directory.

  Takes a fraction of a second, or `ttl_seconds` where the last holder was on
  another machine and has not released it; two fifths of that for a damaged file
  that others may be about to mend.

  Args:
    directory: Made if it is missing; local, mounted, or an object store.
    doing: What for, in the error of whoever comes second, who reads '... has
      been <doing> <directory> since ...'.
    ttl_seconds: After how long a holder elsewhere that gives no sign of life
      counts as dead.
    interrupted: Polled while waiting.
    patience: Time limits: `lease_settle`, `remote_lease_settle`, `lease_poll`.
    clock: By which it waits: `time`, or what has its `monotonic` and `sleep`.

  Raises:
    HeldError: If a living process holds it, be it this one; names it.
    Interrupted: If `interrupted` returned true.
    OSError: If the file cannot be read or written.
  """
  if not 0 < ttl_seconds <= _LONGEST_TTL:
    raise ValueError(
        f'ttl_seconds={ttl_seconds:g} is no time for a lease; set it to more'
        f' than 0 and at most {_LONGEST_TTL:g}'
    )
  path, own = _path_in(directory), this_process(doing, ttl_seconds)
  _OWN.add(own.nonce)
  try:
    _Candidacy(path, own, interrupted, patience, clock).contend()
  except BaseException:
    _remove(path, own)
    raise
  return Lease(path, own, clock)


def peek(directory: epath.PathLike) -> Holder | None:
  """Returns who holds a directory, dead or alive; None if nobody or unreadable.

  Raises:
    OSError: If the disk fails.
  """
  return _read(_path_in(directory))[1]


@contextlib.contextmanager
def exclusive(directory: epath.PathLike, doing: str) -> Iterator[None]:
  """Makes a directory and keeps other processes out of it meanwhile.

  Args:
    directory: Where.
    doing: What for, in the error of whoever comes second.

  Raises:
    HeldError: If another process is in it.
  """
  files.make_directory(directory)
  if files.is_remote(directory):
    with acquire(directory, doing):  # There is no kernel to ask.
      yield
    return
  handle = os.open(directory, os.O_RDONLY)
  try:
    try:
      # The kernel lets go of the lock whenever and however we end.
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise HeldError(
          f'Another process is {doing} {os.fspath(directory)}; wait for it, end'
          ' it, or choose another directory.'
      ) from e
    yield
  finally:
    os.close(handle)


# --- Becoming the holder -----------------------------------------------------


class _Candidacy(NamedTuple):
  """A newcomer that waits for a lease."""

  path: epath.Path
  own: Holder
  interrupted: Callable[[], bool]
  patience: Patience
  clock: Any

  def contend(self) -> None:
    """Returns once `own` is in the file and no newcomer can be on its way."""
    settle = (
        self.patience.remote_lease_settle
        if files.is_remote(self.path)
        else self.patience.lease_settle
    )
    if files.is_remote(self.path):
      _read(self.path)  # To load a client takes longer than any write.
    while True:
      looked, nobody = self._wait_until_free()
      if nobody:
        created = files.create(self.path, files.as_json(self.own._asdict()))
        # Of a request that is sent again the first one may have worked.
        if created or (created is False and _read(self.path)[1] == self.own):
          return
        if created is False:
          continue
      files.write_json(self.path, self.own._asdict())
      took = self.clock.monotonic() - looked
      if took <= settle:
        # All who saw the file free before this was written have written by
        # then, or will find themselves late.
        self._pause(settle)
        if _read(self.path)[1] == self.own:
          return
      else:
        # Perhaps written over a holder. It puts its file back at its next beat,
        # which on a busy machine may be late.
        _remove(self.path, self.own)
        self._pause(2 * self.own.ttl_seconds / _BEATS_PER_TTL + settle)
        settle = 3 * took  # On a disk as slow as that it would never end.

  def _wait_until_free(self) -> tuple[float, bool]:
    """Waits until nobody alive holds the file.

    Returns:
      The time before the look that found that, and whether there was no file.

    Raises:
      HeldError: If the holder gives a sign of life.
    """
    ttl = self.own.ttl_seconds
    first, quiet, last = None, 0.0, self.clock.monotonic()
    pause = min(self.patience.lease_poll, ttl / 20)
    while True:
      looked = self.clock.monotonic()
      # If this process was suspended, so may have been the holder.
      quiet, last = quiet + min(looked - last, 2 * pause), looked
      raw, holder = _read(self.path)
      alive = is_alive(holder)
      if holder is None and _nobody_here(self.path.parent):
        alive = False
      if raw is None or alive is False:
        return looked, raw is None
      changed = first not in (None, raw)
      if holder and (alive or changed):
        other = _sentence(holder, self.path)
        raise HeldError(f'{other}; end it, or wait until it is done')
      # Whoever lives mends a damaged file at its next beat.
      limit = (
          max(ttl, holder.ttl_seconds) if holder else 2 * ttl / _BEATS_PER_TTL
      )
      if first is None:
        logging.warning(
            'Waiting up to %g s for a sign of life in %s: %s',
            limit,
            os.fspath(self.path),
            f'{holder} holds it, or did' if holder else 'damaged',
        )
      if first != raw:
        first, quiet = raw, 0.0
      if quiet > limit:
        return looked, False
      self._pause(pause)

  def _pause(self, seconds: float) -> None:
    deadline = self.clock.monotonic() + seconds
    while (left := deadline - self.clock.monotonic()) > 0:
      if self.interrupted():
        raise Interrupted('asked to stop while waiting for a lease')
      self.clock.sleep(min(left, 0.1))


# --- The file ----------------------------------------------------------------


def _path_in(directory: epath.PathLike) -> epath.Path:
  return epath.Path(directory) / 'lease.json'


def _read(path: epath.Path) -> tuple[bytes | None, Holder | None]:
  """Reads a lease file: its bytes, if it is there; its holder, if sound.

  Raises:
    OSError: If the disk fails.
  """
  try:
    raw = files.read_bytes(path)
  except (FileNotFoundError, NotADirectoryError):
    return None, None
  except files.RefusedError:
    return b'', None
  try:
    tree = json.loads(raw)
    holder = Holder(*(tree[name] for name in Holder._fields))
    sound = (
        all(isinstance(getattr(holder, k), t) for k, t in _TYPES.items())
        and 0 < holder.pid < 1 << 31
        and 0 < holder.ttl_seconds <= _LONGEST_TTL
    )
  except (ValueError, TypeError, KeyError, RecursionError):
    sound = False
  return raw, holder if sound else None


def _remove(path: epath.Path, own: Holder) -> None:
  """Removes the file if it is our own; not at any price."""
  _OWN.discard(own.nonce)
  try:
    found = _read(path)[1]
    if found and found.nonce == own.nonce:
      files.remove(path)
  except Exception as e:  # Object stores have errors of their own.
    logging.warning('The lease %s stays behind: %s', os.fspath(path), e)


def _sentence(holder: Holder, path: epath.Path) -> str:
  """Returns who has been doing what since when; an error begins with it."""
  try:
    since = datetime.datetime.fromtimestamp(holder.since, datetime.UTC)
    when = f'{since:%Y-%m-%d %H:%M:%S} UTC'
  except (ValueError, OverflowError, OSError):
    when = 'an unknown time'
  return (
      f'{holder} has been {holder.doing} {os.fspath(path.parent)} since {when}'
  )


# --- The lock of the kernel ---------------------------------------------------

# File systems that only the processes of one machine write to.
_OF_ONE_MACHINE = {'ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'f2fs', 'zfs'}
_OF_ONE_MACHINE |= {'tmpfs', 'overlay', 'apfs'}


def _lock(directory: epath.Path) -> int | None:
  """Takes the kernel's lock of a directory; None if others have it, or none."""
  if files.is_remote(directory):
    return None
  with contextlib.suppress(OSError):
    handle = os.open(directory, os.O_RDONLY)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      os.close(handle)
    else:
      return handle
  return None


def _unlock(handle: int | None) -> None:
  if handle is not None:
    os.close(handle)


def _nobody_here(directory: epath.Path) -> bool:
  """Returns whether surely no process lives that holds a directory."""
  handle = _lock(directory)
  _unlock(handle)
  return handle is not None and is_of_one_machine(directory)


def is_of_one_machine(directory: epath.PathLike) -> bool:
  """Returns whether a directory lies on a disk of this machine."""
  path = os.path.realpath(directory)
  with contextlib.suppress(psutil.Error, OSError):
    mounts = {
        found.mountpoint: found.fstype
        for found in psutil.disk_partitions(all=True)
        if os.path.commonpath([path, found.mountpoint]) == found.mountpoint
    }
    # The innermost, and of several at one place the last.
    return mounts[max(mounts, key=len)] in _OF_ONE_MACHINE
  return False


# --- Processes ---------------------------------------------------------------


def this_process(doing: str, ttl_seconds: float) -> Holder:
  """Returns this process as a holder, with a nonce that nobody had before."""
  return Holder(
      host=socket.gethostname(),
      pid=os.getpid(),
      started=_started(os.getpid()),
      machine=_machine(),
      since=time.time(),
      doing=doing,
      ttl_seconds=ttl_seconds,
      nonce=secrets.token_hex(8),
      beat=0,
  )


def is_alive(holder: Holder | None) -> bool | None:
  """Returns whether a holder lives; None if that cannot be seen from here."""
  if holder is None:
    return None
  if holder.pid == os.getpid() and holder.nonce in _OWN:
    return True
  if holder.machine is None or holder.machine != _machine():
    return None
  if holder.pid == os.getpid():
    return False  # A leftover: of this process, or of one before it.
  if not psutil.pid_exists(holder.pid):
    return False
  started = _started(holder.pid)
  if started is None or holder.started is None:
    return None  # Perhaps the system hides what others do.
  if started != holder.started:
    return False  # The number was given to a new process.
  with contextlib.suppress(psutil.Error, OSError):
    process = psutil.Process(holder.pid)
    if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
      # Its last threads may still be writing.
      return False if process.num_threads() <= 1 else None
    return True
  return None


def _started(pid: int) -> int | None:
  """Returns when a process started, in ticks; None if that is hidden."""
  try:
    # Since the boot: the time of day may be set meanwhile. In this order, since
    # psutil 7.0 remembers the boot where 7.1 looks again.
    boot = psutil.boot_time()
    seconds = psutil.Process(pid).create_time() - boot
    return round(seconds * os.sysconf('SC_CLK_TCK'))
  except (psutil.Error, OSError):
    return None


def _machine() -> str | None:
  """Names where process ids and start times mean the same; None if unknown.

  Two machines may have one name, and two containers one kernel.
  """
  try:
    boot = epath.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    spaces = [os.readlink('/proc/self/ns/pid')]
  except OSError:
    return None
  # Start times count from the boot as a time namespace sees it.
  with contextlib.suppress(OSError):
    spaces.append(os.readlink('/proc/self/ns/time'))
  return ' '.join([socket.gethostname(), boot, *spaces])
