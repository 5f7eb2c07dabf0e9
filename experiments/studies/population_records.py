"""What a population tells of itself: the records that `Watch` would write.

Shape suffixes: N = S * G members, seed by seed; S seeds, G groups, B rows.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base, evaluate, writers
from codistill_jax import experiment as experiment_lib
from codistill_jax.base import Metrics, Model, TrainState, Variables
from codistill_jax.experiment import Experiment
from codistill_jax.one_program import Population
from experiments.efficiency import Efficiency
from experiments.job import Job
from experiments.studies.population_exchange import (
    StackedExchange,
    StackedTeachers,
)

ENSEMBLE = -1  # Stands for a group: the mean prediction of those of its seed.

OnRecord = Callable[[int, int, int, dict[str, float]], None]
AnyExchange = StackedExchange | StackedTeachers
Member = tuple[int, int]  # A seed, and a group of it.


class Records:
  """Turns what the program returns into records, as `Watch` does for a group.

  Attributes:
    experiment: Of each run.
    members: Seed and group of each of the N.
    alive_N: Which of them have not diverged.
    diverged_at: When the others did.
  """

  def __init__(
      self,
      experiment: Experiment,
      model: Model,
      seeds: Sequence[int],
      num_groups: int,
      program: Population,
      exchange: AnyExchange,
      start: TrainState,
      on_record: OnRecord,
  ):
    """Has recorded nothing yet.

    Args:
      experiment: Of each run.
      model: Of all.
      seeds: S of them.
      num_groups: G.
      program: What trains them.
      exchange: Of all.
      start: The stacked state, for its shapes and devices.
      on_record: Told `(seed, group, step, metrics)`.
    """
    self.experiment = experiment
    self.members = [(seed, g) for seed in seeds for g in range(num_groups)]
    self.alive_N = np.ones(len(self.members), bool)
    self.diverged_at: dict[Member, int] = {}
    self._seeds = list(seeds)
    self._num_devices = start.step.sharding.num_devices
    self._exchange = exchange
    self._on_record = on_record
    row = experiment_lib.first_row(experiment, num_groups)
    tokens = int(np.prod(np.shape(row['labels'])[1:]))
    self._examples = experiment.group_batch * tokens
    job = Job(experiment, model, program, '', 0, num_groups)
    first = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), start
    )
    self._efficiency = Efficiency(job, first, row)
    self._metrics: list[Metrics] = []
    self._taught: list[bool] = []
    self._weight, self._stall_ms = 0.0, 0.0
    self._clock: float | None = None  # Not while the first update compiles.
    self._logged = 0

  def close(self) -> None:
    self._efficiency.close()

  def add(
      self,
      step: int,
      metrics: Metrics,
      weight: float,
      taught: bool,
  ) -> None:
    """Takes note of an update of all members."""
    self._metrics.append(metrics)
    self._taught.append(taught)
    self._weight = weight
    self._efficiency.seen(taught)
    if self._clock is None:
      jax.block_until_ready(metrics)
      self._clock, self._logged = time.perf_counter(), step

  def held_up(self, milliseconds: float) -> None:
    """Takes note of time that the exchange took."""
    self._stall_ms += milliseconds

  def due(self, step: int) -> bool:
    """Whether there is a record, apart from those at exchanges."""
    experiment = self.experiment
    every = experiment.log_every, experiment.checkpoint_every
    return step == experiment.num_steps or any(step % n == 0 for n in every)

  def log(self, step: int) -> None:
    """Records of training; losses are means since the last ones."""
    found = jax.device_get(self._metrics)
    stacked = {
        key: np.array([m[key] for m in found if key in m], np.float64)
        for key in found[-1]
    }
    self._note_diverged(step, found)
    shared = self._shared(step)
    for n, (seed, group_id) in enumerate(self.members):
      if not self.alive_N[n]:
        continue
      mine = {
          key: float(x[:, n].mean() if key.startswith('loss/') else x[-1, n])
          for key, x in stacked.items()
      }
      if self._weight:
        mine |= self._exchange.metrics(step - 1, n)
      self._on_record(seed, group_id, step, mine | shared)
    self._metrics, self._taught, self._stall_ms = [], [], 0.0
    self._clock, self._logged = time.perf_counter(), step

  def evaluated(
      self,
      step: int,
      members: Sequence[dict[str, float]],
      ensembles: Sequence[dict[str, float]] = (),
  ) -> None:
    """Records of an evaluation."""
    for (seed, group_id), alive, found in zip(
        self.members, self.alive_N, members
    ):
      if alive:
        self._on_record(seed, group_id, step, found)
    for seed, found in zip(self._seeds, ensembles):
      if not any(s == seed for s, _ in self.diverged_at):
        self._on_record(seed, ENSEMBLE, step, found)

  @contextlib.contextmanager
  def clock_stopped(self) -> Iterator[None]:
    """What is done inside does not count as time of training."""
    start = time.perf_counter()
    yield
    self._clock += time.perf_counter() - start

  def _note_diverged(self, step: int, found: Sequence[Metrics]) -> None:
    first = step - len(found) + 1
    for key in ('loss/total', 'optim/grad_norm'):
      for at, metrics in enumerate(found, first):
        for n in np.flatnonzero(~np.isfinite(metrics[key])):
          self.alive_N[n] = False
          before = self.diverged_at.get(self.members[n], at)
          self.diverged_at[self.members[n]] = min(before, at)

  def _shared(self, step: int) -> dict[str, float]:
    """What is the same for all members."""
    taught = self._taught[-1]
    shared = {
        'distill/weight': self._weight if taught else 0.0,
        'exchange/stall_ms': self._stall_ms,
    }
    steps = step - self._logged
    if steps > 0:
      seconds = time.perf_counter() - self._clock
      shared['perf/steps_per_sec'] = steps / seconds
      shared['perf/examples_per_sec'] = steps / seconds * self._examples
      shared |= self._efficiency.metrics(self._taught[-steps:], seconds)
      if 'perf/utilisation' in shared:
        # Of one member on a device that works for several.
        shared['perf/utilisation'] *= len(self.members) / self._num_devices
    return writers.as_floats(shared)


class Evaluation:
  """One pass over the validation set for all members, and for ensembles."""

  def __init__(
      self,
      experiment: Experiment,
      model: Model,
      num_seeds: int,
      num_groups: int,
      sharding: jax.sharding.NamedSharding,
      ensembles: bool,
  ):
    """Loads and compiles nothing yet.

    Args:
      experiment: Of each run.
      model: Of all.
      num_seeds: S.
      num_groups: G.
      sharding: Of an array with an axis N in front.
      ensembles: Whether there are any.
    """
    self._experiment, self._model = experiment, model
    self._num_members = num_seeds * num_groups
    self._sharding = sharding
    one = experiment_lib.make_eval_step(experiment, model)
    if ensembles:
      step = _compare_step(model, num_seeds, num_groups)
    else:
      step = _member_step(one)
    everywhere = jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec()
    )
    self._step = jax.jit(step, out_shardings=(everywhere, sharding))
    self._batches: Sequence[base.Batch] | None = None

  def due(self, step: int) -> bool:
    """Whether there is one after that step."""
    experiment = self._experiment
    return step == experiment.num_steps or step % experiment.eval_every == 0

  def __call__(
      self,
      variables: Variables,
      step: int,
      records: 'Records',
      should_stop: Callable[[], bool],
  ) -> bool:
    """Records what it finds; false if it was stopped."""
    task, rows = self._experiment.task, self._experiment.eval_batch
    if self._batches is None:
      self._batches = task.eval_batches(rows)
    carry = jax.tree.map(
        lambda x: np.stack([x] * self._num_members),
        base.host_copy(self._model.init_carry(rows)),
    )
    found = evaluate.evaluate_stacked(
        self._step,
        variables,
        self._batches,
        jax.device_put(carry, self._sharding),
        should_stop=should_stop,
    )
    if found is not None:
      records.evaluated(step, *found)
    return found is not None


def _member_step(eval_step: Callable[..., tuple]) -> Callable[..., tuple]:
  """An evaluation step of all members, for `evaluate_stacked`."""
  members = jax.vmap(eval_step, in_axes=(0, None, 0))

  def step(variables, batch, carry):
    sums, carry = members(variables, batch, carry)
    return [sums], carry

  return step


def _compare_step(
    model: Model, num_seeds: int, num_groups: int
) -> Callable[..., tuple]:
  """The same, and of the ensemble of each seed."""
  compare = jax.vmap(evaluate.make_compare_step(model), in_axes=(0, None, 0))
  sizes = num_seeds, num_groups

  def apart(tree):
    """For each group, its members (S, ...) of all seeds."""
    rows = jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), tree)
    return [jax.tree.map(lambda x, g=g: x[:, g], rows) for g in range(sizes[1])]

  def together(*xs):
    stacked = jnp.stack(xs, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])

  def step(variables, batch, carry):
    sums, carries = compare(apart(variables), batch, apart(carry))
    members = jax.tree.map(together, *sums.members)
    return [members, sums.ensemble], jax.tree.map(together, *carries)

  return step
