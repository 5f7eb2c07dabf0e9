"""The command line of a benchmark: options in, one JSON object out.

A benchmark is a function `rows(options)` that yields dicts. What cannot run
here is a row with `skipped`, the reason. The file of `--output` is written
anew after each row: a benchmark that is ended early leaves what it had.
"""

import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

DEVICES = ('cpu', 'gpu')


def define_flags() -> None:
  """Defines the flags of every benchmark; called by its program alone."""
  flags.DEFINE_enum('device', 'cpu', DEVICES, 'What to measure on.')
  flags.DEFINE_bool('quick', False, 'Tiny sizes, once: to see whether it runs.')
  flags.DEFINE_integer(
      'repeats',
      None,
      'Measurements of each arm; default: as the benchmark says.',
  )
  flags.DEFINE_string(
      'output', None, 'Also write the JSON to this file, after each row.'
  )


class Options(NamedTuple):
  """How to measure.

  Attributes:
    device: 'cpu' or 'gpu'.
    quick: Tiny sizes, one repeat.
    repeats: Of each arm; None, as the benchmark says.
  """

  device: str = 'cpu'
  quick: bool = False
  repeats: int | None = None

  def times(self, usual: int) -> int:
    """Measurements of each arm, where the benchmark would take `usual`."""
    return self.repeats or (1 if self.quick else usual)


Rows = Callable[[Options], Iterator[dict[str, Any]]]


def run(benchmark: str, rows: Rows) -> None:
  """Runs the main program of a benchmark."""

  def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    options, output = from_flags()
    try:
      choose_device(options.device)
    except ValueError as e:
      sys.exit(f'error: {e}')
    print(json.dumps(collect(benchmark, rows, options, output)))

  define_flags()
  app.run(main)


def from_flags() -> tuple[Options, str | None]:
  """Returns what the flags say, and where to write."""
  given = flags.FLAGS
  return Options(given.device, given.quick, given.repeats), given.output


def collect(
    benchmark: str, rows: Rows, options: Options, output: str | None = None
) -> dict[str, Any]:
  """Returns all rows, with what a reader needs to know of the run."""
  from benchmarks import measure

  start = time.perf_counter()
  record = {
      'benchmark': benchmark,
      'made': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      **options._asdict(),
      'machine': measure.machine(),
      'results': [],
  }
  for row in rows(options):
    record['results'].append(row)
    record['seconds'] = round(time.perf_counter() - start, 1)
    print(f'{benchmark}: {row}', file=sys.stderr)
    if output:
      write_json(output, record)
  return record


def choose_device(device: str) -> None:
  """Makes jax use it; before anything has used jax.

  Raises:
    ValueError: If there is none.
  """
  if device == 'cpu':
    os.environ['JAX_PLATFORMS'] = 'cpu'
  # A benchmark says itself what it needs, and shares the device with torch.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax

  if jax.default_backend() != device:
    raise ValueError(
        f'--device={device}, but jax finds {jax.default_backend()!r} only;'
        f' install jax with support for it, or give --device=cpu'
    )


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Replaces the file."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = path.with_name(f'{path.name}.part')
  whole.write_text(json.dumps(content, indent=1) + '\n')
  whole.replace(path)


def skipped(name: str, reason: str) -> dict[str, str]:
  """Returns the row of what cannot run here."""
  return {'name': name, 'skipped': reason}
