"""Models from flax.linen modules: signatures, state, randomness, carry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from codistill_jax import base
from codistill_jax import step as step_lib
from codistill_jax.models import linen

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
BATCH = {'inputs': X, 'labels': np.arange(4) % 2}


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


# --- Flags of training --------------------------------------------------------

FLAGS = {
    **dict.fromkeys(('train', 'training', 'is_training'), True),
    **dict.fromkeys(
        ('deterministic', 'use_running_average', 'inference'), False
    ),
}


def module_of(body, arguments='x', **names):
  """A module whose call has this signature; `body(self, x, **rest)`."""
  namespace = {'body': body, **names}
  keywords = [a.split('=')[0].strip(' *') for a in arguments.split(',')[1:]]
  given = ''.join(f', {k}={k}' for k in keywords)
  code = f'def call(self, {arguments}): return body(self, x{given})'
  exec(code, namespace)
  return type(
      'Made', (nn.Module,), {'__call__': nn.compact(namespace['call'])}
  )()


@pytest.mark.parametrize('default', ['', '=True', '=False'])
@pytest.mark.parametrize('flag', FLAGS)
def test_a_flag_of_training_is_told_by_any_of_its_names(flag, default):
  def body(self, x, **told):
    rest = told[flag] != FLAGS[flag]
    x = nn.BatchNorm(use_running_average=rest, momentum=0.5)(x)
    return nn.Dropout(0.5)(x, deterministic=rest)

  model, variables = make(module_of(body, f'x, {flag}{default}'))
  run = lambda train: model.apply(
      variables, BATCH, (), jax.random.key(0), train
  )
  (taught, updates), (judged, _) = run(True), run(False)
  np.testing.assert_allclose(judged, X, rtol=1e-4)
  assert np.any(taught == 0) and not np.any(judged == 0)
  mean = updates.model_state['batch_stats']['BatchNorm_0']['mean']
  np.testing.assert_allclose(mean, 0.5 * X.mean(0), rtol=1e-5)


UNTOLD = {
    'Dropout': nn.Dropout(0.1, deterministic=True),
    'BatchNorm': nn.BatchNorm(use_running_average=True),
    'MultiHeadDotProductAttention': nn.MultiHeadDotProductAttention(
        1, dropout_rate=0.1, deterministic=True
    ),
}


@pytest.mark.parametrize('name', UNTOLD)
@pytest.mark.parametrize('arguments', ['x', 'x, **kwargs', 'x, resets=None'])
def test_layers_that_are_not_told_whether_they_train_are_refused(
    name, arguments
):
  layer = UNTOLD[name]
  module = module_of(lambda self, x, **_: layer.copy()(x), arguments)
  for wrapped in (module, nn.Sequential([nn.Dense(3), layer])):
    with pytest.raises(ValueError, match=f'has a {name} and is not told'):
      make(wrapped)


def test_layers_that_do_the_same_in_training_need_no_flag():
  def body(self, x):
    x = nn.Dropout(0.0, deterministic=True)(nn.LayerNorm()(x))
    return nn.MultiHeadDotProductAttention(1)(x)

  make(module_of(body))


# --- What is refused, by name -------------------------------------------------


class Careless(nn.Module):

  def __call__(self, x, carry):
    return x, carry


@pytest.mark.parametrize(
    'module, message',
    [
        (Plain, 'instance of a flax.linen module, got the class .*Plain'),
        (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), 'got a flax.nnx.*Linear;'),
        (lambda x: x, 'got a builtins.function'),
        (Careless(), 'Careless takes a carry'),
        (module_of(None, 'x, mask'), r'takes \(x, mask\); .*wrap it'),
        (module_of(None, 'carry, x=0'), r'the first argument is the inputs'),
    ],
)
def test_what_is_no_module_of_this_kind_is_refused(module, message):
  with pytest.raises(ValueError, match=message):
    linen.from_linen(module)


def test_a_module_of_nnx_in_one_of_linen_is_taken():
  x = np.ones((2, 3), np.float32)
  model = linen.from_linen(nnx.bridge.ToLinen(nnx.Linear, args=(3, 2)))
  variables = model.init(jax.random.key(0), {'inputs': x})
  logits, _ = model.apply(variables, {'inputs': x}, (), None, False)
  assert logits.shape == (2, 2)


def test_a_batch_without_inputs_is_named():
  model, variables = make(Plain())
  with pytest.raises(ValueError, match=r"'inputs', got \['x'\]"):
    model.apply(variables, {'x': X}, (), None, False)


def trained(module):
  """An update of a model of it, traced."""
  model, tx = linen.from_linen(module), optax.sgd(0.1)
  state = step_lib.init_state(model, tx, jax.random.PRNGKey(0), BATCH)
  step = step_lib.make_train_step(model, tx)
  return jax.eval_shape(step, state, BATCH, None, 0.0)


def head(self, x, kernel=(3, 2), bias=None):
  make = lambda n, shape: self.param(n, nn.initializers.ones, shape)
  return base.HeadOutputs(x, make('k', kernel), bias and make('b', bias))


@pytest.mark.parametrize('bias', [None, (2,)])
def test_a_head_may_be_without_bias(bias):
  trained(module_of(lambda self, x: head(self, x, bias=bias)))


@pytest.mark.parametrize(
    'body, got',
    [
        (lambda self, x: (x, x), r'tuple of \(float32\[4, 3\], float32'),
        (lambda self, x: [x], r'list of \(float32\[4, 3\]\)'),
        (lambda self, x: {'logits': x}, r'dict of \(logits: float32'),
        (lambda self, x: None, 'NoneType'),
        (lambda self, x: jnp.argmax(x, -1), r'int32\[4\]'),
        (lambda self, x: head(self, x, (2, 3)), 'HeadOutputs'),
        (lambda self, x: head(self, x, bias=(3,)), 'HeadOutputs'),
        (lambda self, x: head(self, x, (3, 2, 1)), 'HeadOutputs'),
    ],
)
def test_outputs_that_are_not_understood_are_refused(body, got):
  with pytest.raises(ValueError, match=f'A model returns .*; got {got}'):
    trained(module_of(body))


class Odd(nn.Module):
  """Recurrent, with a carry that changes its form."""

  change: str

  def init_carry(self, rows):
    return jnp.zeros((rows + (self.change == 'rows'), 3))

  @nn.compact
  def __call__(self, x, carry):
    if self.change == 'swapped':
      return carry + x, nn.Dense(2)(x)
    new = carry.astype(jnp.bfloat16) if self.change == 'dtype' else (carry,)
    return x if self.change == 'missing' else (x, new)


def sowing(self, x):
  self.sow('losses', 'activity', jnp.mean(x))
  return x


def counting(self, x, train=False):
  count = self.variable('n', 'n', lambda: jnp.zeros((), jnp.int32))
  if train:
    count.value = count.value + 0.5
  return x


@pytest.mark.parametrize(
    'module, message',
    [
        (module_of(sowing), r"model_state\['losses'\].*not there.* sows"),
        (
            module_of(counting, 'x, train=False'),
            r"model_state\['n'\]\['n'\] was int32\[\] .* is float32\[\] after",
        ),
        (Odd('dtype'), r'carry was float32\[4, 3\] .* is bfloat16'),
        (Odd('swapped'), r'carry was float32\[4, 3\] .* is float32\[4, 2\]'),
        (Odd('structure'), r'carry.* state keeps its structure'),
        (Odd('rows'), r'carry is float32\[5, 3\], .* batch has 4 rows'),
        (Odd('missing'), r'takes a carry: it returns \(outputs, carry\), got'),
        (
            module_of(
                lambda self, x: x + jax.random.uniform(self.make_rng('noise'))
            ),
            'needs PRNG for "noise"',
        ),
    ],
)
def test_state_that_changes_its_form_is_named(module, message):
  with pytest.raises(ValueError, match=message):
    trained(module)
