"""A preparation: records of a source -> shards on disk, piece by piece.

A *piece* is some records that follow each other. What is made of one is a pure
function of the settings, the number of the piece and its records: files that
bear that number, and then, last, a description of them, `pieces/<number>.json`.
A piece that has its description is skipped. So a preparation that was killed at
any moment goes on when it is called again with the same settings, in whatever
order pieces were made, and ends with the same files as one that was not,
whatever the number of workers. `meta.json`, written at the very end, makes the
directory a data set.

`Recipe` says what text and clicks do each in its own way.

Worker processes are spawned, not forked: the parent may have threads, and a
fork of their locks may hang. A script that asks for more than one worker
therefore needs the usual `if __name__ == '__main__'`.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import process as process_lib
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

from codistill_jax.data import prepared_files
from codistill_jax.data.prepared_files import META
from codistill_jax.data.records import Raw, Reject
from codistill_jax.data.sources import Source
from codistill_jax.storage import files, leases

SETTINGS = 'settings.json'
PIECES = 'pieces'
_SECONDS_BETWEEN_LINES = 10.0
_REST_OF_A_FILE = ('damaged_file', 'unnumbered', 'missing_paragraphs')

# Like the builtin `map`: a function, which can be pickled, and items.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

# What is made of a piece: (its number, its records) -> its description.
Make = Callable[[int, list[Raw]], dict[str, Any]]


class Start(NamedTuple):
  """What must be known before the first piece.

  Attributes:
    known: Whatever it is, for JSON; stored with the settings.
    records: How many of the source to read; None: all.
    files: Contents of files to write first, by name.
  """

  known: dict[str, Any]
  records: int | None = None
  files: Mapping[str, bytes] = {}


class Recipe(NamedTuple):
  """How one kind of data is prepared.

  Attributes:
    kind: Of data.
    config: All that the result depends on but the source's files, for JSON.
    open_source: Opens the source.
    start: `start(source, process)`; `process` is like `map`, but parallel.
    cut: Cuts records into pieces, given the source.
    make: `make(source, known)` makes a piece, in any process: it can be
      pickled. Its description has 'records', 'rejects' (a count for each
      reason), 'first' (the first of them that nobody asked for, see
      `rejected`) and 'splits' (sizes and checksums of the shard of each).
    finish: `finish(meta, process)` is what `meta.json` has besides.
    asked_for: Reasons of rejects that are no damage: filters gave them.
    leftovers: Folders that nobody needs in the end.
  """

  kind: prepared_files.DataKind
  config: dict[str, Any]
  open_source: Callable[[], Source]
  start: Callable[[Source, Map], Start]
  cut: Callable[[Source, Iterable[Raw]], Iterator[list[Raw]]]
  make: Callable[[Source, dict[str, Any]], Make]
  finish: Callable[[dict[str, Any], Map], dict[str, Any]]
  asked_for: Collection[str] = ()
  leftovers: Sequence[str] = ()


def run(
    output: str | os.PathLike,
    recipe: Recipe,
    *,
    source_checksums: str | None,
    max_rejected: float,
    workers: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
  """Prepares data, continues a preparation, or finds that all is done.

  Args:
    output: Directory of the data; made if missing.
    recipe: What to do.
    source_checksums: A file of `sha256sum`, with which all files of the source
      are compared first.
    max_rejected: The share of broken records from which on it is an error.
    workers: Processes that make pieces; 1: this process alone. More are
      spawned: a script needs `if __name__ == '__main__'`.
    report: Takes a line about what goes on.

  Returns:
    What `meta.json` holds.

  Raises:
    ValueError: If the data are unusable, or `output` holds anything but a
      preparation with the same settings.
    OSError: If something cannot be read or written.
  """
  output = files.on_disk(output)
  if not 0 <= max_rejected <= 1:
    raise ValueError(f'max_rejected must be in [0, 1]; got {max_rejected}.')
  with process_map(workers) as process:
    if (output / META).exists():
      return _finished(output, recipe, report)
    source = recipe.open_source()
    if source_checksums:
      _check_files(source, source_checksums, report)
    with leases.exclusive(output, 'preparing'):
      # Another process may have finished it just now.
      if (output / META).exists():
        return _finished(output, recipe, report)
      settings = _begin(output, recipe, source, process, report)
      pieces = _make_pieces(output, recipe, source, settings, process, report)
      _check_rejects(source, recipe, pieces, max_rejected)
      meta = {
          'format_version': recipe.kind.version,
          'source': source.spec,
          'source_fingerprint': source.fingerprint,
          'config': recipe.config,
          **_total(pieces),
      }
      meta |= recipe.finish(meta | settings['known'], process)
      prepared_files.write_json(output / META, meta)
      _clean(output, recipe)
      return meta


def _check_files(
    source: Source, list_path: str, report: Callable[[str], None]
) -> None:
  if not source.files:
    raise ValueError(
        f'The source {source.spec} has no files of its own to compare with'
        f' {list_path}; leave the checksums out.'
    )
  size = prepared_files.check_source(source.files, list_path)
  report(f'{len(source.files)} source files, {size:,} bytes: checksums agree.')


def _finished(
    output: pathlib.Path, recipe: Recipe, report: Callable[[str], None]
) -> dict[str, Any]:
  meta = prepared_files.read_meta(output, recipe.kind)
  _check_config(output, recipe.config, meta.get('config', {}))
  try:
    source = recipe.open_source()
  except (ValueError, OSError):
    pass  # Prepared data stay good when their source is gone.
  else:
    _check_source(output, source, meta['source_fingerprint'])
  _clean(output, recipe)  # Killed between the last two steps of `run`.
  report(f'{output} is prepared already; nothing to do.')
  return meta


def _clean(output: pathlib.Path, recipe: Recipe) -> None:
  (output / SETTINGS).unlink(missing_ok=True)
  for name in (PIECES, *recipe.leftovers):
    shutil.rmtree(output / name, ignore_errors=True)


# --- before the first piece --------------------------------------------------


def _begin(
    output: pathlib.Path,
    recipe: Recipe,
    source: Source,
    process: Map,
    report: Callable[[str], None],
) -> dict[str, Any]:
  """Returns the stored settings, after writing them if there are none yet."""
  path, settings = output / SETTINGS, None
  if path.exists():
    settings = prepared_files.read_json(path, recipe.kind)
    _check_config(output, recipe.config, settings['config'])
    _check_source(output, source, settings['source_fingerprint'])
    done = len(list((output / PIECES).glob('*.json')))
    report(f'Continuing in {output}: {done} pieces are done.')
    if _files_are_there(output, settings['files']):
      return settings
  else:
    _check_unused(output)
  # Nothing is written before all is known: a wrong source or argument leaves no
  # settings behind that the corrected command would offend.
  start = recipe.start(source, process)
  sha256 = {
      name: hashlib.sha256(data).hexdigest()
      for name, data in start.files.items()
  }
  settings = {
      'config': recipe.config,
      'source_fingerprint': source.fingerprint,
      'known': start.known,
      'records': start.records,
      'files': sha256,
  }
  # In this order: a file in a directory without settings is not ours.
  prepared_files.write_json(path, settings)
  for name, data in start.files.items():
    prepared_files.write_file(output / name, data)
  return settings


def _files_are_there(output: pathlib.Path, sha256: Mapping[str, str]) -> bool:
  """Returns whether all were written.

  Raises:
    ValueError: If one is not that with which the first pieces were made.
  """
  for name, expected in sha256.items():
    if not (output / name).exists():
      return False
    found = files.digest(output / name).sha256
    if found != expected:
      raise ValueError(
          f'The {name} in {output} is not the one that the preparation was'
          f' begun with (sha256 {found[:12]}, expected {expected[:12]}); put'
          ' that one back or delete the directory.'
      )
  return True


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


def _check_source(output: pathlib.Path, source: Source, stored: str) -> None:
  if source.fingerprint != stored:
    raise ValueError(
        f'The files of {source.spec} have changed since {output} was prepared'
        ' from them; choose another output or delete the directory.'
    )


def _check_unused(output: pathlib.Path) -> None:
  """Refuses to mix data with somebody else's files."""
  own = SETTINGS + '.tmp'  # Killed in the very first write.
  foreign = sorted(path.name for path in output.iterdir() if path.name != own)
  if foreign:
    raise ValueError(
        f'{output} holds {foreign[0]}, but no preparation that could be'
        ' continued; choose another output or empty the directory.'
    )


# --- pieces ------------------------------------------------------------------


def _make_pieces(
    output: pathlib.Path,
    recipe: Recipe,
    source: Source,
    settings: dict[str, Any],
    process: Map,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
  """Makes the pieces that are missing; returns the descriptions of all."""
  stop, paths = settings['records'], []

  def missing() -> Iterator[tuple[pathlib.Path, int, list[Raw]]]:
    # What was done is read again, but no more than that.
    records = itertools.islice(source.raw(), stop)
    for number, piece in enumerate(recipe.cut(source, records)):
      paths.append(output / PIECES / f'{number:05d}.json')
      if not paths[-1].exists():
        yield paths[-1], number, piece

  make = functools.partial(_make, recipe.make(source, settings['known']))
  for _ in _shown(process(make, missing()), stop, report):
    pass
  return [prepared_files.read_json(path, recipe.kind) for path in paths]


def _make(
    make: Make, piece: tuple[pathlib.Path, int, list[Raw]]
) -> dict[str, Any]:
  """Makes a piece, then its description."""
  path, number, records = piece
  description = make(number, records)
  prepared_files.write_json(path, description)
  return description


def _shown(
    pieces: Iterable[dict[str, Any]],
    total: int | None,
    report: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
  """Shows a bar on a terminal; otherwise says a line every few seconds."""
  bar, records = None, 0
  began = said = time.monotonic()
  if sys.stderr.isatty():
    import tqdm

    bar = tqdm.tqdm(total=total, unit=' records', unit_scale=True)
  with bar or contextlib.nullcontext():
    for piece in pieces:
      yield piece
      records += piece['records']
      now = time.monotonic()
      if bar is not None:
        bar.update(piece['records'])
      elif now - said >= _SECONDS_BETWEEN_LINES:
        said = now
        rate = records / (now - began)
        report(f'{records:,} records, {rate:,.0f} records/second')


def _check_rejects(
    source: Source,
    recipe: Recipe,
    pieces: Sequence[dict[str, Any]],
    max_rejected: float,
) -> None:
  """Raises ValueError, with the first one, if too much of a source is lost."""
  total = _total(pieces)
  asked = {r: n for r, n in total['rejects'].items() if r in recipe.asked_for}
  broken = {r: n for r, n in total['rejects'].items() if r not in asked}
  records = total['records'] - sum(asked.values())
  lost, what = sum(broken.values()), f'{records:,} records'
  share = lost / max(1, records)
  # One such record stands for all that its file had behind it.
  ended = sum(broken.get(reason, 0) for reason in _REST_OF_A_FILE)
  if source.files and ended / len(source.files) > share:
    lost, what = ended, f'{len(source.files):,} files'
    share = lost / len(source.files)
  if share > max_rejected:
    before = 0
    for piece in pieces:
      if piece.get('first'):
        number, reason, text = piece['first']
        break
      before += piece['records']
    raise ValueError(
        f'Of {what} of {source.spec}, {lost:,} are broken, more than'
        f' max_rejected={max_rejected:g}: {counts_text(broken)}. The first is'
        f' {quoted(before + number, reason, text)}. Mend the source or its'
        ' flags, or allow more with --max_rejected.'
    )


def rejected(place: int, reason: str, raw: Raw) -> tuple[int, str, str]:
  """Describes a reject of a piece: its place there, why, and what it is."""
  if isinstance(raw, Reject):
    return place, reason, 'it could not be read'
  if isinstance(raw, bytes):
    raw = raw[:400].decode('utf-8', 'backslashreplace')
  return place, reason, repr(raw[:100].rstrip('\r\n'))


def quoted(place: int, reason: str, text: str) -> str:
  """Returns what `rejected` describes, for an error."""
  return f'record {place:,}, {reason}: {text}'


def _total(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns records, rejects and splits of all pieces together."""
  rejects: collections.Counter[str] = collections.Counter()
  splits: dict[str, dict[str, Any]] = {}
  for piece in pieces:
    rejects.update(piece['rejects'])
    for name, shard in piece['splits'].items():
      split = splits.setdefault(name, {'shards': []})
      split['shards'].append(shard)
      for key, value in shard.items():
        if isinstance(value, int):
          split[key] = split.get(key, 0) + value
  records = sum(piece['records'] for piece in pieces)
  return {'records': records, 'rejects': dict(rejects), 'splits': splits}


# --- of both kinds -----------------------------------------------------------


def check_counts(config: Mapping[str, Any], *names: str) -> None:
  """Raises ValueError unless the seed and these settings are large enough."""
  for name in names:
    if config[name] is not None and config[name] < 1:
      raise ValueError(f'{name} must be 1 or more; got {config[name]}.')
  if config['seed'] < 0:
    raise ValueError(f"seed must be 0 or more; got {config['seed']}.")


def counts_text(rejects: Mapping[str, int]) -> str:
  """Returns '3 bad_json, 1 empty', or 'none'."""
  counts = (f'{rejects[reason]:,} {reason}' for reason in sorted(rejects))
  return ', '.join(counts) or 'none'


# --- processes ----------------------------------------------------------------


def usable_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # Not on macOS.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@contextlib.contextmanager
def process_map(workers: int) -> Iterator[Map]:
  """Yields a `map` over so many processes, or over this one for 1.

  Results come in the order of the items, which are fetched a bounded number
  ahead. An error comes where its result would have come: what is never asked
  for is no error, with any number of workers. A process is started when an item
  comes and all others are busy.

  Raises:
    ValueError: If `workers` is less than 1.
    OSError: From the map, if a worker dies.
  """
  if workers < 1:
    raise ValueError(f'workers must be 1 or more; got {workers}.')
  if workers == 1:
    yield map
    return
  _start_quiet_tracker()
  pool = concurrent.futures.ProcessPoolExecutor(
      workers, multiprocessing.get_context('spawn'), _end_with_parent
  )
  try:
    yield functools.partial(_map, pool, workers + 1)
  finally:
    # Waiting: else the interpreter may write into its pipe as that is closed.
    pool.shutdown(cancel_futures=True)


def _start_quiet_tracker() -> None:
  """Starts what cleans up after us if we are killed, and would say so."""
  sys.warnoptions.append('ignore:resource_tracker')  # It inherits them.
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.pop()


def _map(
    pool: concurrent.futures.ProcessPoolExecutor,
    ahead: int,
    function: Callable[[Any], Any],
    items: Iterable[Any],
) -> Iterator[Any]:
  """Yields results in order, at most `ahead` of them under way."""
  items = iter(items)
  error: Exception | None = None
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    while True:
      while error is None and len(waiting) < ahead:
        try:
          item = next(items)
        except Exception as e:  # Also StopIteration: the last one.
          error = e
        else:
          waiting.append(pool.submit(function, item))
      if not waiting:
        break
      yield waiting.popleft().result()
  except process_lib.BrokenProcessPool as e:
    # The pool asks the others to end, and waits: but to that signal they are
    # deaf, and the one that died may have held the lock of their queue.
    for worker in multiprocessing.active_children():
      worker.kill()
    died = OSError(
        'A worker process has died, as when memory is short; the same command'
        ' goes on, perhaps with fewer --workers. (A script that asks for'
        " several needs `if __name__ == '__main__':` around what it does.)"
    )
    died.errno = errno.EAGAIN  # It may pass.
    raise died from e
  finally:
    for future in waiting:
      future.cancel()
  if error and not isinstance(error, StopIteration):
    raise error


def _end_with_parent() -> None:
  """Makes a new worker deaf to signals, and end when its parent has gone.

  A worker of the stock pool outlives a parent that leaves by `os._exit` or is
  killed, as it holds both ends of the queue that it waits at.
  """
  for number in (
      *(signal.SIGINT, signal.SIGTERM),
      *(signal.SIGUSR1, signal.SIGUSR2),
  ):
    signal.signal(number, signal.SIG_IGN)  # Sent to all, but for the parent.
  threading.Thread(target=_leave_after_parent, daemon=True).start()


def _leave_after_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)  # Nothing is left to be cleaned up, or to be said.
