"""One pass over a data set: a model's metrics, an ensemble's, and churn.

Nothing of a whole data set is kept: batches leave sums and counts. They stay on
the device for some batches, so that the host runs ahead of it, and add up on
the host in float64, where a count beyond 2**24 is exact.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base, metrics
from codistill_jax.step import example_weights

# Batches that may be under way on the device: bounds the memory they hold, and
# the time that passes between `should_stop` and the return.
_IN_FLIGHT = 32


class ModelComparison(NamedTuple):
  """What `compare` finds.

  Attributes:
    members: For each set of variables 'eval/loss' (nats), 'eval/accuracy',
      'eval/perplexity' and 'eval/examples', over how many; of text
      'eval/bits_per_byte' (see `evaluate`); of a sigmoid output
      'eval/auc', 'eval/calibration' and 'eval/calibration_error' in place of
      the perplexity.
    ensemble: The same of the ensemble.
    pairs: For each pair of indices a < b 'churn/mean_abs' and
      'churn/disagreement'; of a sigmoid output 'churn/relative_difference' too.
  """

  members: list[dict[str, float]]
  ensemble: dict[str, float]
  pairs: dict[tuple[int, int], dict[str, float]]


def evaluate(
    eval_step: Callable[..., tuple[dict[str, metrics.Metric], base.PyTree]],
    variables: base.Variables,
    batches: Iterable[base.Batch],
    carry: base.PyTree,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Returns metrics of one set of variables over `batches`, in one pass.

  Args:
    eval_step: `eval_step(variables, batch, carry) -> (metrics, carry)`, where
      metrics are by key; jit it.
    variables: The model's.
    batches: Every batch once, in order; padding has weight 0.
    carry: The recurrent state before the first batch.
    should_stop: Asked before every batch.

  Returns:
    Their numbers by key, NaN if nothing had weight; 'eval/examples', the weight
    of all examples (tokens); and 'eval/perplexity', the exp of 'eval/loss',
    unless there is an 'eval/auc': a sigmoid output has none; and, if `batches`
    have `bytes_per_example`, 'eval/bits_per_byte', the same loss of a byte of
    text: it compares models with different tokenizers. None if `should_stop`
    said so.

  Raises:
    ValueError: If there is no batch.
  """
  step = lambda batch, carry: eval_step(variables, batch, carry)
  leaf = next(iter(jax.tree.leaves(variables)), None)
  if isinstance(leaf, jax.Array) and leaf.committed:
    # Where later carries are; else the second batch would compile once more.
    carry = jax.device_put(carry, leaf.sharding)
  sums = _sum_over(step, batches, carry, should_stop)
  return None if sums is None else _values(sums, batches)


def compare(
    model: base.Model,
    variables_list: Sequence[base.Variables],
    batches: Iterable[base.Batch],
    own: Sequence[Callable[..., metrics.Metric]] = (),
) -> ModelComparison:
  """Compares sets of variables: each, their ensemble, and between them.

  The ensemble predicts the mean of the members' probabilities; its loss and
  accuracy are those of that prediction, not means of the members'. A model
  whose logits have the shape of the labels has a sigmoid output.

  Args:
    model: One model.
    variables_list: N >= 1 sets of its variables.
    batches: Every batch once, in order, all with the same number of rows;
      padding has weight 0.
    own: Metrics besides, see `metrics.quality`.

  Raises:
    ValueError: If there is no batch, or nothing to compare.
  """
  variables_list = list(variables_list)
  if not variables_list:
    raise ValueError('Expected at least one set of variables, got none.')
  stream = iter(batches)
  first = next(stream, None)
  if first is None:
    raise ValueError(_NO_BATCH)
  rows = len(example_weights(first))
  carries = [model.init_carry(rows) for _ in variables_list]
  compare_step = _compare_step(model, tuple(own))
  step = lambda batch, carries: compare_step(variables_list, batch, carries)
  sums = _sum_over(step, itertools.chain([first], stream), carries)
  return ModelComparison(
      members=[_values(member, batches) for member in sums.members],
      ensemble=_values(sums.ensemble, batches),
      pairs={pair: _values(found) for pair, found in sums.pairs.items()},
  )


# Compiled once, however often the models of a run are compared.
@functools.lru_cache(maxsize=4)
def _compare_step(
    model: base.Model, own: tuple[Callable[..., metrics.Metric], ...]
) -> Callable[..., tuple]:
  """Returns a jitted step that compares sets of variables on a batch.

  `step(variables_list, batch, carries) -> (sums, carries)`, where sums is a
  pytree of metrics shaped like `ModelComparison`, less perplexity.
  """

  @jax.jit
  def step(variables_list, batch, carries):
    weights, labels = example_weights(batch), batch['labels']
    results = [
        base.forward(model, variables, batch, carry, None, False)
        for variables, carry in zip(variables_list, carries)
    ]
    logits = [base.logits_of(outputs) for outputs, _ in results]
    sigmoid = logits[0].shape == labels.shape
    log_probs = [
        jax.nn.log_softmax(metrics.class_logits(x, labels)) for x in logits
    ]
    member = functools.partial(
        _member, labels=labels, weights=weights, sigmoid=sigmoid, own=own
    )
    sums = ModelComparison(
        members=[member(x) for x in log_probs],
        ensemble=member(_mean_prediction(log_probs)),
        pairs={
            (i, j): _differences(log_probs[i], log_probs[j], weights, sigmoid)
            for i, j in itertools.combinations(range(len(log_probs)), 2)
        },
    )
    return sums, [updates.carry for _, updates in results]

  return step


_NO_BATCH = 'Expected at least one batch to evaluate on, got none.'


def _member(log_probs, *, labels, weights, sigmoid, own):
  # The logit of a sigmoid output from the two classes it stands for.
  logits = log_probs[..., 1] - log_probs[..., 0] if sigmoid else log_probs
  return {
      'eval/loss': metrics.cross_entropy(log_probs, labels, weights),
      **metrics.quality(logits, labels, weights, own),
  }


def _mean_prediction(log_probs):
  """Returns the logarithm of the mean of probabilities."""
  stacked = jnp.stack(log_probs)
  return jax.nn.logsumexp(stacked, axis=0) - np.log(len(log_probs))


def _differences(log_probs_a, log_probs_b, weights, sigmoid):
  probs_a, probs_b = jnp.exp(log_probs_a), jnp.exp(log_probs_b)
  found = {
      'churn/mean_abs': metrics.churn(probs_a, probs_b, weights),
      'churn/disagreement': metrics.disagreement(
          log_probs_a, log_probs_b, weights
      ),
  }
  if sigmoid:
    found['churn/relative_difference'] = metrics.relative_difference(
        probs_a[..., 1], probs_b[..., 1], weights
    )
  return found


def _sum_over(step, batches, carry, should_stop=lambda: False):
  """Returns sums of `step(batch, carry) -> (sums, carry)`; None if stopped."""
  sums, pending = None, []
  for batch in batches:
    if should_stop():
      return None
    found, carry = step(batch, carry)
    pending.append(found)
    if len(pending) == _IN_FLIGHT:
      sums, pending = _add(sums, pending), []
  sums = _add(sums, pending)
  if sums is None:
    raise ValueError(_NO_BATCH)
  return sums


def _add(sums, pending):
  """Returns `sums` (or None), plus what the device has, in float64."""
  for found in jax.device_get(pending):
    found = jax.tree.map(np.float64, found)
    sums = found if sums is None else jax.tree.map(np.add, sums, found)
  return sums


def _values(sums, batches=()):
  """Returns numbers by key, with perplexity and count of 'eval/loss'."""
  values = {key: metric.number() for key, metric in sums.items()}
  if 'eval/loss' not in values:
    return values
  values['eval/examples'] = float(sums['eval/loss'].count)
  if 'eval/auc' not in values:
    with np.errstate(over='ignore'):
      values['eval/perplexity'] = float(np.exp(values['eval/loss']))
  if bytes_per_example := getattr(batches, 'bytes_per_example', None):
    nats_per_byte = values['eval/loss'] / bytes_per_example
    values['eval/bits_per_byte'] = nats_per_byte / float(np.log(2))
  return values
