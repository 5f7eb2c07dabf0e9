"""A signal ends a process soon, also one whose main thread is inside C code."""

import signal
import subprocess
import sys
import time

import pytest
import tiny_run

from experiments import stopping

# `sleep` of the C library: as during a compilation, Python runs no handler to
# the end of which the main thread would come.
_PROLOGUE = """
import ctypes, sys, threading, time
from experiments import cli, stopping
stopping._SOON, stopping._PATIENCE = 0.1, 0.5
calls = []
def stuck(seconds):
  left = seconds
  while left:
    left = ctypes.CDLL(None).sleep(left)
def save(line='saved all'):
  calls.append('save')
  return line
rescue = stopping.Rescue('nothing lost')
stop = stopping.StopRequest(rescue).install()
def ready():
  print('ready', flush=True)
"""


class Script:
  """Python code that runs in a process of its own."""

  def __init__(self, code):
    self._process = subprocess.Popen(
        [sys.executable, '-c', _PROLOGUE + code],
        cwd=tiny_run.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert self._process.stdout.readline() == 'ready\n'

  def send(self, number):
    self._process.send_signal(number)

  def end(self, within=5.0):
    """Exit status and output; fails if it takes longer."""
    try:
      output, _ = self._process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
      self._process.kill()
      output, _ = self._process.communicate()
      pytest.fail(f'still there after {within} s: {output}')
    return self._process.returncode, output


@pytest.mark.parametrize(
    'number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_with_nothing_to_lose_it_leaves_at_once(number, status):
  script = Script('ready()\nstuck(30)\n')
  script.send(number)
  assert script.end(2.0) == (status, 'nothing lost\n')


def test_a_stuck_main_thread_is_saved_by_another():
  script = Script("""
print_all = lambda: print('at exit', calls, flush=True)
rescue.hold(0, 7, save)
rescue.at_exit(0, print_all)
ready()
stuck(30)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, "at exit ['save']\nsaved all\n")


def test_groups_of_one_process_are_saved_at_one_step():
  script = Script("""
rescue.hold(0, 7, lambda: save('first'))
rescue.hold(1, 6, lambda: save('second'))
ready()
time.sleep(1.2)
rescue.hold(1, 7, lambda: save('second'))
print(calls, flush=True)  # Nothing before they agree.
stuck(30)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, '[]\nfirst\nsecond\n')


def test_a_main_thread_that_comes_to_poll_does_it_itself():
  script = Script("""
rescue.hold(0, 7, save)
ready()
while not stop():
  time.sleep(0.01)
time.sleep(1)  # Saves, longer than it is waited for a poll.
print(calls, stop.signal_number)
sys.exit(3)
""")
  script.send(signal.SIGINT)
  assert script.end() == (3, '[] 2\n')


def test_what_cannot_be_saved_from_outside_is_left_and_tried_again():
  script = Script("""
def moved_on():
  calls.append('moved on')
  if len(calls) < 3:
    raise stopping.MovedOnError()
  return f'{len(calls)} tries'
rescue.hold(0, 7, moved_on)
ready()
stuck(30)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, '3 tries\n')


def test_the_main_thread_waits_for_a_rescue_under_way():
  """Else both would save, or the main thread would go on meanwhile."""
  script = Script("""
def slow():
  time.sleep(1)
  return 'saved once'
rescue.hold(0, 7, slow)
ready()
time.sleep(1)  # The rescue begins after half of it.
stop()
print('must not be reached', flush=True)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, 'saved once\n')


def test_a_poll_in_another_thread_is_not_the_main_thread_coming():
  script = Script("""
def poll():
  while True:
    stop()
    time.sleep(0.01)
rescue.hold(0, 7, save)
threading.Thread(target=poll, daemon=True).start()
ready()
stuck(30)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, 'saved all\n')


def test_a_rescue_that_fails_says_so_by_its_status():
  script = Script("""
def fail():
  raise TimeoutError('disk full')
rescue.hold(0, 7, fail)
ready()
stuck(30)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (75, 'error: disk full\n')


@pytest.mark.parametrize('rescue', ['', 'rescue.hold(0, 7, lambda: stuck(30))'])
def test_a_second_signal_leaves_at_once(rescue):
  """Also while the first one is being dealt with."""
  script = Script(f'stop.rescue.hold(1, 7, save)\n{rescue}\nready()\nstuck(30)')
  script.send(signal.SIGTERM)
  time.sleep(0.2)
  script.send(signal.SIGINT)
  assert script.end(1.0)[0] == 130


def test_without_a_rescue_it_only_is_a_flag():
  """A supervisor ends its children in its own time."""
  script = Script("""
stop.uninstall()
stop = stopping.StopRequest().install()
ready()
time.sleep(0.8)
print(stop(), stop.signal_number)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (0, 'True 15\n')


def test_a_poll_right_after_the_signal_sees_it():
  before = signal.getsignal(signal.SIGTERM)
  stop = stopping.StopRequest().install()
  try:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop() and stop.signal_number == signal.SIGTERM
  finally:
    stop.uninstall()
  assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_group_held_is_let_go():
  rescue = stopping.Rescue('nothing')
  rescue.hold(0, 3, lambda: 'saved')
  rescue.at_exit(0, lambda: pytest.fail('let go'))
  assert not rescue.nothing_to_lose
  rescue.let_go(0)
  assert rescue.nothing_to_lose and rescue.save() == 'nothing'
