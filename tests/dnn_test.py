"""The click model: what it computes, what it has; see models_test.py, too."""

import functools

import fast
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax.models import dnn

SIZES, INTEGERS = (7, 3, 20), 4


def batch(rows=6, seed=0):
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.integers(n, size=rows) for n in SIZES], axis=1)
  return {
      'inputs': {
          'integers': rng.normal(size=(rows, INTEGERS)).astype(np.float32),
          'categories': ids.astype(np.int32),
      },
      'labels': rng.integers(2, size=rows).astype(np.int32),
  }


@functools.cache
def model(**changes):
  arguments = {'hidden': (8, 5), 'embedding': None, **changes}
  return dnn.click_model(2, SIZES, INTEGERS, **arguments)


@functools.cache
def start(made, seed=0):
  return fast.jit(made.init)(jax.random.PRNGKey(seed), batch())


@functools.cache
def compiled(made):
  return fast.jit(lambda v, data: made.apply(v, data, (), None, False)[0])


def logits(made, variables, data):
  return compiled(made)(variables, data)


def test_it_computes_what_its_head_says():
  made, data = model(), batch()
  params = start(made).params
  params = jax.tree.map(np.asarray, params)
  found = logits(made, start(made), data)
  ids = data['inputs']['categories']
  x = np.concatenate(
      [
          data['inputs']['integers'],
          *(params[f'table_{k}'][ids[:, k]] for k in range(3)),
      ],
      axis=1,
  )
  for name in ('hidden_0', 'hidden_1'):
    layer = params[name]
    x = np.maximum(x @ layer['kernel'] + layer['bias'][None], 0)
  expected = x @ params['logit']['kernel'] + params['logit']['bias'][None]
  assert found.shape == (6,) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected[:, 0], rtol=1e-5, atol=1e-6)


def test_widths_of_tables_are_those_of_the_rule():
  widths = {1: 6, 16: 12, 81: 18, 10_000: 60, 13_000: 64, 10**7: 64}
  assert {n: dnn.embedding_width(n) for n in widths} == widths
  params = start(model()).params
  shapes = [params[f'table_{k}'].shape for k in range(3)]
  assert shapes == [(7, 10), (3, 8), (20, 13)]
  params = start(model(embedding=5)).params
  assert [params[f'table_{k}'].shape[1] for k in range(3)] == [5, 5, 5]


def test_rows_that_were_looked_up_learn_and_no_others():
  made, data = model(), batch()

  def loss(params):
    variables = start(made).replace(params=params)
    found, _ = made.apply(variables, data, (), None, False)
    return jnp.sum(jnp.square(found - 1.0))

  grads = fast.jit(jax.grad(loss))(start(made).params)
  for k in range(3):
    seen = np.unique(data['inputs']['categories'][:, k])
    moved = np.flatnonzero(np.abs(grads[f'table_{k}']).max(axis=1))
    np.testing.assert_array_equal(moved, seen)


def test_embeddings_start_at_a_length_of_about_one():
  made = dnn.click_model(2, (4000,), 1, hidden=(4,), embedding=16)
  data = {
      'inputs': {
          'integers': np.zeros((1, 1), np.float32),
          'categories': np.zeros((1, 1), np.int32),
      }
  }
  table = fast.jit(made.init)(jax.random.PRNGKey(0), data).params['table_0']
  np.testing.assert_allclose(np.mean(np.sum(table**2, axis=1)), 1, atol=0.05)


@pytest.mark.parametrize('bad', [20, -21, 2**31 - 1])
def test_an_id_outside_its_table_is_not_overlooked(bad):
  made, data = model(), batch()
  data['inputs']['categories'][1, 2] = bad
  found = np.asarray(logits(made, start(made), data))
  assert np.isnan(found[1]) and np.isfinite(np.delete(found, 1)).all()


def test_a_batch_of_another_task_is_refused():
  data = batch()
  data['inputs']['integers'] = data['inputs']['integers'][:, :3]
  with pytest.raises(ValueError, match=r'\(4, 3\) columns, got \(3, 3\)'):
    model().init(jax.random.PRNGKey(0), data)
