"""Tests of studies: targets, effects, and the words of verdicts."""

import numpy as np
import pytest
import study_toy as toy

from experiments.studies import analysis, results, verdicts
from experiments.studies.results import Run


def analyse(*groups_of_runs, study=None, **kwargs):
  runs = [run for runs in groups_of_runs for run in runs]
  return analysis.analyse(study or toy.study(**kwargs), runs)


def judge(found, name='two', **kwargs):
  return verdicts.judge(found, toy.compare(name, **kwargs))


def states(found, arm, measure='steps_to_target'):
  return [o.state for o in analysis.cell(found, arm, measure).outcomes]


def by_hand(arm, loss_N, seed=0, **kwargs) -> Run:
  steps_N = 10 * np.arange(1, len(loss_N) + 1)
  run = toy.run(arm, seed, steps_N=steps_N, **kwargs)
  return run._replace(loss_N=np.array(loss_N, float))


# --- Targets -----------------------------------------------------------------


def test_steps_are_those_of_the_first_evaluation_at_or_under_the_target():
  found = analyse(
      [by_hand('baseline', [5, 4, 3, 3.5])],
      [by_hand('two', [4, 3, 3.5, 2], groups=2)],
  )
  assert found.targets == {0: 3.0}
  (base,) = analysis.cell(found, 'baseline', 'steps_to_target').outcomes
  (ours,) = analysis.cell(found, 'two', 'steps_to_target').outcomes
  # At the target counts; in between evaluations nothing does.
  assert (base.value, ours.value) == (30, 20)
  assert ours.resolution == 10


def test_each_seed_has_its_own_target():
  found = analyse(
      [by_hand('baseline', [5, 4], 0), by_hand('baseline', [5, 2], 1)],
      [by_hand('two', [4, 3], 0), by_hand('two', [4, 3], 1)],
  )
  assert states(found, 'two') == ['measured', 'not reached']


def test_smoothing_is_a_trailing_mean_of_all_arms_alike():
  np.testing.assert_allclose(
      results.smooth(np.array([6.0, 4, 2, 0]), 3), [6, 5, 4, 2]
  )
  spike_N = np.full(20, 4.0)
  spike_N[10] = 1.0  # A lucky evaluation is no target.
  found = analyse([by_hand('baseline', spike_N)])
  assert found.window == 3
  assert found.targets[0] == pytest.approx(3.0)


def test_few_evaluations_are_not_smoothed():
  assert results.window_of([by_hand('baseline', [3.0] * 11)]) == 1
  assert results.window_of([by_hand('baseline', [3.0] * 12)]) == 3


def test_a_target_that_one_seed_does_not_reach_leaves_no_mean():
  runs = [*toy.runs('two', 2, speed=2), toy.run('two', 2, shift=1.0)]
  found = analyse(toy.runs(), runs)
  cell = analysis.cell(found, 'two', 'steps_to_target')
  assert cell.estimate is None
  assert (cell.count('measured'), cell.count('not reached')) == (2, 1)
  assert cell.outcomes[2].at_least == 1000
  assert judge(found).words.startswith('cannot be said')


def test_costs_of_teachers_count():
  runs = toy.runs('two', speed=2, prior_steps=300.0, prior_flops=7e12)
  found = analyse(toy.runs(), runs)
  mean = lambda key: analysis.cell(found, 'two', key).estimate.mean
  assert mean('total_steps_to_target') == mean('steps_to_target') + 300
  assert mean('compute_to_target') == pytest.approx(
      7e12 + 1e9 * mean('steps_to_target')
  )


# --- Divergence --------------------------------------------------------------


def test_a_run_that_diverged_is_counted_and_left_out_of_means():
  good = toy.runs('two', 4, speed=2)
  bad = toy.run('two', 4, speed=2, diverged_at=60)
  found = analyse(toy.runs(seeds=5), [*good, bad])
  alone = analyse(toy.runs(seeds=5), good)
  cell = analysis.cell(found, 'two', 'final_loss')
  assert cell.count('diverged') == 1
  assert cell.estimate == analysis.cell(alone, 'two', 'final_loss').estimate
  assert judge(found).effect.pairs == 4
  assert '1 left out for divergence' in judge(found).sentence


def test_a_loss_that_is_not_finite_is_divergence_too():
  run = by_hand('two', [5, np.nan, 4])
  assert results.diverged_at(run) == 20


def test_a_baseline_that_diverged_gives_no_target():
  baseline = [toy.run(diverged_at=100), *toy.runs(seeds=3)[1:]]
  found = analyse(baseline, toy.runs('two', speed=2))
  assert states(found, 'two') == ['no target', 'measured', 'measured']


def test_an_arm_that_always_diverges_has_more():
  found = analyse(toy.runs(), toy.runs('two', diverged_at=60))
  assert judge(found).words == 'opposite to the paper'
  assert judge(found, expect='more').words == 'as in the paper'
  assert 'diverged in 3 of 3 seeds' in judge(found).sentence


def test_divergence_of_one_arm_here_and_the_other_there_says_nothing():
  one = [toy.run(diverged_at=60), *toy.runs()[1:]]
  two = [toy.run('two'), *toy.runs('two', diverged_at=60)[1:]]
  assert judge(analyse(one, two), measure='final_loss').words == (
      'cannot be said (in every seed one of the two diverged)'
  )


# --- Effects -----------------------------------------------------------------


def test_equal_arms_have_ratio_one_and_no_difference():
  found = analyse(toy.runs(), toy.runs('two'))
  for measure in ('steps_to_target', 'total_steps_to_target'):
    got = judge(found, measure=measure)
    f = got.effect.estimate
    assert (f.mean, f.low, f.high) == (1, 1, 1)
    assert got.words == verdicts.NONE
  assert judge(found, measure='final_loss').words == verdicts.NONE
  assert judge(found, expect='equal').words == verdicts.AS


def test_a_shift_of_the_loss_is_found_exactly_whatever_the_seeds_differ_by():
  found = analyse(toy.runs(noise=0.1), toy.runs('two', noise=0.1, shift=-0.05))
  got = judge(found, measure='final_loss')
  assert got.effect.estimate.mean == pytest.approx(-0.05)
  assert got.effect.estimate.high == pytest.approx(-0.05)
  assert got.words == verdicts.AS
  assert judge(found, measure='final_loss', expect='more').words == (
      verdicts.OPPOSITE
  )


def test_shifting_all_losses_changes_no_steps():
  runs = [*toy.runs(), *toy.runs('two', speed=1.5)]
  moved = [r._replace(loss_N=r.loss_N + 2.0) for r in runs]
  ours, theirs = analyse(runs), analyse(moved)
  assert judge(ours).effect.estimate == judge(theirs).effect.estimate


def test_the_order_of_runs_does_not_matter():
  runs = [*toy.runs(seeds=5), *toy.runs('two', 5, speed=1.3)]
  shuffled = [runs[i] for i in np.random.default_rng(0).permutation(10)]
  assert judge(analyse(runs)) == judge(analyse(shuffled))


def test_a_ratio_and_its_reverse_are_one_over_the_other():
  found = analyse(toy.runs(noise=0.05), toy.runs('two', speed=1.7, noise=0.05))
  there = analysis.effect(found, 'two', 'baseline', 'steps_to_target').estimate
  back = analysis.effect(found, 'baseline', 'two', 'steps_to_target').estimate
  assert there.mean * back.mean == pytest.approx(1)
  assert there.low * back.high == pytest.approx(1)


def test_only_seeds_that_both_arms_have_are_compared():
  found = analyse(toy.runs(seeds=5), toy.runs('two', 3, speed=2))
  assert judge(found).effect.pairs == 3


def test_the_interval_covers_the_true_difference():
  rng = np.random.default_rng(1)
  covered = 0
  for _ in range(60):
    ours = [
        by_hand('two', [3 + 0.1 + 0.05 * rng.standard_normal()], seed)
        for seed in range(5)
    ]
    base = [by_hand('baseline', [3.0], seed) for seed in range(5)]
    found = analyse(base, ours)
    f = analysis.effect(found, 'two', 'baseline', 'final_loss').estimate
    covered += f.low <= 0.1 <= f.high
  assert covered >= 51  # 57 of 60 are expected.


# --- Verdicts ----------------------------------------------------------------


def differences(values):
  """Two arms whose losses at the end differ by these, seed by seed."""
  seeds = range(len(values))
  return analyse(
      [by_hand('baseline', [3.0], s) for s in seeds],
      [by_hand('two', [3.0 + d], s) for s, d in zip(seeds, values)],
  )


@pytest.mark.parametrize(
    'values, expect, words',
    [
        ((-0.5, -0.51, -0.49), 'less', verdicts.AS),
        ((-0.5, -0.51, -0.49), 'more', verdicts.OPPOSITE),
        ((0.5, 0.51, 0.49), 'more', verdicts.AS),
        ((0.5, 0.51, 0.49), 'less', verdicts.OPPOSITE),
        ((-0.5, 0.4, -0.3), 'less', verdicts.TOWARDS),
        ((-0.5, 0.4, -0.3), 'more', verdicts.NONE),
        ((0.5, -0.4, 0.3), 'less', verdicts.NONE),
        ((0.001, -0.001, 0.0), 'equal', verdicts.AS),
        ((0.5, -0.4, 0.3), 'equal', verdicts.NONE),
        ((0.5, 0.51, 0.49), 'equal', verdicts.OPPOSITE),
        # Seen, but too small to matter.
        ((0.01, 0.011, 0.009), 'equal', verdicts.AS),
    ],
)
def test_the_words_follow_the_interval(values, expect, words):
  found = differences(values)
  got = judge(found, measure='final_loss', expect=expect)
  assert got.words == words
  assert words in got.sentence and '3 seeds' in got.sentence
  assert f'{got.effect.estimate.low:.4f}' in got.sentence
  assert 'half the steps [B]' in got.sentence


@pytest.mark.parametrize('seeds', [1, 2])
def test_fewer_than_three_seeds_say_nothing(seeds):
  got = judge(differences([-0.5] * seeds), measure='final_loss')
  assert got.words.startswith('cannot be said')
  assert '-0.5' in got.sentence  # The number is there all the same.


def test_what_lies_within_one_evaluation_is_no_difference():
  base = [by_hand('baseline', [5, 4, 3, 2.0], s) for s in range(3)]
  near = [by_hand('two', [5, 4, 2, 2.0], s) for s in range(3)]
  far = [by_hand('two', [5, 2, 2, 2.0], s) for s in range(3)]
  assert judge(analyse(base, near)).words == verdicts.NONE
  assert judge(analyse(base, far)).words == verdicts.AS
  # Nor does it show that two are the same: 10 of 40 steps are 25 %.
  assert judge(analyse(base, near), expect='equal').words == verdicts.NONE
  same = [r._replace(arm='two') for r in base]
  assert judge(analyse(base, same), expect='equal').words == verdicts.NONE


def test_an_arm_that_never_gets_there_has_more():
  found = analyse(toy.runs(), toy.runs('two', shift=0.5))
  got = judge(found)
  assert got.words == verdicts.OPPOSITE
  assert 'reached in 0 of 3 seeds, by the baseline in 3' in got.sentence
  back = verdicts.judge(found, toy.compare('baseline', 'two'))
  assert back.words == verdicts.AS


def test_an_arm_that_was_stopped_early_says_nothing():
  short = toy.runs('two', shift=0.5, steps_N=toy.STEPS_N[:10])
  found = analyse(toy.runs(), short)
  assert judge(found).words.startswith('cannot be said')
  back = verdicts.judge(found, toy.compare('baseline', 'two'))
  assert back.words.startswith('cannot be said')


def test_what_the_paper_did_not_compare_is_not_said_to_be_in_it():
  found = analyse(toy.runs(), toy.runs('two', speed=2))
  said = judge(found, paper='not in the paper: a guess').sentence
  assert said.endswith(': as expected. Not in the paper: a guess.')
  assert 'as in the paper' in judge(found).sentence


def test_churn_is_no_number_of_these_runs():
  found = analyse(toy.runs(), toy.runs('two'))
  assert judge(found, measure='churn').words == (
      'cannot be said (these runs do not measure it)'
  )


# --- Errors ------------------------------------------------------------------


def test_runs_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="arm 'three', but toy has baseline"):
    analyse(toy.runs('three'))
  with pytest.raises(ValueError, match='Two runs'):
    analyse(toy.runs(), toy.runs())
  short = toy.run()._replace(flops_N=np.zeros(3))
  with pytest.raises(ValueError, match='flops_N has 3 values for 20'):
    analyse([short])
  found = analyse(toy.runs())
  with pytest.raises(ValueError, match='No measure'):
    judge(found, measure='speed')
  with pytest.raises(ValueError, match='less, more, equal'):
    judge(found, expect='fewer')
  with pytest.raises(ValueError, match="names arm 'three'"):
    judge(found, 'three')


def test_runs_for_tuning_are_in_no_figure():
  tuning = [toy.run(tuning=True, shift=-1.0, rate=r) for r in (0.1, 0.2)]
  plain, tuned = analyse(toy.runs()), analyse(toy.runs(), tuning)
  assert plain.targets == tuned.targets
  assert len(tuned.tuning['baseline']) == 2
