r"""Runs the benchmarks, each as a process, and makes their page.

    python -m benchmarks.run_all --device=cpu

takes 40 minutes at most on two cores: no benchmark runs longer than its time in
`BENCHMARKS` and what those before it have left. On a GPU that is lent for four
minutes, the most important ones, in that order; jax, flax, optax, orbax and
numpy will do there:

    python -m benchmarks.run_all --device=gpu --budget=225 \
        --only=loss,step_cost,utilisation --output=bench_gpu.json

Writes the JSON after each benchmark, and `docs/benchmarks.md` at the end, from
the runs on all devices that lie beside it. What ends early, or fails, says why
in `not_run`, its rows until then are kept, and the run ends with status 1.
"""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from benchmarks import command, page
from experiments.running import processes

# Seconds for each. By importance, for runs with little time.
BENCHMARKS = {
    'step_cost': 180,
    'prediction_exchange': 240,
    'loss': 120,
    'utilisation': 90,
    'rivals': 720,
    'cold_start': 150,
    'input': 240,
    'records': 60,
    'exchange_stall': 150,
    'overlap': 60,
    'scaling': 150,
}
_HERE = pathlib.Path(__file__).parent


def main(argv: Sequence[str]) -> None:
  del argv
  options, output = command.from_flags()
  try:
    names = chosen(flags.FLAGS.only, output)
  except ValueError as e:
    sys.exit(f'error: {e}')
  output = output or f'docs/results/bench_{options.device}.json'
  run = {
      'device': options.device,
      'quick': options.quick,
      'made': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'command': ' '.join(['python -m benchmarks.run_all', *_said()]),
      'benchmarks': {},
      'not_run': {},
  }
  start, given = time.monotonic(), 0.0
  for name in names:
    begun = time.monotonic()
    given = flags.FLAGS.budget or given + BENCHMARKS[name]
    record, failure = run_one(name, options, start + given - begun)
    if record:
      run['benchmarks'][name] = record
    if failure:
      run['not_run'][name] = failure
    run['seconds'] = round(time.monotonic() - start)
    command.write_json(output, run)
    took = time.monotonic() - begun
    print(f'{name}: {took:.0f} s {failure or ""}', file=sys.stderr)
  if 'docs/results' in output:
    write_page()
  if run['not_run']:
    sys.exit(f'error: not whole: {", ".join(run["not_run"])}; see above')


def chosen(only: Sequence[str], output: str | None = None) -> list[str]:
  """Returns the benchmarks of these names, as ordered; all if there are none.

  Raises:
    ValueError: If there is none of a name, or some would take the place of all.
  """
  unknown = set(only) - set(BENCHMARKS)
  if unknown:
    raise ValueError(
        f'--only={",".join(sorted(unknown))}: no such benchmark; choose of'
        f' {", ".join(BENCHMARKS)}'
    )
  if only and not output:
    raise ValueError('the page is of one run of all; give --only an --output')
  return list(only) or list(BENCHMARKS)


def run_one(
    name: str,
    options: command.Options,
    seconds: float,
    tree: pathlib.Path = _HERE.parent,
) -> tuple[dict[str, Any] | None, str]:
  """Returns what a benchmark wrote, and why it ended early ('' if not).

  Args:
    name: Of the benchmark.
    options: How to measure.
    seconds: After which it is ended.
    tree: The clone to run it in.
  """
  if seconds <= 0:
    return None, 'no time was left'
  with tempfile.TemporaryDirectory() as directory:
    written = pathlib.Path(directory) / 'record.json'
    run = [sys.executable, '-m', f'benchmarks.{name}', f'--output={written}']
    run += [f'--device={options.device}', f'--quick={options.quick}']
    if options.repeats:
      run.append(f'--repeats={options.repeats}')
    # A process group of its own, of whose processes none stays behind.
    process = subprocess.Popen(
        run,
        cwd=tree,
        # As `train_local` starts its groups; PyTorch has the same.
        env=os.environ | processes.large_pages(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
      status = process.wait(seconds)
      failure = f'ended with status {status}' if status else ''
    except subprocess.TimeoutExpired:
      failure = f'ended after {seconds:.0f} s, for lack of time'
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
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


def _said() -> list[str]:
  """Returns the flags of this run that were given."""
  return [arg for arg in sys.argv[1:] if not arg.startswith('--output')]


def define_flags() -> None:
  """Defines the flags beside those of every benchmark."""
  command.define_flags()
  flags.DEFINE_list('only', [], 'Benchmarks to run; default: all.')
  flags.DEFINE_float(
      'budget', None, 'Seconds for all, in place of those of each.'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main)
