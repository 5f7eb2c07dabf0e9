"""Prepared data of arbitrary tokens, made without a tokenizer, for tests."""

import hashlib

import numpy as np

from codistill_jax.data import shards
from codistill_jax.data.tokenizer import END_ID, START_ID

MODEL = b'stands for a tokenizer'


def write_data(data_dir, train, validation=((5, 6, 7),), vocab_size=5000):
  """A data set whose shards hold the given documents (lists of pieces)."""
  splits = {}
  for split, parts in (('train', train), ('validation', [validation])):
    described = []
    for i, part in enumerate(part for part in parts if len(part)):
      documents = [np.asarray([START_ID, *d, END_ID]) for d in part]
      dtype = shards.token_dtype(vocab_size)
      shards.write_shard(data_dir, split, i, documents, dtype)
      tokens = sum(map(len, documents))
      described.append({'documents': len(documents), 'tokens': tokens})
    splits[split] = {'shards': described}
  shards.write_file(data_dir / 'tokenizer.model', lambda f: f.write(MODEL))
  meta = {
      'format_version': 1,
      'vocab_size': vocab_size,
      'tokenizer_sha256': hashlib.sha256(MODEL).hexdigest(),
      'splits': splits,
  }
  shards.write_json(data_dir / 'meta.json', meta)
  return data_dir


def unlike_documents(lengths):
  """Documents of these lengths in which no piece occurs twice."""
  pieces = iter(range(3, 10**9))
  return [[next(pieces) for _ in range(length)] for length in lengths]
