"""Data: sources of documents, tokenizer, token shards, partitions, streams.

Nothing here imports TensorFlow or `datasets` at import time: they load inside
the function that needs them, so that a machine with prepared tokens can train
without them.
"""
