"""experiments.reproduce: all studies run at smoke scale and write a page."""

import csv
import json
import pathlib
import shutil

import pytest
import tiny_run
from run_cases import run as run_binary

from codistill_jax import run_directory
from experiments import reproduce
from experiments.studies import plan as plan_lib
from experiments.studies.catalogue import STUDIES
from experiments.studies.declaration import MEASURES, SCALES

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = list(STUDIES)
LANGUAGE = [
    name
    for name in NAMES
    if STUDIES[name].scales['smoke'].gin_files[0].endswith('lm_smoke.gin')
]
TOY = """\
from __gin__ import dynamic_registration
import optax
import churn_toy
from codistill_jax import experiment
from codistill_jax import schedules

experiment.Experiment.task = @churn_toy.task()
experiment.Experiment.model = @churn_toy.model
RATE = 1e-2
STEPS = 6
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = %RATE
experiment.Experiment.distill_weight = @schedules.distill_weight()
experiment.Experiment.num_steps = %STEPS
experiment.Experiment.group_batch = 16
experiment.Experiment.exchange_every = 2
experiment.Experiment.log_every = 2
experiment.Experiment.eval_every = 2
experiment.Experiment.eval_batch = 64
experiment.Experiment.checkpoint_every = 4
"""


# --- Declarations ------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_a_declaration_makes_sense_at_every_scale(name):
  study = STUDIES[name]
  assert set(study.scales) == set(SCALES)
  for scale in SCALES:
    plan = plan_lib.make_plan(study, scale)
    names = [arm.name for arm in plan.arms]
    assert len(set(names)) == len(names)
    assert plan.study.baseline in names
    assert plan.study.comparisons, scale
    for comparison in plan.study.comparisons:
      assert comparison.measure in MEASURES
    for arm in plan.arms:
      for file in (*arm.gin_files, *plan.scale.gin_files):
        assert (ROOT / file).is_file(), file
    done = set()
    for run in plan.runs():
      # In this order nobody waits for what comes later.
      assert set(plan.needed(run)) <= done
      done.add(run)


def test_a_rate_is_tuned_on_a_seed_of_its_own():
  plan = plan_lib.make_plan(STUDIES['lm_codistillation'], 'cpu')
  tuning = [run for run in plan.runs() if run.tuning]
  seeds = {run.seed for run in plan.runs() if not run.tuning}
  assert {run.seed for run in tuning}.isdisjoint(seeds)
  assert {run.rate for run in tuning} == set(plan.scale.rates)


def test_the_rate_with_the_lowest_loss_is_chosen():
  outcomes = {
      1e-3: {'loss': 2.0, 'diverged_at': None},
      1e-2: {'loss': 1.5, 'diverged_at': None},
      1e-1: {'loss': 1.0, 'diverged_at': 7},
      1e0: {'loss': float('nan'), 'diverged_at': None},
  }
  assert plan_lib.choose_rate(outcomes) == 1e-2
  # An arm that always diverges is trained, and will say so.
  diverged = {rate: {**o, 'diverged_at': 7} for rate, o in outcomes.items()}
  assert plan_lib.choose_rate(diverged) == 1e-3


def test_arms_are_trained_with_what_they_stand_on():
  study = STUDIES['offline_distillation']
  plan = plan_lib.make_plan(study, 'smoke', arms=['student'])
  assert [arm.name for arm in plan.arms] == ['baseline', 'teachers', 'student']
  student = next(run for run in plan.runs() if run.arm == 'student')
  teachers = plan.teachers(student)
  assert (teachers.arm, teachers.seed) == ('teachers', student.seed)
  assert teachers in plan.needed(student)
  with pytest.raises(ValueError, match=r"no arm 'pupil'; it has baseline"):
    plan_lib.make_plan(study, 'smoke', arms=['pupil'])


def test_workers_make_the_group_batch():
  plan = plan_lib.make_plan(STUDIES['sgd_scaling'], 'cpu')
  rows = plan.scale.worker_rows
  batches = [plan.group_batch(plan.arm(f'sgd_{w}')) for w in (1, 2, 4)]
  assert batches == [rows, 2 * rows, 4 * rows]
  plan = plan_lib.make_plan(STUDIES['async_sgd'], 'cpu')
  assert plan.group_batch(plan.arm('asynchronous_8')) == rows
  plan = plan_lib.make_plan(STUDIES['lm_codistillation'], 'cpu')
  sizes = [plan.group_batch(a) for a in plan.arms[:2]]
  assert sizes == [rows * plan.scale.workers, 2 * rows * plan.scale.workers]


# --- All of them, at smoke scale ---------------------------------------------


@pytest.fixture
def launch(tmp_path_factory):
  with tiny_run.launcher(tmp_path_factory) as launcher:
    yield launcher


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Data, and a directory for each study."""
  directory = tmp_path_factory.mktemp('studies')
  tiny_run.write_data(directory / 'data', num_validation=24)
  (directory / 'toy.gin').write_text(TOY)
  return directory


def seeds_of(name):
  """Two where seeds are what a test is about; the suite has little time."""
  two = 'offline_distillation', 'data_partition', 'topology', 'churn'
  return 2 if name in two else 1


def arguments(places, name, workdir=None):
  made = [
      f'--study={name}',
      '--scale=smoke',
      f'--workdir={workdir or places / name}',
  ]
  if name in LANGUAGE:
    data = f"text.language_model_task.data_dir='{places / 'data'}'"
    return [*made, f'--gin={data}']
  return [*made, f'--gin_file={places / "toy.gin"}']


class Finished(dict):
  """Exit status and output of each study, and of a few commands after them."""

  def __init__(self, places):
    self._places = places

  def __missing__(self, name):
    self[name] = run_binary(reproduce, self._arguments(name))
    return self[name]

  def _arguments(self, name):
    places = self._places
    if name in NAMES:
      return [*arguments(places, name), f'--seeds={seeds_of(name)}']
    again = arguments(places, 'topology')
    if name in AGAIN:
      assert self['topology'][0] == 0
      return [*again, *AGAIN[name]]
    return {
        'more seeds': lambda: [
            *again,
            '--seeds=3',
            '--arms=two',
            f'--output={places / "more"}',
        ],
        'nothing to report': lambda: [
            *arguments(places, 'topology', places / 'nothing'),
            '--report_only',
        ],
        'dead binding': lambda: [
            *arguments(places, 'topology', places / 'dead'),
            '--gin=UNUSED=1',
        ],
        'diverges': lambda: [
            *arguments(places, 'offline_distillation', places / 'diverges'),
            '--rates=1e30',
            '--seeds=1',
        ],
        'one program': lambda: [
            *arguments(places, 'data_partition', places / 'together'),
            '--one_program=yes',
        ],
        'one program diverges': lambda: [
            *arguments(places, 'data_partition', places / 'together_diverges'),
            '--one_program=yes',
            '--rates=1e30',
            '--arms=same',
        ],
        **{case: lambda x=x: x for case, x in ALONE.items()},
    }[name]()


# After the study topology.
AGAIN = {
    'again': [],
    'another': ['--gin=lstm.language_model.units=5'],
    'no arm': ['--arms=nine'],
    'own seed': ['--gin=Experiment.seed=7'],
    'own rate': ['--gin=RATE=0.5'],
    'another scale': ['--scale=cpu', '--report_only'],
    'no rate': ['--rates=fast'],
    'no latency': ['--all_reduce=1'],
    'no times': ['--step_times=no-such-file'],
}
ALONE = {
    'no study': ['--scale=smoke'],
    'rows of images': [
        '--study=image_codistillation',
        '--scale=smoke',
        '--worker_rows=4',
    ],
    'rates of churn': ['--study=churn', '--scale=smoke', '--rates=1,2'],
    'no scale': ['--study=topology', '--scale=cpu', '--seeds=0'],
    'list': ['--list'],
}


@pytest.fixture(scope='module')
def finished(places):
  return Finished(places)


@pytest.mark.parametrize('name', NAMES)
def test_a_study_writes_its_page(finished, places, name):
  status, output = finished[name]
  assert status == 0, output
  page = (places / name / 'report' / 'page.md').read_text()
  plan = plan_lib.make_plan(STUDIES[name], 'smoke')
  assert plan.study.question in page
  assert '## Verdict' in page and plan.study.source in page
  for arm in plan.arms:
    # A churn study shows the chosen weight of several.
    assert arm.title in page or name == 'churn'
  assert '## How to make it again' in page
  images = [x for x in (places / name / 'report').iterdir() if '.png' in x.name]
  assert images and all(x.name in page for x in images)


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'churn'])
def test_all_runs_of_a_study_are_in_its_table(finished, places, name):
  assert finished[name][0] == 0
  with (places / name / 'report' / 'curves.csv').open() as f:
    rows = list(csv.DictReader(f))
  plan = plan_lib.make_plan(STUDIES[name], 'smoke')
  found = {(row['arm'], int(row['seed'])) for row in rows}
  assert found == {
      (arm.name, seed) for arm in plan.arms for seed in range(seeds_of(name))
  }


def outcomes(workdir):
  return {
      path.parent.relative_to(workdir / 'runs'): json.loads(path.read_text())
      for path in sorted((workdir / 'runs').rglob('outcome.json'))
  }


def test_seeds_differ_and_arms_of_one_seed_agree_on_the_order(finished, places):
  assert finished['topology'][0] == 0
  found = outcomes(places / 'topology')
  losses = [outcome['loss'] for outcome in found.values()]
  assert len(set(losses)) == len(losses)
  for path, outcome in found.items():
    assert outcome['data_seed'] == outcome['seed'] == outcome['run']['seed']
    config = (places / 'topology/runs' / path / 'config.gin').read_text()
    assert f'Experiment.data_seed = {outcome["seed"]}' in config


def test_peers_are_those_of_the_topology(finished, places):
  assert finished['topology'][0] == 0
  found = outcomes(places / 'topology')
  peers = {path.parts[0]: outcome['peers'] for path, outcome in found.items()}
  expected = {'baseline': 0, 'two': 1, 'all': 3, 'ring': 1, 'pairs': 1}
  assert peers == expected


def test_a_student_is_taught_by_the_run_of_its_own_seed(finished, places):
  status, output = finished['offline_distillation']
  assert status == 0, output
  workdir = places / 'offline_distillation'
  for seed in (0, 1):
    run = run_directory.read_run(workdir / f'runs/student/seed_{seed}')
    text = json.dumps(run)
    assert f'runs/teachers/seed_{seed}' in text
  with (workdir / 'report' / 'study.csv').open() as f:
    rows = list(csv.DictReader(f))
  assert any(row['measure'] == 'total_steps_to_target' for row in rows)


def test_an_ensemble_is_better_than_its_members_on_average(finished, places):
  assert finished['lm_codistillation'][0] == 0
  workdir = places / 'lm_codistillation/runs/alone/seed_0'
  ensemble = run_directory.read_metrics(workdir / 'ensemble.jsonl').records
  groups = [
      {
          r['step']: r['eval/loss']
          for r in run_directory.read_metrics(
              run_directory.metrics_path(workdir, g)
          ).records
          if 'eval/loss' in r
      }
      for g in (0, 1)
  ]
  assert [r['step'] for r in ensemble] == list(groups[0])
  for record in ensemble:
    mean = sum(group[record['step']] for group in groups) / 2
    assert record['eval/loss'] < mean  # Jensen's inequality.


def test_a_study_that_is_done_is_not_trained_again(finished):
  status, output = finished['again']
  assert status == 0, output
  assert 'runs done' not in output and 'page:' in output


def test_more_seeds_are_added_to_those_that_are_there(finished, places):
  assert finished['topology'][0] == 0
  status, output = finished['more seeds']
  assert status == 0, output
  assert 'two, seed 2: done' in output and 'two, seed 1' not in output
  assert '3 seeds of each arm' in (places / 'more' / 'page.md').read_text()


@pytest.mark.parametrize(
    'case, words',
    [
        ('another', 'holds another study'),
        ('no study', 'give --study, one of'),
        ('own seed', 'the study sets seed of each run; change it by --seeds'),
        ('own rate', 'the study sets RATE of each run; change it by --rates'),
        ('another scale', "with scale 'smoke', not 'cpu'; give --scale=smoke"),
        ('rows of images', 'the group batch is that of the configuration'),
        ('rates of churn', '--rates would act nowhere in the study churn'),
        ('no arm', "no arm 'nine'; it has baseline"),
        ('no rate', 'is no learning rate'),
        ('no latency', '--all_reduce=1; expected two numbers'),
        ('no times', '--step_times=no-such-file: No such file'),
        ('no scale', '--seeds=0; set it to 1 or more'),
        ('nothing to report', 'holds no study; train it first'),
        ('dead binding', 'acts nowhere'),
    ],
)
def test_mistakes_are_said_in_a_line(finished, case, words):
  status, output = finished[case]
  assert status == 1
  assert words in output and 'Traceback' not in output
  assert len([x for x in output.splitlines() if x.startswith('error')]) == 1


def test_a_study_reports_that_its_arms_diverge(finished, places):
  status, output = finished['diverges']
  assert status == 0, output
  assert 'student, seed 0: diverged' in output
  found = outcomes(places / 'diverges')
  steps = {path.parts[0]: o['diverged_at'] for path, o in found.items()}
  # The student of teachers that came to nothing is not begun.
  assert steps.pop('student') == 0
  assert all(1 <= step <= 4 for step in steps.values())
  page = (places / 'diverges' / 'report' / 'page.md').read_text()
  assert 'Two teachers alone diverged at step' in page


def test_the_list_names_all_studies(finished):
  status, output = finished['list']
  assert status == 0
  assert all(f'{name}: ' in output for name in NAMES)


def test_one_program_finds_what_groups_in_turn_find(finished, places):
  for name in ('data_partition', 'one program'):
    status, output = finished[name]
    assert status == 0, output
  assert 'of 8, all seeds' in output or 'seed 1: done' in output
  apart, together = (
      outcomes(places / name) for name in ('data_partition', 'together')
  )
  assert apart.keys() == together.keys()
  for path, outcome in apart.items():
    other = together[path]
    assert outcome['loss'] == pytest.approx(other['loss'], rel=1e-5)
    for key in ('peers', 'examples_per_step', 'rate', 'seed', 'diverged_at'):
      assert outcome[key] == other[key]
    assert (outcome['together'], other['together']) == (1, 2)
    ours, theirs = (
        places / name / 'runs' / path for name in ('data_partition', 'together')
    )
    assert (ours / 'config.gin').read_text() == (
        theirs / 'config.gin'
    ).read_text()
    check_same_records(ours, theirs)
  # Of other seeds: neither the configuration nor the records are one's own.
  runs = [places / 'together/runs/disjoint' / f'seed_{k}' for k in (0, 1)]
  assert len({(path / 'config.gin').read_text() for path in runs}) == 2


def check_same_records(ours, theirs):
  found = [run_directory.read_run(path) for path in (ours, theirs)]
  assert found[0] | {'command': ''} == found[1] | {'command': ''}
  for group_id in range(found[0]['num_groups']):
    expected, records = (
        run_directory.read_metrics(
            run_directory.metrics_path(path, group_id)
        ).records
        for path in (ours, theirs)
    )
    assert len(records) == len(expected)
    for record, other in zip(records, expected):
      # What nobody reads is not published in one program.
      assert record.keys() ^ other.keys() <= {'exchange/publication_bytes'}
      for key in (
          'step',
          'loss/total',
          'eval/loss',
          'exchange/staleness_steps',
      ):
        value = other.get(key, 0.0)
        assert record.get(key, 0.0) == pytest.approx(value, rel=2e-5)


def test_a_seed_of_one_program_that_diverges_is_done(finished, places):
  status, output = finished['one program diverges']
  assert status == 0, output
  found = outcomes(places / 'together_diverges')
  assert {path.parts[0] for path in found} == {'baseline', 'same'}
  assert all(1 <= o['diverged_at'] <= 4 for o in found.values())
  assert all(o['together'] == 2 for o in found.values())


# --- Killed in the middle ----------------------------------------------------


def test_a_study_that_is_stopped_goes_on_to_the_same_page(
    launch, places, finished
):
  assert finished['data_partition'][0] == 0
  workdir = places / 'stopped'
  process = launch('reproduce', *arguments(places, 'data_partition', workdir))
  first = workdir / 'runs/baseline/seed_0/outcome.json'
  tiny_run.until(first.exists, process=process)
  process.send(15)
  output = process.wait(128 + 15)
  assert 'stopped' in output and 'Traceback' not in output
  assert len(outcomes(workdir)) < len(outcomes(places / 'data_partition'))
  launch('reproduce', *arguments(places, 'data_partition', workdir)).wait()
  expected, found = (
      (path / 'report' / 'curves.csv').read_text()
      for path in (places / 'data_partition', workdir)
  )
  assert found == expected
  shutil.rmtree(workdir)
