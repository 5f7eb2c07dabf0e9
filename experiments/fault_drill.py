r"""A run under faults: kills, suspensions, damaged publications, broken disks.

    python -m experiments.fault_drill --minutes=20 --seed=0

Trains groups of one small model as `train_local` does, each in a process of its
own, and does harm to them at random for so many minutes, once all have begun.
Then they may finish, unharmed. Prints a table of the faults and what the
promises came to:

* no group ends other than by a fault that the drill asked for,
* no publication is used whose bits are not those its group published,
* no restart loses more than one checkpoint interval (beyond what the disk
  refused to save), and none any update after a stop that said it had saved,
* when the faults are over, groups publish, and take what their peers publish,
* every group reaches its last step.

With --workdir the result is also in <workdir>/drill.json. Exit status 1 if one
of them is broken. Linux only.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from codistill_jax.storage import files
from experiments import cli, drill_report
from experiments.cli import StopRequest
from experiments.drill_faults import (
    CONTROL_VARIABLE,
    FAULTS,
    OF_HOSTS,
    OF_PUBLICATIONS,
    Nothing,
    Victim,
)
from experiments.drill_ledger import SOCKET_VARIABLE, Ledger
from experiments.running import processes

EVERY, CHECKPOINT_EVERY = 10, 20
_CONFIG = """\
from __gin__ import dynamic_registration
import optax
from codistill_jax import exchange
from codistill_jax import experiment
from experiments import drill_task

experiment.Experiment.task = @drill_task.clusters()
experiment.Experiment.model = @drill_task.network
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-3
experiment.Experiment.num_steps = {num_steps}
experiment.Experiment.group_batch = 32
experiment.Experiment.exchange = @exchange.Checkpoints()
exchange.Checkpoints.every = {every}
exchange.Checkpoints.max_staleness_steps = {max_staleness}
experiment.Experiment.log_every = 10
experiment.Experiment.eval_every = 100
experiment.Experiment.checkpoint_every = {checkpoint_every}
"""
_POLL_SECONDS = 0.1
_PROGRESS_SECONDS = 30.0
_BEGIN_SECONDS = 300.0  # For the groups to begin.
_FINISH_SECONDS = 600.0  # For the groups to end after the last fault.
_MOST_ENDINGS = 5  # Unasked; a drill with more goes nowhere.
_FASTEST, _SLOWEST = 0.01, 2.0  # Seconds of a step.
# Of the faults that harm publications: the share that waits for the next one.
_AMBUSHES = 0.7


def define_flags() -> None:
  """Defines the flags; not on import, where those of train_group stand."""
  flags.DEFINE_string(
      'workdir',
      None,
      'Run directory, new or empty, which is kept; by default a temporary one,'
      ' deleted at the end.',
  )
  flags.DEFINE_integer('num_groups', 4, 'Groups of the run.', lower_bound=2)
  flags.DEFINE_float(
      'minutes',
      5.0,
      'How long to do harm; starting and finishing take about a minute more.',
      lower_bound=0.1,
  )
  flags.DEFINE_integer(
      'seed',
      0,
      'Of the faults: which, on whom, and when after the one before.',
      lower_bound=0,
  )
  flags.DEFINE_float(
      'seconds_between', 5.0, 'Between faults, on average.', lower_bound=0.1
  )
  flags.DEFINE_integer(
      'num_steps', 0, 'Updates of each group; 0: 2 for each second of harm.'
  )


def main(argv: Sequence[str]) -> None:
  del argv
  values = flags.FLAGS
  if sys.platform != 'linux':
    raise ValueError(
        'the drill needs Linux (it limits the files of other processes), and'
        f' this is {sys.platform}; run it there'
    )
  stop = StopRequest().install()
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
    result = drill.run(stop)
    print(drill_report.describe(result), flush=True)
    if values.workdir:
      files.write_json(os.path.join(values.workdir, 'drill.json'), result)
  if result['stopped']:
    raise cli.Stopped(cli.STOPPED, stop.signal_number)
  if result['broken']:
    sys.exit(cli.CLEAR_ERROR)


Enough = Callable[[Sequence[drill_report.Fault], Ledger], bool]


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
      calm_seconds: float = 25.0,
      patience_seconds: float = 15.0,
      deck: Mapping[str, int] | None = None,
      enough: Enough | None = None,
  ):
    """Prepares the run; starts nothing.

    Args:
      workdir: The run directory; new, or empty.
      temporary: For control files and the socket; a short path.
      num_groups: G.
      seconds: How long to do harm.
      seconds_between: Between faults, on average.
      num_steps: Updates of each group.
      seed: Of the faults.
      calm_seconds: How long the groups train on when the faults are over.
      patience_seconds: That a group then has to take what a peer publishes.
      deck: How often each fault comes before all begins anew; by default as in
        `FAULTS`. Dealt in random order.
      enough: Of the faults so far and the ledger: whether harm may end. Then
        the drill lasts as long as that takes on this machine: a fault comes
        only when all groups train, harm goes on beyond `seconds` until it is
        true, and the calm until each group has read what a peer has published
        since, or twice `patience_seconds`.

    Raises:
      ValueError: If the run directory is not empty.
    """
    self._workdir = os.path.abspath(workdir)
    if os.path.isdir(self._workdir) and os.listdir(self._workdir):
      raise ValueError(
          f'--workdir={workdir} is not empty; a drill needs a run of its own,'
          ' so give it a new directory'
      )
    self._seconds = seconds
    self._between = seconds_between
    self._calm_seconds = calm_seconds
    self._patience_seconds = patience_seconds
    self._enough = enough
    self._calm_since: float | None = None
    self._num_steps = num_steps
    self._rng = np.random.default_rng(seed)
    self._facts = {
        'num_groups': num_groups,
        'seed': seed,
        'minutes': round(seconds / 60, 2),
        'num_steps': num_steps,
        'exchange_every': EVERY,
        'checkpoint_every': CHECKPOINT_EVERY,
    }
    self._deck = deck or {name: n for name, (_, n) in FAULTS.items()}
    self._cards: list[str] = []
    self._log: list[drill_report.Fault] = []
    self._undo: list[_Pending] = []
    # By group: what harms its next publication.
    self._ambushes: dict[int, tuple[str, np.random.Generator]] = {}
    self._began = 0.0
    self._ledger = Ledger(
        os.path.join(temporary, 'events'), self._ambush, EVERY
    )
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
  ) -> processes.Group:
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
    return processes.Group(self._workdir, group_id, command, environment)

  def run(self, stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains and does harm; what came of it, see `drill_report.result`.

    Args:
      stop: Polled; true ends the drill early.
    """
    start, error = time.monotonic(), ''
    try:
      self._train_and_harm(stop)
    except ValueError as e:  # A group was given up, by a clear error.
      error = str(e)
    finally:
      self._undo_what_is_over(everything=True)
      processes.end_all(self._groups)
      time.sleep(0.2)  # The last datagrams.
      self._ledger.close()
    return drill_report.result(
        self._facts | {'seconds': round(time.monotonic() - start, 1)},
        faults=self._log,
        ledger=self._ledger,
        groups=self._groups,
        calm_since=self._calm_since,
        patience=self._patience_seconds,
        error=error,
        stopped=stop(),
    )

  def _train_and_harm(self, stop: Callable[[], bool]) -> None:
    start = said = time.monotonic()
    next_fault = 0.0
    while not stop() and not all(group.done for group in self._groups):
      now = time.monotonic()
      if not self._began and self._all_train():
        self._began, next_fault = now, now
      harm = bool(self._began) and self._calm_since is None
      if harm and self._may_end(now):
        self._calm_since, harm = now, False
      self._supervise(self._left(now))
      self._undo_what_is_over(everything=not harm)
      if harm and now >= next_fault and self._ready() and self._strike():
        next_fault = now + float(self._rng.exponential(self._between))
      if now - said > _PROGRESS_SECONDS:
        said = now
        self._say_progress(now - start)
        self._check_endings()
      self._check_time(now - start)
      time.sleep(_POLL_SECONDS)

  def _ready(self) -> bool:
    """Whether the next fault may come."""
    # On a slow machine more would happen than a group can recover from.
    return self._enough is None or self._all_train()

  def _may_end(self, now: float) -> bool:
    """Whether the harm may."""
    if now < self._began + self._seconds:
      return False
    return (
        self._enough is None
        or self._enough(self._log, self._ledger)
        or any(group.done for group in self._groups)
    )

  def _left(self, now: float) -> float:
    """Seconds for the groups to train on, if nothing delays the drill more."""
    if not self._began:
      return self._seconds + self._calm_seconds
    if self._calm_since is None:
      harm = self._began + self._seconds - now
      return max(harm, 0.0) + self._calm_seconds
    calm = now - self._calm_since
    if self._enough is None:
      return self._calm_seconds - calm
    settled = self._ledger.all_read_since(self._calm_since)
    return (
        0.0
        if settled or calm > 2 * self._patience_seconds
        else (self._calm_seconds)
    )

  def _all_train(self) -> bool:
    return all(self._ledger.trains(g.group_id) for g in self._groups)

  def _check_endings(self) -> None:
    count = len(self._ledger.unasked_endings(self._num_steps))
    if count > _MOST_ENDINGS:
      raise ValueError(
          f'{count} processes ended though no fault had asked for it, so the'
          ' drill ends here'
      )

  def _check_time(self, seconds: float) -> None:
    if not self._began and seconds > _BEGIN_SECONDS:
      raise ValueError(f'not all groups have begun within {seconds:.0f} s')
    if seconds > _BEGIN_SECONDS + self._seconds + _FINISH_SECONDS:
      raise ValueError(
          f'the groups have not finished {_FINISH_SECONDS:g} s after the last'
          ' fault'
      )

  def _say_progress(self, seconds: float) -> None:
    steps = ' '.join(
        str(self._ledger.step_of(g.group_id)) for g in self._groups
    )
    cli.tell(
        f'{seconds:.0f} s: {len(self._log)} faults; the groups are at steps'
        f' {steps} of {self._num_steps}',
        error=True,
    )

  def _supervise(self, seconds_left: float) -> None:
    """Starts what died; sets the pace.

    So that the faults do not outlive the run, all arrive at the same time, and
    some of it is left when the faults are over.
    """
    for group, victim in zip(self._groups, self._victims):
      status = _exit_status(victim.pid)
      if status is not None:
        self._ledger.ended(group.group_id, victim.pid, status)
      group.poll(max_restarts=50)
      if group.pid is not None and group.pid != victim.pid:
        self._inherit(group.group_id, group.pid)
      victim.pid = group.pid
      left = self._num_steps - self._ledger.step_of(group.group_id)
      if left > 0:
        pace = max(seconds_left, 0.0) / left
        victim.wish(step_seconds=min(max(pace, _FASTEST), _SLOWEST))

  def _inherit(self, group_id: int, pid: int) -> None:
    """A process that is started on a broken disk has to bear that, too."""
    for one in self._undo:
      if one.group_id == group_id and one.name in OF_HOSTS:
        self._ledger.struck(pid, one.name)

  def _undo_what_is_over(self, *, everything: bool) -> None:
    if everything:
      self._ambushes.clear()
    now, later = time.monotonic(), []
    for one in self._undo:
      if one.due > now and not everything:
        later.append(one)
        continue
      with contextlib.suppress(ProcessLookupError):  # Killed meanwhile.
        one.undo()
    self._undo = later

  def _strike(self) -> bool:
    """One fault; false if there was nothing to harm."""
    if not self._cards:
      cards = [name for name, n in self._deck.items() for _ in range(n)]
      self._cards = [str(name) for name in self._rng.permutation(cards)]
    name = self._cards.pop()
    if self._deal(name):
      return True
    self._cards.insert(0, name)  # Its turn will come.
    return False

  def _deal(self, name: str) -> bool:
    victim = self._victims[int(self._rng.integers(len(self._victims)))]
    if self._groups[victim.group_id].done:
      return False
    if name in OF_PUBLICATIONS and self._rng.random() < _AMBUSHES:
      if victim.group_id in self._ambushes:
        return False
      self._ambushes[victim.group_id] = (name, self._rng.spawn(1)[0])
      return True
    same = (name, victim.group_id)
    if any((one.name, one.group_id) == same for one in self._undo):
      return False  # The first to be undone would undo both.
    return self._harm(name, victim, self._rng)

  def _ambush(self, group_id: int, step: int) -> None:
    """Harms a publication at once; in the thread of the ledger."""
    found = self._ambushes.pop(group_id, None)
    if found is not None:
      name, rng = found
      victim = dataclasses.replace(self._victims[group_id], fresh=step)
      self._harm(name, victim, rng)

  def _harm(self, name: str, victim: Victim, rng: np.random.Generator) -> bool:
    pid = victim.pid
    try:
      undo = FAULTS[name][0](victim, rng)
    except (Nothing, OSError):
      return False
    self._ledger.struck(pid, name)
    now = time.monotonic()
    if undo is not None:
      due = now + undo[0]
      self._undo.append(_Pending(due, name, victim.group_id, undo[1]))
    seconds = round(now - self._began, 2)
    self._log.append(drill_report.Fault(seconds, name, victim.group_id))
    return True


class _Pending(NamedTuple):
  """A fault to be undone, when `due` (monotonic seconds)."""

  due: float
  name: str
  group_id: int
  undo: Callable[[], None]


def _exit_status(pid: int | None) -> int | None:
  """How a child ended, below 0 by a signal; None if it did not.

  Leaves it to be waited for.
  """
  if pid is None:
    return None
  try:
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
  except ChildProcessError:
    return None
  if found is None:
    return None
  exited = found.si_code == os.CLD_EXITED
  return found.si_status if exited else -found.si_status


if __name__ == '__main__':
  define_flags()
  cli.run(main)
