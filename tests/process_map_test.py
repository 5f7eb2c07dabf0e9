"""A process pool keeps the order, passes errors on, and never stays behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waits import PATIENCE, until

from codistill_jax.data.prepare import process_map
from experiments import cli

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


@pytest.fixture(scope='module')
def two():
  with process_map(2) as process:
    yield process


@pytest.mark.parametrize('number', [1, 2])
def test_results_come_in_the_order_of_the_items(two, number, tmp_path):
  process = two if number == 2 else map
  results = list(process(Together(number, tmp_path), range(40)))
  assert [square for square, _ in results] == [n * n for n in range(40)]
  processes = {pid for _, pid in results}
  assert len(processes) == number
  assert (os.getpid() in processes) == (number == 1)
  results = [square for square, _ in process(slow_square, range(40))]
  assert results == [n * n for n in range(40)]
  assert list(process(slow_square, [])) == []


def test_items_are_fetched_a_bounded_number_ahead(two):
  fetched = 0

  def fetch(n):
    nonlocal fetched
    fetched = n
    return n

  results = two(slow_square, map(fetch, range(1, 1000)))
  for n in range(1, 6):
    assert next(results)[0] == n * n
    assert fetched <= n + 8
  results.close()
  assert list(two(abs, [-1, -2, -3])) == [1, 2, 3]


@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.parametrize('where', ['function', 'items'])
def test_an_error_comes_after_the_results_before_it(two, number, where):
  """So that what is never asked for is no error, with any number."""
  process = two if number == 2 else map
  if where == 'function':
    results = process(fail_at_5, range(9))
  else:
    results = process(abs, map(fail_at_5, range(9)))
  assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match='no fives'):
    next(results)
  assert list(process(abs, [-1])) == [1]


KILLED = """
import multiprocessing, sys, time
from codistill_jax.data.prepare import process_map
def items():
  for n in range(1000):
    if n == 20:
      time.sleep(0.5)  # Both wait for an item, one of them at the lock.
      sorted(multiprocessing.active_children(), key=lambda p: p.pid)[
          int(sys.argv[1])
      ].kill()
    yield n
def wait(n):
  time.sleep(0.05)
  return n
if __name__ == '__main__':
  try:
    with process_map(2) as process:
      list(process(wait, items()))
  except OSError as e:
    print(e.errno, e)
"""


@pytest.mark.parametrize('which', [0, 1])
def test_the_others_end_when_an_idle_worker_is_killed(tmp_path, which, python):
  """Also those that wait for a lock which the dead one holds."""
  script = tmp_path / 'script.py'
  script.write_text(KILLED)
  done = subprocess.run(
      [python, script, str(which)],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=PATIENCE,
  )
  # An errno that may pass.
  assert f'{errno.EAGAIN} A worker process has died' in done.stdout


PARENT = """
import os, sys, time
from codistill_jax.data.prepare import process_map
def work(n):
  mine = f'{sys.argv[1]}/{os.getpid()}'
  open(mine, 'w').close()
  while not os.path.exists(mine + '.go'):
    time.sleep(0.01)
  open(mine + '.alive', 'w').close()
  time.sleep(1000)
if __name__ == '__main__':
  with process_map(2) as process:
    list(process(work, range(4)))
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_their_parent(tmp_path, how, python):
  """Nor do they hear of signals that are meant for it."""
  folder = tmp_path / 'pids'
  folder.mkdir()
  script = tmp_path / 'parent.py'
  script.write_text(PARENT)
  with subprocess.Popen(
      [python, script, folder],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      start_new_session=True,
  ) as process:
    until(lambda: len(list(folder.iterdir())) == 2)
    pids = [int(path.name) for path in folder.iterdir()]
    for pid in pids:
      for number in cli.SIGNALS:
        os.kill(pid, number)
      (folder / f'{pid}.go').touch()
    until(lambda: all((folder / f'{pid}.alive').exists() for pid in pids))
    process.send_signal(how)
    assert process.wait(PATIENCE) == -how
  until(lambda: all(is_gone(pid) for pid in pids))


def is_gone(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  stat = Path(f'/proc/{pid}/stat')
  if sys.platform == 'linux' and stat.exists():  # Nobody's child any more.
    return stat.read_text().rpartition(')')[2].split()[0] == 'Z'
  return False


def test_a_script_without_a_guard_gets_an_error(tmp_path, python):
  script = tmp_path / 'script.py'
  script.write_text(
      'from codistill_jax.data.prepare import process_map\n'
      'with process_map(2) as process:\n'
      '  list(process(abs, range(4)))\n'
  )
  done = subprocess.run(
      [python, script],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=PATIENCE,
  )
  assert done.returncode == 1
  assert "needs `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
