"""Metrics records and heartbeats of a run in training; its FLOP utilisation.

Shape suffixes: B rows of the group batch, P teachers.
"""

import concurrent.futures
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from codistill_jax import (
    evaluate,
    jaxprs,
    one_program,
    run_directory,
    writers,
)
from codistill_jax.base import (
    ALONE,
    Batch,
    Metrics,
    PeerPredictions,
    PyTree,
    Teachers,
    TrainState,
    Variables,
)
from codistill_jax.exchange.plan import Exchange, NoExchange, check_finite
from codistill_jax.experiment import make_eval_step, split_batches
from codistill_jax.group import StepResult
from codistill_jax.storage import files, leases

from .. import cli
from .job import Job

_BEAT_SECONDS = 2.0
_LAST_WORDS_SECONDS = 1.0


class Heartbeat:
  """The sign of life of a group, status.json: by a thread, and when it ends.

  A compilation or a slow disk does not look like a death, and holds nobody up.

  Attributes:
    exchange: The group's, once it is made.
    steps_per_sec: Of the updates since the last record but one.
    taught: Whether an update with teachers has run.
  """

  def __init__(self, job: Job):
    """Writes nothing: the group may be another process's, see `begin`."""
    self.exchange: Exchange = NoExchange()
    self.steps_per_sec: float | None = None
    self.taught = False
    self._job = job
    self._step: int | None = None
    self._phase, self._reason = 'starting', ''
    self._started = self._since = time.time()
    self._ended = False
    self._news = threading.Event()
    self._thread = threading.Thread(
        target=self._beat, name='heartbeat', daemon=True
    )

  def begin(self) -> None:
    """Begins to write, of a primary; the lease of the group is held."""
    if self._job.agreement.is_primary:
      self._job.stop.last_words[self._job.directory] = self._leave_at_once
      self._thread.start()

  def tell(self, step: int, phase: str) -> None:
    """Says where the group is; a new phase is written at once."""
    changed = phase != self._phase
    self._step, self._phase, self._since = step, phase, time.time()
    if changed:
      self._news.set()

  def __enter__(self) -> 'Heartbeat':
    return self

  def __exit__(
      self, kind: type[BaseException] | None, error: Any, trace: Any
  ) -> None:
    self._job.stop.last_words.pop(self._job.directory, None)
    if self._thread.ident is None:
      return
    self._ended = True
    self._news.set()
    self._thread.join()
    # Who has lost the lease would speak for another process.
    if kind is None or not issubclass(kind, leases.LostError):
      self._end(error)
      self._write()

  def _end(self, error: BaseException | None) -> None:
    if isinstance(error, cli.Stopped | GeneratorExit | KeyboardInterrupt):
      self._phase = 'stopped'
    elif error is not None:
      self._phase = 'failed'
      self._reason = ' '.join(str(error).split()) or type(error).__name__

  def _leave_at_once(self) -> None:
    """Writes once more, in any thread, unless the disk hangs."""
    self._ended, self._phase = True, 'stopped'
    last = threading.Thread(target=self._write, daemon=True)
    last.start()
    last.join(_LAST_WORDS_SECONDS)

  def _beat(self) -> None:
    while not self._ended:
      self._write()
      self._news.wait(_BEAT_SECONDS)
      self._news.clear()

  def _write(self) -> None:
    job, exchange, phase = self._job, self.exchange, self._phase
    teachers = [p for p in exchange.in_use if p is not None]
    if phase == 'training' and teachers and not self.taught:
      phase = 'compiling'  # The second program of a run.
    content = {
        'step': self._step,
        'num_steps': job.experiment.num_steps,
        'time': time.time(),
        'started': self._started,
        'since': self._since,
        'pid': os.getpid(),
        'host': job.host,
        'replicas': job.train_step.num_replicas,
        'device': job.train_step.device_kind,
        'phase': phase,
        'reason': self._reason,
        'steps_per_sec': self.steps_per_sec,
        'num_groups': job.num_groups,
        'peers': list(exchange.peers),
        'teachers': [
            {'peer': p.group_id, 'step': p.step, 'time': p.time}
            for p in teachers
        ],
        'rejected': exchange.rejected,
        'last_rejection': exchange.last_rejection,
        'troubles': [trouble._asdict() for trouble in job.troubles.now],
    }
    with job.troubles.noted('writing status.json'):
      run_directory.write_status(job.workdir, job.group_id, content)


class Watch:
  """Turns the results of a loop into records."""

  def __init__(
      self,
      job: Job,
      heartbeat: Heartbeat,
      writer: writers.Writer,
      start: int,
      examples: int,
      efficiency: 'Efficiency',
  ):
    """Starts to watch.

    Args:
      job: What is watched.
      heartbeat: Of the group.
      writer: Where records go.
      start: The step before the first update.
      examples: Per update of the group.
      efficiency: Of its updates.
    """
    self._job = job
    self._examples = examples
    self._efficiency = efficiency
    self.heartbeat = heartbeat
    self._writer = writer
    self._eval_step = make_eval_step(job.experiment, job.model)
    self._eval_batches = None
    self._results: list[dict] = []
    self._logged_step = start
    self._logged_time = time.perf_counter()
    self._first_step = start + 1
    heartbeat.tell(start, 'compiling')

  def add(self, result: StepResult) -> None:
    self._results.append(result.metrics)
    taught = _taught(result.metrics)
    self._efficiency.seen(taught)
    self.heartbeat.taught |= taught
    self.heartbeat.tell(result.step, 'training')
    if result.step == self._first_step:
      # The first update includes compilation; it says nothing of the speed.
      self._restart_clock(result.step)

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
    found = [r['optim/fault'] for r in results if r.get('optim/fault')]
    newest['optim/fault'] = found[0] if found else 0.0  # The first.
    check_finite(self._job.group_id, step, newest)
    del newest['optim/fault']
    newest['exchange/stall_ms'] = sum(
        m['exchange/stall_ms'] for m in self._results
    )
    steps = step - self._logged_step
    if steps > 0:
      seconds = time.perf_counter() - self._logged_time
      speed = self.heartbeat.steps_per_sec = steps / seconds
      newest['perf/steps_per_sec'] = speed
      newest['perf/examples_per_sec'] = speed * self._examples
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

  def _restart_clock(self, step: int) -> None:
    self._logged_step, self._logged_time = step, time.perf_counter()


def _taught(metrics: Metrics) -> bool:
  """Returns whether an update had teachers."""
  return bool(metrics['distill/weight'])


def check_profile(job: Job) -> None:
  """Raises ValueError if the trace that is asked for cannot be written."""
  steps, last = job.profile, job.experiment.num_steps
  if steps and steps.stop > last:
    raise ValueError(
        f'--profile_steps={steps.start}:{steps.stop} goes beyond'
        f' Experiment.num_steps = {last}; give steps up to that'
    )
  if steps and files.is_remote(job.workdir):
    raise ValueError(
        f'--profile_steps writes to a disk, and --workdir={job.workdir} is of'
        ' an object store; profile with a --workdir on a disk'
    )


def profiled(
    job: Job, turns: Iterator[StepResult], step: int
) -> Iterator[StepResult]:
  """Passes all updates on; writes the trace of those of `job.profile`.

  Args:
    job: The group.
    turns: Of `run_group`.
    step: The step before the first of them.
  """
  steps = job.profile if job.agreement.is_primary else range(0)
  begin = max(step, steps.start)
  with contextlib.ExitStack() as trace:
    while True:
      if step == begin and step in steps:
        trace.enter_context(_trace(job))
      with jax.profiler.StepTraceAnnotation('update', step_num=step):
        result = next(turns, None)
      if result is None:
        return
      step = result.step
      if step == steps.stop:
        jax.device_get(result.metrics)  # Waits for what is under way.
        trace.close()
      yield result


@contextlib.contextmanager
def _trace(job: Job) -> Iterator[None]:
  directory = run_directory.profile_dir(job.workdir, job.group_id)
  jax.profiler.start_trace(directory, create_perfetto_trace=True)
  try:
    yield
  finally:
    try:
      jax.profiler.stop_trace()
    except (OSError, RuntimeError, ValueError) as e:
      # Of a disk that fails: no reason to end training.
      cli.tell(f'warning: no trace in {directory}: {e}', error=True)


def group_writer(
    job: Job, *, progress: bool
) -> Callable[[int], writers.Writer]:
  """Makes writers of JSON lines and TensorBoard events, and of what is asked.

  That is progress on the terminal, and `Experiment.writers`.
  """

  def make(start: int) -> writers.Writer:
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
    source = writers.Source(
        job.directory,
        job.run_name,
        job.group_id,
        job.num_groups,
        start,
        job.configuration().bindings,
    )
    # Last: one that hangs holds up nothing that is written here.
    made += [
        writers.OwnWriter(make, source, job.troubles)
        for make in job.experiment.writers
    ]
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
    self._count(self.teachers() is not None)

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
        self.teachers() if taught else None,
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

  def teachers(self) -> Teachers | PeerPredictions | None:
    """Returns the shapes of the group's teachers, if it can have any."""
    job, kind = self._job, self._job.experiment.exchange
    step = job.train_step
    if isinstance(step, one_program.Seat) and step.peers is not None:
      return _shapes(step.peers)
    peers = kind.num_teachers(job.group_id, job.num_groups)
    if not peers:
      return None

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
