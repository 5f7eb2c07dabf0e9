"""The study of prediction churn: trained and drawn by `churn_study`.

Its runs are retrains whose predictions are kept, rather than curves; what it
has in common with the other studies is the declaration and the verdict.
"""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from codistill_jax import statistics
from codistill_jax.storage import files
from experiments import cli, devices, tables
from experiments.churn_study import (
    report,
    results,
    run_files,
    tabular,
    worker,
)
from experiments.churn_study import wording as report_wording
from experiments.churn_study.figures import Row
from experiments.report_pages import Block, Bullets, Heading, Paragraph
from experiments.stopping import StopRequest
from experiments.studies import verdict, wording
from experiments.studies.analysis import Effect
from experiments.studies.declaration import Comparison
from experiments.studies.plan import Plan

_CONTROLS = 3


def is_churn(plan: Plan) -> bool:
  """Whether a study is of this kind."""
  return plan.study.name == 'churn'


def runs(plan: Plan) -> list[run_files.Run]:
  """Its retrains; so many of each arm as there are seeds."""
  weights = [run_files.weight_of(arm.name) for arm in plan.arms]
  return run_files.plan(
      plan.scale.seeds,
      [weight for weight in weights if weight is not None],
      num_groups=max(arm.num_groups for arm in plan.arms),
      control_retrains=min(_CONTROLS, plan.scale.seeds),
  )


def train(
    workdir: files.PathLike,
    plan: Plan,
    bindings: Sequence[str],
    *,
    stop: StopRequest,
    replicas: int,
    jobs: int,
) -> None:
  """Trains what is not done; see `Worker.train_all`."""
  trainers = worker.Trainers(
      workdir,
      plan.scale.gin_files,
      [*plan.scale.bindings, *bindings],
      own={},
      devices=lambda: devices.chosen_devices(replicas),
  )
  study = worker.describe_study(
      trainers,
      num_groups=max(arm.num_groups for arm in plan.arms),
      command=os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
  )
  worker.claim(workdir, study)
  worker.train_all(workdir, runs(plan), trainers, stop, jobs)


def write(
    workdir: files.PathLike, plan: Plan, output: files.PathLike, note: str
) -> epath.Path:
  """Prints the table and the verdicts, and writes the page.

  Raises:
    ValueError: If fewer than two single models are done; or, after all is
      written, if a deterministic control failed.
  """
  study = results.load_study(workdir)
  said = verdicts(plan, study.rows['test'])
  header, cells = tabular.table_1(study.table, '', tabular.SHORT)
  cli.tell('\n' + tables.align([header, *cells]) + '\n')
  for line in said:
    cli.tell(line)
  head: list[Block] = [
      Paragraph(plan.study.question),
      Paragraph(f'The paper ({plan.study.source}): {plan.study.claim}'),
      Heading('Verdict'),
      Bullets(said),
  ]
  directory = epath.Path(output)
  made = [*head, *report.blocks(study, workdir, note)]
  report.write(directory, plan.study.title, made, 'page')
  report.write_data(directory, study)
  failures = report_wording.failures(study)
  if failures:
    raise ValueError(f'the deterministic control failed: {failures[0]}')
  return directory / 'page.md'


def verdicts(plan: Plan, rows: Sequence[Row]) -> list[str]:
  """A sentence for each comparison."""
  by_arm = {row.arm: row for row in rows}
  found = []
  for comparison in plan.study.comparisons:
    pair = by_arm.get(comparison.arm), by_arm.get(comparison.against)
    if None not in pair:
      effect = _effect(comparison, *pair)
      words = verdict.words_of(effect, comparison)
      found.append(wording.comparison(plan.study, comparison, effect, words))
  return found


def _effect(comparison: Comparison, ours: Row, theirs: Row) -> Effect:
  """Churn as a ratio, over pairs of retrains; log loss as a difference."""
  retrains = min(ours.retrains, theirs.retrains)  # In order: the first ones.
  if comparison.measure == 'churn':
    change = statistics.change_of_churn(
        *(
            statistics.symmetric(row.figures['churn'].values, row.retrains)
            for row in (ours, theirs)
        )
    )
    figure = change._replace(
        mean=1 + change.mean,
        low=1 + change.low,
        high=1 + change.high,
        # One ratio, of so many retrains: they have none of their own.
        values=(1 + change.mean,) * retrains,
    )
    return Effect(
        True,
        (),
        (),
        figure,
        ours.figures['churn'].mean,
        theirs.figures['churn'].mean,
    )
  losses = [
      np.array(row.figures['log_loss'].values[:retrains])
      for row in (ours, theirs)
  ]
  return Effect(
      False,
      (),
      (),
      statistics.mean_over_retrains(losses[0] - losses[1]),
      losses[0].mean(),
      losses[1].mean(),
  )
