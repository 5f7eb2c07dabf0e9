"""A language model that holds a thread where a test says, in C code.

Stands for a compilation of minutes: Python runs no more than a signal handler
in the main thread meanwhile, and other threads run.
"""

import ctypes
import os
import pathlib
import threading

from codistill_jax.models import lstm

# Where: the number of a trace in train or eval mode; the first of training, and
# all of eval mode, are those of the look at all parts before a run begins. Or
# 'ahead-1': the second program, beside burn-in, for which the main thread waits
# at the first update with teachers. And the file that says it got there.
WHERE, MARK = 'STUCK_WHERE', 'STUCK_MARK'


def language_model(num_classes):
  """The model of the tiny run; stuck in one trace of `apply`."""
  model = lstm.language_model(num_classes, layers=1, units=8, embedding=8)
  counts = dict.fromkeys(('train', 'eval', 'ahead'), 0)

  def apply(variables, batch, carry, rng, train):
    thread = threading.current_thread()
    if thread.name == 'compile-ahead':
      kind = 'ahead'
    elif thread is threading.main_thread():
      kind = 'train' if train else 'eval'
    else:  # Where its operations are counted.
      return model.apply(variables, batch, carry, rng, train)
    counts[kind] += 1
    if os.environ.get(WHERE) == f'{kind}-{counts[kind]}':
      pathlib.Path(os.environ[MARK]).touch()
      left = 1000
      while left:
        left = ctypes.CDLL(None).sleep(left)
    return model.apply(variables, batch, carry, rng, train)

  return model._replace(apply=apply)
