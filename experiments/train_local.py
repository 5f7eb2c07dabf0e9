r"""Trains all groups of one machine, each as processes of its own.

    python -m experiments.train_local --workdir=runs/two --num_groups=2 \
        --gin_file=gin_configs/tasks/bible_lm.gin

Shares out the accelerators (or makes fake CPU devices), shows progress, starts
a group again that dies, and ends with an evaluation and a report. The same
command again goes on where everything stopped.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from codistill_jax import gin_utils, run_directory, writers
from codistill_jax.exchange import peers_of
from experiments import cli
from experiments.job import StopRequest

flags.adopt_module_key_flags(gin_utils)

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory.', required=True)
_NUM_GROUPS = flags.DEFINE_integer(
    'num_groups', 2, 'Groups of the run; 1 trains a baseline without peers.'
)
_CPU_REPLICAS = flags.DEFINE_integer(
    'cpu_replicas',
    2,
    'Replicas (fake devices) of each group where there is no accelerator.',
    lower_bound=1,
)
_ARM = flags.DEFINE_string(
    'arm', '', 'Name of the run in reports; default: the name of --workdir.'
)
_MAX_RESTARTS = flags.DEFINE_integer(
    'max_restarts',
    5,
    'How often a group may die without a new resume checkpoint before the run'
    ' is given up.',
    lower_bound=0,
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the configuration and stop; write nothing.'
)
_REPORT = flags.DEFINE_bool(
    'report',
    True,
    'Evaluate the groups together and write a report at the end.',
)

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 60.0  # For a group to save after SIGTERM.


def main(argv: Sequence[str]) -> None:
  del argv
  peers_of(0, _NUM_GROUPS.value)  # Raises if there are too few.
  workdir = os.path.abspath(_WORKDIR.value)
  environments, replicas = share_devices(_NUM_GROUPS.value, _CPU_REPLICAS.value)
  groups = [
      Group(workdir, group_id, _command(workdir, group_id, replicas), extra)
      for group_id, extra in enumerate(environments)
  ]
  if _DRY_RUN.value:
    sys.exit(subprocess.call([*groups[0].command, '--dry_run']))
  stop = StopRequest().install()
  print(
      f'{_NUM_GROUPS.value} group(s) of {replicas} replica(s); what they say is'
      f' in {_WORKDIR.value}/groups/group_*/log.txt',
      flush=True,
  )
  try:
    watch(groups, stop, _MAX_RESTARTS.value)
  finally:
    end_all(groups)
  print(f'all groups are done; see {_WORKDIR.value}')
  if _REPORT.value:
    for binary in ('evaluate', 'report'):
      command = [sys.executable, '-m', f'experiments.{binary}']
      status = subprocess.call([*command, f'--workdir={_WORKDIR.value}'])
      if status:
        raise ValueError(
            f'all groups are trained, but experiments.{binary} ended with'
            f' status {status}; see above, and start it again by itself'
        )


def _command(workdir: str, group_id: int, replicas: int) -> list[str]:
  return [
      sys.executable,
      '-m',
      'experiments.train_group',
      f'--workdir={workdir}',
      f'--group_id={group_id}',
      f'--num_groups={_NUM_GROUPS.value}',
      f'--replicas={replicas}',
      *([f'--arm={_ARM.value}'] if _ARM.value else []),
      *gin_utils.flag_arguments(),
  ]


def share_devices(
    num_groups: int, cpu_replicas: int
) -> tuple[list[dict[str, str]], int]:
  """How the groups divide this machine.

  Returns:
    The environment variables of each group, and the replicas of each.
  """
  # In a process of its own: jax would keep the accelerators for this one.
  code = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  try:
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
  except subprocess.CalledProcessError as e:
    raise OSError(
        f'jax does not start here: {e.stderr.strip().splitlines()[-1]}'
    ) from e
  platform, count = out.split()
  if platform == 'cpu':
    return [{} for _ in range(num_groups)], cpu_replicas
  if platform not in ('gpu', 'cuda', 'rocm'):
    raise ValueError(
        f'train_local cannot share out {platform} devices; start'
        ' experiments.train_group once per host instead'
    )
  return share_gpus(visible_gpus(int(count)), num_groups)


def visible_gpus(count: int) -> list[str]:
  """The names by which this process sees its GPUs."""
  named = os.environ.get('CUDA_VISIBLE_DEVICES', '')
  return named.split(',') if named else [str(i) for i in range(count)]


def share_gpus(
    gpus: Sequence[str], num_groups: int
) -> tuple[list[dict[str, str]], int]:
  """Whole GPUs for each group, or several groups on a GPU."""
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


class Group:
  """The process of one group, started again when it dies."""

  def __init__(
      self,
      workdir: str,
      group_id: int,
      command: Sequence[str],
      environment: dict[str, str],
  ):
    self.group_id = group_id
    self.command = list(command)
    self.done = False
    self.workdir = workdir
    self._environment = environment
    self._process: subprocess.Popen | None = None
    self._deaths = 0
    self._checkpoint: int | None = None
    self._start_at = 0.0
    self._asked_to_stop = False
    self._log = run_directory.group_dir(workdir, group_id) / 'log.txt'

  def poll(self, max_restarts: int) -> None:
    """Starts the process if it should run; looks whether it has ended.

    Raises:
      ValueError: If it ended with a clear error, or dies again and again.
    """
    if self.done or time.monotonic() < self._start_at:
      return
    if self._process is None:
      self._start()
      return
    status = self._process.poll()
    if status is None:
      return
    self._process = None
    if status == 0:
      self.done = True
    elif status == cli.CLEAR_ERROR:
      raise ValueError(f'group {self.group_id}: {self._last_line()}')
    else:
      self._count_death(status, max_restarts)

  def ask_to_stop(self) -> None:
    """Asks the process to save and leave; once, for a second time kills."""
    if self.running and not self._asked_to_stop:
      self._asked_to_stop = True
      self._process.send_signal(signal.SIGTERM)

  @property
  def running(self) -> bool:
    return self._process is not None and self._process.poll() is None

  def end(self) -> None:
    """Asks the process to save and leave; kills it if it does not."""
    self.ask_to_stop()
    if self._process is not None:
      try:
        self._process.wait(_GRACE_SECONDS)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()

  def _start(self) -> None:
    self._log.parent.mkdir(parents=True, exist_ok=True)
    with self._log.open('ab') as log:
      self._process = subprocess.Popen(
          self.command,
          env={
              **os.environ,
              **self._environment,
              # A report says how to make the run again: not group by group.
              cli.COMMAND_VARIABLE: cli.own_command(),
          },
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          # Not in the foreground group of the terminal: Ctrl-C reaches this
          # process alone, which then asks each group once.
          start_new_session=True,
          preexec_fn=_die_with_parent,
      )

  def _count_death(self, status: int, max_restarts: int) -> None:
    saved = run_directory.newest_saved(
        run_directory.checkpoints_dir(self.workdir, self.group_id)
    )
    newest = None if saved is None else saved.step
    if newest != self._checkpoint:
      self._checkpoint, self._deaths = newest, 0
    self._deaths += 1
    how = f'signal {-status}' if status < 0 else f'exit status {status}'
    if self._deaths > max_restarts:
      raise ValueError(
          f'group {self.group_id} died {self._deaths} times without a new'
          f' resume checkpoint (last: {how}, "{self._last_line()}"); see'
          f' {self._log}'
      )
    delay = min(2.0 ** (self._deaths - 1), 60.0)
    self._start_at = time.monotonic() + delay
    print(
        f'group {self.group_id} died ({how}); starting it again in'
        f' {delay:g} s from step {newest or 0}',
        file=sys.stderr,
    )

  def _last_line(self) -> str:
    log = self._log.read_bytes().decode(errors='replace')
    lines = log.strip().splitlines()
    return lines[-1] if lines else 'it said nothing'


def watch(
    groups: Sequence[Group], stop: StopRequest, max_restarts: int
) -> None:
  """Runs all groups to their end, showing progress."""
  progress = [_Progress(group) for group in groups]
  try:
    while not all(group.done for group in groups):
      for group in groups:
        group.poll(max_restarts)
      if stop():
        _stop(groups, stop)
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
  for group in groups:
    group.ask_to_stop()
  for group in groups:
    group.end()


def _stop(groups: Sequence[Group], stop: StopRequest) -> None:
  print('stopping: the groups save and leave', file=sys.stderr)
  end_all(groups)
  raise cli.Stopped(
      'stopped; the same command goes on from here',
      stop.signal_number or signal.SIGTERM,
  )


class _Progress:
  """Shows what a group writes to its metrics."""

  def __init__(self, group: Group):
    self._group = group
    self._shown = time.time()  # What was there before is not news.
    self._writer: writers.Writer | None = None

  def update(self) -> None:
    workdir = self._group.workdir
    path = run_directory.metrics_path(workdir, self._group.group_id)
    records = run_directory.read_metrics(path, tail_bytes=1 << 16).records
    new = [r for r in records if r['time'] > self._shown]
    if not new:
      return
    if self._writer is None:
      self._writer = writers.ProgressWriter(
          run_directory.read_run(workdir)['num_steps'],
          resume_step=new[0]['step'],
          name=f'group {self._group.group_id}',
      )
    self._shown = new[-1]['time']
    for record in new:
      metrics = {k: v for k, v in record.items() if k not in ('step', 'time')}
      self._writer.write(record['step'], metrics)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


def _die_with_parent() -> None:
  """A group must not go on training when nobody watches it any more.

  At once: one that saves first would meet its successor.
  """
  if sys.platform == 'linux':
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == '__main__':
  cli.run(main)
