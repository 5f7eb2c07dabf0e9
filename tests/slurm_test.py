"""Groups under a real SLURM: two nodes on this machine, nothing under /etc.

Needs the programs of SLURM and munge (`slurm-wlm` and `munge` in Debian).
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import paced
import psutil
import pytest
import tiny_run
from waits import until

from codistill_jax import run_directory
from codistill_jax.storage import checkpoints
from experiments.reports import pages, run_status
from experiments.running import processes

pytestmark = [
    pytest.mark.cluster,
    # Tests have a jax with threads, which warns when it is forked.
    pytest.mark.filterwarnings('ignore:os.fork'),
    pytest.mark.skipif(
        not all(map(shutil.which, ('slurmctld', 'slurmd', 'munged'))),
        reason='SLURM is not installed: slurm-wlm and munge in Debian',
    ),
]

ROOT = tiny_run.ROOT
RECIPE = ROOT / 'deploy' / 'slurm' / 'groups.sbatch'
# Loopback addresses, which processes of a group can find each other by.
NODES = ('127.0.0.1', '127.0.0.2')
HALT, LAST = 60, 90

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A job that is requeued waits for as long as that; less than 5 is not heard.
AuthInfo=socket={d}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.%n.log
# Neither control groups nor a data base.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2
# A node that is silent for so long is down.
SlurmdTimeout=10
ReturnToService=2
MinJobAge=3600
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 \
Port=[{ports[1]},{ports[2]}] CPUs=4 CoresPerSocket=4 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_GIN = """
from __gin__ import dynamic_registration
import optax
import paced
from codistill_jax import experiment
from codistill_jax.exchange import kinds as exchange
from tools.fault_drill import task

experiment.Experiment.task = @task.clusters()
experiment.Experiment.model = @task.network
experiment.Experiment.optimizer = @optax.adam()
optax.adam.learning_rate = 1e-3
experiment.Experiment.distill_weight = @paced.weight()
experiment.Experiment.num_steps = {last}
experiment.Experiment.group_batch = 32
experiment.Experiment.exchange = @exchange.Checkpoints()
exchange.Checkpoints.every = 10
experiment.Experiment.log_every = 10
experiment.Experiment.eval_every = {last}
experiment.Experiment.checkpoint_every = 50
"""


class Cluster:
  """The daemons of SLURM, with all that they write below one directory."""

  def __init__(self, directory):
    self._directory = directory
    self._daemons = {}
    self._environment = os.environ | {
        'SLURM_CONF': str(directory / 'slurm.conf'),
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
        'TRAIN': f'{sys.executable} -u -m experiments.train_group',
        'JAX_COMPILATION_CACHE_DIR': str(directory / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    for name in ('state', 'munge', *(f'spool.{node}' for node in NODES)):
      (directory / name).mkdir()
    for path in (directory, directory / 'munge'):
      path.chmod(0o755)
    key = directory / 'munge' / 'key'
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (directory / 'slurm.conf').write_text(
        _CONF.format(
            d=directory,
            host=os.uname().nodename.partition('.')[0],
            user=psutil.Process().username(),
            ports=[tiny_run.free_port() for _ in range(3)],
        )
    )

  def start(self):
    munge = self._directory / 'munge'
    self._daemon(
        'munged',
        '--foreground',
        '--force',
        *(f'--{x}-file={munge / x}' for x in ('key', 'pid', 'log', 'seed')),
        f'--socket={munge / "socket"}',
    )
    until((munge / 'socket').exists)
    self._daemon('slurmctld', '-D')
    for node in NODES:
      self.start_node(node)
    until(lambda: self.run('sinfo', '-hNt', 'idle').count('\n') == 2)

  def start_node(self, node):
    self._daemon('slurmd', '-D', '-N', node)

  def lose_node(self, node):
    """Its daemon is gone; what runs there runs on."""
    processes.wait_or_kill(self._daemons[node], 0)

  def _daemon(self, *command):
    with open(self._directory / 'daemons.log', 'ab') as log:
      # Ends with this process, however that ends.
      self._daemons[command[-1]] = processes.popen(
          command, env=self._environment, stdout=log, stderr=log
      )

  def run(self, *command, cwd=ROOT, **variables):
    """Runs a client; returns what it says.

    By a file: what it leaves running would keep a pipe open.
    """
    with (
        tempfile.TemporaryFile('w+') as said,
        tempfile.TemporaryFile('w+') as errors,
    ):
      status = subprocess.call(
          list(map(str, command)),
          env=self._environment | variables,
          cwd=cwd,
          stdout=said,
          stderr=errors,
      )
      said.seek(0)
      errors.seek(0)
      assert status == 0, (command, errors.read())
      return said.read()

  def close(self):
    with contextlib.suppress(AssertionError):
      self.run('scancel', '--user', psutil.Process().username())
      until(lambda: not self.run('squeue', '-h'), 30)
    for daemon in reversed(self._daemons.values()):
      daemon.terminate()
      processes.wait_or_kill(daemon, 10)
    for pid in self.pids():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert not self.pids()

  def pids(self):
    """Processes that were started for this cluster and live."""
    mine = f'SLURM_CONF={self._environment["SLURM_CONF"]}'
    found = []
    for process in psutil.process_iter(['environ', 'cmdline', 'status']):
      info = process.info
      words = [f'{k}={v}' for k, v in (info['environ'] or {}).items()]
      words += info['cmdline'] or []
      mine_too = any(str(self._directory) in w for w in info['cmdline'] or ())
      if (mine in words or mine_too) and info['status'] != 'zombie':
        found.append(process.pid)
    return [pid for pid in found if pid != os.getpid()]


class Run:
  """A run of the tiny task, which halts at a step until it is let go."""

  def __init__(self, cluster, directory):
    self.cluster, self.workdir = cluster, directory / 'run'
    self._directory = directory
    self._gin = directory / 'tiny.gin'
    self._gin.write_text(_GIN.format(last=LAST))
    self._pace = directory / 'pace'
    paced.write(self._pace, limit=HALT)

  @property
  def flags(self):
    return (
        f'--workdir={self.workdir}',
        f'--gin_file={self._gin}',
        '--replicas=1',
    )

  @property
  def variables(self):
    return {paced.VARIABLE: str(self._pace)}

  def submit(self, *options, script=RECIPE, flags=()):
    """Submits a script; its job's number."""
    said = self.cluster.run(
        'sbatch',
        '--parsable',
        f'--output={self._directory}/%a.log',
        *options,
        script,
        *self.flags,
        *flags,
        **self.variables,
    )
    return said.strip()

  def let_go(self):
    paced.write(self._pace)

  def log(self, group_id=0):
    path = self._directory / f'{group_id}.log'
    return path.read_text(errors='replace') if path.exists() else ''

  def sign(self, group_id=0):
    return run_directory.read_status(self.workdir, group_id) or {}

  def until(self, condition):
    """Waits; a clear error of a group ends that at once."""

    def holds():
      texts = [path.read_text() for path in self._directory.glob('*log')]
      assert not any('with status 1\n' in text for text in texts), texts
      return condition()

    until(holds)

  def wait_halted(self, *groups, saved=50):
    """Waits until these groups have halted, with that checkpoint."""
    for g in groups:
      steps = run_directory.checkpoints_dir(self.workdir, g)
      self.until(
          lambda g=g, steps=steps: self.sign(g).get('step') == HALT
          and saved in checkpoints.completed_steps(steps)
      )

  def wait_done(self, *groups):
    for g in groups:
      self.until(run_directory.done_path(self.workdir, g).exists)

  def status(self):
    """What the binary shows."""
    return pages.plain(run_status.look(str(self.workdir), 0.0)[0])


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  one = Cluster(tmp_path_factory.mktemp('slurm'))
  try:
    one.start()
    yield one
  finally:
    one.close()


@pytest.fixture
def run(cluster, tmp_path):
  return Run(cluster, tmp_path)


def test_groups_of_an_array_are_requeued_one_by_one_and_end(run):
  """By somebody; after it was killed; after a signal of the user."""
  job = run.submit('--array=0-2', '--cpus-per-task=2')
  run.wait_halted(0, 1, 2)
  assert {run.sign(g)['host'] for g in range(3)} == set(NODES)
  for node in NODES:
    assert re.search(rf'on {node}: pid \d+ \(group \d, 1 x cpu\)', run.status())
  run.cluster.run('scontrol', 'requeue', f'{job}_0')
  os.kill(run.sign(1)['pid'], signal.SIGKILL)
  run.cluster.run('scancel', '--signal=USR1', f'{job}_2')
  run.until(lambda: 'stopped and saved at step 6' in run.log(0))
  run.until(lambda: 'ended with status 137' in run.log(1))
  run.until(lambda: 'ended with status 138' in run.log(2))
  assert 'group 2 stopped and saved at step 6' in run.log(2)
  run.let_go()
  run.wait_done(0, 1, 2)
  for group_id in range(3):
    run.until(lambda g=group_id: f'group {g} ended with status 0' in run.log(g))
    # None has stopped another.
    assert re.findall(r'start (\d)', run.log(group_id)) == ['0', '1']
  assert 'loss' in run.log(0)


def test_a_clear_error_is_not_tried_again(run):
  run.submit('--array=0', flags=['--gin=experiment.Experiment.nonsense=1'])
  until(lambda: 'ended with status 1' in run.log())
  assert 'nonsense' in run.log()
  until(lambda: not run.cluster.run('squeue', '-h'))


def test_a_group_of_two_processes_names_both_of_its_nodes(run):
  run.submit(
      '--array=0', '--nodes=2', '--cpus-per-task=1', flags=['--num_processes=0']
  )
  run.wait_halted(0)
  found = run_directory.read_run(run.workdir)
  assert (found['replicas'], found['host']) == (2, ', '.join(NODES))
  assert re.search(
      r'on 127.0.0.1, 127.0.0.2: pid \d+ \(group 0, 2 x cpu\)', run.status()
  )
  run.let_go()
  run.wait_done(0)
  run.until(lambda: 'group 0 ended with status 0' in run.log())
  assert '2 replica(s) on cpu, 1 in each of 2 processes' in run.log()


@pytest.mark.parametrize('where, groups', [('slurm', 2), ('local', 1)])
def test_one_command_submits_all_groups_and_they_go_on(run, where, groups):
  """Preempted, then killed; each goes on, and neither stops the other."""
  pytest.importorskip('submitit')
  said = run.cluster.run(
      *(sys.executable, '-m', 'experiments.launch', f'--num_groups={groups}'),
      *(f'--cluster={where}', *run.flags[:2], '--minutes=30'),
      *(['--slurm=cpus_per_task=2'] if where == 'slurm' else []),
      **run.variables,
      cwd=run.workdir.parent,
      XLA_FLAGS='',
  )
  jobs, logs = zip(*re.findall(r'group \d: job (\S+), log (\S+)\n', said))
  # What is pickled does not lie where others write.
  assert not any(str(run.workdir) + os.sep in log for log in logs)
  assert said.splitlines()[-1].endswith(f'status --workdir={run.workdir}')
  run.wait_halted(*range(groups))
  if where == 'slurm':
    run.cluster.run('scancel', '--signal=USR2', jobs[0])
    killed = psutil.Process(run.sign(1)['pid'])
    assert killed.environ()['SRUN_CPUS_PER_TASK'] == '2'
    killed.kill()
  else:  # The task of the job, which waits for train_group.
    psutil.Process(run.sign(0)['pid']).parent().send_signal(signal.SIGUSR2)
  texts = [pathlib.Path(log).read_text for log in logs]
  run.until(lambda: 'group 0 stopped and saved at step 6' in texts[0]())
  run.let_go()
  run.wait_done(*range(groups))
  for text in texts:
    run.until(lambda text=text: 'Job completed successfully' in text())
    assert text().count('Starting with') == 2


def test_two_groups_of_two_processes_share_an_allocation(run, tmp_path):
  """The script is that of docs/cluster.md."""
  blocks = re.findall(
      r'```\n(#!/bin/bash\n.*?)```',
      (ROOT / 'docs' / 'cluster.md').read_text(),
      re.DOTALL,
  )
  (text,) = [block for block in blocks if 'for group in' in block]
  script = tmp_path / 'script'
  script.write_text(text.replace('python', sys.executable))
  run.submit(f'--output={tmp_path}/log', script=script)
  run.wait_halted(0, 1)
  text = run.status()
  for group_id in (0, 1):
    assert f'(group {group_id}, 2 x cpu)' in text
  run.let_go()
  run.wait_done(0, 1)


def test_who_is_still_there_on_a_lost_node_holds_its_group_for_a_while(run):
  """SLURM starts the group elsewhere, which is refused and tried again."""
  job = run.submit('--array=0')
  run.wait_halted(0)
  old, node = run.sign()['pid'], run.sign()['host']
  run.cluster.lose_node(node)
  try:
    run.until(lambda: 'ended with status 75' in run.log())
    assert f'process {old} on host' in run.log()
    # With all that SLURM had started there.
    ours = [psutil.Process(old), *psutil.Process(old).parents()]
    for process in ours:
      if process.pid in run.cluster.pids():
        process.kill()
    run.let_go()
    run.wait_done(0)
    run.until(lambda: 'group 0 ended with status 0' in run.log())
  finally:
    run.cluster.run('scancel', job)
    run.cluster.start_node(node)
