"""How tests wait: for a condition, never for a time that should be enough.

A test must come to the same end on a machine where any thread or process stands
still for many seconds: limits are for what hangs, so they are long.
"""

import time
from collections.abc import Callable

PATIENCE = 240.0  # Seconds after which something is taken to hang.


def until(
    condition: Callable[[], object], seconds: float = PATIENCE, process=None
) -> None:
  """Waits until `condition()` holds; fails if `process` ends before."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'waited in vain'
    assert process is None or not process.ended, process.output[-4000:]
    time.sleep(0.005)


class Clock:
  """Stands for the module `time`: passes only while somebody sleeps.

  What others do meanwhile is in `acts`: each is called with the time after each
  bit of sleep.
  """

  def __init__(self, now: float = 1000.0):
    self.now = now
    self.acts: list[Callable[[float], object]] = []

  def monotonic(self) -> float:
    return self.now

  def sleep(self, seconds: float) -> None:
    self.now += seconds
    for act in list(self.acts):
      act(self.now)

  def later(self, seconds: float, act: Callable[[], object]) -> None:
    """Calls `act` once, when so many seconds have passed."""
    due = self.now + seconds

    def perhaps(now: float) -> None:
      if now >= due and perhaps in self.acts:
        self.acts.remove(perhaps)
        act()

    self.acts.append(perhaps)

  def every(self, seconds: float, act: Callable[[int], object]) -> None:
    """Calls `act` with 1, 2, ..., at this interval."""
    start, count = self.now, 0

    def perhaps(now: float) -> None:
      nonlocal count
      while now - start >= (count + 1) * seconds:
        count += 1
        act(count)

    self.acts.append(perhaps)
