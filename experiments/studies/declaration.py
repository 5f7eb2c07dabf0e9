"""What a study is: arms, scales, and what is compared; data, no code.

A study is declared in `catalogue/`, planned by `study_plan` and trained by
`worker`; `outcomes` reads it back, `analysis` and `verdicts` turn it into
numbers and words, `study_page` into a page. Nothing here imports jax.
"""

from collections.abc import Mapping
from typing import NamedTuple

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
    communication: Pattern of bytes, a name in `communication`: 'none',
      'all_reduce', 'exchange', 'outer' or 'server'.
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
  communication: str = 'none'
  seeds: tuple[int, ...] | None = None
  fixed: str = ''
  weight: float | None = None
  x: float | None = None
  series: str = ''


class Comparison(NamedTuple):
  """One number of one arm against that of another, seed by seed.

  Attributes:
    arm: The one of interest.
    against: The other.
    measure: A key of `MEASURES`.
    expect: What the paper leads us to expect of the arm's number: 'less',
      'more' or 'equal' to the other's.
    paper: What the paper says, with its mark: 'half the steps [B]'.
  """

  arm: str
  against: str
  measure: str
  expect: str
  paper: str


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
    x_label: Of the axis on which arms stand; '' for none.
    x_log: Whether that axis is logarithmic.
    views: Further figures of this study, names in `study_page.VIEWS`.
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
  x_log: bool = False
  views: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
