"""How a process is asked to stop, and leaves soon, whatever it is doing.

SIGTERM and SIGINT are a flag that loops poll. But Python runs its handlers in
the main thread, which may be inside XLA's compiler or another library for
minutes. So a thread hears of a signal through the wakeup descriptor, which C
code writes to at once, and if the main thread does not come to poll, it saves
what there is and ends the process. A second signal ends it without saving.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from experiments import cli

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds that the main thread has to come and poll: where nothing is to be
# saved, and in training, where an update may take a while.
_SOON = 0.5
_PATIENCE = 3.0


class MovedOnError(Exception):
  """Cannot be saved from outside, but the main thread will come to poll."""


class _Held(NamedTuple):
  step: int
  save: Callable[[], str]


class Rescue:
  """What a process would lose, and how another thread can save it.

  Attributes:
    line: What a process says that leaves while it has nothing to lose.
  """

  def __init__(self, line: str = 'stopped; nothing is lost'):
    self.line = line
    self._held: dict[int, _Held] = {}
    self._at_exit: dict[int, list[Callable[[], None]]] = {}

  def hold(self, group_id: int, step: int, save: Callable[[], str]) -> None:
    """From now on the process must not leave without `save`.

    Args:
      group_id: Whose; one state is held for each group.
      step: Of that state.
      save: Called in another thread while the main thread is stuck. Returns the
        line to leave with; raises MovedOnError to leave all to the main thread.
    """
    self._held[group_id] = _Held(step, save)

  def at_exit(self, group_id: int, act: Callable[[], None]) -> None:
    """Something to do when all is saved; the last one comes first."""
    self._at_exit.setdefault(group_id, []).append(act)

  def let_go(self, group_id: int) -> None:
    """The group has saved all and closed everything."""
    self._held.pop(group_id, None)
    self._at_exit.pop(group_id, None)

  @property
  def nothing_to_lose(self) -> bool:
    return not self._held

  def save(self) -> str:
    """Saves all that is held; the line to leave with.

    Raises:
      MovedOnError: If the main thread has to do it.
    """
    held = list(self._held.values())
    # Groups that share a process restart at a common step.
    if len({one.step for one in held}) > 1:
      raise MovedOnError('the groups are at different steps')
    lines = [one.save() for one in held]
    acts = [act for acts in list(self._at_exit.values()) for act in acts]
    for act in reversed(acts):
      try:
        act()
      except Exception as e:  # All is saved; nobody is left to handle it.
        logging.error('While leaving: %s', e)
    return '\n'.join(lines) or self.line


class StopRequest:
  """SIGTERM and SIGINT as a flag to poll; see the module's text.

  Attributes:
    rescue: What is at stake. None: something that only the main thread can
      bring to an end, however long that takes.
    signal_number: The first signal that came, or None.
  """

  def __init__(self, rescue: Rescue | None = None):
    self.rescue = rescue
    self.signal_number: int | None = None
    self._heard = threading.Event()
    self._saving = threading.Lock()
    self._undo: list[Callable[[], Any]] = []

  def __call__(self) -> bool:
    """Whether to stop; the main thread that asks then has to see to it."""
    if self.signal_number is None:
      return False
    if threading.current_thread() is threading.main_thread():
      # A rescue under way ends the process, or leaves it to the main thread;
      # two must not save at the same time.
      with self._saving:
        self._heard.set()
    return True

  def install(self) -> 'StopRequest':
    """Takes over both signals; in the main thread only."""
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    self._undo.append(lambda: (signal.set_wakeup_fd(before), os.close(sender)))
    for number in SIGNALS:
      handler = signal.signal(number, self._note)
      self._undo.append(lambda n=number, h=handler: signal.signal(n, h))
    threading.Thread(
        target=self._watch, args=(receiver,), name='stopping', daemon=True
    ).start()
    return self

  def uninstall(self) -> None:
    """Gives the signals back to whoever had them; ends the thread."""
    while self._undo:
      self._undo.pop()()

  def _note(self, number: int, frame: Any) -> None:
    # The thread counts the signals; here only so that a poll right after one
    # sees it.
    del frame
    if self.signal_number is None:
      self.signal_number = number

  def _watch(self, receiver: int) -> None:
    count = 0
    while numbers := os.read(receiver, 16):
      for number in numbers:
        if number not in SIGNALS:
          continue
        count += 1
        if count > 1:
          os._exit(128 + number)
        self._note(number, None)
        if self.rescue is not None:
          # In a thread of its own: this one waits for the second signal.
          threading.Thread(
              target=self._end_if_stuck, args=(number,), daemon=True
          ).start()
    os.close(receiver)

  def _end_if_stuck(self, number: int) -> None:
    rescue = self.rescue
    while not self._heard.wait(_SOON if rescue.nothing_to_lose else _PATIENCE):
      with self._saving:
        if self._heard.is_set():
          return
        try:
          outcome = cli.Stopped(rescue.save(), number)
        except MovedOnError:
          continue
        except Exception as e:  # Said, with its status, as in the main thread.
          outcome = e
        status = cli.say(outcome)
        _flush()
        os._exit(status)


def _flush() -> None:
  for stream in (sys.stdout, sys.stderr):
    # A full disk; a closed stream.
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
