"""The one form of all pages: blocks, written as Markdown and as HTML.

The HTML page is one file: images are in it, nothing is loaded from elsewhere.
What a page looks like stands in `page.html.jinja`, `page.md.jinja` and
`page.css`; text is escaped by the templates. Numbers become text here, too.
"""

import base64
import functools
import io
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from codistill_jax.storage import files

from ..cli import printable

if TYPE_CHECKING:
  import jinja2
  import pandas as pd
  import rich.console
  import rich.table
  import rich.text

# --- Blocks ------------------------------------------------------------------


class Heading(NamedTuple):
  text: str


class Paragraph(NamedTuple):
  text: str


class Bullets(NamedTuple):
  items: Sequence[str]


class Table(NamedTuple):
  """A table of text; the first `names` columns are names, others numbers."""

  frame: 'pd.DataFrame'
  names: int = 1

  @property
  def header(self) -> list[str]:
    return list(self.frame.columns)

  @property
  def rows(self) -> list[list[str]]:
    return self.frame.to_numpy(object).tolist()


class Code(NamedTuple):
  """Text shown as it is; folded away under its title if it has one."""

  text: str
  title: str = ''

  @property
  def fence(self) -> str:
    """Backticks, more of them than stand in a row anywhere inside."""
    fence = '```'
    while fence in self.text:
      fence += '`'
    return fence


class Plot(NamedTuple):
  """A picture with the words that go below it.

  Attributes:
    name: File name without ending.
    title: Its heading.
    caption: What is drawn and how it was treated.
    image: PNG, or SVG.
  """

  name: str
  title: str
  caption: str
  image: bytes

  @property
  def file(self) -> str:
    is_svg = self.image.startswith(b'<svg')
    return f'{self.name}.{"svg" if is_svg else "png"}'

  @property
  def source(self) -> str:
    """Returns the image as a URL that holds it."""
    kind = 'svg+xml' if self.file.endswith('svg') else 'png'
    return f'data:image/{kind};base64,{base64.b64encode(self.image).decode()}'

  @property
  def width(self) -> int:
    """CSS pixels: letters of one size in all plots, sharp on fine screens."""
    if self.file.endswith('svg'):
      return int(re.search(rb'viewBox="0 0 (\d+)', self.image)[1])
    # The width stands in bytes 16 to 19 of a PNG.
    return int(0.62 * int.from_bytes(self.image[16:20], 'big'))


Block = Heading | Paragraph | Bullets | Table | Code | Plot

# --- Pages -------------------------------------------------------------------


def write(
    directory: files.PathLike, name: str, title: str, blocks: Sequence[Block]
) -> epath.Path:
  """Writes `<name>.md`, `<name>.html` and the plots, which lie beside them.

  Returns:
    The path of the HTML page.
  """
  directory = epath.Path(directory)
  for block in blocks:
    if isinstance(block, Plot):
      files.write_bytes(directory / block.file, block.image)
  for ending, render in (('md', to_markdown), ('html', to_html)):
    text = render(title, blocks)
    files.write_bytes(directory / f'{name}.{ending}', text.encode())
  return directory / f'{name}.html'


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
  """Returns the page as Markdown; plots are links to files beside it."""
  return _render('page.md.jinja', title, blocks)


def to_html(title: str, blocks: Sequence[Block]) -> str:
  """Returns the page as one HTML file with its images inside."""
  return _render('page.html.jinja', title, blocks)


def _render(template: str, title: str, blocks: Sequence[Block]) -> str:
  kinds = [(type(block).__name__, block) for block in blocks]
  page = _environment(pathlib.Path(__file__).parent).get_template(template)
  return page.render(title=title, blocks=kinds)


def _environment(directory: pathlib.Path) -> 'jinja2.Environment':
  # Here, since `--help` and `status` do without.
  import jinja2

  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(directory),
      # Markdown has filters of its own.
      autoescape=lambda name: 'html' in name,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
      keep_trailing_newline=True,
      finalize=lambda x: printable(x) if isinstance(x, str) else x,
  )
  environment.filters |= {'md': _block, 'cell': _cell, 'alt': _alt}
  environment.filters |= {'number': number, 'count': count}
  environment.filters |= {'sentence_start': sentence_start}
  return environment


def _escape_markdown(text: str) -> str:
  """Escapes what would be markup anywhere in a line; makes it one line."""
  text = re.sub(r'[\\`*_<\[]|&(?=#?\w+;)', r'\\\g<0>', text)
  return text.replace('\n', ' ')


def _block(text: str) -> str:
  """Escapes also what would be markup where a block begins."""
  begins = r'^(\s*\d*)([-+.)](?=\s|$)|#{1,6}(?=\s|$)|>|=+$|~~~)'
  return re.sub(begins, r'\1\\\2', _escape_markdown(text))


def _cell(text: str) -> str:
  return _escape_markdown(text).replace('|', '\\|')


def _alt(text: str) -> str:
  return _escape_markdown(text).replace(']', '\\]')


# --- Words -------------------------------------------------------------------


def prose(
    module: str, filters: Mapping[str, Callable] | None = None
) -> Callable[..., list[str]]:
  """Returns a writer of the paragraphs of the template beside a module.

  `write(macro, **values)` fills in a macro of `<module>.jinja`. Paragraphs are
  apart by blank lines, and the lines of each are joined. Nothing is escaped: a
  page does that.

  Args:
    module: `__file__` of the module.
    filters: What it may use besides `number`, `count` and `sentence_start`.
  """
  path = pathlib.Path(module).with_suffix('.jinja')

  @functools.cache
  def macros() -> Any:
    environment = _environment(path.parent)
    environment.filters |= filters or {}
    return environment.get_template(path.name).module

  def write(macro: str, *positional: Any, **values: Any) -> list[str]:
    text = getattr(macros(), macro)(*positional, **values)
    joined = (' '.join(paragraph.split()) for paragraph in text.split('\n\n'))
    return [paragraph for paragraph in joined if paragraph]

  return write


def count(number: int, noun: str) -> str:
  """Returns `1 seed`, `3 seeds`."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def sentence_start(text: str) -> str:
  """Returns the text with a capital."""
  return text[:1].upper() + text[1:]


# --- Text --------------------------------------------------------------------


def to_text(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    names: int | None = None,
) -> str:
  """Returns a table with aligned columns, for a terminal or a log.

  Args:
    header: The titles, which may have several lines.
    rows: The cells.
    names: How many columns are names, to the left; the others are numbers, to
      the right. None: all to the left.
  """
  return plain(terminal_table(header, rows, names))


def terminal_table(
    header: Sequence[str],
    rows: Iterable[Sequence['str | rich.text.Text']],
    names: int | None = None,
) -> 'rich.table.Table':
  """Returns what `to_text` shows; cells may have a style."""
  from rich.table import Table as RichTable
  from rich.text import Text

  table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
  for i, title in enumerate(header):
    table.add_column(
        Text(title),
        no_wrap=True,
        vertical='bottom',
        justify='left' if names is None or i < names else 'right',
    )
  for row in rows:
    # A plain string would be read as markup.
    table.add_row(*(Text(x) if isinstance(x, str) else x for x in row))
  return table


def plain(view: 'rich.console.RenderableType') -> str:
  """Returns what a terminal would show as text of any width."""
  from rich.console import Console

  console = Console(file=io.StringIO(), width=10_000, color_system=None)
  console.print(view)
  lines = console.file.getvalue().splitlines()
  return '\n'.join(line.rstrip() for line in lines)


_PREFIXES = ('', 'k', 'M', 'G', 'T', 'P', 'E')
_BYTES = ('bytes', 'kB', 'MB', 'GB', 'TB')


def number(value: float | None, form: str = '.4f', nan: str = 'nan') -> str:
  """Returns a number as text; '-' for None, which stands for "not known".

  Args:
    value: The number.
    form: A format specification; or 'SI' (`1.23 T`), 'bytes' (`1.2 MB`) or
      'time', of seconds (`2.5 h`).
    nan: What stands for NaN.
  """
  if value is None:
    return '-'
  if form == 'time':
    return _duration(value)
  if isinstance(value, float) and not math.isfinite(value):
    return nan if math.isnan(value) else str(value)
  if form == 'SI':
    return _scaled(value, _PREFIXES)
  return _scaled(value, _BYTES) if form == 'bytes' else format(value, form)


def _scaled(value: float, units: Sequence[str]) -> str:
  for unit in units[:-1]:
    # What would round up to 1000 takes the next unit.
    if value < 999.5:
      return f'{value:.3g} {unit}'.rstrip()
    value /= 1000
  return f'{value:.3g} {units[-1]}'


def _duration(seconds: float) -> str:
  """Returns it in the unit that matters: `4 s`, `3 min`, `2.5 h`."""
  if not math.isfinite(seconds):
    return '?'
  if seconds < 0:
    return '-' + _duration(-seconds)  # Clocks of two hosts disagree.
  if seconds < 100:
    return f'{seconds:.0f} s'
  if seconds < 100 * 60:
    return f'{seconds / 60:.0f} min'
  if seconds < 100 * 3600:
    return f'{seconds / 3600:.1f} h'
  return f'{seconds / 86400:.1f} d'
