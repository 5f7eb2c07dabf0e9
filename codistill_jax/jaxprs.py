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

  def __add__(self, other: 'Flops') -> 'Flops':  # type: ignore[override]
    return Flops(
        dict(Counter(self.by_dtype) + Counter(other.by_dtype)),
        self.unknown_loops + other.unknown_loops,
    )

  def times(self, count: int) -> 'Flops':
    by_dtype = {dtype: count * n for dtype, n in self.by_dtype.items()}
    return self._replace(by_dtype=by_dtype)


_NONE = Flops({})


def flops(
    function: Callable[..., Any],
    *args: PyTree,
    axis_sizes: Mapping[str, int] = MappingProxyType({}),
) -> Flops:
  """Returns the FLOPs of a call with arguments of these shapes.

  A scan counts as often as it runs, a condition as its dearest branch, and the
  body of a `shard_map` or `pmap` once for each device.

  Args:
    function: Anything that `jax.jit` takes.
    *args: Pytrees of arrays or `jax.ShapeDtypeStruct`.
    axis_sizes: Named axes within which it is to be called, such as those of a
      pmap; it is counted once.
  """
  trace = jax.make_jaxpr(function, axis_env=list(axis_sizes.items()))
  return flops_of_jaxpr(trace(*args).jaxpr)


def flops_of_jaxpr(jaxpr: Jaxpr) -> Flops:
  """Returns the FLOPs of a trace; see `flops`."""
  return sum((_of_equation(e) for e in jaxpr.eqns), _NONE)


def has_convolution(function: Callable[..., Any], *args: PyTree) -> bool:
  """Returns whether a convolution occurs in a function of such arguments."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  found = equations(jax.make_jaxpr(function)(*shapes).jaxpr)
  return any(e.primitive.name == 'conv_general_dilated' for e in found)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
  """Returns the equations of a trace and of all that it calls, each once."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def axes_of(equation: Any) -> tuple:
  """Returns the named axes that an equation computes over."""
  names: list[str] = []
  for key in ('axes', 'axis_name'):
    found = equation.params.get(key, ())
    names += found if isinstance(found, tuple | list) else [found]
  return tuple(names)


def _of_equation(equation) -> Flops:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _product(equation, _dot_multiply_adds(equation))
  if name == 'conv_general_dilated':
    return _product(equation, _conv_multiply_adds(equation))
  inner = [flops_of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(params)]
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


_TERA = 1e12


def _gpu(half: float, tensor_float: float) -> dict[str, float]:
  return {
      'bfloat16': half * _TERA,
      'float16': half * _TERA,
      'float32': tensor_float * _TERA,
  }


def _tpu(bfloat16: float) -> dict[str, float]:
  return {'bfloat16': bfloat16 * _TERA, 'float32': bfloat16 * _TERA}


# By the beginning of `jax.Device.device_kind`; the longest that fits counts.
PEAKS: Mapping[str, Mapping[str, float]] = {
    'NVIDIA H200': _gpu(989.5, 494.7),
    'NVIDIA H100': _gpu(989.5, 494.7),  # SXM: 'NVIDIA H100 80GB HBM3'.
    'NVIDIA H100 PCIe': _gpu(756.0, 378.0),
    'NVIDIA H100 NVL': _gpu(835.5, 417.5),
    'NVIDIA A100': _gpu(312.0, 156.0),
    'NVIDIA L4': _gpu(121.0, 60.0),
    # Without bfloat16 and TensorFloat-32.
    'Tesla V100-SXM2': {'float16': 125.0 * _TERA, 'float32': 15.7 * _TERA},
    'Tesla V100-PCIE': {'float16': 112.0 * _TERA, 'float32': 14.0 * _TERA},
    'TPU v3': _tpu(61.5),
    'TPU v4': _tpu(275.0),
    'TPU v5 lite': _tpu(197.0),
    'TPU v5e': _tpu(197.0),
    'TPU v5': _tpu(459.0),
    'TPU v5p': _tpu(459.0),
    'TPU v6 lite': _tpu(918.0),
    'TPU v6e': _tpu(918.0),
}


def least_seconds(
    flops_by_dtype: Mapping[str, float], device_kind: str
) -> float:
  """Returns the seconds that one device needs at least; NaN if unknown."""
  fitting = [kind for kind in PEAKS if _names(kind, device_kind)]
  peaks = PEAKS[max(fitting, key=len)] if fitting else {}
  return sum(
      flops / peaks.get(dtype, float('nan'))
      for dtype, flops in flops_by_dtype.items()
  )


def _names(kind: str, device_kind: str) -> bool:
  """Returns whether it begins with that, as a whole word: an L40 is no L4."""
  rest = device_kind.removeprefix(kind)
  return rest != device_kind and not rest[:1].isalnum()
