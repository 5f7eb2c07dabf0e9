"""Figure 4: how often must groups exchange?"""

from ..study_plan import Arm, Study
from . import tasks

_INTERVALS = (2, 4, 5, 10, 25, 50, 100, 250)


def _every(steps: int) -> Arm:
  return Arm(
      f'every_{steps}',
      f'exchange every {steps} steps',
      bindings=(tasks.exchange_every(steps),),
      num_groups=2,
      communication='exchange',
      x=steps,
      series='two groups',
  )


def _at(*steps: int) -> dict:
  return {'arms': ('baseline', *(f'every_{n}' for n in steps))}


STUDY = Study(
    name='staleness',
    title='How stale teachers may be',
    source='Figure 4 of Anil et al. 2018',
    question='What is lost if groups exchange their parameters less often?',
    claim=(
        'Of exchanges every 50, 100 and 250 steps, 50 is best and longer ones'
        ' are slightly worse [B].'
    ),
    arms=(
        tasks.BASELINE,
        *map(_every, _INTERVALS),
    ),
    baseline='baseline',
    comparisons=(
        tasks.loss('every_100', 'more', 'every_50').by(
            '100 slightly worse than 50 [B]'
        ),
        tasks.loss('every_250', 'more', 'every_50').by(
            '250 slightly worse than 50 [B]'
        ),
        tasks.loss('every_50', 'more', 'every_5').by(
            'not in the paper at these intervals: longer is slightly worse'
        ),
        tasks.loss('every_4', 'more', 'every_2').by(
            'not in the paper at these intervals: longer is slightly worse'
        ),
    ),
    scales=tasks.changed(
        tasks.SMALL_BATCH,
        smoke=_at(2, 4),
        cpu=_at(10, 50, 100, 250),
        gpu=_at(10, 25, 50, 100),
        paper=_at(50, 100, 250),
    ),
    x_label='steps between exchanges',
    notes=(
        'The burn-in is a multiple of every interval, so that all arms have'
        ' their first teacher at the same step.',
        'In lockstep a teacher is 0 to n - 1 steps old at an interval of n:'
        ' (n - 1) / 2 on average.',
    ),
)
