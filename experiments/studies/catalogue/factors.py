"""What does a second group's help depend on? One setting at a time."""

from ..study_plan import Arm, Factor, Study
from . import tasks

_WEIGHT = 'schedules.distill_weight.weight'
_BURN_IN = 'schedules.distill_weight.burn_in_steps'
_RAMP = 'schedules.distill_weight.ramp_steps'

# Of the groups that codistil alone: words, bindings.
_OF_TWO = {
    'weight_half': ('distill weight 0.5', (f'{_WEIGHT}=0.5',)),
    'weight_2': ('distill weight 2', (f'{_WEIGHT}=2.0',)),
    **{
        f'ramp_{n}': (f'a ramp of {n:,} steps', (f'{_RAMP}={n}',))
        for n in (2, 250, 800, 4000)
    },
    **{
        f'burn_in_{n}': (f'burn-in of {n:,} steps', (f'{_BURN_IN}={n}',))
        for n in (0, 6, 500, 750, 1600, 2400, 8000, 12000)
    },
    **{
        f'every_{n}': (f'exchange every {n} steps', (tasks.exchange_every(n),))
        for n in (2, 10, 250)
    },
    'shared': ('the same data', (tasks.SHARED,)),
    'four': ('four groups', ()),
}
# Of one group too.
_OF_ALL = {
    'decay': (
        'rate decayed to 0',
        (
            'optax.adam.learning_rate=@schedules.warmup_cosine()',
            'schedules.warmup_cosine.learning_rate=%RATE',
            'schedules.warmup_cosine.total_steps=%STEPS',
        ),
    ),
    'dropout': ('dropout 0.1', ('lstm.language_model.dropout=0.1',)),
}
_POINTS = (1, 4)


def _name(number: str, workers: int, change: str = '') -> str:
  return '_'.join(filter(None, (number, str(workers), change)))


def _point(workers: int) -> tuple[list[Arm], list[Factor]]:
  """Returns the arms and rows of a batch of so many workers."""

  def of(number: str, name: str, change: str, bindings: tuple) -> Arm:
    kind = tasks.BASELINE if number == 'one' else tasks.CODISTILLATION
    return kind._replace(
        name=_name(number, workers, name),
        title=f'{number} of {workers}' + (f', {change}' if change else ''),
        bindings=bindings,
        workers=workers,
        x=workers,
        series=f'{number} {name}',
        num_groups=4 if name == 'four' else kind.num_groups,
    )

  one, two = of('one', '', '', ()), of('two', '', '', ())
  arms = [one, two]
  where = f'a batch of {workers} worker{"s" * (workers > 1)}'
  factors = [Factor(where, 'nothing', two.name, one.name, two.name)]
  for name, (change, bindings) in (_OF_TWO | _OF_ALL).items():
    controls = [of('one', name, change, bindings)] if name in _OF_ALL else []
    changed = of('two', name, change, bindings)
    arms += [*controls, changed]
    against = (controls or [one])[0].name
    factors.append(Factor(where, change, changed.name, against, two.name))
  return arms, factors


def _at(every: tuple, burn_in: tuple, ramp: int, *points: int) -> dict:
  names = ['', 'weight_half', 'weight_2', f'ramp_{ramp}']
  names += [f'burn_in_{n}' for n in burn_in] + [f'every_{n}' for n in every]
  names += ['shared', 'four', *_OF_ALL]
  controls = ['', *_OF_ALL]
  wanted = [
      _name(number, workers, name)
      for workers in points or _POINTS
      for number, of in (('one', controls), ('two', names))
      for name in of
  ]
  return {'arms': tuple(wanted)}


_ARMS, _FACTORS = zip(*map(_point, _POINTS))

STUDY = Study(
    name='factors',
    title='What the help of a second group depends on',
    source='the setting of Figures 1 and 2a of Anil et al. 2018',
    question=(
        'At a small batch, where two groups end ahead of one, and at a larger'
        ' one, where they end behind it: what does each setting change?'
    ),
    claim=(
        'Stale predictions do not matter much, and disjoint data help [B].'
        ' Sodhani et al. 2020 find that codistillation regularises, so that'
        ' explicit regularisation is to be reduced with it.'
    ),
    arms=(*_ARMS[0], *_ARMS[1]),
    baseline=_name('one', _POINTS[0]),
    comparisons=tuple(
        tasks.loss(_name('two', w), 'less', _name('one', w)).by(
            'a second group helps at the same number of steps [B]'
        )
        for w in _POINTS
    ),
    scales=tasks.changed(
        tasks.LANGUAGE,
        smoke=_at((2,), (0, 6), 2, 1),
        cpu={
            **_at((10, 250), (0, 500, 750), 250),
            'gin_files': (tasks.GIN + 'lm_map_cpu.gin',),
            'worker_rows': 32,
            'rates': (8e-3,),
        },
        gpu={
            **_at((10, 250), (0, 1600, 2400), 800),
            'workers': 1,
            'worker_rows': 64,
            'seeds': 3,
            'rates': (4e-3,),
        },
        paper={
            **_at((10, 250), (0, 8000, 12000), 4000),
            'worker_rows': 4096,
            'rates': (1e-3,),
        },
    ),
    factors=(*_FACTORS[0], *_FACTORS[1]),
    notes=(
        'A worker is an equal share of the group batch. On the map of batches'
        ' two groups end ahead of one at the smaller of the two, and behind it'
        ' at the larger; at still larger ones they end further behind, and take'
        ' longer.',
    ),
)
