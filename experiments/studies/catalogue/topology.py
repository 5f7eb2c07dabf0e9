"""Who learns from whom, with four groups."""

from ..study_plan import Arm, Study
from . import tasks


def _four(name: str, title: str, topology: str) -> Arm:
  return Arm(
      name,
      title,
      bindings=(f'Checkpoints.topology={topology}',),
      num_groups=4,
      workers=1,
      communication='exchange',
  )


STUDY = Study(
    name='topology',
    title='Who learns from whom',
    source='the discussion of Anil et al. 2018, as recalled',
    question=(
        'Of four groups, should each learn from all others, from one, or only'
        ' within its pair?'
    ),
    claim=(
        'Fully connected groups may become alike too fast; rings and other'
        ' topologies are proposed [C].'
    ),
    arms=(
        Arm('baseline', 'one group', workers=1),
        Arm(
            'two',
            'two groups',
            num_groups=2,
            workers=1,
            communication='exchange',
        ),
        _four('all', 'four groups, all', "'all'"),
        _four('ring', 'four groups, ring', "'ring'"),
        _four('pairs', 'four groups, two pairs', '[[1],[0],[3],[2]]'),
    ),
    baseline='baseline',
    comparisons=(
        tasks.loss('ring', 'equal', 'all').by(
            'not in the paper, which proposes rings: no worse'
        ),
        tasks.loss('pairs', 'more', 'all').by(
            'not in the paper: a pair knows half as much'
        ),
        tasks.loss('all', 'less', 'two').by(
            'not in the paper: more groups, more knowledge'
        ),
    ),
    scales=tasks.SMALL_BATCH,
    notes=(
        'The partition gives each group a quarter of the text (with two groups'
        ' a half).',
    ),
)
