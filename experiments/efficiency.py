"""What of a group's time goes into the arithmetic of its model.

Shape suffixes: B rows of the group batch, P teachers.
"""

import concurrent.futures
import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from codistill_jax import jaxprs, one_program
from codistill_jax.base import (
    Batch,
    PeerPredictions,
    PyTree,
    Teachers,
    TrainState,
)
from codistill_jax.experiment import num_teachers
from experiments.job import Job


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

  def seen(self, taught: bool) -> None:
    """A step has run, with teachers or without; starts to count it."""
    for form in {False, taught} - self._counts.keys():
      self._counts[form] = self._counter.submit(self._count, form)

  def metrics(self, taught: Sequence[bool], seconds: float) -> dict[str, float]:
    """Of the whole group, over steps that took so long together.

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
    job, plan = self._job, self._job.experiment.plan
    step = job.train_step
    if isinstance(step, one_program.Seat) and step.peers is not None:
      return _shapes(step.peers)
    peers = num_teachers(job.experiment, job.group_id, job.num_groups)

    def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      floating = jax.numpy.issubdtype(x.dtype, np.floating)
      dtype = plan.teacher_dtype if floating else x.dtype
      return jax.ShapeDtypeStruct((peers, *x.shape), dtype)

    return Teachers(
        jax.tree.map(stacked, self._state.variables),
        jax.ShapeDtypeStruct((peers,), np.float32),
    )


def _shapes(tree: PyTree) -> PyTree:
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree
  )
