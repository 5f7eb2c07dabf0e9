"""The highest rate of matrix products that makers of accelerators state.

Dense, in FLOP/s of one jax device, by the dtype of what is multiplied. Products
of float32 are what jax makes of them by default: TensorFloat-32 on GPUs that
have it, one pass of bfloat16 on TPUs.

Sources: NVIDIA's data sheets of the V100, A100, L4, H100 and H200 (where they
state rates for sparse matrices, half of that); Google Cloud's pages of TPU v3
to v6e, system architecture. A chip of TPU v3 is two jax devices.
"""

from collections.abc import Mapping

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


def seconds(flops_by_dtype: Mapping[str, float], device_kind: str) -> float:
  """The least time in which one device could do that; NaN if unknown."""
  fitting = [kind for kind in PEAKS if _names(kind, device_kind)]
  peaks = PEAKS[max(fitting, key=len)] if fitting else {}
  return sum(
      flops / peaks.get(dtype, float('nan'))
      for dtype, flops in flops_by_dtype.items()
  )


def _names(kind: str, device_kind: str) -> bool:
  """Whether it begins with that, as a whole word: an L40 is no L4."""
  rest = device_kind.removeprefix(kind)
  return rest != device_kind and not rest[:1].isalnum()
