"""A run that exchanges predictions, with all that surrounds its loop."""

import functools

import all_groups
import jax
import numpy as np
import pytest
import tiny_run
import toy

from codistill_jax import experiment as experiment_lib
from codistill_jax import one_program, run_directory
from codistill_jax.exchange.kinds import PredictionExchange, Predictions
from codistill_jax.peer_predictions import mixing_matrix
from codistill_jax.storage import checkpoints
from experiments import cli
from experiments.running import job as job_lib

G, BATCH, STEPS = 3, 4, 12
MODEL = toy.recurrent_model(units=4)
TASK = toy.TOKEN_TASK


def make_experiment(**changes):
  return toy.experiment(
      MODEL,
      **{
          'distill_weight': lambda step: float(step >= 2),
          'exchange': Predictions(top_k=3, topology='ring'),
          **changes,
      },
  )


EXPERIMENT = make_experiment()


@functools.cache
def population():
  devices = jax.devices()[:3]
  return experiment_lib.make_population(EXPERIMENT, MODEL, G, devices)


def test_groups_of_one_device_learn_from_whole_predictions():
  """A top_k saves what is sent between devices."""
  mix_GG = mixing_matrix([[1, 2], [0, 2], [0, 1]])
  on_one = experiment_lib.make_population(
      EXPERIMENT, MODEL, G, jax.devices()[:1]
  )
  assert on_one.peers(mix_GG, top_k=3).top_k is None
  assert population().peers(mix_GG, top_k=3).top_k == 3


@pytest.mark.parametrize('num_replicas, said', [(1, False), (3, True)])
def test_a_top_k_that_has_no_effect_is_said(capsys, num_replicas, said):
  """Of three devices each group has its own, or all have all."""
  job_lib.train_steps_of(EXPERIMENT, MODEL, G, num_replicas)
  assert ('top_k=3 has no effect' in capsys.readouterr().err) == said


def train(workdir, stop_after=None):
  kind = EXPERIMENT.exchange
  mix_GG = mixing_matrix([kind.peers_of(g, G) for g in range(G)])
  update = one_program.JointUpdate(population(), mix_GG, kind.top_k)
  stream = one_program.SharedStream(
      experiment_lib.train_stream(EXPERIMENT, 0, G)
  )
  all_groups.train(EXPERIMENT, MODEL, update.seats, workdir, stop_after, stream)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  train(workdir)
  return workdir


def arrays(workdir, group_id, step=STEPS):
  directory = run_directory.checkpoints_dir(workdir, group_id)
  return tiny_run.arrays_of(directory, step)


def test_a_run_directory_is_that_of_any_run(whole):
  for g in range(G):
    assert run_directory.done_path(whole, g).exists()
    directory = run_directory.checkpoints_dir(whole, g)
    assert checkpoints.completed_steps(directory) == [4, 8, 12]
    records = tiny_run.records(whole, g)
    assert [r['step'] for r in records if 'eval/loss' in r] == [6, 12]
    training = [r for r in records if 'loss/task' in r]
    assert [r['step'] for r in training] == [2, 4, 6, 8, 10, 12]
    first, *later = training
    assert 'loss/distill' not in first and 'exchange/peers_present' not in first
    for record in later:
      assert record['loss/distill'] > 0
      assert record['exchange/peers_present'] == 1
      assert record['exchange/staleness_steps'] == 0
      # 4 rows of 3 tokens, 3 classes and the rest, to one reader.
      assert record['exchange/prediction_bytes'] == 4 * 3 * (3 * 8 + 4)
    status = run_directory.read_status(whole, g)
    assert (status['phase'], status['peers']) == ('done', [(g - 1) % G])
  run = run_directory.read_run(whole)
  assert (run['mode'], run['exchange_every']) == ('predictions', 1)
  # No teacher runs here, so none has a recurrent state.
  assert not any(key.startswith('teacher_carry') for key in arrays(whole, 0))
  assert np.any(
      arrays(whole, 0)['variables/params/embed']
      != arrays(whole, 1)['variables/params/embed']
  )


@pytest.mark.parametrize('stop_after', [1, 6])
def test_a_stopped_run_ends_with_the_same_bits(whole, tmp_path, stop_after):
  with pytest.raises(cli.Stopped):
    train(tmp_path, stop_after)
  steps = {
      max(
          checkpoints.completed_steps(
              run_directory.checkpoints_dir(tmp_path, g)
          )
      )
      for g in range(G)
  }
  assert len(steps) == 1 and steps < {*range(STEPS)}
  train(tmp_path)
  for g in range(G):
    tiny_run.assert_same_bits(arrays(tmp_path, g), arrays(whole, g))
    records = tiny_run.records(tmp_path, g)
    steps = [r['step'] for r in records if 'eval/loss' in r]
    assert steps == [6, 12]


def test_a_finished_run_is_left_alone(whole):
  before = tiny_run.snapshot(whole)
  train(whole)
  assert tiny_run.snapshot(whole) == before


def test_a_whole_run_compiles_two_steps(tmp_path):
  # Between tests memory may be given back, and programs with it.
  population.cache_clear()
  train(tmp_path)
  assert population().num_traces == 2


def test_all_groups_read_the_stream_of_the_first(monkeypatch):
  asked = []
  task = TASK._replace(
      train_stream=lambda **kwargs: asked.append(kwargs['group_id'])
      or toy.Tokens(4)
  )
  experiment = make_experiment(task=task)
  _, stream = job_lib.train_steps_of(experiment, MODEL, 3, 1)
  assert asked == [0] and stream.batch(3) is stream.batch(3)


def test_nobody_sends_to_those_who_do_not_learn_from_him():
  kind = Predictions(topology=[[1], [], [1]])
  sent = [
      PredictionExchange(g, 3, kind, bytes_to_peer=5).metrics(0)[
          'exchange/prediction_bytes'
      ]
      for g in range(3)
  ]
  assert sent == [0.0, 10.0, 0.0]
  assert PredictionExchange(1, 3, kind).fetch(7) is None


# -- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'exchange': 'rumours'}, "exchange='rumours'; bind it to a kind of"),
        ({'exchange': Predictions}, 'bind it to a kind of exchange: @exchange'),
        ({'exchange': 'predictions'}, r'is now @exchange.Predictions\(\)'),
        (
            {'task': TASK._replace(partition='disjoint')},
            r"'disjoint'; .*shared",
        ),
        ({'distill_loss': 'kl'}, r'top_k=3 .* cross_entropy'),
        ({'exchange': Predictions(top_k=8)}, r'top_k=8, but .* 7 classes'),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make_experiment(**wrong)
  assert '\n' not in str(e.value)


def test_a_single_group_is_refused():
  with pytest.raises(ValueError, match=r'num_groups=1: there is nobody'):
    job_lib.train_steps_of(EXPERIMENT, MODEL, 1, 1)


@pytest.mark.parametrize('partition', ['shared', 'disjoint'])
def test_tasks_tell_their_partition(partition, tmp_path):
  from codistill_jax.data import text

  data = tiny_run.write_data(tmp_path)
  assert text.language_model_task(data, partition=partition).partition == (
      partition
  )
