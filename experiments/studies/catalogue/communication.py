"""Loss against bytes: what does it take to use more workers?"""

from ..study_plan import Arm, Study
from . import tasks

_INTERVALS = (2, 10, 50, 200, 250)


def _every(steps: int) -> Arm:
  return Arm(
      f'codistillation_{steps}',
      f'codistilled, every {steps} steps',
      bindings=(tasks.exchange_every(steps),),
      num_groups=2,
      workers=1,
      communication='exchange',
  )


def _diloco(workers: int, steps: int) -> Arm:
  control = ' (control)' if workers == 1 else ''
  return Arm(
      f'diloco_{workers}_every_{steps}',
      f'DiLoCo, {workers} worker{"s" * (workers > 1)}, every {steps}{control}',
      gin_files=(tasks.ABLATIONS + 'diloco.gin',),
      bindings=(f'Diloco.workers={workers}', f'Diloco.inner_steps={steps}'),
      workers=workers,
      communication='outer',
  )


def _at(*steps: int) -> dict:
  return {
      'arms': (
          'synchronous_1',
          'synchronous_2',
          *(f'codistillation_{n}' for n in steps),
          *(f'diloco_2_every_{n}' for n in steps),
          *(f'diloco_1_every_{n}' for n in steps),
      )
  }


STUDY = Study(
    name='communication',
    title='Loss against bytes communicated',
    source='not in the paper; DiLoCo is Douillard et al. 2023',
    question=(
        'What does each method make of two workers, and how many bytes must'
        ' each of them receive for it?'
    ),
    claim=(
        'Codistillation needs little communication: parameters now and then,'
        ' in place of gradients in every step [A]. DiLoCo matches synchronous'
        ' SGD with 500 times less communication, by its own account.'
    ),
    arms=(
        Arm('synchronous_1', 'one worker', workers=1),
        Arm(
            'synchronous_2',
            'synchronous, 2 workers',
            workers=2,
        ),
        *map(_every, _INTERVALS),
        *(_diloco(2, steps) for steps in _INTERVALS),
        *(_diloco(1, steps) for steps in _INTERVALS),
    ),
    baseline='synchronous_1',
    comparisons=(
        tasks.loss('codistillation_50', 'less', 'synchronous_1').by(
            'not in the paper at this batch: a second group helps'
        ),
        tasks.loss('codistillation_50', 'less', 'synchronous_2').by(
            'not in the paper at this batch: a second group or a second worker'
        ),
        tasks.loss('codistillation_50', 'less', 'diloco_2_every_50').by(
            'not in the paper'
        ),
        tasks.loss('diloco_2_every_50', 'less', 'diloco_1_every_50').by(
            'not in the paper: what the second worker of DiLoCo adds'
        ),
        tasks.loss('codistillation_2', 'less', 'synchronous_1').by(
            'not in the paper at this batch: a second group helps'
        ),
    ),
    scales=tasks.changed(
        tasks.SMALL_BATCH,
        smoke=_at(2),
        cpu=_at(50, 250),
        gpu=_at(10, 50, 200),
        paper=_at(50, 250),
    ),
    views=('bytes',),
    notes=(
        'Every worker has the same rows per update, and every arm the same'
        ' number of updates. DiLoCo and synchronous SGD end with one model,'
        ' codistillation with one for each group, of which one is served.',
        'DiLoCo with one worker is its control: what its outer optimiser does'
        ' without any communication. Its inner optimiser is that of all other'
        ' arms. Between its outer steps nobody has the mean of its workers, so'
        ' it is evaluated at outer steps alone.',
    ),
)
