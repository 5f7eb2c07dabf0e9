"""Everything around the loop of one group: resume, log, evaluate, save, stop.

Shared by the binaries that train. `run_group` writes nothing; this does.
"""

import dataclasses
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from codistill_jax import evaluate, gin_utils, replicas, run_directory, writers
from codistill_jax import step as step_lib
from codistill_jax.base import ALONE, Agreement, Model, TrainState, Variables
from codistill_jax.checkpoint import Checkpoints
from codistill_jax.checkpoint_exchange import Interrupted
from codistill_jax.exchange import Exchange
from codistill_jax.experiment import Experiment
from codistill_jax.group import StepResult, run_group
from experiments.cli import Stopped

# Set by a supervisor to the command that a user typed.
COMMAND_VARIABLE = 'CODISTILL_COMMAND'

_STATUS_SECONDS = 2.0


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
  """

  experiment: Experiment
  model: Model
  train_step: replicas.PmapStep
  workdir: str
  group_id: int
  num_groups: int
  agreement: Agreement = ALONE
  stop: Callable[[], bool] = lambda: False

  @property
  def identity(self) -> dict[str, str]:
    return {k: str(v) for k, v in self.experiment.task.identity.items()}


def new_state(job: Job) -> tuple[TrainState, Any]:
  """The group's state before the first update, and its stream."""
  experiment = job.experiment
  replicas.check_group_batch(
      experiment.group_batch, job.train_step.num_replicas
  )
  stream = experiment.task.train_stream(
      group_id=job.group_id,
      num_groups=job.num_groups,
      group_batch=experiment.group_batch,
      rows=replicas.process_rows(experiment.group_batch),
  )
  state = step_lib.init_state(
      job.model,
      experiment.optimizer,
      jax.random.fold_in(jax.random.PRNGKey(experiment.seed), job.group_id),
      stream.batch(0),
      num_peers=job.num_groups - 1,
      group_batch=experiment.group_batch,
  )
  return state, stream


def train(
    job: Job,
    make_exchange: Callable[[Variables], Exchange],
    writer_of: Callable[[int], writers.Writer],
) -> Iterator[int]:
  """Trains one group to its last step; yields the step after each update.

  Args:
    job: The group.
    make_exchange: Variables of the group -> its exchange; closed at the end.
    writer_of: Step to resume from -> where metrics go.

  Raises:
    Stopped: After `job.stop` became true and everything was saved.
    FloatingPointError: If the loss is not finite; the checkpoints before stay.
    ValueError: If what is in the run directory does not fit.
  """
  primary = job.agreement.is_primary
  if run_directory.done_path(job.workdir, job.group_id).exists():
    return
  fresh, stream = new_state(job)
  checkpoints = Checkpoints(
      run_directory.checkpoints_dir(job.workdir, job.group_id),
      identity=job.identity,
  )
  resume = checkpoints.restore(fresh)
  state = resume.state if resume else fresh
  exchange = make_exchange(state.variables)
  start = int(state.step)
  writer = writer_of(start) if primary else writers.NullWriter()
  row_shape = stream.batch(0)['labels'].shape[1:]
  examples = job.experiment.group_batch * int(np.prod(row_shape))
  watch = _Watch(job, exchange, writer, start, examples)
  try:
    if resume:
      exchange.restore(start, resume.teacher_steps)
      exchange.checkpointed(start)
    turns = run_group(
        job.train_step,
        state,
        stream,
        num_steps=job.experiment.num_steps,
        exchange=exchange,
        distill_weight=job.experiment.distill_weight,
    )
    result = None
    try:
      for result in turns:
        _after_update(job, result, watch, checkpoints, exchange)
        yield result.step
    except Interrupted:
      # Raised before an update, so the state after the last one still stands;
      # before the first one it is the one restored.
      if result is not None:
        _save_and_stop(job, result, checkpoints, exchange)
      raise _stopped(job, start) from None
    exchange.checkpointed(_finish_saving(checkpoints, start))
  finally:
    # In this order, and each even if the one before fails: what is closed
    # last is what a restart needs least.
    _close_all(checkpoints.close, exchange.close, writer.close)
  if primary:
    run_directory.write_bytes(
        run_directory.done_path(job.workdir, job.group_id), b''
    )
    watch.status(job.experiment.num_steps, 'done')


def _after_update(
    job: Job,
    result: StepResult,
    watch: '_Watch',
    checkpoints: Checkpoints,
    exchange: Exchange,
) -> None:
  """Log, evaluate, save; in that order."""
  experiment, step = job.experiment, result.step
  last = step == experiment.num_steps
  due = lambda every: last or step % every == 0
  stopping = _asked_to_stop(job, due(experiment.log_every))
  save = due(experiment.checkpoint_every)
  watch.add(result)
  if due(experiment.log_every) or save:
    watch.log(step)
  if due(experiment.eval_every) and not stopping and job.agreement.is_primary:
    watch.status(step, 'evaluating')
    watch.evaluate(step, result.state.variables)
  if stopping:
    _save_and_stop(job, result, checkpoints, exchange)
  if save:
    watch.status(step, 'saving')
    _save(job, result, checkpoints, exchange)
  if checkpoints.saved_step is not None:
    # A restart begins there: older publications are not asked for any more.
    exchange.checkpointed(checkpoints.saved_step)


def _asked_to_stop(job: Job, at_record: bool) -> bool:
  """All processes of a group stop at the same step, or they would hang."""
  if job.agreement is ALONE:
    return job.stop()
  if not at_record:
    return False
  return not job.agreement.all_true(np.array(not job.stop()))


def _save(
    job: Job, result: StepResult, checkpoints: Checkpoints, exchange: Exchange
) -> None:
  state = job.train_step.collect(result.state)  # All processes take part.
  if job.agreement.is_primary:
    steps = [None if p is None else p.step for p in exchange.in_use]
    checkpoints.save(state, steps)


def _save_and_stop(
    job: Job, result: StepResult, checkpoints: Checkpoints, exchange: Exchange
) -> None:
  if checkpoints.newest_step != result.step:
    _save(job, result, checkpoints, exchange)
  checkpoints.wait()
  raise _stopped(job, result.step)


def _stopped(job: Job, step: int) -> Stopped:
  return Stopped(
      f'group {job.group_id} stopped and saved at step {step}; the same'
      ' command goes on from there',
      getattr(job.stop, 'signal_number', None) or signal.SIGTERM,
  )


class _Watch:
  """Turns the results of a loop into records and signs of life."""

  def __init__(
      self,
      job: Job,
      exchange: Exchange,
      writer: writers.Writer,
      start: int,
      examples: int,
  ):
    """Starts to watch.

    Args:
      job: What is watched.
      exchange: The group's.
      writer: Where records go.
      start: The step before the first update.
      examples: Per update of the group.
    """
    self._job = job
    self._examples = examples
    self._exchange = exchange
    self._writer = writer
    self._eval_step = jax.jit(step_lib.make_eval_step(job.model))
    self._eval_batches = None
    self._results: list[dict] = []
    self._logged_step = start
    self._logged_time = time.perf_counter()
    self._started = time.time()
    self._status_time = 0.0
    self._speed: float | None = None
    self._first_step = start + 1
    self.status(start, 'compiling')

  def add(self, result: StepResult) -> None:
    self._results.append(result.metrics)
    if result.step == self._first_step:
      gin_utils.check_no_dead_bindings()
      save_config(self._job.workdir, self._job.agreement)
      # The first update includes compilation; it says nothing of the speed.
      self._restart_clock(result.step)
    if time.time() - self._status_time > _STATUS_SECONDS:
      self.status(result.step, 'training')

  def log(self, step: int) -> None:
    """Writes a record: losses are means since the last record."""
    if not self._results:
      return
    results = jax.device_get(self._results)
    newest = writers.as_floats(results[-1])
    for key in newest:
      if key.startswith('loss/'):
        found = [float(r[key]) for r in results if key in r]
        newest[key] = sum(found) / len(found)
    if not np.isfinite(newest['loss/total']):
      raise FloatingPointError(
          f'the loss of group {self._job.group_id} is'
          f' {newest["loss/total"]} at step {step}; lower the learning rate or'
          ' the distill weight; the last checkpoint is kept'
      )
    newest['exchange/stall_ms'] = sum(
        m['exchange/stall_ms'] for m in self._results
    )
    newest['exchange/rejected'] = float(self._exchange.rejected)
    steps = step - self._logged_step
    if steps > 0:
      seconds = time.perf_counter() - self._logged_time
      self._speed = steps / seconds
      newest['perf/steps_per_sec'] = self._speed
      newest['perf/examples_per_sec'] = self._speed * self._examples
    self._results = []
    self._restart_clock(step)
    self._writer.write(step, newest)

  def evaluate(self, step: int, variables: Variables) -> None:
    experiment, model = self._job.experiment, self._job.model
    start = time.perf_counter()
    if self._eval_batches is None:
      self._eval_batches = experiment.task.eval_batches(experiment.eval_batch)
    found = evaluate.evaluate(
        self._eval_step,
        # One device's copy: else every replica would evaluate everything.
        jax.tree.map(lambda x: x.addressable_shards[0].data, variables),
        self._eval_batches,
        model.init_carry(experiment.eval_batch),
        should_stop=self._job.stop,
    )
    if found is not None:
      self._writer.write(step, found)
    self._logged_time += time.perf_counter() - start

  def status(self, step: int, phase: str) -> None:
    """Replaces the sign of life in the run directory."""
    job = self._job
    if not job.agreement.is_primary:
      return
    self._status_time = time.time()
    run_directory.write_status(
        job.workdir,
        job.group_id,
        {
            'step': step,
            'num_steps': job.experiment.num_steps,
            'time': self._status_time,
            'started': self._started,
            'pid': os.getpid(),
            'host': socket.gethostname(),
            'phase': phase,
            'steps_per_sec': self._speed,
            'num_groups': job.num_groups,
            'teachers': [
                {'peer': p.group_id, 'step': p.step, 'time': p.time}
                for p in self._exchange.in_use
                if p is not None
            ],
        },
    )

  def _restart_clock(self, step: int) -> None:
    self._logged_step, self._logged_time = step, time.perf_counter()


def use_replicas(count: int) -> None:
  """Makes `count` fake CPU devices; before the first use of jax.

  Without effect on accelerators, whose devices are what they are.
  """
  if count < 0:
    raise ValueError(f'--replicas={count}; set it to 0 (all) or more')
  if count:
    jax.config.update('jax_num_cpu_devices', count)


def chosen_devices(count: int) -> list[jax.Device] | None:
  """The first `count` devices; None, all of them, for 0.

  Raises:
    ValueError: If this process has fewer.
  """
  if not count or jax.process_count() > 1:
    return None
  devices = jax.local_devices()
  if len(devices) < count:
    raise ValueError(
        f'--replicas={count}, but this process has {len(devices)} devices;'
        f' set --replicas to at most {len(devices)}'
    )
  return devices[:count]


def describe_run(job: Job, state: TrainState, arm: str) -> dict[str, Any]:
  """What run.json says; see `run_directory.write_run`."""
  experiment = job.experiment
  sizes = [x.size for x in jax.tree.leaves(state.variables.params)]
  burn_in = (
      n for n in range(experiment.num_steps) if experiment.distill_weight(n)
  )
  return {
      'arm': arm or os.path.basename(os.path.normpath(job.workdir)),
      'num_groups': job.num_groups,
      'replicas': job.train_step.num_replicas,
      'group_batch': experiment.group_batch,
      'seed': experiment.seed,
      'num_steps': experiment.num_steps,
      'burn_in_steps': next(burn_in, experiment.num_steps),
      'exchange_every': experiment.exchange_every,
      'mode': experiment.exchange_mode,
      'example': experiment.task.example_name,
      'data': experiment.task.description,
      'model_parameters': int(sum(sizes)),
      'command': os.environ.get(COMMAND_VARIABLE) or own_command(),
      'configuration': gin_utils.configuration(),
  }


def print_dry_run(job: Job, state: TrainState) -> None:
  """Prints what would be trained."""
  gin_utils.check_no_dead_bindings()
  print(gin_utils.operative_configuration())
  run = describe_run(job, state, '')
  print(
      f'{run["model_parameters"]:,} parameters; {run["num_groups"]} groups of'
      f' {run["replicas"]} replicas; dry run, nothing written'
  )


def claim_workdir(job: Job, state: TrainState, *, arm: str = '') -> None:
  """Writes run.json, or checks that it is of the same configuration.

  Raises:
    ValueError: If the run directory belongs to another configuration.
  """
  run = describe_run(job, state, arm)
  before = run_directory.read_run(job.workdir)
  if before:
    _check_same_run(job.workdir, before, run)
  else:
    run_directory.write_run(job.workdir, run)


def _check_same_run(workdir: str, before: dict, now: dict) -> None:
  ours, theirs = now['configuration'], before.get('configuration', [])
  if before.get('num_groups') != now['num_groups']:
    differing = (
        f'num_groups={before.get("num_groups")}',
        f'num_groups={now["num_groups"]}',
    )
  elif ours != theirs:
    differing = (
        next((s for s in theirs if s not in ours), 'no such binding'),
        next((s for s in ours if s not in theirs), 'no such binding'),
    )
  else:
    return
  raise ValueError(
      f'{workdir} holds a run of another configuration: it has {differing[0]},'
      f' this one has {differing[1]}; use another --workdir, or the first'
      ' configuration'
  )


def save_config(workdir: str, agreement: Agreement) -> None:
  """Writes the operative config, once."""
  path = run_directory.config_path(workdir)
  if agreement.is_primary and not path.exists():
    text = gin_utils.operative_configuration()
    run_directory.write_bytes(path, text.encode())


def group_writer(
    job: Job, *, progress: bool
) -> Callable[[int], writers.Writer]:
  """JSON lines and TensorBoard events always; progress if asked."""

  def make(start: int) -> writers.Writer:
    directory = run_directory.group_dir(job.workdir, job.group_id)
    directory.mkdir(parents=True, exist_ok=True)
    made = [
        writers.JsonlWriter(
            run_directory.metrics_path(job.workdir, job.group_id),
            resume_step=start,
        ),
        writers.TensorBoardWriter(
            run_directory.tensorboard_dir(job.workdir, job.group_id),
            resume_step=start,
        ),
    ]
    if progress:
      made.append(
          writers.ProgressWriter(
              job.experiment.num_steps,
              resume_step=start,
              name=f'group {job.group_id}',
          )
      )
    return writers.MultiWriter(made)

  return make


def _finish_saving(checkpoints: Checkpoints, start: int) -> int:
  saved = checkpoints.wait()
  return start if saved is None else saved


def _close_all(*closers: Callable[[], None]) -> None:
  """Calls all; raises the first error, unless one is on its way already."""
  errors = []
  for close in closers:
    try:
      close()
    except Exception as e:  # Raised below, once the others are closed.
      errors.append(e)
  if errors and sys.exc_info()[1] is None:
    raise errors[0]


def own_command() -> str:
  """The command of this process, as a user would type it."""
  name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
  return shlex.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])
