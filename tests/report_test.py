"""Tests of experiments/report: what the numbers, plots and pages say."""

import html.parser
import math
import os
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

from codistill_jax import run_directory, writers
from codistill_jax.storage import files
from experiments import cli
from experiments.reports import (
    pages,
    plots,
    run_plots,
    run_records,
    run_report,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REJECTED, FAILURES = run_records.REJECTED, run_records.FAILURES


def write_records(workdir, group_id: int, steps_and_metrics) -> None:
  """Writes records as they are, as several processes in turn may."""
  path = run_directory.metrics_path(workdir, group_id)
  writer = writers.JsonlWriter(path, clock=lambda: 1_700_000_000.0)
  for step, metrics in steps_and_metrics:
    writer.write(step, metrics)
  writer.close()


def make_run(
    workdir,
    num_groups: int,
    arm='codistillation',
    *,
    offset=0.0,
    steps=100,
    drop=(),
):
  """A small run: a record every 5 steps, an evaluation every 10.

  Validation losses are 6 at step 10, then 0.1 less every 10 steps. Peer p is
  10 p steps stale; keys that start with one of `drop` are not recorded.
  """
  run = {
      'arm': arm,
      'num_groups': num_groups,
      'group_batch': 64,
      'burn_in_steps': 20,
      'exchange_every': 10,
      'example': 'token',
      'command': f'python -m experiments.train_local --workdir {workdir}',
      'configuration': ['not', 'a', 'setting'],
  }
  run_directory.write_run(workdir, run)
  run_directory.config_path(workdir).write_text('Lstm.units = 8  # <b>|`\n')
  for group_id in range(num_groups):
    made = []
    for step in range(5, steps + 1, 5):
      metrics = metrics_at(step, group_id, num_groups)
      kept = {k: v for k, v in metrics.items() if not k.startswith(drop)}
      made.append((step, kept))
      if step % 10 == 0:
        loss = 6.1 - step / 100 - offset + 0.02 * group_id
        made.append((step, {'eval/loss': loss, 'eval/accuracy': 0.25}))
        made[-1][1]['eval/examples'] = 12345.0
    write_records(workdir, group_id, made)
  return str(workdir)


def metrics_at(step: int, group_id: int, num_groups: int) -> dict[str, float]:
  """What a group records; also of an exchange that it does not have."""
  peers = [p for p in range(num_groups) if p != group_id]
  # The last group is away for a while.
  present = [p for p in peers if p < num_groups - 1 or not 40 < step < 70]
  present = present if step > 20 else []
  metrics = {
      'loss/task': 6.0 - step / 100,
      'loss/distill': 6.0 - step / 100 if step > 20 else 0.0,
      'distill/weight': float(num_groups > 1 and step > 20),
      'perf/steps_per_sec': 4.0,
      'exchange/stall_ms': 2.0,
      'exchange/peers_present': float(len(present)),
      REJECTED: float(step > 50) * group_id,
      FAILURES: 0.0,
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
  return metrics


def load_run(*args, **kwargs) -> list[run_records.RunRecords]:
  return run_records.load_arms([make_run(*args, **kwargs)])


def write_comparison(workdir) -> None:
  """A final evaluation, without accuracy; of which arm, its names say."""
  pairs = [
      {'churn/mean_abs': 0.01, 'churn/disagreement': 0.3},
      {'churn/mean_abs': 0.03, 'churn/disagreement': 0.1},
  ]
  ensemble = {'eval/loss': 4.4, 'eval/perplexity': 81.45}
  files.write_json(
      run_directory.comparison_path(workdir),
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
  make_run(workdir, 2, offset=0.305)
  write_comparison(workdir)
  return str(workdir)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one')
  write_comparison(workdir)
  return make_run(workdir, 1, 'baseline')


@pytest.fixture(scope='module')
def arms(two, one):
  return run_records.load_arms([two, one])


def lines_of(frame: pd.DataFrame) -> list[str]:
  return ['|'.join(row) for row in frame.to_numpy()]


def curve_of(steps_and_values) -> pd.Series:
  return pd.Series(dict(steps_and_values), dtype=float)


# --- Numbers -----------------------------------------------------------------


def test_results_have_a_row_per_group_and_one_of_the_ensemble(arms):
  assert lines_of(run_report.results(arms)) == [
      # Stall: 20 records of 2 ms, 10 exchanges, 100 steps at 4 per second.
      'codistillation|group 0|100|4.5000|90.02|-|10.0 / 10|4.0 (0.2%)|-|-',
      'codistillation|group 1|100|4.7000|109.95|-|0.0 / 0|4.0 (0.2%)|-|-',
      'codistillation|ensemble|-|4.4000|81.45|-|-|-|20.00%|0.02',
      'baseline|group 0|100|5.2500|190.57|-|-|-|-|-',
  ]


def test_without_a_final_evaluation_the_last_in_training_holds(tmp_path):
  (row,) = lines_of(run_report.results(load_run(tmp_path, 1, 'baseline')))
  assert row == 'baseline|group 0|100|5.1000|164.02|25.00%|12,345|-|-|-|-'


def test_terminal_table_is_narrow_and_aligned(arms, tmp_path):
  more = [*arms, *load_run(tmp_path, 1, 'an arm with a very long name indeed')]
  lines = run_report.results_text(more).splitlines()
  assert max(map(len, lines)) <= 110
  width = max(map(len, lines))
  blank = [
      at
      for at in range(width - 1)
      if not any(line[at : at + 2].strip() for line in lines)
  ]
  # Two blank columns between each two of the eleven columns of cells.
  assert len([at for at in blank if at - 1 not in blank]) == 10


def test_training_time_counts_the_steps_before_the_first_record(arms):
  for arm in arms:
    for group in arm.groups:
      assert run_records.training_seconds(group) == 100 / 4.0


def test_the_later_record_of_a_step_holds_and_nan_is_a_value():
  group = run_records.GroupRecords(
      0,
      [
          {'step': 1, 'a': 1.0},
          {'step': 3, 'a': 3.0, 'b': math.nan},
          {'step': 2, 'a': 2},
          {'step': 3, 'a': 30.0},
      ],
  )
  assert group.curve('a').to_dict() == {1: 1.0, 2: 2.0, 3: 30.0}
  assert group.curve('b').isna().to_dict() == {3: True}
  assert group.curve('c').empty and group.curve('d').empty
  assert group.last_step == 3


def test_mean_curve_is_over_the_steps_that_all_groups_have():
  a = curve_of({1: 1, 2: 2, 3: 3})
  b = curve_of({2: 4, 3: 5, 4: 6})
  mean = run_records.mean_curve([a, run_records.EMPTY, b])
  assert mean.to_dict() == {2: 3.0, 3: 4.0}
  # A group that diverged is not passed over.
  assert run_records.mean_curve([a, b.where(b != 5)]).isna().tolist() == [
      False,
      True,
  ]
  assert run_records.mean_curve([run_records.EMPTY]).empty


def test_target_rule_is_the_first_evaluation_at_or_under():
  curve = curve_of({1: math.nan, 2: 3, 3: 2, 4: 1, 5: 2})
  assert run_records.best(curve) == (4, 1.0)
  assert run_records.best(curve[:1]) is None
  assert run_records.first_at_or_under(curve, 2.0) == 3
  assert run_records.first_at_or_under(curve, 0.5) is None


def test_running_mean_is_centred_and_passes_over_what_is_not_finite():
  # Of 80 records: over three of them.
  curve = curve_of(enumerate([1, 2, math.nan, 4, 6, math.inf, 8, *[8] * 73]))
  smooth = plots.smooth(curve)
  np.testing.assert_allclose(smooth[:8], [1.5, 1.5, 3, 5, 5, 7, 8, 8])
  assert plots.window_in_steps(curve) == 3


def test_bins_hold_mean_and_range_and_gaps_stay_gaps():
  mean = curve_of(zip([0, 1, 2, 3, 8, 9, 10, 11], [1, 3, 2, 2, 5, 7, 6, 6]))
  found = plots.binned(mean, mean + 10, 3)
  np.testing.assert_allclose(found.index, [2, 6, 10])
  np.testing.assert_allclose(found['mean'], [2, np.nan, 6])
  np.testing.assert_allclose(found['low'], [1, np.nan, 5])
  np.testing.assert_allclose(found['high'], [13, np.nan, 17])
  drawn = plots.with_gaps(mean)
  assert drawn.isna().tolist() == [False] * 4 + [True] + [False] * 4


def test_distillation_loss_is_drawn_where_it_has_weight(arms):
  curve = run_records.distill_curve(arms[0].groups[0])
  assert curve.index.tolist() == list(range(25, 101, 5))


def test_median_of_groups_holds_values_and_ends_with_each():
  a = curve_of({0: 1, 10: 3})
  b = curve_of({5: 5, 12: 5, 15: math.nan})
  c = curve_of({10: 17, 20: 9})
  median = plots.median_curve([a, b, c])
  # At 10 there are 3, 5 and 17.
  assert median.to_dict() == {0: 1, 5: 3, 10: 5, 12: 11, 20: 9}
  assert plots.median_curve([]).empty


@pytest.mark.parametrize(
    'value, form, text',
    [
        (None, '.3f', '-'),
        (math.nan, '.3f', 'nan'),
        (math.inf, '.2%', 'inf'),
        (0.25, '.1%', '25.0%'),
        (0, 'bytes', '0 bytes'),
        (999, 'bytes', '999 bytes'),
        (1000, 'bytes', '1 kB'),
        (999_499, 'bytes', '999 kB'),
        (999_500, 'bytes', '1 MB'),
        (402_653_184, 'bytes', '403 MB'),
        (2.5e12, 'bytes', '2.5 TB'),
        (12.0, 'SI', '12'),
        (999.6e6, 'SI', '1 G'),
        (1.25e12, 'SI', '1.25 T'),
        (3e19, 'SI', '30 E'),
        (4, 'time', '4 s'),
        (99, 'time', '99 s'),
        (100, 'time', '2 min'),
        (9000, 'time', '2.5 h'),
        (-3, 'time', '-3 s'),
        (math.nan, 'time', '?'),
    ],
)
def test_numbers_are_short_and_have_units(value, form, text):
  assert pages.number(value, form) == text


# --- Exchange ----------------------------------------------------------------


def group_of(*steps_and_metrics) -> run_records.GroupRecords:
  made = [{'step': step} | metrics for step, metrics in steps_and_metrics]
  return run_records.GroupRecords(0, made)


def test_health_has_a_row_per_group_with_dashes_for_an_old_run(tmp_path):
  # 16 records after burn-in, 5 of them without group 3; its teachers are 10,
  # 20 and 30 steps old. 20 records of 2 ms, 100 steps at 4 per second.
  ages = ['18.4 / 30|4.6 / 7.5|2.7 / 3', '14.6 / 30|3.6 / 7.5|2.7 / 3']
  ages += ['10.7 / 30|2.7 / 7.5|2.7 / 3', '10.0 / 20|2.5 / 5.0|3.0 / 3']
  assert lines_of(run_report.health(load_run(tmp_path / 'four', 4))) == [
      f'codistillation|group {g}|10|{age}|{g}|0|0.04 (0.2%)|1.23 MB|-'
      for g, age in enumerate(ages)
  ]
  later = (REJECTED, FAILURES, 'exchange/publication', 'exchange/staleness_')
  old = load_run(tmp_path / 'old', 2, drop=later)
  assert lines_of(run_report.health(old)) == [
      'codistillation|group 0|10|-|-|0.7 / 1|-|-|0.04 (0.2%)|-|-',
      'codistillation|group 1|10|-|-|1.0 / 1|-|-|0.04 (0.2%)|-|-',
  ]


def test_a_group_that_is_alone_by_design_exchanges_nothing(tmp_path):
  # It records zeros, which would say too much.
  arms = load_run(tmp_path, 1)
  assert run_report.health(arms) is None
  assert list(captions_of(arms)) == [
      'validation_loss',
      'training_loss',
      'speed',
  ]


@pytest.mark.parametrize(
    'made, restarts, rejected, failed',
    [
        # A process counts 3, the next 2, the last none.
        (
            [(1, 0, 0), (2, 3, 0), (3, 3, 0), (4, 1, 0), (5, 2, 0), (6, 0, 0)],
            2,
            {1: 0, 2: 3, 3: 3, 4: 4, 5: 5, 6: 5},
            0,
        ),
        # The second process rejects as many as the first: no count falls. What
        # the first counted stays counted, in steps that were done again too.
        (
            [(10, 0, 0), (20, 2, 0), (30, 2, 0), (15, 2, 0), (25, 4, 0)],
            1,
            {10: 0, 15: 4, 25: 6},
            0,
        ),
        # Step and count go back; it was evaluated before its first update.
        (
            [(10, 1, 0), (20, 5, 0), (10,), (12, 0, 0), (12,), (14, 1, 0)],
            1,
            {10: 1, 12: 5, 14: 6},
            0,
        ),
        # Any count that falls shows a restart.
        ([(10, 0, 4), (20, 3, 0)], 1, {10: 0, 20: 3}, 4),
        ([(10,)], 0, {}, None),
    ],
)
def test_counts_are_added_up_over_restarts(made, restarts, rejected, failed):
  group = group_of(
      *((step, dict(zip((REJECTED, FAILURES), n))) for step, *n in made)
  )
  assert group.restarts == restarts
  assert run_records.counted(group, REJECTED).to_dict() == rejected
  failures = run_records.counted(group, FAILURES)
  assert (failures.iloc[-1] if len(failures) else None) == failed


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_no_count_is_passed_over(value):
  group = group_of((1, {REJECTED: 2.0}), (2, {REJECTED: value}), (3, {}))
  assert run_records.counted(group, REJECTED).to_dict() == {1: 2}


def test_staleness_counts_the_oldest_single_teacher():
  key = 'exchange/staleness_seconds'
  group = group_of(
      (1, {key: 2.0, f'{key}_group_1': 1.0, f'{key}_group_12': 3.0}),
      (2, {key: 4.0, f'{key}_group_1': 4.0}),
      (3, {f'{key}_group_1': math.nan}),
  )
  assert run_report.staleness(group, 'seconds', '.1f') == '3.0 / 4.0'
  assert list(run_records.by_peer(group, 'seconds')) == [1, 12]
  assert run_report.staleness(group, 'steps', '.0f') == '-'


# --- Speed -------------------------------------------------------------------


def speed_record(steps_per_sec, flops, **more):
  return {
      'perf/steps_per_sec': steps_per_sec,
      'perf/examples_per_sec': 64 * steps_per_sec,
      'perf/model_flops_per_step': flops,
      'perf/model_flops_per_sec': flops * steps_per_sec,
      **more,
  }


# Ten steps of burn-in in 2.5 seconds, then ten with a teacher in 10.
SPEED = [
    (10, speed_record(4.0, 3e9)),
    (
        20,
        speed_record(
            1.0, 4e9, **{'perf/teacher_share': 0.25, 'perf/utilisation': 0.415}
        ),
    ),
]


def arms_of(workdir, steps_and_metrics, arm='codistillation'):
  run_directory.write_run(workdir, {'arm': arm, 'num_groups': 1})
  write_records(workdir, 0, steps_and_metrics)
  return run_records.load_arms([str(workdir)])


def test_rates_are_means_over_time_and_the_rest_is_the_latest(tmp_path):
  arms = arms_of(tmp_path, SPEED)
  # 20 steps, 1,280 examples and 70 GFLOP in 12.5 seconds.
  row = 'codistillation|group 0|1.6|102|4 G|5.6 G|25.0%|41.5%'
  assert lines_of(run_report.speed(arms)) == [row]
  page = pages.to_markdown('', run_report.blocks(arms))
  assert 'teacher share' in page and '5.6 G' in page


def test_a_run_of_before_has_dashes_beside_another_and_alone_no_table(tmp_path):
  old = arms_of(tmp_path / 'old', [(10, {'perf/steps_per_sec': 4.0})], 'old')
  assert run_report.speed(old) is None
  new = arms_of(tmp_path / 'new', SPEED)
  rows = lines_of(run_report.speed([*new, *old]))
  assert rows[1] == 'old|group 0|4|-|-|-|-|-'


def test_records_without_a_speed_do_not_count(tmp_path):
  # Such as the one after the first step, which is all compilation.
  made = [(5, {'perf/steps_per_sec': math.nan}), *SPEED, (21, {})]
  (arm,) = arms_of(tmp_path, made)
  rate = run_records.mean_rate(arm.groups[0], 'perf/examples_per_sec')
  # Of five steps at 4 per second and of ten at one.
  assert rate == pytest.approx(15 * 64 / 11.25)


# --- Words -------------------------------------------------------------------


def test_summary_states_the_rule_in_numbers(arms):
  headline, steps, between, caveat = run_report.summary(arms)
  assert headline == (
      'After 100 steps codistillation (mean of its 2 groups) has a validation'
      ' loss of 4.6000 nats per token: 0.6500 lower than baseline (5.2500), by'
      ' 12.4%.'
  )
  # 6.1 - s / 100 - 0.305 + 0.01 is 5.1 at 70.5; evaluated every 10.
  assert steps == (
      'Codistillation comes to the best loss of baseline (5.1000, at step 100)'
      ' at about step 70 (on a line between its evaluations at 70 and 80): 30%'
      ' fewer steps.'
  )
  assert 'has 4.4000; a single group 4.6000 on average' in between
  assert 'different token in 20.0% of cases' in between
  assert 'differ by 0.02 in the mean (churn)' in between
  assert 'no interval over seeds' in caveat and '2 times' not in caveat


def test_summary_says_when_the_baseline_is_not_reached(one, tmp_path):
  worse = make_run(tmp_path, 2, offset=-1.0)
  headline, steps, _ = run_report.summary(run_records.load_arms([worse, one]))
  assert 'of 6.1100 nats per token: 0.8600 higher than baseline' in headline
  assert 'does not come to the best loss of baseline' in steps
  assert 'in 100 steps; its own best is 6.1100, at step 100.' in steps


def test_a_loss_is_reached_on_the_line_between_two_evaluations():
  curve = curve_of({10: math.inf, 20: 4.0, 40: 2.0, 60: 3.0, 80: 1.0})
  assert run_report.reached(curve, 2.5) == (35.0, 20, 40)
  assert run_report.reached(curve, 2.0) == (40.0, 20, 40)
  assert run_report.reached(curve, 4.0) == (20, None, 20)
  assert run_report.reached(curve, 0.5) is None


def test_oddities_of_the_records_are_told(tmp_path):
  make_run(tmp_path, 1, 'baseline')
  with run_directory.metrics_path(tmp_path, 0).open('ab') as f:
    f.write(b'damaged\n{"step": 102, "loss/task": "NaN"}\n')
  notes = '\n'.join(run_report.notes(run_records.load_arms([str(tmp_path)])))
  assert 'baseline, group 0: 1 damaged line(s)' in notes
  said = 'loss/task is not finite in 1 record(s), the first at step 102'
  assert said in notes


def test_commands_carry_no_path_of_this_machine(arms, monkeypatch):
  outside = run_report.commands(arms)
  assert not any(os.sep + 'two' in c or 'tmp' in c for c in outside)
  monkeypatch.chdir(arms[0].workdir.parent)
  train, _, again = run_report.commands(arms, 'out')
  name = arms[0].workdir.name
  assert train == f'python -m experiments.train_local --workdir {name}'
  assert again.startswith(
      f'python -m experiments.report --workdir=codistillation={name} '
  )
  assert again.endswith('--output=out')


def test_settings_leave_out_what_is_for_programs(arms):
  settings = {row[0]: row[1:] for row in run_report.settings(arms).to_numpy()}
  assert settings['groups (G)'].tolist() == ['2', '1']
  assert settings['last record (UTC)'].tolist() == ['2023-11-14 22:13'] * 2
  assert not {'configuration', 'seed', 'command'} & set(settings)


# --- Loading -----------------------------------------------------------------


def test_arms_are_named_by_label_run_or_directory(one, tmp_path):
  other = make_run(tmp_path / 'seed1', 1, 'baseline')
  arms = run_records.load_arms([f'mine={one}', one, other])
  directory = os.path.basename(one)
  names = ['mine', f'baseline ({directory})', 'baseline (seed1)']
  assert [arm.name for arm in arms] == names


@pytest.mark.parametrize('workdirs', [['a={one}', 'a={one}'], ['{one}'] * 2])
def test_two_arms_of_one_name_are_refused(one, workdirs):
  with pytest.raises(ValueError, match=r'Two arms are called .*; name them'):
    run_records.load_arms([w.format(one=one) for w in workdirs])


def test_nothing_recorded_is_a_clear_error(tmp_path):
  with pytest.raises(ValueError, match='has recorded no metrics'):
    run_records.load_arms([str(tmp_path)])
  with pytest.raises(FileNotFoundError, match='No run directory at'):
    run_records.load_arms([str(tmp_path / 'absent')])
  with pytest.raises(ValueError, match='pass --workdir'):
    run_records.load_arms([])


# --- Plots and pages ---------------------------------------------------------


@pytest.mark.parametrize(
    'num_groups, steps', [(2, 5), (2, 1000), (4, 100), (6, 1000)]
)
def test_exchange_plots_of_few_and_many_groups_and_records(
    tmp_path, num_groups, steps
):
  arms = load_run(tmp_path, num_groups, steps=steps, drop=('loss', 'distill'))
  expected = ['validation_loss', 'staleness'] if steps > 20 else []
  # With one peer it would say the same again.
  expected += ['staleness_by_peer'] * (num_groups > 2 and steps > 20)
  names = [plot.name for plot in run_plots.make_plots(arms)]
  assert names == [*expected, 'exchange', 'speed']


def captions_of(arms) -> dict[str, str]:
  """By the name of the plot, which is not drawn: that takes most of it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('matplotlib.figure.Figure.savefig', lambda *_, **__: None)
    return {p.name: p.caption for p in run_plots.make_plots(arms)}


def test_each_arm_has_its_own_plot_of_peers(tmp_path):
  (four,) = load_run(tmp_path / 'a', 4)
  (many,) = load_run(tmp_path / 'b', 6, 'many')
  said = captions_of([four, many])
  # Four peers have a colour each, six have not.
  assert 'stalest' not in said['staleness_by_peer']
  assert 'stalest' in said['staleness_by_peer_2']
  # So have four groups; of more there is a median.
  assert 'the thick line their median' in said['staleness']
  four_alone = ' '.join(captions_of([four]).values())
  assert 'the thick line their median' not in four_alone


def test_no_rejection_is_said_and_not_drawn(tmp_path):
  none = captions_of(load_run(tmp_path / 'a', 2, steps=50))['exchange']
  some = captions_of(load_run(tmp_path / 'b', 2))['exchange']
  assert 'No publication was rejected' in none and 'Rejected:' not in none
  assert 'No publication was rejected' not in some and 'Rejected:' in some


def test_what_is_constant_is_said_and_not_drawn(tmp_path):
  constant = captions_of(load_run(tmp_path / 'a', 2, steps=40))['exchange']
  assert 'Every publication has 1.23 MB.' in constant
  assert 'taught by 1 of its peers from step 25 on.' in constant
  assert 'Size:' not in constant and 'Peers present:' not in constant
  # The last group is away for a while.
  away = captions_of(load_run(tmp_path / 'b', 2))['exchange']
  assert 'Peers present:' in away and 'taught by' not in away


def test_ticks_are_at_round_steps():
  for last in (40, 160, 320, 800, 4088, 1_000_000):
    axes = plots.figure_of(4)[1]
    axes[0].set_xlim(-0.015 * last, 1.015 * last)
    apart = np.diff(axes[0].get_xticks())
    assert len(apart) >= 3 and len(set(apart)) == 1
    assert f'{apart[0]:.0f}'.rstrip('0') in ('1', '2', '25', '5')


def test_what_models_wrote_is_shown_as_it_is(tmp_path):
  workdir = make_run(tmp_path, 2)
  how = {'temperature': 0.7, 'top_k': None, 'seed': 3, 'group': 1, 'step': 100}
  texts = [f'{STRANGE}\nverse {i} ' + 'and ' * 50 for i in range(5)]
  samples = [{'text': text, **how} for text in texts]
  samples[1:1] = [7, {'text': 3}, {}]
  files.write_json(run_directory.samples_path(workdir), {'samples': samples})
  (arm,) = run_records.load_arms([workdir])
  heading, about, *shown = run_report.samples([arm])
  assert heading.text == 'What the models write'
  assert 'at temperature 0.7 (seed 3).' in about.text
  assert len(shown) == 6
  assert shown[0].text == 'codistillation, group 1, step 100:'
  assert STRANGE.strip() in shown[1].text and 'verse 2' in shown[5].text
  assert max(map(len, shown[1].text.splitlines())) <= 88
  parsed = _Page(run_report.write([arm]).read_text())
  assert STRANGE.strip() in parsed.text and 'i' not in dict(parsed.found)


def test_an_arm_keeps_its_colour_whatever_stands_beside_it():
  names = ['codistillation', 'baseline', 'a', 'b', 'c', 'd', 'ensemble']
  colours = plots.arm_colours(names[:-1])
  assert colours['baseline'] == plots.arm_colours(['baseline'])['baseline']
  assert len(set(colours.values())) == len(names) - 1
  assert plots.arm_colours(names[-2::-1]) == colours
  assert len(set(plots.arm_colours(['x', *names[:4]]).values())) == 5


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
  page = run_report.write(arms, tmp_path / 'out')
  assert page == (tmp_path / 'out' / 'report.html')
  parsed = _Page(page.read_text())
  images = [a['src'] for tag, a in parsed.found if tag == 'img']
  made = ['validation_loss', 'training_loss', 'staleness', 'exchange', 'speed']
  made = [*(f'{name}.png' for name in made), 'method.svg']
  assert all(src.startswith('data:image/') for src in images)
  assert not re.search(r'(src|href)="(?!data:)|url\(|@import', page.read_text())
  assert 'Lstm.units = 8  # <b>|`' in parsed.text
  markdown = (tmp_path / 'out' / 'report.md').read_text()
  links = re.findall(r'!\[[^]]*\]\(([^)]*)\)', markdown)
  assert links == made and len(images) == 6
  files_beside = {f for f in os.listdir(tmp_path / 'out') if 'report' not in f}
  assert files_beside == {*links}
  assert all(text in markdown for text in run_report.summary(arms))
  assert 'Exchange health' in markdown
  # A single group exchanges nothing.
  alone = run_report.blocks(arms[1:])
  assert 'Exchange health' not in pages.to_markdown('', alone)
  plots_alone = [b.name for b in alone if isinstance(b, pages.Plot)]
  assert plots_alone == ['validation_loss', 'training_loss', 'speed']


# What others may write: markup of every kind, and what a terminal acts on.
HOSTILE = (
    '\x1b]0;owned\x07',
    '\x1b[2J\x9b31m',
    '\u202etxt.exe',
    'a\x00b\rc',
    'half \udcff',
    '$\\frac{1$',
    '_hidden',
    '<script>alert(1)</script>&lt;b&gt;',
    '# no heading',
    '> no quotation',
    '1. no list',
    '](javascript:alert(1)) ![x](y)',
    '`code` *a* |b| ~~~',
)


@pytest.mark.parametrize(
    'names', [HOSTILE[:7], HOSTILE[7:]], ids=['terminal', 'markup']
)
def test_the_name_of_an_arm_is_only_a_text(tmp_path, names):
  runs = [make_run(tmp_path / str(n), 2, x) for n, x in enumerate(names)]
  arms = run_records.load_arms(runs)
  page = run_report.write(arms)
  parsed = _Page(page.read_text())
  for arm in arms:
    assert cli.printable(arm.name) == arm.name
    assert arm.name in parsed.text
  assert not {'script', 'b'} & {tag for tag, _ in parsed.found}
  markdown = (page.parent / 'report.md').read_text()
  for text in (page.read_text(), markdown, run_report.results_text(arms)):
    assert cli.printable(text) == text
  title, *lines = markdown.splitlines()
  assert title.startswith('# Run report: ') and not re.search(
      r'(?<!\\)<', title
  )
  # No line of it begins as markup but those of the page's own.
  headings = [line[3:] for line in lines if line.startswith('## ')]
  assert set(headings) <= {
      *('Results', 'Validation loss', 'Training losses', 'Staleness'),
      *('Exchange', 'Speed', 'Exchange health', 'Settings'),
      *('How to make it again', 'What the models write', 'The method'),
  }


STRANGE = '<i>&"\'$x_y$|`*\n'
ALL_BLOCKS = [
    pages.Heading(STRANGE),
    pages.Paragraph(STRANGE),
    pages.Bullets([STRANGE]),
    pages.Table(pd.DataFrame([[STRANGE] * 2], columns=[STRANGE, 'b']), names=2),
    pages.Code(STRANGE, STRANGE),
    pages.Code(STRANGE),
    pages.Plot('name', STRANGE, STRANGE, b'\x89PNG' + bytes(20)),
]


def test_html_shows_every_text_as_it_is():
  parsed = _Page(pages.to_html(STRANGE, ALL_BLOCKS))
  # Twice the title; heading, paragraph, item, three cells, both codes and the
  # title of one, the caption.
  assert parsed.text.count(STRANGE) == 12
  assert {tag for tag, _ in parsed.found}.isdisjoint({'i', 'x_y'})
  (alt,) = [a['alt'] for tag, a in parsed.found if tag == 'img']
  assert alt == STRANGE


def test_markdown_escapes_what_would_break_a_table_or_a_fence():
  table = pd.DataFrame([['x_y | <z>', '1']], columns=['a|b', 'n'])
  blocks = [pages.Table(table), pages.Code('```\n', 'config')]
  assert pages.to_markdown('t', blocks) == (
      '# t\n\n| a\\|b | n |\n| --- | ---: |\n| x\\_y \\| \\<z> | 1 |\n\n'
      '<details><summary>config</summary>\n\n````\n```\n````\n\n</details>\n'
  )


LONELY = (
    {'loss/task': 1.0},
    {'eval/loss': 1.0},
    {'loss/task': math.nan, 'eval/loss': math.inf},
    {'perf/steps_per_sec': math.nan},
    {'exchange/staleness_steps': 3.0, 'exchange/stall_ms': math.nan},
    {'exchange/staleness_steps_group_1': 3.0, REJECTED: 1.0},
    {
        'exchange/staleness_steps_group_2': -3.0,
        'exchange/staleness_steps_group_3': math.nan,
        'exchange/staleness_steps_group_4': 0.0,
        'exchange/publication_bytes': math.inf,
        'exchange/peers_present': math.nan,
    },
    {},
)


@pytest.mark.parametrize(
    'step, record', [(7, LONELY[6]), *((0, r) for r in LONELY)]
)
def test_one_lonely_record_makes_a_report(tmp_path, step, record):
  for group_id in (0, 1):
    write_records(tmp_path, group_id, [(step, record)])
  arms = run_records.load_arms([str(tmp_path)])
  assert run_report.write(arms).exists()
  assert run_report.results_text(arms)


def test_dollars_in_a_name_are_no_mathematics(tmp_path):
  arms = arms_of(tmp_path, SPEED, arm='$ \\no {mathematics $')
  assert run_plots.make_plots(arms)


# --- The binary --------------------------------------------------------------


def _run(python, *args: str, missing: str = '') -> subprocess.CompletedProcess:
  code = (
      'import runpy, sys\n'
      f'sys.modules |= dict.fromkeys({missing.split()})\n'
      'runpy.run_module("experiments.report", run_name="__main__")\n'
      'assert not {"matplotlib.pyplot", "tkinter"} & set(sys.modules)'
  )
  command = [python, '-W', 'error', '-c', code, *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_binary_prints_the_table_and_the_path(two, one, python):
  done = _run(python, f'--workdir=two={two}', f'--workdir={one}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'ensemble' in done.stdout
  assert done.stdout.endswith(f'report: {two}/report/report.html\n')


def test_a_missing_extra_is_one_line(two, python):
  done = _run(python, f'--workdir={two}', missing='matplotlib')
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert "matplotlib is missing; pip install 'codistill_jax[report]'" in line
