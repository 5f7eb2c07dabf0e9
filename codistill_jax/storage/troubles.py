"""What fails now and may work again: said once when it begins and ends.

A full disk fails at every save. Training goes on; the log is not filled, and
`status` shows what does not work at this moment.
"""

import threading
import time
from typing import NamedTuple

from absl import logging


class Trouble(NamedTuple):
  """Something that fails since a while.

  Attributes:
    doing: What fails, such as 'saving a resume checkpoint'.
    reason: Why it failed last, in one line.
    since: Unix seconds of the first failure in a row.
    count: Failures in a row.
  """

  doing: str
  reason: str
  since: float
  count: int


class Troubles:
  """What a process cannot do at the moment; safe to use from any thread."""

  def __init__(self, who: str = ''):
    """Begins without troubles.

    Args:
      who: Stands before every line of the log, such as 'group 3: '.
    """
    self._who = who
    self._lock = threading.Lock()
    self._now: dict[str, Trouble] = {}
    self.failures = 0

  def failed(self, doing: str, error: BaseException) -> None:
    """Notes a failure; says so if it is the first in a row."""
    reason = ' '.join(str(error).split()) or type(error).__name__
    with self._lock:
      self.failures += 1
      before = self._now.get(doing)
      since, count = (before.since, before.count) if before else (0.0, 0)
      self._now[doing] = Trouble(doing, reason, since or time.time(), count + 1)
    if before is None:
      logging.warning(
          '%s%s fails (%s); training goes on, and it is tried again',
          self._who,
          doing,
          reason,
      )

  def worked(self, doing: str) -> None:
    """Notes a success; says so if it failed before."""
    with self._lock:
      before = self._now.pop(doing, None)
    if before is not None:
      logging.warning(
          '%s%s works again, after %d failures', self._who, doing, before.count
      )

  @property
  def now(self) -> tuple[Trouble, ...]:
    """What fails at this moment, the oldest first."""
    with self._lock:
      return tuple(sorted(self._now.values(), key=lambda t: t.since))
