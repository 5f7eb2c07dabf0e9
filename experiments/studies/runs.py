"""Trains one run of a study, or all seeds of an arm as one program.

A run is a run directory as of any other training. All its groups are stepped
in turn in this process, in lockstep, each by `driver.train`: through memory,
or, if several runs are one program, through the devices. What was compiled for
one seed serves all others.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from codistill_jax import (
    base,
    evaluate,
    gin_utils,
    metrics,
    run_directory,
    writers,
)
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.base import Model, Variables
from codistill_jax.data.prepare import usable_cores
from codistill_jax.exchange import kinds
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files

from .. import cli
from ..cli import StopRequest
from ..reports import run_records
from ..running import driver
from ..running import job as job_lib
from ..running.job import Job
from . import retrains, seeds_together
from . import study_plan as plan_lib
from .configurations import Configurations, shared_by_seeds
from .study_plan import Arm, PlannedRun

LAST = 3  # Evaluations that the loss at the end is the mean of.

Outcome = dict[str, Any]


class _Compiled(NamedTuple):
  """What runs that differ in their seeds alone have in common."""

  key: Any
  optimizer: Any
  model: base.Model
  train_steps: Sequence[Any]
  stream: base.Stream | None


class _TrainedRun(NamedTuple):
  """A run in training."""

  planned: PlannedRun
  jobs: Sequence[Job]
  exchanges: Sequence[Any]


class Trainer:
  """Trains runs, and keeps what it has compiled for the last of them."""

  def __init__(
      self,
      configurations: Configurations,
      replicas: int,
      stop: StopRequest,
      one_program: bool,
  ):
    """Has trained nothing yet.

    Args:
      configurations: Of all runs.
      replicas: Devices of a group; 0 for all.
      stop: Whether to leave.
      one_program: Whether all seeds of an arm are trained as one program, where
        that can be.
    """
    self._configurations = configurations
    self._plan = configurations.plan
    self._replicas = replicas
    self._stop = stop
    self._one_program = one_program
    self._compiled: _Compiled | None = None

  def trains_together(self, run: PlannedRun) -> bool:
    """Returns whether all seeds of the run's arm are to be one program."""
    # Predictions of runs that were trained alike are the same to the bit.
    apart = self._plan.study.predictions or run.tuning or self._replicas > 1
    if apart or not self._one_program:
      return False
    experiment = self._configurations.configure(run)
    num_groups = self._plan.arm(run.arm).num_groups
    return seeds_together.possible(experiment, num_groups)

  def __call__(
      self,
      runs: Sequence[PlannedRun],
      say: Callable[[str], None],
      finish: Callable[[PlannedRun, Outcome], None],
  ) -> None:
    """Trains runs of one arm to their end; several of them as one program.

    Args:
      runs: They differ in their seeds alone.
      say: Told now and then how far they are.
      finish: Told of each that has ended what outcome.json says of it.

    Raises:
      Stopped: If asked to stop; the same command goes on from there.
    """
    began = time.time()
    experiments = [self._begin(run) for run in runs]
    together = len(runs) > 1
    latch = job_lib.Latch(self._stop)
    prepare = self._as_one_program if together else self._in_turn
    trained = prepare(runs, experiments, latch)
    rounds = [
        self._rounds(run, began, len(runs), say, finish) for run in trained
    ]
    with contextlib.ExitStack() as stack:
      for each in rounds:
        stack.enter_context(contextlib.closing(each))
      job_lib.train_in_turn(rounds, latch)

  def _begin(self, run: PlannedRun) -> Experiment:
    """Configures a run; what it has left under another configuration goes."""
    experiment = self._configurations.configure(run)
    directory = plan_lib.run_dir(self._configurations.workdir, run)
    before = run_directory.read_run(directory).get('configuration')
    if before is not None and before != gin_utils.configuration():
      cli.tell(f'{run.name} begins again: its configuration was corrected')
      # Not the directory itself, which is locked. Last, what says that: killed
      # before, it would go on from what is left.
      there = files.names(directory)
      for name in sorted(there, key=lambda name: name == 'run.json'):
        files.remove_tree(epath.Path(directory) / name)
    return experiment

  def _in_turn(
      self,
      runs: Sequence[PlannedRun],
      experiments: Sequence[Experiment],
      latch: job_lib.Latch,
  ) -> list[_TrainedRun]:
    """Prepares one run, whose groups exchange through memory."""
    (run,), (experiment,) = runs, experiments
    num_groups = self._plan.arm(run.arm).num_groups
    compiled = self._compile(run, experiment)
    # The same optimiser, model and step: nothing is compiled again.
    experiment = dataclasses.replace(experiment, optimizer=compiled.optimizer)
    made = self._run(
        run,
        experiment,
        compiled.model,
        # A seat for each group, or one step for whatever many there are.
        (list(compiled.train_steps) * num_groups)[:num_groups],
        latch,
        shared_stream=compiled.stream,
    )
    exchange = experiment.exchange
    if self._plan.study.predictions and isinstance(exchange, Checkpoints):
      # Short runs that exchange often: none of it on disk is worth the time.
      can_resume = functools.partial(seeds_together.can_resume, exchange)
      job_lib.keep_common_checkpoints(made.jobs, can_resume)
      exchanges = memory_exchanges(len(made.jobs), plan=exchange)
    else:
      job_lib.keep_common_checkpoints(made.jobs)
      start = driver.new_state(made.jobs[0])
      start.efficiency.close()
      exchanges = exchange.join_all(
          made.jobs[0], start.state.variables, start.examples
      )
    return [made._replace(exchanges=exchanges)]

  def _compile(self, run: PlannedRun, experiment: Experiment) -> _Compiled:
    """Makes the step of a run, or keeps it if only seeds differ."""
    # Under this configuration, even if it is thrown away: what makes no model
    # would have dead bindings.
    model = gin_utils.call(experiment_lib.make_model, experiment)
    arm = self._plan.arm(run.arm)
    # The number of groups matters where these are one program alone.
    groups = arm.num_groups if experiment.exchange.one_program else 0
    key = shared_by_seeds(), groups
    compiled = self._compiled
    # Groups of one program keep a state of their own in their step.
    if (
        compiled is None
        or key != compiled.key
        or experiment.exchange.one_program
    ):
      # One program at a time is enough of memory.
      compiled = self._compiled = None
      steps, stream = job_lib.train_steps_of(
          experiment, model, arm.num_groups, self._replicas
      )
      compiled = _Compiled(key, experiment.optimizer, model, steps, stream)
      self._compiled = compiled
    return compiled

  def _as_one_program(
      self,
      runs: Sequence[PlannedRun],
      experiments: Sequence[Experiment],
      latch: job_lib.Latch,
  ) -> list[_TrainedRun]:
    """Prepares several runs, whose groups exchange through the devices."""
    self._compiled = None
    first = experiments[0]
    # One optimiser, and the data are loaded once.
    experiments = [
        dataclasses.replace(e, optimizer=first.optimizer, task=first.task)
        for e in experiments
    ]
    model = gin_utils.call(experiment_lib.make_model, first)
    places, stream = seeds_together.make_places(
        experiments,
        model,
        self._plan.arm(runs[0].arm).num_groups,
        job_lib.chosen_devices(self._replicas),
    )
    made = [
        self._run(
            run,
            experiment,
            model,
            [seat for seat, _ in of_seed],
            latch,
            shared_stream=stream,
            configuration=functools.cache(gin_utils.current),
        )._replace(exchanges=[exchange for _, exchange in of_seed])
        for run, experiment, of_seed in zip(runs, experiments, places)
    ]
    job_lib.keep_common_checkpoints(
        [job for run in made for job in run.jobs],
        lambda step: seeds_together.can_resume(first.exchange, step),
    )
    return made

  def _run(
      self,
      run: PlannedRun,
      experiment: Experiment,
      model: base.Model,
      train_steps: Sequence[Any],
      latch: job_lib.Latch,
      **kwargs: Any,
  ) -> _TrainedRun:
    """Returns a run without its exchanges."""
    arm = self._plan.arm(run.arm)
    directory = plan_lib.run_dir(self._configurations.workdir, run)
    if arm.num_groups > 1 and any(
        other.ensemble_of == arm.name for other in self._plan.declared
    ):
      path = plan_lib.ensemble_path(directory)
      kwargs['evaluated'] = _ensemble_of(
          model, experiment, path, arm.num_groups
      )
    jobs = [
        Job(
            experiment=experiment,
            model=model,
            train_step=train_step,
            workdir=str(directory),
            group_id=group_id,
            num_groups=arm.num_groups,
            stop=latch,
            arm=arm.name,
            **kwargs,
        )
        for group_id, train_step in enumerate(train_steps)
    ]
    return _TrainedRun(run, jobs, ())

  def _rounds(
      self,
      run: _TrainedRun,
      began: float,
      together: int,
      say: Callable[[str], None],
      finish: Callable[[PlannedRun, Outcome], None],
  ) -> Iterator[None]:
    """Steps all groups of a run until they are done or one diverges."""
    experiment = run.jobs[0].experiment
    diverged_at = None
    steps = dict.fromkeys(range(len(run.jobs)), 0)

    def counted(group_id: int, group: Iterator[int]) -> Iterator[int]:
      of = f'{experiment.num_steps:,}{", all seeds" if together > 1 else ""}'
      for step in group:
        steps[group_id] = step
        say(f'step {step:,} of {of}')
        yield step

    with contextlib.ExitStack() as stack:
      groups = [
          stack.enter_context(
              contextlib.closing(
                  driver.train(
                      job,
                      lambda _, x=exchange: x,
                      functools.partial(_make_writer, job),
                  )
              )
          )
          for job, exchange in zip(run.jobs, run.exchanges)
      ]
      groups = [counted(i, group) for i, group in enumerate(groups)]
      if together > 1:
        # Another run of the program was configured last.
        made = self._configurations.configure(run.planned)
        gin_utils.call(experiment_lib.make_model, made)
      try:
        for _ in job_lib.in_turn(groups):
          if together > 1:
            run.jobs[0].configuration()  # Kept, as of the first round.
          yield
      except FloatingPointError:
        diverged_at = min(steps.values()) + 1  # Who did not get through it.
        for job in run.jobs if together > 1 else ():
          job.train_step.leave()
    job = run.jobs[0]
    if self._plan.study.predictions:
      if diverged_at is not None:
        raise FloatingPointError(
            f'{run.planned.name} diverged at step {diverged_at}; lower the'
            ' learning rate or the distill weight'
        )
      _leave_predictions(
          self._configurations.workdir, job.workdir, experiment, job.model
      )
    outcome = _describe(
        run.planned,
        self._plan.arm(run.planned.arm),
        experiment,
        job.workdir,
        rate=self._configurations.rate(run.planned),
        diverged_at=diverged_at,
        began=began,
        together=together,
    )
    finish(run.planned, outcome)


def _describe(
    run: PlannedRun,
    arm: Arm,
    experiment: Experiment,
    directory: files.PathLike,
    *,
    rate: float | None,
    diverged_at: int | None,
    began: float,
    together: int,
) -> Outcome:
  """Returns what outcome.json says of a run that has just ended."""
  num_peers = [
      experiment.exchange.num_teachers(g, arm.num_groups)
      for g in range(arm.num_groups)
  ]
  row = experiment_lib.first_row(experiment, arm.num_groups)
  examples = experiment.group_batch * int(np.prod(np.shape(row['labels'])[1:]))
  return {
      'run': run._asdict(),
      'rate': rate,
      'seed': experiment.seed,
      'data_seed': experiment.data_seed,
      'num_groups': arm.num_groups,
      'num_steps': experiment.num_steps,
      'exchange_every': experiment.exchange.every,
      'burn_in_steps': next(
          filter(experiment.distill_weight, range(experiment.num_steps)),
          experiment.num_steps,
      ),
      'peers': float(np.mean(num_peers)),
      'outer_every': getattr(experiment.method, 'inner_steps', 1),
      'examples_per_step': examples * arm.num_groups,
      'diverged_at': diverged_at,
      'loss': _last_loss(directory, arm.num_groups),
      'together': together,
      'began': began,
      'ended': time.time(),
      'jax': jax.__version__,
      'cores': usable_cores(),
  }


def _last_loss(directory: files.PathLike, num_groups: int) -> float:
  """Returns the mean validation loss of groups and last evaluations."""
  found = []
  for group_id in range(num_groups):
    path = run_directory.metrics_path(directory, group_id)
    losses = run_records.read_group(path, group_id).curve('eval/loss')
    found += losses.tolist()[-LAST:]
  return float(np.mean(found)) if found else float('nan')


def _make_writer(job: Job, start: int) -> writers.Writer:
  path = run_directory.metrics_path(job.workdir, job.group_id)
  return writers.JsonlWriter(path, resume_step=start, troubles=job.troubles)


def _ensemble_of(
    model: base.Model,
    experiment: Experiment,
    path: files.PathLike,
    num_groups: int,
) -> Callable[[int, int, Variables], None]:
  """Returns what evaluates the mean prediction of all groups.

  The groups are stepped in turn, so what the first ones have given is intact
  when the last one comes.
  """
  given: dict[int, Variables] = {}

  def evaluated(group_id: int, step: int, variables: Variables) -> None:
    given[group_id] = variables
    if len(given) < num_groups:
      return
    members = [given.pop(g) for g in range(num_groups)]
    batches = experiment.task.eval_batches(experiment.eval_batch)
    found = evaluate.compare(model, members, batches)
    writer = writers.JsonlWriter(path, resume_step=step - 1)
    with contextlib.closing(writer):
      writer.write(step, found.ensemble)

  return evaluated


# --- Predictions -------------------------------------------------------------

# Of a study that keeps the predictions of dozens of models.
_MOST_BYTES = 2**30


def _leave_predictions(
    workdir: files.PathLike,
    directory: files.PathLike,
    experiment: Experiment,
    model: Model,
) -> None:
  """Writes the predictions of all groups of a run, and the labels.

  Args:
    workdir: Of the study.
    directory: Of the run, which has ended.
    experiment: Its configuration.
    model: Its model.

  Raises:
    ValueError: If the labels are not those of the runs before.
  """
  like = jax.eval_shape(
      model.init,
      jax.random.PRNGKey(0),
      experiment_lib.first_row(experiment, 1),
  )
  identity = {k: str(v) for k, v in experiment.task.identity.items()}
  for source in kinds.find_teachers([directory]):
    loaded = kinds.load_teachers([source], like, identity)
    variables = jax.tree.map(lambda x: x[0], loaded.variables)
    for split in retrains.SPLITS:
      found, labels = _predict(experiment, model, variables, split)
      retrains.keep_labels(workdir, split, labels)
      retrains.write_predictions(directory, source.group_id, split, found)


def _predict(
    experiment: Experiment, model: Model, variables: Variables, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns probabilities, (N,) or (N, C), and labels on a split.

  Where there is no test split they are of validation. Padding is left out.
  """
  step, task = _predict_step(model), experiment.task
  parts, labels, carry, size = [], [], None, 0
  there = split if split != 'test' or task.test_batches else 'validation'
  rows = experiment.eval_batch
  for batch in experiment_lib.split_batches(task, there, rows):
    if carry is None:
      carry = model.init_carry(len(batch['labels']))
    probs, carry = step(variables, dict(batch), carry)
    real = step_lib.example_weights(batch) > 0
    parts.append(np.asarray(probs)[real])
    labels.append(np.asarray(batch['labels'])[real])
    size += parts[-1].nbytes
    if size > _MOST_BYTES:
      raise ValueError(
          f'the predictions of one model on the {split} split are more than'
          f' {_MOST_BYTES >> 20} MB; take a smaller split, such as by'
          ' max_eval_batches'
      )
  return np.concatenate(parts), np.concatenate(labels)


# Compiled once for all runs of a model.
@functools.lru_cache(maxsize=4)
def _predict_step(model: Model) -> Callable[..., tuple]:
  def predict(variables, batch, carry):
    outputs, updates = base.forward(model, variables, batch, carry, None, False)
    logits = base.logits_of(outputs)
    if logits.shape == batch['labels'].shape:
      return jax.nn.sigmoid(logits), updates.carry
    logits = metrics.class_logits(logits, batch['labels'])
    return jax.nn.softmax(logits), updates.carry

  return jax.jit(predict)
