"""Groups of one process: made, stepped in turn, resumed together."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from codistill_jax import experiment as experiment_lib
from codistill_jax import one_program, run_directory
from codistill_jax.base import Model, Stream
from codistill_jax.peer_predictions import mixing_matrix
from codistill_jax.replicas import PmapStep
from codistill_jax.storage.resume import ResumeCheckpoints

from .. import cli
from ..cli import StopRequest
from . import devices
from .job import Job


def train_steps_of(
    experiment: experiment_lib.Experiment,
    model: Model,
    num_groups: int,
    num_replicas: int,
) -> tuple[Sequence[PmapStep | one_program.Seat], Stream | None]:
  """Makes the update of each group; and one stream, if they update together."""
  chosen = devices.chosen_devices(num_replicas)
  kind = experiment.exchange
  if not kind.one_program:
    step = experiment_lib.make_replicated_step(experiment, model, chosen)
    return [step] * num_groups, None  # Compiled once for all.
  if num_groups < 2:
    raise ValueError(
        f'Experiment.exchange={kind} with --num_groups=1: there is nobody to'
        ' exchange with; set --num_groups to at least 2, or'
        ' exchange=@exchange.Checkpoints() for a baseline'
    )
  population = experiment_lib.make_population(
      experiment,
      model,
      num_groups,
      num_replicas=num_replicas or jax.local_device_count(),
  )
  peers = [
      kind.peers_of(group_id, num_groups) for group_id in range(num_groups)
  ]
  update = one_program.JointUpdate(population, mixing_matrix(peers), kind.top_k)
  stream = experiment_lib.train_stream(experiment, 0, num_groups)
  return update.seats, one_program.SharedStream(stream)


class Latch:
  """A stop request that all groups of a round see alike."""

  def __init__(self, request: StopRequest):
    self._request = request
    self._stop = False
    self.unsaved = request.unsaved

  def __call__(self) -> bool:
    # Asked only now, and not in `update`: until the groups are about to save,
    # the main thread may be stuck in an update.
    if self._stop:
      return self._request()
    self._request.put_off()  # Such as in an evaluation, of any length.
    return False

  @property
  def signal_number(self) -> int | None:
    return self._request.signal_number

  def update(self) -> None:
    """Asks; to be called before each round."""
    self._stop = self.signal_number is not None


def train_in_turn(groups: Sequence[Iterator[Any]], latch: Latch) -> None:
  """Steps all groups, one update each, until all are done."""
  latch.update()
  for _ in in_turn(groups):
    latch.update()


def in_turn(groups: Sequence[Iterator[Any]]) -> Iterator[None]:
  """Steps all groups, one update each, until all are done.

  Yields:
    After each round.

  Raises:
    Stopped: What the first one raised, after all others had the same update.
  """
  running = list(groups)
  while running:
    stopped = None
    for group in list(running):
      try:
        next(group)
      except StopIteration:
        running.remove(group)
      except cli.Stopped as e:
        stopped = e  # The others save at this step too.
    if stopped is not None:
      raise stopped
    yield


def keep_common_checkpoints(
    jobs: Sequence[Job], usable: Callable[[int], bool] | None = None
) -> None:
  """Lets all groups restart at one step: the newest that all of them have.

  Args:
    jobs: The groups.
    usable: Of a step, whether a restart can begin there; without such a step
      all begin again. None: all steps are, and it is an error if the groups
      have none in common.
  """
  stores = [
      ResumeCheckpoints(
          run_directory.checkpoints_dir(job.workdir, job.group_id)
      )
      for job in jobs
  ]
  steps = [set(store.steps()) for store in stores]
  common = set.intersection(*steps)
  if usable is not None:
    common = set(filter(usable, common))
  elif all(steps) and not common:
    raise ValueError(
        f'the groups of {jobs[0].workdir} have no step in common among their'
        ' resume checkpoints; use another --workdir to start again'
    )
  start = max(common, default=-1)
  for job, store in zip(jobs, stores):
    if store.newest_step not in (None, start):
      # It goes back with the others, also if it had reached its last step.
      run_directory.done_path(job.workdir, job.group_id).unlink(missing_ok=True)
      store.discard_after(start)
    store.close()
