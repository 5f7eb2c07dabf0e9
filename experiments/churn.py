r"""Prediction churn: how far independent retrains of a model differ.

Trains a study and makes Table 1 of Anil et al. 2018 of it, with a plot:

    python -m experiments.churn --workdir=runs/churn \
        --gin_file=gin_configs/tasks/flights_dnn.gin --weights=1,3,6 --jobs=2

Or compares the predictions of anybody's models:

    python -m experiments.churn --predictions=a.npy --predictions=b.npy \
        --labels=labels.npy

Stopped or killed, the first goes on where it was when started again.
"""

import os
import time
from collections.abc import Sequence

from absl import flags

from codistill_jax import gin_utils
from codistill_jax.storage import files
from experiments import cli, side_by_side
from experiments.churn_study import comparison, run_files
from experiments.stopping import Rescue, StopRequest

flags.adopt_module_key_flags(gin_utils)
flags.adopt_module_key_flags(comparison)

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the study: predictions and report.'
)
_RETRAINS = flags.DEFINE_integer(
    'retrains', 5, 'Independent retrains of each arm; at least 2.'
)
_WEIGHTS = flags.DEFINE_list(
    'weights', ['1', '3', '6'], 'Distill weights; a codistilled arm each.'
)
_NUM_GROUPS = flags.DEFINE_integer(
    'num_groups', 2, 'Groups of a codistilled arm, and members of an ensemble.'
)
_ARM_GIN = flags.DEFINE_multi_string(
    'arm_gin',
    [],
    'A further arm: name=file.gin, a gin file on top of --gin_file, trained'
    ' alone; or name:groups=file.gin. Repeatable.',
)
_CONTROL_RETRAINS = flags.DEFINE_integer(
    'control_retrains',
    3,
    'Retrains of the two controls with one seed fixed, that of the parameters'
    ' or that of the order of data; at least 2, or 0 for none.',
)
_REPLICAS = flags.DEFINE_integer(
    'replicas', 1, 'Devices to use, by every group in turn; 0 means all.'
)
_JOBS = flags.DEFINE_integer(
    'jobs',
    1,
    'Processes that train runs side by side. With more than one, each has its'
    ' share of the CPU cores for itself.',
)
_WORKER = flags.DEFINE_string(
    'worker', '', 'Set by --jobs for each process: its number/their number.'
)
_NOTE = flags.DEFINE_string(
    'note', '', 'A sentence for the head of the page, such as on the data.'
)

# Without --workdir, which is refused in words of its own.
_OF_STUDIES = (
    'retrains',
    'weights',
    'num_groups',
    'arm_gin',
    'control_retrains',
    'replicas',
    'jobs',
    'note',
    'gin_file',
    'gin',
)


def main(argv: Sequence[str]) -> None:
  """Compares files, or trains and reports."""
  del argv
  if comparison.PREDICTIONS.value:
    if _WORKDIR.value:
      raise ValueError(
          '--predictions and --workdir: compare files or train a study; leave'
          ' one out (--output says where a comparison is written)'
      )
    _refuse_flags_of('a study', _OF_STUDIES)
    comparison.main()
    return
  if not _WORKDIR.value:
    raise ValueError('give --workdir to train a study, or --predictions')
  _refuse_flags_of('--predictions', comparison.ONLY_OF_FILES)
  _check_flags()
  workdir = _WORKDIR.value
  if not files.is_remote(workdir):
    workdir = os.path.abspath(workdir)
  if _WORKER.value:
    _work(workdir)
    return
  began = time.time()
  if _JOBS.value > 1:
    before = run_files.claimed_at(workdir)
    side_by_side.run(
        'experiments.churn',
        _JOBS.value,
        StopRequest().install(),
        accepted=lambda: run_files.claimed_at(workdir) != before,
    )
  else:
    _work(workdir)
  left = [
      run.name for run in _runs() if run_files.read_record(workdir, run) is None
  ]
  if left:
    cli.tell(
        f'{left[0]} is in the hands of another process, which makes the report'
        ' in the end; or start this command again'
    )
    return
  cli.tell(f'trained in {(time.time() - began) / 60:.1f} min')
  from experiments.studies import churn_page

  churn_page.report(workdir, comparison.OUTPUT.value, _NOTE.value)


def _refuse_flags_of(what: str, names: Sequence[str]) -> None:
  """A flag that acts nowhere is a mistake."""
  for name in names:
    if flags.FLAGS[name].present:
      raise ValueError(
          f'--{name} belongs to {what}, and would act nowhere; leave it out'
      )


def _check_flags() -> None:
  for flag, least in (
      (_RETRAINS, 2),
      (_NUM_GROUPS, 2),
      (_JOBS, 1),
      (_CONTROL_RETRAINS, 0),
      (_REPLICAS, 0),
  ):
    if flag.value < least:
      raise ValueError(f'--{flag.name}={flag.value}; set it to {least} or more')
  if _CONTROL_RETRAINS.value == 1:
    raise ValueError(
        '--control_retrains=1: the first is a single model, which is no'
        ' control; set it to 0, or to 2 or more'
    )
  _runs()


def _runs() -> list[run_files.Run]:
  weights = []
  for text in _WEIGHTS.value:
    try:
      weights.append(float(text))
    except ValueError:
      weights.append(-1.0)
    if not 0 < weights[-1] < float('inf'):
      raise ValueError(
          f'--weights: {text!r} is no distill weight; give numbers above 0,'
          ' such as --weights=1,3,6'
      )
  if len(set(map(run_files.codistilled, weights))) < len(weights):
    raise ValueError(f'--weights={",".join(_WEIGHTS.value)} names one twice')
  return run_files.plan(
      _RETRAINS.value,
      weights,
      num_groups=_NUM_GROUPS.value,
      own={name: groups for name, (groups, _) in _own_arms().items()},
      control_retrains=_CONTROL_RETRAINS.value,
  )


def _own_arms() -> dict[str, tuple[int, str]]:
  """Groups and gin file of each arm of --arm_gin, by name."""
  arms = {}
  for text in _ARM_GIN.value:
    label, _, path = text.partition('=')
    name, colon, groups = label.partition(':')
    groups = groups if colon else '1'
    if not path or not groups.isdecimal() or int(groups) < 1:
      raise ValueError(
          f'--arm_gin={text}; expected name=file.gin or name:groups=file.gin'
      )
    run_files.check_name(name)
    if name in arms:
      raise ValueError(f'--arm_gin: two arms are called {name!r}')
    arms[name] = (int(groups), path)
  return arms


def _work(workdir: str) -> None:
  """Trains what is not done, in this process."""
  jobs = side_by_side.take_cores(_WORKER.value)
  line = 'stopped; the same command goes on from here'
  stop = StopRequest(Rescue(line)).install()
  # Not at the top: to compare files needs no jax.
  from experiments import devices
  from experiments.churn_study import worker

  if _REPLICAS.value > 1:
    devices.use_replicas(_REPLICAS.value)
  own = _own_arms()
  trainers = worker.Trainers(
      workdir,
      *gin_utils.flag_values(),
      own={name: path for name, (_, path) in own.items()},
      devices=lambda: devices.chosen_devices(_REPLICAS.value),
  )
  study = worker.describe_study(
      trainers,
      num_groups=_NUM_GROUPS.value,
      command=os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
  )
  worker.claim(workdir, study)
  worker.train_all(workdir, _runs(), trainers, stop, jobs)
  stop.uninstall()


if __name__ == '__main__':
  cli.run(main)
