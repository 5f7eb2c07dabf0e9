"""A language model run of seconds, and its processes, for tests of binaries."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import token_files
from waits import PATIENCE

from codistill_jax import run_directory
from codistill_jax.data import prepared_files, shards
from codistill_jax.storage import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_STEPS, EVERY, CHECKPOINT_EVERY = 50, 10, 20
VOCABULARY = 30

_GIN = """\
from __gin__ import dynamic_registration
import optax
import paced
from codistill_jax import exchange
from codistill_jax import experiment
from codistill_jax.data import text
from codistill_jax.models import lstm

experiment.Experiment.task = @text.language_model_task()
text.language_model_task.data_dir = '{data}'
text.language_model_task.unroll = 4
experiment.Experiment.model = @lstm.language_model
lstm.language_model.layers = 1
lstm.language_model.units = 8
lstm.language_model.embedding = 8
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-2
experiment.Experiment.distill_weight = @paced.distill_weight()
paced.distill_weight.burn_in_steps = {every}
experiment.Experiment.num_steps = {num_steps}
experiment.Experiment.group_batch = 8
experiment.Experiment.exchange = @exchange.Checkpoints()
exchange.Checkpoints.every = {every}
exchange.Checkpoints.mode = 'lockstep'
exchange.Checkpoints.timeout_seconds = 600.0
experiment.Experiment.log_every = 5
experiment.Experiment.eval_every = 25
experiment.Experiment.eval_batch = 4
experiment.Experiment.checkpoint_every = {checkpoint_every}
"""


def write_data(directory, *, num_validation=6, tokenizer=token_files.MODEL):
  """Token files of random documents, as of that tokenizer."""
  rng = np.random.default_rng(0)
  document = lambda: rng.integers(3, VOCABULARY, size=rng.integers(4, 20))
  token_files.write_data(
      directory,
      [[document() for _ in range(200)]],
      [document() for _ in range(num_validation)],
      vocab_size=VOCABULARY,
  )
  (directory / shards.TOKENIZER).write_bytes(tokenizer)
  path = directory / prepared_files.META
  meta = prepared_files.read_json(path, shards.KIND)
  meta['source'] = 'random'
  meta['tokenizer_sha256'] = hashlib.sha256(tokenizer).hexdigest()
  prepared_files.write_json(path, meta)
  return directory


def write_config(directory):
  """Data and a gin file of the tiny run; gives the gin file."""
  data = write_data(directory / 'data')
  path = directory / 'tiny.gin'
  path.write_text(
      _GIN.format(
          data=data,
          every=EVERY,
          num_steps=NUM_STEPS,
          checkpoint_every=CHECKPOINT_EVERY,
      )
  )
  return path


def free_port():
  """A port of this machine that nobody has at the moment."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


class Process:
  """A binary that is running."""

  def __init__(self, command, log, environment):
    self.log = log
    with log.open('ab') as out:
      self._popen = subprocess.Popen(
          command,
          cwd=ROOT,
          env={**os.environ, **environment},
          stdin=subprocess.DEVNULL,
          stdout=out,
          stderr=out,
          start_new_session=True,
      )
    self.pid = self._popen.pid

  @property
  def output(self) -> str:
    return self.log.read_text(errors='replace')

  @property
  def ended(self) -> bool:
    return self.status is not None

  @property
  def status(self) -> int | None:
    return self._popen.poll()

  def send(self, number: int) -> None:
    self._popen.send_signal(number)

  def wait(self, status: int = 0, timeout: float = 2 * PATIENCE) -> str:
    """Waits for the end; its output. Fails on another exit status."""
    try:
      found = self._popen.wait(timeout)
    except subprocess.TimeoutExpired:
      found = f'still running after {timeout} s'
    assert found == status, f'{found}, expected {status}\n{self.output[-4000:]}'
    return self.output

  def kill(self) -> None:
    if not self.ended:
      self._popen.kill()
    self._popen.wait()


class Launcher:
  """Starts binaries; no process outlives it."""

  def __init__(self, directory, cache):
    self._directory = directory
    # Compiled programs are the same bits, whoever compiled them.
    self._environment = {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    self.python_path = [str(ROOT), str(ROOT / 'tests')]
    self._started = []

  def __call__(self, binary, *args, **flags) -> Process:
    """Starts `python -m experiments.<binary> --flag=value ...`."""
    log = self._directory / f'{len(self._started)}-{binary}.log'
    command = [sys.executable, '-m', f'experiments.{binary}', *args]
    command += [f'--{name}={value}' for name, value in flags.items()]
    process = Process(command, log, self._variables())
    self._started.append(process)
    return process

  def _variables(self):
    return self._environment | {'PYTHONPATH': os.pathsep.join(self.python_path)}

  def cases(self, binary, cases):
    """Runs a binary on each list of arguments: (status, output) by name."""
    paths = [self._directory / f'{binary}.{x}.json' for x in ('in', 'out')]
    paths[0].write_text(json.dumps(cases))
    script = ROOT / 'tests' / 'run_cases.py'
    process = Process(
        [sys.executable, str(script), binary, *map(str, paths)],
        self._directory / f'{binary}.cases.log',
        self._variables(),
    )
    self._started.append(process)
    process.wait()
    return json.loads(paths[1].read_text())

  def close(self) -> None:
    for process in self._started:
      process.kill()
    # What they started in turn names this directory on its command line.
    for pid in processes_of(self._directory):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes_of(directory) -> list[int]:
  """Running processes that name `directory` as their --workdir."""
  return [
      process.pid
      for process in psutil.process_iter(['cmdline'])
      if any(
          word.startswith('--workdir=') and str(directory) in word
          for word in process.info['cmdline'] or ()
      )
  ]


@contextlib.contextmanager
def launcher(tmp_path_factory, name='logs'):
  """A `Launcher` for a fixture or a test."""
  cache = tmp_path_factory.getbasetemp() / 'compiled'
  one = Launcher(tmp_path_factory.mktemp(name), cache)
  try:
    yield one
  finally:
    one.close()


def saved_arrays(workdir, group_id, step=None):
  """Leaf path -> array of a resume checkpoint, without its step in use."""
  directory = run_directory.checkpoints_dir(workdir, group_id)
  step = max(checkpoints.completed_steps(directory)) if step is None else step
  return step, arrays_of(directory, step)


def arrays_of(directory, step):
  """Leaf path -> array of what `checkpoints.save` wrote of the tiny model."""
  record = checkpoints.load_record(directory, step)
  like = _nested(record.leaves)
  if 'params' in like:
    like['model_state'] = {}
  else:
    like['variables']['model_state'] = {}
    like['opt_state']['1'] = {}
    like.setdefault('teacher_carry', {})
  return dict(
      checkpoints.flatten(checkpoints.load_tree(directory, step, record, like))
  )


def _nested(leaves):
  tree = {}
  for leaf in leaves:
    *parents, last = leaf.path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = np.empty(leaf.shape, leaf.dtype)
  return tree


def records(workdir, group_id=0):
  """What a group of a run has recorded."""
  path = run_directory.metrics_path(workdir, group_id)
  return run_directory.read_metrics(path).records


def assert_same_bits(a, b):
  """Two dicts of arrays are equal, bit for bit."""
  assert a.keys() == b.keys()
  differing = [k for k in a if a[k].tobytes() != b[k].tobytes()]
  assert not differing


def snapshot(directory):
  """Digest of every file under a directory, by path."""
  return {
      str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
      for p in sorted(pathlib.Path(directory).rglob('*'))
      if p.is_file()
  }


_references = {}


def reference(tmp_path_factory):
  """The gin file and workdir of two groups trained in one process; once."""
  key = tmp_path_factory.getbasetemp()
  if key not in _references:
    directory = tmp_path_factory.mktemp('reference')
    gin_file = write_config(directory)
    with launcher(tmp_path_factory) as launch:
      workdir = directory / 'run'
      launch(
          'train_lockstep', workdir=workdir, num_groups=2, gin_file=gin_file
      ).wait()
    _references[key] = (gin_file, workdir)
  return _references[key]
