"""Metrics records and heartbeats of a run in training; its FLOP utilisation.

Shape suffixes: B rows of the group batch, P teachers.
"""

import concurrent.futures
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from codistill_jax import (
    evaluate,
    jaxprs,
    losses,
    one_program,
    run_directory,
    writers,
)
from codistill_jax.base import (
    ALONE,
    Batch,
    Metrics,
    Model,
    PeerPredictions,
    PyTree,
    Teachers,
    TrainState,
    Variables,
)
from codistill_jax.exchange.plan import Exchange, check_finite
from codistill_jax.experiment import split_batches
from codistill_jax.group import StepResult
from codistill_jax.step import EvalStep, make_eval_step

from .job import Job

_STATUS_SECONDS = 2.0


class Watch:
  """Turns the results of a loop into records and signs of life."""

  def __init__(
      self,
      job: Job,
      exchange: Exchange,
      writer: writers.Writer,
      start: int,
      examples: int,
      efficiency: 'Efficiency',
  ):
    """Starts to watch.

    Args:
      job: What is watched.
      exchange: The group's.
      writer: Where records go.
      start: The step before the first update.
      examples: Per update of the group.
      efficiency: Of its updates.
    """
    self._job = job
    self._examples = examples
    self._efficiency = efficiency
    self._exchange = exchange
    self._writer = writer
    self._eval_step = _eval_step(job.experiment.task.output, job.model)
    self._eval_batches = None
    self._results: list[dict] = []
    self._logged_step = start
    self._logged_time = time.perf_counter()
    self._started = time.time()
    # Of the clock that nobody sets back.
    self._status_written = -math.inf
    self._speed: float | None = None
    self._first_step = start + 1
    self.status(start, 'compiling')

  def add(self, result: StepResult) -> None:
    self._results.append(result.metrics)
    self._efficiency.seen(_taught(result.metrics))
    if result.step == self._first_step:
      # The first update includes compilation; it says nothing of the speed.
      self._restart_clock(result.step)
    if time.monotonic() - self._status_written > _STATUS_SECONDS:
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
    check_finite(self._job.group_id, step, newest)
    newest['exchange/stall_ms'] = sum(
        m['exchange/stall_ms'] for m in self._results
    )
    steps = step - self._logged_step
    if steps > 0:
      seconds = time.perf_counter() - self._logged_time
      self._speed = steps / seconds
      newest['perf/steps_per_sec'] = self._speed
      newest['perf/examples_per_sec'] = self._speed * self._examples
      taught = [_taught(metrics) for metrics in self._results[-steps:]]
      newest |= self._efficiency.metrics(taught, seconds)
    self._results = []
    self._restart_clock(step)
    self._writer.write(step, newest)

  def evaluate(self, step: int, variables: Variables) -> bool:
    """Writes a record of the validation metrics; False if it was stopped."""
    job, experiment, model = self._job, self._job.experiment, self._job.model
    # Several processes stop at a step that they agree on: none is beyond the
    # last one, so that ends with its evaluation.
    needed = step == experiment.num_steps and job.agreement is not ALONE
    start = time.perf_counter()
    if self._eval_batches is None:
      self._eval_batches = split_batches(
          experiment.task, 'validation', experiment.eval_batch
      )
    found = evaluate.evaluate(
        self._eval_step,
        variables,
        self._eval_batches,
        model.init_carry(experiment.eval_batch),
        should_stop=lambda: job.stop() and not needed,
    )
    if found is not None:
      self._writer.write(step, found)
      self._job.evaluated(self._job.group_id, step, variables)
    self._logged_time += time.perf_counter() - start
    return found is not None

  def status(self, step: int, phase: str) -> None:
    """Replaces the sign of life in the run directory."""
    job = self._job
    if not job.agreement.is_primary:
      return
    self._status_written = time.monotonic()
    exchange = self._exchange
    content = {
        'step': step,
        'num_steps': job.experiment.num_steps,
        'time': time.time(),
        'started': self._started,
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'phase': phase,
        'steps_per_sec': self._speed,
        'num_groups': job.num_groups,
        'peers': list(exchange.peers),
        'teachers': [
            {'peer': p.group_id, 'step': p.step, 'time': p.time}
            for p in exchange.in_use
            if p is not None
        ],
        'rejected': exchange.rejected,
        'last_rejection': exchange.last_rejection,
        'troubles': [trouble._asdict() for trouble in job.troubles.now],
    }
    with job.troubles.noted('writing status.json'):
      run_directory.write_status(job.workdir, job.group_id, content)

  def _restart_clock(self, step: int) -> None:
    self._logged_step, self._logged_time = step, time.perf_counter()


# Compiled once for all groups and runs of a process.
@functools.lru_cache(maxsize=4)
def _eval_step(output: str, model: Model) -> EvalStep:
  task_loss = losses.task_loss_of(output)
  return jax.jit(make_eval_step(model, task_loss=task_loss))


def _taught(metrics: Metrics) -> bool:
  """Returns whether an update had teachers."""
  return bool(metrics['distill/weight'])


def group_writer(
    job: Job, *, progress: bool
) -> Callable[[int], writers.Writer]:
  """Makes writers of JSON lines, TensorBoard events and, if asked, progress."""

  def make(start: int) -> writers.Writer:
    directory = run_directory.group_dir(job.workdir, job.group_id)
    directory.mkdir(parents=True, exist_ok=True)
    made = [
        writers.JsonlWriter(
            run_directory.metrics_path(job.workdir, job.group_id),
            resume_step=start,
            troubles=job.troubles,
        ),
        writers.TensorBoardWriter(
            run_directory.tensorboard_dir(job.workdir, job.group_id),
            resume_step=start,
            troubles=job.troubles,
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


class Efficiency:
  """Counts the FLOPs of a step in its two forms, each when it first runs.

  In a thread, after the step was compiled: for a large model the trace takes
  seconds, and the first update should not wait for it.
  """

  def __init__(self, job: Job, state: TrainState, row: Batch):
    """Looks at shapes only.

    Args:
      job: The group.
      state: Of the whole group.
      row: One row of its batches.
    """
    self._job = job
    rows = job.experiment.group_batch
    self._state = _shapes(state)
    self._batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
        _shapes(dict(row)),
    )
    self._counts: dict[bool, concurrent.futures.Future] = {}
    self._counter = concurrent.futures.ThreadPoolExecutor(1, 'count-flops')

  def trace(self) -> None:
    """Traces the step, with teachers if there are any."""
    job = self._job
    kind = job.experiment.exchange
    self._count(
        kind.one_program or kind.num_teachers(job.group_id, job.num_groups) > 0
    )

  def seen(self, taught: bool) -> None:
    """Starts to count the FLOPs of a step that has run, taught or not."""
    for form in {False, taught} - self._counts.keys():
      self._counts[form] = self._counter.submit(self._count, form)

  def metrics(self, taught: Sequence[bool], seconds: float) -> dict[str, float]:
    """Returns throughput of the whole group over some steps.

    Args:
      taught: For each of them, whether it had teachers; `seen` before.
      seconds: That all of them took.

    Returns:
      `perf/model_flops_per_step` and `perf/teacher_share` of the last one,
      `perf/model_flops_per_sec`, and `perf/utilisation`: the least time in
      which the group's devices could do that, as a part of the time it took;
      absent where their peak is not known.
    """
    counts = [self._counts[form].result() for form in taught]
    alone, last = self._counts[False].result(), counts[-1]
    found = {
        'perf/model_flops_per_step': last.total,
        'perf/model_flops_per_sec': sum(c.total for c in counts) / seconds,
        'perf/teacher_share': 1.0 - alone.total / max(last.total, 1.0),
    }
    step = self._job.train_step
    least = sum(
        jaxprs.least_seconds(c.by_dtype, step.device_kind) for c in counts
    )
    if math.isfinite(least):
      found['perf/utilisation'] = least / step.num_replicas / seconds
    return found

  def close(self) -> None:
    self._counter.shutdown(wait=False, cancel_futures=True)

  def _count(self, taught: bool) -> jaxprs.Flops:
    step = self._job.train_step
    # The whole group batch on one replica, which takes the same.
    found = jaxprs.flops(
        step.train_step,
        self._state,
        self._batch,
        self._teachers() if taught else None,
        jax.ShapeDtypeStruct((), np.float32),
        axis_sizes=step.axis_sizes,
    )
    if found.unknown_loops:
      logging.warning(
          'perf/model_flops counts %d while loops of the step once, however'
          ' often they run; a scan would be counted as often as it runs',
          found.unknown_loops,
      )
    return found

  def _teachers(self) -> Teachers | PeerPredictions:
    job, kind = self._job, self._job.experiment.exchange
    step = job.train_step
    if isinstance(step, one_program.Seat) and step.peers is not None:
      return _shapes(step.peers)
    peers = kind.num_teachers(job.group_id, job.num_groups)

    def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      floating = jax.numpy.issubdtype(x.dtype, np.floating)
      dtype = kind.teacher_dtype if floating else x.dtype
      return jax.ShapeDtypeStruct((peers, *x.shape), dtype)

    return Teachers(
        jax.tree.map(stacked, self._state.variables),
        jax.ShapeDtypeStruct((peers,), np.float32),
    )


def _shapes(tree: PyTree) -> PyTree:
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree
  )
