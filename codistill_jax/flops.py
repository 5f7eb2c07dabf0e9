"""Model FLOPs of a function, counted from its trace; nothing is compiled.

Counted are matrix products and convolutions, with two operations for each
multiply-add, at the sizes that are written down: not what a compiler makes of
them, nor element-wise work. The gradient counts if what is traced contains it,
as a train step does. A convolution takes nothing for padding and holes.

XLA's own `compiled.cost_analysis()` counts the body of a loop once, however
often it runs: of a scan over 100 tokens it reports a hundredth.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params

from codistill_jax.base import PyTree


class Flops(NamedTuple):
  """What a function takes.

  Attributes:
    by_dtype: FLOPs by the dtype of what is multiplied, such as 'bfloat16'; of
      two dtypes the wider one.
    unknown_loops: `while` loops, whose body is counted once, because how often
      it runs is not in the trace.
  """

  by_dtype: Mapping[str, float]
  unknown_loops: int = 0

  @property
  def total(self) -> float:
    return sum(self.by_dtype.values())

  def __add__(self, other: 'Flops') -> 'Flops':
    return Flops(
        dict(Counter(self.by_dtype) + Counter(other.by_dtype)),
        self.unknown_loops + other.unknown_loops,
    )

  def times(self, count: int) -> 'Flops':
    by_dtype = {dtype: count * n for dtype, n in self.by_dtype.items()}
    return self._replace(by_dtype=by_dtype)


_NONE = Flops({})


def count(
    function: Callable[..., Any],
    *args: PyTree,
    axis_sizes: Mapping[str, int] = MappingProxyType({}),
) -> Flops:
  """The FLOPs of a call with arguments of these shapes.

  A scan counts as often as it runs, a condition as its dearest branch, and the
  body of a `shard_map` or `pmap` once for each device.

  Args:
    function: Anything that `jax.jit` takes.
    *args: Pytrees of arrays or `jax.ShapeDtypeStruct`.
    axis_sizes: Named axes within which it is to be called, such as those of a
      pmap; it is counted once.
  """
  trace = jax.make_jaxpr(function, axis_env=list(axis_sizes.items()))
  return of_jaxpr(trace(*args).jaxpr)


def of_jaxpr(jaxpr: Jaxpr) -> Flops:
  """The FLOPs of a trace; see `count`."""
  return sum((_of_equation(e) for e in jaxpr.eqns), _NONE)


def has_convolution(function: Callable[..., Any], *args: PyTree) -> bool:
  """Whether a convolution occurs in a function of such arguments."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  found = equations(jax.make_jaxpr(function)(*shapes).jaxpr)
  return any(e.primitive.name == 'conv_general_dilated' for e in found)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
  """The equations of a trace and of all that it calls, each once."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def _of_equation(equation) -> Flops:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _product(equation, _dot_multiply_adds(equation))
  if name == 'conv_general_dilated':
    return _product(equation, _conv_multiply_adds(equation))
  inner = [of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(params)]
  if name == 'cond':
    return max(inner, key=lambda flops: flops.total)
  found = sum(inner, _NONE)
  if name == 'scan':
    return found.times(params['length'])
  if name == 'while':
    return found._replace(unknown_loops=found.unknown_loops + 1)
  if name == 'shard_map':
    sizes = params['mesh'].shape
    return found.times(math.prod(sizes[a] for a in params['newly_manual_axes']))
  return found


def _product(equation, multiply_adds: int) -> Flops:
  dtype = jnp.promote_types(*(v.aval.dtype for v in equation.invars))
  return Flops({dtype.name: 2.0 * multiply_adds})


def _dot_multiply_adds(equation) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  lhs = equation.invars[0].aval.shape
  each = math.prod(lhs[axis] for axis in contracted)
  return each * math.prod(equation.outvars[0].aval.shape)


def _conv_multiply_adds(equation) -> int:
  """Each output adds up its group's input features at each tap that is real."""
  _, kernel_spec, out_spec = equation.params['dimension_numbers']
  kernel = equation.invars[1].aval.shape
  out = equation.outvars[0].aval.shape
  features = out[out_spec[0]] * out[out_spec[1]] * kernel[kernel_spec[1]]
  return features * math.prod(_real_taps(equation))


def _real_taps(equation) -> Iterator[int]:
  """For each spatial axis, pairs of an output and a tap on a real input."""
  params = equation.params
  specs = params['dimension_numbers']
  avals = [v.aval for v in (*equation.invars, *equation.outvars)]
  sizes = [
      [aval.shape[axis] for axis in spec[2:]]
      for aval, spec in zip(avals, specs)
  ]
  for inputs, taps, outputs, stride, (before, _), hole, spread in zip(
      *sizes,
      params['window_strides'],
      params['padding'],
      params['lhs_dilation'],
      params['rhs_dilation'],
  ):
    at = np.add.outer(np.arange(outputs) * stride, np.arange(taps) * spread)
    at -= before
    real = (at >= 0) & (at <= (inputs - 1) * hole) & (at % hole == 0)
    yield int(np.count_nonzero(real))
