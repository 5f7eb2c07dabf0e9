"""A report as a list of blocks, and the blocks as Markdown and as HTML.

The HTML page is one file: images are in it, nothing is loaded from elsewhere.
"""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report_style import Plot


class Heading(NamedTuple):
  text: str


class Paragraph(NamedTuple):
  text: str


class Bullets(NamedTuple):
  items: Sequence[str]


class Table(NamedTuple):
  """A table; the first `names` columns are text, the others numbers."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  names: int


class Code(NamedTuple):
  """Text shown as it is; folded away under its title if it has one."""

  text: str
  title: str = ''


Block = Heading | Paragraph | Bullets | Table | Code | Plot


# --- Markdown ----------------------------------------------------------------


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
  """The page as Markdown; plots are links to PNG files beside it."""
  return '\n\n'.join([f'# {title}', *map(_markdown, blocks)]) + '\n'


def _markdown(block: Block) -> str:
  match block:
    case Heading(text):
      return f'## {text}'
    case Paragraph(text):
      return _escape_markdown(text)
    case Bullets(items):
      return '\n'.join(f'* {_escape_markdown(item)}' for item in items)
    case Table(header, rows, names):
      rule = ['---'] * names + ['---:'] * (len(header) - names)
      lines = [[_cell(c) for c in row] for row in (header, *rows)]
      lines.insert(1, rule)
      return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    case Code(text, title):
      return _markdown_code(text, title)
    case Plot(name, title, caption, _):
      return f'![{title}]({name}.png)\n\n{_escape_markdown(caption)}'
  raise TypeError(f'No Markdown for {block!r}.')


def _markdown_code(text: str, title: str) -> str:
  # A fence longer than any run of backticks inside.
  fence = '```'
  while fence in text:
    fence += '`'
  code = f'{fence}\n{text.rstrip()}\n{fence}'
  if not title:
    return code
  summary = f'<summary>{html.escape(title)}</summary>'
  return f'<details>{summary}\n\n{code}\n\n</details>'


def _escape_markdown(text: str) -> str:
  for character in '\\`*_<[':
    text = text.replace(character, '\\' + character)
  return text


def _cell(text: str) -> str:
  return _escape_markdown(text).replace('|', '\\|').replace('\n', ' ')


# --- HTML --------------------------------------------------------------------

_CSS = """
:root {
  color-scheme: light dark;
  --text: #1c1e21; --soft: #5c6470; --page: #ffffff; --line: #dfe3e8;
  --panel: #f6f7f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e6ea; --soft: #9aa3af; --page: #15181c; --line: #30363d;
    --panel: #1e2227;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 64rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  color: var(--text); background: var(--page);
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 {
  font-size: 1.2rem; margin: 2.6rem 0 0.8rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line);
}
p, ul { max-width: 46rem; }
.wide { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: 0.84rem; line-height: 1.35;
  font-variant-numeric: tabular-nums;
}
th, td { padding: 0.4rem 0.55rem; text-align: right; }
th {
  vertical-align: bottom; color: var(--soft); font-weight: 600;
  border-bottom: 2px solid var(--line);
}
td { border-bottom: 1px solid var(--line); white-space: nowrap; }
.name { text-align: left; }
.settings td { white-space: normal; }
ul { padding-left: 1.2rem; color: var(--soft); font-size: 0.9rem; }
figure { margin: 1.6rem 0 2.4rem; }
img {
  display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem;
}
figcaption {
  max-width: 46rem; margin-top: 0.5rem; color: var(--soft);
  font-size: 0.88rem;
}
pre {
  overflow-x: auto; padding: 0.8rem 1rem; border-radius: 6px;
  background: var(--panel); font: 0.82rem/1.5 ui-monospace, monospace;
}
summary { cursor: pointer; margin: 0.6rem 0; color: var(--soft); }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
  """The page as one HTML file with its images inside."""
  heading = html.escape(title)
  body = '\n'.join(map(_html, blocks))
  return (
      '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{heading}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n'
      f'<h1>{heading}</h1>\n{body}\n</body>\n</html>\n'
  )


def _html(block: Block) -> str:
  match block:
    case Heading(text):
      return f'<h2>{html.escape(text)}</h2>'
    case Paragraph(text):
      return f'<p>{html.escape(text)}</p>'
    case Bullets(items):
      inside = ''.join(f'<li>{html.escape(item)}</li>' for item in items)
      return f'<ul>{inside}</ul>'
    case Table():
      return _html_table(block)
    case Code(text, ''):
      return f'<pre>{html.escape(text)}</pre>'
    case Code(text, title):
      return (
          f'<details><summary>{html.escape(title)}</summary>'
          f'<pre>{html.escape(text)}</pre></details>'
      )
    case Plot():
      return _html_plot(block)
  raise TypeError(f'No HTML for {block!r}.')


def _html_table(table: Table) -> str:
  rows = '\n'.join(_html_row('td', row, table.names) for row in table.rows)
  # A table of names only holds sentences, which may wrap.
  kind = ' class="settings"' if table.names == len(table.header) else ''
  header = _html_row('th', table.header, table.names)
  return (
      f'<div class="wide"><table{kind}>\n<thead>{header}</thead>\n<tbody>\n'
      f'{rows}\n</tbody>\n</table></div>'
  )


def _html_row(tag: str, cells: Sequence[str], names: int) -> str:
  name = f'<{tag} class="name">'
  starts = [name if i < names else f'<{tag}>' for i in range(len(cells))]
  inside = [f'{s}{html.escape(c)}</{tag}>' for s, c in zip(starts, cells)]
  return f'<tr>{"".join(inside)}</tr>'


def _html_plot(plot: Plot) -> str:
  data = base64.b64encode(plot.png).decode()
  # The width stands in bytes 16 to 19 of a PNG. Two pixels or so to a CSS
  # pixel: sharp on fine screens, and letters of one size in all plots.
  width = int(0.62 * int.from_bytes(plot.png[16:20], 'big'))
  return (
      f'<figure><img alt="{html.escape(plot.title)}" width="{width}"'
      f' src="data:image/png;base64,{data}">'
      f'<figcaption>{html.escape(plot.caption)}</figcaption></figure>'
  )
