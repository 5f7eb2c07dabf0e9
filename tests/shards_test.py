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


def edit_meta(data_dir, **changes):
  path = data_dir / 'meta.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, size):
  path.write_bytes(path.read_bytes()[:size])


TOKENS, OFFSETS = 'train/00000.tokens.npy', 'train/00000.offsets.npy'


@pytest.mark.parametrize(
    ('damage', 'error', 'message'),
    [
        (
            lambda d: (d / 'meta.json').unlink(),
            FileNotFoundError,
            'no meta.json',
        ),
        (
            lambda d: truncate(d / 'meta.json', 30),
            ValueError,
            'meta.json is dam',
        ),
        (
            lambda d: truncate(d / 'meta.json', 0),
            ValueError,
            'meta.json is dam',
        ),
        (
            lambda d: (d / 'meta.json').write_text('[]'),
            ValueError,
            'not a JSON',
        ),
        (
            lambda d: (d / 'meta.json').write_text('{}'),
            ValueError,
            'lacks ',
        ),
        (
            lambda d: edit_meta(d, format_version=2),
            ValueError,
            'version 2, this',
        ),
        (lambda d: edit_meta(d, tokenizer_sha256='0'), ValueError, 'sha256'),
        (
            lambda d: (d / 'tokenizer.model').write_bytes(b'another'),
            ValueError,
            'is not the tokenizer that made these tokens',
        ),
        (
            lambda d: (d / 'tokenizer.model').unlink(),
            FileNotFoundError,
            'tokenizer.model is missing',
        ),
        (
            lambda d: (d / TOKENS).unlink(),
            FileNotFoundError,
            'tokens.npy is mis',
        ),
        (
            lambda d: (d / OFFSETS).unlink(),
            FileNotFoundError,
            'offsets.npy is mi',
        ),
        (
            lambda d: truncate(d / TOKENS, 0),
            ValueError,
            'tokens.npy is damaged',
        ),
        (
            lambda d: truncate(d / TOKENS, 50),
            ValueError,
            'tokens.npy is damaged',
        ),
        (
            lambda d: truncate(d / TOKENS, 130),
            ValueError,
            'tokens.npy is damaged',
        ),
        (
            lambda d: (d / TOKENS).write_bytes(b'x' * 1000),
            ValueError,
            'tokens.npy is damaged',
        ),
        (
            lambda d: np.save(d / TOKENS, np.arange(12)),
            ValueError,
            'holds int64',
        ),
        (
            lambda d: np.save(d / TOKENS, np.arange(11, dtype=np.uint16)),
            ValueError,
            r'holds uint16 \(11,\), expected uint16 \(12,\)',
        ),
        (
            lambda d: np.save(d / OFFSETS, np.asarray([0, 7, 11])),
            ValueError,
            'does not fit its token file',
        ),
        (
            lambda d: np.save(d / OFFSETS, np.asarray([0, 14, 12])),
            ValueError,
            'does not fit its token file',
        ),
        (
            lambda d: edit_meta(
                d, splits={'train': {'shards': []}, 'validation': {}}
            ),
            ValueError,
            'train split of .* is empty',
        ),
    ],
)
def test_damaged_data_are_refused_by_name(tmp_path, damage, error, message):
  write_data(tmp_path, [unlike_documents([5, 3])])
  shards.open_tokens(tmp_path, 'train')
  damage(tmp_path)
  with pytest.raises(error, match=message) as raised:
    shards.open_tokens(tmp_path, 'train')
  assert str(tmp_path) in str(raised.value)
  assert '\n' not in str(raised.value)
  assert 'prepare' in str(raised.value)


@pytest.mark.parametrize('name', ['missing', 'file'])
def test_what_is_no_directory_is_refused(tmp_path, name):
  (tmp_path / 'file').touch()
  with pytest.raises(FileNotFoundError, match='holds no prepared data'):
    shards.open_tokens(tmp_path / name, 'train')


def test_unknown_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="train, validation; got 'test'"):
    shards.open_tokens(write_data(tmp_path, [[[5]]]), 'test')


def test_a_shard_without_documents_has_no_files(tmp_path):
  write_data(tmp_path, [[[5]], [], [[6], [7]]])
  data = shards.open_tokens(tmp_path, 'train')
  assert data.gather(np.arange(9)).tolist() == [1, 5, 2, 1, 6, 2, 1, 7, 2]
  assert not (tmp_path / 'train/00001.tokens.npy').exists()
  assert shards.verify(tmp_path)[0] == 7


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
