"""Lines -> rows on disk: the part of a preparation of clicks that takes long.

The work goes in *rounds* of so many lines; a round writes a shard of each
split, a run of value counts and then, last, `progress.json`, which says what is
done.
What a killed round left behind is written again, byte by byte the same, by the
next run with the same settings.

How lines are split:

* 'time': Kaggle's lines are in the order of time, over seven days. The last
  lines are the test split, those before them the validation split: a model is
  judged on what comes after what it learned from, as in use.
* 'hash': by the number of the line, at random: splits of one distribution, as
  in most work on the Kaggle data; it makes the task a little easier.

Lines are numbered with the bad ones, so that a line's split does not depend on
which others are good.

Shape suffixes: N rows.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from codistill_jax.data import (
    click_shards,
    criteo,
    line_blocks,
    order,
    shards,
    value_counts,
)
from codistill_jax.data.rounds import PROGRESS

SPLIT_BY = ('time', 'hash')

_SPLIT_KEY = 6  # The next after those of order.py.


def first_state(
    config: dict[str, Any], source_fingerprint: str, total_lines: int | None
) -> dict[str, Any]:
  """The state of a preparation before its first round.

  Keys: `lines`, how many were read; `rejects`, a count for each reason;
  `damaged_files`, numbers of the files whose rest could not be read; `splits`,
  the sizes of each split and of its shards; and the arguments.
  """
  return {
      'config': config,
      'source_fingerprint': source_fingerprint,
      'total_lines': total_lines,
      'lines': 0,
      'rejects': {},
      'damaged_files': [],
      'splits': {
          split: {'rows': 0, 'positives': 0, 'shards': []}
          for split in click_shards.SPLITS
      },
  }


def make_splitter(
    config: dict[str, Any], total_lines: int | None
) -> Callable[[np.ndarray], np.ndarray]:
  """Line numbers -> the split of each, as an index into SPLITS."""
  validation, test = config['validation_fraction'], config['test_fraction']
  if config['split'] == 'time':
    test_lines = int(total_lines * test)
    validation_lines = int(total_lines * validation)
    first_test = total_lines - test_lines
    bounds = np.asarray([first_test - validation_lines, first_test])
    return lambda numbers: np.searchsorted(bounds, numbers, side='right')
  key = np.random.SeedSequence((_SPLIT_KEY, config['seed'])).generate_state(1)
  shares = np.asarray([1 - validation - test, 1 - test])
  # Twice, so that line numbers beyond 2**32 count too.
  mix = order.mix32

  def split_of(numbers: np.ndarray) -> np.ndarray:
    low, high = numbers.astype(np.uint32), (numbers >> 32).astype(np.uint32)
    draw = mix(mix(low ^ key) ^ high)
    return np.searchsorted(shares, draw / 2.0**32, side='right')

  return split_of


class RoundWriter:
  """Writes rows into shards below `output`, round by round.

  Attributes:
    state: See `first_state`; on disk as it was at the end of the last round.
  """

  def __init__(self, output: pathlib.Path, state: dict[str, Any]):
    self.state = state
    self._output = output
    self._split_of = make_splitter(state['config'], state['total_lines'])
    # Line numbers and rows of the round so far.
    self._parts: list[tuple[np.ndarray, np.ndarray]] = []

  def run(
      self, paths: Sequence[epath.Path], advance: Callable[[int], None]
  ) -> None:
    """All rounds that are left; `advance(n)` hears of n more lines."""
    state, done = self.state, self.state['lines']
    blocks = line_blocks.read_blocks(paths, done, state['total_lines'])
    for block, last in line_blocks.cut_every(
        blocks, state['config']['shard_lines']
    ):
      if block.damaged_file is not None:
        # A set: after a restart, files before the first line are named again.
        damaged = {*state['damaged_files'], block.damaged_file}
        state['damaged_files'] = sorted(damaged)
        continue
      self._add(block)
      advance(block.lines)
      done = block.first + block.lines
      if last:
        self._end_round(done)
    self._end_round(done)

  def _add(self, block: line_blocks.Block) -> None:
    parsed = criteo.parse(block.data)
    self._parts.append((block.first + parsed.lines, parsed.rows))
    rejects = self.state['rejects']
    for reason, count in parsed.rejects.items():
      rejects[reason] = rejects.get(reason, 0) + count

  def _end_round(self, lines: int) -> None:
    """Writes the shards of the round, then that they are written."""
    if self._parts:
      numbers, rows = (np.concatenate(part) for part in zip(*self._parts))
      self._parts.clear()
      split_N = self._split_of(numbers)
      for i, name in enumerate(click_shards.SPLITS):
        self._write(name, rows[split_N == i])
    self.state['lines'] = lines
    shards.write_json(self._output / PROGRESS, self.state)

  def _write(self, split: str, rows: np.ndarray) -> None:
    """Writes one shard, and of the training split its run of counts."""
    if not len(rows):
      return
    sizes = self.state['splits'][split]
    number = len(sizes['shards'])
    if split == 'train':
      path = value_counts.run_path(self._output, number)
      value_counts.write_run(path, rows[:, -criteo.NUM_CATEGORIES :])
    digest = shards.write_file(
        click_shards.rows_path(self._output, split, number),
        lambda f: np.save(f, rows),
    )
    sizes['shards'].append({'rows': len(rows), 'sha256': digest})
    sizes['rows'] += len(rows)
    sizes['positives'] += int(rows[:, 0].sum())

  def write_counts(self) -> list[dict[str, Any]]:
    """Writes the value counts of each column; describes the files."""
    return [self._merge(k) for k in range(criteo.NUM_CATEGORIES)]

  def _merge(self, column: int) -> dict[str, Any]:
    done = len(self.state['splits']['train']['shards'])
    runs = [value_counts.run_path(self._output, n) for n in range(done)]
    values = 0

    def write(file) -> None:
      nonlocal values
      for pairs in value_counts.merged_column(
          runs, criteo.NUM_CATEGORIES, column
      ):
        values += len(pairs)
        file.write(pairs.astype('<u4').tobytes())

    path = click_shards.counts_path(self._output, column)
    digest = shards.write_file(path, write)
    return {'values': values, 'sha256': digest}
