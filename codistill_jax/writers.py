"""Where metrics go: JSON lines, the terminal; TensorBoard.

A writer is anything with `write(step, metrics)` and `close()`. Metrics are
scalars by key (`loss/task`), device arrays or plain numbers. What is optional
is a `NullWriter`, never None.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TextIO

from absl import logging
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    BackgroundWriter,
    Patience,
    Troubles,
    Unwritten,
)

Metrics = Mapping[str, Any]

_MAX_LINES = 10_000  # Kept while the disk fails.


class Writer(Protocol):
  """Takes the metrics of a run."""

  def write(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of `step`, scalars by key."""

  def close(self) -> None:
    """Hands on all that was written; no write may follow."""


def as_floats(metrics: Metrics) -> dict[str, float]:
  """Metrics as Python floats, waiting for the device where it must.

  Raises:
    ValueError: If a value is no scalar.
  """
  return {key: _as_float(key, value) for key, value in metrics.items()}


def _as_float(key: str, value: Any) -> float:
  try:
    # `item` takes shape (1,) too and also reads bfloat16.
    return float(value.item() if hasattr(value, 'item') else value)
  except (TypeError, ValueError):
    shape = getattr(value, 'shape', None)
    got = f'shape {shape}' if shape is not None else repr(value)
    raise ValueError(
        f'Metric {key!r} must be one number, got {got}; reduce it first.'
    ) from None


class NullWriter:
  """Writes nothing."""

  def write(self, step: int, metrics: Metrics) -> None:
    del step, metrics

  def close(self) -> None:
    pass


class MultiWriter:
  """Hands everything to several writers, in order."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = tuple(writers)

  def write(self, step: int, metrics: Metrics) -> None:
    # Once, here: each writer would wait for the device again.
    metrics = as_floats(metrics)
    for writer in self._writers:
      writer.write(step, metrics)

  def close(self) -> None:
    """Closes all, also past one that fails; raises the first failure."""
    errors = []
    for writer in self._writers:
      try:
        writer.close()
      except Exception as e:  # Raised below, once the others are closed.
        errors.append(e)
    if errors:
      raise errors[0]


class Source(NamedTuple):
  """Whose metrics a writer gets.

  Attributes:
    directory: Of the group; it exists.
    arm: Name of the run.
    group_id: The group.
    num_groups: G.
    start: The step the run goes on from; 0 at its beginning.
    configuration: Bindings of the run, a statement each.
  """

  directory: str
  arm: str
  group_id: int
  num_groups: int
  start: int
  configuration: Sequence[str] = ()


class OwnWriter:
  """A writer of a user's own: what it raises does not end the training."""

  def __init__(
      self,
      make: Callable[[Source], Writer],
      source: Source,
      troubles: Troubles,
  ):
    """Makes the writer; if that fails, again after 1, 2, 4, ... records.

    Args:
      make: A class or function.
      source: Whose metrics it gets.
      troubles: Where it is noted that it fails.
    """
    self._make, self._source, self._troubles = make, source, troubles
    name = getattr(make, '__qualname__', repr(make))
    self._doing = f'writing by {make.__module__}.{name}'
    self._writer: Writer | None = None
    self._records = self._missed = 0
    self._open()

  def write(self, step: int, metrics: Metrics) -> None:
    """Hands on a copy."""
    self._records += 1
    if self._writer is None and self._records.bit_count() == 1:
      self._open()
    if self._writer is not None:
      with self._noting():
        self._writer.write(step, dict(metrics))
        self._troubles.worked(self._doing)
        return
    self._missed += 1

  def close(self) -> None:
    """Closes it, and says how many records it has missed."""
    if self._writer is not None:
      with self._noting():
        self._writer.close()
    if self._missed:
      logging.warning(
          '%s has missed %d of %d records; metrics.jsonl has them all',
          self._doing,
          self._missed,
          self._records,
      )

  def _open(self) -> None:
    with self._noting():
      self._writer = self._make(self._source)

  @contextlib.contextmanager
  def _noting(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # It may raise anything.
      logging.info('Where the error came from:', exc_info=e)
      error = RuntimeError(f'{type(e).__name__}: {e}')
      self._troubles.failed(self._doing, error)


class _Appender:
  """Appends pieces as a whole; keeps them in memory while that fails."""

  def __init__(
      self,
      path: epath.PathLike,
      doing: str,
      troubles: Troubles,
      *,
      patience: Patience = DEFAULT_PATIENCE,
      room: int = _MAX_LINES,
  ):
    """Opens the file.

    Args:
      path: In a directory that exists; this process alone writes to it.
      doing: The name of this as a trouble.
      troubles: Where a disk that fails is noted.
      patience: Time limits.
      room: How many pieces are kept while the disk fails; the newest.

    Raises:
      OSError: If it cannot be opened.
    """
    self._path = epath.Path(path)
    self._patience = patience
    self._count = 0
    self._file = self._path.open('ab')
    self._size = self._file.seek(0, os.SEEK_END)
    self._writer = BackgroundWriter(
        self._write, doing, troubles, room=room, patience=patience
    )

  def append(self, piece: bytes) -> None:
    """Writes a piece before it returns, unless the disk fails."""
    self._count += 1
    self._writer.put(self._count, piece)
    self._writer.wait(failing=0.0)

  def close(self) -> None:
    """Tries once more, and closes.

    Raises:
      TimeoutError: If pieces are left that could not be written.
    """
    unwritten = self._writer.finish(2 * self._patience.retry)
    self._writer.close()
    if self._writer.finished:  # Or it hangs in a write, and so would closing.
      self._drop_file()
    if self._writer.dropped:
      logging.warning(
          '%d pieces of %s are lost', self._writer.dropped, self._path
      )
    _raise_unwritten(unwritten, self._path)

  def _write(self, number: int, piece: bytes) -> None:
    """In the thread."""
    del number
    try:
      if self._file is None:
        self._reopen()
      self._file.write(piece)
      self._file.flush()
    except OSError:
      self._drop_file()
      raise
    self._size += len(piece)

  def _drop_file(self) -> None:
    # Closing tries to write what is buffered; `_reopen` cuts that off.
    file, self._file = self._file, None
    if file is not None:
      with contextlib.suppress(OSError):
        file.close()

  def _reopen(self) -> None:
    """Opens the file again, without what was written of a piece."""
    self._file = self._path.open('ab')
    size = self._file.seek(0, os.SEEK_END)
    if size > self._size:
      size = self._file.truncate(self._size)
    self._size = size


_UPLOAD_SECONDS = 10.0
_UPLOAD_BYTES_PER_SECOND = 1 << 20


class _Uploader:
  """Puts a growing file into an object store, whole, now and then.

  There nothing can be appended. What has come since the last time is a part: of
  10 seconds, or of as many as the file has megabytes, so that no more than one
  megabyte a second goes up. A kill loses at most one part and the next, where
  that is on its way.
  """

  def __init__(
      self,
      path: epath.PathLike,
      doing: str,
      troubles: Troubles,
      *,
      patience: Patience = DEFAULT_PATIENCE,
  ):
    """Reads what is there; see `_Appender`."""
    self._path = path
    self._patience = patience
    self._lock = threading.Lock()
    self._data = bytearray(_content(path))
    self._count = 0
    self._asked = False  # For an upload, which takes what comes till then.
    self._next = 0.0
    self._closing = threading.Event()
    self._writer = BackgroundWriter(
        self._write, doing, troubles, patience=patience
    )

  def append(self, piece: bytes) -> None:
    """Adds a piece; it goes up with its part."""
    with self._lock:
      self._data += piece
      asked, self._asked = self._asked, True
    if not asked:
      self._count += 1
      self._writer.put(self._count, None)

  def close(self) -> None:
    """Puts up the rest; raises as `_Appender.close`."""
    self._closing.set()
    unwritten = self._writer.finish(2 * self._patience.retry)
    self._writer.close()
    _raise_unwritten(unwritten, self._path)

  def _write(self, number: int, unused: None) -> None:
    """In the thread."""
    del number, unused
    self._closing.wait(max(0.0, self._next - time.monotonic()))
    with self._lock:
      data, self._asked = bytes(self._data), False
    try:
      files.write_bytes(self._path, data)
    except OSError:
      self._asked = True  # It is tried again, with what comes till then.
      raise
    self._next = time.monotonic() + max(
        _UPLOAD_SECONDS, len(data) / _UPLOAD_BYTES_PER_SECOND
    )


def _content(path: epath.PathLike) -> bytes:
  """Returns all of a file; b'' if it is not there."""
  try:
    return files.content(path)
  except FileNotFoundError:
    return b''


def _raise_unwritten(unwritten: Unwritten | None, path: epath.PathLike) -> None:
  if unwritten is not None:
    raise TimeoutError(
        f'{len(unwritten.steps)} records could not be written to'
        f' {os.fspath(path)} ({unwritten.error}); see to the disk, and start'
        ' the same command again'
    ) from unwritten.error


def _appender(path: epath.Path, *args: Any, **kwargs: Any) -> Any:
  """Makes what appends to a file, on a disk or in an object store."""
  if files.is_remote(path):
    kwargs.pop('room', None)  # It has all of the file in memory.
    return _Uploader(path, *args, **kwargs)
  return _Appender(path, *args, **kwargs)


class JsonlWriter:
  """Appends one JSON object a line: `step`, `time` (Unix seconds), metrics.

  A line reaches the operating system as a whole before `write` returns, so a
  kill loses no earlier record; while the disk fails, lines wait in memory. To
  an object store the file goes whole every 10 seconds, or more seldom where it
  is large, and at the end: a kill loses what came since. NaN
  and infinities, which JSON lacks, become the strings "NaN", "Infinity" and
  "-Infinity"; `run_directory.read_metrics` turns them back.
  """

  def __init__(
      self,
      path: os.PathLike[str] | str,
      *,
      resume_step: int | None = None,
      clock: Callable[[], float] = time.time,
      troubles: Troubles | None = None,
      patience: Patience = DEFAULT_PATIENCE,
      room: int = _MAX_LINES,
  ):
    """Opens the file, and repairs what a killed writer left.

    Args:
      path: The file; its directory is made if need be.
      resume_step: The step the run goes on from. Records of later steps are
        dropped, all at once, since they are about to be written again. None
        keeps every record.
      clock: Gives `time`; for tests.
      troubles: Where a disk that fails is noted.
      patience: Time limits.
      room: How many lines are kept while the disk fails; the newest.
    """
    self._clock = clock
    path = epath.Path(files.absolute(path))
    files.make_directory(path.parent)
    self._step = _repair(path, resume_step)
    self._lines = _appender(
        path,
        'writing metrics',
        troubles or Troubles(),
        patience=patience,
        room=room,
    )

  def write(self, step: int, metrics: Metrics) -> None:
    """Appends one record, or keeps it while the disk fails.

    Raises:
      ValueError: If a metric is no scalar, or is called `step` or `time`; or if
        the run was further on.
    """
    for key in ('step', 'time'):
      if key in metrics:
        raise ValueError(
            f'Metric key {key!r} is taken by the record itself; rename it.'
        )
    if step < self._step:
      raise ValueError(
          f'a record of step {step} after one of step {self._step}; make a new'
          ' writer for another run: with another path, or a resume_step'
      )
    self._step = int(step)
    record: dict[str, Any] = {'step': self._step, 'time': self._clock()}
    for key, value in as_floats(metrics).items():
      record[key] = files.encode_number(value)
    line = json.dumps(record, allow_nan=False) + '\n'
    self._lines.append(line.encode())

  def close(self) -> None:
    """Closes the file.

    Raises:
      TimeoutError: If there are records that the disk does not take.
    """
    self._lines.close()


def _repair(path: epath.Path, resume_step: int | None) -> int:
  """Drops a torn last line and, on resume, the records of later steps.

  Returns:
    The newest step that is kept.
  """
  lines = list(run_directory.lines(path))
  # A damaged whole line stays, for a person to look at; readers skip it.
  records = map(run_directory.parse_record, lines)
  steps = [record['step'] if record else 0 for record in records]
  last = math.inf if resume_step is None else resume_step
  kept = [x[-1:] == b'\n' and step <= last for x, step in zip(lines, steps)]
  if not all(kept):
    files.write_bytes(path, b''.join(itertools.compress(lines, kept)))
  return max(itertools.compress(steps, kept), default=0)


# How a metric is shown on the terminal, in this order; others are not.
_SHOWN: dict[str, Callable[[float], str]] = {
    'loss/task': '  loss/task {:.3f}'.format,
    'eval/loss': '  eval/loss {:.4f}'.format,
    'eval/perplexity': '  perplexity {:.1f}'.format,
    'eval/bits_per_byte': '  bits per byte {:.3f}'.format,
    'eval/accuracy': '  accuracy {:.2%}'.format,
    'eval/auc': '  auc {:.4f}'.format,
    'eval/calibration': '  calibration {:.3f}'.format,
    'eval/examples': '  over {:,.0f}'.format,
    'perf/steps_per_sec': '  {:.1f} steps/s'.format,
    'exchange/staleness_steps': '  staleness {:.0f}'.format,
}


def describe(metrics: Metrics) -> str:
  """Formats the metrics a person watches: `loss/task 5.123  ...`."""
  values = as_floats({k: metrics[k] for k in _SHOWN if k in metrics})
  return ''.join(_SHOWN[k](v) for k, v in values.items()).strip()


class ProgressWriter:
  """Shows a bar on a terminal and in a notebook; else a line now and then."""

  def __init__(
      self,
      num_steps: int,
      *,
      resume_step: int = 0,
      name: str = '',
      every_seconds: float = 10.0,
      stream: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the bar.

    Args:
      num_steps: The last step of the run.
      resume_step: The step the run goes on from.
      name: Put before every line, such as `group 0`.
      every_seconds: Training metrics that come sooner after the last plain
        line are not shown. Evaluations and the last step always are.
      stream: Where to; standard error if None.
      clock: Seconds; for tests.
    """
    self._num_steps = num_steps
    self._name = name
    self._every_seconds = every_seconds
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._last_line: float | None = None
    self._bar = None
    # The kernel of a notebook has a standard error of its own.
    notebook = type(self._stream).__module__.startswith('ipykernel.')
    if notebook or self._stream.isatty():
      from tqdm import auto  # Here: log files need no bar.

      self._bar = auto.tqdm(
          total=num_steps,
          initial=resume_step,
          desc=name or None,
          unit='step',
          file=self._stream,
          dynamic_ncols=True,
      )

  def write(self, step: int, metrics: Metrics) -> None:
    if self._bar is None:
      self._write_line(int(step), metrics)
    elif _is_evaluation(metrics):
      # Above the bar, to stay; the bar's own line is overwritten.
      self._bar.write(self._line(int(step), metrics), file=self._stream)
    else:
      self._bar.set_postfix_str(_bar_text(metrics), refresh=False)
      self._bar.update(int(step) - self._bar.n)

  def _write_line(self, step: int, metrics: Metrics) -> None:
    now = self._clock()
    due = (
        self._last_line is None or now - self._last_line >= self._every_seconds
    )
    last = step >= self._num_steps
    if not (due or last or _is_evaluation(metrics)):
      return
    if not _is_evaluation(metrics):
      self._last_line = now
    # The log may lie on the very disk that is full.
    with contextlib.suppress(OSError):
      print(self._line(step, metrics), file=self._stream, flush=True)

  def _line(self, step: int, metrics: Metrics) -> str:
    prefix = f'{self._name}  ' if self._name else ''
    text = describe(metrics)
    return f'{prefix}step {step}/{self._num_steps}  {text}'.rstrip()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _bar_text(metrics: Metrics) -> str:
  # The bar shows a speed of its own.
  return describe(
      {k: v for k, v in metrics.items() if not k.startswith('perf')}
  )


def _is_evaluation(metrics: Metrics) -> bool:
  return any(key.startswith('eval/') for key in metrics)


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
    # Here: the file must not cost what it does not use.
    with _absent('torch', 'boto3', 'google.cloud.storage'):
      import tensorboardX
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


@contextlib.contextmanager
def _absent(*modules: str) -> Iterator[None]:
  """Hides modules that an import would take if it can, for what nobody uses.

  PyTorch takes 1.3 seconds and 200 MB.
  """
  hidden: dict[str, Any] = {x: None for x in modules if x not in sys.modules}
  sys.modules.update(hidden)
  try:
    yield
  finally:
    for name in hidden:
      sys.modules.pop(name, None)


class _EventFiles:
  """Opens event files for tensorboardX, as <scheme>:<path>."""

  def __init__(self, scheme: str, troubles: Troubles, patience: Patience):
    self._prefix = f'{scheme}:'
    self._troubles = troubles
    self._patience = patience

  def directory_check(self, path: str) -> None:
    files.make_directory(path.removeprefix(self._prefix))

  def open(self, path: str) -> '_EventFile':
    path = epath.Path(path.removeprefix(self._prefix))
    doing = 'writing TensorBoard events'
    return _EventFile(
        _appender(path, doing, self._troubles, patience=self._patience)
    )


class _EventFile:
  """As tensorboardX uses a file; what it writes comes to disk at `flush`."""

  def __init__(self, events: _Appender):
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
