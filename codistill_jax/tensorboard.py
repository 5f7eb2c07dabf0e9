"""Metrics as TensorBoard events."""

import contextlib
import os

from etils import epath

from codistill_jax.storage.appender import Appender
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    Patience,
    Troubles,
)
from codistill_jax.writers import Metrics, as_floats


class TensorBoardWriter:
  """Scalars for TensorBoard, without TensorFlow (through tensorboardX)."""

  def __init__(
      self,
      logdir: os.PathLike[str] | str,
      *,
      resume_step: int | None = None,
      troubles: Troubles | None = None,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    """Opens an event file.

    Args:
      logdir: Where the event files lie.
      resume_step: The step the run goes on from; TensorBoard hides what an
        earlier process wrote for later steps.
      troubles: Where a disk that fails is noted.
      patience: Time limits.
    """
    import tensorboardX  # Here: the file must not cost what it does not use.
    from tensorboardX import record_writer

    # Its thread ends at the first OSError, and then `write` waits for ever: so
    # it writes to files that raise none.
    self._scheme = f'codistill-{id(self)}'
    record_writer.register_writer_factory(
        self._scheme,
        _EventFiles(self._scheme, troubles or Troubles(), patience),
    )
    purge_step = None if resume_step is None else resume_step + 1
    self._writer = tensorboardX.SummaryWriter(
        f'{self._scheme}:{os.fspath(logdir)}',
        purge_step=purge_step,
        flush_secs=10,
    )

  def write(self, step: int, metrics: Metrics) -> None:
    for key, value in as_floats(metrics).items():
      self._writer.add_scalar(key, value, int(step))

  def close(self) -> None:
    self._writer.close()


class _EventFiles:
  """Opens event files for tensorboardX, as <scheme>:<path>."""

  def __init__(self, scheme: str, troubles: Troubles, patience: Patience):
    self._prefix = f'{scheme}:'
    self._troubles = troubles
    self._patience = patience

  def directory_check(self, path: str) -> None:
    path = epath.Path(path.removeprefix(self._prefix))
    path.mkdir(parents=True, exist_ok=True)

  def open(self, path: str) -> '_EventFile':
    path = epath.Path(path.removeprefix(self._prefix))
    doing = 'writing TensorBoard events'
    return _EventFile(
        Appender(path, doing, self._troubles, patience=self._patience)
    )


class _EventFile:
  """As tensorboardX uses a file; what it writes comes to disk at `flush`."""

  def __init__(self, events: Appender):
    self._events = events
    self._data = bytearray()

  def write(self, data: bytes) -> None:
    self._data += data

  def flush(self) -> None:
    data, self._data = bytes(self._data), bytearray()
    self._events.append(data)

  def close(self) -> None:
    self.flush()
    # Lost events are no reason to end otherwise: metrics.jsonl has it all.
    with contextlib.suppress(TimeoutError):
      self._events.close()
