"""Token files: what is damaged or does not belong is refused, by name."""

import hashlib
import json
import os

import numpy as np
import pytest
from token_files import unlike_documents, write_data

from codistill_jax.data import prepared_files, shards


def test_large_vocabularies_take_four_bytes(tmp_path):
  write_data(tmp_path, [[[70_000, 65_536]]], vocab_size=70_001)
  data = shards.open_tokens(tmp_path, 'train')
  assert data.gather(np.arange(4)).tolist() == [1, 70_000, 65_536, 2]
  assert shards.token_dtype(2**16) == np.uint16
  assert shards.token_dtype(2**16 + 1) == np.uint32


TOKENS, OFFSETS = 'train/00000.tokens.npy', 'train/00000.offsets.npy'
META, MODEL = 'meta.json', 'tokenizer.model'


def edit(**changes):
  """Damages `meta.json`."""

  def damage(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return damage


def truncate(size):
  return lambda path: path.write_bytes(path.read_bytes()[:size])


def replace(content):
  if isinstance(content, bytes):
    return lambda path: path.write_bytes(content)
  return lambda path: np.save(path, content)


def unlink(path):
  path.unlink()


NO_TRAINING = {'train': {'shards': []}, 'validation': {}}


@pytest.mark.parametrize(
    ('name', 'damage', 'message'),
    [
        (META, unlink, 'no meta.json'),
        (META, truncate(30), 'meta.json is dam'),
        (META, truncate(0), 'meta.json is dam'),
        (META, replace(b'[]'), 'not a JSON'),
        (META, replace(b'{}'), 'lacks format'),
        (META, edit(format_version=2), 'version 2, this'),
        (META, edit(tokenizer_sha256='0'), 'sha256'),
        (META, edit(splits=NO_TRAINING), 'train split of .* is empty'),
        (MODEL, replace(b'another'), 'not the tokenizer that made these'),
        (MODEL, unlink, 'tokenizer.model is missing'),
        (TOKENS, unlink, 'tokens.npy is missing'),
        (TOKENS, truncate(0), 'tokens.npy is damaged'),
        (TOKENS, truncate(50), 'tokens.npy is damaged'),
        (TOKENS, truncate(130), 'tokens.npy is damaged'),
        (TOKENS, replace(b'x' * 1000), 'tokens.npy is damaged'),
        (TOKENS, replace(np.arange(12)), 'holds int64'),
        (
            TOKENS,
            replace(np.arange(11, dtype=np.uint16)),
            r'holds uint16 \(11,\), expected uint16 \(12,\)',
        ),
        (OFFSETS, unlink, 'offsets.npy is missing'),
        (OFFSETS, replace(np.asarray([0, 7, 11])), 'does not fit its token'),
        (OFFSETS, replace(np.asarray([0, 14, 12])), 'does not fit its token'),
    ],
)
def test_damaged_data_are_refused_by_name(tmp_path, name, damage, message):
  write_data(tmp_path, [unlike_documents([5, 3])])
  shards.open_tokens(tmp_path, 'train')
  damage(tmp_path / name)
  error = FileNotFoundError if damage is unlink else ValueError
  with pytest.raises(error, match=message) as raised:
    shards.open_tokens(tmp_path, 'train')
  assert str(tmp_path) in str(raised.value)
  assert '\n' not in str(raised.value)
  assert 'prepare' in str(raised.value)


def test_what_is_not_there_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  for name in ('missing', 'file'):
    with pytest.raises(FileNotFoundError, match='holds no prepared data'):
      shards.open_tokens(tmp_path / name, 'train')
  with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
    shards.open_tokens(write_data(tmp_path, [[[5]]]), 'dev')


def test_a_shard_without_documents_has_no_files(tmp_path):
  write_data(tmp_path, [[[5]], [], [[6], [7]]])
  data = shards.open_tokens(tmp_path, 'train')
  assert data.gather(np.arange(9)).tolist() == [1, 5, 2, 1, 6, 2, 1, 7, 2]
  assert not (tmp_path / 'train/00001.tokens.npy').exists()
  assert prepared_files.verify(tmp_path, shards.KIND)[0] == 7


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
  path = tmp_path / 'folder' / 'file'
  digest = prepared_files.write_file(path, b'whole')
  assert digest == hashlib.sha256(b'whole').hexdigest()

  def fail(handle):
    assert path.read_bytes() == b'whole'
    raise OSError('No space left on device')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='No space'):
    prepared_files.write_file(path, b'other')
  assert path.read_bytes() == b'whole'
