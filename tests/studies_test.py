"""experiments.reproduce: all studies run at smoke scale and write a page."""

import csv
import json
import os
import pathlib
import subprocess

import churn_toy
import pytest
import tiny_run
from run_cases import run as run_binary
from waits import until

from codistill_jax import run_directory
from experiments import reproduce
from experiments.studies import study_plan as plan_lib
from experiments.studies.catalogue import STUDIES
from experiments.studies.study_plan import MEASURES, SCALES

pytestmark = pytest.mark.usefixtures('compiled_once')
ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = list(STUDIES)
LANGUAGE = [
    name
    for name in NAMES
    if STUDIES[name].scales['smoke'].gin_files[0].endswith('lm_smoke.gin')
]


# --- Declarations ------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_a_declaration_makes_sense_at_every_scale(name):
  study = STUDIES[name]
  assert set(study.scales) == set(SCALES)
  assert set(study.views) <= {'bytes', 'latency', 'map', 'speed-accuracy'}
  for scale in SCALES:
    plan = plan_lib.make_plan(study, scale)
    names = [arm.name for arm in plan.study.arms]
    assert len(set(names)) == len(names)
    assert plan.study.baseline in names
    assert plan.study.comparisons, scale
    for comparison in plan.study.comparisons:
      assert comparison.measure in MEASURES
      assert comparison.expect in ('less', 'more', 'equal')
    for arm in plan.study.arms:
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
  assert [arm.name for arm in plan.study.arms] == [
      'baseline',
      'teachers',
      'student',
  ]
  students = [run for run in plan.runs() if run.arm == 'student']
  assert [run.seed for run in students] == [0, 1]
  for student in students:
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
  assert plan.group_batch(plan.arm('asynchronous_8')) == plan.scale.worker_rows
  plan = plan_lib.make_plan(STUDIES['lm_codistillation'], 'cpu')
  sizes = [plan.group_batch(a) for a in plan.study.arms[:2]]
  assert sizes == [rows * plan.scale.workers, 2 * rows * plan.scale.workers]


# --- All of them, at smoke scale ---------------------------------------------


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Data, and a directory for each study."""
  directory = tmp_path_factory.mktemp('studies')
  tiny_run.write_data(directory / 'data', num_validation=24)
  (directory / 'toy.gin').write_text(churn_toy.GIN)
  return directory


def seeds_of(name):
  """Two where seeds are what a test is about; the suite has little time."""
  return 2 if name in ('offline_distillation', 'churn') else 1


def arguments(places, name, workdir):
  made = [f'--study={name}', '--scale=smoke', f'--workdir={places / workdir}']
  if name in LANGUAGE:
    data = f"text.language_model_task.data_dir='{places / 'data'}'"
    return [*made, f'--gin={data}']
  return [*made, f'--gin_file={places / "toy.gin"}']


@pytest.fixture(scope='module')
def reproduce_once(places):
  """Exit status and output of a study and flags; run when it is first asked."""
  known = {}

  def reproduce_once(study, *flags, workdir=None):
    key = study, flags, workdir
    if key not in known:
      given = {flag.partition('=')[0] for flag in flags} - {'--gin'}
      made = [
          flag
          for flag in arguments(places, study, workdir or study)
          if flag.partition('=')[0] not in given
      ]
      known[key] = run_binary(reproduce, [*made, *flags])
    return known[key]

  return reproduce_once


@pytest.fixture(scope='module')
def finished(reproduce_once, places):
  """The directory of a study that is done."""

  def finished(name):
    status, output = reproduce_once(name, f'--seeds={seeds_of(name)}')
    assert status == 0, output
    return places / name

  return finished


@pytest.mark.parametrize('name', NAMES)
def test_a_study_writes_its_page(finished, name):
  report = finished(name) / 'report'
  page = (report / 'page.md').read_text()
  plan = plan_lib.make_plan(STUDIES[name], 'smoke')
  assert plan.study.question in page
  assert '## Verdict' in page and plan.study.source in page
  assert '## How to make it again' in page
  images = [x for x in report.iterdir() if '.png' in x.name]
  assert images and all(x.name in page for x in images)
  if name == 'churn':  # It shows the chosen weight of several.
    return
  assert all(arm.title in page for arm in plan.study.arms)
  with (report / 'curves.csv').open() as f:
    found = {(row['arm'], int(row['seed'])) for row in csv.DictReader(f)}
  assert found == {
      (arm.name, seed)
      for arm in plan.study.arms
      for seed in range(seeds_of(name))
  }


def outcomes(workdir):
  return {
      path.parent.relative_to(workdir / 'runs'): json.loads(path.read_text())
      for path in sorted((workdir / 'runs').rglob('outcome.json'))
  }


def test_seeds_differ_and_arms_of_one_seed_agree_on_the_order(finished):
  workdir = finished('offline_distillation')
  found = outcomes(workdir)
  losses = [outcome['loss'] for outcome in found.values()]
  assert len(set(losses)) == len(losses)
  for path, outcome in found.items():
    assert outcome['data_seed'] == outcome['seed'] == outcome['run']['seed']
    config = (workdir / 'runs' / path / 'config.gin').read_text()
    assert f'Experiment.data_seed = {outcome["seed"]}' in config


def test_arms_have_the_peers_of_their_topology(finished):
  found = outcomes(finished('topology'))
  peers = {path.parts[0]: outcome['peers'] for path, outcome in found.items()}
  expected = {'baseline': 0, 'two': 1, 'all': 3, 'ring': 1, 'pairs': 1}
  assert peers == expected


def test_a_student_is_taught_by_the_run_of_its_own_seed(finished):
  workdir = finished('offline_distillation')
  for seed in (0, 1):
    run = run_directory.read_run(workdir / f'runs/student/seed_{seed}')
    assert f'runs/teachers/seed_{seed}' in json.dumps(run)
  with (workdir / 'report' / 'study.csv').open() as f:
    measures = {row['measure'] for row in csv.DictReader(f)}
  assert 'total_steps_to_target' in measures


def losses_of(path):
  records = run_directory.read_metrics(path).records
  return {r['step']: r['eval/loss'] for r in records if 'eval/loss' in r}


def test_an_ensemble_is_better_than_its_members_on_average(finished):
  workdir = finished('lm_codistillation') / 'runs/alone/seed_0'
  ensemble = losses_of(plan_lib.ensemble_path(workdir))
  groups = [losses_of(run_directory.metrics_path(workdir, g)) for g in (0, 1)]
  assert ensemble.keys() == groups[0].keys()
  for step, loss in ensemble.items():
    assert loss < sum(g[step] for g in groups) / 2  # Jensen's inequality.


def test_a_study_that_is_done_is_not_trained_again_but_for_more_seeds(
    finished, reproduce_once, places
):
  name = 'offline_distillation'
  finished(name)
  status, output = reproduce_once(name)
  assert status == 0, output
  assert 'runs done' not in output and 'page:' in output
  status, output = reproduce_once(
      name, '--seeds=3', '--arms=teachers', f'--output={places / "more"}'
  )
  assert status == 0, output
  assert 'teachers, seed 2: done' in output and 'seed 1' not in output
  assert '3 seeds of each arm' in (places / 'more' / 'page.md').read_text()


# After the study topology.
MISTAKES = {
    'holds another study': ['--gin=lstm.language_model.units=5'],
    "no arm 'nine'; it has baseline": ['--arms=nine'],
    'sets seed of each run; change it by --seeds': ['--gin=Experiment.seed=7'],
    'sets RATE of each run; change it by --rates': ['--gin=RATE=0.5'],
    "with scale 'smoke', not 'cpu'; give --scale=smoke": [
        '--scale=cpu',
        '--report_only',
    ],
    'is no learning rate': ['--rates=fast'],
    '--all_reduce=1; expected two numbers': ['--all_reduce=1'],
    '/none: No such file': ['--step_times=none'],
    '--seeds=0; set it to 1 or more': ['--seeds=0'],
    'holds no study; train it first': ['--report_only', '--workdir={new}'],
    'acts nowhere': ['--gin=UNUSED=1', '--workdir={new}'],
    'codistillation, seed 0 would have no teacher in any of its 6 steps': [
        '--study=image_codistillation',
        '--workdir={new}',
        '--gin_file={toy}',
        '--gin=schedules.distill_weight.burn_in_steps=6',
    ],
    'gives group 1 the peer 5': [
        '--gin=Checkpoints.topology=[[1],[5]]',
        '--workdir={new}',
    ],
    'the group batch is that of the configuration': [
        '--study=image_codistillation',
        '--worker_rows=4',
    ],
    '--rates would act nowhere in the study churn': [
        '--study=churn',
        '--rates=1,2',
    ],
}


@pytest.mark.parametrize('words', MISTAKES)
def test_mistakes_are_said_in_a_line(
    finished, reproduce_once, places, tmp_path, words
):
  finished('topology')
  known = {'new': tmp_path, 'toy': places / 'toy.gin'}
  flags = [flag.format(**known) for flag in MISTAKES[words]]
  status, output = reproduce_once('topology', *flags)
  assert status == 1
  assert words in output and 'Traceback' not in output
  assert len([x for x in output.splitlines() if x.startswith('error')]) == 1
  assert not list(tmp_path.rglob('outcome.json'))  # Nothing was trained.


def test_the_list_names_all_studies():
  status, output = run_binary(reproduce, ['--list'])
  assert status == 0
  assert all(f'{name}: ' in output for name in NAMES)
  status, output = run_binary(reproduce, ['--scale=smoke'])
  assert status == 1 and 'give --study, one of' in output


def test_a_study_reports_that_its_arms_diverge(reproduce_once, places):
  status, output = reproduce_once(
      'offline_distillation', '--rates=1e30', '--seeds=1', workdir='diverges'
  )
  assert status == 0, output
  assert 'student, seed 0: diverged' in output
  found = outcomes(places / 'diverges')
  steps = {path.parts[0]: o['diverged_at'] for path, o in found.items()}
  # The student of teachers that came to nothing is not begun.
  assert steps.pop('student') == 0
  assert all(1 <= step <= 4 for step in steps.values())
  page = (places / 'diverges' / 'report' / 'page.md').read_text()
  assert 'Two teachers alone diverged at step' in page


# --- One program -------------------------------------------------------------


def test_one_program_finds_what_groups_in_turn_find(
    finished, reproduce_once, places
):
  ours, theirs = finished('offline_distillation'), places / 'together'
  status, output = reproduce_once(
      'offline_distillation', '--one_program=yes', workdir='together'
  )
  assert status == 0, output
  apart, together = outcomes(ours), outcomes(theirs)
  # Of one arm another test has trained more seeds.
  assert {path.name for path in together} == {'seed_0', 'seed_1'}
  assert together.keys() <= apart.keys()
  for path, other in together.items():
    outcome = apart[path]
    assert outcome['loss'] == pytest.approx(other['loss'], rel=1e-5)
    for key in ('peers', 'examples_per_step', 'rate', 'seed', 'diverged_at'):
      assert outcome[key] == other[key]
    # Each student has teachers of its own.
    together_with = 1 if path.parts[0] == 'student' else 2
    assert (outcome['together'], other['together']) == (1, together_with)
    check_same_run(ours / 'runs' / path, theirs / 'runs' / path)


def check_same_run(ours, theirs):
  expected, found = map(run_directory.read_run, (ours, theirs))
  assert found['seed'] == expected['seed']
  # But for where teachers lie; of other seeds it would be another.
  texts = [
      (path / 'config.gin').read_text().replace(str(path.parents[2]), '')
      for path in (ours, theirs)
  ]
  assert texts[0] == texts[1]
  ensembles = [plan_lib.ensemble_path(path) for path in (ours, theirs)]
  assert ensembles[0].exists() == ensembles[1].exists()
  if ensembles[0].exists():
    before, after = map(losses_of, ensembles)
    assert after == pytest.approx(before, rel=2e-5)
  for group_id in range(found['num_groups']):
    before, records = (
        run_directory.read_metrics(
            run_directory.metrics_path(path, group_id)
        ).records
        for path in (ours, theirs)
    )
    assert len(records) == len(before)
    for record, other in zip(records, before):
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


def test_a_seed_of_one_program_that_diverges_holds_up_no_other(
    reproduce_once, places
):
  status, output = reproduce_once(
      'image_codistillation',
      '--one_program=yes',
      '--seeds=2',
      '--arms=codistillation',
      '--gin=churn_toy.task.bad_seed=1',
      workdir='one_diverges',
  )
  assert status == 0, output
  found = {str(k): o for k, o in outcomes(places / 'one_diverges').items()}
  assert all(o['together'] == 2 for o in found.values())
  # At the exchange after it, by groups that have one.
  assert {k: o['diverged_at'] for k, o in found.items()} == {
      'baseline/seed_0': None,
      'baseline/seed_1': 4,
      'codistillation/seed_0': None,
      'codistillation/seed_1': 4,
  }
  assert found['codistillation/seed_0']['loss'] > 0


def test_one_program_goes_on_where_all_seeds_have_a_checkpoint(
    reproduce_once, places, monkeypatch
):
  flags = '--one_program=yes', '--seeds=2', '--gin=STEPS=12', '--arms=baseline'
  name, steps = 'image_codistillation', 12
  whole = reproduce_once(name, *flags, workdir='whole')
  assert whole[0] == 0, whole[1]
  # Killed after step 8, of which there is a checkpoint; it reads a few rows
  # more than those of its updates.
  monkeypatch.setattr(churn_toy, 'batches_left', 2 * 8 + 4)
  killed = arguments(places, name, 'killed')
  assert run_binary(reproduce, [*killed, *flags])[0] == 130
  assert not outcomes(places / 'killed')
  monkeypatch.setattr(churn_toy, 'batches_left', 2 * (steps - 8) + 8)
  status, output = run_binary(reproduce, [*killed, *flags])
  assert status == 0, output
  curves = [places / x / 'report' / 'curves.csv' for x in ('whole', 'killed')]
  assert curves[0].read_text() == curves[1].read_text()


# --- Several processes -------------------------------------------------------

WORKER = """
import os, pathlib, signal, sys, time
ends = {ends}
first = '--worker=0/2' in sys.argv
leave = lambda *_: os._exit(ends[1])
signal.signal(signal.SIGTERM, leave)
if first:
  pathlib.Path({workdir!r}, 'study.json').write_text('{{}}')
  time.sleep(60)
if ends[0] == 'killed':
  os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)  # Until the other one has its handler.
sys.exit(ends[0])
"""


ENDS = {
    (75, 143): 75,
    (143, 75): 75,
    (143, 143): 143,
    (1, 143): 1,
    (75, 1): 1,
    (70, 75): 70,
    (75, 0): 75,
    ('killed', 143): 75,
    ('killed', 1): 1,
}
SUPERVISOR = """
import os, sys
from absl import flags
from experiments import cli, reproduce
reproduce.define_flags()
for path in sys.argv[1:]:
  cli.module_of = lambda binary: 'stand_in'
  argv = ['reproduce', '--study=topology', f'--workdir={path}', '--jobs=2']
  argv = flags.FLAGS(argv)
  os.environ['PYTHONPATH'] = path
  try:
    print(cli.status_of(reproduce.main, argv))
  except SystemExit as e:
    print(e.code)
"""


def test_the_status_is_the_worst_of_all_processes(python, tmp_path):
  """Of one that ends by itself, and of the other, which is asked to."""
  paths = []
  for i, ends in enumerate(ENDS):
    paths.append(tmp_path / str(i))
    paths[-1].mkdir()
    code = WORKER.format(ends=ends, workdir=str(paths[-1]))
    (paths[-1] / 'stand_in.py').write_text(code)
  done = subprocess.run(
      [python, '-c', SUPERVISOR, *map(str, paths)],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.stdout.split('\n')[:-1] == [str(x) for x in ENDS.values()], done


# --- Killed in the middle ----------------------------------------------------


def test_a_study_that_is_stopped_goes_on_to_the_same_page(
    launch, places, finished
):
  expected, workdir = finished('data_partition'), places / 'stopped'
  flags = [*arguments(places, 'data_partition', 'stopped'), '--seeds=1']
  process = launch('reproduce', *flags)
  first = workdir / 'runs/baseline/seed_0/outcome.json'
  until(first.exists, process=process)
  process.send(15)
  output = process.wait(128 + 15)
  assert 'stopped' in output and 'Traceback' not in output
  assert len(outcomes(workdir)) < len(outcomes(expected))
  launch('reproduce', *flags).wait()
  curves = [x / 'report' / 'curves.csv' for x in (expected, workdir)]
  assert curves[0].read_text() == curves[1].read_text()
