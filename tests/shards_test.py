"""Token files: what is damaged or does not belong is refused, by name."""

import json

import numpy as np
import pytest
from token_files import unlike_documents, write_data

from codistill_jax.data import shards


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
            'lacks format',
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


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
  path = tmp_path / 'folder' / 'file'
  shards.write_file(path, lambda f: f.write(b'whole'))

  def fail(f):
    f.write(b'half')
    f.flush()
    raise OSError('No space left on device')

  with pytest.raises(OSError, match='No space'):
    shards.write_file(path, fail)
  assert path.read_bytes() == b'whole'


def write_with_checksums(data_dir):
  write_data(data_dir, [unlike_documents([5, 3]), unlike_documents([4])])
  documents = [np.asarray([1, 9, 2])]
  described = shards.write_shard(data_dir, 'train', 0, documents, np.uint16)
  meta = json.loads((data_dir / 'meta.json').read_text())
  meta['splits']['train']['shards'] = [described]
  shards.write_json(data_dir / 'meta.json', meta)


def flip(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 64
  path.write_bytes(content)


def test_verify_reads_every_byte(tmp_path):
  write_with_checksums(tmp_path)
  found = shards.verify(tmp_path)
  # The tokenizer and one shard; the validation split has no checksums.
  assert (found.files, found.unknown) == (3, 2)
  for name in (TOKENS, OFFSETS):
    content = (tmp_path / name).read_bytes()
    flip(tmp_path / name)
    with pytest.raises(ValueError, match=f'{name} is damaged .SHA-256'):
      shards.verify(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
      shards.verify(tmp_path)
    (tmp_path / name).write_bytes(content)
  assert shards.verify(tmp_path) == found
  flip(tmp_path / 'tokenizer.model')
  with pytest.raises(ValueError, match='is not the tokenizer'):
    shards.verify(tmp_path)
