r"""What a look at a long run costs: seconds and memory.

    python -m benchmarks.records

Makes up the records of a run of two groups, with the 24 numbers of a group that
codistils, and has `status` and `report` read them, each in a process of its own
with all that it imports.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import command, measure
from codistill_jax import run_directory

_RECORDS = 200_000  # Of both groups together.
_MOST = {'status': 0.5, 'report': 5.0}  # Seconds.
_KEYS = (
    *('loss/task', 'loss/distill', 'loss/total', 'distill/weight'),
    *('optim/grad_norm', 'optim/learning_rate', 'exchange/stall_ms'),
    *('perf/steps_per_sec', 'perf/examples_per_sec', 'perf/teacher_share'),
    *('perf/model_flops_per_step', 'perf/model_flops_per_sec'),
    *('exchange/peers_present', 'exchange/publication_bytes'),
    *('exchange/staleness_steps', 'exchange/staleness_steps_max'),
    *('exchange/staleness_seconds', 'exchange/staleness_seconds_max'),
    *('exchange/staleness_steps_group_0', 'exchange/staleness_seconds_group_0'),
)
_COUNTS = dict.fromkeys(('exchange/publish_failures', 'exchange/rejected'), 0.0)


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each binary."""
  records = 200 if options.quick else _RECORDS
  with tempfile.TemporaryDirectory() as workdir:
    for group_id in (0, 1):
      _write(workdir, group_id, records // 2)
    run = {'arm': 'long', 'num_groups': 2, 'exchange_every': 50}
    run_directory.write_run(workdir, run)
    for name, most in _MOST.items():
      found = [_cost(name, workdir) for _ in range(options.times(3))]
      seconds, used, megabytes = map(measure.spread, zip(*found))
      yield {
          'name': name,
          'records': records,
          'seconds': seconds,
          'processor_seconds': used,
          'megabytes': megabytes,
          'goal': measure.goal(seconds['median'], at_most=most),
      }


def _write(workdir: str, group_id: int, count: int) -> None:
  path = run_directory.metrics_path(workdir, group_id)
  path.parent.mkdir(parents=True)
  with path.open('w') as f:
    for n in range(1, count + 1):
      values = {key: random.uniform(1.0, 6.0) for key in _KEYS}
      record = {'step': 10 * n, 'time': 1.7e9 + n, **values, **_COUNTS}
      f.write(json.dumps(record) + '\n')
      if n % 100 == 0:
        found = {'eval/loss': 6.0 - n / count, 'eval/accuracy': 0.2}
        f.write(json.dumps({'step': 10 * n, 'time': 1.7e9 + n, **found}) + '\n')


# Between us and the binary: a process begins with the peak of its parent.
_USED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
"""


def _cost(binary: str, workdir: str) -> tuple[float, float, float]:
  """Returns seconds, those of processors, and the most memory in MB."""
  run = [sys.executable, '-m', f'experiments.{binary}', f'--workdir={workdir}']
  start = time.perf_counter()
  done = subprocess.run(
      [sys.executable, '-c', _USED, *run],
      stdout=subprocess.PIPE,
      check=True,
      text=True,
  )
  seconds = time.perf_counter() - start
  used, megabytes = map(float, done.stdout.split())
  return seconds, used, megabytes


if __name__ == '__main__':
  command.run('records', rows)
