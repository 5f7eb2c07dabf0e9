r"""How much of what the machine can multiply does a language model's step use?

    python -m benchmarks.utilisation --device=cpu

The operations of a step are those of its matrix products, forward and backward,
as `codistill_jax.jaxprs` counts them; what else a step does (gates, softmax,
the optimiser) counts as nothing, so that it lowers the share. They are compared
with a large square product of the same dtype, the best of several sizes, that
runs in turn with the step on the same machine.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import command, measure

_LEAST = 0.6
_GOAL_AT = 512  # Units of the LSTM.


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model."""
  from benchmarks import cases

  for case in _cases(options):
    products = {
        size: _product(size, case.sizes['dtype']) for size in _sizes(options)
    }
    arms = {f'{size}': measure.timed(call) for size, call in products.items()}
    arms['step'] = measure.timed(cases.updates(case, 0))
    measure.warm_up(arms)
    seconds = measure.alternate(arms, options.times(5))
    yield _row(case, products, seconds)


def _row(case, products, seconds) -> dict[str, Any]:
  steps = seconds['step']
  # In each repeat, the fastest product.
  peaks = [
      max(2 * size**3 / seconds[f'{size}'][i] for size in products)
      for i in range(len(steps))
  ]
  from benchmarks import cases

  operations = cases.update_operations(case, 0)
  share = measure.spread([operations / s / p for s, p in zip(steps, peaks)])
  row = {
      'name': case.name,
      'sizes': case.sizes,
      'operations': operations,
      'step_ms': measure.milliseconds(steps),
      'gflops': measure.spread([operations / s / 1e9 for s in steps]),
      'peak_gflops': measure.spread([p / 1e9 for p in peaks]),
      'share': share,
  }
  if case.name.startswith('LSTM') and case.sizes['units'] == _GOAL_AT:
    row['goal'] = measure.goal(share['median'], at_least=_LEAST)
  return row


def _product(size: int, dtype: str):
  import jax
  import jax.numpy as jnp

  key = jax.random.PRNGKey(0)
  a = jax.random.normal(key, (size, size), jnp.dtype(dtype))
  multiply = jax.jit(jnp.dot)
  return lambda: multiply(a, a)


def _sizes(options: command.Options) -> tuple[int, ...]:
  if options.quick:
    return (32,)
  return (4096, 8192) if options.device == 'gpu' else (1024, 2048, 3072)


def _cases(options: command.Options) -> Iterator[Any]:
  from benchmarks import cases

  if options.quick:
    yield cases.lstm_lm(8, 30, 2, 4)
  elif options.device == 'gpu':
    for units in (256, 512, 1024):
      yield cases.lstm_lm(units, 24006, 128, 32, 'bfloat16')
    yield cases.transformer_lm(512, 6, 24006, 128, 32, 'bfloat16')
  else:
    for units in (256, 512, 1024):
      yield cases.lstm_lm(units, 8192, 32, 32)
    yield cases.transformer_lm(256, 4, 8192, 16, 32)


if __name__ == '__main__':
  command.run('utilisation', rows)
