"""Everything around the loop of one group: resume, log, evaluate, save, stop.

Shared by the binaries that train. `run_group` writes nothing; this does.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from codistill_jax import (
    base,
    files,
    gin_utils,
    locks,
    replicas,
    run_directory,
    writers,
)
from codistill_jax import step as step_lib
from codistill_jax.base import ALONE, Stream, TrainState, Variables
from codistill_jax.checkpoint import Checkpoints, Resume
from codistill_jax.exchange import Exchange, Interrupted
from codistill_jax.group import StepResult, run_group
from experiments import claims
from experiments.cli import Stopped
from experiments.job import Job
from experiments.watch import Watch


def new_state(job: Job) -> tuple[TrainState, Stream]:
  """The group's state before the first update (numpy), and its stream."""
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
  # Not on a device, where it would stay beside the state in training.
  return base.host_copy(state), stream


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
  done = run_directory.done_path(job.workdir, job.group_id)
  if done.exists():
    return
  state, stream = new_state(job)
  # Closed in reverse order, each even if another fails.
  with contextlib.ExitStack() as stack:
    if job.agreement.is_primary:
      directory = run_directory.group_dir(job.workdir, job.group_id)
      stack.enter_context(locks.exclusive(directory, 'training in'))
    checkpoints = Checkpoints(
        run_directory.checkpoints_dir(job.workdir, job.group_id),
        identity=job.identity,
    )
    stack.push(_closing(checkpoints.close))
    resume = _restore(job, checkpoints, state)
    state = resume.state if resume else state
    start = int(state.step)
    exchange = make_exchange(state.variables)
    stack.push(_closing(exchange.close))
    writer = writers.NullWriter()
    if job.agreement.is_primary:
      writer = writer_of(start)
    stack.push(_closing(writer.close))
    row_shape = stream.batch(0)['labels'].shape[1:]
    examples = job.experiment.group_batch * int(np.prod(row_shape))
    watch = Watch(job, exchange, writer, start, examples)
    if resume:
      exchange.restore(start, resume.teacher_steps)
      exchange.checkpointed(checkpoints.restart_step)
      _evaluate_what_was_missed(job, watch, resume.state)
    turns = run_group(
        job.train_step,
        state,
        stream,
        num_steps=job.experiment.num_steps,
        exchange=exchange,
        distill_weight=job.experiment.distill_weight,
    )
    del state, resume  # A whole state, that training goes on without.
    result = None
    try:
      for result in turns:
        if result.step == start + 1:
          gin_utils.check_no_dead_bindings()
          claims.claim_workdir(job, result.state)
        _after_update(job, result, watch, checkpoints, exchange)
        yield result.step
    except Interrupted:
      # Raised before an update, so the state after the last one still stands;
      # before the first one it is the one restored.
      if result is not None:
        _save_and_stop(job, result, watch, checkpoints, exchange)
      raise _stopped(job, start) from None
    checkpoints.wait()
    exchange.checkpointed(checkpoints.restart_step)
  if job.agreement.is_primary:
    files.write_bytes(done, b'')
    watch.status(job.experiment.num_steps, 'done')
  _meet(job)


def _closing(close: Callable[[], None]) -> Callable[..., bool]:
  """An exit that does not hide the error that is on its way."""

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


def _restore(
    job: Job, checkpoints: Checkpoints, like: TrainState
) -> Resume | None:
  """The newest sound checkpoint; the primary's choice in every process."""
  resume = checkpoints.restore(like) if job.agreement.is_primary else None
  step = np.array(-1 if resume is None else resume.state.step, np.int32)
  chosen = int(job.agreement.choose(step))
  if chosen < 0:
    return None
  return resume or checkpoints.read(chosen, like)


def _evaluate_what_was_missed(
    job: Job, watch: Watch, state: TrainState
) -> None:
  """A run that was stopped where an evaluation was due makes up for it."""
  step = int(state.step)
  if not job.agreement.is_primary or not _evaluation_due(job, step):
    return
  path = run_directory.metrics_path(job.workdir, job.group_id)
  records = run_directory.read_metrics(path).records
  there = any(r['step'] == step and 'eval/loss' in r for r in records)
  if not there and not watch.evaluate(step, state.variables):
    raise _stopped(job, step)


def _evaluation_due(job: Job, step: int) -> bool:
  experiment = job.experiment
  return step == experiment.num_steps or step % experiment.eval_every == 0


def _after_update(
    job: Job,
    result: StepResult,
    watch: Watch,
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
  if _evaluation_due(job, step) and not stopping and job.agreement.is_primary:
    watch.status(step, 'evaluating')
    # One device's copy: else every replica would evaluate everything.
    local = jax.tree.map(
        lambda x: x.addressable_shards[0].data, result.state.variables
    )
    evaluated = watch.evaluate(step, local)
    if not evaluated and job.agreement is ALONE:
      stopping = True  # The last step must not end a run without evaluation.
  if stopping:
    _save_and_stop(job, result, watch, checkpoints, exchange)
  if save:
    watch.status(step, 'saving')
    _save(job, result, watch, checkpoints, exchange)
  if checkpoints.restart_step is not None:
    # Publications that only an earlier start would ask for are not needed.
    exchange.checkpointed(checkpoints.restart_step)


def _asked_to_stop(job: Job, at_record: bool) -> bool:
  """All processes of a group stop at the same step, or they would hang."""
  if job.agreement is ALONE:
    return job.stop()
  if not at_record:
    return False
  return not job.agreement.all_true(np.array(not job.stop()))


def _save(
    job: Job,
    result: StepResult,
    watch: Watch,
    checkpoints: Checkpoints,
    exchange: Exchange,
) -> None:
  watch.check_finite(result.step)
  state = job.train_step.collect(result.state)  # All processes take part.
  if job.agreement.is_primary:
    steps = [None if p is None else p.step for p in exchange.in_use]
    checkpoints.save(state, steps)


def _save_and_stop(
    job: Job,
    result: StepResult,
    watch: Watch,
    checkpoints: Checkpoints,
    exchange: Exchange,
) -> None:
  saved = np.array(checkpoints.wait() == result.step)
  if not job.agreement.choose(saved):
    _save(job, result, watch, checkpoints, exchange)
    checkpoints.wait()
  _meet(job)
  raise _stopped(job, result.step)


def _meet(job: Job) -> None:
  """Waits for the other processes of the group.

  One that left while the primary still saves would take the group with it.
  """
  job.agreement.all_true(np.array(True))


def _stopped(job: Job, step: int) -> Stopped:
  return Stopped(
      f'group {job.group_id} stopped and saved at step {step}; the same'
      ' command goes on from there',
      getattr(job.stop, 'signal_number', None) or signal.SIGTERM,
  )


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
  if not count:
    return None
  devices = jax.local_devices()
  if jax.process_count() > 1:
    if count != len(devices):
      raise ValueError(
          f'--replicas={count}, but a group of several processes uses all'
          f' {len(devices)} devices of each: leave --replicas out, or hide the'
          ' others'
      )
    return None
  if len(devices) < count:
    raise ValueError(
        f'--replicas={count}, but this process has {len(devices)} devices;'
        f' set --replicas to at most {len(devices)}'
    )
  return devices[:count]
