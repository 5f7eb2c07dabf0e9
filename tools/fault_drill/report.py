"""The result of a drill, as JSON and as text."""

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from codistill_jax import run_directory
from experiments.reports.pages import to_text
from experiments.running import processes
from tools.fault_drill.faults import FAULTS
from tools.fault_drill.ledger import Ledger

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
    unread: Sequence[str],
    error: str,
    stopped: bool,
) -> dict[str, Any]:
  """Returns everything worth knowing of a drill, ready for JSON.

  Args:
    facts: Of the drill itself: `num_steps`, `exchange_every`,
      `checkpoint_every`, ...; kept.
    faults: What took place.
    ledger: What the groups reported.
    groups: Their processes.
    unread: Sentences on what was not read after the faults were over.
    error: Why the drill ended early, or ''.
    stopped: Whether it was asked to.

  Returns:
    The facts and what is shown by `describe`; `broken` has a sentence for each
    broken promise.
  """
  losses = [
      (g.group_id, loss) for g in groups for loss in ledger.losses(g.group_id)
  ]
  restarts = [
      f'group {group_id} {sentence}'
      for group_id, loss in losses
      if (sentence := loss.broken(facts['checkpoint_every']))
  ]
  promises = [
      ledger.bad_uses,
      restarts,
      ledger.unasked_endings(facts['num_steps']),
      [error] * bool(error),
  ]
  if not stopped:
    promises += [
        [x for group in groups for x in _unfinished(facts, ledger, group)],
        [] if error else unread,
    ]
  counts = collections.Counter(fault.name for fault in faults)
  return {
      **facts,
      'stopped': stopped,
      'num_faults': len(faults),
      'faults': {name: counts[name] for name in FAULTS},
      'endings': ledger.endings(),
      'publications': ledger.publications,
      'forged': ledger.forged,
      'uses': ledger.uses,
      'refused': ledger.refused,
      'bad_uses': len(ledger.bad_uses),
      'restarts': len(losses),
      'steps_lost': {
          'median': statistics.median([x.steps for _, x in losses] or [0]),
          'most': max((x.steps for _, x in losses), default=0),
          'most_not_excused': max(
              (x.steps - x.excused for _, x in losses), default=0
          ),
      },
      'groups': [
          {
              'group': group.group_id,
              'step': ledger.step_of(group.group_id),
              'done': group.done,
              'restarts': group.restarts,
          }
          for group in groups
      ],
      'troubles': dict(ledger.troubles.most_common()),
      'broken': [x for promise in promises for x in promise[:_MOST_SHOWN]],
      'log': [fault._asdict() for fault in faults],
  }


def _unfinished(
    facts: Mapping[str, Any], ledger: Ledger, group: processes.Group
) -> list[str]:
  num_steps, step = facts['num_steps'], ledger.step_of(group.group_id)
  if not group.done or step != num_steps:
    return [f'group {group.group_id} ended at {step} of {num_steps}']
  directory = run_directory.publications_dir(group.workdir, group.group_id)
  newest = run_directory.newest_saved(directory)
  due = num_steps - num_steps % facts['exchange_every']
  if newest == due:
    return []
  return [
      f'the newest publication of group {group.group_id} is'
      f' {newest}, and not that of its last exchange, {due}'
  ]


def describe(result: Mapping[str, Any]) -> str:
  """Returns the result as text."""
  table = lambda title, counts: to_text(
      [title, 'times'], [[name, str(n)] for name, n in counts.items()]
  )
  columns = list(result['groups'][0])
  groups = [[str(group[c]) for c in columns] for group in result['groups']]
  lost = result['steps_lost']
  lines = [
      f'{result["num_faults"]} faults in {result["minutes"]:g} minutes, seed'
      f' {result["seed"]}; {result["num_groups"]} groups of'
      f' {result["num_steps"]} steps, {result["seconds"]:.0f} s in all',
      table('fault', result['faults']),
      '',
      table('what failed for a while', result['troubles']),
      '',
      table('a process ended by', result['endings']),
      '',
      to_text(columns, groups),
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
