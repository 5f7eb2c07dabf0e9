"""What an experiment refuses, it refuses with what to change."""

import re

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base, losses, optimizers, schedules
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.baselines.diloco import Diloco
from codistill_jax.exchange.kinds import Checkpoints, Predictions
from codistill_jax.models import linen

TASK = base.Task(
    train_stream=lambda **kwargs: toy.Clusters(kwargs['group_batch']),
    eval_batches=lambda rows: [toy.Clusters(rows).batch(0)],
    num_classes=toy.CLASSES,
    identity={'task': 'toy'},
    example_name='point',
)


def make(**kwargs):
  defaults = {
      'task': TASK,
      'model': lambda num_classes: linen.from_linen(toy.TwoLayers()),
      'optimizer': optax.sgd(0.1),
  }
  return experiment_lib.Experiment(**{**defaults, **kwargs})


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'task': lambda: TASK}, 'Experiment.task=.*bind it to a task'),
        ({'model': 'lstm'}, "Experiment.model='lstm'; bind it to a reference"),
        ({'distill_weight': 1.0}, 'Experiment.distill_weight=1.0'),
        ({'seed': -1}, 'Experiment.seed=-1; .*at least 0'),
        ({'data_seed': 1.0}, 'Experiment.data_seed=1.0; .*at least 0'),
        ({'task': TASK._replace(output='probit')}, "'probit' is no kind"),
        ({'num_steps': 0}, 'Experiment.num_steps=0; .*at least 1'),
        ({'group_batch': 8.0}, 'Experiment.group_batch=8.0; .*whole number'),
        ({'log_every': -1}, 'Experiment.log_every=-1'),
        ({'eval_every': 0}, 'Experiment.eval_every=0'),
        ({'eval_batch': 0}, 'Experiment.eval_batch=0'),
        ({'checkpoint_every': '9'}, "Experiment.checkpoint_every='9'"),
        ({'distill_loss': 'nonsense'}, 'nonsense.*cross_entropy'),
        ({'metrics': lambda: 0}, 'Experiment.metrics=.*bind it to a list'),
        ({'writers': ['mine']}, "Experiment.writers=.'mine'.; bind it to a l"),
        (
            {
                'distill_loss': lambda *logits_and_presence: 0.0,
                'exchange': Predictions(),
            },
            'distill_loss <lambda> has no formula .* use one of cross_entropy',
        ),
        ({'exchange': None}, 'Experiment.exchange=None; bind it to a kind'),
        ({'exchange': 'fixed'}, r"='fixed' is now @exchange.FixedTeachers\(\)"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make(**wrong)
  assert '\n' not in str(e.value)


# -- numbers that act nowhere -------------------------------------------------

PARAMS = {'kernel': np.ones((2, 3), np.float32), 'bias': np.zeros(3, 'f')}
IDLE = {
    'burn-in': (
        {'distill_weight': schedules.distill_weight(1.0, 5000)},
        'distillation begins .* at step 5000',
    ),
    'exchange': ({'exchange': Checkpoints(5000)}, 'first exchange .* 5000'),
    'at the end': ({'exchange': Checkpoints(200)}, 'first exchange .* 200'),
    'staleness': (
        {'exchange': Checkpoints(150, 'lockstep', 150)},
        'first exchange .* 300',
    ),
    'eval_every': ({'eval_every': 500}, 'eval_every = 500'),
    'checkpoint_every': ({'checkpoint_every': 500}, 'checkpoint_every = 500'),
    'log_every': ({'log_every': 500}, 'log_every = 500'),
    'ramp_up_steps': (
        {'method': AsynchronousSgd(4, ramp_up_steps=300)},
        'AsynchronousSgd.ramp_up_steps = 300',
    ),
    'inner_steps': (
        {'method': Diloco(4, inner_steps=300)},
        'Diloco.inner_steps = 300',
    ),
}


@pytest.mark.parametrize('given, said', IDLE.values(), ids=IDLE)
def test_a_number_beyond_the_last_step_is_named(given, said):
  found = experiment_lib.idle_settings(make(num_steps=200, **given), 2, PARAMS)
  assert len(found) == 1 and re.search(said, found[0])
  longer = make(num_steps=9000, **given)
  assert experiment_lib.idle_settings(longer, 2, PARAMS) == []


def test_what_is_off_or_alone_is_no_mistake():
  off = {'distill_weight': schedules.distill_weight(0.0, 5000)}
  late = {'distill_weight': schedules.distill_weight(1.0, 5000)}
  assert experiment_lib.idle_settings(make(**off), 2, PARAMS) == []
  assert experiment_lib.idle_settings(make(**late), 1, PARAMS) == []
  # The defaults of a short run.
  assert experiment_lib.idle_settings(make(num_steps=60), 2, PARAMS) == []


OPTIMISERS = {
    'sgd': optax.sgd,
    'adam': optax.adam,
    'adamw': lambda rate: optax.adamw(rate, weight_decay=0.1),
    'momentum': optimizers.momentum_sgd,
    'lars': optimizers.lars,
    'chain': lambda rate: optax.chain(optax.clip(1.0), optax.adam(rate)),
    'steps': lambda rate: optax.MultiSteps(optax.sgd(rate), 4),
    'every': lambda rate: optax.chain(optax.apply_every(4), optax.sgd(rate)),
    'injected': optax.inject_hyperparams(optax.sgd),
}
ENDING = {
    'cosine': schedules.warmup_cosine(0.1, 100, 10),
    'optax cosine': optax.cosine_decay_schedule(0.1, 100),
    'linear': optax.linear_schedule(0.1, 0.0, 100),
    'steps': optax.piecewise_constant_schedule(0.1, {100: 0.0}),
}
GOING_ON = {
    'constant': schedules.constant(0.1, 10),
    'number': 0.1,
    'cosine': schedules.warmup_cosine(0.1, 1000, 10),
    'steps': schedules.step_decay(0.1, [100]),
    'exponential': optax.exponential_decay(0.1, 10, 0.9),
    'linear': optax.linear_schedule(0.1, 0.0, 1000),
}


@pytest.mark.parametrize('optimiser', OPTIMISERS)
def test_a_schedule_that_is_over_long_before_the_run_is_found(optimiser):
  named = lambda rate: experiment_lib.idle_settings(
      make(num_steps=1000, optimizer=OPTIMISERS[optimiser](rate)), 1, PARAMS
  )
  if optimiser in ('steps', 'every'):
    assert named(ENDING['cosine']) == []  # It cannot be told.
    return
  for name, schedule in ENDING.items():
    assert len(named(schedule)) == 1, name
    (said,) = named(schedule)
    step = int(said.split('step ')[1].split()[0])
    assert 90 <= step <= 104, name
  for schedule in GOING_ON.values():
    assert named(schedule) == []


# -- contracts ----------------------------------------------------------------


class Fixed:
  """A stream that gives one batch, whatever is asked."""

  def __init__(self, batch):
    self.given = batch

  def batch(self, step):
    return self.given


def points(rows):
  return toy.Clusters(rows).batch(0)


class Bare(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(toy.CLASSES)(x['integers'])


def stream_of(batch):
  return TASK._replace(train_stream=lambda **kwargs: Fixed(batch))


@pytest.mark.parametrize(
    'given, message',
    [
        (
            {'task': stream_of(points(100))},
            r'inputs has .* \(100, 5\), expected 8',
        ),
        (
            {'task': stream_of([1, 2])},
            'batch of step 0 is a list, expected a ma',
        ),
        ({'task': stream_of({'x': 1})}, "is a dict of x, expected .*'labels'"),
        (
            {'task': stream_of(points(8) | {'weights': np.float32(1)})},
            r'weights has shape \(\), expected',
        ),
        (
            {'task': TASK._replace(train_stream=lambda **kw: [points(8)])},
            'train_stream gave a list, expected an object',
        ),
        ({'model': lambda n: Bare()}, 'model gave a Bare, .* from_linen'),
        (
            {'model': lambda n: linen.from_linen(Bare())},
            'the model .* cannot be started on a batch: ',
        ),
        ({'optimizer': optax.sgd}, 'Experiment.optimizer=.* that was made'),
    ],
)
def test_a_contract_that_is_broken_is_one_line(given, message):
  with pytest.raises(ValueError, match=message) as e:
    experiment = make(group_batch=8, **given)
    model = experiment_lib.make_model(experiment)
    row = experiment_lib.first_row(experiment, 2)
    experiment_lib.init_state(
        experiment, model, jax.random.key(0), row, num_peers=1
    )
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('rows', [1, 7, 9, 100])
def test_a_batch_of_other_rows_is_refused_whenever_it_comes(rows):
  class Shrinking(Fixed):

    def batch(self, step):
      return points(rows if step == 3 else 8)

  task = TASK._replace(train_stream=lambda **kwargs: Shrinking(None))
  stream = experiment_lib.train_stream(make(task=task, group_batch=8), 0, 1)
  stream.batch(2)
  with pytest.raises(ValueError, match=r'batch of step 3: .*expected 8 rows'):
    stream.batch(3)


@pytest.mark.parametrize(
    'outputs, batches, message',
    [
        (lambda x: x @ np.ones((5, 4)), None, None),
        (lambda x: x @ np.ones((5, 6)), None, None),  # Padded classes.
        (
            lambda x: x @ np.ones((5, 2)),
            None,
            r'shape \(8, 2\) .*expected \(8, 4',
        ),
        (lambda x: x[:, 0], None, 'expected|Labels|classes|logits'),
        (lambda x: {'logits': x}, None, 'logits'),
        (lambda x: x['integers'], None, 'evaluation cannot be traced'),
        (lambda x: x, [], 'no validation batch'),
        (
            lambda x: x,
            [points(7)],
            r'first validation batch: .*expected 8 rows',
        ),
    ],
)
def test_what_a_model_gives_fits_the_labels(outputs, batches, message):
  model = base.Model(
      init=None,
      apply=lambda variables, batch, carry, rng, train: (
          outputs(batch['inputs']),
          base.Updates({}, carry),
      ),
  )
  task = TASK
  if batches is not None:
    task = TASK._replace(eval_batches=lambda rows: batches)
  made = make(task=task, eval_batch=8)
  check = lambda: experiment_lib.check_evaluation(
      made, model, base.Variables({})
  )
  if message is None:
    check()
    return
  with pytest.raises(ValueError, match=message):
    check()


@pytest.mark.parametrize(
    'given', [iter([]), (points(4) for _ in range(3)), map(points, [4]), None]
)
def test_validation_batches_that_can_be_read_once_are_refused(given):
  task = TASK._replace(eval_batches=lambda rows: given)
  with pytest.raises(ValueError, match='can be read but once'):
    experiment_lib.split_batches(task, 'validation', 4)


def test_the_distill_loss_is_looked_up_by_name():
  for name in ('cross_entropy', 'reverse_kl'):
    assert make(distill_loss=name).distillation is getattr(losses, name)


def test_a_sigmoid_task_is_trained_and_evaluated_on_its_log_loss():
  """One update, against the same two classes written as a softmax."""
  model = linen.from_linen(Logistic())
  task = TASK._replace(output='sigmoid', num_classes=2)
  experiment = make(task=task, model=lambda num_classes: model)
  batch = {
      'inputs': toy.Clusters(4).batch(0)['inputs'],
      'labels': np.array([1, 0, 0, 1], np.int32),
  }
  step = experiment_lib.make_replicated_step(
      experiment, model, jax.devices()[:1]
  )
  state = step_lib.init_state(
      model, optax.sgd(0.1), jax.random.PRNGKey(0), batch, num_peers=1
  )
  teachers = base.Teachers(
      jax.tree.map(lambda x: 1.5 * x[None], state.variables),
      np.ones(1, np.float32),
  )
  _, found = step(step.place(state), batch, step.place_teachers(teachers), 1.0)
  z = model.apply(state.variables, batch, (), None, False)[0]
  y, p = batch['labels'], jax.nn.sigmoid(1.5 * z)
  log_q, log_1_q = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  task_loss = -np.mean(y * log_q + (1 - y) * log_1_q)
  distill = -np.mean(p * log_q + (1 - p) * log_1_q)
  np.testing.assert_allclose(found['loss/task'], task_loss, rtol=1e-5)
  np.testing.assert_allclose(found['loss/distill'], distill, rtol=1e-5)
  sums, _ = experiment_lib.make_eval_step(experiment, model)(
      state.variables, batch, ()
  )
  np.testing.assert_allclose(sums['eval/loss'].value, task_loss, rtol=1e-5)


class Logistic(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, use_bias=False)(x)[..., 0]


def test_a_model_is_told_what_the_task_knows():
  task = TASK._replace(model_arguments={'table_sizes': (3, 5)})
  told = []

  def model(*args, **kwargs):
    told.append((args, kwargs))
    return toy.TWO_LAYERS

  experiment_lib.make_model(make(task=task, model=model))
  assert told == [((toy.CLASSES,), {'table_sizes': (3, 5)})]


@pytest.mark.parametrize('data_seed, given', [(None, {}), (0, {'seed': 0})])
def test_a_data_seed_replaces_the_one_of_the_task(data_seed, given):
  asked = []

  def train_stream(**kwargs):
    asked.append(kwargs)
    return toy.Clusters(8)

  task = TASK._replace(train_stream=train_stream)
  experiment = make(task=task, data_seed=data_seed, group_batch=8)
  experiment_lib.train_stream(experiment, 1, 2)
  expected = {'group_id': 1, 'num_groups': 2, 'group_batch': 8, 'rows': None}
  assert asked == [{**expected, **given}]


def test_a_split_is_what_the_task_says_it_is():
  test = lambda rows: [f'test batches of {rows}']
  task = TASK._replace(eval_batches=lambda rows: [rows], test_batches=test)
  assert experiment_lib.split_batches(task, 'validation', 3) == [3]
  assert experiment_lib.split_batches(task, 'test', 3) == test(3)
  with pytest.raises(ValueError, match='no test split; it has: validation'):
    experiment_lib.split_batches(TASK, 'test', 3)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_teachers_are_computed_in_the_dtype_in_which_they_are_held(dtype):
  made = []

  def model(num_classes, dtype='float32'):
    made.append(dtype)
    return linen.from_linen(toy.TwoLayers())

  found = experiment_lib.make_teacher_model(
      make(model=model, exchange=Checkpoints(teacher_dtype=dtype))
  )
  # In float32 the student's own model, whatever that computes in.
  assert made == ([] if dtype == 'float32' else ['bfloat16'])
  assert (found is None) == (dtype == 'float32')
  assert (
      experiment_lib.make_teacher_model(
          make(exchange=Checkpoints(teacher_dtype=dtype))
      )
      is None
  )
