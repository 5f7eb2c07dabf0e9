"""What is quick to compile, and slow to run: for what runs once."""

import functools

import jax
import jaxlib
import numpy as np

_OPTIONS = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
}
# See conftest.py.
if jaxlib.__version__ < '0.11':
  _OPTIONS['xla_cpu_use_fusion_emitters'] = False

jit = functools.partial(jax.jit, compiler_options=_OPTIONS)


def random_variables(model, batch, seed=0):
  """Variables in which no scale is 1, without the cost of compiling `init`."""
  rng = np.random.default_rng(seed)
  like = jax.eval_shape(model.init, jax.random.key(0), batch)

  def fill(path, x):
    noise = rng.normal(size=x.shape)
    if x.ndim > 1:
      noise /= np.sqrt(np.prod(x.shape[:-1]))
    elif str(path[-1].key).endswith(('scale', 'var')):
      noise = np.exp(0.3 * noise)
    return noise.astype(x.dtype)

  return jax.tree.map_with_path(fill, like)
