"""Test set-up: four fake CPU devices, strict numerics, no network.

The flags must be in the environment before jax is imported, by this process
and by the processes that tests start.
"""

import os
import sys

# Tests compile far longer than they run.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=4'
    ' --xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_DATASETS_OFFLINE'] = '1'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
os.environ['CUDA_VISIBLE_DEVICES'] = ''

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def python():
  """The interpreter that subprocess tests start."""
  return sys.executable
