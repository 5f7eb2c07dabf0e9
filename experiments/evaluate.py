"""Evaluates the groups of finished or running runs, alone and together.

    python -m experiments.evaluate --workdir=runs/two --workdir=runs/one

For each run: the validation metrics of each group, of the ensemble of its
groups (the mean of their probabilities), and churn and disagreement between
them. The run's own configuration is used, with what --gin_file and --gin say on
top; the figures are printed, and written to `<workdir>/report/comparison.json`,
where a report finds them. Those of another step, of the test split, of --all or
of another configuration are written beside it.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath

from codistill_jax import evaluate as evaluate_lib
from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory
from codistill_jax.base import Model, TrainState, Variables
from codistill_jax.exchange import publications
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.resume import ResumeCheckpoints

from . import cli
from .reports import pages
from .reports.pages import number

CHECKPOINTS, PUBLICATIONS = 'checkpoints', 'publications'


class EvaluatedRun(NamedTuple):
  """A run directory, its configuration and the groups found in it."""

  workdir: str
  arm: str
  experiment: experiment_lib.Experiment
  model: Model
  num_groups: int
  groups: list[int]


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
  flags.DEFINE_integer(
      'step', None, 'Evaluate this step of every group; default: its newest.'
  )
  flags.DEFINE_enum(
      'split',
      'validation',
      ['validation', 'test'],
      'Evaluate on this split, where the task has it.',
  )
  flags.DEFINE_bool(
      'all',
      False,
      'Evaluate on the whole split, where the run takes a sample of it'
      ' (max_eval_batches, max_eval_examples).',
  )
  flags.DEFINE_multi_string(
      'trust',
      [],
      'Module of your own that the config.gin of a run may name, as mine.tasks;'
      ' repeatable. Whoever can write in a run directory wrote that file, so it'
      ' may name only what makes a run (models, tasks, optimisers), and what'
      ' the --gin_file of this command import; see SECURITY.md.',
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
    run = open_run(workdir)
    path = _output(workdir)
    files.check_writable(path.parent)
    comparison = compare(run)
    files.write_json(path, comparison)
    print(describe(comparison))
    print(f'written to {path}\n')


def _output(workdir: str) -> epath.Path:
  """Returns where the figures go: a report shows those of the run as it is."""
  path = run_directory.comparison_path(workdir, _FLAGS.step, _FLAGS.split)
  other = '_other' * any(gin_utils.flag_values()) + '_all' * _FLAGS.all
  return path.with_stem(path.stem + other)


def compare(run: EvaluatedRun) -> dict[str, Any]:
  """Evaluates one run; returns the content of its comparison.json.

  Raises:
    FileNotFoundError: If there is no such checkpoint.
    ValueError: If a checkpoint cannot be used.
  """
  found = [load(run, g, _FLAGS.source, _FLAGS.step) for g in run.groups]
  rows = _FLAGS.eval_batch or run.experiment.eval_batch
  result = evaluate_lib.compare(
      run.model,
      [variables for _, variables in found],
      experiment_lib.split_batches(run.experiment.task, _FLAGS.split, rows),
  )
  names = [f'{run.arm}/group_{group}' for group in run.groups]
  return {
      'configuration': gin_utils.flag_arguments(),
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


def open_run(workdir: str) -> EvaluatedRun:
  """Opens a run directory; makes what its own configuration says."""
  groups = run_directory.list_groups(workdir)
  config = run_directory.config_path(workdir)
  if not groups or not config.exists():
    raise FileNotFoundError(
        f'{workdir} holds no trained group yet (no {config.name}); train one'
        ' first, or check --workdir'
    )
  gin_files, bindings = gin_utils.flag_values()
  saved = {'saved': config, 'trusted': _FLAGS.trust}
  gin_utils.parse(gin_files, bindings, **saved)
  if _FLAGS.all:
    names = [s.partition(' = ')[0] for s in gin_utils.configuration()]
    bindings += [f'{name}=None' for name in names if '.max_eval_' in name]
    gin_utils.parse(gin_files, bindings, **saved)
  experiment = gin_utils.make(experiment_lib.Experiment)
  facts = run_directory.read_run(workdir)
  arm = facts.get('arm', os.path.basename(workdir))
  model = gin_utils.call(experiment_lib.make_model, experiment)
  num_groups = facts.get('num_groups', len(groups))
  return EvaluatedRun(workdir, arm, experiment, model, num_groups, groups)


def load(
    run: EvaluatedRun, group_id: int, source: str, step: int | None
) -> tuple[int, Variables]:
  """Reads the step and variables of one checkpoint or publication."""
  if source == PUBLICATIONS:
    root = checkpoints.absolute(run_directory.exchange_root(run.workdir))
    steps = publications.published_steps(root, group_id)
  else:
    directory = run_directory.checkpoints_dir(run.workdir, group_id)
    steps = checkpoints.completed_steps(directory)
  wanted = max(steps, default=None) if step is None else step
  if wanted not in steps:
    raise FileNotFoundError(
        f'group {group_id} of {run.workdir} has no {source} of step'
        f' {"any" if wanted is None else wanted}; there are: {steps or "none"}'
    )
  like = _like(run, group_id)
  if source == PUBLICATIONS:
    _, variables = publications.read(
        root,
        group_id,
        wanted,
        like=like.variables,
        identity=run.experiment.task.identity,
        dtype='float32',
    )
    return wanted, variables
  resume = ResumeCheckpoints(directory, identity=run.experiment.task.identity)
  return wanted, resume.read(wanted, like).state.variables


def _like(run: EvaluatedRun, group_id: int) -> TrainState:
  """Returns the shapes of a group's state."""
  experiment = run.experiment
  row = experiment_lib.first_row(experiment, run.num_groups)
  return jax.eval_shape(
      lambda: experiment_lib.init_state(
          experiment,
          run.model,
          jax.random.PRNGKey(0),
          row,
          num_peers=experiment.exchange.num_teachers(group_id, run.num_groups),
      )
  )


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
  # A sigmoid output has no perplexity, others no AUC.
  keys = [k for k in _TITLES if all(k in metrics for metrics in rows.values())]
  table = pages.to_text(
      ['model', 'step', *(_TITLES[key] for key in keys)],
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
