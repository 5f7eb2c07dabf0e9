"""What a drill came to: as JSON, and as text."""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from codistill_jax import run_directory
from experiments.drill_faults import FAULTS
from experiments.drill_ledger import Ledger
from experiments.reports.pages import to_text
from experiments.running import processes

_MOST_SHOWN = 5  # Of the same kind of broken promise.


class Fault(NamedTuple):
  """A fault that took place.

  Attributes:
    seconds: When, since the first one could.
    name: Which.
    group: Whom it struck.
  """

  seconds: float
  name: str
  group: int


def result(
    facts: Mapping[str, Any],
    *,
    faults: Sequence[Fault],
    ledger: Ledger,
    groups: Sequence[processes.Group],
    calm_since: float | None,
    patience: float,
    error: str,
    stopped: bool,
) -> dict[str, Any]:
  """Everything worth knowing of a drill, ready for JSON.

  Args:
    facts: Of the drill itself: `num_steps`, `exchange_every`,
      `checkpoint_every`, ...; kept.
    faults: What took place.
    ledger: What the groups reported.
    groups: Their processes.
    calm_since: When the faults were over, monotonic seconds; None if the groups
      never began.
    patience: Seconds for a group to take what a peer has published.
    error: Why the drill ended early, or ''.
    stopped: Whether it was asked to.

  Returns:
    The facts and what is shown by `describe`; `broken` has a sentence for each
    broken promise.
  """
  losses = [x for g in groups for x in ledger.losses(g.group_id)]
  counts = collections.Counter(fault.name for fault in faults)
  broken = _broken(facts, ledger, groups) + [error] * bool(error)
  if not stopped:
    broken += _unfinished(facts, ledger, groups)
    if calm_since is not None and not error:
      broken += ledger.starved(calm_since, patience)[:_MOST_SHOWN]
  return {
      **facts,
      'stopped': stopped,
      'num_faults': len(faults),
      'faults': {name: counts[name] for name in FAULTS},
      'endings': ledger.endings(),
      'publications': ledger.publications,
      'forged': ledger.forged,
      'uses': ledger.uses,
      'refused': ledger.refused.total(),
      'bad_uses': len(ledger.bad_uses),
      'restarts': len(losses),
      'steps_lost': {
          'median': statistics.median([x.steps for x in losses] or [0]),
          'most': max((x.steps for x in losses), default=0),
          'most_not_excused': max(
              (x.steps - x.excused for x in losses), default=0
          ),
      },
      'groups': [_outcome(group, ledger) for group in groups],
      'troubles': _troubles(ledger),
      'broken': broken,
      'log': [fault._asdict() for fault in faults],
  }


def _broken(
    facts: Mapping[str, Any], ledger: Ledger, groups: Sequence[processes.Group]
) -> list[str]:
  lost = [
      f'group {group.group_id} {sentence}'
      for group in groups
      for loss in ledger.losses(group.group_id)
      if (sentence := loss.broken(facts['checkpoint_every']))
  ]
  ends = ledger.unasked_endings(facts['num_steps'])
  return [
      *ledger.bad_uses[:_MOST_SHOWN],
      *lost[:_MOST_SHOWN],
      *ledger.silent[:_MOST_SHOWN],
      *ends[:_MOST_SHOWN],
  ]


def _unfinished(
    facts: Mapping[str, Any], ledger: Ledger, groups: Sequence[processes.Group]
) -> list[str]:
  found, num_steps, every = [], facts['num_steps'], facts['exchange_every']
  for group in groups:
    step = ledger.step_of(group.group_id)
    if not group.done or step != num_steps:
      found.append(f'group {group.group_id} ended at {step} of {num_steps}')
      continue
    directory = run_directory.publications_dir(group.workdir, group.group_id)
    newest = run_directory.newest_saved(directory)
    due = num_steps - num_steps % every
    if newest is None or newest.step != due:
      found.append(
          f'the newest publication of group {group.group_id} is'
          f' {newest and newest.step}, and not that of its last exchange, {due}'
      )
  return found


def _outcome(group: processes.Group, ledger: Ledger) -> dict[str, Any]:
  path = run_directory.metrics_path(group.workdir, group.group_id)
  records = run_directory.read_metrics(path).records
  _, present = run_directory.series(records, 'exchange/peers_present')
  _, ages = run_directory.series(records, 'exchange/staleness_steps_max')
  _, stalls = run_directory.series(records, 'exchange/stall_ms')
  return {
      'group': group.group_id,
      'step': ledger.step_of(group.group_id),
      'done': group.done,
      'restarts': group.restarts,
      'refused': ledger.refused[group.group_id],
      'troubles': ledger.troubles[group.group_id].total(),
      'peers_present': round(statistics.mean(present), 2) if present else 0.0,
      'staleness_steps_max': max(ages, default=0.0),
      'stall_ms_median': round(statistics.median(stalls), 1) if stalls else 0.0,
      'stall_ms_max': round(max(stalls, default=0.0), 1),
  }


def _troubles(ledger: Ledger) -> dict[str, int]:
  """How often what failed, in all groups."""
  total = collections.Counter()
  for counts in ledger.troubles.values():
    total += counts
  return dict(total.most_common())


def describe(result: Mapping[str, Any]) -> str:
  """The result as text."""
  columns = list(result['groups'][0])
  groups = [columns, *([str(g[c]) for c in columns] for g in result['groups'])]
  lost = result['steps_lost']
  lines = [
      f'{result["num_faults"]} faults in {result["minutes"]:g} minutes, seed'
      f' {result["seed"]}; {result["num_groups"]} groups of'
      f' {result["num_steps"]} steps, {result["seconds"]:.0f} s in all',
      _table(['fault', 'times'], result['faults'].items()),
      '',
      _table(['what failed for a while', 'times'], result['troubles'].items()),
      '',
      _table(['a process ended by', 'times'], result['endings'].items()),
      '',
      to_text(groups[0], groups[1:]),
      '',
      f'{result["publications"]} publications and {result["forged"]} forged'
      f' ones; read {result["uses"]} times and refused'
      f' {result["refused"]} times; of those read, with other bits than'
      f' published: {result["bad_uses"]}',
      f'{result["restarts"]} restarts; steps lost: median {lost["median"]:g},'
      f' most {lost["most"]}, without what a disk refused or was still writing'
      f' {lost["most_not_excused"]} (checkpoint interval'
      f' {result["checkpoint_every"]})',
  ]
  if result['broken']:
    lines += ['BROKEN:', *(f'  {line}' for line in result['broken'])]
  elif result['stopped']:
    lines.append('stopped before its end; until then all promises were kept')
  else:
    lines.append('all promises kept')
  return '\n'.join(lines)


def _table(head: Sequence[str], rows: Iterable[tuple[str, int]]) -> str:
  return to_text(head, ([key, str(count)] for key, count in rows))
