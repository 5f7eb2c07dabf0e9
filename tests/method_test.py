"""A run with another method than synchronous SGD is a run like any other."""

import dataclasses
import itertools
import signal

import jax
import numpy as np
import pytest
import tiny_run
import toy

from codistill_jax import base, gin_utils, group, run_directory
from codistill_jax import exchange as exchange_lib
from codistill_jax import experiment as experiment_lib
from codistill_jax.baselines.async_sgd import AsynchronousSgd
from codistill_jax.baselines.diloco import Diloco
from codistill_jax.exchange.plan import NoExchange
from codistill_jax.exchange.store_exchange import memory_exchanges
from codistill_jax.storage.resume import ResumeCheckpoints
from experiments import cli
from experiments.running import driver, watch
from experiments.running import job as job_lib

STEPS = 8
METHODS = {
    'async': AsynchronousSgd(3, 'random', ramp_up_steps=3),
    'diloco': Diloco(workers=2, inner_steps=3),
}


class Rows(toy.Tokens):
  """Some of the rows of a group's token stream."""

  def __init__(self, *args, rows=None, **kwargs):
    super().__init__(*args, **kwargs)
    self._rows = rows or slice(None)

  def batch(self, step):
    return {k: x[self._rows] for k, x in super().batch(step).items()}


TASK = toy.TOKEN_TASK._replace(
    train_stream=lambda group_id, num_groups, group_batch, rows: Rows(
        group_batch, group_id=group_id, rows=rows
    )
)


def make_experiment(**changes):
  return toy.experiment(
      toy.RECURRENT,
      **{
          'task': TASK,
          'num_steps': STEPS,
          'eval_every': 8,
          'exchange': exchange_lib.Checkpoints(2, 'lockstep'),
          **changes,
      },
  )


class Request:
  """A request to stop, once `asked`."""

  signal_number = signal.SIGTERM

  def __init__(self):
    self.asked, self.unsaved, self.last_words = False, {}, {}

  def __call__(self):
    return self.asked


@pytest.fixture(scope='module', params=METHODS)
def method(request):
  return METHODS[request.param]


@pytest.fixture(scope='module')
def train_step(method):
  """Compiled once for each method."""
  return experiment_lib.make_replicated_step(
      make_experiment(method=method), toy.RECURRENT, jax.devices()[:2]
  )


@pytest.fixture
def make_job(method, train_step, tmp_path):
  def make(name='run', *, group_id=0, num_groups=1, **kwargs):
    return job_lib.Job(
        experiment=make_experiment(method=method),
        model=toy.RECURRENT,
        train_step=kwargs.pop('train_step', train_step),
        workdir=str(tmp_path / name),
        group_id=group_id,
        num_groups=num_groups,
        stop=Request(),
        **kwargs,
    )

  gin_utils.parse([])
  return make


def run(job, stop_after=None):
  """Trains; the steps it went through."""
  steps = []
  for step in driver.train(
      job,
      lambda variables: NoExchange(),
      watch.group_writer(job, progress=False),
  ):
    steps.append(step)
    job.stop.asked = step == stop_after
  return steps


def last_state(job):
  """As `evaluate` reads a resume checkpoint."""
  row = experiment_lib.first_row(job.experiment, 1)
  like = jax.eval_shape(
      lambda: experiment_lib.init_state(
          job.experiment, job.model, jax.random.PRNGKey(0), row, num_peers=0
      )
  )
  directory = run_directory.checkpoints_dir(job.workdir, 0)
  return (
      ResumeCheckpoints(directory, identity=job.identity)
      .read(STEPS, like)
      .state
  )


def test_a_run_that_was_stopped_ends_with_the_same_bits(make_job, method):
  straight = make_job('straight')
  assert run(straight) == list(range(1, STEPS + 1))
  with pytest.raises(cli.Stopped, match='stopped and saved at step 6'):
    run(make_job(), stop_after=5)
  job = make_job()
  assert run(job) == [7, 8]
  toy.assert_same(last_state(job), last_state(straight))
  records = tiny_run.records(job.workdir)
  key = 'async/staleness_steps'
  if isinstance(method, Diloco):
    key = 'local/divergence'
  assert [r['step'] for r in records if key in r] == [2, 4, 6, 8]
  assert [r['step'] for r in records if 'eval/loss' in r] == [8]
  # As many as synchronous SGD takes for the batch.
  units, vocabulary, tokens = 6, 7, 4 * 3
  flops = 3 * 2 * tokens * (units * units + units * vocabulary)
  found = {r.get('perf/model_flops_per_step', flops) for r in records}
  assert found == {flops}


# The steps of both have tests with teachers of their own.
@pytest.mark.parametrize('method', ['async'], indirect=True)
def test_groups_of_such_a_method_codistill(make_job, train_step):
  def losses(order):
    jobs = [make_job(group_id=g, num_groups=2) for g in range(2)]
    exchanges = memory_exchanges(2, plan=jobs[0].experiment.exchange)
    runs = {}
    for g in order:
      start = driver.new_state(jobs[g])
      runs[g] = group.run_group(
          train_step,
          start.state,
          start.stream,
          num_steps=4,
          exchange=exchanges[g],
      )
    found = {g: [] for g in order}
    for n, g in itertools.product(range(4), order):
      metrics = next(runs[g]).metrics
      found[g].append(float(metrics['loss/total']))
      # From the first publications on.
      assert ('loss/distill' in metrics) == (n >= 2)
    return found

  there, back = losses((0, 1)), losses((1, 0))
  assert there == back and there[0] != there[1]


@pytest.mark.parametrize('method', ['diloco'], indirect=True)
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(make_job):
  job = make_job('broken')
  step = job.train_step

  class Poisoned:
    """Loses itself in its third update."""

    def __init__(self):
      self.__dict__.update(vars(step))
      self.place, self.collect = step.place, step.collect

    def __call__(self, state, batch, *args):
      if int(state.step) == 2:
        nan = jax.tree.map(lambda x: x * np.nan, state.opt_state)
        state = step.place(step.collect(state.replace(opt_state=nan)))
      return step(state, batch, *args)

  with pytest.raises(FloatingPointError, match=r'at step 4: \d+ logits .* not'):
    run(make_job('broken', train_step=Poisoned()))


@pytest.mark.parametrize('method', ['async'], indirect=True)
@pytest.mark.parametrize('rows', [3, 2])
def test_replicas_that_cannot_share_the_rows_are_refused(make_job, rows):
  """3 for two replicas, and 2 for two workers on each of them."""
  job = make_job()
  method = METHODS['async' if rows == 3 else 'diloco']
  experiment = dataclasses.replace(
      job.experiment, method=method, group_batch=rows
  )
  with pytest.raises(ValueError, match=f'group_batch={rows} is not divisible'):
    driver.new_state(dataclasses.replace(job, experiment=experiment))


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'method': 'async'}, "Experiment.method='async'; bind it to a method"),
        ({'method': AsynchronousSgd}, 'bind it to a method, such as'),
        ({'method': Diloco(workers=3)}, 'group_batch=4 .*to a multiple of 3'),
        (
            {
                'method': Diloco(2),
                'exchange': exchange_lib.Predictions(),
            },
            r'Predictions\(\) needs synchronous SGD in every group',
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make_experiment(**wrong)
  assert '\n' not in str(e.value)


def test_each_worker_reads_rows_of_its_own_group():
  method = AsynchronousSgd(3)
  experiment = make_experiment(method=method)
  stream = experiment_lib.train_stream(experiment, 1, 2)
  for n in range(7):
    k, w = divmod(n, 3)
    rows = slice(4 * w, 4 * w + 4)
    toy.assert_same(stream.batch(n), Rows(12, group_id=1, rows=rows).batch(k))


def test_no_method_is_synchronous_sgd():
  experiment = make_experiment()
  state = toy.start(toy.RECURRENT, toy.SGD)
  method = experiment_lib.method_of(experiment)
  assert method.init_state(toy.SGD, state) is state
  stream = experiment_lib.train_stream(experiment, 1, 2, slice(1, 3))
  expected = Rows(4, group_id=1, rows=slice(1, 3)).batch(5)
  toy.assert_same(stream.batch(5), base.host_copy(expected))
