"""The comparison of prediction files: flags, and what is made of them."""

import os
from collections.abc import Sequence

from absl import flags

from experiments.churn_study import prediction_files, results
from experiments.churn_study.prediction_files import Columns, Predictions

PREDICTIONS = flags.DEFINE_multi_string(
    'predictions',
    [],
    'Compare files instead of training: .npy, .csv, .tsv or .parquet of'
    ' probabilities, a model each. arm=path puts a model in an arm; arms are'
    ' compared with the first. Repeatable.',
)
_PREDICTION_COLUMN = flags.DEFINE_multi_string(
    'prediction_column',
    ['prediction'],
    'Column of a table with the probability of the positive class; or repeated,'
    ' one column for each class.',
)
_LABELS = flags.DEFINE_string(
    'labels',
    None,
    'File with labels, for log loss and error. Default: --label_column of the'
    ' prediction files, if they have it.',
)
_LABEL_COLUMN = flags.DEFINE_string(
    'label_column',
    'label',
    'Column of a table with the class, from 0; nothing for no labels.',
)
_ID_COLUMN = flags.DEFINE_string(
    'id_column', '', 'Column by which tables are joined; default: row by row.'
)
OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Directory for tables, page and plot; default: report/ in --workdir, or'
    ' nowhere for files.',
)

# Would act nowhere in a study.
ONLY_OF_FILES = ('prediction_column', 'labels', 'label_column', 'id_column')

_ONE_ARM = 'predictions'


def main() -> None:
  """Reads, prints, and writes where told."""
  columns = Columns(
      tuple(_PREDICTION_COLUMN.value), _LABEL_COLUMN.value, _ID_COLUMN.value
  )
  named = [_split_name(text) for text in PREDICTIONS.value]
  if len(named) < 2:
    raise ValueError('churn is between models: give --predictions twice')
  for again in (x for i, x in enumerate(named) if x in named[:i]):
    raise ValueError(
        f'{again[1]} is given twice; a model has no churn against itself'
    )
  labels = None
  if _LABELS.value:
    labels = prediction_files.read_labels(_LABELS.value, columns)
    columns = columns._replace(label='')
  models = [prediction_files.read(path, columns) for _, path in named]
  arrays, labels = prediction_files.join(models, labels)
  arms: dict[str, list] = {}
  for (arm, _), array in zip(named, arrays):
    arms.setdefault(arm, []).append(array)
  rows = results.summarise(arms, labels)
  # Here, since `--help` does without tables.
  from experiments.studies import churn_page

  churn_page.report_files(
      rows,
      pairs=_pairs(named, models),
      examples=len(arrays[0]),
      joined_by=columns.id,
      paths=[path for _, path in named],
      output=OUTPUT.value,
  )


def _split_name(text: str) -> tuple[str, str]:
  """`arm=path` as both; a path alone is of the one arm without a name."""
  name, equals, path = text.partition('=')
  if not equals or '/' in name:
    return _ONE_ARM, text
  if not name or not path:
    raise ValueError(f'--predictions={text}: expected path or arm=path')
  return name, path


def _pairs(
    named: Sequence[tuple[str, str]], models: Sequence[Predictions]
) -> dict[str, list[tuple[str, str]]]:
  """By arm, the files of each pair in the order of a figure's values."""
  paths = [os.path.abspath(model.name) for model in models]
  # Their names, if all lie in one directory.
  together = os.path.commonpath(map(os.path.dirname, paths))
  found: dict[str, list[str]] = {}
  for (arm, _), path in zip(named, paths):
    found.setdefault(arm, []).append(os.path.relpath(path, together))
  return {
      arm: [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
      for arm, names in found.items()
  }
