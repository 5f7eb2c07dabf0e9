r"""What a look at a long run costs: processor seconds and memory.

    python -m benchmarks.records --records=200000

Makes up the records of a run of two groups, with the 24 numbers of a group that
codistils, and has `status` and `report` read them, each in a process of its own
with all that it imports. Prints JSON.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from codistill_jax import run_directory

_FLAGS = flags.FLAGS
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


def main(argv: Sequence[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as workdir:
    for group_id in (0, 1):
      _write(workdir, group_id, _FLAGS.records // 2)
    run = {'arm': 'long', 'num_groups': 2, 'exchange_every': 50}
    run_directory.write_run(workdir, run)
    found = {name: _cost(name, workdir) for name in ('status', 'report')}
  print(json.dumps({'records': _FLAGS.records, **found}, indent=2))


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


def _cost(binary: str, workdir: str) -> dict[str, Any]:
  command = [sys.executable, '-m', f'experiments.{binary}']
  process = subprocess.Popen(
      [*command, f'--workdir={workdir}'], stdout=subprocess.DEVNULL
  )
  _, status, used = os.wait4(process.pid, 0)
  if status:
    raise ValueError(f'{binary} ended with status {status}')
  return {
      'cpu_seconds': round(used.ru_utime + used.ru_stime, 2),
      'megabytes': round(used.ru_maxrss / 1000),
  }


if __name__ == '__main__':
  flags.DEFINE_integer('records', 200_000, 'Of both groups together.')
  app.run(main)
