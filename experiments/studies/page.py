"""The page of a study as blocks, and as files."""

from collections.abc import Sequence

from etils import epath

from codistill_jax.storage import files
from experiments import report_pages
from experiments.report_pages import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Table,
)
from experiments.report_style import Plot
from experiments.studies import formatting, plotting, tabular, views, wording
from experiments.studies.analysis import Analysis
from experiments.studies.latency import Latency
from experiments.studies.results import Setting
from experiments.studies.verdict import Verdict

_RATES = (
    'Each cell is the best smoothed and the last validation loss of one run of'
    ' its own seed, which is reported nowhere else.'
)


def blocks(
    found: Analysis,
    setting: Setting,
    verdicts: Sequence[Verdict],
    latency: Latency,
) -> list[Block]:
  """All of the page, in order."""
  study = found.study
  plots = plotting.make_plots(found, setting)
  return [
      Paragraph(study.question),
      Paragraph(wording.claim(study)),
      Paragraph(wording.settings(study, setting)),
      *_verdicts(found, verdicts),
      Heading('Arms'),
      Table(*tabular.arms_table(found, setting), names=1),
      Paragraph(wording.targets(found, setting)),
      *_each_seed(found),
      *(block for plot in plots for block in (Heading(plot.title), plot)),
      *views.blocks(found, setting, latency),
      *_rates(found, setting),
      Heading('Rules'),
      Bullets([*wording.rules(found), *wording.VERDICTS]),
      *_notes(study.notes),
      Heading('How to make it again'),
      Code(setting.command),
      Paragraph(
          f'All runs together took {setting.minutes:,.1f} minutes on'
          f' {wording.machine(setting)}.'
      ),
  ]


def _verdicts(found: Analysis, verdicts: Sequence[Verdict]) -> list[Block]:
  lines = [v.sentence for v in verdicts] + wording.divergences(found)
  return [Heading('Verdict'), Bullets(lines)] if lines else []


def _each_seed(found: Analysis) -> list[Block]:
  header, rows = tabular.seeds_table(found)
  if len(header) < 2:
    return []
  return [
      Heading('Steps to the target, seed by seed'),
      Table(header, rows, names=1),
  ]


def _rates(found: Analysis, setting: Setting) -> list[Block]:
  header, rows = tabular.rates_table(found, setting)
  said = formatting.sentence_start(setting.selection).rstrip('.') + '.'
  if not any(found.tuning.values()):
    return [Heading('Learning rates'), Paragraph(said)] if said != '.' else []
  return [
      Heading('Learning rates'),
      Table(header, rows, names=1),
      Paragraph(f'{said} {_RATES}'),
  ]


def _notes(notes: Sequence[str]) -> list[Block]:
  return [Heading('Notes'), *map(Paragraph, notes)] if notes else []


def write(directory: epath.Path, title: str, made: Sequence[Block]) -> None:
  """page.md and page.html, and the plots beside them."""
  for block in made:
    if isinstance(block, Plot):
      files.write_bytes(directory / f'{block.name}.png', block.png)
  pages = {
      'page.md': report_pages.to_markdown(title, made),
      'page.html': report_pages.to_html(title, made),
  }
  for name, text in pages.items():
    files.write_bytes(directory / name, text.encode())
