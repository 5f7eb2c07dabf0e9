"""A study: its declaration, the runs that are trained in order, its files.

A study is declared in `catalogue/` as arms, scales, and what is compared: data,
no code. `worker` trains its plan; `outcomes` reads it back, `analysis` and
`words` turn it into numbers and words, `study_page` into a page.

    <workdir>/study.json                     what the study is
    <workdir>/runs/<arm>/tuning_<rate>/      a run directory each, of the seed
    <workdir>/runs/<arm>/seed_<k>/           on which nothing is reported, and
    <workdir>/runs/<arm>/.../outcome.json    of the others; the last of a run
    <workdir>/report/                        figures, plots, page

A learning rate is chosen from the tuning runs alone. Nothing here imports jax.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from codistill_jax.storage import files

SCALES = ('smoke', 'cpu', 'gpu', 'paper')


class Measure(NamedTuple):
  """How a number of a run is called, written and compared.

  Attributes:
    title: In a sentence.
    column: In a table.
    label: On an axis.
    form: Its digits.
    ratio: Compared as a ratio, on a logarithmic scale; else as a difference.
  """

  title: str
  column: str
  label: str
  form: str = '.4f'
  ratio: bool = False


_BEST = "the baseline's best validation loss"
# What a comparison may measure; see `analysis` for the rules.
MEASURES = {
    'steps_to_target': Measure(
        f'steps to {_BEST}', 'steps to target', 'steps to target', ',.0f', True
    ),
    'total_steps_to_target': Measure(
        f'steps to {_BEST}, with those of the teachers before',
        'with teachers',
        'steps to target, with teachers',
        ',.0f',
        True,
    ),
    'compute_to_target': Measure(
        f'FLOPs of all groups and teachers to {_BEST}',
        'FLOPs to target',
        'FLOPs to target',
        '.3g',
        True,
    ),
    'final_loss': Measure(
        'validation loss at the last evaluation',
        'loss at the end',
        'validation loss at the end',
    ),
    'best_loss': Measure(
        'best validation loss', 'best loss', 'best validation loss'
    ),
    # Of several retrains, not of one run.
    'churn': Measure(
        'mean absolute difference between retrains', 'churn', 'churn'
    ),
    'log_loss': Measure('log loss', 'log loss', 'log loss'),
    'final_accuracy': Measure(
        'validation accuracy at the end',
        'accuracy at the end',
        'validation accuracy at the end',
        '.2%',
    ),
}


class Arm(NamedTuple):
  """One method in a comparison.

  Attributes:
    name: In files; letters, digits and underscores.
    title: For people.
    gin_files: On top of those of the scale.
    bindings: On top of all files.
    num_groups: G.
    ensemble_of: Trains nothing: the mean prediction of the groups of each run
      of that arm.
    taught_by: Trained after that arm, and towards the groups of its run of the
      same seed, which stay as they are.
    tuned_as: Takes the learning rate of that arm rather than its own of the
      grid.
    workers: Of each group; 0: those of the scale, times `times`. Their rows
      make up a group batch, and what they give each other is counted as
      `communication` says.
    times: See `workers`.
    batch_workers: Workers whose rows make up one update, if not all: 1 for
      asynchronous SGD.
    communication: Pattern of bytes, see `costs.bytes_per_update`: 'all_reduce',
      'exchange', 'outer' or 'server'.
    seeds: Of its runs; None: as many as the scale says, from 0.
    fixed: What all its runs have of seed 0: 'parameters', the 'order' of data,
      or '', nothing.
    weight: Distill weight in the end, in place of that of the configuration,
      whose burn-in and ramp stay; None: that of the configuration.
    x: Where the arm stands on the axis of the study, if that has one.
    series: Which line of the plot against that axis it belongs to.
  """

  name: str
  title: str
  gin_files: tuple[str, ...] = ()
  bindings: tuple[str, ...] = ()
  num_groups: int = 1
  ensemble_of: str = ''
  taught_by: str = ''
  tuned_as: str = ''
  workers: int = 0
  times: int = 1
  batch_workers: int | None = None
  communication: str = 'all_reduce'
  seeds: tuple[int, ...] | None = None
  fixed: str = ''
  weight: float | None = None
  x: float | None = None
  series: str = ''


class Comparison(NamedTuple):
  """One number of one arm against that of another, seed by seed.

  Attributes:
    arm: The one of interest.
    expect: What the paper leads us to expect of its number: 'less', 'more' or
      'equal' to the other's.
    against: The other.
    measure: A key of `MEASURES`.
    paper: What the paper says, with its mark: 'half the steps [B]'.
  """

  arm: str
  expect: str
  against: str
  measure: str
  paper: str = ''

  def by(self, paper: str) -> 'Comparison':
    """Returns the comparison, with what the paper says."""
    return self._replace(paper=paper)


class Factor(NamedTuple):
  """One setting that is changed, all else as it is at some point.

  Attributes:
    point: Where, for people; the same words for all changes there.
    change: What is changed, for people.
    arm: Groups that codistil, with the change.
    one: One group of the same batch, with the change if that touches it: its
      best loss is the target.
    unchanged: Groups that codistil, without the change.
  """

  point: str
  change: str
  arm: str
  one: str
  unchanged: str


class Scale(NamedTuple):
  """How large a study is.

  Attributes:
    gin_files: The task first; `--gin_file` replaces them. They define the
      macros RATE (learning rate) and STEPS (updates of a group).
    bindings: On top of them.
    workers: Of a group, where an arm does not say otherwise.
    worker_rows: Rows of the group batch for each worker; 0: the configuration
      says how many a group batch has.
    seeds: How many seeds each arm is trained with.
    rates: The grid of learning rates of every arm; each is tried with one more
      seed, which is reported nowhere. One rate: nothing is tuned.
    arms: Names of the arms that are trained; empty for all.
    baseline: In place of that of the study.
  """

  gin_files: tuple[str, ...]
  bindings: tuple[str, ...] = ()
  workers: int = 1
  worker_rows: int = 0
  seeds: int = 3
  rates: tuple[float, ...] = ()
  arms: tuple[str, ...] = ()
  baseline: str = ''


class Study(NamedTuple):
  """A declaration.

  Attributes:
    name: Of `--study`.
    title: Heading of the page.
    source: 'Figure 2a of Anil et al. 2018', or what else is reproduced.
    question: One sentence.
    claim: What the paper says, with the marks of how sure we are of it.
    arms: In the order of tables and plots.
    baseline: The arm whose best loss is the target.
    comparisons: What the verdict is about; the first is the main one.
    scales: By name.
    predictions: Whether its runs leave what they predict in the end, on the
      validation and the test split; see `retrains`.
    x_label: Of the logarithmic axis on which arms stand; '' for none.
    views: Further figures: 'latency', wall time from a tail-latency model;
      'bytes', loss against bytes received; 'speed-accuracy', accuracy beside
      loss; 'map', ratios of steps over batches, at three targets.
    factors: What a second group's help may depend on, a row of a table each.
    notes: Paragraphs for the page: what the result depends on.
  """

  name: str
  title: str
  source: str
  question: str
  claim: str
  arms: tuple[Arm, ...]
  baseline: str
  comparisons: tuple[Comparison, ...]
  scales: Mapping[str, Scale]
  predictions: bool = False
  x_label: str = ''
  views: tuple[str, ...] = ()
  factors: tuple[Factor, ...] = ()
  notes: tuple[str, ...] = ()


# --- The plan ----------------------------------------------------------------


class PlannedRun(NamedTuple):
  """One training of one arm.

  Attributes:
    arm: Its name.
    seed: Of parameters and of the order of data; `TUNING_SEED` for tuning.
    rate: Learning rate; None: the one that was chosen for the arm, or that of
      the configuration if there is no grid.
    tuning: Whether it is there to choose the rate.
  """

  arm: str
  seed: int
  rate: float | None = None
  tuning: bool = False

  @property
  def name(self) -> str:
    """Returns a name for people."""
    if self.tuning:
      return f'{self.arm}, rate {self.rate:g}'
    return f'{self.arm}, seed {self.seed}'


# Far from the seeds of the study, also if these become more later.
TUNING_SEED = 1000


class StudyPlan(NamedTuple):
  """A study at a scale.

  Attributes:
    study: The declaration, with the arms of this scale alone and what is
      compared of them.
    scale_name: Which scale.
    scale: With whatever flags have changed.
    declared: All arms of the study, whatever is trained now.
  """

  study: Study
  scale_name: str
  scale: Scale
  declared: tuple[Arm, ...]

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.study.arms if arm.name == name)

  @property
  def trained(self) -> list[Arm]:
    """Returns the arms that are not made of the runs of another one."""
    return [arm for arm in self.study.arms if not arm.ensemble_of]

  def group_batch(self, arm: Arm) -> int | None:
    """Returns rows of an update of one group; None: as configured."""
    workers = arm.batch_workers or arm.workers
    return workers * self.scale.worker_rows or None

  def grid(self, arm: Arm) -> tuple[float, ...]:
    """Returns the rates to choose from; empty: nothing is chosen."""
    rates = self.scale.rates
    return rates if len(rates) > 1 and not arm.tuned_as else ()

  def seeds(self, arm: Arm) -> Sequence[int]:
    """Returns the seeds of the runs of an arm."""
    return range(self.scale.seeds) if arm.seeds is None else arm.seeds

  def tuning(self, arm: Arm) -> list[PlannedRun]:
    """Returns the runs that choose the rate of an arm."""
    return [
        PlannedRun(arm.name, TUNING_SEED, rate, True) for rate in self.grid(arm)
    ]

  def runs(self) -> list[PlannedRun]:
    """Returns all runs; those that others need come before those."""
    found = []
    for arm in self.trained:  # Compiled once for all seeds.
      found += self.tuning(arm)
      found += [PlannedRun(arm.name, seed) for seed in self.seeds(arm)]
    return found

  def tuned(self, arm: Arm) -> Arm:
    """Returns the arm whose runs choose the rate of this one."""
    return self.arm(arm.tuned_as) if arm.tuned_as else arm

  def needed(self, run: PlannedRun) -> list[PlannedRun]:
    """Returns the runs that must be done before this one.

    The teachers of a tuning run are those of seed 0: what is reported of the
    arm is not tuned on them but for that seed.
    """
    arm = self.arm(run.arm)
    needed = [] if run.tuning else self.tuning(self.tuned(arm))
    return [*needed, self.teachers(run)] if arm.taught_by else needed

  def teachers(self, run: PlannedRun) -> PlannedRun:
    """Returns the run whose groups teach in this one."""
    seed = 0 if run.tuning else run.seed
    return PlannedRun(self.arm(run.arm).taught_by, seed)


def make_plan(
    study: Study,
    scale_name: str,
    *,
    gin_files: Sequence[str] = (),
    seeds: int | None = None,
    rates: Sequence[float] | None = None,
    worker_rows: int | None = None,
    arms: Sequence[str] = (),
) -> StudyPlan:
  """Makes the plan of a study, with what flags change.

  Args:
    study: The declaration.
    scale_name: One of its scales.
    gin_files: In place of those of the scale.
    seeds: In place of its number of seeds.
    rates: In place of its grid.
    worker_rows: In place of its rows for each worker.
    arms: Names, in place of its choice; what they need is added.

  Raises:
    ValueError: If there is no such scale or arm, or nothing for `worker_rows`.
  """
  if scale_name not in study.scales:
    raise ValueError(
        f'--scale={scale_name}: the study {study.name} has'
        f' {", ".join(s for s in SCALES if s in study.scales)}'
    )
  scale = study.scales[scale_name]
  if gin_files:
    scale = scale._replace(gin_files=tuple(gin_files))
  if seeds is not None:
    scale = scale._replace(seeds=seeds)
  if worker_rows is not None:
    if not scale.worker_rows:
      raise ValueError(
          f'--worker_rows={worker_rows}: in the study {study.name} the group'
          ' batch is that of the configuration; leave it out'
      )
    scale = scale._replace(worker_rows=worker_rows)
  if rates is not None:
    scale = scale._replace(rates=tuple(rates))
  declared = study.arms
  study = study._replace(baseline=scale.baseline or study.baseline)
  chosen = [
      arm if arm.workers else arm._replace(workers=arm.times * scale.workers)
      for arm in _with_needed(study, arms or scale.arms)
  ]
  names = {arm.name for arm in chosen}
  comparisons = [c for c in study.comparisons if {c.arm, c.against} <= names]
  factors = [f for f in study.factors if {f.arm, f.one, f.unchanged} <= names]
  study = study._replace(
      arms=tuple(chosen),
      comparisons=tuple(comparisons),
      factors=tuple(factors),
  )
  return StudyPlan(study, scale_name, scale, declared)


def _with_needed(study: Study, names: Sequence[str]) -> list[Arm]:
  """Returns arms by name (empty: all), and those that they stand on."""
  by_name = {arm.name: arm for arm in study.arms}
  unknown = [name for name in names if name not in by_name]
  if unknown:
    raise ValueError(
        f'--arms: the study {study.name} has no arm {unknown[0]!r}; it has'
        f' {", ".join(by_name)}'
    )
  if not names:
    return list(study.arms)
  wanted, found = [*names, study.baseline], set()
  while wanted:
    arm = by_name[wanted.pop()]
    if arm.name not in found:
      found.add(arm.name)
      wanted += filter(None, (arm.ensemble_of, arm.taught_by, arm.tuned_as))
  return [arm for arm in study.arms if arm.name in found]


# --- Files -------------------------------------------------------------------


def study_path(workdir: files.PathLike) -> epath.Path:
  """Returns the path of study.json: what the study is."""
  return epath.Path(workdir) / 'study.json'


def run_dir(workdir: files.PathLike, run: PlannedRun) -> epath.Path:
  """Returns the run directory of one run."""
  last = f'tuning_{run.rate:g}' if run.tuning else f'seed_{run.seed}'
  return epath.Path(workdir) / 'runs' / run.arm / last


def ensemble_path(run_directory: files.PathLike) -> epath.Path:
  """Returns the path of evaluations of the ensemble of a run's groups."""
  return epath.Path(run_directory) / 'ensemble.jsonl'


def outcome_path(run_directory: files.PathLike) -> epath.Path:
  """Returns the path of outcome.json: how a run has ended."""
  return epath.Path(run_directory) / 'outcome.json'


def read_outcome(
    workdir: files.PathLike, run: PlannedRun
) -> dict[str, Any] | None:
  """Reads how a run has ended; None if it has not."""
  return files.read_json(outcome_path(run_dir(workdir, run)))


def choose_rate(outcomes: Mapping[float, Mapping[str, Any]]) -> float:
  """Chooses the rate of the lowest validation loss at the end of tuning.

  Args:
    outcomes: Of the tuning runs of an arm, by rate. If all of them diverged,
      the lowest rate.
  """
  ended = {
      rate: outcome['loss']
      for rate, outcome in outcomes.items()
      if outcome['diverged_at'] is None and math.isfinite(outcome['loss'])
  }
  if not ended:
    return min(outcomes)  # Its runs will say how they diverge.
  return min(ended, key=lambda rate: (ended[rate], rate))


def begun_at(workdir: files.PathLike) -> float:
  """Returns when study.json was last written; 0 if it was not."""
  return files.modified(study_path(workdir))


def check_known(
    workdir: files.PathLike, described: Mapping[str, Any] | None
) -> None:
  """Raises ValueError if study.json is one that this version cannot read."""
  if described and 'study' not in described:
    raise ValueError(
        f'{os.fspath(workdir)} holds a study of churn as earlier versions wrote'
        ' it, whose runs are no run directories; train it again in another'
        ' --workdir'
    )
