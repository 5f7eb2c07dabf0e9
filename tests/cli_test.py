"""Exit statuses and last lines, on which people and supervisors rely.

And a signal ends a process soon, also one whose main thread is inside C code.
"""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import tiny_run
from absl import flags
from waits import PATIENCE

from codistill_jax.storage import leases
from experiments import cli


def status_of(error, argv=('binary',)):
  def main(argv):
    if error is not None:
      raise error

  return cli.status_of(main, list(argv))


@pytest.mark.parametrize(
    'error',
    [
        ValueError('a wrong\n  value'),
        FileNotFoundError('a wrong value'),
        ConnectionError('a wrong value'),
        FloatingPointError('a wrong value'),
    ],
)
def test_a_clear_error_is_one_line_and_status_1(error, capsys):
  assert status_of(error) == 1
  assert capsys.readouterr().err == 'error: a wrong value\n'


@pytest.mark.parametrize(
    'error',
    [
        TimeoutError('no peer'),
        OSError(errno.ENOSPC, 'disk full'),
        leases.HeldError('process 7 is at it'),
        leases.LostError('process 7 has taken over'),
    ],
)
def test_an_error_that_may_pass_says_so_by_its_status(error, capsys):
  assert status_of(error) == 75
  assert capsys.readouterr().err.startswith('error: ')


@pytest.mark.parametrize(
    'code, below, elsewhere',
    [
        *((c, 75, 75) for c in (errno.ENOTCONN, errno.EREMOTEIO, errno.ENODEV)),
        *(
            (c, 75, 75)
            for c in (errno.EKEYEXPIRED, errno.EHOSTDOWN, errno.EINTR)
        ),
        *((c, 75, 1) for c in (errno.EACCES, errno.EPERM, errno.ENOENT)),
        *((c, 1, 1) for c in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)),
    ],
)
def test_below_the_run_directory_a_refusal_may_pass(
    code, below, elsewhere, monkeypatch, tmp_path
):
  places = {x: str(tmp_path / x) for x in ('workdir', 'exchange_dir')}
  workdir = types.SimpleNamespace(**places)
  monkeypatch.setattr(cli.flags, 'FLAGS', workdir)
  inside = os.path.join(workdir.workdir, 'groups', 'a')
  if code != errno.ENOENT:  # In the middle of a read a path is not named.
    assert status_of(OSError(code, 'no')) == below
  for error in (
      OSError(code, 'no', inside),
      OSError(code, 'no', os.path.join(workdir.exchange_dir, 'group_0')),
      OSError(code, f'{inside} cannot be read: no'),
  ):
    assert status_of(error) == below
  assert status_of(OSError(code, 'no', str(tmp_path / 'data'))) == elsewhere
  monkeypatch.setattr(cli.flags, 'FLAGS', types.SimpleNamespace())
  assert status_of(OSError(code, 'no', inside)) == elsewhere


@pytest.mark.parametrize('error', [RuntimeError('deep'), KeyError('k')])
def test_a_crash_has_its_traceback_and_another_status(error, capsys):
  assert status_of(error) == cli.CRASH == 70
  assert 'Traceback' in capsys.readouterr().err


def test_a_stop_has_the_status_of_its_signal(capsys):
  assert status_of(cli.Stopped('saved', 15)) == 143
  assert status_of(cli.Stopped('saved', 2)) == 130
  assert status_of(KeyboardInterrupt()) == 130
  assert capsys.readouterr().err == 'saved\nsaved\n'


def test_the_end_is_status_0():
  assert status_of(None) == 0


def test_an_argument_that_is_no_flag_is_an_error(capsys):
  assert status_of(None, ['binary', 'seed=3']) == 1
  assert "unexpected argument 'seed=3'" in capsys.readouterr().err


@pytest.mark.parametrize('error, status', [(None, 0), ('ValueError("x")', 1)])
def test_a_log_on_a_full_disk_does_not_change_the_status(error, status):
  """Nothing that is said reaches /dev/full."""
  code = (
      'import sys\n'
      'from experiments import cli\n'
      'def main(argv):\n'
      '  sys.stdout.write("said, and lost when python ends")\n'
      '  cli.tell("said, and lost at once")\n'
      f'  if {error}: raise {error}\n'
      'cli.run(main)\n'
  )
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tiny_run.ROOT,
        stdout=full,
        stderr=full,
        env={**os.environ, 'PYTHONUNBUFFERED': ''},
        timeout=600,
    )
  assert done.returncode == status


# A flag that none has, a value of another kind, one out of range, one that is
# missing, one given twice, one of no use: each binary has one of them. And a
# character that the terminal cannot show, where it is repeated.
BAD_FLAGS = {
    'churn': (['--prediction_é=a.csv'], r"flag 'prediction_\xe9'"),
    'evaluate': ([], '--workdir'),
    'export': (['--output=x'], '--workdir'),
    'launch': (['--workdir=x', '--cluster=Ж'], r'--cluster=\u0416'),
    'prepare_clicks': (['--output=x'], '--source is missing'),
    'prepare_data': (['--output=x', '--vocab_size=Ж'], r'--vocab_size=\u0416'),
    'report': (['--workdir=/né\x1b[2J'], r'directory at /n\xe9\x1b[2J;'),
    'reproduce': (['--study=né'], r'--study=n\xe9'),
    'sample': (['--workdir=/né'], r'No run directory at /n\xe9'),
    'status': (['--workdir=/né'], r'No run directory at /n\xe9'),
    'train_group': (['--workdir=x', '--group_id=2'], 'group_id=2'),
    'train_local': (['--workdir=/a', '--workdir=/é'], 'already defined as /a'),
    'train_lockstep': (['--workdir=x', 'é=3'], r"unexpected argument '\xe9="),
}


def test_every_binary_has_a_bad_flag():
  found = (tiny_run.ROOT / 'experiments').glob('*.py')
  binaries = [p for p in found if "if __name__ == '__main_" in p.read_text()]
  assert {p.stem for p in binaries} == set(BAD_FLAGS)


# Each in a process of its own; what takes seconds is to import jax.
_EACH = """
import importlib, json, os, runpy, sys, warnings
warnings.simplefilter('ignore')  # Of a fork beside the threads of jax.
names = [f'experiments.{name}' for name in json.loads(sys.argv[1])]
all(map(importlib.import_module, names))
for name, arguments in zip(names, json.loads(sys.argv[1]).values()):
  child = os.fork()
  if not child:
    sys.argv[1:] = arguments
    os.dup2(os.open(f'{sys.argv[0]}/{name}', os.O_CREAT | os.O_WRONLY), 2)
    del sys.modules[name]
    runpy.run_module(name, run_name='__main__', alter_sys=True)
    os._exit(0)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_bad_flag_is_status_1_without_a_traceback(tmp_path):
  given = {name: arguments for name, (arguments, _) in BAD_FLAGS.items()}
  code = _EACH.replace('{sys.argv[0]}', str(tmp_path))
  done = subprocess.run(
      [sys.executable, '-c', code, json.dumps(given)],
      cwd=tiny_run.ROOT,
      capture_output=True,
      text=True,
      env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
      timeout=600,
  )
  for name, (_, words) in BAD_FLAGS.items():
    said = (tmp_path / f'experiments.{name}').read_text()
    assert words in said, name
    assert 'Traceback' not in said and '\x1b' not in said
  assert done.stdout.split()[-len(given) :] == ['1'] * len(given)


# --- Flags --------------------------------------------------------------------


def project_flags():
  """The names of the flags of this project, by the module that has them."""
  return {
      module: {flag.name for flag in found}
      for module, found in flags.FLAGS.flags_by_module_dict().items()
      if module.startswith(('experiments', 'codistill_jax')) and found
  }


@pytest.fixture(params=sorted(BAD_FLAGS))
def binary(request):
  """A binary, with its flags defined."""
  name = f'experiments.{request.param}'
  module = importlib.import_module(name)
  assert not project_flags()  # An import defines none.
  try:
    module.define_flags()
    cli.check_flags()
    yield name
  finally:
    for found in project_flags().values():
      for flag in found:
        delattr(flags.FLAGS, flag)


def test_a_binary_has_the_flags_that_its_help_shows_and_no_others(binary):
  assert set(project_flags()) == {binary}
  shown = {f.name for f in flags.FLAGS.get_key_flags_for_module(binary)}
  assert shown == project_flags()[binary]


def parses(flag, text):
  try:
    flag.parser.parse(text)
  except ValueError:
    return False
  return True


def test_a_flag_of_one_value_is_given_once(binary):
  once = [flags.FLAGS[name] for name in project_flags()[binary]]
  once = [
      flag
      for flag in once
      if not isinstance(flag, flags.MultiFlag)
      and not flag.help.startswith('Alias for --gin')  # Which is repeatable.
  ]
  assert once or binary.endswith('status')
  for flag in once:
    value = getattr(flag.parser, 'enum_values', None) or [
        'true',
        '2',
        '1',
        '2:3',
    ]
    (value,) = [v for v in value if parses(flag, v)][:1]
    flag.parse(value)
    with pytest.raises(flags.IllegalFlagValueError, match='already defined'):
      flag.parse(value)


def test_no_number_is_nan(binary):
  for name in project_flags()[binary]:
    flag = flags.FLAGS[name]
    if isinstance(flag.parser, flags.FloatParser):
      flag.parse('nan')
      with pytest.raises(flags.IllegalFlagValueError, match=f'{name}=.*NaN'):
        flags.FLAGS.validate_all_flags()
      flag.unparse()


def test_steps_to_profile_are_two_in_order(binary):
  trains = binary.partition('.')[2].startswith(('train_', 'launch'))
  assert ('profile_steps' in project_flags()[binary]) == trains
  for value in ['20:10', '10', '10:', '3:3', '-1:4', 'a:b'] if trains else ():
    with pytest.raises(flags.IllegalFlagValueError, match=r'profile_steps=.*:'):
      flags.FLAGS['profile_steps'].parse(value)


# All of these, and `name=path` or lists with commas, where they are taken.
PATHS = (
    'checksums',
    'compile_cache',
    'init_from',
    'labels',
    'output',
    'paragraph_ids',
    'step_times',
)
PATHS += ('tokenizer', 'workdir')


def test_paths_are_absolute_know_home_and_leave_object_stores_alone(
    binary, monkeypatch
):
  monkeypatch.setenv('HOME', '/home/me')
  found = project_flags()[binary] & {*PATHS}
  assert found
  for name in found:
    flag = flags.FLAGS[name]
    if binary.split('.')[1] in ('status', 'report') and name == 'workdir':
      continue  # See `split_commas` and `load_arms`.
    for given, meant in (
        ('~/a b', '/home/me/a b'),
        ('a/../b', os.path.abspath('b')),
        ('/a', '/a'),
        ('s3://a/~', 's3://a/~'),
        ('gs://a', 'gs://a'),
    ):
      flag.unparse()
      flag.parse(given)
      assert flag.value in (meant, [meant]), name


# --- The request to stop ------------------------------------------------------

# `sleep` of the C library: as during a compilation, Python runs no handler to
# the end of which the main thread would come.
_PROLOGUE = """
import ctypes, sys, time
from experiments import cli
def stuck():
  while True:
    ctypes.CDLL(None).sleep(1000)
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

  def send(self, number=signal.SIGTERM):
    self._process.send_signal(number)

  def end(self, seconds=PATIENCE):
    """Returns status and output; None if it is still there."""
    try:
      output, _ = self._process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      return None
    return self._process.returncode, output

  def end_by_repeating(self, number):
    """As `end`, with one signal after another."""
    for _ in range(100):
      self.send(number)
      found = self.end(0.4)
      if found is not None:
        return found
    self._process.kill()
    pytest.fail('no signal ends it')


@pytest.mark.parametrize(
    'number, status',
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
    ],
)
def test_with_nothing_to_lose_a_stuck_process_leaves_soon(number, status):
  script = Script("""
cli.StopRequest('nothing lost', 1000.0).install()
ready()
stuck()
""")
  script.send(number)
  assert script.end() == (status, 'nothing lost\n')


def test_after_the_grace_period_a_stuck_process_says_what_it_loses():
  script = Script("""
stop = cli.StopRequest('nothing lost', 0.2).install()
stop.unsaved['run/group_3'] = 40
ready()
stuck()
""")
  script.send()
  status, output = script.end()
  assert status == cli.MAY_PASS
  assert output.startswith('error: ') and 'step 40 of run/group_3' in output


def test_who_polls_within_the_grace_period_takes_the_time_it_needs():
  script = Script("""
stop = cli.StopRequest('nothing lost', 2.0).install()
stop.unsaved['group_0'] = 7
ready()
while not stop():
  time.sleep(0.01)
time.sleep(2.5)  # Saves.
print('saved', stop.signal_number)
sys.exit(3)
""")
  script.send(signal.SIGINT)
  assert script.end() == (3, 'saved 2\n')


def test_who_polls_before_it_can_leave_has_another_grace_period():
  """An evaluation of a group, of which others have not come as far."""
  script = Script("""
from experiments.running import job
stop = cli.StopRequest('nothing lost', 2.0).install()
stop.unsaved['group_0'] = 7
latch = job.Latch(stop)
ready()
while stop.signal_number is None:
  time.sleep(0.01)
end = time.monotonic() + 5.0
while time.monotonic() < end:
  assert not latch()
  time.sleep(0.01)
latch.update()
print('saves', latch())
""")
  script.send()
  assert script.end() == (0, 'saves True\n')


def test_an_update_that_ends_after_the_signal_has_a_grace_period():
  """The first one: while it compiled there was nothing to lose."""
  script = Script("""
stop = cli.StopRequest('nothing lost', 1000.0).install()
ready()
while stop.signal_number is None:
  time.sleep(0.01)
stop.unsaved['group_0'] = 0
time.sleep(2.0)
print('saves', stop())
""")
  script.send()
  assert script.end() == (0, 'saves True\n')


def test_a_poll_in_another_thread_is_not_the_main_thread_coming():
  script = Script("""
import threading
stop = cli.StopRequest('nothing lost', 0.2).install()
stop.unsaved['group_0'] = 7
def poll():
  while True:
    stop()
    time.sleep(0.01)
threading.Thread(target=poll, daemon=True).start()
ready()
stuck()
""")
  script.send()
  assert script.end()[0] == cli.MAY_PASS


@pytest.mark.parametrize('line', ['"nothing lost"', 'None'])
def test_signals_go_on_for_a_second_and_then_it_leaves_at_once(line):
  """All processes of a job are signalled; and each by its supervisor."""
  script = Script(f"""
stop = cli.StopRequest({line}, 1000.0).install()
stop.unsaved['group_0'] = 7
ready()
while not stop():
  time.sleep(0.01)
time.sleep(0.5)
print('not yet', flush=True)
stuck()
""")
  status, output = script.end_by_repeating(signal.SIGTERM)
  assert status == cli.MAY_PASS
  first, last = output.splitlines()
  assert first == 'not yet' and 'step 7 of group_0' in last


def test_without_a_line_it_only_is_a_flag():
  """A supervisor ends its children in its own time."""
  script = Script("""
stop = cli.StopRequest().install()
ready()
time.sleep(1.5)
print(stop(), stop.signal_number)
""")
  script.send()
  assert script.end() == (0, 'True 15\n')


def test_signals_are_given_back_when_a_main_function_ends():
  before = [signal.getsignal(n) for n in cli.SIGNALS]

  def main(argv):
    cli.StopRequest('stopped').install()
    raise ValueError('wrong')

  assert cli.status_of(main, ['binary']) == 1
  assert [signal.getsignal(n) for n in cli.SIGNALS] == before


def test_a_poll_right_after_the_signal_sees_it_and_uninstall_gives_it_back():
  before = [signal.getsignal(n) for n in cli.SIGNALS]
  stop = cli.StopRequest().install()
  try:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop() and stop.signal_number == signal.SIGTERM
  finally:
    stop.uninstall()
  assert [signal.getsignal(n) for n in cli.SIGNALS] == before


def test_a_line_is_logged_once():
  """Though something was logged at an import, as orbax does."""
  code = (
      'from absl import logging; logging.vlog(1, "early")\n'
      'from experiments import cli\n'
      'cli.run(lambda argv: logging.warning("late"))\n'
  )
  done = subprocess.run(
      [sys.executable, '-c', code],
      cwd=tiny_run.ROOT,
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0 and done.stderr.count('late') == 1, done.stderr
