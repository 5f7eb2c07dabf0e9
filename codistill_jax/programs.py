"""Compiled programs: before they are needed, and once for a machine.

A run has two, of burn-in and of codistillation. What is compiled is kept in a
directory of the user's (jax's persistent cache), and where two processes want
one program at once, as groups of one machine do, the second one waits and loads
it. A cache that fails costs a compilation, and is no error.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_KEPT_SECONDS = 30 * 24 * 3600.0
_PATIENCE_SECONDS = 300.0  # Then one compiles by oneself.
_LEAST_SECONDS = 0.2  # What is compiled faster is not kept.


def default_directory() -> str:
  """Returns where programs are kept unless a user says otherwise.

  One for each kind of processor, whose instructions a program may use: a home
  directory is often shared by machines that differ.
  """
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
  return os.path.join(home, 'codistill_jax', 'programs', kind)


def _processor() -> str:
  """Returns what tells the instructions of processors apart."""
  try:
    with open('/proc/cpuinfo') as f:
      flags = {x for x in f if x.startswith(('flags', 'Features'))}
  except OSError:
    flags = set()
  return '\n'.join([platform.machine(), *sorted(flags)])


def keep(directory: str) -> None:
  """Keeps what this process compiles, for 30 days; loads what others did.

  Does nothing if jax has been told already (JAX_COMPILATION_CACHE_DIR).

  Args:
    directory: Made if missing. Who can write there runs code in this process:
      one of another user is refused.

  Raises:
    OSError: If it cannot be used; nothing is kept then.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  os.makedirs(directory, mode=0o700, exist_ok=True)
  if os.stat(directory).st_uid != os.getuid():
    raise PermissionError(errno.EPERM, 'belongs to another user', directory)
  if not os.access(directory, os.W_OK):
    raise PermissionError(errno.EACCES, 'is not writable', directory)
  with os.scandir(directory) as entries:
    for entry in entries:
      with contextlib.suppress(OSError):
        if time.time() - entry.stat().st_mtime > _KEPT_SECONDS:
          os.remove(entry)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update(
      'jax_persistent_cache_min_compile_time_secs', _LEAST_SECONDS
  )


class Programs:
  """A compiled step: a program without teachers, and one with them."""

  def __init__(self, step: jax.stages.Wrapped):
    """Compiles nothing yet.

    Args:
      step: What jax.jit or jax.pmap gave, of state, batch, teachers (or None)
        and distill weight. The shapes of each are always the same.
    """
    self._step = step
    self._expected: Any = None
    self._begun: dict[bool, threading.Thread | None] = {}

  def expect(self, teachers: Any) -> None:
    """Compiles for such teachers in a thread, from the first update on.

    Args:
      teachers: As they will come, or `jax.ShapeDtypeStruct` with shardings.
    """
    self._expected = teachers

  def __call__(
      self, state: Any, batch: Any, teachers: Any, distill_weight: Any
  ) -> Any:
    taught = teachers is not None
    if taught not in self._begun:
      self._begun[taught] = None
      _share(self._step, state, batch, teachers, distill_weight)
    elif thread := self._begun[taught]:
      thread.join()
      self._begun[taught] = None
    found = self._step(state, batch, teachers, distill_weight)
    if self._expected is not None and True not in self._begun:
      self._compile_ahead(found[0], batch, distill_weight)
    return found

  def _compile_ahead(self, state: Any, batch: Any, weight: Any) -> None:
    # Of the state only shapes: the next update takes its arrays.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
    )

    def run(teachers: Any) -> None:
      # What is wrong, the call says; it compiles again.
      with contextlib.suppress(Exception):
        compile_once(self._step, shapes, batch, teachers, weight)

    # No daemon: to end Python beneath a compilation is a crash. The binaries
    # know the name, and do not wait.
    thread = threading.Thread(
        target=run, args=(self._expected,), name='compile-ahead'
    )
    self._begun[True] = thread
    self._expected = None
    thread.start()


def shared(function: jax.stages.Wrapped) -> Callable[..., Any]:
  """Returns a jitted function whose first call compiles once for a machine."""
  begun = False

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    nonlocal begun
    leaves = () if begun else jax.tree.leaves(args)
    if not (begun or any(isinstance(x, jax.core.Tracer) for x in leaves)):
      begun = True
      _share(function, *args)
    return function(*args)

  return call


def _share(step: jax.stages.Wrapped, *args: Any) -> None:
  # Without a place to share it, a call compiles by itself.
  if jax.config.jax_compilation_cache_dir and jax.process_count() == 1:
    compile_once(step, *args)


def compile_once(step: jax.stages.Wrapped, *args: Any) -> None:
  """Compiles for arguments, or shapes; a call with such compiles no more."""
  lowered = step.lower(*args)
  with _turn(lowered):
    lowered.compile()
  # What XLA took to compile a step, 150 MB of a small one, glibc would keep.
  with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _turn(lowered: jax.stages.Lowered) -> Iterator[None]:
  """Waits until no process of this machine compiles the same program."""
  directory = jax.config.jax_compilation_cache_dir
  with contextlib.ExitStack() as stack:
    if directory:
      name = hashlib.sha256(lowered.as_text().encode()).hexdigest()
      with contextlib.suppress(OSError):  # Then nobody waits for anybody.
        os.makedirs(directory, mode=0o700, exist_ok=True)
        file = stack.enter_context(open(f'{directory}/{name}.lock', 'ab'))
        _lock(file.fileno())
    yield


def _lock(descriptor: int) -> None:
  end = time.monotonic() + _PATIENCE_SECONDS
  while time.monotonic() < end:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      time.sleep(0.02)
    else:
      return
