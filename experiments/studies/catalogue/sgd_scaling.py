"""Figures 1a and 1b: where do more workers stop helping?"""

from ..study_plan import Arm, Study
from . import tasks

_WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _one_group(workers: int) -> Arm:
  return Arm(
      f'sgd_{workers}',
      f'{workers} worker{"s" * (workers > 1)}',
      workers=workers,
      x=workers,
      series='one group',
  )


def _two_groups(workers: int) -> Arm:
  return Arm(
      f'codistilled_{workers}',
      f'two groups of {workers}',
      num_groups=2,
      workers=workers,
      communication='exchange',
      x=2 * workers,
      series='two groups',
  )


def _arms(workers: tuple[int, ...], groups_of: tuple[int, ...]) -> dict:
  one = tuple(f'sgd_{w}' for w in workers)
  return {'arms': one + tuple(f'codistilled_{w}' for w in groups_of)}


STUDY = Study(
    name='sgd_scaling',
    title='How far synchronous SGD scales, and what a second group adds',
    source='Figures 1a and 1b of Anil et al. 2018',
    question=(
        'From how many workers on do more of them save neither steps nor time,'
        ' and from where on is a second group the better use of them?'
    ),
    claim=(
        'Steps to a given error fall up to 128 workers; 256 bring nothing in'
        ' steps and are slower in wall time, by step time and tail latency [B].'
        ' The strongest baseline is 128 workers [A]; two groups of it halve the'
        ' steps [B].'
    ),
    arms=tuple(map(_one_group, _WORKERS)) + tuple(map(_two_groups, _WORKERS)),
    baseline='sgd_1',
    comparisons=(
        tasks.steps('sgd_2', 'less', 'sgd_1').by(
            'far from the limit, twice the workers save steps [B]'
        ),
        tasks.steps('sgd_8', 'equal', 'sgd_4').by(
            'at the limit, twice the workers save none [B]'
        ),
        tasks.steps('codistilled_4', 'less', 'sgd_8').by(
            'there, a second group does [B]'
        ),
        tasks.steps('sgd_32', 'equal', 'sgd_16').by(
            'at the limit, twice the workers save none [B]'
        ),
        tasks.steps('codistilled_16', 'less', 'sgd_32').by(
            'there, a second group does [B]'
        ),
        tasks.steps('sgd_256', 'equal', 'sgd_128').by(
            '256 workers bring nothing over 128 [B]'
        ),
        tasks.steps('codistilled_128', 'less', 'sgd_128').by(
            'half the steps [B]'
        ),
    ),
    scales=tasks.changed(
        tasks.LANGUAGE,
        smoke=_arms((1, 2), (1,)),
        cpu={**_arms((1, 2, 4, 8), (4,)), 'seeds': 3},
        gpu=_arms((1, 2, 4, 8, 16, 32, 64), (4, 16, 32)),
        paper={
            **_arms((32, 64, 128, 256), (128,)),
            'baseline': 'sgd_32',
        },
    ),
    x_label='workers',
    views=('latency',),
    notes=(
        'A worker is 1 / W of the group batch: synchronous SGD with W workers'
        ' takes the gradient of the whole batch, whoever computes it.',
    ),
)
