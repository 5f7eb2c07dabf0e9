"""Figure 2b: the same data for all groups, or disjoint parts?"""

from ..study_plan import Arm, Study
from . import tasks

STUDY = Study(
    name='data_partition',
    title='The same data, or disjoint parts of it',
    source='Figure 2b of Anil et al. 2018',
    question=(
        'Is the gain that of soft targets, or that of what a peer knows of data'
        ' one has not seen?'
    ),
    claim=(
        'Two groups on the same data are only slightly better than the'
        ' baseline; on disjoint subsets they are much better [B].'
    ),
    arms=(
        tasks.BASELINE,
        Arm(
            'same',
            'two groups, the same data',
            bindings=(tasks.SHARED,),
            num_groups=2,
            communication='exchange',
        ),
        Arm(
            'disjoint',
            'two groups, disjoint data',
            num_groups=2,
            communication='exchange',
        ),
    ),
    baseline='baseline',
    comparisons=(
        tasks.loss('disjoint', 'less', 'same').by(
            'much better on disjoint data [B]'
        ),
        tasks.loss('same', 'less', 'baseline').by(
            'only slightly better on the same data [B]'
        ),
        tasks.steps('disjoint', 'less', 'baseline').by('half the steps [B]'),
    ),
    scales=tasks.SMALL_BATCH,
    notes=(
        'On the same data each group reads all documents, in an order of its'
        ' own.',
    ),
)
