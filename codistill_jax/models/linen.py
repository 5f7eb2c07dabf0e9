"""`base.Model` from a flax.linen module.

A module takes `__call__(inputs)` and returns logits (or `base.HeadOutputs`).
Two things are found in its signature:

* `train`: the module is told whether it trains (dropout, batch statistics).
* `carry`: the module is recurrent, `__call__(inputs, carry)`, and returns
  `(outputs, carry)`. If it also takes `resets`, it gets the batch's (or None):
  True where the state of a row is zero before that input.

Collections other than 'params', such as 'batch_stats', are the model state:
updated in training, used and left alone in evaluation.

Shape suffixes: B rows of a batch.
"""

import inspect
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from codistill_jax import base


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
    ValueError: If the module is recurrent and has no `init_carry`.
  """
  accepts = inspect.signature(type(module).__call__).parameters
  recurrent = 'carry' in accepts
  if recurrent:
    init_carry = init_carry or getattr(module, 'init_carry', None)
    if init_carry is None:
      raise ValueError(
          f'{type(module).__name__} takes a carry: give it a method'
          ' init_carry(batch_size), or from_linen the argument init_carry.'
      )

  def arguments(batch, carry, train):
    if input_key not in batch:
      raise ValueError(
          f'Expected a batch with {input_key!r}, got {sorted(batch)}; set'
          ' input_key.'
      )
    positional = (batch[input_key], carry) if recurrent else (batch[input_key],)
    named = {'train': train} if 'train' in accepts else {}
    if recurrent and 'resets' in accepts:
      named['resets'] = batch.get('resets')
    return positional, named

  def init(rng, batch):
    # One row is enough for shapes, and the group batch may be huge.
    row = jax.tree.map(lambda x: x[:1], dict(batch))
    positional, named = arguments(
        row, init_carry(1) if recurrent else (), False
    )
    state = dict(module.init({'params': rng}, *positional, **named))
    return base.Variables(params=state.pop('params', {}), model_state=state)

  def apply(variables, batch, carry, rng, train):
    positional, named = arguments(batch, carry, train)
    rngs = {}
    if train and rng is not None:
      rngs = {
          name: jax.random.fold_in(rng, i) for i, name in enumerate(rng_names)
      }
    # Where nothing is mutable, flax returns the outputs alone.
    mutable = list(variables.model_state) if train else []
    result = module.apply(
        {'params': variables.params, **variables.model_state},
        *positional,
        rngs=rngs,
        mutable=mutable or False,
        **named,
    )
    outputs, state = result if mutable else (result, variables.model_state)
    if recurrent:
      outputs, carry = outputs
    return outputs, base.Updates(model_state=dict(state), carry=carry)

  if recurrent:
    return base.Model(init, apply, init_carry)
  return base.Model(init, apply)


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
