"""What is installed: the binaries and the gin files, outside of a clone."""

import os
import re
import subprocess
import sys

import pytest
import tiny_run


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A directory as `pip install` would leave it in site-packages."""
  target = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-W', 'ignore', 'setup.py', '--quiet', 'egg_info']
  command += [f'--egg-base={tmp_path_factory.mktemp("info")}']
  subprocess.run(
      [*command, 'build_py', f'--build-lib={target}'],
      cwd=tiny_run.ROOT,
      check=True,
  )
  return target


def run(installed, directory, *command):
  done = subprocess.run(
      [sys.executable, *command],
      cwd=directory,
      env={**os.environ, 'PYTHONPATH': str(installed)},
      capture_output=True,
      text=True,
      timeout=600,
  )
  return done.returncode, done.stdout + done.stderr


def test_everything_that_a_binary_reads_is_installed(installed):
  """And nothing stands beside the package that another one may be named."""
  assert [p.name for p in installed.iterdir()] == ['codistill_jax']
  for ours, theirs in [
      ('gin_configs', 'gin_configs'),
      ('experiments', 'experiments'),
      ('codistill_jax', ''),
  ]:
    expected = {
        path.relative_to(tiny_run.ROOT / ours)
        for path in (tiny_run.ROOT / ours).rglob('*.*')
        if path.suffix in ('.gin', '.py', '.jinja', '.css')
    }
    home = installed / 'codistill_jax' / theirs
    assert all((home / path).exists() for path in expected), ours


def test_outside_of_a_clone_a_run_starts_its_groups(installed, tmp_path):
  """The gin file is found in the package, and the groups' binary, too."""
  status, output = run(
      installed,
      tmp_path,
      '-m',
      'codistill_jax.experiments.train_local',
      '--workdir=run',
      '--dry_run',
      '--cpu_replicas=1',
      '--gin_file=gin_configs/tasks/digits_resnet.gin',
      '--gin_file=gin_configs/ablations/bfloat16_exchange.gin',
  )
  assert status == 0, output
  assert 'dry run, nothing written' in output
  assert "publish_dtype = 'bfloat16'" in output


@pytest.mark.parametrize(
    'command, words',
    [
        ('status', '--workdir'),
        ('reproduce', '--study'),
        # A module in the working directory, not beside the script.
        ('train_group --workdir=x --gin_file=mine.gin', 'mine, imported'),
    ],
)
def test_a_console_script_is_named_after_its_binary(
    installed, tmp_path, command, words
):
  name, *arguments = command.split()
  script = tmp_path / 'bin' / f'codistill-{name}'
  script.parent.mkdir()
  script.write_text(
      'from codistill_jax.experiments import cli; cli.console()\n'
  )
  (tmp_path / 'mine.gin').write_text('import mine\n')
  (tmp_path / 'mine.py').write_text('raise ValueError("mine, imported")\n')
  status, output = run(installed, tmp_path, str(script), *arguments)
  assert status == 1 and words in output and 'Traceback' not in output


def test_the_binaries_do_not_ask_for_a_package_that_a_clone_alone_has():
  asking = [
      path.name
      for path in (tiny_run.ROOT / 'experiments').rglob('*.py')
      if re.search(r'^ *(from|import) experiments', path.read_text(), re.M)
  ]
  assert not asking  # Imports inside `experiments` are relative.
