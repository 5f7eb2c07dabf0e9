"""Processes that are started, asked to leave, and do not outlive this one."""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from experiments import cli
from experiments.stopping import StopRequest

_POLL_SECONDS = 0.2
_SOON_SECONDS = 5.0  # For a command that has nothing to save.


def call(
    command: Sequence[str], stop: StopRequest, *, capture: bool = False
) -> subprocess.CompletedProcess[str]:
  """Runs a command that has nothing to save, to its end.

  Args:
    command: Program and arguments.
    stop: Once true, the command is ended within seconds.
    capture: Whether to keep its output; else it goes where ours goes.

  Raises:
    Stopped: If asked to stop before it ended well.
  """
  pipe = subprocess.PIPE if capture else None
  process = popen(
      command, stdout=pipe, stderr=pipe, text=True, errors='replace'
  )
  with process, contextlib.ExitStack() as stack:
    stack.callback(wait_or_kill, process, _SOON_SECONDS)
    stack.callback(ask_to_leave, process)
    while True:
      with contextlib.suppress(subprocess.TimeoutExpired):
        out, err = process.communicate(timeout=_POLL_SECONDS)
        # It may have heard of the signal as well.
        if process.returncode and stop():
          raise stopped(stop)
        return subprocess.CompletedProcess(
            command, process.returncode, out, err
        )
      if stop():
        raise stopped(stop)


def stopped(stop: StopRequest) -> cli.Stopped:
  """What ends a supervisor that was asked to stop."""
  return cli.Stopped(
      'stopped; the same command goes on from here',
      stop.signal_number or signal.SIGTERM,
  )


def say(text: str, stream: TextIO | None = None) -> None:
  """Says it, or not: our own output may lie on the disk that is full."""
  with contextlib.suppress(OSError):
    print(text, file=stream or sys.stderr, flush=True)


def popen(command: Sequence[str], **kwargs: Any) -> subprocess.Popen:
  """Starts a process that a terminal does not reach, and that ends with us."""
  return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      # Not in the foreground group of the terminal: Ctrl-C reaches this
      # process alone, which then asks each process once.
      start_new_session=True,
      preexec_fn=_die_with_parent,
      **kwargs,
  )


def ask_to_leave(process: subprocess.Popen) -> None:
  """Asks by SIGTERM, which a second time would mean: at once."""
  if process.poll() is None:
    process.send_signal(signal.SIGTERM)
    # One that somebody has stopped would not hear of it.
    process.send_signal(signal.SIGCONT)


def wait_or_kill(process: subprocess.Popen, seconds: float) -> None:
  """Returns once it has ended, after about so many seconds at most."""
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def _find_prctl() -> Callable[[int, int], int] | None:
  return ctypes.CDLL(None).prctl if sys.platform == 'linux' else None


_PRCTL = _find_prctl()  # Not between fork and exec.


def _die_with_parent() -> None:
  """A group must not go on training when nobody watches it any more.

  At once: one that saves first would meet its successor.
  """
  if _PRCTL is not None:
    set_parent_death_signal = 1
    _PRCTL(set_parent_death_signal, signal.SIGKILL)
