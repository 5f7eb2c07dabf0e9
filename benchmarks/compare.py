r"""Times of this clone over those of another, in one alternating run.

    git worktree add /tmp/before HEAD~1
    python -m benchmarks.compare --against=/tmp/before --only=step_cost

Each benchmark runs in this clone and in the other in turn, `--rounds` times,
and the median times of each of its rows are compared round by round. Above 1
this clone is slower; ends with status 1 if a row is by more than 3 %.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks import command, measure, page, run_all

_MOST = 1.03
_HERE = pathlib.Path(__file__).parents[1]


def main(argv: Sequence[str]) -> None:
  del argv
  options, _ = command.from_flags()
  trees = {'this': _HERE, 'other': pathlib.Path(flags.FLAGS.against)}
  found: dict[str, list[Any]] = {tree: [] for tree in trees}
  for name in flags.FLAGS.only:
    for n in range(flags.FLAGS.rounds):
      for tree in measure.in_turn(trees, n):
        seconds = run_all.BENCHMARKS[name]
        record, why = run_all.run_one(name, options, seconds, trees[tree])
        if record is None or why:
          sys.exit(f'error: {name} in {trees[tree]}: {why}')
        found[tree].append(record)
  compared = list(ratios(found['this'], found['other']))
  head = ['row', 'time', 'this / other']
  cells = [[*row[:2], page.cell(row[2])] for row in compared]
  print(page.markdown_table([head, *cells]))
  sys.exit(any(row[2]['median'] > _MOST for row in compared))


def ratios(
    this: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, dict[str, Any]]]:
  """Returns (row, time, ratio) of all times that both have.

  Args:
    this: What a benchmark wrote, once for each round.
    other: Likewise, of the other clone.
  """
  times: list[dict[tuple[str, str], list[float]]] = [{}, {}]
  for side, records in zip(times, (this, other)):
    for record in records:
      for row in record['results']:
        for key, value in row.items():
          if isinstance(value, dict) and key.endswith(('_ms', 'seconds')):
            name = row['name'], key
            side.setdefault(name, []).append(value['median'])
  mine, theirs = times
  return [
      (*name, measure.ratio(mine[name], theirs[name]))
      for name in mine
      if len(mine[name]) == len(theirs.get(name, ()))
  ]


if __name__ == '__main__':
  command.define_flags()
  flags.DEFINE_string('against', None, 'Another clone.', required=True)
  flags.DEFINE_list('only', None, 'Benchmarks to compare.', required=True)
  flags.DEFINE_integer('rounds', 3, 'Runs in each clone.')
  app.run(main)
