"""Jobs: one group of one run, its run.json, its devices; several in turn."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, one_program, replicas, run_directory
from codistill_jax.base import (
    ALONE,
    Agreement,
    Model,
    Stream,
    TrainState,
    Variables,
)
from codistill_jax.exchange import publications
from codistill_jax.experiment import Experiment
from codistill_jax.peer_predictions import mixing_matrix
from codistill_jax.storage import checkpoints, files
from codistill_jax.storage.background import (
    DEFAULT_PATIENCE,
    Patience,
    Troubles,
)
from codistill_jax.storage.resume import ResumeCheckpoints

from .. import cli


def _ignore(group_id: int, step: int, variables: Variables) -> None:
  del group_id, step, variables


def _host() -> str:
  return ', '.join(dict.fromkeys(replicas.hosts()))


@dataclasses.dataclass(frozen=True)
class Job:
  """One group of one run.

  Attributes:
    experiment: The configuration.
    model: Its model.
    train_step: On the replicas of this group.
    workdir: The run directory.
    group_id: This group.
    num_groups: G.
    agreement: How the processes of this group decide together.
    host: Their machines; made in all of them.
    stop: True once the process was asked to stop; it also knows what would be
      lost.
    troubles: What this group cannot do at the moment, such as saving.
    patience: How long a disk is waited for.
    arm: Name of the run in reports; '' for the name of the workdir.
    shared_stream: The batches of all groups, if these update together; each
      then yields once before its first update, so that all have begun.
    exchange_dir: Where all groups publish; '' for the run directory.
    init_from: Where the first parameters and statistics come from; '' for
      random ones. See `initial_variables`.
    configuration: Gives what run.json and config.gin say that was configured;
      of a process that trains several runs at once, that of this one.
    profile: The updates whose trace is written, by their steps before.
    evaluated: Called with the group, the step and the variables after each
      evaluation, and once more if the run goes on from there; they are intact
      until the group's next update.
  """

  experiment: Experiment
  model: Model
  train_step: replicas.PmapStep | one_program.Seat
  workdir: str
  group_id: int
  num_groups: int
  agreement: Agreement = ALONE
  host: str = dataclasses.field(default_factory=_host)
  stop: cli.StopRequest = dataclasses.field(default_factory=cli.StopRequest)
  troubles: Troubles = dataclasses.field(default_factory=Troubles)
  patience: Patience = DEFAULT_PATIENCE
  arm: str = ''
  shared_stream: Stream | None = None
  exchange_dir: str = ''
  init_from: str = ''
  configuration: Callable[[], gin_utils.Configuration] = gin_utils.current
  profile: range = range(0)
  evaluated: Callable[[int, int, Variables], None] = _ignore

  @property
  def directory(self) -> str:
    """Returns the directory of the group."""
    return os.fspath(run_directory.group_dir(self.workdir, self.group_id))

  @property
  def run_name(self) -> str:
    return self.arm or os.path.basename(os.path.normpath(self.workdir))

  @property
  def identity(self) -> dict[str, str]:
    return {k: str(v) for k, v in self.experiment.task.identity.items()}


def describe_run(job: Job, state: TrainState) -> dict[str, Any]:
  """Returns the content of run.json; see `run_directory.write_run`."""
  experiment = job.experiment
  sizes = [x.size for x in jax.tree.leaves(state.variables.params)]
  simulated = experiment.simulated_replicas
  burn_in = (
      n for n in range(experiment.num_steps) if experiment.distill_weight(n)
  )
  return {
      'arm': job.run_name,
      'num_groups': job.num_groups,
      'replicas': job.train_step.num_replicas,
      # Few runs simulate any: the others do not speak of it.
      'simulated_replicas': simulated if simulated > 1 else None,
      'group_batch': experiment.group_batch,
      'seed': experiment.seed,
      'num_steps': experiment.num_steps,
      'burn_in_steps': next(burn_in, experiment.num_steps),
      **experiment.exchange.describe(),
      'example': experiment.task.example_name,
      'data': experiment.task.description,
      'exchange_dir': job.exchange_dir or None,
      'init_from': files.absolute(job.init_from) if job.init_from else None,
      'model_parameters': int(sum(sizes)),
      'command': os.environ.get(cli.COMMAND_VARIABLE) or cli.own_command(),
      'device': job.train_step.device_kind,
      'host': job.host,
      'versions': _versions(),
      'configuration': job.configuration().bindings,
  }


_PACKAGES = [
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'codistill_jax',
]


@functools.cache
def _versions() -> dict[str, str]:
  """Returns those of Python and packages; of a clone, its commit."""
  found = {'python': platform.python_version()}
  for name in (*_PACKAGES, 'codistill_jax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  clone = pathlib.Path(run_directory.__file__).parents[1]
  if (clone / '.git').exists():
    command = 'git describe --always --dirty --abbrev=40 --exclude=*'
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      found['commit'] = subprocess.check_output(
          command.split(),
          cwd=clone,
          stderr=subprocess.DEVNULL,
          timeout=5,
          text=True,
      ).strip()
  return found


def print_dry_run(job: Job, state: TrainState) -> None:
  """Prints what would be trained."""
  gin_utils.check_no_dead_bindings()
  print(gin_utils.operative_configuration())
  run = describe_run(job, state)
  print(
      f'{run["model_parameters"]:,} parameters; {run["num_groups"]} groups of'
      f' {run["replicas"]} replicas; dry run, nothing written'
  )


def check_workdir(job: Job, state: TrainState) -> None:
  """Raises ValueError if the workdir holds a run of another configuration.

  What changes no number that was computed may change: how long the run is, how
  often it is evaluated, recorded and saved, and by which writers.
  """
  before = _read_before(job)
  if not before:
    return
  _check_same_run(job, before, describe_run(job, state))
  expected = before.get('config_sha256')  # Older runs have none.
  try:
    config = run_directory.read_config(job.workdir)
    why = 'its digest is another one than that in run.json'
  except ValueError as e:
    config, why = None, str(e)
  if expected and config != '' and _digest(config) != expected:
    raise ValueError(
        f'{run_directory.config_path(job.workdir)} is not what this run wrote'
        f' ({why}); look at who did that, and delete it: the run writes it anew'
    )


def _digest(config: str | None) -> str:
  return hashlib.sha256((config or '').encode()).hexdigest()


def _read_before(job: Job) -> dict[str, Any]:
  """Reads run.json; a damaged one counts as none, and is written again."""
  try:
    return run_directory.read_run(job.workdir)
  except ValueError as e:
    cli.tell(f'{e} The first update writes it again.', error=True)
    return {}


def claim_workdir(job: Job, state: TrainState) -> None:
  """Writes run.json and config.gin, once; after the first update.

  Not before: a mistake that the first update brings out would leave a workdir
  that refuses the corrected configuration. Both are written anew for a run that
  goes on with a change that it may have.

  Raises:
    ValueError: If the run directory belongs to another configuration.
  """
  if not job.agreement.is_primary:
    return
  now = describe_run(job, state)
  text = job.configuration().operative
  now['config_sha256'] = _digest(text)
  config = run_directory.config_path(job.workdir)
  try:
    there = run_directory.read_run(job.workdir)
  except ValueError:  # That was said at the start.
    there = {}
    with contextlib.suppress(files.RefusedError):
      if written := run_directory.read_config(job.workdir):
        _check_same_run(
            job,
            {**now, 'configuration': written.splitlines()},
            {**now, 'configuration': text.splitlines()},
        )
  if not there:
    # Also over one that is there: this run did not write it.
    files.write_bytes(config, text.encode(), sync=True)
    run_directory.write_run(job.workdir, now)
  # Read again: another group may have claimed it at the same moment.
  before = run_directory.read_run(job.workdir)
  _check_same_run(job, before, now)
  changed = before.get('configuration') != now['configuration']
  if changed:
    now['earlier'] = [
        *before.get('earlier', []),
        *(
            s
            for s in before.get('configuration', [])
            if s not in now['configuration']
        ),
    ]
  if changed or not files.exists(config):
    # In this order, so that nobody finds one file beside the other's digest.
    files.remove(config)
    sums = {'config_sha256': now['config_sha256']}
    run_directory.write_run(job.workdir, now if changed else {**before, **sums})
    files.write_bytes(config, text.encode(), sync=True)


# Of an `Experiment`: settings that change no number that was computed.
_MAY_CHANGE = re.compile(
    r'(\w+\.)*Experiment\.(num_steps|(eval|log|checkpoint)_every|writers) = '
)


def _check_same_run(job: Job, before: dict, now: dict) -> None:
  theirs, ours = (run.get('configuration', []) for run in (before, now))
  free = _free_macros([*theirs, *ours])
  settled = (
      [
          f'num_groups={run.get("num_groups")}',
          f'--init_from={run.get("init_from") or ""}',
          f'--exchange_dir={run.get("exchange_dir") or ""}',
          *(
              s
              for s in run.get('configuration', [])
              if not _MAY_CHANGE.match(s) and s.split(' = ')[0] not in free
          ),
      ]
      for run in (before, now)
  )
  run_directory.check_same_configuration(
      f'{job.workdir} holds a run of another configuration',
      *settled,
      'use another --workdir, or the first configuration',
  )
  if now['num_steps'] != before.get('num_steps', now['num_steps']):
    _check_not_passed(job.workdir, now['num_steps'])
  for name in free:
    there, here = (
        next((s for s in run if s.startswith(f'{name} = ')), None)
        for run in (theirs, ours)
    )
    with_it = [
        s.split(' = ')[0]
        for s in ours
        if f"'%{name}'" in s and not _MAY_CHANGE.match(s)
    ]
    if there != here and with_it:
      cli.tell(
          f'{job.workdir} had {there} so far, now {here}: with it changes'
          f' {", ".join(with_it)}, from here on',
          error=True,
      )


def _free_macros(statements: Sequence[str]) -> set[str]:
  """Returns the macros that may change: of what may, and of the run's length.

  Whoever gives the length a name, and to a schedule the same, wants them to
  change together.
  """
  users: dict[str, list[str]] = {}
  for statement in statements:
    for name in re.findall(r'%([\w./]+)', statement):
      users.setdefault(name, []).append(statement)
  return {
      name
      for name, found in users.items()
      if all(map(_MAY_CHANGE.match, found))
      or any('Experiment.num_steps = ' in s for s in found)
  }


def _check_not_passed(workdir: str, num_steps: int) -> None:
  for group_id in run_directory.list_groups(workdir):
    step = run_directory.newest_saved(
        run_directory.checkpoints_dir(workdir, group_id)
    )
    if step is not None and step > num_steps:
      raise ValueError(
          f'group {group_id} of {workdir} has reached step {step}, and this run'
          f' ends at num_steps={num_steps}; set it to at least {step}, or use'
          ' another --workdir'
      )


# --- Where a run begins -------------------------------------------------------


def initial_variables(job: Job, like: Variables) -> Variables:
  """Reads what `--init_from` names: a checkpoint or a publication, verified.

  Only parameters and model state: the optimiser, the step and the place in the
  data are those of a new run.

  Args:
    job: The group.
    like: Its variables, or their shapes.

  Raises:
    ValueError: If there is none, if it is of another model, or damaged.
    OSError: If the file system refuses to give it.
  """
  directory, step = _find_initial(job)
  where = f'--init_from={directory / str(step)}'
  record = checkpoints.load_record(directory, step)
  is_resume = any(leaf.path.startswith('variables/') for leaf in record.leaves)
  found = publications.load_sound(
      directory,
      step,
      record,
      serialization.to_state_dict(like),
      who=where,
      theirs={},
      ours={},
      part='variables' if is_resume else None,
      advice='begin with a model of the same configuration',
  )
  theirs = record.facts.get('identity')
  if theirs != job.identity:
    cli.tell(
        f'{where} was trained as {theirs}; this run is {job.identity}',
        error=True,
    )
  return jax.tree.map(
      lambda x, y: np.asarray(x, y.dtype),
      serialization.from_state_dict(like, found),
      like,
  )


def _find_initial(job: Job) -> tuple[epath.Path, int]:
  """Returns directory and step: of a run, those of the same group."""
  path = epath.Path(files.absolute(job.init_from))
  if path.name in map(str, checkpoints.completed_steps(path.parent)):
    return path.parent, int(path.name)
  for directory in (
      run_directory.checkpoints_dir(path, job.group_id),
      run_directory.publications_dir(path, job.group_id),
      path,
  ):
    if steps := checkpoints.completed_steps(directory):
      return directory, steps[-1]
  raise ValueError(
      f'--init_from={job.init_from} has no checkpoint or publication for group'
      f' {job.group_id}; give a run directory with as many groups, a directory'
      ' of steps, or one step of it'
  )


# --- Devices of this process --------------------------------------------------


def use_replicas(count: int) -> None:
  """Makes `count` fake CPU devices; before the first use of jax.

  Without effect on accelerators, whose devices are what they are.
  """
  if count < 0:
    raise ValueError(f'--replicas={count}; set it to 0 (all) or more')
  if count:
    jax.config.update('jax_num_cpu_devices', count)


def chosen_devices(count: int) -> list[jax.Device] | None:
  """Returns the first `count` devices; None, all of them, for 0.

  Raises:
    ValueError: If this process has fewer.
  """
  if not count:
    return None
  devices = jax.local_devices()
  if jax.process_count() > 1:
    if count != len(devices):
      raise ValueError(
          f'--replicas={count}, but a group of several processes uses all'
          f' {len(devices)} devices of each: leave --replicas out, or hide the'
          ' others'
      )
    return None
  if len(devices) < count:
    raise ValueError(
        f'--replicas={count}, but this process has {len(devices)} devices;'
        f' set --replicas to at most {len(devices)}'
    )
  return devices[:count]


def describe_devices(
    num_replicas: int, num_processes: int, kind: str, present: int
) -> str:
  """Says on how many devices a group trains, and that a machine has more.

  Args:
    num_replicas: Devices of the group, over all its processes.
    num_processes: Those.
    kind: What the devices are.
    present: Accelerators of this machine.
  """
  each = num_replicas // num_processes
  words = f'{num_replicas} replica(s) on {kind}'
  if num_processes > 1:
    words += f', {each} in each of {num_processes} processes'
  if kind == 'cpu' and present:
    return f'{words}, though this machine has {present} accelerator(s)'
  if each < present:
    return f'{words}; {each} of the {present} that this machine has'
  return words


# --- Groups of one process ----------------------------------------------------


def train_steps_of(
    experiment: Experiment,
    model: Model,
    num_groups: int,
    num_replicas: int,
) -> tuple[Sequence[replicas.PmapStep | one_program.Seat], Stream | None]:
  """Makes the update of each group; and one stream, if they update together."""
  chosen = chosen_devices(num_replicas)
  kind = experiment.exchange
  if not kind.one_program:
    step = experiment_lib.make_replicated_step(experiment, model, chosen)
    return [step] * num_groups, None  # Compiled once for all.
  if num_groups < 2:
    raise ValueError(
        f'Experiment.exchange={kind} with --num_groups=1: there is nobody to'
        ' exchange with; set --num_groups to at least 2, or'
        ' exchange=@exchange.Checkpoints() for a baseline'
    )
  population = experiment_lib.make_population(
      experiment,
      model,
      num_groups,
      num_replicas=num_replicas or jax.local_device_count(),
  )
  peers = [
      kind.peers_of(group_id, num_groups) for group_id in range(num_groups)
  ]
  update = one_program.JointUpdate(population, mixing_matrix(peers), kind.top_k)
  assert update.peers is not None
  if update.peers.top_k != kind.top_k:
    cli.tell(
        f'warning: all groups share their devices, so nothing is sent; top_k='
        f'{kind.top_k} has no effect, they learn from whole predictions',
        error=True,
    )
  stream = experiment_lib.train_stream(experiment, 0, num_groups)
  return update.seats, one_program.SharedStream(stream)


class Latch:
  """A stop request that all groups of a round see alike."""

  def __init__(self, request: cli.StopRequest):
    self._request = request
    self._stop = False
    self.unsaved = request.unsaved
    self.last_words = request.last_words

  def __call__(self) -> bool:
    # Asked only now, and not in `update`: until the groups are about to save,
    # the main thread may be stuck in an update.
    if self._stop:
      return self._request()
    self._request.put_off()  # Such as in an evaluation, of any length.
    return False

  @property
  def signal_number(self) -> int | None:
    return self._request.signal_number

  def update(self) -> None:
    """Asks; to be called before each round."""
    self._stop = self.signal_number is not None


def train_in_turn(groups: Sequence[Generator], latch: Latch) -> None:
  """Steps all groups, one update each, until all are done."""
  latch.update()
  for _ in in_turn(groups):
    latch.update()


def in_turn(groups: Sequence[Generator]) -> Iterator[None]:
  """Steps all groups, one update each, until all are done.

  Yields:
    After each round.

  Raises:
    Stopped: What the first one raised, after all others had the same update.
  """
  with contextlib.ExitStack() as stack:
    for group in groups:  # Whatever ends one, all of them know it.
      stack.callback(group.close)
    running = list(groups)
    while running:
      stopped = None
      for group in list(running):
        try:
          next(group)
        except StopIteration:
          running.remove(group)
        except cli.Stopped as e:
          stopped = e  # The others save at this step too.
      if stopped is not None:
        raise stopped
      yield


def keep_common_checkpoints(
    jobs: Sequence[Job], usable: Callable[[int], bool] | None = None
) -> None:
  """Lets all groups restart at one step: the newest that all of them have.

  Args:
    jobs: The groups.
    usable: Of a step, whether a restart can begin there; without such a step
      all begin again. None: all steps are, and it is an error if the groups
      have none in common.
  """
  stores = [
      ResumeCheckpoints(
          run_directory.checkpoints_dir(job.workdir, job.group_id)
      )
      for job in jobs
  ]
  steps = [set(store.steps()) for store in stores]
  common = set.intersection(*steps)
  if usable is not None:
    common = set(filter(usable, common))
  elif all(steps) and not common:
    raise ValueError(
        f'the groups of {jobs[0].workdir} have no step in common among their'
        ' resume checkpoints; use another --workdir to start again'
    )
  start = max(common, default=-1)
  for job, store in zip(jobs, stores):
    if store.newest_step not in (None, start):
      # It goes back with the others, also if it had reached its last step.
      files.remove(run_directory.done_path(job.workdir, job.group_id))
      store.discard_after(start)
    store.close()
