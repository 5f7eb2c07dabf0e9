"""Evaluation: streaming sums equal the whole; ensembles average predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax import base, losses, metrics
from codistill_jax import evaluate as evaluate_lib
from codistill_jax import step as step_lib

CLASSES = 3


def table_model():
  """Logits straight from a table of parameters: row `inputs` of it."""

  def apply(variables, batch, carry, rng, train):
    assert rng is None and train is False
    logits = jnp.asarray(variables.params)[jnp.asarray(batch['inputs'])]
    return logits, base.Updates(variables.model_state, carry)

  return base.Model(init=None, apply=apply)


def counting_model():
  """Its logits depend on how often a row was seen; its carry on variables."""

  def apply(variables, batch, carry, rng, train):
    del rng, train
    logits = jnp.asarray(variables.params)[jnp.asarray(batch['inputs'])]
    logits = logits * (1.0 + carry[:, None])
    return logits, base.Updates({}, carry + variables.model_state['rate'])

  return base.Model(None, apply, lambda n: jnp.zeros((n,)))


def evaluated(model, variables, batches, carry=(), **kwargs):
  step = jax.jit(step_lib.make_eval_step(model))
  return evaluate_lib.evaluate(step, variables, batches, carry, **kwargs)


def compared(members):
  members = [base.Variables(x) for x in members]
  return evaluate_lib.compare(table_model(), members, batches(6))


def data(rows=20, seed=0):
  rng = np.random.default_rng(seed)
  return np.arange(rows), rng.integers(CLASSES, size=rows)


def batches(size, rows=20, junk=0):
  """Batches of `size` rows, the last one padded with weight 0."""
  inputs, labels = data(rows)
  found = []
  for i in range(0, rows, size):
    x, y = inputs[i : i + size], labels[i : i + size]
    pad = (0, size - len(x))
    found.append(
        {
            'inputs': np.pad(x, pad, constant_values=junk),
            'labels': np.pad(y, pad),
            'weights': np.pad(np.ones(len(x), np.float32), pad),
        }
    )
  return found


def tables(count=2, rows=20, scale=2.0):
  rng = np.random.default_rng(7)
  shape = (count, rows, CLASSES)
  return list((scale * rng.normal(size=shape)).astype(np.float32))


def softmax(x):
  e = np.exp(x.astype(np.float64))
  return e / e.sum(-1, keepdims=True)


def expected_metrics(probs):
  _, labels = data(len(probs))
  loss = -np.log(probs[np.arange(len(probs)), labels]).mean()
  return {
      'eval/loss': loss,
      'eval/accuracy': (probs.argmax(-1) == labels).mean(),
      'eval/perplexity': np.exp(loss),
      'eval/examples': len(probs),
  }


def assert_close(got, expected):
  assert got.keys() == expected.keys()
  for key, value in expected.items():
    assert type(got[key]) is float
    np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize('size', [1, 7, 20])
def test_evaluate_equals_the_whole_set_at_once(size):
  table = tables()[0]
  got = evaluated(table_model(), base.Variables(table), batches(size))
  assert_close(got, expected_metrics(softmax(table)))


def test_padding_changes_nothing_even_where_it_is_not_a_number():
  table = np.concatenate([tables()[0], np.full((1, CLASSES), np.nan)])
  padded = batches(8, junk=20)
  assert sum(b['weights'].size for b in padded) == 24
  variables = base.Variables(table.astype(np.float32))
  expected = expected_metrics(softmax(table[:20]))
  assert_close(evaluated(table_model(), variables, padded), expected)
  found = evaluate_lib.compare(table_model(), [variables] * 2, padded)
  assert_close(found.ensemble, expected)
  assert found.pairs[0, 1] == {
      'churn/mean_abs': 0.0,
      'churn/disagreement': 0.0,
  }


def test_sums_are_exact_beyond_what_float32_counts():
  big = metrics.Mean(jnp.float32(2**24), jnp.float32(2**24))
  one = metrics.Mean(jnp.float32(0), jnp.float32(1))
  step = lambda variables, batch, carry: ({'x': batch}, carry)
  got = evaluate_lib.evaluate(step, None, [big] + [one] * 100, ())
  assert got == {'x': 2**24 / (2**24 + 100)}


def test_the_carry_goes_from_batch_to_batch():
  table = tables()[0]
  variables = base.Variables(table, {'rate': 1.0})
  got = evaluated(counting_model(), variables, batches(5), jnp.zeros((5,)))
  scaled = table * (1 + np.arange(20) // 5)[:, None]
  assert_close(got, expected_metrics(softmax(scaled)))
  found = evaluate_lib.compare(
      counting_model(),
      [variables, base.Variables(table, {'rate': 0.0})],
      batches(5),
  )
  assert_close(found.members[0], expected_metrics(softmax(scaled)))
  assert_close(found.members[1], expected_metrics(softmax(table)))


def test_one_program_evaluates_all_batches_of_variables_on_a_device():
  """They come from a training step: a carry that did not would retrace it."""
  step = jax.jit(step_lib.make_eval_step(counting_model()))
  variables = base.Variables(
      jnp.ones((20, CLASSES)), {'rate': jnp.float32(0.5)}
  )
  variables = jax.device_put(variables, jax.devices()[1])
  carry = counting_model().init_carry(5)
  evaluate_lib.evaluate(step, variables, batches(5), carry)
  assert step._cache_size() == 1


def test_should_stop_is_asked_before_every_batch():
  asked, served = [], []

  def should_stop():
    asked.append(len(served))
    return len(asked) == 3

  def stream():
    for batch in batches(4):
      served.append(batch)
      yield batch

  variables = base.Variables(tables()[0])
  got = evaluated(table_model(), variables, stream(), should_stop=should_stop)
  assert got is None and asked == [1, 2, 3]


def test_only_some_batches_are_under_way_on_the_device(monkeypatch):
  fetched = []
  device_get = jax.device_get
  monkeypatch.setattr(
      jax, 'device_get', lambda x: fetched.append(len(x)) or device_get(x)
  )
  (table,) = tables(1, rows=100)
  many = batches(1, rows=100)
  got = evaluated(table_model(), base.Variables(table), many)
  assert sum(fetched) == 100 and max(fetched) <= 50
  assert_close(got, expected_metrics(softmax(table)))


def test_nothing_to_evaluate_is_an_error_and_no_weight_is_nan():
  variables = base.Variables(tables()[0])
  with pytest.raises(ValueError, match='at least one batch'):
    evaluated(table_model(), variables, [])
  with pytest.raises(ValueError, match='at least one batch'):
    evaluate_lib.compare(table_model(), [variables], [])
  with pytest.raises(ValueError, match='one set of variables'):
    evaluate_lib.compare(table_model(), [], batches(4))
  (batch,) = batches(20)
  batch['weights'][:] = 0
  got = evaluated(table_model(), variables, [batch])
  assert got.pop('eval/examples') == 0
  assert np.isnan(list(got.values())).all()


def test_the_ensemble_averages_probabilities():
  members = tables(3)
  probs = softmax(np.stack(members))
  found = compared(members)
  expected = [expected_metrics(p) for p in probs]
  for got, want in zip(found.members, expected, strict=True):
    assert_close(got, want)
  ensemble = expected_metrics(probs.mean(0))
  assert_close(found.ensemble, ensemble)
  # A case that tells: neither the mean of the members' metrics, nor the
  # metrics of averaged logits.
  logits = expected_metrics(softmax(np.mean(members, 0)))
  for key in ('eval/loss', 'eval/accuracy'):
    assert abs(np.mean([e[key] for e in expected]) - ensemble[key]) > 0.01
  assert abs(logits['eval/loss'] - ensemble['eval/loss']) > 1e-3


@pytest.mark.parametrize('label, weight', [(-1, 1), (CLASSES, 1), (0, -1)])
def test_wrong_labels_and_weights_give_no_number(label, weight):
  batch = {'inputs': np.zeros(2, int), 'labels': np.array([0, label])}
  batch['weights'] = np.array([1, weight], np.float32)
  members = [base.Variables(x) for x in tables(2)]
  found = evaluate_lib.compare(table_model(), members, [batch])
  for values in (*found.members, found.ensemble):
    assert np.isnan(values['eval/loss'])


def test_pairs_differ_as_their_probabilities_do():
  members = tables(3)
  probs = softmax(np.stack(members))
  found = compared(members)
  assert set(found.pairs) == {(0, 1), (0, 2), (1, 2)}
  for (a, b), got in found.pairs.items():
    differ = probs[a].argmax(-1) != probs[b].argmax(-1)
    tv = 0.5 * np.abs(probs[a] - probs[b]).sum(-1)
    assert_close(
        got,
        {'churn/mean_abs': tv.mean(), 'churn/disagreement': differ.mean()},
    )


def exact_auc(logits, labels):
  difference = logits[labels == 1][:, None] - logits[labels == 0][None, :]
  return np.mean((difference > 0) + 0.5 * (difference == 0))


def test_a_sigmoid_output_has_an_area_and_no_perplexity():
  rng = np.random.default_rng(1)
  # Bins apart, so that the area is exact.
  z = (rng.permutation(41)[:40].reshape(2, 20) / 8.0 - 2.5).astype(np.float32)
  labels = data()[1] % 2
  padded = batches(6)
  for batch in padded:
    batch['labels'] = batch['labels'] % 2
  variables = [base.Variables(x) for x in z]
  found = evaluate_lib.compare(table_model(), variables, padded)
  p = 1 / (1 + np.exp(-z.astype(np.float64)))
  mean = p.mean(0)
  step = jax.jit(
      step_lib.make_eval_step(table_model(), task_loss=losses.sigmoid_task_loss)
  )
  alone = evaluate_lib.evaluate(step, variables[0], padded, ())
  for got, p_one in (
      (found.members[0], p[0]),
      (found.members[1], p[1]),
      (found.ensemble, mean),
      (alone, p[0]),
  ):
    logit = np.log(p_one / (1 - p_one))
    assert_close(
        got,
        {
            'eval/loss': np.mean(
                -labels * np.log(p_one) - (1 - labels) * np.log(1 - p_one)
            ),
            'eval/accuracy': np.mean((p_one > 0.5) == labels),
            'eval/examples': 20,
            'eval/auc': exact_auc(logit, labels),
            'eval/calibration': p_one.sum() / labels.sum(),
            'eval/calibration_error': got['eval/calibration_error'],
        },
    )
  assert_close(
      found.pairs[0, 1],
      {
          'churn/mean_abs': np.abs(p[0] - p[1]).mean(),
          'churn/disagreement': np.mean((p[0] > 0.5) != (p[1] > 0.5)),
          'churn/relative_difference': np.mean(
              2 * np.abs(p[0] - p[1]) / (p[0] + p[1])
          ),
      },
  )


def test_comparing_compiles_once():
  traces = []
  model = table_model()

  def apply(*args):
    traces.append(1)
    return model.apply(*args)

  variables = [base.Variables(x) for x in tables(2)]
  evaluate_lib.compare(model._replace(apply=apply), variables, batches(6))
  assert len(traces) == 2  # One for each set of variables, in one trace.
