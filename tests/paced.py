"""A distill weight that holds training up, for tests of processes."""

import os
import pathlib
import time
from collections.abc import Callable

VARIABLE = 'PACE_FILE'  # Names a file: the seconds that an update takes more.


def weight(value: float = 0.5) -> Callable[[int], float]:
  """`value` at every step, after a pause."""

  def paced(step):
    del step
    path = os.environ.get(VARIABLE)
    if path:
      time.sleep(float(pathlib.Path(path).read_text() or 0))
    return value

  return paced
