"""Something to configure, for gin_utils_test.py, and a model of one's own."""

import flax.linen as nn

import codistill_jax as cj


def leaf(size=1, name='x'):
  return (size, name)


def unused(size=1):
  return size


def strict(size):
  if size < 0:
    raise ValueError(f'size={size} is negative; set it to 0 or more')
  return size


class Root:

  def __init__(self, value=None, other=0):
    self.value, self.other = value, other


def flat_model(num_classes):
  """Logits straight from all pixels of an image."""
  flatten = lambda inputs: inputs.reshape(inputs.shape[0], -1)
  return cj.from_linen(nn.Sequential([flatten, nn.Dense(num_classes)]))
