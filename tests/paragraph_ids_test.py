"""The paper's list selects exactly the listed paragraphs, or says why not."""

import bz2
import csv
import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import read_source
from wet_files import packed, record, wet, write_wet

from codistill_jax.data import paragraph_ids
from codistill_jax.data.records import Reject

pytest.importorskip('fastwarc')

PAGES = [
    'zero\n\n one \ntwo',
    'three',
    'four\nfive\r\n \nsix\n',
    'seven\neight',
]
NOT_LISTED = Reject('not_listed')


def deltas(ids):
  return np.diff([0, *ids]).tolist()


def csv_of(rows, heading=('file name', 'encoded_paragraph_list'), join=','):
  text = io.StringIO()
  writer = csv.writer(text)
  if heading:
    writer.writerow(heading)
  for name, ids in rows:
    writer.writerow([name, join.join(map(str, deltas(ids)))])
  return text.getvalue().encode()


def write_tar(path, *contents):
  with tarfile.open(path, 'w:bz2') as tar:
    for i, content in enumerate(contents):
      info = tarfile.TarInfo(f'list/part-{i}.csv')
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def read(source, spec, unit='line', sha256='none'):
  listed = paragraph_ids.open_list(str(spec), sha256)
  return read_source(f'wet:{source}', paragraphs=listed, paragraph_unit=unit)


@pytest.fixture
def page_file(tmp_path):
  (tmp_path / 'wet').mkdir()
  return write_wet(tmp_path / 'wet' / 'a.warc.wet.gz', *PAGES)


def test_deltas_are_those_of_the_released_decoder():
  # By hand, as the C++ of the README does it: each is added to the last ID.
  decoded = paragraph_ids.decode_deltas('3, 1, 10, 5')
  assert decoded.tolist() == [3, 4, 14, 19] and decoded.dtype == np.int64
  assert paragraph_ids.decode_deltas('').tolist() == []
  with pytest.raises(ValueError, match='ID -1 is below 0'):
    paragraph_ids.decode_deltas('3 -4')


@settings(deadline=None)
@given(st.sets(st.integers(0, 2**40)).map(sorted))
def test_decoding_inverts_encoding(ids):
  for text in (str(deltas(ids)), ' '.join(map(str, deltas(ids)))):
    np.testing.assert_array_equal(paragraph_ids.decode_deltas(text), ids)


@pytest.mark.parametrize(
    ('ids', 'expected'),
    [
        ([0, 2, 3, 8], ['zero\ntwo', 'three', NOT_LISTED, 'eight']),
        ([1], ['one', NOT_LISTED, NOT_LISTED, NOT_LISTED]),
        ([5, 6, 7], [NOT_LISTED, NOT_LISTED, 'five\nsix', 'seven']),
        (
            range(9),
            ['zero\none\ntwo', 'three', 'four\nfive\nsix', 'seven\neight'],
        ),
        (
            [8, 9],
            [*[NOT_LISTED] * 3, 'eight', Reject('missing_paragraphs')],
        ),
    ],
)
def test_exactly_the_listed_paragraphs_are_taken(
    tmp_path, page_file, ids, expected
):
  path = write_tar(
      tmp_path / 'a.tar.bz2',
      csv_of([('other.warc.wet.gz', range(9))]),
      csv_of([('a.warc.wet.gz', ids)]),
  )
  assert read(page_file, path) == expected


def test_a_paragraph_may_be_a_page(tmp_path, page_file):
  (tmp_path / 'a.csv').write_bytes(csv_of([('a.warc.wet.gz', [1, 3])]))
  records = read(page_file, tmp_path / 'a.csv', unit='record')
  assert records == [NOT_LISTED, PAGES[1], NOT_LISTED, PAGES[3]]


@settings(deadline=None)
@given(data=st.data())
def test_selection_equals_a_naive_one(data):
  line = st.sampled_from(['', ' ', 'a', 'b c', '\r'])
  pages = data.draw(st.lists(st.lists(line).map('\n'.join), max_size=6))
  lines, owner = [], []
  for i, page in enumerate(pages):
    for one in page.split('\n'):
      if one.strip():
        lines.append(one.strip())
        owner.append(i)
  ids = data.draw(st.sets(st.integers(0, max(0, len(lines) - 1))))
  if not lines:
    ids = set()
  expected = [
      '\n'.join(lines[i] for i in sorted(ids) if owner[i] == p)
      for p in range(len(pages))
  ]
  found = paragraph_ids.select(
      iter([page.encode() for page in pages]), np.asarray(sorted(ids)), 'line'
  )
  assert [
      '' if one == NOT_LISTED else one.decode() for one in found
  ] == expected


def test_after_damage_numbers_are_unknown(tmp_path):
  parts = packed(wet(*PAGES))
  parts[2] = parts[2][:30] + bytes(30)
  path = tmp_path / 'a.warc.wet.gz'
  path.write_bytes(b''.join(parts))
  (tmp_path / 'a.csv').write_bytes(csv_of([(path.name, range(9))]))
  assert read(path, tmp_path / 'a.csv') == [
      'zero\none\ntwo',
      Reject('damaged_record'),
      Reject('unnumbered'),
  ]
  path.write_bytes(b''.join(parts[:3]))
  assert read(path, tmp_path / 'a.csv')[1:] == [Reject('damaged_file')]


def test_records_of_other_types_have_no_numbers(tmp_path):
  parts = [record(PAGES[0]), record('y', 'metadata'), record(PAGES[1])]
  path = tmp_path / 'a.wet'
  path.write_bytes(b''.join(parts))
  (tmp_path / 'a.csv').write_bytes(csv_of([('a.wet', [0, 3])]))
  texts = [r for r in read(path, tmp_path / 'a.csv') if isinstance(r, str)]
  assert texts == ['zero', 'three']


@pytest.mark.parametrize('join', [',', ' ', ';', ', '])
@pytest.mark.parametrize(
    'heading',
    [
        ('file name', 'encoded_paragraph_list'),
        ('File Name', 'encoded_paragraph_list '),
        None,
    ],
)
def test_layouts_of_the_csv(tmp_path, page_file, join, heading):
  content = csv_of([('a.warc.wet.gz', [0, 3])], heading, join)
  other = b'encoded_paragraph_list,file name\n"[0, 3]",a.warc.wet.gz\n'
  for layout in (content, other):
    (tmp_path / 'a.csv').write_bytes(layout)
    assert read(page_file, tmp_path / 'a.csv')[:2] == ['zero', 'three']


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.csv.bz2'])
def test_extracted_lists_may_be_compressed(tmp_path, page_file, suffix):
  compress = {'.csv.gz': gzip.compress, '.csv.bz2': bz2.compress}
  for i, name in enumerate(['b.wet', 'a.warc.wet.gz']):
    content = csv_of([(name, [0, 3])])
    content = compress.get(suffix, bytes)(content)
    (tmp_path / f'part-{i}{suffix}').write_bytes(content)
  assert read(page_file, tmp_path / 'part-*')[:2] == ['zero', 'three']


def test_a_long_list_is_no_csv_error(tmp_path, page_file):
  before = csv.field_size_limit()
  ids = range(200_000)
  (tmp_path / 'a.csv').write_bytes(csv_of([('a.warc.wet.gz', ids)]))
  assert len(read(page_file, tmp_path / 'a.csv')) == 5
  assert csv.field_size_limit() == before


BUCKET = 'crawl-data/CC-MAIN-2017-13/segments/1/wet/a.warc.wet.gz'


@pytest.mark.parametrize(
    'name',
    [
        'a.warc.wet.gz',
        'a.warc.wet',
        BUCKET,
        f's3://commoncrawl/{BUCKET}',
    ],
)
def test_files_are_found_by_path_or_by_name(tmp_path, page_file, name):
  (tmp_path / 'a.csv').write_bytes(csv_of([(name, [3])]))
  assert read(page_file, tmp_path / 'a.csv')[1] == 'three'


@pytest.mark.parametrize(
    ('names', 'here', 'found'),
    [
        (('crawl/1/a.wet.gz', 'crawl/2/a.wet.gz'), 'crawl/1/a.wet', 0),
        (('crawl/1/a.wet.gz', 'crawl/2/a.wet.gz'), '2/a.wet', 1),
        # Only the ends of paths count.
        (('crawl/2/a.wet', 'other/1/a.wet'), 'crawl/1/a.wet', 1),
    ],
)
def test_of_two_files_of_a_name_the_nearer_path_wins(
    tmp_path, names, here, found
):
  path = tmp_path / here
  path.parent.mkdir(parents=True)
  write_wet(path, *PAGES)
  (tmp_path / 'a.csv').write_bytes(csv_of(zip(names, ([0], [3]))))
  assert read(path, tmp_path / 'a.csv')[found] == ('zero', 'three')[found]
  lone = write_wet(tmp_path / 'a.wet', *PAGES)
  with pytest.raises(ValueError, match=r'may be .*/a.wet.* or .*/a.wet'):
    read(lone, tmp_path / 'a.csv')


def test_a_file_in_several_lines_has_all_their_paragraphs(tmp_path, page_file):
  rows = [('a.warc.wet.gz', [0, 3]), ('a.warc.wet.gz', [3, 7])]
  (tmp_path / 'a.csv').write_bytes(csv_of(rows))
  records = read(page_file, tmp_path / 'a.csv')
  assert records == ['zero', 'three', NOT_LISTED, 'seven']


def test_files_that_are_not_listed_are_left_out(tmp_path, page_file):
  write_wet(page_file.with_name('b.wet'), *PAGES)
  (tmp_path / 'a.csv').write_bytes(csv_of([('a.warc.wet.gz', [3])]))
  records = read(page_file.with_name('*'), tmp_path / 'a.csv')
  assert records[4:] == [Reject('file_not_listed')]
  (tmp_path / 'a.csv').write_bytes(csv_of([('c.warc.wet.gz', [3])]))
  with pytest.raises(ValueError, match=r"none of the 1 files .*'c.warc"):
    read(page_file, tmp_path / 'a.csv')


def test_only_a_tar_with_the_released_checksum_is_taken(tmp_path, page_file):
  content = csv_of([('a.warc.wet.gz', [3])])
  path = write_tar(tmp_path / 'a.tar.bz2', content)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert read(page_file, path, sha256=digest.upper())[1] == 'three'
  with pytest.raises(ValueError, match=f'SHA-256 {digest}, expected 2694ae96'):
    read(page_file, path, sha256=None)
  with pytest.raises(ValueError, match='expected 00'):
    read(page_file, path, sha256='00')
  # Extracted files have no checksum that is known.
  (tmp_path / 'b.csv').write_bytes(content)
  assert read(page_file, tmp_path / 'b.csv', sha256=None)[1] == 'three'
  (tmp_path / 'c.csv').write_bytes(content)
  with pytest.raises(ValueError, match='names 2 files'):
    read(page_file, tmp_path / '*.csv', sha256=digest)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'file name\na.warc.wet.gz\n', r'line 1: expected the columns'),
        (
            b'file name,encoded_paragraph_list\na.warc.wet.gz,"1,x"\n',
            "line 2: expected whole numbers .* got 'x'",
        ),
        (b'', 'lists none of the 1 files'),
        (b'a.warc.wet.gz,"1,-5"\n', 'of .*a.warc.wet.gz: paragraph ID -4'),
        (b'a.warc.wet.gz,%s\n' % (b'9' * 40), 'of .*gz: 999.* is too large'),
        (
            'a.warc.wet.gz,1\u00a02\n'.encode(),
            r"whole numbers .* got '\\xa0'",
        ),
        ('a.warc.wet.gz,\u0663\n'.encode(), 'whole numbers'),
    ],
)
def test_malformed_lists_are_one_line(tmp_path, page_file, content, message):
  (tmp_path / 'a.csv').write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    read(page_file, tmp_path / 'a.csv')
  assert '\n' not in str(raised.value)


def test_a_truncated_tar_is_refused(tmp_path, page_file):
  rng = np.random.default_rng(0)
  ids = np.cumsum(rng.integers(1, 1000, 90_000)).tolist()
  path = write_tar(tmp_path / 'a.tar.bz2', csv_of([('a.warc.wet.gz', ids)]))
  path.write_bytes(path.read_bytes()[:-20_000])
  with pytest.raises(ValueError, match=r'a\.tar\.bz2 is damaged'):
    read(page_file, path)
