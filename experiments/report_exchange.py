"""What a report says of the exchange in numbers: its health, group by group.

Old runs lack most of the keys; what they do not tell is None.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import report_data
from experiments.report_data import Arm, Curve, Group

# Counts since the start of a process: a restart begins at 0 again.
REJECTED = 'exchange/rejected'
FAILURES = 'exchange/publish_failures'
_COUNTS = (REJECTED, FAILURES)

Records = list[Mapping[str, Any]]


class Spread(NamedTuple):
  """The mean and the largest of what was recorded."""

  mean: float
  most: float


class Health(NamedTuple):
  """How the exchange of one group went; None where the records do not tell.

  Attributes:
    exchanges: How many were due.
    steps: Staleness of the teachers in steps.
    seconds: Staleness in seconds.
    present: Peers present after burn-in: on average, and at most.
    rejected: Publications of peers that were bad.
    failures: Publications of its own that the file system refused.
    stall_seconds: How long the exchange held the training loop, in all.
    stall_share: The same as a share of the training time.
    bytes: Size of the newest publication.
    restarts: How often the process was started again, as far as the records
      show it.
  """

  exchanges: int | None
  steps: Spread | None
  seconds: Spread | None
  present: Spread | None
  rejected: int | None
  failures: int | None
  stall_seconds: float | None
  stall_share: float | None
  bytes: int | None
  restarts: int


def exchanging(arms: Sequence[Arm]) -> list[Arm]:
  """The arms of several groups that have recorded anything of an exchange."""
  return [
      arm
      for arm in arms
      # A lonely group records zeros, which would say too much.
      if arm.run.get('num_groups', len(arm.groups)) > 1
      and any(
          key.startswith('exchange/')
          for group in arm.groups
          for record in group.log.records
          for key in record
      )
  ]


def health(arm: Arm, group: Group) -> Health:
  """Sums up what one group has recorded of its exchange."""
  stall = _finite(group.curve('exchange/stall_ms'))
  held = float(stall.sum()) / 1000.0 if len(stall) else None
  seconds = report_data.training_seconds(group)
  size = _finite(group.curve('exchange/publication_bytes'))
  every = arm.run.get('exchange_every')
  return Health(
      exchanges=group.last_step // every if every else None,
      steps=staleness(group, 'steps'),
      seconds=staleness(group, 'seconds'),
      present=_present(arm, group),
      rejected=_total(group, REJECTED),
      failures=_total(group, FAILURES),
      stall_seconds=held,
      stall_share=held / seconds if held is not None and seconds else None,
      bytes=int(size[-1]) if len(size) else None,
      restarts=len(lives(group.log.records)) - 1,
  )


# --- Staleness ---------------------------------------------------------------


def staleness(group: Group, unit: str) -> Spread | None:
  """Staleness in `unit` (steps, seconds): over all records and all teachers."""
  key = f'exchange/staleness_{unit}'
  mean = _finite(group.curve(key))
  if not len(mean):
    return None
  # The largest of any single teacher; in old runs only the means are known.
  single = [_finite(c) for c in by_peer(group, unit).values()]
  most = [_finite(group.curve(f'{key}_max')), *single, mean]
  largest = max(float(v.max()) for v in most if len(v))
  return Spread(float(mean.mean()), largest)


def by_peer(group: Group, unit: str = 'steps') -> dict[int, Curve]:
  """Staleness of each peer that ever taught, by its group id."""
  pattern = re.compile(rf'exchange/staleness_{unit}_group_(\d+)')
  keys = {key for record in group.log.records for key in record}
  found = {int(m[1]): m[0] for m in map(pattern.fullmatch, keys) if m}
  curves = {peer: group.curve(key) for peer, key in sorted(found.items())}
  return {p: c for p, c in curves.items() if len(_finite(c))}


def _present(arm: Arm, group: Group) -> Spread | None:
  curve = group.curve('exchange/peers_present')
  # In burn-in nobody is asked for.
  later = curve.steps > (arm.run.get('burn_in_steps') or 0)
  values = _finite(Curve(curve.steps[later], curve.values[later]))
  if not len(values):
    return None
  return Spread(float(values.mean()), float(values.max()))


def _finite(curve: Curve) -> np.ndarray:
  return curve.values[np.isfinite(curve.values)]


# --- Counts and restarts -----------------------------------------------------


def lives(records: Sequence[Mapping[str, Any]]) -> list[Records]:
  """The records of each process in turn, as far as they show where it began.

  A new process shows where the step goes back, or where a count falls. Of one
  that counted nothing and lost no step nothing shows.
  """
  found: list[Records] = [[]]
  counts: dict[str, float] = {}
  for record in records:
    now = {key: record[key] for key in _COUNTS if _is_count(record.get(key))}
    fell = any(value < counts.get(key, 0) for key, value in now.items())
    if fell or (found[-1] and record['step'] < found[-1][-1]['step']):
      found.append([])
      counts = {}
    counts |= now
    found[-1].append(record)
  return found


def counted(group: Group, key: str) -> Curve:
  """A count since the start of the run, restarts and all, by step.

  The steps that a restart went back over are those of the later process; what
  the earlier one counted in them stays counted.
  """
  steps: list[int] = []
  totals: list[float] = []
  before = 0.0
  for life in lives(group.log.records):
    found = [r for r in life if _is_count(r.get(key))]
    while found and steps and steps[-1] >= found[0]['step']:
      steps.pop()
      totals.pop()
    for record in found:
      if steps and steps[-1] == record['step']:
        totals[-1] = before + record[key]
      else:
        steps.append(record['step'])
        totals.append(before + record[key])
    before += found[-1][key] if found else 0.0
  return Curve(np.asarray(steps, np.int64), np.asarray(totals, np.float64))


def _total(group: Group, key: str) -> int | None:
  curve = counted(group, key)
  return int(curve.values[-1]) if curve else None


def _is_count(value: Any) -> bool:
  return isinstance(value, int | float) and bool(np.isfinite(value))
