"""Pages that are looked at as a whole: words are exact, numbers nearly so.

`GOLDEN_WRITE=1 python -m pytest tests/study_page_test.py` writes them anew.
"""

import os
import pathlib
import re

import pytest

HOME = pathlib.Path(__file__).parent / 'golden'
_NUMBER = re.compile(r'(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?')


def check(page: str, name: str) -> None:
  """Compares a page with the one of that name."""
  if os.environ.get('GOLDEN_WRITE'):
    (HOME / name).write_text(page)
  known = (HOME / name).read_text()
  assert _NUMBER.sub('#', page) == _NUMBER.sub('#', known)
  found, expected = (
      [float(x.replace(',', '')) for x in _NUMBER.findall(text)]
      for text in (page, known)
  )
  # A rounded number may round the other way on another processor.
  assert found == pytest.approx(expected, rel=1e-3, abs=1.1e-4)
