"""Small preparations of both kinds, for tests."""

import json
import random

from click_files import write_lines

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


def contents(folder):
  """Returns all files of a folder: name -> bytes."""
  return {
      path.relative_to(folder).as_posix(): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file()
  }
