"""The training driver of one group: resumes, logs, evaluates, saves, stops.

Shared by the binaries that train. `run_group` writes nothing; this does.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from codistill_jax import (
    base,
    gin_utils,
    replicas,
    run_directory,
    writers,
)
from codistill_jax import experiment as experiment_lib
from codistill_jax.base import ALONE, Stream, TrainState, Variables
from codistill_jax.exchange.plan import (
    Exchange,
    check_finite,
)
from codistill_jax.experiment import first_row, train_stream
from codistill_jax.group import StepResult, run_group
from codistill_jax.storage import checkpoints as storage
from codistill_jax.storage import files, leases
from codistill_jax.storage.background import BackgroundWriter, Interrupted
from codistill_jax.storage.resume import Resume, ResumeCheckpoints

from .. import cli
from ..cli import Stopped
from . import processes
from .job import (
    Job,
    claim_workdir,
    describe_devices,
    initial_variables,
)
from .watch import Efficiency, Heartbeat, Watch, check_profile, profiled


class GroupStart(NamedTuple):
  """The start of a group.

  Attributes:
    state: Before the first update, in numpy.
    stream: Of its batches; nothing is read yet.
    examples: How many an update takes, over the whole group.
    efficiency: Of its updates.
  """

  state: TrainState
  stream: Stream
  examples: int
  efficiency: Efficiency


def new_state(job: Job) -> GroupStart:
  """Returns the start of a group that has no checkpoint."""
  experiment = job.experiment
  experiment_lib.check_group_batch(experiment, job.train_step.num_replicas)
  stream = job.shared_stream or train_stream(
      experiment,
      job.group_id,
      job.num_groups,
      replicas.process_rows(experiment.group_batch),
  )
  row = first_row(experiment, job.num_groups)
  init = functools.partial(
      experiment_lib.init_state,
      experiment,
      job.model,
      jax.random.fold_in(jax.random.PRNGKey(experiment.seed), job.group_id),
      row,
      num_peers=experiment.exchange.num_teachers(job.group_id, job.num_groups),
  )
  variables = None
  if job.init_from:
    variables = initial_variables(job, jax.eval_shape(init).variables)
  state = init(variables=variables)
  # Not on a device, where it would stay beside the state in training.
  return GroupStart(
      base.host_copy(state),
      stream,
      experiment.group_batch * int(np.prod(np.shape(row['labels'])[1:])),
      Efficiency(job, state, row),
  )


def check_start(job: Job, start: GroupStart) -> None:
  """Names the devices; traces an update and an evaluation; warns.

  Of numbers that act nowhere.

  Raises:
    ValueError: One line, if the task or the model breaks its contract.
  """
  experiment, step = job.experiment, job.train_step
  check_profile(job)
  if job.agreement.is_primary:
    used = describe_devices(
        step.num_replicas,
        jax.process_count(),
        step.device_kind,
        processes.accelerators() if processes.may_have_accelerator() else 0,
    )
    cli.tell(f'group {job.group_id}: {used}')
  saved = run_directory.checkpoints_dir(job.workdir, job.group_id)
  if run_directory.newest_saved(saved) is None:  # Else both have been done.
    with experiment_lib.naming('the update cannot be traced'):
      start.efficiency.trace()
    experiment_lib.check_evaluation(
        experiment, job.model, start.state.variables
    )
  idle = experiment_lib.idle_settings(
      experiment, job.num_groups, start.state.variables.params
  )
  idle += gin_utils.steps_out_of(experiment.num_steps)
  if idle and job.agreement.is_primary:
    cli.tell(
        f'warning: {"; ".join(idle)}; but the run ends at'
        f' Experiment.num_steps = {experiment.num_steps}',
        error=True,
    )


def train(
    job: Job,
    make_exchange: Callable[[Variables], Exchange],
    writer_of: Callable[[int], writers.Writer],
) -> Iterator[int]:
  """Trains one group to its last step; yields the step after each update.

  A group of those that update together yields once before, at its start.

  Args:
    job: The group.
    make_exchange: Variables of the group -> its exchange; closed at the end.
    writer_of: Step to resume from -> where metrics go.

  Raises:
    Stopped: After `job.stop` became true and everything was saved.
    TimeoutError: If the disk still fails when all else is done.
    leases.LostError: If another process has taken over the group.
    FloatingPointError: If the loss is not finite; the checkpoints before stay.
    ValueError: If what is in the run directory does not fit.
  """
  done = run_directory.done_path(job.workdir, job.group_id)
  if files.exists(done) and not _goes_on(job):
    return
  with Heartbeat(job) as heartbeat:
    yield from _train(job, make_exchange, writer_of, heartbeat)
    if job.agreement.is_primary:
      _write_done(job)
    heartbeat.tell(job.experiment.num_steps, 'done')
  _meet(job)


def _train(
    job: Job,
    make_exchange: Callable[[Variables], Exchange],
    writer_of: Callable[[int], writers.Writer],
    heartbeat: Heartbeat,
) -> Iterator[int]:
  state, stream, examples, efficiency = new_state(job)
  # Closed in reverse order, each even if another fails.
  with contextlib.ExitStack() as stack:
    stack.callback(job.stop.unsaved.pop, job.directory, None)
    with _stopping_in_time(job):
      lease = _lease(job)
    stack.push(_closing(lease.release))
    if job.agreement.is_primary:
      _clear_up(job)  # Before the heartbeat writes there.
      files.remove(run_directory.done_path(job.workdir, job.group_id))
    heartbeat.begin()

    def before_saving(step: int) -> None:
      lease.check()
      exchange.settle(step)

    checkpoints = ResumeCheckpoints(
        run_directory.checkpoints_dir(job.workdir, job.group_id),
        identity=job.identity,
        troubles=job.troubles,
        check=before_saving,
        patience=job.patience,
    )
    stack.push(_closing(checkpoints.close))
    resume = _restore(job, checkpoints, state)
    state = resume.state if resume else state
    start = int(state.step)
    with _stopping_in_time(job):
      exchange = make_exchange(state.variables)
    stack.push(_closing(exchange.close))
    stack.push(functools.partial(_tell, exchange))
    heartbeat.exchange = exchange
    keeper = _Keeper(job, checkpoints, exchange, start)
    writer = writers.NullWriter()
    if job.agreement.is_primary:
      writer = writer_of(start)
    stack.push(_closing(writer.close))
    stack.callback(efficiency.close)
    watch = Watch(job, heartbeat, writer, start, examples, efficiency)
    if resume:
      exchange.restore(start, resume.teacher_steps)
      exchange.checkpointed(checkpoints.restart_step)
      if not _evaluate_what_was_missed(job, watch, resume.state):
        raise _stopped(job, start)
    if (expected := _teachers_expected(job, start)) == start:
      _expect_teachers(job, efficiency)
    turns = run_group(
        job.train_step,
        state,
        stream,
        num_steps=job.experiment.num_steps,
        exchange=exchange,
        distill_weight=job.experiment.distill_weight,
    )
    turns = stack.enter_context(contextlib.closing(profiled(job, turns, start)))
    del state, resume  # A whole state, that training goes on without.
    claimed = False
    try:
      if job.shared_stream is not None:
        yield start
      for result in turns:
        keeper.updated(result)
        if result.step == expected:
          _expect_teachers(job, efficiency)
        first = result.step == start + 1
        if first:
          gin_utils.check_no_dead_bindings()
        if first or not (claimed or result.step % job.experiment.log_every):
          claimed = _claim(job, result)
        _after_update(job, result, watch, keeper)
        yield result.step
    except Interrupted:
      # Raised before an update, so the state after the last one still stands.
      keeper.save_and_stop()
    checkpoints.wait()
    exchange.checkpointed(checkpoints.restart_step)


def _teachers_expected(job: Job, start: int) -> int | None:
  """Returns after which update to compile for teachers; None: it has none.

  At the start, beside the updates of burn-in. Where those are many, after the
  first record, which would come later by half.
  """
  experiment = job.experiment
  steps = range(start, experiment.num_steps)
  taught = next(filter(experiment.distill_weight, steps), None)
  if taught is None:
    return None
  record = min(experiment.log_every, experiment.exchange.every or math.inf)
  return start + (record if taught - start >= 4 * record else 0)


def _expect_teachers(job: Job, efficiency: Efficiency) -> None:
  if (teachers := efficiency.teachers()) is not None:
    job.train_step.expect(teachers)


def _after_update(
    job: Job, result: StepResult, watch: Watch, keeper: '_Keeper'
) -> None:
  """Logs, evaluates and saves, in that order, what is due."""
  experiment, step = job.experiment, result.step
  last = step == experiment.num_steps
  due = lambda every: last or step % every == 0
  stopping = _asked_to_stop(job, due(experiment.log_every))
  save = due(experiment.checkpoint_every)
  # The age of each teacher is on record for every exchange.
  exchanged = keeper.has_peers and experiment.exchange.due(step)
  watch.add(result)
  if due(experiment.log_every) or save or exchanged:
    watch.log(step)
  if _evaluation_due(job, step) and not stopping and job.agreement.is_primary:
    watch.heartbeat.tell(step, 'evaluating')
    # One device's copy: else every replica would evaluate everything.
    local = jax.tree.map(
        lambda x: x.addressable_shards[0].data, result.state.variables
    )
    evaluated = watch.evaluate(step, local)
    if not evaluated and job.agreement is ALONE:
      stopping = True  # The last step must not end a run without evaluation.
  if stopping:
    keeper.save_and_stop()
  if save:
    watch.heartbeat.tell(step, 'saving')
    keeper.save()
  keeper.tell_peers()


class _Keeper:
  """Sees to it that no update is lost when the process is asked to leave."""

  def __init__(
      self,
      job: Job,
      checkpoints: ResumeCheckpoints,
      exchange: Exchange,
      start: int,
  ):
    """Keeps nothing yet.

    Args:
      job: The group.
      checkpoints: Where its states go.
      exchange: Whose teachers were in use.
      start: The step before the first update.
    """
    self._job = job
    self._checkpoints = checkpoints
    self._exchange = exchange
    self._start = start
    self._result: StepResult | None = None
    self._teacher_steps: list[int | None] = []

  @property
  def has_peers(self) -> bool:
    return bool(self._exchange.peers)

  def updated(self, result: StepResult) -> None:
    """Takes note of the newest update."""
    self._result = result
    # Now: what is in use may be newer when the state is saved.
    self._teacher_steps = [
        None if p is None else p.step for p in self._exchange.in_use
    ]
    saved = self._checkpoints.saved_step
    self._job.stop.unsaved[self._job.directory] = (
        self._start if saved is None else saved
    )

  def save(self) -> None:
    """Saves in the background; all processes of a group take part."""
    job, result = self._job, self._result
    check_finite(job.group_id, result.step, result.metrics)
    state = job.train_step.collect(result.state)
    if job.agreement.is_primary:
      self._checkpoints.save(state, self._teacher_steps)

  def save_and_stop(self) -> None:
    """Saves, unless that is done; raises Stopped."""
    if self._result is None:
      raise _stopped(self._job, self._start)
    saved = np.array(self._checkpoints.saved_step == self._result.step)
    if not self._job.agreement.choose(saved):
      self.save()
    self._checkpoints.wait()
    _meet(self._job)
    raise _stopped(self._job, self._result.step)

  def tell_peers(self) -> None:
    """Publications that only an earlier start would ask for are not needed."""
    step = self._checkpoints.restart_step
    if step is not None:
      self._exchange.checkpointed(step)


def _meet(job: Job) -> None:
  """Waits for the other processes of the group.

  One that left while the primary still saves would take the group with it.
  """
  job.agreement.all_true(np.array(True))


def _asked_to_stop(job: Job, at_record: bool) -> bool:
  """Returns whether to stop: all processes at one step, or they would hang."""
  asked = job.stop()
  if job.agreement is ALONE:
    return asked
  return at_record and not job.agreement.all_true(np.array(not asked))


def _stopped(job: Job, step: int) -> Stopped:
  """Returns what ends a group that was asked to stop; 0: with nothing yet."""
  line = cli.STOPPED
  if step:
    line = (
        f'group {job.group_id} stopped and saved at step {step}; the same'
        ' command goes on from there'
    )
  return Stopped(line, job.stop.signal_number)


@contextlib.contextmanager
def _stopping_in_time(job: Job) -> Iterator[None]:
  """Ends the run as any stop does if a wait for a lease is given up."""
  try:
    yield
  except Interrupted:
    raise Stopped(cli.STOPPED, job.stop.signal_number) from None


class _NoLease:
  """The lease of a process that writes nothing."""

  def check(self) -> None:
    pass

  def release(self) -> None:
    pass


def _lease(job: Job) -> leases.Lease | _NoLease:
  if not job.agreement.is_primary:
    return _NoLease()
  return leases.acquire(
      run_directory.group_dir(job.workdir, job.group_id),
      'training in',
      interrupted=job.stop,
      patience=job.patience,
  )


def _clear_up(job: Job) -> None:
  """Deletes what earlier processes left behind, and says how much that was."""
  with job.troubles.noted('clearing up'):
    checkpoints = run_directory.checkpoints_dir(job.workdir, job.group_id)
    count = storage.clear_up(checkpoints)
    count += files.remove_leftovers(job.directory)
    # There other groups may be starting.
    count += files.remove_leftovers(job.workdir, older_than=60.0)
    if count:
      logging.warning(
          'Group %d: removed %d leftovers of earlier starts',
          job.group_id,
          count,
      )


def _goes_on(job: Job) -> bool:
  """Returns whether a run that was done is longer now."""
  directory = run_directory.checkpoints_dir(job.workdir, job.group_id)
  newest = run_directory.newest_saved(directory)
  return newest is not None and newest < job.experiment.num_steps


def _claim(job: Job, result: StepResult) -> bool:
  """Claims the run directory; returns false if its disk fails."""
  with job.troubles.noted('writing run.json'):
    claim_workdir(job, result.state)
    return True
  return False


def _write_done(job: Job) -> None:
  """Says that the last step is reached; tries for as long as a save is tried.

  Raises:
    TimeoutError: If the disk fails for longer.
  """
  path = run_directory.done_path(job.workdir, job.group_id)
  writer = BackgroundWriter(
      lambda step, data: files.write_bytes(path, data),
      'writing DONE',
      job.troubles,
      patience=job.patience,
  )
  writer.put(job.experiment.num_steps, b'')
  unwritten = writer.finish(0.0 if job.stop() else None)
  writer.close()
  if unwritten is not None:
    raise TimeoutError(
        f'{path} could not be written ({unwritten.error}), though group'
        f' {job.group_id} has reached its last step; see to the disk, and start'
        ' the same command again'
    ) from unwritten.error


def _closing(close: Callable[[], None]) -> Callable[..., bool]:
  """Returns an exit that does not hide the error that is on its way."""

  def leave(kind: type[BaseException] | None, *unused: Any) -> bool:
    del unused
    try:
      close()
    except Exception as e:
      if kind is None:
        raise
      logging.error('While closing after an error: %s', e)
    return False

  return leave


def _tell(exchange: Exchange, kind: Any, error: Any, unused: Any) -> None:
  """Tells peers what ends the group before its time, if anything does."""
  del kind, unused
  if isinstance(error, Exception) and not isinstance(error, Stopped):
    exchange.fail(error)


def _restore(
    job: Job, checkpoints: ResumeCheckpoints, like: TrainState
) -> Resume | None:
  """Reads the newest sound checkpoint: the primary's choice everywhere."""
  resume = checkpoints.restore(like) if job.agreement.is_primary else None
  step = np.array(-1 if resume is None else resume.state.step, np.int32)
  chosen = int(job.agreement.choose(step))
  if chosen < 0:
    return None
  return resume or checkpoints.read(chosen, like)


def _evaluate_what_was_missed(
    job: Job, watch: Watch, state: TrainState
) -> bool:
  """Evaluates if the run was stopped where an evaluation was due.

  Returns:
    False if it was stopped again meanwhile.
  """
  step = int(state.step)
  if not job.agreement.is_primary or not _evaluation_due(job, step):
    return True
  path = run_directory.metrics_path(job.workdir, job.group_id)
  records = filter(None, run_directory.records(path))
  if not any(r['step'] == step and 'eval/loss' in r for r in records):
    return watch.evaluate(step, state.variables)
  # Another group of the run may have missed it.
  job.evaluated(job.group_id, step, state.variables)
  return True


def _evaluation_due(job: Job, step: int) -> bool:
  experiment = job.experiment
  return step == experiment.num_steps or step % experiment.eval_every == 0
