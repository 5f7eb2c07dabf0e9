"""Tables on a terminal."""

from collections.abc import Iterable, Sequence


def align(rows: Iterable[Sequence[str]]) -> str:
  """Rows of text as a table with aligned columns."""
  rows = list(rows)
  widths = [max(len(cell) for cell in column) for column in zip(*rows)]
  return '\n'.join(
      '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
      for row in rows
  )
