"""One run with faults: who is harmed how and when, and how that is undone."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cli
from experiments.running import processes
from tools.fault_drill import report
from tools.fault_drill.faults import (
    CONTROL_VARIABLE,
    FAULTS,
    OF_HOSTS,
    OF_PUBLICATIONS,
    Nothing,
    Victim,
)
from tools.fault_drill.ledger import SOCKET_VARIABLE, Ledger

EVERY, CHECKPOINT_EVERY = 10, 20
_CONFIG = """\
from __gin__ import dynamic_registration
import optax
from codistill_jax import experiment
from codistill_jax.exchange import kinds as exchange
from tools.fault_drill import task

experiment.Experiment.task = @task.clusters()
experiment.Experiment.model = @task.network
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

Enough = Callable[[Sequence[report.Fault], Ledger], bool]


class _Pending(NamedTuple):
  """A fault to be undone, when `due` (monotonic seconds)."""

  due: float
  name: str
  group_id: int
  undo: Callable[[], None]


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
      patience_seconds: float = 30.0,
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
      patience_seconds: That groups have, when the faults are over, to publish
        and to take what their peers publish.
      deck: How often each fault comes before all begins anew; by default as in
        `FAULTS`. Dealt in random order.
      enough: Of the faults so far and the ledger: whether harm may end. Harm
        then goes on beyond `seconds` until this is true, or a group is done;
        and a fault comes only when all groups train, or on a slow machine more
        would happen than they can recover from.

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
    self._patience = patience_seconds
    self._enough = enough
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
    self._log: list[report.Fault] = []
    self._undo: list[_Pending] = []
    # By group: what harms its next publication.
    self._ambushes: dict[int, tuple[str, np.random.Generator]] = {}
    # When harm began, and when it was over.
    self._began: float | None = None
    self._calm_since: float | None = None
    self._unread: list[str] = []  # That no group may leave so.
    self._ledger = Ledger(os.path.join(temporary, 'events'), self._ambush)
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
        'tools.fault_drill.drilled_group',
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
    """Trains and does harm; returns what came of it, see `report.result`.

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
    return report.result(
        self._facts | {'seconds': round(time.monotonic() - start, 1)},
        faults=self._log,
        ledger=self._ledger,
        groups=self._groups,
        unread=self._unread,
        error=error,
        stopped=stop(),
    )

  def _train_and_harm(self, stop: Callable[[], bool]) -> None:
    start = said = time.monotonic()
    next_fault = 0.0
    while not stop() and not all(group.done for group in self._groups):
      now = time.monotonic()
      if self._began is None and self._all_train():
        self._began = now
      harm = self._began is not None and self._calm_since is None
      if harm and self._may_end(now):
        self._calm_since, harm = now, False
      self._supervise(self._seconds_left(now))
      self._undo_what_is_over(everything=not harm)
      ready = self._enough is None or self._all_train()
      if harm and ready and now >= next_fault and self._strike():
        next_fault = now + float(self._rng.exponential(self._between))
      if now - said > _PROGRESS_SECONDS:
        said = now
        self._say_progress(now - start)
      self._check(now - start)
      time.sleep(_POLL_SECONDS)

  def _may_end(self, now: float) -> bool:
    """Returns whether the harm may."""
    if now < self._began + self._seconds:
      return False
    return (
        self._enough is None
        or self._enough(self._log, self._ledger)
        or any(group.done for group in self._groups)
    )

  def _seconds_left(self, now: float) -> float:
    """Returns how long the groups are to train on."""
    if self._began is None:
      return self._seconds + self._patience
    if self._calm_since is None:
      harm = self._began + self._seconds - now
      return max(harm, 0.0) + self._patience
    left = self._calm_since + self._patience - now
    training = [g.group_id for g in self._groups if not g.done]
    self._unread = self._ledger.unread(training, self._calm_since)
    return left if self._unread and left > 0 else 0.0

  def _all_train(self) -> bool:
    return all(self._ledger.trains(g.group_id) for g in self._groups)

  def _check(self, seconds: float) -> None:
    """Raises ValueError if the drill goes nowhere."""
    endings = len(self._ledger.unasked_endings(self._num_steps))
    if endings > _MOST_ENDINGS:
      raise ValueError(f'{endings} processes ended as no fault had asked for')
    if self._began is None and seconds > _BEGIN_SECONDS:
      raise ValueError(f'not all groups have begun within {seconds:.0f} s')
    if seconds > _BEGIN_SECONDS + self._seconds + _FINISH_SECONDS:
      raise ValueError(
          f'the groups have not finished {_FINISH_SECONDS:g} s after the last'
          ' fault'
      )

  def _say_progress(self, seconds: float) -> None:
    steps = [str(self._ledger.step_of(g.group_id)) for g in self._groups]
    cli.tell(
        f'{seconds:.0f} s: {len(self._log)} faults; the groups are at steps'
        f' {" ".join(steps)} of {self._num_steps}',
        error=True,
    )

  def _supervise(self, seconds_left: float) -> None:
    """Starts what died; sets the pace.

    So that the faults do not outlive the run, all arrive at the same time, and
    some of it is left when the faults are over.
    """
    for group, victim in zip(self._groups, self._victims):
      self._note_end(group, victim)
      group.poll(max_restarts=50)
      self._note_end(group, victim)
      if group.pid is not None and victim.pid is None:
        victim.pid = group.pid
        # Started on a broken disk it has to bear that, too.
        for one in self._undo:
          if one.group_id == group.group_id and one.name in OF_HOSTS:
            self._ledger.struck(group.pid, one.name)
      left = self._num_steps - self._ledger.step_of(group.group_id)
      if left > 0:
        pace = max(seconds_left, 0.0) / left
        victim.wish(step_seconds=min(max(pace, _FASTEST), _SLOWEST))

  def _note_end(self, group: processes.Group, victim: Victim) -> None:
    if victim.pid is not None and group.pid != victim.pid:
      self._ledger.ended(victim.pid, group.exit_status)
      victim.pid = None

  def _undo_what_is_over(self, *, everything: bool) -> None:
    if everything:
      self._ambushes.clear()
    now = time.monotonic()
    over = [one for one in self._undo if everything or one.due <= now]
    self._undo = [one for one in self._undo if one not in over]
    for one in over:
      with contextlib.suppress(ProcessLookupError):  # Killed meanwhile.
        one.undo()

  def _strike(self) -> bool:
    """Does one fault; returns false if there was nothing to harm."""
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
    if pid is not None:
      self._ledger.struck(pid, name)
    now = time.monotonic()
    if undo is not None:
      due = now + undo[0]
      self._undo.append(_Pending(due, name, victim.group_id, undo[1]))
    seconds = round(now - self._began, 2)
    self._log.append(report.Fault(seconds, name, victim.group_id))
    return True
