"""Loss against bytes: what does it take to use more workers?"""

from experiments.studies.catalogue import tasks
from experiments.studies.declaration import Arm, Comparison, Study

_INTERVALS = (2, 10, 50, 250)


def _every(steps: int) -> Arm:
  return Arm(
      f'codistillation_{steps}',
      f'codistilled, every {steps} steps',
      bindings=(tasks.exchange_every(steps),),
      num_groups=2,
      workers=1,
      communication='exchange',
  )


def _diloco(workers: int, name: str, title: str) -> Arm:
  return Arm(
      name,
      title,
      gin_files=(tasks.ABLATIONS + 'diloco.gin',),
      bindings=(
          f'Diloco.workers={workers}',
          'Diloco.inner_steps=%INNER_STEPS',
      ),
      workers=workers,
      communication='outer',
  )


_ARMS = ('synchronous_1', 'synchronous_2', 'diloco_1', 'diloco_2')


def _at(*steps: int) -> dict:
  return {'arms': _ARMS + tuple(f'codistillation_{n}' for n in steps)}


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
            communication='all_reduce',
        ),
        *map(_every, _INTERVALS),
        _diloco(2, 'diloco_2', 'DiLoCo, 2 workers'),
        _diloco(1, 'diloco_1', 'DiLoCo, 1 worker (control)'),
    ),
    baseline='synchronous_1',
    comparisons=(
        Comparison(
            'codistillation_50',
            'synchronous_1',
            'final_loss',
            'less',
            'a second group helps [B]',
        ),
        Comparison(
            'codistillation_50',
            'synchronous_2',
            'final_loss',
            'less',
            'where synchronous SGD has stopped to, it helps more [B]',
        ),
        Comparison(
            'codistillation_50',
            'diloco_2',
            'final_loss',
            'less',
            'not in the paper',
        ),
        Comparison(
            'diloco_2',
            'diloco_1',
            'final_loss',
            'less',
            'not in the paper: what the second worker of DiLoCo adds',
        ),
        Comparison(
            'codistillation_2',
            'synchronous_1',
            'final_loss',
            'less',
            'a second group helps [B]',
        ),
    ),
    scales=tasks.changed(
        tasks.LANGUAGE,
        smoke=_at(2),
        cpu=_at(10, 50, 250),
        gpu=_at(10, 50, 250),
        paper=_at(50, 250),
    ),
    views=('bytes',),
    notes=(
        'Every worker has the same rows per update, and every arm the same'
        ' number of updates. DiLoCo and synchronous SGD end with one model,'
        ' codistillation with one for each group, of which one is served.',
        'DiLoCo with one worker is its control: what its outer optimiser does'
        ' without any communication.',
    ),
)
