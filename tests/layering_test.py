"""Imports go one way, and importing the package loads nothing heavy."""

import ast
import functools
import graphlib
import os
import pathlib
import subprocess
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What each module may import of the package. data/* and models/* are below;
# a new module gets a line here.
_METRICS = {'base', 'scores', 'metrics'}
_LOSSES = _METRICS | {'losses', 'schedules'}
_STEP = _LOSSES | {'blocks', 'flops', 'parts', 'predictions', 'step'}
_METHOD = _STEP | {'replicas', 'baselines.method'}
_FILES = {'storage.files', 'storage.remote'}
_RECORDS = _FILES | {'base', 'storage.records'}
_TREES = _RECORDS | {'storage.orbax_noise', 'storage.steps'}
_SAVER = {'storage.saver', 'storage.troubles'}
_STORAGE = _TREES | {'storage.trees'}
_PROTOCOL = _STORAGE | {'exchange.publications', 'exchange.topology'}
_PLAN = _PROTOCOL | {'exchange.protocol'}
_EXCHANGE = _PLAN | {'storage.background', 'storage.troubles'}
_READING = _EXCHANGE | {'exchange.fetcher', 'exchange.teaching'}
MAY_IMPORT = {
    'base': set(),
    'losses': {'base'},
    'schedules': {'base'},
    'optimizers': {'base'},
    'scores': {'base'},
    'flops': {'base'},
    'peaks': set(),
    'metrics': {'base', 'scores'},
    'statistics': set(),
    'blocks': {'base'},
    'predictions': {'base', 'losses'},
    'objectives': {'base', 'losses'},
    'parts': {'base', 'flops'},
    'step': _LOSSES | {'blocks', 'flops', 'parts', 'predictions'},
    'replicas': _STEP,
    'population': _STEP | {'replicas'},
    'joint': {'base', 'population'},
    'storage': set(),
    'storage.files': set(),
    'storage.locks': set(),
    'storage.orbax_noise': set(),
    'storage.background': set(),
    'storage.troubles': set(),
    'storage.remote': {'storage.files'},
    'storage.records': {'base', 'storage.remote'},
    'storage.steps': _FILES,
    'storage.trees': _TREES,
    'storage.saver': {'storage.troubles'},
    'storage.checkpoint': _STORAGE | _SAVER,
    'storage.holders': {'storage.files'},
    'storage.leases': {'storage.files', 'storage.holders'},
    'storage.appender': {'storage.files', 'storage.troubles'},
    'exchange': set(),
    'exchange.topology': set(),
    'exchange.publications': _STORAGE,
    'exchange.protocol': _PROTOCOL,
    'exchange.memory_exchange': _EXCHANGE,
    'exchange.prediction_exchange': _PLAN,
    'exchange.fixed_teachers': _PLAN | {'run_directory', 'storage.files'},
    'exchange.publisher': _EXCHANGE | {'storage.leases'},
    'exchange.teaching': _PLAN,
    'exchange.fetcher': _EXCHANGE | {'exchange.publisher', 'exchange.teaching'},
    'exchange.fetching': _READING,
    'exchange.checkpoint_exchange': (
        _READING | {'exchange.fetching', 'exchange.publisher', 'storage.leases'}
    ),
    # Through the protocol: the loop knows no kind of exchange.
    'group': {'base', 'exchange.protocol'},
    'evaluate': _METRICS,
    'run_directory': {'storage.files'},
    'writers': {
        'run_directory',
        'storage.appender',
        'storage.files',
        'storage.troubles',
    },
    'tensorboard': {'storage.appender', 'storage.troubles', 'writers'},
    'gin_utils': set(),
    'baselines': set(),
    'baselines.method': _STEP | {'replicas'},
    'baselines.turns': {'base'},
    'baselines.async_sgd': _METHOD | {'baselines', 'baselines.turns'},
    'baselines.diloco': _METHOD,
    'experiment_checks': _METHOD | {'objectives'},
    'experiment': (
        _METHOD
        | {'experiment_checks', 'objectives', 'population', 'replicas'}
        | {'exchange.protocol', 'exchange.topology'}
        | {'exchange.fixed_teachers'}
    ),
}
PACKAGES = ('data', 'models')  # Base, locks, and their own modules downwards.
HEAVY = ('tensorflow', 'tensorflow_text', 'datasets', 'PIL', 'sklearn')
# Imported late too, though lighter.
LATE = (
    'fastwarc',
    'pandas',
    'py3langid',
    'sentencepiece',
    'tensorboardX',
)


@functools.cache
def tree_of(path):
  return ast.parse(path.read_text(), str(path))


def sources(*directories):
  found = [p for d in directories for p in sorted((ROOT / d).rglob('*.py'))]
  assert found
  return found


def name_of(path):
  """codistill_jax/data/text.py -> codistill_jax.data.text."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in sources('codistill_jax')}


def imports(path, top_level=False):
  """Full names of what a file imports; also inside functions, unless told."""
  tree = tree_of(path)
  for node in _outside_functions(tree) if top_level else ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: write absolute imports'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _outside_functions(node):
  yield node
  if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
    for child in ast.iter_child_nodes(node):
      yield from _outside_functions(child)


def internal(path):
  """The modules of the package that a file imports, without its name."""
  for name in imports(path):
    if name.split('.')[0] == 'codistill_jax':
      while name not in MODULES:  # An object of a module.
        name = name.rpartition('.')[0]
      yield name.removeprefix('codistill_jax').removeprefix('.')


def files_with(directories, matches):
  """Paths, from the root, of the files in which `matches` finds something."""
  return {
      path.relative_to(ROOT).as_posix()
      for path in sources(*directories)
      if matches(path)
  }


def importing(*packages):
  return lambda path: any(
      name.split('.')[0] in packages for name in imports(path)
  )


def using(*names):
  """Files that take one of these names from anywhere, by dot or by import."""

  def matches(path):
    if any(name.split('.')[-1] in names for name in imports(path)):
      return True
    return any(
        isinstance(node, ast.Attribute) and node.attr in names
        for node in ast.walk(tree_of(path))
    )

  return matches


@pytest.mark.parametrize('module', [name for name in MODULES if '.' in name])
def test_imports_go_one_way(module):
  path = MODULES[module]
  name = module.removeprefix('codistill_jax.')
  package = name.split('.')[0]
  if package in PACKAGES:
    wrong = {
        found
        for found in internal(path)
        if found != 'storage.locks'
        and found.split('.')[0] not in ('base', package)
    }
  else:
    assert name in MAY_IMPORT, f'say in layering_test.py what {name} imports'
    wrong = set(internal(path)) - MAY_IMPORT[name]
  assert not wrong


def test_the_rules_themselves_have_no_circle_and_name_no_ghost():
  graphlib.TopologicalSorter(MAY_IMPORT).prepare()
  allowed = set(MAY_IMPORT).union(*MAY_IMPORT.values())
  assert {f'codistill_jax.{name}' for name in allowed} <= MODULES.keys()


def test_there_is_no_circle_of_imports():
  graph = {
      name.removeprefix('codistill_jax').removeprefix('.'): set(internal(path))
      for name, path in MODULES.items()
  }
  # Importing the names of a package's __init__ counts, its own modules do not.
  graphlib.TopologicalSorter(graph).prepare()


def test_nothing_in_the_package_imports_the_binaries_or_the_tests():
  outside = importing('experiments', 'tests', 'benchmarks', 'pytest')
  assert files_with(['codistill_jax'], outside) == set()


@pytest.mark.parametrize(
    'package, home', [('orbax', 'storage/trees'), ('gin', 'gin_utils')]
)
def test_one_module_knows_orbax_and_one_gin(package, home):
  found = files_with(['codistill_jax', 'experiments'], importing(package))
  assert found == {f'codistill_jax/{home}.py'}


@pytest.mark.parametrize(
    'name, homes',
    [
        ('pmap', {'replicas'}),
        # Groups on a mesh: what goes with `pmap` is not what goes with this.
        ('shard_map', {'population'}),
        ('grad', {'step'}),
        # Gradients made by hand, for speed or memory, of those of their parts.
        ('custom_vjp', {'blocks', 'models/products', 'models/recurrence'}),
        ('value_and_grad', {'blocks'}),
        ('vjp', {'models/recurrence'}),
    ],
)
def test_one_module_has_pmap_and_one_differentiates(name, homes):
  found = files_with(['codistill_jax', 'experiments'], using(name))
  assert found == {f'codistill_jax/{home}.py' for home in homes}


def test_heavy_packages_are_imported_where_they_are_used():
  def at_the_top(path):
    found = {name.split('.')[0] for name in imports(path, top_level=True)}
    return not found.isdisjoint({*HEAVY, *LATE})

  assert files_with(['codistill_jax', 'experiments'], at_the_top) == set()
  # Or the names above are none that anything imports.
  anywhere = files_with(['codistill_jax', 'experiments'], importing(*HEAVY))
  assert anywhere


def run_python(python, code):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(
      [python, '-c', textwrap.dedent(code)],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
  )
  assert done.returncode == 0, done.stderr[-4000:]


def test_importing_the_package_loads_nothing_heavy(python):
  run_python(
      python,
      f"""
      import sys
      import codistill_jax
      found = sorted(set({HEAVY}) & set(sys.modules))
      assert not found, found
      assert 'gin' not in sys.modules and 'matplotlib' not in sys.modules
      """,
  )


def test_a_machine_without_heavy_packages_imports_every_module(python):
  modules = [*MODULES, 'experiments.train_group']
  run_python(
      python,
      f"""
      import importlib, sys
      for name in {HEAVY}:
        sys.modules[name] = None  # An import raises, as if it were missing.
      for name in {modules}:
        importlib.import_module(name)
      import jax
      # Fails if an import has used a device: a group of several processes
      # could then no longer be started.
      jax.config.update('jax_num_cpu_devices', 3)
      assert jax.device_count() == 3
      """,
  )


def test_the_rules_would_notice(tmp_path):
  # A file that breaks them all, each in the way that is easiest to overlook.
  path = tmp_path / 'bad.py'
  path.write_text(textwrap.dedent("""
          import jax
          from jax import pmap as parallel
          if True:
            import datasets
          def f():
            from orbax import checkpoint
            return jax.grad(f)
      """))
  assert importing('orbax')(path) and importing('datasets')(path)
  assert using('pmap')(path) and using('grad')(path)
  assert 'datasets' in list(imports(path, top_level=True))
  assert 'orbax.checkpoint' not in list(imports(path, top_level=True))
