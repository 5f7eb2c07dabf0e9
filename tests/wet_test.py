"""WET files: every page is read, and damage costs no more than its records."""

import gzip
import pathlib
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import read_source, shared
from wet_files import packed, record, wet, write_wet

from codistill_jax.data import records as records_lib
from codistill_jax.data.records import Reject

pytest.importorskip('fastwarc')

ROOT = pathlib.Path(__file__).parent.parent
DAMAGED = Reject('damaged_record')
CUT = Reject('damaged_file')
PAGES = [f'page {i}\n' + 'some words ' * (40 + i) for i in range(6)]


def read(path, **options):
  return read_source(f'wet:{path}', **options)


def write(path, *parts):
  path.write_bytes(b''.join(parts))
  return path


@pytest.mark.parametrize('name', ['a.wet', 'a.wet.gz', 'a.warc.wet'])
def test_every_page_is_a_document(tmp_path, name):
  assert read(write_wet(tmp_path / name, *PAGES)) == PAGES


def test_a_file_compressed_as_a_whole_is_read(tmp_path):
  path = write(tmp_path / 'a.gz', gzip.compress(b''.join(wet(*PAGES))))
  assert read(path) == PAGES


def test_bad_pages_are_counted(tmp_path):
  path = write_wet(tmp_path / 'a.gz', b'', ' \n', b'\xff\xfe', 'x' * 99, 'good')
  rejects = [Reject(r) for r in ('empty', 'empty', 'not_utf8', 'too_long')]
  assert read(path, max_document_bytes=98) == [*rejects, 'good']
  assert read(path, max_document_bytes=99)[3:] == ['x' * 99, 'good']


@pytest.mark.parametrize('kind', ['request', 'response', 'metadata'])
def test_records_of_another_type_are_counted_behind_a_page(tmp_path, kind):
  html = record('HTTP/1.1 200 OK\r\n\r\n<p>hello', kind)
  info, page = wet('text')
  found = read(write(tmp_path / 'a.wet', info, page, html, page))
  assert found == ['text', Reject('no_conversion'), 'text']
  for path in (
      write(tmp_path / 'b.wet', info, html, page),
      write(tmp_path / 'b.gz', *packed([info, html, page])),
  ):
    with pytest.raises(ValueError, match=f'type {kind}: a WARC or WAT file'):
      read(path)


def damaged():
  """Name -> records of the file, of which page 2 is damaged."""
  plain, gz = wet(*PAGES), packed(wet(*PAGES))
  third = gz[3]
  lies = {
      'too large': 10**9,
      'larger': 10**5,
      'no number': 'many',
      'negative': -5,
      'none': '',
  }
  cases = {
      f'length {name}': [
          *plain[:3],
          record(PAGES[2], length=length),
          *plain[4:],
      ]
      for name, length in lies.items()
  }
  return (
      cases
      | {
          f'length {name}.gz': [
              *gz[:3],
              gzip.compress(record(PAGES[2], length=length)),
              *gz[4:],
          ]
          for name, length in lies.items()
      }
      | {
          'version': [
              *plain[:3],
              plain[3].replace(b'WARC', b'WARX'),
              *plain[4:],
          ],
          'garbage': [*plain[:3], b'\x00\x80' * 300 + b'\r\n\r\n', *plain[4:]],
          'flipped.gz': [*gz[:3], third[:30] + bytes(40) + third[70:], *gz[4:]],
          'head.gz': [*gz[:3], b'XXXX' + third[4:], *gz[4:]],
          'cut.gz': [*gz[:3], third[: len(third) // 2], *gz[4:]],
          'checksum.gz': [*gz[:3], third[:-8] + bytes(8), *gz[4:]],
          'missing head': [*plain[:3], plain[3][20:], *plain[4:]],
      }
  )


@pytest.mark.parametrize('name', sorted(damaged()))
def test_a_damaged_record_costs_nothing_but_itself(tmp_path, name):
  suffix = '.gz' if name.endswith('.gz') else '.wet'
  path = write(tmp_path / f'a{suffix}', *damaged()[name])
  records = read(path)
  assert records.count(DAMAGED) == 1
  found = [one for one in records if one != DAMAGED]
  assert found == [*PAGES[:2], *PAGES[3:]]


@pytest.mark.parametrize('suffix', ['.gz', '.wet'])
def test_a_truncated_file_counts_as_one_cut_short(tmp_path, suffix):
  records = wet(*PAGES)
  whole = b''.join(packed(records) if suffix == '.gz' else records)
  last = write(tmp_path / f'a{suffix}', whole[:-60])
  assert read(last) == [*PAGES[:5], CUT]
  write_wet(tmp_path / 'b.wet', 'the next file')
  assert read(f'{tmp_path}/*')[-1] == 'the next file'


def test_a_gzip_file_cut_anywhere_says_so(tmp_path):
  parts = packed(wet(*PAGES[:2]))
  whole = b''.join(parts)
  edges = {len(b''.join(parts[:i])) for i in range(4)}
  for cut in set(range(4, len(whole), 7)) - edges:
    records = read(write(tmp_path / 'a.gz', whole[:cut]))
    assert records[-1:] == [CUT]
    assert records[:-1] == PAGES[: len(records) - 1]


@pytest.mark.parametrize('chunk', [8, 9, 64])
def test_the_next_record_is_found_across_reads(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(records_lib, '_PIECE', chunk)
  for name in ('garbage', 'head.gz', 'length larger'):
    path = write(tmp_path / f'a-{name}', *damaged()[name])
    assert read(path) == [*PAGES[:2], DAMAGED, *PAGES[3:]]


def test_damage_in_a_file_compressed_as_a_whole_ends_it(tmp_path):
  rng = random.Random(0)
  pages = [''.join(rng.choices('abc def\n', k=9000)) for _ in range(4)]
  whole = gzip.compress(b''.join(wet(*pages)))
  path = write(tmp_path / 'a.gz', whole[: len(whole) // 2])
  records = read(path)
  assert records[-1] == CUT and records.count(CUT) == 1
  assert records[:-1] == pages[: len(records) - 1] != []


@pytest.mark.parametrize('content', [b'', b'plain text\n' * 99, b'\x1f\x8bxx'])
def test_what_is_no_wet_file_has_no_page(tmp_path, content):
  path = write(tmp_path / 'a', content)
  assert read(path) == ([CUT] if content else [])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), compress=st.booleans())
def test_no_damage_is_fatal_and_numbers_are_stable(
    tmp_path_factory, data, compress
):
  records = wet('one page ' * 9, 'two\nlines ' * 9, 'three')
  content = bytearray(b''.join(packed(records) if compress else records))
  for _ in range(data.draw(st.integers(1, 3))):
    place = data.draw(st.integers(0, len(content) - 1))
    end = place + data.draw(st.integers(0, 80))
    content[place:end] = data.draw(st.binary(max_size=40))
  path = tmp_path_factory.mktemp('wet') / 'a'
  write(path, bytes(content))
  everything = read(path)
  # No page is made up; one may be cut where its length was what was damaged.
  assert len(everything) <= 8
  assert read(path) == everything


@pytest.mark.parametrize(
    'split', ['wet_pages', 'json_lines', 'text_blocks', 'whole_file']
)
def test_a_disk_that_fails_is_no_damage(tmp_path, split):
  path = write_wet(tmp_path / 'a.wet', *PAGES)
  if split != 'wet_pages':
    noise = random.Random(0).choices('abcdefgh\n', k=9000)
    path = write(tmp_path / 'a', gzip.compress(''.join(noise).encode()))
  failed = False

  class Failing:
    """Fails once; what was not read must not count as damage."""

    def __init__(self, f):
      self._f = f
      self.seek, self.tell = f.seek, f.tell

    def read(self, size=-1):
      nonlocal failed
      if self._f.tell() > 100 and not failed:
        failed = True
        raise OSError(5, 'Input/output error')
      return self._f.read(min(size, 200))

    def __enter__(self):
      return self

    def __exit__(self, *unused):
      self._f.close()

  class Path:

    def open(self, mode):
      return Failing(path.open(mode))

  with pytest.raises(OSError, match='Input/output error'):
    list(getattr(records_lib, split)(Path(), 10_000))


def test_a_huge_page_is_skipped_in_bounded_memory(tmp_path):
  path = tmp_path / 'a.gz'
  with open(path, 'wb') as f:
    f.write(packed(wet('before'))[1])
    f.write(gzip.compress(record(b'x' * 100_000_000), 1))
    f.write(packed(wet('after'))[1])
  tracemalloc.start()
  records = read(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert records == ['before', Reject('too_long'), 'after']
  assert peak < 60_000_000


def test_a_page_of_common_crawl():
  records = read(shared('wet/whirlwind.warc.wet.gz'))
  assert len(records) == 1 and 'Biquipedia' in records[0]


def test_a_real_warc_file_has_no_text():
  path = shared('wet/resiliparse-warcfile.warc.gz')
  with pytest.raises(ValueError, match='a WARC or WAT file'):
    read(path)
