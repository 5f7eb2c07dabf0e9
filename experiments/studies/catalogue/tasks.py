"""The tasks of the studies at each scale, and bindings that arms share."""

import functools
from collections.abc import Mapping

from ..study_plan import Arm, Comparison, Scale

GIN = 'gin_configs/studies/'
ABLATIONS = 'gin_configs/ablations/'

# The workers of a group: at `paper` where more of them have stopped to help, by
# Figure 1; at `cpu` what two cores allow. That is about the critical batch that
# the study `sgd_scaling` fits: twice as many still save a fifth of the steps.
LANGUAGE = {
    'smoke': Scale(
        (GIN + 'lm_smoke.gin',),
        workers=2,
        worker_rows=2,
        seeds=2,
        rates=(8e-3,),
    ),
    'cpu': Scale(
        (GIN + 'lm_cpu.gin',),
        workers=4,
        worker_rows=64,
        seeds=3,
        rates=(8e-3, 1.6e-2),
    ),
    'gpu': Scale(
        (GIN + 'lm_gpu.gin',),
        workers=16,
        worker_rows=16,
        seeds=10,
        rates=(2e-3, 4e-3, 8e-3),
    ),
    'paper': Scale(
        (GIN + 'lm_paper.gin',),
        workers=128,
        worker_rows=128,
        seeds=3,
        rates=(5e-4, 1e-3, 2e-3),
    ),
}
IMAGES = {
    'smoke': Scale((GIN + 'images_smoke.gin',), seeds=2, rates=(3e-3,)),
    'cpu': Scale((GIN + 'images_cpu.gin',), seeds=3, rates=(1e-3, 3e-3)),
    'gpu': Scale((GIN + 'images_gpu.gin',), seeds=5, rates=(0.05, 0.1, 0.2)),
    'paper': Scale((GIN + 'images_paper.gin',), seeds=3, rates=(0.1,)),
}


def changed(
    scales: Mapping[str, Scale], **changes: Mapping[str, object]
) -> dict[str, Scale]:
  """Returns the scales, each with its own changes."""
  return {
      name: scale._replace(**changes.get(name, {}))
      for name, scale in scales.items()
  }


# For questions that a large batch says nothing about on two cores.
SMALL_BATCH = changed(
    LANGUAGE,
    cpu={
        'gin_files': (GIN + 'lm_small_cpu.gin',),
        'workers': 1,
        'worker_rows': 16,
        'rates': (8e-3,),
    },
)


# Arms of many studies.
BASELINE = Arm('baseline', 'one group')
CODISTILLATION = Arm(
    'codistillation',
    'two groups, codistilled',
    num_groups=2,
    communication='exchange',
)
TWO_ALONE = Arm(
    'alone',
    'two groups, no distillation',
    bindings=('schedules.distill_weight.weight=0.0',),
    num_groups=2,
    tuned_as='baseline',
)
ENSEMBLE = Arm('ensemble', 'ensemble of two', num_groups=2, ensemble_of='alone')
SHARED = "text.language_model_task.partition='shared'"


def exchange_every(steps: int) -> str:
  """Returns a binding."""
  return f'Checkpoints.every={steps}'


# Comparisons by steps to the target, and by the loss at the end.
steps = functools.partial(Comparison, measure='steps_to_target')
loss = functools.partial(Comparison, measure='final_loss')
