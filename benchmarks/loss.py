r"""The loss over blocks of tokens against the loss of all logits at once.

    python -m benchmarks.loss --device=cpu

Task loss and distillation from one teacher, from features (tokens, 1024) and
head to the loss and the gradients of student features and head. `fused` is
`blocks.summed`, `plain` the same loss of logits. Memory is what the compiled
program holds besides arguments and results (`memory_analysis`); nothing is run
for it. Times are of 1,024 tokens on a CPU, where 4,096 take ten seconds.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import command, measure

_TOKENS = 4096
_FEATURES = 1024
_VOCABULARIES = (24_006, 131_072)
_TIMED_VOCABULARY = 24_006
_MEMORY = 1 / 8  # At most that share of the plain loss's.
_BUDGETS_MB = 300, 500, 1000  # At the smaller vocabulary.
_SLOWER = 1.0


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each vocabulary's memory, then those of the time."""
  tokens, features, vocabularies = _TOKENS, _FEATURES, _VOCABULARIES
  if options.quick:
    # So many that there is more than one block.
    tokens, features, vocabularies = 2048, 2, (50,)
  for vocab in vocabularies:
    yield memory(tokens, features, vocab, options)
  for budget in () if options.quick else _BUDGETS_MB:
    yield memory(tokens, features, vocabularies[0], options, budget)
  if options.device == 'cpu':
    tokens = min(tokens, 1024)
  vocab = vocabularies[0] if options.quick else _TIMED_VOCABULARY
  yield from times(tokens, features, vocab, options)


def memory(
    tokens: int,
    features: int,
    vocab: int,
    options: command.Options,
    budget_mb: int | None = None,
) -> dict[str, Any]:
  """Temporary memory of both forms, compiled for these shapes.

  With a budget the goal is to keep within that, whatever the plain form takes.
  """
  import jax

  dtype = _dtype(options)
  shapes = jax.eval_shape(lambda: arguments_of(tokens, features, vocab, dtype))
  found = {}
  most_bytes = budget_mb and budget_mb * 10**6
  for name, function in functions(True, most_bytes).items():
    compiled = jax.jit(function).lower(*shapes).compile()
    found[name] = compiled.memory_analysis().temp_size_in_bytes
  share = found['fused'] / found['plain']
  within, goal = '', measure.goal(share, at_most=_MEMORY)
  if budget_mb:
    within = f' within {budget_mb:,} MB'
    goal = measure.goal(found['fused'] / 1e6, at_most=budget_mb)
  return {
      'name': f'memory{within}, V = {vocab:,}',
      'sizes': _sizes(tokens, features, vocab, dtype),
      'fused_mb': measure.brief(found['fused'] / 1e6),
      'plain_mb': measure.brief(found['plain'] / 1e6),
      'ratio': measure.spread([share]),
      'goal': goal,
  }


def times(
    tokens: int, features: int, vocab: int, options: command.Options
) -> Iterator[dict[str, Any]]:
  """Time of both forms: forward alone, and with the gradients."""
  import jax

  dtype = _dtype(options)
  arguments = arguments_of(tokens, features, vocab, dtype)
  for backward in (False,) if options.quick else (False, True):
    arms = {}
    for name, function in functions(backward).items():
      run = jax.jit(function)
      arms[name] = measure.timed(lambda run=run: run(*arguments))
    measure.warm_up(arms)
    seconds = measure.alternate(arms, options.times(7))
    ratio = measure.ratio(seconds['fused'], seconds['plain'])
    what = 'forward and backward' if backward else 'forward'
    yield {
        'name': f'time {what}, V = {vocab:,}',
        'sizes': _sizes(tokens, features, vocab, dtype),
        'fused_ms': measure.milliseconds(seconds['fused']),
        'plain_ms': measure.milliseconds(seconds['plain']),
        'ratio': ratio,
        'goal': measure.goal(ratio['median'], at_most=_SLOWER),
    }


def functions(backward: bool, most_bytes: int | None = None) -> dict[str, Any]:
  """`(student, teachers, labels) -> loss`, or loss and gradients."""
  import jax
  import jax.numpy as jnp

  from codistill_jax import base, blocks, losses

  def loss(logits, teacher_logits, labels, shared):
    present = jnp.ones(len(teacher_logits))
    per_example = losses.task_loss(logits, labels)
    distill = losses.cross_entropy(logits, teacher_logits, present)
    del shared
    return jnp.sum(per_example + distill), {}

  def fused(student, teachers, labels):
    return blocks.summed(
        loss, student, teachers, labels, None, most_bytes=most_bytes
    )[0]

  def plain(student, teachers, labels):
    teacher_logits = jax.vmap(base.logits_of)(teachers)
    return loss(base.logits_of(student), teacher_logits, labels, None)[0]

  found = {'fused': fused, 'plain': plain}
  if not backward:
    return found
  return {name: jax.value_and_grad(f) for name, f in found.items()}


def arguments_of(tokens: int, features: int, vocab: int, dtype: str) -> tuple:
  """Returns student, one teacher and labels, of random numbers."""
  import jax
  import jax.numpy as jnp

  from codistill_jax import base

  def head(seed: int) -> base.HeadOutputs:
    a, b = jax.random.split(jax.random.PRNGKey(seed))
    kernel = jax.random.normal(b, (features, vocab), dtype) / features**0.5
    return base.HeadOutputs(
        jax.random.normal(a, (tokens, features), dtype),
        kernel.astype(dtype),
        jnp.zeros(vocab),
    )

  labels = jax.random.randint(jax.random.PRNGKey(2), (tokens,), 0, vocab)
  teachers = jax.tree.map(lambda x: x[None], head(1))
  return head(0), teachers, labels


def _dtype(options: command.Options) -> str:
  return 'bfloat16' if options.device == 'gpu' else 'float32'


def _sizes(tokens: int, features: int, vocab: int, dtype: str) -> dict:
  sizes = {'tokens': tokens, 'features': features, 'vocab': vocab}
  return {**sizes, 'dtype': dtype, 'peers': 1}


if __name__ == '__main__':
  command.run('loss', rows)
