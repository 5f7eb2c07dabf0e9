"""Trains a group as `train_group` does, with faults to order.

Obeys a control file: slow file operations, a read-only disk, a wrong clock, a
pace. Reports what it publishes, uses, saves and resumes from, by datagrams,
which no broken disk holds up.
"""

import builtins
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from codistill_jax import group
from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.storage import background, checkpoints, resume
from experiments import cli, train_group
from experiments.running import driver
from tools.fault_drill.faults import CONTROL_VARIABLE
from tools.fault_drill.ledger import SOCKET_VARIABLE

_POLL_SECONDS = 0.1
_WRITING = set('wax+')


class Control:
  """The wishes of the drill, read again and again.

  Attributes:
    slow_seconds: How long each file operation in the run directory takes.
    read_only: Whether the run directory can be read only.
    refused: The errno by which all in the run directory is refused; 0: none.
    clock_offset: Seconds that the clock of this host is wrong.
    step_seconds: How long an update takes at least.
    forge: Whether it publishes, well formed, what no peer may use.
  """

  def __init__(self, path: str):
    self.slow_seconds = 0.0
    self.read_only = False
    self.refused = 0
    self.clock_offset = 0.0
    self.step_seconds = 0.0
    self.forge = False
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
  """Makes the file operations of this process obey `control` below `root`.

  Those of Python: what C++ code does in a directory that is there already is
  neither slow nor refused. The limit of `full_disk` is felt by all.
  """
  below = os.path.join(root, '')

  def patched(function: Callable, writes: Callable[..., bool]) -> Callable:
    def call(*args, **kwargs):
      path = _absolute(args[0] if args else None, kwargs.get('dir_fd'))
      if path.startswith(below):
        if control.slow_seconds:
          time.sleep(control.slow_seconds)
        code = control.refused
        if control.read_only and writes(*args[1:], **kwargs):
          code = errno.EROFS
        if code:
          raise OSError(code, os.strerror(code), path)
      return function(*args, **kwargs)

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


def _absolute(path: Any, directory: int | None) -> str:
  """Returns where a file operation goes; '' for what is no path."""
  if not isinstance(path, str | os.PathLike):
    return ''
  path = os.fspath(path)
  if directory is not None and not os.path.isabs(path):
    # `shutil.rmtree` works with names in open directories.
    path = os.path.join(os.readlink(f'/proc/self/fd/{directory}'), path)
  return path


def skew_clock(control: Control) -> None:
  """Makes the clock of this process obey `control`; not the monotonic one."""
  real_time = time.time
  time.time = lambda: real_time() + control.clock_offset


def watch_exchange(report: Reporter, control: Control, group_id: int) -> None:
  """Reports what is published and read, with its bits; forges to order."""
  write, read, save = publications.write, publications.read, checkpoints.save
  # NaN; another architecture; said to be of another group.
  ways = itertools.cycle(['nan', 'shape', 'source'])

  def reported_write(root, publication, variables):
    step = publication.step
    if control.forge:
      directory = publications.group_directory(root, group_id)
      save(directory, step, *_forged(publication, variables, next(ways)))
      report('forged', step=step)
      return publication
    report('offered', step=step, digest=digest(variables))
    written = write(root, publication, variables)
    report('published', step=step)
    return written

  def reported_read(root, peer, step, **kwargs):
    if peer == group_id:  # Looks at what it published in an earlier life.
      return read(root, peer, step, **kwargs)
    try:
      publication, variables = read(root, peer, step, **kwargs)
    except (checkpoints.DamagedError, checkpoints.MismatchError):
      report('refused', peer=peer, step=step)
      raise
    report('used', peer=peer, step=step, digest=digest(variables))
    return publication, variables

  publications.write = reported_write
  publications.read = reported_read


def _forged(
    publication: publications.Publication, variables: Variables, how: str
) -> tuple[Any, dict[str, Any]]:
  """Returns tree and facts of a publication that no peer may use."""
  tree = {'params': variables.params, 'model_state': variables.model_state}
  leaves, structure = jax.tree.flatten(tree)
  group_id = publication.group_id
  if how == 'nan':
    leaves[0] = np.full_like(leaves[0], np.nan)
  elif how == 'shape':
    leaves[0] = np.concatenate([leaves[0], leaves[0]])
  elif how == 'source':
    group_id += 1
  facts = {
      'group_id': group_id,
      'step': publication.step,
      'time': publication.time,
      'identity': dict(publication.identity),
  }
  return structure.unflatten(leaves), facts


def watch_saving(report: Reporter) -> None:
  """Reports which resume checkpoints are asked for, and which are complete."""
  ask, save = resume.ResumeCheckpoints.save, checkpoints.save
  fail = background.Troubles.failed

  def reported_ask(self, state, teacher_steps=()):
    report('saving', step=int(state.step))
    ask(self, state, teacher_steps)

  def reported_save(directory, step, tree, facts):
    record = save(directory, step, tree, facts)
    if os.path.basename(directory) == 'checkpoints':
      report('saved', step=step)
    return record

  def reported_failure(self, doing, error):
    report('trouble', doing=doing)
    fail(self, doing, error)

  resume.ResumeCheckpoints.save = reported_ask
  checkpoints.save = reported_save
  background.Troubles.failed = reported_failure


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
  watch_exchange(report, control, flags.group_id)
  watch_saving(report)
  watch_training(report, control)
  skew_clock(control)
  break_disk(control, os.path.abspath(flags.workdir))
  train_group.main(argv)


if __name__ == '__main__':
  train_group.define_flags()
  cli.run(main)
