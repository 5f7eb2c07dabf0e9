"""Baselines: how a group updates, a value of `Experiment.method`."""

from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.baselines.diloco import Diloco

__all__ = ['AsynchronousSgd', 'Diloco']
