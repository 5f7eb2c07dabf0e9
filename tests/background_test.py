"""The background writer: what is lost, what is tried again, what is said."""

import gc
import logging
import subprocess
import sys
import threading
import time
import weakref

import pytest
from waits import PATIENCE, until

from codistill_jax.storage.background import (
    BackgroundWriter,
    Mutex,
    Patience,
    Troubles,
    submit,
)

# Tries again at once; gives up nothing by itself.
QUICK = Patience(
    retry=0.01, longest_retry=0.01, hold=PATIENCE, failing=PATIENCE, join=0.01
)


class Disk:
  """Is whole, or fails, or is slow; for each step, at will."""

  def __init__(self):
    self.tried, self.written = [], []
    self.error = None
    self.open = threading.Event()
    self.open.set()

  def write(self, step, item):
    self.tried.append(step)
    assert self.open.wait(PATIENCE)
    if self.error is not None:
      raise self.error
    self.written.append((step, item))


@pytest.fixture
def disk():
  made = Disk()
  yield made
  made.open.set()


@pytest.fixture
def writer(disk):
  """Makes writers to that disk, and ends their threads."""
  made = []

  def make(patience=QUICK, troubles=None, **kwargs):
    made.append(
        BackgroundWriter(
            disk.write,
            'writing',
            troubles or Troubles(),
            patience=patience,
            **kwargs,
        )
    )
    return made[-1]

  yield make
  disk.error = None
  disk.open.set()
  for one in made:
    one.give_up()
    one.close()


# --- A disk that works -------------------------------------------------------


@pytest.mark.parametrize('room', [1, 3, None])
def test_a_quick_disk_gets_everything_in_order(disk, writer, room):
  one = writer(room=room)
  assert one.finished and one.saved is None
  for step in range(6):
    one.put(step, step * 10)
  assert one.wait() and one.saved == 5 and one.dropped == 0
  assert disk.written == [(step, step * 10) for step in range(6)]
  assert not one.finished
  one.close()
  until(lambda: one.finished)


def test_what_is_written_is_let_go(disk, writer):
  class Item:
    pass

  item = Item()
  gone = weakref.ref(item)
  one = writer()
  one.put(1, item)
  assert one.wait()
  del item
  disk.written.clear()
  until(lambda: gc.collect() is not None and gone() is None)


@pytest.mark.parametrize('where', ['waiting', 'busy', 'saved'])
def test_a_step_is_taken_once(disk, writer, where):
  one = writer(room=None)
  if where != 'saved':
    disk.open.clear()
  if where == 'waiting':
    one.put(1, 'a')
    until(lambda: disk.tried)
  one.put(2, 'a')
  if where == 'saved':
    one.wait()
  one.put(2, 'b')
  disk.open.set()
  one.wait()
  assert [x for x in disk.written if x[0] == 2] == [(2, 'a')]


# --- A slow disk -------------------------------------------------------------


def test_a_slow_disk_gets_the_newest(disk, writer):
  one = writer(Patience(hold=0.01))
  disk.open.clear()
  one.put(1, None)
  until(lambda: disk.tried)
  for step in (2, 3, 4):
    one.put(step, None)
  assert not one.wait(slow=0.0)
  disk.open.set()
  assert one.wait(failing=0.0)
  assert disk.tried == [1, 4] and one.dropped == 2


def test_what_waits_can_be_taken_back(disk, writer):
  one = writer()
  disk.open.clear()
  one.put(1, 'a')
  until(lambda: disk.tried)
  assert one.withdraw() is None  # It is being written.
  one.put(2, 'b')
  assert one.withdraw() == 'b'
  disk.open.set()
  one.put(3, 'c')
  one.wait()
  assert disk.written == [(1, 'a'), (3, 'c')] and one.dropped == 1


def test_where_every_one_is_needed_a_slow_disk_holds_up(disk, writer):
  stop = []
  one = writer(room=None, interrupted=lambda: bool(stop))
  disk.open.clear()
  one.put(1, None)
  until(lambda: disk.tried)
  one.put(2, None)
  assert one.withdraw() is None
  held = threading.Thread(target=one.put, args=(3, None), daemon=True)
  held.start()
  held.join(0.05)
  assert held.is_alive()
  stop.append(True)
  held.join(PATIENCE)
  disk.open.set()
  assert one.wait()
  assert [step for step, _ in disk.written] == [1, 2, 3]


def test_waiting_for_a_step_does_not_wait_for_later_ones(disk, writer):
  one = writer(room=None)
  one.put(1, None)
  one.wait()
  disk.open.clear()
  one.put(3, None)
  assert one.wait(up_to=2, slow=0.0) and not one.wait(up_to=3, slow=0.0)


# --- A disk that fails -------------------------------------------------------


def test_a_failure_is_tried_again_until_it_works(disk, writer):
  now = Troubles()
  one = writer(troubles=now)
  disk.error = OSError(28, 'No space left on device')
  one.put(1, 'a')
  until(lambda: len(disk.tried) > 3)
  assert [x.doing for x in now.now] == ['writing'] and one.saved is None
  assert not one.wait(failing=0.0)
  disk.error = None
  assert one.wait()
  assert disk.written == [(1, 'a')] and not now.now


def test_pauses_become_longer(disk, writer):
  one = writer(Patience(retry=0.01, longest_retry=PATIENCE))
  disk.error = OSError()
  one.put(1, None)
  start = time.monotonic()
  until(lambda: len(disk.tried) == 4)
  assert time.monotonic() - start >= 0.01 + 0.02 + 0.04


def test_who_waits_for_the_end_ends_a_long_pause(disk, writer):
  now = Troubles()
  one = writer(Patience(retry=10 * PATIENCE), troubles=now)
  disk.error = OSError()
  one.put(1, None)
  until(lambda: now.now)
  disk.error = None
  assert one.wait(failing=PATIENCE)


@pytest.mark.parametrize('room, kept', [(1, [7]), (2, [6, 7]), (None, None)])
def test_the_oldest_gives_way_where_the_disk_fails(disk, writer, room, kept):
  """Be it the one whose write fails; and nobody is held up by that."""
  one = writer(room=room, interrupted=lambda: True)
  disk.error = OSError()
  for step in range(1, 8):
    one.put(step, None)
    until(lambda: disk.tried)
  until(lambda: one.dropped >= 5 or room is None)
  disk.error = None
  one.wait()
  steps = [step for step, _ in disk.written]
  if room is None:
    assert steps == [1, 2, 3, 4, 5, 6, 7]
  else:
    assert steps[-room:] == kept and len(steps) + one.dropped == 7


def test_what_was_given_up_may_be_put_again(disk, writer):
  one = writer(room=None, interrupted=lambda: True)
  disk.error = OSError('full')
  for step in (1, 2):
    one.put(step, 'a')
  until(lambda: disk.tried)
  unwritten = one.finish(failing=0.0)
  assert unwritten.steps == (1, 2) and str(unwritten.error) == 'full'
  assert one.finish() is None
  disk.error = None
  one.put(1, 'b')
  one.wait()
  assert disk.written == [(1, 'b')] and one.saved == 1


def test_a_write_that_hangs_is_given_up_without_an_error(disk, writer):
  one = writer()
  disk.open.clear()
  one.put(1, None)
  until(lambda: disk.tried)
  assert not one.wait(slow=0.0)
  assert one.give_up() == ((1,), None)
  one.close()
  assert not one.finished  # Nobody else may write yet.
  disk.open.set()
  until(lambda: one.finished)


# --- Another error -----------------------------------------------------------


@pytest.mark.parametrize(
    'call',
    [
        lambda one: one.put(3, None),
        lambda one: one.wait(),
        lambda one: one.raise_failure(),
    ],
    ids=['put', 'wait', 'raise_failure'],
)
def test_an_error_that_is_none_of_the_disk_comes_to_light_once(
    disk, writer, call
):
  one = writer(room=None, interrupted=lambda: True)
  disk.open.clear()
  disk.error = ValueError('a mistake')
  one.put(1, None)
  until(lambda: disk.tried)
  one.put(2, None)
  disk.open.set()
  with pytest.raises(ValueError, match='a mistake'):
    until(lambda: call(one))
  assert disk.tried == [1]
  one.raise_failure()


def test_an_error_of_what_was_given_up_is_dropped(disk, writer):
  one = writer()
  disk.open.clear()
  disk.error = ValueError('a mistake')
  one.put(1, None)
  until(lambda: disk.tried)
  one.give_up()
  disk.open.set()
  one.close()
  until(lambda: one.finished)
  one.raise_failure()


@pytest.mark.parametrize('inline', [False, True])
def test_what_is_submitted_is_a_future(inline):
  def act(x):
    if x < 0:
      raise ValueError('negative')
    return threading.current_thread(), x

  thread, x = submit(act, 3, inline=inline).result(PATIENCE)
  assert x == 3 and (thread is threading.current_thread()) == inline
  assert inline or thread.daemon  # A hang must not hold up an exit.
  with pytest.raises(ValueError, match='negative'):
    submit(act, -3, inline=inline).result(PATIENCE)


def test_a_mutex_is_held_by_one_after_another_but_not_for_ever():
  mutex, inside = Mutex(Patience(turn=0.05)), []
  with mutex.held(), mutex.held():  # After a moment: the other one hangs.
    inside.append(1)
  with mutex.held():
    inside.append(2)
  assert inside == [1, 2]


# --- Troubles ----------------------------------------------------------------


@pytest.fixture
def said(caplog):
  caplog.set_level(logging.WARNING, logger='absl')
  return lambda: [r.getMessage() for r in caplog.records]


def test_a_row_of_failures_and_its_end_are_said_once(said):
  troubles = Troubles('group 3: ')
  troubles.worked('publishing')
  for _ in range(2):
    for _ in range(5):
      troubles.failed('publishing', OSError(28, 'No space left on device'))
    (now,) = troubles.now
    assert (now.doing, now.count) == ('publishing', 5)
    for _ in range(2):
      troubles.worked('publishing')
  assert said() == 2 * [
      'group 3: publishing fails ([Errno 28] No space left on device); training'
      ' goes on, and it is tried again',
      'group 3: publishing works again, after 5 failures',
  ]
  assert troubles.now == () and troubles.failures == 10


def test_a_block_notes_how_it_ended_and_an_error_of_the_disk_ends_only_it():
  troubles, done = Troubles(), []
  for error in (OSError('full'), None):
    with troubles.noted('publishing'):
      if error:
        raise error
      done.append(1)
    assert bool(troubles.now) is bool(error)
  assert done == [1] and troubles.failures == 1
  with pytest.raises(ValueError), troubles.noted('publishing'):
    raise ValueError


def test_troubles_are_apart_and_ordered_by_age():
  troubles = Troubles()
  troubles.failed('publishing', OSError('a\nb'))
  troubles.failed('saving', OSError('c'))
  troubles.failed('publishing', OSError('d  e'))
  assert [(t.doing, t.reason, t.count) for t in troubles.now] == [
      ('publishing', 'd e', 2),
      ('saving', 'c', 1),
  ]
  assert troubles.now[0].since <= troubles.now[1].since
  troubles.worked('publishing')
  assert [t.doing for t in troubles.now] == ['saving']


def test_what_is_at_work_when_the_process_ends_is_finished():
  code = """
import concurrent.futures, time
from codistill_jax.storage import background

def work(*unused):
  time.sleep(0.3)
  pool = concurrent.futures.ThreadPoolExecutor(1)  # As of a library.
  print(pool.submit(str, 'done').result())

background.submit(work)
writer = background.BackgroundWriter(work, 'saving', background.Troubles())
writer.put(1, None)
time.sleep(0.1)
"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == 'done\n' * 2 and not done.stderr
