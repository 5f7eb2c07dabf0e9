"""Two phases against one: what it costs to train the teachers first."""

from ..study_plan import Arm, Comparison, Study
from . import tasks

STUDY = Study(
    name='offline_distillation',
    title='Codistillation against distillation in two phases',
    source='Anil et al. 2018, as recalled',
    question=(
        'How many steps does it take in all, if two teachers are trained first'
        ' and a student after them?'
    ),
    claim=(
        'Distillation in two phases needs 27 K steps in all to an error that'
        ' codistillation reaches in 10 K [B] (18 K for the ensemble of two, 9 K'
        ' for the student [D]).'
    ),
    arms=(
        tasks.BASELINE,
        tasks.CODISTILLATION,
        tasks.TWO_ALONE._replace(name='teachers', title='two teachers alone'),
        Arm(
            'ensemble',
            'ensemble of the teachers',
            num_groups=2,
            ensemble_of='teachers',
        ),
        Arm(
            'student',
            'a student of both, afterwards',
            gin_files=(tasks.ABLATIONS + 'offline_distillation.gin',),
            # Its teachers have learnt all that they will.
            bindings=('schedules.distill_weight.burn_in_steps=0',),
            taught_by='teachers',
        ),
    ),
    baseline='baseline',
    comparisons=(
        Comparison(
            'codistillation', 'less', 'student', 'total_steps_to_target'
        ).by('10 K steps in all against 27 K [B]'),
        tasks.loss('student', 'less', 'baseline').by(
            'not in the paper as recalled: better than a model trained alone'
        ),
    ),
    scales=tasks.SMALL_BATCH,
    notes=(
        'The steps of both teachers count in full. Where they are trained at'
        ' the same time, on twice the hardware, the time is that of one of'
        ' them.',
    ),
)
