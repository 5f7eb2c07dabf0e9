"""Resume checkpoints of one group: all that a restart needs.

Checkpoint n holds the state after n updates (so the data position, since a
batch is a function of the step) and which publications were the teachers.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath
from flax import serialization

from codistill_jax.base import TrainState
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    BackgroundWriter,
    Patience,
    Troubles,
)


class Resume(NamedTuple):
  """State that a run goes on from.

  Attributes:
    state: The group's state, as numpy arrays.
    teacher_steps: Per peer, the step of the publication in use, or None.
  """

  state: TrainState
  teacher_steps: tuple[int | None, ...]


class ResumeCheckpoints:
  """Saves and restores one group, in one directory, beside training.

  Only the primary process of a group saves; all of its processes restore.
  """

  def __init__(
      self,
      directory: epath.PathLike,
      *,
      identity: Mapping[str, str] | None = None,
      keep: int = 3,
      troubles: Troubles | None = None,
      check: Callable[[int], None] = lambda step: None,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    """Opens the directory; writes nothing yet.

    Args:
      directory: Of this group alone.
      identity: Facts that a restart must share (task, tokenizer hash, ...).
      keep: Newest checkpoints to keep; more than one, so that a damaged one
        does not lose the run.
      troubles: Where a disk that fails is noted.
      check: Called with the step before it is written; raises if this process
        must not write here any more, or not yet (OSError).
      patience: Time limits.
    """
    self._directory = epath.Path(files.absolute(directory))
    self._identity = dict(identity or {})
    self._keep = keep
    self._troubles = troubles or Troubles()
    self._check = check
    self._patience = patience
    self._writer = BackgroundWriter(
        self._write,
        'saving a resume checkpoint',
        self._troubles,
        patience=patience,
    )
    self._oldest: int | None = None

  @property
  def newest_step(self) -> int | None:
    """Returns the newest completed checkpoint, if any."""
    return max(self.steps(), default=None)

  def steps(self) -> list[int]:
    """Lists all completed checkpoints, ascending."""
    return checkpoints.completed_steps(self._directory)

  def discard_after(self, step: int) -> None:
    """Deletes the checkpoints beyond `step`."""
    checkpoints.delete(self._directory, [s for s in self.steps() if s > step])

  def save(
      self, state: TrainState, teacher_steps: Sequence[int | None] = ()
  ) -> None:
    """Saves in the background; a state that still waits is given up for it.

    A disk that fails is tried again until it works or a newer state comes, and
    holds up nobody. So at most two states are kept: one that is being written
    and one that waits.

    Args:
      state: Numpy arrays that nobody will change (`PmapStep.collect`).
      teacher_steps: Per peer, the step of the publication in use, or None.

    Raises:
      What a save before raised, unless it was an OSError.
      ValueError: If a run that was further on has been saved or restored here.
    """
    if self._writer.saved is not None and state.step <= self._writer.saved:
      raise self._of_another_run(int(state.step), self._writer.saved)
    self._writer.put(int(state.step), (state, list(teacher_steps)))

  def wait(self, seconds: float | None = None) -> int | None:
    """Waits until all is saved; returns the newest step saved, if any.

    Args:
      seconds: How long to go on trying while the disk fails; by default
        `patience.failing`. A save that is only slow is waited for.

    Raises:
      TimeoutError: If a state could not be saved; it is given up.
      What a save raised, unless it was an OSError.
    """
    seconds = self._patience.failing if seconds is None else seconds
    unwritten = self._writer.finish(seconds)
    if unwritten is not None:
      reason = unwritten.error or TimeoutError('it takes too long')
      raise TimeoutError(
          f'the resume checkpoint of step {unwritten.steps[-1]} could not be'
          f' saved in {self._directory} within {seconds:g} s'
          f' ({files.one_line(reason)}); see to the disk, and start'
          ' the same command again: it goes on from step'
          f' {self._writer.saved or 0}'
      ) from unwritten.error
    return self._writer.saved

  @property
  def saved_step(self) -> int | None:
    """Returns the newest step known to be on disk, without waiting."""
    self._writer.raise_failure()
    return self._writer.saved

  @property
  def restart_step(self) -> int | None:
    """Returns the oldest step that a restart may begin at, if that is known.

    Not the newest: that one may turn out to be damaged.
    """
    self._writer.raise_failure()
    return self._oldest

  def restore(self, like: TrainState) -> Resume | None:
    """Reads the newest sound checkpoint; None where there is none.

    Args:
      like: A state of the same structure and shapes.

    Raises:
      ValueError: If the checkpoints are of another model, optimiser, number of
        peers, group batch or task; or if none of those present can be read;
        or if such a state cannot be saved.
    """
    checkpoints.describe(serialization.to_state_dict(like))
    damaged = []
    for step in reversed(self.steps()):
      try:
        resume = self.read(step, like)
      except checkpoints.DamagedError as e:
        logging.warning('Skipped a damaged resume checkpoint: %s', e)
        damaged.append(str(e))
        continue
      # In the way of the run, which comes by their steps again.
      for newer in [s for s in self.steps() if s > step]:
        checkpoints.set_aside(self._directory, newer)
      self._writer.saved, self._oldest = step, self.steps()[0]
      return resume
    if damaged:
      raise ValueError(
          f'none of the resume checkpoints in {self._directory} can be read'
          f' ({damaged[0]}); restore one from a copy, or delete the directory'
          ' to start again'
      )
    return None

  def close(self) -> None:
    """Waits as `wait` does, and ends the thread."""
    try:
      self.wait()
    finally:
      self._writer.close()

  def _write(self, step: int, item: tuple[TrainState, list]) -> None:
    self._check(step)
    newest = step
    with contextlib.suppress(OSError):  # That is no trouble with the new one.
      newest = max(self.steps(), default=step)
    if newest > step:  # Else this one would be the first to be deleted.
      raise self._of_another_run(step, newest)
    state, teacher_steps = item
    facts = {'teacher_steps': teacher_steps, 'identity': self._identity}
    checkpoints.delete_torn(self._directory)
    checkpoints.save(
        self._directory, step, serialization.to_state_dict(state), facts
    )
    self._prune()

  def _of_another_run(self, step: int, newest: int) -> ValueError:
    return ValueError(
        f'the resume checkpoints in {self._directory} have come to step'
        f' {newest}, and are to save step {step}; restore to go on there, or'
        ' make new ones in another directory for another run'
    )

  def _prune(self) -> None:
    """Deletes all but the newest; a failure must not look like one to save."""
    with self._troubles.noted('listing resume checkpoints'):
      steps = self.steps()
      checkpoints.delete(self._directory, steps[: -self._keep])
      self._oldest = steps[-self._keep :][0]

  def read(self, step: int, like: TrainState) -> Resume:
    """Reads one checkpoint; raises as `restore`, or `DamagedError`."""
    record = checkpoints.load_record(self._directory, step)
    target = serialization.to_state_dict(like)
    checkpoints.check_match(
        f'resume checkpoint {self._directory / str(step)}',
        identity=record.facts['identity'],
        leaves=record.leaves,
        our_identity=self._identity,
        like=target,
        advice='use another workdir, or the configuration of the first run',
    )
    tree = checkpoints.load_tree(self._directory, step, record, target)
    state = serialization.from_state_dict(like, tree)
    return Resume(state, tuple(record.facts['teacher_steps']))
