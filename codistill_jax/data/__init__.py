"""Data: sources of documents, tokenizer, token shards, partitions, streams.

Nothing here imports TensorFlow or `datasets` at import time: they load inside
the function that needs them, so that a machine with prepared tokens can train
without them.
"""

import importlib

__all__ = ['clicks', 'images', 'tables', 'text', 'tokenizer']


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
