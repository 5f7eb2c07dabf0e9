"""What a source is made of: records, each a document or why there is none."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

# Longer ones are no text that a language model should see (a dump of a data
# base, one line of 100 MB), and would have to be held in memory.
DEFAULT_MAX_DOCUMENT_BYTES = 1 << 24


class Reject(NamedTuple):
  """A record that holds no usable document.

  Attributes:
    reason: Why, as a name to count by.
      From any source: 'not_utf8', 'empty' (nothing but white space), 'too_long'
      (more bytes than allowed), 'damaged_file' (the rest of a compressed file
      cannot be read).
      From JSON: 'bad_json', 'no_text' (no string under the text key).
      From WET files: 'damaged_record', 'no_conversion' (a record of another
      type than extracted text); see `wet`.
      With a list of paragraphs: 'not_listed', 'file_not_listed', 'unnumbered',
      'missing_paragraphs'; see `paragraph_ids`.
      From filters: 'not_english', 'short'; see `filters`.
  """

  reason: str


Record = str | Reject
Raw = bytes | str | Reject  # A record before it is decoded.


class Source(NamedTuple):
  """A corpus.

  Attributes:
    spec: The string that names it.
    fingerprint: A hash of the names and sizes of its files; '' if unknown.
    raw: `raw(start)` iterates over all raw records from number `start`. Cheap
      work only: it runs in one process.
    decode: Makes a record of a raw one, in any process, so it can be pickled.
    files: What it reads; empty if unknown.
  """

  spec: str
  fingerprint: str
  raw: Callable[[int], Iterator[Raw]]
  decode: Callable[[Any], Record]
  files: Sequence[epath.Path] = ()

  def records(self, start: int) -> Iterator[Record]:
    """All records from number `start`."""
    return self._decoded(self.raw(start))

  def _decoded(self, raw: Iterator[Raw]) -> Iterator[Record]:
    for record in raw:
      yield record if isinstance(record, Reject) else self.decode(record)


def decode_text(raw: bytes) -> Record:
  """A document from its bytes."""
  try:
    return check_text(raw.decode('utf-8'))
  except UnicodeDecodeError:
    return Reject('not_utf8')


def decode_json(line: bytes, text_key: str) -> Record:
  """A document from a line that holds a JSON object."""
  try:
    value = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError:
    return Reject('not_utf8')
  except (ValueError, RecursionError):  # Recursion: thousands of brackets.
    return Reject('bad_json')
  text = value.get(text_key) if isinstance(value, dict) else None
  return check_text(text) if isinstance(text, str) else Reject('no_text')


def check_text(text: str) -> Record:
  """The text, if it is one."""
  if not text.strip():
    return Reject('empty')
  try:
    # JSON may spell half of a surrogate pair, which no UTF-8 text contains.
    text.encode('utf-8')
  except UnicodeEncodeError:
    return Reject('not_utf8')
  return text
