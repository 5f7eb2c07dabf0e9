"""The report of runs: what stands on its page, in order."""

from collections.abc import Sequence

from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files
from experiments.reports import pages, run_plots, run_tables, run_text
from experiments.reports.pages import Block, Bullets, Code, Heading, Table
from experiments.reports.records import Arm


def write(
    arms: Sequence[Arm], output: files.PathLike | None = None
) -> epath.Path:
  """Writes plots and pages.

  Args:
    arms: As `records.load_arms` gives them.
    output: Where to; report/ in the first arm's run directory if None.

  Returns:
    The path of report.html.
  """
  directory = output or run_directory.report_dir(arms[0].workdir)
  title = 'Run report: ' + ', '.join(arm.name for arm in arms)
  return pages.write(directory, 'report', title, blocks(arms, output))


def blocks(
    arms: Sequence[Arm], output: files.PathLike | None = None
) -> list[Block]:
  """Returns what stands in a report, in order."""
  made: list[Block] = [
      pages.Paragraph(run_text.summary(arms)),
      Heading('Results'),
      Table(run_tables.results(arms), names=2),
      Bullets(run_text.notes(arms)),
  ]
  for plot in run_plots.make_plots(arms):
    made += [Heading(plot.title), plot]
  for title, frame, notes in (
      ('Speed and arithmetic', run_tables.speed(arms), run_text.SPEED),
      ('Exchange health', run_tables.health(arms), run_text.HEALTH),
  ):
    if frame is not None:
      made += [Heading(title), Table(frame, names=2), Bullets(notes)]
  settings = run_tables.settings(arms)
  made += [Heading('Settings'), Table(settings, names=1 + len(arms))]
  made += [
      Code(arm.config, f'config.gin of {arm.name}')
      for arm in arms
      if arm.config
  ]
  commands = '\n'.join(run_text.commands(arms, output))
  return [*made, Heading('How to make it again'), Code(commands)]
