"""Models from flax.linen modules: signatures, state, randomness, carry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codistill_jax.models import linen

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
BATCH = {'inputs': X}


class Plain(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x)


class Noisy(nn.Module):
  """Dropout, batch statistics, and a collection that is not a statistic."""

  @nn.compact
  def __call__(self, x, train=False):
    calls = self.variable('counters', 'calls', lambda: jnp.zeros((), jnp.int32))
    if train:
      calls.value += 1
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    self.sow('intermediates', 'x', x)
    return nn.Dense(2)(x)


class Adder(nn.Module):
  """Recurrent: the carry sums up inputs since the last reset."""

  def init_carry(self, batch_size):
    return jnp.zeros((batch_size,))

  @nn.compact
  def __call__(self, x, carry, resets=None):
    if resets is not None:
      carry = jnp.where(resets, 0.0, carry)
    carry = carry + jnp.sum(x, axis=-1)
    return nn.Dense(2)(carry[:, None]), carry


def make(module, batch=BATCH, **kwargs):
  model = linen.from_linen(module, **kwargs)
  return model, model.init(jax.random.key(0), batch)


def test_a_plain_module_needs_nothing():
  model, variables = make(Plain())
  for train in (False, True):
    logits, updates = model.apply(variables, BATCH, (), None, train)
    kernel = variables.params['Dense_0']['kernel']
    np.testing.assert_allclose(logits, X @ kernel, rtol=1e-5, atol=1e-6)
    assert updates.model_state == {} and updates.carry == ()
  assert model.init_carry(4) == ()


def test_init_equals_that_of_the_module_and_sees_one_row_once():
  shapes = []

  class Watched(nn.Module):

    @nn.compact
    def __call__(self, x):
      shapes.append(x.shape)
      return nn.Dense(2)(x)

  _, variables = make(Watched())
  assert shapes == [(1, 3)]
  direct = Watched().init({'params': jax.random.key(0)}, X)['params']
  jax.tree.map(np.testing.assert_array_equal, variables.params, direct)


def test_model_state_moves_in_training_and_rests_in_evaluation():
  model, variables = make(Noisy())
  assert set(variables.model_state) == {'batch_stats', 'counters'}
  key = jax.random.key(1)
  _, updates = model.apply(variables, BATCH, (), key, True)
  mean = updates.model_state['batch_stats']['BatchNorm_0']['mean']
  np.testing.assert_allclose(mean, 0.5 * X.mean(0), rtol=1e-5)
  assert updates.model_state['counters']['calls'] == 1
  assert jax.tree.structure(updates.model_state) == jax.tree.structure(
      variables.model_state
  )
  moved = variables.replace(model_state=updates.model_state)
  logits, rested = model.apply(moved, BATCH, (), None, False)
  jax.tree.map(
      np.testing.assert_array_equal, rested.model_state, moved.model_state
  )
  # And evaluation uses the running statistics: rows do not see each other.
  one, _ = model.apply(moved, {'inputs': X[:1]}, (), None, False)
  np.testing.assert_allclose(one, logits[:1], rtol=1e-5)


def test_dropout_follows_its_key_in_training_only():
  model, variables = make(Noisy())
  run = lambda key, train: model.apply(variables, BATCH, (), key, train)[0]
  a, b = jax.random.key(1), jax.random.key(2)
  np.testing.assert_array_equal(run(a, True), run(a, True))
  assert np.abs(run(a, True) - run(b, True)).max() > 1e-3
  np.testing.assert_array_equal(run(a, False), run(None, False))


def test_random_streams_of_two_names_differ():

  class Two(nn.Module):

    @nn.compact
    def __call__(self, x, train=False):
      if not train:
        return x
      drawn = [jax.random.uniform(self.make_rng(n), (4, 1)) for n in 'ab']
      return jnp.concatenate(drawn, axis=1)

  model, variables = make(Two(), rng_names=('a', 'b'))
  drawn, _ = model.apply(variables, BATCH, (), jax.random.key(0), True)
  assert (drawn[:, 0] != drawn[:, 1]).all()


def test_a_recurrent_module_carries_its_state():
  model, variables = make(Adder())
  carry = model.init_carry(4)
  _, updates = model.apply(variables, BATCH, carry, None, False)
  np.testing.assert_allclose(updates.carry, X.sum(-1), rtol=1e-5)
  batch = BATCH | {'resets': np.array([True, False, False, True])}
  _, updates = model.apply(variables, batch, updates.carry, None, True)
  expected = X.sum(-1) * np.array([1, 2, 2, 1])
  np.testing.assert_allclose(updates.carry, expected, rtol=1e-5)


def test_init_carry_may_be_an_argument():
  model, _ = make(Adder(), init_carry=lambda n: jnp.ones((n,)))
  np.testing.assert_array_equal(model.init_carry(2), [1, 1])


def test_inputs_may_be_a_pytree_under_another_key():

  class Two(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(x['a']) + nn.Dense(2)(x['b'])

  batch = {'features': {'a': X, 'b': X[:, :2]}}
  model, variables = make(Two(), batch, input_key='features')
  logits, _ = model.apply(variables, batch, (), None, False)
  assert logits.shape == (4, 2)


def test_vmap_over_variables_gives_each_models_logits():
  model, a = make(Noisy())
  b = jax.tree.map(lambda x: 2 * x, a)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), a, b)
  run = lambda v: model.apply(v, BATCH, (), None, False)[0]
  np.testing.assert_allclose(
      jax.vmap(run)(stacked), jnp.stack([run(a), run(b)]), rtol=1e-5, atol=1e-6
  )


def test_mistakes_are_named():
  model, variables = make(Plain())
  with pytest.raises(ValueError, match=r"'inputs', got \['x'\]"):
    model.apply(variables, {'x': X}, (), None, False)

  class Careless(nn.Module):

    def __call__(self, x, carry):
      return x, carry

  with pytest.raises(ValueError, match='Careless takes a carry'):
    linen.from_linen(Careless())
