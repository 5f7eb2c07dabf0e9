r"""A run under faults: kills, suspensions, damaged publications, broken disks.

    python -m experiments.fault_drill --minutes=20 --seed=0

Trains groups of one small model as `train_local` does, each in a process of its
own, and does harm to them at random for so many minutes. Then they may finish.
Prints a table of the faults and what the promises came to:

* no group ends other than by a fault that the drill asked for,
* no publication is used whose bits are not those its group published,
* no restart loses more than one checkpoint interval (beyond what the disk
  refused to save),
* every group reaches its last step.

Exit status 1 if one of them is broken. Linux only.
"""

import collections
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from codistill_jax import files, run_directory
from experiments import cli, supervisor
from experiments.drill_faults import (
    CONTROL_VARIABLE,
    FAULTS,
    Nothing,
    Victim,
)
from experiments.drill_ledger import SOCKET_VARIABLE, Ledger
from experiments.stopping import StopRequest
from experiments.tables import align

EVERY, CHECKPOINT_EVERY = 10, 20
_CONFIG = """\
from __gin__ import dynamic_registration
import optax
from codistill_jax import experiment
from experiments import drill_task

experiment.Experiment.task = @drill_task.clusters()
experiment.Experiment.model = @drill_task.network
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-3
experiment.Experiment.num_steps = {num_steps}
experiment.Experiment.group_batch = 32
experiment.Experiment.exchange_every = {every}
experiment.Experiment.max_staleness_steps = {max_staleness}
experiment.Experiment.log_every = 10
experiment.Experiment.eval_every = 100
experiment.Experiment.checkpoint_every = {checkpoint_every}
"""
_POLL_SECONDS = 0.1
_FINISH_SECONDS = 600.0  # For the groups to end after the last fault.
_FASTEST, _SLOWEST = 0.01, 2.0  # Seconds of a step.


def define_flags() -> None:
  """Defines the flags; not on import, where those of train_group stand."""
  flags.DEFINE_string(
      'workdir', None, 'Run directory; by default a temporary one, deleted.'
  )
  flags.DEFINE_integer('num_groups', 4, 'Groups of the run.', lower_bound=2)
  flags.DEFINE_float('minutes', 5.0, 'How long to do harm.', lower_bound=0.1)
  flags.DEFINE_integer('seed', 0, 'Of the faults.')
  flags.DEFINE_float(
      'seconds_between', 5.0, 'Between faults, on average.', lower_bound=0.1
  )
  flags.DEFINE_integer('num_steps', 0, 'Updates; 0: 2 for each second.')


def main(argv: Sequence[str]) -> None:
  del argv
  values = flags.FLAGS
  with tempfile.TemporaryDirectory(prefix='drill_') as temporary:
    drill = Drill(
        values.workdir or os.path.join(temporary, 'run'),
        temporary,
        num_groups=values.num_groups,
        seconds=60.0 * values.minutes,
        seconds_between=values.seconds_between,
        num_steps=values.num_steps or int(120 * values.minutes),
        seed=values.seed,
    )
    result = drill.run(StopRequest().install())
    print(describe(result))
    if values.workdir:
      files.write_json(os.path.join(values.workdir, 'drill.json'), result)
  if result['broken']:
    sys.exit(cli.CLEAR_ERROR)


class Drill:
  """One run with faults."""

  def __init__(
      self,
      workdir: str,
      temporary: str,
      *,
      num_groups: int,
      seconds: float,
      seconds_between: float,
      num_steps: int,
      seed: int,
  ):
    """Prepares the run; starts nothing.

    Args:
      workdir: The run directory.
      temporary: For control files and the socket.
      num_groups: G.
      seconds: How long to do harm.
      seconds_between: Between faults, on average.
      num_steps: Updates of each group.
      seed: Of the faults.
    """
    self._workdir = os.path.abspath(workdir)
    self._seconds = seconds
    self._between = seconds_between
    self._num_steps = num_steps
    self._rng = np.random.default_rng(seed)
    self._facts = {
        'num_groups': num_groups,
        'seed': seed,
        'minutes': round(seconds / 60, 2),
        'num_steps': num_steps,
    }
    self._log: list[tuple[float, str, int]] = []
    self._undo: list[tuple[float, Callable[[], None]]] = []
    self._ledger = Ledger(os.path.join(temporary, 'events'))
    config = pathlib.Path(temporary) / 'drill.gin'
    config.write_text(
        _CONFIG.format(
            num_steps=num_steps,
            every=EVERY,
            checkpoint_every=CHECKPOINT_EVERY,
            max_staleness=10 * EVERY,
        )
    )
    self._groups = [
        self._group(g, num_groups, temporary, config) for g in range(num_groups)
    ]
    self._victims = [
        Victim(self._workdir, g, None, pathlib.Path(temporary) / f'control_{g}')
        for g in range(num_groups)
    ]

  def _group(
      self, group_id: int, num_groups: int, temporary: str, config: pathlib.Path
  ) -> supervisor.Group:
    command = [
        sys.executable,
        '-m',
        'experiments.drilled_group',
        f'--workdir={self._workdir}',
        f'--group_id={group_id}',
        f'--num_groups={num_groups}',
        '--replicas=1',
        f'--gin_file={config}',
    ]
    environment = {
        CONTROL_VARIABLE: f'{temporary}/control_{group_id}',
        SOCKET_VARIABLE: self._ledger.address,
        # Each life would compile the same programs again.
        'JAX_COMPILATION_CACHE_DIR': f'{temporary}/compiled',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    return supervisor.Group(self._workdir, group_id, command, environment)

  def run(self, stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains and does harm; what came of it."""
    start = time.monotonic()
    end, limit = start + self._seconds, start + self._seconds + _FINISH_SECONDS
    next_fault, error = start + 10.0, None
    try:
      while not all(group.done for group in self._groups):
        now = time.monotonic()
        self._supervise(end - now)
        self._undo_what_is_over(now, everything=now > end)
        if next_fault <= now < end and self._strike(now - start):
          next_fault = now + float(self._rng.exponential(self._between))
        if now > limit:
          raise ValueError(
              f'the groups have not finished {_FINISH_SECONDS:g} s after the'
              ' last fault'
          )
        if stop():
          raise ValueError('the drill was stopped')
        time.sleep(_POLL_SECONDS)
    except ValueError as e:  # A group was given up, by a clear error.
      error = str(e)
    finally:
      self._undo_what_is_over(time.monotonic(), everything=True)
      supervisor.end_all(self._groups)
    time.sleep(0.2)  # The last datagrams.
    return self._result(time.monotonic() - start, error)

  def _supervise(self, seconds_left: float) -> None:
    for group, victim in zip(self._groups, self._victims):
      group.poll(max_restarts=50)
      victim.pid = group.pid
      left = self._num_steps - self._ledger.step_of(group.group_id)
      if left > 0:
        # So that the faults do not outlive the run, nor the run the faults.
        pace = max(seconds_left - 5.0, 0.0) / left
        victim.wish(step_seconds=min(max(pace, _FASTEST), _SLOWEST))

  def _undo_what_is_over(self, now: float, *, everything: bool) -> None:
    later = []
    for due, undo in self._undo:
      if due > now and not everything:
        later.append((due, undo))
        continue
      with contextlib.suppress(ProcessLookupError):  # Killed meanwhile.
        undo()
    self._undo = later

  def _strike(self, seconds: float) -> bool:
    """One fault; false if there was nothing to harm."""
    names = list(FAULTS)
    weights = np.array([FAULTS[name][1] for name in names], np.float64)
    name = str(self._rng.choice(names, p=weights / weights.sum()))
    victim = self._victims[int(self._rng.integers(len(self._victims)))]
    if self._groups[victim.group_id].done:
      return False
    try:
      undo = FAULTS[name][0](victim, self._rng)
    except (Nothing, OSError):
      return False
    if undo is not None:
      self._undo.append((time.monotonic() + undo[0], undo[1]))
    self._log.append((seconds, name, victim.group_id))
    return True

  def _result(self, seconds: float, error: str | None) -> dict[str, Any]:
    groups = [self._outcome(group) for group in self._groups]
    losses = [
        loss - waived
        for group in self._groups
        for loss, waived in self._ledger.losses(group.group_id)
    ]
    worst = max(losses, default=0)
    broken = list(self._ledger.bad_uses[:5])
    if error:
      broken.append(error)
    if worst > CHECKPOINT_EVERY:
      broken.append(
          f'a restart lost {worst} steps, more than the checkpoint interval of'
          f' {CHECKPOINT_EVERY}'
      )
    broken += [
        f'group {g["group"]} ended at step {g["step"]} of {self._num_steps}'
        for g in groups
        if not g['done']
    ]
    counts = collections.Counter(name for _, name, _ in self._log)
    return {
        **self._facts,
        'seconds': round(seconds, 1),
        'faults': {name: counts[name] for name in FAULTS},
        'num_faults': len(self._log),
        'publications': self._ledger.publications,
        'uses': self._ledger.uses,
        'bad_uses': len(self._ledger.bad_uses),
        'restarts': len(losses),
        'steps_lost': {
            'median': statistics.median(losses) if losses else 0,
            'most': worst,
        },
        'groups': groups,
        'broken': broken,
    }

  def _outcome(self, group: supervisor.Group) -> dict[str, Any]:
    path = run_directory.metrics_path(self._workdir, group.group_id)
    records = run_directory.read_metrics(path).records
    _, present = run_directory.series(records, 'exchange/peers_present')
    _, ages = run_directory.series(records, 'exchange/staleness_steps_max')
    return {
        'group': group.group_id,
        'step': self._ledger.step_of(group.group_id),
        'done': group.done,
        'restarts': group.restarts,
        'rejected': _total(records, 'exchange/rejected'),
        'publish_failures': _total(records, 'exchange/publish_failures'),
        'peers_present': round(statistics.mean(present), 2) if present else 0.0,
        'staleness_steps_max': max(ages, default=0.0),
    }


def _total(records: Sequence[dict[str, Any]], key: str) -> int:
  """The sum of a count that begins at 0 in each process."""
  total, before = 0.0, 0.0
  for record in records:
    now = record.get(key)
    if isinstance(now, int | float):
      total += now - before if now >= before else now
      before = now
  return int(total)


def describe(result: dict[str, Any]) -> str:
  """The result as text."""
  faults = [
      ['fault', 'times'],
      *([k, str(n)] for k, n in result['faults'].items()),
  ]
  columns = list(result['groups'][0])
  groups = [columns, *([str(g[c]) for c in columns] for g in result['groups'])]
  lost = result['steps_lost']
  lines = [
      f'{result["num_faults"]} faults in {result["minutes"]:g} minutes, seed'
      f' {result["seed"]}; {result["num_groups"]} groups of'
      f' {result["num_steps"]} steps, {result["seconds"]:.0f} s in all',
      align(faults),
      '',
      align(groups),
      '',
      f'{result["publications"]} publications; read {result["uses"]} times, of'
      f' these with other bits than published: {result["bad_uses"]}',
      f'{result["restarts"]} restarts; steps lost: median {lost["median"]:g},'
      f' most {lost["most"]} (checkpoint interval {CHECKPOINT_EVERY})',
  ]
  if result['broken']:
    lines += ['BROKEN:', *(f'  {line}' for line in result['broken'])]
  else:
    lines.append('all promises kept')
  return '\n'.join(lines)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
