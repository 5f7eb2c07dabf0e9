r"""Many small runs as one program, or group by group: which takes longer?

    python -m benchmarks.population --device=cpu

Six members: three seeds of two groups, which codistil in lockstep on one
device, each on a batch of its own. `together` is one program for all of them
(`experiments.studies.seeds_together`), `in_turn` a step of each group, one
update each in turn, exchanging through memory. Both exchange every ten updates;
that is part of what is measured. A ratio below 1 is in favour of one program.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import command, measure

_SEEDS, _GROUPS, _EVERY = 3, 2, 10


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model."""
  for case in _cases(options):
    calls = calls_of(case)
    for call in calls.values():
      call()  # Without teachers, which the first interval has not; then with.
    seconds = measure.alternate(
        {name: measure.timed(call) for name, call in calls.items()},
        options.times(7),
    )
    rounds = {
        name: [s / _EVERY for s in found] for name, found in seconds.items()
    }
    yield {
        'name': f'{case.name}, {case.sizes["rows"]} rows',
        'members': _SEEDS * _GROUPS,
        'sizes': case.sizes,
        'together_ms': measure.milliseconds(rounds['together']),
        'in_turn_ms': measure.milliseconds(rounds['in_turn']),
        'ratio': measure.ratio(rounds['together'], rounds['in_turn']),
    }


def calls_of(case: Any) -> dict[str, Callable[[], Any]]:
  """Returns the arms: a call is ten updates of all groups, and an exchange.

  It gives the metrics of the last ones.
  """
  return {'together': _together(case), 'in_turn': _in_turn(case)}


def _together(case: Any) -> Callable[[], Any]:
  import jax
  import jax.numpy as jnp

  from benchmarks import cases
  from codistill_jax import base, one_program
  from codistill_jax.exchange.plan import Plan
  from experiments.studies.seeds_together import exchanges_of

  members = _SEEDS * _GROUPS
  population = one_program.Population(
      cases.train_step(case, axis_name=base.REPLICA_AXIS),
      members,
      devices=jax.devices()[:1],
      shared_batch=False,
  )
  update = one_program.JointUpdate(population)
  batch = jax.tree.map(lambda x: jnp.stack([x] * members), case.batch)
  exchanges = exchanges_of(update, Plan(_EVERY, 'lockstep'), _GROUPS)
  return _rounds(case, update.seats, batch, exchanges)


def _in_turn(case: Any) -> Callable[[], Any]:
  import jax

  from benchmarks import cases
  from codistill_jax import base, replicas
  from codistill_jax.exchange.store_exchange import memory_exchanges

  step = replicas.PmapStep(
      cases.train_step(case, axis_name=base.REPLICA_AXIS), jax.devices()[:1]
  )
  exchanges = [
      exchange
      for _ in range(_SEEDS)
      for exchange in memory_exchanges(_GROUPS, every=_EVERY)
  ]
  return _rounds(case, [step] * len(exchanges), case.batch, exchanges)


def _rounds(
    case: Any, steps: Sequence[Any], batch: Any, exchanges: Sequence[Any]
) -> Callable[[], Any]:
  from codistill_jax import group

  groups = [
      group.run_group(
          step, state, _Same(batch), num_steps=10**9, exchange=exchange
      )
      for step, state, exchange in zip(steps, _states(case), exchanges)
  ]

  def call() -> Any:
    for _ in range(_EVERY):
      results = [next(one) for one in groups]
    return [result.metrics for result in results]

  return call


class _Same:
  """A stream of one batch."""

  def __init__(self, batch: Any):
    self._batch = batch

  def batch(self, step: int) -> Any:
    del step
    return self._batch


def _states(case: Any) -> list[Any]:
  from benchmarks import cases

  count = range(_SEEDS * _GROUPS)
  return [cases.state_of(case, _GROUPS - 1, seed) for seed in count]


def _cases(options: command.Options) -> Iterator[Any]:
  from benchmarks import cases

  if options.quick:
    yield cases.click_dnn(4, (8,), tables=2, buckets=10)
    return
  yield cases.lstm_lm(32, 200, 8, 8)
  yield cases.lstm_lm(64, 1000, 8, 16)
  yield cases.click_dnn(128, (256, 128, 64), tables=8, buckets=1000)
  if options.device == 'gpu':
    yield cases.lstm_lm(256, 1000, 16, 32)
    yield cases.lstm_lm(512, 8192, 32, 32)
    yield cases.click_dnn(1024)
    yield cases.resnet20(128)


if __name__ == '__main__':
  command.run('population', rows)
