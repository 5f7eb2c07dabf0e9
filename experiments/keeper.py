"""Sees to it that no update of a group is lost when its process must leave."""

import functools
import signal
import threading
from collections.abc import Callable

import numpy as np

from codistill_jax.base import ALONE
from codistill_jax.exchange.protocol import Exchange, check_finite
from codistill_jax.group import StepResult
from codistill_jax.storage.resume import ResumeCheckpoints
from experiments.cli import Stopped
from experiments.job import Job
from experiments.stopping import MovedOnError

_Steps = list[int | None]


class Keeper:
  """Saves one group: its main thread does, or another if that one is stuck.

  Attributes:
    close_exchange: Closes the exchange; once, whoever comes first.
  """

  def __init__(
      self,
      job: Job,
      checkpoints: ResumeCheckpoints,
      exchange: Exchange,
  ):
    """Keeps nothing yet.

    Args:
      job: The group.
      checkpoints: Where its states go.
      exchange: Whose teachers were in use.
    """
    self._job = job
    self._checkpoints = checkpoints
    self._exchange = exchange
    self._teacher_steps: _Steps = []
    self.close_exchange = _once(exchange.close)
    job.rescue.at_exit(job.group_id, self.close_exchange)

  @property
  def has_peers(self) -> bool:
    return bool(self._exchange.peers)

  def hold(self, result: StepResult) -> None:
    """Takes note of the newest update; to be called after each."""
    # Now: what is in use may be newer when the state is saved.
    self._teacher_steps = [
        None if p is None else p.step for p in self._exchange.in_use
    ]
    self._job.rescue.hold(
        self._job.group_id,
        result.step,
        functools.partial(self._rescue, result, self._teacher_steps),
    )

  def save(self, result: StepResult) -> None:
    """Saves in the background; all processes of a group take part."""
    job = self._job
    check_finite(job.group_id, result.step, result.metrics)
    state = job.train_step.collect(result.state)
    if job.agreement.is_primary:
      self._checkpoints.save(state, self._teacher_steps)

  def save_and_stop(self, result: StepResult) -> None:
    """Saves, unless that is done; raises Stopped."""
    self._job.stop()  # Who polls sees to it: no rescue begins from here on.
    saved = np.array(self._checkpoints.saved_step == result.step)
    if not self._job.agreement.choose(saved):
      self.save(result)
    self._checkpoints.wait()
    self.meet()
    raise self.stopped(result.step)

  def tell_peers(self) -> None:
    """Publications that only an earlier start would ask for are not needed."""
    step = self._checkpoints.restart_step
    if step is not None:
      self._exchange.checkpointed(step)

  def meet(self) -> None:
    """Waits for the other processes of the group.

    One that left while the primary still saves would take the group with it.
    """
    self._job.agreement.all_true(np.array(True))

  def stopped(self, step: int) -> Stopped:
    """What ends a group that was asked to stop."""
    return Stopped(
        f'group {self._job.group_id} stopped and saved at step {step}; the same'
        ' command goes on from there',
        stop_signal(self._job),
    )

  def _rescue(self, result: StepResult, teacher_steps: _Steps) -> str:
    """Saves in another thread than the main one, which is stuck.

    The arrays of `result` are intact until the next update is executed, which
    the main thread may be compiling.
    """
    job = self._job
    if job.agreement is not ALONE:
      raise MovedOnError('a state of several processes needs all of them')
    check_finite(job.group_id, result.step, result.metrics)
    try:
      state = job.train_step.collect(result.state)
    except RuntimeError as e:
      if 'deleted' not in str(e):
        raise
      raise MovedOnError('the next update has begun') from e
    self._checkpoints.save(state, teacher_steps)
    self._checkpoints.wait()
    return str(self.stopped(result.step))


def stop_signal(job: Job) -> int:
  """The signal that asked the process to stop."""
  return getattr(job.stop, 'signal_number', None) or signal.SIGTERM


def _once(act: Callable[[], None]) -> Callable[[], None]:
  """`act` at the first call only; the others wait until it is done."""
  lock, acts = threading.Lock(), [act]

  def call() -> None:
    with lock:
      if acts:
        acts.pop()()

  return call
