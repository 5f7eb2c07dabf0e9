"""Small files in Criteo's format."""

import gzip

import numpy as np


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
