"""experiments.churn: studies train, resume and report."""

import json
import os
import pathlib
import signal

import churn_toy
import numpy as np
import pytest
import tiny_run
import toy
from run_cases import run
from waits import until

from codistill_jax import statistics
from codistill_jax.statistics import Estimate
from codistill_jax.storage import files
from experiments import churn
from experiments.studies import configurations, retrains
from experiments.studies import study_plan as plan_lib
from experiments.studies.catalogue.churn import STUDY
from experiments.studies.retrains import Row
from experiments.studies.study_plan import PlannedRun, Scale

pytestmark = pytest.mark.usefixtures('compiled_once')
TESTS = pathlib.Path(__file__).parent
GIN = """\
# Do toys churn?
%s
STEPS = 24
schedules.distill_weight.burn_in_steps = 4
exchange.Checkpoints.every = 4
experiment.Experiment.checkpoint_every = 500
"""
WIDE = 'import churn_toy\nchurn_toy.model.hidden = 9\n'
HEAD = 'from __gin__ import dynamic_registration\n'


@pytest.fixture(scope='module')
def configuration(tmp_path_factory):
  directory = tmp_path_factory.mktemp('gin')
  (directory / 'toy.gin').write_text(GIN % churn_toy.GIN)
  (directory / 'wide.gin').write_text(HEAD + WIDE)
  return directory


def study(configuration, workdir, *arguments, retrains=2):
  flags = {
      '--workdir': workdir,
      '--gin_file': configuration / 'toy.gin',
      '--retrains': retrains,
      '--weights': '1,4',
      '--control_retrains': 2,
  }
  given = {argument.split('=')[0] for argument in arguments}
  usual = [f'{k}={v}' for k, v in flags.items() if k not in given]
  return run(churn, [*usual, *arguments])


@pytest.fixture(scope='module')
def finished(configuration, tmp_path_factory):
  """A whole study: its directory and what it printed."""
  workdir = tmp_path_factory.mktemp('study') / 'run'
  arm = f'--arm_gin=wide={configuration / "wide.gin"}'
  with toy.compilations() as names:
    status, output = study(configuration, workdir, arm, '--note=Of toys only.')
  assert status == 0, output
  # Burn-in and codistillation, whatever the seed, the weight and the number of
  # groups; and the wider model by itself.
  assert names.count('jit(_fun)') == 3, names
  return workdir, output


def outcomes(workdir):
  return {(arm, k): outcome for arm, k, outcome in retrains.done(workdir)}


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
      workdir / 'runs' / arm / f'seed_{k}' / f'group_0_{split}.npy'
  )
  task = churn_toy.task()
  batches = {'validation': task.eval_batches, 'test': task.test_batches}
  for split, batches_of in batches.items():
    labels = np.load(workdir / f'labels_{split}.npy')
    # Without padding: of the split, in its order.
    expected = np.concatenate([batch['labels'] for batch in batches_of(50)])
    np.testing.assert_array_equal(labels, expected)
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


def test_arms_retrains_and_groups_differ_and_the_controls_share_a_seed(
    finished,
):
  workdir, _ = finished
  found = {
      (arm, k, g): retrains.read_predictions(workdir, arm, k, 'test', g)
      for (arm, k), outcome in outcomes(workdir).items()
      for g in range(outcome['num_groups'])
  }
  repeats = {x for x in found if x[0].startswith('repeat_')}
  assert len(repeats) == 3  # One group, and both of a codistilled run.
  for arm, k, g in repeats:
    first = found[arm.removeprefix('repeat_'), k, g]
    assert (first == found[arm, k, g]).all()
  rest = [found[x].tobytes() for x in found if x not in repeats]
  assert len(set(rest)) == len(rest) == 4 + 4 + 4 + 2 + 1 + 1
  seeds = {
      run: (outcome['seed'], outcome['data_seed'])
      for run, outcome in outcomes(workdir).items()
  }
  assert seeds['single', 0] == (0, 0)
  assert seeds['codistilled_4', 1] == seeds['single', 1] == (1, 1)
  assert seeds['fixed_init', 1] == (0, 1)
  assert seeds['fixed_order', 1] == (1, 0)


def test_a_killed_study_ends_with_the_same_numbers(
    configuration, finished, tmp_path, monkeypatch
):
  workdir = tmp_path / 'run'
  # In the first run of two groups, whose first checkpoint is at step 10.
  monkeypatch.setattr(churn_toy, 'batches_left', 5 * 24 + 2 * 14)
  more = '--gin=experiment.Experiment.checkpoint_every=10'
  assert study(configuration, workdir, more)[0] == 130
  before = outcomes(workdir)
  assert len(before) == 5
  monkeypatch.setattr(churn_toy, 'batches_left', 10**9)
  status, output = study(configuration, workdir, more)
  assert status == 0, output
  after = outcomes(workdir)
  assert before.items() <= after.items()  # Not trained again.
  for split, rows in figures_of(workdir).items():
    whole = [r for r in figures_of(finished[0])[split] if r['arm'] != 'wide']
    assert rows == whole


def test_a_run_that_was_not_done_begins_again_if_it_is_corrected(
    configuration, finished, tmp_path, monkeypatch
):
  """What is shown as its configuration is what was trained."""
  workdir = tmp_path / 'run'
  arguments = ['--weights=', '--control_retrains=0']
  monkeypatch.setattr(churn_toy, 'batches_left', 14)
  wrong = '--gin=exchange.Checkpoints.every=5'
  assert study(configuration, workdir, *arguments, wrong)[0] == 130
  assert not outcomes(workdir)
  monkeypatch.setattr(churn_toy, 'batches_left', 10**9)
  status, output = study(configuration, workdir, *arguments)
  assert status == 0, output
  assert 'single, seed 0 begins again' in output
  assert 'Checkpoints.every = 4' in report(workdir, 'churn.md')
  single = lambda path: [
      row for row in figures_of(path)['test'] if row['arm'] == 'single'
  ]
  assert single(workdir) == single(finished[0])
  status, output = study(configuration, workdir, *arguments, wrong)
  assert status == 1 and 'holds another study' in output


def test_a_finished_study_is_left_alone_but_for_what_was_deleted(
    configuration, finished
):
  workdir, _ = finished
  before = tiny_run.snapshot(workdir / 'runs')
  directory = workdir / 'runs' / 'fixed_init' / 'seed_1'
  for name in ('group_0_test.npy', 'outcome.json'):
    (directory / name).unlink()
  status, output = study(configuration, workdir)
  assert status == 0 and output.count('runs done') == 1
  after = tiny_run.snapshot(workdir / 'runs')
  assert {k for k in before if before[k] != after[k]} == {
      'fixed_init/seed_1/outcome.json'  # When it was made.
  }


def test_one_changed_bit_fails_the_control(finished, tmp_path):
  workdir, _ = finished
  path = workdir / 'runs/repeat_codistilled_1/seed_0/group_1_test.npy'
  kept = path.read_bytes()
  try:
    probs = np.load(path)
    probs[7] = np.nextafter(probs[7], np.float32(1))
    np.save(path, probs)
    found = {r.arm: r for r in retrains.load_study(workdir).repeats}
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
  probs = np.load(tmp_path / 'run/runs/single/seed_0/group_0_test.npy')
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
  assert retrains.choose(base + good)[0] == 'codistilled_3'
  bad = [row('codistilled_1', 0.42, 4), row('codistilled_6', 0.43, 2)]
  chosen, reason = retrains.choose(base + bad)
  assert chosen == 'codistilled_1' and 'no weight' in reason
  assert retrains.choose(base) == (None, '')


def test_what_is_better_on_test_only_is_not_chosen(tmp_path):
  """Predictions made so that the splits disagree on the weights."""
  rng = np.random.default_rng(0)
  labels = {s: rng.integers(2, size=400) for s in retrains.SPLITS}

  def predictions(good_at):
    found = {}
    for split, y in labels.items():
      skill = 0.3 if split in good_at else 0.1
      noise = rng.normal(0, 0.02, size=400)
      found[split] = np.float32(0.5 + skill * (2 * y - 1) + noise)
    return found

  write = lambda path, **values: files.write_json(path, values)
  write(plan_lib.study_path(tmp_path), study='churn', num_groups=2)
  for split, y in labels.items():
    retrains.keep_labels(tmp_path, split, y)
  for planned in plan_of(weights=[1.0, 3.0], controls=0).runs():
    if not planned.arm.startswith('repeat'):
      weight = retrains.weight_of(planned.arm)
      good_at = {3.0: ('test',), 1.0: ('validation',)}.get(weight, ())
      directory = plan_lib.run_dir(tmp_path, planned)
      for split, array in predictions(good_at).items():
        retrains.write_predictions(directory, 0, split, array)
      write(plan_lib.outcome_path(directory))
  study = retrains.load_study(tmp_path)
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
      (workdir, ['--gin=Experiment.num_steps=25'], 'holds another study'),
      (
          workdir,
          ['--num_groups=3'],
          'groups of codistilled_1=2, this one has groups of codistilled_1=3',
      ),
      (workdir, ['--gin=Experiment.seed=1'], 'change it by --seeds'),
      (new, ['--gin=churn_toy.model.hiden=3'], 'hiden'),
      (new, ['--gin=x/optax.adam.learning_rate=1.0'], 'acts nowhere'),
      (new, ['--weights=1,two'], "'two' is no distill weight"),
      (new, ['--weights=1,1.0'], 'names one twice'),
      (new, ['--retrains=1'], '--retrains=1'),
      (new, ['--arm_gin=wide'], 'name=file.gin'),
      (new, ['--arm_gin=single=a.gin'], "called 'single'"),
      (new, ['--arm_gin=../x=a.gin'], "called '../x'"),
      (new, ['--arm_gin=x=none.gin'], 'no such file'),
      (new, ['--predictions=a.npy'], 'leave one out'),
      (new, ['--control_retrains=1'], 'to 2 or more'),
      (new, ['--labels=a.npy'], '--labels belongs to --predictions'),
  ]:
    status, output = study(configuration, where, *arguments)
    said = [x for x in output.splitlines() if 'runs done' not in x]
    assert status == 1 and len(said) == 1, (arguments, output)
    assert words in said[0]
  assert tiny_run.snapshot(workdir) == before


def plan_of(weights, controls=2, own=None, gin_file='toy.gin'):
  """The plan of two retrains of each arm."""
  declared = STUDY._replace(
      arms=retrains.arms(weights, 2, own),
      scales={'own': Scale((str(gin_file),), seeds=2)},
  )
  return retrains.with_controls(plan_lib.make_plan(declared, 'own'), controls)


def configurations_of(configuration, workdir, *bindings):
  planned = plan_of(
      [1.0],
      own={'wide': (1, str(configuration / 'wide.gin'))},
      gin_file=configuration / 'toy.gin',
  )
  return configurations.Configurations(workdir, planned, bindings)


@pytest.mark.parametrize(
    'binding',
    [
        'exchange.Checkpoints.every=24',
        'exchange.Checkpoints.every=1000',
        'schedules.distill_weight.burn_in_steps=24',
        'schedules.distill_weight.burn_in_steps=10_000_000',
        'schedules.distill_weight.weight=0.0',
    ],
)
def test_groups_that_never_exchange_are_no_codistilled_arm(
    configuration, tmp_path, binding
):
  """And nothing is trained for them, of no arm."""
  status, output = study(configuration, tmp_path / 'run', f'--gin={binding}')
  assert status == 1 and len(output.splitlines()) == 1
  assert 'codistilled_1, seed 0 would have no teacher' in output
  name, value = binding.split('=')
  assert f'{name.split(".", 1)[1]} = {value.replace("_", "")}' in output
  assert not (tmp_path / 'run').exists()
  found = configurations_of(configuration, tmp_path, binding)
  found.configure(PlannedRun('wide', 0))  # May be anything.


@pytest.mark.parametrize('configured', [0.5, 1.0, 8.0])
def test_a_weight_is_that_at_the_end_of_the_schedule(
    configuration, tmp_path, configured
):
  run = PlannedRun('codistilled_1', 0)
  weight_of = (
      configurations_of(
          configuration,
          tmp_path,
          f'schedules.distill_weight.weight={configured}',
          'schedules.distill_weight.ramp_steps=4',
      )
      .configure(run)
      .distill_weight
  )
  # Its burn-in and ramp are those of the configuration.
  found = [weight_of(n) for n in (0, 3, 6, 23)]
  assert found == pytest.approx([0, 0, 0.6, 1])


def claims(configuration, workdir, described, *, done=()):
  """Claims a study where one is described that has come so far.

  Args:
    configuration: Directory of the gin files.
    workdir: The study's.
    described: What study.json says.
    done: Outcomes by arm.
  """
  files.write_json(plan_lib.study_path(workdir), described)
  for arm, outcome in dict(done).items():
    run = PlannedRun(arm, 0)
    path = plan_lib.outcome_path(plan_lib.run_dir(workdir, run))
    files.write_json(path, outcome)
  configurations.claim(configurations_of(configuration, workdir), 1)
  return files.read_json(plan_lib.study_path(workdir))


def test_a_study_is_of_one_configuration_data_set_and_kind_of_device(
    configuration, tmp_path
):
  first = claims(configuration, tmp_path / 'first', {})
  same = first['configurations']
  for key, value in {
      'configurations': same | {'single': ['a = 1', *same['single']]},
      'replicas': 2,
      'identity': {'ids': 'b'},
      'data': '513 points',
      'platform': 'gpu',
  }.items():
    other, workdir = first | {key: value}, tmp_path / key
    # A mistake leaves nothing that would refuse the correction, ...
    assert claims(configuration, workdir, other) == first
    # ... until a run is done.
    with pytest.raises(ValueError, match='holds another study'):
      claims(configuration, workdir, other, done={'single': {}})
    claims(configuration, workdir, first)


def test_an_own_arm_can_be_corrected_until_one_of_its_runs_is_done(
    configuration, tmp_path
):
  """Its turn comes last, and only then are bindings found that act nowhere."""
  first = claims(configuration, tmp_path, {})
  other = first['configurations'] | {'wide': ['z']}
  other = first | {'configurations': other}
  single = {'single': {}}
  assert claims(configuration, tmp_path, other, done=single) == first
  with pytest.raises(ValueError, match='it has wide: z, this one has wide: '):
    claims(configuration, tmp_path, other, done={'wide': {}})
  claims(configuration, tmp_path, first)
  with pytest.raises(ValueError, match=r'has groups of wide=2, .* wide=1'):
    claims(configuration, tmp_path, first, done={'wide': {'num_groups': 2}})


def test_what_earlier_versions_wrote_is_refused_in_a_line(
    configuration, tmp_path
):
  files.write_json(plan_lib.study_path(tmp_path), {'num_groups': 2})
  status, output = study(configuration, tmp_path)
  assert status == 1 and len(output.splitlines()) == 1
  assert 'holds a study of churn as earlier versions wrote it' in output
  with pytest.raises(ValueError, match='as earlier versions wrote it'):
    retrains.load_study(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / 'labels_test.npy'
  for data in (b'', b'\x93NUMPY', b'no array'):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'labels_test\.npy is damaged'):
      retrains.read_labels(tmp_path, 'test')


def test_other_data_are_refused(finished):
  workdir, _ = finished
  with pytest.raises(ValueError, match='labels differ'):
    retrains.keep_labels(workdir, 'test', np.zeros(150, np.int32))


def in_processes(launch, configuration, workdir, num_steps=24):
  """The study of `finished` without its own arm."""
  return launch(
      'churn',
      workdir=workdir,
      gin_file=configuration / 'toy.gin',
      gin=f'STEPS={num_steps}',
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
  for (arm, k), outcome in outcomes(workdir).items():
    assert outcome['cores'] * 2 <= max(len(os.sched_getaffinity(0)), 2)
    ours, theirs = (
        retrains.read_predictions(directory, arm, k, 'test')
        for directory in (workdir, finished[0])
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_processes_leave_when_asked(configuration, launch, tmp_path):
  workdir = tmp_path / 'run'
  process = in_processes(launch, configuration, workdir, num_steps=10**7)
  locked = lambda: len(list(workdir.glob('runs/*/*'))) == 2
  until(locked, process=process)
  process.send(signal.SIGTERM)
  output = process.wait(143)
  assert 'the same command goes on' in output.splitlines()[-1]
  assert not outcomes(workdir)
  assert not tiny_run.processes_of(workdir)
