"""Watches the processes of groups: starts again what dies, leaves none behind.

It must outlive what it watches: a full disk, a log that cannot be written and a
half-written file cost it a line on the terminal, no more.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from codistill_jax import run_directory, writers
from experiments import cli, processes
from experiments.stopping import StopRequest

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60.0  # For groups to save after SIGTERM.
_PATIENCE = 4  # So much more often may fail what may pass.
_LONGEST_DELAY_SECONDS = 60.0
_TAIL_BYTES = 1 << 14
_LONGEST_LINE = 1000


class Group:
  """The process of one group, started again when it dies.

  Attributes:
    group_id: The group.
    command: Of its process.
    workdir: The run directory.
    done: Whether the process has ended well.
    restarts: How often it was started again.
  """

  def __init__(
      self,
      workdir: str,
      group_id: int,
      command: Sequence[str],
      environment: dict[str, str],
  ):
    """Starts nothing yet: see `poll`.

    Args:
      workdir: The run directory; the log and the checkpoints are in it.
      group_id: The group.
      command: Of its process.
      environment: Variables that its process has besides our own.
    """
    self.group_id = group_id
    self.command = list(command)
    self.workdir = workdir
    self.done = False
    self.restarts = 0
    self._environment = environment
    self._process: subprocess.Popen | None = None
    self._begun = False
    self._deaths = 0  # Since the last progress.
    self._checkpoint = -1  # The newest step at the last death.
    self._start_at = 0.0
    self._asked_to_stop = False
    self._log = run_directory.group_dir(workdir, group_id) / 'log.txt'
    self._log_trouble = ''
    self._log_start = 0  # Of what the process says that was started last.

  @property
  def pid(self) -> int | None:
    """Its process, or None while none runs."""
    return self._process.pid if self.running else None

  @property
  def running(self) -> bool:
    return self._process is not None and self._process.poll() is None

  def poll(self, max_restarts: int) -> None:
    """Starts the process if it should run; looks whether it has ended.

    Args:
      max_restarts: How often it may die without a new resume checkpoint; and
        four times as often where the reason may pass (status 75).

    Raises:
      ValueError: If it ended with a clear error, or dies again and again.
    """
    if self.done or time.monotonic() < self._start_at:
      return
    if self._process is None:
      try:
        self._start()
      except OSError as e:  # No memory, no process id.
        self._count_death(f'could not be started: {e}', max_restarts)
      return
    status = self._process.poll()
    if status is None:
      return
    self._process = None
    if status == 0:
      self.done = True
    elif status == cli.CLEAR_ERROR:
      raise ValueError(f'group {self.group_id}: {self._last_line()}')
    elif status < 0:
      self._count_death(f'signal {-status}', max_restarts)
    elif status == cli.MAY_PASS:
      # A disk may be full for longer than the first tries take.
      self._count_death(f'exit status {status}', _PATIENCE * max_restarts)
    else:
      self._count_death(f'exit status {status}', max_restarts)

  def ask_to_stop(self) -> None:
    """Asks the process to save and leave; once, for a second time kills."""
    if self.running and not self._asked_to_stop:
      self._asked_to_stop = True
      processes.ask_to_leave(self._process)

  def end(self, seconds: float | None = None) -> None:
    """Asks the process to save and leave; kills it if it does not.

    Args:
      seconds: That it has for it; None for a minute.
    """
    self.ask_to_stop()
    if self._process is not None:
      processes.wait_or_kill(
          self._process, _GRACE_SECONDS if seconds is None else seconds
      )

  def _start(self) -> None:
    environment = {
        **os.environ,
        **self._environment,
        # A report says how to make the run again: not group by group.
        cli.COMMAND_VARIABLE: cli.own_command(),
    }
    with self._open_log() as log:
      self._process = processes.popen(
          self.command, env=environment, stdout=log, stderr=log
      )
    self.restarts += self._begun
    self._begun = True
    self._asked_to_stop = False

  def _open_log(self) -> BinaryIO:
    """The log; or, where that cannot be written, a file that swallows all."""
    try:
      self._log.parent.mkdir(parents=True, exist_ok=True)
      log = self._log.open('ab')
    except OSError as e:
      if not self._log_trouble:
        processes.say(
            f'group {self.group_id}: {self._log} cannot be written ({e}); it'
            ' runs without a log'
        )
      self._log_trouble = f'nothing is known, as its log was not writable: {e}'
      return open(os.devnull, 'wb')
    self._log_trouble, self._log_start = '', log.tell()
    return log

  def _count_death(self, how: str, max_restarts: int) -> None:
    newest = self._newest_checkpoint()
    if newest is not None:
      if newest > self._checkpoint:
        self._deaths = 0
      self._checkpoint = newest
    self._deaths += 1
    if self._deaths > max_restarts:
      raise ValueError(
          f'group {self.group_id} died {self._deaths} times without a new'
          f' resume checkpoint (last: {how}, "{self._last_line()}"); see'
          f' {self._log}'
      )
    delay = min(2.0 ** (self._deaths - 1), _LONGEST_DELAY_SECONDS)
    self._start_at = time.monotonic() + delay
    # Whoever was killed had no time to say why.
    why = '' if how.startswith('signal') else f', "{self._last_line()}"'
    processes.say(
        f'group {self.group_id} died ({how}{why}); starting it again in'
        f' {delay:g} s from step {max(self._checkpoint, 0)}'
    )

  def _newest_checkpoint(self) -> int | None:
    """The newest resume checkpoint that is to be seen: its step, or None."""
    with contextlib.suppress(OSError):
      saved = run_directory.newest_saved(
          run_directory.checkpoints_dir(self.workdir, self.group_id)
      )
      return saved and saved.step
    return None

  def _last_line(self) -> str:
    if self._log_trouble:
      return self._log_trouble
    try:
      with self._log.open('rb') as f:
        f.seek(max(f.seek(0, os.SEEK_END) - _TAIL_BYTES, self._log_start))
        tail = f.read().decode(errors='replace')
    except OSError as e:
      return f'its log cannot be read: {e}'
    lines = tail.strip().splitlines()
    return lines[-1][:_LONGEST_LINE] if lines else 'it said nothing'


def watch(
    groups: Sequence[Group], stop: StopRequest, max_restarts: int
) -> None:
  """Runs all groups to their end, showing progress.

  Raises:
    ValueError: If a group ended with a clear error, or dies again and again;
      the others still run.
    Stopped: After `stop` became true and all groups have left.
  """
  progress = [_Progress(group) for group in groups]
  try:
    while not all(group.done for group in groups):
      # First: who stops all processes at once stops the groups as well, and
      # they have not died.
      if stop():
        _stop(groups, stop)
      for group in groups:
        group.poll(max_restarts)
      for one in progress:
        one.update()
      time.sleep(_POLL_SECONDS)
    for one in progress:
      one.update()
  finally:
    for one in progress:
      one.close()


def end_all(groups: Sequence[Group]) -> None:
  """Asks all groups to save and leave, together; returns once none runs."""
  deadline = time.monotonic() + _GRACE_SECONDS
  for group in groups:
    group.ask_to_stop()
  for group in groups:
    group.end(max(deadline - time.monotonic(), 0.0))


def _stop(groups: Sequence[Group], stop: StopRequest) -> None:
  processes.say('stopping: the groups save and leave')
  end_all(groups)
  raise processes.stopped(stop)


class _Progress:
  """Shows what a group writes to its metrics."""

  def __init__(self, group: Group):
    self._group = group
    self._path = run_directory.metrics_path(group.workdir, group.group_id)
    self._writer: writers.Writer | None = None
    # What was there before is not news.
    self._seen_bytes = self._num_bytes()
    records = self._read()
    self._shown = _key(records[-1]) if records else None

  def update(self) -> None:
    num_bytes = self._num_bytes()
    if num_bytes == self._seen_bytes:
      return
    records = self._read()
    keys = [_key(record) for record in records]
    if self._shown in keys:
      records = records[len(keys) - keys[::-1].index(self._shown) :]
    elif self._shown is not None:
      records = records[-1:]  # More than one look can hold.
    if not records or not self._begin(records[0]['step']):
      return
    self._seen_bytes, self._shown = num_bytes, _key(records[-1])
    for record in records:
      metrics = {k: v for k, v in record.items() if k not in ('step', 'time')}
      self._writer.write(record['step'], metrics)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()

  def _num_bytes(self) -> int:
    try:
      return self._path.stat().length
    except OSError:
      return 0

  def _read(self) -> list[dict[str, Any]]:
    try:
      return run_directory.read_metrics(self._path, tail_bytes=1 << 16).records
    except OSError:
      return []  # At the next look, perhaps.

  def _begin(self, step: int) -> bool:
    """Opens the writer; false while it is not known how far the run goes."""
    if self._writer is not None:
      return True
    try:
      num_steps = run_directory.read_run(self._group.workdir).get('num_steps')
    except (OSError, ValueError):
      return False
    if not isinstance(num_steps, int):
      return False
    self._writer = writers.ProgressWriter(
        num_steps, resume_step=step, name=f'group {self._group.group_id}'
    )
    return True


def _key(record: dict[str, Any]) -> tuple[int, float | None]:
  # Not by the time alone: somebody may set the clock.
  return record['step'], record.get('time')
