"""Workers keep the order, pass on errors, and never stay behind."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waits import PATIENCE, until

from codistill_jax.data.workers import Workers

ROOT = Path(__file__).parent.parent


def slow_square(n):
  time.sleep(0.02 * (n % 3 == 0))
  return n * n, os.getpid()


class Together:
  """The process that takes an item; once so many have taken one."""

  def __init__(self, number, path):
    self._number, self._path = number, path

  def __call__(self, n):
    (self._path / str(os.getpid())).touch()
    until(lambda: len(list(self._path.iterdir())) >= self._number)
    return n * n, os.getpid()


def fail_at_5(n):
  if n == 5:
    raise ValueError('no fives, please')
  return n


def die_at_5(n):
  if n == 5:
    os.kill(os.getpid(), signal.SIGKILL)
  return n


def big(n):
  return bytes(n)


@pytest.fixture(scope='module')
def pool():
  with Workers(2) as pool:
    yield pool


@pytest.mark.parametrize('number', [1, 2])
def test_results_come_in_the_order_of_the_items(pool, number, tmp_path):
  workers = pool if number == 2 else Workers(1)
  results = list(workers.map(Together(number, tmp_path), range(40)))
  assert [square for square, _ in results] == [n * n for n in range(40)]
  processes = {process for _, process in results}
  assert len(processes) == number
  assert (os.getpid() in processes) == (number == 1)
  results = [square for square, _ in workers.map(slow_square, range(40))]
  assert results == [n * n for n in range(40)]
  assert list(workers.map(slow_square, [])) == []


def test_little_work_starts_few_processes():
  with Workers(50) as pool:
    assert len({pid for _, pid in pool.map(slow_square, range(3))}) <= 3
    assert len(pool._processes) <= 3


def test_pipes_larger_than_their_buffers_do_not_block(pool):
  sizes = [3_000_000 + n for n in range(12)]
  assert [len(one) for one in pool.map(big, sizes)] == sizes
  assert list(pool.map(len, map(bytes, sizes))) == sizes


def test_items_are_fetched_a_bounded_number_ahead(pool):
  fetched = 0

  def fetch(n):
    nonlocal fetched
    fetched = n
    return n

  results = pool.map(slow_square, map(fetch, range(1, 1000)))
  for n in range(1, 6):
    assert next(results)[0] == n * n
    assert fetched <= n + 8
  results.close()


def test_a_map_given_up_leaves_nothing_for_the_next(pool):
  for _ in range(3):
    next(pool.map(slow_square, range(30)))
  assert list(pool.map(abs, [-1, -2, -3])) == [1, 2, 3]


def test_errors_arrive_with_their_origin(pool):
  with pytest.raises(ValueError, match='no fives') as raised:
    list(pool.map(fail_at_5, range(9)))
  assert 'fail_at_5' in raised.value.__notes__[0]
  assert list(pool.map(abs, [-1])) == [1]


@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.parametrize('where', ['function', 'items'])
def test_an_error_comes_after_the_results_before_it(pool, number, where):
  """So that what is never asked for is no error, with any number."""
  workers = pool if number == 2 else Workers(1)
  if where == 'function':
    results = workers.map(fail_at_5, range(9))
  else:
    results = workers.map(abs, map(fail_at_5, range(9)))
  assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match='no fives'):
    next(results)


def test_an_error_of_a_map_given_up_is_none_of_the_next(pool):
  results = pool.map(fail_at_5, range(4, 9))
  assert next(results) == 4
  assert list(pool.map(abs, [-1, -2])) == [1, 2]


class TwoArgumentsError(Exception):
  """Can be pickled, and not be unpickled."""

  def __init__(self, one, other):
    super().__init__(f'{one} and {other}')


def fail_oddly(n):
  raise TwoArgumentsError('odd', n)


def not_picklable(n):
  return lambda: n


def test_what_cannot_be_sent_is_an_error_all_the_same(pool):
  with pytest.raises(RuntimeError, match='odd and 3') as raised:
    list(pool.map(fail_oddly, [3]))
  assert 'fail_oddly' in str(raised.value)
  with pytest.raises((AttributeError, pickle.PicklingError), match='lambda'):
    list(pool.map(not_picklable, [3]))
  assert list(pool.map(abs, [-1])) == [1]


def exists_soon(path):
  until(path.exists, PATIENCE / 4)
  return True


def test_items_are_fetched_while_all_workers_are_busy(pool, tmp_path):
  """Not only when one is idle, which would then wait for the item."""

  def items():
    yield from [tmp_path / 'a'] * 3
    (tmp_path / 'a').touch()  # Both workers wait for it.
    yield tmp_path / 'a'

  assert list(pool.map(exists_soon, items())) == [True] * 4


def test_a_script_without_a_guard_is_told_so(python, tmp_path):
  (tmp_path / 'parent.py').write_text(
      'from codistill_jax.data.workers import Workers\n'
      'with Workers(2) as pool:\n'
      '  list(pool.map(abs, range(9)))\n'
  )
  done = subprocess.run(
      [python, tmp_path / 'parent.py'],
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=PATIENCE,
  )
  last = done.stderr.splitlines()[-1]
  assert last.startswith('OSError: A worker process ended with status 1')
  assert "needs `if __name__ == '__main__':`" in last


def test_a_worker_that_dies_is_an_error_that_may_pass():
  with Workers(2) as pool:
    with pytest.raises(
        OSError, match=r'ended by signal 9.*fewer --w'
    ) as raised:
      list(pool.map(die_at_5, range(50)))
    assert raised.value.errno == errno.EAGAIN
    assert 'Errno' not in str(raised.value)


def test_at_least_one():
  with pytest.raises(ValueError, match='workers must be 1 or more; got 0'):
    Workers(0)


def running(processes):
  return {pid for pid in processes if Path(f'/proc/{pid}').exists()}


def test_at_the_end_the_processes_are_gone(tmp_path):
  with Workers(2) as pool:
    work = Together(2, tmp_path)
    processes = {process for _, process in pool.map(work, range(20))}
    assert len(running(processes)) == 2
  assert not running(processes)


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('end', ['SIGKILL', 'os._exit', 'SIGTERM to all'])
def test_workers_do_not_outlive_their_parent(python, tmp_path, end):
  (tmp_path / 'parent.py').write_text(
      'import os, pathlib, sys\n'
      'from workers_test import Together\n'
      'from codistill_jax.data.workers import Workers\n'
      'if __name__ == "__main__":\n'
      '  with Workers(2) as pool:\n'
      '    work = Together(2, pathlib.Path(sys.argv[2]))\n'
      '    for n, (_, pid) in enumerate(pool.map(work, range(10**6))):\n'
      '      if n < 30: print(pid, flush=True)\n'
      '      if n == 50 and sys.argv[1] == "os._exit": os._exit(3)\n'
  )
  (tmp_path / 'marks').mkdir()
  with subprocess.Popen(
      [python, tmp_path / 'parent.py', end, tmp_path / 'marks'],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'},
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
  ) as parent:
    try:
      processes = {int(parent.stdout.readline()) for _ in range(30)}
      assert len(processes) == 2
      if end == 'SIGKILL':
        parent.kill()
      elif end == 'SIGTERM to all':
        os.killpg(parent.pid, signal.SIGTERM)
      parent.wait(PATIENCE)
      until(lambda: not running(processes))
    finally:
      if running(processes):
        os.killpg(parent.pid, signal.SIGKILL)
