"""The benchmarks run, in their tiniest form, and their page says what they say.

What needs PyTorch is in an extra of its own, and is run by hand.
"""

import collections
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import exchange_kit
import jax
import jax.numpy as jnp
import numpy as np
import prepared
import pytest
import remote

from benchmarks import (
    cases,
    cold_start,
    command,
    compare,
    exchange_cost,
    figures,
    input,
    loss,
    measure,
    overlap,
    page,
    population,
    prediction_exchange,
    records,
    rivals,
    run_all,
    scaling,
    step_cost,
)
from codistill_jax import base, losses
from codistill_jax.exchange import publications
from codistill_jax.exchange.plan import Plan
from codistill_jax.exchange.store_exchange import CheckpointExchange

ROOT = pathlib.Path(__file__).parents[1]
QUICK = command.Options(quick=True)


# -- measure ------------------------------------------------------------------


class Clockwork:
  """An arm that takes what it is told, and remembers when it was asked."""

  def __init__(self, name, seconds, asked):
    self._name, self._seconds, self._asked = name, seconds, asked

  def __call__(self, times):
    self._asked.append((self._name, times))
    return times * self._seconds


def test_arms_run_in_turn_as_often_as_they_need():
  asked = []
  arms = {n: Clockwork(n, s, asked) for n, s in (('a', 0.5), ('b', 0.25))}
  seconds = measure.alternate(arms, 3, least_seconds=1.0)
  assert seconds == {'a': [0.5] * 3, 'b': [0.25] * 3}
  measured = asked[4:]
  forth, back = [('a', 2), ('b', 4)], [('b', 4), ('a', 2)]
  assert measured == [*forth, *back, *forth]


def test_an_arm_of_no_time_at_all_is_not_called_for_ever():
  asked = []
  measure.alternate({'a': Clockwork('a', 0.0, asked)}, 1, most_calls=5)
  assert asked[-1] == ('a', 5)


def test_a_ratio_is_taken_repeat_by_repeat():
  # The machine was ten times slower in one repeat, for both.
  found = measure.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
  assert found == {'median': 2.0, 'quartiles': [2.0, 2.0], 'repeats': 3}
  assert measure.spread([1, 2, 3, 4, 5])['quartiles'] == [2, 4]


@pytest.mark.parametrize(
    'value, bound, met',
    [
        (1.0, {'at_most': 1.0}, True),
        (1.01, {'at_most': 1.0}, False),
        (0.6, {'at_least': 0.6}, True),
        (0.59, {'at_least': 0.6}, False),
    ],
)
def test_a_goal_is_met_at_its_bound(value, bound, met):
  assert measure.goal(value, **bound) == {**bound, 'value': value, 'met': met}


def test_lines_are_found_again():
  x = [1, 2, 4, 8]
  power = measure.slope(x, [3 * n**2 for n in x])
  assert power['exponent'] == 2 and power['residual'] < 1e-6
  straight = measure.line(x, [3 * n + 5 for n in x])
  assert (straight['slope'], straight['intercept']) == (3, 5)
  assert straight['residual'] < 1e-6
  assert measure.line(x, [1, 3, 1, 3])['residual'] > 0.1


# -- the scripts --------------------------------------------------------------


def rows_of(benchmark):
  rows = list(benchmark.rows(QUICK))
  assert rows and json.dumps(rows)
  return {row['name']: row for row in rows}


def test_step_cost_names_the_limit():
  (row,) = rows_of(step_cost).values()
  share = row['forward_share']['median']
  assert row['limit'] == pytest.approx(1 + share, rel=1e-2)
  # Teachers multiply a third of what a plain update multiplies, or less, where
  # the input of the first layer needs no gradient.
  assert 1.1 < row['operations_ratio'] < 1.5
  assert row['goal']['value'] == row['of_limit']['median']


def test_predictions_of_peers_take_no_second_forward_pass():
  (row,) = rows_of(prediction_exchange).values()
  # A teacher would take a third of all products.
  assert 1.0 <= row['operations_ratio'] < 1.1
  assert (row['groups'], row['bytes_to_peer']) == (2, 4 * 2 * 4)
  assert row['goal']['value'] == row['ratio']['median']


def test_fused_loss_needs_less_memory_and_gives_the_same():
  memory, time = rows_of(loss).values()
  assert memory['fused_mb'] < memory['plain_mb'] / 4
  assert time['ratio']['repeats'] == 1
  arguments = loss.arguments_of(300, 4, 20, 'float32')
  fused, plain = (f(*arguments) for f in loss.functions(False).values())
  student, teachers, labels = arguments
  logits = base.logits_of(student)
  said = jnp.stack([base.logits_of(jax.tree.map(lambda x: x[0], teachers))])
  expected = losses.task_loss(logits, labels)
  expected += losses.cross_entropy(logits, said, jnp.ones(1))
  np.testing.assert_allclose([fused, plain], [expected.sum()] * 2, rtol=1e-5)


def test_overlapping_programs_train_as_one():
  case = cases.click_dnn(4, (8,), tables=2, buckets=10)
  calls = overlap.calls_of(case)
  found = [
      [float(call()['loss/total']) for _ in range(3)] for call in calls.values()
  ]
  assert list(calls) == ['inside', 'apart', 'beside']
  np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-5)


def test_members_train_alike_together_and_in_turn():
  case = cases.click_dnn(4, (8,), tables=2, buckets=10)
  together, in_turn = (
      [call() for _ in range(2)][-1]
      for call in population.calls_of(case).values()
  )
  for key in ('loss/total', 'loss/distill'):
    found, expected = (
        [float(metrics[key]) for metrics in members]
        for members in (together, in_turn)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_operations_of_a_step_are_those_of_its_matrices():
  case = cases.lstm_lm(8, 30, 2, 4)
  # Two layers, from an embedding of 8 and from 8 units; the head.
  matrices = 2 * (8 + 8) * 32 + 8 * 30
  assert cases.update_operations(case, 0) == 6 * (2 * 4) * matrices


def test_groups_of_a_round_teach_each_other():
  case = cases.click_dnn(4, (8,), tables=2, buckets=10)
  call = scaling.Rounds(case)(2)['codistilled']
  assert len(call()) == 2


def test_imports_are_timed():
  rows = rows_of(cold_start)
  assert rows['import codistill_jax']['seconds']['median'] > 0
  assert 'quick' in rows['first line']['skipped']


def test_loading_is_timed_and_compared_with_a_need():
  row = next(input.rows(QUICK))
  assert row['name'] == 'digits' and row['batch'] == 64
  per_core = row['per_core']['median']
  assert row['cores_needed'] == pytest.approx(2500 / per_core, rel=0.01)
  for pipeline in input.PIPELINES:
    assert (ROOT / 'gin_configs' / 'tasks' / pipeline.config).is_file()


def test_a_look_at_a_run_is_timed():
  row = next(records.rows(QUICK))
  assert row['name'] == 'status' and row['records'] == 200
  assert 0 < row['processor_seconds']['median'] < row['seconds']['median'] + 1
  assert 5 < row['megabytes']['median'] < 1000


def test_rivals_say_what_they_need():
  if importlib.util.find_spec('torch'):
    pytest.skip('PyTorch is there: `python -m benchmarks.rivals --quick`')
  (row,) = rows_of(rivals).values()
  assert 'bench' in row['skipped']


# -- the run and the page -----------------------------------------------------

MACHINE = {
    'device': 'cpu',
    'cores': 2,
    'load': 0.1,
    'python': '3.11',
    'versions': {'jax': '0.10.2'},
}


def a_row(name, value, **rest):
  ratio = {'median': value, 'quartiles': [value, value], 'repeats': 3}
  goal = measure.goal(value, at_most=1.05)
  return {'name': name, 'ratio': ratio, 'goal': goal, **rest}


def a_run(device='cpu', **results):
  return {
      'device': device,
      'quick': False,
      'made': '2026-01-02T03:04:05+00:00',
      'command': f'python -m benchmarks.run_all --device={device}',
      'benchmarks': {
          name: {'machine': MACHINE, 'seconds': 12.3, 'results': rows}
          for name, rows in results.items()
      },
      'not_run': {},
  }


ROWS = [a_row('LSTM 256, P = 1', 1.02), a_row('LSTM 256, P = 3', 1.34)]


def test_the_page_says_which_goals_are_met():
  text = page.make([a_run(step_cost=ROWS)], [])
  met, missed = (x for x in text.splitlines() if x.startswith('| LSTM'))
  assert met.endswith('| ≤ 1.05: 1.02 | yes |')
  assert missed.endswith('| ≤ 1.05: 1.34 | **no** |')
  assert 'Missed: LSTM 256, P = 3 (1.34, goal ≤ 1.05).' in text
  assert page._UNKNOWN in text and '3 repeats' in text
  assert '| What teachers cost a step |' in text and '1 of 2 met' in text


def test_every_benchmark_is_on_the_page():
  text = page.make([a_run(step_cost=ROWS)], [])
  for name in run_all.BENCHMARKS:
    assert f'`benchmarks/{name}.py`' in text
  assert {f.benchmark for f in figures.FIGURES} == set(run_all.BENCHMARKS)


def test_what_was_not_measured_says_why():
  run = a_run(rivals=[command.skipped('PyTorch', 'needs torch')])
  run['not_run'] = {'loss': 'no time was left'}
  text = page.make([run], [])
  assert '* PyTorch: not measured, needs torch.' in text
  assert re.search(r'\| Against the same in PyTorch \|.*\| not run \|', text)
  assert 'On cpu: not run (no time was left).' in text


NOTES = """\
An introduction that nobody looks for.

## step_cost

About all.

## step_cost / LSTM

Layer norm.

## step_cost / LSTM 256, P = 3 / gpu

Launches.
"""


@pytest.mark.parametrize(
    'row, device, expected',
    [
        ('', '', 'About all.'),
        ('LSTM 256, P = 3', 'cpu', 'Layer norm.'),
        ('LSTM 256, P = 3', 'gpu', 'Launches.'),
        ('ResNet-20, P = 3', 'cpu', ''),
    ],
)
def test_the_note_that_fits_best_is_taken(row, device, expected):
  notes = page.read_notes(NOTES)
  assert page.find_note(notes, 'step_cost', row, device) == expected
  assert page.find_note(notes, 'loss', row, device) == ''


def test_a_page_of_something_else_is_refused(tmp_path):
  path = tmp_path / 'input.json'
  path.write_text('{"benchmark": "input"}')
  with pytest.raises(ValueError, match='run_all: it has no benchmarks'):
    page.read_run(path)


def test_rows_are_on_disk_before_the_benchmark_ends(tmp_path):
  path, seen = tmp_path / 'out' / 'record.json', []

  def rows(options):
    yield a_row('first', 1.0)
    seen.append(json.loads(path.read_text())['results'])
    yield a_row('second', 1.0)

  record = command.collect('made', rows, QUICK, path)
  assert [row['name'] for row in seen[0]] == ['first']
  assert json.loads(path.read_text()) == json.loads(json.dumps(record))


def test_only_benchmarks_that_exist_are_chosen():
  some = ['loss', 'step_cost']
  assert run_all.chosen(some, 'some.json') == some
  assert run_all.chosen([]) == list(run_all.BENCHMARKS)
  with pytest.raises(ValueError, match='no such benchmark'):
    run_all.chosen(['speed'])
  with pytest.raises(ValueError, match='one run of all; give --only an'):
    run_all.chosen(some)


def test_two_clones_are_compared_round_by_round():
  record = lambda **times: {
      'results': [
          {'name': name, 'plain_ms': measure.spread([x]), 'ratio': 1.0}
          for name, x in times.items()
      ]
  }
  this = [record(a=2.0, new=1.0), record(a=30.0, new=1.0)]
  other = [record(a=1.0), record(a=20.0)]
  ((row, time, found),) = compare.ratios(this, other)
  assert (row, time, found['median']) == ('a', 'plain_ms', 1.75)


def test_all_benchmarks_have_40_minutes():
  assert sum(run_all.BENCHMARKS.values()) <= 40 * 60


def test_a_run_with_something_cut_off_names_it_and_fails(tmp_path):
  output = tmp_path / 'run.json'
  run = [sys.executable, '-m', 'benchmarks.run_all', '--quick', '--budget=0.1']
  run += ['--only=records', f'--output={output}']
  done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  assert 'error: not whole: records' in done.stderr
  assert json.loads(output.read_text())['not_run'] == {
      'records': 'ended after 0 s, for lack of time'
  }


def test_the_page_in_docs_is_that_of_the_runs_in_docs():
  results = sorted((ROOT / 'docs' / 'results').glob('bench_*pu.json'))
  if not results:
    pytest.skip('no run is kept')
  runs = {run['device']: run for run in map(page.read_run, results)}
  notes = (ROOT / 'docs' / 'benchmarks_notes.md').read_text()
  made = page.make(
      [runs[d] for d in command.DEVICES if d in runs], page.read_notes(notes)
  )
  assert made == (ROOT / 'docs' / 'benchmarks.md').read_text()


# --- What an exchange costs at the far end ------------------------------------


def simulated(topology, lag=0.0, **kwargs):
  link = exchange_cost.Link(10e9 / 8, 0.05, lag)
  return exchange_cost.simulate(64, topology, link, num_steps=200, **kwargs)


@pytest.mark.parametrize('topology', ['ring', 'random-3'])
def test_64_groups_exchange_what_the_formula_says(topology):
  link = exchange_cost.Link(10e9 / 8, 0.05)
  found = simulated(topology)
  on_paper = exchange_cost.cost(1e9, 64, topology, link)
  assert found['bytes_sent'] == on_paper['bytes_sent']
  # At the last exchange, and at the first, there is nothing to fetch.
  assert 0.7 < found['bytes_fetched'] / on_paper['bytes_fetched'] <= 1.0
  # And looks in vain.
  assert 0.8 < found['requests'] / on_paper['requests'] < 3
  assert found['publications'] == 64 * 4
  # A teacher comes into use young, and ages until the next one comes.
  assert 20 < found['staleness_steps'] < 50
  late = simulated(topology, lag=30.0)['staleness_steps']
  assert late - found['staleness_steps'] == pytest.approx(30, abs=10)


def test_a_size_that_takes_longer_than_the_interval_is_sent_less_often():
  found = simulated('ring', num_bytes=100e9)  # 80 s up, every 50 s.
  assert found['publications'] == 64 * 2
  assert found['bytes_sent'] == 50e9


def test_requests_are_those_of_the_store(bucket, monkeypatch):
  asked = collections.Counter()
  request = lambda self, kind, path: asked.update([kind])

  def counted(act):
    asked.clear()
    act()
    return sum(asked.values())

  def publish(step):
    exchange.publish_if_due(step, exchange_kit.variables_of(step))
    exchange.flush()
    exchange.close() if step == 60 else None  # Deletes the oldest, too.

  root = 's3://bucket/exchange'
  exchange = CheckpointExchange(
      root,
      0,
      2,
      like=exchange_kit.variables_of(0),
      plan=Plan(every=10),
  )
  for step in range(10, 60, 10):
    publish(step)
  monkeypatch.setattr(remote.Bucket, 'request', request)
  found = {
      'publish': counted(lambda: publish(60)),
      'look': counted(lambda: exchange_kit.kept(root)),
      'read': counted(
          lambda: publications.read(
              root, 0, 60, like=exchange_kit.variables_of(0)
          )
      ),
  }
  expected = {
      'publish': exchange_cost.PUBLISH,
      'look': exchange_cost.LOOK,
      'read': exchange_cost.READ,
  }
  found['read'] += 3  # The mark of a reader, twice, and when it was made.
  # Orbax may write a file more or less.
  assert found == {k: pytest.approx(n, rel=0.2) for k, n in expected.items()}


def test_the_page_of_exchanges_has_what_is_computed():
  text = (ROOT / 'docs' / 'exchange_cost.md').read_text()
  kept = json.loads((ROOT / 'docs/results/exchange_cost.json').read_text())
  link = exchange_cost.Link(10e9 / 8)
  assert (
      exchange_cost.cost(100e9, 1000, 'ring', link).items()
      <= {
          k: v
          for row in kept['costs']
          if (row['groups'], row['topology'], row['gigabytes'], row['gigabits'])
          == (1000, 'ring', 100, 10)
          for k, v in row.items()
      }.items()
  )
  lines = exchange_cost.table()
  lines += exchange_cost.simulated_table(kept['simulated'])
  assert [line for line in lines if line not in text] == []


@pytest.mark.cluster
def test_all_that_a_gpu_is_for_runs_in_small_on_a_cpu(tmp_path):
  data, output = tmp_path / 'text', tmp_path / 'gpu'
  source = prepared.write_corpus(
      tmp_path / 'corpus.jsonl', prepared.texts(300), damaged=False
  )
  run = lambda *program: subprocess.run(
      [sys.executable, '-m', *program], cwd=ROOT, check=True
  )
  prepare = (f'--source={source}', '--vocab_size=320', f'--output={data}')
  run('experiments.prepare_data', *prepare)
  run(
      'benchmarks.gpu',
      *('--device=cpu', '--quick', f'--data={data}', f'--output={output}'),
  )
  parts = json.loads((output / 'gpu.json').read_text())['parts']
  assert parts['two_groups']['last_steps'] == [100, 100]
  assert 50 <= parts['two_groups']['killed_at'] < 100
  assert parts['benchmarks']['ran']
  assert parts['study']['runs_done'] == 8
  with tarfile.open(output / 'map_records.tar.gz') as archive:
    names = archive.getnames()
  assert sum(name.endswith('outcome.json') for name in names) == 8
