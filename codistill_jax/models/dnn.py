"""The click model of Anil et al. 2018: a ReLU net with one logistic output.

Every categorical column has a table of embeddings; what is looked up in them
and the dense columns ("integers") lie side by side before the first layer:

  x = [integers, table_1[c_1], ..., table_K[c_K]]
  x = relu(W_l x + b_l)   for each hidden layer
  logit = w x + b

The paper names the widths of the layers (2560-1024-256, as recalled), ReLU and
the logistic output. It is silent on the embeddings, on how the weights start
and on how integers enter. Here: the width of a table is that of
`embedding_width` unless given; embeddings start as vectors of length about 1,
layers as He et al. 2015 say, biases at 0.

Parameters are float32; matrix products and activations are in `dtype`, the
logit is float32.

Shape suffixes: B examples, I dense columns, K categorical columns, D units.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from codistill_jax import base
from codistill_jax.models import linen

MAX_EMBEDDING = 64


def embedding_width(table_size: int, maximum: int = MAX_EMBEDDING) -> int:
  """Returns 6 * table_size ** (1/4), rounded up, and at most `maximum`.

  The rule of Wang et al. 2017 (Deep & Cross Network, section 3), capped, since
  they leave the widest of Criteo's tables at hundreds of values.
  """
  # Less a hair, so that 6 * 16 ** 0.25 is 12 whatever the last bit says.
  return min(maximum, math.ceil(6 * table_size**0.25 - 1e-9))


def click_model(
    num_classes: int,
    table_sizes: Sequence[int],
    num_integers: int,
    hidden: Sequence[int] = (2560, 1024, 256),
    embedding: int | None = None,
    dtype: str = 'float32',
) -> base.Model:
  """Makes the feed-forward click model; the defaults are the paper's size.

  A batch has `inputs`: a dict of `integers` float32 (B, I) and `categories`
  int32 (B, K), each below the size of its table. Outputs are logits (B,) of the
  positive class, for a task whose output is 'sigmoid'; (B, C) of more classes.
  An id outside its table makes the logit NaN.

  Args:
    num_classes: 2: one logistic output tells them apart; more: a logit each.
    table_sizes: Rows of the K tables; `Task.model_arguments` has them.
    num_integers: I; likewise.
    hidden: Units of the hidden layers.
    embedding: Width of every table; None: `embedding_width` of its size.
    dtype: Of matrix products and activations: 'float32' or 'bfloat16'.

  Raises:
    ValueError: If an argument is out of range.
  """
  if num_classes < 2:
    raise ValueError(f'Expected 2 classes or more, got {num_classes}.')
  sizes, hidden = tuple(table_sizes), tuple(hidden)
  for name, values in (('table_sizes', sizes), ('hidden', hidden)):
    for value in values:
      linen.check_whole_numbers(**{name: value})
  if embedding is not None:
    linen.check_whole_numbers(embedding=embedding)
  if num_integers < 0 or not (num_integers or sizes):
    raise ValueError(
        f'Expected columns, got num_integers={num_integers} and'
        f' table_sizes={sizes}.'
    )
  widths = [embedding or embedding_width(size) for size in sizes]
  module = ClickModel(
      tables=tuple(zip(sizes, widths)),
      num_integers=num_integers,
      hidden=hidden,
      dtype=linen.checked_dtype(dtype),
      outputs=1 if num_classes == 2 else num_classes,
  )
  return linen.from_linen(module)


class ClickModel(nn.Module):
  """Tables, ReLU layers, logits."""

  tables: tuple[tuple[int, int], ...]
  num_integers: int
  hidden: tuple[int, ...]
  dtype: Any
  outputs: int

  @nn.compact
  def __call__(self, inputs: dict[str, base.Array]) -> jax.Array:
    """Logits float32 (B,), or (B, C) of several outputs."""
    self._check(inputs)
    columns = [jnp.asarray(inputs['integers'], self.dtype)]
    categories_BK = inputs['categories']
    for k, shape in enumerate(self.tables):
      # Standard deviation 1 / sqrt(width).
      start = nn.initializers.variance_scaling(
          1.0, 'fan_in', 'normal', out_axis=0
      )
      table = self.param(f'table_{k}', start, shape)
      # 'fill' gives NaN outside the table; the default would clamp the id, and
      # nobody would notice that data and model do not belong together.
      found = jnp.take(table, categories_BK[:, k], axis=0, mode='fill')
      columns.append(found.astype(self.dtype))
    x_BD = jnp.concatenate(columns, axis=-1)
    for layer, units in enumerate(self.hidden):
      x_BD = nn.relu(self._dense(units, f'hidden_{layer}')(x_BD))
    logits = self._dense(self.outputs, 'logit')(x_BD).astype(jnp.float32)
    return logits[:, 0] if self.outputs == 1 else logits

  def _dense(self, units: int, name: str) -> nn.Dense:
    return nn.Dense(
        units,
        dtype=self.dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )

  def _check(self, inputs):
    got = (inputs['integers'].shape[-1], inputs['categories'].shape[-1])
    expected = (self.num_integers, len(self.tables))
    if got != expected:
      raise ValueError(
          'Expected (integers, categories) of'
          f' {expected} columns, got {got}; model and task do not fit.'
      )
