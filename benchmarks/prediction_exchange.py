r"""What predictions of peers cost: a joint update against a plain one.

    python -m benchmarks.prediction_exchange --device=cpu

G groups are one program on one device (`one_program.Population`), with and
without distillation: same states, same batch. `ratio` is the one over the
other, and its goal 1.05 for any G. `operations_ratio` is the same in floating
point operations, as the programs are written. `of_single` is a plain update of
all groups over G times that of a group by itself: what it costs to be one
program. A top_k is for groups on different devices, and has no effect on one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import command, measure

_MOST = 1.05
_GROUPS = (1, 2, 4, 8)


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model and number of groups."""
  for case in _cases(options):
    for groups in _GROUPS[1 : 2 if options.quick else None]:
      yield from _of_groups(case, groups, options)


def _of_groups(
    case: Any, groups: int, options: command.Options
) -> Iterator[dict[str, Any]]:
  single, together = _Groups(case, 1), _Groups(case, groups)
  peers = together.peers()
  arms = {
      'single': measure.timed(single.updates(None)),
      'plain': measure.timed(together.updates(None)),
      'codistilled': measure.timed(together.updates(peers)),
  }
  for arm in arms.values():  # Of one state: not at the same time.
    arm(1)
  seconds = measure.alternate(arms, options.times(7))
  operations = together.flops(peers) / together.flops(None)
  yield _row(case, groups, seconds, operations)


def _row(
    case: Any,
    groups: int,
    seconds: Mapping[str, Sequence[float]],
    operations: float,
) -> dict[str, Any]:
  from codistill_jax import peer_predictions

  ratio = measure.ratio(seconds['codistilled'], seconds['plain'])
  classes = case.sizes.get('vocab', 2)
  sent = peer_predictions.bytes_per_example(classes, None, case.output)
  return {
      'name': f'{case.name}, G = {groups}',
      'groups': groups,
      'sizes': case.sizes,
      'plain_ms': measure.milliseconds(seconds['plain']),
      'codistilled_ms': measure.milliseconds(seconds['codistilled']),
      'ratio': ratio,
      'operations_ratio': measure.brief(operations),
      'of_single': measure.ratio(
          seconds['plain'], [groups * s for s in seconds['single']]
      ),
      'bytes_to_peer': sent * case.units,
      'goal': measure.goal(ratio['median'], at_most=_MOST),
  }


class _Groups:
  """Groups of one case as one program, and their state."""

  def __init__(self, case: Any, num_groups: int):
    import jax

    from benchmarks import cases
    from codistill_jax import base, one_program

    self._case = case
    self._step = one_program.Population(
        cases.train_step(case, axis_name=base.REPLICA_AXIS),
        num_groups,
        devices=jax.devices()[:1],
    )
    states = [cases.state_of(case, seed=seed) for seed in range(num_groups)]
    self._state = self._step.place(states)

  def peers(self) -> Any:
    """Returns all others as the peers of each."""
    from codistill_jax import peer_predictions
    from codistill_jax.exchange.plan import peers_of

    groups = self._step.num_groups
    others = [peers_of(g, groups) for g in range(groups)]
    return self._step.peers(peer_predictions.mixing_matrix(others))

  def updates(self, teachers: Any) -> Callable[[], Any]:
    """Returns `call()`, one more update of all groups."""

    def call() -> Any:
      self._state, metrics = self._step(
          self._state, self._case.batch, teachers, 1.0
      )
      return metrics

    return call

  def flops(self, teachers: Any) -> float:
    """Returns the FLOPs of one update of one group."""
    from benchmarks import cases
    from codistill_jax import jaxprs

    if teachers is not None:
      teachers = teachers.replace(mix_G=teachers.mix_G[0])
    step = self._step
    state, batch = cases.state_of(self._case), self._case.batch
    given = (state, batch, teachers, 1.0)
    return jaxprs.flops(
        step.train_step, *given, axis_sizes=step.axis_sizes
    ).total


def _cases(options: command.Options) -> Iterator[Any]:
  from benchmarks import cases

  if options.quick:
    yield cases.click_dnn(4, (8,), tables=2, buckets=10)
  elif options.device == 'gpu':
    yield cases.lstm_lm(1024, 24006, 32, 32, 'bfloat16')
    yield cases.click_dnn(1024, buckets=32768)
  else:
    yield cases.lstm_lm(256, 8192, 16, 32)
    yield cases.click_dnn(256)


if __name__ == '__main__':
  command.run('prediction_exchange', rows)
