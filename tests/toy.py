"""Small models and streams that the tests of steps and loops share."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import step as step_lib
from codistill_jax.base import (
    Model,
    Task,
    Teachers,
    Updates,
    Variables,
    host_copy,
)
from codistill_jax.experiment import Experiment
from codistill_jax.models.linen import from_linen
from codistill_jax.replicas import REPLICA_AXIS, PmapStep

FEATURES, CLASSES = 5, 4


class TwoLayers(nn.Module):
  """A softmax classifier with one hidden layer."""

  hidden: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(self.hidden)(x))
    return nn.Dense(CLASSES)(x)


class Clusters:
  """A stream of noisy class clusters; another part of it for each group."""

  def __init__(self, batch_size=8, seed=0, group_id=0, weights=False):
    self._key = (seed, group_id)
    self._size = batch_size
    self._weights = weights

  def batch(self, step):
    rng = np.random.default_rng([*self._key, step])
    labels = rng.integers(CLASSES, size=self._size)
    centres = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    noise = rng.normal(size=(self._size, FEATURES))
    batch = {
        'inputs': (centres[labels] + noise).astype(np.float32),
        'labels': labels.astype(np.int32),
    }
    if self._weights:
      batch['weights'] = rng.integers(2, size=self._size).astype(np.float32)
    return batch


def recurrent_model(vocab=7, units=6):
  """A tiny recurrent model: h' = tanh(E[x] + h W), reset where told."""

  def init(rng, batch):
    del batch
    a, b, c = jax.random.split(rng, 3)
    normal = jax.random.normal
    return Variables(
        {
            'embed': normal(a, (vocab, units)),
            'recur': 0.3 * normal(b, (units, units)),
            'head': normal(c, (units, vocab)),
        }
    )

  def apply(variables, batch, carry, rng, train):
    del rng, train
    p = variables.params

    def cell(h, x):
      token, reset = x
      h = jnp.where(reset[:, None], 0.0, h)
      h = jnp.tanh(p['embed'][token] + h @ p['recur'])
      return h, h @ p['head']

    carry, logits = jax.lax.scan(
        cell, carry, (batch['inputs'].T, batch['resets'].T)
    )
    return jnp.swapaxes(logits, 0, 1), Updates(variables.model_state, carry)

  return Model(init, apply, lambda n: jnp.zeros((n, units)))


class Tokens:
  """Random token rows with resets and padding, in the language-model form."""

  def __init__(self, batch_size=8, unroll=3, vocab=7, group_id=0):
    self._shape = (batch_size, unroll)
    self._vocab = vocab
    self._group_id = group_id

  def batch(self, step):
    rng = np.random.default_rng([self._group_id, step])
    tokens = rng.integers(self._vocab, size=(2, *self._shape))
    return {
        'inputs': tokens[0].astype(np.int32),
        'labels': tokens[1].astype(np.int32),
        'weights': rng.integers(2, size=self._shape).astype(np.float32),
        'resets': rng.random(self._shape) < 0.2,
    }


TOKEN_TASK = Task(
    train_stream=lambda group_id, group_batch, **_: Tokens(
        group_batch, group_id=group_id
    ),
    eval_batches=lambda rows: [Tokens(rows).batch(n) for n in (0, 1)],
    num_classes=7,
    identity={'task': 'toy'},
    example_name='token',
)


def experiment(model, **changes):
  """What a run of twelve updates of a recurrent model is."""
  return Experiment(
      **{
          'task': TOKEN_TASK,
          'model': lambda num_classes: model,
          'optimizer': optax.adam(1e-2),
          'num_steps': 12,
          'group_batch': 4,
          'log_every': 2,
          'eval_every': 6,
          'eval_batch': 2,
          'checkpoint_every': 4,
          **changes,
      }
  )


def statistics_model():
  """Centres x by the batch in training and by a running mean in evaluation.

  Counts its calls in training, in an integer that is no statistic.
  """

  def init(rng, batch):
    del batch
    kernel = jax.random.normal(rng, (FEATURES, CLASSES))
    state = {'mean': jnp.zeros(FEATURES), 'calls': jnp.zeros((), jnp.int32)}
    return Variables({'kernel': kernel}, state)

  def apply(variables, batch, carry, rng, train):
    del rng
    x, state = batch['inputs'], variables.model_state
    mean = state['mean']
    if train:
      mean = jnp.mean(x, axis=0)
      state = {
          'mean': 0.5 * (state['mean'] + mean),
          'calls': state['calls'] + 1,
      }
    logits = (x - mean[None]) @ variables.params['kernel']
    return logits, Updates(state, carry)

  return Model(init, apply)


def noise_model():
  """Adds to the logits of each row a noise that it shows in the carry."""

  def init(rng, batch):
    del batch
    return Variables({'kernel': jax.random.normal(rng, (FEATURES, CLASSES))})

  def apply(variables, batch, carry, rng, train):
    logits = batch['inputs'] @ variables.params['kernel']
    if train:
      carry = jax.random.uniform(rng, carry.shape)
      logits = logits + carry[:, None] * jnp.eye(1, CLASSES)
    return logits, Updates(variables.model_state, carry)

  return Model(init, apply, lambda n: jnp.zeros((n,)))


# One of each, so that what is compiled for one test serves others.
TWO_LAYERS = from_linen(TwoLayers())
RECURRENT = recurrent_model()
STATISTICS = statistics_model()
NOISE = noise_model()
SGD = optax.sgd(1.0)  # The change of a parameter is its gradient.
ADAM = optax.adam(1e-2)


def stream_of(model, group_id=0):
  """Weighted group batches of 8 rows that suit one of the models above."""
  if model is RECURRENT:
    return Tokens(8, group_id=group_id)
  return Clusters(8, group_id=group_id, weights=True)


@functools.cache
def _template(model, tx, num_peers):
  batch = stream_of(model).batch(0)
  key = jax.random.PRNGKey(0)
  return step_lib.init_state(model, tx, key, batch, num_peers=num_peers)


@functools.cache
def start(model, tx=SGD, seed=0, num_peers=1):
  """A fresh state; another seed gives other parameters and another key."""
  state = _template(model, tx, num_peers)
  rng = np.random.default_rng(seed)
  # By numpy: `init_state` would compile again for each seed.
  params = jax.tree.map(
      lambda x: rng.normal(0.0, 0.5, x.shape).astype(np.float32),
      state.variables.params,
  )
  return state.replace(
      variables=state.variables.replace(params=params),
      rng=np.array([1, seed], np.uint32),
  )


def peers_of(model, count):
  """Variables of peers, from other seeds than a test's students."""
  return [start(model, seed=100 + n).variables for n in range(count)]


def stacked(variables, present=None):
  """`Teachers` of these variables."""
  present = [1.0] * len(variables) if present is None else present
  return Teachers(
      jax.tree.map(lambda *xs: np.stack(xs), *variables),
      np.array(present, np.float32),
  )


def replicated(model, tx=SGD, number=4):
  """A new `PmapStep`; compiled anew."""
  step = step_lib.make_train_step(model, tx, axis_name=REPLICA_AXIS)
  # From the last device backwards: nothing may lean on the default order.
  return PmapStep(step, jax.devices()[::-1][:number])


def trained(step, state, stream, updates, teachers=None, distill_weight=0.0):
  """States and metrics, in numpy, after each of some updates."""
  step, states, metrics = jax.jit(step), [], []
  for n in updates:
    state, found = step(state, stream.batch(n), teachers, distill_weight)
    states.append(host_copy(state))
    metrics.append(jax.device_get(found))
  return states, metrics


_replicated = functools.cache(replicated)


def on_replicas(model, tx=SGD, number=4):
  """One `PmapStep` for all tests that do not count compilations."""
  return _replicated(model, tx, number)  # By position: one key of the cache.


@functools.cache
def evaluated(model):
  """`apply` in eval mode, compiled."""
  return jax.jit(
      lambda variables, batch, carry: model.apply(
          variables, batch, carry, None, False
      )
  )


@contextlib.contextmanager
def compilations():
  """Collects the names of the programs that XLA compiles meanwhile."""
  names = []

  def listener(event, seconds, **facts):
    del seconds
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(facts.get('fun_name'))

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def assert_same(a, b, **tolerance):
  """Two trees have one structure and equal leaves; the same bits by default."""
  (leaves_a, treedef_a), (leaves_b, treedef_b) = map(
      jax.tree_util.tree_flatten_with_path, (a, b)
  )
  assert treedef_a == treedef_b
  for (path, x), (_, y) in zip(leaves_a, leaves_b):
    x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
    assert (x.shape, x.dtype) == (y.shape, y.dtype), name
    if tolerance:
      np.testing.assert_allclose(x, y, **tolerance, err_msg=name)
    else:
      assert x.tobytes() == y.tobytes(), name
