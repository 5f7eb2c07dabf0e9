"""All groups of all seeds as one program: the updates are those made in turn.

To float32 rounding: in the sums of a batched product, XLA adds in another
order than in those of one. Stated at `CLOSE`.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base, evaluate
from codistill_jax import experiment as experiment_lib
from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.exchange import (
    Checkpoints,
    FixedTeachers,
    Predictions,
    fixed_teachers,
)
from codistill_jax.exchange.memory_exchange import memory_exchanges
from codistill_jax.exchange.plan import Plan
from codistill_jax.group import run_group
from codistill_jax.schedules import distill_weight
from experiments.studies import population
from experiments.studies.population_exchange import StackedExchange

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
SEEDS = (0, 3)
TX = optax.sgd(0.3)
LOG, EVAL, STEPS = 5, 8, 13


def clusters(group_id, group_batch, seed=0, **_):
  return toy.Clusters(group_batch, seed, group_id, weights=True)


def tokens(group_id, group_batch, seed=0, **_):
  return toy.Tokens(group_batch, group_id=100 * seed + group_id)


TASK = base.Task(
    train_stream=clusters,
    eval_batches=lambda rows: [toy.Clusters(rows).batch(n) for n in (7, 8)],
    num_classes=toy.CLASSES,
    identity={},
    example_name='point',
)


def experiment_of(model=toy.TWO_LAYERS, **kwargs):
  task = TASK
  if model is toy.RECURRENT:
    task = toy.TOKEN_TASK._replace(train_stream=tokens)
  return experiment_lib.Experiment(
      **{
          'task': task,
          'model': lambda num_classes: model,
          'optimizer': toy.SGD if model is toy.RECURRENT else TX,
          'distill_weight': distill_weight(weight=0.7, burn_in_steps=3),
          'num_steps': STEPS,
          'group_batch': 8,
          'seed': 1,
          'exchange': Checkpoints(2),
          'log_every': LOG,
          'eval_every': EVAL,
          'eval_batch': 4,
          'checkpoint_every': 100,
          **kwargs,
      }
  )


class Records(dict):
  """By member and step, what was told."""

  def __call__(self, seed, group_id, step, metrics):
    self.setdefault((seed, group_id, step), {}).update(metrics)


def together(experiment, num_groups=2, **kwargs):
  """The outcome of one program, and its records."""
  records = Records()
  outcome = population.train_population(
      experiment,
      experiment_lib.make_model(experiment),
      SEEDS,
      num_groups,
      records,
      **{'devices': jax.devices()[:1], **kwargs},
  )
  return outcome, records


def in_turn(experiment, num_groups=2, exchanges_of=None):
  """What each member has learnt, and all metrics of each of its updates."""
  learnt, metrics = {}, {}
  model = experiment_lib.make_model(experiment)
  step = experiment_lib.make_replicated_step(
      experiment, model, jax.devices()[:1]
  )
  for seed in SEEDS:
    run = dataclasses.replace(
        experiment_lib.in_lockstep(experiment),
        seed=experiment.seed + seed,
        data_seed=experiment.seed + seed,
    )
    groups = []
    if exchanges_of is None:
      exchanges = memory_exchanges(num_groups, plan=run.exchange)
    else:
      exchanges = exchanges_of(seed)
    for g, exchange in enumerate(exchanges):
      stream = experiment_lib.train_stream(run, g, num_groups)
      state = experiment_lib.init_state(
          run,
          model,
          jax.random.fold_in(jax.random.PRNGKey(run.seed), g),
          stream.batch(0),
          num_peers=len(exchange.in_use),
      )
      groups.append(
          run_group(
              step,
              base.host_copy(state),
              stream,
              num_steps=run.num_steps,
              exchange=exchange,
              distill_weight=run.distill_weight,
          )
      )
    for results in zip(*groups):
      for g, result in enumerate(results):
        metrics[seed, g, result.step] = jax.device_get(dict(result.metrics))
    for g, result in enumerate(results):
      learnt[seed, g] = base.host_copy(result.state.variables)
  return learnt, metrics


@functools.cache
def plain_teachers():
  return together(experiment_of(toy.RECURRENT), ensembles=True)


@functools.cache
def plain():
  return together(experiment_of())


CASES = {
    'fresh': (toy.TWO_LAYERS, 2, {}),
    'stale, halved': (
        toy.TWO_LAYERS,
        2,
        {'exchange': Checkpoints(2, 'lockstep', 4, 'bfloat16')},
    ),
    'ring': (toy.TWO_LAYERS, 3, {'exchange': Checkpoints(2, topology='ring')}),
    'asynchronous': (toy.TWO_LAYERS, 2, {'method': AsynchronousSgd(workers=2)}),
    'recurrent': (
        toy.RECURRENT,
        2,
        {'exchange': Checkpoints(2, 'lockstep', 2)},
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_one_program_makes_the_updates_that_are_made_in_turn(name):
  model, num_groups, settings = CASES[name]
  experiment = experiment_of(model, **settings)
  learnt, metrics = in_turn(experiment, num_groups)
  if name == 'fresh':
    outcome, records = plain()
  else:
    outcome, records = together(experiment, num_groups)
  assert (outcome.step, outcome.stopped, outcome.diverged_at) == (13, False, {})
  assert outcome.variables.keys() == learnt.keys()
  for member, expected in learnt.items():
    toy.assert_same(outcome.variables[member], expected, **CLOSE)
    check_records(experiment, member, records, metrics)


def check_records(experiment, member, records, metrics):
  """Those of a run directory: steps, keys, means of losses, ages."""
  logged = [5, *range(2, 13, 2), 10, 13]
  steps = sorted({*logged, 8})
  assert sorted(s for *m, s in records if tuple(m) == member) == steps
  before = 0
  for step in sorted(set(logged)):
    found = records[*member, step]
    newest = metrics[*member, step]
    for key, value in newest.items():
      if key.startswith('loss/'):
        seen = [metrics[*member, s] for s in range(before + 1, step + 1)]
        value = np.mean([m[key] for m in seen if key in m])
      if not key.endswith('_ms') and 'seconds' not in key:
        np.testing.assert_allclose(
            found[key], value, rtol=2e-4, err_msg=f'{key} at {step}'
        )
      assert key in found
    assert ('loss/distill' in found) == ('loss/distill' in newest)
    if step > 2:
      assert found['perf/steps_per_sec'] > 0
      assert found['perf/model_flops_per_step'] > 0
    before = step
  assert {s for *m, s in records if 'eval/loss' in records[*m, s]} == {8, 13}


def test_an_evaluation_is_that_of_each_model_and_of_its_ensemble():
  experiment = experiment_of(toy.RECURRENT)
  outcome, records = plain_teachers()
  assert population.ENSEMBLE not in (g for _, g in outcome.variables)
  for seed in SEEDS:
    members = [outcome.variables[seed, g] for g in (0, 1)]
    expected = evaluate.compare(
        toy.RECURRENT, members, experiment.task.eval_batches(4)
    )
    for group_id, values in [
        *enumerate(expected.members),
        (population.ENSEMBLE, expected.ensemble),
    ]:
      found = records[seed, group_id, STEPS]
      assert values.keys() <= found.keys()
      for key, value in values.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5)


def test_it_compiles_the_step_twice_and_all_else_once():
  plain()  # What jax itself compiles, for small things, and the start.
  stale = experiment_of(exchange=Checkpoints(2, 'lockstep', 4))
  with toy.compilations() as names:
    # Not where another test might have compiled some of it.
    together(stale, devices=jax.devices()[3:])
  assert sorted(names) == [
      'jit(_copied)',
      'jit(_gathered)',
      'jit(counted)',  # The step, in burn-in and with teachers.
      'jit(counted)',
      'jit(step)',  # Of evaluation.
  ]


def test_members_may_be_spread_over_devices():
  expected, _ = plain()
  found, records = together(experiment_of(), devices=jax.devices()[:2])
  toy.assert_same(dict(found.variables), dict(expected.variables), **CLOSE)
  assert records[3, 1, STEPS]['eval/loss'] > 0


def test_the_slot_of_an_absent_teacher_is_finite():
  """So that no loss has to know how to look away."""
  exchange = StackedExchange(
      Plan(1, 'lockstep'),
      2,
      2,
      jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  values = np.float32([[1.0], [2.0], [np.nan], [4.0]])
  exchange.publish(
      1, base.Variables({'w': jax.numpy.asarray(values)}), [True] * 4
  )
  teachers = exchange.fetch(1)
  found = np.asarray(teachers.variables.params['w'])
  np.testing.assert_array_equal(found.ravel(), [2.0, 1.0, 4.0, 0.0])
  np.testing.assert_array_equal(
      np.asarray(teachers.present_P).ravel(), [1.0, 1.0, 1.0, 0.0]
  )


def test_students_of_each_seed_learn_from_the_fixed_teachers_of_theirs(
    tmp_path,
):
  model = toy.RECURRENT
  learnt, _ = plain_teachers()
  for (seed, group_id), variables in learnt.variables.items():
    fixed_teachers.leave(
        tmp_path / f'{seed}', group_id, STEPS, variables, {'task': 'toy'}
    )
  loaded, start = [], toy.start(model)
  for seed in SEEDS:
    sources = fixed_teachers.find([tmp_path / f'{seed}'])
    loaded.append(
        fixed_teachers.load(sources, start.variables, {'task': 'toy'})
    )
  expected = [
      toy.stacked([learnt.variables[seed, g] for g in (0, 1)]) for seed in SEEDS
  ]
  toy.assert_same(loaded, expected)
  experiment = experiment_of(
      model, exchange=FixedTeachers([str(tmp_path / '0')])
  )
  exchanges = {
      seed: fixed_teachers.FixedExchange(sources, one)
      for seed, one in zip(SEEDS, loaded)
  }
  learnt, metrics = in_turn(experiment, 1, lambda seed: [exchanges[seed]])
  outcome, records = together(experiment, 1, teachers=loaded)
  for member, expected in learnt.items():
    toy.assert_same(outcome.variables[member], expected, **CLOSE)
    np.testing.assert_allclose(
        records[*member, 13]['loss/total'],
        np.mean([metrics[*member, s]['loss/total'] for s in (11, 12, 13)]),
        rtol=1e-4,
    )
    assert records[*member, 13]['exchange/peers_present'] == 2.0


# -- what goes wrong ----------------------------------------------------------


class Spoilt:
  """A stream with an infinite input in one batch."""

  def __init__(self, stream, at):
    self._stream, self._at = stream, at

  def batch(self, step):
    batch = self._stream.batch(step)
    if step == self._at:
      batch['inputs'] = np.full_like(batch['inputs'], np.nan)
      batch['weights'] = np.ones_like(batch['weights'])
    return batch


def test_one_that_diverges_stops_nobody_and_teaches_nobody():
  def stream(group_id, group_batch, seed, **_):
    healthy = clusters(group_id, group_batch, seed)
    return Spoilt(healthy, 6) if (group_id, seed) == (1, 4) else healthy

  expected, _ = plain()
  ill = TASK._replace(train_stream=stream)
  outcome, records = together(experiment_of(task=ill))
  assert outcome.diverged_at == {(3, 1): 7} and outcome.step == STEPS
  # The other seed knows nothing of it.
  for g in (0, 1):
    toy.assert_same(outcome.variables[0, g], expected.variables[0, g], **CLOSE)
  # Its peer goes on alone.
  survivor = jax.tree.leaves(outcome.variables[3, 0])
  assert all(np.isfinite(x).all() for x in survivor)
  present = {
      s: r['exchange/peers_present']
      for (seed, g, s), r in records.items()
      if (seed, g) == (3, 0) and 'exchange/peers_present' in r
  }
  assert present == {4: 1, 5: 1, 6: 1, 8: 1, 10: 0, 12: 0, 13: 0}
  assert max(s for seed, g, s in records if (seed, g) == (3, 1)) == 6


def test_if_all_diverge_it_ends():
  def stream(group_id, group_batch, **_):
    return Spoilt(clusters(group_id, group_batch), 2)

  outcome, records = together(
      experiment_of(task=TASK._replace(train_stream=stream))
  )
  assert outcome.step == 4 and set(outcome.diverged_at.values()) == {3}
  assert {s for _, _, s in records} == {2}


def test_it_stops_when_it_is_asked_to():
  asked = iter([False] * 4 + [True])
  outcome, records = together(experiment_of(), should_stop=lambda: next(asked))
  assert outcome.stopped and outcome.step == 4
  assert max(s for _, _, s in records) == 4


def test_groups_that_need_no_exchange_make_none():
  experiment = experiment_of(num_steps=4)
  learnt, _ = in_turn(experiment, 1)
  outcome, records = together(experiment, 1)
  for member, expected in learnt.items():
    toy.assert_same(outcome.variables[member], expected, **CLOSE)
  assert {s for _, _, s in records} == {4}


@pytest.mark.parametrize(
    'settings, num_groups, message',
    [
        (
            {'exchange': Checkpoints(topology=[[1], [0, 2], [0]])},
            3,
            'they have 1 and 2; train them',
        ),
        ({'exchange': Predictions()}, 2, 'exchange is Predictions.*; train'),
        (
            {'exchange': FixedTeachers(['x'])},
            2,
            'and 2 seeds a population has 2 teachers=, not 0',
        ),
    ],
)
def test_what_is_not_one_program_is_refused(settings, num_groups, message):
  with pytest.raises(ValueError, match=message):
    together(experiment_of(**settings), num_groups)
