"""What the speed table of a report says of records."""

import pytest

from codistill_jax import run_directory, writers
from experiments import report, report_data, report_speed


def make_arms(workdir, records):
  run_directory.write_run(workdir, {'arm': 'codistillation', 'num_groups': 1})
  run_directory.config_path(workdir).write_text('')
  writer = writers.JsonlWriter(run_directory.metrics_path(workdir, 0))
  for step, metrics in records:
    writer.write(step, {'loss/task': 1.0, 'eval/loss': 1.0, **metrics})
  writer.close()
  return report_data.load_arms([str(workdir)])


def record(steps_per_sec, flops, share=0.0, **more):
  return {
      'perf/steps_per_sec': steps_per_sec,
      'perf/examples_per_sec': 64 * steps_per_sec,
      'perf/model_flops_per_step': flops,
      'perf/model_flops_per_sec': flops * steps_per_sec,
      'perf/teacher_share': share,
      **more,
  }


# Ten steps of burn-in in 2.5 seconds, then ten with a teacher in 10.
RECORDS = [
    (10, record(4.0, 3e9)),
    (20, record(1.0, 4e9, 0.25, **{'perf/utilisation': 0.415})),
]


def test_rates_are_means_over_time_and_the_rest_is_the_latest(tmp_path):
  (row,) = report_speed.rows(make_arms(tmp_path, RECORDS))
  # 20 steps, 1,280 examples and 70 GFLOP in 12.5 seconds.
  assert row == [
      'codistillation', 'group 0', '1.6', '102', '4 G', '5.6 G', '25.0%',
      '41.5%',
  ]  # fmt: skip
  assert len(row) == len(report_speed.TITLES)


def test_a_run_of_before_has_dashes_beside_another_and_alone_no_table(tmp_path):
  old = make_arms(tmp_path / 'old', [(10, {'perf/steps_per_sec': 4.0})])
  assert report_speed.rows(old) == []
  new = make_arms(tmp_path / 'new', RECORDS)
  rows = report_speed.rows([*new, *old])
  assert rows[1][2:] == ['4', '-', '-', '-', '-', '-']


def test_records_without_a_speed_do_not_count(tmp_path):
  # Such as the one after the first step, which is all compilation.
  records = [(5, {'perf/steps_per_sec': float('nan')}), *RECORDS]
  (arm,) = make_arms(tmp_path, [*records, (21, {})])
  rate = report_speed.mean_rate(arm.groups[0], 'perf/examples_per_sec')
  # Of five steps at 4 per second and of ten at one.
  assert rate == pytest.approx(15 * 64 / 11.25)


@pytest.mark.parametrize(
    'value, text',
    [(12.0, '12'), (999.6e6, '1 G'), (1.25e12, '1.25 T'), (3e19, '30 E')],
)
def test_flops_have_a_prefix(value, text):
  assert report_speed._flops(value) == text


def test_a_report_has_the_table(tmp_path):
  arms = make_arms(tmp_path, RECORDS)
  report.make_report(arms, tmp_path / 'out')
  page = (tmp_path / 'out' / 'report.md').read_text()
  assert 'teacher share' in page and '5.6 G' in page
