"""Writes what a study has found: CSV files, plots and a page.

Files: study.csv (a row per arm and measure), curves.csv (a row per
evaluation), PNG plots, page.md and page.html.
"""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from codistill_jax.storage import files
from experiments import tables
from experiments.studies import analysis, tabular, verdict, wording
from experiments.studies.declaration import Study
from experiments.studies.latency import Latency
from experiments.studies.results import Run, Setting
from experiments.studies.verdict import Verdict


class Summary(NamedTuple):
  """What to print.

  Attributes:
    table: The arms, aligned for a terminal.
    lines: Verdicts and what went wrong, a sentence each.
    verdicts: In the order of the study's comparisons.
    page: The Markdown page.
  """

  table: str
  lines: tuple[str, ...]
  verdicts: tuple[Verdict, ...]
  page: epath.Path


def write(
    study: Study,
    setting: Setting,
    runs: Sequence[Run],
    output: files.PathLike,
    *,
    latency: Latency | None = None,
) -> Summary:
  """Analyses the runs of a study and writes everything about them.

  Args:
    study: Its declaration.
    setting: What all runs have in common.
    runs: Of all arms and seeds, those for tuning among them; in any order.
    output: Directory; what lies there under the same names is replaced.
    latency: What is assumed of workers and network, for the view 'latency'.

  Raises:
    ValueError: If runs and declaration do not fit.
  """
  # Here, since it needs matplotlib.
  from experiments.studies import page

  found = analysis.analyse(study, runs)
  verdicts = tuple(verdict.judge(found, c) for c in study.comparisons)
  directory = epath.Path(output)
  blocks = page.blocks(found, setting, verdicts, latency or Latency())
  page.write(directory, study.title, blocks)
  _write_text(directory / 'study.csv', tabular.study_csv(found))
  _write_text(directory / 'curves.csv', tabular.curves_csv(found))
  header, rows = tabular.short_table(found)
  return Summary(
      table=tables.align([header, *rows]),
      lines=(*(v.sentence for v in verdicts), *wording.divergences(found)),
      verdicts=verdicts,
      page=directory / 'page.md',
  )


def _write_text(path: epath.Path, text: str) -> None:
  files.write_bytes(path, text.encode())
