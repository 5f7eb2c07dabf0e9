"""One look at running, dead or finished runs: where each group is.

    python -m experiments.status --workdir runs/demo
    python -m experiments.status --workdir runs/a,runs/b --watch 5

Reads only; it may look at a run on a shared disk from any machine. On a
terminal what is wrong is in colour; a pipe gets plain text.
"""

import os
import sys
import time
from collections.abc import Sequence

from absl import flags

from codistill_jax.storage import files

from . import cli


def define_flags() -> None:
  """Defines the flags; not on import, where those of other binaries stand."""
  flags.DEFINE_multi_string(
      'workdir',
      None,
      'Run directory to look at. May be given several times, or as a list with'
      ' commas.',
  )
  flags.DEFINE_float(
      'watch',
      None,
      'Look again every so many seconds, until all groups are done or Ctrl-C.',
      lower_bound=0.1,
  )
  flags.DEFINE_float(
      'silent_after',
      60.0,
      'Flag a group whose last sign of life is older than this many seconds.',
      lower_bound=0.0,
  )


def split_commas(values: Sequence[str] | None) -> list[str]:
  """Returns the paths of a repeatable flag that takes lists with commas."""
  entries = [v.strip() for value in values or () for v in value.split(',')]
  return [files.absolute(v) for v in entries if v]


def look(workdirs: Sequence[str]) -> bool:
  """Prints several run directories; returns whether all groups are done."""
  from rich.console import Console, Group

  from .reports import pages, run_status

  now, silent_after = time.time(), flags.FLAGS.silent_after
  looks = [run_status.look(w, now, silent_after) for w in workdirs]
  views = [part for view, _ in looks for part in (view, '')]
  view = Group(*views[:-1])
  # Of any width: where a row does not fit, the terminal wraps it.
  # Not through what escapes colours; the view is printable.
  console = Console(width=10_000, file=sys.__stdout__)
  if not console.is_terminal:
    print(pages.plain(view), flush=True)
  else:
    with console:  # One write: the terminal must not show half a table.
      if flags.FLAGS.watch is not None:
        console.clear()
      console.print(view)
  return all(done for _, done in looks)


def _run() -> None:
  workdirs = split_commas(flags.FLAGS.workdir)
  if not workdirs:
    raise ValueError('No run directory given; pass --workdir=<directory>.')
  while not look(workdirs) and flags.FLAGS.watch is not None:
    time.sleep(flags.FLAGS.watch)


def main(argv: Sequence[str]) -> None:
  """Prints the table, once or again and again."""
  del argv
  try:
    _run()
  except BrokenPipeError:
    # The reader (`head`) has gone; do not fail again when Python flushes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    if flags.FLAGS.watch is None:
      raise
    print()  # The usual end of a watch.


if __name__ == '__main__':
  define_flags()
  cli.run(main)
