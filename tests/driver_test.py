"""What surrounds the loop: resume, records, evaluation, saving, stopping."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import signal
import threading
import types

import jax
import numpy as np
import pytest
import tiny_run
import toy
from waits import PATIENCE, until

from codistill_jax import base, gin_utils, run_directory, writers
from codistill_jax import experiment as experiment_lib
from codistill_jax.exchange import publications
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.exchange.plan import NoExchange
from codistill_jax.exchange.publications import Publication
from codistill_jax.storage import checkpoints, files, leases
from codistill_jax.storage.background import Interrupted, Patience
from experiments import cli
from experiments.reports import run_records
from experiments.running import driver, watch
from experiments.running import job as job_lib
from experiments.running import processes as processes_lib

BATCH, STEPS = 4, 12
MODEL = toy.recurrent_model(units=4)
TASK = toy.TOKEN_TASK


make_experiment = functools.partial(toy.experiment, MODEL)


@pytest.fixture(scope='module')
def train_step():
  """Compiled once for all tests."""
  return experiment_lib.make_replicated_step(
      make_experiment(), MODEL, jax.devices()[:2]
  )


@pytest.fixture(autouse=True, scope='module')
def compile_once():
  """What every start of a group compiles takes longer than these runs."""
  states = {}
  init_state = experiment_lib.step.init_state

  def init(model, tx, rng, batch, **kwargs):
    key = (id(model), tuple(kwargs.items()))
    if key not in states:
      states[key] = base.host_copy(init_state(model, tx, rng, batch, **kwargs))
    return states[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment_lib.step, 'init_state', init)
    yield


@pytest.fixture
def real_lease():
  """Asked for by a test of two processes."""


@pytest.fixture(autouse=True)
def lease(request, monkeypatch):
  """A real one takes a while, and looks whether to stop meanwhile."""
  lease = FakeLease()
  if 'real_lease' not in request.fixturenames:
    monkeypatch.setattr(leases, 'acquire', lambda *args, **kwargs: lease)
  return lease


QUICK = Patience(retry=0.01)


@pytest.fixture
def make_job(train_step, tmp_path):
  def make(
      name='run',
      *,
      stop=None,
      agreement=base.ALONE,
      patience=QUICK,
      **kwargs,
  ):
    return job_lib.Job(
        experiment=make_experiment(**kwargs),
        model=MODEL,
        train_step=train_step,
        workdir=name if files.is_remote(name) else str(tmp_path / name),
        group_id=0,
        num_groups=1,
        stop=stop or cli.StopRequest(),
        agreement=agreement,
        patience=patience,
    )

  gin_utils.parse([])
  return make


def run(job, exchange=None, steps=None):
  """Trains; the steps it went through."""
  done = [] if steps is None else steps
  for step in driver.train(
      job,
      lambda variables: exchange or NoExchange(),
      watch.group_writer(job, progress=False),
  ):
    done.append(step)
  return done


def checkpoint_steps(job):
  return checkpoints.completed_steps(
      run_directory.checkpoints_dir(job.workdir, 0)
  )


def records_of(job):
  return tiny_run.records(job.workdir)


def curve_of(job, key):
  """Steps and values of a metric."""
  path = run_directory.metrics_path(job.workdir, 0)
  curve = run_records.read_group(path, 0).curve(key)
  return curve.index.tolist(), curve.tolist()


class StopAt:
  """Asked to stop from the n-th look on."""

  signal_number = signal.SIGTERM

  def __init__(self, looks):
    self._looks = looks
    self.unsaved, self.last_words = {}, {}

  def __call__(self):
    self._looks -= 1
    return self._looks < 0


def arrays(job, step=STEPS):
  return tiny_run.arrays_of(run_directory.checkpoints_dir(job.workdir, 0), step)


@pytest.mark.parametrize('name', ['run', 's3://bucket/run'])
def test_a_run_leaves_what_the_contract_says(make_job, name, request):
  if files.is_remote(name):
    request.getfixturevalue('bucket')
  job = make_job(name)
  assert run(job) == list(range(1, STEPS + 1))
  assert checkpoint_steps(job) == [4, 8, 12]
  assert files.exists(run_directory.done_path(job.workdir, 0))
  assert files.exists(run_directory.config_path(job.workdir))
  training = [r for r in records_of(job) if 'loss/task' in r]
  assert [r['step'] for r in training] == [2, 4, 6, 8, 10, 12]
  assert [r['step'] for r in records_of(job) if 'eval/loss' in r] == [6, 12]
  for record in training:
    assert record['perf/examples_per_sec'] == pytest.approx(
        record['perf/steps_per_sec'] * BATCH * 3
    )
    # Three forward passes, of h W and the head, for each token.
    assert record['perf/model_flops_per_step'] == 3 * BATCH * 3 * 2 * 4 * (
        4 + 7
    )
    assert record['perf/model_flops_per_sec'] == pytest.approx(
        record['perf/steps_per_sec'] * record['perf/model_flops_per_step']
    )
    assert record['perf/teacher_share'] == 0.0
    assert 'perf/utilisation' not in record  # Of a CPU no peak is known.
  status = run_directory.read_status(job.workdir, 0)
  assert (status['step'], status['phase']) == (STEPS, 'done')


def test_the_last_step_is_evaluated_and_saved_wherever_it_falls(make_job):
  job = make_job(num_steps=7, eval_every=5, checkpoint_every=100)
  run(job)
  assert [r['step'] for r in records_of(job) if 'eval/loss' in r] == [5, 7]
  assert checkpoint_steps(job) == [7]


def test_a_finished_run_is_left_alone(make_job, tmp_path):
  job = make_job()
  run(job)
  before = tiny_run.snapshot(tmp_path)
  assert run(job) == []
  assert tiny_run.snapshot(tmp_path) == before


def stop_and_resume(make_job, looks):
  with pytest.raises(cli.Stopped) as e:
    run(make_job(stop=StopAt(looks)))
  return e.value


# A pass over the two validation batches, at steps 6 and 12, looks twice: so
# 5 and 13 stop where an evaluation is due, 6 and 14 in the middle of it.
@pytest.mark.parametrize(
    'looks, at',
    [(0, 1), (4, 5), (5, 6), (6, 6), (8, 7), (13, 12), (14, 12)],
)
def test_a_stopped_run_ends_with_the_same_bits(make_job, looks, at):
  """Also the recurrent state and the moments of the optimiser go on."""
  straight = make_job('straight')
  run(straight)
  error = stop_and_resume(make_job, looks)
  assert error.exit_status == 143
  assert f'stopped and saved at step {at}' in str(error)
  job = make_job()
  assert checkpoint_steps(job)[-1] == at
  assert not run_directory.done_path(job.workdir, 0).exists()
  assert run(job) == list(range(at + 1, STEPS + 1))
  tiny_run.assert_same_bits(arrays(job), arrays(straight))
  evaluations = [curve_of(one, 'eval/loss') for one in (job, straight)]
  assert evaluations[0] == evaluations[1]
  steps = [r['step'] for r in records_of(job) if 'loss/task' in r]
  assert steps == [2, 4, 6, 8, 10, 12]


def test_processes_that_end_together_leave_out_no_last_evaluation(make_job):
  """They stop where they agree to, and beyond the last step they do not."""
  together = base.ALONE._replace(all_true=base.ALONE.all_true)
  assert together is not base.ALONE
  job = make_job(stop=StopAt(14), agreement=together)
  assert run(job)[-1] == STEPS
  assert curve_of(job, 'eval/loss')[0] == [6, 12]


@pytest.mark.parametrize('broken', [False, True])
def test_a_writer_of_ones_own_gets_every_record_and_cannot_end_the_run(
    make_job, caplog, broken
):
  records, places = [], []

  class Mine:

    def __init__(self, source):
      places.append((source.directory, source.arm, source.start))

    def write(self, step, metrics):
      if broken:
        raise RuntimeError('no network')
      records.append({'step': step, **metrics})

    def close(self):
      records.append('closed')

  job = make_job(writers=[Mine])
  run(job)
  assert places == [(job.directory, 'run', 0)]
  assert records.pop() == 'closed'
  written = records_of(job)
  for record in written:
    del record['time']
  assert records == [] if broken else records == written
  status = run_directory.read_status(job.workdir, 0)
  doing = [trouble['doing'] for trouble in status['troubles']]
  assert [text.endswith('Mine') for text in doing] == [True] * broken
  assert sum('no network' in r.getMessage() for r in caplog.records) == broken


def test_all_groups_that_go_on_from_an_evaluation_tell_of_it(make_job):
  """Of those killed amid it some have a record: an ensemble needs all."""
  told = []
  for stop in (StopAt(8), None):
    job = dataclasses.replace(
        make_job(stop=stop, checkpoint_every=6),
        evaluated=lambda group_id, step, variables: told.append(step),
    )
    with contextlib.suppress(cli.Stopped):
      run(job)
    shutil.rmtree(
        run_directory.checkpoints_dir(job.workdir, 0) / '7', ignore_errors=True
    )
  assert told == [6, 6, 12]
  assert curve_of(job, 'eval/loss')[0] == [6, 12]


def test_a_record_is_the_mean_since_the_last_one(make_job):
  one, two = make_job('one', log_every=1), make_job('two', log_every=3)
  for job in (one, two):
    run(job)
  steps, each = curve_of(one, 'loss/task')
  assert steps == list(range(1, STEPS + 1))
  # A record is due at a checkpoint, too: at 4 and 8.
  steps, means = curve_of(two, 'loss/task')
  assert steps == [3, 4, 6, 8, 9, 12]
  for start, stop, mean in zip([0, *steps], steps, means):
    assert mean == pytest.approx(np.mean(each[start:stop]), rel=1e-6)


def test_records_after_the_checkpoint_are_written_once(make_job, monkeypatch):
  """As after a kill: metrics go on beyond what was saved."""
  job = make_job()
  turns = driver.train(
      job, lambda v: NoExchange(), watch.group_writer(job, progress=False)
  )
  for step in turns:
    if step == 7:
      break
  turns.close()
  assert [r['step'] for r in records_of(job)] == [2, 4, 6, 6]
  assert run(make_job()) == [5, 6, 7, 8, 9, 10, 11, 12]
  steps = [r['step'] for r in records_of(job) if 'loss/task' in r]
  assert steps == [2, 4, 6, 8, 10, 12]


def test_a_kill_between_last_checkpoint_and_done_costs_nothing(make_job):
  job = make_job()
  run(job)
  run_directory.done_path(job.workdir, 0).unlink()
  before = arrays(job)
  assert run(job) == []
  assert run_directory.done_path(job.workdir, 0).exists()
  tiny_run.assert_same_bits(arrays(job), before)


def test_evaluation_gives_way_to_a_stop_request(make_job):
  with pytest.raises(cli.Stopped):
    run(make_job(stop=StopAt(5)))  # At step 6, where one is due.
  assert not [r for r in records_of(make_job()) if 'eval/loss' in r]


def test_a_gradient_that_is_not_finite_is_never_saved(make_job):
  """The loss before it still was: the parameters after it are not."""
  model = MODEL._replace(apply=lambda v, *args: MODEL.apply(_explode(v), *args))
  train_step = experiment_lib.make_replicated_step(
      make_experiment(), model, jax.devices()[:2]
  )
  job = dataclasses.replace(
      make_job(log_every=50, stop=StopAt(0)),
      model=model,
      train_step=train_step,
  )
  with pytest.raises(
      FloatingPointError, match='gradient of a finite loss is not'
  ):
    run(job)
  assert checkpoint_steps(job) == []


@jax.custom_vjp
def _explode(tree):
  """The identity, with a gradient that is not a number."""
  return tree


_explode.defvjp(
    lambda tree: (tree, None),
    lambda _, grads: (jax.tree.map(lambda g: g * np.nan, grads),),
)


def test_a_second_trainer_of_one_group_is_refused(make_job, real_lease):
  first = driver.train(
      make_job(),
      lambda variables: NoExchange(),
      watch.group_writer(make_job(), progress=False),
  )
  next(first)
  with pytest.raises(ValueError, match=r'training in .*group_0'):
    run(make_job())
  assert list(first) == list(range(2, STEPS + 1))


def test_the_trace_of_some_updates_is_written(make_job):
  job = dataclasses.replace(make_job(), profile=range(3, 5))
  assert run(job) == [*range(1, STEPS + 1)]
  directory = pathlib.Path(run_directory.profile_dir(job.workdir, 0))
  # For XProf; and for Perfetto.
  (traced,) = directory.rglob('*.xplane.pb')
  assert traced.stat().st_size
  (shown,) = directory.rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(shown.read_bytes()))['traceEvents']
  steps = [e['args']['step_num'] for e in events if e.get('name') == 'update']
  assert sorted(steps) == ['3', '4']


@pytest.mark.parametrize(
    'place, steps, words',
    [
        ('run', range(2, STEPS + 1), 'beyond Experiment.num_steps = 12'),
        ('s3://bucket/run', range(2, 4), 'object store'),
    ],
)
def test_a_trace_that_cannot_be_is_refused(make_job, place, steps, words):
  job = dataclasses.replace(make_job(), workdir=place, profile=steps)
  with pytest.raises(ValueError, match=f'--profile_steps.*{words}'):
    watch.check_profile(job)


def test_a_mistake_in_the_first_update_leaves_the_workdir_free(
    make_job, monkeypatch
):
  def dead():
    raise ValueError('acts nowhere')

  monkeypatch.setattr(gin_utils, 'check_no_dead_bindings', dead)
  job = make_job()
  with pytest.raises(ValueError, match='acts nowhere'):
    run(job)
  assert not run_directory.run_path(job.workdir).exists()
  monkeypatch.setattr(gin_utils, 'check_no_dead_bindings', lambda: None)
  monkeypatch.setattr(gin_utils, 'configuration', lambda: ['a.b = corrected'])
  assert run(job) == list(range(1, STEPS + 1))


def test_the_configuration_is_that_of_the_run_that_began(make_job):
  job = make_job()
  path = run_directory.config_path(job.workdir)
  files.write_bytes(path, b'planted')
  run(job)
  text = path.read_bytes()
  assert text != b'planted'
  state = driver.new_state(job).state
  job_lib.check_workdir(job, state)
  path.write_bytes(b'planted')
  with pytest.raises(ValueError, match=r'is not what this run wrote.*delete'):
    job_lib.check_workdir(job, state)
  path.unlink()
  job_lib.check_workdir(job, state)
  job_lib.claim_workdir(job, state)
  assert path.read_bytes() == text


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(make_job):
  class Poisoned(toy.Tokens):

    def batch(self, step):
      batch = super().batch(step)
      if step >= 5:
        batch['weights'] = np.full_like(batch['weights'], np.inf)
      return batch

  task = TASK._replace(train_stream=lambda group_batch, **_: Poisoned(BATCH))
  job = make_job(task=task)
  with pytest.raises(ValueError, match='step 6: 12 weights'):
    run(job)
  assert checkpoint_steps(job) == [4]
  # A run that only looks at its loss when it saves does not save it either.
  job = make_job('rarely', task=task, log_every=100)
  with pytest.raises(ValueError, match='step 8'):
    run(job)
  assert checkpoint_steps(job) == [4]


class Recorder(NoExchange):
  """Remembers what it was told."""

  def __init__(self, in_use=(), interrupt_at=None):
    self.in_use = in_use
    self.told, self.restored, self.closed = [], None, False
    self._interrupt_at = interrupt_at

  def fetch(self, step):
    if step == self._interrupt_at:
      raise Interrupted('stopped while waiting')

  def restore(self, step, teacher_steps):
    self.restored = (step, tuple(teacher_steps))

  def checkpointed(self, step):
    self.told.append(step)

  def close(self):
    self.closed = True


def test_peers_are_told_of_checkpoints_that_are_on_disk(make_job):
  job = make_job()
  exchange = Recorder()
  exchange.checkpointed = lambda step: exchange.told.append(
      (step, step in checkpoint_steps(job))
  )
  run(job, exchange)
  assert exchange.told[-1] == (min(checkpoint_steps(job)), True)
  assert all(on_disk for _, on_disk in exchange.told)
  assert exchange.closed


def failing_saves(monkeypatch, steps):
  """The disk is full whenever one of these steps is saved."""
  original = checkpoints.save

  def save(directory, step, *args):
    if step in steps:
      raise OSError(errno.ENOSPC, 'no space left on device')
    return original(directory, step, *args)

  monkeypatch.setattr(checkpoints, 'save', save)


def test_a_full_disk_does_not_end_training(make_job, monkeypatch, caplog):
  """Nor are peers told of a checkpoint that failed."""
  failing_saves(monkeypatch, {8})
  exchange = Recorder()
  # Step 8 is tried once, and waits for step 12 to take its place.
  job = make_job(patience=Patience(retry=PATIENCE, hold=PATIENCE))
  with caplog.at_level('WARNING', logger='absl'):
    assert run(job, exchange) == list(range(1, STEPS + 1))
  assert checkpoint_steps(job) == [4, 12]
  assert set(exchange.told) == {4}
  assert run_directory.done_path(job.workdir, 0).exists()
  assert job.troubles.failures == 1 and not job.troubles.now
  assert caplog.text.count('saving a resume checkpoint fails') == 1


def test_a_disk_that_stays_full_ends_the_run_in_the_end(make_job, monkeypatch):
  failing_saves(monkeypatch, {8, 12})
  exchange = Recorder()
  steps = []
  with pytest.raises(TimeoutError, match='no space left') as e:
    run(make_job(patience=Patience(failing=0.2)), exchange, steps)
  assert 'goes on from step 4' in str(e.value)
  assert steps[-1] == STEPS  # Training itself went on.
  assert set(exchange.told) <= {4} and exchange.closed
  assert not run_directory.done_path(make_job().workdir, 0).exists()
  assert cli.say(e.value) == cli.MAY_PASS


def test_a_stop_on_a_full_disk_says_what_is_lost(make_job, monkeypatch):
  failing_saves(monkeypatch, {6})
  job = make_job(stop=StopAt(5), patience=Patience(failing=0.2))
  with pytest.raises(TimeoutError, match=r'step 6 .* goes on from step 4'):
    run(job)


def test_signs_of_life_may_fail(make_job, monkeypatch):
  def fail(*unused):
    raise PermissionError(errno.EACCES, 'not yours')

  monkeypatch.setattr(run_directory, 'write_status', fail)
  job = make_job()
  assert run(job)[-1] == STEPS
  assert [t.doing for t in job.troubles.now] == ['writing status.json']


def test_the_run_directory_is_claimed_once_its_disk_works(
    make_job, monkeypatch
):
  original, failures = run_directory.write_run, []

  def write(workdir, content):
    if len(failures) < 2:
      failures.append(content)
      raise OSError(errno.ENOSPC, 'disk full')
    original(workdir, content)

  monkeypatch.setattr(run_directory, 'write_run', write)
  job = make_job()
  claimed = [
      step
      for step in driver.train(
          job, lambda v: NoExchange(), lambda start: writers.NullWriter()
      )
      if run_directory.run_path(job.workdir).exists()
  ]
  # Tried after the first update, then at each record: at 2 and at 4.
  assert claimed[0] == 4 and len(failures) == 2


def test_done_is_tried_again(make_job, monkeypatch):
  original, tries = files.write_bytes, []

  def write(path, data, **how):
    if path.name == 'DONE':
      tries.append(path)
      if len(tries) < 3:
        raise OSError(errno.ENOSPC, 'disk full')
    original(path, data, **how)

  monkeypatch.setattr(files, 'write_bytes', write)
  job = make_job()
  run(job)
  assert run_directory.done_path(job.workdir, 0).exists()

  run_directory.done_path(job.workdir, 0).unlink()
  tries.clear()
  with pytest.raises(TimeoutError, match='reached its last step'):
    run(make_job(patience=Patience(retry=60.0, failing=0.0)))


def test_a_lost_lease_ends_the_run_without_saving(make_job, lease):
  turns = driver.train(
      make_job(),
      lambda v: NoExchange(),
      watch.group_writer(make_job(), progress=False),
  )
  with pytest.raises(leases.LostError, match='another'):
    for step in turns:
      lease.lost = step >= 6
  assert checkpoint_steps(make_job()) == [4]
  assert lease.released


def test_a_stop_while_waiting_for_a_lease(make_job, monkeypatch):
  def acquire(*unused, interrupted, **others):
    assert interrupted()
    raise Interrupted()

  monkeypatch.setattr(leases, 'acquire', acquire)
  with pytest.raises(cli.Stopped) as e:
    run(make_job(stop=StopAt(0)))
  assert e.value.exit_status == 143
  assert checkpoint_steps(make_job()) == []


class FakeLease:

  lost = released = False

  def check(self):
    if self.lost:
      raise leases.LostError('another process took over')

  def release(self):
    self.released = True


def test_each_exchange_is_on_record(make_job):
  class Peer(Recorder):
    peers = (1,)

    def metrics(self, step):
      return {'exchange/staleness_steps_group_1': float(step % 5)}

  job = make_job(exchange=Checkpoints(5), log_every=100, checkpoint_every=100)
  run(job, Peer())
  steps, _ = curve_of(job, 'exchange/staleness_steps_group_1')
  assert steps == [5, 10, 12]
  job = make_job(
      'alone', exchange=Checkpoints(5), log_every=100, checkpoint_every=100
  )
  run(job)
  training = [r['step'] for r in records_of(job) if 'loss/task' in r]
  assert training == [12]


# How a group ends; what its status then says of it, and why.
ENDS = {
    'done': ('done', None),
    'asked': ('stopped', cli.Stopped),
    'asked while it waits': ('stopped', cli.Stopped),
    'asked amid an evaluation': ('stopped', cli.Stopped),
    'left by its process': ('stopped', None),
    'not finite': ('failed', FloatingPointError),
    'disk': ('failed', TimeoutError),
    'crash': ('failed', KeyError),
    'DONE cannot be written': ('failed', TimeoutError),
}


@pytest.mark.parametrize('how', ENDS)
def test_the_last_status_says_how_the_process_ended(make_job, monkeypatch, how):
  phase, error = ENDS[how]
  stop = {'asked': StopAt(3), 'asked amid an evaluation': StopAt(6)}.get(how)
  exchange = Recorder(interrupt_at=5 if how == 'asked while it waits' else None)
  patience = Patience(retry=0.01, failing=0.05)
  job = make_job(stop=stop, patience=patience)
  if how == 'not finite':
    monkeypatch.setattr(driver, 'check_finite', _raise(FloatingPointError('x')))
  elif how == 'disk':
    failing_saves(monkeypatch, {12})
  elif how == 'crash':
    exchange.checkpointed = _raise(KeyError('x'))
  elif how == 'DONE cannot be written':
    done = run_directory.done_path(job.workdir, 0)
    done.parent.mkdir(parents=True)
    write = files.write_bytes
    refuse = _raise(OSError(errno.ENOSPC, 'full'))
    monkeypatch.setattr(
        files,
        'write_bytes',
        lambda path, *args, **how: (refuse if path == done else write)(
            path, *args, **how
        ),
    )
  turns = driver.train(
      job, lambda v: exchange, watch.group_writer(job, progress=False)
  )
  with pytest.raises(error) if error else contextlib.nullcontext():
    for step in turns:
      if how == 'left by its process' and step == 3:
        turns.close()
  status = run_directory.read_status(job.workdir, 0)
  assert status['phase'] == phase
  assert bool(status['reason']) == (phase == 'failed')
  assert not [t for t in threading.enumerate() if t.name == 'heartbeat']


def _raise(error):
  def call(*unused, **unused_by_name):
    raise error

  return call


def test_a_long_update_does_not_look_like_a_death(make_job, monkeypatch):
  """A compilation of minutes: the heart beats on, and says what it is."""
  monkeypatch.setattr(watch, '_BEAT_SECONDS', 0.01)
  job = make_job()
  read = lambda: run_directory.read_status(job.workdir, 0) or {}
  seen = []

  class Slow(Recorder):
    peers = (1,)

    def fetch(self, step):
      if step in (0, 5):  # A program is compiled: without teachers, and with.
        self.in_use = (Publication(1, 40, 7.0),) if step else ()
        until(lambda: read().get('phase') == 'compiling')
        first = read()['time']
        until(lambda: read()['time'] > first)
        seen.append((step, read()['step'], read()['phase']))

  run(job, Slow())
  assert seen == [(0, 0, 'compiling'), (5, 5, 'compiling')]


def test_status_says_how_the_exchange_fares(make_job):
  exchange = Recorder((Publication(1, 40, 7.0), None))
  exchange.peers = (1, 2)
  exchange.rejected, exchange.last_rejection = 3, 'step 50 is torn'
  job = make_job()
  job.troubles.failed('publishing', OSError('disk full'))
  run(job, exchange)
  status = run_directory.read_status(job.workdir, 0)
  assert status['peers'] == [1, 2]
  assert status['teachers'] == [{'peer': 1, 'step': 40, 'time': 7.0}]
  assert (status['rejected'], status['last_rejection']) == (
      3,
      'step 50 is torn',
  )
  (trouble,) = status['troubles']
  assert (trouble['doing'], trouble['reason']) == ('publishing', 'disk full')


def test_a_restart_hands_the_teachers_steps_to_the_exchange(make_job):
  used = (Publication(1, 40, 0.0), None)
  with pytest.raises(cli.Stopped):
    run(make_job(stop=StopAt(2)), Recorder(used))
  exchange = Recorder()
  run(make_job(), exchange)
  assert exchange.restored == (3, (40, None))
  assert exchange.told[0] == 3


@pytest.mark.parametrize('at, saved', [(5, 5), (4, 4)])
def test_a_stop_while_waiting_saves_the_last_update(make_job, at, saved):
  with pytest.raises(cli.Stopped, match=f'saved at step {saved}'):
    run(make_job(), Recorder(interrupt_at=at))
  assert checkpoint_steps(make_job())[-1] == saved


def test_a_stop_while_waiting_before_the_first_update(make_job):
  with pytest.raises(cli.Stopped):
    run(make_job(), Recorder(interrupt_at=4))
  exchange = Recorder(interrupt_at=4)
  with pytest.raises(cli.Stopped, match='saved at step 4'):
    run(make_job(), exchange)
  assert checkpoint_steps(make_job()) == [4]
  assert exchange.closed


def test_everything_is_closed_though_one_of_it_fails(make_job):
  exchange, closed = Recorder(), []

  def close():
    raise OSError('stale file handle')

  exchange.close = close
  job = make_job()
  writer = writers.NullWriter()
  writer.close = lambda: closed.append('writer')
  with pytest.raises(OSError, match='stale'):
    list(driver.train(job, lambda v: exchange, lambda step: writer))
  assert closed == ['writer']
  assert checkpoint_steps(job)[-1] == STEPS
  assert not run_directory.done_path(job.workdir, 0).exists()


def test_an_error_on_its_way_is_not_hidden_by_closing(make_job):
  exchange = Recorder(interrupt_at=5)

  def close():
    raise OSError('stale file handle')

  exchange.close = close
  with pytest.raises(cli.Stopped):
    run(make_job(), exchange)


def test_processes_of_a_group_stop_at_one_record(make_job):
  """Each is asked at a different step; all stop when all know."""
  asked = []

  def all_true(go_on):
    asked.append(bool(go_on))
    return np.array(len(asked) < 3)  # The other one was asked before.

  agreement = base.Agreement(True, lambda x: x, all_true)
  with pytest.raises(cli.Stopped, match='saved at step 6'):
    run(make_job(agreement=agreement))
  # An evaluation is due there, which the others would wait for.
  assert not [r for r in records_of(make_job()) if 'eval/loss' in r]
  assert asked == [True] * 4  # At the end they meet, before any leaves.


def test_only_the_primary_process_writes(make_job, tmp_path):
  agreement = base.Agreement(False, lambda x: x, lambda x: x)
  job = make_job(agreement=agreement)
  assert run(job) == list(range(1, STEPS + 1))
  assert tiny_run.snapshot(tmp_path) == {}


def test_a_run_directory_belongs_to_one_configuration(make_job, monkeypatch):
  job = make_job()
  state = driver.new_state(job).state
  configuration = ['a.b = 1', 'c.d = 2']
  monkeypatch.setattr(gin_utils, 'configuration', lambda: configuration)
  job = dataclasses.replace(job, arm='ours')
  job_lib.claim_workdir(job, state)
  run_json = run_directory.run_path(job.workdir).read_text()
  assert json.loads(run_json)['arm'] == 'ours'
  job_lib.claim_workdir(job, state)  # The same again.
  for other, message in [
      (['a.b = 1', 'c.d = 3'], 'it has c.d = 2, this one has c.d = 3'),
      (['a.b = 1'], 'it has c.d = 2, this one has no such binding'),
      (
          ['a.a = 0', 'a.b = 1', 'c.d = 2'],
          'it has no such binding, this one has a.a = 0',
      ),
  ]:
    monkeypatch.setattr(gin_utils, 'configuration', lambda o=other: o)
    with pytest.raises(ValueError, match=message):
      job_lib.check_workdir(job, state)
  assert run_directory.run_path(job.workdir).read_text() == run_json


X, N = 'x.Experiment', 'x.Experiment.num_steps'


@pytest.mark.parametrize(
    'before, after, refused',
    [
        ([f'{N} = 6'], [f'{N} = 9'], ''),
        ([], [f'{N} = 9', f'{X}.eval_every = 3'], ''),
        ([f'{X}.log_every = 5', f'{X}.checkpoint_every = 6'], [], ''),
        ([f"{N} = '%S'", 'S = 6'], [f"{N} = '%S'", 'S = 9'], ''),
        # A schedule that ends with the run does so.
        *(
            (
                [f"{N} = '%S'", f"{to} = '%S'", 'S = 6'],
                [f"{N} = '%S'", f"{to} = '%S'", 'S = 9'],
                '',
            )
            for to in ('s.cosine.total_steps', f'{X}.eval_every')
        ),
        # But not one that is told of a length of its own.
        (['s.cosine.total = 6'], ['s.cosine.total = 9'], 'total = 6.*= 9'),
        (['S = 6', 'c.t = %S'], ['S = 9', 'c.t = %S'], 'S = 6.*S = 9'),
        (
            [f"{X}.eval_every = '%E'", "c.every = '%E'", 'E = 6'],
            [f"{X}.eval_every = '%E'", "c.every = '%E'", 'E = 9'],
            'E = 6.*E = 9',
        ),
        ([f'{X}.group_batch = 6'], [f'{X}.group_batch = 9'], '= 6.*= 9'),
        ([f'{X}.seed = 1'], [], 'seed = 1.*no such binding'),
        (['Other.eval_every = 1'], [], 'no such binding'),
        ([f'{N}_of_another = 1'], [], 'no such binding'),
    ],
)
def test_what_changes_no_number_may_change(
    make_job, monkeypatch, before, after, refused
):
  job = make_job()
  state = driver.new_state(job).state
  monkeypatch.setattr(gin_utils, 'configuration', lambda: before)
  job_lib.claim_workdir(job, state)
  monkeypatch.setattr(gin_utils, 'configuration', lambda: after)
  if refused:
    for act in (job_lib.check_workdir, job_lib.claim_workdir):
      with pytest.raises(ValueError, match=refused):
        act(job, state)
  else:
    for _ in range(2):
      job_lib.check_workdir(job, state)
      job_lib.claim_workdir(job, state)
  found = run_directory.read_run(job.workdir)
  assert found['configuration'] == (before if refused else after)
  gone = [s for s in before if s not in after]
  assert found.get('earlier', []) == ([] if refused else gone)


def test_a_run_that_was_done_goes_on_to_more_steps(make_job):
  """With the bits of one that was that long from the start."""
  run(make_job('whole'))
  assert run(make_job(num_steps=5, log_every=3)) == [1, 2, 3, 4, 5]
  assert run(make_job(num_steps=5)) == []
  assert run(make_job(eval_every=4)) == list(range(6, STEPS + 1))
  assert run(make_job()) == []
  tiny_run.assert_same_bits(
      *(
          tiny_run.saved_arrays(make_job(name).workdir, 0)[1]
          for name in ('run', 'whole')
      )
  )
  shorter = make_job(num_steps=STEPS - 1)
  with pytest.raises(ValueError, match=rf'reached step {STEPS}.*=11;'):
    job_lib.check_workdir(shorter, driver.new_state(shorter).state)


@pytest.mark.parametrize('damage', [b'', b'{"arm": ', bytes(64), b'[]'])
def test_a_damaged_run_json_is_written_again(
    make_job, monkeypatch, capsys, damage
):
  """As after a power cut; but not over a run of another configuration."""
  job = make_job(num_steps=2)
  run(job)
  path = run_directory.run_path(job.workdir)
  whole = path.read_bytes()
  path.write_bytes(damage)
  job = make_job(num_steps=3)
  job_lib.check_workdir(job, driver.new_state(job).state)
  assert run(job) == [3]
  assert 'run.json' in capsys.readouterr().err
  assert json.loads(path.read_bytes()) == json.loads(whole) | {'num_steps': 3}
  path.write_bytes(damage)
  config = run_directory.config_path(job.workdir)
  config.write_text('a.b = 1\n')
  with pytest.raises(ValueError, match=r'it has a.b = 1, this one has no such'):
    run(make_job(num_steps=4))
  config.write_text('')  # Neither is whole.
  assert run(make_job(num_steps=4)) == [4]
  assert 'configuration' in run_directory.read_run(job.workdir)


def test_leftovers_are_removed_at_the_start_and_counted(make_job, caplog):
  job = make_job(num_steps=2)
  run(job)
  group = run_directory.group_dir(job.workdir, 0)
  steps = run_directory.checkpoints_dir(job.workdir, 0)
  left = [
      run_directory.run_path(job.workdir).parent / '.run.json.0123abcd.tmp',
      group / '.status.json.ffffffff.tmp',
      steps / '1.damaged' / 'record.json',
      steps / '7' / 'record.json',
  ]
  others = [group / 'notes.tmp', steps / 'mine.damaged' / 'a']
  for path in left + others:
    path.parent.mkdir(exist_ok=True)
    path.write_text('')
  # What another group may be writing as it starts is not taken for one.
  os.utime(left[0], (0, 0))
  others.append(left[0].with_name('.config.gin.4567abcd.tmp'))
  others[-1].write_text('')
  with caplog.at_level(logging.WARNING, logger='absl'):
    run(make_job(num_steps=3))
  assert not any(path.exists() for path in left)
  assert all(path.exists() for path in others)
  assert 'Group 0: removed 4 leftovers' in caplog.text


# --- Where a run begins ------------------------------------------------------


def begun(make_job, init_from, **kwargs):
  job = dataclasses.replace(make_job('new', **kwargs), init_from=init_from)
  return job, driver.new_state(job).state


@pytest.mark.parametrize(
    'where',
    [
        '',
        'groups/group_0/checkpoints',
        'groups/group_0/checkpoints/4',
        'exchange/group_0',
        'exchange/group_0/4',
    ],
)
def test_a_run_begins_at_a_checkpoint_or_a_publication(make_job, where):
  first = make_job(num_steps=4)
  run(first)
  _, arrays = tiny_run.saved_arrays(first.workdir, 0)
  trained = driver.new_state(first).state.variables
  trained = jax.tree.unflatten(
      jax.tree.structure(trained),
      [x for path, x in arrays.items() if path.startswith('variables/')],
  )
  publications.write(
      run_directory.exchange_root(first.workdir),
      Publication(0, 4, 1.0),
      trained,
  )
  job, state = begun(make_job, f'{first.workdir}/{where}'.rstrip('/'))
  fresh = driver.new_state(make_job('another')).state
  assert jax.tree.all(jax.tree.map(np.array_equal, state.variables, trained))
  rest = lambda state: state.replace(variables=None)
  assert jax.tree.all(jax.tree.map(np.array_equal, rest(state), rest(fresh)))
  assert run(job) == list(range(1, STEPS + 1))
  known = run_directory.read_run(job.workdir)['init_from']
  assert known == f'{first.workdir}/{where}'.rstrip('/')
  other = make_job('new')
  with pytest.raises(ValueError, match=f'--init_from={known}, this one has'):
    job_lib.check_workdir(other, state)


def test_a_run_does_not_begin_where_nothing_fits(make_job, tmp_path):
  with pytest.raises(ValueError, match='has no checkpoint or publication'):
    begun(make_job, str(tmp_path / 'nowhere'))
  checkpoints.save(tmp_path, 3, {'params': {'x': np.ones(3)}}, {})
  with pytest.raises(ValueError, match=r'--init_from=.*/3 is of another'):
    begun(make_job, str(tmp_path))


def test_a_run_says_what_it_was_made_with(make_job, monkeypatch):
  monkeypatch.setenv('SLURMD_NODENAME', 'node7')
  job = make_job(num_steps=2)
  run(job)
  found = run_directory.read_run(job.workdir)
  assert (found['device'], found['host']) == ('cpu', 'node7')
  assert run_directory.read_status(job.workdir, 0)['host'] == 'node7'
  versions = found['versions']
  assert versions['python'] == platform.python_version()
  assert versions['jax'] == jax.__version__
  assert {'jaxlib', 'flax', 'optax', 'orbax-checkpoint'} <= versions.keys()
  if (tiny_run.ROOT / '.git').exists():
    assert re.fullmatch('[0-9a-f]{40}(-dirty)?', versions['commit'])


def test_burn_in_of_a_run_is_where_its_weight_begins(make_job):
  job = make_job(distill_weight=lambda step: float(step >= 5))
  state = driver.new_state(job).state
  assert job_lib.describe_run(job, state)['burn_in_steps'] == 5
  job = make_job(distill_weight=lambda step: 0.0)
  assert job_lib.describe_run(job, state)['burn_in_steps'] == STEPS


def test_a_start_reads_one_row_of_the_data(make_job):
  """A group batch of images takes a minute to decode, and gigabytes."""
  read = []

  def train_stream(*, group_batch, rows, **_):
    stream = toy.Tokens(group_batch)

    def batch(step):
      read.append((rows, step))
      return {k: v[rows or slice(None)] for k, v in stream.batch(step).items()}

    return types.SimpleNamespace(batch=batch)

  job = make_job(task=TASK._replace(train_stream=train_stream))
  start = driver.new_state(job)
  assert read == [(slice(0, 1), 0)]
  assert start.examples == 3 * BATCH
  assert len(start.stream.batch(0)['labels']) == BATCH
  assert start.state.carry.shape == (BATCH, 4)


def test_a_group_batch_that_cannot_be_shared_is_refused(make_job):
  with pytest.raises(ValueError, match=r'group_batch=5 .*2 replicas'):
    driver.new_state(make_job(group_batch=5))


def test_devices_are_chosen_by_number():
  assert job_lib.chosen_devices(0) is None
  assert job_lib.chosen_devices(3) == jax.local_devices()[:3]
  with pytest.raises(ValueError, match=r'--replicas=9, but .* 4 devices'):
    job_lib.chosen_devices(9)
  with pytest.raises(ValueError, match='--replicas=-1'):
    job_lib.use_replicas(-1)


@pytest.mark.parametrize(
    'replicas, processes, kind, files, said',
    [
        (2, 1, 'cpu', [], '2 replica(s) on cpu'),
        (8, 2, 'H200', ['nvidia0'], '4 in each of 2 processes'),
        (
            1,
            1,
            'H200',
            ['nvidia0', 'nvidia1'],
            '; 1 of the 2 that this machine',
        ),
        (4, 1, 'TPU', ['vfio/0', 'accel1', 'vfio/vfio'], 'replica(s) on TPU'),
        (1, 1, 'cpu', ['nvidia0', 'nvidiactl'], 'machine has 1 accelerator'),
    ],
)
def test_a_group_says_what_it_trains_on_and_what_it_leaves(
    tmp_path, replicas, processes, kind, files, said
):
  (tmp_path / 'vfio').mkdir()
  for name in files:
    (tmp_path / name).touch()
  present = processes_lib.accelerators(str(tmp_path))
  found = job_lib.describe_devices(replicas, processes, kind, present)
  assert found.startswith(f'{replicas} replica(s) on {kind}') and said in found
  assert ('machine' in said) == ('machine' in found)


def test_the_start_of_a_run_is_checked_before_its_first_update(
    make_job, capsys
):
  driver.check_start(job := make_job(), start := driver.new_state(job))
  assert capsys.readouterr() == ('group 0: 2 replica(s) on cpu\n', '')
  driver.check_start(make_job(eval_every=500), start)
  said = capsys.readouterr().err
  assert said.startswith('warning: eval_every = 500; but the run ends at')
  assert f'num_steps = {STEPS}' in said
  task = TASK._replace(eval_batches=lambda rows: iter([]))
  with pytest.raises(ValueError, match='can be read but once'):
    driver.check_start(make_job(task=task), start)
  broken = MODEL._replace(apply=lambda *args: {}['integers'])
  job = dataclasses.replace(
      job,
      train_step=experiment_lib.make_replicated_step(
          job.experiment, broken, jax.devices()[:1]
      ),
  )
  with pytest.raises(
      ValueError, match="cannot be traced: KeyError: 'integers'"
  ):
    driver.check_start(
        job,
        start._replace(
            efficiency=watch.Efficiency(
                job, start.state, experiment_lib.first_row(job.experiment, 1)
            )
        ),
    )
