"""Table 1: do retrains of a codistilled model differ less?"""

import functools

from .. import retrains
from ..study_plan import Comparison, Scale, Study

_churn = functools.partial(Comparison, measure='churn')
_log_loss = functools.partial(Comparison, measure='log_loss')

STUDY = Study(
    name='churn',
    title='Prediction churn',
    source='Table 1 of Anil et al. 2018',
    question=(
        'By how much do the predictions of independent retrains differ, and how'
        ' much less if the model is codistilled?'
    ),
    claim=(
        'On Criteo, a DNN of log loss 0.4480 has a mean absolute difference'
        ' between retrains of 0.029; an ensemble of two 0.4461 and 0.019; a'
        ' two-way codistilled DNN 0.4458 and 0.019 [C]: 35 % less churn [B], at'
        ' the quality of the ensemble and the serving cost of one model.'
    ),
    arms=retrains.arms((1, 2), num_groups=2),
    predictions=True,
    baseline='single',
    comparisons=(
        _churn('codistilled_1', 'less', 'single').by('35 % less churn [B]'),
        _churn('codistilled_1', 'equal', 'ensemble').by(
            'as much as of an ensemble of two [C]'
        ),
        _log_loss('codistilled_1', 'less', 'single').by(
            'better than a single model [C]'
        ),
        _log_loss('codistilled_1', 'equal', 'ensemble').by(
            'at the quality of the ensemble [C]'
        ),
        _churn('codistilled_2', 'less', 'single').by(
            'not in the paper: a weight of 2'
        ),
        _log_loss('codistilled_2', 'less', 'ensemble').by(
            'not in the paper: a weight of 2'
        ),
    ),
    scales={
        'smoke': Scale(
            ('gin_configs/tasks/flights_dnn.gin',),
            ('STEPS=6', 'Checkpoints.every=2'),
            seeds=2,
        ),
        'cpu': Scale(('gin_configs/tasks/flights_dnn.gin',), seeds=5),
        'gpu': Scale(('gin_configs/tasks/flights_dnn.gin',), seeds=10),
        'paper': Scale(('gin_configs/tasks/criteo_dnn.gin',), seeds=5),
    },
)
