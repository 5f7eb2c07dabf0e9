"""What a report of churn says in words; every number comes from the files."""

from collections.abc import Mapping, Sequence

import numpy as np

from codistill_jax import statistics
from experiments.churn_study import run_files, tabular
from experiments.churn_study.figures import Row
from experiments.churn_study.results import ENSEMBLE, Repeat, Study

DEFINITIONS = (
    'Mean absolute difference between retrains: |p - q| of the positive class'
    ' on the same examples, meaned over examples and over pairs of retrains;'
    ' total variation for more than two classes.',
    'Relative difference: 2 |p - q| / (p + q), of the positive class, or of the'
    ' label for more than two classes. Disagreement: the share of examples'
    ' whose most probable classes differ.',
    'Intervals are for the mean over retrains of the same kind: the standard'
    ' error of a bootstrap that resamples retrains, not pairs, with the'
    " quantile of Student's t; seeded.",
)

CONTROLS = (
    'Which seed makes the churn: retrains that share the order of the data or'
    ' the parameters at the start, beside as many that share neither.'
)


def split_of(study: Study) -> str:
  """The split of the table, before the name of a figure."""
  return 'test ' if study.settings['has_test_split'] else 'validation '


def summary(study: Study) -> str:
  """The result in a sentence or two."""
  rows = {row.arm: row for row in study.table}
  single, ensemble = rows[run_files.SINGLE], rows[ENSEMBLE]
  found = rows.get(study.chosen)
  if found is None:
    return (
        f'Churn of the {ensemble.title}, against the single model:'
        f' {tabular.percent(ensemble.change)}.'
    )
  loss = lambda row: tabular.number('log_loss', row.figures['log_loss'].mean)
  worse = found.figures['log_loss'].mean > ensemble.figures['log_loss'].mean
  return (
      f'Churn of the model {found.title}, against the single model:'
      f' {tabular.percent(found.change)}; of the {ensemble.title}:'
      f' {tabular.percent(ensemble.change)}. Its'
      f' {split_of(study)}log loss is {loss(found)},'
      f' {"worse" if worse else "no worse"} than the {loss(ensemble)} of the'
      f' {ensemble.title} ({_difference(found, ensemble)}); the single model'
      f' has {loss(single)}.'
  )


def _difference(row: Row, other: Row) -> str:
  """Of log losses; retrains of one number share their seeds."""
  ours, theirs = (np.array(r.figures['log_loss'].values) for r in (row, other))
  if len(ours) != len(theirs):
    return 'arms of different size'
  figure = statistics.mean_over_retrains(ours - theirs)
  said = tabular.interval('log_loss', figure)
  return f'difference {said.replace(" [-]", "")}'


def chosen(study: Study) -> str:
  """How the weight was chosen."""
  said = 'No codistilled arm was trained.'
  if study.chosen is not None:
    weight = run_files.weight_of(study.chosen)
    said = (
        f'Distill weight {weight:g} was chosen on validation: {study.reason}.'
    )
  if not study.settings['has_test_split']:
    said += ' The task has no test split: the table is of validation.'
  elif study.chosen is not None:
    said += ' The table is of the same retrains, on other examples.'
  return said


def notes(study: Study) -> list[str]:
  """Below Table 1."""
  size = study.settings['num_groups']
  return [
      '± is half of maximum minus minimum, over retrains or over pairs of them'
      ' (Anil et al. 2018).',
      'Retrains differ in the seed of the parameters and in that of the order'
      f' of the data. An ensemble is the mean probability of {size} single'
      ' models, and no model is in two ensembles; of a codistilled run one copy'
      ' is compared, that of group 0, with those of other runs.',
      'Change: of the mean absolute difference, against the single model.'
      ' Retrains of one number share their seeds and are resampled together.',
      *DEFINITIONS,
  ]


def failures(study: Study) -> list[str]:
  """What is wrong with the deterministic controls."""
  return [
      f'{r.arm} 0, trained twice with the same seeds, gave'
      f' {r.different:,} of {r.total:,} predictions that differ, by up to'
      f' {r.largest:.3g}; the churn of the arms is not due to their seeds alone'
      + _hint(study, r)
      for r in study.repeats
      if r.different
  ]


def _hint(study: Study, repeat: Repeat) -> str:
  if not repeat.same_cores:
    return ' (one run had more cores than the other: do not change --jobs)'
  if study.settings['platform'] != 'cpu':
    return ' (try XLA_FLAGS=--xla_gpu_deterministic_ops=true)'
  return ''


def repeat_table(study: Study) -> tuple[list[str], list[list[str]]]:
  """The deterministic controls."""
  header = ['trained twice with the same seeds', 'predictions']
  header += ['that differ', 'largest difference']
  return header, [
      [r.arm, f'{r.total:,}', f'{r.different:,}', f'{r.largest:g}']
      for r in study.repeats
  ]


def pair_table(
    rows: Sequence[Row], pairs: Mapping[str, Sequence[tuple[str, str]]]
) -> tuple[list[str], list[list[str]]]:
  """The figures of each pair of files."""
  keys = ('churn', 'relative', 'disagreement')
  cells = []
  for row in rows:
    for i, names in enumerate(pairs[row.arm]):
      values = [
          tabular.number(k, row.figures[k].values[i])
          if k in row.figures
          else '-'
          for k in keys
      ]
      cells.append([row.title, *names, *values])
  titles = [tabular.SHORT[k] for k in keys]
  return ['arm', 'model', 'and model', *titles], cells


def settings(study: Study) -> list[list[str]]:
  """What the study was, one setting a row."""
  s, records = study.settings, [record for _, _, record in study.runs]
  seeds = lambda key: ', '.join(map(str, sorted({r[key] for r in records})))
  whole = lambda key: ', '.join(
      f'{x:,}' for x in sorted({r[key] for r in records})
  )
  took = max(r['ended'] for r in records) - min(r['began'] for r in records)
  trained = sum(r['ended'] - r['began'] for r in records)
  return [
      ['data set', s['data']],
      ['examples compared', _splits(study)],
      ['groups (G) of a codistilled arm', str(s['num_groups'])],
      ['replicas per group (R)', str(s['replicas'])],
      ['group batch', f'{s["group_batch"]:,}'],
      ['steps of each group', whole('num_steps')],
      ['steps between exchanges', f'{s["exchange_every"]:,}, in lockstep'],
      ['seeds of parameters', seeds('seed')],
      ['seeds of the order of data', seeds('data_seed')],
      ['trainings', str(len(records))],
      ['cores of a training', whole('cores')],
      ['device', s['platform']],
      ['first start to last end, minutes', f'{took / 60:.1f}'],
      ['minutes of all trainings added', f'{trained / 60:.1f}'],
      ['jax', ', '.join(sorted({r['jax'] for r in records}))],
  ]


def _splits(study: Study) -> str:
  validation = f'{study.examples["validation"]:,} validation'
  if not study.settings['has_test_split']:
    return f'{validation}; no test split'
  return f'{validation}, {study.examples["test"]:,} test'
