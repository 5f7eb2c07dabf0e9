"""Figure 3: an image classifier."""

from ..study_plan import Arm, Study
from . import tasks

STUDY = Study(
    name='image_codistillation',
    title='Codistillation of an image classifier',
    source='Figure 3 of Anil et al. 2018',
    question='Does a second group help an image classifier as well?',
    claim=(
        'ResNet-50 on ImageNet, with a batch of 16,384 for each group: 75 %'
        ' top-1 accuracy after 5,250 steps, against 7,250 for the baseline [C].'
    ),
    arms=(
        tasks.BASELINE,
        tasks.CODISTILLATION,
        tasks.TWO_ALONE,
        tasks.ENSEMBLE,
        Arm(
            'smoothing_uniform',
            'label smoothing',
            gin_files=(tasks.ABLATIONS + 'label_smoothing.gin',),
        ),
    ),
    baseline='baseline',
    comparisons=(
        tasks.steps('codistillation', 'less', 'baseline').by(
            '5,250 steps against 7,250 [C]'
        ),
        tasks.loss('codistillation', 'equal', 'ensemble').by(
            'close to the ensemble of two, as for the language model [B]'
        ),
        tasks.loss('codistillation', 'less', 'smoothing_uniform').by(
            'better than label smoothing, as for the language model [A]'
        ),
    ),
    scales=tasks.IMAGES,
    views=('speed-accuracy',),
    notes=(
        'Small data are read many times over. There codistillation also acts as'
        ' a regulariser, which is not what the paper claims for it.',
    ),
)
