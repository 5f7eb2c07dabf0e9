"""What runs have recorded: arms, their groups, and curves of one metric.

An arm is one run directory under a name. The records of a group are one
DataFrame, a row per number; a curve is a Series of values by step.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files

from .. import cli

# Counts since the start of a process: a restart begins at 0 again.
REJECTED = 'exchange/rejected'
FAILURES = 'exchange/publish_failures'

EMPTY = pd.Series([], pd.Index([], dtype='int64', name='step'), 'float64')


class GroupRecords(NamedTuple):
  """The records of one group.

  Attributes:
    group_id: The group.
    records: A row per number of every record, by metric key (the index,
      sorted; `step` and `time` are keys, too) and in the order of the file:
      its `step`, its `value`, and its `life`, which counts the processes.
    damaged: How many lines of metrics.jsonl were no records.
  """

  group_id: int
  records: pd.DataFrame
  damaged: int = 0

  def curve(self, key: str) -> pd.Series:
    """Returns one metric by step; empty if the group has not recorded it.

    Where a step was recorded twice the later record holds, as it does for the
    trainer that went back to a checkpoint.
    """
    found = self.records.loc[key:key].drop_duplicates('step', keep='last')
    return found.set_index('step')['value'].sort_index().rename(key)

  @property
  def keys(self) -> list[str]:
    return self.records.index.unique().tolist()

  @property
  def last_step(self) -> int:
    return int(self.records['step'].max())

  @property
  def restarts(self) -> int:
    return int(self.records['life'].max())


class RunRecords(NamedTuple):
  """One run under its name.

  Attributes:
    name: What plots and tables call it; no two arms share one.
    workdir: Where it lies.
    run: What `run_directory.write_run` wrote.
    config: config.gin, or '' if there is none.
    groups: The groups that have recorded something.
    models: Final evaluation of each model, by group id.
    ensemble: Final evaluation of the ensemble; empty if there is none.
    pairs: What each pair of models of this arm disagrees on.
    colour: Of its lines; a set of plots gives it.
  """

  name: str
  workdir: epath.Path
  run: Mapping[str, Any]
  config: str
  groups: tuple[GroupRecords, ...]
  models: Mapping[int, Mapping[str, Any]]
  ensemble: Mapping[str, Any]
  pairs: Sequence[Mapping[str, Any]]
  colour: str = ''

  def curves(self, key: str) -> list[pd.Series]:
    """Returns one metric of every group."""
    return [group.curve(key) for group in self.groups]


# --- Reading -----------------------------------------------------------------


def read_group(path: files.PathLike, group_id: int) -> GroupRecords:
  """Reads a metrics.jsonl; a missing one has no records."""
  log = run_directory.read_metrics(path)
  return GroupRecords(group_id, to_frame(log.records), log.damaged)


def to_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
  """Returns the numbers of records, see `GroupRecords.records`."""
  rows = [
      (key, record['step'], life, value)
      for record, life in zip(records, _lives(records))
      for key, value in record.items()
      if isinstance(value, int | float)
  ]
  frame = pd.DataFrame(rows, columns=['key', 'step', 'life', 'value'])
  frame = frame.astype({'step': 'int64', 'life': 'int64', 'value': 'float64'})
  return frame.set_index('key').sort_index(kind='stable')


def _lives(records: Iterable[Mapping[str, Any]]) -> Iterable[int]:
  """Numbers the process that wrote each record, as far as they show it.

  A new process shows where the step goes back, or where a count falls. Of one
  that counted nothing and lost no step nothing shows.
  """
  life, step = 0, 0
  counts: dict[str, float] = {}
  for record in records:
    now = {key: record.get(key) for key in (REJECTED, FAILURES)}
    now = {k: v for k, v in now.items() if _is_count(v)}
    if record['step'] < step or any(
        value < counts.get(key, 0) for key, value in now.items()
    ):
      life, counts = life + 1, {}
    step = record['step']
    counts |= now
    yield life


def _is_count(value: Any) -> bool:
  return isinstance(value, int | float) and bool(np.isfinite(value))


def load_arms(workdirs: Sequence[str]) -> list[RunRecords]:
  """Reads run directories: paths, or `name=path` to name the arm.

  Raises:
    FileNotFoundError: If a directory is missing.
    ValueError: If a run has recorded nothing, or two arms share a name.
  """
  if not workdirs:
    raise ValueError('No run directory given; pass --workdir=<directory>.')
  labels, paths = zip(*(_split_label(w) for w in workdirs))
  runs = [run_directory.read_run(p) for p in paths]
  groups = [_read_groups(p) for p in paths]
  own_names = [
      str(run.get('arm') or epath.Path(path).name)
      for run, path in zip(runs, paths)
  ]
  arms = []
  for i, name in enumerate(_distinct_names(labels, own_names, paths)):
    config = run_directory.config_path(paths[i])
    there = files.exists(config)
    text = files.content(config).decode() if there else ''
    known = epath.Path(paths[i]), runs[i], text, groups[i]
    arms.append(RunRecords(name, *known, *_comparison(paths[i], own_names[i])))
  return arms


def _split_label(workdir: str) -> tuple[str | None, str]:
  """Returns `name=path` as (name, path); a path that exists as it is."""
  label, equals, path = workdir.partition('=')
  if not equals or os.path.isdir(workdir):
    return None, files.absolute(workdir)
  if not label or not path:
    raise ValueError(f'Expected path or name=path, got {workdir!r}.')
  return label, files.absolute(path)


def _read_groups(workdir: str) -> tuple[GroupRecords, ...]:
  groups = [
      read_group(run_directory.metrics_path(workdir, i), i)
      for i in run_directory.list_groups(workdir)
  ]
  groups = [group for group in groups if len(group.records)]
  if not groups:
    raise ValueError(
        f'The run in {workdir} has recorded no metrics (groups/group_<i>/'
        'metrics.jsonl is missing or empty); train it first.'
    )
  return tuple(groups)


def _distinct_names(
    labels: Sequence[str | None], own: Sequence[str], paths: Sequence[str]
) -> list[str]:
  """Returns labels as they are, others with their directory if need be."""
  names = [label or name for label, name in zip(labels, own)]
  names = [' '.join(cli.printable(name).split()) for name in names]
  names = [
      f'{name} ({epath.Path(path).name})'
      if label is None and names.count(name) > 1
      else name
      for label, name, path in zip(labels, names, paths)
  ]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(
          f'Two arms are called {name!r}; name them: --workdir=<name>=<path>.'
      )
  return names


def _comparison(
    workdir: str, arm: str
) -> tuple[dict[int, Any], Mapping[str, Any], Sequence[Any]]:
  """Returns models by group id, ensemble and pairs of the final evaluation."""
  found = run_directory.read_comparison(workdir)
  models = {}
  for key, metrics in found.get('models', {}).items():
    name, _, group = key.rpartition('/group_')
    if name == arm and group.isdigit():
      models[int(group)] = metrics
  ensemble = found.get('ensembles', {}).get(arm) or {}
  return models, ensemble, found.get('pairs', {}).get(arm) or []


# --- What arms have in common ------------------------------------------------


def find_target(
    arms: Sequence[RunRecords],
) -> tuple[RunRecords | None, float | None]:
  """Returns the baseline and its best loss; (None, None) if there is none.

  It is the arm called baseline; else the only arm of one group.
  """
  named = [a for a in arms if a.name.lower().startswith('baseline')]
  single = [a for a in arms if len(a.groups) == 1]
  if not named and (len(single) != 1 or len(arms) == 1):
    return None, None
  baseline = (named or single)[0]
  found = best(validation_curve(baseline))
  return (baseline, found[1]) if found else (None, None)


def example_name(arms: Sequence[RunRecords]) -> str:
  """Returns what losses are counted per: 'token', 'image', ...; 'example'."""
  names = {arm.run.get('example') for arm in arms} - {None}
  return names.pop() if len(names) == 1 else 'example'


def exchanging(arms: Sequence[RunRecords]) -> list[RunRecords]:
  """Returns arms of several groups that have recorded their exchange."""
  return [
      arm
      for arm in arms
      # A lonely group records zeros, which would say too much.
      if arm.run.get('num_groups', len(arm.groups)) > 1
      and any(k.startswith('exchange/') for g in arm.groups for k in g.keys)
  ]


# --- Curves ------------------------------------------------------------------


def finite(curve: pd.Series) -> pd.Series:
  """Returns the records whose value is finite."""
  return curve[np.isfinite(curve)]


def mean_curve(curves: Iterable[pd.Series]) -> pd.Series:
  """Returns the mean of curves at the steps that all of them have."""
  curves = [c for c in curves if len(c)]
  if not curves:
    return EMPTY
  together = pd.concat(curves, axis=1, join='inner').sort_index()
  return together.mean(axis=1, skipna=False)


def validation_curve(arm: RunRecords) -> pd.Series:
  """Returns the validation loss of an arm: the mean over its groups."""
  return mean_curve(arm.curves('eval/loss'))


def best(curve: pd.Series) -> tuple[int, float] | None:
  """Returns step and value of the lowest finite point; the first of equals."""
  curve = finite(curve)
  return (int(curve.idxmin()), float(curve.min())) if len(curve) else None


def first_at_or_under(curve: pd.Series, target: float) -> int | None:
  """Returns the first recorded step with a value at or under the target."""
  hit = curve.index[curve <= target]
  return int(hit[0]) if len(hit) else None


def distill_curve(group: GroupRecords) -> pd.Series:
  """Returns the distillation loss where it counted: not during burn-in."""
  curve, weight = group.curve('loss/distill'), group.curve('distill/weight')
  if weight.empty:
    return curve
  return curve[curve.index.isin(weight.index[weight > 0])]


def counted(group: GroupRecords, key: str) -> pd.Series:
  """Returns a count since the start of the run, restarts and all, by step.

  The steps that a restart went back over are those of the later process; what
  the earlier one counted in them stays counted.
  """
  found = group.records.loc[key:key]
  found = found[np.isfinite(found['value'])]
  lives = found.groupby('life')
  before = lives['value'].last().cumsum().shift(fill_value=0)
  # Where any later process began.
  begins = lives['step'].first()[::-1].cummin()[::-1].shift(-1)
  total = found.set_axis(found['step'])['value'] + (
      found['life'].map(before).to_numpy()
  )
  kept = ~(found['step'] >= found['life'].map(begins)).to_numpy()
  total = total[kept]
  return total[~total.index.duplicated(keep='last')]


def by_peer(group: GroupRecords, unit: str = 'steps') -> dict[int, pd.Series]:
  """Returns the staleness of each peer that ever taught, by its group id."""
  pattern = re.compile(rf'exchange/staleness_{unit}_group_(\d+)')
  found = {int(m[1]): m[0] for m in map(pattern.fullmatch, group.keys) if m}
  curves = {peer: group.curve(key) for peer, key in sorted(found.items())}
  return {peer: c for peer, c in curves.items() if len(finite(c))}


# --- Rates -------------------------------------------------------------------


def _seconds(group: GroupRecords) -> pd.Series:
  """Returns how long the steps up to each record took, where it is known."""
  speed = group.curve('perf/steps_per_sec')
  taken = pd.Series(np.diff(speed.index, prepend=0), speed.index)
  good = np.isfinite(speed) & (speed > 0)
  return taken[good] / speed[good]


def training_seconds(group: GroupRecords) -> float:
  """Returns the time spent on the recorded steps; 0 if none is known.

  From the recorded speeds, so that a restart's gap does not count.
  """
  return float(_seconds(group).sum())


def mean_rate(group: GroupRecords, key: str) -> float | None:
  """Returns a metric's mean over the time of the steps that have it."""
  both = pd.concat([finite(group.curve(key)), _seconds(group)], axis=1).dropna()
  if not both.iloc[:, 1].sum():
    return None
  return float(np.average(both.iloc[:, 0], weights=both.iloc[:, 1]))
