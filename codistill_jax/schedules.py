"""Learning rates and the distill weight, as functions of the step. Pure.

`step` is the number of updates done before the one the value is used in: the
first update of a run asks for step 0. Learning rates are optax schedules and go
where optax takes one.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import optax

from codistill_jax import base

Schedule = Callable[[base.Array], base.Array]


def constant(learning_rate: float, warmup_steps: int = 0) -> Schedule:
  """Returns a constant rate, after a linear rise from 0 over `warmup_steps`."""
  _check_not_negative('learning_rate', learning_rate)
  return _after_warmup(
      optax.constant_schedule(learning_rate), learning_rate, warmup_steps
  )


def warmup_cosine(
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    end_fraction: float = 0.0,
) -> Schedule:
  """Returns a linear rise from 0, then half a cosine down.

  Args:
    learning_rate: The rate at `warmup_steps`, the highest.
    total_steps: Length of the run, warm-up included.
    warmup_steps: Length of the rise; fewer than `total_steps`.
    end_fraction: Share of `learning_rate` that is left at `total_steps`.

  Raises:
    ValueError: If an argument is out of range.
  """
  _check_not_negative('learning_rate', learning_rate)
  _check_count('total_steps', total_steps)
  _check_count('warmup_steps', warmup_steps)
  if warmup_steps >= total_steps:
    raise ValueError(
        f'warmup_steps={warmup_steps} must be less than'
        f' total_steps={total_steps}.'
    )
  if not 0.0 <= end_fraction <= 1.0:
    raise ValueError(f'end_fraction must lie in [0, 1], got {end_fraction}.')
  cosine = optax.cosine_decay_schedule(
      learning_rate, total_steps - warmup_steps, alpha=end_fraction
  )
  return _after_warmup(cosine, learning_rate, warmup_steps)


def step_decay(
    learning_rate: float,
    boundaries: Sequence[int],
    factor: float = 0.1,
    warmup_steps: int = 0,
) -> Schedule:
  """Returns a rate that is multiplied by `factor` from each boundary on.

  With a warm-up this is the recipe of Goyal et al. 2017.

  Args:
    learning_rate: The rate before the first boundary.
    boundaries: Increasing steps, counted from step 0 (warm-up included).
    factor: In (0, 1].
    warmup_steps: Length of a linear rise from 0, ending before the first
      boundary.

  Raises:
    ValueError: If an argument is out of range.
  """
  _check_not_negative('learning_rate', learning_rate)
  _check_count('warmup_steps', warmup_steps)
  for boundary in boundaries:
    _check_count('boundaries', boundary)
  edges = [warmup_steps, *boundaries]
  if any(a >= b for a, b in itertools.pairwise(edges)):
    raise ValueError(
        'boundaries must increase and lie beyond'
        f' warmup_steps={warmup_steps}, got {list(boundaries)}.'
    )
  if not 0.0 < factor <= 1.0:
    raise ValueError(f'factor must lie in (0, 1], got {factor}.')
  shifted = {boundary - warmup_steps: factor for boundary in boundaries}
  decay = optax.piecewise_constant_schedule(learning_rate, shifted)
  return _after_warmup(decay, learning_rate, warmup_steps)


def linear_scaling(
    group_batch: int,
    examples_per_epoch: int,
    base_rate: float = 0.1,
    base_batch: int = 256,
    warmup_epochs: float = 5,
    boundary_epochs: Sequence[float] = (30, 60, 80),
    factor: float = 0.1,
) -> Schedule:
  """Returns the rate of Goyal et al. 2017 for ImageNet, a `step_decay`.

  The highest rate is base_rate * group_batch / base_batch (the linear scaling
  rule). The warm-up begins at 0, theirs at `base_rate`.

  Args:
    group_batch: Examples per update of one group.
    examples_per_epoch: Examples of the training split; of the part of it that
      one group reads, if groups have disjoint parts.
    base_rate: The rate at `base_batch`.
    base_batch: In examples.
    warmup_epochs: Length of the linear rise.
    boundary_epochs: Where the rate is multiplied by `factor`, from the start.
    factor: In (0, 1].

  Raises:
    ValueError: If an argument is out of range, or if warm-up and boundaries are
      less than a step apart.
  """
  _check_not_negative('base_rate', base_rate)
  for name, value in [
      ('group_batch', group_batch),
      ('examples_per_epoch', examples_per_epoch),
      ('base_batch', base_batch),
  ]:
    _check_count(name, value)
    if not value:
      raise ValueError(f'{name} must be at least 1, got 0.')
  steps = lambda epochs: round(epochs * examples_per_epoch / group_batch)
  return step_decay(
      base_rate * group_batch / base_batch,
      [steps(epochs) for epochs in boundary_epochs],
      factor,
      steps(warmup_epochs),
  )


def distill_weight(
    weight: float = 1.0, burn_in_steps: int = 0, ramp_steps: int = 0
) -> Callable[[base.Array], base.Array]:
  """Returns the factor of the distillation loss as a function of the step.

  0 for the first `burn_in_steps` updates, then `weight`: a hard switch, as in
  Anil et al. 2018. With `ramp_steps`, that many updates in between rise
  linearly, none of them with weight 0.

  Args:
    weight: Final factor; 0 switches distillation off.
    burn_in_steps: Number of updates without distillation.
    ramp_steps: Number of updates with less than the full weight after them.

  Returns:
    `schedule(step)`: a Python float for a Python (or numpy) integer, a float32
    array for a jax array, traced or not.

  Raises:
    ValueError: If an argument is negative or not finite, or a count of steps
      is not an integer.
  """
  _check_not_negative('weight', weight)
  _check_count('burn_in_steps', burn_in_steps)
  _check_count('ramp_steps', ramp_steps)

  def schedule(step):
    if isinstance(step, int | np.integer):
      turns = max(int(step) - burn_in_steps + 1, 0)
      return float(weight) * min(turns / (ramp_steps + 1), 1.0)
    turns = jnp.asarray(step, jnp.int32) - (burn_in_steps - 1)
    share = turns.astype(jnp.float32) / (ramp_steps + 1)
    return jnp.float32(weight) * jnp.clip(share, 0.0, 1.0)

  return schedule


def _after_warmup(schedule, learning_rate, warmup_steps):
  _check_count('warmup_steps', warmup_steps)
  if not warmup_steps:
    return schedule
  rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([rise, schedule], [warmup_steps])


def _check_not_negative(name, value):
  if not (math.isfinite(value) and value >= 0):
    raise ValueError(f'{name} must be finite and >= 0, got {value}.')


def _check_count(name, value):
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise ValueError(f'{name} must be an integer, got {value!r}.')
  if value < 0:
    raise ValueError(f'{name} must be >= 0, got {value}.')
