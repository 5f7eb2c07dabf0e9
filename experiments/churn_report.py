"""The report of a churn study: printed, as pages, as CSV and as JSON."""

import os
from collections.abc import Mapping, Sequence

from etils import epath

from codistill_jax.storage import files
from experiments import (
    churn_results,
    churn_table,
    churn_text,
    cli,
    report_pages,
    tables,
)
from experiments.churn_figures import Row
from experiments.churn_results import Study
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
  study = churn_results.load_study(workdir)
  split = churn_text.split_of(study)
  header, cells = churn_table.table_1(study.table, split, churn_table.SHORT)
  cli.tell(f'\n{study.settings["data"]}\n{study.settings["headline"]}')
  cli.tell('\n' + tables.align([header, *cells]) + '\n')
  for line in (churn_text.summary(study), churn_text.chosen(study)):
    cli.tell(line)
  directory = epath.Path(output or epath.Path(workdir) / 'report')
  _write(directory, 'Prediction churn', _blocks(study, workdir, note))
  _write_data(directory, study)
  cli.tell(f'report: {os.fspath(directory / "churn.html")}')
  failures = churn_text.failures(study)
  if failures:
    raise ValueError(f'the deterministic control failed: {failures[0]}')


def _blocks(study: Study, workdir, note: str) -> list[Block]:
  from experiments import churn_plot  # Matplotlib, which files may do without.

  split = churn_text.split_of(study)
  plot = churn_plot.make_plot(study.rows['test'], study.chosen, split.strip())
  blocks = [
      *(Paragraph(x) for x in (study.settings['headline'], note) if x),
      *(Paragraph(f'FAILED: {x}') for x in churn_text.failures(study)),
      Paragraph(churn_text.summary(study)),
      Paragraph(churn_text.chosen(study)),
      Heading('Table 1'),
      Table(*churn_table.table_1(study.table, split), names=1),
      Bullets(churn_text.notes(study)),
      Heading('95 % intervals'),
      Table(*churn_table.interval_table(study.table), names=1),
      Heading(plot.title),
      plot,
      Heading('All weights, and what they were chosen on'),
      Table(*churn_table.weight_table(study.rows, study.chosen), names=1),
      Heading('Controls'),
      Table(*churn_text.repeat_table(study), names=1),
  ]
  if study.controls:
    blocks += [
        Paragraph(churn_text.CONTROLS),
        Table(*churn_table.table_1(study.controls, split), names=1),
    ]
  settings = churn_text.settings(study)
  return [
      *blocks,
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


def _write(directory: epath.Path, title: str, blocks: Sequence[Block]) -> None:
  for block in blocks:
    if hasattr(block, 'png'):
      files.write_bytes(directory / f'{block.name}.png', block.png)
  pages = {
      'churn.md': report_pages.to_markdown(title, blocks),
      'churn.html': report_pages.to_html(title, blocks),
  }
  for name, text in pages.items():
    files.write_bytes(directory / name, text.encode())


def _write_data(directory: epath.Path, study: Study) -> None:
  text = churn_table.to_csv(study.rows)
  files.write_bytes(directory / 'churn.csv', text.encode())
  tree = {
      'settings': study.settings,
      'examples': study.examples,
      'chosen': study.chosen,
      'rule': study.reason,
      'rows': {
          split: [churn_table.to_tree(row) for row in rows]
          for split, rows in study.rows.items()
      },
      'controls': [churn_table.to_tree(row) for row in study.controls],
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
  header, cells = churn_table.table_1(rows, titles=churn_table.SHORT)
  between = churn_text.pair_table(rows, pairs)
  cli.tell(tables.align([header, *cells]))
  if len(between[1]) > 1:
    cli.tell('\n' + tables.align([between[0], *between[1]]))
  how = f'joined by {joined_by}' if joined_by else 'row by row'
  said = f'{examples:,} examples, {how}; ± is half of maximum minus minimum'
  cli.tell(f'\n{said}')
  if output is None:
    return
  blocks = [
      Table(*churn_table.table_1(rows), names=1),
      Bullets([said, *churn_text.DEFINITIONS]),
      Heading('95 % intervals'),
      Table(*churn_table.interval_table(rows), names=1),
      Heading('Pairs'),
      Table(*between, names=3),
      Heading('Files'),
      Code('\n'.join(paths)),
      Heading('How to make it again'),
      Code(cli.own_command()),
  ]
  directory = epath.Path(output)
  _write(directory, 'Prediction churn', blocks)
  text = churn_table.to_csv({'': rows})
  files.write_bytes(directory / 'churn.csv', text.encode())
  tree = {
      'examples': examples,
      'files': list(paths),
      'rows': [churn_table.to_tree(row) for row in rows],
      'pairs': {arm: list(names) for arm, names in pairs.items()},
  }
  files.write_json(directory / 'churn.json', tree)
  cli.tell(f'report: {os.fspath(directory / "churn.html")}')
