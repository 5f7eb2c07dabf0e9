"""Child processes: given devices, supervised with restarts and back-off, ended.

A supervisor must outlive what it watches: a full disk, a log that cannot be
written and a half-written file cost it a line on the terminal, no more.
"""

import contextlib
import ctypes
import glob
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import flags
from etils import epath

from codistill_jax import gin_utils, run_directory, writers
from codistill_jax.storage import files
from codistill_jax.storage.files import PathLike

from .. import cli

_PATIENCE = 4  # So much more often may fail what may pass.
_TAIL_BYTES = 1 << 14
_LONGEST_LINE = 1000
_KEPT_BYTES = 1 << 32  # Of temporary memory; see `large_pages`.
_REMOTE_SECONDS = 5.0  # Between two looks at records in an object store.
# Exit statuses: at the end, after a save, or before there was anything to save.
_NOTHING_LOST = {0} | {x for n in cli.SIGNALS for x in (128 + n, -n)}


class Pace(NamedTuple):
  """Time limits of a supervisor, in seconds.

  Attributes:
    poll: Between two looks at the processes.
    grace: For groups to save and leave when they are asked to.
    first_delay: Before a group is started again; twice as long each time.
    longest_delay: The most of that.
  """

  poll: float = 0.2
  grace: float = 60.0
  first_delay: float = 1.0
  longest_delay: float = 60.0


PACE = Pace()


def popen(command: Sequence[str], **kwargs: Any) -> subprocess.Popen:
  """Starts a process that a terminal does not reach, and that ends with us."""
  return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      # Not in the foreground group of the terminal: Ctrl-C reaches this
      # process alone, which then asks each process once.
      start_new_session=True,
      preexec_fn=_die_with_parent,
      **kwargs,
  )


def ask_to_leave(process: subprocess.Popen) -> None:
  """Asks by SIGTERM, which a second time would mean: at once."""
  if process.poll() is None:
    process.send_signal(signal.SIGTERM)
    # One that somebody has stopped would not hear of it.
    process.send_signal(signal.SIGCONT)


def wait_or_kill(process: subprocess.Popen, seconds: float) -> None:
  """Returns once it has ended, after about so many seconds at most."""
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def call(
    command: Sequence[str],
    stop: cli.StopRequest,
    *,
    capture: bool = False,
    patience: float = 5.0,
) -> subprocess.CompletedProcess[str]:
  """Runs a command that has nothing to save, to its end.

  Args:
    command: Program and arguments.
    stop: Once true, the command is asked to leave.
    capture: Whether to keep its output; else it goes where ours goes.
    patience: Seconds that it has for that before it is killed.

  Raises:
    Stopped: If asked to stop before it ended well.
  """
  pipe = subprocess.PIPE if capture else None
  process = popen(
      command, stdout=pipe, stderr=pipe, text=True, errors='replace'
  )
  with process, contextlib.ExitStack() as stack:
    stack.callback(wait_or_kill, process, patience)
    stack.callback(ask_to_leave, process)
    out = err = None
    while process.returncode is None and not stop():
      with contextlib.suppress(subprocess.TimeoutExpired):
        out, err = process.communicate(timeout=PACE.poll)
    # It may have heard of the signal as well.
    if process.returncode != 0 and stop():
      raise cli.Stopped(cli.STOPPED, stop.signal_number)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _find_prctl() -> Callable[[int, int], int] | None:
  return ctypes.CDLL(None).prctl if sys.platform == 'linux' else None


_PRCTL = _find_prctl()  # Not between fork and exec.


def _die_with_parent() -> None:
  """Lets the kernel kill this process with its parent, which watches it.

  At once: one that saves first would meet its successor.
  """
  if _PRCTL is not None:
    set_parent_death_signal = 1
    _PRCTL(set_parent_death_signal, signal.SIGKILL)


_HANDED_ON = ('compile_cache', 'profile_steps')  # If they are given.


def group_command(group_id: int, *more: str) -> list[str]:
  """Returns the command that trains a group of the run that our flags say."""
  given = flags.FLAGS
  return [
      *(sys.executable, '-u', '-m', cli.module_of('train_group')),
      f'--workdir={given.workdir}',
      f'--group_id={group_id}',
      f'--num_groups={given.num_groups}',
      *([f'--arm={given.arm}'] if given.arm else []),
      f'--init_from={given.init_from}',
      f'--exchange_dir={given.exchange_dir}',
      *(given[x].serialize() for x in _HANDED_ON if given[x].present),
      *gin_utils.flag_arguments(),
      *more,
  ]


def log_directory(workdir: str) -> epath.Path:
  """Returns where a process can write what it says: on a disk.

  Of a run in an object store that is a new directory of this machine.
  """
  if files.is_remote(workdir):
    return epath.Path(tempfile.mkdtemp(prefix='codistill_'))
  return run_directory.groups_root(workdir)


class Group:
  """The process of one group, started again when it dies.

  Attributes:
    group_id: The group.
    command: Of its process.
    workdir: The run directory.
    log: The file that its process writes what it says to.
    pace: Its time limits.
    done: Whether the process has ended well.
    restarts: How often it was started again.
  """

  def __init__(
      self,
      workdir: str,
      group_id: int,
      command: Sequence[str],
      environment: dict[str, str],
      pace: Pace = PACE,
      logs: PathLike | None = None,
  ):
    """Starts nothing yet: see `poll`.

    Args:
      workdir: The run directory; the log and the checkpoints are in it.
      group_id: The group.
      command: Of its process.
      environment: Variables that its process has besides our own.
      pace: Time limits.
      logs: Where logs are kept, as of `log_directory`; None: beside the run.
    """
    self.group_id = group_id
    self.command = list(command)
    self.workdir = workdir
    logs = logs or run_directory.groups_root(workdir)
    self.log = epath.Path(logs) / f'group_{group_id}' / 'log.txt'
    self.pace = pace
    self.done = False
    self.restarts = 0
    self._environment = environment
    self._process: subprocess.Popen | None = None
    self._ended: int | None = None  # The exit status of the one before.
    self._begun = False
    self._deaths = 0  # Since the last progress.
    self._checkpoint = -1  # The newest step at the last death.
    self._start_at = 0.0
    self._asked_to_stop = False
    self._log_trouble = ''
    self._log_start = 0  # Of what the process says that was started last.

  @property
  def pid(self) -> int | None:
    """Returns the id of its process, or None while none runs."""
    return self._process.pid if self.running else None

  @property
  def running(self) -> bool:
    return self._process is not None and self._process.poll() is None

  @property
  def exit_status(self) -> int | None:
    """Returns the status of its last process; below 0: ended by a signal."""
    status = None if self._process is None else self._process.poll()
    return self._ended if status is None else status

  @property
  def has_lost_updates(self) -> bool:
    """Returns whether its last process has ended without a save."""
    return self.exit_status not in {None, *_NOTHING_LOST}

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
    self._process, self._ended = None, status
    if status == 0:
      self.done = True
    elif status == cli.CLEAR_ERROR:
      raise ValueError(f'group {self.group_id}: {self.last_line()}')
    elif status < 0:
      self._count_death(_how(status), max_restarts)
    elif status == cli.MAY_PASS:
      # A disk may be full for longer than the first tries take.
      self._count_death(_how(status), _PATIENCE * max_restarts)
    else:
      self._count_death(_how(status), max_restarts)

  def ask_to_stop(self) -> None:
    """Asks the process to save and leave; once, for a second time kills."""
    if self.running and not self._asked_to_stop:
      self._asked_to_stop = True
      ask_to_leave(self._process)

  def end(self, seconds: float) -> None:
    """Asks the process to save and leave; kills it if it has not by then."""
    self.ask_to_stop()
    if self._process is not None:
      wait_or_kill(self._process, seconds)

  def _start(self) -> None:
    environment = {
        **os.environ,
        **self._environment,
        # A report says how to make the run again: not group by group.
        cli.COMMAND_VARIABLE: cli.own_command(),
    }
    with self._open_log() as log:
      self._process = popen(
          self.command, env=environment, stdout=log, stderr=log
      )
    self.restarts += self._begun
    self._begun = True
    self._asked_to_stop = False

  def _open_log(self) -> BinaryIO:
    """Opens the log; or, if that fails, a file that swallows all."""
    try:
      self.log.parent.mkdir(parents=True, exist_ok=True)
      log = self.log.open('ab')
    except OSError as e:
      if not self._log_trouble:
        cli.tell(
            f'group {self.group_id}: {self.log} cannot be written ({e}); it'
            ' runs without a log',
            error=True,
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
          f' resume checkpoint (last: {how}, "{self.last_line()}"); see'
          f' {self.log}'
      )
    pace = self.pace
    delay = min(pace.first_delay * 2 ** (self._deaths - 1), pace.longest_delay)
    self._start_at = time.monotonic() + delay
    # Whoever was killed had no time to say why.
    why = '' if how.startswith('signal') else f', "{self.last_line()}"'
    cli.tell(
        f'group {self.group_id} died ({how}{why}); starting it again in'
        f' {delay:g} s from step {max(self._checkpoint, 0)}',
        error=True,
    )

  def _newest_checkpoint(self) -> int | None:
    """Returns the step of the newest resume checkpoint to be seen, or None."""
    with contextlib.suppress(OSError):
      return run_directory.newest_saved(
          run_directory.checkpoints_dir(self.workdir, self.group_id)
      )
    return None

  def warnings(self) -> list[str]:
    """Returns what the process that runs warned of, in its first lines."""
    with contextlib.suppress(OSError), self.log.open('rb') as f:
      f.seek(self._log_start)
      lines = f.read(_TAIL_BYTES).decode(errors='replace').splitlines()
      return [line for line in lines if line.startswith('warning: ')]
    return []

  def last_line(self) -> str:
    """Returns the last line that its last process has said."""
    if self._log_trouble:
      return self._log_trouble
    try:
      with self.log.open('rb') as f:
        f.seek(max(f.seek(0, os.SEEK_END) - _TAIL_BYTES, self._log_start))
        tail = f.read().decode(errors='replace')
    except OSError as e:
      return f'its log cannot be read: {e}'
    lines = tail.strip().splitlines()
    return lines[-1][:_LONGEST_LINE] if lines else 'it said nothing'


def supervise(
    groups: Sequence[Group],
    stop: cli.StopRequest,
    max_restarts: int,
) -> None:
  """Runs all groups to their end, showing progress; leaves none behind.

  Raises:
    ValueError: If a group ended with a clear error, or dies again and again.
      That is said at once, and the others train on to their last step.
    Stopped: If asked to stop; with the worst status of a group that has left
      without a save.
  """
  with contextlib.ExitStack() as stack:
    stack.callback(end_all, groups)
    progress = [stack.enter_context(Progress(group)) for group in groups]
    given_up: dict[int, ValueError] = {}
    while any(not g.done and g.group_id not in given_up for g in groups):
      # First: who stops all processes at once stops the groups as well, and
      # they have not died.
      if stop():
        cli.tell('stopping: the groups save and leave', error=True)
        end_all(groups)
        raise _stopped(groups, stop)
      for group in groups:
        if group.group_id in given_up:
          continue
        try:
          group.poll(max_restarts)
        except ValueError as e:
          given_up[group.group_id] = e
          if len(groups) > 1:
            cli.tell(f'{e}; the other groups train on', error=True)
      for one in progress:
        one.update()
      time.sleep(groups[0].pace.poll)
    for one in progress:
      one.update(last=True)
    for error in given_up.values():
      raise error


def _stopped(groups: Sequence[Group], stop: cli.StopRequest) -> cli.Stopped:
  """Returns what ends a supervisor: the worst that its groups ended with."""
  lost = [group for group in groups if group.has_lost_updates]
  if not lost:
    return cli.Stopped(cli.STOPPED, stop.signal_number)
  lines = [
      f'group {g.group_id} ({_how(g.exit_status)}, "{g.last_line()}")'
      for g in lost
  ]
  return cli.Stopped(
      f'error: stopped, but not saved: {", ".join(lines)}; the same command'
      ' goes on from the resume checkpoint before',
      stop.signal_number,
      worst_status(group.exit_status for group in lost),
  )


def _how(status: int) -> str:
  return f'exit status {status}' if status >= 0 else f'signal {-status}'


def worst_status(statuses: Iterable[int | None]) -> int:
  """Returns the worst of exit statuses: those of `cli` rise from 1 to 128 + n.

  Of a process that was killed what it had not saved is lost: 75.
  """
  return min(
      (
          128 - s if -s in cli.SIGNALS else cli.MAY_PASS if s < 0 else s
          for s in statuses
          if s
      ),
      default=0,
  )


def end_all(groups: Sequence[Group]) -> None:
  """Asks all groups to save and leave, together; returns once none runs."""
  start = time.monotonic()
  for group in groups:
    group.ask_to_stop()
  for group in groups:
    group.end(max(start + group.pace.grace - time.monotonic(), 0.0))


class Progress:
  """Shows what a group adds to its metrics, from now on."""

  def __init__(self, group: Group):
    self._group = group
    self._path = run_directory.metrics_path(group.workdir, group.group_id)
    self._writer: writers.Writer | None = None
    self._shown = self._size()  # What was there before is not news.
    self._looked = 0.0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused: Any) -> None:
    if self._writer is not None:
      self._writer.close()

  def update(self, last: bool = False) -> None:
    """Shows the lines that are complete and were not shown.

    Args:
      last: Look now, also in an object store, which is asked seldom.
    """
    now, remote = time.monotonic(), files.is_remote(self._path)
    if remote and not last and now - self._looked < _REMOTE_SECONDS:
      return
    self._looked = now
    # A restart takes back what came after the checkpoint.
    self._shown = min(self._shown, self._size())
    with contextlib.suppress(OSError, ValueError):
      for line in run_directory.lines(self._path, self._shown):
        if not line.endswith(b'\n'):
          break
        record = run_directory.parse_record(line)
        if record is not None and not self._show(dict(record)):
          break
        self._shown += len(line)

  def _size(self) -> int:
    try:
      return files.size(self._path)
    except OSError:
      return 0

  def _show(self, record: dict[str, Any]) -> bool:
    """Shows a record; returns false while the run's length is not known."""
    step = record.pop('step')
    record.pop('time', None)
    if self._writer is None:
      num_steps = run_directory.read_run(self._group.workdir).get('num_steps')
      if num_steps is None:
        return False
      # The configuration is one: all groups warn of the same.
      for line in self._group.warnings() if not self._group.group_id else ():
        cli.tell(line, error=True)
      self._writer = writers.ProgressWriter(
          num_steps, resume_step=step, name=f'group {self._group.group_id}'
      )
    self._writer.write(step, record)
    return True


# --- The devices of a machine -------------------------------------------------

# Of the drivers of NVIDIA (under WSL too), AMD, and TPUs.
_DEVICE_FILES = (
    '/dev/nvidia*',
    '/dev/dxg',
    '/dev/kfd',
    '/dev/accel*',
    '/dev/vfio/*',
)


def share_devices(
    num_groups: int, cpu_replicas: int, stop: cli.StopRequest
) -> tuple[list[dict[str, str]], int]:
  """Divides this machine among the groups.

  Args:
    num_groups: G.
    cpu_replicas: Replicas of each group where there is no accelerator.
    stop: Ends the look at the devices, which may take long.

  Returns:
    The environment variables of each group, and the replicas of each.

  Raises:
    OSError: If jax does not start.
    ValueError: If the devices are of a kind that processes cannot share.
  """
  if not may_have_accelerator():
    return [large_pages() for _ in range(num_groups)], cpu_replicas
  # In a process of its own: jax would keep the accelerators for this one.
  code = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  probe = call([sys.executable, '-c', code], stop, capture=True)
  if probe.returncode:
    said = probe.stderr.strip().splitlines() or ['it said nothing']
    raise OSError(f'jax does not start here: {said[-1]}')
  platform, count = probe.stdout.split()[-2:]
  if platform == 'cpu':
    return [large_pages() for _ in range(num_groups)], cpu_replicas
  if platform not in ('gpu', 'cuda', 'rocm'):
    raise ValueError(
        f'train_local cannot share out {platform} devices; start'
        ' train_group once per host instead'
    )
  return share_gpus(visible_gpus(int(count)), num_groups)


def may_have_accelerator() -> bool:
  """Returns false where jax can find none: to ask it takes two seconds."""
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return False
  if sys.platform != 'linux':
    return True
  return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def accelerators(directory: str = '/dev') -> int:
  """Returns how many GPUs or TPUs this machine has; 0: none, or not known."""
  names = ('nvidia[0-9]*', 'accel[0-9]*', 'vfio/[0-9]*')
  return sum(len(glob.glob(os.path.join(directory, name))) for name in names)


def large_pages() -> dict[str, str]:
  """Returns variables with which glibc asks for large pages, and keeps them.

  On CPU each step takes its temporary memory anew, which glibc would take from
  the system and give back: to clear and map it in pages of 4 kB took a sixth of
  a language model's step, and in large pages a third of a ResNet's where memory
  was scattered. Up to 4 GB is kept, in one arena, as others have no room for
  large arrays: a ResNet-50 that took more than 1 GB anew in each step was
  slower by half. Only a new process can be told, and by no other way.
  """
  if 'GLIBC_TUNABLES' in os.environ:
    return {}  # What the user tunes stands.
  tuned = {
      'hugetlb': 1,
      'arena_max': 1,
      'mmap_threshold': _KEPT_BYTES,
      'trim_threshold': _KEPT_BYTES,
  }
  said = ':'.join(f'glibc.malloc.{key}={x}' for key, x in tuned.items())
  return {'GLIBC_TUNABLES': said}


def visible_gpus(count: int) -> list[str]:
  """Returns the names by which this process sees its GPUs."""
  named = os.environ.get('CUDA_VISIBLE_DEVICES', '')
  return named.split(',') if named else [str(i) for i in range(count)]


def share_gpus(
    gpus: Sequence[str], num_groups: int
) -> tuple[list[dict[str, str]], int]:
  """Gives each group whole GPUs, or several groups one GPU."""
  replicas = len(gpus) // num_groups
  if replicas:
    shares = [
        gpus[g * replicas : (g + 1) * replicas] for g in range(num_groups)
    ]
    return [{'CUDA_VISIBLE_DEVICES': ','.join(s)} for s in shares], replicas
  per_gpu = -(-num_groups // len(gpus))
  return [
      {
          'CUDA_VISIBLE_DEVICES': gpus[g % len(gpus)],
          'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / per_gpu:.2f}',
      }
      for g in range(num_groups)
  ], 1
