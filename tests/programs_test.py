"""Programs: compiled before they are needed, and once for a machine."""

import collections
import contextlib
import os
import shutil
import threading

import all_groups
import jax
import pytest
import toy
from jax.experimental.compilation_cache import compilation_cache

from codistill_jax import experiment as experiment_lib
from codistill_jax import one_program, peer_predictions, programs
from codistill_jax.base import REPLICA_AXIS
from codistill_jax.exchange.kinds import Checkpoints
from codistill_jax.experiment import Experiment
from codistill_jax.replicas import PmapStep
from codistill_jax.step import make_train_step
from experiments import cli

MODEL, TX = toy.RECURRENT, toy.ADAM


@pytest.fixture
def kept(tmp_path):
  """Nothing is kept before; what a test keeps is its own."""
  names = (
      'jax_compilation_cache_dir',
      'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  yield tmp_path / 'kept'
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def keep(directory):
  programs.keep(str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@contextlib.contextmanager
def counted():
  """Counts what is loaded and what is compiled and kept."""
  counts = collections.Counter()
  listen = lambda event, **_: counts.update([event.rpartition('/')[2]])
  jax.monitoring.register_event_listener(listen)
  yield counts
  jax.monitoring.unregister_event_listener(listen)


def wait():
  for thread in threading.enumerate():
    if thread.name == 'compile-ahead':
      thread.join()


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def group():
  """A step, new; its state and its teachers."""
  step = toy.replicated(MODEL, TX, 2)
  teachers = toy.stacked(toy.peers_of(MODEL, 1))
  return step, toy.start(MODEL, TX), step.place_teachers(teachers)


def groups_of_one_program():
  pure = make_train_step(MODEL, TX, axis_name=REPLICA_AXIS)
  step = one_program.Population(pure, 2, devices=jax.devices()[:2])
  peers = step.peers(peer_predictions.mixing_matrix([(1,), (0,)]))
  return step, [toy.start(MODEL, TX, g, 0) for g in range(2)], peers


@pytest.mark.parametrize('make', [group, groups_of_one_program])
def test_the_second_program_is_there_before_its_first_update(make):
  (step, start, teachers), stream = make(), toy.Tokens(8)
  step.expect(shapes(teachers) if make is group else teachers)
  state, _ = step(step.place(start), stream.batch(0), None, 0.0)
  wait()
  with toy.compilations() as names:
    step(state, stream.batch(1), teachers, 1.0)
  assert not names and step.num_traces == 2


class Watched(PmapStep):
  """Notes how much was compiled before each update, and after it."""

  def __call__(self, state, batch, teachers, distill_weight):
    wait()
    before = len(self.names)
    found = super().__call__(state, batch, teachers, distill_weight)
    self.seen.append((teachers is not None, before, len(self.names)))
    return found


@pytest.mark.parametrize('record', [1, 2])
def test_a_run_compiles_nothing_in_its_first_taught_update(tmp_path, record):
  """Nor before its first record, if burn-in is much longer than that."""
  experiment = Experiment(
      task=toy.TOKEN_TASK,
      model=lambda num_classes: MODEL,
      optimizer=TX,
      exchange=Checkpoints(every=record, mode='lockstep'),
      distill_weight=lambda step: float(step >= 4),
      num_steps=8,
      group_batch=4,
      eval_batch=2,
      log_every=record,
      eval_every=100,
      checkpoint_every=100,
  )
  pure = experiment_lib.make_replicated_step(experiment, MODEL).train_step
  step = Watched(pure, jax.devices()[:2])
  step.seen = []
  with toy.compilations() as step.names:
    all_groups.train(experiment, MODEL, [step, step], tmp_path)
  (_, _, first), second, *alone = [x for x in step.seen if not x[0]]
  taught = [x for x in step.seen if x[0]]
  assert len(alone) == 6 and len(taught) == 8
  assert second[1] == (first if record == 1 else first + 1)
  # One more than after the first update, and of it nothing is missing: what
  # the last update may compile is the evaluation.
  assert {*alone, *taught[:-1]} == {
      (form, first + 1, first + 1) for form in (False, True)
  }


def test_an_update_that_comes_early_waits_for_its_program():
  (step, start, teachers), stream = group(), toy.Tokens(8)
  step.expect(shapes(teachers))
  with toy.compilations() as names:
    state, _ = step(step.place(start), stream.batch(0), None, 0.0)
    step(state, stream.batch(1), teachers, 1.0)
  assert len(names) == 2


def test_processes_that_want_one_program_at_once_compile_it_once(kept):
  keep(kept)
  groups = [group() for _ in range(3)]
  barrier = threading.Barrier(len(groups))

  def first_update(step, start, teachers):
    state = step.place(start)
    barrier.wait()
    step(state, toy.Tokens(8).batch(0), teachers, 1.0)

  with counted() as counts:
    threads = [threading.Thread(target=first_update, args=g) for g in groups]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert (counts['cache_misses'], counts['cache_hits']) == (1, 2)


def test_any_function_is_shared(kept):
  keep(kept)
  with counted() as counts:
    for _ in range(2):
      double = programs.shared(jax.jit(lambda x: x + x))
      assert int(double(3)) == int(double(3)) == 6
  assert (counts['cache_misses'], counts['cache_hits']) == (1, 1)


def damage(kept):
  found = [p for p in kept.iterdir() if p.name.endswith('-cache')]
  assert found
  for n, path in enumerate(found):
    data = path.read_bytes()
    path.write_bytes(
        [data[: len(data) // 2], b'', data[:-9] + b'x' + data[-8:]][n % 3]
    )


def remove(kept):
  if kept.is_dir():
    shutil.rmtree(kept)
    kept.touch()  # Nor can a directory be made there.


@pytest.mark.filterwarnings('ignore:Error (reading|writing) persistent')
@pytest.mark.parametrize('harm', [damage, remove])
def test_a_cache_that_fails_costs_a_compilation_alone(kept, harm):
  keep(kept)
  batch = toy.Tokens(8).batch(0)
  found = []
  for _ in range(2):
    step, start, teachers = group()
    state = step.place(start)
    found.append(step(state, batch, teachers, 1.0))
    jax.clear_caches()
    harm(kept)
    compilation_cache.reset_cache()
  toy.assert_same(*found)


def test_what_is_kept_is_kept_for_thirty_days(kept):
  kept.mkdir()
  ages = {'new': 29, 'old': 31}
  for name, days in ages.items():
    (kept / name).touch()
    at = os.stat(kept).st_mtime - days * 24 * 3600
    os.utime(kept / name, (at, at))
  keep(kept)
  assert [p.name for p in kept.iterdir()] == ['new']


def test_a_directory_that_cannot_be_used_is_said_and_no_more(kept, capsys):
  kept.touch()
  cli.keep_programs(str(kept))
  assert 'no compiled program is kept' in capsys.readouterr().err
  assert jax.config.jax_compilation_cache_dir is None


def test_what_jax_was_told_stands(kept, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  programs.keep(str(kept))
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  assert not kept.exists()
