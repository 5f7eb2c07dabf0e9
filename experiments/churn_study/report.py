"""The report of a churn study: printed, as pages, as CSV and as JSON."""

import os
from collections.abc import Mapping, Sequence

from etils import epath

from codistill_jax.storage import files
from experiments import cli, report_pages, tables
from experiments.churn_study import results, tabular, wording
from experiments.churn_study.figures import Row
from experiments.churn_study.results import Study
from experiments.report_pages import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Table,
)


def main(workdir: files.PathLike, output: str | None, note: str = '') -> None:
  """Prints Table 1 and writes the report.

  Raises:
    ValueError: After all that, if a deterministic control failed.
  """
  study = results.load_study(workdir)
  split = wording.split_of(study)
  header, cells = tabular.table_1(study.table, split, tabular.SHORT)
  cli.tell(f'\n{study.settings["data"]}\n{study.settings["headline"]}')
  cli.tell('\n' + tables.align([header, *cells]) + '\n')
  for line in (wording.summary(study), wording.chosen(study)):
    cli.tell(line)
  directory = epath.Path(output or epath.Path(workdir) / 'report')
  write(directory, 'Prediction churn', blocks(study, workdir, note))
  write_data(directory, study)
  cli.tell(f'report: {os.fspath(directory / "churn.html")}')
  failures = wording.failures(study)
  if failures:
    raise ValueError(f'the deterministic control failed: {failures[0]}')


def blocks(study: Study, workdir, note: str) -> list[Block]:
  """All of the page, in order."""
  # Here, since it needs matplotlib: files may do without.
  from experiments.churn_study import plotting

  split = wording.split_of(study)
  plot = plotting.make_plot(study.rows['test'], study.chosen, split.strip())
  made = [
      *(Paragraph(x) for x in (study.settings['headline'], note) if x),
      *(Paragraph(f'FAILED: {x}') for x in wording.failures(study)),
      Paragraph(wording.summary(study)),
      Paragraph(wording.chosen(study)),
      Heading('Table 1'),
      Table(*tabular.table_1(study.table, split), names=1),
      Bullets(wording.notes(study)),
      Heading('95 % intervals'),
      Table(*tabular.interval_table(study.table), names=1),
      Heading(plot.title),
      plot,
      Heading('All weights, and what they were chosen on'),
      Table(*tabular.weight_table(study.rows, study.chosen), names=1),
      Heading('Controls'),
      Table(*wording.repeat_table(study), names=1),
  ]
  if study.controls:
    made += [
        Paragraph(wording.CONTROLS),
        Table(*tabular.table_1(study.controls, split), names=1),
    ]
  settings = wording.settings(study)
  return [
      *made,
      Heading('Settings'),
      Table(['', 'value'], settings, names=2),
      *_configurations(workdir, study),
      Heading('How to make it again'),
      Code(study.settings['command']),
  ]


def _configurations(workdir, study: Study) -> list[Block]:
  paths = [
      epath.Path(workdir) / (f'config_{name}.gin' if name else 'config.gin')
      for name in study.settings['configurations']
  ]
  return [Code(p.read_text(), p.name) for p in paths if p.exists()]


def write(
    directory: epath.Path,
    title: str,
    made: Sequence[Block],
    name: str = 'churn',
) -> None:
  """The pages, as Markdown and HTML, and the plots beside them."""
  for block in made:
    if hasattr(block, 'png'):
      files.write_bytes(directory / f'{block.name}.png', block.png)
  pages = {
      f'{name}.md': report_pages.to_markdown(title, made),
      f'{name}.html': report_pages.to_html(title, made),
  }
  for name, text in pages.items():
    files.write_bytes(directory / name, text.encode())


def write_data(directory: epath.Path, study: Study) -> None:
  """churn.csv and churn.json."""
  text = tabular.to_csv(study.rows)
  files.write_bytes(directory / 'churn.csv', text.encode())
  tree = {
      'settings': study.settings,
      'examples': study.examples,
      'chosen': study.chosen,
      'rule': study.reason,
      'rows': {
          split: [tabular.to_tree(row) for row in rows]
          for split, rows in study.rows.items()
      },
      'controls': [tabular.to_tree(row) for row in study.controls],
      'repeats': [repeat._asdict() for repeat in study.repeats],
      'runs': [
          {'arm': arm, 'retrain': k, **record} for arm, k, record in study.runs
      ],
  }
  files.write_json(directory / 'churn.json', tree)


# --- Files of other people's models ------------------------------------------


def report_files(
    rows: Sequence[Row],
    *,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    examples: int,
    joined_by: str,
    paths: Sequence[str],
    output: str | None,
) -> None:
  """Prints the figures of prediction files; writes them if there is an output.

  Args:
    rows: An arm each.
    pairs: By arm, the names of each pair in the order of a figure's values.
    examples: N.
    joined_by: The column of ids; '' if rows were compared with rows.
    paths: Of all files.
    output: Directory, or None.
  """
  header, cells = tabular.table_1(rows, titles=tabular.SHORT)
  between = wording.pair_table(rows, pairs)
  cli.tell(tables.align([header, *cells]))
  if len(between[1]) > 1:
    cli.tell('\n' + tables.align([between[0], *between[1]]))
  how = f'joined by {joined_by}' if joined_by else 'row by row'
  said = f'{examples:,} examples, {how}; ± is half of maximum minus minimum'
  cli.tell(f'\n{said}')
  if output is None:
    return
  made = [
      Table(*tabular.table_1(rows), names=1),
      Bullets([said, *wording.DEFINITIONS]),
      Heading('95 % intervals'),
      Table(*tabular.interval_table(rows), names=1),
      Heading('Pairs'),
      Table(*between, names=3),
      Heading('Files'),
      Code('\n'.join(paths)),
      Heading('How to make it again'),
      Code(cli.own_command()),
  ]
  directory = epath.Path(output)
  write(directory, 'Prediction churn', made)
  text = tabular.to_csv({'': rows})
  files.write_bytes(directory / 'churn.csv', text.encode())
  tree = {
      'examples': examples,
      'files': list(paths),
      'rows': [tabular.to_tree(row) for row in rows],
      'pairs': {arm: list(names) for arm, names in pairs.items()},
  }
  files.write_json(directory / 'churn.json', tree)
  cli.tell(f'report: {os.fspath(directory / "churn.html")}')
