r"""How long until something happens: imports, the first step, the first line.

    python -m benchmarks.cold_start --device=cpu

Wall time of fresh processes, with the interpreter's own start; no compiled
program is kept from one to the next. Files are in the page cache after the
first run, which counts for nothing. `first step` is `experiments.train_group`
with bible_lm.gin until the record of step 1 is on disk, `first line` the demo,
`experiments.train_local` with two groups, until it shows its first progress.
Tokens are made up, as many as `make demo` prepares.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import command, measure

_ROOT = pathlib.Path(__file__).parents[1]
_MOST_IMPORT, _MOST_LINE = 3.0, 10.0  # Seconds.
_PATIENCE = 300.0
_IMPORTS = {
    'interpreter': 'pass',
    'import codistill_jax': 'import codistill_jax',
    'its public names': 'from codistill_jax import *',
    'import experiments.train_group': 'import experiments.train_group',
    'import experiments.train_local': 'import experiments.train_local',
}
_PROGRESS = re.compile(r'step \d+/\d+')
_GIN_FILE = 'gin_configs/tasks/bible_lm.gin'


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each start."""
  needed = 'gin-config'
  for name, code in _IMPORTS.items():
    if options.quick and name not in ('interpreter', 'import codistill_jax'):
      continue
    if 'experiments' in name and not measure.versions([needed]):
      yield command.skipped(name, f'needs {needed}')
      continue
    run = [sys.executable, '-c', code]
    most = None if name == 'interpreter' else _MOST_IMPORT
    yield _row(name, lambda run=run: _whole(run), most, options)
  if options.quick or not measure.versions([needed]):
    reason = 'not quick' if options.quick else f'needs {needed}'
    yield command.skipped('first step', reason)
    yield command.skipped('first line', reason)
    return
  with tempfile.TemporaryDirectory() as directory:
    data = pathlib.Path(directory) / 'data'
    data.mkdir()
    _write_tokens(data)
    for name, start, most in (
        ('first step', first_step, None),
        ('first line', first_line, _MOST_LINE),
    ):
      yield _row(name, lambda start=start: start(data), most, options)


def _row(
    name: str,
    start: Callable[[], float],
    most: float | None,
    options: command.Options,
) -> dict[str, Any]:
  if not options.quick:
    start()
  found = measure.spread([start() for _ in range(options.times(3))])
  row = {'name': name, 'seconds': found}
  if most is not None:
    row['goal'] = measure.goal(found['median'], at_most=most)
  return row


def _whole(run: list[str]) -> float:
  """Seconds of a process from start to end."""
  start = time.perf_counter()
  subprocess.run(run, cwd=_ROOT, env=_environment(), check=True)
  return time.perf_counter() - start


def first_step(data: pathlib.Path) -> float:
  """Seconds from the start of a group to its first record on disk."""
  with tempfile.TemporaryDirectory() as workdir:
    run = _binary('train_group', data, workdir)
    run += ['--group_id=0', '--num_groups=1']
    run += ['--gin=experiment.Experiment.log_every=1']
    record = pathlib.Path(workdir) / 'groups' / 'group_0' / 'metrics.jsonl'
    return _until(run, lambda said: record.exists() and record.stat().st_size)


def first_line(data: pathlib.Path) -> float:
  """Seconds from the start of two groups to the first sign of progress."""
  with tempfile.TemporaryDirectory() as workdir:
    run = [*_binary('train_local', data, workdir), '--num_groups=2']
    run += ['--noreport']
    return _until(run, _PROGRESS.search)


def _binary(name: str, data: pathlib.Path, workdir: str) -> list[str]:
  run = [sys.executable, '-m', f'experiments.{name}', f'--workdir={workdir}']
  run += [f'--gin_file={_GIN_FILE}']
  return [*run, f"--gin=text.language_model_task.data_dir='{data}'"]


def _until(run: list[str], happened: Callable[[str], Any]) -> float:
  """Seconds until it has happened, of which what the process said may tell.

  Raises:
    ValueError: If the process ends before, or nothing happens for minutes.
  """
  with (
      tempfile.TemporaryFile('w+') as said,
      tempfile.TemporaryDirectory() as kept,
  ):
    start = time.perf_counter()
    process = subprocess.Popen(
        run, cwd=_ROOT, env=_environment(kept), stdout=said, stderr=said
    )
    try:
      while True:
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read()
        if happened(text):
          return seconds
        if process.poll() is not None or seconds > _PATIENCE:
          raise ValueError(
              f'{" ".join(run)} did not get there in {seconds:.0f} s; it said:'
              f' {text[-1000:]}'
          )
        time.sleep(0.02)
    finally:
      _end(process)


def _end(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError):
    process.send_signal(signal.SIGTERM)
  try:
    process.wait(60)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def _environment(kept: str = os.devnull) -> dict[str, str]:
  """Ours, with nothing that was compiled before.

  Args:
    kept: Where the processes of this start keep what they compile.
  """
  mine = {
      k: v
      for k, v in os.environ.items()
      if not k.startswith(('JAX_COMPILATION_CACHE', 'JAX_PERSISTENT_CACHE'))
  }
  return mine | {'XDG_CACHE_HOME': kept}


def _write_tokens(directory: pathlib.Path) -> None:
  from benchmarks import input_data

  input_data.token_shards(directory, documents=2_000)


if __name__ == '__main__':
  command.run('cold_start', rows)
