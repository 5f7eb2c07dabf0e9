"""Small preparations of both kinds, for tests."""

import gzip
import json
import os
import pathlib
import random

import numpy as np
import pytest

from codistill_jax.data import criteo, prepare_text, sources

WORDS = ['the', 'and', 'of', 'that', 'he', 'his', 'for', 'they', 'be', 'is']


def texts(num_documents, seed=0):
  rng = random.Random(seed)
  return [
      f'{i}: ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 60))) + ' ▁ÿ\n'
      for i in range(num_documents)
  ]


def write_corpus(path, documents, damaged=True):
  """Writes JSON lines, four of them bad; returns what names the source."""
  lines = [json.dumps({'text': text}) for text in documents]
  if damaged:
    for place, line in ((5, '{'), (6, '{"text": ""}'), (40, '{}'), (90, '[')):
      lines.insert(place, line)
  path.write_text('\n'.join(lines) + '\n')
  return f'jsonl:{path}'


def read_source(spec, **options):
  """Returns all records of a source, decoded."""
  source = sources.open_source(spec, **options)
  return [sources.decoded(source.decode, raw) for raw in source.raw()]


def line(rng):
  """One good line: 40 columns, some of them empty."""
  integers = [
      '' if rng.random() < 0.3 else str(int(rng.integers(-3, 10**6)))
      for _ in range(13)
  ]
  categories = [
      '' if rng.random() < 0.1 else value(int(rng.integers(k + 2)))
      for k in range(26)
  ]
  return '\t'.join([str(int(rng.integers(2))), *integers, *categories])


def value(number):
  """A category; that of number 0 is 00000000."""
  return f'{number * 2654435761 % 2**32:08x}'


def lines(count, seed=0):
  rng = np.random.default_rng(seed)
  return [line(rng) for _ in range(count)]


def write_lines(path, count, seed=0):
  """Writes a plain or gzip file of good lines; returns them."""
  made = lines(count, seed)
  data = ''.join(f'{text}\n' for text in made).encode()
  path.write_bytes(
      gzip.compress(data, mtime=0) if path.suffix == '.gz' else data
  )
  return made


def expected_row(text):
  """What the row of a line is, worked out in the simplest way."""
  fields = text.split('\t')
  row = [int(fields[0])]
  row += [int(f) % 2**32 if f else 2**31 for f in fields[1:14]]
  row += [int(f, 16) or 1 if f else 0 for f in fields[14:]]
  return row


def write_clicks(folder):
  """Writes three files; the second is cut short, the third has bad lines."""
  write_lines(folder / '0.txt', 200)
  write_lines(folder / '1.gz', 200, seed=1)
  data = (folder / '1.gz').read_bytes()
  (folder / '1.gz').write_bytes(data[: len(data) // 2])
  lines = write_lines(folder / '2.txt', 250, seed=2)
  for place in (3, 77, 249):
    lines[place] = lines[place][:-1] + 'x\t'
  (folder / '2.txt').write_text('\n'.join(lines))
  return f'criteo:{folder}/*'


def run_text(output, source, **changes):
  """Prepares text; returns `meta.json` and what was reported."""
  lines = []
  options = {
      'vocab_size': 320,
      'validation_fraction': 0.2,
      'shard_tokens': 500,
      'report': lines.append,
  }
  return prepare_text.prepare_text(output, source, **options | changes), lines


def run_clicks(output, source, **changes):
  """Prepares clicks; returns `meta.json` and what was reported."""
  lines = []
  options = {
      'validation_fraction': 0.1,
      'test_fraction': 0.2,
      'max_rejected': 0.5,  # One of its three files is cut short.
      'shard_lines': 64,
      'report': lines.append,
  }
  meta = criteo.prepare_clicks(output, source, **options | changes)
  return meta, lines


def shared(name):
  """Returns where real data lie, which are no part of the project."""
  root = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
  path = pathlib.Path(os.environ.get('CODISTILL_SHARED_DATA', root)) / name
  if not path.exists():
    pytest.skip(f'{path} is not there')
  return path


def contents(folder):
  """Returns all files of a folder: name -> bytes."""
  return {
      path.relative_to(folder).as_posix(): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file()
  }
