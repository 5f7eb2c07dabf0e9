"""What all binaries share: one-line errors and exit statuses.

  0  done
  1  a clear error on the last line; the same command would fail again
 70  a crash, with its traceback; starting again may help
 75  a clear error that may pass: a peer that did not come, a full disk
128+n  stopped by signal n, everything saved
"""

import contextlib
import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

CLEAR_ERROR = 1
CRASH = 70
MAY_PASS = 75

_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EFBIG,  # A limit of the system on how much may be written.
    errno.EIO,
    errno.EMFILE,
    errno.ENOSPC,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

# Packages that only some binaries need, by the extra that installs them.
_EXTRAS = dict.fromkeys(('jinja2', 'matplotlib', 'pandas', 'pyarrow'), 'report')

# Said by a process that leaves before there is anything to save.
NOT_BEGUN = 'stopped before training began; the same command starts it again'

# Set by a supervisor to the command that a user typed.
COMMAND_VARIABLE = 'CODISTILL_COMMAND'


class Stopped(Exception):
  """The process was asked to stop, and everything is saved."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_status = 128 + signal_number


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a binary: absl flags, then `main`, with the statuses above."""
  # The notes of orbax, jax and XLA would bury our own lines; --verbosity=0
  # brings them back.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

  def quiet(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    status = status_of(main, argv)
    _settle_output()
    sys.exit(status)

  app.run(quiet)


def status_of(
    main: Callable[[Sequence[str]], None], argv: Sequence[str]
) -> int:
  """Runs `main`; prints what went wrong; returns the exit status."""
  try:
    if len(argv) > 1:
      raise ValueError(
          f'unexpected argument {argv[1]!r}; everything is given by flags, see'
          ' --help'
      )
    main(argv)
  except KeyboardInterrupt:
    return 130
  except Exception as e:
    return say(e)
  return 0


def say(error: Exception) -> int:
  """Prints what went wrong; returns the exit status for it."""
  if isinstance(error, Stopped):
    tell(str(error), error=True)
    return error.exit_status
  if isinstance(error, ValueError | OSError | FloatingPointError):
    # Jax raises ValueError too, from inside a user's own model.
    logging.info('Where the error came from:', exc_info=error)
    tell(f'error: {" ".join(str(error).split())}', error=True)
    passing = isinstance(error, TimeoutError) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )
    return MAY_PASS if passing else CLEAR_ERROR
  package = str(getattr(error, 'name', '')).partition('.')[0]
  if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
    extra = f"'codistill_jax[{_EXTRAS[package]}]'"
    tell(f'error: {package} is missing; pip install {extra}', error=True)
    return CLEAR_ERROR
  # A crash: whoever supervises may start again.
  text = ''.join(traceback.format_exception(error)).rstrip()
  tell(text, error=True)
  return CRASH


def tell(text: str, *, error: bool = False) -> None:
  """Prints, or does not: the log may lie on the very disk that is full.

  Args:
    text: What to say.
    error: To standard error.
  """
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _settle_output() -> None:
  """Drops output that cannot be written.

  Python tries once more on its way out, and would end with a status of its own.
  """
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())


def own_command() -> str:
  """The command of this process, as a user would type it."""
  name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
  return shlex.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])
