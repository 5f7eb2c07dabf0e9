"""Small models and streams that the tests of steps and loops share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax.base import Model
from codistill_jax.base import Updates
from codistill_jax.base import Variables

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
    return Variables({
        'embed': normal(a, (vocab, units)),
        'recur': 0.3 * normal(b, (units, units)),
        'head': normal(c, (units, vocab)),
    })

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
