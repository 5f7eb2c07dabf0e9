"""What a run report says in words, made from the numbers alone."""

import os
import shlex
from collections.abc import Sequence

import numpy as np
from etils import epath

from codistill_jax.storage import files
from experiments.reports import records, run_tables
from experiments.reports.records import Arm, Group


def summary(arms: Sequence[Arm]) -> str:
  """Returns what the runs show, in a paragraph."""
  unit = f'nats per {records.example_name(arms)}'
  baseline = records.find_baseline(arms)
  target = baseline and records.best(records.validation_curve(baseline))
  if target:
    step, loss = target
    others = [arm for arm in arms if arm is not baseline]
    sentences = [
        f'The best validation loss of {baseline.name} is {loss:.4f} {unit},'
        f' at step {step:,}.',
        *(_against(arm, step, loss) for arm in others),
    ]
  else:
    sentences = [_alone(arm, unit) for arm in arms]
  sentences += [_ensemble_sentence(arm) for arm in arms]
  sentences.append(_caution(arms))
  return ' '.join(filter(None, sentences))


def _of_groups(arm: Arm) -> str:
  if len(arm.groups) == 1:
    return arm.name
  return f'{arm.name} (mean of its {len(arm.groups)} groups)'


def _alone(arm: Arm, unit: str) -> str:
  found = records.best(records.validation_curve(arm))
  if not found:
    return f'{_sentence_start(arm.name)} has no evaluation yet.'
  return (
      f'The best validation loss of {_of_groups(arm)} is {found[1]:.4f} {unit},'
      f' at step {found[0]:,}.'
  )


def _against(arm: Arm, target_step: int, target: float) -> str:
  curve = records.validation_curve(arm)
  found = records.best(curve)
  if not found:
    return f'{_sentence_start(arm.name)} has no evaluation yet.'
  name = _sentence_start(_of_groups(arm))
  step = records.first_at_or_under(curve, target)
  if step is None:
    return (
        f'{name} does not reach that in {curve.index[-1]:,} steps; its'
        f' best is {found[1]:.4f}, at step {found[0]:,}.'
    )
  return (
      f'{name} is at or under that for the first time at step {step:,}'
      f' ({_times(target_step, step)}); its best is {found[1]:.4f}, at step'
      f' {found[0]:,}.'
  )


def _times(target_step: int, step: int) -> str:
  if step < target_step:
    return f'{target_step / max(step, 1):.2f} times fewer steps'
  if step > target_step:
    return f'{step / max(target_step, 1):.2f} times as many steps'
  return 'the same number of steps'


def _ensemble_sentence(arm: Arm) -> str:
  sentence = ''
  loss = arm.ensemble.get('eval/loss')
  if loss is not None:
    sentence = f'The ensemble of the groups of {arm.name} has {loss:.4f}'
    singles = [m['eval/loss'] for m in arm.models.values() if 'eval/loss' in m]
    if singles:
      sentence += f'; a single group {np.mean(singles):.4f} on average'
    sentence += '.'
  disagreement = run_tables.pair_mean(arm, 'churn/disagreement')
  if disagreement is not None:
    sentence += (
        f' The groups of {arm.name} predict a different'
        f' {records.example_name([arm])} in {disagreement:.1%} of cases.'
    )
  return sentence.strip()


def _caution(arms: Sequence[Arm]) -> str:
  parts = []
  spacing = [
      np.diff(curve.index).max()
      for curve in map(records.validation_curve, arms)
      if len(curve) > 1
  ]
  if spacing:
    parts.append(f'Evaluations are up to {max(spacing):,} steps apart.')
  if len(arms) > 1:
    parts.append(
        'Each arm is one run, so these numbers carry no interval over seeds.'
    )
    batches = {arm.run.get('group_batch') for arm in arms}
    if len(batches) == 1 and len({len(arm.groups) for arm in arms}) > 1:
      parts.append(
          'Steps are counted per group: at equal steps, and an equal group'
          ' batch, an arm with G groups has processed G times the examples of'
          ' an arm with one.'
      )
  return ' '.join(parts)


def _sentence_start(text: str) -> str:
  return text[:1].upper() + text[1:]


# --- Notes below tables ------------------------------------------------------

_RESULTS = (
    (
        'Validation loss, perplexity, accuracy and AUC are those of the final'
        ' evaluation, or of the last one in training where there is none.'
    ),
    (
        'Staleness, in steps, is own step minus the step the teacher was'
        ' published at: mean over all records, and the largest.'
    ),
    (
        'Stall is the time for which the exchange held the training loop, per'
        ' exchange and as a share of the training time.'
    ),
    (
        'Disagreement is the share of examples on which the argmax of two'
        ' groups differs; churn is the mean absolute difference of their'
        ' probabilities. Both are means over pairs of groups of one arm.'
    ),
)
SPEED = (
    (
        'Rates are means over the time spent on the recorded steps, without'
        ' compilation and evaluation; the other numbers are those of the last'
        ' record.'
    ),
    (
        'Model FLOPs are two for each multiply-add of the matrix products and'
        ' convolutions of the whole group, of teachers too; the teacher share'
        ' is their part of them.'
    ),
    (
        "Utilisation is the part of what the group's devices could do of that"
        ' by their data sheet; it is not known of CPUs.'
    ),
)
HEALTH = (
    (
        'Exchanges are those that were due by the last step. Staleness is of'
        ' the teachers in use; its largest value is that of any single teacher'
        ' in any record.'
    ),
    'Peers present are counted after burn-in: how many taught the group.',
    (
        'Rejected are publications of peers that were damaged or did not fit;'
        ' none of them was used. Failed to publish counts what the file system'
        ' refused, which is tried again. Both are added up over restarts, but'
        ' for records that a restart dropped.'
    ),
    (
        'Stall is all the time for which the exchange held the training loop,'
        ' and its share of the training time; a publication is the size of the'
        ' newest one.'
    ),
    (
        'Restarts show where steps go back or counts begin again; of others'
        ' nothing is recorded here.'
    ),
)


def notes(arms: Sequence[Arm]) -> list[str]:
  """Returns how to read the results, and what was odd in the records."""
  return [*_RESULTS, *(x for a in arms for g in a.groups for x in _odd(a, g))]


def _odd(arm: Arm, group: Group) -> list[str]:
  who = f'{arm.name}, group {group.group_id}'
  lines = []
  if group.damaged:
    lines.append(
        f'{who}: {group.damaged} damaged line(s) of metrics.jsonl were skipped.'
    )
  for key in ('loss/task', 'loss/distill', 'eval/loss'):
    curve = group.curve(key)
    bad = curve.index[~np.isfinite(curve)]
    if len(bad):
      lines.append(
          f'{who}: {key} is not finite in {len(bad)} record(s), the first at'
          f' step {bad[0]:,}.'
      )
  return lines


# --- Commands ----------------------------------------------------------------


def commands(
    arms: Sequence[Arm], output: files.PathLike | None = None
) -> list[str]:
  """Returns the commands that make the runs and the report again.

  Paths under the working directory are relative; of others only the last part
  is kept, since the rest means nothing on another machine.
  """
  lines = []
  for arm in arms:
    command = str(arm.run.get('command') or '')
    for path in (os.path.abspath(arm.workdir), os.fspath(arm.workdir)):
      command = command.replace(path, _portable(path))
    lines.append(command.replace(os.getcwd() + os.sep, ''))
  report = ['python -m experiments.report']
  for arm in arms:
    label = f'{arm.name}={_portable(arm.workdir)}'
    report.append(f'--workdir={shlex.quote(label)}')
  if output is not None:
    report.append(f'--output={shlex.quote(_portable(output))}')
  return [*filter(None, dict.fromkeys(lines)), ' '.join(report)]


def _portable(path: files.PathLike) -> str:
  relative = os.path.relpath(os.path.abspath(os.fspath(path)))
  outside = relative.startswith(os.pardir)
  return epath.Path(path).name if outside else relative
