"""What `status` knows of a run, from files that others are writing, and shows.

Any file may be missing, torn by a kill, damaged, or of an older version. What
cannot be read is None and named; a look at a run never fails for it. A table
has a row for each group; what is wrong stands under it. If groups have several
teachers, a last table has the staleness of each.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from codistill_jax import run_directory
from experiments.reports import pages
from experiments.reports.pages import number

# Enough for some 200 records: the newest evaluation is among them.
_TAIL_BYTES = 65536
_WIDTH = 140
_HEADER = (
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
)

T = TypeVar('T')


class Age(NamedTuple):
  """How old the publication of a peer was at its reader's last sign of life."""

  steps: int
  seconds: float


class Status(NamedTuple):
  """What is known of one group; None where the run has not said it.

  Attributes:
    group_id: The group.
    step: Updates done.
    num_steps: The last step of the run.
    num_groups: G.
    phase: compiling, training, evaluating, saving, done; or '?'.
    steps_per_sec: Speed.
    eval_loss: Loss of the newest evaluation.
    published: Step of the newest finished publication.
    checkpoint: Step of the newest finished resume checkpoint.
    peers: The groups that could teach this one.
    ages: Of each teacher in use, by peer; None if there is no sign of life.
    rejected: Bad publications of peers, since the process began.
    host: Where its process ran.
    pid: Its number there.
    last_seen: Time of the last sign of life, Unix seconds.
    done: Whether the group has reached its last step.
    notes: What is wrong, a sentence each.
  """

  group_id: int
  step: int | None
  num_steps: int | None
  num_groups: int | None
  phase: str
  steps_per_sec: float | None
  eval_loss: float | None
  published: int | None
  checkpoint: int | None
  peers: tuple[int, ...] | None
  ages: Mapping[int, Age] | None
  rejected: int | None
  host: str
  pid: int | None
  last_seen: float | None
  done: bool
  notes: tuple[str, ...]


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
  run = _attempt(lambda: run_directory.read_run(workdir), {}, bad)
  groups = [
      read_group(workdir, i, run) for i in run_directory.list_groups(workdir)
  ]
  facts = [str(run[key]) for key in ('arm', 'mode', 'data') if run.get(key)]
  title = workdir + (f'  ({", ".join(facts)})' if facts else '')
  top = [Text(title, 'bold'), *(_note(f'cannot be read: {x}') for x in bad)]
  if not groups:
    return Stack(*top, Text('  no group has started yet')), False
  rows = [_row(group, now, silent_after) for group in groups]
  notes = [note for group in groups for note in group.notes]
  parts = [
      [pages.terminal_table(_HEADER, rows)],
      [*map(_note, notes), *(_note(x, 'dim') for x in _processes(groups))],
      *_staleness_tables(groups),
  ]
  blocks = [block for part in parts if part for block in (*part, Text())]
  # A group that has not made its directory yet is not done either.
  expected = max(group.num_groups or 1 for group in groups)
  done = len(groups) >= expected and all(group.done for group in groups)
  return Stack(*top, *blocks[:-1]), done


# --- Reading -----------------------------------------------------------------


def read_group(workdir: str, group_id: int, run: Mapping[str, Any]) -> Status:
  """Looks at one group; what status.json lacks comes from metrics.jsonl.

  Args:
    workdir: The run directory.
    group_id: The group.
    run: What run.json says, or {}.
  """
  bad: list[str] = []
  ask = lambda read, missing: _attempt(read, missing, bad)
  sign = ask(lambda: run_directory.read_status(workdir, group_id), None) or {}
  path = run_directory.metrics_path(workdir, group_id)
  log = ask(lambda: run_directory.read_metrics(path, _TAIL_BYTES), None)
  records = log.records if log else []
  last = records[-1] if records else {}
  done = ask(run_directory.done_path(workdir, group_id).exists, False)
  num_groups = _first(_whole(sign, 'num_groups'), _whole(run, 'num_groups'))
  peers = _peers(sign, group_id, num_groups)
  saved = lambda directory: ask(
      lambda: run_directory.newest_saved(directory(workdir, group_id)), None
  )
  published = saved(run_directory.publications_dir)
  checkpoint = saved(run_directory.checkpoints_dir)
  times = (_number(sign, 'time'), _number(last, 'time'))
  status = Status(
      group_id=group_id,
      step=_first(_whole(sign, 'step'), _whole(last, 'step')),
      num_steps=_first(_whole(sign, 'num_steps'), _whole(run, 'num_steps')),
      num_groups=num_groups,
      phase='done' if done else _text(sign, 'phase') or '?',
      # Before the first record of a process its speed is null.
      steps_per_sec=_number(sign, 'steps_per_sec')
      or _newest(records, 'perf/steps_per_sec'),
      eval_loss=_newest(records, 'eval/loss'),
      published=published and published.step,
      checkpoint=checkpoint and checkpoint.step,
      peers=peers,
      # Teachers that are no peers are fixed: no age in steps of this run.
      ages={} if peers == () else _ages(sign),
      rejected=_first(
          _whole(sign, 'rejected'), _newest_count(records, 'exchange/rejected')
      ),
      host=_text(sign, 'host'),
      pid=_whole(sign, 'pid'),
      last_seen=max((t for t in times if t is not None), default=None),
      done=done,
      notes=(),
  )
  return status._replace(notes=tuple(_notes(status, sign, run, bad)))


def _attempt(read: Callable[[], T], missing: T, unreadable: list[str]) -> T:
  try:
    return read()
  except (ValueError, OSError) as e:
    # Torn by a kill or by the object store, or refused by the file system.
    unreadable.append(' '.join(str(e).split()))
    return missing


def _peers(
    sign: Mapping[str, Any], group_id: int, num_groups: int | None
) -> tuple[int, ...] | None:
  said = sign.get('peers')
  if isinstance(said, list):
    return tuple(peer for peer in said if isinstance(peer, int))
  # A run from before there were topologies: all the others.
  if num_groups is None:
    return None
  return tuple(g for g in range(num_groups) if g != group_id)


def _ages(sign: Mapping[str, Any]) -> dict[int, Age] | None:
  if not isinstance(sign.get('teachers'), list):
    return None
  # Against the last sign of life, not against now: of a dead group it says
  # how it stood when it died.
  step, time = _whole(sign, 'step'), _number(sign, 'time')
  ages = {}
  for teacher in _trees(sign, 'teachers'):
    peer, at = _whole(teacher, 'peer'), _whole(teacher, 'step')
    made = _number(teacher, 'time')
    if None not in (step, time, peer, at, made):
      ages[peer] = Age(step - at, time - made)
  return ages


def _notes(
    status: Status,
    sign: Mapping[str, Any],
    run: Mapping[str, Any],
    unreadable: Sequence[str],
) -> Iterable[str]:
  """Says what is wrong with a group."""
  who = f'group {status.group_id}'
  for why in unreadable:
    yield f'{who}: cannot be read: {why}'
  absent = [p for p in status.peers or () if p not in (status.ages or ())]
  if status.ages is not None and absent and not status.done:
    ids = ', '.join(map(str, absent))
    if status.ages:
      yield f'{who} goes without the teacher(s) {ids}'
    elif _should_be_taught(status, run):
      yield f'{who} trains alone: of its peers ({ids}) none teaches'
  for trouble in _trees(sign, 'troubles'):
    doing = _text(trouble, 'doing') or 'something'
    reason = _text(trouble, 'reason') or 'for no reason given'
    count = _whole(trouble, 'count') or 1
    times = 'once' if count == 1 else f'{count} times'
    begun = _number(trouble, 'since')
    if begun and status.last_seen is not None:
      times = f'since {number(status.last_seen - begun, "time")}, {times}'
    yield f'{who}: {doing} fails {times}: {reason}'
  if _text(sign, 'last_rejection'):
    yield f'{who}: last rejection: {_text(sign, "last_rejection")}'


def _should_be_taught(status: Status, run: Mapping[str, Any]) -> bool:
  # Without run.json, which the first update writes, nothing is known of
  # burn-in; and who has not made that update has not fetched either.
  burn_in = _whole(run, 'burn_in_steps')
  past = None not in (status.step, burn_in) and status.step > burn_in
  return past and status.phase != 'compiling'


# --- Values of the right kind, or None ---------------------------------------


def _number(tree: Mapping[str, Any], key: str) -> float | None:
  value = tree.get(key)
  return value if isinstance(value, int | float) else None


def _whole(tree: Mapping[str, Any], key: str) -> int | None:
  value = tree.get(key)
  return value if isinstance(value, int) else None


def _text(tree: Mapping[str, Any], key: str) -> str:
  """Returns a text in one line; '' for anything else."""
  value = tree.get(key)
  return ' '.join(value.split()) if isinstance(value, str) else ''


def _trees(tree: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
  value = tree.get(key)
  entries = value if isinstance(value, list) else []
  return [entry for entry in entries if isinstance(entry, dict)]


def _newest(records: Sequence[dict[str, Any]], key: str) -> float | None:
  found = (_number(r, key) for r in reversed(records) if key in r)
  return next(found, None)


def _newest_count(records: Sequence[dict[str, Any]], key: str) -> int | None:
  value = _newest(records, key)
  # NaN and infinities are no counts.
  return int(value) if value is not None and abs(value) < 1e15 else None


def _first(*values: int | None) -> int | None:
  return next((v for v in values if v is not None), None)


# --- Showing -----------------------------------------------------------------


def _row(status: Status, now: float, silent_after: float) -> list[str | Text]:
  seen = status.last_seen
  silent = not status.done and seen is not None and now - seen > silent_after
  speed = status.steps_per_sec
  known = speed is not None and math.isfinite(speed)
  rejected = None if status.peers == () else status.rejected
  return [
      str(status.group_id),
      f'{number(status.step, "d")}/{number(status.num_steps, "d")}',
      status.phase,
      number(speed if known else None, '.1f'),
      '-' if status.done or silent else _eta(status),
      number(status.eval_loss, '.3f'),
      number(status.published, 'd'),
      _teachers(status),
      _staleness(status),
      number(rejected, 'd'),
      number(status.checkpoint, 'd'),
      _sign_of_life(status, now, silent),
  ]


def _eta(status: Status) -> str:
  if None in (status.step, status.num_steps) or not status.steps_per_sec:
    return '-'
  left = status.num_steps - status.step
  return number(left / status.steps_per_sec, 'time')


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


def _sign_of_life(status: Status, now: float, silent: bool) -> Text:
  if status.last_seen is None:
    return Text('DONE' if status.done else 'none yet')
  age = f'{number(now - status.last_seen, "time")} ago'
  if status.done:
    return Text(f'DONE {age}', 'green')
  return Text(f'SILENT {age}', 'bold red') if silent else Text(age)


def _staleness_tables(
    groups: Sequence[Status],
) -> list[list[RenderableType]]:
  """Draws readers down, teachers across; nothing for one teacher at most."""
  if not any(len(group.ages or ()) > 1 for group in groups):
    return []  # The row of the group says it all.
  peers = sorted(
      {p for g in groups for p in (*(g.peers or ()), *(g.ages or ()))}
  )
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


def _note(sentence: str, style: str = 'yellow') -> Text:
  """Returns it in lines that fit; paths in it stay whole."""
  lines = textwrap.fill(
      sentence,
      _WIDTH,
      subsequent_indent='    ',
      break_long_words=False,
      break_on_hyphens=False,
  )
  return Text(lines, style)


def _processes(groups: Sequence[Status]) -> list[str]:
  """Says where processes run, a line per host; of finished groups none does."""
  hosts: dict[str, list[str]] = {}
  for group in groups:
    if not group.done and group.pid is not None:
      entry = f'{group.pid} (group {group.group_id})'
      hosts.setdefault(group.host or '?', []).append(entry)
  return [f'on {host}: pid {", ".join(pids)}' for host, pids in hosts.items()]
