"""`base.Model` from a flax.linen module.

A module takes `__call__(inputs)` and returns logits (or `base.HeadOutputs`).
More is found by the names in its signature:

* `train`, `training`, `is_training`: it is told whether it trains, for dropout
  and batch statistics; by `deterministic`, `use_running_average` and
  `inference` whether it does not.
* `carry`: the module is recurrent and returns `(outputs, carry)`. If it also
  takes `resets`, it gets the batch's (or None): True where the state of a row
  is zero before that input.

Collections other than 'params', such as 'batch_stats', are the model state:
updated in training, used and left alone in evaluation.

Shape suffixes: B rows of a batch.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from codistill_jax import base

# What an argument of that name is in training; in evaluation the opposite.
_IN_TRAINING = {
    'train': True,
    'training': True,
    'is_training': True,
    'deterministic': False,
    'use_running_average': False,
    'inference': False,
}


def from_linen(
    module: nn.Module,
    *,
    input_key: str = 'inputs',
    init_carry: Callable[[int], base.PyTree] | None = None,
    rng_names: Sequence[str] = ('dropout',),
) -> base.Model:
  """Makes a model of a flax.linen module.

  Args:
    module: As the head of this file says.
    input_key: The entry of a batch that the module is called with; an array or
      a pytree of arrays with leading axis B.
    init_carry: For a recurrent module, `init_carry(batch_size)` gives the state
      before the first input; if None, the module's method of that name.
    rng_names: Flax random streams that the module draws from in training.

  Raises:
    ValueError: If the module is recurrent and has no `init_carry`, takes
      arguments that nobody gives, or is none; by the model, if it has dropout
      or moving statistics and is not told whether it trains.
  """
  if not isinstance(module, nn.Module):
    kind = module if isinstance(module, type) else type(module)
    raise ValueError(
        'Expected an instance of a flax.linen module, got'
        f' {"the class" if kind is module else "a"} {kind.__module__}.'
        f'{kind.__qualname__}; of flax.nnx and other libraries make a'
        ' Model(init, apply) of your own'
    )
  name = type(module).__name__
  takes = _arguments(module)
  told = [x for x in takes if x in _IN_TRAINING]
  recurrent = 'carry' in takes
  if recurrent:
    init_carry = init_carry or getattr(module, 'init_carry', None)
    if init_carry is None:
      raise ValueError(
          f'{name} takes a carry: give it a method'
          ' init_carry(batch_size), or from_linen the argument init_carry.'
      )

  def call(method, variables, batch, carry, train, **kwargs):
    if input_key not in batch:
      raise ValueError(
          f'Expected a batch with {input_key!r}, got {sorted(batch)}; set'
          ' input_key.'
      )
    named = {x: _IN_TRAINING[x] == train for x in told}
    if recurrent:
      named['carry'] = carry
    if recurrent and 'resets' in takes:
      named['resets'] = batch.get('resets')
    try:
      with contextlib.nullcontext() if told else _refusing(name):
        return method(variables, batch[input_key], **named, **kwargs)
    except flax.errors.FlaxError as e:
      raise ValueError(f'{name}: {e}') from e

  def init(rng, batch):
    # One row is enough for shapes, and the group batch may be huge.
    row = jax.tree.map(lambda x: x[:1], dict(batch))
    carry = init_carry(1) if recurrent and init_carry else ()
    state = dict(call(module.init, {'params': rng}, row, carry, False))
    return base.Variables(params=state.pop('params', {}), model_state=state)

  def apply(variables, batch, carry, rng, train):
    rngs = {}
    if train and rng is not None:
      rngs = {
          name: jax.random.fold_in(rng, i) for i, name in enumerate(rng_names)
      }
    # Where nothing is mutable, flax returns the outputs alone.
    mutable = list(variables.model_state) if train else []
    result = call(
        module.apply,
        {'params': variables.params, **variables.model_state},
        batch,
        carry,
        train,
        rngs=rngs,
        mutable=mutable or False,
    )
    outputs, state = result if mutable else (result, variables.model_state)
    if recurrent:
      if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise ValueError(
            f'{name} takes a carry: it returns (outputs, carry), got'
            f' {base.form_of(outputs)}.'
        )
      outputs, carry = outputs
    return outputs, base.Updates(model_state=dict(state), carry=carry)

  if recurrent and init_carry:
    return base.Model(init, apply, init_carry)
  return base.Model(init, apply)


def _arguments(module: nn.Module) -> list[str]:
  """Returns what a module takes by name, besides its inputs."""
  signature = inspect.signature(type(module).__call__).parameters
  _, *parameters = signature.values()
  if not parameters:
    raise ValueError(f'{type(module).__name__} takes no inputs.')
  first, *rest = parameters
  unknown = [
      x.name
      for x in rest
      if x.default is x.empty
      and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
      and x.name not in ('carry', 'resets', *_IN_TRAINING)
  ]
  if unknown or first.name == 'carry':
    raise ValueError(
        f'{type(module).__name__} takes'
        f' ({", ".join(x.name for x in parameters)}); the first argument is the'
        ' inputs, and nobody gives others than'
        f' carry, resets, {", ".join(_IN_TRAINING)}: wrap it in a module'
    )
  return [x.name for x in rest]


def _refusing(name: str) -> contextlib.AbstractContextManager:
  """Refuses layers that must know whether they train, in a module that doesn't.

  Else dropout would be off and statistics stand still, without a word.
  """

  def call(next_call, args, kwargs, context):
    layer = context.module
    has = vars(layer)  # Else a module of nnx would set itself up, again.
    rate = has.get('rate') or has.get('dropout_rate')
    if 'use_running_average' in has or ('deterministic' in has and rate):
      raise ValueError(
          f'{name} has a {type(layer).__name__} and is not told'
          ' whether it trains: give its __call__ an argument train=False (or'
          ' deterministic=True), and the layer what follows from it.'
      )
    return next_call(*args, **kwargs)

  return nn.intercept_methods(call)


# --- Arguments of the models of this package ----------------------------------


def check_whole_numbers(least: int = 1, **values: int) -> None:
  """Raises ValueError unless all values are whole numbers from `least` on."""
  for name, value in values.items():
    if type(value) is not int or value < least:
      raise ValueError(
          f'{name} must be a whole number of at least {least}, got {value!r}.'
      )


def check_dropout(dropout: float) -> None:
  """Raises ValueError unless it is a probability below 1."""
  if not 0.0 <= dropout < 1.0:
    raise ValueError(f'dropout must lie in [0, 1), got {dropout}.')


def checked_dtype(dtype: str) -> jnp.dtype:
  """Returns the dtype of products and activations.

  Raises:
    ValueError: If it is neither 'float32' nor 'bfloat16'.
  """
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")
  return jnp.dtype(dtype)
