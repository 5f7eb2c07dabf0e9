"""Simulated replicas: parts in turn are real replicas side by side."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from codistill_jax import experiment as experiment_lib
from codistill_jax import jaxprs, one_program, peer_predictions, replicas
from codistill_jax import step as step_lib
from codistill_jax.base import REPLICA_AXIS, Model, Updates, Variables
from codistill_jax.models.linen import from_linen
from experiments.running import driver

VOCAB, UNITS = 7, 6


class Everything(nn.Module):
  """Recurrent, with batch normalisation and dropout; and a counter."""

  @nn.compact
  def __call__(self, tokens, carry, resets, train=False):
    calls = self.variable('counts', 'calls', lambda: jnp.zeros((), jnp.int32))
    if train:
      calls.value += 1
    embed = nn.Embed(VOCAB, UNITS)(tokens)
    recur = self.param('recur', nn.initializers.normal(0.3), (UNITS, UNITS))
    states = []
    for t in range(tokens.shape[1]):
      carry = jnp.where(resets[:, t, None], 0.0, carry)
      carry = jnp.tanh(embed[:, t] + carry @ recur)
      states.append(carry)
    x = nn.BatchNorm(not train, momentum=0.5)(jnp.stack(states, axis=1))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(VOCAB)(x), carry

  def init_carry(self, batch_size):
    return jnp.zeros((batch_size, UNITS))


EVERYTHING = from_linen(Everything())


def uneven(batch):
  """Weights that differ, and a part that is all padding."""
  weights = np.array(batch['weights'], np.float32)
  weights[:2] = 0.0
  weights[2:4] = 1.0
  weights[5] = 2.5
  return {**batch, 'weights': weights}


def group_of(devices, parts=1):
  step = step_lib.make_train_step(
      EVERYTHING, toy.SGD, axis_name=REPLICA_AXIS, simulated_replicas=parts
  )
  return replicas.PmapStep(step, jax.devices()[:devices])


@functools.cache
def start(seed=0):
  batch, key = toy.Tokens(8).batch(0), jax.random.PRNGKey(seed)
  return step_lib.init_state(EVERYTHING, toy.SGD, key, batch, num_peers=2)


def trained(step, steps=3):
  """States and metrics after each update; the first is a burn-in."""
  state, stream = step.place(start()), toy.Tokens(8)
  peers = [start(seed).variables for seed in (1, 2)]
  teachers = step.place_teachers(toy.stacked(peers))
  found = []
  for n in range(steps):
    now = teachers if n else None
    state, metrics = step(state, uneven(stream.batch(n)), now, 0.7)
    found.append((step.collect(state), dict(metrics)))
  return found


@functools.cache
def on_four_devices():
  return trained(group_of(4))


@pytest.mark.parametrize('devices, parts, steps', [(1, 4, 3), (2, 2, 1)])
def test_parts_of_few_devices_are_as_many_devices(devices, parts, steps):
  """Dropout, statistics, carries, uneven padding, teachers and metrics."""
  step = group_of(devices, parts)
  found = trained(step, steps)
  toy.assert_same(found, on_four_devices()[:steps], rtol=1e-4, atol=1e-6)
  assert found[-1][0].variables.model_state['counts']['calls'] == steps
  assert step.num_traces == min(steps, 2)


def test_the_parts_draw_and_normalise_apart():
  """Or the test above would compare two trainings without randomness."""
  states = [
      found[0][0] for found in (on_four_devices(), trained(group_of(1), 1))
  ]
  few, one = (
      state.variables.model_state['batch_stats']['BatchNorm_0']['var']
      for state in states
  )
  assert np.all(np.abs(few - one) > 1e-4)
  head, other = (
      state.variables.params['Dense_0']['kernel'] for state in states
  )
  assert np.abs(head - other).max() > 1e-2


@pytest.mark.parametrize('parts', [2, 8])
def test_parts_are_the_big_batch_of_a_model_without_either(parts):
  batch = uneven(toy.Clusters(8, weights=True).batch(0))
  state = toy.start(toy.TWO_LAYERS, num_peers=2)
  teachers = toy.stacked(toy.peers_of(toy.TWO_LAYERS, 2), [0, 1])
  step = functools.partial(step_lib.make_train_step, toy.TWO_LAYERS, toy.SGD)
  whole, found = (
      jax.jit(step(simulated_replicas=n))(state, batch, teachers, 0.7)
      for n in (1, parts)
  )
  toy.assert_same(found, whole, rtol=1e-5, atol=1e-6)


def test_groups_of_one_program_predict_part_by_part():
  """What peers predict is gathered for the rows of each part."""
  mix_GG = peer_predictions.mixing_matrix([(1,), (0,)])
  results = []
  for parts in (1, 2):
    step = step_lib.make_train_step(
        toy.RECURRENT,
        toy.SGD,
        axis_name=REPLICA_AXIS,
        simulated_replicas=parts,
    )
    program = one_program.Population(step, 2, devices=jax.devices()[:1])
    states = [toy.start(toy.RECURRENT, seed=g, num_peers=0) for g in (0, 1)]
    state, metrics = program(
        program.place(states),
        uneven(toy.Tokens(8).batch(0)),
        program.peers(mix_GG),
        0.7,
    )
    found = [program.collect(state, g) for g in (0, 1)]
    results.append((found, dict(metrics)))
  toy.assert_same(*results, rtol=1e-5, atol=1e-6)
  assert np.all(results[0][1]['loss/distill'] > 0)


# -- what it costs ------------------------------------------------------------


def traced(parts, teachers=None, model=toy.TWO_LAYERS, rows=8):
  step = step_lib.make_train_step(
      model, toy.SGD, axis_name=REPLICA_AXIS, simulated_replicas=parts
  )
  batch = toy.Clusters(rows, weights=True).batch(0)
  return jax.make_jaxpr(step, axis_env=[(REPLICA_AXIS, 1)])(
      toy.start(model), batch, teachers, 1.0
  ).jaxpr


def scans(jaxpr):
  found = [e.params for e in jaxprs.equations(jaxpr)]
  return [params['length'] for params in found if 'length' in params]


@pytest.mark.parametrize('peers', [0, 3])
def test_one_part_is_no_loop_and_several_take_as_many_flops(peers):
  teachers = peers and toy.stacked(toy.peers_of(toy.TWO_LAYERS, peers))
  one, four = (traced(n, teachers or None) for n in (1, 4))
  assert scans(one) == [] and scans(four) == [4]
  assert jaxprs.flops_of_jaxpr(four) == jaxprs.flops_of_jaxpr(one)
  assert jaxprs.flops_of_jaxpr(one).total > 0


def test_the_activations_of_one_part_exist_at_a_time():
  def temporary(parts):
    step = step_lib.make_train_step(
        toy.TWO_LAYERS, toy.SGD, simulated_replicas=parts
    )
    batch = toy.Clusters(4096).batch(0)
    args = toy.start(toy.TWO_LAYERS), batch, None, 0.0
    compiled = jax.jit(step).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # The rows themselves are copied into parts: they do not shrink.
  assert temporary(32) < temporary(1) / 2


# -- what is refused ----------------------------------------------------------


class Shared(nn.Module):
  """Batch normalisation over all replicas."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(not train, axis_name=REPLICA_AXIS if train else None)(x)
    return nn.Dense(toy.CLASSES)(x)


def numbered(variables, batch, carry, rng, train):
  del rng, train
  index = jax.lax.axis_index(REPLICA_AXIS).astype(jnp.float32)
  return batch['inputs'] @ variables.params['kernel'] + index, Updates(
      {}, carry
  )


def kernel(rng, batch):
  del rng, batch
  return Variables({'kernel': jnp.ones((toy.FEATURES, toy.CLASSES))})


@pytest.mark.parametrize(
    'model, primitive',
    [(from_linen(Shared()), 'psum'), (Model(kernel, numbered), 'axis_index')],
)
def test_a_model_that_looks_over_the_replicas_is_refused(model, primitive):
  message = (
      "^simulated_replicas=2, but the model computes over the axis 'replica' of"
      rf' all replicas \(by {primitive}.*simulated_replicas=1'
  )
  with pytest.raises(ValueError, match=message):
    traced(2, model=model)
  assert scans(traced(1, model=model)) == []


def test_rows_that_cannot_be_divided_are_refused_where_they_are_configured():
  experiment = experiment_lib.Experiment(
      task=toy.TOKEN_TASK,
      model=lambda num_classes: toy.RECURRENT,
      optimizer=optax.sgd(0.1),
      group_batch=8,
      simulated_replicas=3,
  )
  job = types.SimpleNamespace(
      experiment=experiment, train_step=types.SimpleNamespace(num_replicas=2)
  )
  message = (
      r'^group_batch=8 is not divisible by the 6 replicas of the group \(3'
      r' simulated on each of 2\); set group_batch to a multiple of 6$'
  )
  with pytest.raises(ValueError, match=message):
    driver.new_state(job)
  replicas.check_group_batch(12, 2, 3)


def test_rows_that_cannot_be_divided_are_refused_by_the_step_too():
  with pytest.raises(ValueError, match=r'8 rows of a replica.*replicas=3; set'):
    traced(3)


@pytest.mark.parametrize('number', [0, 2.0])
def test_a_number_of_parts_is_a_whole_one(number):
  with pytest.raises(ValueError, match=r'Experiment.simulated_replicas='):
    experiment_lib.Experiment(
        task=toy.TOKEN_TASK,
        model=lambda num_classes: toy.RECURRENT,
        optimizer=optax.sgd(0.1),
        simulated_replicas=number,
    )
