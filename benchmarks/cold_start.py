r"""How long until something happens, and in how much memory.

    python -m benchmarks.cold_start --device=cpu

Imports, the first step, the first line: wall time of fresh processes, with the
interpreter's own start. Files are in the page cache after the first run, which
counts for nothing. `first step` is `experiments.train_group` with bible_lm.gin
until the record of step 1 is on disk, `first line` the demo,
`experiments.train_local` with two groups, until it shows its first progress;
both where no compiled program is kept, as a machine starts for the first time,
and where all are, as it does from then on. Tokens are made up, as many as `make
demo` prepares.

`memory` is that of such processes when they have come there: `own`, which no
other process could share, and `resident`, with the pages of library files.
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

import psutil

from benchmarks import command, measure

_ROOT = pathlib.Path(__file__).parents[1]
_MOST_IMPORT, _MOST_LINE = 3.0, 8.0  # Seconds.
_MOST_MEMORY = 300.0  # MB, of a group's own.
_PATIENCE = 300.0
_IMPORTS = {
    'interpreter': 'pass',
    'import codistill_jax': 'import codistill_jax',
    'its public names': 'from codistill_jax import *',
    'import experiments.train_group': 'import experiments.train_group',
    'import experiments.train_local': 'import experiments.train_local',
}
_BACKEND = 'import experiments.train_group, jax; jax.device_put(0)'
_UPDATES = 200  # After which a group's memory is looked at.
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
  stages = _IMPORTS | {'jax has its devices': _BACKEND}
  whole = 'first step', 'first line', 'memory: a group'
  if options.quick or not measure.versions([needed]):
    reason = 'not quick' if options.quick else f'needs {needed}'
    yield from (command.skipped(name, reason) for name in whole)
    return
  with tempfile.TemporaryDirectory() as directory:
    data = pathlib.Path(directory) / 'data'
    data.mkdir()
    _write_tokens(data)
    for name, start, most in (
        ('first step', first_step, None),
        ('first line', first_line, _MOST_LINE),
    ):
      for state, kept in (('nothing', None), ('programs', directory)):
        begin = lambda start=start, kept=kept: start(data, kept)
        yield _row(f'{name}, {state} kept', begin, most, options)
    for name, code in stages.items():
      yield {'name': f'memory: {name}', **_memory_after(code)}
    for state, kept in (('nothing', None), ('programs', directory)):
      used = group_memory(data, kept)
      yield {
          'name': f'memory: a group, {_UPDATES} updates, {state} kept',
          **used,
          'goal': measure.goal(used['own_mb'], at_most=_MOST_MEMORY),
      }


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


def _memory_after(code: str) -> dict[str, Any]:
  """Returns the memory of a process that has run some code."""
  wait = 'import sys; print(flush=True); sys.stdin.read()'
  with subprocess.Popen(
      [sys.executable, '-c', f'{code}\n{wait}'],
      cwd=_ROOT,
      env=_environment(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
  ) as process:
    process.stdout.readline()
    return _memory(process.pid)


def _memory(pid: int) -> dict[str, Any]:
  """Returns the megabytes of a process."""
  found = psutil.Process(pid).memory_full_info()
  return {
      'own_mb': round(found.uss / 1e6),
      'resident_mb': round(found.rss / 1e6),
  }


def group_memory(data: pathlib.Path, kept: str | None) -> dict[str, Any]:
  """Returns the memory of a group that has made some updates."""
  used: dict[str, Any] = {}

  def come(pid: int, records: str) -> bool:
    if f'"step": {_UPDATES},' in records:
      used.update(_memory(pid))
    return bool(used)

  _group(data, kept, come)
  return used


def first_step(data: pathlib.Path, kept: str | None) -> float:
  """Returns seconds from the start of a group to its first record on disk."""
  return _group(data, kept, lambda pid, records: bool(records))


def _group(
    data: pathlib.Path, kept: str | None, come: Callable[[int, str], bool]
) -> float:
  """Returns seconds until a group has come to some record."""
  with tempfile.TemporaryDirectory() as workdir:
    run = _binary('train_group', data, workdir)
    run += ['--group_id=0', '--num_groups=1']
    run += ['--gin=experiment.Experiment.log_every=1']
    path = pathlib.Path(workdir) / 'groups' / 'group_0' / 'metrics.jsonl'
    records = lambda: path.read_text() if path.exists() else ''
    return _until(run, lambda pid, said: come(pid, records()), kept)


def first_line(data: pathlib.Path, kept: str | None) -> float:
  """Returns seconds from the start of two groups to a sign of progress."""
  with tempfile.TemporaryDirectory() as workdir:
    run = [*_binary('train_local', data, workdir), '--num_groups=2']
    run += ['--noreport']
    return _until(run, lambda pid, said: bool(_PROGRESS.search(said)), kept)


def _binary(name: str, data: pathlib.Path, workdir: str) -> list[str]:
  run = [sys.executable, '-m', f'experiments.{name}', f'--workdir={workdir}']
  run += [f'--gin_file={_GIN_FILE}']
  return [*run, f"--gin=text.language_model_task.data_dir='{data}'"]


def _until(
    run: list[str], happened: Callable[[int, str], bool], kept: str | None
) -> float:
  """Returns seconds until something has happened.

  Args:
    run: The command.
    happened: Whether it has, of a process by its id and what it has said.
    kept: Where compiled programs are; None: nowhere yet.

  Raises:
    ValueError: If the process ends before, or nothing happens for minutes.
  """
  with (
      tempfile.TemporaryFile('w+') as said,
      tempfile.TemporaryDirectory() as empty,
  ):
    start = time.perf_counter()
    process = subprocess.Popen(
        run,
        cwd=_ROOT,
        env=_environment(kept or empty),
        stdout=said,
        stderr=said,
    )
    try:
      while True:
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read()
        if happened(process.pid, text):
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
  """Returns ours, with nothing that was compiled for anything else.

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
