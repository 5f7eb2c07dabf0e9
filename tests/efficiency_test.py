"""What a record says of a group's arithmetic."""

import types

import jax
import numpy as np
import optax
import pytest
import toy

from codistill_jax import base, jaxprs
from codistill_jax import experiment as experiment_lib
from codistill_jax import step as step_lib
from codistill_jax.models import resnet
from experiments.running import watch

ROWS, TOKENS = 4, 3
UNITS, VOCAB = 6, 7
MODEL = toy.recurrent_model(vocab=VOCAB, units=UNITS)
# Of the toy: h W and the head, each token; a gradient takes twice as much.
FORWARD = 2 * ROWS * TOKENS * (UNITS * UNITS + UNITS * VOCAB)


def make_job(model=MODEL, *, peers=2, devices=None, **plan):
  """As much of a job as is looked at."""
  experiment = types.SimpleNamespace(
      exchange=types.SimpleNamespace(
          teacher_dtype='float32', num_teachers=lambda *_: peers, **plan
      ),
      group_batch=ROWS,
  )
  train_step = step_lib.make_train_step(
      model, optax.adam(1e-3), axis_name=base.REPLICA_AXIS
  )
  return types.SimpleNamespace(
      experiment=experiment,
      group_id=0,
      num_groups=peers + 1,
      train_step=types.SimpleNamespace(
          train_step=train_step,
          axis_sizes={base.REPLICA_AXIS: 1},
          num_replicas=2,
          device_kind='cpu',
      ),
  )


def make_efficiency(job, batch, model=MODEL):
  row = {key: x[:1] for key, x in batch.items()}
  state = jax.eval_shape(
      lambda: step_lib.init_state(
          model,
          optax.adam(1e-3),
          jax.random.PRNGKey(0),
          row,
          num_peers=job.num_groups - 1,
          group_batch=ROWS,
      )
  )
  return watch.Efficiency(job, state, row)


@pytest.fixture
def watched():
  found = make_efficiency(make_job(), toy.Tokens(ROWS).batch(0))
  yield found
  found.close()


def test_burn_in_takes_three_forward_passes_and_each_teacher_one(watched):
  watched.seen(False)
  alone = watched.metrics([False] * 4, seconds=2.0)
  assert alone == {
      # The input of the first product is data: it needs no gradient.
      'perf/model_flops_per_step': 3 * FORWARD,
      'perf/model_flops_per_sec': 3 * FORWARD * 2,
      'perf/teacher_share': 0.0,
  }
  watched.seen(True)
  taught = watched.metrics([True], seconds=0.5)
  assert taught['perf/model_flops_per_step'] == 5 * FORWARD
  assert taught['perf/model_flops_per_sec'] == 10 * FORWARD
  assert taught['perf/teacher_share'] == pytest.approx(2 / 5)


def test_a_record_of_both_forms_adds_up_what_was_done(watched):
  # A run that goes on after burn-in: teachers from its first step.
  watched.seen(True)
  found = watched.metrics([False, False, True], seconds=2.0)
  assert found['perf/model_flops_per_sec'] == (3 + 3 + 5) * FORWARD / 2
  assert found['perf/model_flops_per_step'] == 5 * FORWARD


def test_utilisation_is_of_all_devices_of_the_group(watched, monkeypatch):
  watched.seen(False)
  assert 'perf/utilisation' not in watched.metrics([False], seconds=1.0)
  peak = 3.0 * FORWARD
  monkeypatch.setattr(jaxprs, 'PEAKS', {'cpu': {'float32': peak}})
  found = watched.metrics([False, False], seconds=4.0)
  # Two devices could have done eight steps.
  assert found['perf/utilisation'] == pytest.approx(2 / 8)


def test_each_form_is_counted_once(watched, monkeypatch):
  counted = []
  count = jaxprs.flops

  def watching(*args, **kwargs):
    counted.append(args[3] is not None)
    return count(*args, **kwargs)

  monkeypatch.setattr(jaxprs, 'flops', watching)
  for taught in (False, False, True, True, False):
    watched.seen(taught)
    watched.metrics([taught], seconds=1.0)
  assert counted == [False, True]


def test_a_loop_of_unknown_length_is_said(caplog):
  def apply(variables, batch, carry, rng, train):
    outputs, updates = MODEL.apply(variables, batch, carry, rng, train)
    loop = lambda x: jax.lax.while_loop(
        lambda c: c[0, 0, 0] < 0, jax.numpy.sin, x
    )
    return outputs + jax.lax.stop_gradient(loop(outputs)), updates

  job = make_job(MODEL._replace(apply=apply))
  found = make_efficiency(job, toy.Tokens(ROWS).batch(0))
  found.seen(False)
  found.metrics([False], seconds=1.0)
  found.close()
  assert 'counts 1 while loops of the step once' in caplog.text


def test_a_model_that_knows_the_axis_of_the_replicas_is_counted():
  # Statistics over all replicas, which only exist within a pmap.
  model = resnet.resnet20(10, batch_norm='cross_replica')
  batch = {
      'inputs': np.zeros((1, 8, 8, 3), np.float32),
      'labels': np.zeros((1,), np.int32),
  }
  found = make_efficiency(make_job(model, peers=0), batch, model)
  found.seen(False)
  assert found.metrics([False], seconds=1.0)['perf/model_flops_per_step'] > 1e6
  found.close()


def test_to_count_is_to_look_at_shapes(watched):
  """No compilation, nothing on a device: not even a buffer."""
  before = len(jax.live_arrays())
  watched.seen(True)
  watched.metrics([True], seconds=1.0)
  assert len(jax.live_arrays()) <= before


def test_a_step_on_replicas_shows_what_it_runs_on():
  job = experiment_lib.Experiment(
      task=toy.TOKEN_TASK,
      model=lambda num_classes: MODEL,
      optimizer=optax.sgd(0.1),
  )
  step = experiment_lib.make_replicated_step(job, MODEL, jax.devices()[:2])
  assert (step.num_replicas, step.device_kind) == (2, 'cpu')
  assert step.num_traces == 0
