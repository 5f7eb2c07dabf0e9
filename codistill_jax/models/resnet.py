"""Residual networks for images: ResNet-50 v1.5 and the ResNet-20 of CIFAR.

ResNet-50 is He et al. 2016a, table 1, with the stride of a block in its 3x3
convolution (the "v1.5" of later reference implementations, whose counts and
accuracies it shares: 25,557,032 parameters at 1000 classes). ResNet-20 is
section 4.2 there with the shortcut of option A, which has no parameters:
269,722 of them at 10 classes and 3 channels.

Batch normalisation uses the statistics of the batch in training, and running
ones, with which the parameters are published, in evaluation and in a teacher.
They are model state, float32, as is all of the normalisation, and the head.
Parameters are float32; convolutions are in `dtype`.

Shape suffixes: B examples, H and W pixels, D channels, C classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from codistill_jax import base
from codistill_jax.models import linen

_MOMENTUM = 0.9
_EPSILON = 1e-5
# He et al. 2015, with the fan of the output, as Goyal et al. 2017 have it.
_CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Elements of a gradient in a block of `convolve_on_cpu`: 512 kB, half of the
# cache of a core.
_BLOCK = 1 << 17
_BATCH_NORMS = ('replica', 'cross_replica')


def resnet50(
    num_classes: int,
    batch_norm: str = 'replica',
    dtype: str = 'float32',
) -> base.Model:
  """Makes ResNet-50 v1.5 with the start of Goyal et al. 2017, section 5.1.

  The last scale of each block starts at 0, so that a block starts as its
  shortcut, and the head at N(0, 0.01^2).

  A batch has `inputs` (B, H, W, 1 or 3), floating, normalised; 224 x 224 in
  the paper. The outputs are logits (B, C).

  Args:
    num_classes: C.
    batch_norm: 'replica': in training each replica normalises by its own
      examples, and the running statistics are the mean of the replicas', which
      says nothing of how their means differ (Goyal et al. 2017, section 2.3).
      'cross_replica': by those of the whole group batch; only under the axis
      of `replicas.PmapStep`.
    dtype: Of the convolutions: 'float32' or 'bfloat16'.

  Raises:
    ValueError: If an argument is out of range.
  """
  module = ResNet(
      num_classes=num_classes,
      stages=(3, 4, 6, 3),
      width=64,
      block=Bottleneck,
      stem=imagenet_stem,
      head_init=nn.initializers.normal(0.01),
      **_checked(num_classes, batch_norm, dtype),
  )
  return linen.from_linen(module)


def resnet20(
    num_classes: int,
    batch_norm: str = 'replica',
    dtype: str = 'float32',
) -> base.Model:
  """Makes ResNet-20 for small images, 32 x 32 in He et al. 2016a.

  Arguments, inputs, outputs and errors as in `resnet50`.
  """
  module = ResNet(
      num_classes=num_classes,
      stages=(3, 3, 3),
      width=16,
      block=Plain,
      stem=cifar_stem,
      head_init=nn.initializers.lecun_normal(),
      **_checked(num_classes, batch_norm, dtype),
  )
  return linen.from_linen(module)


def _checked(num_classes: int, batch_norm: str, dtype: str) -> dict[str, Any]:
  linen.check_whole_numbers(num_classes=num_classes)
  if batch_norm not in _BATCH_NORMS:
    raise ValueError(
        f"batch_norm must be 'replica' or 'cross_replica', got {batch_norm!r}."
    )
  cross_replica = batch_norm == 'cross_replica'
  return {
      'axis_name': base.REPLICA_AXIS if cross_replica else None,
      'dtype': linen.checked_dtype(dtype),
  }


class ResNet(nn.Module):
  """Stem, stages of blocks, the mean over pixels, and the head."""

  num_classes: int
  stages: tuple[int, ...]  # Blocks of each.
  width: int  # Channels of the first stage; each next one has twice as many.
  block: type[nn.Module]
  stem: Callable
  head_init: Callable
  axis_name: str | None
  dtype: Any

  @nn.compact
  def __call__(self, images_BHWD, train=False):
    """Logits (B, C), float32."""
    if not jnp.issubdtype(images_BHWD.dtype, jnp.floating):
      raise ValueError(
          f'Expected floating inputs, got {images_BHWD.dtype}; normalise the'
          ' pixels first.'
      )
    if train and self.axis_name is not None:
      _check_axis(self.axis_name)
    conv = functools.partial(
        nn.Conv,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=_CONV_INIT,
        conv_general_dilated=_convolution(),
    )
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=_MOMENTUM,
        epsilon=_EPSILON,
        axis_name=self.axis_name,
        dtype=self.dtype,
    )
    x_BHWD = self.stem(conv, norm, self.width, images_BHWD)
    for stage, blocks in enumerate(self.stages):
      for i in range(blocks):
        x_BHWD = self.block(
            width=self.width * 2**stage,
            stride=2 if stage > 0 and i == 0 else 1,
            conv=conv,
            norm=norm,
            name=f'stage{stage + 1}_block{i + 1}',
        )(x_BHWD)
    x_BD = jnp.mean(x_BHWD.astype(jnp.float32), axis=(1, 2))
    head = nn.Dense(self.num_classes, kernel_init=self.head_init, name='head')
    return head(x_BD)


def _convolution() -> Callable[..., jax.Array]:
  on_cpu = jax.default_backend() == 'cpu'
  return convolve_on_cpu if on_cpu else jax.lax.conv_general_dilated


def convolve_on_cpu(x_BHWD, kernel, strides, padding, **kwargs):
  """Convolves as `lax.conv_general_dilated`, with gradients fast on a CPU.

  That of the kernel is a sum over blocks of images, in a loop: outside of one
  XLA's CPU backend, which transposes the images for it, normalises all of them
  once more as it does so, out of order. Both gradients are transposed here to
  the one order that the backend has a fast convolution for: it does so itself,
  but not in a loop, where any other order takes 50 times as long.

  Args:
    x_BHWD: Images.
    kernel: (height, width, D, channels out).
    strides: As for `lax.conv_general_dilated`.
    padding: Likewise.
    **kwargs: Likewise; `dimension_numbers` are those of the shapes above.
  """

  def conv(x, kernel, *orders):
    names = {**kwargs, 'dimension_numbers': orders}
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **names)

  def of_images(x, kernel, grad):
    swapped = kernel.transpose(0, 1, 3, 2)
    to_grad = lambda x: conv(x, swapped, 'NHWC', 'HWOI', 'NHWC')
    return jax.linear_transpose(to_grad, x)(grad)[0]

  def of_kernel(x, kernel, grad):
    kernel = kernel.transpose(2, 0, 1, 3)

    def add(total, block):
      x, grad = block[0].transpose(3, 1, 2, 0), block[1].transpose(1, 2, 0, 3)
      to_grad = lambda kernel: conv(x, kernel, 'CHWN', 'IHWO', 'HWNC')
      return total + jax.linear_transpose(to_grad, kernel)(grad)[0], None

    images = len(x)
    most = min(max(_BLOCK * images // grad.size, 1), images)
    rows = next(n for n in range(most, 0, -1) if images % n == 0)
    blocks = [a.reshape(-1, rows, *a.shape[1:]) for a in (x, grad)]
    total = jnp.zeros(kernel.shape, jnp.float32)
    total, _ = jax.lax.scan(add, total, blocks)
    return total.transpose(1, 2, 0, 3).astype(kernel.dtype)

  @jax.custom_vjp
  def apply(x, kernel):
    return conv(x, kernel, 'NHWC', 'HWIO', 'NHWC')

  def backward(saved, grad):
    x, kernel = saved
    return of_images(x, kernel, grad), of_kernel(x, kernel, grad)

  apply.defvjp(lambda x, kernel: (apply(x, kernel), (x, kernel)), backward)
  return apply(x_BHWD, kernel)


def _check_axis(name: str) -> None:
  try:
    jax.lax.axis_size(name)
  except NameError as e:
    raise ValueError(
        "batch_norm='cross_replica' trains under the axis"
        f' {name!r} of replicas.PmapStep only, and there is none; set'
        " batch_norm='replica' for a single replica."
    ) from e


def imagenet_stem(conv, norm, width, x_BHWD):
  x_BHWD = conv(width, (7, 7), 2, padding=3, name='stem_conv')(x_BHWD)
  x_BHWD = nn.relu(norm(name='stem_norm')(x_BHWD))
  return nn.max_pool(x_BHWD, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def cifar_stem(conv, norm, width, x_BHWD):
  x_BHWD = conv(width, (3, 3), padding=1, name='stem_conv')(x_BHWD)
  return nn.relu(norm(name='stem_norm')(x_BHWD))


class Bottleneck(nn.Module):
  """1x1 to `width`, 3x3 with the stride, 1x1 to four times `width`."""

  width: int
  stride: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x_BHWD):
    channels = 4 * self.width
    y = self.conv(self.width, (1, 1), name='conv1')(x_BHWD)
    y = nn.relu(self.norm(name='norm1')(y))
    # Padding is given as numbers: 'SAME' with a stride of 2 would pad one side
    # only, and see other pixels than the usual implementations.
    y = self.conv(self.width, (3, 3), self.stride, padding=1, name='conv2')(y)
    y = nn.relu(self.norm(name='norm2')(y))
    y = self.conv(channels, (1, 1), name='conv3')(y)
    y = self.norm(name='norm3', scale_init=nn.initializers.zeros)(y)
    if x_BHWD.shape[-1] != channels or self.stride > 1:
      x_BHWD = self.conv(channels, (1, 1), self.stride, name='shortcut_conv')(
          x_BHWD
      )
      x_BHWD = self.norm(name='shortcut_norm')(x_BHWD)
    return nn.relu(x_BHWD + y)


class Plain(nn.Module):
  """Two 3x3 convolutions; the shortcut drops pixels and adds zero channels."""

  width: int
  stride: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x_BHWD):
    y = self.conv(self.width, (3, 3), self.stride, padding=1, name='conv1')(
        x_BHWD
    )
    y = nn.relu(self.norm(name='norm1')(y))
    y = self.conv(self.width, (3, 3), padding=1, name='conv2')(y)
    y = self.norm(name='norm2')(y)
    missing = self.width - x_BHWD.shape[-1]
    x_BHWD = x_BHWD[:, :: self.stride, :: self.stride]
    x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return nn.relu(x_BHWD + y)
