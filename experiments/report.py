"""Plots, a table and two pages from run directories, several side by side.

    python -m experiments.report --workdir runs/demo
    python -m experiments.report --workdir codistillation=runs/two \\
        --workdir baseline=runs/one --output runs/comparison

Writes PNG plots, report.md and report.html, which carries its images inside.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files
from experiments import (
    cli,
    report_data,
    report_pages,
    report_plots,
    report_speed,
    report_style,
    report_table,
    report_text,
)
from experiments.report_data import Arm


def make_report(
    arms: Sequence[Arm], output: files.PathLike | None = None
) -> epath.Path:
  """Writes plots and pages.

  Args:
    arms: As `report_data.load_arms` gives them.
    output: Where to; report/ in the first arm's run directory if None.

  Returns:
    The path of report.html.
  """
  directory = epath.Path(
      run_directory.report_dir(arms[0].workdir) if output is None else output
  )
  title = 'Run report: ' + ', '.join(arm.name for arm in arms)
  plots = report_plots.make_plots(arms)
  blocks = report_blocks(arms, plots, output)
  for plot in plots:
    files.write_bytes(directory / f'{plot.name}.png', plot.png)
  pages = {
      'report.md': report_pages.to_markdown(title, blocks),
      'report.html': report_pages.to_html(title, blocks),
  }
  for name, text in pages.items():
    files.write_bytes(directory / name, text.encode())
  return directory / 'report.html'


def report_blocks(
    arms: Sequence[Arm],
    plots: Sequence[report_style.Plot],
    output: files.PathLike | None = None,
) -> list[report_pages.Block]:
  """What stands in a report, in order."""
  settings = report_table.settings_rows(arms)
  names = [arm.name for arm in arms]
  columns = [column.title for column in report_table.columns(arms)]
  blocks: list[report_pages.Block] = [
      report_pages.Paragraph(report_text.summary(arms)),
      report_pages.Heading('Results'),
      report_pages.Table(columns, report_table.table_rows(arms), names=2),
      report_pages.Bullets(report_text.notes(arms)),
  ]
  for plot in plots:
    blocks += [report_pages.Heading(plot.title), plot]
  speed = report_speed.rows(arms)
  if speed:
    blocks += [
        report_pages.Heading('Speed and arithmetic'),
        report_pages.Table(report_speed.TITLES, speed, names=2),
        report_pages.Bullets(report_speed.NOTES),
    ]
  health = report_table.health_rows(arms)
  if health:
    blocks += [
        report_pages.Heading('Exchange health'),
        report_pages.Table(report_table.HEALTH_TITLES, health, names=2),
        report_pages.Bullets(report_text.HEALTH_NOTES),
    ]
  blocks += [
      report_pages.Heading('Settings'),
      report_pages.Table(['', *names], settings, names=1 + len(names)),
  ]
  blocks += [
      report_pages.Code(arm.config, f'config.gin of {arm.name}')
      for arm in arms
      if arm.config
  ]
  commands = '\n'.join(report_text.commands(arms, output))
  return [
      *blocks,
      report_pages.Heading('How to make it again'),
      report_pages.Code(commands),
  ]


def define_flags() -> None:
  """Defines the flags; not on import, where those of other binaries stand."""
  flags.DEFINE_multi_string(
      'workdir',
      None,
      'Run directory to report on, or name=directory to name the arm. May be'
      ' given several times.',
  )
  flags.DEFINE_string(
      'output',
      None,
      'Directory for the plots and pages; by default report/ in the first run'
      ' directory.',
  )


def main(argv: Sequence[str]) -> None:
  """Prints the table, writes the report, prints where it is."""
  del argv
  output = flags.FLAGS.output
  arms = report_data.load_arms(flags.FLAGS.workdir or [], output)
  report_table.print_table(arms)
  print(f'\nreport: {make_report(arms, output)}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
