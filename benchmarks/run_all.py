r"""Runs the benchmarks, each as a process, and makes their page.

    python -m benchmarks.run_all --device=cpu

On a GPU that is lent for four minutes, the most important ones, in that order;
jax, flax, optax, orbax and numpy will do there:

    python -m benchmarks.run_all --device=gpu --budget=225 \
        --only=loss,step_cost,utilisation --output=bench_gpu.json

Writes the JSON after each benchmark, and `docs/benchmarks.md` at the end, from
the runs on all devices that lie beside it. What ends early, or fails, says why
in `not_run`; its rows until then are kept.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import command, page
from experiments.running import processes

# By importance, for runs with little time.
BENCHMARKS = (
    'step_cost',
    'prediction_exchange',
    'loss',
    'utilisation',
    'rivals',
    'cold_start',
    'overlap',
    'scaling',
)
_HERE = pathlib.Path(__file__).parent


def main(argv: Sequence[str]) -> None:
  del argv
  options, output = command.from_flags()
  output = output or f'docs/results/bench_{options.device}.json'
  try:
    names = chosen(flags.FLAGS.only)
  except ValueError as e:
    sys.exit(f'error: {e}')
  run = {
      'device': options.device,
      'quick': options.quick,
      'made': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'command': ' '.join(['python -m benchmarks.run_all', *_said()]),
      'benchmarks': _kept(output) if flags.FLAGS.keep else {},
      'not_run': {},
  }
  deadline = time.monotonic() + (flags.FLAGS.budget or float('inf'))
  for name in names:
    start = time.monotonic()
    run['benchmarks'].pop(name, None)
    record, failure = run_one(name, options, deadline - start)
    if record:
      run['benchmarks'][name] = record
    if failure:
      run['not_run'][name] = failure
    command.write_json(output, run)
    took = time.monotonic() - start
    print(f'{name}: {took:.0f} s {failure or ""}', file=sys.stderr)
  if 'docs/results' in output:
    write_page()


def chosen(only: Sequence[str]) -> list[str]:
  """Returns the benchmarks of these names, as ordered; all if there are none.

  Raises:
    ValueError: If there is none of a name.
  """
  there = [name for name in BENCHMARKS if (_HERE / f'{name}.py').exists()]
  unknown = set(only) - set(there)
  if unknown:
    raise ValueError(
        f'--only={",".join(sorted(unknown))}: no such benchmark; choose of'
        f' {", ".join(there)}'
    )
  return list(only) or there


def run_one(
    name: str, options: command.Options, seconds: float
) -> tuple[dict[str, Any] | None, str]:
  """Returns what a benchmark wrote, and why it ended early ('' if not)."""
  if seconds <= 0:
    return None, 'no time was left'
  with tempfile.TemporaryDirectory() as directory:
    written = pathlib.Path(directory) / 'record.json'
    run = [sys.executable, '-m', f'benchmarks.{name}', f'--output={written}']
    run += [f'--device={options.device}', f'--quick={options.quick}']
    if options.repeats:
      run.append(f'--repeats={options.repeats}')
    failure = ''
    try:
      done = subprocess.run(
          run,
          cwd=_HERE.parent,
          # As `train_local` starts its groups; PyTorch has the same.
          env=os.environ | processes.large_pages(),
          stdout=subprocess.DEVNULL,
          timeout=None if seconds == float('inf') else seconds,
      )
      if done.returncode:
        failure = f'ended with status {done.returncode}'
    except subprocess.TimeoutExpired:
      failure = f'ended after {seconds:.0f} s, for lack of time'
    if not written.exists():
      return None, failure or 'it wrote nothing'
    return json.loads(written.read_text()), failure


def write_page() -> None:
  """Writes the page, from the runs on all devices."""
  results = _HERE.parent / 'docs' / 'results'
  found = [results / f'bench_{device}.json' for device in command.DEVICES]
  page.write(
      [os.fspath(path) for path in found if path.exists()],
      os.fspath(_HERE.parent / 'docs' / 'benchmarks_notes.md'),
      os.fspath(_HERE.parent / 'docs' / 'benchmarks.md'),
  )


def _kept(output: str) -> dict[str, Any]:
  path = pathlib.Path(output)
  return dict(page.read_run(path)['benchmarks']) if path.exists() else {}


def _said() -> list[str]:
  """Returns the flags of this run that were given."""
  return [arg for arg in sys.argv[1:] if not arg.startswith('--output')]


def define_flags() -> None:
  """Defines the flags beside those of every benchmark."""
  command.define_flags()
  flags.DEFINE_list('only', [], 'Benchmarks to run; default: all.')
  flags.DEFINE_float('budget', None, 'Seconds after which what runs is ended.')
  flags.DEFINE_bool(
      'keep', False, 'Keep what the output holds of benchmarks not run now.'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main)
