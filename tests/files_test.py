"""Tests of files: replaced as a whole, valid JSON, errors with a name."""

import json
import math
import os

import pytest
from etils import epath

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


@pytest.mark.parametrize('data', [b'', b'{"a": ', b'[]', b'1', b'\xff\xfe{}'])
def test_a_damaged_file_is_named_in_one_line(tmp_path, data):
  path = tmp_path / 'run.json'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'Expected .*run\.json') as e:
    files.read_json(path)
  assert '\n' not in str(e.value)


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
