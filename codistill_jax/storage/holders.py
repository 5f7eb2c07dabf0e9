"""Who holds a lease, as a small file says, and whether that process lives."""

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
import typing
from typing import NamedTuple

from etils import epath

from codistill_jax.storage import files

LONGEST_TTL = 600.0

# The nonces of this process's own leases.
live: set[str] = set()


class Holder(NamedTuple):
  """Who holds a lease.

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
    this = ' (this one)' if self.nonce in live else ''
    return f'process {self.pid}{this} on host {self.host}'


_TYPES = typing.get_type_hints(Holder)


class Content(NamedTuple):
  """A lease file; `holder` is None if it is damaged."""

  raw: bytes
  holder: Holder | None


def write(path: epath.Path, holder: Holder) -> None:
  """Replaces a lease file."""
  files.write_json(path, holder._asdict())


def read(path: epath.Path) -> Content | None:
  """Reads a lease file; None if there is none. OSError if the disk fails."""
  try:
    raw = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None
  return Content(raw, _parse(raw))


def _parse(raw: bytes) -> Holder | None:
  """The holder in a file's bytes; None if they are damaged."""
  try:
    tree = json.loads(raw)
    holder = Holder(*(tree[name] for name in Holder._fields))
    sound = (
        all(isinstance(getattr(holder, k), t) for k, t in _TYPES.items())
        and 0 < holder.pid < 1 << 31
        and 0 < holder.ttl_seconds <= LONGEST_TTL
    )
  except (ValueError, TypeError, KeyError, RecursionError):
    return None
  return holder if sound else None


def sentence(holder: Holder, path: epath.Path) -> str:
  """Who has been doing what since when; the beginning of an error."""
  try:
    since = datetime.datetime.fromtimestamp(holder.since, datetime.UTC)
    when = f'{since:%Y-%m-%d %H:%M:%S} UTC'
  except (ValueError, OverflowError, OSError):
    when = 'an unknown time'
  return (
      f'{holder} has been {holder.doing} {os.fspath(path.parent)} since {when}'
  )


# --- Processes ---------------------------------------------------------------


def newcomer(doing: str, ttl_seconds: float) -> Holder:
  """This process, with a nonce that nobody had before."""
  stat = _process_stat(os.getpid())
  return Holder(
      host=socket.gethostname(),
      pid=os.getpid(),
      started=stat and stat.started,
      machine=_machine(),
      since=time.time(),
      doing=doing,
      ttl_seconds=ttl_seconds,
      nonce=secrets.token_hex(8),
      beat=0,
  )


def _machine() -> str | None:
  """Where process ids and start times mean the same; None if not known.

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


def is_alive(holder: Holder | None) -> bool | None:
  """Whether a holder lives; None if that cannot be seen from here."""
  if holder is None:
    return None
  if holder.pid == os.getpid() and holder.nonce in live:
    return True
  if holder.machine is None or holder.machine != _machine():
    return None
  if holder.pid == os.getpid():
    return False  # A leftover: of this process, or of one before it.
  try:
    os.kill(holder.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # It is there, and another user's.
  stat = _process_stat(holder.pid)
  if stat is None or holder.started is None:
    return None  # Perhaps /proc hides what others do.
  if stat.started != holder.started:
    return False  # The number was given to a new process.
  if stat.state in 'ZX':
    # Its last threads may still be writing.
    return False if stat.threads <= 1 else None
  return True


class _Stat(NamedTuple):
  state: str
  threads: int
  started: int


def _process_stat(pid: int) -> _Stat | None:
  """What Linux says of a process; None elsewhere, or if there is none."""
  try:
    text = epath.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return None
  # After the name, which may hold anything.
  fields = text.rpartition(')')[2].split()
  return _Stat(fields[0], int(fields[17]), int(fields[19]))
