"""Evaluates the groups of finished or running runs, alone and together.

    python -m experiments.evaluate --workdir=runs/two --workdir=runs/one

For each run: the validation metrics of each group, of the ensemble of its
groups (the mean of their probabilities), and churn and disagreement between
them. The run's own configuration is used, with what --gin_file and --gin say on
top; the figures are printed, and written to `<workdir>/report/comparison.json`,
where a report finds them. Those of other data (--data), of another step, of the
test split, of --all or of another configuration are written beside it.
"""

import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from codistill_jax import evaluate as evaluate_lib
from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory
from codistill_jax.storage import files
from codistill_jax.trained import (
    CHECKPOINTS,
    PUBLICATIONS,
    Run,
    open_run,
    read_variables,
)

from . import cli
from .reports import pages
from .reports.pages import number

_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  gin_utils.define_flags()
  cli.define_paths('workdir', 'Run directory; repeatable.', required=True)
  flags.DEFINE_enum(
      'source',
      CHECKPOINTS,
      [CHECKPOINTS, PUBLICATIONS],
      'Evaluate resume checkpoints or publications.',
  )
  cli.define_step_flags()
  flags.DEFINE_enum(
      'split',
      'validation',
      ['validation', 'test'],
      'Evaluate on this split, where the task has it.',
  )
  flags.DEFINE_string(
      'data',
      None,
      'Evaluate on other data than those of the run, which must have its'
      ' tokenizer, columns or classes: text (what prepare_data wrote, or a'
      ' source such as text:PATH), a table, Criteo rows (what prepare_clicks'
      ' wrote), or a directory of <class>/<images>. --split is of them, if they'
      ' are divided.',
  )
  flags.DEFINE_bool(
      'all',
      False,
      'Evaluate on the whole split, where the run takes a sample of it'
      ' (max_eval_batches, max_eval_examples).',
  )
  flags.DEFINE_integer(
      'eval_batch',
      None,
      'Rows of a batch; default: as in the run.',
      lower_bound=1,
  )


def main(argv: Sequence[str]) -> None:
  """Evaluates every run that is given."""
  del argv
  # What is found is written as a whole: there is nothing to save.
  cli.StopRequest('stopped; nothing is written of this run').install()
  for workdir in _FLAGS.workdir:
    run = open_run(
        workdir,
        *gin_utils.flag_values(),
        trusted=_FLAGS.trust,
        whole_splits=_FLAGS.all,
    )
    path = _output(workdir)
    files.check_writable(path.parent)
    comparison = compare(run)
    files.write_json(path, comparison)
    if _FLAGS.data:
      print(f'on {_FLAGS.data}:')
    print(describe(comparison))
    print(f'written to {path}\n')


def _output(workdir: str) -> epath.Path:
  """Returns where the figures go: a report shows those of the run as it is."""
  path = run_directory.comparison_path(workdir, _FLAGS.step, _FLAGS.split)
  other = '_other' * any(gin_utils.flag_values()) + '_all' * _FLAGS.all
  if data := _FLAGS.data:
    # Two data sets may have one last name.
    name = re.sub(r'[^\w.-]+', '_', os.path.basename(data.rstrip('/')))
    other += f'_on_{name[:40]}_{zlib.crc32(data.encode()):08x}'
  return path.with_stem(path.stem + other)


def compare(run: Run) -> dict[str, Any]:
  """Evaluates one run; returns the content of its comparison.json.

  Raises:
    FileNotFoundError: If there is no such checkpoint.
    ValueError: If a checkpoint cannot be used.
  """
  found = [
      read_variables(run, g, _FLAGS.source, _FLAGS.step) for g in run.groups
  ]
  rows = _FLAGS.eval_batch or run.experiment.eval_batch
  result = evaluate_lib.compare(
      run.model,
      [variables for _, variables in found],
      experiment_lib.split_batches(
          run.experiment.task, _FLAGS.split, rows, _FLAGS.data
      ),
      run.experiment.metrics,
  )
  names = [f'{run.arm}/group_{group}' for group in run.groups]
  return {
      'configuration': gin_utils.flag_arguments(),
      'data': _FLAGS.data,
      'models': {
          name: {'step': at, **metrics}
          for name, (at, _), metrics in zip(names, found, result.members)
      },
      'ensembles': {run.arm: result.ensemble} if len(names) > 1 else {},
      'pairs': {
          run.arm: [
              {
                  'a': f'group_{run.groups[a]}',
                  'b': f'group_{run.groups[b]}',
                  **metrics,
              }
              for (a, b), metrics in result.pairs.items()
          ]
      },
  }


_TITLES = {
    'eval/examples': 'examples',
    'eval/loss': 'loss (nats)',
    'eval/perplexity': 'perplexity',
    'eval/bits_per_byte': 'bits per byte',
    'eval/accuracy': 'accuracy',
    'eval/auc': 'AUC',
    'eval/calibration': 'calibration',
    'eval/calibration_error': 'calibration error',
}
_FORMS = {'eval/examples': ',.0f'}


def describe(comparison: dict[str, Any]) -> str:
  """Returns the comparison as aligned text."""
  ensembles = comparison['ensembles'].items()
  rows = comparison['models'] | {f'{k}/ensemble': v for k, v in ensembles}
  # A sigmoid output has no perplexity, others no AUC; some have metrics of
  # their own.
  known = dict.fromkeys(k for k in next(iter(rows.values())) if 'eval/' in k)
  keys = [
      key
      for key in _TITLES | known
      if all(key in metrics for metrics in rows.values())
  ]
  table = pages.to_text(
      [
          *('model', 'step'),
          *(_TITLES.get(key, key.removeprefix('eval/')) for key in keys),
      ],
      [
          [
              name,
              str(found.get('step', '-')),
              *(number(found[k], _FORMS.get(k, '.4f')) for k in keys),
          ]
          for name, found in rows.items()
      ],
  )
  pairs = (pair for found in comparison['pairs'].values() for pair in found)
  return '\n'.join([table, *map(_differences, pairs)])


def _differences(pair: dict[str, Any]) -> str:
  line = (
      f'{pair["a"]} and {pair["b"]}: churn (mean absolute difference)'
      f' {pair["churn/mean_abs"]:.4f}, disagreement'
      f' {pair["churn/disagreement"]:.2%}'
  )
  relative = pair.get('churn/relative_difference')
  return line if relative is None else f'{line}, relative {relative:.2%}'


if __name__ == '__main__':
  define_flags()
  cli.run(main)
