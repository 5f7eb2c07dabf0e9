"""All seeds as one program: the updates are those that are made in turn.

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

from codistill_jax import base
from codistill_jax import experiment as experiment_lib
from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.exchange.kinds import Checkpoints, Predictions
from codistill_jax.exchange.plan import Plan
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.group import run_group
from codistill_jax.schedules import distill_weight
from experiments.studies import seeds_together

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
SEEDS, STEPS = (0, 3), 13


class Clusters(toy.Clusters):
  """The rows of one worker, of an update of all."""

  rows = slice(None)

  def batch(self, step):
    return {k: x[self.rows] for k, x in super().batch(step).items()}


def clusters(group_id, group_batch, seed=0, rows=None, **_):
  stream = Clusters(group_batch, seed, group_id, weights=True)
  stream.rows = rows or slice(None)
  return stream


def tokens(group_id, group_batch, seed=0, **_):
  return toy.Tokens(group_batch, group_id=100 * seed + group_id)


TASK = base.Task(
    train_stream=clusters,
    eval_batches=lambda rows: [],
    num_classes=toy.CLASSES,
    identity={},
    example_name='point',
)


def experiments_of(model=toy.TWO_LAYERS, **kwargs):
  """One of each seed."""
  recurrent = model is toy.RECURRENT
  task = toy.TOKEN_TASK._replace(train_stream=tokens) if recurrent else TASK
  first = experiment_lib.Experiment(
      **{
          'task': task,
          'model': lambda num_classes: model,
          'optimizer': toy.SGD if recurrent else optax.sgd(0.3),
          'distill_weight': distill_weight(weight=0.7, burn_in_steps=3),
          'num_steps': STEPS,
          'group_batch': 8,
          'exchange': Checkpoints(2, 'lockstep'),
          **kwargs,
      }
  )
  return [dataclasses.replace(first, seed=s, data_seed=s) for s in SEEDS]


def generators(members, num_steps=STEPS, starts=None):
  """The loop of each member: by seed and group."""
  num_groups = 1 + max(group_id for _, group_id in members)
  starts = starts or {
      member: start_of(run, member[1], num_groups)
      for member, (run, *_) in members.items()
  }
  return {
      member: run_group(
          step,
          starts[member],
          stream,
          num_steps=num_steps,
          exchange=exchange,
          distill_weight=run.distill_weight,
      )
      for member, (run, step, stream, exchange) in members.items()
  }


def trained(members, num_steps=STEPS, starts=None):
  """What all members are in the end, and the metrics of each update."""
  groups = generators(members, num_steps, starts)
  metrics, states = {}, {}
  for results in zip(*groups.values()):
    for member, result in zip(groups, results):
      found = {k: float(v) for k, v in result.metrics.items()}
      metrics[*member, result.step] = found
      if result.step == num_steps:
        states[member] = members[member][1].collect(result.state)
  return states, metrics


@functools.cache
def model_of(make):
  return make(toy.CLASSES)


def start_of(run, group_id, num_groups):
  return base.host_copy(
      experiment_lib.init_state(
          run,
          model_of(run.model),
          jax.random.fold_in(jax.random.PRNGKey(run.seed), group_id),
          experiment_lib.first_row(run, num_groups),
          num_peers=run.exchange.num_teachers(group_id, num_groups),
      )
  )


def together(experiments, num_groups=2, devices=None):
  """Experiment, seat, stream and exchange of each member of one program."""
  places, stream = seeds_together.make_places(
      experiments,
      model_of(experiments[0].model),
      num_groups,
      devices or jax.devices()[:1],
  )
  return {
      (run.seed, g): (run, seat, stream, exchange)
      for run, of_seed in zip(experiments, places)
      for g, (seat, exchange) in enumerate(of_seed)
  }


def in_turn(experiments, num_groups=2):
  """The same of groups that are no program."""
  first = experiments[0]
  step = experiment_lib.make_replicated_step(
      first, model_of(first.model), jax.devices()[:1]
  )
  return {
      (run.seed, g): (
          run,
          step,
          experiment_lib.train_stream(run, g, num_groups),
          exchange,
      )
      for run in experiments
      for g, exchange in enumerate(
          memory_exchanges(num_groups, plan=run.exchange)
      )
  }


@functools.cache
def plain():
  return trained(together(experiments_of()))


def assert_same_variables(found, expected):
  assert found.keys() == expected.keys()
  for member in expected:
    toy.assert_same(
        found[member].variables, expected[member].variables, **CLOSE
    )


CASES = {
    'fresh': (toy.TWO_LAYERS, 2, {}),
    'stale, halved': (
        toy.TWO_LAYERS,
        2,
        {'exchange': Checkpoints(2, 'lockstep', 4, 'bfloat16')},
    ),
    'ring': (
        toy.TWO_LAYERS,
        3,
        {'exchange': Checkpoints(2, 'lockstep', topology='ring')},
    ),
    'asynchronous': (toy.TWO_LAYERS, 2, {'method': AsynchronousSgd(workers=2)}),
    'recurrent': (
        toy.RECURRENT,
        2,
        {'exchange': Checkpoints(2, 'lockstep', 2)},
    ),
    'alone': (toy.TWO_LAYERS, 1, {}),
}


@pytest.mark.parametrize('name', CASES)
def test_one_program_makes_the_updates_that_are_made_in_turn(name):
  model, num_groups, settings = CASES[name]
  experiments = experiments_of(model, **settings)
  expected, metrics = trained(in_turn(experiments, num_groups))
  found, records = (
      plain() if name == 'fresh' else trained(together(experiments, num_groups))
  )
  assert_same_variables(found, expected)
  assert records.keys() == metrics.keys()
  for at, values in metrics.items():
    if num_groups == 1:  # Nobody reads it: here it is not published.
      values.pop('exchange/publication_bytes', None)
    assert records[at].keys() == values.keys()
    for key, value in values.items():
      if not key.endswith('_ms') and 'seconds' not in key:
        np.testing.assert_allclose(
            records[at][key], value, rtol=2e-4, err_msg=f'{key} at {at}'
        )


def test_it_compiles_the_step_twice_and_all_else_once():
  plain()  # What jax itself compiles, for small things, and the start.
  members = together(
      experiments_of(exchange=Checkpoints(2, 'lockstep', 4)),
      devices=jax.devices()[3:],
  )
  groups = generators(members)
  with toy.compilations() as names:
    # Not where another test might have compiled some of it.
    for _ in zip(*groups.values()):
      pass
  assert sorted(n for n in names if n != 'jit(_rows)') == [
      'jit(_copied)',
      'jit(_gathered)',
      'jit(counted)',  # The step, in burn-in and with teachers.
      'jit(counted)',
  ]


def test_members_may_be_spread_over_devices():
  expected, _ = plain()
  found, _ = trained(together(experiments_of(), devices=jax.devices()[:2]))
  assert_same_variables(found, expected)


@pytest.mark.parametrize(
    'until, settings', [(4, {}), (8, {}), (1, {}), (6, {'num_groups': 1})]
)
def test_a_run_that_goes_on_is_the_run_that_never_stopped(until, settings):
  experiments = experiments_of()
  assert seeds_together.can_resume(experiments[0].exchange, until)
  starts, _ = trained(together(experiments, **settings), until)
  found, _ = trained(together(experiments, **settings), starts=starts)
  expected, _ = trained(together(experiments, **settings))
  for member in expected:
    toy.assert_same(found[member], expected[member])


@pytest.mark.parametrize(
    'staleness, steps', [(0, {1, 2, 4, 6}), (2, {1, 2}), (4, {1, 2})]
)
def test_it_goes_on_where_no_publication_from_before_is_asked_for(
    staleness, steps
):
  plan = Plan(every=2, mode='lockstep', staleness=staleness)
  usable = {s for s in range(1, 8) if seeds_together.can_resume(plan, s)}
  asked = {
      s
      for s in range(1, 8)
      if not {plan.asked(t) for t in range(s, 40)} & {*range(1, s)}
  }
  assert usable == asked == steps


class Spoilt(toy.Clusters):
  """Its seventh batch has no numbers."""

  def batch(self, step):
    batch = super().batch(step)
    return batch | {'inputs': batch['inputs'] + (np.nan if step == 6 else 0)}


def test_a_seed_that_leaves_its_seats_holds_up_no_other():
  def stream(group_id, group_batch, seed, **_):
    kind = Spoilt if (group_id, seed) == (1, 3) else toy.Clusters
    return kind(group_batch, seed, group_id, weights=True)

  expected, _ = plain()
  members = together(experiments_of(task=TASK._replace(train_stream=stream)))
  groups, failed = generators(members), {}
  for step in range(1, STEPS + 1):
    for member in [m for m in groups if m not in failed]:
      try:
        result = next(groups[member])
      except ValueError:
        for group_id in (0, 1):
          failed[3, group_id] = step
          members[3, group_id][1].leave()
  # At the exchange after the update that went wrong.
  assert failed == {(3, 0): 8, (3, 1): 8}
  assert result.step == STEPS
  toy.assert_same(
      base.host_copy(result.state.variables), expected[0, 1].variables, **CLOSE
  )


@pytest.mark.parametrize(
    'settings, num_groups, expected',
    [
        ({}, 2, True),
        ({}, 1, True),
        ({'exchange': Checkpoints(topology=[[1], [0, 2], [0]])}, 3, False),
        ({'exchange': Predictions()}, 2, False),
    ],
)
def test_what_can_be_one_program(settings, num_groups, expected):
  first, _ = experiments_of(**settings)
  assert seeds_together.possible(first, num_groups) == expected
