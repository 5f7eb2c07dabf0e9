"""One look at running, dead or finished runs: where each group is.

    python -m experiments.status --workdir runs/demo
    python -m experiments.status --workdir runs/a,runs/b --watch 5

Reads only; it may look at a run on a shared disk from any machine.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from codistill_jax import run_directory
from experiments import cli
from experiments.tables import align

# Enough for some 200 records: the newest evaluation is among them.
_TAIL_BYTES = 65536


class GroupStatus(NamedTuple):
  """What is known of one group; None where the run has not said it.

  Attributes:
    group_id: The group.
    step: Updates done.
    num_steps: The last step of the run.
    phase: compiling, training, evaluating, saving, done; or '?'.
    steps_per_sec: Speed.
    eval_loss: Loss of the newest evaluation.
    publication: Newest finished publication.
    checkpoint: Newest finished resume checkpoint.
    num_peers: P, the peers that could teach.
    staleness_steps: Of each present teacher, at the last sign of life.
    staleness_seconds: The same in seconds.
    last_seen: Time of the last sign of life, Unix seconds.
    done: Whether the group has reached its last step.
  """

  group_id: int
  step: int | None
  num_steps: int | None
  phase: str
  steps_per_sec: float | None
  eval_loss: float | None
  publication: run_directory.SavedStep | None
  checkpoint: run_directory.SavedStep | None
  num_peers: int | None
  staleness_steps: tuple[int, ...]
  staleness_seconds: tuple[float, ...]
  last_seen: float | None
  done: bool


def read_group(workdir: str, group_id: int) -> GroupStatus:
  """Looks at one group; what status.json lacks comes from metrics.jsonl."""
  run = run_directory.read_run(workdir)
  status = run_directory.read_status(workdir, group_id) or {}
  path = run_directory.metrics_path(workdir, group_id)
  records = run_directory.read_metrics(path, _TAIL_BYTES).records
  last = records[-1] if records else {}
  done = run_directory.done_path(workdir, group_id).exists()
  num_groups = status.get('num_groups', run.get('num_groups'))
  steps, seconds = _staleness_of(status)
  return GroupStatus(
      group_id=group_id,
      step=status.get('step', last.get('step')),
      num_steps=status.get('num_steps', run.get('num_steps')),
      phase='done' if done else str(status.get('phase', '?')),
      steps_per_sec=status.get('steps_per_sec')
      or _newest(records, 'perf/steps_per_sec'),
      eval_loss=_newest(records, 'eval/loss'),
      publication=run_directory.newest_saved(
          run_directory.publications_dir(workdir, group_id)
      ),
      checkpoint=run_directory.newest_saved(
          run_directory.checkpoints_dir(workdir, group_id)
      ),
      num_peers=None if num_groups is None else num_groups - 1,
      staleness_steps=steps,
      staleness_seconds=seconds,
      last_seen=_latest(status.get('time'), last.get('time')),
      done=done,
  )


def _staleness_of(
    status: dict[str, Any],
) -> tuple[tuple[int, ...], tuple[float, ...]]:
  if 'step' not in status or 'time' not in status:
    return (), ()
  # Against the last sign of life, not against now: of a dead group it says
  # how it stood when it died.
  teachers = status.get('teachers') or []
  return (
      tuple(status['step'] - t['step'] for t in teachers),
      tuple(status['time'] - t['time'] for t in teachers),
  )


def _newest(records: Sequence[dict[str, Any]], key: str) -> float | None:
  return next((r[key] for r in reversed(records) if key in r), None)


def _latest(*times: float | None) -> float | None:
  return max((t for t in times if t is not None), default=None)


# --- As text -----------------------------------------------------------------


def duration(seconds: float) -> str:
  """A duration in the one or two units that matter: `4 s`, `3 min`, `2.5 h`."""
  if seconds < 0:
    return '-' + duration(-seconds)  # Clocks of two hosts disagree.
  if seconds < 100:
    return f'{seconds:.0f} s'
  if seconds < 100 * 60:
    return f'{seconds / 60:.0f} min'
  if seconds < 100 * 3600:
    return f'{seconds / 3600:.1f} h'
  return f'{seconds / 86400:.1f} d'


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
  low, high = show(min(values)), show(max(values))
  return high if low == high else f'{low} to {high}'


def _teachers(group: GroupStatus) -> str:
  if not group.num_peers:
    return '-'
  return f'{len(group.staleness_steps)} of {group.num_peers}'


def _staleness(group: GroupStatus) -> str:
  if not group.staleness_steps:
    return '-'
  steps = _spread(group.staleness_steps, '{:.0f}'.format)
  return f'{steps} steps, {_spread(group.staleness_seconds, duration)}'


def _eta(group: GroupStatus, silent: bool) -> str:
  if group.done or silent or group.step is None or group.num_steps is None:
    return '-'
  if not group.steps_per_sec:
    return '-'
  return duration((group.num_steps - group.step) / group.steps_per_sec)


def _sign_of_life(group: GroupStatus, now: float, silent: bool) -> str:
  if group.last_seen is None:
    return 'DONE' if group.done else 'none yet'
  age = duration(now - group.last_seen) + ' ago'
  if group.done:
    return f'DONE {age}'
  return f'SILENT {age}' if silent else age


def _row(group: GroupStatus, now: float, silent_after: float) -> list[str]:
  seen = group.last_seen
  silent = not group.done and seen is not None and now - seen > silent_after
  speed, loss = group.steps_per_sec, group.eval_loss
  return [
      str(group.group_id),
      f'{_or_dash(group.step)}/{_or_dash(group.num_steps)}',
      group.phase,
      '-' if speed is None or not math.isfinite(speed) else f'{speed:.1f}',
      _eta(group, silent),
      '-' if loss is None else f'{loss:.3f}',
      '-' if group.publication is None else str(group.publication.step),
      _teachers(group),
      _staleness(group),
      '-' if group.checkpoint is None else str(group.checkpoint.step),
      _sign_of_life(group, now, silent),
  ]


_HEADER = [
    'group',
    'step',
    'phase',
    'steps/s',
    'ETA',
    'eval/loss',
    'published',
    'teachers',
    'staleness',
    'checkpoint',
    'last seen',
]


def _or_dash(value: Any) -> str:
  return '-' if value is None else str(value)


def describe(workdir: str, now: float, silent_after: float) -> tuple[str, bool]:
  """A run directory as text, and whether all of its groups are done.

  Raises:
    FileNotFoundError: If there is no such directory.
    ValueError: If one of its JSON files is damaged.
  """
  groups = [read_group(workdir, i) for i in run_directory.list_groups(workdir)]
  run = run_directory.read_run(workdir)
  facts = [str(run[key]) for key in ('arm', 'mode', 'data') if run.get(key)]
  title = workdir + (f'  ({", ".join(facts)})' if facts else '')
  if not groups:
    return f'{title}\n  no group has started yet', False
  table = align([_HEADER, *(_row(g, now, silent_after) for g in groups)])
  # A group that has not made its directory yet is not done either.
  complete = len(groups) >= run.get('num_groups', 1)
  return f'{title}\n{table}', complete and all(g.done for g in groups)


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
