"""What `status` knows of a run, from files that others are writing, and shows.

Any file may be missing, torn by a kill, damaged, or of an older version. What
cannot be read is None and named; a look at a run never fails for it. A table
has a row for each group; what is wrong stands under it. If groups have several
teachers, a last table has the staleness of each.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from codistill_jax import run_directory
from codistill_jax.storage import files, leases

from .. import cli
from ..cli import printable
from . import pages
from .pages import number

# Enough for some 200 records: the newest evaluation is among them.
_TAIL_BYTES = 65536
_WIDTH = 140
_MOST_PEERS = 200  # With a column each.

T = TypeVar('T')


class Age(NamedTuple):
  """How old the publication of a peer was at its reader's last sign of life."""

  steps: int
  seconds: float


class Status(NamedTuple):
  """What is known of one group.

  Attributes:
    group_id: The group.
    known: What it has said: of status.json, run.json and its last records.
    seen: Time of the last sign of life, Unix seconds, if there was any.
    age: Seconds since then.
    silent: Whether it should have been heard of since, or its process has died.
    ended: 'done', 'stopped' or 'failed'; '' for one that may run.
    published: Step of the newest publication, or None.
    saved: Step of the newest resume checkpoint, or None.
    peers: The groups that could teach this one, if that is known.
    ages: Of each teacher in use, by peer; None if there is no sign of life.
    unreadable: The files that could not be read, and why, a line each.
  """

  group_id: int
  known: Mapping[str, Any]
  seen: float | None
  age: float | None
  silent: bool
  ended: str
  published: int | None
  saved: int | None
  peers: list[int] | None
  ages: Mapping[int, Age] | None
  unreadable: tuple[str, ...]


def look(
    workdir: str, now: float, silent_after: float = 60.0
) -> tuple[RenderableType, bool]:
  """Returns a run directory as a view, and whether all groups are done.

  Args:
    workdir: The run directory.
    now: Unix seconds.
    silent_after: Seconds after which a group is called silent.

  Raises:
    FileNotFoundError: If there is no such directory.
  """
  bad: list[str] = []
  run = cli.attempt(bad, run_directory.read_run, workdir) or {}
  groups = [
      read_group(workdir, i, run, now, silent_after)
      for i in run_directory.list_groups(workdir)
  ]
  facts = [_line(run[key]) for key in ('arm', 'mode', 'data') if run.get(key)]
  title = workdir + (f'  ({", ".join(facts)})' if facts else '')
  top = [
      Text(printable(title), 'bold'),
      *(_note(f'cannot be read: {x}') for x in bad),
  ]
  if not groups:
    return Stack(*top, Text('  no group has started yet')), False
  rows = [[show(group) for show in _COLUMNS.values()] for group in groups]
  notes = [note for group in groups for note in _notes(group)]
  parts = [
      [pages.terminal_table(list(_COLUMNS), rows)],
      [*map(_note, notes), *(_note(x, 'dim') for x in _processes(groups))],
      *_staleness_tables(groups),
  ]
  blocks = [block for part in parts if part for block in (*part, Text())]
  # A group that has not made its directory yet is not done either.
  expected = max(group.known.get('num_groups') or 1 for group in groups)
  done = len(groups) >= expected and all(
      group.ended == 'done' for group in groups
  )
  return Stack(*top, *blocks[:-1]), done


# --- Reading -----------------------------------------------------------------


def read_group(
    workdir: str,
    group_id: int,
    run: Mapping[str, Any],
    now: float,
    silent_after: float,
) -> Status:
  """Looks at one group; what status.json lacks comes from metrics.jsonl.

  Args:
    workdir: The run directory.
    group_id: The group.
    run: What run.json says, or {}.
    now: Unix seconds.
    silent_after: Seconds after which it is called silent.
  """
  bad: list[str] = []
  ask = functools.partial(cli.attempt, bad)
  sign = ask(run_directory.read_status, workdir, group_id) or {}
  path = run_directory.metrics_path(workdir, group_id)
  recorded = _recorded(ask(run_directory.read_metrics, path, _TAIL_BYTES))
  known = recorded | {k: run[k] for k in _OF_RUN if k in run} | sign
  times = [tree['time'] for tree in (recorded, sign) if 'time' in tree]
  seen = max(times, default=None)
  peers = known.get('peers')
  if peers is None and 'num_groups' in known:
    # A run from before there were topologies: all the others.
    peers = [g for g in run_directory.list_groups(workdir) if g != group_id]
  published, saved = (
      ask(run_directory.newest_saved, directory(workdir, group_id))
      for directory in (
          run_directory.publications_dir,
          run_directory.checkpoints_dir,
      )
  )
  ended = sign.get('phase', '')
  if ask(files.exists, run_directory.done_path(workdir, group_id)):
    ended = 'done'
  elif ended not in ('stopped', 'failed'):
    ended = ''
  holder = ask(leases.peek, run_directory.group_dir(workdir, group_id))
  died = leases.is_alive(holder) is False
  return Status(
      group_id=group_id,
      known=known,
      seen=seen,
      age=None if seen is None else now - seen,
      silent=not ended
      and seen is not None
      and (died or now - seen > silent_after),
      ended=ended,
      published=published,
      saved=saved,
      peers=peers,
      # Teachers that are no peers are fixed: no age in steps of this run.
      ages={} if peers == [] else _ages(sign),
      unreadable=tuple(bad),
  )


def _recorded(log: run_directory.MetricsLog | None) -> dict[str, Any]:
  newest: dict[str, Any] = {}
  for record in log.records if log else ():
    newest |= record
  return {key: newest[k] for k, key in _RECORDED.items() if k in newest}


# Of the metrics, what stands in for status.json or beside it.
_RECORDED = {
    'step': 'step',
    'time': 'time',
    'perf/steps_per_sec': 'steps_per_sec',
    'eval/loss': 'eval_loss',
    'exchange/rejected': 'rejected',
}


_OF_RUN = ('num_steps', 'num_groups', 'burn_in_steps')


def _line(text: str) -> str:
  """Returns the text of anybody as a line that a terminal may show."""
  return printable(' '.join(text.split()))


def _ages(sign: Mapping[str, Any]) -> dict[int, Age] | None:
  if 'teachers' not in sign:
    return None
  # Against the last sign of life, not against now: of a dead group it says
  # how it stood when it died.
  return {
      found['peer']: Age(
          sign['step'] - found['step'], sign['time'] - found['time']
      )
      for found in sign['teachers']
      if {'peer', 'step', 'time'} <= found.keys()
      and {'step', 'time'} <= sign.keys()
  }


# --- What is wrong -----------------------------------------------------------


def _notes(status: Status) -> Iterable[str]:
  who, known = f'group {status.group_id}', status.known
  for why in status.unreadable:
    yield f'{who}: cannot be read: {why}'
  if status.ended == 'failed' and known.get('reason'):
    yield f'{who} has failed: {known["reason"]}'
  absent = [p for p in status.peers or () if p not in (status.ages or ())]
  if status.ages is not None and absent and not status.ended:
    ids = ', '.join(map(str, absent))
    if status.ages:
      yield f'{who} goes without the teacher(s) {ids}'
    elif _should_be_taught(known):
      yield f'{who} trains alone: of its peers ({ids}) none teaches'
  for trouble in filter(None, known.get('troubles', ())):
    doing = trouble.get('doing') or 'something'
    reason = trouble.get('reason') or 'for no reason given'
    count = trouble.get('count') or 1
    times = 'once' if count == 1 else f'{count} times'
    if trouble.get('since') and status.seen is not None:
      lasts = number(status.seen - trouble['since'], 'time')
      times = f'since {lasts}, {times}'
    yield f'{who}: {doing} fails {times}: {reason}'
  if known.get('last_rejection'):
    yield f'{who}: last rejection: {known["last_rejection"]}'


def never_taught(workdir: str) -> list[str]:
  """Returns a line for each group of a finished run that had no teacher.

  Nobody is named whose peers were not to teach: all of the run was burn-in.
  """
  bad: list[str] = []
  run = cli.attempt(bad, run_directory.read_run, workdir) or {}
  lines = []
  for group_id in run_directory.list_groups(workdir):
    known = read_group(workdir, group_id, run, 0.0, math.inf).known
    peers = ', '.join(map(str, known.get('peers') or ()))
    path = run_directory.metrics_path(workdir, group_id)
    taught = cli.attempt(bad, _was_taught, path)
    if peers and taught is False and _should_be_taught(known):
      why = f'none of its peers ({peers}) had published what it could use'
      for trouble in known.get('troubles', ()):
        why = f'{trouble.get("doing")} fails: {trouble.get("reason")}'
      why = known.get('last_rejection') or why
      lines.append(f'group {group_id} has never had a teacher, because {why}')
  return lines


def _was_taught(path: files.PathLike) -> bool:
  records = filter(None, run_directory.records(path))
  return any(record.get('distill/weight', 0) > 0 for record in records)


def _should_be_taught(known: Mapping[str, Any]) -> bool:
  # Without run.json, which the first update writes, nothing is known of
  # burn-in; and who has not made that update has not fetched either.
  step, burn_in = known.get('step'), known.get('burn_in_steps')
  past = None not in (step, burn_in) and step > burn_in
  return past and known.get('phase') != 'compiling'


def _processes(groups: Sequence[Status]) -> list[str]:
  """Says where processes run, a line per host; an ended group has none."""
  hosts: dict[str, list[str]] = {}
  for group in groups:
    if not group.ended and 'pid' in group.known:
      known, device = group.known, ''
      if {'replicas', 'device'} <= known.keys():
        device = f', {known["replicas"]} x {known["device"]}'
      entry = f'{known["pid"]} (group {group.group_id}{device})'
      hosts.setdefault(group.known.get('host') or '?', []).append(entry)
  return [f'on {host}: pid {", ".join(pids)}' for host, pids in hosts.items()]


def _note(sentence: str, style: str = 'yellow') -> Text:
  """Returns it in lines that fit; paths in it stay whole."""
  lines = textwrap.fill(
      _line(sentence),
      _WIDTH,
      subsequent_indent='    ',
      break_long_words=False,
      break_on_hyphens=False,
  )
  return Text(lines, style)


# --- Showing -----------------------------------------------------------------


def _speed(status: Status) -> str:
  speed = status.known.get('steps_per_sec', math.nan)
  return number(speed if math.isfinite(speed) else None, '.1f')


def _eta(status: Status) -> str:
  known = status.known
  named = {'step', 'num_steps'} <= known.keys()
  if (
      status.ended
      or status.silent
      or not (named and known.get('steps_per_sec'))
  ):
    return '-'
  left = known['num_steps'] - known['step']
  return number(left / known['steps_per_sec'], 'time')


def _teachers(status: Status) -> str:
  if not status.peers:
    return '-'
  present = '?' if status.ages is None else len(status.ages)
  return f'{present} of {len(status.peers)}'


def _staleness(status: Status) -> str:
  if not status.ages:
    return '-'
  steps, seconds = zip(*status.ages.values())
  return f'{_span(steps, ".0f")} steps, {_span(seconds, "time")}'


def _span(values: Sequence[float], form: str) -> str:
  low, high = number(min(values), form), number(max(values), form)
  return high if low == high else f'{low}..{high}'


def _last_seen(status: Status) -> Text:
  word = 'silent' if status.silent else status.ended
  style = _STYLES.get(word, '')
  if status.age is None:
    return Text(word.upper() or 'none yet', style)
  return Text(f'{word.upper()} {number(status.age, "time")} ago'.strip(), style)


_STYLES = {
    'done': 'green',
    'stopped': 'yellow',
    'failed': 'bold red',
    'silent': 'bold red',
}


_COLUMNS: dict[str, Callable[[Status], str | Text]] = {
    'group': lambda s: str(s.group_id),
    'step': lambda s: '/'.join(
        number(s.known.get(key), 'd') for key in ('step', 'num_steps')
    ),
    'phase': lambda s: s.ended or _line(s.known.get('phase', '')) or '?',
    'steps/s': _speed,
    'ETA': _eta,
    'eval/loss': lambda s: number(s.known.get('eval_loss'), '.3f'),
    'published': lambda s: number(s.published, 'd'),
    'teachers': _teachers,
    'staleness': _staleness,
    # Who has no peers rejects nothing.
    'rejected': lambda s: number(
        None if s.peers == [] else s.known.get('rejected'), '.0f'
    ),
    'checkpoint': lambda s: number(s.saved, 'd'),
    'last seen': _last_seen,
}


def _staleness_tables(
    groups: Sequence[Status],
) -> list[list[RenderableType]]:
  """Draws readers down, teachers across; nothing for one teacher at most."""
  if not any(len(group.ages or ()) > 1 for group in groups):
    return []  # The row of the group says it all.
  peers = sorted(
      {p for g in groups for p in (*(g.peers or ()), *(g.ages or ()))}
  )
  if len(peers) > _MOST_PEERS:
    return []  # Wider than anybody reads.
  header = ['group', *(f'of {peer}' for peer in peers)]

  def table(title: str, show: Callable[[Age], str]) -> list[RenderableType]:
    rows = [
        [str(group.group_id), *(_cell(group, peer, show) for peer in peers)]
        for group in groups
    ]
    return [Text(title), pages.terminal_table(header, rows)]

  both = table(
      'staleness of each teacher, steps and time:',
      lambda age: f'{age.steps}, {number(age.seconds, "time")}',
  )
  if max(map(len, pages.plain(both[1]).splitlines())) <= _WIDTH:
    return [both]
  return [
      table('staleness of each teacher in steps:', lambda age: str(age.steps)),
      table('and in time:', lambda age: number(age.seconds, 'time')),
  ]


def _cell(group: Status, peer: int, show: Callable[[Age], str]) -> str:
  if group.ages is None:
    return '?'
  if peer in group.ages:
    return show(group.ages[peer])
  return 'absent' if peer in (group.peers or ()) else '.'
