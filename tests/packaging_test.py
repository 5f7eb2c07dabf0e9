"""What is installed: the binaries and the gin files, outside of a clone."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
import tiny_run

from experiments import cli

BINARIES = {
    path.stem
    for path in (tiny_run.ROOT / 'experiments').glob('*.py')
    if "if __name__ == '__main__'" in path.read_text()
}


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """A fresh environment with our wheel, made of our sdist.

  What else it needs it finds where this Python does: no network is needed, and
  what is installed there of ours, for editing, is not seen.
  """
  home = tmp_path_factory.mktemp('installed')
  tree, made = home / 'tree', home / 'made'
  for name in ('codistill_jax', 'experiments', 'gin_configs'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(tiny_run.ROOT / name, tree / name, ignore=ignored)
  for path in filter(os.path.isfile, tiny_run.ROOT.iterdir()):
    shutil.copy(path, tree)

  def build(kind, tree):
    code = (
        f'from setuptools import build_meta as b; b.build_{kind}({str(made)!r})'
    )
    command = [sys.executable, '-W', 'ignore', '-c', code]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return next(made.glob('*.tar.gz' if kind == 'sdist' else '*.whl'))

  made.mkdir()
  shutil.unpack_archive(build('sdist', tree), home / 'unpacked', filter='data')
  wheel = build('wheel', *(home / 'unpacked').iterdir())
  venv.create(home / 'env', symlinks=True)
  (site,) = (home / 'env').glob('lib/*/site-packages')
  (site / 'others.pth').write_text(sysconfig.get_path('purelib'))
  command = [sys.executable, '-m', 'pip', f'--python={home / "env"}', 'install']
  command += ['--quiet', '--no-index', '--no-deps']
  # The others may have an installation of ours among them.
  command += ['--ignore-installed', str(wheel)]
  subprocess.run(command, check=True)
  return home / 'env'


@pytest.fixture(scope='module')
def installed(environment):
  (site,) = environment.glob('lib/*/site-packages')
  return site


def run(environment, directory, binary, *arguments):
  clean = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  done = subprocess.run(
      [environment / 'bin' / f'codistill-{binary}', *arguments],
      cwd=directory,
      env=clean,
      capture_output=True,
      text=True,
      timeout=600,
  )
  return done.returncode, done.stdout + done.stderr


def test_everything_that_a_binary_reads_is_installed(installed, environment):
  """And nothing stands beside the package that another one may be named."""
  ours = [p.stem for p in installed.iterdir() if p.name.startswith('c')]
  assert sorted(ours) == ['codistill_jax', 'codistill_jax-0.2.0']
  for ours, theirs in [
      ('gin_configs', 'gin_configs'),
      ('experiments', 'experiments'),
      ('codistill_jax', ''),
  ]:
    expected = {
        path.relative_to(tiny_run.ROOT / ours)
        for path in (tiny_run.ROOT / ours).rglob('*.*')
        if path.suffix in ('.gin', '.py', '.jinja', '.css', '.svg', '.typed')
    }
    home = installed / 'codistill_jax' / theirs
    assert all((home / path).exists() for path in expected), ours
  scripts = {p.name for p in (environment / 'bin').glob('codistill-*')}
  assert scripts == {f'codistill-{name}' for name in BINARIES}


def test_in_an_empty_directory_20_steps_are_trained(environment, tmp_path):
  """Gin files and the group's binary are the package's, digits packaged too."""
  status, output = run(
      environment,
      tmp_path,
      'train_local',
      '--workdir=run',
      '--num_groups=1',
      '--noreport',
      '--cpu_replicas=1',
      '--gin_file=gin_configs/tasks/digits_resnet.gin',
      '--gin_file=gin_configs/ablations/bfloat16_exchange.gin',
      '--gin=STEPS=20',
      '--gin=experiment.Experiment.group_batch=8',
      '--gin=experiment.Experiment.eval_every=20',
  )
  assert status == 0, output
  assert [p.name for p in tmp_path.iterdir()] == ['run']
  assert (
      "publish_dtype = 'bfloat16'"
      in (tmp_path / 'run' / 'config.gin').read_text()
  )
  records = tmp_path / 'run' / 'groups' / 'group_0' / 'metrics.jsonl'
  assert '"step": 20,' in records.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    'command, words',
    [
        ('reproduce', '--study'),
        # A module in the working directory, not beside the script.
        ('train_group --workdir=x --gin_file=mine.gin', 'mine, imported'),
    ],
)
def test_a_console_script_is_named_after_its_binary(
    environment, tmp_path, command, words
):
  (tmp_path / 'mine.gin').write_text('import mine\n')
  (tmp_path / 'mine.py').write_text('raise ValueError("mine, imported")\n')
  status, output = run(environment, tmp_path, *command.split())
  assert status == 1 and words in output and 'Traceback' not in output


def test_the_binaries_do_not_ask_for_a_package_that_a_clone_alone_has():
  asking = [
      path.name
      for path in (tiny_run.ROOT / 'experiments').rglob('*.py')
      if re.search(r'^ *(from|import) experiments', path.read_text(), re.M)
  ]
  assert not asking  # Imports inside `experiments` are relative.


def test_a_package_of_an_extra_that_is_missing_is_one_line(installed, capsys):
  """Whatever binary needs it, and wherever it does."""
  (ours,) = importlib.metadata.distributions(path=[str(installed)])
  plain = lambda name: name.lower().replace('_', '-')
  modules = {}  # Of a distribution.
  for module, names in importlib.metadata.packages_distributions().items():
    for name in names:
      modules.setdefault(plain(name), []).append(module)
  extras = {}  # By the distribution that they install.
  for asked in ours.requires:
    found = re.fullmatch(r'([\w-]+).*extra == "(\w+)"', asked)
    if found and found[2] in ('data', 'clicks', 'images', 'report', 'export'):
      extras.setdefault(plain(found[1]), set()).add(found[2])
  # Another Python's environment has no TensorFlow.
  installed_here = extras.keys() & modules.keys()
  assert len(installed_here) > 8
  for name in installed_here:
    said = set()
    for module in modules[name]:
      status = cli.say(ModuleNotFoundError(name=f'{module}.part'))
      output = capsys.readouterr().err
      if status == cli.CLEAR_ERROR:
        (line,) = output.splitlines()
        said |= set(re.findall(r"pip install 'codistill_jax\[(\w+)\]'", line))
    assert said and said <= extras[name], name
