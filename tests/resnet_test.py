"""Residual networks against slow ones; whose statistics normalise whom."""

import dataclasses
import functools
import re

import fast
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codistill_jax import base, losses, replicas
from codistill_jax import step as step_lib
from codistill_jax.models import linen, resnet

CLASSES, WIDTH = 5, 4
B, SIZE = 8, 12  # Even: padding 'SAME' would be of one side only.
SGD = optax.sgd(0.1)

BLOCKS = {
    'bottleneck': (resnet.Bottleneck, resnet.imagenet_stem),
    'plain': (resnet.Plain, resnet.cifar_stem),
}


@functools.cache
def tiny(kind='plain', axis_name=None):
  """Two stages of one block each."""
  block, stem = BLOCKS[kind]
  module = resnet.ResNet(
      num_classes=CLASSES,
      stages=(1, 1),
      width=WIDTH,
      block=block,
      stem=stem,
      head_init=jax.nn.initializers.normal(0.1),
      axis_name=axis_name,
      dtype=jnp.dtype('float32'),
  )
  return linen.from_linen(module)


def images(seed=0, rows=B):
  rng = np.random.default_rng(seed)
  # Rows differ in scale and mean: so do the statistics of their groups.
  scale = rng.uniform(0.5, 2.0, size=(rows, 1, 1, 1))
  pixels = scale * rng.normal(size=(rows, SIZE, SIZE, 3)) + scale
  return {
      'inputs': pixels.astype(np.float32),
      'labels': rng.integers(CLASSES, size=rows).astype(np.int32),
  }


@functools.cache
def compiled(model, train):
  return fast.jit(lambda v, b: model.apply(v, b, (), None, train))


def run(model, variables, batch, train=False):
  return compiled(model, train)(variables, batch)


assert_close = functools.partial(
    np.testing.assert_allclose, rtol=1e-4, atol=1e-5
)


class Slow:
  """A residual network in float64 numpy, with its padding written out."""

  def __init__(self, variables, train):
    to64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    self._params = to64(variables.params)
    self._stats = to64(variables.model_state['batch_stats'])
    self._train = train
    self.new_stats = {}

  def conv(self, x, path, stride=1):
    kernel = self._at(self._params, path)['kernel']
    size = len(kernel)
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(
        x, (size, size), axis=(1, 2)
    )
    patches = patches[:, ::stride, ::stride]
    return np.einsum('bhwdij,ijde->bhwe', patches, kernel)

  def norm(self, x, path):
    p, stats = self._at(self._params, path), self._at(self._stats, path)
    mean, var = stats['mean'], stats['var']
    if self._train:
      of_batch = {'mean': x.mean((0, 1, 2)), 'var': x.var((0, 1, 2))}
      self.new_stats[path] = {
          k: 0.9 * stats[k] + 0.1 * v for k, v in of_batch.items()
      }
      mean, var = of_batch['mean'], of_batch['var']
    return (x - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']

  def _at(self, tree, path):
    return functools.reduce(lambda t, k: t[k], path.split('/'), tree)

  def logits(self, kind, x):
    relu = lambda x: np.maximum(x, 0)
    big = kind == 'bottleneck'
    x = self.conv(x, 'stem_conv', 2 if big else 1)
    x = relu(self.norm(x, 'stem_norm'))
    if big:
      x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # x >= 0: like -inf.
      view = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
      x = view[:, ::2, ::2].max((-1, -2))
    for name, stride in [('stage1_block1', 1), ('stage2_block1', 2)]:
      at = lambda part, name=name: f'{name}/{part}'
      y = x
      strides = [1, stride, 1] if big else [stride, 1]
      for i, s in enumerate(strides, 1):
        y = self.norm(self.conv(y, at(f'conv{i}'), s), at(f'norm{i}'))
        y = y if i == len(strides) else relu(y)
      if big:
        x = self.conv(x, at('shortcut_conv'), stride)
        x = self.norm(x, at('shortcut_norm'))
      else:
        zeros = y.shape[-1] - x.shape[-1]
        x = np.pad(x[:, ::stride, ::stride], 3 * [(0, 0)] + [(0, zeros)])
      x = relu(x + y)
    head = self._params['head']
    return x.mean((1, 2)) @ head['kernel'] + head['bias']


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('kind', BLOCKS)
def test_equals_a_slow_network(kind, train):
  model = tiny(kind)
  variables = fast.random_variables(model, images())
  batch = images()
  logits, updates = run(model, variables, batch, train)
  slow = Slow(variables, train)
  assert_close(logits, slow.logits(kind, batch['inputs']))
  stats = updates.model_state['batch_stats']
  if not train:
    jax.tree.map(
        np.testing.assert_array_equal,
        stats,
        variables.model_state['batch_stats'],
    )
  for path, expected in slow.new_stats.items():
    found = slow._at(stats, path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      assert_close(found[name], value)


def count(model, channels=3):
  batch = {'inputs': np.zeros((1, 32, 32, channels), np.float32)}
  like = jax.eval_shape(model.init, jax.random.key(0), batch)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return size(like.params), size(like.model_state)


@pytest.mark.parametrize('channels, by_hand', [(3, 269_722), (1, 269_434)])
def test_resnet20_has_as_many_parameters_as_by_hand(channels, by_hand):
  convs, norms, d = 9 * channels * 16, 16, 16
  for w in (16, 32, 64):
    convs += 9 * d * w + 5 * 9 * w * w
    norms += 6 * w
    d = w
  assert convs + 2 * norms + 64 * 10 + 10 == by_hand
  assert count(resnet.resnet20(10), channels) == (by_hand, 2 * norms)


def test_a_block_of_resnet50_starts_as_its_shortcut():
  block = resnet.Bottleneck(
      width=WIDTH,
      stride=2,
      conv=functools.partial(nn.Conv, kernel_init=nn.initializers.ones),
      norm=functools.partial(nn.BatchNorm, use_running_average=True),
  )
  x = images()['inputs']
  variables = fast.jit(block.init)(jax.random.key(0), x)
  shortcut = np.maximum(x[:, ::2, ::2].sum(-1, keepdims=True), 0)
  expected = np.repeat(shortcut, 4 * WIDTH, axis=-1)
  assert_close(fast.jit(block.apply)(variables, x), expected)


@functools.cache
def step_of(axis_name, number):
  """A train step on `number` devices."""
  step = step_lib.make_train_step(
      tiny('plain', axis_name), SGD, axis_name=base.REPLICA_AXIS
  )
  return replicas.PmapStep(step, jax.devices()[:number])


def start(num_peers=0):
  model = tiny()
  state = jax.eval_shape(
      functools.partial(step_lib.init_state, model, SGD, num_peers=num_peers),
      jax.random.PRNGKey(0),
      images(),
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return zeros.replace(variables=fast.random_variables(model, images()))


def stepped(step, *args):
  state, metrics = step(step.place(start()), images(), *args)
  return step.collect(state).variables, metrics


def largest_difference(a, b):
  """Between two trees, relative to the largest value of each array."""
  return max(
      np.abs(x - y).max() / np.abs(y).max()
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


def test_across_replicas_four_devices_are_one_big_batch():
  whole, expected = stepped(step_of(None, 1), None, 0.0)
  split, found = stepped(step_of(base.REPLICA_AXIS, 4), None, 0.0)
  change = lambda new: jax.tree.map(
      lambda a, b: a - b, new.params, start().variables.params
  )
  # The update itself, not the parameter that it hides in.
  assert largest_difference(change(split), change(whole)) < 1e-4
  assert largest_difference(split.params, whole.params) < 1e-5
  assert largest_difference(split.model_state, whole.model_state) < 1e-5
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
      dict(found),
      dict(expected),
  )


def test_each_replica_normalises_by_its_own_examples():
  whole, expected = stepped(step_of(None, 1), None, 0.0)
  split, found = stepped(step_of(None, 4), None, 0.0)
  assert abs(float(found['loss/task']) - float(expected['loss/task'])) > 1e-3
  # The means agree; the variances lack what the replicas' means differ by.
  stats = [v.model_state['batch_stats']['stem_norm'] for v in (split, whole)]
  assert_close(stats[0]['mean'], stats[1]['mean'])
  assert (stats[0]['var'] < stats[1]['var'] - 1e-3).all()


def test_teachers_are_asked_one_after_another_in_plain_convolutions():
  """Batched over teachers, convolutions would be grouped, which is slow."""
  two = [fast.random_variables(tiny(), images(), seed) for seed in (1, 2)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *two)
  teachers = base.Teachers(stacked, np.ones(2, np.float32))
  step = step_lib.make_train_step(tiny(), SGD)
  args = start(num_peers=2), images(), teachers, 1.0
  traced = str(jax.make_jaxpr(step)(*args))
  assert 'feature_group_count=1\n' in traced
  assert 'feature_group_count=2' not in traced
  student, _ = run(tiny(), start().variables, images(), train=True)
  logits = np.stack([run(tiny(), v, images(), False)[0] for v in two])
  expected = losses.cross_entropy(student, logits, np.ones(2, np.float32))
  _, found = jax.jit(step)(*args)
  np.testing.assert_allclose(found['loss/distill'], np.mean(expected), 1e-5)


def test_across_replicas_needs_the_axis_in_training_only():
  model = resnet.resnet20(CLASSES, batch_norm='cross_replica')
  batch = images()
  like = jax.eval_shape(model.init, jax.random.key(0), batch)
  evaluate = lambda v, b: model.apply(v, b, (), None, False)
  jax.eval_shape(evaluate, like, batch)
  with pytest.raises(ValueError, match=r"set batch_norm='replica'"):
    jax.eval_shape(lambda v, b: model.apply(v, b, (), None, True), like, batch)


def test_raw_pixels_are_refused():
  batch = {'inputs': np.zeros((1, 32, 32, 3), np.uint8)}
  with pytest.raises(ValueError, match='floating inputs, got uint8'):
    resnet.resnet20(10).init(jax.random.key(0), batch)


@pytest.mark.parametrize(
    'size, stride, padding',
    [
        (3, 1, ((1, 1), (1, 1))),
        (3, 2, ((1, 1), (1, 1))),
        (7, 2, ((3, 3), (3, 3))),
        (1, 2, 'SAME'),
    ],
)
def test_gradients_over_blocks_are_those_of_a_convolution(
    size, stride, padding
):
  images, side, channels = 6, 32 * stride, 64  # 2 images a block.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(images, side, side, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(size, size, 3, channels)), jnp.float32)
  grad = rng.normal(size=(images, 32, 32, channels))
  how = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'precision': None}

  def outputs_and_gradients(convolve):
    of = lambda *a: convolve(*a, (stride, stride), padding, **how)
    found, backward = jax.vjp(of, x, kernel)
    return found, *backward(jnp.asarray(grad, jnp.float32))

  ours = outputs_and_gradients(resnet.convolve_on_cpu)
  plain = outputs_and_gradients(jax.lax.conv_general_dilated)
  for a, b in zip(ours, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_gradients_in_a_loop_are_in_the_order_that_xla_is_fast_in():
  # As in gradient accumulation. It reorders nothing there, and takes 50 times
  # as long for any other order.
  variables = fast.random_variables(tiny(), images())

  def loss(params, batch):
    given = dataclasses.replace(variables, params=params)
    logits, _ = tiny().apply(given, batch, (), None, True)
    return jnp.mean(logits**2)

  grads = lambda batch: jax.grad(loss)(variables.params, batch)
  batches = jax.tree.map(lambda x: x[None].repeat(2, 0), images())
  program = jax.jit(lambda b: jax.lax.map(grads, b)).lower(batches).compile()
  orders = set(
      re.findall(r'convolution\(.*dim_labels=(\S+?),? ', program.as_text())
  )
  assert orders == {'b01f_01io->b01f'}
