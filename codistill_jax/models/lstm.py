"""The language model of Anil et al. 2018: an LSTM with layer normalisation.

The layer is Ba, Kiros & Hinton 2016, equations 20 to 22:

  (f, i, o, g) = LN(W_h h) + LN(W_x x) + b
  c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
  h' = sigmoid(o) * tanh(LN(c'))

LN(W .) normalises all 4 D values of the four gates together. Its two shifts and
b only ever occur as their sum, so one vector b is kept, which starts at 1 for
the forget gate and 0 elsewhere. Without layer normalisation LN is left out.

Parameters, the recurrent state, gates and statistics are float32. Matrix
products and the activations between layers are in `dtype`. A bfloat16 cell
would stop counting: its 8 bits lose what a step adds to a larger sum.

Shape suffixes: B rows, T tokens, E embedding, D units, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from codistill_jax import base
from codistill_jax.models import linen, recurrence


def language_model(
    vocab_size: int,
    layers: int = 2,
    units: int = 1024,
    embedding: int = 256,
    layer_norm: bool = True,
    dropout: float = 0.0,
    dtype: str = 'float32',
) -> base.Model:
  """Makes the LSTM language model; the defaults are the paper's size.

  A batch has `inputs` (B, T) integers below `vocab_size` and, if documents end
  within it, `resets` (B, T): True where the state of a row becomes 0 before
  that token is processed. The outputs are `base.HeadOutputs`.

  Args:
    vocab_size: V.
    layers: Number of LSTM layers.
    units: D, the size of state and output of each layer.
    embedding: E.
    layer_norm: Whether layers normalise.
    dropout: Probability of dropping a value of a layer's input or of the last
      layer's output, in training; recurrent connections are never dropped.
    dtype: Of matrix products and activations: 'float32' or 'bfloat16'.

  Raises:
    ValueError: If an argument is out of range.
  """
  sizes: dict[str, Any] = {
      'vocab_size': vocab_size,
      'layers': layers,
      'units': units,
      'embedding': embedding,
  }
  linen.check_whole_numbers(**sizes)
  linen.check_dropout(dropout)
  module = LstmLanguageModel(
      **sizes,
      layer_norm=layer_norm,
      dropout=dropout,
      dtype=linen.checked_dtype(dtype),
  )
  return linen.from_linen(module)


class LstmLanguageModel(nn.Module):
  """Embedding, LSTM layers, and the head for a full softmax."""

  vocab_size: int
  layers: int
  units: int
  embedding: int
  layer_norm: bool
  dropout: float
  dtype: Any

  def init_carry(self, batch_size: int) -> base.PyTree:
    """Zeros: for each layer the cell and the output, float32 (B, D)."""
    zeros = lambda: jnp.zeros((batch_size, self.units), jnp.float32)
    return tuple((zeros(), zeros()) for _ in range(self.layers))

  @nn.compact
  def __call__(self, inputs_BT, carry, resets=None, train=False):
    """`(HeadOutputs, carry)` of tokens; `resets` (B, T) or None."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    embed = nn.Embed(self.vocab_size, self.embedding, dtype=self.dtype)
    x_BTE = drop(embed(inputs_BT))
    # Time goes first, because the scan runs over the leading axis.
    x_TBD = jnp.swapaxes(x_BTE, 0, 1)
    resets_TB = None
    if resets is not None:
      resets_TB = jnp.swapaxes(jnp.asarray(resets, bool), 0, 1)
    new_carry = []
    for i in range(self.layers):
      layer = LSTM(self.units, self.layer_norm, self.dtype, name=f'lstm_{i}')
      x_TBD, last = layer(x_TBD, carry[i], resets_TB)
      x_TBD = drop(x_TBD)
      new_carry.append(last)
    head = self.param(
        'head_kernel',
        nn.initializers.lecun_normal(),
        (self.units, self.vocab_size),
    )
    bias = self.param('head_bias', nn.initializers.zeros, (self.vocab_size,))
    features_BTD = jnp.swapaxes(x_TBD, 0, 1)
    outputs = base.HeadOutputs(features_BTD, head.astype(self.dtype), bias)
    return outputs, tuple(new_carry)


class LSTM(nn.Module):
  """One layer over a window of tokens; E is the size of its input."""

  units: int
  layer_norm: bool
  dtype: Any

  @nn.compact
  def __call__(self, x_TBE, carry, resets_TB):
    """`(h_TBD, (c_BD, h_BD))`: all outputs and the last state."""
    size = 4 * self.units
    matrix = nn.initializers.lecun_normal()
    x_kernel = self.param('x_kernel', matrix, (x_TBE.shape[-1], size))
    h_kernel = self.param('h_kernel', matrix, (self.units, size))
    bias = self.param('bias', _forget_bias, (size,))
    norms = None
    if self.layer_norm:
      x_scale = self._vector('x_norm_scale', size)
      norms = recurrence.Norms(
          gates_F=self._vector('h_norm_scale', size),
          cell_D=self._vector('c_norm_scale', self.units),
          shift_D=self._vector('c_norm_shift', self.units, 0.0),
      )
      x_kernel, h_kernel = _centred(x_kernel), _centred(h_kernel)
    # All that does not depend on the state happens outside the scan, in one
    # large product over N = T * B rows.
    x_NE = x_TBE.reshape(-1, x_TBE.shape[-1])
    inputs_NF = recurrence.dot(x_NE, x_kernel.astype(self.dtype))
    if self.layer_norm:
      inputs_NF = recurrence.unit_size(inputs_NF) * recurrence.row(x_scale, 2)
    inputs_NF = inputs_NF + recurrence.row(bias, 2)
    inputs_TBF = inputs_NF.reshape(*x_TBE.shape[:2], size)
    return recurrence.run(
        h_kernel.astype(self.dtype),
        norms,
        inputs_TBF.astype(self.dtype),
        resets_TB,
        carry,
    )

  def _vector(self, name, size, value=1.0):
    return self.param(name, nn.initializers.constant(value), (size,))


def _centred(kernel):
  """Takes from each row its mean: then each product with it has mean 0.

  Layer normalisation of the product has nothing to centre any more, token by
  token, forwards and backwards.
  """
  return kernel - jnp.mean(kernel, axis=1, keepdims=True)


def _forget_bias(rng, shape, dtype=jnp.float32):
  del rng
  return jnp.zeros(shape, dtype).at[: shape[0] // 4].set(1.0)
