"""What an experiment refuses, it refuses with what to change."""

import optax
import pytest
import toy

from codistill_jax import base, losses
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
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
        ({'num_steps': 0}, 'Experiment.num_steps=0; .*at least 1'),
        ({'group_batch': 8.0}, 'Experiment.group_batch=8.0; .*whole number'),
        ({'log_every': -1}, 'Experiment.log_every=-1'),
        ({'eval_every': 0}, 'Experiment.eval_every=0'),
        ({'eval_batch': 0}, 'Experiment.eval_batch=0'),
        ({'checkpoint_every': '9'}, "Experiment.checkpoint_every='9'"),
        ({'distill_loss': 'nonsense'}, 'nonsense.*cross_entropy'),
        ({'exchange_every': 0}, 'exchange_every=0'),
        ({'exchange_mode': 'eager'}, "'eager' is not one of freshest"),
        (
            {'exchange_mode': 'lockstep', 'staleness': 30},
            'staleness=30 is not a multiple of exchange_every=50',
        ),
        ({'staleness': 50}, 'staleness=50 can be asked for in lockstep only'),
        ({'publish_dtype': 'float16'}, "'float16' is not one of float32"),
        ({'teacher_dtype': 'int8'}, "'int8' is not one of float32"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make(**wrong)
  assert '\n' not in str(e.value)


def test_the_plan_is_what_was_configured():
  plan = make(
      exchange_every=20,
      exchange_mode='lockstep',
      staleness=40,
      publish_dtype='bfloat16',
  ).plan
  assert (plan.every, plan.mode, plan.staleness) == (20, 'lockstep', 40)
  assert (plan.publish_dtype, plan.teacher_dtype) == ('bfloat16', 'float32')


def test_the_distill_loss_is_looked_up_by_name(monkeypatch):
  """Another name gives another loss, not the default."""
  passed = []
  monkeypatch.setattr(
      step_lib,
      'make_train_step',
      lambda *args, distill_loss, axis_name: passed.append(distill_loss),
  )
  for name in ('cross_entropy', 'reverse_kl'):
    experiment = make(distill_loss=name)
    model = experiment_lib.make_model(experiment)
    experiment_lib.make_replicated_step(experiment, model)
  assert passed == [losses.cross_entropy, losses.reverse_kl]
