"""The report of runs: what stands on its page, in order; its words and numbers.

What it says stands in `run_report.jinja`, made from the numbers alone.
"""

import os
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files

from .. import cli
from . import pages, run_plots, run_records, run_tables
from .pages import Block, Bullets, Code, Heading, Table
from .run_records import RunRecords

_write = pages.prose(__file__)


def write(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
) -> epath.Path:
  """Writes plots and pages.

  Args:
    arms: As `run_records.load_arms` gives them.
    output: Where to; report/ in the first arm's run directory if None.

  Returns:
    The path of report.html.
  """
  directory = output or run_directory.report_dir(arms[0].workdir)
  title = 'Run report: ' + ', '.join(arm.name for arm in arms)
  return pages.write(directory, 'report', title, blocks(arms, output))


def blocks(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
) -> list[Block]:
  """Returns what stands in a report, in order."""
  made: list[Block] = [
      pages.Paragraph(summary(arms)),
      Heading('Results'),
      Table(run_tables.results(arms), names=2),
      Bullets(notes(arms)),
  ]
  for plot in run_plots.make_plots(arms):
    made += [Heading(plot.title), plot]
  for title, frame, about in (
      ('Speed and arithmetic', run_tables.speed(arms), 'speed_notes'),
      ('Exchange health', run_tables.health(arms), 'health_notes'),
  ):
    if frame is not None:
      made += [Heading(title), Table(frame, names=2), Bullets(_write(about))]
  settings = run_tables.settings(arms)
  made += [Heading('Settings'), Table(settings, names=1 + len(arms))]
  made += [
      Code(arm.config, f'config.gin of {arm.name}')
      for arm in arms
      if arm.config
  ]
  again = '\n'.join(commands(arms, output))
  return [*made, Heading('How to make it again'), Code(again)]


# --- Words -------------------------------------------------------------------


def summary(arms: Sequence[RunRecords]) -> str:
  """Returns what the runs show, in a paragraph."""
  baseline, target = run_records.find_target(arms)
  curves = map(run_records.validation_curve, arms)
  known = {arm.name: _known(arm, target) for arm in arms}
  (said,) = _write(
      'summary',
      arms=list(known.values()),
      baseline=baseline and known[baseline.name],
      spacing=max(
          (np.diff(c.index).max() for c in curves if len(c) > 1), default=0
      ),
      example=run_records.example_name(arms),
      one_batch=len({arm.run.get('group_batch') for arm in arms}) == 1
      and len({len(arm.groups) for arm in arms}) > 1,
  )
  return said


def _known(arm: RunRecords, target: float | None) -> dict[str, Any]:
  """Returns what the summary needs to know of an arm."""
  curve = run_records.validation_curve(arm)
  singles = [m['eval/loss'] for m in arm.models.values() if 'eval/loss' in m]
  return {
      'name': arm.name,
      'groups': len(arm.groups),
      'example': run_records.example_name([arm]),
      'best': run_records.best(curve),
      'last_step': curve.index.max(),
      'reached': (
          None
          if target is None
          else run_records.first_at_or_under(curve, target)
      ),
      'ensemble': arm.ensemble.get('eval/loss'),
      'single': np.mean(singles) if singles else None,
      'disagreement': run_tables.pair_mean(arm, 'churn/disagreement'),
  }


def notes(arms: Sequence[RunRecords]) -> list[str]:
  """Returns how to read the results, and what was odd in the records."""
  odd = []
  for arm in arms:
    for group in arm.groups:
      keys = ('loss/task', 'loss/distill', 'eval/loss')
      curves = {key: group.curve(key) for key in keys}
      bad = {k: list(c.index[~np.isfinite(c)]) for k, c in curves.items()}
      who = f'{arm.name}, group {group.group_id}'
      odd.append((who, group.damaged, bad))
  return _write('results_notes', odd=odd)


# --- Commands ----------------------------------------------------------------


def commands(
    arms: Sequence[RunRecords], output: files.PathLike | None = None
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
  report = [f'python -m {cli.module_of("report")}']
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
