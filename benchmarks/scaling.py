r"""How the cost of a codistilled step grows: groups, vocabulary, tokens, units.

    python -m benchmarks.scaling --device=cpu

Along `groups`, a round of lockstep: every group of one process fetches from
memory, does one update with the G - 1 others as teachers, and publishes every
10 steps; the time is that of a round over G. The other lines are of one update
with one teacher, beside a plain one. Each line is fitted by least squares:
along the groups and the vocabulary a straight line (there is a part that does
not grow), else a power of the size. The residual is the root of the mean square
off the line, relative.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import command, measure

_EVERY = 10


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each line."""
  for name, (points, call_of, fit) in _lines(options).items():
    # All points of a line in turn.
    arms = {}
    for point in points:
      for kind, call in call_of(point).items():
        arms[f'{kind} {point}'] = measure.timed(call)
    measure.warm_up(arms)
    seconds = measure.alternate(arms, options.times(3), most_calls=20)
    row = {'name': name, 'along': list(points), 'fit': fit.__name__}
    for kind in call_of.kinds:
      times = [
          measure.milliseconds(seconds[f'{kind} {point}'])['median']
          for point in points
      ]
      if call_of.per_point:
        times = [measure.brief(t / n) for t, n in zip(times, points)]
      row[f'{kind}_ms'] = times
      row[f'{kind}_line'] = fit(points, times)
    yield row


def _lines(options: command.Options) -> dict[str, tuple]:
  from benchmarks import cases

  usual = {'units': 128, 'vocab': 2048, 'rows': 8, 'tokens': 32}
  if options.device == 'gpu':
    usual = {'units': 512, 'vocab': 8192, 'rows': 128, 'tokens': 32}
  if options.quick:
    usual = {'units': 8, 'vocab': 30, 'rows': 2, 'tokens': 4}
  lm = lambda **sizes: cases.lstm_lm(**{**usual, **sizes})
  along = {
      'groups': (1, 2, 4, 8),
      'vocab': (2048, 8192, 32768, 131072),
      'tokens': (16, 32, 64, 128),
      'units': (64, 128, 256, 512, 1024),
  }
  if options.quick:
    along = {'groups': (1, 2), 'units': (8, 16)}
  fits = {'groups': measure.line, 'vocab': measure.line}
  found = {}
  for name, points in along.items():
    call_of = Rounds(lm()) if name == 'groups' else Updates(lm, name)
    found[name] = (points, call_of, fits.get(name, measure.slope))
  return found


class Updates:
  """Plain and codistilled updates of a model of some size."""

  kinds = ('plain', 'codistilled')
  per_point = False

  def __init__(self, case_of: Callable[..., Any], name: str):
    self._case_of, self._name = case_of, name

  def __call__(self, point: int) -> dict[str, Callable[[], Any]]:
    from benchmarks import cases

    case = self._case_of(**{self._name: point})
    return {
        kind: cases.updates(case, peers)
        for peers, kind in enumerate(self.kinds)
    }


class Rounds:
  """Rounds of G groups in lockstep."""

  kinds = ('codistilled',)
  per_point = True  # A round is of G updates.

  def __init__(self, case: Any):
    self._case = case

  def __call__(self, groups: int) -> dict[str, Callable[[], Any]]:
    import jax

    from benchmarks import cases
    from codistill_jax import replicas
    from codistill_jax.exchange.store_exchange import memory_exchanges
    from codistill_jax.group import run_group

    case = self._case
    train_step = replicas.PmapStep(
        cases.train_step(case, axis_name=replicas.REPLICA_AXIS),
        jax.local_devices()[:1],
    )
    turns = [
        run_group(
            train_step,
            cases.state_of(case, groups - 1, seed=g),
            Same(jax.device_get(case.batch)),
            num_steps=10**6,
            exchange=exchange,
        )
        for g, exchange in enumerate(memory_exchanges(groups, every=_EVERY))
    ]

    def call():
      return [next(turn).metrics['loss/total'] for turn in turns]

    for _ in range(_EVERY + 1):  # Until there are teachers.
      call()
    return {'codistilled': call}


class Same:
  """The same batch in every step."""

  def __init__(self, batch: dict[str, Any]):
    self._batch = batch

  def batch(self, step: int) -> dict[str, Any]:
    """Returns that batch."""
    del step
    return self._batch


if __name__ == '__main__':
  command.run('scaling', rows)
