"""Large-batch optimisers: whom they decay, and their steps by hand."""

import contextlib
import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codistill_jax import base, optimizers
from codistill_jax.models import lstm, resnet, transformer

# A kernel, and one of everything that is none.
PARAMS = {
    'conv': {'kernel': np.float32([[3.0, -4.0]])},
    'norm': {'scale': np.float32([2.0]), 'bias': np.float32([-1.0])},
    'dense': {'kernel': np.float32([[1.0], [2.0]]), 'bias': np.float32([0.5])},
}


def gradients(seed):
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  return jax.tree.map(draw, PARAMS)


def names_of(mask, value):
  return {
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, x in jax.tree.leaves_with_path(mask)
      if x is value
  }


def params_of(model, **batch):
  return jax.eval_shape(model.init, jax.random.key(0), batch).params


IMAGES = {'inputs': np.zeros((1, 32, 32, 3), np.float32)}
TOKENS = {'inputs': np.zeros((1, 2), np.int32)}


@pytest.mark.parametrize('make', [resnet.resnet20, resnet.resnet50])
def test_of_a_residual_network_the_convolutions_and_the_head_decay(make):
  params = params_of(make(10), **IMAGES)
  mask = optimizers.kernels(params)
  decayed, spared = names_of(mask, True), names_of(mask, False)
  assert len(decayed) + len(spared) == len(jax.tree.leaves(params))
  shapes = {
      jax.tree_util.keystr(path, simple=True, separator='/'): x.shape
      for path, x in jax.tree.leaves_with_path(params)
  }
  assert {len(shapes[name]) for name in decayed} == {2, 4}
  assert {len(shapes[name]) for name in spared} == {1}
  assert {name.split('/')[-1] for name in decayed} == {'kernel'}
  assert {name.split('/')[-1] for name in spared} == {'scale', 'bias'}


def test_of_language_models_the_matrices_decay_but_not_the_embedding():
  params = params_of(lstm.language_model(7, layers=1), **TOKENS)
  assert names_of(optimizers.kernels(params), True) == {
      'lstm_0/x_kernel',
      'lstm_0/h_kernel',
      'head_kernel',
  }
  model = transformer.language_model(7, layers=1, units=8, heads=2)
  found = names_of(optimizers.kernels(params_of(model, **TOKENS)), False)
  assert found == {
      'embed/embedding',
      'layer_0/attention_norm/scale',
      'layer_0/feed_norm/scale',
      'norm/scale',
  }


def test_a_model_without_kernels_is_refused():
  with pytest.raises(ValueError, match='end in kernel, got b, weights; rename'):
    optimizers.momentum_sgd(0.1).init({'weights': jnp.ones(2), 'b': 1.0})


def descend(tx, steps):
  """Parameters after each of the steps."""
  params, state, path = PARAMS, tx.init(PARAMS), []
  for step in range(steps):
    updates, state = tx.update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return path


def by_hand(steps, direction):
  """w' = w - direction(is_kernel, w, g, u, rate), which also gives u'."""
  is_kernel = optimizers.kernels(PARAMS)
  params = jax.tree.map(np.float64, PARAMS)
  past = jax.tree.map(np.zeros_like, params)
  for step in range(steps):
    rate = RATE(step)
    both = jax.tree.map(
        lambda k, w, g, u, rate=rate: direction(k, w, np.float64(g), u, rate),
        is_kernel,
        params,
        gradients(step),
        past,
    )
    move, past = jax.tree.transpose(
        jax.tree.structure(params), jax.tree.structure((0, 0)), both
    )
    params = jax.tree.map(np.subtract, params, move)
    yield params


RATE = lambda step: 0.5 / (1.0 + step)  # A rate that changes.


def assert_same_path(found, expected):
  for a, b in zip(found, expected, strict=True):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        a,
        b,
    )


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('momentum, decay', [(0.8, 0.01), (0.9, 1e-4)])
def test_momentum_sgd_is_the_formula_of_goyal(nesterov, momentum, decay):
  def direction(is_kernel, w, g, u, rate):
    g = g + decay * w if is_kernel else g
    u = momentum * u + g
    return rate * (g + momentum * u if nesterov else u), u

  given = {'momentum': momentum, 'weight_decay': decay, 'nesterov': nesterov}
  if (momentum, nesterov) == (0.9, False):
    given = {}  # The defaults are those of the paper.
  tx = optimizers.momentum_sgd(RATE, **given)
  assert_same_path(descend(tx, 3), by_hand(3, direction))


def test_lars_is_the_formula_of_you():
  def direction(is_kernel, w, g, u, rate):
    if is_kernel:
      d = g + 0.05 * w
      g = 0.02 * np.linalg.norm(w) / np.linalg.norm(d) * d
    u = 0.8 * u + rate * g
    return u, u

  tx = optimizers.lars(
      RATE, momentum=0.8, weight_decay=0.05, trust_coefficient=0.02
  )
  assert_same_path(descend(tx, 3), by_hand(3, direction))


# -- optax as it is -----------------------------------------------------------

SGD = optax.sgd(0.1)
MASK = {'conv': True, 'norm': False, 'dense': True}
# What a transformation cannot do without, by the name of its argument.
ARGUMENTS = {
    'learning_rate': 0.1,
    'clipping': 1.0,
    'max_delta': 1.0,
    'max_norm': 1.0,
    'threshold': 1.0,
    'decay': 0.9,
    'eta': 0.1,
    'gamma': 0.5,
    'step_size': -0.1,
    'step_size_fn': lambda count: -0.1 / (1 + count),
    'l2_norm_clip': 1.0,
    'noise_multiplier': 1.0,
    'seed': 0,
    'inner': SGD,
    'base_optimizer': SGD,
    'optimizer': SGD,
    'adv_optimizer': SGD,
    'fast_optimizer': SGD,
    'sync_period': 2,
    'slow_step_size': 0.5,
    'inner_factory': lambda **kw: optax.sgd(0.1),
    'max_consecutive_errors': 3,
    'max_backtracking_steps': 3,
    'max_linesearch_steps': 3,
    'mask': MASK,
    'freeze_mask': MASK,
    'should_transform_fn': lambda step, **kw: step < 1,
    'transforms': {'a': SGD, 'b': optax.adam(0.1)},
    'param_labels': {'conv': 'a', 'norm': 'b', 'dense': 'a'},
    'measure': lambda updates, **kw: optax.tree.norm(updates),
    'measure_name': 'norm',
    'f': lambda updates, params: updates,
    'tx': SGD,
}
MADE = {
    'chain': lambda: optax.chain(optax.clip(1.0), SGD),
    'named_chain': lambda: optax.named_chain(('a', optax.clip(1.0))),
    'stateless_with_tree_map': lambda: optax.stateless_with_tree_map(
        lambda g, p: g
    ),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adam)(0.1),
    'inject_stateful_hyperparams': lambda: (
        optax.inject_stateful_hyperparams(optax.adam)(0.1)
    ),
    'MultiSteps': lambda: optax.MultiSteps(SGD, 2),
    'lbfgs without its search': lambda: optax.lbfgs(0.1, linesearch=None),
    'scale_by_muon': lambda: optax.contrib.muon(0.1),
}
# What asks for more than a loop of updates has, and the words that say so.
REFUSED = {
    'lbfgs': 'value_fn',
    'scale_by_backtracking_linesearch': 'value_fn',
    'scale_by_zoom_linesearch': 'value_fn',
    'lookahead': 'tree of arrays',
    'sophia': 'obj_fn',
    'dpsgd': 'batch dimension',
    'differentially_private_aggregate': 'batch dimension',
    'measure_with_ema': 'one update for each parameter',
}


def transformations():
  """Every one of optax and its contrib, by name; made when called."""
  found = dict(MADE)
  for module in (optax, optax.contrib):
    for name, make in vars(module).items():
      if name in found or not callable(make) or name[0] in '_ABCDEFGHLMNOPSTZ':
        continue
      with contextlib.suppress(ValueError):
        signature = inspect.signature(make)
        if 'Transformation' not in str(signature.return_annotation):
          continue
        arguments = {
            p.name: ARGUMENTS[p.name]
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        }
        found[name] = functools.partial(make, **arguments)
  return found


ALL = transformations()


@pytest.mark.parametrize('name', ALL)
def test_optax_works_as_it_is_or_is_refused_by_name(name):
  # In optax's own way: names that are to go, and a shape (1,) beside others.
  with warnings.catch_warnings(action='ignore'):
    tx = ALL[name]()
  params = jax.tree.map(jnp.asarray, PARAMS)
  grads = gradients(0)

  def two_updates(params):
    with jax.numpy_rank_promotion('allow'):
      state = optimizers.init(tx, params)
      for _ in range(2):
        params, after = optimizers.update(tx, grads, state, params, 3.0)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        state = after
    return params, state

  if name in REFUSED:
    with pytest.raises(ValueError, match=REFUSED[name]):
      jax.eval_shape(two_updates, params)
    return
  found, state = jax.eval_shape(two_updates, params)
  assert found == jax.eval_shape(lambda x: x, params)
  # Plain arrays, which can be copied, placed, saved and read.
  assert not any(map(base.is_typed_key, jax.tree.leaves(state)))


def test_there_are_as_many_transformations_as_optax_had():
  assert len(ALL) > 100 and set(REFUSED) <= set(ALL)
