"""What groups give each other, and when.

A configuration says `Experiment.exchange = @exchange.Checkpoints()`, or another
kind. `plan` has the interface and the times, `kinds` the choices.
"""

from codistill_jax.exchange.kinds import (
    Checkpoints,
    FixedTeachers,
    Kind,
    Predictions,
)

__all__ = ['Checkpoints', 'FixedTeachers', 'Kind', 'Predictions']
