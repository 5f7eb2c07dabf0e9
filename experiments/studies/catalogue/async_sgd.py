"""Asynchronous SGD: what stale gradients do as workers are added."""

from ..study_plan import Arm, Study
from . import tasks

_WORKERS = (2, 4, 8, 32, 128)


def _asynchronous(workers: int) -> Arm:
  return Arm(
      f'asynchronous_{workers}',
      f'asynchronous, {workers} workers',
      gin_files=(tasks.ABLATIONS + 'asynchronous_sgd.gin',),
      bindings=(
          f'AsynchronousSgd.workers={workers}',
          "AsynchronousSgd.order='round_robin'",
      ),
      workers=workers,
      batch_workers=1,
      communication='server',
      x=workers,
      series='asynchronous',
  )


def _synchronous(workers: int) -> Arm:
  return Arm(
      f'synchronous_{workers}',
      f'synchronous, {workers} worker{"s" * (workers > 1)}',
      workers=workers,
      x=workers,
      series='synchronous',
  )


STUDY = Study(
    name='async_sgd',
    title='Asynchronous SGD',
    source='Figure 1 of Anil et al. 2018',
    question=(
        'Does SGD stay stable when each gradient is W - 1 updates old, as it is'
        ' with W workers that do not wait for each other?'
    ),
    claim=(
        'Asynchronous SGD with 32 and 128 workers was hard to keep stable, and'
        ' was dropped in favour of synchronous SGD [A].'
    ),
    arms=(
        _synchronous(1),
        *map(_asynchronous, _WORKERS),
    ),
    baseline='synchronous_1',
    comparisons=(
        tasks.loss('asynchronous_2', 'more', 'synchronous_1').by(
            'not in the paper: stale gradients are worse per update'
        ),
        tasks.loss('asynchronous_8', 'more', 'synchronous_1').by(
            'not in the paper: stale gradients are worse per update'
        ),
        tasks.loss('asynchronous_32', 'more', 'synchronous_1').by(
            'hard to keep stable with 32 workers [A]'
        ),
        tasks.loss('asynchronous_128', 'more', 'synchronous_1').by(
            'hard to keep stable with 128 workers [A]'
        ),
    ),
    scales=tasks.changed(
        tasks.SMALL_BATCH,
        smoke={'arms': ('synchronous_1', 'asynchronous_2')},
        cpu={
            'arms': (
                'synchronous_1',
                'asynchronous_2',
                'asynchronous_8',
                'asynchronous_32',
            )
        },
    ),
    x_label='workers',
    notes=(
        'A step is one update of the server, on the rows of one worker. W'
        ' workers make W of them in the time of one, as long as the server'
        ' keeps up: at an equal wall time, stand W times as far to the right.',
        'The workers are simulated exactly: each computes its gradient at the'
        ' parameters that it last pulled. Only the order in which they come is'
        ' assumed, here in turn, so that each gradient is W - 1 updates old.',
    ),
)
