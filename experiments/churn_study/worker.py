"""Trains all runs of a churn study that are not done yet, one after another.

Several processes may work on one study: each run belongs to whoever locks its
directory first.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from codistill_jax import gin_utils
from codistill_jax.experiment import Experiment
from codistill_jax.storage import files, leases
from experiments import cli
from experiments.churn_study import run_files, training
from experiments.churn_study.run_files import SPLITS, Run
from experiments.churn_study.training import Trainer
from experiments.cli import StopRequest

_SAY_EVERY_SECONDS = 30.0
# A round of two groups does two updates and asks a teacher for each.
_TEACHER_COST = 1.4
# What all runs of a study have in common, besides their configurations; 'data'
# tells how many examples each split has.
_FIXED = ('num_groups', 'replicas', 'identity', 'data', 'platform')


class Trainers:
  """The trainer of each configuration, made when it is first needed.

  Attributes:
    configurations: The bindings of each, by the name of its arm; '' is that of
      all other arms.
    headline: What the files of all arms say they are for.
  """

  def __init__(
      self,
      workdir: files.PathLike,
      gin_files: Sequence[str],
      bindings: Sequence[str],
      own: Mapping[str, str],
      devices: Callable[[], Sequence[jax.Device] | None],
  ):
    """Parses all configurations; makes none.

    Args:
      workdir: The study's.
      gin_files: Of all arms.
      bindings: Of all arms, applied last.
      own: Further gin file of an arm, by its name.
      devices: The replicas.
    """
    self.headline = ' '.join(map(gin_utils.headline, gin_files)).strip()
    self._workdir = workdir
    self._bindings = bindings
    self._devices = devices
    self._files = {'': list(gin_files)} | {
        name: [*gin_files, path] for name, path in own.items()
    }
    self._made: dict[str, Trainer] = {}
    self._parsed: str | None = None
    self.configurations = {}
    for name in reversed(self._files):  # The one that is needed first is last.
      self._parse(name)
      self.configurations[name] = gin_utils.configuration()

  def __call__(self, name: str) -> Trainer:
    if name not in self._made:
      self._parse(name)
      experiment = gin_utils.make(Experiment)
      for split in SPLITS:
        labels = training.labels_of(experiment, split)
        run_files.keep_labels(self._workdir, split, labels)
      self._made[name] = gin_utils.call(
          training.make_trainer, experiment, self._devices()
      )
    return self._made[name]

  def check(self, name: str) -> None:
    """After a first update: a binding that acts nowhere ends the study."""
    if name == self._parsed:
      gin_utils.check_no_dead_bindings()
      self._write_configuration(name)

  def _write_configuration(self, name: str) -> None:
    path = run_files.config_path(self._workdir, name)
    # What an attempt before a correction has left is not in force.
    if not path.exists() or not run_files.has_begun(self._workdir, name):
      text = gin_utils.operative_configuration()
      files.write_bytes(path, text.encode())

  def _parse(self, name: str) -> None:
    if name != self._parsed:
      gin_utils.parse(self._files[name], self._bindings)
      self._parsed = name


def describe_study(
    trainers: Trainers,
    *,
    num_groups: int,
    command: str,
) -> dict[str, Any]:
  """What study.json says."""
  trainer = trainers('')
  experiment = trainer.experiment
  task = experiment.task
  return {
      'headline': trainers.headline,
      'configurations': trainers.configurations,
      'num_groups': num_groups,
      'replicas': trainer.train_step.num_replicas,
      'group_batch': experiment.group_batch,
      'num_steps': experiment.num_steps,
      'exchange_every': experiment.exchange.every,
      'data': task.description,
      'example': task.example_name,
      'num_classes': task.num_classes,
      'has_test_split': task.test_batches is not None,
      'identity': dict(task.identity),
      'platform': jax.devices()[0].device_kind,
      'command': command,
  }


def claim(workdir: files.PathLike, study: Mapping[str, Any]) -> None:
  """Writes study.json; the first time, or with arms that are new.

  The configuration of an arm may be corrected until one of its runs is done.

  Raises:
    ValueError: If the workdir holds a study of another configuration, of other
      data, or of another kind of device.
  """
  path = run_files.study_path(workdir)
  begun = run_files.has_begun(workdir)
  before = (files.read_json(path) if begun else None) or {}
  theirs = before.get('configurations', {})
  for name, ours in study['configurations'].items():
    same = theirs.get(name, ours) == ours
    if not same and run_files.has_begun(workdir, name):
      _refuse(workdir, theirs[name], ours)
  for key in _FIXED:
    if key in before and before[key] != study[key]:
      _refuse(workdir, [f'{key}={before[key]}'], [f'{key}={study[key]}'])
  configurations = theirs | study['configurations']
  files.write_json(path, {**study, 'configurations': configurations})


def _refuse(workdir, theirs: Sequence[str], ours: Sequence[str]) -> None:
  missing = 'no such binding'
  raise ValueError(
      f'{os.fspath(workdir)} holds a study of another configuration: it has'
      f' {next((s for s in theirs if s not in ours), missing)}, this one has'
      f' {next((s for s in ours if s not in theirs), missing)}; use another'
      ' --workdir, or the first configuration'
  )


def train_all(
    workdir: files.PathLike,
    runs: Sequence[Run],
    trainers: Trainers,
    stop: StopRequest,
    jobs: int = 1,
) -> None:
  """Trains the runs that are not done and that no other process has in hand.

  Args:
    workdir: The study's.
    runs: All of them.
    trainers: Of all configurations.
    stop: Whether to leave.
    jobs: Processes that share the runs, for the time that is left.

  Raises:
    Stopped: If asked to stop; the runs that are done stay.
  """
  for run in runs:
    _leave_if(stop, run)
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(
            leases.exclusive(run_files.run_dir(workdir, run), 'training')
        )
      except ValueError:
        continue  # Another process is at it.
      if run_files.read_record(workdir, run) is None:
        _train_one(workdir, run, trainers, stop, Progress(runs, run, jobs))
        cli.tell(Progress(runs, run, jobs).line(workdir, 'done'))


def _leave_if(stop: StopRequest, run: Run) -> None:
  if stop():
    raise cli.Stopped(
        f'stopped in {run.name}; the same command goes on with it',
        stop.signal_number,
    )


def _train_one(
    workdir: files.PathLike,
    run: Run,
    trainers: Trainers,
    stop: StopRequest,
    progress: 'Progress',
) -> None:
  trainer = trainers(run.config)
  began = time.time()

  def tick(step: int) -> None:
    if step == 1:
      trainers.check(run.config)
    _leave_if(stop, run)
    progress.say(workdir, step, trainer.experiment.num_steps)

  learnt = training.train(trainer, run, tick)
  predictions = [
      {split: training.predict(trainer, x, split) for split in SPLITS}
      for x in learnt
  ]
  run_files.write_run(workdir, run, predictions, describe(trainer, run, began))


def describe(trainer: Trainer, run: Run, began: float) -> dict[str, Any]:
  """What run.json says of a run that has just ended."""
  experiment = training.configured(trainer.experiment, run)
  return {
      'seed': experiment.seed,
      'data_seed': experiment.data_seed,
      'num_steps': experiment.num_steps,
      'began': began,
      'ended': time.time(),
      'cores': run_files.own_cores(),
      'jax': jax.__version__,
  }


class Progress:
  """Says how far the study is, and about how long it will take."""

  def __init__(self, runs: Sequence[Run], run: Run, jobs: int):
    self._runs, self._run, self._jobs = runs, run, jobs
    self._next = time.monotonic() + _SAY_EVERY_SECONDS

  def say(self, workdir: files.PathLike, step: int, num_steps: int) -> None:
    """A line now and then."""
    if time.monotonic() >= self._next:
      self._next = time.monotonic() + _SAY_EVERY_SECONDS
      cli.tell(self.line(workdir, f'step {step:,} of {num_steps:,}'))

  def line(self, workdir: files.PathLike, what: str) -> str:
    """Where the study stands, by its files."""
    records = {run: run_files.read_record(workdir, run) for run in self._runs}
    took = [
        (r['ended'] - r['began']) / _cost(run)
        for run, r in records.items()
        if r
    ]
    left = sum(_cost(run) for run, r in records.items() if not r)
    text = f'{len(took)} of {len(records)} runs done; {self._run.name}: {what}'
    if not took or not left:
      return text
    minutes = left * sum(took) / len(took) / self._jobs / 60
    return f'{text}; about {minutes:.1f} min left'


def _cost(run: Run) -> float:
  """In trainings of one group alone."""
  return 1.0 if run.num_groups == 1 else _TEACHER_COST * run.num_groups
