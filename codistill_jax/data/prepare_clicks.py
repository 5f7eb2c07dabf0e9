"""A preparation of clicks: lines of Criteo's format -> rows on disk, resumable.

Everything streams. The work goes in *rounds* of so many lines; a round writes a
shard of each split, a run of value counts and then, last, `progress.json`,
which says what is done. A preparation that was killed at any moment goes on
when it is called again with the same arguments, and ends with the same files,
byte by byte, as one that was not. `meta.json`, written at the very end, makes
the directory a data set.

How lines are split:

* 'time': Kaggle's lines are in the order of time, over seven days. The last
  lines are the test split, those before them the validation split: a model is
  judged on what comes after what it learned from, as in use.
* 'hash': by the number of the line, at random: splits of one distribution, as
  in most work on the Kaggle data; it makes the task a little easier.

Lines are numbered with the bad ones, so that a line's split does not depend on
which others are good.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codistill_jax.data import (
    click_features,
    click_shards,
    criteo,
    line_blocks,
    shards,
    value_counts,
)
from codistill_jax.data.rounds import PROGRESS, Progress
from codistill_jax.storage import locks

SPLIT_BY = ('time', 'hash')
DEFAULT_SHARD_LINES = 1 << 20


def prepare(
    output: str | os.PathLike,
    source: str,
    *,
    split: str = 'time',
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 0,
    max_lines: int | None = None,
    shard_lines: int = DEFAULT_SHARD_LINES,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Prepares clicks, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    source: 'criteo:PATH_OR_GLOB', of files that may end in .gz.
    split: 'time' or 'hash'; see the head of this file.
    validation_fraction: Share of the lines in the validation split.
    test_fraction: Share of the lines in the test split.
    seed: Of the split by hash.
    max_lines: Stop after so many lines of the source; None: all.
    shard_lines: Lines of a round; some 170 bytes of memory each.
    report: Takes a line about what goes on.

  Returns:
    What `meta.json` holds.

  Raises:
    ValueError: If an argument or the data are unusable, or `output` holds
      anything but a preparation with the same arguments.
    OSError: If something cannot be read or written.
  """
  config = {
      'source': source,
      'split': split,
      'validation_fraction': validation_fraction,
      'test_fraction': test_fraction,
      'seed': seed,
      'max_lines': max_lines,
      'shard_lines': shard_lines,
  }
  _check_arguments(config)
  output = pathlib.Path(output)
  if (output / click_shards.META).exists():
    meta = click_shards.read_meta(output)
    _check_config(output, config, meta['config'])
    _clean(output)  # Killed between the last two steps of `_Preparation.run`.
    report(f'{output} is prepared already; nothing to do.')
    return meta
  paths = open_source(source)
  with locks.exclusive(output, 'preparing'):
    return _Preparation(output, config, paths, report).run()


def _check_arguments(config: dict[str, Any]) -> None:
  if config['split'] not in SPLIT_BY:
    raise ValueError(
        f"split must be one of {', '.join(SPLIT_BY)}; got {config['split']!r}."
    )
  fractions = config['validation_fraction'], config['test_fraction']
  if min(fractions) < 0 or sum(fractions) >= 1:
    raise ValueError(
        'validation_fraction and test_fraction must be 0 or more and below 1'
        f' together; got {fractions[0]} and {fractions[1]}.'
    )
  for name in ('max_lines', 'shard_lines'):
    if config[name] is not None and config[name] < 1:
      raise ValueError(f'{name} must be 1 or more; got {config[name]}.')
  if config['seed'] < 0:
    raise ValueError(f"seed must be 0 or more; got {config['seed']}.")


def open_source(spec: str) -> list[epath.Path]:
  """The files of 'criteo:PATH_OR_GLOB', sorted.

  Raises:
    ValueError: If the spec is malformed.
    FileNotFoundError: If no file matches.
  """
  kind, _, pattern = spec.partition(':')
  if kind != 'criteo' or not pattern:
    raise ValueError(f'Unknown source {spec!r}; expected criteo:PATH_OR_GLOB.')
  return line_blocks.expand(pattern)


def fingerprint(paths: list[epath.Path]) -> str:
  """A hash of the names and sizes of the files."""
  listing = [(path.name, path.stat().length) for path in paths]
  return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _check_config(
    output: pathlib.Path, config: dict[str, Any], stored: dict[str, Any]
) -> None:
  for name, value in config.items():
    if stored.get(name) != value:
      raise ValueError(
          f'{output} was prepared with {name}={stored.get(name)!r}, now it is'
          f' {value!r}; use the same settings, choose another output or delete'
          ' the directory.'
      )


def _clean(output: pathlib.Path) -> None:
  (output / PROGRESS).unlink(missing_ok=True)
  shutil.rmtree(output / 'runs', ignore_errors=True)


class _Preparation(NamedTuple):
  """An unfinished preparation."""

  output: pathlib.Path
  config: dict[str, Any]
  paths: list[epath.Path]
  report: Callable[[str], None]

  def run(self) -> dict[str, Any]:
    """From wherever it is to the end."""
    state = self._start_or_resume()
    split_of = make_splitter(self.config, state['total_lines'])
    with Progress(
        state['lines'], state['total_lines'], self.report, noun='lines'
    ) as progress:
      self._rounds(state, split_of, progress.advance)
    self._check_splits(state)
    self.report('Counting the values of each column.')
    meta = {
        **state,
        'counts': [self._merge(state, k) for k in range(criteo.NUM_CATEGORIES)],
    }
    click_shards.write_meta(self.output, meta)
    _clean(self.output)
    return meta

  def _start_or_resume(self) -> dict[str, Any]:
    path = self.output / PROGRESS
    found = fingerprint(self.paths)
    if path.exists():
      state = click_shards.read_json(path)
      _check_config(self.output, self.config, state['config'])
      if state['source_fingerprint'] != found:
        raise ValueError(
            f'The files of {self.config["source"]} have changed since'
            f' {self.output} was prepared from them; choose another output or'
            ' delete the directory.'
        )
      self.report(f'Continuing in {self.output} at line {state["lines"]:,}.')
      return state
    self._check_unused()
    state = {
        'config': self.config,
        'source_fingerprint': found,
        'total_lines': self._total_lines(),
        'lines': 0,
        'rejects': {},
        'damaged_files': [],
        'splits': {
            split: {'rows': 0, 'positives': 0, 'shards': []}
            for split in click_shards.SPLITS
        },
    }
    shards.write_json(path, state)
    return state

  def _check_unused(self) -> None:
    """Refuses to mix data with somebody else's files."""
    own = PROGRESS + '.tmp'  # Killed in the very first write.
    foreign = sorted(p.name for p in self.output.iterdir() if p.name != own)
    if foreign:
      raise ValueError(
          f'{self.output} holds {foreign[0]}, but no preparation of clicks;'
          ' choose another output or empty the directory.'
      )

  def _total_lines(self) -> int | None:
    """Where the last lines begin is known only after counting all."""
    most = self.config['max_lines']
    if self.config['split'] != 'time':
      return most
    self.report('Counting lines.')
    lines = line_blocks.count_lines(self.paths)
    return lines if most is None else min(lines, most)

  def _rounds(
      self,
      state: dict[str, Any],
      split_of: Callable[[np.ndarray], np.ndarray],
      advance: Callable[[int], None],
  ) -> None:
    """All rounds that are left, each of them added to `state`."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []

    def end_round(lines: int) -> None:
      if parts:
        numbers, rows = (np.concatenate(part) for part in zip(*parts))
        self._write(state, rows, split_of(numbers))
        parts.clear()
      advance(lines - state['lines'])
      state['lines'] = lines
      shards.write_json(self.output / PROGRESS, state)

    blocks = line_blocks.read_blocks(
        self.paths, state['lines'], state['total_lines']
    )
    done = state['lines']
    for block, last in line_blocks.cut_every(
        blocks, self.config['shard_lines']
    ):
      if block.damaged_file is not None:
        # A set: after a restart, files before the first line are named again.
        damaged = {*state['damaged_files'], block.damaged_file}
        state['damaged_files'] = sorted(damaged)
        continue
      parsed = criteo.parse(block.data)
      parts.append((block.first + parsed.lines, parsed.rows))
      for reason, count in parsed.rejects.items():
        state['rejects'][reason] = state['rejects'].get(reason, 0) + count
      done = block.first + block.lines
      if last:
        end_round(done)
    end_round(done)

  def _write(
      self, state: dict[str, Any], rows: np.ndarray, split_N: np.ndarray
  ) -> None:
    """Writes the shards of a round and its run of counts."""
    for i, name in enumerate(click_shards.SPLITS):
      chosen = rows[split_N == i]
      sizes = state['splits'][name]
      number = len(sizes['shards'])
      if not len(chosen):
        continue
      if name == 'train':
        path = value_counts.run_path(self.output, number)
        value_counts.write_run(path, chosen[:, -criteo.NUM_CATEGORIES :])
      digest = click_shards.write_hashed(
          click_shards.rows_path(self.output, name, number),
          lambda f, array=chosen: np.save(f, array),
      )
      sizes['shards'].append({'rows': len(chosen), 'sha256': digest})
      sizes['rows'] += len(chosen)
      sizes['positives'] += int(chosen[:, 0].sum())

  def _merge(self, state: dict[str, Any], column: int) -> dict[str, Any]:
    """Writes the counts of one column in the training split."""
    shards_done = len(state['splits']['train']['shards'])
    runs = [value_counts.run_path(self.output, n) for n in range(shards_done)]
    values = 0

    def write(file) -> None:
      nonlocal values
      for pairs in value_counts.merged_column(
          runs, criteo.NUM_CATEGORIES, column
      ):
        values += len(pairs)
        file.write(pairs.astype('<u4').tobytes())

    path = click_shards.counts_path(self.output, column)
    digest = click_shards.write_hashed(path, write)
    return {'values': values, 'sha256': digest}

  def _check_splits(self, state: dict[str, Any]) -> None:
    config = self.config
    wanted = {
        'train': True,
        'validation': config['validation_fraction'] > 0,
        'test': config['test_fraction'] > 0,
    }
    for name, want in wanted.items():
      if want and not state['splits'][name]['rows']:
        raise ValueError(
            f'Of {state["lines"]:,} lines, none that is good fell into the'
            f' {name} split (rejects: {rejects_text(state)}); check the source,'
            ' or choose other fractions, and another output.'
        )


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
  key = np.random.SeedSequence((6, config['seed'])).generate_state(1)
  shares = np.asarray([1 - validation - test, 1 - test])
  # Twice, so that line numbers beyond 2**32 count too.
  mix = click_features.mix32

  def split_of(numbers: np.ndarray) -> np.ndarray:
    low, high = numbers.astype(np.uint32), (numbers >> 32).astype(np.uint32)
    draw = mix(mix(low ^ key) ^ high)
    return np.searchsorted(shares, draw / 2.0**32, side='right')

  return split_of


def rejects_text(state: dict[str, Any]) -> str:
  """'3 bad_label, 1 wrong_columns', or 'none'."""
  found = dict(state['rejects'])
  if state['damaged_files']:
    found['damaged_file'] = len(state['damaged_files'])
  counts = (f'{found[reason]:,} {reason}' for reason in sorted(found))
  return ', '.join(counts) or 'none'


def summary(meta: dict[str, Any]) -> str:
  """A few lines about prepared clicks."""
  lines = [
      f'{name}: {split["rows"]:,} rows,'
      f' {split["positives"] / max(1, split["rows"]):.2%} positive,'
      f' {len(split["shards"])} shards'
      for name, split in meta['splits'].items()
  ]
  values = [count['values'] for count in meta['counts']]
  lines.append(f'rejected lines: {rejects_text(meta)}')
  lines.append(
      f'categories: {sum(values):,} values in {len(values)} columns of the'
      f' training split, {max(values):,} in the largest'
  )
  return '\n'.join(lines)
