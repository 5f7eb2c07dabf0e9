"""Plots, a table and two pages from run directories, several side by side.

    python -m experiments.report --workdir runs/demo
    python -m experiments.report --workdir codistillation=runs/two \\
        --workdir baseline=runs/one --output runs/comparison

Writes PNG plots, report.md and report.html, which carries its images inside.
"""

from collections.abc import Sequence

from absl import flags

from . import cli


def define_flags() -> None:
  """Defines the flags; not on import, where those of other binaries stand."""
  flags.DEFINE_multi_string(
      'workdir',
      None,
      'Run directory to report on, or name=directory to name the arm. May be'
      ' given several times.',
  )
  cli.define_path(
      'output',
      None,
      'Directory for the plots and pages; by default report/ in the first run'
      ' directory.',
  )


def main(argv: Sequence[str]) -> None:
  """Prints the table, writes the report, prints where it is."""
  del argv
  # Here, so that --help needs neither pandas nor matplotlib.
  from .reports import run_records, run_report

  output = flags.FLAGS.output
  arms = run_records.load_arms(flags.FLAGS.workdir or [])
  for arm in arms:
    for why in arm.unreadable:
      cli.tell(f'{arm.name}: cannot be read: {why}', error=True)
  print(run_report.results_text(arms))
  print(f'\nreport: {run_report.write(arms, output)}')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
