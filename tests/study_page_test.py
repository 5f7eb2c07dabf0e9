"""Tests of studies/study_page: what is written of a study, and what it says."""

import contextlib
import csv
import html
import io
import itertools
import os
import re
import subprocess
import textwrap

import golden_page
import matplotlib
import numpy as np
import pytest
import study_toy as toy

from codistill_jax.statistics import Estimate
from experiments.reports import plots
from experiments.reports.pages import Paragraph, Plot
from experiments.studies import analysis, costs, study_page, study_plots, words
from experiments.studies.catalogue import STUDIES
from experiments.studies.costs import Latency
from experiments.studies.study_plan import Factor, make_plan

PNG = b'\x89PNG'
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read_csv(path):
  with open(path) as f:
    return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """With an arm that diverges, and one that never gets there."""
  study = toy.study(
      toy.arm('baseline'),
      toy.arm('two', num_groups=2),
      toy.arm('smooth'),
      toy.arm('async'),
      toy.arm('pair', num_groups=2, ensemble_of='baseline'),
      toy.arm('absent'),
      comparisons=[
          toy.compare('two'),
          toy.compare('smooth'),
          toy.compare('pair', measure='best_loss'),
          toy.compare('absent'),
      ],
      views=('bytes', 'speed-accuracy'),
  )
  runs = [
      *toy.runs(accuracy=True),
      *toy.runs('two', speed=2, groups=2, received=2e4, accuracy=True),
      *toy.runs('smooth', shift=0.2),
      *toy.runs('async', 2, received=1e6),
      toy.run('async', 2, steps_N=toy.STEPS_N[:4], diverged_at=230),
      *toy.runs('pair', speed=1.5, groups=2),
      toy.run(seed=99, tuning=True, rate=0.001),
      toy.run(seed=99, tuning=True, rate=0.002, diverged_at=10),
  ]
  output = tmp_path_factory.mktemp('study') / 'page'
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    judged = study_page.report(study, toy.settings(), runs, output)
  return output, printed.getvalue(), judged, runs


def test_the_page_as_a_whole(written):
  """Arms, seeds, settings, what diverged, what was tuned; rules and command."""
  golden_page.check((written[0] / 'page.md').read_text(), 'study.md')
  golden_page.check((written[0] / 'study.csv').read_text(), 'study.csv')


def test_what_is_printed_is_what_the_page_says(written):
  output, printed, judged, _ = written
  page = html.unescape((output / 'page.html').read_text())
  said = [v.words for v in judged]
  assert said[:3] == [words.AS, words.OPPOSITE, words.AS]
  assert said[3].startswith('cannot be said (no seed')
  table, lines = printed.strip().split('\n\n')
  assert len(table.splitlines()) == 1 + 6
  *lines, last = lines.splitlines()
  assert len(lines) == 5 and all(line in page for line in lines)
  assert last == f'page: {output / "page.md"}'


def test_every_plot_that_the_page_shows_is_there(written):
  output = written[0]
  page = (output / 'page.md').read_text()
  names = {p.name for p in output.glob('*.png')}
  assert names == {'loss.png', 'accuracy.png', 'loss_bytes.png'}
  for name in names:
    assert f']({name})' in page
    assert (output / name).read_bytes().startswith(PNG)
  assert (output / 'page.html').read_text().count('data:image/png') == 3


def test_curves_read_back_as_they_were(written):
  output, _, _, runs = written
  rows = read_csv(output / 'curves.csv')
  reported = [r for r in runs if not r.tuning]
  assert len(rows) == sum(len(r.steps_N) for r in reported)
  for run in reported:
    mine = [
        row
        for row in rows
        if (row['arm'], row['seed']) == (run.arm, str(run.seed))
    ]
    for key, values in (
        ('step', run.steps_N),
        ('loss', run.loss_N),
        ('flops', run.flops_N),
        ('bytes', run.bytes_N),
    ):
      np.testing.assert_array_equal([float(r[key]) for r in mine], values)
    assert (mine[0]['accuracy'] == '') == (not len(run.accuracy_N))


def test_the_order_of_runs_changes_no_file(tmp_path):
  study = toy.study(comparisons=[toy.compare('two')])
  runs = [*toy.runs(), *toy.runs('two', speed=1.5)]
  study_page.report(study, toy.settings(), runs, tmp_path / 'a')
  study_page.report(study, toy.settings(), runs[::-1], tmp_path / 'b')
  for name in ('page.md', 'study.csv', 'curves.csv', 'loss.png'):
    ours, theirs = (tmp_path / d / name for d in 'ab')
    assert ours.read_bytes() == theirs.read_bytes()


SHORT = {'seeds': 1, 'steps_N': toy.STEPS_N[:1]}
UNKNOWN = {'rate': float('nan'), 'flops_N': np.full(20, np.nan)}


@pytest.mark.parametrize(
    'runs, measure, words, said',
    [
        (
            [*toy.runs(**SHORT), *toy.runs('two', received=1.0, **SHORT)],
            'steps_to_target',
            'cannot be said (1 seed',
            'validation loss',
        ),
        (
            [*toy.runs(diverged_at=60), *toy.runs('two', diverged_at=70)],
            'steps_to_target',
            'cannot be said (in every seed',
            'diverged at step 60, 60 and 60 in 3 of 3 seeds',
        ),
        (
            [*toy.runs(**UNKNOWN), *toy.runs('two', speed=2, **UNKNOWN)],
            'compute_to_target',
            'cannot be said (these runs do not measure it)',
            'no number: cannot be said',
        ),
        (
            [toy.run(tuning=True, rate=r) for r in (0.001, 0.002)],
            'steps_to_target',
            'cannot be said (no seed',
            'not trained',
        ),
    ],
    ids=['one evaluation', 'all diverged', 'no FLOPs on record', 'tuning only'],
)
def test_a_study_with_little_to_say_has_a_page(
    tmp_path, runs, measure, words, said
):
  comparison = toy.compare('two', measure=measure)
  study = toy.study(comparisons=[comparison], views=('bytes',))
  (judged,) = study_page.report(study, toy.settings(), runs, tmp_path)
  assert judged.words.startswith(words)
  page = (tmp_path / 'page.md').read_text()
  assert said in page
  assert not re.search(r'\bnan\b', page)
  flops = {row['flops'] for row in read_csv(tmp_path / 'curves.csv')}
  assert (flops == {''}) == (measure == 'compute_to_target')


@pytest.mark.parametrize(
    'values, known',
    [
        ((3.0, 2.5, 1.0, 5.25, (1, 2, 6)), '3.0 ± 2.5 [1.0, 5.2]'),
        ((3.0, 2.5, np.nan, np.nan, (1, 6)), '3.0 ± 2.5'),
        ((3.0, 0.0, 1.0, 5.25, (3,)), '3.0 [1.0, 5.2]'),
    ],
)
def test_an_estimate_shows_what_is_known_of_it(values, known):
  found = Estimate(*values)
  assert words.estimate(found, '.1f', spread=True) == known
  assert '±' not in words.estimate(found, '.1f')
  assert '[' not in words.estimate(found, '.1f', interval=False)
  assert words.percent(found).startswith('+300 %')


def test_importing_the_report_needs_neither_jax_nor_matplotlib(python):
  code = """
      import sys
      from experiments.studies import churn_page, study_page
      assert 'matplotlib' not in sys.modules
      from experiments.studies import study_plots
      assert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)
      """
  subprocess.run([python, '-c', textwrap.dedent(code)], check=True, cwd=ROOT)


# --- Studies with an axis ----------------------------------------------------

EVERY_N = np.arange(25, 1001, 25)


def scaling(both=(8, 16, 32), **kwargs):
  """Steps to the target fall with the workers of a group; two need 1/1.5."""
  arms, runs = [], []
  for series, groups, gain, workers in (
      ('one group', 1, 1.0, (4, 8, 16, 32)),
      ('two groups', 2, 1.5, both),
  ):
    for w in workers:
      name = f'{series.split()[0]}_{w}'
      place = {'workers': w, 'x': groups * w, 'series': series}
      arms.append(toy.arm(name, num_groups=groups, **place))
      speed = gain / (0.15 * (1 + 6 / w))
      runs += toy.runs(name, speed=speed, groups=groups, steps_N=EVERY_N)
  study = toy.study(*arms, x_label='workers of a group', **kwargs)._replace(
      baseline='one_4'
  )
  return study, runs


def test_what_the_latency_model_is_given_comes_from_the_runs():
  study, runs = scaling()
  got = costs.measure(analysis.analyse(study, runs), Latency())
  assert sorted(got.one) == [4, 8, 16, 32] and sorted(got.two) == [8, 16, 32]
  assert got.at == 32
  assert got.ratio == pytest.approx(got.two[32] / got.one[32])
  assert got.ratio == pytest.approx(1 / 1.5, rel=0.1)
  # Teachers of the toy cost a third; both groups' FLOPs are one group's twice.
  assert got.compute == pytest.approx(4 / 3)


def test_the_page_says_where_a_second_group_pays(tmp_path):
  study, runs = scaling(views=('latency',))
  study_page.report(study, toy.settings(), runs, tmp_path)
  golden_page.check((tmp_path / 'page.md').read_text(), 'wall_time.md')
  for name in ('latency', 'against_x'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(PNG)


def said_of_wall_time(study, runs, assumed=None):
  """Sentences and plots of the view."""
  found = analysis.analyse(study, runs)
  blocks = study_page.wall_time_blocks(
      found, toy.settings(), assumed or Latency()
  )
  texts = [b.text for b in blocks if isinstance(b, Paragraph)]
  return ' '.join(texts), [b for b in blocks if isinstance(b, Plot)]


def test_a_second_group_that_costs_too_much_never_pays():
  study, runs = scaling()
  runs = [
      r._replace(flops_N=9 * r.flops_N) if 'two' in r.arm else r for r in runs
  ]
  assumed = Latency(1.0, alpha=0.0, model_time=0.0)
  text, plots = said_of_wall_time(study, runs, assumed)
  assert 'two groups of W never stay ahead' in text and len(plots) == 1


def test_too_few_points_give_a_sentence_instead_of_a_plot():
  study, runs = scaling()
  runs = [r for r in runs if r.arm not in ('one_8', 'one_16')]
  text, plots = said_of_wall_time(study, runs)
  assert 'No wall time' in text and not plots


def test_without_two_groups_there_is_no_crossover():
  text, plots = said_of_wall_time(*scaling(both=()))
  assert 'there is no crossover to compute' in text and len(plots) == 1


def batches(critical=8, gain=1.4):
  """Steps to any target follow a critical batch of so many workers."""
  study = make_plan(STUDIES['map'], 'gpu').study
  runs, often = [], {'noise': 1e-5, 'steps_N': np.arange(4, 1001, 4)}
  for arm in study.arms:
    speed = (gain if arm.num_groups > 1 else 1) / (1 + critical / arm.workers)
    runs += toy.runs(arm.name, speed=speed, **often)
  return study, runs


def test_the_map_says_at_which_batches_a_second_group_pays(tmp_path):
  study, runs = batches()
  found = analysis.analyse(study, runs)
  maps = costs.map_of_batches(found)
  assert [m.name for m in maps] == ['early', 'middle', 'late']
  assert maps[0].nats > maps[1].nats > maps[2].nats
  # Twice the batch takes (1 + 4 / W) / (1 + 8 / W) of the steps, a second group
  # 1 / 1.4: fewer from W = 6 on. One worker alone does not get far.
  for found_map in maps[:2]:
    assert found_map.fit.critical == pytest.approx(8, rel=0.25)
    assert found_map.where(True) == [8, 16]
    assert found_map.where(False)[-2:] == [2, 4]
    ratio = found_map.ratios['two groups'][16].estimate.mean
    assert ratio == pytest.approx(1 / 1.4, rel=0.05)
  study_page.report(study, toy.settings(group_batch=256), runs, tmp_path)
  page = (tmp_path / 'page.md').read_text()
  assert 'fewer steps than twice the batch at a batch of 512, 1,024.' in page
  assert (tmp_path / 'map.png').read_bytes().startswith(PNG)
  head = next(x for x in page.splitlines() if 'batch / critical' in x)
  rows = page.split(head)[1].split('\n\n')[0].splitlines()[2:]
  assert len(rows) == 3 * 5 and head.count('|') == rows[0].count('|')


def test_a_factor_is_judged_by_its_own_control(tmp_path):
  names = ('one', 'two', 'slow', 'fast', 'one_hard', 'hard', 'absent')
  rows = (
      ('nothing', 'two', 'one'),
      ('slower', 'slow', 'one'),
      ('faster', 'fast', 'one'),
      ('harder', 'hard', 'one_hard'),
      ('not yet', 'absent', 'one'),
  )
  study = toy.study(
      *(toy.arm(n, num_groups=1 + (not n.startswith('one'))) for n in names),
      factors=tuple(Factor('here', *row, unchanged='two') for row in rows),
  )._replace(baseline='one')
  speeds = {'one': 1, 'two': 2, 'slow': 1.25, 'fast': 4}
  often = {'noise': 1e-5, 'steps_N': np.arange(10, 1001, 10)}
  runs = [r for n, v in speeds.items() for r in toy.runs(n, speed=v, **often)]
  for name, speed in (('one_hard', 1), ('hard', 2)):  # All losses are higher.
    runs += toy.runs(name, speed=speed, shift=0.5, **often)
  found = {
      e.factor.change: e
      for e in analysis.factor_effects(analysis.analyse(study, runs))
  }
  steps = {
      n: e.steps.estimate.mean for n, e in found.items() if e.steps.estimate
  }
  expected = {'nothing': 1 / 2, 'slower': 0.8, 'faster': 1 / 4, 'harder': 1 / 2}
  assert steps == pytest.approx(expected, rel=0.05)
  # Both of its arms are 0.5 higher: the help is the same.
  assert found['harder'].change.mean == pytest.approx(0.0, abs=1e-6)
  study_page.report(study, toy.settings(), runs, tmp_path)
  page = (tmp_path / 'page.md').read_text()
  said = 'a second group helps more with faster, and less with slower.'
  assert said in page
  lines = [line for line in page.splitlines() if line.startswith('| here')]
  assert len(lines) == len(rows)
  assert lines[0].endswith('| - |') and lines[-1].count('not trained') == 2
  assert {p.name for p in tmp_path.glob('*.png')} == {'factors.png'}


def test_what_is_not_reached_stands_on_the_axis_at_what_was_seen():
  study, runs = scaling()
  runs += toy.runs('late', shift=1.0, steps_N=EVERY_N)
  late = toy.arm('late', workers=2, x=2, series='one group')
  study = study._replace(arms=(*study.arms, late))
  found = analysis.analyse(study, runs)
  assert study_plots.point(found, late, 'steps_to_target') == (1000, None)


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are saved, by name."""
  figures, save = {}, plots.save

  def keep(figure, name, *args):
    figures[name] = figure
    return save(figure, name, *args)

  monkeypatch.setattr(plots, 'save', keep)
  return figures


def colours_of(figure):
  return {
      handle.get_label(): matplotlib.colors.to_hex(handle.get_color())
      for handle in figure.legends[0].legend_handles
  }


SEVERAL_PLOTS = ['sgd_scaling', 'staleness', 'communication']


@pytest.mark.parametrize('name', SEVERAL_PLOTS)
def test_an_arm_has_one_colour_on_all_plots(tmp_path, drawn, name):
  """And so has a series of arms, which have a shade of it each."""
  study = make_plan(STUDIES[name], 'cpu').study
  runs = []
  for i, arm in enumerate(study.arms):
    runs += toy.runs(arm.name, 2, speed=1 + i / 9, received=i * 1e4)
  study_page.report(study, toy.settings(), runs, tmp_path)
  for figure in drawn.values():
    for ax in figure.axes:  # However many entries a legend has.
      assert ax.get_window_extent().height / figure.dpi > 2
  plots_of = [colours_of(figure) for figure in drawn.values()]
  assert len(plots_of) > 1
  for ours, theirs in itertools.combinations(plots_of, 2):
    both = (ours.keys() & theirs.keys()) - {'target'}
    assert [ours[x] for x in both] == [theirs[x] for x in both]


def test_many_arms_are_told_apart():
  for study in STUDIES.values():
    for scale in study.scales:
      arms = make_plan(study, scale).study
      styles = study_plots.styles_of(arms)
      looks = {(style['color'], style['ls']) for style in styles.values()}
      assert len(looks) == len(styles) == len(arms.arms)
