"""A preparation, of either kind: killed at any moment, it ends the same."""

import fcntl
import hashlib
import json
import os
import pathlib
import random
import shutil
import typing
from collections.abc import Callable

import prepared
import pytest
from prepared import contents

from codistill_jax.data import criteo, prepare, prepared_files, shards

ROOT = pathlib.Path(__file__).parent.parent


class Kind(typing.NamedTuple):
  """A kind of data with a small source of it."""

  run: Callable
  source: str
  kind: prepared_files.DataKind
  settings: dict  # Others, each of which makes other data.


@pytest.fixture(scope='module', params=['text', 'clicks'])
def kind(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('source')
  if request.param == 'text':
    source = prepared.write_corpus(folder / 'a', prepared.texts(120))
    others = {
        'vocab_size': 321,
        'validation_fraction': 0.3,
        'seed': 1,
        'shard_tokens': 501,
        'max_documents': 100,
        'tokenizer_bytes': 10**6,
        'text_key': 'body',
        'max_document_bytes': 10**6,
        'filters': ['long_paragraphs'],
    }
    return Kind(prepared.run_text, source, shards.KIND, others)
  source = prepared.write_clicks(folder)
  others = {
      'split': 'hash',
      'validation_fraction': 0.3,
      'test_fraction': 0.3,
      'seed': 1,
      'shard_lines': 65,
      'max_lines': 100,
  }
  return Kind(prepared.run_clicks, source, criteo.KIND, others)


class Killed(BaseException):
  """Stands for kill -9: nothing in the program catches it."""


@pytest.fixture
def killed(monkeypatch):
  """`killed(number, before, run)` dies at the number-th file it writes.

  Returns whether it died: else it had fewer files to write.
  """
  replace, writes = os.replace, 0

  def attempt(number, before, run):
    def stop(*paths):
      nonlocal writes
      writes += 1
      if writes == number and before:
        raise Killed
      replace(*paths)
      if writes == number:
        raise Killed

    nonlocal writes
    writes = 0
    with monkeypatch.context() as patch:
      patch.setattr(os, 'replace', stop)
      try:
        run()
      except Killed:
        return True
    return False

  return attempt


def test_killed_at_any_write_it_ends_with_the_same_files(
    tmp_path, kind, killed
):
  size = 'shard_tokens' if kind.run is prepared.run_text else 'shard_lines'
  options = {size: {'shard_tokens': 1500, 'shard_lines': 300}[size]}
  kind.run(tmp_path / 'whole', kind.source, **options)
  expected = contents(tmp_path / 'whole')
  assert not any(
      name.endswith(('.tmp', 'settings.json')) or 'pieces' in name
      for name in expected
  )
  number, died = 0, True
  while died:
    number += 1 if number < 15 else 6  # Counts of clicks, one like another.
    for before in (True, False):
      output = tmp_path / f'{number}{before}'
      run = lambda o=output: kind.run(o, kind.source, **options)
      died = killed(number, before, run)
      assert kind.run(output, kind.source, **options)[0]
      assert contents(output) == expected
      shutil.rmtree(output)
  # Settings, several pieces and their descriptions, meta.
  assert number > 15


def test_killed_again_and_again_it_gets_there(tmp_path, kind, killed):
  kind.run(tmp_path / 'whole', kind.source)
  rng, deaths = random.Random(0), 0
  run = lambda: kind.run(tmp_path / 'a', kind.source)
  while killed(rng.choice([3, 8, 30]), rng.random() < 0.5, run):
    deaths += 1
    assert deaths < 200
  assert deaths > 2
  assert contents(tmp_path / 'a') == contents(tmp_path / 'whole')


def test_the_number_of_workers_makes_no_difference(tmp_path, kind, killed):
  """Not even where a preparation is continued with another one."""
  kind.run(tmp_path / 'whole', kind.source)
  kind.run(tmp_path / 'three', kind.source, workers=3)
  assert killed(20, True, lambda: kind.run(tmp_path / 'a', kind.source))
  # As other workers leave them: a later piece is there, an earlier one is not.
  (tmp_path / 'a' / prepare.PIECES / '00000.json').unlink()
  _, lines = kind.run(tmp_path / 'a', kind.source, workers=2)
  assert lines[0].startswith('Continuing in')
  assert contents(tmp_path / 'three') == contents(tmp_path / 'whole')
  assert contents(tmp_path / 'a') == contents(tmp_path / 'whole')


def test_what_is_done_is_not_done_again(tmp_path, kind, killed):
  output = tmp_path / 'data'
  killed(20, True, lambda: kind.run(output, kind.source))
  done = {
      path: path.stat().st_mtime_ns
      for path in (output / prepare.PIECES).iterdir()
      if path.suffix == '.json'
  }
  assert len(done) >= 2
  before = {
      path: path.stat().st_mtime_ns
      for path in (output / 'train').iterdir()
      if output / prepare.PIECES / f'{path.name[:5]}.json' in done
  }
  assert before
  kind.run(output, kind.source)
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_finished_data_are_left_alone(tmp_path, kind):
  meta, _ = kind.run(tmp_path, kind.source)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  again, lines = kind.run(tmp_path, kind.source)
  assert again == meta == json.loads((tmp_path / 'meta.json').read_text())
  assert lines == [f'{tmp_path} is prepared already; nothing to do.']
  after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  assert before == after


def renamed(source):
  """Names the same files otherwise."""
  folder, _, name = source.rpartition('/')
  return f'{folder}/../{pathlib.Path(folder).name}/{name}'


@pytest.mark.parametrize('finished', [True, False])
def test_other_settings_are_refused_and_damage_nothing(
    tmp_path, kind, killed, finished
):
  killed(
      9**9 if finished else 12, True, lambda: kind.run(tmp_path, kind.source)
  )
  assert (tmp_path / 'meta.json').exists() == finished
  before = contents(tmp_path)
  for name, value in kind.settings.items():
    with pytest.raises(ValueError, match=f'was prepared with {name}='):
      kind.run(tmp_path, kind.source, **{name: value})
  with pytest.raises(ValueError, match='was prepared with source='):
    kind.run(tmp_path, renamed(kind.source))
  assert contents(tmp_path) == before
  kind.run(tmp_path, kind.source)


@pytest.mark.parametrize('finished', [True, False])
def test_a_changed_source_is_noticed(tmp_path, kind, killed, finished):
  head, _, pattern = kind.source.partition(':')
  source = tmp_path / 'source'
  shutil.copytree(pathlib.Path(pattern).parent, source)
  run = lambda: kind.run(tmp_path / 'data', f'{head}:{source}/*')
  killed(9**9 if finished else 12, True, run)
  for path in source.iterdir():
    path.write_bytes(path.read_bytes() + b'\n')
  with pytest.raises(ValueError, match='have changed since'):
    run()
  shutil.rmtree(source)
  if finished:  # Data outlive their source.
    run()


def test_files_of_somebody_else_are_refused(tmp_path, kind):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(ValueError, match=r'holds thesis.tex, but no prep'):
    kind.run(tmp_path, kind.source)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_two_at_a_time_are_refused(tmp_path, kind):
  handle = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)
  try:
    with pytest.raises(ValueError, match='Another process is preparing'):
      kind.run(tmp_path, kind.source)
  finally:
    os.close(handle)
  kind.run(tmp_path, kind.source)


def checksums_of(source, path):
  """Writes what `sha256sum` would; returns its path."""
  files = pathlib.Path(source.partition(':')[2])
  files = files.parent.glob(files.name)
  path.write_text(
      ''.join(
          f'{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}\n'
          for file in files
      )
  )
  return str(path)


def test_checksums_of_the_source(tmp_path, kind):
  listed = checksums_of(kind.source, tmp_path / 'good')
  output = tmp_path / 'data'
  (tmp_path / 'bad').write_text(
      '\n'.join(
          line[:64][::-1] + line[64:]
          for line in pathlib.Path(listed).read_text().splitlines()
      )
  )
  with pytest.raises(ValueError, match='has the SHA-256'):
    kind.run(output, kind.source, source_checksums=str(tmp_path / 'bad'))
  assert not output.exists()
  _, lines = kind.run(output, kind.source, source_checksums=listed)
  assert 'checksums agree' in lines[0]


def test_finished_by_another_process_meanwhile(tmp_path, kind):
  listed = checksums_of(kind.source, tmp_path / 'sums')
  output, lines = tmp_path / 'data', []

  def report(line):
    lines.append(line)
    if 'checksums agree' in line:  # After a first look, before the lock.
      kind.run(output, kind.source)

  kind.run(output, kind.source, source_checksums=listed, report=report)
  assert lines[1:] == [f'{output} is prepared already; nothing to do.']


def test_verify_compares_every_byte_of_every_file(tmp_path, kind):
  kind.run(tmp_path, kind.source)
  paths = [path for path in tmp_path.rglob('*.*') if path.name != 'meta.json']
  sizes = [path.stat().st_size for path in paths]
  assert prepared_files.verify(tmp_path, kind.kind) == (len(paths), sum(sizes))
  for path in paths:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    with pytest.raises(ValueError, match=f'{path.name} is'):
      prepared_files.verify(tmp_path, kind.kind)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f'{path.name} is missing'):
      prepared_files.verify(tmp_path, kind.kind)
    path.write_bytes(content)
  prepared_files.verify(tmp_path, kind.kind)


@pytest.mark.parametrize('changes', [{'seed': -1}, {'workers': 0}])
def test_bad_arguments(tmp_path, kind, changes):
  with pytest.raises(ValueError, match=f'{next(iter(changes))} must be'):
    kind.run(tmp_path / 'data', kind.source, **changes)
  assert not (tmp_path / 'data').exists()
