"""train_group: groups as processes are groups in memory, bit for bit.

Also after kills and stops, and with several processes in a group; and what is
wrong is one clear line that damages nothing.
"""

import random
import shutil
import signal
import time

import numpy as np
import pytest
import run_cases
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.exchange import publications
from codistill_jax.storage import checkpoints
from experiments import train_group

LAST = tiny_run.NUM_STEPS


@pytest.fixture(scope='module')
def finished(launch, reference, tmp_path_factory):
  """The run of the reference again, each group a process."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  for group in [start_group(launch, workdir, reference[0], g) for g in (0, 1)]:
    output = group.wait()
    assert 'has reached step 50' in output
    assert 'Traceback' not in output and 'WARNING' not in output
  return workdir


def start_group(launch, workdir, gin_file, group_id, *args, **flags):
  return launch(
      'train_group',
      *args,
      workdir=workdir,
      num_groups=2,
      group_id=group_id,
      gin_file=gin_file,
      **flags,
  )


def assert_same_run(a, b):
  """Resume checkpoints and publications of the end, of both groups."""
  for group_id in (0, 1):
    step, arrays = tiny_run.saved_arrays(a, group_id)
    assert step == LAST
    tiny_run.assert_same_bits(
        arrays, tiny_run.saved_arrays(b, group_id, LAST)[1]
    )
    directories = [run_directory.publications_dir(d, group_id) for d in (a, b)]
    common = set.intersection(
        *map(set, map(checkpoints.completed_steps, directories))
    )
    assert LAST in common
    for step in common:
      tiny_run.assert_same_bits(
          *(tiny_run.arrays_of(d, step) for d in directories)
      )


def assert_whole_metrics(workdir, group_id):
  """Each step once, in order, with the staleness asked for."""
  records = tiny_run.records(workdir, group_id)
  training = [r for r in records if 'loss/task' in r]
  assert [r['step'] for r in training] == list(range(5, LAST + 1, 5))
  evaluated = [r['step'] for r in records if 'eval/loss' in r]
  assert evaluated == [25, LAST]
  for record in training:
    # Of the update before: at 20 that is the one after step 19.
    expected = (record['step'] - 1) % tiny_run.EVERY
    if record['step'] > tiny_run.EVERY:
      assert record['exchange/staleness_steps'] == expected
      assert record['exchange/peers_present'] == 1.0
    else:
      assert 'exchange/staleness_steps' not in record


def test_processes_and_memory_give_the_same_bits(reference, finished):
  """50 steps with 5 exchanges; also what is logged is what was asked for."""
  _, in_memory = reference
  assert_same_run(finished, in_memory)
  for group_id in (0, 1):
    assert _published(finished, group_id) == [10, 20, 30, 40, 50]
    for run in (finished, in_memory):
      assert_whole_metrics(run, group_id)
      assert run_directory.done_path(run, group_id).exists()
  # Groups differ from each other, or all of this says nothing.
  a, b = (tiny_run.saved_arrays(finished, g)[1] for g in (0, 1))
  assert not np.array_equal(
      a['variables/params/head_kernel'], b['variables/params/head_kernel']
  )


def test_kill_and_stop_leave_no_trace_in_the_result(
    launch, reference, finished, tmp_path
):
  """Killed at a random moment, then stopped, then run to the end.

  Group 1 runs beside the first publications of group 0, so that it cannot
  reach its end before it is killed: it waits for step 40 of its peer.
  """
  gin_file, _ = reference
  workdir = tmp_path / 'run'
  theirs = run_directory.publications_dir(finished, 0)
  ours = run_directory.publications_dir(workdir, 0)
  for step in ('10', '20', '30'):
    shutil.copytree(theirs / step, ours / step)
  saved = lambda: checkpoints.completed_steps(
      run_directory.checkpoints_dir(workdir, 1)
  )

  group = start_group(launch, workdir, gin_file, 1)
  until(lambda: saved(), process=group)
  # Seeded: the moment in the run still is the machine's to choose.
  time.sleep(random.Random(7).uniform(0, 0.3))
  group.send(signal.SIGKILL)
  group.wait(-signal.SIGKILL)
  assert not run_directory.done_path(workdir, 1).exists()

  # It goes on from its newest checkpoint, and waits for its peer again. That it
  # has come to the wait shows in its publication, which the killed one may have
  # made as well.
  checkpoints.delete(run_directory.publications_dir(workdir, 1), [40])
  newest = max(saved())
  group = start_group(launch, workdir, gin_file, 1)
  until(lambda: 40 in _published(workdir, 1), process=group)
  group.send(signal.SIGTERM)
  output = group.wait(143)
  assert 'group 1 stopped and saved at step 40' in output
  assert max(saved()) == 40 >= newest

  # Stopped again, now before its first update: there is nothing to save, but
  # it says where it stands.
  group = start_group(launch, workdir, gin_file, 1)
  begun = lambda: _status(workdir, 1)
  until(
      lambda: (begun().get('pid'), begun().get('step')) == (group.pid, 40),
      process=group,
  )
  group.send(signal.SIGUSR1)
  assert 'stopped and saved at step 40' in group.wait(138)

  groups = [start_group(launch, workdir, gin_file, g) for g in (0, 1)]
  for group in groups:
    group.wait()
  assert_same_run(workdir, finished)
  for group_id in (0, 1):
    assert_whole_metrics(workdir, group_id)


def _published(workdir, group_id):
  return publications.published_steps(
      run_directory.exchange_root(workdir), group_id
  )


def _status(workdir, group_id):
  return run_directory.read_status(workdir, group_id) or {}


def test_two_processes_of_two_devices_are_one_of_four(
    launch, reference, tmp_path
):
  """Equal but for the order in which four gradients are added up.

  Group 0, beside the publications of a group 1 of one process.
  """
  gin_file, one_process = reference
  workdir = tmp_path / 'run'
  shutil.copytree(
      run_directory.publications_dir(one_process, 1),
      run_directory.publications_dir(workdir, 1),
  )
  steps = 2 * tiny_run.EVERY
  port = tiny_run.free_port()
  processes = [
      start_group(
          launch,
          workdir,
          gin_file,
          0,
          coordinator=f'127.0.0.1:{port}',
          num_processes=2,
          process_id=process_id,
          replicas=2,
          heartbeat_seconds=300,
          gin=f'experiment.Experiment.num_steps={steps}',
      )
      for process_id in (0, 1)
  ]
  for process in processes:
    process.wait()
  assert run_directory.read_run(workdir)['replicas'] == 4
  for directory_of in (
      run_directory.checkpoints_dir,
      run_directory.publications_dir,
  ):
    found, expected = (
        tiny_run.arrays_of(directory_of(w, 0), steps)
        for w in (workdir, one_process)
    )
    assert found.keys() == expected.keys()
    for path, x in found.items():
      np.testing.assert_allclose(
          x, expected[path], rtol=1e-4, atol=1e-6, err_msg=path
      )
  # Each record once: only the primary process writes.
  lines = [r['step'] for r in tiny_run.records(workdir, 0)]
  assert lines == [5, 10, 15, 20, 20]


# --- What is wrong -----------------------------------------------------------


def copy_of(finished, directory, *, keep_run=True):
  """A copy of the finished run that is not done, to be spoiled."""
  workdir = directory / 'run'
  shutil.copytree(finished, workdir)
  for group_id in (0, 1):
    run_directory.done_path(workdir, group_id).unlink()
  if not keep_run:  # Else another configuration is noticed by its text.
    run_directory.run_path(workdir).unlink()
  return workdir


def other_vocabulary(gin_file, directory):
  """The configuration with data of another tokenizer."""
  data = tiny_run.write_data(directory / 'data', tokenizer=b'another')
  text = gin_file.read_text()
  path = directory / 'other.gin'
  path.write_text(text.replace(str(gin_file.parent / 'data'), str(data)))
  return path


@pytest.fixture(scope='module')
def wrong(launch, reference, finished, tmp_path_factory):
  """All cases, run once: name -> (status, output, changed files)."""
  gin_file, _ = reference
  tmp = tmp_path_factory.mktemp('wrong')
  fresh = tmp / 'nothing_here'
  foreign = other_vocabulary(gin_file, tmp)
  unused = tmp / 'unused.gin'
  unused.write_text(
      'from __gin__ import dynamic_registration\nimport optax\n'
      'optax.sgd.learning_rate = 0.5\n'
  )
  no_validation = tiny_run.write_data(tmp / 'no_validation', num_validation=0)
  damaged = tiny_run.write_data(tmp / 'damaged_data')
  (damaged / 'train' / '00000.tokens.npy').write_bytes(b'\x93NUMPY')

  workdirs = {}

  def case(name, *args, workdir=fresh, gin=gin_file, group_id=0, groups=2):
    workdirs[name] = workdir
    flags = {'num_groups': groups, 'group_id': group_id, 'gin_file': gin}
    words = [f'--{k}={v}' for k, v in flags.items()]
    return [f'--workdir={workdir}', *words, *args]

  def spoiled(name, **kwargs):
    directory = tmp / name
    directory.mkdir()
    return copy_of(finished, directory, **kwargs)

  data_dir = lambda path: f'--gin=language_model_task.data_dir="{path}"'
  bind = lambda text: f'--gin=experiment.Experiment.{text}'

  other_config = spoiled('other_config')
  other_data = spoiled('other_data', keep_run=False)
  peer_data, peer_model = (
      spoiled(name, keep_run=False) for name in ('peer_data', 'peer_model')
  )
  for workdir in (peer_data, peer_model):
    shutil.rmtree(run_directory.group_dir(workdir, 0))
  lonely = spoiled('lonely')
  shutil.rmtree(run_directory.publications_dir(lonely, 1))
  for step in (40, 50):
    shutil.rmtree(run_directory.checkpoints_dir(lonely, 0) / str(step))
  unreadable = spoiled('unreadable')
  directory = run_directory.checkpoints_dir(unreadable, 0)
  for step in checkpoints.completed_steps(directory):
    (directory / str(step) / 'record.json').write_text('{}')

  cases = {
      name: case(name, *args, **kwargs)
      for name, args, kwargs in [
          # The first: jax has not been used yet.
          ('no_engine', ['--num_processes=0'], {}),
          ('found_out', ['--num_processes=0', '--process_id=0'], {}),
          ('group_id', [], {'group_id': 2}),
          ('negative_group_id', [], {'group_id': -1}),
          ('gin_file', ['--gin_file=nowhere.gin'], {}),
          ('binding', [bind('nonsense=1')], {}),
          ('value', [bind('num_steps="many"')], {}),
          (
              'acts_nowhere',
              [f'--gin_file={unused}'],
              {'workdir': tmp / 'acts_nowhere'},
          ),
          ('group_batch', [bind('group_batch=6')], {}),
          ('no_data', [data_dir(tmp / 'no_data')], {}),
          ('empty_data', [data_dir(no_validation)], {}),
          ('too_little_data', [bind('group_batch=4000')], {}),
          ('damaged_data', [data_dir(damaged)], {}),
          ('processes', ['--num_processes=2'], {}),
          ('replicas', ['--replicas=-1'], {}),
          (
              'other_config',
              ['--gin=optax.adam.learning_rate=5'],
              {'workdir': other_config},
          ),
          ('other_groups', [], {'workdir': other_config, 'groups': 3}),
          ('other_data', [], {'workdir': other_data, 'gin': foreign}),
          ('peer_data', [], {'workdir': peer_data, 'gin': foreign}),
          (
              'peer_model',
              ['--gin=lstm.language_model.units=12'],
              {'workdir': peer_model},
          ),
          (
              'lonely',
              ['--gin=Checkpoints.timeout_seconds=0.1'],
              {'workdir': lonely},
          ),
          ('unreadable', [], {'workdir': unreadable}),
      ]
  }
  # The time limit is part of the configuration, which has to be the run's.
  run = run_directory.read_run(lonely)
  run['configuration'] = [
      line.replace('600.0', '0.1') for line in run['configuration']
  ]
  run_directory.write_run(lonely, run)
  before = {w: tiny_run.snapshot(w) for w in set(workdirs.values())}
  found = launch.cases('train_group', cases)
  results = {}
  for name, (status, output) in found.items():
    now = tiny_run.snapshot(workdirs[name])
    gone = {p for p, x in before[workdirs[name]].items() if now.get(p) != x}
    results[name] = (status, output, gone)
  assert tiny_run.snapshot(fresh) == {}
  return results


@pytest.mark.parametrize(
    'name, words',
    [
        ('no_engine', ['cannot tell the processes', 'srun', 'JobSet']),
        ('found_out', ['--num_processes=0', 'leave out --coordinator']),
        ('group_id', ['group_id=2', 'out of range', '0..1']),
        ('negative_group_id', ['group_id=-1', 'out of range']),
        ('gin_file', ['--gin_file=nowhere.gin', 'no such file']),
        ('binding', ['nonsense']),
        ('value', ["num_steps='many'", 'whole number']),
        ('group_batch', ['group_batch=6', 'not divisible', '4 replicas']),
        ('no_data', ['no_data', 'holds no prepared data', 'prepare_data']),
        ('empty_data', ['validation split', 'is empty']),
        ('too_little_data', ['tokens', 'group_batch=4000', 'use more data']),
        ('damaged_data', ['00000.tokens.npy', 'damaged']),
        ('processes', ['--num_processes=2', '--coordinator']),
        ('replicas', ['--replicas=-1']),
        ('other_config', ['another configuration', 'rate = 0.01', 'rate = 5']),
        ('other_groups', ['num_groups=2', 'num_groups=3', '--workdir']),
        ('other_data', ['resume checkpoint', 'tokenizer=', 'another workdir']),
        ('peer_data', ['of group 0, by an', 'has tokenizer=', 'this run has']),
        (
            'peer_model',
            [
                'of group 0, by an earlier run, is of another configuration',
                'params/head_kernel float32[8, 30] where',
                'params/head_kernel float32[12, 30];',
            ],
        ),
        ('lonely', ['group 1 has not published', '0.1 s']),
        ('unreadable', ['none of the resume checkpoints', 'delete']),
    ],
)
def test_a_mistake_is_one_line_and_damages_nothing(wrong, name, words):
  status, output, gone = wrong[name]
  # Only a peer that is missing may come yet.
  assert status == (75 if name == 'lonely' else 1), output
  last = output.splitlines()[-1]
  assert last.startswith('error: ')
  for word in words:
    assert word in last
  assert 'Traceback' not in output
  # Where a run begins, it says so: that is no damage.
  harmless = ('metrics.jsonl', 'status.json', 'restart_step.json')
  harmless += ('reading.json',)
  gone = [path for path in gone if not path.endswith(harmless)]
  if name.startswith('peer_'):  # A configuration beside no run.json.
    gone = [p for p in gone if p != 'config.gin']
  assert not gone


@pytest.mark.parametrize('flags', [[], ['--num_processes=1']])
def test_processes_that_are_no_group_are_warned_of_unless_they_say_so(
    monkeypatch, tmp_path, flags
):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  flags = [f'--workdir={tmp_path}', '--gin_file=nowhere.gin', *flags]
  _, output = run_cases.run(train_group, flags)
  assert ('2 processes were started together' in output) == (len(flags) == 2)


@pytest.mark.parametrize(
    'name', ['group_id', 'other_config', 'other_data', 'unreadable']
)
def test_what_is_noticed_at_once_changes_no_file(wrong, name):
  _, output, gone = wrong[name]
  # But its status, which says that it has failed.
  assert not [path for path in gone if not path.endswith('status.json')]
  assert len(output.splitlines()) <= 1 + 3  # A warning for each checkpoint.


def test_a_binding_that_acts_nowhere_stops_the_run(wrong):
  status, output, _ = wrong['acts_nowhere']
  assert status == 1
  assert 'optax.sgd.learning_rate = 0.5' in output
  assert 'acts nowhere' in output
