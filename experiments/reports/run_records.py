"""What runs have recorded: arms, their groups, and curves of one metric.

An arm is one run directory under a name. The records of a group are read once;
a curve is a Series of values by step.
"""

import array
import functools
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


class GroupRecords:
  """The records of one group, each number of them as 8 bytes.

  Attributes:
    group_id: The group.
    damaged: How many lines of metrics.jsonl were no records.
  """

  def __init__(
      self,
      group_id: int,
      records: Iterable[Mapping[str, float] | None],
      damaged: int = 0,
  ):
    """Takes records in the order of the file, each once.

    Args:
      group_id: The group.
      records: Of `run_directory.records`; None for each that is damaged.
      damaged: How many there were besides.
    """
    self.group_id = group_id
    self.damaged = damaged
    steps = array.array('q')
    # Most records have the same keys: by those, which records, and all values.
    tables: dict[tuple[str, ...], tuple[array.array, array.array]] = {}
    for record in records:
      if record is None:
        self.damaged += 1
        continue
      keys = tuple(record)
      if keys not in tables:
        tables[keys] = array.array('q'), array.array('d')
      places, values = tables[keys]
      places.append(len(steps))
      values.extend(record.values())
      steps.append(record['step'])
    self._steps = np.array(steps, np.int64)
    self._tables = [
        (keys, np.array(n, np.int64), np.frombuffer(x).reshape(-1, len(keys)))
        for keys, (n, x) in tables.items()
    ]
    self._life = _lives(self._steps, [*map(self._column, (REJECTED, FAILURES))])

  def _column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the records that have a key, and its values."""
    parts = [(EMPTY.index.to_numpy(), EMPTY.to_numpy())]
    parts += [
        (places, values[:, keys.index(key)])
        for keys, places, values in self._tables
        if key in keys
    ]
    places, values = map(np.concatenate, zip(*parts))
    order = np.argsort(places, kind='stable')
    return places[order], values[order]

  def column(self, key: str) -> pd.DataFrame:
    """Returns one metric in the order of the file.

    Returns:
      A row per record that has it: its `step`, its `value`, and its `life`,
      which counts the processes.
    """
    places, values = self._column(key)
    found = {'step': self._steps[places], 'life': self._life[places]}
    return pd.DataFrame({**found, 'value': values})

  def curve(self, key: str) -> pd.Series:
    """Returns one metric by step; empty if the group has not recorded it.

    Where a step was recorded twice the later record holds, as it does for the
    trainer that went back to a checkpoint.
    """
    places, values = self._column(key)
    index = pd.Index(self._steps[places], name='step')
    found = pd.Series(values, index, name=key)
    if index.is_monotonic_increasing and index.is_unique:
      return found
    return found[~index.duplicated('last')].sort_index()

  def __len__(self) -> int:
    return len(self._steps)

  @property
  def keys(self) -> list[str]:
    return sorted({key for keys, *_ in self._tables for key in keys})

  @property
  def last_step(self) -> int:
    return int(self._steps.max())

  @property
  def restarts(self) -> int:
    return int(self._life[-1])


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
    samples: What its models have written; each has a `text`.
    unreadable: The files that could not be read, and why, a line each.
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
  samples: Sequence[Mapping[str, Any]] = ()
  unreadable: Sequence[str] = ()
  colour: str = ''

  def curves(self, key: str) -> list[pd.Series]:
    """Returns one metric of every group."""
    return [group.curve(key) for group in self.groups]


# --- Reading -----------------------------------------------------------------


def read_group(path: files.PathLike, group_id: int) -> GroupRecords:
  """Reads a metrics.jsonl, once; a missing one has no records."""
  return GroupRecords(group_id, run_directory.records(path))


def _lives(
    steps: np.ndarray, counts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
  """Numbers the process that wrote each record, as far as they show it.

  A new process shows where the step goes back, or where a count falls. Of one
  that counted nothing and lost no step nothing shows.

  Args:
    steps: Of all records.
    counts: Of each count the places of its records, and its values.
  """
  back = np.flatnonzero(np.diff(steps) < 0) + 1
  falls = [(place, place - 1) for place in back.tolist()]
  for places, values in counts:
    places, values = (x[np.isfinite(values)] for x in (places, values))
    fall = np.flatnonzero(np.diff(values) < 0)
    falls += zip(places[fall + 1].tolist(), places[fall].tolist())
  begins = [0]
  for place, before in sorted(falls):
    if before >= begins[-1]:  # Else of an earlier process.
      begins.append(place)
  return np.searchsorted(begins[1:], np.arange(len(steps)), side='right')


def load_arms(workdirs: Sequence[str]) -> list[RunRecords]:
  """Reads run directories: paths, or `name=path` to name the arm.

  Raises:
    FileNotFoundError: If a directory is missing.
    ValueError: If a run has recorded nothing, or two arms share a name.
  """
  if not workdirs:
    raise ValueError('No run directory given; pass --workdir=<directory>.')
  labels, paths = zip(*(_split_label(w) for w in workdirs))
  arms = [_read_arm(path) for path in paths]
  names = _distinct_names(labels, [arm.name for arm in arms], paths)
  return [arm._replace(name=name) for arm, name in zip(arms, names)]


def _read_arm(workdir: str) -> RunRecords:
  """Reads one run directory; the name is that of its run."""
  bad: list[str] = []
  ask = functools.partial(cli.attempt, bad)
  run = ask(run_directory.read_run, workdir) or {}
  groups = [
      ask(read_group, run_directory.metrics_path(workdir, i), i)
      for i in run_directory.list_groups(workdir)
  ]
  groups = tuple(group for group in groups if group)
  if not groups:
    raise ValueError(
        f'The run in {workdir} has recorded no metrics (groups/group_<i>/'
        f'metrics.jsonl is missing or empty); train it first. {" ".join(bad)}'
    )
  arm = run.get('arm') or epath.Path(workdir).name
  found = ask(run_directory.read_comparison, workdir) or {}
  models = {
      key.rpartition('_')[2]: metrics
      for key, metrics in found.get('models', {}).items()
      if key.rpartition('_')[0] == f'{arm}/group'
  }
  return RunRecords(
      name=arm,
      workdir=epath.Path(workdir),
      run=run,
      config=ask(run_directory.read_config, workdir) or '',
      groups=groups,
      models={int(k): v for k, v in models.items() if files.is_step(k)},
      ensemble=found.get('ensembles', {}).get(arm) or {},
      pairs=found.get('pairs', {}).get(arm) or [],
      samples=ask(run_directory.read_samples, workdir) or [],
      unreadable=tuple(bad),
  )


def _split_label(workdir: str) -> tuple[str | None, str]:
  """Returns `name=path` as (name, path); a path that exists as it is."""
  label, equals, path = workdir.partition('=')
  if not equals or os.path.isdir(workdir):
    return None, files.absolute(workdir)
  if not label or not path:
    raise ValueError(f'Expected path or name=path, got {workdir!r}.')
  return label, files.absolute(path)


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
  found = group.column(key)
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
