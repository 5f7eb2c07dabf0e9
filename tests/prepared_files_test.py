"""Lists of checksums: every file is compared, and found however it is named."""

import hashlib
import shutil
import subprocess

import pytest
from etils import epath

from codistill_jax.data import prepared_files


def digest(content):
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def files(tmp_path):
  (tmp_path / 'data').mkdir()
  paths = [tmp_path / 'data' / name for name in ('a', 'b c')]
  for path in paths:
    path.write_bytes(path.name.encode() * 1000)
  return [epath.Path(path) for path in paths]


@pytest.mark.parametrize(
    'name', ['{name}', 'data/{name}', './data/{name}', '{path}']
)
@pytest.mark.parametrize('mark', [' ', '*'])
def test_agreeing_files(tmp_path, files, name, mark):
  lines = [
      f'{digest(path.read_bytes())} {mark}'
      + name.format(name=path.name, path=path)
      for path in files
  ]
  lines += ['', f'{"0" * 64}  of/another/file', '# a comment']
  (tmp_path / 'sums').write_text('\n'.join(lines))
  assert prepared_files.check_source(files, str(tmp_path / 'sums')) == 4000


def test_what_sha256sum_writes(tmp_path, files):
  if not shutil.which('sha256sum'):
    pytest.skip('there is no sha256sum')
  with open(tmp_path / 'sums', 'w') as f:
    names = [path.relative_to(tmp_path) for path in files]
    subprocess.run(['sha256sum', *names], cwd=tmp_path, stdout=f, check=True)
  assert prepared_files.check_source(files, str(tmp_path / 'sums')) == 4000


def test_a_file_that_differs_is_refused(tmp_path, files):
  lines = [f'{digest(path.read_bytes())}  {path.name}\n' for path in files]
  (tmp_path / 'sums').write_text(''.join(lines))
  files[1].write_bytes(b'b d' * 1000)
  with pytest.raises(ValueError, match=r'b c has the SHA-256 .* says'):
    prepared_files.check_source(files, str(tmp_path / 'sums'))


@pytest.mark.parametrize(
    'line, words',
    [
        (f'{"0" * 64}  other', r'has no checksum of .*data/a'),
        ('abc  a', 'line 2: expected a SHA-256'),
        ('a', 'line 2'),
        ('0' * 64, 'line 2'),
        ('0' * 63 + '  a', 'line 2'),
    ],
)
def test_a_list_without_a_file_or_malformed_is_refused(
    tmp_path, files, line, words
):
  (tmp_path / 'sums').write_text(f'\n{line}\n')
  with pytest.raises(ValueError, match=words):
    prepared_files.check_source(files, str(tmp_path / 'sums'))
