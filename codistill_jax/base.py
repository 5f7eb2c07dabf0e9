"""The types that every other module speaks: model, state, teachers, streams.

Shape suffixes: B examples of a batch (or rows of a language model), T tokens,
D features, C classes, P peers.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

PyTree = Any
Array = Any  # jax.Array or numpy.ndarray
Batch = Mapping[str, Array]
Metrics = dict[str, Array]

REPLICA_AXIS = 'replica'  # The pmap axis of a group.
GROUP_AXIS = 'group'  # The vmap axis of groups that are one program.


class Variables(struct.PyTreeNode):
  """What a group publishes: everything `Model.apply` needs of a trained model.

  Attributes:
    params: Trainable parameters.
    model_state: Non-trainable state, such as running batch statistics; `{}`
      for models that have none.
  """

  params: PyTree
  model_state: PyTree = struct.field(default_factory=dict)


class HeadOutputs(NamedTuple):
  """Features and the linear head that makes logits of them.

  A model returns this instead of logits so that a loss may work on blocks of
  examples and never hold all logits at once.
  """

  features: Array  # (..., D)
  kernel: Array  # (D, C)
  bias: Any = None  # An Array (C,); None for no bias.


Outputs = Array | HeadOutputs


def logits_of(outputs: Outputs) -> jax.Array:
  """Logits (..., C), in float32, of either form of model output.

  Raises:
    ValueError: If it is neither.
  """
  outputs = checked_outputs(outputs)
  if isinstance(outputs, HeadOutputs):
    features, kernel, bias = outputs
    # As a matrix: of more axes, the gradient of the kernel would transpose that
    # of the logits.
    rows = jnp.reshape(features, (-1, features.shape[-1]))
    logits = contract(rows, kernel, 1, 0) + bias.astype(jnp.float32)[None]
    return jnp.reshape(logits, (*features.shape[:-1], kernel.shape[-1]))
  return jnp.asarray(outputs, jnp.float32)


def checked_outputs(outputs: Any) -> Outputs:
  """Returns what a model said; a head has a bias, of 0 if need be.

  Raises:
    ValueError: If it is neither logits nor `HeadOutputs` whose shapes fit.
  """
  if isinstance(outputs, HeadOutputs):
    features, kernel, bias = outputs
    if bias is None and getattr(kernel, 'ndim', 0) == 2:
      bias = jnp.zeros(kernel.shape[1], kernel.dtype)
    outputs = HeadOutputs(features, kernel, bias)
    if all(map(_is_floating, outputs)):
      last = features.shape[-1:]
      if (kernel.shape, kernel.ndim) == ((*last, *bias.shape), 2) and last:
        return outputs
  elif _is_floating(outputs):
    return outputs
  raise ValueError(
      'A model returns floating logits (..., C), or HeadOutputs of features'
      f' (..., D), kernel (D, C) and bias (C,); got {form_of(outputs)}'
  )


def _is_floating(x: Any) -> bool:
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def form_of(tree: PyTree) -> str:
  """Returns types, dtypes and shapes of a tree in words, for an error."""
  if isinstance(tree, tuple | list):
    inner = ', '.join(map(form_of, tree))
    return f'{type(tree).__name__} of ({inner})'
  if isinstance(tree, Mapping):
    inner = ', '.join(f'{k}: {form_of(x)}' for k, x in tree.items())
    return f'{type(tree).__name__} of ({inner})'
  if hasattr(tree, 'dtype'):
    return f'{tree.dtype}{list(tree.shape)}'
  return type(tree).__name__


def checked_batch(batch: Batch) -> dict[str, PyTree]:
  """Returns a batch as a dict; raises ValueError if it is no such thing."""
  if not isinstance(batch, Mapping):
    raise ValueError(
        f'Expected a batch: a dict of arrays, got {form_of(batch)}'
    )
  rows = None
  for path, x in jax.tree_util.tree_leaves_with_path(dict(batch)):
    name = f'batch{jax.tree_util.keystr(path)}'
    if not _is_rows_of_numbers(x):
      raise ValueError(
          f'{name} is {form_of(x)}; a batch has arrays of numbers (of numpy or'
          ' jax) with a row for each example, and nothing else'
      )
    rows = rows or (name, len(x))
    if len(x) != rows[1]:
      raise ValueError(
          f'{name} has {len(x)} rows and {rows[0]} has {rows[1]}; a batch has'
          ' arrays with a row for each example'
      )
    if isinstance(x, np.ndarray) and x.dtype.kind in 'iu':
      narrow = jax.dtypes.canonicalize_dtype(x.dtype)
      if narrow != x.dtype and np.any(x != x.astype(narrow)):
        raise ValueError(
            f'{name} is {form_of(x)} with numbers from {x.min()} to {x.max()},'
            f' which {narrow} does not hold; number them anew'
        )
  return dict(batch)


def _is_rows_of_numbers(x: Any) -> bool:
  if not isinstance(x, np.ndarray | jax.Array) or not x.shape:
    return False
  if jnp.issubdtype(x.dtype, np.number):
    return not jnp.issubdtype(x.dtype, np.timedelta64)
  return x.dtype == bool


def check_form(name: str, before: PyTree, after: PyTree) -> None:
  """Raises ValueError if state changed its structure, a shape or a dtype.

  Args:
    name: What it is.
    before: The state that went in.
    after: What came out.
  """
  leaves = lambda tree: {
      jax.tree_util.keystr(path): f'{jnp.result_type(x)}{list(jnp.shape(x))}'
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  old, new = leaves(before), leaves(after)
  for leaf in old | new:
    if old.get(leaf) != new.get(leaf):
      sown = ' (what a module sows grows with each call: hold it in a variable)'
      raise ValueError(
          f'{name}{leaf} was {old.get(leaf, "not there")} before the step and'
          f' is {new.get(leaf, "not there")} after it; state keeps its'
          f' structure, shapes and dtypes{"" if leaf in old else sown}'
      )
  if jax.tree.structure(before) != jax.tree.structure(after):
    raise ValueError(
        f'{name} was {form_of(before)} before the step and is'
        f' {form_of(after)} after it; state keeps its structure'
    )


def contract(a: Array, b: Array, axis_a: int, axis_b: int) -> jax.Array:
  """Sums products over an axis of each of two arrays, in float32."""
  return jax.lax.dot_general(
      a,
      b,
      (((axis_a,), (axis_b,)), ((), ())),
      preferred_element_type=jnp.float32,
  )


def two_class_logits(logits: Array) -> jax.Array:
  """Returns logits (..., 2) of two classes that predict as a sigmoid does."""
  logits = jnp.asarray(logits, jnp.float32)
  return jnp.stack([jnp.zeros_like(logits), logits], axis=-1)


class Updates(NamedTuple):
  """What a call of `Model.apply` changes besides its outputs.

  Attributes:
    model_state: The new `Variables.model_state` (unchanged in eval mode).
    carry: The recurrent state after the batch; `()` for models without one.
  """

  model_state: PyTree
  carry: PyTree


def _no_carry(batch_size: int) -> tuple[()]:
  del batch_size
  return ()


class Model(NamedTuple):
  """A model as pure functions.

  Attributes:
    init: `init(rng, batch) -> Variables`.
    apply: `apply(variables, batch, carry, rng, train) -> (Outputs, Updates)`.
      `rng` may be None when `train` is False. In eval mode nothing is random
      and running statistics are used.
    init_carry: `init_carry(batch_size) -> carry`: the recurrent state at the
      start of every row; `()` for models without one. The leading axis of each
      of its leaves is the batch axis.
  """

  init: Callable[[Array, Batch], Variables]
  apply: Callable[..., tuple[Outputs, Updates]]
  init_carry: Callable[[int], PyTree] = _no_carry


def forward(
    model: Model,
    variables: Variables,
    batch: Batch,
    carry: PyTree,
    rng: Array | None,
    train: bool,
) -> tuple[Outputs, Updates]:
  """Calls `Model.apply`, and checks once, while it is traced, what it returns.

  Raises:
    ValueError: If that is of another form than `Model` says, or the carry has
      other rows than the batch.
  """
  rows = jnp.shape(jax.tree.leaves(dict(batch))[0])[:1]
  for path, x in jax.tree_util.tree_leaves_with_path(carry):
    if jnp.shape(x)[:1] != rows:
      raise ValueError(
          f'carry{jax.tree_util.keystr(path)} is {form_of(x)}, but the batch'
          f' has {rows[0]} rows; make it with init_carry of that number'
      )
  result = model.apply(variables, batch, carry, rng, train)
  if type(result) is not tuple or len(result) != 2:
    raise ValueError(
        f'Model.apply returns (outputs, Updates), got {form_of(result)}'
    )
  outputs, updates = result
  if not isinstance(updates, Updates):
    raise ValueError(
        'Model.apply returns (outputs, Updates(model_state, carry)), got'
        f' {form_of(updates)} for the latter'
    )
  if train:
    check_form('model_state', variables.model_state, updates.model_state)
  check_form('carry', carry, updates.carry)
  return checked_outputs(outputs), updates


class TrainState(struct.PyTreeNode):
  """All that one group carries from update to update.

  Attributes:
    step: int32 scalar; the number of updates done.
    variables: The student.
    opt_state: State of the optax transformation.
    rng: Key, plain (of `PRNGKey`, or `KeyData` of another generator); never
      advanced, folded with `step` and the replica's index.
    carry: Recurrent state of the student on this group's rows (B, ...).
    teacher_carry: Recurrent state of each teacher on the same rows
      (P, B, ...); kept when the teachers' parameters are swapped.
  """

  step: Array
  variables: Variables
  opt_state: PyTree
  rng: Array
  carry: PyTree
  teacher_carry: PyTree


class KeyData(struct.PyTreeNode):
  """A typed random key as a plain array, to be copied, placed and saved."""

  data: Array  # uint32 (..., n); n as the generator has it.
  impl: Any = struct.field(pytree_node=False)  # As `jax.random.key_impl` says.


def is_typed_key(x: Any) -> bool:
  """Returns whether this is a key of `jax.random.key`, not of `PRNGKey`."""
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def without_keys(tree: PyTree) -> PyTree:
  """Replaces typed random keys by `KeyData`; the inverse of `with_keys`."""
  return jax.tree.map(
      lambda x: (
          KeyData(jax.random.key_data(x), jax.random.key_impl(x))
          if is_typed_key(x)
          else x
      ),
      tree,
  )


def with_keys(tree: PyTree) -> PyTree:
  """Replaces `KeyData` by typed random keys of the same generator."""
  is_data = lambda x: isinstance(x, KeyData)
  return jax.tree.map(
      lambda x: (
          jax.random.wrap_key_data(x.data, impl=x.impl) if is_data(x) else x
      ),
      tree,
      is_leaf=is_data,
  )


class Teachers(struct.PyTreeNode):
  """Frozen copies of the peers, stacked along a leading axis of fixed length P.

  Attributes:
    variables: `Variables` whose leaves have a leading axis P. The slot of an
      absent peer holds any finite values.
    present_P: float32 (P,); 1 where the peer is present, else 0.
  """

  variables: Variables
  present_P: Array


class PeerPredictions(struct.PyTreeNode):
  """Stands for teachers where the peers predict the same batch, now.

  The groups are one program with a named axis over them. The soft target of a
  step is the mean of what the peers predict in that very step, in training
  mode: staleness 0, and no second forward pass.

  Attributes:
    mix_G: float32 (G,), over all groups of the axis: how much each counts in
      this group's soft target. 1 / P for a peer that is present; 0 for the
      group itself and whoever is absent; all 0 if it is alone.
    axis_name: The axis of the groups; several if it is split, as by
      `one_program.Population`, the outermost first.
    top_k: How many classes a group sends of each prediction, with one number
      for the rest; None sends all.
  """

  mix_G: Array
  axis_name: str | tuple[str, ...] = struct.field(
      pytree_node=False, default=GROUP_AXIS
  )
  top_k: int | None = struct.field(pytree_node=False, default=None)


class Agreement(NamedTuple):
  """How the processes of one group decide together.

  Attributes:
    is_primary: Whether this process writes and chooses for the group.
    choose: `choose(array)` gives the primary's array on every process.
    all_true: `all_true(flags)` is true where it is true on every process.
  """

  is_primary: bool
  choose: Callable[[np.ndarray], np.ndarray]
  all_true: Callable[[np.ndarray], np.ndarray]


ALONE = Agreement(True, lambda x: x, lambda x: x)  # A group of one process.


class Stream(Protocol):
  """A deterministic source of batches."""

  def batch(self, step: int) -> Batch:
    """Returns the batch of update `step`: for one step the same, always."""


class Task(NamedTuple):
  """A data set as the binaries see it.

  Attributes:
    train_stream: `train_stream(group_id=, num_groups=, group_batch=, rows=)`
      gives the `Stream` of one group. `rows` is a slice of the group batch:
      the rows that this process loads (None: all). A `seed=` replaces the one
      of the task: another order (and partition) of the same training split.
    eval_batches: `eval_batches(batch_size)` gives the validation set once, in
      order, as a sequence of batches of that many rows; padding has weight 0.
    num_classes: C, or the vocabulary size V of a language model.
    identity: What two groups must agree on to exchange predictions, as
      strings: task name, number of classes, tokenizer hash, ...
    example_name: What one example is: 'token', 'image', 'click'.
    description: The data in a few words, for reports.
    output: 'softmax' over C classes, logits (..., C); or 'sigmoid', one
      logistic output with logits of the shape of the labels (C is 2).
    model_arguments: What a model must know of the data besides C, as keyword
      arguments of `Experiment.model`, such as the sizes of its tables.
    test_batches: As `eval_batches`, of a test split, on which nothing is
      chosen; None if the data have none.
    partition: How groups divide the training split, 'shared' or 'disjoint'.
    label_frequencies: `label_frequencies()` gives how often each class is the
      label in the training split, that of all groups: float64 (C,), of sum 1.
      None: nobody counts.
    tokenizer: `tokenizer()` gives that of a task of text; None for others.
    other_data: `other_data(name, split)` opens another data set as this task
      sees its own, with its tokenizer, vocabulary, classes and normalisation,
      and gives what `eval_batches` is of it. It raises ValueError if those of
      the data are others. None: no other data are read.
    raw_inputs: How inputs are made of raw values, for a servable model:
      `tables.Columns`, `images.Pixels`; None: unknown.
  """

  train_stream: Callable[..., Stream]
  eval_batches: Callable[[int], Sequence[Batch]]
  num_classes: int
  identity: Mapping[str, str]
  example_name: str
  description: str = ''
  output: str = 'softmax'
  model_arguments: Mapping[str, Any] = MappingProxyType({})
  test_batches: Callable[[int], Sequence[Batch]] | None = None
  partition: str = 'shared'
  label_frequencies: Callable[[], np.ndarray] | None = None
  tokenizer: Callable[[], Any] | None = None
  other_data: Callable[[str, str], Callable[[int], Sequence[dict]]] | None = (
      None
  )
  raw_inputs: Any = None


def host_copy(tree: PyTree, into: PyTree | None = None) -> PyTree:
  """Returns numpy copies of arrays, safe from what happens to `tree`.

  A copy, even on CPU, where `numpy.asarray` gives a view of the device buffer:
  the next step may reuse a donated buffer while a background thread still
  writes it to disk.

  Args:
    tree: Arrays.
    into: An earlier result for such a tree that nobody needs any more; on CPU
      its memory is used again. For 400 MB that is 3 to 20 times as fast as
      fresh memory, each page of which the kernel has to find and clear.
  """
  if into is None:
    return jax.tree.map(_host_copy, tree)
  return jax.tree.map(_host_copy, tree, into)


def _host_copy(x: Array, into: np.ndarray | None = None) -> np.ndarray:
  on_accelerator = isinstance(x, jax.Array) and any(
      device.platform != 'cpu' for device in x.devices()
  )
  if on_accelerator:
    return np.asarray(x)  # What comes from there is a copy already.
  if into is None:
    return np.array(x)
  np.copyto(into, np.asarray(x), casting='no')
  return into


def cast_floats(tree: PyTree, dtype: str | None) -> PyTree:
  """Casts the floating leaves (numpy) to `dtype`; None leaves them."""
  if dtype is None:
    return tree
  return jax.tree.map(
      lambda x: (
          x.astype(dtype, copy=False)
          if jnp.issubdtype(x.dtype, jnp.floating)
          else x
      ),
      tree,
  )
