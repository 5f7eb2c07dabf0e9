"""Exit statuses and last lines, on which people and supervisors rely."""

import errno
import os
import subprocess
import sys

import pytest
import tiny_run

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
    'error', [TimeoutError('no peer'), OSError(errno.ENOSPC, 'disk full')]
)
def test_an_error_that_may_pass_says_so_by_its_status(error, capsys):
  assert status_of(error) == 75
  assert capsys.readouterr().err.startswith('error: ')


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


@pytest.mark.parametrize(
    'binary, flags, words',
    [
        ('train_group', ['--workdir=x', '--sede=3'], "flag 'sede'"),
        ('train_local', ['--workdir=x', '--num_groups=two'], '--num_groups'),
        ('evaluate', [], '--workdir'),
    ],
)
def test_a_wrong_flag_is_status_1_without_a_traceback(binary, flags, words):
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{binary}', *flags],
      cwd=tiny_run.ROOT,
      capture_output=True,
      text=True,
      timeout=600,
  )
  assert done.returncode == 1
  assert words in done.stderr
  assert 'Traceback' not in done.stderr
