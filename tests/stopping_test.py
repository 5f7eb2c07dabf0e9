"""A signal ends a process soon, also one whose main thread is inside C code."""

import signal
import subprocess
import sys

import pytest
import tiny_run
from waits import PATIENCE

from experiments import cli

# `sleep` of the C library: as during a compilation, Python runs no handler to
# the end of which the main thread would come.
_PROLOGUE = """
import ctypes, sys, threading, time
from experiments import cli
cli._SOON, cli._PATIENCE = 0.1, 0.2
calls = []
def stuck(seconds):
  left = seconds
  while left:
    left = ctypes.CDLL(None).sleep(left)
def save(line='saved all'):
  calls.append('save')
  return line
rescue = cli.Rescue('nothing lost')
stop = cli.StopRequest(rescue).install()
def ready():
  print('ready', flush=True)
FOR_LONG = 1000  # None of the scripts is to last so long.
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

  def read(self):
    return self._process.stdout.readline()

  def end(self):
    """Exit status and output; fails if it is still inside C code."""
    try:
      output, _ = self._process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      output, _ = self._process.communicate()
      pytest.fail(f'still there after {PATIENCE} s: {output}')
    return self._process.returncode, output


@pytest.mark.parametrize(
    'number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_with_nothing_to_lose_it_leaves_at_once(number, status):
  script = Script('ready()\nstuck(FOR_LONG)\n')
  script.send(number)
  assert script.end() == (status, 'nothing lost\n')


def test_a_stuck_main_thread_is_saved_by_another():
  script = Script("""
print_all = lambda: print('at exit', calls, flush=True)
rescue.hold(0, 7, save)
rescue.at_exit(0, print_all)
ready()
stuck(FOR_LONG)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, "at exit ['save']\nsaved all\n")


def test_groups_of_one_process_are_saved_at_one_step():
  script = Script("""
rescue.hold(0, 7, lambda: save('first'))
rescue.hold(1, 6, lambda: save('second'))
tries, all_of_it = [], rescue.save
rescue.save = lambda: tries.append(1) or all_of_it()
ready()
while len(tries) < 2:
  time.sleep(0.01)
print(calls, flush=True)  # Nothing before they agree.
rescue.hold(1, 7, lambda: save('second'))
stuck(FOR_LONG)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, '[]\nfirst\nsecond\n')


def test_a_main_thread_that_comes_to_poll_does_it_itself():
  script = Script("""
over = threading.Event()
class Patience(threading.Event):  # Is over when the main thread says so.
  def wait(self, seconds):
    over.wait()
    return self.is_set()
stop._heard = Patience()
rescue.hold(0, 7, save)
ready()
while not stop():
  time.sleep(0.01)
over.set()
time.sleep(0.3)  # Saves, longer than it is waited for a poll.
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
    raise cli.MovedOnError()
  return f'{len(calls)} tries'
rescue.hold(0, 7, moved_on)
ready()
stuck(FOR_LONG)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, '3 tries\n')


def test_the_main_thread_waits_for_a_rescue_under_way():
  """Else both would save, or the main thread would go on meanwhile."""
  script = Script("""
begun = threading.Event()
def slow():
  begun.set()
  time.sleep(0.3)
  return 'saved once'
rescue.hold(0, 7, slow)
ready()
begun.wait()
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
stuck(FOR_LONG)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (143, 'saved all\n')


def test_a_rescue_that_fails_says_so_by_its_status():
  script = Script("""
def fail():
  raise TimeoutError('disk full')
rescue.hold(0, 7, fail)
ready()
stuck(FOR_LONG)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (75, 'error: disk full\n')


_BEFORE_A_RESCUE = """
cli._PATIENCE = FOR_LONG
def heard():
  while not stop.signal_number:
    time.sleep(0.01)
  print('heard', flush=True)
threading.Thread(target=heard, daemon=True).start()
rescue.hold(0, 7, save)
"""
_DURING_A_RESCUE = """
rescue.hold(0, 7, lambda: print('heard', flush=True) or stuck(FOR_LONG))
"""


@pytest.mark.parametrize(
    'first', [_BEFORE_A_RESCUE, _DURING_A_RESCUE], ids=['before', 'during']
)
def test_a_second_signal_leaves_at_once(first):
  """Also while the first one is being dealt with."""
  script = Script(f'{first}\nready()\nstuck(FOR_LONG)\n')
  script.send(signal.SIGTERM)
  assert script.read() == 'heard\n'
  script.send(signal.SIGINT)
  assert script.end() == (130, '')


def test_without_a_rescue_it_only_is_a_flag():
  """A supervisor ends its children in its own time."""
  script = Script("""
stop.uninstall()
stop = cli.StopRequest().install()
ready()
while not stop():
  time.sleep(0.01)
time.sleep(0.4)
print(stop(), stop.signal_number)
""")
  script.send(signal.SIGTERM)
  assert script.end() == (0, 'True 15\n')


def test_a_poll_right_after_the_signal_sees_it():
  before = signal.getsignal(signal.SIGTERM)
  stop = cli.StopRequest().install()
  try:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop() and stop.signal_number == signal.SIGTERM
  finally:
    stop.uninstall()
  assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_group_held_is_let_go():
  rescue = cli.Rescue('nothing')
  rescue.hold(0, 3, lambda: 'saved')
  rescue.at_exit(0, lambda: pytest.fail('let go'))
  assert not rescue.nothing_to_lose
  rescue.let_go(0)
  assert rescue.nothing_to_lose and rescue.save() == 'nothing'
