"""experiments.churn: studies train, resume and report; files are compared."""

import json
import pathlib
import signal

import churn_toy
import jax
import numpy as np
import pytest
import tiny_run
import toy
from jax.experimental.compilation_cache import compilation_cache
from run_cases import run

from codistill_jax import statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files, locks
from experiments import churn, driver
from experiments.churn_study import results, run_files, training, worker
from experiments.churn_study.results import Row
from experiments.job import Job

TESTS = pathlib.Path(__file__).parent
GIN = """\
# Do toys churn?
from __gin__ import dynamic_registration
import optax
import churn_toy
from codistill_jax import experiment
from codistill_jax import schedules

experiment.Experiment.task = @churn_toy.task()
experiment.Experiment.model = @churn_toy.model
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-2
experiment.Experiment.distill_weight = @schedules.distill_weight()
schedules.distill_weight.burn_in_steps = 4
experiment.Experiment.num_steps = 24
experiment.Experiment.group_batch = 16
experiment.Experiment.exchange_every = 4
experiment.Experiment.eval_batch = 64
"""
WIDE = 'import churn_toy\nchurn_toy.model.hidden = 9\n'
HEAD = 'from __gin__ import dynamic_registration\n'


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """Studies of one model load what another has compiled."""
  cache = tmp_path_factory.getbasetemp() / 'compiled'
  values = {
      'jax_compilation_cache_dir': str(cache),
      'jax_persistent_cache_min_compile_time_secs': 0.0,
      'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def configuration(tmp_path_factory):
  directory = tmp_path_factory.mktemp('gin')
  (directory / 'toy.gin').write_text(GIN)
  (directory / 'wide.gin').write_text(HEAD + WIDE)
  return directory


def study(configuration, workdir, *arguments, retrains=2):
  return run(
      churn,
      [
          f'--workdir={workdir}',
          f'--gin_file={configuration / "toy.gin"}',
          f'--retrains={retrains}',
          '--weights=1,4',
          '--control_retrains=2',
          *arguments,
      ],
  )


@pytest.fixture(scope='module')
def finished(configuration, tmp_path_factory):
  """A whole study: its directory and what it printed."""
  workdir = tmp_path_factory.mktemp('study') / 'run'
  arm = f'--arm_gin=wide={configuration / "wide.gin"}'
  status, output = study(configuration, workdir, arm, '--note=Of toys only.')
  assert status == 0, output
  return workdir, output


def report(workdir, name='churn.json'):
  return (workdir / 'report' / name).read_text()


def figures_of(workdir):
  return json.loads(report(workdir))['rows']


# --- Training ----------------------------------------------------------------


def test_a_study_prints_table_1_and_writes_all_of_it(finished):
  workdir, output = finished
  for text in (
      output,
      report(workdir, 'churn.md'),
      report(workdir, 'churn.csv'),
  ):
    assert 'single' in text and 'ensemble' in text and 'wide' in text
  assert 'runs done' in output and 'min left' in output
  page = report(workdir, 'churn.md')
  for word in (
      'toy points',
      'Do toys churn?',
      'Of toys only.',
      'chosen on validation',
      '150 validation, 150 test',
      '(difference ',
      'python -m experiments',
      'churn_toy.model.hidden = 9',
      'churn.png',
  ):
    assert word in page, word
  assert (workdir / 'report' / 'churn.png').read_bytes()[:4] == b'\x89PNG'
  assert 'data:image/png;base64' in report(workdir, 'churn.html')


def test_figures_are_those_of_the_predictions_on_disk(finished):
  workdir, _ = finished
  read = lambda arm, k, split: np.load(
      workdir / 'runs' / arm / str(k) / f'group_0_{split}.npy'
  )
  for split in ('validation', 'test'):
    labels = np.load(workdir / f'labels_{split}.npy')
    assert len(labels) == 150  # Without padding.
    rows = {row['arm']: row for row in figures_of(workdir)[split]}
    for arm in ('single', 'codistilled_1', 'codistilled_4', 'wide'):
      models = [read(arm, k, split) for k in (0, 1)]
      figures = rows[arm]['figures']
      assert figures['churn']['mean'] == statistics.churn(*models)
      assert figures['log_loss']['values'] == [
          statistics.log_loss(p, labels) for p in models
      ]
    # Two disjoint pairs of four single models.
    pairs = [
        [read('single', k, split) for k in pair] for pair in ((0, 2), (1, 3))
    ]
    means = [np.mean(pair, axis=0, dtype=np.float64) for pair in pairs]
    assert rows['ensemble']['figures']['churn']['mean'] == pytest.approx(
        statistics.churn(*means)
    )


def test_each_split_is_its_own(finished):
  """Chosen on the one, shown of the other."""
  workdir, _ = finished
  task = churn_toy.task()
  for split, batches in (
      ('validation', task.eval_batches(50)),
      ('test', task.test_batches(50)),
  ):
    expected = np.concatenate([batch['labels'] for batch in batches])
    np.testing.assert_array_equal(
        np.load(workdir / f'labels_{split}.npy'), expected
    )
  assert not np.array_equal(
      *(
          run_files.read_predictions(workdir, 'single', 0, split)
          for split in ('validation', 'test')
      )
  )


def test_arms_retrains_and_groups_differ_and_the_controls_share_a_seed(
    finished,
):
  workdir, _ = finished
  found = {
      (arm, k, g): np.load(path)
      for arm, k, record in run_files.done(workdir)
      for g in range(record['run']['num_groups'])
      for path in [workdir / 'runs' / arm / str(k) / f'group_{g}_test.npy']
  }
  repeats = {x for x in found if x[0].startswith('repeat_')}
  assert len(repeats) == 3  # One group, and both of a codistilled run.
  for arm, k, g in repeats:
    first = found[arm.removeprefix('repeat_'), k, g]
    assert (first == found[arm, k, g]).all()
  rest = [found[x].tobytes() for x in found if x not in repeats]
  assert len(set(rest)) == len(rest) == 4 + 4 + 4 + 2 + 1 + 1
  seeds = {
      (arm, k): (record['seed'], record['data_seed'])
      for arm, k, record in run_files.done(workdir)
  }
  assert seeds['single', 0] == (0, 0)
  assert seeds['codistilled_4', 1] == seeds['single', 1] == (1, 1)
  assert seeds['fixed_init', 1] == (0, 1)
  assert seeds['fixed_order', 1] == (1, 0)


def test_groups_start_as_those_of_the_other_binaries(configuration, tmp_path):
  """From the seed and the number of the group; group 0 as the single model."""
  still = ['optax.adam.learning_rate=0.0', 'experiment.Experiment.num_steps=1']
  trainers = worker.Trainers(
      tmp_path, [configuration / 'toy.gin'], still, {}, devices=lambda: None
  )
  trainer = trainers('')
  groups = training.train(
      trainer, run_files.Run('two', 3, 2, init=3), lambda step: None
  )
  (single,) = training.train(
      trainer, run_files.Run('one', 3, 1, init=3), lambda step: None
  )
  toy.assert_same(groups[0], single)
  for group_id, found in enumerate(groups):
    job = Job(
        experiment=training.configured(
            trainer.experiment, run_files.Run('two', 3, 2, init=3)
        ),
        model=trainer.model,
        train_step=trainer.train_step,
        workdir='',
        group_id=group_id,
        num_groups=2,
    )
    toy.assert_same(found, driver.new_state(job).state.variables)
  kernels = [g.params['Dense_0']['kernel'] for g in groups]
  assert (kernels[0] != kernels[1]).all()


def test_nothing_compiles_again_for_another_weight_or_seed(
    configuration, tmp_path, monkeypatch
):
  trainers = worker.Trainers(
      tmp_path, [configuration / 'toy.gin'], [], {}, devices=lambda: None
  )
  stop = lambda: False
  warm = run_files.plan(1, [1.0], control_retrains=0)
  worker.train_all(tmp_path, warm, trainers, stop)
  rest = run_files.plan(2, [1.0, 5.0], control_retrains=2)
  with toy.compilations() as names:
    worker.train_all(tmp_path, rest, trainers, stop)
  assert trainers('').train_step.num_traces == 2  # Burn-in, codistillation.
  assert not names


def test_a_killed_study_ends_with_the_same_numbers(
    configuration, finished, tmp_path, monkeypatch
):
  workdir, killed_at = tmp_path / 'run', 6  # In an arm of two groups.
  written = []
  write_run = run_files.write_run

  def write(directory, job, *rest):
    if len(written) == killed_at:
      raise KeyboardInterrupt
    written.append(job)
    write_run(directory, job, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(run_files, 'write_run', write)
    assert study(configuration, workdir)[0] == 130
  before = {
      (arm, k): record['began'] for arm, k, record in run_files.done(workdir)
  }
  assert len(before) == killed_at
  status, output = study(configuration, workdir)
  assert status == 0, output
  after = {
      (arm, k): record['began'] for arm, k, record in run_files.done(workdir)
  }
  assert before.items() <= after.items()  # Not trained again.
  for split, rows in figures_of(workdir).items():
    whole = [r for r in figures_of(finished[0])[split] if r['arm'] != 'wide']
    assert rows == whole


def test_a_finished_study_is_reported_again_and_left_alone(
    configuration, finished
):
  workdir, _ = finished
  before = tiny_run.snapshot(workdir / 'runs')
  status, output = study(configuration, workdir)
  assert status == 0 and 'runs done' not in output
  assert tiny_run.snapshot(workdir / 'runs') == before


def test_nondeterminism_fails_the_control_loudly(configuration, tmp_path):
  status, output = study(
      configuration,
      tmp_path / 'run',
      '--gin=churn_toy.task.drifts=True',
      '--weights=',
  )
  assert status == 1
  last = output.splitlines()[-1]
  assert 'the deterministic control failed: ' in last
  assert 'single 0, trained twice with the same seeds' in last
  assert 'FAILED' in report(tmp_path / 'run', 'churn.md')


def test_one_changed_bit_fails_the_control(finished, tmp_path):
  workdir, _ = finished
  path = workdir / 'runs' / 'repeat_codistilled_1' / '0' / 'group_1_test.npy'
  kept = path.read_bytes()
  try:
    probs = np.load(path)
    probs[7] = np.nextafter(probs[7], np.float32(1))
    np.save(path, probs)
    found = {r.arm: r for r in results.load_study(workdir).repeats}
  finally:
    path.write_bytes(kept)
  assert found['single'].different == 0
  assert found['codistilled_1'].different == 1


def test_a_softmax_task_without_a_test_split(configuration, tmp_path):
  status, output = study(
      configuration,
      tmp_path / 'run',
      '--gin=churn_toy.task.output="softmax"',
      '--gin=churn_toy.task.test_split=False',
      '--gin=churn_toy.model.outputs=2',
      '--weights=',
      '--control_retrains=0',
  )
  assert status == 0, output
  probs = np.load(tmp_path / 'run/runs/single/0/group_0_test.npy')
  assert probs.shape == (150, 2)
  assert 'no test split' in output
  assert 'validation log loss' in output and 'test log loss' not in output


def test_the_weight_is_chosen_on_validation():
  def row(arm, loss, churn):
    figure = lambda x: Estimate(x, 0, x, x, (x,))
    figures = {'log_loss': figure(loss), 'churn': figure(churn)}
    return Row(arm, arm, 5, figures, None)

  base = [row('single', 0.5, 9), row('ensemble', 0.4, 5)]
  good = [
      row('codistilled_1', 0.39, 4),
      row('codistilled_3', 0.40, 3),  # As good as the ensemble will do.
      row('codistilled_6', 0.41, 2),
  ]
  assert results.choose(base + good)[0] == 'codistilled_3'
  bad = [row('codistilled_1', 0.42, 4), row('codistilled_6', 0.43, 2)]
  chosen, reason = results.choose(base + bad)
  assert chosen == 'codistilled_1' and 'no weight' in reason
  assert results.choose(base) == (None, '')


def test_what_is_better_on_test_only_is_not_chosen(tmp_path):
  """Predictions made so that the splits disagree on the weights."""
  rng = np.random.default_rng(0)
  labels = {s: rng.integers(2, size=400) for s in run_files.SPLITS}

  def predictions(good_at):
    found = {}
    for split, y in labels.items():
      skill = 0.3 if split in good_at else 0.1
      noise = rng.normal(0, 0.02, size=400)
      found[split] = np.float32(0.5 + skill * (2 * y - 1) + noise)
    return found

  files.write_json(run_files.study_path(tmp_path), {'num_groups': 2})
  for split, y in labels.items():
    run_files.keep_labels(tmp_path, split, y)
  for job in run_files.plan(2, [1.0, 3.0], control_retrains=0):
    if not job.arm.startswith('repeat'):
      good_at = {3.0: ('test',), 1.0: ('validation',)}.get(job.weight, ())
      run_files.write_run(tmp_path, job, [predictions(good_at)], {})
  study = results.load_study(tmp_path)
  assert study.chosen == 'codistilled_1'
  table = {row.arm: row.figures['log_loss'].mean for row in study.table}
  assert set(table) == {'single', 'ensemble', 'codistilled_1'}
  # On test the chosen one is no better than the rest, and so it stands there.
  assert table['codistilled_1'] == pytest.approx(table['single'], abs=0.01)


def test_mistakes_are_one_line(configuration, finished, tmp_path):
  workdir, _ = finished
  before = tiny_run.snapshot(workdir)
  new = tmp_path / 'new'
  for where, arguments, words in [
      (workdir, ['--gin=Experiment.num_steps=25'], 'another configuration'),
      (workdir, ['--num_groups=3'], 'num_groups=2, this one has num_groups=3'),
      (new, ['--gin=churn_toy.model.hiden=3'], 'hiden'),
      (new, ['--gin=x/optax.adam.learning_rate=1.0'], 'acts nowhere'),
      (new, ['--weights=1,two'], "'two' is no distill weight"),
      (new, ['--weights=1,1.0'], 'names one twice'),
      (new, ['--retrains=1'], '--retrains=1'),
      (new, ['--arm_gin=wide'], 'name=file.gin'),
      (new, ['--arm_gin=single=a.gin'], "called 'single'"),
      (new, ['--arm_gin=../x=a.gin'], "called '../x'"),
      (new, ['--arm_gin=x=none.gin'], 'no such file'),
      (new, ['--gin=schedules.distill_weight.weight=0'], 'is 0 at its last'),
      (new, ['--predictions=a.npy'], 'leave one out'),
      (new, ['--control_retrains=1'], 'to 2 or more'),
      (new, ['--labels=a.npy'], '--labels belongs to --predictions'),
  ]:
    status, output = study(configuration, where, *arguments)
    said = [x for x in output.splitlines() if 'runs done' not in x]
    assert status == 1 and len(said) == 1, (arguments, output)
    assert words in said[0]
  assert tiny_run.snapshot(workdir) == before


def test_groups_that_never_exchange_are_no_codistilled_arm(
    configuration, tmp_path
):
  trainers = worker.Trainers(
      tmp_path,
      [configuration / 'toy.gin'],
      ['experiment.Experiment.exchange_every=24'],
      {},
      devices=lambda: None,
  )
  train = lambda weight: training.train(
      trainers(''), run_files.Run('two', 0, 2, weight=weight), lambda step: None
  )
  with pytest.raises(ValueError, match='two 0 never had a teacher in 24 steps'):
    train(1.0)
  assert len(train(None)) == 2  # An arm of one's own may be anything.


CLAIM = {
    'configurations': {'': ['x'], 'wide': ['y']},
    'num_groups': 2,
    'replicas': 1,
    'identity': {'ids': 'a'},
    'data': '512 points',
    'platform': 'cpu',
}


def test_a_study_is_of_one_configuration_data_set_and_kind_of_device(tmp_path):
  worker.claim(tmp_path, CLAIM)
  for key, value in {
      'configurations': {'': ['z']},
      'num_groups': 3,
      'replicas': 2,
      'identity': {'ids': 'b'},
      'data': '513 points',
      'platform': 'gpu',
  }.items():
    other = {**CLAIM, key: value}
    # A mistake leaves nothing that would refuse the correction, ...
    worker.claim(tmp_path / key, other)
    worker.claim(tmp_path / key, CLAIM)
    # ... until a run is done.
    run_files.write_run(tmp_path / key, run_files.Run('single', 0), [], {})
    with pytest.raises(ValueError, match='another configuration'):
      worker.claim(tmp_path / key, other)
    worker.claim(tmp_path / key, CLAIM)


def test_an_own_arm_can_be_corrected_until_one_of_its_runs_is_done(tmp_path):
  """Its turn comes last, and only then are bindings found that act nowhere."""
  worker.claim(tmp_path, CLAIM)
  run_files.write_run(tmp_path, run_files.Run('single', 0), [], {})
  corrected = {**CLAIM, 'configurations': {'': ['x'], 'wide': ['z']}}
  worker.claim(tmp_path, corrected)
  run = run_files.Run('wide', 0, config='wide')
  run_files.write_run(tmp_path, run, [], {})
  with pytest.raises(ValueError, match='has z, this one has y'):
    worker.claim(tmp_path, CLAIM)


def test_the_page_shows_the_configuration_that_was_trained(
    configuration, tmp_path
):
  """Not the one of an attempt that was given up before a run was done."""

  def after_training(exchange_every):
    trainers = worker.Trainers(
        tmp_path,
        [configuration / 'toy.gin'],
        [f'experiment.Experiment.exchange_every={exchange_every}'],
        {},
        devices=lambda: None,
    )
    training.train(
        trainers(''), run_files.Run('single', 0), lambda _: trainers.check('')
    )
    return run_files.config_path(tmp_path, '').read_text()

  assert 'exchange_every = 5' in after_training(5)
  assert 'exchange_every = 6' in after_training(6)
  run_files.write_run(tmp_path, run_files.Run('single', 0), [], {})
  assert 'exchange_every = 6' in after_training(7)


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / 'labels_test.npy'
  for data in (b'', b'\x93NUMPY', b'no array'):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'labels_test\.npy is damaged'):
      run_files.read_labels(tmp_path, 'test')


def test_no_report_of_what_another_process_has_not_finished(
    configuration, tmp_path
):
  run = run_files.Run('single', 3)
  directory = run_files.run_dir(tmp_path, run)
  arguments = ['--weights=', '--control_retrains=0']
  with locks.exclusive(directory, 'training'):
    status, output = study(configuration, tmp_path, *arguments)
  assert status == 0
  assert 'single 3 is in the hands of another process' in output
  assert not (tmp_path / 'report').exists()
  status, output = study(configuration, tmp_path, *arguments)
  assert status == 0 and 'single model' in output


def test_what_another_run_wrote_is_refused(tmp_path):
  first, other = (run_files.Run('single', 0, init=n) for n in (0, 5))
  run_files.write_run(tmp_path, first, [], {'seed': 0})
  assert run_files.read_record(tmp_path, first)['seed'] == 0
  with pytest.raises(ValueError, match='was made by'):
    run_files.read_record(tmp_path, other)


def test_other_data_are_refused(configuration, finished):
  workdir, _ = finished
  with pytest.raises(ValueError, match='labels differ'):
    run_files.keep_labels(workdir, 'test', np.zeros(150, np.int32))


def in_processes(launch, configuration, workdir, num_steps=24):
  """The study of `finished` without its own arm."""
  return launch(
      'churn',
      workdir=workdir,
      gin_file=configuration / 'toy.gin',
      gin=f'experiment.Experiment.num_steps={num_steps}',
      retrains=2,
      weights='1,4',
      control_retrains=2,
      jobs=2,
  )


@pytest.fixture
def launch(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(TESTS))
  with tiny_run.launcher(tmp_path_factory) as launch:
    yield launch


def test_two_processes_share_a_study(configuration, finished, launch, tmp_path):
  workdir = tmp_path / 'run'
  output = in_processes(launch, configuration, workdir).wait()
  assert '12 of 12 runs done' in output and '--jobs=2' in report(
      workdir, 'churn.md'
  )
  for arm, k, record in run_files.done(workdir):
    assert record['cores'] * 2 <= max(run_files.own_cores(), 2)
    ours, theirs = (
        run_files.read_predictions(directory, arm, k, 'test')
        for directory in (workdir, finished[0])
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_processes_leave_when_asked(configuration, launch, tmp_path):
  workdir = tmp_path / 'run'
  process = in_processes(launch, configuration, workdir, num_steps=10**7)
  locked = lambda: len(list(workdir.glob('runs/*/*'))) == 2
  tiny_run.until(locked, process=process)
  process.send(signal.SIGTERM)
  output = process.wait(143)
  assert 'the same command goes on' in output.splitlines()[-1]
  assert not run_files.has_begun(workdir)
  assert not tiny_run.processes_of(workdir)
