"""Tests of studies: targets, effects, and the words of words."""

import numpy as np
import pytest
import study_toy as toy

from experiments.studies import analysis, words
from experiments.studies.analysis import Run


def analyse(*groups_of_runs, **kwargs):
  runs = [run for runs in groups_of_runs for run in runs]
  return analysis.analyse(toy.study(**kwargs), runs)


def judge(found, name='two', against='baseline', **kwargs):
  return words.judge(found, toy.compare(name, against, **kwargs))


def cell(found, arm, measure='steps_to_target'):
  return analysis.cell(found, arm, measure)


def by_hand(arm, loss_N, seed=0, **kwargs) -> Run:
  steps_N = 10 * np.arange(1, len(loss_N) + 1)
  run = toy.run(arm, seed, steps_N=steps_N, **kwargs)
  return run._replace(loss_N=np.array(loss_N, float))


def thrice(arm, loss_N):
  return [by_hand(arm, loss_N, seed) for seed in range(3)]


# --- Targets -----------------------------------------------------------------


def test_steps_are_those_of_the_first_evaluation_at_or_under_the_target():
  found = analyse(
      [by_hand('baseline', [5, 4, 3, 3.5])],
      [by_hand('two', [4, 3, 3.5, 2], groups=2)],
  )
  assert found.targets == {0: 3.0}
  (base,), (ours,) = (cell(found, arm).scores for arm in ('baseline', 'two'))
  # At the target counts; in between evaluations nothing does.
  assert (base.value, ours.value, ours.resolution) == (30, 20, 10)


def test_each_seed_has_its_own_target():
  found = analyse(
      [by_hand('baseline', [5, 4], 0), by_hand('baseline', [5, 2], 1)],
      [by_hand('two', [4, 3], 0), by_hand('two', [4, 3], 1)],
  )
  states = [o.state for o in cell(found, 'two').scores]
  assert states == ['measured', 'not reached']


def test_smoothing_is_a_trailing_mean_of_all_arms_alike():
  got = analysis.smooth(np.array([6.0, 4, 2, 0]), 3)
  np.testing.assert_allclose(got, [6, 5, 4, 2])
  spike_N = np.full(20, 4.0)
  spike_N[10] = 1.0  # A lucky evaluation is no target.
  assert analyse([by_hand('baseline', spike_N)]).targets[0] == pytest.approx(3)
  # Few evaluations are not smoothed.
  windows = [analyse([by_hand('baseline', [3.0] * n)]).window for n in (11, 12)]
  assert windows == [1, 3]


def test_a_target_that_one_seed_does_not_reach_leaves_no_mean():
  runs = [*toy.runs('two', 2, speed=2), toy.run('two', 2, shift=1.0)]
  found = analyse(toy.runs(), runs)
  ours = cell(found, 'two')
  assert ours.estimate is None
  assert (ours.count('measured'), ours.count('not reached')) == (2, 1)
  assert ours.scores[2].at_least == 1000
  assert judge(found).words.startswith('cannot be said')


def test_costs_of_teachers_count():
  runs = toy.runs('two', speed=2, prior_steps=300.0, prior_flops=7e12)
  found = analyse(toy.runs(), runs)
  mean = lambda key: cell(found, 'two', key).estimate.mean
  steps = mean('steps_to_target')
  assert mean('total_steps_to_target') == steps + 300
  assert mean('compute_to_target') == pytest.approx(7e12 + 1e9 * steps)


# --- Divergence --------------------------------------------------------------


@pytest.mark.parametrize('arm', ['baseline', 'two'])
def test_a_run_that_diverged_is_counted_and_left_out_of_means(arm):
  """Of either side; the pairs are those in which neither did."""
  good = {name: toy.runs(name, 5, noise=0.05) for name in ('baseline', 'two')}
  bad = {**good, arm: [*good[arm][:4], toy.run(arm, 4, diverged_at=60)]}
  alone = {**good, arm: good[arm][:4]}
  found, without = (analyse(*runs.values()) for runs in (bad, alone))
  ours = cell(found, arm, 'final_loss')
  assert ours.count('diverged') == 1
  assert ours.estimate == cell(without, arm, 'final_loss').estimate
  got, expected = (judge(x, measure='final_loss') for x in (found, without))
  assert got.effect.pairs == 4
  assert got.effect.estimate == expected.effect.estimate
  assert '1 left out for divergence' in got.sentence


def test_a_loss_that_is_not_finite_is_divergence_too():
  assert analysis.diverged_at(by_hand('two', [5, np.nan, 4])) == 20


def test_a_baseline_that_diverged_gives_no_target():
  baseline = [toy.run(diverged_at=100), *toy.runs(seeds=3)[1:]]
  found = analyse(baseline, toy.runs('two', speed=2))
  states = [o.state for o in cell(found, 'two').scores]
  assert states == ['no target', 'measured', 'measured']


# --- Effects -----------------------------------------------------------------


def test_neither_all_losses_shifted_nor_the_order_of_runs_changes_steps():
  runs = [*toy.runs(seeds=5), *toy.runs('two', 5, speed=1.5)]
  moved = [r._replace(loss_N=r.loss_N + 2.0) for r in runs]
  shuffled = [runs[i] for i in np.random.default_rng(0).permutation(10)]
  got = judge(analyse(runs))
  assert got.effect.estimate == judge(analyse(moved)).effect.estimate
  assert got == judge(analyse(shuffled))


def test_a_ratio_is_ours_over_theirs_and_its_reverse_one_over_it():
  found = analyse(toy.runs(noise=0.05), toy.runs('two', speed=1.7, noise=0.05))
  there = judge(found).effect.estimate
  back = judge(found, 'baseline', 'two').effect.estimate
  assert there.mean < 1 < back.mean
  assert there.mean * back.mean == pytest.approx(1)
  assert there.low * back.high == pytest.approx(1)


def test_what_the_seeds_differ_by_is_in_no_difference():
  found = analyse(toy.runs(noise=0.1), toy.runs('two', noise=0.1, shift=-0.05))
  got = judge(found, measure='final_loss').effect.estimate
  assert (got.low, got.mean, got.high) == pytest.approx((-0.05,) * 3)


def test_only_seeds_that_both_arms_have_are_compared():
  found = analyse(toy.runs(seeds=5), toy.runs('two', 3, speed=2))
  assert judge(found).effect.pairs == 3


# --- Verdicts ----------------------------------------------------------------


def differences(values):
  """Two arms whose losses at the end differ by these, seed by seed."""
  seeds = range(len(values))
  return analyse(
      [by_hand('baseline', [3.0], s) for s in seeds],
      [by_hand('two', [3.0 + d], s) for s, d in zip(seeds, values)],
  )


LESS, MORE = (-0.5, -0.51, -0.49), (0.5, 0.51, 0.49)
MIXED, RATHER_MORE = (-0.5, 0.4, -0.3), (0.5, -0.4, 0.3)


@pytest.mark.parametrize(
    'values, expect, words',
    [
        (LESS, 'less', words.AS),
        (LESS, 'more', words.OPPOSITE),
        (MORE, 'more', words.AS),
        (MORE, 'less', words.OPPOSITE),
        (MIXED, 'less', words.TOWARDS),
        (MIXED, 'more', words.NONE),
        (RATHER_MORE, 'less', words.NONE),
        (RATHER_MORE, 'equal', words.NONE),
        (MORE, 'equal', words.OPPOSITE),
        ((0.001, -0.001, 0.0), 'equal', words.AS),
        # Seen, but within 1 % of 3 nats; and beyond.
        ((0.01, 0.011, 0.009), 'equal', words.AS),
        ((0.05, 0.051, 0.049), 'equal', words.OPPOSITE),
    ],
)
def test_the_words_follow_the_interval(values, expect, words):
  got = judge(differences(values), measure='final_loss', expect=expect)
  assert got.words == words
  assert words in got.sentence and '3 seeds' in got.sentence
  assert f'{got.effect.estimate.low:.4f}' in got.sentence
  assert 'half the steps [B]' in got.sentence


BASE, TWO = toy.runs(), toy.runs('two')
DIVERGED = toy.runs('two', diverged_at=60)
NEVER = toy.runs('two', shift=0.5)
STOPPED = toy.runs('two', shift=0.5, steps_N=toy.STEPS_N[:10])
FIRST_OF_BASE = [toy.run(diverged_at=60), *BASE[1:]]


@pytest.mark.parametrize(
    'base, two, measure, expected, said',
    [
        (BASE, TWO, 'steps_to_target', words.NONE, 'a ratio of 1 [1, 1]'),
        (BASE, TWO, 'final_loss', words.NONE, '0.0000 [0.0000, 0.0000]'),
        (BASE, DIVERGED, 'steps_to_target', 'more', 'diverged in 3 of 3 seeds'),
        (
            FIRST_OF_BASE,
            [TWO[0], *DIVERGED[1:]],
            'final_loss',
            'cannot be said (in every seed one of the two diverged)',
            'no number',
        ),
        # At its end, and when it was stopped before the other got there.
        (BASE, NEVER, 'steps_to_target', 'more', 'reached in 0 of 3 seeds'),
        (
            BASE,
            STOPPED,
            'steps_to_target',
            'cannot be said (the target was not reached in all seeds)',
            'by the baseline in 3; no ratio',
        ),
        (
            BASE,
            TWO,
            'churn',
            'cannot be said (these runs do not measure it)',
            'no number',
        ),
        (
            BASE,
            [],
            'final_loss',
            'cannot be said (no seed in which both arms were trained)',
            'no number',
        ),
        (
            BASE[:2],
            TWO[:2],
            'final_loss',
            'cannot be said (2 seeds of both arms: an interval needs 3)',
            '0.0000 (2 seeds)',  # The number is there all the same.
        ),
    ],
)
def test_what_can_be_said(base, two, measure, expected, said):
  """The same from both sides, and whatever was expected."""
  found = analyse(base, two)
  assert said in judge(found, measure=measure).sentence
  for ours, theirs, side in (
      ('two', 'baseline', 'more'),
      ('baseline', 'two', 'less'),
  ):
    for expect in ('more', 'less'):
      got = judge(found, ours, theirs, measure=measure, expect=expect).words
      if expected == 'more':
        assert got == (words.AS if expect == side else words.OPPOSITE)
      else:
        assert got == expected


def test_what_lies_within_one_evaluation_is_no_difference():
  base = thrice('baseline', [5, 4, 3, 2.0])
  near = analyse(base, thrice('two', [5, 4, 2, 2.0]))
  far = analyse(base, thrice('two', [5, 2, 2, 2.0]))
  assert judge(near).words == words.NONE
  assert judge(far).words == words.AS
  # Nor does it show that two are the same: 10 of 40 steps are 25 %.
  assert judge(near, expect='equal').words == words.NONE
  same = analyse(base, [r._replace(arm='two') for r in base])
  assert judge(same, expect='equal').words == words.NONE


def test_what_the_paper_did_not_compare_is_not_said_to_be_in_it():
  found = analyse(toy.runs(), toy.runs('two', speed=2))
  said = judge(found, paper='not in the paper: a guess').sentence
  assert said.endswith(': as expected. Not in the paper: a guess.')
  assert 'as in the paper' in judge(found).sentence


def test_runs_for_tuning_are_in_no_figure():
  tuning = [toy.run(tuning=True, shift=-1.0, rate=r) for r in (0.1, 0.2)]
  plain, tuned = analyse(toy.runs()), analyse(toy.runs(), tuning)
  assert plain.targets == tuned.targets
  assert len(tuned.tuning['baseline']) == 2
