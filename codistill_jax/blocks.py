"""Losses of features: the logits of all examples never exist at once.

At a vocabulary of 24,006 the logits of 4,096 tokens are 393 MB, those of each
teacher as much again, and a loss makes several arrays of that size. Here a
loss sees the logits of one block of examples after the other, and the gradients
with respect to features and head are made in the same pass: three matrix
products for the student and one for each teacher, as many as without blocks.

Shape suffixes: N examples (all leading axes in one), S examples of a block,
D features, C classes, P peers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from codistill_jax.base import Array, HeadOutputs, PyTree, contract

# `(logits (S, C), teacher_logits (P, S, C) or None, rows, shared) ->
# (total, sums)`; `total` is a scalar to be differentiated, `sums` a tree of
# whatever else adds up over examples.
BlockLoss = Callable[
    [jax.Array, jax.Array | None, PyTree, PyTree], tuple[jax.Array, PyTree]
]

# Fewer examples than that, about, are slower: each block reads the kernel for
# each of its matrix products, and adds to its gradient. More are hardly faster.
_FEWEST = {'cpu': 448, 'accelerator': 1024}
_MOST = {'cpu': 1024, 'accelerator': 4096}
# The memory of a block grows with its share of the examples: of many it stays
# below an eighth of that of all at once.
_SHARE = {'cpu': 1 / 9, 'accelerator': 1 / 16}
# What the logits of student and teachers may take in one block, unless that is
# less than a few examples.
_FEW = 128
_MOST_BYTES = {'cpu': 2**28, 'accelerator': 2**30}
# Tensor cores want rows that begin at such multiples; a vocabulary of 24,006
# took 1.7 times as long as with columns of 0 up to 24,064 (H100). A CPU gains
# a tenth, for a copy of the kernel.
_LANES = {'cpu': 1, 'accelerator': 128}


def summed(
    loss: BlockLoss,
    student: HeadOutputs,
    teachers: HeadOutputs | None,
    rows: PyTree,
    shared: PyTree,
    *,
    block: int | None = None,
    most_bytes: int | None = None,
    lanes: int | None = None,
) -> tuple[jax.Array, PyTree]:
  """Sums a loss over blocks of examples; differentiable in `student` alone.

  Losses and gradients are summed up in float32, whatever the dtype of features
  and head. Reverse mode only, and once: there is no gradient of the gradient.

  Args:
    loss: Additive over examples. The last block is filled up with zeros, of
      features and rows alike: rows of weight 0 must count nowhere. It may not
      close over traced values; those go into `shared`.
    student: Features (..., D), kernel (D, C), bias (C,).
    teachers: The same with an axis P in front, or None.
    rows: Arrays whose leading axes are those of the features without D, such
      as labels and weights. The loss gets them as (S, ...).
    shared: Arrays that each block gets as they are.
    block: Examples of a block; chosen by `block_size` if None.
    most_bytes: In place of that, the largest that takes so much memory.
    lanes: What the number of columns of the matrix products is a multiple of;
      chosen if None. The loss sees C classes all the same.

  Returns:
    The sums over all examples of what `loss` returns: `total` and `sums`. No
    gradient flows through `sums`.

  Raises:
    ValueError: If shapes disagree, or `most_bytes` is too little.
  """
  lead = student.features.shape[:-1]
  _check_rows(lead, teachers, rows)
  num_peers = 0 if teachers is None else teachers.features.shape[0]
  size = math.prod(lead)
  num_classes = student.bias.shape[-1]
  if most_bytes is not None:
    width = student.features.shape[-1]
    block = _fitting(size, num_classes, num_peers, width, most_bytes)
  block = block or block_size(size, num_classes, num_peers)
  # Blocks of one size, as few of them as the largest size allows: next to
  # nothing is filled up.
  count = max(1, math.ceil(size / block))
  block = max(1, math.ceil(size / count))
  lanes = lanes or _LANES[_platform()]

  def cut(x: Array, axis: int = 0) -> jax.Array:
    """Returns the axes of examples, from `axis` on, as (blocks, examples)."""
    before, after = x.shape[:axis], x.shape[axis + len(lead) :]
    x = jnp.reshape(x, (*before, size, *after))
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, count * block - size)
    return jnp.reshape(jnp.pad(x, fill), (*before, count, block, *after))

  blocks = {
      'rows': jax.tree.map(lambda x: cut(jnp.asarray(x)), rows),
      'teachers': None,
  }
  heads = None
  if teachers is not None:
    # No gradient is made of them; this says so to whoever differentiates.
    teachers = jax.lax.stop_gradient(teachers)
    blocks['teachers'] = jnp.swapaxes(cut(teachers.features, 1), 0, 1)
    heads = _widen(teachers.kernel, lanes), teachers.bias
  student = HeadOutputs(
      cut(student.features), _widen(student.kernel, lanes), student.bias
  )
  return _summed(loss, student, blocks, heads, shared)


def block_size(num_examples: int, num_classes: int, num_peers: int = 0) -> int:
  """Examples of a block: a share of all, within what is fast and fits."""
  fewest, most = _FEWEST[_platform()], _MOST[_platform()]
  share = math.ceil(num_examples * _SHARE[_platform()])
  size = min(max(share, fewest), most)
  # Of blocks of one size, the nearest to that: not two where one is as good.
  size = math.ceil(num_examples / max(1, round(num_examples / size)))
  fitting = _MOST_BYTES[_platform()] // (4 * num_classes * (1 + num_peers))
  return max(1, min(size, most, max(fitting, _FEW), num_examples))


def _fitting(
    num_examples: int,
    num_classes: int,
    num_peers: int,
    width: int,
    most_bytes: int,
) -> int:
  """Examples of the largest block whose temporary memory is `most_bytes`.

  As compiled programs have it: whatever the block, the gradient of the kernel
  and what a block adds to it, and the features of all and their gradient; for
  each of its examples three arrays over C, and two for each teacher.

  Raises:
    ValueError: If not even a block of one example fits.
  """
  features = num_examples * width * (2 + num_peers)
  fixed = 4 * (2 * width * num_classes + features)
  of_example = 4 * num_classes * (3 + 2 * num_peers)
  if most_bytes < fixed + of_example:
    raise ValueError(
        f'fused_loss_bytes={most_bytes} is too little for the loss of this'
        f' model; set it to at least {fixed + of_example}, or to None'
    )
  return min((most_bytes - fixed) // of_example, num_examples)


def _platform() -> str:
  return 'cpu' if jax.default_backend() == 'cpu' else 'accelerator'


def _widen(kernel: Array, lanes: int) -> jax.Array:
  """The kernel with columns of 0 up to a multiple of `lanes`."""
  missing = -kernel.shape[-1] % lanes
  return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 1) + [(0, missing)])


def _logits(features: Array, kernel: Array, bias: Array) -> jax.Array:
  """The logits (S, C) of a kernel that may have more columns than C."""
  logits = contract(features, kernel, 1, 0)[:, : bias.shape[0]]
  return logits + bias.astype(jnp.float32)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss, student, blocks, heads, shared):
  def value(x):
    features, x = x
    logits = _logits(features, student.kernel, student.bias)
    return _of_logits(loss, heads, shared)(logits, x)

  xs = (student.features, blocks)
  add = lambda sums, x: (jax.tree.map(jnp.add, sums, value(x)), None)
  return _scan(add, _zeros_of(value, xs), xs)[0]


def _summed_fwd(loss, student, blocks, heads, shared):
  kernel, bias = student.kernel, student.bias

  def gradient(x):
    features, x = x
    logits = _logits(features, kernel, bias)
    of_logits = _of_logits(loss, heads, shared)
    sums, logits_grad = jax.value_and_grad(of_logits, has_aux=True)(logits, x)
    bias_grad = jnp.sum(logits_grad, axis=0)
    logits_grad = _widen(logits_grad.astype(kernel.dtype), kernel.shape[1])
    kernel_grad = contract(features, logits_grad, 0, 0)
    features_grad = contract(logits_grad, kernel, 1, 1)
    return (sums, kernel_grad, bias_grad), features_grad.astype(features.dtype)

  def add(carry, x):
    summand, features_grad = gradient(x)
    return jax.tree.map(jnp.add, carry, summand), features_grad

  xs = (student.features, blocks)
  start = _zeros_of(lambda x: gradient(x)[0], xs)
  (sums, kernel_grad, bias_grad), features_grad = _scan(add, start, xs)
  grads = HeadOutputs(
      features_grad,
      kernel_grad.astype(kernel.dtype),
      bias_grad.astype(bias.dtype),
  )
  return sums, grads


def _summed_bwd(loss, grads, cotangent):
  del loss
  scale = cotangent[0]
  scaled = jax.tree.map(lambda x: (x * scale).astype(x.dtype), grads)
  return scaled, None, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _of_logits(loss, heads, shared):
  """The loss as a function of the logits and of the rest of a block."""

  def of_logits(logits, x):
    teacher_logits = None
    if heads is not None:
      teacher_logits = jax.vmap(_logits)(x['teachers'], *heads)
    return loss(logits, teacher_logits, x['rows'], shared)

  return of_logits


def _scan(body, start, xs):
  """`lax.scan`, without a loop around a single block."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.scan(body, start, xs)
  carry, y = body(start, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda x: x[None], y)


def _zeros_of(summand, xs):
  """Zeros of the shapes of what is summed up over blocks."""
  first = jax.tree.map(lambda x: x[0], xs)
  like = jax.eval_shape(summand, first)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _check_rows(lead, teachers, rows) -> None:
  for x in jax.tree.leaves(rows):
    if jnp.shape(x)[: len(lead)] != lead:
      raise ValueError(
          f'Expected rows of leading shape {lead}, that of the features, got'
          f' {jnp.shape(x)}.'
      )
  if teachers is not None and teachers.features.shape[1:-1] != lead:
    raise ValueError(
        f'Expected features of teachers of shape (P,) + {lead} + (D,), got'
        f' {teachers.features.shape}.'
    )
