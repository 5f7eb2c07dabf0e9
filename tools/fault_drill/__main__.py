r"""Trains under faults: kills, suspensions, damaged publications, broken disks.

    python -m tools.fault_drill --minutes=20 --seed=0

Trains groups of one small model as `train_local` does, each in a process of its
own, and does harm to them at random for so many minutes, once all have begun.
Then they may finish, unharmed. Prints a table of the faults and what the
promises came to:

* no group ends other than by a fault that the drill asked for,
* no publication is used whose bits are not those its group published,
* no restart loses more than one checkpoint interval (beyond what the disk
  refused to save), and none any update after a stop that said it had saved,
* when the faults are over, groups publish, and take what their peers publish,
* every group reaches its last step.

With --workdir the result is also in <workdir>/drill.json. Exit status 1 if one
of them is broken. Linux only.
"""

import os
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from codistill_jax.storage import files
from experiments import cli
from tools.fault_drill import report
from tools.fault_drill.drill import Drill

_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Run directory, new or empty, which is kept; by default a temporary one,'
    ' deleted at the end.',
)
_NUM_GROUPS = flags.DEFINE_integer(
    'num_groups', 4, 'Groups of the run.', lower_bound=2
)
_MINUTES = flags.DEFINE_float(
    'minutes',
    5.0,
    'How long to do harm; starting and finishing take about a minute more.',
    lower_bound=0.1,
)
_SEED = flags.DEFINE_integer(
    'seed',
    0,
    'Of the faults: which, on whom, and when after the one before.',
    lower_bound=0,
)
_SECONDS_BETWEEN = flags.DEFINE_float(
    'seconds_between', 5.0, 'Between faults, on average.', lower_bound=0.1
)
_NUM_STEPS = flags.DEFINE_integer(
    'num_steps', 0, 'Updates of each group; 0: 2 for each second of harm.'
)


def main(argv: Sequence[str]) -> None:
  del argv
  if sys.platform != 'linux':
    raise ValueError(
        'the drill needs Linux (it limits the files of other processes), and'
        f' this is {sys.platform}; run it there'
    )
  stop = cli.StopRequest().install()
  with tempfile.TemporaryDirectory(prefix='drill_') as temporary:
    drill = Drill(
        # Of a name that is no pattern.
        _WORKDIR.value or os.path.join(temporary, 'run [1]'),
        temporary,
        num_groups=_NUM_GROUPS.value,
        seconds=60.0 * _MINUTES.value,
        seconds_between=_SECONDS_BETWEEN.value,
        num_steps=_NUM_STEPS.value or int(120 * _MINUTES.value),
        seed=_SEED.value,
    )
    result = drill.run(stop)
    cli.tell(report.describe(result))
    if _WORKDIR.value:
      files.write_json(os.path.join(_WORKDIR.value, 'drill.json'), result)
  if result['stopped']:
    raise cli.Stopped(cli.STOPPED, stop.signal_number)
  if result['broken']:
    sys.exit(cli.CLEAR_ERROR)


if __name__ == '__main__':
  cli.run(main)
