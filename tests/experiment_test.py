"""What an experiment refuses, it refuses with what to change."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base, losses
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.exchange.kinds import Checkpoints
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
        ({'exchange': None}, 'Experiment.exchange=None; bind it to a kind'),
        ({'exchange': 'fixed'}, r"='fixed' is now @exchange.FixedTeachers\(\)"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make(**wrong)
  assert '\n' not in str(e.value)


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
  experiment_lib.make_model(
      make(task=task, model=lambda *args, **kw: told.append((args, kw)))
  )
  assert told == [((toy.CLASSES,), {'table_sizes': (3, 5)})]


@pytest.mark.parametrize('data_seed, given', [(None, {}), (0, {'seed': 0})])
def test_a_data_seed_replaces_the_one_of_the_task(data_seed, given):
  asked = []
  task = TASK._replace(train_stream=lambda **kwargs: asked.append(kwargs))
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
