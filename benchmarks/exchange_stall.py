r"""What an exchange costs the training loop: time, memory, bytes.

    python -m benchmarks.exchange_stall --millions=25 --millions=100

One group trains a network of so many million float32 parameters and exchanges
every 50 steps with a peer that publishes as often. Three arms, each a process
of its own, alternating:

* `off`: teachers are there, and never change; nothing is published.
* `synchronous`: the loop writes, reads and swaps itself.
* `asynchronous`: `CheckpointExchange`, as in training.

Prints JSON: medians over repeats. `lost_ms` is the time per exchange by which
an arm is slower than `off`; `stall_ms` is how long the loop itself was held;
`sync_ms` is how long a publication waited for the disk (fsync) in its thread;
`extra_copies` is peak memory above `off`, in sizes of the parameters, from one
more process for each arm in which malloc gives memory back at once: else what
is free, but kept, would count.
"""

import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from benchmarks import measure

ARMS = ('off', 'synchronous', 'asynchronous')
_WIDTH = 2048

_MILLIONS = flags.DEFINE_multi_integer(
    'millions', [25, 100], 'Parameters, in millions; may be given repeatedly.'
)
_EVERY = flags.DEFINE_integer('every', 50, 'Steps between exchanges.')
_EXCHANGES = flags.DEFINE_integer(
    'exchanges', 4, 'Exchanges measured; one more before them warms up.'
)
_ROWS = flags.DEFINE_integer(
    'rows', 32, 'Group batch; sets the length of a step.'
)
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Processes for each arm.')
_FREE_CORE = flags.DEFINE_bool(
    'free_core',
    True,
    'Keep a core for the threads of the exchange, as beside an accelerator, and'
    ' compute on the others; Linux only.',
)
_ARM = flags.DEFINE_enum(
    'arm', None, ARMS, 'Measure this arm here; what the benchmark starts.'
)


def main(argv: Sequence[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  if _ARM.value:
    print(json.dumps(measure_arm(_ARM.value, _MILLIONS.value[0])))
    return
  results = [compare(millions) for millions in _MILLIONS.value]
  print(
      json.dumps({'benchmark': 'exchange_stall', 'results': results}, indent=2)
  )


def compare(millions: int) -> dict[str, Any]:
  """Measures all arms at one size, alternating."""
  runs = {arm: [] for arm in ARMS}
  for repeat in range(_REPEATS.value):
    for arm in measure.in_turn(ARMS, repeat):
      runs[arm].append(_in_a_process(arm, millions))
      print(f'{millions} M, {arm}: {runs[arm][-1]}', file=sys.stderr)
  give_back = {'MALLOC_MMAP_THRESHOLD_': str(1 << 16)}
  peaks = {
      arm: _in_a_process(arm, millions, give_back)['peak_bytes'] for arm in ARMS
  }
  middle = lambda arm, key: statistics.median(r[key] for r in runs[arm])
  size = runs['off'][0]['parameter_bytes']
  arms = {}
  for arm in ARMS:
    interval = middle(arm, 'interval_s')
    lost = interval - middle('off', 'interval_s')
    arms[arm] = {
        'interval_s': round(interval, 4),
        'lost_ms': round(1e3 * lost, 1),
        'lost_share': round(lost / interval, 4),
        'stall_ms': round(middle(arm, 'stall_ms'), 2),
        'stall_share': round(middle(arm, 'stall_ms') / interval / 1e3, 5),
        'sync_ms': round(middle(arm, 'sync_ms'), 1),
        'publication_bytes': middle(arm, 'publication_bytes'),
        'swaps': middle(arm, 'swaps'),
        'peak_bytes': peaks[arm],
        'extra_copies': round((peaks[arm] - peaks['off']) / size, 2),
    }
  return {
      'parameters': size // 4,
      'every': _EVERY.value,
      'rows': _ROWS.value,
      'exchanges': _EXCHANGES.value,
      'repeats': _REPEATS.value,
      'platform': runs['off'][0]['platform'],
      'free_core': _FREE_CORE.value,
      'cores': measure.cores(),
      'arms': arms,
  }


def _in_a_process(
    arm: str, millions: int, extra: Mapping[str, str] | None = None
) -> dict[str, Any]:
  environment = {**os.environ, **(extra or {})}
  command = [sys.executable, '-m', 'benchmarks.exchange_stall', f'--arm={arm}']
  command += [f'--millions={millions}', f'--every={_EVERY.value}']
  command += [f'--exchanges={_EXCHANGES.value}', f'--rows={_ROWS.value}']
  command += [f'--free_core={_FREE_CORE.value}']
  done = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, check=True, text=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure_arm(arm: str, millions: int) -> dict[str, Any]:
  """Measures one arm, in this process."""
  _compute_beside_the_free_core()
  # Here, so that the parent holds no accelerator and no memory.
  import jax
  import optax

  from codistill_jax import replicas, step
  from codistill_jax.group import run_group

  model = _network(millions)
  tx = optax.sgd(1e-6)
  train_step = replicas.PmapStep(
      step.make_train_step(model, tx, axis_name=replicas.REPLICA_AXIS),
      jax.local_devices()[:1],
  )
  state = step.init_state(
      model, tx, jax.random.PRNGKey(0), _Rows().batch(0), num_peers=1
  )
  state = jax.tree.map(lambda x: jax.device_get(x), state)
  with tempfile.TemporaryDirectory() as root:
    exchange = _exchange(arm, root, state.variables, train_step)
    turns = run_group(
        train_step,
        state,
        _Rows(),
        num_steps=(_EXCHANGES.value + 1) * _EVERY.value,
        exchange=exchange,
    )
    sizes = [x.nbytes for x in jax.tree.leaves(state.variables)]
    del state
    with _timed_syncs() as seconds:
      found = _time(turns)
      exchange.close()
  # One more exchange warms up.
  found['sync_ms'] = 1e3 * sum(seconds) / (_EXCHANGES.value + 1)
  return {
      'arm': arm,
      'platform': jax.default_backend(),
      'parameter_bytes': sum(sizes),
      **found,
  }


def _cores() -> tuple[set[int], set[int]]:
  """Returns the cores to compute on, and the one for the exchange."""
  cores = sorted(os.sched_getaffinity(0))
  if not _FREE_CORE.value or len(cores) < 2:
    return set(cores), set(cores)
  return set(cores[:-1]), set(cores[-1:])


# Known before this process restricts itself.
_CORES: list[tuple[set[int], set[int]]] = []


def _compute_beside_the_free_core() -> None:
  _CORES.append(_cores())
  os.sched_setaffinity(0, _CORES[0][0])  # Threads begun later inherit it.


def _on_the_free_core(function: Callable[[], Any]) -> Any:
  """Calls it there, so that threads which libraries begin stay there."""
  found = []

  def call() -> None:
    os.sched_setaffinity(0, _CORES[0][1])
    found.append(function())

  thread = threading.Thread(target=call)
  thread.start()
  thread.join()
  return found[0]


def _time(turns) -> dict[str, Any]:
  intervals, stalls, stall, swaps, size = [], [], 0.0, set(), 0
  start = None
  for result in turns:
    stall += result.metrics['exchange/stall_ms']
    age = result.metrics.get('exchange/staleness_steps_group_1')
    if age is not None:
      swaps.add(result.step - 1 - age)  # The step of the publication in use.
    size = result.metrics.get('exchange/publication_bytes', size)
    if result.step % _EVERY.value == 1 and result.step > 1:
      # After the first step of an interval: so each holds one exchange whole.
      result.state.step.block_until_ready()
      now = time.perf_counter()
      if start is None:
        _forget_peak()  # That of compiling and of preparing this benchmark.
      else:
        intervals.append(now - start)
        stalls.append(stall)
      start, stall = now, 0.0
  result.state.step.block_until_ready()
  return {
      'interval_s': statistics.median(intervals),
      'stall_ms': statistics.median(stalls),
      'publication_bytes': size,
      'swaps': max(len(swaps) - 1, 0),
      'peak_bytes': _peak_bytes(),
  }


@contextlib.contextmanager
def _timed_syncs() -> Iterator[list[float]]:
  """Gives the seconds of each wait for the disk inside."""
  from codistill_jax.storage import files

  seconds, to_disk = [], files.to_disk

  def timed(path) -> None:
    start = time.perf_counter()
    to_disk(path)
    seconds.append(time.perf_counter() - start)

  files.to_disk = timed
  try:
    yield seconds
  finally:
    files.to_disk = to_disk


def _forget_peak() -> None:
  with contextlib.suppress(OSError):  # Linux only.
    pathlib.Path('/proc/self/clear_refs').write_text('5')


def _peak_bytes() -> int:
  """Returns the largest resident size since `_forget_peak`."""
  try:
    status = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(status.split('VmHWM:')[1].split()[0])
  except (OSError, IndexError):
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Rows:
  """The same random rows in every step."""

  def batch(self, step: int):
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        'inputs': rng.normal(size=(_ROWS.value, _WIDTH)).astype(np.float32),
        'labels': rng.integers(10, size=_ROWS.value).astype(np.int32),
    }


def _network(millions: int):
  import flax.linen as nn

  from codistill_jax import from_linen

  layers = round(millions * 1e6 / _WIDTH**2)

  class Network(nn.Module):

    @nn.compact
    def __call__(self, x):
      for _ in range(layers):
        x = nn.relu(nn.Dense(_WIDTH)(x))
      return nn.Dense(10)(x)

  return from_linen(Network())


def _exchange(arm: str, root: str, variables, train_step):
  from codistill_jax.exchange import publications
  from codistill_jax.exchange.fetching import merge_teachers
  from codistill_jax.exchange.plan import NoExchange, Plan
  from codistill_jax.exchange.store_exchange import CheckpointExchange

  if arm == 'off':

    class Fixed(NoExchange):
      """Teachers that never change."""

      def __init__(self):
        self._teachers = merge_teachers(
            None, {0: variables}, [True], train_step.place_teachers
        )

      def fetch(self, step):
        return self._teachers

    return Fixed()

  class Measured(CheckpointExchange):
    """Beside it a peer publishes, whose work is not measured here."""

    def fetch(self, step):
      if self._plan.due(step):
        _show(root, step)
        newest = publications.published_steps(root, 1)[-1]
        held = lambda: -1 if self.in_use[0] is None else self.in_use[0].step
        while arm == 'synchronous' and held() < newest:
          super().fetch(step)
          time.sleep(0.001)
      return super().fetch(step)

    def publish_if_due(self, step, variables, metrics=None):
      published = super().publish_if_due(step, variables, metrics)
      if published and arm == 'synchronous':
        self.flush()
      return published

  def join() -> CheckpointExchange:
    hidden = pathlib.Path(root) / 'hidden'
    for n in range(_EXCHANGES.value + 2):
      publications.write(
          hidden,
          publications.Publication(1, n * _EVERY.value, time.time()),
          variables,
      )
    _show(root, 0)
    return Measured(
        root,
        0,
        2,
        like=variables,
        plan=Plan(every=_EVERY.value),
        put=train_step.place_teachers,
    )

  exchange = _on_the_free_core(join)
  exchange.restore(0, [0])  # Teachers from the start, as in `off`.
  return exchange


def _show(root: str, step: int) -> None:
  source = pathlib.Path(root) / 'hidden' / 'group_1' / str(step)
  target = pathlib.Path(root) / 'group_1' / str(step)
  target.parent.mkdir(exist_ok=True)
  if source.exists():
    source.rename(target)


if __name__ == '__main__':
  app.run(main)
