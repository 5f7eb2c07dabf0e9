"""Tests of studies/churn_page: a page of made-up predictions, and verdicts."""

import golden_page
import numpy as np
import pytest

from codistill_jax import statistics
from experiments.studies import churn_page, retrains
from experiments.studies.catalogue import STUDIES
from experiments.studies.retrains import Repeat, Retrains

SPREAD = {
    'single': 0.5,
    'codistilled_1': 0.3,
    'codistilled_2': 0.2,
    'wide': 0.6,
}
TITLES = {arm.name: arm.title for arm in STUDIES['churn'].arms}
RECORD = {
    'num_steps': 24,
    'cores': 1,
    'jax': '0.10',
    'began': 1000.0,
    'ended': 1090.0,
}


def rows_of(seed):
  """Five retrains of each arm; an ensemble of two has ten single models."""
  rng = np.random.default_rng(seed)
  labels, base = rng.integers(2, size=400), rng.normal(size=400)
  arms = {}
  for name, spread in SPREAD.items():
    skill = 2 * (0.6 - 0.5 * spread) * (labels - 0.5)
    logits = base + skill + spread * rng.normal(size=(10, 400))
    models = list(1 / (1 + np.exp(-logits)))
    arms[name] = models[:5]
    if name == 'single':
      arms['ensemble'] = statistics.ensembles(models)
  return retrains.summarise(arms, labels, TITLES)


def made_up(**kwargs):
  rows = {'validation': rows_of(0), 'test': rows_of(1)}
  chosen, rule = retrains.choose(rows['validation'])
  settings = {
      'data': 'toy points',
      'headline': 'Do toys churn?',
      'has_test_split': True,
      'num_groups': 2,
      'replicas': 1,
      'group_batch': 16,
      'exchange_every': 4,
      'platform': 'cpu',
      'device': 'cpu',
      'command': 'python -m experiments.churn --workdir=toy',
  }
  values = {
      'settings': settings | kwargs,
      'examples': {'validation': 400, 'test': 400},
      'rows': rows,
      'chosen': chosen,
      'rule': rule,
      'controls': rows['test'][:2],
      'repeats': [Repeat('single', 0, 800, 0.0, True)],
      'runs': [
          RECORD | {'arm': 'single', 'retrain': k, 'seed': k, 'data_seed': k}
          for k in range(10)
      ],
      'configurations': {'config.gin': 'optax.adam.learning_rate = 0.1\n'},
  }
  return Retrains(**values)


def test_the_page_as_a_whole(tmp_path, capsys):
  churn_page.report(made_up(), tmp_path, 'Of toys only.')
  golden_page.check((tmp_path / 'churn.md').read_text(), 'churn.md')
  printed = capsys.readouterr().out
  assert 'was chosen on validation' in printed and 'churn.html' in printed
  endings = ('csv', 'html', 'json', 'md', 'png')
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [f'churn.{ending}' for ending in endings]


def test_the_page_of_the_declared_study_has_its_verdicts(tmp_path, capsys):
  churn_page.report(made_up(), tmp_path, study=STUDIES['churn'])
  printed = capsys.readouterr().out.replace(str(tmp_path), '')
  golden_page.check(printed, 'churn_verdicts.txt')
  page = (tmp_path / 'page.md').read_text()
  assert '## Verdict' in page and '35 % less churn' in page


@pytest.mark.parametrize(
    'repeat, platform, hint',
    [
        (Repeat('single', 1, 800, 1e-7, True), 'cpu', 'seeds alone'),
        (Repeat('single', 1, 800, 1e-7, False), 'cpu', 'do not change --jobs'),
        (Repeat('single', 1, 800, 1e-7, True), 'gpu', 'deterministic_ops'),
    ],
)
def test_a_control_that_fails_is_said_loudly(tmp_path, repeat, platform, hint):
  found = made_up(platform=platform)._replace(repeats=[repeat])
  with pytest.raises(ValueError, match=f'1 of 800 .*{hint}'):
    churn_page.report(found, tmp_path)
  assert 'FAILED' in (tmp_path / 'churn.md').read_text()
