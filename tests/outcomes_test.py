"""What is read back of a study, from the files of its runs."""

import json

import numpy as np
import pytest
import study_toy

from codistill_jax import run_directory
from codistill_jax.exchange.plan import Plan
from codistill_jax.storage import files
from experiments.studies import outcomes
from experiments.studies import study_plan as plan_lib
from experiments.studies.study_plan import Scale

SETTINGS = {
    'study': 'toy',
    'scale': 'smoke',
    'publish_dtype': 'bfloat16',
    'model_parameters': 10,
    'platform': 'cpu',
    'examples_per_row': 1,
    **dict.fromkeys(('data', 'example', 'model', 'device', 'command'), 'x'),
    **dict.fromkeys(
        ('group_batch', 'num_steps', 'exchange_every', 'replicas', 'cores'), 1
    ),
}
OUTCOME = {
    'rate': 0.1,
    'diverged_at': None,
    'exchange_every': 5,
    'burn_in_steps': 0,
    'peers': 1.0,
    'together': 1,
}


class Workdir:
  """Of a study whose runs a test writes."""

  def __init__(self, path, *arms, **scale):
    self.path = path
    study = study_toy.study(*arms)._replace(
        scales={'smoke': Scale(('toy.gin',), **{'seeds': 1, **scale})}
    )
    self.plan = plan_lib.make_plan(study, 'smoke')
    files.write_json(plan_lib.study_path(path), SETTINGS)

  def write(self, arm, records, *, seed=0, groups=1, ensemble=None, **outcome):
    """A run whose groups have all recorded this."""
    run = next(r for r in self.plan.runs() if (r.arm, r.seed) == (arm, seed))
    directory = plan_lib.run_dir(self.path, run)
    for group_id in range(groups):
      path = run_directory.metrics_path(directory, group_id)
      _write_records(path, records)
    if ensemble is not None:
      _write_records(plan_lib.ensemble_path(directory), ensemble)
    files.write_json(plan_lib.outcome_path(directory), OUTCOME | outcome)

  def load(self):
    """The runs by arm and seed."""
    _, runs = outcomes.load(self.path, self.plan)
    return {(run.arm, run.seed): run for run in runs}


def _write_records(path, records):
  lines = [json.dumps({'time': 0.0, **record}) + '\n' for record in records]
  files.write_bytes(path, ''.join(lines).encode())


def losses_at(steps, **more):
  return [{'step': int(s), 'eval/loss': 1.0 / s, **more} for s in steps]


def two(**kwargs):
  return study_toy.arm(
      'two', num_groups=2, communication='exchange', workers=1, **kwargs
  )


@pytest.mark.parametrize('every, burn_in', [(5, 0), (5, 10), (10, 3), (7, 100)])
def test_bytes_are_those_of_the_publications_that_were_fetched(
    tmp_path, every, burn_in
):
  workdir = Workdir(tmp_path, study_toy.arm('baseline', workers=1), two())
  workdir.write(
      'two',
      losses_at(range(1, 61)),
      groups=2,
      exchange_every=every,
      burn_in_steps=burn_in,
      peers=3.0,
  )
  plan = Plan(every=every, mode='lockstep')
  # By the rule of the exchange itself.
  fetched_N = [
      len({plan.asked(s) for s in range(burn_in, n) if plan.asked(s)})
      for n in range(1, 61)
  ]
  found = workdir.load()['two', 0].bytes_N
  np.testing.assert_allclose(found, 3 * 2 * 10 * np.array(fetched_N))


def test_workers_of_a_group_receive_what_they_reduce_besides(tmp_path):
  workdir = Workdir(
      tmp_path, study_toy.arm('baseline', workers=1), two()._replace(workers=4)
  )
  workdir.write('two', losses_at([2]), groups=2, burn_in_steps=100)
  found = workdir.load()['two', 0].bytes_N
  np.testing.assert_allclose(found, [2 * (2 * 3 / 4) * 20])


@pytest.mark.parametrize(
    'values, expected',
    [
        ([0, 0, 0], None),
        ([0, 1, 0], None),  # It came back.
        ([0, 1, 0, 1, 1], 40),
        ([1, 1], 10),
        ([], None),
    ],
)
def test_a_loss_that_went_up_for_good_is_divergence(tmp_path, values, expected):
  workdir = Workdir(tmp_path, study_toy.arm('baseline', workers=1), seeds=2)
  records = losses_at([5]) + [
      {'step': 10 * (i + 1), 'async/diverged': x} for i, x in enumerate(values)
  ]
  workdir.write('baseline', records)
  workdir.write('baseline', records, seed=1, diverged_at=7)
  found = workdir.load()
  assert found['baseline', 0].diverged_at == expected
  assert found['baseline', 1].diverged_at == 7


def test_an_arm_at_two_rates_is_no_arm(tmp_path):
  workdir = Workdir(
      tmp_path, study_toy.arm('baseline', workers=1), seeds=3, rates=(0.1, 0.2)
  )
  for seed in (plan_lib.TUNING_SEED, 0, 1):
    workdir.write('baseline', losses_at([1]), seed=seed)
  assert workdir.load()['baseline', 1].rate == 0.1
  workdir.write('baseline', losses_at([1]), seed=2, rate=0.2)
  with pytest.raises(ValueError, match='arm baseline at learning rates'):
    workdir.load()


def test_teachers_count_as_steps_and_flops_before_the_first(tmp_path):
  workdir = Workdir(
      tmp_path,
      study_toy.arm('baseline', workers=1, num_groups=2),
      study_toy.arm('student', workers=1, taught_by='baseline'),
  )
  spent = losses_at([10, 20], **{'perf/model_flops_per_step': 3.0})
  workdir.write('baseline', spent, groups=2)
  workdir.write('student', losses_at([10]))
  student = workdir.load()['student', 0]
  # Of both teachers.
  assert (student.prior_steps, student.prior_flops) == (40, 2 * 20 * 3)


def test_an_ensemble_has_the_costs_of_its_members(tmp_path):
  workdir = Workdir(
      tmp_path,
      study_toy.arm('baseline', workers=1, num_groups=2),
      study_toy.arm('both', num_groups=2, ensemble_of='baseline'),
  )
  spent = losses_at([10, 20, 30], **{'perf/model_flops_per_step': 3.0})
  better = [{'step': 20, 'eval/loss': 0.01}]
  workdir.write('baseline', spent, groups=2, ensemble=better)
  found = workdir.load()['both', 0]
  assert (found.steps_N, found.loss_N, found.flops_N) == ([20], [0.01], [120])


def test_between_outer_steps_nobody_has_the_mean_of_the_workers(tmp_path):
  workdir = Workdir(tmp_path, study_toy.arm('baseline', workers=1))
  workdir.write('baseline', losses_at([10, 15, 20, 25]), outer_every=10)
  assert workdir.load()['baseline', 0].steps_N.tolist() == [10, 20]


@pytest.mark.parametrize(
    'settings, words',
    [
        (None, 'holds no study; train it first'),
        ({}, 'a study of churn as earlier versions wrote it'),
        (SETTINGS | {'scale': 'cpu'}, "not 'smoke'; give --scale=cpu"),
        (SETTINGS, 'no run of .* is done; start it again'),
    ],
)
def test_what_is_no_study_is_said(tmp_path, settings, words):
  workdir = Workdir(tmp_path, study_toy.arm('baseline', workers=1))
  plan_lib.study_path(tmp_path).unlink()
  if settings is not None:
    content = settings or {'num_groups': 2}
    files.write_json(plan_lib.study_path(tmp_path), content)
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    workdir.load()
