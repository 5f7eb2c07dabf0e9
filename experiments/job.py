"""One group of one run."""

import dataclasses
from collections.abc import Callable

from codistill_jax import gin_utils, one_program, replicas
from codistill_jax.base import ALONE, Agreement, Model, Stream, Variables
from codistill_jax.experiment import Experiment
from codistill_jax.storage.background import Troubles
from experiments.stopping import Rescue


def _ignore(group_id: int, step: int, variables: Variables) -> None:
  del group_id, step, variables


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
    rescue: How the group is saved if its main thread is stuck then.
    troubles: What this group cannot do at the moment, such as saving.
    arm: Name of the run in reports; '' for the name of the workdir.
    shared_stream: The batches of all groups, if these update together; each
      then yields once before its first update, so that all have begun.
    configuration: Gives what run.json and config.gin say that was configured;
      of a process that trains several runs at once, that of this one.
    evaluated: Called with the group, the step and the variables, on a device,
      after each evaluation; they are intact until the group's next update.
  """

  experiment: Experiment
  model: Model
  train_step: replicas.PmapStep | one_program.Seat
  workdir: str
  group_id: int
  num_groups: int
  agreement: Agreement = ALONE
  stop: Callable[[], bool] = lambda: False
  rescue: Rescue = dataclasses.field(default_factory=Rescue)
  troubles: Troubles = dataclasses.field(default_factory=Troubles)
  arm: str = ''
  shared_stream: Stream | None = None
  configuration: Callable[[], gin_utils.Configuration] = gin_utils.current
  evaluated: Callable[[int, int, Variables], None] = _ignore

  @property
  def identity(self) -> dict[str, str]:
    return {k: str(v) for k, v in self.experiment.task.identity.items()}
