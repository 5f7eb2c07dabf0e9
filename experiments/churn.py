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

from . import cli
from .studies import retrains, study_plan, worker
from .studies.catalogue import churn as catalogue
from .studies.study_plan import Scale

_OF_FILES = ('prediction_column', 'labels', 'label_column', 'id_column')
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


_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  worker.define_flags()
  flags.DEFINE_integer(
      'retrains', 5, 'Independent retrains of each arm; at least 2.'
  )
  flags.DEFINE_list(
      'weights', ['1', '3', '6'], 'Distill weights; a codistilled arm each.'
  )
  flags.DEFINE_integer(
      'num_groups',
      2,
      'Groups of a codistilled arm, and members of an ensemble.',
  )
  flags.DEFINE_multi_string(
      'arm_gin',
      [],
      'A further arm: name=file.gin, a gin file on top of --gin_file, trained'
      ' alone; or name:groups=file.gin. Repeatable.',
  )
  flags.DEFINE_integer(
      'control_retrains',
      retrains.CONTROL_RETRAINS,
      'Retrains of the two controls with one seed fixed, that of the parameters'
      ' or that of the order of data; at least 2, or 0 for none.',
  )
  flags.DEFINE_multi_string(
      'predictions',
      [],
      'Compare files instead of training: .npy, .csv, .tsv or .parquet of'
      ' probabilities, a model each. arm=path puts a model in an arm; arms are'
      ' compared with the first. Repeatable.',
  )
  flags.DEFINE_multi_string(
      'prediction_column',
      ['prediction'],
      'Column of a table with the probability of the positive class; or'
      ' repeated, one column for each class.',
  )
  cli.define_path(
      'labels',
      None,
      'File with labels, for log loss and error. Default: --label_column of the'
      ' prediction files, if they have it.',
  )
  flags.DEFINE_string(
      'label_column',
      'label',
      'Column of a table with the class, from 0; nothing for no labels.',
  )
  flags.DEFINE_string(
      'id_column', '', 'Column by which tables are joined; default: row by row.'
  )


def main(argv: Sequence[str]) -> None:
  """Compares files, or trains and reports."""
  del argv
  if _FLAGS.predictions:
    if _FLAGS.workdir:
      raise ValueError(
          '--predictions and --workdir: compare files or train a study; leave'
          ' one out (--output says where a comparison is written)'
      )
    worker.refuse(_OF_STUDIES, 'belongs to a study, and would act nowhere')
    _compare_files()
    return
  if not _FLAGS.workdir:
    raise ValueError('give --workdir to train a study, or --predictions')
  worker.refuse(_OF_FILES, 'belongs to --predictions, and would act nowhere')
  planned = _plan()
  workdir = _FLAGS.workdir
  began = time.time()
  worker.train(cli.module_of('churn'), workdir, planned)
  if _FLAGS.worker:
    return
  cli.tell(f'trained in {(time.time() - began) / 60:.1f} min')
  from .studies import churn_page  # To train needs no tables.

  output = _FLAGS.output or os.path.join(workdir, 'report')
  churn_page.report(retrains.load_study(workdir), output, _FLAGS.note)


def _compare_files() -> None:
  from .studies import churn_page, prediction_files

  columns = prediction_files.Columns(
      tuple(_FLAGS.prediction_column), _FLAGS.label_column, _FLAGS.id_column
  )
  named = [_split_name(text) for text in _FLAGS.predictions]
  rows, pairs, examples = prediction_files.compare(
      named, columns, _FLAGS.labels
  )
  churn_page.report_files(
      rows,
      pairs=pairs,
      examples=examples,
      joined_by=columns.id,
      paths=[path for _, path in named],
      output=_FLAGS.output,
  )


def _split_name(text: str) -> tuple[str, str]:
  """Returns arm and path; a path alone is of the one arm without a name."""
  name, equals, path = text.partition('=')
  if not equals or '/' in name:
    return 'predictions', files.absolute(text)
  if not name or not path:
    raise ValueError(f'--predictions={text}: expected path or arm=path')
  return name, files.absolute(path)


def _plan() -> study_plan.StudyPlan:
  """Returns the plan of the study that the flags declare.

  Raises:
    ValueError: If they do not fit.
  """
  worker.check_least(retrains=2, num_groups=2, control_retrains=0)
  if _FLAGS.control_retrains == 1:
    raise ValueError(
        '--control_retrains=1: the first is a single model, which is no'
        ' control; set it to 0, or to 2 or more'
    )
  scale = Scale(tuple(gin_utils.flag_values()[0]), seeds=_FLAGS.retrains)
  study = catalogue.STUDY._replace(
      arms=retrains.arms(_weights(), _FLAGS.num_groups, _own_arms()),
      comparisons=(),
      scales={'own': scale},
  )
  return retrains.with_controls(
      study_plan.make_plan(study, 'own'), _FLAGS.control_retrains
  )


def _weights() -> list[float]:
  weights = worker.positive('weights', 'distill weight')
  if len({f'{weight:g}' for weight in weights}) < len(weights):
    raise ValueError(f'--weights={",".join(_FLAGS.weights)} names one twice')
  return weights


def _own_arms() -> dict[str, tuple[int, str]]:
  """Returns groups and gin file of each arm of --arm_gin, by name."""
  arms = {}
  for text in _FLAGS.arm_gin:
    label, _, path = text.partition('=')
    name, colon, groups = label.partition(':')
    groups = groups if colon else '1'
    if not path or not groups.isdecimal() or int(groups) < 1:
      raise ValueError(
          f'--arm_gin={text}; expected name=file.gin or name:groups=file.gin'
      )
    retrains.check_name(name)
    if name in arms:
      raise ValueError(f'--arm_gin: two arms are called {name!r}')
    arms[name] = (int(groups), path)
  return arms


if __name__ == '__main__':
  define_flags()
  cli.run(main)
