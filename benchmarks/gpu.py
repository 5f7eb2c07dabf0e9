r"""Checks, benchmarks and the map of batches on one GPU, in nine minutes.

    make gpu_kit   # Where there is a network: data and wheels, to carry along.
    make gpu       # On a machine with jax, flax, optax, orbax and PyTorch.

The most important part first: two groups that are killed and go on, then the
benchmarks, then the study `map` with all its seeds as one program until the
time is used. Each part writes below `--output` as it goes, so that a cut loses
what was not begun; `gpu.json` says how each has ended. `map_records.tar.gz` has
what the page of the study needs, which `experiments.reproduce --study=map
--scale=gpu --workdir=map --report_only` makes anywhere.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from benchmarks import command
from codistill_jax import run_directory
from experiments.running import processes

_HERE = pathlib.Path(__file__).parents[1]
_STUDIES = 'gin_configs/studies/'
# Those of the page that a GPU is for, by importance.
_BENCHMARKS = (
    'rivals',
    'step_cost',
    'prediction_exchange',
    'loss',
    'utilisation',
)
# Seconds kept for the study: less makes no point of it.
_STUDY_SECONDS = 150.0
_GRACE_SECONDS = 20.0

Part = Callable[[pathlib.Path, command.Options, float], dict[str, Any]]


def main(argv: Sequence[str]) -> None:
  del argv
  options, output = command.from_flags()
  directory = pathlib.Path(output or 'runs/gpu').absolute()
  directory.mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + flags.FLAGS.budget
  found = {'device': options.device, 'quick': options.quick, 'parts': {}}
  for part in (two_groups, benchmarks, study):
    start = time.monotonic()
    try:
      said = part(directory, options, deadline - start)
    except Exception as e:  # The other parts are worth their time.
      said = {'failed': f'{type(e).__name__}: {e}'}
    said['seconds'] = round(time.monotonic() - start, 1)
    found['parts'][part.__name__] = said
    command.write_json(directory / 'gpu.json', found)
    print(json.dumps({part.__name__: said}), flush=True)
  if any('failed' in said for said in found['parts'].values()):
    sys.exit(1)


def two_groups(
    directory: pathlib.Path, options: command.Options, seconds: float
) -> dict[str, Any]:
  """Trains two groups on one device for 100 steps, with a kill -9 half way.

  Raises:
    ValueError: If a group does not go on from a checkpoint to its last step, or
      had no teacher.
  """
  del seconds  # A minute, if it works at all.
  workdir, steps, every = directory / 'two_groups', 100, 20
  gin = _STUDIES + ('lm_smoke.gin' if options.quick else 'lm_gpu.gin')
  shutil.rmtree(workdir, ignore_errors=True)
  run = [
      *('experiments.train_local', f'--workdir={workdir}', f'--gin_file={gin}'),
      *('--num_groups=2', '--cpu_replicas=1', '--noreport'),
      f'--gin=STEPS={steps}',
      f'--gin=exchange.Checkpoints.every={every}',
      f'--gin=Experiment.checkpoint_every={every}',
      '--gin=Experiment.log_every=1',
      '--gin=Experiment.eval_every=50',
      f'--gin=schedules.distill_weight.burn_in_steps={every}',
      _data(),
  ]
  process = _start(run, options)
  try:
    while _last_step(workdir) < steps // 2:
      if process.poll() is not None:
        raise ValueError(f'ended with {process.returncode} before the kill')
      time.sleep(0.1)
  finally:
    _kill(process)
  killed_at = _last_step(workdir)
  start = time.monotonic()
  if status := _start(run, options).wait():
    raise ValueError(f'the same command again ended with status {status}')
  records = [_records(workdir, group_id) for group_id in (0, 1)]
  taught = [sum('loss/distill' in r for r in found) for found in records]
  ended = [found[-1]['step'] for found in records]
  if ended != [steps, steps] or not all(taught):
    raise ValueError(f'last steps {ended}, records with teachers {taught}')
  return {
      'killed_at': killed_at,
      'last_steps': ended,
      'records_with_teachers': taught,
      'seconds_after_the_kill': round(time.monotonic() - start, 1),
      'losses': [
          [r['loss/task'] for r in found if 'loss/task' in r][-1]
          for found in records
      ],
  }


def benchmarks(
    directory: pathlib.Path, options: command.Options, seconds: float
) -> dict[str, Any]:
  """Runs the benchmarks, PyTorch's side eager and compiled."""
  output = directory / f'bench_{options.device}.json'
  run = [
      'benchmarks.run_all',
      f'--device={options.device}',
      f'--quick={options.quick}',
      f'--only={",".join(_BENCHMARKS[-1:] if options.quick else _BENCHMARKS)}',
      f'--output={output}',
      f'--budget={max(seconds - _STUDY_SECONDS, 1.0)}',
  ]
  status = _start(run, options).wait()
  if not output.exists():  # Otherwise it says what is not whole.
    raise ValueError(f'ended with status {status}')
  found = json.loads(output.read_text())
  return {'ran': list(found['benchmarks']), 'not_run': found['not_run']}


def study(
    directory: pathlib.Path, options: command.Options, seconds: float
) -> dict[str, Any]:
  """Trains the study `map` until the time is used; it can go on later.

  Raises:
    ValueError: If not one run was done, though there was time.
  """
  workdir = directory / 'map'
  run = [
      *('experiments.reproduce', '--study=map', f'--workdir={workdir}'),
      f'--scale={"smoke" if options.quick else "gpu"}',
      '--one_program=yes',
      _data(),
  ]
  process = _start(run, options)
  try:
    process.wait(max(seconds - _GRACE_SECONDS, 1.0))
  except subprocess.TimeoutExpired:
    process.terminate()  # It saves, and goes on from there another time.
    processes.wait_or_kill(process, _GRACE_SECONDS)
  done = sorted(workdir.glob('runs/*/*/outcome.json'))
  if not done and process.returncode != 128 + signal.SIGTERM:
    raise ValueError(f'ended with status {process.returncode} and no run done')
  with tarfile.open(directory / 'map_records.tar.gz', 'w:gz') as archive:
    for path in workdir.rglob('*.json*'):
      if not {'checkpoints', 'exchange'} & set(path.parts):
        archive.add(path, path.relative_to(directory))
  # Not 0 either where a page cannot be made, for want of matplotlib.
  return {'runs_done': len(done), 'status': process.returncode}


def _data() -> str:
  path = pathlib.Path(flags.FLAGS.data).absolute()
  return f'--gin=text.language_model_task.data_dir={os.fspath(path)!r}'


def _start(
    arguments: Sequence[str], options: command.Options
) -> subprocess.Popen:
  """Starts a program of this clone; nothing of it is left when we end."""
  environment = os.environ | processes.large_pages()
  if options.device == 'cpu':
    environment['JAX_PLATFORMS'] = 'cpu'
  program = [sys.executable, '-m', *arguments]
  return processes.popen(program, cwd=_HERE, env=environment, stdout=sys.stderr)


def _kill(process: subprocess.Popen) -> None:
  """Kills a program and what it has started, as a lost machine would."""
  # A session of its own each, and a parent's death ends its groups.
  process.kill()
  process.wait()


def _records(workdir: pathlib.Path, group_id: int) -> list[dict[str, Any]]:
  path = run_directory.metrics_path(workdir, group_id)
  return run_directory.read_metrics(path).records if path.exists() else []


def _last_step(workdir: pathlib.Path) -> int:
  """Returns the least of the groups' last recorded steps."""
  records = [_records(workdir, group_id) for group_id in (0, 1)]
  return min(found[-1]['step'] if found else 0 for found in records)


def define_flags() -> None:
  """Defines the flags beside those of every benchmark."""
  command.define_flags()
  flags.DEFINE_float('budget', 540.0, 'Seconds for all of it.')
  flags.DEFINE_string('data', 'data/study', 'Prepared text.')


if __name__ == '__main__':
  define_flags()
  app.run(main)
