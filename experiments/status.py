"""One look at running, dead or finished runs: where each group is.

    python -m experiments.status --workdir runs/demo
    python -m experiments.status --workdir runs/a,runs/b --watch 5

Reads only; it may look at a run on a shared disk from any machine.
"""

import os
import sys
import time
from collections.abc import Sequence

from absl import flags

from codistill_jax import run_directory
from experiments import cli, status_data, status_text


def describe(workdir: str, now: float, silent_after: float) -> tuple[str, bool]:
  """A run directory as text, and whether all of its groups are done.

  Raises:
    FileNotFoundError: If there is no such directory.
  """
  unreadable: list[str] = []
  run = status_data.read_run(workdir, unreadable)
  groups = [
      status_data.read_group(workdir, i, run)
      for i in run_directory.list_groups(workdir)
  ]
  facts = [str(run[key]) for key in ('arm', 'mode', 'data') if run.get(key)]
  title = workdir + (f'  ({", ".join(facts)})' if facts else '')
  lines = [title]
  lines += [status_text.wrap(f'cannot be read: {why}') for why in unreadable]
  if not groups:
    return '\n'.join([*lines, '  no group has started yet']), False
  lines.append(status_text.describe(groups, now, silent_after))
  # A group that has not made its directory yet is not done either.
  expected = max(group.num_groups or 1 for group in groups)
  complete = len(groups) >= expected
  return '\n'.join(lines), complete and all(g.done for g in groups)


def describe_all(
    workdirs: Sequence[str], now: float, silent_after: float = 60.0
) -> tuple[str, bool]:
  """Several run directories as text, and whether all groups are done."""
  parts = [describe(w, now, silent_after) for w in workdirs]
  return '\n\n'.join(text for text, _ in parts), all(d for _, d in parts)


# --- The binary --------------------------------------------------------------


def _look(workdirs: Sequence[str], clear: bool) -> bool:
  text, all_done = describe_all(workdirs, time.time(), flags.FLAGS.silent_after)
  # One write: the terminal must not show half a table.
  print('\x1b[2J\x1b[H' + text if clear else text, flush=True)
  return all_done


def split_commas(values: Sequence[str] | None) -> list[str]:
  """The entries of a repeatable flag that also takes lists with commas."""
  entries = [v.strip() for value in values or () for v in value.split(',')]
  return [v for v in entries if v]


def _run() -> None:
  workdirs = split_commas(flags.FLAGS.workdir)
  if not workdirs:
    raise ValueError('No run directory given; pass --workdir=<directory>.')
  clear = flags.FLAGS.watch is not None and sys.stdout.isatty()
  while not _look(workdirs, clear) and flags.FLAGS.watch is not None:
    time.sleep(flags.FLAGS.watch)


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
