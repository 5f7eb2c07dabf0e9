"""What `status` knows of a run: facts from files that others are writing.

Any file may be missing, torn by a kill, damaged, or of an older version. What
cannot be read is None and named; a look at a run never fails for it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from codistill_jax import run_directory

# Enough for some 200 records: the newest evaluation is among them.
_TAIL_BYTES = 65536

T = TypeVar('T')


class Age(NamedTuple):
  """How old the publication of a peer was when its reader gave the last sign
  of life: in steps of the reader and in seconds."""

  steps: int
  seconds: float


class Trouble(NamedTuple):
  """What fails at the last sign of life; see `troubles.Trouble`."""

  doing: str
  reason: str
  since: float
  count: int


class GroupStatus(NamedTuple):
  """What is known of one group; None where the run has not said it.

  Attributes:
    group_id: The group.
    step: Updates done.
    num_steps: The last step of the run.
    num_groups: G.
    phase: compiling, training, evaluating, saving, done; or '?'.
    steps_per_sec: Speed.
    eval_loss: Loss of the newest evaluation.
    publication: Newest finished publication.
    checkpoint: Newest finished resume checkpoint.
    peers: The groups that could teach this one.
    ages: Of each teacher in use, by peer; None if there is no sign of life.
    alone: Whether it learns from nobody though it should, past burn-in.
    rejected: Bad publications of peers, since the process began.
    last_rejection: Which one was the last, and why.
    troubles: What fails at the last sign of life.
    host: Where its process ran.
    pid: Its number there.
    last_seen: Time of the last sign of life, Unix seconds.
    done: Whether the group has reached its last step.
    unreadable: The files that could not be read, and why, one line each.
  """

  group_id: int
  step: int | None
  num_steps: int | None
  num_groups: int | None
  phase: str
  steps_per_sec: float | None
  eval_loss: float | None
  publication: run_directory.SavedStep | None
  checkpoint: run_directory.SavedStep | None
  peers: tuple[int, ...] | None
  ages: Mapping[int, Age] | None
  alone: bool
  rejected: int | None
  last_rejection: str
  troubles: tuple[Trouble, ...]
  host: str
  pid: int | None
  last_seen: float | None
  done: bool
  unreadable: tuple[str, ...]


def read_run(workdir: str, unreadable: list[str]) -> dict[str, Any]:
  """What run.json says; adds to `unreadable` instead of failing."""
  return _attempt(lambda: run_directory.read_run(workdir), {}, unreadable)


def read_group(
    workdir: str, group_id: int, run: Mapping[str, Any]
) -> GroupStatus:
  """Looks at one group; what status.json lacks comes from metrics.jsonl.

  Args:
    workdir: The run directory.
    group_id: The group.
    run: What run.json says, or {}.
  """
  bad: list[str] = []
  look = lambda read, missing: _attempt(read, missing, bad)
  sign = look(lambda: run_directory.read_status(workdir, group_id), None) or {}
  path = run_directory.metrics_path(workdir, group_id)
  log = look(lambda: run_directory.read_metrics(path, _TAIL_BYTES), None)
  records = log.records if log else []
  last = records[-1] if records else {}
  publications = run_directory.publications_dir(workdir, group_id)
  checkpoints = run_directory.checkpoints_dir(workdir, group_id)
  done_path = run_directory.done_path(workdir, group_id)
  done = look(done_path.exists, False)
  step = _first(_whole(sign, 'step'), _whole(last, 'step'))
  num_groups = _first(_whole(sign, 'num_groups'), _whole(run, 'num_groups'))
  peers = _peers(sign, group_id, num_groups)
  # Teachers that are no peers are fixed, and do not age in steps of this run.
  ages = {} if peers == () else _ages(sign)
  return GroupStatus(
      group_id=group_id,
      step=step,
      num_steps=_first(_whole(sign, 'num_steps'), _whole(run, 'num_steps')),
      num_groups=num_groups,
      phase='done' if done else _text(sign, 'phase') or '?',
      # Before the first record of a process its speed is null.
      steps_per_sec=_number(sign, 'steps_per_sec')
      or _newest(records, 'perf/steps_per_sec'),
      eval_loss=_newest(records, 'eval/loss'),
      publication=look(lambda: run_directory.newest_saved(publications), None),
      checkpoint=look(lambda: run_directory.newest_saved(checkpoints), None),
      peers=peers,
      ages=ages,
      # A process that has not made its first update has not fetched either.
      alone=bool(peers and ages == {} and not done)
      and _text(sign, 'phase') != 'compiling'
      and _is_past(step, _whole(run, 'burn_in_steps')),
      rejected=_first(
          _whole(sign, 'rejected'), _newest_count(records, 'exchange/rejected')
      ),
      last_rejection=_text(sign, 'last_rejection'),
      troubles=_troubles(sign),
      host=_text(sign, 'host'),
      pid=_whole(sign, 'pid'),
      last_seen=_latest(_number(sign, 'time'), _number(last, 'time')),
      done=done,
      unreadable=tuple(bad),
  )


def _attempt(read: Callable[[], T], missing: T, unreadable: list[str]) -> T:
  try:
    return read()
  except (ValueError, OSError) as e:
    # Torn by a kill or by the object store, or refused by the file system.
    unreadable.append(' '.join(str(e).split()))
    return missing


def _is_past(step: int | None, burn_in: int | None) -> bool:
  # Without run.json, which the first update writes, nothing is known.
  return step is not None and burn_in is not None and step > burn_in


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


def _troubles(sign: Mapping[str, Any]) -> tuple[Trouble, ...]:
  return tuple(
      Trouble(
          _text(tree, 'doing') or 'something',
          _text(tree, 'reason') or 'for no reason given',
          _number(tree, 'since') or 0.0,
          _whole(tree, 'count') or 1,
      )
      for tree in _trees(sign, 'troubles')
  )


# --- Values of the right kind, or None ---------------------------------------


def _number(tree: Mapping[str, Any], key: str) -> float | None:
  value = tree.get(key)
  return value if isinstance(value, int | float) else None


def _whole(tree: Mapping[str, Any], key: str) -> int | None:
  value = tree.get(key)
  return value if isinstance(value, int) else None


def _text(tree: Mapping[str, Any], key: str) -> str:
  """A text in one line; '' for anything else."""
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


def _latest(*times: float | None) -> float | None:
  return max((t for t in times if t is not None), default=None)
