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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from codistill_jax import base, evaluate, group
from codistill_jax import experiment as experiment_lib
from codistill_jax.base import Model, Stream, Teachers, TrainState, Variables
from codistill_jax.exchange import Checkpoints, FixedTeachers
from codistill_jax.experiment import Experiment
from codistill_jax.one_program import Population
from experiments.studies.population_exchange import (
    StackedExchange,
    StackedTeachers,
    peers_of_all,
)
from experiments.studies.population_records import (
    ENSEMBLE,
    AnyExchange,
    Evaluation,
    Member,
    OnRecord,
    Records,
)

__all__ = ['ENSEMBLE', 'Outcome', 'configured', 'train_population']


class Outcome(NamedTuple):
  """What has become of the members, each a seed and a group.

  Attributes:
    step: Updates done.
    stopped: Whether `should_stop` ended it.
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
    teachers: Sequence[Teachers] = (),
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
      keys of the records of a run directory. `perf/utilisation` is that of a
      device by all members on it.
    should_stop: Asked before every update and batch of an evaluation; what is
      trained so far cannot be taken up again.
    teachers: With `exchange.FixedTeachers`: those of each seed, from
      `fixed_teachers.load`.
    ensembles: Whether evaluations have a record of group `ENSEMBLE` too.
    devices: As of `Population`.

  Raises:
    ValueError: If the groups exchange predictions, their numbers of peers
      differ, or there are not as many `teachers` as the experiment says.
  """
  _check(experiment, seeds, num_groups, teachers)
  runs = [configured(experiment, seed) for seed in seeds]
  members = [(run, group_id) for run in runs for group_id in range(num_groups)]
  program = experiment_lib.make_population(
      experiment, model, len(members), devices, shared_batch=False
  )
  state = program.place(
      [_start(run, model, group_id, num_groups) for run, group_id in members]
  )
  sharding = state.step.sharding
  if isinstance(runs[0].exchange, Checkpoints):
    exchange = StackedExchange(
        runs[0].exchange, len(runs), num_groups, sharding
    )
  else:
    each = [one for one in teachers for _ in range(num_groups)]
    exchange = StackedTeachers(program.place_teachers(each))
  records = Records(
      runs[0], model, seeds, num_groups, program, exchange, state, on_record
  )
  evaluation = Evaluation(
      runs[0], model, len(runs), num_groups, sharding, ensembles
  )
  stream = _Stacked(
      [
          experiment_lib.train_stream(run, group_id, num_groups)
          for run, group_id in members
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
      experiment_lib.in_lockstep(experiment),
      seed=experiment.seed + seed,
      data_seed=order + seed,
  )


def _check(
    experiment: Experiment,
    seeds: Sequence[int],
    num_groups: int,
    teachers: Sequence[Teachers],
) -> None:
  """Raises ValueError as `train_population`."""
  kind = experiment.exchange
  if kind.one_program:
    raise ValueError(
        'a population exchanges parameters, but Experiment.exchange is'
        f' {kind}; train its groups by experiments.train_lockstep'
    )
  wanted = len(seeds) if isinstance(kind, FixedTeachers) else 0
  if len(teachers) != wanted:
    raise ValueError(
        f'with Experiment.exchange={kind!r} and {len(seeds)}'
        f' seeds a population has {wanted} teachers=, not {len(teachers)}'
    )
  if isinstance(kind, Checkpoints):
    peers_of_all(kind, num_groups)


def _train(
    program: Population,
    state: TrainState,
    stream: Stream,
    exchange: AnyExchange,
    records: Records,
    evaluation: Evaluation,
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
      weight = float(experiment.distill_weight(step))
      with _held_up(records):
        teachers = exchange.fetch(step) if weight else None
      state, metrics = program(state, next(batches), teachers, weight)
      step += 1
      records.add(step, metrics, weight, teachers is not None)
      if exchange.due(step) or records.due(step):
        records.log(step)
      if exchange.due(step):
        # After the records: who has diverged by then teaches nobody.
        with _held_up(records):
          exchange.publish(step, state.variables, records.alive_N)
      if evaluation.due(step):
        with records.clock_stopped():
          stopped = not evaluation(state.variables, step, records, should_stop)
        if stopped:
          break
  learnt = {
      member: program.collect(state, n).variables
      for n, member in enumerate(records.members)
  }
  return Outcome(step, stopped, records.diverged_at, learnt)


@contextlib.contextmanager
def _held_up(records: Records) -> Iterator[None]:
  """What is done inside is time that the exchange takes."""
  start = time.perf_counter()
  yield
  records.held_up(1e3 * (time.perf_counter() - start))


def _start(
    experiment: Experiment, model: Model, group_id: int, num_groups: int
) -> TrainState:
  """As `driver.new_state` makes it."""
  experiment_lib.check_group_batch(experiment, 1)
  state = experiment_lib.init_state(
      experiment,
      model,
      jax.random.fold_in(jax.random.PRNGKey(experiment.seed), group_id),
      experiment_lib.first_row(experiment, num_groups),
      num_peers=experiment.exchange.num_teachers(group_id, num_groups),
  )
  return base.host_copy(state)


class _Stacked:
  """The streams of all members as one, of batches (N, B, ...)."""

  def __init__(self, streams: Sequence[Stream]):
    self._streams = streams

  def batch(self, step: int) -> dict[str, Any]:
    batches = [dict(stream.batch(step)) for stream in self._streams]
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)
