"""Synthetic studies: runs whose losses are a formula, nothing is trained."""

from typing import Any

import numpy as np

from experiments.studies.analysis import Run
from experiments.studies.study_plan import Arm, Comparison, Scale, Study

STEPS_N = np.arange(50, 1001, 50)
COMMAND = 'python -m experiments.reproduce --study=toy --scale=smoke'


def arm(name: str, **kwargs) -> Arm:
  return Arm(name=name, title=f'the {name}', **kwargs)


def compare(name: str, against: str = 'baseline', **kwargs) -> Comparison:
  kwargs = {
      'measure': 'steps_to_target',
      'expect': 'less',
      'paper': 'half the steps [B]',
  } | kwargs
  return Comparison(arm=name, against=against, **kwargs)


def study(*arms: Arm, comparisons=(), **kwargs) -> Study:
  return Study(
      name='toy',
      title='A toy study',
      source='Figure 2a of Anil et al. 2018',
      question='Does it take fewer steps?',
      claim='Half the steps [B].',
      arms=arms or (arm('baseline'), arm('two', num_groups=2)),
      baseline='baseline',
      comparisons=tuple(comparisons),
      scales={'smoke': Scale(gin_files=('toy.gin',))},
      notes=('It depends on the formula.',),
      **kwargs,
  )


def settings(**kwargs) -> dict[str, Any]:
  """What `outcomes` gives of a study."""
  return {
      'data': 'made-up tokens',
      'scale': 'smoke',
      'example': 'token',
      'examples_per_row': 32,
      'group_batch': 16,
      'num_steps': 1000,
      'exchange_every': 25,
      'replicas': 1,
      'model_parameters': 123_456,
      'model': 'LSTM 256',
      'bytes_of_model': 493_824,
      'cores': 2,
      'platform': 'cpu',
      'device': 'cpu',
      'command': COMMAND,
      'seeds': 3,
      'rates': (0.001, 0.002),
      'runs': 9,
      'done': 9,
      'minutes': 12.5,
  } | kwargs


def run(
    name: str = 'baseline',
    seed: int = 0,
    *,
    speed: float = 1.0,
    shift: float = 0.0,
    noise: float = 0.004,
    groups: int = 1,
    received: float = 0.0,
    accuracy: bool = False,
    **kwargs,
) -> Run:
  """A loss that falls like a power of `speed` times the step.

  Noise depends on the seed alone, so that arms are paired by it.
  """
  rng = np.random.default_rng(seed)
  steps_N = kwargs.pop('steps_N', STEPS_N)
  draws_N = rng.standard_normal(len(steps_N))
  level = 0.01 * rng.standard_normal()
  loss_N = 3.0 + 4.0 * (speed * steps_N / 50) ** -0.5 + level + shift
  loss_N = loss_N + noise * draws_N
  values = {
      'rate': 0.002,
      'tuning': False,
      'accuracy_N': 1 - loss_N / 9 if accuracy else np.zeros(0),
      'examples_per_step': 16.0 * groups,
      'flops_N': 1e9 * groups * steps_N * (4 / 3 if groups > 1 else 1.0),
      'bytes_N': received * steps_N,
      'seconds': 10.0,
  }
  return Run(
      arm=name, seed=seed, steps_N=steps_N, loss_N=loss_N, **(values | kwargs)
  )


def runs(name: str = 'baseline', seeds: int = 3, **kwargs) -> list[Run]:
  return [run(name, seed, **kwargs) for seed in range(seeds)]
