"""Resume checkpoints of one group: all that a restart needs.

Checkpoint n holds the state after n updates (so the data position, since a
batch is a function of the step) and which publications were the teachers.
"""

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath
from flax import serialization

from codistill_jax import storage
from codistill_jax.base import TrainState


class Resume(NamedTuple):
  """What `Checkpoints.restore` gives back.

  Attributes:
    state: The group's state, as numpy arrays.
    teacher_steps: Per peer, the step of the publication in use, or None.
  """

  state: TrainState
  teacher_steps: tuple[int | None, ...]


class Checkpoints:
  """The resume checkpoints of one group, in one directory, written beside it.

  Only the primary process of a group saves; all of its processes restore.
  """

  def __init__(
      self,
      directory: epath.PathLike,
      *,
      identity: Mapping[str, str] | None = None,
      keep: int = 3,
  ):
    """Opens the directory; writes nothing yet.

    Args:
      directory: Of this group alone.
      identity: Facts that a restart must share (task, tokenizer hash, ...).
      keep: Newest checkpoints to keep; more than one, so that a damaged one
        does not lose the run.
    """
    self._directory = storage.absolute(directory)
    self._identity = dict(identity or {})
    self._keep = keep
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._saving: concurrent.futures.Future | None = None
    self._saved: int | None = None
    self._oldest: int | None = None

  @property
  def newest_step(self) -> int | None:
    """The newest completed checkpoint, if any."""
    return max(self.steps(), default=None)

  def steps(self) -> list[int]:
    """All completed checkpoints, ascending."""
    return storage.completed_steps(self._directory)

  def discard_after(self, step: int) -> None:
    """Deletes the checkpoints beyond `step`."""
    storage.delete(self._directory, [s for s in self.steps() if s > step])

  def save(
      self, state: TrainState, teacher_steps: Sequence[int | None] = ()
  ) -> None:
    """Saves in the background, after the save before it is complete.

    Args:
      state: Numpy arrays that nobody will change (`PmapStep.collect`).
      teacher_steps: Per peer, the step of the publication in use, or None.

    Raises:
      Whatever the save before raised.
    """
    self.wait()
    self._saving = self._thread.submit(
        self._save, int(state.step), state, list(teacher_steps)
    )

  def wait(self) -> int | None:
    """Waits for the save under way; gives the newest step saved, if any."""
    if self._saving is not None:
      saving, self._saving = self._saving, None
      self._saved, self._oldest = saving.result()
    return self._saved

  @property
  def saved_step(self) -> int | None:
    """The newest step known to be on disk, without waiting."""
    if self._saving is not None and self._saving.done():
      return self.wait()
    return self._saved

  @property
  def restart_step(self) -> int | None:
    """The oldest step that a restart may begin at, as far as is known.

    Not the newest: that one may turn out to be damaged.
    """
    if self._saving is not None and self._saving.done():
      self.wait()
    return self._oldest

  def restore(self, like: TrainState) -> Resume | None:
    """The newest sound checkpoint; None where there is none.

    Args:
      like: A state of the same structure and shapes.

    Raises:
      ValueError: If the checkpoints are of another model, optimiser, number of
        peers, group batch or task; or if none of those present can be read.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        resume = self.read(step, like)
      except storage.DamagedError as e:
        logging.warning('Skipped a damaged resume checkpoint: %s', e)
        damaged.append(str(e))
        continue
      # In the way of the run, which comes by their steps again.
      for newer in [s for s in self.steps() if s > step]:
        storage.set_aside(self._directory, newer)
      self._saved, self._oldest = step, self.steps()[0]
      return resume
    if damaged:
      raise ValueError(
          f'none of the resume checkpoints in {self._directory} can be read'
          f' ({damaged[0]}); restore one from a copy, or delete the directory'
          ' to start again'
      )
    return None

  def close(self) -> None:
    """Waits for the save under way."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def _save(
      self, step: int, state: TrainState, teacher_steps: list[int | None]
  ) -> tuple[int, int]:
    facts = {'teacher_steps': teacher_steps, 'identity': self._identity}
    storage.delete_torn(self._directory)
    storage.save(
        self._directory, step, serialization.to_state_dict(state), facts
    )
    steps = self.steps()
    storage.delete(self._directory, steps[: -self._keep])
    return step, steps[-self._keep :][0]

  def read(self, step: int, like: TrainState) -> Resume:
    """One checkpoint; raises as `restore`, or `storage.DamagedError`."""
    record = storage.load_record(self._directory, step)
    where = self._directory / str(step)
    theirs = record.facts['identity']
    for key in sorted(theirs.keys() | self._identity.keys()):
      if theirs.get(key) != self._identity.get(key):
        raise ValueError(
            f'resume checkpoint {where} was made with'
            f' {key}={theirs.get(key)}, this run has'
            f' {key}={self._identity.get(key)}; use another workdir, or the'
            ' configuration of the first run'
        )
    target = serialization.to_state_dict(like)
    ours = storage.describe(target)
    for a, b in zip(record.leaves, ours):
      if (a.path, a.shape, a.dtype) != (b.path, b.shape, b.dtype):
        raise ValueError(
            f'resume checkpoint {where} is of another configuration: it holds'
            f' {a} where this run has {b}; use another workdir, or the'
            ' configuration of the first run'
        )
    if len(record.leaves) != len(ours):
      raise ValueError(
          f'resume checkpoint {where} is of another configuration: it holds'
          f' {len(record.leaves)} arrays, this run has {len(ours)}; use another'
          ' workdir, or the configuration of the first run'
      )
    tree = storage.load_tree(self._directory, step, record, target)
    state = serialization.from_state_dict(like, tree)
    return Resume(state, tuple(record.facts['teacher_steps']))
