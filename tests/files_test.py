"""Tests of files: replaced as a whole, valid JSON, errors with a name."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import time

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from codistill_jax.storage import files


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 0.5])
def test_json_files_are_valid_json_and_keep_every_float(tmp_path, value):
  path = tmp_path / 'a.json'
  files.write_json(path, {'speed': [value], 'deep': ({'x': value},)})
  json.loads(path.read_text(), parse_constant=lambda n: pytest.fail(n))
  tree = files.read_json(path)
  for back in (tree['speed'][0], tree['deep'][0]['x']):
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_no_file_is_none_also_where_a_directory_should_be(tmp_path):
  assert files.read_json(tmp_path / 'absent.json') is None
  (tmp_path / 'file').write_text('')
  assert files.read_json(tmp_path / 'file' / 'a.json') is None


def test_every_torn_file_is_told_from_a_whole_one(tmp_path):
  path = tmp_path / 'a.json'
  files.write_json(path, {'a': [1, {'b': 'c'}]})
  whole = path.read_bytes().rstrip()
  for cut in range(len(whole)):
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r'a\.json'):
      files.read_json(path)


def test_writing_makes_the_directory_and_replaces_the_file(tmp_path):
  path = tmp_path / 'new' / 'deep' / 'a'
  files.write_bytes(path, b'long before')
  files.write_bytes(path, b'now')
  assert path.read_bytes() == b'now'
  assert os.listdir(path.parent) == ['a']


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch
):
  path = tmp_path / 'a.json'
  files.write_json(path, {'arm': 'old'})

  def fail(*args):
    raise OSError('disk is full')

  monkeypatch.setattr(type(epath.Path(path)), 'replace', fail)
  with pytest.raises(OSError, match='disk is full'):
    files.write_json(path, {'arm': 'new'})
  assert os.listdir(tmp_path) == ['a.json']
  assert files.read_json(path) == {'arm': 'old'}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.json'
  files.write_json(path, {'arm': 'old'})
  with pytest.raises(TypeError):
    files.write_json(path, {'arm': {1, 2}})
  assert files.read_json(path) == {'arm': 'old'}


def test_writers_at_the_same_time_share_no_temporary_file(
    tmp_path, monkeypatch
):
  path = tmp_path / 'a'
  replaced = []
  kind = type(epath.Path(path))
  replace = kind.replace

  def note(self, target):
    replaced.append(os.fspath(self))
    # The other writer comes between this one's write and its rename.
    if len(replaced) == 1:
      files.write_bytes(path, b'second')
    return replace(self, target)

  monkeypatch.setattr(kind, 'replace', note)
  files.write_bytes(path, b'first')
  assert len(set(replaced)) == 2
  assert path.read_bytes() == b'first'
  assert os.listdir(tmp_path) == ['a']


def test_buckets_are_remote_and_disks_are_not(tmp_path):
  assert files.is_remote('gs://bucket/run') and files.is_remote('s3://b/c')
  assert files.is_remote(epath.Path('gs://bucket/run'))
  assert not files.is_remote(tmp_path) and not files.is_remote('runs/a')


# --- Files of others ---------------------------------------------------------

ODD = [
    b'',
    b'{',
    b'\xff\xfe{}',
    b'[' * 10**5,
    b'{"a":' * 60 + b'1' + b'}' * 60,
    b'{"step": 1e999}',
    b'{"step": -1e400}',
    b'{"step": NaN}',
    b'{"step": -Infinity}',
    b'{"step": 1%s}' % (b'0' * 5000),
    b'{"step": 9223372036854775808}',
    b'[]',
    b'3',
    b'null',
    b'"NaN"',
]


@pytest.mark.parametrize('content', ODD, ids=lambda content: content[:20])
def test_json_of_others_is_refused_in_one_line(tmp_path, content):
  path = tmp_path / 'run.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r'Expected .*run\.json') as e:
    files.read_json(path)
  assert '\n' not in str(e.value) and len(str(e.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=10,
)


KINDS = {'a': files.WHOLE, 'b': files.TEXT, 'c': [{'d': files.NUMBER}]}
KINDS |= {'e': {'f': files.TIME, ...: files.VALUE}}
KEYED = st.dictionaries(st.sampled_from('abcdefg'), JSON, max_size=3)


@given(tree=KEYED | st.fixed_dictionaries({'c': st.lists(KEYED), 'e': KEYED}))
def test_what_json_holds_is_of_its_kind_or_refused(tree):
  with tempfile.TemporaryDirectory() as directory:
    path = f'{directory}/run.json'
    pathlib.Path(path).write_text(json.dumps(tree))
    try:
      found = files.read_json(path, KINDS)
    except ValueError as e:
      assert 'run.json' in str(e) and '\n' not in str(e) and len(str(e)) < 500
      return
  assert found.keys() <= KINDS.keys()
  assert type(found.get('a', 0)) is int and 0 <= found.get('a', 0) < 1 << 63
  assert isinstance(found.get('b', ''), str)
  for x in found.get('c', []):
    assert x.keys() <= {'d'} and math.isfinite(x.get('d', 0))
  assert {*map(type, found.get('e', {}).values())} <= {int, float}
  assert abs(found.get('e', {}).get('f', 0)) < 1e12


@pytest.mark.parametrize('word', ['NaN', 'Infinity', '-Infinity'])
def test_a_text_that_could_be_a_number_stays_a_text(tmp_path, word):
  files.write_json(tmp_path / 'a.json', {'b': word})
  assert files.read_json(tmp_path / 'a.json', KINDS) == {'b': word}


@given(data=st.binary() | st.text().map(str.encode))
def test_any_bytes_are_json_or_refused(data):
  with contextlib.suppress(ValueError):
    files.parse_json(data)


def test_no_byte_is_read_of_what_is_no_small_file(tmp_path):
  made = [tmp_path / name for name in ('fifo', 'link', 'sparse', 'directory')]
  fifo, link, sparse, directory = made
  os.mkfifo(fifo)
  link.symlink_to(tmp_path / 'elsewhere')
  with sparse.open('wb') as f:
    f.truncate(60 << 30)
  directory.mkdir()
  start = time.monotonic()
  for path in made:
    for read in (files.read_bytes, files.read_json, files.read_text):
      with pytest.raises(files.RefusedError, match=f'{path.name} (is|has)'):
        read(path)
    with pytest.raises(files.RefusedError):
      files.digest(path, most=1 << 20)
  assert time.monotonic() - start < 5
