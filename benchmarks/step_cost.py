r"""What teachers cost: a codistilled update against a plain one.

    python -m benchmarks.step_cost --device=cpu

Beside the ratio stands what it cannot be below, for P teachers that are asked
again in each step: 1 + P x (forward pass / plain update). A forward pass is one
in eval mode up to the logits; up to the features alone, where the model has a
head of its own (the share is given, too), a teacher has not said anything yet.
Nor has it taught by then: of language models stands beside it the ratio to a
floor that has also what P teachers add to the losses and their gradient, as a
program by itself.
The jitted, donated step is timed, with teachers on the device; exchange is not
in it. All arms of a model run in turn; medians of ratios within a repeat.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import command, measure

_MOST = 1.05  # Of the limit.
_PEERS = (1, 3)


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model and number of teachers."""
  from benchmarks import cases

  for case in _cases(options):
    arms = {
        'plain': measure.timed(cases.updates(case, 0)),
        'features': measure.timed(cases.forward(case, to_logits=False)),
        'logits': measure.timed(cases.forward(case, to_logits=True)),
    }
    numbers = _PEERS[: 1 if options.quick else None]
    for peers in numbers:
      arms[f'{peers}'] = measure.timed(cases.updates(case, peers))
    for peers in (0, *numbers) if 'vocab' in case.sizes else ():
      losses = cases.losses_of_logits(case, peers)
      arms[f'losses {peers}'] = measure.timed(losses)
    measure.warm_up(arms)
    seconds = measure.alternate(arms, options.times(7))
    plain_operations = cases.update_operations(case, 0)
    for peers in numbers:
      operations = cases.update_operations(case, peers) / plain_operations
      yield _row(case, peers, seconds, operations)


def _row(
    case, peers: int, seconds: dict[str, Sequence[float]], operations: float
) -> dict[str, Any]:
  ratio = measure.ratio(seconds[f'{peers}'], seconds['plain'])
  share = measure.ratio(seconds['logits'], seconds['plain'])
  limit = 1 + peers * share['median']
  # Repeat by repeat, as the others.
  of_limit = measure.ratio(
      seconds[f'{peers}'],
      [p + peers * f for p, f in zip(seconds['plain'], seconds['logits'])],
  )
  row = {
      'name': f'{case.name}, P = {peers}',
      'peers': peers,
      'sizes': case.sizes,
      'plain_ms': measure.milliseconds(seconds['plain']),
      'codistilled_ms': measure.milliseconds(seconds[f'{peers}']),
      'forward_ms': measure.milliseconds(seconds['logits']),
      'ratio': ratio,
      'forward_share': share,
      'feature_share': measure.ratio(seconds['features'], seconds['plain']),
      'limit': measure.brief(limit),
      'operations_ratio': measure.brief(operations),
      'of_limit': of_limit,
      'goal': measure.goal(of_limit['median'], at_most=_MOST),
  }
  if 'losses 0' in seconds:
    parts = (seconds[x] for x in ('plain', 'logits', f'losses {peers}'))
    row['of_floor'] = measure.ratio(
        seconds[f'{peers}'],
        [
            p + peers * f + taught - task
            for p, f, taught, task in zip(*parts, seconds['losses 0'])
        ],
    )
  return row


def _cases(options: command.Options) -> Iterator[Any]:
  from benchmarks import cases

  if options.quick:
    yield cases.click_dnn(4, (8,), tables=2, buckets=10)
  elif options.device == 'gpu':
    yield cases.lstm_lm(1024, 24006, 128, 32, 'bfloat16')
    yield cases.transformer_lm(512, 6, 24006, 128, 32, 'bfloat16')
    yield cases.click_dnn(1024, buckets=32768)
    yield cases.resnet50(64)  # Last: it takes longest to compile.
  else:
    yield cases.lstm_lm(256, 8192, 16, 32)
    yield cases.transformer_lm(256, 4, 8192, 16, 32)
    yield cases.resnet20(32)
    yield cases.click_dnn(256)


if __name__ == '__main__':
  command.run('step_cost', rows)
