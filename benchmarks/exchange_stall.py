r"""What an exchange costs the training loop: time, memory, bytes.

    python -m benchmarks.exchange_stall --device=cpu

One group trains a network of 25 million float32 parameters and exchanges every
50 steps with a peer that publishes as often. Three arms, each a process of its
own, alternating:

* `off`: teachers are there, and never change; nothing is published.
* `synchronous`: the loop writes, reads and swaps itself.
* `asynchronous`: `CheckpointExchange`, as in training.

`lost_ms` is the time per exchange by which an arm is slower than `off`;
`stall_ms` is how long the loop itself was held; `sync_ms` is how long a
publication waited for the disk (fsync) in its thread; `extra_copies` is peak
memory above `off`, in sizes of the parameters, from one more process for each
arm in which malloc gives memory back at once: else what is free, but kept,
would count. A core is kept for the threads of the exchange, as beside an
accelerator, and the others compute; on Linux.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks import command, measure

ARMS = ('off', 'synchronous', 'asynchronous')
_WIDTH = 2048
_MOST_STALL = 0.01  # Of the interval.


class Setting(NamedTuple):
  """What a process measures.

  Attributes:
    millions: Of parameters.
    rows: Group batch; sets the length of a step.
    every: Steps between exchanges.
    exchanges: Measured; one more before them warms up.
  """

  millions: int = 25
  rows: int = 8
  every: int = 50
  exchanges: int = 2


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each arm."""
  setting = Setting(5, 2, 4, 1) if options.quick else Setting()
  few = setting._replace(every=min(20, setting.every), exchanges=1)
  give_back = {'MALLOC_MMAP_THRESHOLD_': str(1 << 16)}
  runs = {arm: [] for arm in ARMS}
  for repeat in range(options.times(1)):
    for arm in measure.in_turn(ARMS, repeat):
      runs[arm].append(_in_a_process(arm, setting))
  peaks = {
      arm: _in_a_process(arm, few, give_back)['peak_bytes'] for arm in ARMS
  }
  middle = lambda arm, key: statistics.median(r[key] for r in runs[arm])
  size = runs['off'][0]['parameter_bytes']
  for arm in ARMS:
    interval, stall = middle(arm, 'interval_s'), middle(arm, 'stall_ms')
    row = {
        'name': f'{setting.millions} M parameters, {arm}',
        **setting._asdict(),
        'interval_s': round(interval, 4),
        'stall_ms': round(stall, 2),
        'stall_share': measure.brief(stall / interval / 1e3),
    }
    if arm != 'off':
      row |= {
          'lost_ms': round(1e3 * (interval - middle('off', 'interval_s')), 1),
          'sync_ms': round(middle(arm, 'sync_ms'), 1),
          'megabytes': middle(arm, 'publication_bytes') / 1e6,
          'swaps': middle(arm, 'swaps'),
          'extra_copies': round((peaks[arm] - peaks['off']) / size, 2),
      }
    if arm == 'asynchronous':
      row['goal'] = measure.goal(row['stall_share'], at_most=_MOST_STALL)
    yield row


def _in_a_process(
    arm: str, setting: Setting, extra: Mapping[str, str] | None = None
) -> dict[str, Any]:
  code = f'from benchmarks import exchange_stall as e; e.child({arm!r})'
  done = subprocess.run(
      [sys.executable, '-c', code, json.dumps(setting)],
      env={**os.environ, **(extra or {})},
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      check=True,
      text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def child(arm: str) -> None:
  """Prints what is measured of an arm, as set by the first argument."""
  print(json.dumps(measure_arm(arm, Setting(*json.loads(sys.argv[1])))))


def measure_arm(arm: str, setting: Setting) -> dict[str, Any]:
  """Measures one arm, in this process."""
  _compute_beside_the_free_core()
  # Here, so that the parent holds no accelerator and no memory.
  import jax
  import optax

  from codistill_jax import replicas, step
  from codistill_jax.group import run_group

  model = _network(setting.millions)
  tx = optax.sgd(1e-6)
  train_step = replicas.PmapStep(
      step.make_train_step(model, tx, axis_name=replicas.REPLICA_AXIS),
      jax.local_devices()[:1],
  )
  stream = _Rows(setting.rows)
  state = step.init_state(
      model, tx, jax.random.PRNGKey(0), stream.batch(0), num_peers=1
  )
  state = jax.tree.map(lambda x: jax.device_get(x), state)
  with tempfile.TemporaryDirectory() as root:
    exchange = _exchange(arm, root, setting, state.variables, train_step)
    turns = run_group(
        train_step,
        state,
        stream,
        num_steps=(setting.exchanges + 1) * setting.every + 1,
        exchange=exchange,
    )
    sizes = [x.nbytes for x in jax.tree.leaves(state.variables)]
    del state
    with _timed_syncs() as seconds:
      found = _time(turns, setting.every)
      exchange.close()
  # One more exchange warms up.
  found['sync_ms'] = 1e3 * sum(seconds) / (setting.exchanges + 1)
  return {
      'parameter_bytes': sum(sizes),
      **found,
  }


def _cores() -> tuple[set[int], set[int]]:
  """Returns the cores to compute on, and the one for the exchange."""
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
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


def _time(turns, every: int) -> dict[str, Any]:
  intervals, stalls, stall, swaps, size = [], [], 0.0, set(), 0
  start = None
  for result in turns:
    stall += result.metrics['exchange/stall_ms']
    age = result.metrics.get('exchange/staleness_steps_group_1')
    if age is not None:
      swaps.add(result.step - 1 - age)  # The step of the publication in use.
    size = result.metrics.get('exchange/publication_bytes', size)
    if result.step % every == 1 and result.step > 1:
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

  def __init__(self, count: int):
    self._count = count

  def batch(self, step: int):
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        'inputs': rng.normal(size=(self._count, _WIDTH)).astype(np.float32),
        'labels': rng.integers(10, size=self._count).astype(np.int32),
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


def _exchange(arm: str, root: str, setting: Setting, variables, train_step):
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
    for n in range(setting.exchanges + 2):
      publications.write(
          hidden,
          publications.Publication(1, n * setting.every, time.time()),
          variables,
      )
    _show(root, 0)
    return Measured(
        root,
        0,
        2,
        like=variables,
        plan=Plan(every=setting.every),
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
  command.run('exchange_stall', rows)
