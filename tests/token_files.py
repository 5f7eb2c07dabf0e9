"""Prepared data of arbitrary tokens, made without a tokenizer, for tests."""

import hashlib

import numpy as np

from codistill_jax.data import prepared_files, shards
from codistill_jax.data.tokenizer import END_ID, START_ID

MODEL = b'stands for a tokenizer'


def write_data(data_dir, train, validation=((5, 6, 7),), vocab_size=5000):
  """A data set whose shards hold the given documents (lists of pieces)."""
  splits = {}
  dtype = shards.token_dtype(vocab_size)
  for split, parts in (('train', train), ('validation', [validation])):
    documents = [[np.asarray([START_ID, *d, END_ID]) for d in p] for p in parts]
    splits[split] = {
        'shards': [
            shards.write_shard(data_dir, split, i, part, dtype)
            for i, part in enumerate(documents)
        ]
    }
  prepared_files.write_file(data_dir / shards.TOKENIZER, MODEL)
  meta = {
      'format_version': 1,
      'vocab_size': vocab_size,
      'tokenizer_sha256': hashlib.sha256(MODEL).hexdigest(),
      'splits': splits,
  }
  prepared_files.write_json(data_dir / prepared_files.META, meta)
  return data_dir


def unlike_documents(lengths):
  """Documents of these lengths in which no piece occurs twice."""
  pieces = iter(range(3, 10**9))
  return [[next(pieces) for _ in range(length)] for length in lengths]
