"""Test set-up: four fake CPU devices, strict numerics, no network.

The flags must be in the environment before jax is imported, by this process
and by the processes that tests start.
"""

import ctypes
import gc
import importlib.metadata
import os
import sys
import tempfile

# Tests run each program once or twice: what counts is how fast it is compiled.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=4'
    ' --xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true'
)
# Where XLA has two emitters of fused loops, this one takes a third of the time;
# a flag that it does not know ends the process.
if importlib.metadata.version('jaxlib') < '0.11':
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_DATASETS_OFFLINE'] = '1'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
os.environ['CUDA_VISIBLE_DEVICES'] = ''

import hypothesis
import jax
import psutil
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples every time, and none is too slow: a test that fails does so
# on every machine, however busy it is.
hypothesis.settings.register_profile(
    'suite',
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('suite')


def pytest_configure(config):
  """Starts XLA where its last words about a flag can be read."""
  capture = config.pluginmanager.getplugin('capturemanager')
  with capture.global_and_fixture_disabled():
    jax.devices()


# What takes longest comes first, so that no process begins it when the others
# are done.
_LONG = (
    *('fault_drill', 'studies', 'task_configs', 'train_group', 'export'),
    *('train_local', 'churn_study', 'train_lockstep', 'study_one_program'),
    *('frozen', 'preemption', 'packaging', 'report', 'fuzz_publications'),
)


def pytest_collection_modifyitems(items):
  rank = {f'{name}_test': n for n, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def memory_is_bounded():
  """What tests compiled would add up to gigabytes."""
  yield
  if psutil.Process().memory_info().rss > 1.2e9:
    gc.collect()
    jax.clear_caches()
    if sys.platform == 'linux':
      ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope='session')
def no_waiting_for_disks():
  """What a power failure would lose; a process that is killed loses nothing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'fsync', lambda handle: None)
    yield


@pytest.fixture(autouse=True, scope='session')
def user_cache_is_left_alone(tmp_path_factory):
  """What processes compile that tests start; this one keeps nothing."""
  kept = tmp_path_factory.getbasetemp() / 'compiled'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(kept))


@pytest.fixture(scope='session')
def python():
  """The interpreter that subprocess tests start."""
  return sys.executable


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
  """Starts binaries; none outlives the module."""
  import tiny_run

  with tiny_run.launcher(tmp_path_factory) as launch:
    yield launch


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The gin file and the workdir of the tiny run, trained in one process."""
  import tiny_run

  return tiny_run.reference(tmp_path_factory)


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
  """Programs that a test has compiled are loaded by the next one."""
  from jax.experimental.compilation_cache import compilation_cache

  cache = tmp_path_factory.getbasetemp() / 'compiled'
  values = {
      'jax_compilation_cache_dir': str(cache),
      'jax_persistent_cache_min_compile_time_secs': 0.0,
      'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """A bucket; and nothing is left on the disk of this machine."""
  import remote

  here, scratch = tmp_path / 'here', tmp_path / 'scratch'
  here.mkdir()
  scratch.mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setattr(tempfile, 'tempdir', str(scratch))
  for name in ('rename', 'replace', 'renames'):
    monkeypatch.setattr(os, name, lambda *_: pytest.fail('renamed'))
  with remote.bucket(monkeypatch) as made:
    yield made
  assert not list(tmp_path.rglob('*/*'))


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  """A directory where checkpoints may lie."""
  from etils import epath

  if request.param == 'disk':
    return epath.Path(tmp_path)
  request.getfixturevalue('bucket')
  return epath.Path('s3://bucket/run')
