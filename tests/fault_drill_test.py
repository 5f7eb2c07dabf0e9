"""A short drill keeps the promises; the books see those that are broken."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import tiny_run
from waits import until

from codistill_jax.storage import checkpoints, files
from tools.fault_drill import faults, report
from tools.fault_drill import ledger as ledger_lib
from tools.fault_drill.drill import Drill
from tools.fault_drill.ledger import SLOW_SAVE_SECONDS, Ledger, Loss

TERMINATED = 128 + signal.SIGTERM

pytestmark = [
    pytest.mark.skipif(sys.platform != 'linux', reason='it needs Linux'),
    # Tests have a jax with threads, which warns when it is forked.
    pytest.mark.filterwarnings('ignore:os.fork'),
]


# --- A short drill -----------------------------------------------------------


# Few kills: it takes seconds to start again.
_DECK = dict.fromkeys(faults.FAULTS, 1) | {
    'truncate': 3,
    'flip': 4,
    'delete': 2,
    'forge': 2,
}


@pytest.fixture(scope='module')
def drilled():
  """What a drill of seconds came to."""
  with (
      tempfile.TemporaryDirectory() as temporary,
      pytest.MonkeyPatch.context() as patch,
  ):
    # No machine is as slow as that.
    patch.setattr(ledger_lib, 'SLOW_SAVE_SECONDS', 60.0)
    drill = Drill(
        os.path.join(temporary, 'run [1]'),
        temporary,
        num_groups=2,
        seconds=8.0,
        seconds_between=0.7,
        num_steps=300,
        seed=3,
        deck=_DECK,
        patience_seconds=60.0,
        enough=bites,
    )
    return drill.run(lambda: False)


def bites(log, ledger):
  """Returns whether enough has happened to say that promises are kept."""
  return (
      len(log) >= 12
      and len({fault.name for fault in log}) >= 6
      and ledger.refused > 0
      and ledger.uses > 3
      and bool(ledger.troubles)
      and any(ledger.losses(group) for group in (0, 1))
  )


def test_a_short_drill_bites_and_all_promises_are_kept(drilled, tmp_path):
  assert drilled['broken'] == []
  assert [(g['done'], g['step']) for g in drilled['groups']] == [
      (True, 300),
      (True, 300),
  ]
  assert drilled['num_faults'] >= 12
  assert sum(n > 0 for n in drilled['faults'].values()) >= 6
  assert drilled['refused'] > 0  # Damage is found before it is used, ...
  assert drilled['uses'] > 3  # ... and the sound ones are used.
  assert sum(drilled['troubles'].values()) > 0
  assert drilled['restarts'] > 0
  files.write_json(tmp_path / 'drill.json', drilled)
  text = report.describe(drilled)
  assert text.endswith('all promises kept')
  assert all(name in text for name in faults.FAULTS)


def test_nothing_is_left_behind_when_interrupted(tmp_path):
  workdir = tmp_path / 'run'
  process = subprocess.Popen(
      [
          sys.executable,
          '-m',
          'tools.fault_drill',
          f'--workdir={workdir}',
          '--num_groups=2',
      ],
      cwd=tiny_run.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
  )
  try:
    until(lambda: len(tiny_run.processes_of(workdir)) == 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=tiny_run.PATIENCE)
  finally:
    process.kill()
  assert process.returncode == TERMINATED, output
  assert tiny_run.processes_of(workdir) == []
  assert json.loads((workdir / 'drill.json').read_text())['stopped']


def test_a_workdir_that_is_not_empty_is_refused(tmp_path):
  (tmp_path / 'config.gin').write_text('')
  with pytest.raises(ValueError, match='is not empty'):
    Drill(
        tmp_path,
        str(tmp_path),
        num_groups=2,
        seconds=1.0,
        seconds_between=1.0,
        num_steps=10,
        seed=0,
    )


# --- The books ---------------------------------------------------------------


@pytest.fixture
def ledger():
  with tempfile.TemporaryDirectory() as temporary:
    one = Ledger(os.path.join(temporary, 'events'))
    yield one
    one.close()


def tell(ledger, *events, group=0, pid=1):
  """Books events of one process, given as (event, value)."""
  keys = {'used': 'digest', 'offered': 'digest', 'trouble': 'doing'}
  for name, value in events:
    fact = {keys.get(name, 'step'): value}
    if name in ('used', 'offered'):
      fact = {'digest': value, 'step': 10, 'peer': 1}
    ledger.book({'event': name, 'group': group, 'pid': pid} | fact)


def live(ledger, start, step, *more, pid):
  tell(ledger, ('alive', 0), ('start', start), ('step', step), *more, pid=pid)


SAVED = [('saving', 20), ('saved', 20)]
MORE = 'more than the checkpoint interval of 20'
NOT_SAVED = 'said that it had saved'


@pytest.mark.parametrize(
    'reached,saves,fault,seconds,status,start,excused,broken',
    [
        (39, SAVED, '', 0, -9, 20, 0, ''),
        (39, SAVED, '', 0, -9, 18, 0, MORE),
        (19, [], '', 0, -9, 20, 0, 'having reached 19'),
        # A save that is under way excuses what came after it, for a while.
        (25, [('saving', 20)], '', 0, -9, 0, 5, ''),
        (25, [('saving', 20)], '', 2 * SLOW_SAVE_SECONDS, -9, 0, 0, MORE),
        # Saves that a disk refuses excuse all since the first.
        (75, [*SAVED, ('saving', 40)], 'full_disk', 15, -9, 20, 35, ''),
        (75, [*SAVED, ('saving', 40)], 'full_disk', 15, -9, 19, 35, MORE),
        (75, [*SAVED, ('saving', 40)], 'full_disk', 99, -9, 20, 0, MORE),
        (75, [*SAVED, ('saving', 40)], 'skew_clock', 15, -9, 20, 0, MORE),
        # A save that overtook another is enough.
        (
            45,
            [('saving', 20), ('saving', 40), ('saved', 40)],
            '',
            0,
            -9,
            40,
            0,
            '',
        ),
        # A stop that says it saved must have; one update may be under way.
        (33, SAVED, '', 0, TERMINATED, 32, 0, ''),
        (33, SAVED, '', 0, TERMINATED, 31, 0, NOT_SAVED),
    ],
)
def test_a_restart_loses_what_was_not_saved_and_not_excused(
    ledger,
    monkeypatch,
    reached,
    saves,
    fault,
    seconds,
    status,
    start,
    excused,
    broken,
):
  clock = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
  live(ledger, 0, reached, *saves, pid=1)
  ledger.struck(1, fault)
  clock[0] += seconds
  ledger.ended(1, status)
  live(ledger, start, start + 1, pid=2)
  (loss,) = ledger.losses(0)
  assert loss == Loss(reached, start, excused, status == TERMINATED)
  assert broken in loss.broken(20) and bool(broken) == bool(loss.broken(20))
  assert ledger.step_of(0) == start + 1


def test_a_process_that_does_not_get_to_an_update_loses_nothing(ledger):
  live(ledger, 0, 25, pid=1)
  tell(ledger, ('alive', 0), pid=2)
  assert ledger.step_of(0) == 25
  tell(ledger, ('alive', 0), ('start', 20), pid=3)
  live(ledger, 20, 21, pid=4)
  assert [loss.steps for loss in ledger.losses(0)] == [5, 0]


@pytest.mark.parametrize(
    'status,step,names,asked',
    [
        (-9, 5, ['kill'], True),
        (-9, 5, ['suspend'], False),
        (-11, 5, ['kill'], False),
        (TERMINATED, 5, ['terminate'], True),
        (TERMINATED, 5, [], False),
        (70, 5, ['full_disk'], False),
        (1, 5, ['full_disk', 'terminate'], False),
        (75, 5, ['full_disk'], False),  # In the middle of training.
        (75, 5, ['full_disk_at_stop'], True),
        (TERMINATED, 5, ['full_disk_at_stop'], True),
        # In the middle of something long.
        (75, 5, ['terminate'], True),
        (75, 100, ['full_disk'], True),
        (75, 100, ['flip'], False),
        (0, 100, [], True),
    ],
)
def test_only_what_was_asked_for_may_end_a_process(
    ledger, status, step, names, asked
):
  live(ledger, 0, step, pid=7)
  for name in names:
    ledger.struck(7, name)
  ledger.ended(7, status)
  assert len(ledger.unasked_endings(num_steps=100)) == (not asked)


def test_bits_that_were_never_published_are_seen(ledger):
  tell(ledger, ('offered', 'a'), ('offered', 'b'), group=1, pid=2)
  tell(ledger, ('alive', 0), ('used', 'a'), ('used', 'b'))
  assert (ledger.uses, ledger.bad_uses) == (2, [])
  tell(ledger, ('used', 'c'))
  assert 'group 0 used publication 10 of group 1' in ledger.bad_uses[0]


def test_who_does_not_publish_or_read_when_all_is_well_is_seen(
    ledger, monkeypatch
):
  clock = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
  for group in (0, 1):
    tell(ledger, ('alive', 0), ('start', 0), group=group, pid=group + 1)
    tell(ledger, ('published', 10), group=group, pid=group + 1)
  read = lambda group, step: ledger.book(
      {'event': 'used', 'group': group, 'pid': group + 1, 'peer': 1 - group}
      | {'step': step, 'digest': 'x'}
  )
  read(0, 10)
  read(1, 10)
  clock[0] = 110.0
  unread = lambda since=105.0: ledger.unread([0, 1], since)
  assert [x.split(' since')[0] for x in unread()] == [
      'group 0 has published nothing',
      'group 1 has published nothing',
  ]
  for group in (0, 1):
    tell(ledger, ('published', 20), group=group, pid=group + 1)
  read(0, 20)
  (found,) = unread()
  assert 'group 1 has not read publication 20 of group 0' in found
  assert not ledger.unread([0], 105.0)  # The other one is done.
  read(1, 30)  # Or something newer.
  assert not unread() and unread(110.0)


def test_events_arrive_from_other_processes(ledger):
  code = (
      'from tools.fault_drill.drilled_group import Reporter;'
      f"report = Reporter({ledger.address!r}, 3); report('alive');"
      "report('start', step=7)"
  )
  subprocess.run([sys.executable, '-c', code], cwd=tiny_run.ROOT, check=True)
  until(lambda: ledger.step_of(3) == 7)


# --- The faults --------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
  directory = tmp_path / 'exchange' / 'group_0'
  for step in (10, 20):
    checkpoints.save(directory, step, {'x': np.arange(999.0)}, {})
  process = subprocess.Popen([sys.executable, '-c', _LOOP], cwd=tmp_path)
  yield faults.Victim(
      str(tmp_path), 0, process.pid, tmp_path / 'control', fresh=20
  )
  process.kill()
  process.wait()


# Appends to a file as often as it can, and says what it must leave undone.
_LOOP = """
import time
while True:
  try:
    with open('grows', 'a') as f:
      f.write('x')
  except OSError as e:
    open('refused', 'a').close()
  time.sleep(0.01)
"""


@pytest.mark.parametrize('name', sorted(faults.OF_PUBLICATIONS))
@pytest.mark.parametrize('seed', range(3))
def test_damage_is_damage_and_hits_what_is_fresh(victim, name, seed):
  directory = pathlib.Path(victim.workdir) / 'exchange' / 'group_0'

  def snapshot():
    return {
        str(path.relative_to(directory)): (
            path.is_file() and path.stat().st_size < 1e6 and path.read_bytes()
        )
        for path in directory.rglob('*')
        if not path.is_dir()
    }

  before = snapshot()
  faults.FAULTS[name][0](victim, np.random.default_rng(seed))
  after = snapshot()
  differing = {
      path for path in before if after.get(path) != before[path]
  } or pytest.fail('nothing was harmed')
  assert all(path.startswith('20/') for path in differing)


def test_a_full_disk_refuses_until_it_is_undone(victim):
  grows = pathlib.Path(victim.workdir) / 'grows'
  refused = pathlib.Path(victim.workdir) / 'refused'
  before = resource.prlimit(victim.pid, resource.RLIMIT_FSIZE)
  until(grows.exists)
  _, undo = faults.full_disk(victim, np.random.default_rng(0))
  until(refused.exists)
  full = grows.stat().st_size
  undo()
  assert resource.prlimit(victim.pid, resource.RLIMIT_FSIZE) == before
  until(lambda: grows.stat().st_size > full)


def test_undoing_spares_the_next_process(victim):
  _, undo = faults.full_disk(victim, np.random.default_rng(0))
  victim.pid += 1  # Another one, which must not be touched.
  undo()


_BROKEN_DISK = """
import os, pathlib, shutil, sys, time
from etils import epath
from tools.fault_drill import drilled_group

root, control = sys.argv[1:]
control = drilled_group.Control(control)
drilled_group.break_disk(control, root)
path = epath.Path(root) / 'a'
path.write_text('x')
control.read_only = True
for attempt in (
    lambda: path.write_text('y'),
    lambda: pathlib.Path(path).write_text('y'),
    lambda: (path.parent / 'c' / 'd').mkdir(parents=True),
    lambda: path.replace(path.parent / 'c'),
    lambda: path.parent.rmtree(),
    lambda: shutil.rmtree(path.parent),
):
  try:
    attempt()
  except OSError as e:
    assert e.errno == 30, e
  else:
    sys.exit('not refused')
assert path.read_text() == 'x'
pathlib.Path(root + '_beside').mkdir()  # Another directory.
control.read_only, control.slow_seconds = False, 0.2
start = time.monotonic()
path.exists()
assert time.monotonic() - start >= 0.2
"""


def test_a_broken_disk_is_felt_by_every_way_to_it(tmp_path):
  root = tmp_path / 'run'
  root.mkdir()
  subprocess.run(
      [sys.executable, '-c', _BROKEN_DISK, root, tmp_path / 'control'],
      cwd=tiny_run.ROOT,
      check=True,
  )
