"""The models that the benchmarks train, on made-up batches of true shapes.

Shape suffixes: B rows, T tokens, P peers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import base, blocks, jaxprs, losses, optimizers
from codistill_jax import step as step_lib
from codistill_jax.models import dnn, lstm, resnet, transformer


class Case(NamedTuple):
  """A model and one batch of it.

  Attributes:
    name: In the results.
    model: The model.
    tx: Its optimiser.
    batch: On the device.
    sizes: What was chosen, for the record.
    output: 'softmax' or 'sigmoid'; see `base.Task`.
  """

  name: str
  model: base.Model
  tx: optax.GradientTransformation
  batch: dict[str, Any]
  sizes: dict[str, Any]
  output: str = 'softmax'

  @property
  def units(self) -> int:
    """Tokens or examples of an update."""
    return self.batch['labels'].size


def lstm_lm(
    units: int, vocab: int, rows: int, tokens: int, dtype: str = 'float32'
) -> Case:
  """Returns the paper's language model; embedding 1/4 as wide, at most 256."""
  embedding = min(256, max(units // 2, 8))
  model = lstm.language_model(
      vocab, units=units, embedding=embedding, dtype=dtype
  )
  sizes = {'units': units, 'vocab': vocab, 'rows': rows, 'tokens': tokens}
  sizes |= {'layers': 2, 'embedding': embedding, 'dtype': dtype}
  return _language_model(f'LSTM {units}, V = {vocab:,}', model, sizes)


def transformer_lm(
    units: int,
    layers: int,
    vocab: int,
    rows: int,
    tokens: int,
    dtype: str = 'float32',
) -> Case:
  """Returns a transformer: heads of 64 units, a memory as long as a window."""
  model = transformer.language_model(
      vocab,
      layers=layers,
      units=units,
      heads=max(units // 64, 1),
      memory=tokens,
      dtype=dtype,
  )
  sizes = {'units': units, 'vocab': vocab, 'rows': rows, 'tokens': tokens}
  sizes |= {'layers': layers, 'memory': tokens, 'dtype': dtype}
  return _language_model(f'transformer {units}, V = {vocab:,}', model, sizes)


def _language_model(
    name: str, model: base.Model, sizes: dict[str, Any]
) -> Case:
  rng = np.random.default_rng(0)
  shape = (sizes['rows'], sizes['tokens'])
  text = rng.integers(sizes['vocab'], size=(shape[0], shape[1] + 1), dtype='i4')
  batch = {
      'inputs': text[:, :-1],
      'labels': text[:, 1:],
      'resets': rng.random(shape) < 0.002,
  }
  return Case(name, model, optax.adam(1e-3), jax.device_put(batch), sizes)


def resnet20(rows: int) -> Case:
  """Returns ResNet-20 on CIFAR's shapes."""
  return _images('ResNet-20', resnet.resnet20(10), rows, 32, 10, 'float32')


def resnet50(rows: int, dtype: str = 'bfloat16', pixels: int = 224) -> Case:
  """Returns ResNet-50 on ImageNet's shapes."""
  model = resnet.resnet50(1000, dtype=dtype)
  return _images('ResNet-50', model, rows, pixels, 1000, dtype)


def _images(
    name: str,
    model: base.Model,
    rows: int,
    pixels: int,
    classes: int,
    dtype: str,
) -> Case:
  rng = np.random.default_rng(0)
  batch = {
      'inputs': rng.normal(size=(rows, pixels, pixels, 3)).astype('f4'),
      'labels': rng.integers(classes, size=rows, dtype='i4'),
  }
  sizes = {'rows': rows, 'pixels': pixels, 'classes': classes, 'dtype': dtype}
  tx = optimizers.momentum_sgd(0.1)
  return Case(name, model, tx, jax.device_put(batch), sizes)


def click_dnn(
    rows: int,
    hidden: tuple[int, ...] = (2560, 1024, 256),
    tables: int = 26,
    buckets: int = 4096,
) -> Case:
  """Returns the click model on Criteo's columns: 13 integers, 26 categories."""
  rng = np.random.default_rng(0)
  model = dnn.click_model(2, [buckets] * tables, 13, hidden, embedding=16)
  batch = {
      'inputs': {
          'integers': rng.normal(size=(rows, 13)).astype('f4'),
          'categories': rng.integers(buckets, size=(rows, tables), dtype='i4'),
      },
      'labels': rng.integers(2, size=rows, dtype='i4'),
  }
  sizes = {'rows': rows, 'hidden': list(hidden), 'tables': tables}
  sizes |= {'buckets': buckets, 'embedding': 16, 'dtype': 'float32'}
  batch = jax.device_put(batch)
  return Case('click DNN', model, optax.adam(1e-3), batch, sizes, 'sigmoid')


def train_step(case: Case, **kwargs: Any) -> step_lib.TrainStep:
  """Returns the pure step of the case."""
  return step_lib.make_train_step(
      case.model,
      case.tx,
      task_loss=losses.task_loss_of(case.output),
      distill_loss=losses.distill_loss('cross_entropy', case.output),
      **kwargs,
  )


def state_of(case: Case, num_peers: int = 0, seed: int = 0) -> base.TrainState:
  """Returns a state of random parameters."""
  return step_lib.init_state(
      case.model,
      case.tx,
      jax.random.PRNGKey(seed),
      case.batch,
      num_peers=num_peers,
  )


def teachers_of(case: Case, num_peers: int) -> base.Teachers | None:
  """Returns that many peers of other random parameters; None of none."""
  if not num_peers:
    return None
  found = [state_of(case, seed=1 + p).variables for p in range(num_peers)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
  return base.Teachers(stacked, jnp.ones(num_peers))


def updates(case: Case, num_peers: int, **kwargs: Any) -> Callable[[], Any]:
  """Returns `call()`, one more update, jitted, the state donated, as in a run.

  Args:
    case: What is trained.
    num_peers: P, peers that teach; 0 for plain training.
    **kwargs: Of `make_train_step`.
  """
  step = jax.jit(train_step(case, **kwargs), donate_argnums=0)
  state = state_of(case, num_peers)
  teachers = teachers_of(case, num_peers)
  weight = jnp.float32(1.0)

  def call():
    nonlocal state
    state, metrics = step(state, case.batch, teachers, weight)
    return metrics

  return call


def forward(case: Case, to_logits: bool) -> Callable[[], Any]:
  """Returns `call()`, a forward pass in eval mode, jitted.

  Args:
    case: What is evaluated.
    to_logits: Up to the logits; else up to the features, where the model gives
      those and its head (`base.HeadOutputs`). Only their maximum leaves the
      program.
  """
  state = state_of(case)

  @jax.jit
  def run(variables: base.Variables, batch: base.Batch, carry: base.PyTree):
    outputs, rest = case.model.apply(variables, batch, carry, None, False)
    if to_logits:
      outputs = base.logits_of(outputs)
    elif isinstance(outputs, base.HeadOutputs):
      outputs = outputs.features
    # Not the sum, which a compiler may take before the product.
    return jnp.max(outputs), rest.carry

  return lambda: run(state.variables, case.batch, state.carry)


def losses_of_logits(case: Case, num_peers: int) -> Callable[[], Any]:
  """Returns `call()`, the losses of a language model and their gradient alone.

  Args:
    case: Of which only the sizes matter: the logits are random numbers.
    num_peers: P; 0 for the task loss alone.
  """
  examples, vocab = case.units, case.sizes['vocab']
  count = math.ceil(examples / blocks.block_size(examples, vocab, num_peers))
  shape = 1 + num_peers, count, examples // count, vocab
  logits = jax.random.normal(jax.random.PRNGKey(0), shape)
  labels = jnp.zeros(shape[1:3], jnp.int32)

  def loss(student: jax.Array, teachers: jax.Array, labels: jax.Array):
    total = losses.task_loss(student, labels)
    if num_peers:
      total += losses.cross_entropy(student, teachers, jnp.ones(num_peers))
    return jnp.sum(total)

  @jax.jit
  def run(student: jax.Array, teachers: jax.Array):
    teachers = jnp.swapaxes(teachers, 0, 1)
    of_block = lambda x: jax.value_and_grad(loss)(*x)
    return jax.lax.map(of_block, (student, teachers, labels))

  student, teachers = logits[0], logits[1:]
  return lambda: run(student, teachers)


def floating_operations(function: Callable[..., Any], *args: Any) -> float:
  """Returns the floating point operations of a function, as it is written.

  Of products and convolutions alone; see `jaxprs`.
  """
  return jaxprs.flops(function, *args).total


def update_operations(case: Case, num_peers: int, **kwargs: Any) -> float:
  """Returns the floating point operations of one update."""
  return floating_operations(
      train_step(case, **kwargs),
      state_of(case, num_peers),
      case.batch,
      teachers_of(case, num_peers),
      jnp.float32(1.0),
  )
