"""Trained models: opens a run directory for evaluation, export or a notebook.

trained = cj.load('runs/two')
outputs, _ = trained.model.apply(
    trained.variables, batch, trained.model.init_carry(rows), None, False
)
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory
from codistill_jax.base import Model, Task, TrainState, Variables
from codistill_jax.exchange import publications
from codistill_jax.storage import checkpoints
from codistill_jax.storage.resume import ResumeCheckpoints

CHECKPOINTS, PUBLICATIONS = 'checkpoints', 'publications'


class Run(NamedTuple):
  """A run directory, its configuration and the groups found in it."""

  workdir: str
  arm: str
  experiment: experiment_lib.Experiment
  model: Model
  num_groups: int
  groups: list[int]


class Trained(NamedTuple):
  """A trained model and what it needs to be used.

  Attributes:
    model: Pure functions; see `base.Model`.
    variables: Of one group, as numpy arrays.
    task: What it was trained on; `task.eval_batches(rows)` is its validation.
    step: Updates done.
  """

  model: Model
  variables: Variables
  task: Task
  step: int

  @property
  def tokenizer(self) -> Any:
    """Returns what makes word pieces of text and back; None without text."""
    return None if self.task.tokenizer is None else self.task.tokenizer()


def load(
    run_dir: epath.PathLike,
    group: int = 0,
    step: int | None = None,
    *,
    trusted: Sequence[str] = (),
) -> Trained:
  """Loads what a group of a run has learnt, from its resume checkpoint.

  The configuration of this process becomes that of the run.

  Args:
    run_dir: A run directory, on a disk or in a bucket.
    group: Which group.
    step: Of which checkpoint; None for the newest.
    trusted: Modules of your own that its config.gin may name; see SECURITY.md.

  Raises:
    FileNotFoundError: If there is no such run, group or checkpoint.
    ValueError: If its configuration or the checkpoint cannot be used.
  """
  run = open_run(run_dir, trusted=trusted)
  step, variables = read_variables(run, group, CHECKPOINTS, step)
  return Trained(run.model, variables, run.experiment.task, step)


def open_run(
    workdir: epath.PathLike,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    *,
    trusted: Sequence[str] = (),
    whole_splits: bool = False,
) -> Run:
  """Opens a run directory; makes what its own configuration says.

  Args:
    workdir: A run directory.
    gin_files: On top of its configuration.
    bindings: On top of both.
    trusted: Modules that its configuration may name.
    whole_splits: Evaluate on all of a split where the run takes a sample.

  Raises:
    FileNotFoundError: If nothing was trained there.
    ValueError: If its configuration cannot be used.
  """
  groups = run_directory.list_groups(workdir)
  config = run_directory.config_path(workdir)
  if not groups or not run_directory.read_config(workdir):
    raise FileNotFoundError(
        f'{workdir} holds no trained group yet (no {config.name}); train one'
        ' first, or check the directory'
    )
  saved = {'saved': config, 'trusted': trusted}
  gin_utils.parse([], **saved)
  own = gin_utils.configuration()
  gin_utils.parse(gin_files, bindings, **saved)
  if whole_splits:
    names = [s.partition(' = ')[0] for s in gin_utils.configuration()]
    caps = [f'{name}=None' for name in names if '.max_eval_' in name]
    gin_utils.parse(gin_files, [*bindings, *caps], **saved)
  with _naming(config):
    experiment = gin_utils.make(experiment_lib.Experiment)
  facts = run_directory.read_run(workdir)
  arm = facts.get('arm', os.path.basename(workdir))
  with _naming(config):
    model = gin_utils.call(experiment_lib.make_model, experiment)
  # Of the run's own, what only training uses does not act here.
  gin_utils.check_no_dead_bindings(own)
  num_groups = facts.get('num_groups') or len(groups)
  return Run(os.fspath(workdir), arm, experiment, model, num_groups, groups)


@contextlib.contextmanager
def _naming(config: epath.Path) -> Iterator[None]:
  """Says in an error whose configuration it is."""
  try:
    yield
  except ValueError as e:
    raise ValueError(f'{config}: {e}') from e


def read_variables(
    run: Run, group_id: int, source: str, step: int | None
) -> tuple[int, Variables]:
  """Reads the step and variables of one checkpoint or publication.

  Args:
    run: Of `open_run`.
    group_id: Which group.
    source: CHECKPOINTS or PUBLICATIONS.
    step: None for the newest.

  Raises:
    FileNotFoundError: If it is not there.
    ValueError: If it cannot be used.
  """
  identity = run.experiment.task.identity
  if source == PUBLICATIONS:
    root = run_directory.exchange_root(run.workdir)
    steps = publications.published_steps(root, group_id)
  else:
    directory = run_directory.checkpoints_dir(run.workdir, group_id)
    steps = checkpoints.completed_steps(directory)
  wanted = max(steps, default=None) if step is None else step
  if wanted not in steps:
    raise FileNotFoundError(
        f'group {group_id} of {run.workdir} has no {source} of step'
        f' {"any" if wanted is None else wanted}; there are: {steps or "none"}'
    )
  like = _like(run, group_id)
  if source == PUBLICATIONS:
    _, variables = publications.read(
        root,
        group_id,
        wanted,
        like=like.variables,
        identity=identity,
        dtype='float32',
    )
    return wanted, variables
  resume = ResumeCheckpoints(directory, identity=identity)
  return wanted, resume.read(wanted, like).state.variables


def _like(run: Run, group_id: int) -> TrainState:
  """Returns the shapes of a group's state."""
  experiment = run.experiment
  row = experiment_lib.first_row(experiment, run.num_groups)
  return jax.eval_shape(
      lambda: experiment_lib.init_state(
          experiment,
          run.model,
          jax.random.PRNGKey(0),
          row,
          num_peers=experiment.exchange.num_teachers(group_id, run.num_groups),
      )
  )
