"""Schedules: where they switch, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codistill_jax import schedules


def values(schedule, steps):
  return [float(schedule(step)) for step in steps]


def test_constant_rises_linearly_then_stays():
  assert values(schedules.constant(0.5), [0, 1, 999]) == [0.5] * 3
  rate = schedules.constant(0.8, warmup_steps=4)
  expected = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
  np.testing.assert_allclose(values(rate, range(7)), expected, rtol=1e-6)


def test_warmup_cosine_peaks_after_warmup_and_ends_where_told():
  rate = schedules.warmup_cosine(1.0, 20, warmup_steps=10, end_fraction=0.1)
  np.testing.assert_allclose(
      values(rate, [0, 5, 10, 15, 20, 30]),
      [0.0, 0.5, 1.0, 0.55, 0.1, 0.1],
      rtol=1e-6,
  )


def test_linear_scaling_is_the_recipe_of_imagenet_in_steps():
  """Batch 8192: 156.4 steps an epoch, a rate of 0.1 * 32."""
  rate = schedules.linear_scaling(8192, 1_281_167)
  steps = [0, 391, 782, 4691, 4692, 9383, 9384, 12510, 12511]
  expected = [0.0, 1.6, 3.2, 3.2, 0.32, 0.32, 0.032, 0.032, 0.0032]
  np.testing.assert_allclose([rate(n) for n in steps], expected, rtol=1e-5)


def test_linear_scaling_of_a_small_run_has_other_epochs():
  rate = schedules.linear_scaling(
      32, 320, base_rate=0.4, warmup_epochs=0, boundary_epochs=(2,), factor=0.5
  )
  np.testing.assert_allclose(
      [rate(n) for n in (0, 19, 20)], [0.05, 0.05, 0.025]
  )


def test_step_decay_drops_at_each_boundary():
  rate = schedules.step_decay(1.0, [4, 6], factor=0.1, warmup_steps=2)
  np.testing.assert_allclose(
      values(rate, range(8)),
      [0.0, 0.5, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01],
      rtol=1e-6,
  )


def test_learning_rates_work_inside_an_optimiser():
  tx = optax.sgd(schedules.step_decay(1.0, [1], 0.5))
  params = {'w': jnp.ones(())}
  state = tx.init(params)
  got = []
  for _ in range(2):
    updates, state = jax.jit(tx.update)(params, state)
    got.append(float(updates['w']))
  np.testing.assert_allclose(got, [-1.0, -0.5])


def test_distill_weight_is_a_hard_switch_by_default():
  weight = schedules.distill_weight(0.7, burn_in_steps=3)
  assert [weight(step) for step in range(6)] == [0, 0, 0, 0.7, 0.7, 0.7]
  assert schedules.distill_weight()(0) == 1.0


def test_distill_weight_ramps_without_a_second_zero():
  weight = schedules.distill_weight(4.0, burn_in_steps=2, ramp_steps=3)
  expected = [0, 0, 1, 2, 3, 4, 4]
  np.testing.assert_allclose([weight(step) for step in range(7)], expected)


@pytest.mark.parametrize('ramp_steps', [0, 5])
def test_distill_weight_is_the_same_on_host_and_device(ramp_steps):
  weight = schedules.distill_weight(0.3, 4, ramp_steps)
  steps = jnp.arange(15)
  host = [weight(step) for step in range(15)]
  assert all(type(x) is float for x in host)
  assert type(weight(np.int64(3))) is float
  np.testing.assert_allclose(jax.jit(jax.vmap(weight))(steps), host, rtol=1e-6)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: schedules.constant(-1.0), 'learning_rate'),
        (lambda: schedules.constant(float('nan')), 'learning_rate'),
        (lambda: schedules.constant(1.0, warmup_steps=-1), 'warmup_steps'),
        (lambda: schedules.warmup_cosine(1.0, 5, 5), 'less than total_steps=5'),
        (lambda: schedules.warmup_cosine(1.0, 5, 1, 2.0), 'end_fraction'),
        (lambda: schedules.step_decay(1.0, [3, 3]), 'increase'),
        (lambda: schedules.linear_scaling(0, 9), 'group_batch must be at'),
        (lambda: schedules.linear_scaling(9, 9.0), 'examples_per_epoch'),
        (lambda: schedules.linear_scaling(9, 9, -1.0), 'base_rate'),
        (lambda: schedules.linear_scaling(999, 9), 'increase'),
        (lambda: schedules.step_decay(1.0, [3], warmup_steps=3), 'beyond'),
        (lambda: schedules.step_decay(1.0, [3], factor=0.0), 'factor'),
        (lambda: schedules.distill_weight(-0.1), 'weight must be finite'),
        (lambda: schedules.distill_weight(float('inf')), 'weight'),
        (lambda: schedules.distill_weight(1.0, -1), 'burn_in_steps'),
        (lambda: schedules.distill_weight(1.0, 1.5), 'integer, got 1.5'),
        (lambda: schedules.distill_weight(1.0, 0, True), 'ramp_steps'),
    ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
