"""What a source is made of: records, each a document or why there is none."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Reject(NamedTuple):
  """A record that holds no usable document.

  Attributes:
    reason: 'bad_json', 'no_text' (no string under the text key), 'not_utf8',
      'empty' (nothing but white space), or 'damaged_file' (the rest of a
      compressed file cannot be read).
  """

  reason: str


Record = str | Reject


class Source(NamedTuple):
  """A corpus.

  Attributes:
    spec: The string that names it.
    fingerprint: A hash of the names and sizes of its files; '' if unknown.
    records: `records(start)` iterates over all records from number `start`.
  """

  spec: str
  fingerprint: str
  records: Callable[[int], Iterator[Record]]


def decode_text(raw: bytes) -> Record:
  """A document from its bytes."""
  try:
    return _checked(raw.decode('utf-8'))
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
  return text_of(value, text_key)


def text_of(value: Any, text_key: str) -> Record:
  """A document from an object that holds it under a key."""
  text = value.get(text_key) if isinstance(value, dict) else None
  return _checked(text) if isinstance(text, str) else Reject('no_text')


def _checked(text: str) -> Record:
  if not text.strip():
    return Reject('empty')
  try:
    # JSON may spell half of a surrogate pair, which no UTF-8 text contains.
    text.encode('utf-8')
  except UnicodeEncodeError:
    return Reject('not_utf8')
  return text
