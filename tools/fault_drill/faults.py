"""The faults of a drill: what they do to a group, and how they end.

Each takes a `Victim` and a random generator, does its harm, and returns when
(in seconds from now) and how it is undone; None if there is nothing to undo. A
fault that finds nothing to harm raises `Nothing`.
"""

import dataclasses
import errno
import json
import os
import pathlib
import resource
import shutil
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints

# Names the file that a drilled process obeys.
CONTROL_VARIABLE = 'CODISTILL_DRILL_CONTROL'

_MARK = 'commit_success.txt'

Undo = tuple[float, Callable[[], None]]


class Nothing(Exception):
  """There is nothing here that this fault could harm."""


@dataclasses.dataclass
class Victim:
  """One group of a drill.

  Attributes:
    workdir: The run directory.
    group_id: The group.
    pid: Its process at this moment; None if there is none.
    control: The file that its process obeys.
    fresh: The step of the publication to harm; None: any.
    wishes: What is in that file.
  """

  workdir: str
  group_id: int
  pid: int | None
  control: pathlib.Path
  fresh: int | None = None
  wishes: dict[str, Any] = dataclasses.field(default_factory=dict)

  def wish(self, **wishes: Any) -> None:
    """Replaces the control file."""
    self.wishes |= wishes
    temporary = self.control.with_suffix('.tmp')
    temporary.write_text(json.dumps(self.wishes))
    temporary.replace(self.control)

  def running(self) -> int:
    if self.pid is None:
      raise Nothing
    return self.pid

  def publication(self, rng: np.random.Generator) -> pathlib.Path:
    """Returns the directory of one of its publications."""
    directory = run_directory.publications_dir(self.workdir, self.group_id)
    steps = checkpoints.completed_steps(directory)
    if not steps:
      raise Nothing
    step = int(rng.choice(steps)) if self.fresh is None else self.fresh
    return pathlib.Path(directory) / str(step)

  def file(self, rng: np.random.Generator) -> pathlib.Path:
    """Returns a file of a publication: not empty, not the completion mark."""
    try:
      files = sorted(
          p
          for p in self.publication(rng).rglob('*')
          if p.is_file() and p.stat().st_size and p.name != _MARK
      )
    except OSError:
      files = []  # Deleted meanwhile.
    if not files:
      raise Nothing
    # Half of the time by size, or the arrays themselves would rarely be hit.
    try:
      sizes = np.array([float(p.stat().st_size) for p in files])
    except OSError:
      raise Nothing from None
    if rng.random() < 0.5:
      sizes[:] = 1.0
    return files[int(rng.choice(len(files), p=sizes / sizes.sum()))]


def kill(victim: Victim, rng: np.random.Generator) -> None:
  """Kills the process: kill -9."""
  del rng
  os.kill(victim.running(), signal.SIGKILL)


def terminate(victim: Victim, rng: np.random.Generator) -> None:
  """Preempts the process: SIGTERM."""
  del rng
  os.kill(victim.running(), signal.SIGTERM)


def suspend(victim: Victim, rng: np.random.Generator) -> Undo:
  """Suspends the process for a while: SIGSTOP, SIGCONT."""
  pid = victim.running()
  os.kill(pid, signal.SIGSTOP)

  def go_on() -> None:
    if victim.pid == pid:
      os.kill(pid, signal.SIGCONT)

  return float(rng.uniform(1.0, 12.0)), go_on


def truncate(victim: Victim, rng: np.random.Generator) -> None:
  """Cuts a file of a publication short."""
  path = victim.file(rng)
  os.truncate(path, int(rng.integers(path.stat().st_size)))


def flip(victim: Victim, rng: np.random.Generator) -> None:
  """Inverts bits of a file of a publication."""
  with victim.file(rng).open('r+b') as f:
    size = f.seek(0, os.SEEK_END)
    for place in map(int, rng.integers(size, size=int(rng.integers(1, 9)))):
      f.seek(place)
      flipped = f.read(1)[0] ^ 1 << int(rng.integers(8))
      f.seek(place)
      f.write(bytes([flipped]))


def fifo(victim: Victim, rng: np.random.Generator) -> None:
  """Puts a FIFO, which blocks who opens it, in the place of a file."""
  path = victim.file(rng)
  path.unlink()
  os.mkfifo(path)


def sparse(victim: Victim, rng: np.random.Generator) -> None:
  """Makes a file of a publication long, without a byte on the disk."""
  os.truncate(victim.file(rng), 60 << 30)


def small_files(victim: Victim, rng: np.random.Generator) -> None:
  """Writes nonsense in the small files by which a group tells others."""
  directory = run_directory.publications_dir(victim.workdir, victim.group_id)
  name = str(rng.choice(['reading.json', 'restart_step.json']))
  texts = ['[' * 100_000, '{"step": 1e999, "steps": {"0": 1e999}}', '', '\0']
  if not directory.exists():
    raise Nothing
  (directory / name).write_text(str(rng.choice(texts)))


def delete(victim: Victim, rng: np.random.Generator) -> None:
  """Deletes a file of a publication, or all of it."""
  if rng.random() < 0.5:
    victim.file(rng).unlink()
  else:
    shutil.rmtree(victim.publication(rng), ignore_errors=True)


def slow_disk(victim: Victim, rng: np.random.Generator) -> Undo:
  """Makes every file operation take long."""
  victim.wish(slow_seconds=float(rng.uniform(0.02, 0.3)))
  return float(rng.uniform(3.0, 12.0)), lambda: victim.wish(slow_seconds=0.0)


def read_only_disk(victim: Victim, rng: np.random.Generator) -> Undo:
  """Makes the run directory read-only."""
  victim.wish(read_only=True)
  return float(rng.uniform(3.0, 12.0)), lambda: victim.wish(read_only=False)


def no_access(victim: Victim, rng: np.random.Generator) -> Undo:
  """Refuses every file operation in the run directory: a ticket expired."""
  code = int(rng.choice([errno.EACCES, errno.EPERM, errno.ENOTCONN]))
  victim.wish(refused=code)
  return float(rng.uniform(3.0, 12.0)), lambda: victim.wish(refused=0)


def full_disk_at_stop(victim: Victim, rng: np.random.Generator) -> Undo:
  """Preempts the process while its disk is full."""
  undo = full_disk(victim, rng)
  os.kill(victim.running(), signal.SIGTERM)
  return undo


def full_disk(victim: Victim, rng: np.random.Generator) -> Undo:
  """Lets no file of the process grow; libraries in C++ feel it as well."""
  pid = victim.running()
  soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))

  def make_room() -> None:
    if victim.pid == pid:
      resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

  return float(rng.uniform(3.0, 12.0)), make_room


def skew_clock(victim: Victim, rng: np.random.Generator) -> Undo:
  """Sets the clock of the process wrong by up to a day."""
  victim.wish(clock_offset=float(rng.uniform(-86400.0, 86400.0)))
  return float(rng.uniform(5.0, 30.0)), lambda: victim.wish(clock_offset=0.0)


def forge(victim: Victim, rng: np.random.Generator) -> Undo:
  """Lets the group publish, well formed, what no peer may use."""
  victim.running()
  victim.wish(forge=True)
  return float(rng.uniform(8.0, 15.0)), lambda: victim.wish(forge=False)


# These harm a publication: best at once when it is complete, before it is read.
OF_PUBLICATIONS = {'truncate', 'flip', 'delete', 'fifo', 'sparse'}

# These last, whichever process the group has.
OF_HOSTS = {'slow_disk', 'read_only_disk', 'no_access', 'skew_clock', 'forge'}

# With how often each comes, relative to the others.
FAULTS: dict[str, tuple[Callable[..., Undo | None], int]] = {
    'kill': (kill, 12),
    'terminate': (terminate, 5),
    'suspend': (suspend, 13),
    'truncate': (truncate, 14),
    'flip': (flip, 14),
    'delete': (delete, 12),
    'fifo': (fifo, 6),
    'sparse': (sparse, 6),
    'small_files': (small_files, 6),
    'forge': (forge, 6),
    'slow_disk': (slow_disk, 8),
    'read_only_disk': (read_only_disk, 7),
    'no_access': (no_access, 7),
    'full_disk': (full_disk, 7),
    'full_disk_at_stop': (full_disk_at_stop, 4),
    'skew_clock': (skew_clock, 8),
}
