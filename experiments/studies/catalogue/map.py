"""When does a second group pay? Steps against the batch, at three targets."""

from ..study_plan import Arm, Study
from . import tasks

_WORKERS = (1, 2, 4, 8, 16)


def _group(workers: int) -> Arm:
  return Arm(
      f'one_{workers}',
      f'one group of {workers}',
      workers=workers,
      x=workers,
      series='one group',
  )


def _two(workers: int) -> tuple[Arm, ...]:
  """Returns two groups of so many workers: codistilled, alone, ensemble."""
  codistilled, alone, ensemble = (
      arm._replace(
          name=f'{name}_{workers}',
          title=f'{title} of {workers}',
          workers=workers,
          x=workers,
          series=title,
      )
      for arm, name, title in (
          (tasks.CODISTILLATION, 'two', 'two groups'),
          (tasks.TWO_ALONE, 'alone', 'two groups alone'),
          (tasks.ENSEMBLE, 'ensemble', 'ensemble'),
      )
  )
  return (
      codistilled,
      alone._replace(tuned_as=f'one_{workers}'),
      ensemble._replace(ensemble_of=alone.name),
  )


def _at(*workers: int) -> dict:
  names = dict.fromkeys(n for w in workers for n in (w, 2 * w))
  kinds = ('two', 'alone', 'ensemble')
  return {
      'arms': (
          *(f'one_{w}' for w in names),
          *(f'{kind}_{w}' for w in workers for kind in kinds),
      ),
      'baseline': f'one_{workers[len(workers) // 2]}',
  }


STUDY = Study(
    name='map',
    title='When codistillation pays',
    source='the setting of Figures 1 and 2a of Anil et al. 2018',
    question=(
        'At which batch, and how early or late in training, does a second group'
        ' save more steps than a batch of twice the size?'
    ),
    claim=(
        'Where twice the batch has stopped to save steps, a second group halves'
        ' them [B].'
    ),
    arms=(
        *map(_group, (*_WORKERS, 2 * _WORKERS[-1])),
        *(arm for workers in _WORKERS for arm in _two(workers)),
    ),
    baseline='one_4',
    comparisons=tuple(
        tasks.steps(f'two_{w}', 'less', f'one_{2 * w}').by(
            'where a larger batch has stopped to help, a second group halves'
            ' the steps [B]'
        )
        for w in reversed(_WORKERS)
    ),
    scales=tasks.changed(
        tasks.LANGUAGE,
        smoke=_at(1),
        cpu={
            **_at(*_WORKERS),
            'gin_files': (tasks.GIN + 'lm_map_cpu.gin',),
            'worker_rows': 32,
            'rates': (8e-3,),
        },
        gpu={**_at(*_WORKERS), 'workers': 1, 'worker_rows': 64, 'seeds': 3},
        paper={**_at(*_WORKERS), 'worker_rows': 4096},
    ),
    x_label='workers of a group',
    views=('map',),
    notes=(
        'A worker is an equal share of the group batch. All arms make as many'
        ' updates; two groups read disjoint halves of the text.',
        'A target is a loss of the baseline on its way, the same for all'
        ' batches; what a run does not reach is no number.',
    ),
)
