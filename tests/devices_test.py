"""How train_local shares out processes."""

import signal
import sys
import time

import pytest

from experiments import cli
from experiments.running import processes

# Tests have a jax with threads, which warns when it is forked.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork')


def test_whole_gpus_are_shared_out():
  environments, replicas = processes.share_gpus(list('01234567'), 3)
  assert replicas == 2
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == [
      '0,1',
      '2,3',
      '4,5',
  ]


def test_several_groups_share_a_gpu_and_its_memory():
  environments, replicas = processes.share_gpus(['3', '5'], 3)
  assert replicas == 1
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == ['3', '5', '3']
  fractions = [float(e['XLA_PYTHON_CLIENT_MEM_FRACTION']) for e in environments]
  assert sum(fractions[::2]) <= 0.9 + 1e-9


def test_gpus_keep_the_names_that_the_user_gave_them(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-abc')
  assert processes.visible_gpus(2) == ['4', 'GPU-abc']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert processes.visible_gpus(2) == ['0', '1']


class Stop:
  """Asked to stop after a while; None: never."""

  signal_number = signal.SIGINT

  def __init__(self, seconds=None):
    self._at = None if seconds is None else time.monotonic() + seconds

  def __call__(self):
    return self._at is not None and time.monotonic() > self._at


def pretend_python(monkeypatch, tmp_path, script):
  """Another program is started in place of Python."""
  path = tmp_path / 'python'
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(path))
  monkeypatch.setattr(processes, 'may_have_accelerator', lambda: True)


def test_a_stop_ends_the_look_at_the_devices(monkeypatch, tmp_path):
  """It may hang: on a driver, or waiting for an accelerator."""
  pretend_python(monkeypatch, tmp_path, 'exec sleep 1000')
  start = time.monotonic()
  with pytest.raises(cli.Stopped) as e:
    processes.share_devices(2, 2, Stop(0.3))
  assert e.value.exit_status == 130
  assert time.monotonic() - start < 500


def test_devices_are_known_by_the_last_line(monkeypatch, tmp_path):
  pretend_python(monkeypatch, tmp_path, 'echo Welcome to jax; echo gpu 4')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  environments, replicas = processes.share_devices(2, 1, Stop())
  assert replicas == 2
  assert [e['CUDA_VISIBLE_DEVICES'] for e in environments] == ['0,1', '2,3']


@pytest.mark.parametrize(
    'script, reason',
    [
        ('echo first >&2; echo no driver >&2; exit 3', 'no driver'),
        ('exit 3', 'it said nothing'),
    ],
)
def test_a_jax_that_does_not_start_is_one_line(
    monkeypatch, tmp_path, script, reason
):
  pretend_python(monkeypatch, tmp_path, script)
  with pytest.raises(OSError) as e:
    processes.share_devices(2, 1, Stop())
  assert str(e.value) == f'jax does not start here: {reason}'


def test_groups_on_cpu_compute_in_large_pages(monkeypatch):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  assert processes.large_pages() == {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=1')
  assert processes.large_pages() == {}


def test_jax_is_asked_only_where_there_may_be_an_accelerator(
    monkeypatch, tmp_path
):
  driver = tmp_path / 'nvidia0'
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setattr(processes, '_DEVICE_FILES', [f'{tmp_path}/nvidia*'])
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  assert not processes.may_have_accelerator()
  monkeypatch.setattr(processes, 'call', None)  # It would fail.
  environments, replicas = processes.share_devices(2, 3, Stop())
  assert (len(environments), replicas) == (2, 3)
  driver.touch()
  assert processes.may_have_accelerator()
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not processes.may_have_accelerator()
  monkeypatch.delenv('JAX_PLATFORMS')
  driver.unlink()
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert processes.may_have_accelerator()
