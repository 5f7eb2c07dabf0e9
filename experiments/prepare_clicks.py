r"""Prepares clicks: lines of Criteo's format -> rows on disk.

  python -m experiments.prepare_clicks --source=criteo:train.txt.gz \
      --output=data/criteo

The format is that of Kaggle's Display Advertising Challenge: a label, 13
integers and 26 categories, separated by tabs. Streaming: 45.8 M
rows need about 1 GB of memory for each worker. Lines that do not fit are
counted by reason and left out. Killed at any moment, the same command
continues; when all is done it says so. The files do not depend on --workers.
"""

from collections.abc import Sequence

from absl import flags

from codistill_jax.data import (
    criteo,
    prepare,
    prepared_files,
)

from . import cli

_STOPPED = 'stopped; the same command goes on'


_FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this binary."""
  cli.define_preparation_flags(
      'lines',
      'as --split says',
      'parse lines, about 1 GB each; default: one for each core that this'
      ' process may use, at most 4, as reading is done by one',
  )
  flags.DEFINE_string(
      'source',
      None,
      'criteo:PATH_OR_GLOB. Files may be compressed; they are read in the'
      ' order of their names. Quote globs.',
  )
  flags.DEFINE_enum(
      'split',
      'time',
      criteo.SPLIT_BY,
      'How lines are split. time: the last ones are the test split, those'
      ' before them the validation split (the lines are in the order of time).'
      ' hash: at random, by the number of the line.',
  )
  flags.DEFINE_float(
      'test_fraction',
      0.05,
      'Share of the lines in the test split.',
      lower_bound=0.0,
      upper_bound=1.0,
  )
  flags.DEFINE_integer(
      'max_lines',
      None,
      'Stop after so many lines of the source. Default: all.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'shard_lines',
      criteo.DEFAULT_SHARD_LINES,
      'Lines of a shard, all splits together. A killed run loses at most the'
      ' shards that it was writing, one for each worker.',
      lower_bound=1,
  )
  flags.DEFINE_bool(
      'verify', False, 'Compare every file with its checksum in the end.'
  )


def main(argv: Sequence[str]) -> None:
  del argv
  if not _FLAGS.output:
    raise ValueError('--output is missing: a directory for the data.')
  if not _FLAGS.source:
    raise ValueError('--source is missing: criteo:PATH_OR_GLOB.')
  # Nothing is to be saved: whenever it ends, the same command goes on.
  cli.StopRequest(_STOPPED).install()
  meta = criteo.prepare_clicks(
      _FLAGS.output,
      _FLAGS.source,
      split=_FLAGS.split,
      validation_fraction=_FLAGS.validation_fraction,
      test_fraction=_FLAGS.test_fraction,
      seed=_FLAGS.seed,
      max_lines=_FLAGS.max_lines,
      shard_lines=_FLAGS.shard_lines,
      source_checksums=_FLAGS.checksums,
      max_rejected=_FLAGS.max_rejected,
      workers=_FLAGS.workers or min(prepare.usable_cores(), 4),
      report=lambda line: print(line, flush=True),
  )
  print(criteo.summary(meta))
  if _FLAGS.verify:
    files, size = prepared_files.verify(_FLAGS.output, criteo.KIND)
    print(f'{files} files, {size:,} bytes: as they were written.')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
