"""`train_group` with faults to order, for `fault_drill`.

Obeys a control file: slow file operations, a read-only disk, a wrong clock, a
pace. Reports what it publishes, uses, saves and resumes from, by datagrams,
which no broken disk holds up.
"""

import builtins
import contextlib
import hashlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from codistill_jax import group, publications, storage
from codistill_jax.base import Variables
from experiments import cli, driver, train_group
from experiments.drill_faults import CONTROL_VARIABLE
from experiments.drill_ledger import SOCKET_VARIABLE

_POLL_SECONDS = 0.1
_WRITING = set('wax+')


class Control:
  """What the drill wants of this process now; read again and again.

  Attributes:
    slow_seconds: How long each file operation in the run directory takes.
    read_only: Whether the run directory can be written to.
    clock_offset: Seconds that the clock of this host is wrong.
    step_seconds: How long an update takes at least.
  """

  def __init__(self, path: str):
    self.slow_seconds = 0.0
    self.read_only = False
    self.clock_offset = 0.0
    self.step_seconds = 0.0
    self._path = path
    self._open = builtins.open
    self._read()
    threading.Thread(target=self._follow, name='drill', daemon=True).start()

  def _follow(self) -> None:
    while True:
      time.sleep(_POLL_SECONDS)
      self._read()

  def _read(self) -> None:
    try:
      with self._open(self._path) as f:
        vars(self).update(json.load(f))
    except (OSError, ValueError):
      pass  # It is being replaced.


class Reporter:
  """Sends events to the drill."""

  def __init__(self, address: str, group_id: int):
    self._address = address
    self._group_id = group_id
    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

  def __call__(self, event: str, **facts: Any) -> None:
    facts |= {'event': event, 'group': self._group_id, 'pid': os.getpid()}
    with contextlib.suppress(OSError):  # The drill has gone.
      self._socket.sendto(json.dumps(facts).encode(), self._address)


def digest(variables: Variables) -> str:
  """Identifies variables by all their bits, in float32."""
  found = hashlib.sha256()
  for x in jax.tree.leaves(variables):
    found.update(np.ascontiguousarray(x).astype(np.float32).tobytes())
  return found.hexdigest()[:24]


def break_disk(control: Control, root: str) -> None:
  """Makes the file operations of this process obey `control` below `root`."""
  real_time = time.time
  time.time = lambda: real_time() + control.clock_offset

  def patched(function: Callable, writes: Callable[..., bool]) -> Callable:
    def call(path, *args, **kwargs):
      inside = isinstance(path, str | os.PathLike) and os.fspath(
          path
      ).startswith(root)
      if inside:
        if control.slow_seconds:
          time.sleep(control.slow_seconds)
        if control.read_only and writes(*args, **kwargs):
          raise OSError(30, 'Read-only file system', os.fspath(path))
      return function(path, *args, **kwargs)

    return call

  by_mode = lambda mode='r', *unused, **rest: bool(_WRITING & set(mode))
  by_flags = lambda flags=0, *unused, **rest: bool(
      flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
  )
  builtins.open = io.open = patched(builtins.open, by_mode)
  os.open = patched(os.open, by_flags)
  always, never = lambda *args, **kwargs: True, lambda *args, **kwargs: False
  for name in ('mkdir', 'rename', 'replace', 'unlink', 'rmdir', 'remove'):
    setattr(os, name, patched(getattr(os, name), always))
  for name in ('stat', 'listdir', 'scandir'):
    setattr(os, name, patched(getattr(os, name), never))


def watch_exchange(report: Reporter, group_id: int) -> None:
  """Reports what is published and read, with its bits, and what is saved."""
  write, read, save = publications.write, publications.read, storage.save

  def reported_write(root, publication, variables):
    report('offered', step=publication.step, digest=digest(variables))
    written = write(root, publication, variables)
    report('published', step=publication.step)
    return written

  def reported_read(root, peer, step, **kwargs):
    publication, variables = read(root, peer, step, **kwargs)
    if peer == group_id:  # Looks at what it published in an earlier life.
      return publication, variables
    report('used', peer=peer, step=step, digest=digest(variables))
    return publication, variables

  def reported_save(directory, step, tree, facts):
    kind = 'checkpoint' if 'checkpoints' in os.fspath(directory) else 'other'
    report('saving', kind=kind, step=step)
    record = save(directory, step, tree, facts)
    report('saved', kind=kind, step=step)
    return record

  publications.write = reported_write
  publications.read = reported_read
  storage.save = reported_save


def watch_training(report: Reporter, control: Control) -> None:
  """Reports where a run starts and what it reaches; keeps the pace."""

  def reported_run(train_step, state, stream, **kwargs) -> Iterator[Any]:
    report('start', step=int(state.step))
    turns = group.run_group(train_step, state, stream, **kwargs)
    del state
    for result in turns:
      report('step', step=result.step)
      yield result
      time.sleep(control.step_seconds)

  driver.run_group = reported_run


def main(argv: list[str]) -> None:
  """As train_group's."""
  flags = train_group.flags.FLAGS
  report = Reporter(os.environ[SOCKET_VARIABLE], flags.group_id)
  control = Control(os.environ[CONTROL_VARIABLE])
  report('alive')
  watch_exchange(report, flags.group_id)
  watch_training(report, control)
  break_disk(control, os.path.abspath(flags.workdir))
  train_group.main(argv)


if __name__ == '__main__':
  cli.run(main)
