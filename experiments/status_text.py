"""What `status` prints: a table, and below it what there is to say.

A table of up to some 140 columns has a row for each group; what is wrong stands
under it. If groups have several teachers, a last table has the staleness of
each.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.status_data import Age, GroupStatus
from experiments.tables import align

WIDTH = 140

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
    'rejected',
    'checkpoint',
    'last seen',
]


def duration(seconds: float) -> str:
  """A duration in the one or two units that matter: `4 s`, `3 min`, `2.5 h`."""
  if not math.isfinite(seconds):
    return '?'
  if seconds < 0:
    return '-' + duration(-seconds)  # Clocks of two hosts disagree.
  if seconds < 100:
    return f'{seconds:.0f} s'
  if seconds < 100 * 60:
    return f'{seconds / 60:.0f} min'
  if seconds < 100 * 3600:
    return f'{seconds / 3600:.1f} h'
  return f'{seconds / 86400:.1f} d'


def describe(
    groups: Sequence[GroupStatus], now: float, silent_after: float
) -> str:
  """All that is known of the groups of a run, as text.

  Args:
    groups: At least one.
    now: Unix seconds.
    silent_after: Seconds after which a group is called silent.
  """
  rows = [_row(group, now, silent_after) for group in groups]
  notes = [note for group in groups for note in _notes(group)]
  notes += _processes(groups)
  parts = [
      align([_HEADER, *rows]),
      '\n'.join(map(wrap, notes)),
      *_staleness_tables(groups),
  ]
  return '\n\n'.join(filter(None, parts))


def wrap(note: str) -> str:
  """A note in lines that fit; paths in it stay whole."""
  return textwrap.fill(
      note,
      WIDTH,
      subsequent_indent='    ',
      break_long_words=False,
      break_on_hyphens=False,
  )


# --- The row of a group ------------------------------------------------------


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
      '-' if group.peers == () else _or_dash(group.rejected),
      '-' if group.checkpoint is None else str(group.checkpoint.step),
      _sign_of_life(group, now, silent),
  ]


def _or_dash(value: Any) -> str:
  return '-' if value is None else str(value)


def _eta(group: GroupStatus, silent: bool) -> str:
  if group.done or silent or group.step is None or group.num_steps is None:
    return '-'
  if not group.steps_per_sec:
    return '-'
  return duration((group.num_steps - group.step) / group.steps_per_sec)


def _teachers(group: GroupStatus) -> str:
  if not group.peers:
    return '-'
  present = '?' if group.ages is None else len(group.ages)
  return f'{present} of {len(group.peers)}'


def _staleness(group: GroupStatus) -> str:
  if not group.ages:
    return '-'
  steps = _spread([a.steps for a in group.ages.values()], '{:.0f}'.format)
  seconds = _spread([a.seconds for a in group.ages.values()], duration)
  return f'{steps} steps, {seconds}'


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
  low, high = show(min(values)), show(max(values))
  return high if low == high else f'{low}..{high}'


def _sign_of_life(group: GroupStatus, now: float, silent: bool) -> str:
  if group.last_seen is None:
    return 'DONE' if group.done else 'none yet'
  age = duration(now - group.last_seen) + ' ago'
  if group.done:
    return f'DONE {age}'
  return f'SILENT {age}' if silent else age


# --- Staleness of each teacher -----------------------------------------------


def _staleness_tables(groups: Sequence[GroupStatus]) -> list[str]:
  """Readers down, teachers across; nothing if all have one teacher at most."""
  if not any(len(group.ages or ()) > 1 for group in groups):
    return []  # The row of the group says it all.
  both = lambda age: f'{age.steps}, {duration(age.seconds)}'
  table = _staleness_table(groups, both)
  if max(map(len, table.splitlines())) <= WIDTH:
    return [f'staleness of each teacher, steps and time:\n{table}']
  return [
      'staleness of each teacher in steps:\n'
      + _staleness_table(groups, lambda age: str(age.steps)),
      'and in time:\n'
      + _staleness_table(groups, lambda age: duration(age.seconds)),
  ]


def _staleness_table(
    groups: Sequence[GroupStatus], show: Callable[[Age], str]
) -> str:
  peers = sorted(
      {p for g in groups for p in (*(g.peers or ()), *(g.ages or ()))}
  )
  header = ['group', *(f'of {peer}' for peer in peers)]
  rows = [
      [str(group.group_id), *(_cell(group, peer, show) for peer in peers)]
      for group in groups
  ]
  return align([header, *rows])


def _cell(group: GroupStatus, peer: int, show: Callable[[Age], str]) -> str:
  if group.ages is None:
    return '?'
  if peer in group.ages:
    return show(group.ages[peer])
  return 'absent' if peer in (group.peers or ()) else '.'


# --- What there is to say ----------------------------------------------------


def _notes(group: GroupStatus) -> Iterable[str]:
  who = f'group {group.group_id}'
  for why in group.unreadable:
    yield f'{who}: cannot be read: {why}'
  if group.alone:
    yield f'{who} trains alone: of its peers ({_ids(group.peers)}) none teaches'
  elif group.ages and not group.done:
    absent = [peer for peer in group.peers or () if peer not in group.ages]
    if absent:
      yield f'{who} goes without the teacher(s) {_ids(absent)}'
  for trouble in group.troubles:
    times = 'once' if trouble.count == 1 else f'{trouble.count} times'
    since = ''
    if trouble.since and group.last_seen is not None:
      since = f' since {duration(group.last_seen - trouble.since)},'
    yield f'{who}: {trouble.doing} fails{since} {times}: {trouble.reason}'
  if group.last_rejection:
    yield f'{who}: last rejection: {group.last_rejection}'


def _ids(groups: Iterable[int] | None) -> str:
  return ', '.join(map(str, groups or ()))


def _processes(groups: Sequence[GroupStatus]) -> list[str]:
  """Where the processes run, a line per host; of finished groups none does."""
  hosts: dict[str, list[str]] = {}
  for group in groups:
    if not group.done and group.pid is not None:
      entry = f'{group.pid} (group {group.group_id})'
      hosts.setdefault(group.host or '?', []).append(entry)
  return [f'on {host}: pid {", ".join(pids)}' for host, pids in hosts.items()]
