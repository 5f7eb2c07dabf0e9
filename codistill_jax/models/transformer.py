"""A decoder-only transformer of today's form, with a memory between windows.

Each layer adds two branches to the residual stream x (Vaswani et al. 2017, with
normalisation before each branch):

  x' = x  + W_o attention(RMSNorm(x))
  y  = x' + W_down (silu(W_gate z) * (W_up z))   with z = RMSNorm(x')

RMSNorm: Zhang & Sennrich 2019. SwiGLU: Shazeer 2020. Positions enter by
rotating queries and keys (RoPE, Su et al. 2021). There are no biases.

A stream of text comes in windows of T tokens. The carry holds what attention
read in each layer, RMSNorm(x), for the last M tokens before the window, so that
keys and values of the memory are made by the parameters of today and no
gradient flows beyond the window (Transformer-XL, Dai et al. 2019). A token sees
the memory and the part of the window before it, as far as they belong to its
document. Only the distance of two tokens matters to rotated keys: those of the
memory are rotated anew in each window, as positions 0 to M - 1.

Parameters, the residual stream, normalisation and softmax are float32. Matrix
products and the memory are in `dtype`.

Shape suffixes: B rows, T tokens of a window, M of the memory, S = M + T,
N heads, H units of a head, D = N H units, F units of the feed-forward branch,
V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from codistill_jax import base
from codistill_jax.models import linen, recurrence

_EPSILON = 1e-6
_LONGEST_WAVE = 10_000.0  # Su et al. 2021, section 3.2.2.


def language_model(
    vocab_size: int,
    layers: int = 6,
    units: int = 512,
    heads: int = 8,
    hidden: int | None = None,
    memory: int = 64,
    tied: bool = False,
    dropout: float = 0.0,
    dtype: str = 'float32',
) -> base.Model:
  """Makes a transformer language model, in place of `lstm.language_model`.

  A batch has `inputs` (B, T) integers below `vocab_size` and, if documents end
  within it, `resets` (B, T): True where a document begins. The outputs are
  `base.HeadOutputs`, whose bias is constantly 0.

  The memory costs layers * memory * units numbers a row, in the state, in each
  resume checkpoint, and once more for each teacher.

  Args:
    vocab_size: V.
    layers: Number of layers.
    units: D, the width of the residual stream.
    heads: N; `units` must be an even multiple of it.
    hidden: F; None for 8 D / 3, rounded up to a multiple of 64.
    memory: M, tokens before the window that attention reaches; 0 for none.
    tied: Whether the head is the transposed embedding.
    dropout: Probability of dropping a value of the embedding, of what a branch
      adds, and of the features, in training.
    dtype: Of matrix products and memory: 'float32' or 'bfloat16'.

  Raises:
    ValueError: If an argument is out of range.
  """
  if hidden is None and type(units) is int:
    hidden = 64 * -(-8 * units // (3 * 64))
  sizes: dict[str, Any] = {
      'vocab_size': vocab_size,
      'layers': layers,
      'units': units,
      'heads': heads,
      'hidden': hidden,
  }
  linen.check_whole_numbers(**sizes)
  linen.check_whole_numbers(0, memory=memory)
  if units % (2 * heads):
    raise ValueError(
        f'units={units} is no even multiple of heads={heads}: rotary positions'
        ' turn pairs of values within a head.'
    )
  linen.check_dropout(dropout)
  module = TransformerLanguageModel(
      **sizes,
      memory=memory,
      tied=tied,
      dropout=dropout,
      dtype=linen.checked_dtype(dtype),
  )
  return linen.from_linen(module)


class Memory(NamedTuple):
  """What a row remembers of the tokens before the window, oldest first.

  Attributes:
    inputs: For each layer what its attention read, `dtype` (B, M, D).
    live: bool (B, M); whether the token belongs to the document that the next
      window goes on with. Others are never looked at.
  """

  inputs: tuple[base.Array, ...]
  live: base.Array


class TransformerLanguageModel(nn.Module):
  """Embedding, layers, a last normalisation, and the head for a softmax."""

  vocab_size: int
  layers: int
  units: int
  heads: int
  hidden: int
  memory: int
  tied: bool
  dropout: float
  dtype: Any

  def init_carry(self, batch_size: int) -> Memory | tuple[()]:
    """Returns a memory in which nothing is live; () if the model has none."""
    if not self.memory:
      return ()
    shape = (batch_size, self.memory)
    zeros = lambda: jnp.zeros((*shape, self.units), self.dtype)
    return Memory(
        inputs=tuple(zeros() for _ in range(self.layers)),
        live=jnp.zeros(shape, bool),
    )

  @nn.compact
  def __call__(self, inputs_BT, carry, resets=None, train=False):
    """`(HeadOutputs, carry)` of tokens; `resets` (B, T) or None."""
    if resets is None:
      resets = jnp.zeros(inputs_BT.shape, bool)
    document_BS = _documents(resets, carry.live if self.memory else None)
    mask_BTS = _visible(document_BS, inputs_BT.shape[1])
    drop = nn.Dropout(self.dropout, deterministic=not train)
    embed = nn.Embed(self.vocab_size, self.units, name='embed')
    # Rows of the embedding have length 1, as the tied head needs it; layers
    # add values of size 1 to the stream.
    x_BTD = drop(embed(inputs_BT) * np.float32(self.units**0.5))
    read = []
    for i in range(self.layers):
      layer = Layer(
          self.heads, self.hidden, self.layers, self.dtype, name=f'layer_{i}'
      )
      past = carry.inputs[i] if self.memory else x_BTD[:, :0]
      x_BTD, read_BSD = layer(x_BTD, past, mask_BTS, drop)
      read.append(read_BSD)
    features_BTD = drop(_norm('norm', self.dtype)(x_BTD))
    head = embed.embedding.T if self.tied else self._head()
    bias = jnp.zeros((self.vocab_size,))
    outputs = base.HeadOutputs(features_BTD, head.astype(self.dtype), bias)
    return outputs, self._remember(read, document_BS)

  def _head(self):
    shape = (self.units, self.vocab_size)
    return self.param('head_kernel', nn.initializers.lecun_normal(), shape)

  def _remember(self, read, document_BS):
    """Returns the carry after the window: the last M that each layer read."""
    if not self.memory:
      return ()
    keep = lambda x: x[:, -self.memory :]
    return Memory(
        inputs=tuple(keep(x) for x in read),
        live=keep(document_BS) == document_BS[:, -1:],
    )


def _documents(resets_BT, live_BM):
  """Numbers the S tokens by document.

  The window goes on with document 0, that of the live part of the memory.
  """
  document_BT = jnp.cumsum(jnp.asarray(resets_BT, jnp.int32), axis=1)
  if live_BM is None:
    return document_BT
  return jnp.concatenate([jnp.where(live_BM, 0, -1), document_BT], axis=1)


def _visible(document_BS, window):
  """Returns whether a token of the window may look at one of S: (B, T, S)."""
  length = document_BS.shape[1]
  earlier_TS = np.tri(window, length, length - window, dtype=bool)
  document_BT = document_BS[:, length - window :]
  same_BTS = document_BT[:, :, None] == document_BS[:, None, :]
  return same_BTS & earlier_TS[None]


class Layer(nn.Module):
  """Attention, then a feed-forward branch; each adds to the stream."""

  heads: int
  hidden: int
  layers: int  # Of the whole model.
  dtype: Any

  @nn.compact
  def __call__(self, x_BTD, past_BMD, mask_BTS, drop):
    """The stream after the layer, and what its attention read (B, S, D)."""
    units = x_BTD.shape[-1]
    now_BTD = _norm('attention_norm', self.dtype)(x_BTD)
    past_BMD = jax.lax.stop_gradient(past_BMD).astype(self.dtype)
    read_BSD = jnp.concatenate([past_BMD, now_BTD], axis=1)
    query = self._split_heads(self._dense('query', units)(now_BTD))
    key = self._split_heads(self._dense('key', units)(read_BSD))
    value = self._split_heads(self._dense('value', units)(read_BSD))
    seen_BTNH = jax.nn.dot_product_attention(
        _rotate(query, first=past_BMD.shape[1]),
        _rotate(key, first=0),
        value,
        mask=mask_BTS[:, None],
    )
    seen_BTD = seen_BTNH.reshape(x_BTD.shape)
    x_BTD = x_BTD + drop(self._adding('attention_out', units)(seen_BTD))
    z_BTD = _norm('feed_norm', self.dtype)(x_BTD)
    gate_BTF = jax.nn.silu(self._dense('gate', self.hidden)(z_BTD))
    h_BTF = gate_BTF * self._dense('up', self.hidden)(z_BTD)
    return x_BTD + drop(self._adding('down', units)(h_BTF)), read_BSD

  def _split_heads(self, x_BSD):
    return x_BSD.reshape(*x_BSD.shape[:2], self.heads, -1)

  def _dense(self, name, size, scale=1.0):
    matrix = nn.initializers.variance_scaling(
        scale, 'fan_in', 'truncated_normal'
    )
    return nn.Dense(
        size,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=matrix,
        dot_general=recurrence.dense,
        name=name,
    )

  def _adding(self, name, size):
    # Smaller at the start, so that the stream keeps its size however many
    # branches add to it (Radford et al. 2019, section 2.3).
    return self._dense(name, size, scale=1.0 / (2 * self.layers))


def _norm(name, dtype):
  return nn.RMSNorm(epsilon=_EPSILON, dtype=dtype, name=name)


def _rotate(x_BSNH, first):
  """Turns each pair (i, i + H / 2) of values by an angle of its position.

  Su et al. 2021, equation 34. Positions count from `first`; the product of two
  vectors so turned depends on the distance of their positions.
  """
  length, half = x_BSNH.shape[1], x_BSNH.shape[-1] // 2
  frequency = _LONGEST_WAVE ** (-np.arange(half) / half)
  angle = np.outer(np.arange(first, first + length), frequency)
  angle = angle.reshape(1, length, 1, half)
  cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
  a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BSNH.dtype)
