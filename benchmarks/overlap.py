r"""Does it pay to run a teacher's forward pass of batch t + 1 beside step t?

    python -m benchmarks.overlap --device=cpu

On one device. `inside` is a codistilled step as it is, `apart` two programs one
after the other: the teacher's forward pass, then a step that is given its
outputs. `beside` dispatches both before it waits for either, the teacher a
batch ahead. What it could win is what one program leaves idle; a ratio of 1 or
more says that there is nothing to win.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import command, measure


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model."""
  for case in _cases(options):
    arms = {name: measure.timed(call) for name, call in calls_of(case).items()}
    measure.warm_up(arms)
    seconds = measure.alternate(arms, options.times(7))
    yield {
        'name': case.name,
        'sizes': case.sizes,
        'inside_ms': measure.milliseconds(seconds['inside']),
        'apart_ms': measure.milliseconds(seconds['apart']),
        'beside_ms': measure.milliseconds(seconds['beside']),
        'ratio': measure.ratio(seconds['beside'], seconds['inside']),
        'apart_ratio': measure.ratio(seconds['apart'], seconds['inside']),
    }


def calls_of(case) -> dict[str, Callable[[], Any]]:
  """Returns the arms: each call does one more update."""
  import jax

  from benchmarks import cases

  return {
      'inside': cases.updates(case, 1),
      'apart': _two_programs(case, jax.block_until_ready),
      'beside': _two_programs(case, lambda x: x),
  }


def _two_programs(case, wait: Callable[[Any], Any]) -> Callable[[], Any]:
  """One more update; the teacher's outputs of the next batch are asked for."""
  import jax
  import jax.numpy as jnp

  from benchmarks import cases
  from codistill_jax import base

  teacher = cases.teachers_of(case, 1)

  @jax.jit
  def ask(variables, carry):
    one = jax.tree.map(lambda x: x[0], variables)
    outputs, updates = case.model.apply(one, case.batch, carry, None, False)
    return jax.tree.map(lambda x: x[None], outputs), updates.carry

  # A model that says what it is given, in the place of the teachers' own.
  said = case.model._replace(
      apply=lambda variables, batch, carry, rng, train: (
          variables.params,
          base.Updates({}, carry),
      )
  )
  step = jax.jit(cases.train_step(case, teacher_model=said), donate_argnums=0)
  state = cases.state_of(case, 1)
  carry = case.model.init_carry(len(case.batch['labels']))
  outputs, carry = ask(teacher.variables, carry)

  def call():
    nonlocal state, outputs, carry
    after, carry = ask(teacher.variables, carry)
    wait(after)
    given = base.Teachers(base.Variables(outputs), teacher.present_P)
    state, metrics = step(state, case.batch, given, jnp.float32(1.0))
    wait(metrics)
    outputs = after
    return metrics

  return call


def _cases(options: command.Options) -> Iterator[Any]:
  from benchmarks import cases

  if options.quick:
    yield cases.click_dnn(4, (8,), tables=2, buckets=10)
  elif options.device == 'gpu':
    yield cases.lstm_lm(1024, 24006, 128, 32, 'bfloat16')
    yield cases.resnet50(64)
  else:
    yield cases.lstm_lm(256, 8192, 16, 32)
    yield cases.resnet20(32)


if __name__ == '__main__':
  command.run('overlap', rows)
