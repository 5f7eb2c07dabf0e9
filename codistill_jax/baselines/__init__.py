"""Methods of a group that are no synchronous SGD: values of Experiment.method."""

from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.baselines.diloco import Diloco

__all__ = ['AsynchronousSgd', 'Diloco']
