"""All groups of all seeds of one arm as one compiled program.

Seeds are runs that know nothing of each other; the groups of a seed codistil
in lockstep, as `MemoryExchange` would have them do. On an accelerator, where a
small model leaves most of the machine idle, that takes about as long as one
run. It writes nothing: what a run directory would hold is told to `on_record`.

Shape suffixes: N = S * G members, seed by seed; S seeds, G groups, B rows.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from codistill_jax import base, evaluate, group, writers
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.base import Metrics, Model, Stream, TrainState, Variables
from codistill_jax.experiment import Experiment
from codistill_jax.population import Population
from experiments.efficiency import Efficiency
from experiments.job import Job
from experiments.studies.population_exchange import (
    StackedExchange,
    peers_of_all,
)

ENSEMBLE = -1  # Stands for a group: the mean prediction of those of its seed.

OnRecord = Callable[[int, int, int, dict[str, float]], None]
Member = tuple[int, int]  # A seed, and a group of it.


class Outcome(NamedTuple):
  """What has become of the members, each a seed and a group.

  Attributes:
    step: Updates done.
    stopped: Whether `should_stop` ended it before the last one.
    diverged_at: Of those that diverged, the update whose loss or gradient was
      not finite.
    variables: What each has learnt, as numpy copies.
  """

  step: int
  stopped: bool
  diverged_at: dict[Member, int]
  variables: Mapping[Member, Variables]


def train_population(
    experiment: Experiment,
    model: Model,
    seeds: Sequence[int],
    num_groups: int,
    on_record: OnRecord,
    should_stop: Callable[[], bool] = evaluate.never,
    *,
    ensembles: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Outcome:
  """Trains G groups with each of S seeds, from the start to the last step.

  A member that diverges has no more records and teaches nobody any more; the
  others go on without it.

  Args:
    experiment: Of each run; its mode is lockstep, whatever it says. Seed s
      adds s to its seed and to its data seed.
    model: Of all.
    seeds: S of them.
    num_groups: G.
    on_record: Told `(seed, group, step, metrics)`, at the steps and with the
      keys of the records of a run directory. Of what all members share, the
      speed, each is told its own part; `perf/utilisation` is that of a device
      by all of them.
    should_stop: Asked before every update and batch of an evaluation; what is
      trained so far cannot be taken up again.
    ensembles: Whether evaluations have a record of group `ENSEMBLE` too.
    devices: As of `Population`.

  Raises:
    ValueError: If the groups exchange anything but parameters, or their
      numbers of peers differ.
  """
  if experiment.exchange != 'checkpoints':
    raise ValueError(
        f'a population exchanges parameters, but Experiment.exchange is'
        f' {experiment.exchange!r}; train its groups in turn'
    )
  runs = [configured(experiment, seed) for seed in seeds]
  peers_of_all(runs[0].plan, num_groups)  # Raises if they are uneven.
  program = experiment_lib.make_population(
      experiment, model, len(runs) * num_groups, devices, shared_batch=False
  )
  state = program.place(
      [
          _start(run, model, group_id, num_groups)
          for run in runs
          for group_id in range(num_groups)
      ]
  )
  exchange = StackedExchange(
      runs[0].plan, len(runs), num_groups, state.step.sharding
  )
  records = _Records(
      runs[0], model, seeds, num_groups, program, exchange, on_record
  )
  evaluation = _Evaluation(
      runs[0], model, len(runs), num_groups, state.step.sharding, ensembles
  )
  stream = _Stacked(
      [
          experiment_lib.train_stream(run, group_id, num_groups)
          for run in runs
          for group_id in range(num_groups)
      ]
  )
  with contextlib.closing(records):
    return _train(
        program, state, stream, exchange, records, evaluation, should_stop
    )


def configured(experiment: Experiment, seed: int) -> Experiment:
  """The experiment of one seed, in lockstep."""
  order = experiment.data_seed
  order = experiment.seed if order is None else order
  return dataclasses.replace(
      experiment,
      exchange_mode='lockstep',
      seed=experiment.seed + seed,
      data_seed=order + seed,
  )


def _train(
    program: Population,
    state: TrainState,
    stream: Stream,
    exchange: StackedExchange,
    records: '_Records',
    evaluation: '_Evaluation',
    should_stop: Callable[[], bool],
) -> Outcome:
  """Fetch, update, record, publish, evaluate; in that order."""
  experiment = records.experiment
  step, stopped = 0, False
  batches = group.prefetch(stream, 0, experiment.num_steps)
  with contextlib.closing(batches):
    while step < experiment.num_steps and records.alive_N.any():
      stopped = should_stop()
      if stopped:
        break
      held = time.perf_counter()
      weight = float(experiment.distill_weight(step))
      teachers = exchange.fetch(step) if weight else None
      held = time.perf_counter() - held
      state, metrics = program(state, next(batches), teachers, weight)
      step += 1
      records.add(step, metrics, weight, teachers is not None, 1e3 * held)
      if exchange.due(step):
        records.log(step)  # Who has diverged does not publish.
        exchange.publish(step, state.variables, records.alive_N)
      elif records.due(step):
        records.log(step)
      if evaluation.due(step):
        with records.clock_stopped():
          stopped = not evaluation(state.variables, step, records, should_stop)
        if stopped:
          break
  return Outcome(
      step,
      stopped,
      records.diverged_at,
      {
          member: program.collect(state, n).variables
          for n, member in enumerate(records.members)
      },
  )


def _start(
    experiment: Experiment, model: Model, group_id: int, num_groups: int
) -> TrainState:
  """As `driver.new_state` makes it."""
  state = step_lib.init_state(
      model,
      experiment.optimizer,
      jax.random.fold_in(jax.random.PRNGKey(experiment.seed), group_id),
      experiment_lib.first_row(experiment, num_groups),
      num_peers=experiment_lib.num_teachers(experiment, group_id, num_groups),
      group_batch=experiment.group_batch,
  )
  return base.host_copy(state)


class _Stacked:
  """The streams of all members as one, of batches (N, B, ...)."""

  def __init__(self, streams: Sequence[Stream]):
    self._streams = streams

  def batch(self, step: int) -> dict[str, Any]:
    batches = [dict(stream.batch(step)) for stream in self._streams]
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


class _Evaluation:
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
    self._num_groups, self._num_members = num_groups, num_seeds * num_groups
    self._sharding = sharding
    one = experiment_lib.make_eval_step(experiment, model)
    members = jax.vmap(one, in_axes=(0, None, 0))
    compare = jax.vmap(evaluate.make_compare_step(model), in_axes=(0, None, 0))

    def step(variables, batch, carry):
      if not ensembles:
        sums, carry = members(variables, batch, carry)
        return [sums], carry
      apart = lambda tree: self._apart(tree, num_seeds)
      sums, carries = compare(apart(variables), batch, apart(carry))
      # Seed by seed again.
      together = lambda *xs: jax.numpy.stack(xs, axis=1).reshape(
          self._num_members, *xs[0].shape[1:]
      )
      return [
          jax.tree.map(together, *sums.members),
          sums.ensemble,
      ], jax.tree.map(together, *carries)

    whole = jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec()
    )
    self._step = jax.jit(step, out_shardings=(whole, sharding))
    self._batches: Sequence[base.Batch] | None = None

  def due(self, step: int) -> bool:
    experiment = self._experiment
    return step == experiment.num_steps or step % experiment.eval_every == 0

  def __call__(
      self,
      variables: Variables,
      step: int,
      records: '_Records',
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

  def _apart(self, tree: base.PyTree, num_seeds: int) -> list[base.PyTree]:
    """For each group, its members (S, ...) of all seeds."""
    return [
        jax.tree.map(
            lambda x, g=g: x.reshape(num_seeds, self._num_groups, *x.shape[1:])[
                :, g
            ],
            tree,
        )
        for g in range(self._num_groups)
    ]


class _Records:
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
      exchange: StackedExchange,
      on_record: OnRecord,
  ):
    """Has recorded nothing yet."""
    self.experiment = experiment
    self.members = [(seed, g) for seed in seeds for g in range(num_groups)]
    self.alive_N = np.ones(len(self.members), bool)
    self.diverged_at: dict[Member, int] = {}
    self._seeds = list(seeds)
    self._num_devices = exchange.num_devices
    self._program, self._exchange = program, exchange
    self._on_record = on_record
    row = experiment_lib.first_row(experiment, num_groups)
    tokens = int(np.prod(np.shape(row['labels'])[1:]))
    self._examples = experiment.group_batch * tokens
    job = Job(experiment, model, program, '', 0, num_groups)
    start = _start(experiment, model, 0, num_groups)
    self._efficiency = Efficiency(job, start, row)
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
      stall_ms: float,
  ) -> None:
    """Takes note of an update of all members."""
    self._metrics.append(metrics)
    self._taught.append(taught)
    self._weight, self._stall_ms = weight, self._stall_ms + stall_ms
    self._efficiency.seen(taught)
    if self._clock is None:
      jax.block_until_ready(metrics)
      self._clock, self._logged = time.perf_counter(), step

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
  def clock_stopped(self):
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
