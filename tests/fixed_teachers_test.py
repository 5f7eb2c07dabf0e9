"""Offline distillation: the student learns from runs that have ended."""

import pathlib

import algorithm1
import all_groups
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
import toy

from codistill_jax import experiment as experiment_lib
from codistill_jax import run_directory
from codistill_jax import step as step_lib
from codistill_jax.base import cast_floats
from codistill_jax.exchange import kinds
from codistill_jax.exchange.kinds import FixedExchange, FixedTeachers
from codistill_jax.group import run_group
from codistill_jax.schedules import distill_weight
from codistill_jax.storage.checkpoints import MismatchError
from codistill_jax.storage.resume import ResumeCheckpoints
from experiments import cli

TX = optax.sgd(0.5)
IDENTITY = {'task': 'toy', 'tokenizer': 'abc'}


def save_run(workdir, states, identity=IDENTITY, **run):
  """A run that has ended: of each group, the states that it left."""
  for group_id, left in enumerate(states):
    directory = run_directory.checkpoints_dir(workdir, group_id)
    saved = ResumeCheckpoints(directory, identity=identity)
    for state in left:
      saved.save(state)
      saved.wait()
    saved.close()
    run_directory.done_path(workdir, group_id).touch()
  run_directory.write_run(workdir, {'num_groups': len(states), **run})
  return workdir


def state_of(model, seed, step=5):
  """Trained somehow, with another optimiser."""
  state = toy.start(model, toy.ADAM, seed + 10 * step, num_peers=0)
  return state.replace(step=np.int32(step))


def states_of(model, seeds=(100, 101), steps=(3, 5)):
  return [[state_of(model, seed, n) for n in steps] for seed in seeds]


def variables_of(model, *groups):
  """(seed, step) of each group -> what they teach."""
  return toy.stacked([state_of(model, *group).variables for group in groups])


def exchange_of(runs, model, *, step=None, identity=IDENTITY, **kwargs):
  sources = kinds.find_teachers(runs, step)
  like = toy.start(model, TX).variables
  return FixedExchange(
      sources, kinds.load_teachers(sources, like, identity, **kwargs)
  )


@pytest.fixture(scope='module')
def teacher_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  return save_run(workdir, states_of(toy.TWO_LAYERS))


# -- what the student learns --------------------------------------------------


def test_the_student_is_that_of_algorithm_1_with_fixed_teachers(teacher_run):
  model, stream = toy.TWO_LAYERS, toy.Clusters(8, weights=True)
  before = tiny_run.snapshot(teacher_run)
  exchange = exchange_of([teacher_run], model)
  teachers = [
      algorithm1.as_float64(state_of(model, seed).variables.params)
      for seed in (100, 101)
  ]
  state = toy.start(model, TX, 1, num_peers=2)
  theta = algorithm1.as_float64(state.variables.params)
  step = toy.on_replicas(model, TX, 1)
  for result in run_group(
      step,
      state,
      stream,
      num_steps=5,
      exchange=exchange,
      distill_weight=lambda step: 0.7 * (step >= 1),
  ):
    # From the first update after burn-in on, whatever an exchange step is.
    peers = teachers if result.step > 1 else []
    batch = stream.batch(result.step - 1)
    phi, psi = algorithm1.losses(theta, batch, peers)
    theta = algorithm1.update(theta, batch, peers, 0.7, 0.5)
    np.testing.assert_allclose(result.metrics['loss/task'], phi, rtol=1e-4)
    if peers:
      np.testing.assert_allclose(result.metrics['loss/distill'], psi, rtol=1e-4)
      assert result.metrics['exchange/peers_present'] == 2.0
    # Nobody claims an age that they do not have.
    assert not any('staleness' in key for key in result.metrics)
  found = step.collect(result.state).variables.params
  found = jax.tree.map(lambda x: x.astype(np.float64), found)
  toy.assert_same(found, theta, rtol=1e-4, atol=1e-5)
  # The teachers are what they were, here and there.
  expected = variables_of(model, (100, 5), (101, 5))
  toy.assert_same(exchange.fetch(0), expected)
  assert tiny_run.snapshot(teacher_run) == before


@pytest.mark.parametrize('model', [toy.TWO_LAYERS, toy.STATISTICS])
def test_all_groups_of_all_runs_teach_in_order(tmp_path, model):
  two = save_run(tmp_path / 'two', states_of(model))
  one = save_run(tmp_path / 'one', states_of(model, (7,), (3,)))
  exchange = exchange_of([two, one], model)
  expected = variables_of(model, (100, 5), (101, 5), (7, 3))
  toy.assert_same(exchange.fetch(0), expected)
  assert [p.step for p in exchange.in_use] == [5, 5, 3]
  assert exchange.fetch(0) is exchange.fetch(10)
  assert exchange.peers == () and not exchange.due(10)
  older = exchange_of([two], model, step=3, dtype='bfloat16').fetch(0)
  widths = {x.dtype for x in jax.tree.leaves(older.variables.params)}
  assert widths == {jnp.dtype('bfloat16')}
  older = cast_floats(older, 'float32')
  expected = variables_of(model, (100, 3), (101, 3))
  toy.assert_same(older, expected, rtol=0.01)


# -- what does not fit --------------------------------------------------------


def without_done(run):
  run_directory.done_path(run, 1).unlink()


def without_checkpoints(run):
  for step in (3, 5):
    mark = run_directory.checkpoints_dir(run, 1) / str(step)
    (mark / 'commit_success.txt').unlink()


def without_a_group(run):
  run_directory.write_run(run, {'num_groups': 3})


def with_a_flipped_bit(run):
  arrays = run_directory.checkpoints_dir(run, 1) / '5' / 'arrays'
  files = [f for f in pathlib.Path(arrays).rglob('*') if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))


@pytest.mark.parametrize(
    'spoil, message',
    [
        (
            without_done,
            r'group 1 of .* \(there is no DONE\); start its command',
        ),
        (without_checkpoints, 'step any in .*there are: none. Set exchange.'),
        (without_a_group, 'group 2 of .* has not reached its last step'),
        (with_a_flipped_bit, 'was altered'),
    ],
)
def test_a_run_that_cannot_teach_is_named(tmp_path, spoil, message):
  model = toy.TWO_LAYERS
  run = save_run(tmp_path / 'run', states_of(model))
  spoil(run)
  with pytest.raises(ValueError, match=message) as e:
    exchange_of([run], model)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'asked, error, message',
    [
        ({'runs': ['nowhere']}, ValueError, 'no run in .*nowhere; train the'),
        ({'step': 4}, ValueError, 'checkpoint of step 4 .*there are: 3, 5'),
        (
            {'identity': {**IDENTITY, 'tokenizer': 'xyz'}},
            MismatchError,
            'group 0 of the teacher run .* tokenizer=abc, .* tokenizer=xyz',
        ),
        (
            {'model': toy.STATISTICS},
            MismatchError,
            r'it holds params/Dense_0/bias float32\[8\] where this run has'
            r' model_state/calls int32\[\]',
        ),
    ],
    ids=['run', 'step', 'identity', 'leaf'],
)
def test_what_does_not_fit_is_named(teacher_run, asked, error, message):
  asked = {'runs': [teacher_run], 'model': toy.TWO_LAYERS, **asked}
  with pytest.raises(error, match=message) as e:
    exchange_of(**asked)
  assert '\n' not in str(e.value)


# -- a run --------------------------------------------------------------------

MODEL = toy.recurrent_model(units=4)


def experiment_of(teacher_run):
  return toy.experiment(
      MODEL,
      exchange=FixedTeachers([str(teacher_run)]),
      distill_weight=distill_weight(burn_in_steps=2),
      num_steps=8,
      eval_every=8,
  )


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'runs': []}, 'no teachers; set exchange.FixedTeachers.runs to'),
        ({'runs': 'runs/two'}, "runs='runs/two'; set it to a list of run dir"),
        ({'runs': ['runs/two'], 'step': 0}, 'step=0; set it to the step'),
        ({'runs': ['x'], 'teacher_dtype': 'int8'}, "'int8' is not one of"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message):
    FixedTeachers(**wrong)


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
  """A teacher run of the recurrent model, and the compiled step of students."""
  batch = toy.Tokens(4).batch(0)
  states = [
      [
          step_lib.init_state(
              MODEL, TX, jax.random.PRNGKey(50 + g), batch
          ).replace(step=np.int32(20 + g))
      ]
      for g in (0, 1)
  ]
  run = tmp_path_factory.mktemp('runs') / 'recurrent'
  save_run(run, states, toy.TOKEN_TASK.identity, prior_steps=9)
  experiment = experiment_of(run)
  step = experiment_lib.make_replicated_step(
      experiment, MODEL, jax.devices()[:1]
  )
  return experiment, step


def train(taught, workdir, stop_after=None):
  experiment, step = taught
  all_groups.train(experiment, MODEL, [step] * 2, workdir, stop_after)


def last_arrays(workdir, group_id):
  return tiny_run.saved_arrays(workdir, group_id)[1]


@pytest.fixture(scope='module')
def finished(taught, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('students') / 'run'
  train(taught, workdir)
  return workdir


def test_a_student_that_was_stopped_ends_with_the_same_bits(
    taught, finished, tmp_path
):
  workdir = tmp_path / 'run'
  with pytest.raises(cli.Stopped):
    train(taught, workdir, 5)
  assert tiny_run.saved_arrays(workdir, 0)[0] < 8
  train(taught, workdir)
  for group_id in (0, 1):
    tiny_run.assert_same_bits(
        last_arrays(workdir, group_id), last_arrays(finished, group_id)
    )
  # Two programs for two students: burn-in and distillation.
  assert taught[1].num_traces == 2


def test_a_run_says_what_its_teachers_cost(taught, finished):
  run = run_directory.read_run(finished)
  teachers = taught[0].exchange.runs[0]
  assert run['teacher_runs'] == [{'workdir': teachers, 'steps': [20, 21]}]
  assert run['prior_steps'] == 20 + 21 + 9  # The teachers had some, too.
  assert run['mode'] == 'fixed' and run.get('exchange_every') is None
  present = [
      r.get('exchange/peers_present')
      for r in tiny_run.records(finished, 1)
      if 'loss/task' in r
  ]
  assert present == [None, 2.0, 2.0, 2.0]  # Nobody in the burn-in.


def test_a_student_does_not_go_on_with_other_teachers(taught):
  exchange = taught[0].exchange.join(
      all_groups.jobs_of(taught[0], MODEL, taught[1:], 'run')[0],
      jax.eval_shape(MODEL.init, jax.random.PRNGKey(0), toy.Tokens(4).batch(0)),
  )
  exchange.restore(4, [20, 21])
  with pytest.raises(ValueError, match=r'steps \[20, 20\], now .* \[20, 21\]'):
    exchange.restore(4, [20, 20])
