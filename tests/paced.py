"""A distill weight that holds training up, for tests of processes.

What may go on cannot come to its end before a test, on a machine of any speed,
has done to it what it wants to do.
"""

import os
import pathlib
import signal
import time
from collections.abc import Callable

from codistill_jax import schedules

# Names a file: the seconds that an update takes more, and how many updates may
# be made. An empty file, or none: no more, and all.
VARIABLE = 'PACE_FILE'


def write(path: str | os.PathLike, seconds: float = 0.0, limit: int = 0):
  """Sets the pace of the processes that have this file in `VARIABLE`.

  Args:
    path: The file; replaced as a whole.
    seconds: That an update takes more.
    limit: How many updates may be made; 0: all.
  """
  path = pathlib.Path(path)
  new = path.with_suffix('.new')
  new.write_text(f'{seconds} {limit}')
  os.replace(new, path)


def weight(value: float = 0.5) -> Callable[[int], float]:
  """`value` at every step, after a pause."""
  return _paced(lambda step: value)


def distill_weight(burn_in_steps: int = 0) -> Callable[[int], float]:
  """`schedules.distill_weight`, after a pause."""
  return _paced(schedules.distill_weight(burn_in_steps=burn_in_steps))


def _paced(weight_of: Callable[[int], float]) -> Callable[[int], float]:
  def paced(step):
    seconds, limit = _read()
    time.sleep(seconds)
    while limit and step >= limit and not _asked_to_stop():
      time.sleep(0.01)
      _, limit = _read()
    return weight_of(step)

  return paced


def _read() -> tuple[float, int]:
  path = os.environ.get(VARIABLE)
  words = pathlib.Path(path).read_text().split() if path else []
  return (float(words[0]), int(words[1])) if words else (0.0, 0)


def _asked_to_stop() -> bool:
  """Whether the `StopRequest` of this process has heard a signal."""
  request = getattr(signal.getsignal(signal.SIGTERM), '__self__', None)
  return getattr(request, 'signal_number', None) is not None
