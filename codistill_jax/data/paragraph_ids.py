"""The authors' list of the paragraphs that they trained on.

What is known (README of google-research/codistillation): the list is a bzip2
compressed tar of CSV files, `common_crawl_paragraph_ids_for_codistillation-csv-
delta.tar.bz2`, 392 MB, with the SHA-256 below. Each CSV file has two columns,
`file name` and `encoded_paragraph_list`; the latter is a list of the IDs of the
paragraphs that were used of that file, delta encoded: each ID is the sum of all
numbers up to its place.

What is not known, and is a choice of this module: what a paragraph is and how
paragraphs are numbered. See `paragraphs`, the one function that decides it.
Nor is it known how the numbers of a list are separated (anything but a digit
will do here) and whether names have folders (both will do, see `_entry_of`).
"""

import csv
import hashlib
import itertools
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, cast

import numpy as np
from etils import epath

from codistill_jax.data.records import (
    DAMAGE,
    DAMAGED_FILE,
    DAMAGED_RECORD,
    TOO_LONG,
    Reject,
    check_damage,
    expand,
    open_text,
)
from codistill_jax.storage import files

RELEASED_SHA256 = (
    '2694ae96685810d2a5c81f2dc9b3d2956d0543fa226ccbe9b26f0ffd81fa8292'
)
UNITS = ('line', 'record')
_COLUMNS = ('file name', 'encoded_paragraph_list')
_NUMBER = re.compile(r'-?\d+', re.ASCII)
_NO_LIST = re.compile(r'[^\d\s,;:|\[\](){}\'"-]', re.ASCII)
_MAX_DIGITS = 15


def paragraphs(content: bytes, unit: str) -> list[bytes]:
  """Splits a page into paragraphs, in the order in which they are numbered.

  The released README does not say what a paragraph is. The choice here:
  paragraphs are numbered from 0 through the whole WET file, over its records
  of type `conversion` in their order, and
  * 'line': a paragraph is a line with more than white space in it (a WET file
    has a line for each block of text of the page);
  * 'record': a paragraph is a page, all of its text.
  Where 'record' is wrong, IDs are larger than the file has records, which shows
  as 'missing_paragraphs'. Where 'line' is wrong, nothing shows but the text:
  then the beginning of each file is taken, menus and all.

  Args:
    content: Of one record.
    unit: 'line' or 'record'.
  """
  if unit == 'record':
    return [content]
  return [line.strip() for line in content.split(b'\n') if line.strip()]


def decode_deltas(text: str) -> np.ndarray:
  """Decodes the IDs of one `encoded_paragraph_list`: running sums, int64.

  Raises:
    ValueError: If it is no list of whole numbers, or an ID is below 0.
  """
  if wrong := _NO_LIST.search(text):
    raise ValueError(f'expected whole numbers, got {wrong[0]!r} among them')
  numbers = _NUMBER.findall(text)
  longest = max(numbers, key=len, default='')
  if len(longest) > _MAX_DIGITS:  # It and the sums would not fit 64 bits.
    raise ValueError(f'{longest[:30]} is too large for the ID of a paragraph')
  ids = np.cumsum(np.asarray([int(number) for number in numbers], np.int64))
  if len(ids) and ids.min() < 0:
    raise ValueError(f'paragraph ID {ids.min()} is below 0')
  return ids


def select(
    records: Iterator[bytes | Reject], ids: np.ndarray, unit: str
) -> Iterator[bytes | Reject]:
  """Selects from each page of one file its listed paragraphs, one a line.

  After damage the numbers of the paragraphs are unknown, so the rest of the
  file is left out.

  Args:
    records: Of the whole file.
    ids: Of the paragraphs to take.
    unit: See `paragraphs`.

  Yields:
    Pages made of listed paragraphs; for others the Reject of `records` or
    'not_listed'; 'unnumbered' in place of all after damage;
    'missing_paragraphs' at the end of a file that has fewer paragraphs than
    were listed: it is another file, or paragraphs are numbered in another way.
  """
  ids = np.unique(ids)
  first = 0
  for record in records:
    if isinstance(record, Reject):
      yield record
      if record == DAMAGED_FILE:
        return
      if record in (DAMAGED_RECORD, TOO_LONG):
        yield Reject('unnumbered')
        return
      continue
    found = paragraphs(record, unit)
    a, b = np.searchsorted(ids, [first, first + len(found)])
    chosen = [found[i - first] for i in ids[a:b].tolist()]
    first += len(found)
    yield b'\n'.join(chosen) if chosen else Reject('not_listed')
  if len(ids) and ids[-1] >= first:
    yield Reject('missing_paragraphs')


# --- the list ----------------------------------------------------------------


class ParagraphList:
  """A list on disk; see `open_list`.

  Attributes:
    spec: What names it.
    sha256: Of its file; of several files, of their hashes.
  """

  def __init__(self, spec: str, paths: Sequence[epath.Path], sha256: str):
    self.spec = spec
    self.sha256 = sha256
    self._paths = paths

  def entries(self, files: Sequence[epath.Path]) -> list[list[bytes] | None]:
    """Reads the lists of some WET files, for `ids_of`; None for one not listed.

    One pass over the whole list (minutes for the released one), of which one
    line and the compressed lists of `files` are held in memory.

    Raises:
      ValueError: If the list is malformed, names none of the files, or has two
        entries for one of them.
    """
    wanted = {_bare(path.name) for path in files}
    found: dict[str, list[bytes]] = {}
    example = None
    for name, text in self._rows():
      example = example or name
      if _bare(name.rpartition('/')[2]) in wanted:
        found.setdefault(name, []).append(zlib.compress(text.encode('ascii')))
    entries = [_entry_of(path, found) for path in files]
    if not any(entries):
      raise ValueError(
          f'{self.spec} lists none of the {len(files)} files of the source; it'
          f' lists files such as {example!r}.'
      )
    return entries

  def _rows(self) -> Iterator[tuple[str, str]]:
    for path in self._paths:
      try:
        for name, f in _csv_files(path):
          yield from _rows(name, f)
      except (tarfile.TarError, *DAMAGE) as e:
        check_damage(e)
        raise ValueError(f'{path} is damaged: {e}') from e


def ids_of(entry: Sequence[bytes], name: str) -> np.ndarray:
  """Decodes the IDs of an entry, int64, rising.

  Args:
    entry: See `ParagraphList.entries`.
    name: Of the file, for errors.

  Raises:
    ValueError: If an ID is below 0.
  """
  try:
    parts = [
        decode_deltas(zlib.decompress(part).decode('ascii')) for part in entry
    ]
  except ValueError as e:
    raise ValueError(f'The list of paragraphs of {name}: {e}.') from e
  return np.unique(np.concatenate(parts))


def open_list(spec: str, sha256: str | None = None) -> ParagraphList:
  """Finds a list and compares its checksum.

  Args:
    spec: The tar file as released, or a path or glob of the CSV files in it,
      plain or compressed.
    sha256: Of the file, in hex; None: for a tar that of the released file, for
      others none is compared; 'none': none is compared.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If the checksum is another one.
  """
  paths = expand(spec)
  if sha256 is None and any(map(_is_tar, paths)):
    sha256 = RELEASED_SHA256
  found = [files.digest(path).sha256 for path in paths]
  if sha256 not in (None, 'none'):
    if len(paths) > 1:
      raise ValueError(
          f'{spec} names {len(paths)} files, but paragraph_ids_sha256 is the'
          ' checksum of one; leave it out or name one file.'
      )
    if found[0] != sha256.lower():
      raise ValueError(
          f'{spec} has the SHA-256 {found[0]}, expected {sha256.lower()}; load'
          ' it again, or say with paragraph_ids_sha256 which one it should have'
          ' (none: any).'
      )
  whole = hashlib.sha256(' '.join(found).encode()).hexdigest()
  return ParagraphList(spec, paths, found[0] if len(found) == 1 else whole)


def _is_tar(path: epath.Path) -> bool:
  with path.open('rb') as raw:
    try:
      tarfile.open(fileobj=raw, mode='r|*').close()
    except tarfile.TarError:
      return False
    return True


def _csv_files(path: epath.Path) -> Iterator[tuple[str, IO[bytes]]]:
  """Opens the CSV files of a tar, or the one that the file is; as streams."""
  if not _is_tar(path):
    with open_text(path) as f:
      yield str(path), f
    return
  # A stream ('|'): nothing is extracted, nothing is sought.
  with path.open('rb') as raw, tarfile.open(fileobj=raw, mode='r|*') as tar:
    for member in tar:
      if member.isfile():
        opened = cast(IO[bytes], tar.extractfile(member))
        yield f'{path}/{member.name}', opened


def _rows(name: str, f: IO[bytes]) -> Iterator[tuple[str, str]]:
  """Reads (file name, encoded list) of each line; a heading is optional."""
  columns = (0, 1)
  for number, row in enumerate(_csv_rows(f), 1):
    if number == 1 and set(_COLUMNS) <= {cell.strip().lower() for cell in row}:
      heading = [cell.strip().lower() for cell in row]
      columns = tuple(heading.index(column) for column in _COLUMNS)
    elif len(row) <= max(columns):
      raise ValueError(
          f'{name}, line {number}: expected the columns {", ".join(_COLUMNS)},'
          f' got {len(row)} column(s).'
      )
    else:
      text = row[columns[1]]
      if wrong := _NO_LIST.search(text):
        raise ValueError(
            f'{name}, line {number}: expected whole numbers under'
            f' {_COLUMNS[1]}, got {wrong[0]!r} among them.'
        )
      yield row[columns[0]].strip(), text


def _csv_rows(f: IO[bytes]) -> Iterator[list[str]]:
  # No TextIOWrapper: it closes the file of a tar, and complains when it cannot.
  lines = (line.decode('utf-8', 'replace').lstrip('\ufeff') for line in f)
  reader = csv.reader(lines)
  while True:
    # A limit of the whole process, of 128 KB; the list of a file is longer.
    before = csv.field_size_limit(1 << 30)
    try:
      row = next(reader, None)
    except csv.Error as e:
      raise ValueError(f'A list of paragraphs is no CSV: {e}') from e
    finally:
      csv.field_size_limit(before)
    if row is None:
      return
    if row:
      yield row


def _bare(name: str) -> str:
  """Removes what compression adds to a name."""
  return name.removesuffix('.gz')


def _entry_of(
    path: epath.Path, found: dict[str, list[bytes]]
) -> list[bytes] | None:
  """Finds the entry for a file: most of its last folders in common.

  Lists may name whole paths in the bucket of Common Crawl, or base names only,
  and files may lie anywhere here.
  """
  scores = {
      name: _common_end(name, str(path))
      for name in found
      if _bare(name.rpartition('/')[2]) == _bare(path.name)
  }
  best = [name for name in scores if scores[name] == max(scores.values())]
  if len(best) > 1:
    raise ValueError(
        f'{path} may be {best[0]!r} or {best[1]!r} of the list of paragraphs;'
        ' put it in the folders that it has there.'
    )
  return found[best[0]] if best else None


def _common_end(a: str, b: str) -> int:
  """Counts the parts in which two paths agree, from their ends."""
  pairs = zip(reversed(_bare(a).split('/')), reversed(_bare(b).split('/')))
  return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
