"""Devices: those of a group, and the share of each group of a machine."""

import glob
import os
import sys
from collections.abc import Sequence

import jax

from ..cli import StopRequest
from . import processes


def use_replicas(count: int) -> None:
  """Makes `count` fake CPU devices; before the first use of jax.

  Without effect on accelerators, whose devices are what they are.
  """
  if count < 0:
    raise ValueError(f'--replicas={count}; set it to 0 (all) or more')
  if count:
    jax.config.update('jax_num_cpu_devices', count)


def chosen_devices(count: int) -> list[jax.Device] | None:
  """Returns the first `count` devices; None, all of them, for 0.

  Raises:
    ValueError: If this process has fewer.
  """
  if not count:
    return None
  devices = jax.local_devices()
  if jax.process_count() > 1:
    if count != len(devices):
      raise ValueError(
          f'--replicas={count}, but a group of several processes uses all'
          f' {len(devices)} devices of each: leave --replicas out, or hide the'
          ' others'
      )
    return None
  if len(devices) < count:
    raise ValueError(
        f'--replicas={count}, but this process has {len(devices)} devices;'
        f' set --replicas to at most {len(devices)}'
    )
  return devices[:count]


# Of the drivers of NVIDIA (under WSL too), AMD, and TPUs.
_DEVICE_FILES = (
    '/dev/nvidia*',
    '/dev/dxg',
    '/dev/kfd',
    '/dev/accel*',
    '/dev/vfio/*',
)


def share_devices(
    num_groups: int, cpu_replicas: int, stop: StopRequest
) -> tuple[list[dict[str, str]], int]:
  """Divides this machine among the groups.

  Args:
    num_groups: G.
    cpu_replicas: Replicas of each group where there is no accelerator.
    stop: Ends the look at the devices, which may take long.

  Returns:
    The environment variables of each group, and the replicas of each.

  Raises:
    OSError: If jax does not start.
    ValueError: If the devices are of a kind that processes cannot share.
  """
  if not may_have_accelerator():
    return [large_pages() for _ in range(num_groups)], cpu_replicas
  # In a process of its own: jax would keep the accelerators for this one.
  code = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  probe = processes.call([sys.executable, '-c', code], stop, capture=True)
  if probe.returncode:
    said = probe.stderr.strip().splitlines() or ['it said nothing']
    raise OSError(f'jax does not start here: {said[-1]}')
  platform, count = probe.stdout.split()[-2:]
  if platform == 'cpu':
    return [large_pages() for _ in range(num_groups)], cpu_replicas
  if platform not in ('gpu', 'cuda', 'rocm'):
    raise ValueError(
        f'train_local cannot share out {platform} devices; start'
        ' train_group once per host instead'
    )
  return share_gpus(visible_gpus(int(count)), num_groups)


def may_have_accelerator() -> bool:
  """Returns false where jax can find none: to ask it takes two seconds."""
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return False
  if sys.platform != 'linux':
    return True
  return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def large_pages() -> dict[str, str]:
  """Returns variables with which glibc asks for large pages for XLA.

  On CPU a step takes its temporary memory from the system and gives it back;
  to clear and map it in pages of 4 kB took a sixth of a language model's step.
  Only a new process can be told, and by no other way.
  """
  if 'GLIBC_TUNABLES' in os.environ:
    return {}  # What the user tunes stands.
  return {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


def visible_gpus(count: int) -> list[str]:
  """Returns the names by which this process sees its GPUs."""
  named = os.environ.get('CUDA_VISIBLE_DEVICES', '')
  return named.split(',') if named else [str(i) for i in range(count)]


def share_gpus(
    gpus: Sequence[str], num_groups: int
) -> tuple[list[dict[str, str]], int]:
  """Gives each group whole GPUs, or several groups one GPU."""
  replicas = len(gpus) // num_groups
  if replicas:
    shares = [
        gpus[g * replicas : (g + 1) * replicas] for g in range(num_groups)
    ]
    return [{'CUDA_VISIBLE_DEVICES': ','.join(s)} for s in shares], replicas
  per_gpu = -(-num_groups // len(gpus))
  return [
      {
          'CUDA_VISIBLE_DEVICES': gpus[g % len(gpus)],
          'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / per_gpu:.2f}',
      }
      for g in range(num_groups)
  ], 1
