"""A process of a group is lost: its group ends, its peers go on, it rejoins.

With real processes: group 0 is two of them, group 1 one.
"""

import os
import signal
import time
from unittest import mock

import paced
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.exchange import publications
from codistill_jax.storage import checkpoints
from experiments import cli

# Seconds of silence that are a loss: where one is to be noticed, elsewhere.
HEARTBEAT, PATIENT = 10, 300
EVERY, CHECKPOINT_EVERY, TOO_OLD, LAST = 10, 20, 30, 300

BINDINGS = [
    'experiment.Experiment.distill_weight = @paced.weight()',
    "exchange.Checkpoints.mode = 'freshest'",
    f'experiment.Experiment.num_steps = {LAST}',
    f'exchange.Checkpoints.max_staleness_steps = {TOO_OLD}',
    f'experiment.Experiment.checkpoint_every = {CHECKPOINT_EVERY}',
    f'experiment.Experiment.eval_every = {LAST}',
]


class Run:
  """A run of one group of two processes, and perhaps of one of one."""

  def __init__(self, launch, directory, num_groups):
    self.workdir = directory / 'run'
    self._launch, self._num_groups = launch, num_groups
    self._gin = tiny_run.write_config(directory)
    text = self._gin.read_text()
    lines = [x for x in text.splitlines() if 'paced.' not in x]
    self._gin.write_text('\n'.join(lines + BINDINGS) + '\n')
    self._paces = [directory / f'pace_{g}' for g in (0, 1)]
    self._port = tiny_run.free_port()

  def pace(self, group_id, seconds=0.0, limit=0):
    """The group rests so long before each update, and halts at the limit."""
    paced.write(self._paces[group_id], seconds, limit)

  def slowly(self, group_id, condition, process):
    """Waits; meanwhile the group trains slower and slower, to the end never."""
    start = time.monotonic()

    def holds():
      self.pace(group_id, max(0.05, (time.monotonic() - start) / 5))
      return condition()

    until(holds, process=process)

  def start(self, group_id, **flags):
    environment = {paced.VARIABLE: str(self._paces[group_id])}
    with mock.patch.dict(os.environ, environment):
      return self._launch(
          'train_group',
          workdir=self.workdir,
          num_groups=self._num_groups,
          group_id=group_id,
          gin_file=self._gin,
          replicas=1,
          **flags,
      )

  def start_pair(self, heartbeat=PATIENT):
    """Both processes of group 0; the same commands every time."""
    return [
        self.start(
            0,
            coordinator=f'127.0.0.1:{self._port}',
            num_processes=2,
            process_id=process_id,
            heartbeat_seconds=heartbeat,
        )
        for process_id in (0, 1)
    ]

  def saved(self):
    """The newest resume checkpoint of group 0."""
    directory = run_directory.checkpoints_dir(self.workdir, 0)
    return max(checkpoints.completed_steps(directory), default=0)

  def published(self):
    """The newest publication of group 0."""
    root = run_directory.exchange_root(self.workdir)
    return max(publications.published_steps(root, 0), default=0)

  def step(self, group_id):
    return max((r['step'] for r in self.records(group_id)), default=0)

  def records(self, group_id):
    return tiny_run.records(self.workdir, group_id)

  def taught(self, group_id, since):
    """Whether the group has had a teacher since then (Unix seconds)."""
    return any(
        r.get('exchange/peers_present') == 1.0
        for r in self.records(group_id)
        if r['time'] > since
    )

  def teacher_step(self):
    """Of the teacher that group 1 has of group 0; -1 without one."""
    status = run_directory.read_status(self.workdir, 1) or {}
    return max((t['step'] for t in status.get('teachers', [])), default=-1)


def assert_lost(process, run):
  """Ends as a crash, which may be started again; nothing is written of it."""
  until(lambda: process.ended)
  # An error of a collective, or an abort by jax.
  assert process.status in (cli.CRASH, -signal.SIGABRT), process.output[-4000:]
  assert not run_directory.done_path(run.workdir, 0).exists()


def test_one_process_is_lost_and_its_group_comes_back(launch, tmp_path):
  """Killed; then, in the group that came back, suspended for good."""
  run = Run(launch, tmp_path, num_groups=2)
  run.pace(0, limit=47)
  run.pace(1, limit=25)
  pair, peer = run.start_pair(), run.start(1)
  until(lambda: run.saved() >= 40, process=pair[0])
  run.slowly(1, lambda: run.teacher_step() > 0, peer)
  alone = peer.output.count('trains alone')

  pair[1].send(signal.SIGKILL)
  run.pace(0, limit=60)  # At the next update it is missed.
  assert_lost(pair[0], run)

  # Its peer goes on, alone.
  lost_at, saved = run.published(), run.saved()
  run.pace(1, limit=120)
  until(lambda: run.step(1) == 120, process=peer)
  # Also while the peer's publication was too far ahead of it.
  assert peer.output.count('trains alone') > alone
  run.pace(0, limit=127)  # It catches up with its peer.
  restart = time.time()

  pair = run.start_pair(HEARTBEAT)
  until(lambda: run.published() >= 120, process=pair[0])
  run.slowly(1, lambda: run.teacher_step() > lost_at, peer)
  assert peer.output.count('has teachers again') > alone
  first = min(r['step'] for r in run.records(0) if r['time'] > restart)
  assert saved < first <= saved + 5 and lost_at - saved <= CHECKPOINT_EVERY
  # It learns from its peer as well.
  run.pace(1, limit=160)
  run.slowly(0, lambda: run.taught(0, since=restart), pair[0])

  pair[0].send(signal.SIGSTOP)
  assert_lost(pair[1], run)
  pair[0].send(signal.SIGKILL)

  run.pace(0)
  pair = run.start_pair()
  run.pace(1)
  for process in (*pair, peer):
    process.wait()
  assert peer.output.count('trains alone') - alone <= 4  # It does not flap.
  for group_id in (0, 1):
    assert run_directory.done_path(run.workdir, group_id).exists()
  # Each step once, whoever was lost meanwhile.
  steps = [r['step'] for r in run.records(0) if 'loss/task' in r]
  assert steps == list(range(5, LAST + 1, 5))
  young = [
      r
      for r in run.records(1)
      if r['time'] > restart and 'exchange/staleness_steps_group_0' in r
  ]
  assert young
  for record in young:
    assert record['exchange/staleness_steps_group_0'] <= TOO_OLD
