"""Tests of experiments/report: what the numbers, plots and pages say."""

import html.parser
import io
import math
import os
import re
import subprocess

import numpy as np
import pytest

from codistill_jax import run_directory, writers
from codistill_jax.storage import files
from experiments import (
    report,
    report_curves,
    report_data,
    report_exchange,
    report_exchange_plots,
    report_pages,
    report_plots,
    report_style,
    report_table,
    report_text,
)
from experiments.report_data import Curve

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _losses(group_id: int, offset: float, steps: int) -> dict[int, float]:
  """Validation losses: 6 at step 10, then 0.1 less every 10 steps."""
  return {
      s: 6.1 - s / 100 - offset + 0.02 * group_id
      for s in range(10, steps + 1, 10)
  }


def make_run(
    workdir, arm: str, num_groups: int, *, offset: float = 0.0, steps: int = 100
):
  """A small run: a record every 2 steps, an evaluation every 10."""
  run_directory.write_run(
      workdir,
      {
          'arm': arm,
          'num_groups': num_groups,
          'group_batch': 64,
          'burn_in_steps': 20,
          'exchange_every': 10,
          'example': 'token',
          'command': f'python -m experiments.train_local --workdir {workdir}',
          'configuration': ['not', 'a', 'setting'],
      },
  )
  run_directory.config_path(workdir).write_text('Lstm.units = 8  # <b>|`\n')
  for group_id in range(num_groups):
    losses = _losses(group_id, offset, steps)
    path = run_directory.metrics_path(workdir, group_id)
    writer = writers.JsonlWriter(path, clock=lambda: 1_700_000_000.0)
    for step in range(2, steps + 1, 2):
      distilling = num_groups > 1 and step > 20
      metrics = {
          'loss/task': 6.0 - step / 100,
          'distill/weight': float(distilling),
          'perf/steps_per_sec': 4.0,
      }
      if num_groups > 1:
        metrics['exchange/stall_ms'] = 2.0
        metrics['loss/distill'] = 0.0
        metrics['exchange/peers_present'] = float(distilling)
      if distilling:
        metrics['loss/distill'] = 6.0 - step / 100
        metrics['exchange/staleness_steps'] = 5.0 + step % 10
        metrics['exchange/staleness_steps_max'] = 6.0 + step % 10
        metrics['exchange/staleness_seconds'] = 1.0
      writer.write(step, metrics)
      if step in losses:
        writer.write(step, {'eval/loss': losses[step], 'eval/accuracy': 0.25})
    writer.close()
  return workdir


def write_records(workdir, group_id: int, records) -> None:
  """Writes (step, metrics) as they are, as several processes in turn may."""
  writer = writers.JsonlWriter(run_directory.metrics_path(workdir, group_id))
  for step, metrics in records:
    writer.write(step, metrics)
  writer.close()


def make_exchange(
    workdir, num_groups: int, *, steps: int = 100, every: int = 5
):
  """A run with all that an exchange records; peer p is 10 p steps stale."""
  run_directory.write_run(
      workdir,
      {
          'arm': 'codistillation',
          'num_groups': num_groups,
          'burn_in_steps': 20,
          'exchange_every': 10,
      },
  )
  for group_id in range(num_groups):
    peers = [p for p in range(num_groups) if p != group_id]
    records = []
    for step in range(every, steps + 1, every):
      # The last group is away for a while.
      present = [p for p in peers if p < num_groups - 1 or not 40 < step < 70]
      present = present if step > 20 else []
      metrics = {
          'perf/steps_per_sec': 4.0,
          'exchange/stall_ms': 2.0,
          'exchange/peers_present': float(len(present)),
          'exchange/rejected': float(step > 50) * group_id,
          'exchange/publish_failures': 0.0,
          'exchange/publication_bytes': 1_234_567.0,
      }
      if present:
        ages = [10.0 * p for p in present]
        metrics['exchange/staleness_steps'] = float(np.mean(ages))
        metrics['exchange/staleness_steps_max'] = max(ages)
        metrics['exchange/staleness_seconds'] = float(np.mean(ages)) / 4
        for p, age in zip(present, ages):
          metrics[f'exchange/staleness_steps_group_{p}'] = age
          metrics[f'exchange/staleness_seconds_group_{p}'] = age / 4
      records.append((step, metrics))
    write_records(workdir, group_id, records)
  return report_data.load_arms([str(workdir)])


def write_comparison(path) -> None:
  """A final evaluation of both arms, without accuracy."""
  pairs = [
      {'churn/mean_abs': 0.01, 'churn/disagreement': 0.3},
      {'churn/mean_abs': 0.03, 'churn/disagreement': 0.1},
  ]
  ensemble = {'eval/loss': 4.4, 'eval/perplexity': 81.45}
  files.write_json(
      path,
      {
          'models': {
              'codistillation/group_0': {'step': 100, 'eval/loss': 4.5},
              'codistillation/group_1': {'step': 100, 'eval/loss': 4.7},
              'baseline/group_0': {'step': 100, 'eval/loss': 5.25},
          },
          'ensembles': {'codistillation': ensemble},
          'pairs': {'codistillation': pairs},
      },
  )


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two')
  make_run(workdir, 'codistillation', 2, offset=0.305)
  write_comparison(run_directory.comparison_path(workdir))
  return str(workdir)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  return str(make_run(tmp_path_factory.mktemp('one'), 'baseline', 1))


@pytest.fixture(scope='module')
def arms(two, one):
  return report_data.load_arms([two, one])


# --- Numbers -----------------------------------------------------------------


def test_table_has_a_row_per_group_and_one_of_the_ensemble(arms):
  rows = ['|'.join(row) for row in report_table.table_rows(arms)]
  assert rows == [
      # Stall: 50 records of 2 ms, 10 exchanges, 100 steps at 4 per second.
      'codistillation|group 0|100|4.5000|90.02|-|9.0 / 14|10.0 (0.4%)|-|-',
      'codistillation|group 1|100|4.7000|109.95|-|9.0 / 14|10.0 (0.4%)|-|-',
      'codistillation|ensemble|-|4.4000|81.45|-|-|-|20.00%|0.02',
      # Its final evaluation lies in the other arm's directory.
      'baseline|group 0|100|5.2500|190.57|-|-|-|-|-',
  ]


def test_without_a_final_evaluation_the_last_in_training_holds(one):
  (row,) = report_table.table_rows(report_data.load_arms([one]))
  assert '|'.join(row) == 'baseline|group 0|100|5.1000|164.02|25.00%|-|-|-|-'


def test_comparison_of_another_directory_is_used_for_a_unique_arm_only(
    one, tmp_path
):
  write_comparison(tmp_path / 'comparison.json')
  (arm,) = report_data.load_arms([one], output=tmp_path)
  assert arm.models == {0: {'step': 100, 'eval/loss': 5.25}}
  arms = report_data.load_arms([f'a={one}', f'b={one}'], output=tmp_path)
  assert [arm.models for arm in arms] == [{}, {}]


def test_terminal_table_is_narrow_and_aligned(arms, tmp_path):
  long = make_run(tmp_path, 'an arm with a very long name indeed', 1)
  more = [*arms, *report_data.load_arms([str(long)])]
  stream = io.StringIO()
  report_table.print_table(more, file=stream)
  lines = stream.getvalue().splitlines()
  assert max(map(len, lines)) <= 110
  # Where the rule has a gap between columns, every line has.
  gaps = [m.start() for m in re.finditer('  ', lines[2])]
  assert all(
      line[gap : gap + 2].strip() == '' for line in lines for gap in gaps
  )


def test_training_time_counts_the_steps_before_the_first_record(arms):
  for arm in arms:
    for group in arm.groups:
      assert report_data.training_seconds(group) == 100 / 4.0


def test_mean_curve_is_over_the_steps_that_all_groups_have():
  a = Curve(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]))
  b = Curve(np.array([2, 3, 4]), np.array([4.0, 5.0, 6.0]))
  none = Curve(np.array([], int), np.array([]))
  mean = report_data.mean_curve([a, none, b])
  assert mean.steps.tolist() == [2, 3]
  assert mean.values.tolist() == [3.0, 4.0]
  assert not report_data.mean_curve([none])


def test_target_rule_is_the_first_evaluation_at_or_under():
  curve = Curve(np.arange(1, 6), np.array([np.nan, 3.0, 2.0, 1.0, 2.0]))
  assert report_data.best(curve) == (4, 1.0)
  assert report_data.first_at_or_under(curve, 2.0) == 3
  assert report_data.first_at_or_under(curve, 0.5) is None


def test_running_mean_is_centred_and_passes_over_nan():
  values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
  curve = Curve(np.arange(5), values)
  smooth = report_curves.running_mean(curve, 3)
  np.testing.assert_allclose(smooth.values, [1.5, 1.5, 3.0, 5.0, 5.0])
  np.testing.assert_array_equal(
      report_curves.running_mean(curve, 1).values, values
  )


def test_bins_hold_mean_and_range_and_gaps_stay_gaps():
  steps = np.array([0, 1, 2, 3, 8, 9, 10, 11])
  mean = Curve(steps, np.array([1.0, 3, 2, 2, 5, 7, 6, 6]))
  most = Curve(steps, mean.values + 10)
  middle, value, low, high = report_curves.binned(mean, most, 3)
  np.testing.assert_allclose(middle, [2, 6, 10])
  np.testing.assert_allclose(value, [2, np.nan, 6])
  np.testing.assert_allclose(low, [1, np.nan, 5])
  np.testing.assert_allclose(high, [13, np.nan, 17])
  drawn = report_curves.with_gaps(mean)
  assert np.isnan(drawn.values).tolist() == [False] * 4 + [True] + [False] * 4


def test_distillation_loss_is_drawn_where_it_has_weight(arms):
  curve = report_curves.distill_curve(arms[0].groups[0])
  assert curve.steps.tolist() == list(range(22, 101, 2))


# --- Exchange ----------------------------------------------------------------


def _group(*records) -> report_data.Group:
  log = run_directory.MetricsLog([{'step': s} | m for s, m in records], 0)
  return report_data.Group(0, log)


def _rejections(*steps_and_counts) -> report_data.Group:
  return _group(*[(s, {'exchange/rejected': n}) for s, n in steps_and_counts])


REJECTED = report_exchange.REJECTED


def test_health_has_a_row_per_group(tmp_path):
  rows = report_table.health_rows(make_exchange(tmp_path, 4))
  assert ['|'.join(row) for row in rows] == [
      # 16 records after burn-in, 5 of them without group 3; its teachers are
      # 10, 20 and 30 steps old. 20 records of 2 ms, 100 steps at 4 per second.
      'codistillation|group 0|10|18.4 / 30|4.6 / 7.5|2.7 / 3|0|0'
      '|0.04 (0.2%)|1.23 MB|-',
      'codistillation|group 1|10|14.6 / 30|3.6 / 7.5|2.7 / 3|1|0'
      '|0.04 (0.2%)|1.23 MB|-',
      'codistillation|group 2|10|10.7 / 30|2.7 / 7.5|2.7 / 3|2|0'
      '|0.04 (0.2%)|1.23 MB|-',
      'codistillation|group 3|10|10.0 / 20|2.5 / 5.0|3.0 / 3|3|0'
      '|0.04 (0.2%)|1.23 MB|-',
  ]


def test_health_of_an_old_run_has_dashes_and_a_single_group_no_row(arms):
  rows = report_table.health_rows(arms)
  assert [row[1] for row in rows] == ['group 0', 'group 1']
  assert rows[0][2:] == [
      '10', '9.0 / 14', '1.0 / 1.0', '1.0 / 1', '-', '-', '0.10 (0.4%)', '-',
      '-',
  ]  # fmt: skip


def test_a_group_that_is_alone_by_design_exchanges_nothing(tmp_path):
  # It records zeros, which would say too much.
  arms = make_exchange(tmp_path, 1)
  assert report_table.health_rows(arms) == []
  assert report_exchange_plots.make_plots(arms) == []


def test_counts_are_added_up_over_restarts():
  # A process counts 3, the next 2, the last none.
  group = _rejections((1, 0), (2, 3), (3, 3), (4, 1), (5, 2), (6, 0))
  curve = report_exchange.counted(group, REJECTED)
  assert curve.steps.tolist() == [1, 2, 3, 4, 5, 6]
  assert curve.values.tolist() == [0, 3, 3, 4, 5, 5]
  assert len(report_exchange.lives(group.log.records)) == 3


def test_where_the_step_goes_back_a_process_began():
  # The second process rejects as many as the first: no count falls.
  group = _rejections((10, 0), (20, 2), (30, 2), (15, 2), (25, 4))
  curve = report_exchange.counted(group, REJECTED)
  assert curve.steps.tolist() == [10, 15, 25]
  # What the first counted stays counted, in steps that were done again too.
  assert curve.values.tolist() == [0, 4, 6]


def test_a_restart_is_seen_once_though_step_and_count_go_back():
  group = _group(
      (10, {REJECTED: 1.0}),
      (20, {REJECTED: 5.0}),
      (10, {'eval/loss': 1.0}),  # Evaluated before its first update.
      (12, {REJECTED: 0.0}),
      (12, {'eval/loss': 1.0}),
      (14, {REJECTED: 1.0}),
  )
  assert len(report_exchange.lives(group.log.records)) == 2
  assert report_exchange.counted(group, REJECTED).values[-1] == 6


def test_any_count_that_falls_shows_a_restart():
  failures = report_exchange.FAILURES
  group = _group(
      (10, {REJECTED: 0.0, failures: 4.0}), (20, {REJECTED: 3.0, failures: 0.0})
  )
  assert len(report_exchange.lives(group.log.records)) == 2
  assert report_exchange.counted(group, REJECTED).values[-1] == 3
  assert report_exchange.counted(group, failures).values[-1] == 4


@pytest.mark.parametrize('value', [math.nan, math.inf, 'many', None, []])
def test_what_is_no_count_is_passed_over(value):
  group = _group((1, {REJECTED: 2.0}), (2, {REJECTED: value}), (3, {}))
  assert report_exchange.counted(group, REJECTED).values.tolist() == [2]
  assert not report_exchange.counted(_group((1, {})), REJECTED)


def test_staleness_counts_the_oldest_single_teacher():
  key = 'exchange/staleness_seconds'
  group = _group(
      (1, {key: 2.0, f'{key}_group_1': 1.0, f'{key}_group_12': 3.0}),
      (2, {key: 4.0, f'{key}_group_1': 4.0}),
      (3, {f'{key}_group_1': math.nan}),
  )
  assert report_exchange.staleness(group, 'seconds') == (3.0, 4.0)
  assert sorted(report_exchange.by_peer(group, 'seconds')) == [1, 12]
  assert report_exchange.staleness(group, 'steps') is None


@pytest.mark.parametrize(
    'count, text',
    [
        (0, '0 bytes'),
        (999, '999 bytes'),
        (1000, '1 kB'),
        (999_499, '999 kB'),
        (999_500, '1 MB'),
        (402_653_184, '403 MB'),
        (2.5e12, '2.5 TB'),
    ],
)
def test_sizes_have_a_unit(count, text):
  assert report_table.size(count) == text


def test_median_of_groups_holds_values_and_ends_with_each():
  a = Curve(np.array([0, 10]), np.array([1.0, 3.0]))
  b = Curve(np.array([5, 12, 15]), np.array([5.0, 5.0, np.nan]))
  c = Curve(np.array([10, 20]), np.array([17.0, 9.0]))
  median = report_curves.median_curve([a, b, c])
  assert median.steps.tolist() == [0, 5, 10, 12, 20]
  # At 10 there are 3, 5 and 17.
  assert median.values.tolist() == [1.0, 3.0, 5.0, 11.0, 9.0]
  assert not report_curves.median_curve([])


# --- Words -------------------------------------------------------------------


def test_summary_states_the_rule_in_numbers(arms):
  said = report_text.summary(arms)
  assert 'baseline is 5.1000 nats per token, at step 100.' in said
  # 6.1 - s / 100 - 0.305 + 0.01 <= 5.1 from step 71 on; evaluated every 10.
  assert 'at or under that for the first time at step 80 (1.25 times' in said
  assert 'has 4.4000; a single group 4.6000 on average' in said
  assert 'different token in 20.0% of cases' in said
  assert 'no interval over seeds' in said


def test_summary_says_when_the_baseline_is_not_reached(one, tmp_path):
  worse = make_run(tmp_path, 'codistillation', 2, offset=-1.0)
  said = report_text.summary(report_data.load_arms([str(worse), one]))
  assert 'does not reach that in 100 steps; its best is 6.1100' in said


def test_oddities_of_the_records_are_told(tmp_path):
  make_run(tmp_path, 'baseline', 1)
  path = run_directory.metrics_path(tmp_path, 0)
  with path.open('ab') as f:
    f.write(b'damaged\n{"step": 102, "loss/task": "NaN"}\n')
  notes = '\n'.join(report_text.notes(report_data.load_arms([str(tmp_path)])))
  assert 'baseline, group 0: 1 damaged line(s)' in notes
  assert (
      'loss/task is not finite in 1 record(s), the first at step 102' in notes
  )


def test_commands_carry_no_path_of_this_machine(arms, monkeypatch, tmp_path):
  outside = report_text.commands(arms)
  assert not any(os.sep + 'two' in c or 'tmp' in c for c in outside)
  monkeypatch.chdir(arms[0].workdir.parent)
  train, _, again = report_text.commands(arms, 'out')
  name = arms[0].workdir.name
  assert train == f'python -m experiments.train_local --workdir {name}'
  assert again.startswith(
      f'python -m experiments.report --workdir=codistillation={name} '
  )
  assert again.endswith('--output=out')


def test_settings_leave_out_what_is_for_programs(arms):
  settings = {row[0]: row[1:] for row in report_table.settings_rows(arms)}
  assert settings['groups (G)'] == ['2', '1']
  assert settings['last record (UTC)'] == ['2023-11-14 22:13'] * 2
  assert not {'configuration', 'seed', 'command'} & set(settings)


# --- Loading -----------------------------------------------------------------


def test_arms_are_named_by_label_run_or_directory(one, tmp_path):
  other = make_run(tmp_path / 'seed1', 'baseline', 1)
  arms = report_data.load_arms([f'mine={one}', one, str(other)])
  directory = os.path.basename(one)
  assert [arm.name for arm in arms] == [
      'mine',
      f'baseline ({directory})',
      'baseline (seed1)',
  ]


@pytest.mark.parametrize('workdirs', [['a={one}', 'a={one}'], ['{one}'] * 2])
def test_two_arms_of_one_name_are_refused(one, workdirs):
  with pytest.raises(ValueError, match=r'Two arms are called .*; name them'):
    report_data.load_arms([w.format(one=one) for w in workdirs])


def test_nothing_recorded_is_a_clear_error(tmp_path):
  with pytest.raises(ValueError, match='has recorded no metrics'):
    report_data.load_arms([str(tmp_path)])
  with pytest.raises(FileNotFoundError, match='No run directory at'):
    report_data.load_arms([str(tmp_path / 'absent')])
  with pytest.raises(ValueError, match='pass --workdir'):
    report_data.load_arms([])


# --- Plots and pages ---------------------------------------------------------


def test_plots_are_those_there_are_records_for(arms):
  plots = report_plots.make_plots(arms)
  assert [p.name for p in plots] == [
      'validation_loss',
      'training_loss',
      'staleness',
      'exchange',
      'speed',
  ]
  assert all(p.png.startswith(b'\x89PNG') for p in plots)
  # A single group exchanges nothing.
  plots = report_plots.make_plots(arms[1:])
  assert [p.name for p in plots] == [
      'validation_loss',
      'training_loss',
      'speed',
  ]


@pytest.mark.parametrize('num_groups', [2, 4, 16])
@pytest.mark.parametrize('steps', [5, 100, 1000])
def test_exchange_plots_of_few_and_many_groups_and_records(
    tmp_path, num_groups, steps
):
  arms = make_exchange(tmp_path, num_groups, steps=steps)
  names = [p.name for p in report_exchange_plots.make_plots(arms)]
  expected = []
  if steps > 20:
    expected.append('staleness')
    # With one peer it would say the same again.
    expected += ['staleness_by_peer'] * (num_groups > 2)
  assert names == [*expected, 'exchange']


def test_each_arm_has_its_own_plot_of_peers(tmp_path):
  (four,) = make_exchange(tmp_path / 'a', 4)
  (many,) = make_exchange(tmp_path / 'b', 6)
  plots = report_exchange_plots.make_plots([four, many._replace(name='many')])
  names = [p.name for p in plots if p.name.startswith('staleness_by_peer')]
  assert names == ['staleness_by_peer', 'staleness_by_peer_2']
  said = {p.name: p.caption for p in plots}
  # Four peers have a colour each, six have not.
  assert 'stalest' not in said['staleness_by_peer']
  assert 'stalest' in said['staleness_by_peer_2']


def test_no_rejection_is_said_and_not_drawn(tmp_path):
  (none,) = make_exchange(tmp_path / 'a', 2, steps=50)
  (some,) = make_exchange(tmp_path / 'b', 2, steps=100)
  said = [
      report_exchange_plots.make_plots([arm])[-1].caption
      for arm in (none, some)
  ]
  assert [('No publication was rejected' in s) for s in said] == [True, False]
  assert [('Rejected:' in s) for s in said] == [False, True]


def test_many_groups_have_a_median_and_few_have_not(tmp_path):
  for num_groups in (4, 5):
    (arm,) = make_exchange(tmp_path / str(num_groups), num_groups)
    plots = report_plots.make_plots([arm])
    said = ' '.join(p.caption for p in plots)
    assert ('the thick line their median' in said) == (num_groups == 5)
    assert report_style.is_crowded(arm) == (num_groups == 5)


def test_plots_need_no_display(python):
  code = (
      'import sys, experiments.report;'
      'print([m for m in ("matplotlib.pyplot", "tkinter") if m in sys.modules])'
  )
  done = subprocess.run(
      [python, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_an_arm_keeps_its_colour_whatever_stands_beside_it(arms):
  assert report_style.arm_colours(arms)['baseline'] == (
      report_style.arm_colours(arms[1:])['baseline']
  )
  many = [arms[0]._replace(name=f'arm {i}') for i in range(4)]
  colours = report_style.arm_colours([*arms, *many])
  assert len(set(colours.values())) == len(colours)


class _Page(html.parser.HTMLParser):
  """Collects tags and checks that they are balanced."""

  def __init__(self, text: str):
    super().__init__()
    self.found, self._open, self.text = [], [], ''
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in ('meta', 'img'):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_report_is_complete_and_html_needs_no_other_file(arms, tmp_path):
  page = report.make_report(arms, tmp_path / 'out')
  assert page == (tmp_path / 'out' / 'report.html')
  parsed = _Page(page.read_text())
  images = [a['src'] for tag, a in parsed.found if tag == 'img']
  assert len(images) == 5
  assert all(src.startswith('data:image/png;base64,') for src in images)
  assert not re.search(r'(src|href)="(?!data:)|url\(|@import', page.read_text())
  assert 'Lstm.units = 8  # <b>|`' in parsed.text
  markdown = (tmp_path / 'out' / 'report.md').read_text()
  links = re.findall(r'!\[[^]]*\]\(([^)]*)\)', markdown)
  files = {f for f in os.listdir(tmp_path / 'out') if f.endswith('.png')}
  assert set(links) == files and len(files) == 5
  assert report_text.summary(arms) in markdown


def test_a_report_tells_of_the_health_of_the_exchange(arms, tmp_path):
  healthy = make_exchange(tmp_path, 4)
  parsed = _Page(report.make_report(healthy).read_text())
  assert 'Exchange health' in parsed.text and '1.23 MB' in parsed.text
  alone = report.make_report(arms[1:], tmp_path / 'out')
  assert 'Exchange health' not in alone.read_text()


def test_markdown_escapes_what_would_break_a_table_or_a_fence():
  blocks = [
      report_pages.Table(['a|b'], [['x_y | <z>']], names=1),
      report_pages.Code('```\n', 'config'),
  ]
  text = report_pages.to_markdown('t', blocks)
  assert '| a\\|b |' in text and '| x\\_y \\| \\<z> |' in text
  assert '````\n```\n````' in text


@pytest.mark.parametrize(
    'record',
    [
        {'loss/task': 1.0},
        {'eval/loss': 1.0},
        {'loss/task': math.nan, 'eval/loss': math.inf},
        {'perf/steps_per_sec': math.nan},
        {'exchange/staleness_steps': 3.0, 'exchange/stall_ms': math.nan},
        {'exchange/staleness_steps_group_1': 3.0, 'exchange/rejected': 1.0},
        {
            'exchange/staleness_steps_group_2': -3.0,
            'exchange/staleness_steps_group_3': math.nan,
            'exchange/staleness_steps_group_4': 0.0,
            'exchange/publication_bytes': math.inf,
            'exchange/peers_present': math.nan,
        },
        {},
    ],
)
@pytest.mark.parametrize('step', [0, 7])
def test_one_lonely_record_makes_a_report(tmp_path, record, step):
  for group_id in (0, 1):
    path = run_directory.metrics_path(tmp_path, group_id)
    writer = writers.JsonlWriter(path)
    writer.write(step, record)
    writer.close()
  arms = report_data.load_arms([str(tmp_path)])
  assert report.make_report(arms).exists()
  report_table.print_table(arms, file=io.StringIO())


# --- The binary --------------------------------------------------------------


def _run(python, *args: str) -> subprocess.CompletedProcess:
  command = [python, '-W', 'error', '-m', 'experiments.report', *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_binary_prints_the_table_and_the_path(two, one, python):
  done = _run(python, f'--workdir=two={two}', f'--workdir={one}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'ensemble' in done.stdout
  assert done.stdout.endswith(f'report: {two}/report/report.html\n')


def test_bad_input_is_one_line_and_status_1(tmp_path, python):
  done = _run(python, f'--workdir={tmp_path}')
  assert (done.returncode, done.stdout) == (1, '')
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and 'has recorded no metrics' in line
