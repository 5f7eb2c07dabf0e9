"""A preparation of clicks: lines of Criteo's format -> rows on disk, resumable.

Everything streams; a preparation that was killed at any moment goes on when it
is called again with the same arguments, and ends with the same files, byte by
byte, as one that was not. `click_rounds` says how, and how lines are split.
`meta.json`, written at the very end, makes the directory a data set.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from codistill_jax.data import (
    click_rounds,
    click_shards,
    line_blocks,
    raw_files,
    shards,
)
from codistill_jax.data.rounds import PROGRESS, Progress
from codistill_jax.storage import leases

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
    split: 'time' or 'hash'; see `click_rounds`.
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
    try:
      paths = open_source(source)
    except (ValueError, OSError):
      pass  # Prepared data stay good when their source is gone.
    else:
      _check_source(output, source, paths, meta['source_fingerprint'])
    _clean(output)  # Killed between the last two steps of `_Preparation.run`.
    report(f'{output} is prepared already; nothing to do.')
    return meta
  paths = open_source(source)
  with leases.exclusive(output, 'preparing'):
    return _Preparation(output, config, paths, report).run()


def _check_arguments(config: dict[str, Any]) -> None:
  if config['split'] not in click_rounds.SPLIT_BY:
    raise ValueError(
        f"split must be one of {', '.join(click_rounds.SPLIT_BY)}; got"
        f" {config['split']!r}."
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
  return raw_files.expand(pattern)


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


def _check_source(
    output: pathlib.Path,
    source: str,
    paths: list[epath.Path],
    stored: str,
) -> None:
  if fingerprint(paths) != stored:
    raise ValueError(
        f'The files of {source} have changed since {output} was prepared from'
        ' them; choose another output or delete the directory.'
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
    writer = click_rounds.RoundWriter(self.output, state)
    with Progress(
        state['lines'], state['total_lines'], self.report, noun='lines'
    ) as progress:
      writer.run(self.paths, progress.advance)
    self._check_splits(state)
    self.report('Counting the values of each column.')
    meta = {
        **state,
        'counts': writer.write_counts(),
    }
    click_shards.write_meta(self.output, meta)
    _clean(self.output)
    return meta

  def _start_or_resume(self) -> dict[str, Any]:
    path = self.output / PROGRESS
    if path.exists():
      state = click_shards.read_json(path)
      _check_config(self.output, self.config, state['config'])
      _check_source(
          self.output,
          self.config['source'],
          self.paths,
          state['source_fingerprint'],
      )
      self.report(f'Continuing in {self.output} at line {state["lines"]:,}.')
      return state
    self._check_unused()
    state = click_rounds.first_state(
        self.config, fingerprint(self.paths), self._total_lines()
    )
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
