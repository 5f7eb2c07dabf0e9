"""Codistillation in JAX and Flax: the public names."""

from codistill_jax.base import (
    HeadOutputs,
    Model,
    Task,
    Teachers,
    TrainState,
    Updates,
    Variables,
)
from codistill_jax.checkpoint import Checkpoints
from codistill_jax.checkpoint_exchange import CheckpointExchange, Waiting
from codistill_jax.exchange import Exchange, NoExchange, Plan
from codistill_jax.group import StepResult, run_group
from codistill_jax.losses import DISTILL_LOSSES
from codistill_jax.memory_exchange import MemoryExchange, memory_exchanges
from codistill_jax.models.linen import from_linen
from codistill_jax.replicas import REPLICA_AXIS, PmapStep
from codistill_jax.schedules import distill_weight
from codistill_jax.step import init_state, make_eval_step, make_train_step

__all__ = [
    'DISTILL_LOSSES',
    'REPLICA_AXIS',
    'CheckpointExchange',
    'Checkpoints',
    'Exchange',
    'HeadOutputs',
    'MemoryExchange',
    'Model',
    'NoExchange',
    'Plan',
    'PmapStep',
    'StepResult',
    'Task',
    'Teachers',
    'TrainState',
    'Updates',
    'Variables',
    'Waiting',
    'distill_weight',
    'from_linen',
    'init_state',
    'make_eval_step',
    'make_train_step',
    'memory_exchanges',
    'run_group',
]
