"""Which devices a group uses."""

import jax


def use_replicas(count: int) -> None:
  """Makes `count` fake CPU devices; before the first use of jax.

  Without effect on accelerators, whose devices are what they are.
  """
  if count < 0:
    raise ValueError(f'--replicas={count}; set it to 0 (all) or more')
  if count:
    jax.config.update('jax_num_cpu_devices', count)


def chosen_devices(count: int) -> list[jax.Device] | None:
  """The first `count` devices; None, all of them, for 0.

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
