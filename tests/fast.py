"""`jax.jit` for what runs once: quick to compile, slow to run."""

import functools

import jax

jit = functools.partial(
    jax.jit,
    compiler_options={
        'xla_backend_optimization_level': 0,
        'xla_llvm_disable_expensive_passes': True,
        'xla_cpu_use_fusion_emitters': False,
    },
)
