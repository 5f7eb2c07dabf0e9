"""Figure 2a: does a second group learn faster than more workers would?"""

from ..study_plan import Arm, Study
from . import tasks

STUDY = Study(
    name='lm_codistillation',
    title='Codistillation of a language model',
    source='Figure 2a of Anil et al. 2018',
    question=(
        'At a batch where synchronous SGD gains little from a larger one, does'
        ' a second group that codistils reach a given loss in fewer steps?'
    ),
    claim=(
        "Two groups of 128 workers reach the baseline's best validation error"
        ' in half the steps [B], close to the ensemble of two [B], and clearly'
        ' better than label smoothing [A] with the uniform and with the unigram'
        ' distribution [C].'
    ),
    arms=(
        tasks.BASELINE,
        Arm(
            'twice_the_batch',
            'one group, twice the batch',
            times=2,
        ),
        tasks.CODISTILLATION,
        tasks.TWO_ALONE,
        tasks.ENSEMBLE,
        Arm(
            'smoothing_uniform',
            'label smoothing, uniform',
            gin_files=(tasks.ABLATIONS + 'label_smoothing.gin',),
        ),
        Arm(
            'smoothing_unigram',
            'label smoothing, unigram',
            gin_files=(tasks.ABLATIONS + 'label_smoothing_unigram.gin',),
        ),
    ),
    baseline='baseline',
    comparisons=(
        tasks.steps('codistillation', 'less', 'baseline').by(
            'half the steps [B]'
        ),
        tasks.steps('codistillation', 'less', 'twice_the_batch').by(
            'a larger batch had stopped helping, a second group had not [B]'
        ),
        tasks.loss('codistillation', 'equal', 'ensemble').by(
            'close to the ensemble of two [B]'
        ),
        tasks.loss('codistillation', 'less', 'smoothing_uniform').by(
            'clearly better than label smoothing [A]'
        ),
        tasks.loss('codistillation', 'less', 'smoothing_unigram').by(
            'clearly better than label smoothing [A]'
        ),
    ),
    scales=tasks.LANGUAGE,
    notes=(
        'The groups read disjoint halves of the text, so two groups have seen'
        ' twice the examples of one by the same step, as in the paper. The'
        ' second comparison gives one group as many.',
    ),
)
