"""One group of one run, and how its process is asked to stop."""

import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any

from codistill_jax import replicas
from codistill_jax.base import ALONE, Agreement, Model
from codistill_jax.experiment import Experiment


class StopRequest:
  """SIGTERM and SIGINT as a flag that the loop polls; a second one kills."""

  def __init__(self):
    self.signal_number: int | None = None

  def __call__(self) -> bool:
    return self.signal_number is not None

  def install(self) -> 'StopRequest':
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self.signal_number is not None:
      os._exit(128 + number)
    self.signal_number = number


@dataclasses.dataclass(frozen=True)
class Job:
  """One group of one run.

  Attributes:
    experiment: The configuration.
    model: Its model.
    train_step: On the replicas of this group.
    workdir: The run directory.
    group_id: This group.
    num_groups: G.
    agreement: How the processes of this group decide together.
    stop: True once the process was asked to stop.
    arm: Name of the run in reports; '' for the name of the workdir.
  """

  experiment: Experiment
  model: Model
  train_step: replicas.PmapStep
  workdir: str
  group_id: int
  num_groups: int
  agreement: Agreement = ALONE
  stop: Callable[[], bool] = lambda: False
  arm: str = ''

  @property
  def identity(self) -> dict[str, str]:
    return {k: str(v) for k, v in self.experiment.task.identity.items()}
