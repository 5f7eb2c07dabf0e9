"""What a report reads: arms, their curves, and single numbers of them.

An arm is one run directory under a name; its curves are means over its groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codistill_jax import run_directory
from codistill_jax.storage import files


class Curve(NamedTuple):
  """One metric of one group: steps, each once and rising, and values."""

  steps: np.ndarray
  values: np.ndarray

  def __bool__(self) -> bool:
    return len(self.steps) > 0


class Group(NamedTuple):
  """The records of one group."""

  group_id: int
  log: run_directory.MetricsLog

  def curve(self, key: str) -> Curve:
    """One metric against the step; empty if the group has not recorded it."""
    steps, values = run_directory.series(self.log.records, key)
    return Curve(np.asarray(steps, np.int64), np.asarray(values, np.float64))

  @property
  def last_step(self) -> int:
    return max(r['step'] for r in self.log.records)


class Arm(NamedTuple):
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
  """

  name: str
  workdir: epath.Path
  run: Mapping[str, Any]
  config: str
  groups: tuple[Group, ...]
  models: Mapping[int, Mapping[str, Any]]
  ensemble: Mapping[str, Any]
  pairs: Sequence[Mapping[str, Any]]


# --- Loading -----------------------------------------------------------------


def load_arms(
    workdirs: Sequence[str], output: files.PathLike | None = None
) -> list[Arm]:
  """Reads run directories.

  Args:
    workdirs: Paths, or `name=path` to name the arm.
    output: A further directory where comparison.json may lie.

  Raises:
    FileNotFoundError: If a directory is missing.
    ValueError: If a run has recorded nothing, or two arms share a name.
  """
  if not workdirs:
    raise ValueError('No run directory given; pass --workdir=<directory>.')
  labels, paths = zip(*(split_label(w) for w in workdirs))
  runs = [run_directory.read_run(p) for p in paths]
  groups = [_load_groups(p) for p in paths]
  own_names = [
      str(run.get('arm') or epath.Path(path).name)
      for run, path in zip(runs, paths)
  ]
  names = _distinct_names(labels, own_names, paths)
  comparisons = [run_directory.read_comparison(p) for p in paths]
  if output is not None:
    extra = files.read_json(epath.Path(output) / 'comparison.json')
    comparisons.append(extra or {})
  arms = []
  for i, path in enumerate(paths):
    # What another run's directory says of `baseline` is about this arm only
    # if no other arm goes by that name.
    unique = own_names.count(own_names[i]) == 1
    final = _find_comparison(
        own_names[i], [comparisons[i], *(comparisons if unique else [])]
    )
    workdir = epath.Path(path)
    config = _read_config(path)
    arms.append(Arm(names[i], workdir, runs[i], config, groups[i], *final))
  return arms


def split_label(workdir: str) -> tuple[str | None, str]:
  """`name=path` as (name, path); a path that exists is taken as it is."""
  label, equals, path = workdir.partition('=')
  if not equals or epath.Path(workdir).is_dir():
    return None, workdir
  if not label or not path:
    raise ValueError(f'Expected path or name=path, got {workdir!r}.')
  return label, path


def _load_groups(path: str) -> tuple[Group, ...]:
  groups = []
  for i in run_directory.list_groups(path):
    log = run_directory.read_metrics(run_directory.metrics_path(path, i))
    if log.records:
      groups.append(Group(i, log))
  if not groups:
    raise ValueError(
        f'The run in {path} has recorded no metrics (groups/group_<i>/'
        'metrics.jsonl is missing or empty); train it first.'
    )
  return tuple(groups)


def _read_config(path: str) -> str:
  try:
    return run_directory.config_path(path).read_text()
  except FileNotFoundError:
    return ''


def _distinct_names(
    labels: Sequence[str | None], own: Sequence[str], paths: Sequence[str]
) -> list[str]:
  """Given names as they are; others get their directory's name if need be."""
  names = [label or name for label, name in zip(labels, own)]
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


def _find_comparison(
    name: str, comparisons: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, Any], Mapping[str, Any], Sequence[Any]]:
  """Models by group id, ensemble and pairs of an arm, from the first that has
  any."""
  for comparison in comparisons:
    models = {}
    for key, metrics in comparison.get('models', {}).items():
      arm, _, group = key.rpartition('/group_')
      if arm == name and group.isdigit():
        models[int(group)] = metrics
    ensemble = comparison.get('ensembles', {}).get(name) or {}
    pairs = comparison.get('pairs', {}).get(name) or []
    if models or ensemble or pairs:
      return models, ensemble, pairs
  return {}, {}, []


# --- Curves ------------------------------------------------------------------


def mean_curve(curves: Sequence[Curve]) -> Curve:
  """The mean of several groups' curves, at the steps that all of them have."""
  curves = [c for c in curves if c]
  if not curves:
    return Curve(np.zeros(0, np.int64), np.zeros(0))
  steps = curves[0].steps
  for curve in curves[1:]:
    steps = np.intersect1d(steps, curve.steps)
  values = [c.values[np.isin(c.steps, steps)] for c in curves]
  return Curve(steps, np.mean(values, axis=0))


def validation_curve(arm: Arm) -> Curve:
  """Validation loss of an arm: the mean over its groups."""
  return mean_curve([g.curve('eval/loss') for g in arm.groups])


def best(curve: Curve) -> tuple[int, float] | None:
  """Step and value of the lowest finite point; the first of equals."""
  finite = np.isfinite(curve.values)
  if not finite.any():
    return None
  i = int(np.argmin(np.where(finite, curve.values, np.inf)))
  return int(curve.steps[i]), float(curve.values[i])


def first_at_or_under(curve: Curve, target: float) -> int | None:
  """The first recorded step whose value is at or under the target."""
  hit = np.flatnonzero(curve.values <= target)
  return int(curve.steps[hit[0]]) if len(hit) else None


def find_baseline(arms: Sequence[Arm]) -> Arm | None:
  """The arm called baseline; else the only arm of one group, if any."""
  named = [a for a in arms if a.name.lower().startswith('baseline')]
  single = [a for a in arms if len(a.groups) == 1]
  if named:
    return named[0]
  return single[0] if len(single) == 1 and len(arms) > 1 else None


def example_name(arms: Sequence[Arm]) -> str:
  """What losses are counted per: 'token', 'image', ...; or 'example'."""
  names = {arm.run.get('example') for arm in arms} - {None}
  return names.pop() if len(names) == 1 else 'example'


# --- What the table asks for --------------------------------------------------


def final_metrics(arm: Arm, group: Group) -> Mapping[str, Any]:
  """The final evaluation of a model, else its last evaluation in training."""
  if group.group_id in arm.models:
    return arm.models[group.group_id]
  metrics: dict[str, Any] = {}
  for key in (
      'eval/loss',
      'eval/perplexity',
      'eval/accuracy',
      'eval/auc',
      'eval/calibration',
  ):
    curve = group.curve(key)
    if curve:
      metrics[key] = float(curve.values[-1])
  return metrics


def exchange_stall(arm: Arm, group: Group) -> tuple[float | None, float | None]:
  """How long the exchange held the loop.

  Returns:
    Milliseconds per exchange, and the share of the training time; None where
    the records do not tell. The training time is the sum over records of steps
    divided by steps per second, so that a restart's gap does not count.
  """
  if arm.run.get('num_groups', len(arm.groups)) < 2:
    return None, None  # Nothing to exchange; a recorded 0 would say too much.
  stall = group.curve('exchange/stall_ms')
  if not stall:
    return None, None
  total_ms = float(np.nansum(stall.values))
  every = arm.run.get('exchange_every')
  exchanges = int(stall.steps[-1]) // every if every else 0
  seconds = training_seconds(group)
  return (
      total_ms / exchanges if exchanges else None,
      total_ms / 1000.0 / seconds if seconds else None,
  )


def training_seconds(group: Group) -> float:
  """Time spent on the recorded steps, from the recorded speeds; 0 if none."""
  speed = group.curve('perf/steps_per_sec')
  taken = np.diff(speed.steps, prepend=0)
  good = np.isfinite(speed.values) & (speed.values > 0)
  return float(np.sum(taken[good] / speed.values[good]))


def pair_mean(arm: Arm, key: str) -> float | None:
  """The mean over the pairs of models of an arm; None if there are none."""
  values = [p[key] for p in arm.pairs if key in p]
  return float(np.mean(values)) if values else None
