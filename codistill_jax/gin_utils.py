"""Gin for the binaries: flags, one-line errors, dead bindings, saved config.

The only module that imports gin. Library code carries no decorators: config
files begin with `from __gin__ import dynamic_registration`.
"""

import codecs
import contextlib
import importlib
import inspect
import itertools
import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import gin
from absl import flags
from gin import config_parser

from codistill_jax.data import records
from codistill_jax.storage import files as files_lib
from codistill_jax.storage.files import PathLike

# The flags below belong to the binary that asks for them.
flags.disclaim_key_flags()

_HERE = pathlib.Path(__file__).resolve().parent
# What gin files are relative to: the package where it is installed, or a clone.
_ROOT = _HERE if (_HERE / 'gin_configs').is_dir() else _HERE.parent
_BASE = _ROOT / 'gin_configs' / 'base.gin'

# What older configurations bind, and the binding that took its place. Of those
# that are not here gin says that there is no such parameter.
RENAMED = {
    f'Experiment.{old}': f'exchange.{new}'
    for old, new in {
        'exchange_every': 'Checkpoints.every',
        'exchange_mode': 'Checkpoints.mode',
        'staleness': 'Checkpoints.staleness',
        'publish_dtype': 'Checkpoints.publish_dtype',
        'teacher_dtype': (
            'Checkpoints.teacher_dtype (or of exchange.FixedTeachers)'
        ),
        'max_staleness_steps': 'Checkpoints.max_staleness_steps',
        'staleness_policy': 'Checkpoints.staleness_policy',
        'topology': 'Checkpoints.topology (or of exchange.Predictions)',
        'topology_seed': (
            'Checkpoints.topology_seed (or of exchange.Predictions)'
        ),
        'exchange_timeout_seconds': 'Checkpoints.timeout_seconds',
        'teacher_runs': 'FixedTeachers.runs',
        'teacher_step': 'FixedTeachers.step',
        'prediction_top_k': 'Predictions.top_k',
    }.items()
}
# What a typed binding may name without a file that imports it.
_ALWAYS = """
from __gin__ import dynamic_registration
import optax
from codistill_jax import exchange
from codistill_jax import experiment
from codistill_jax import optimizers
from codistill_jax import schedules
"""
# What a config.gin that is read back may import, and where the functions and
# classes that it names may be defined: what makes a run, and writes nothing.
_IMPORTS = {'codistill_jax', 'flax', 'jax', 'optax'}
_PARTS = {
    'codistill_jax.baselines',
    'codistill_jax.data.clicks',
    'codistill_jax.data.images',
    'codistill_jax.data.tables',
    'codistill_jax.data.text',
    'codistill_jax.exchange.kinds',
    'codistill_jax.experiment',
    'codistill_jax.losses',
    'codistill_jax.models',
    'codistill_jax.optimizers',
    'codistill_jax.schedules',
    'flax.linen',
    'jax.lax',
    'jax.nn',
    'jax.numpy',
    'jax._src.nn',
    'optax',
}
_WITH_FILES = {'fromfile', 'load', 'save', 'savez', 'savez_compressed'}
_NO_PARAMETER = re.compile(
    r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'"
)

# Bindings of files, as text, of what was in use until a later file (or binding)
# of the same command line put something else in its place.
_superseded: set[str] = set()


def define_flags() -> None:
  """Defines `--gin_file` and the like, for a binary that parses them."""
  flags.DEFINE_multi_string(
      'gin_file',
      [],
      'Gin config file; repeatable, later files override earlier ones. Relative'
      ' to the working directory, or else to one of --gin_search_paths, or else'
      ' to the root of the project; its own gin_configs/ are found wherever it'
      ' is installed.',
  )
  flags.DEFINE_multi_string(
      'gin_search_paths',
      [],
      'Directory of gin files; repeatable. What a file includes is looked for'
      ' beside it, and then as --gin_file.',
  )
  flags.DEFINE_multi_string(
      'gin',
      [],
      'One gin binding, e.g. --gin="Experiment.num_steps=500"; repeatable,'
      ' overrides the files.',
  )
  flags.DEFINE_alias('gin_bindings', 'gin')


def parse_flags() -> None:
  """Parses `--gin_file` and `--gin`; raises ValueError on any mistake."""
  parse(*flag_values())


def flag_values() -> tuple[list[str], list[str]]:
  """Returns the files and bindings given by flags, for `parse`."""
  return list(flags.FLAGS.gin_file), list(flags.FLAGS.gin)


def _search_paths() -> list[str]:
  name = 'gin_search_paths'
  return list(flags.FLAGS[name].value or ()) if name in flags.FLAGS else []


def flag_arguments() -> list[str]:
  """Returns the gin flags of this process, to start another one alike."""
  files, bindings = flag_values()
  return [
      *(f'--gin_search_paths={path}' for path in _search_paths()),
      *(f'--gin_file={file}' for file in files),
      *(f'--gin={binding}' for binding in bindings),
  ]


def parse(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    *,
    saved: PathLike | None = None,
    trusted: Sequence[str] = (),
) -> None:
  """Makes files and bindings the configuration of this process.

  Args:
    files: Gin files, in order.
    bindings: `Configurable.argument=value` strings, applied last.
    saved: The config.gin of a run, which comes first. Whoever can write there
      wrote it: it may name what a model or a task is made of, and nothing else.
    trusted: Modules besides that it may name; those of `files` are.

  Raises:
    ValueError: If a file is missing, a name is unknown, a line does not parse,
      or a task comes after another file; one line, with the place.
  """
  gin.clear_config()
  _superseded.clear()
  if saved is not None:
    trusted = {*trusted, *imported_by(files)}
    with _one_line_errors(os.fspath(saved)):
      text = files_lib.read_text(saved)
      _check_names(text, trusted)
      gin.parse_config(text)
  for number, file in enumerate(files):
    _find(file)  # Else it is said that it is not there.
    with _one_line_errors(f'--gin_file={file}'), _superseding() as earlier:
      if _BASE in _parse_file(file, earlier) and number:
        raise ValueError(
            'a task, which undoes what the files before it bind; give it first'
        )
  for binding in bindings:
    with _one_line_errors(f'--gin={binding}'), _superseding():
      _register_names(binding)
      gin.parse_config(binding)
  _make_paths_absolute()
  # Files bring along what a swap puts out of use; what is typed is meant.
  _superseded.difference_update(map(_text, _bound_by(bindings)))


def _make_paths_absolute() -> None:
  """Binds absolute paths: a config.gin is read from other directories.

  A path is what the signature of its configurable says may be an `os.PathLike`.
  """
  statements = _bindings(gin.config_str())
  macros = {s.selector: s for s in statements if not s.arg_name}
  for s in statements:
    if s.arg_name and 'PathLike' in _annotation(s.selector, s.arg_name):
      s = macros.get(str(s.value).removeprefix('%'), s)
      key = _text(s).partition(' = ')[0]
      if not s.arg_name:
        key = f'{s.selector}/macro.value'
      if _is_path(s.value):
        gin.bind_parameter(key, files_lib.absolute(s.value))
      elif isinstance(s.value, list | tuple) and all(map(_is_path, s.value)):
        gin.bind_parameter(key, [files_lib.absolute(path) for path in s.value])


def _is_path(value: Any) -> bool:
  """Returns whether a value is a text, and no reference."""
  return isinstance(value, str) and value[:1] not in ('', '@', '%')


def _annotation(selector: str, argument: str) -> str:
  found = gin.get_configurable(selector)
  for kind in getattr(found, '__mro__', ()):
    if argument in vars(kind).get('__annotations__', ()):
      return str(vars(kind)['__annotations__'][argument])
  known = inspect.signature(found).parameters.get(argument)
  return str(known.annotation) if known else ''


def _parse_file(file: str, earlier: list['_Earlier']) -> list[pathlib.Path]:
  """Parses a file; returns it and all that it includes.

  Adds to `earlier` what was bound after each file that is included.

  An experiment is whole, and undoes what was bound before, if base.gin is among
  them. As what it puts out of use was in use until then, that would not be
  noticed as a dead binding.
  """
  found: list[pathlib.Path] = []
  within: list[pathlib.Path | None] = [None]
  theirs = gin.config.parse_config_file

  def parse(name: str, *args: Any) -> Any:
    path = _find(name, within[-1])
    if records.compression_of(path) or path.read_bytes()[:3] == codecs.BOM_UTF8:
      raise ValueError(
          f'{path} is compressed or begins with a mark of UTF-8; expected plain'
          ' text without one'
      )
    found.append(path.resolve())
    within.append(path)
    before = set(map(_text, _bindings(gin.config_str())))
    parsed = theirs(os.path.abspath(path), *args)
    within.pop()
    if within[-1]:
      bound = _bindings(gin.config_str())
      new = [s for s in bound if _text(s) not in before]
      earlier.append(_Earlier(bound, new))
    return parsed

  # Of a name that is relative gin would take the directory for a Python
  # package, import it, and fail.
  gin.config.parse_config_file = parse
  try:
    parse(file)
  finally:
    gin.config.parse_config_file = theirs
  return found


def imported_by(
    files: Sequence[str], within: pathlib.Path | None = None
) -> set[str]:
  """Returns the modules that gin files, and what they include, import.

  Args:
    files: Their names.
    within: The file that includes them; None: `--gin_file`.
  """
  found = set()
  for path in (_find(file, within) for file in files):
    for s in _statements(path.read_text()):
      if isinstance(s, config_parser.ImportStatement):
        found.add(s.module)
      elif isinstance(s, config_parser.IncludeStatement):
        found |= imported_by([s.filename], path)
  return {m for m in found if not m.startswith('__gin__')}


def _check_names(text: str, trusted: set[str]) -> None:
  """Raises ValueError if a saved configuration names anything but parts.

  Nothing is imported before all imports are known to be harmless, and nothing
  that it names is called.
  """
  advice = (
      'a config.gin is read as data, whoever wrote it; if it is yours, and that'
      ' is a module of your own, name it by --trust'
  )
  modules = {}
  delegate = _AsText()
  statements = list(config_parser.ConfigParser(text, delegate))
  for s in statements:
    if isinstance(s, config_parser.IncludeStatement):
      raise ValueError(f'it includes {s.filename!r}; {advice}')
    if not isinstance(s, config_parser.ImportStatement):
      continue
    if s.module.startswith('__gin__.'):
      continue
    if not _within(s.module, {*_IMPORTS, *trusted}):
      raise ValueError(f'it imports {s.module}; {advice}')
    module = importlib.import_module(s.module)
    whole = not s.is_from and not s.alias
    modules[s.module if whole else s.bound_name()] = module
  selectors = {
      s.selector
      for s in statements
      if isinstance(s, config_parser.BlockDeclaration)
      or (isinstance(s, config_parser.BindingStatement) and s.arg_name)
  }
  for name in selectors | delegate.references:
    first, _, last = name.rpartition('.')
    # Not what a module has imported itself, such as `os`.
    found = getattr(modules.get(first), last, None)
    home = getattr(found, '__module__', None) or ''
    known = callable(found) and _within(home, {*_PARTS, *trusted})
    if first != 'gin' and (not known or last in _WITH_FILES):
      raise ValueError(f'it names {name}, which is no part of a run; {advice}')


def _within(module: str, packages: set[str]) -> bool:
  return any(f'{module}.'.startswith(f'{package}.') for package in packages)


def _register_names(binding: str) -> None:
  """Makes known what a typed binding names in the modules of the files.

  And in those of `_ALWAYS`: a file knows what it imports, a binding nothing.
  """
  context = gin.config.ParseContext()
  for statement in (
      *_statements(_ALWAYS, config_parser.ImportStatement),
      *_statements(gin.config_str(), config_parser.ImportStatement),
  ):
    if (
        statement.module != '__gin__.dynamic_registration'
        or not context.imports
    ):
      context.process_import(statement)
  for s in _bindings(binding):
    for name in (s.selector, *_references([s])):
      # Else it may be a part of a name that is known.
      with contextlib.suppress(NameError, AttributeError):
        context.get_configurable(name)


def _bound_by(
    bindings: Sequence[str],
) -> Iterator[config_parser.BindingStatement]:
  """Yields the statements of the configuration that `--gin` makes."""
  typed = [s for binding in bindings for s in _bindings(binding)]
  for statement in _bindings(gin.config_str()):
    for s in typed:
      same = (s.scope, s.arg_name) == (statement.scope, statement.arg_name)
      # What is typed may leave out modules.
      if same and f'.{statement.selector}'.endswith(f'.{s.selector}'):
        yield statement


def _find(file: str, within: pathlib.Path | None = None) -> pathlib.Path:
  """Returns where a file is; `within`: the file that includes it."""
  beside = [within.parent] if within else []
  if within and _BASE.parent in within.resolve().parents:
    beside.append(_ROOT)  # Ours include ours, whatever the user's are called.
  places = [*beside, pathlib.Path.cwd()]
  places += [pathlib.Path(path).expanduser() for path in _search_paths()]
  places.append(_ROOT)
  for place in places:
    path = place / pathlib.Path(file).expanduser()
    if path.is_file():
      return path
  what = f'include {file!r}' if within else f'--gin_file={file}'
  looked = ', '.join(dict.fromkeys(map(str, places)))
  raise ValueError(f'{what}: no such file in any of: {looked}')


def headline(file: str) -> str:
  """Returns the comment that a gin file opens with: what it is for."""
  lines = itertools.takewhile(
      lambda line: line.startswith('#'),
      _find(file).read_text().splitlines(),
  )
  return ' '.join(line.lstrip('# ') for line in lines)


def make(configurable: Callable[..., Any], *args: Any) -> Any:
  """Calls `configurable` with the arguments that the configuration binds.

  Raises:
    ValueError: One line, if the configuration says nothing of it, or if it
      cannot be made as configured.
  """
  name = configurable.__qualname__
  try:
    configured = gin.get_configurable(configurable)
  except ValueError as e:
    raise ValueError(
        f'the configuration says nothing of {name}; give a task, such as'
        ' --gin_file=gin_configs/tasks/bible_lm.gin'
    ) from e
  return call(configured, *args)


def call(configured: Callable[..., Any], *args: Any) -> Any:
  """Calls what the configuration says; its errors become one line.

  Raises:
    ValueError: If it cannot be made as configured.
    OSError: If what it reads is not there.
  """
  try:
    return configured(*args)
  except TypeError as e:
    # A missing argument, or a value of the wrong kind.
    name = configured.__name__
    raise ValueError(f'configuration of {name}: {_first_line(e)}') from e
  except ValueError as e:
    # Gin appends where in the configuration the call was made.
    raise ValueError(_first_line(e)) from e
  except OSError as e:
    raise OSError(_first_line(e)) from e


@contextlib.contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
  try:
    yield
  except (
      OSError,
      ValueError,
      SyntaxError,
      NameError,
      AttributeError,
      TypeError,
      ImportError,
      RecursionError,
      MemoryError,
      tokenize.TokenError,
  ) as e:
    reason = str(e)
    if isinstance(e, SyntaxError):
      reason = f'line {e.lineno}: {e.msg}'
    found = _NO_PARAMETER.search(reason)
    if found:
      old = f'{found[1].split(".")[-1]}.{found[2]}'
      if old in RENAMED:
        reason = (
            f'{old} is now {RENAMED[old]};{reason[found.end():].lstrip(".")}'
        )
    if isinstance(e, ModuleNotFoundError):
      reason += (
          '; a module of your own is looked for in the working directory, and'
          ' on PYTHONPATH'
      )
    if 'No configurable matching' in reason:
      reason = (
          reason.rstrip('^ ')
          + '; write module.name, as @optax.sgd(), of a module that a'
          ' --gin_file imports'
      )
    raise ValueError(f'{where}: {" ".join(reason.split())}') from e


# Counts of steps: what has to be over by the last step of a run, and what
# should last as long as the run.
_OVER = {
    'boundaries',
    'max_staleness_steps',
    'ramp_steps',
    'transition_begin',
    'transition_steps',
    'warmup_steps',
}
_AS_LONG = {'decay_steps', 'total_steps'}


def steps_out_of(num_steps: int) -> list[str]:
  """Returns the bindings of counts of steps that do not suit a run.

  Such as those of schedules that end long before it, or after it.
  """
  statements = _bindings(gin.config_str())
  macros = {f'%{s.selector}': s.value for s in statements if not s.arg_name}
  used = {_key(s) for s in _bindings(gin.operative_config_str())}
  found = []
  for s in statements:
    value = macros.get(str(s.value), s.value)
    counts = value if isinstance(value, list | tuple) else [value]
    if s.arg_name not in _OVER | _AS_LONG or _key(s) not in used:
      continue
    if not all(isinstance(n, int) for n in counts):
      continue
    early = s.arg_name in _AS_LONG and max(counts) < 0.9 * num_steps
    if early or any(n > num_steps for n in counts):
      found.append(f'{s.selector}.{s.arg_name} = {value}')
  return found


def configuration() -> list[str]:
  """Returns the bindings, one normalised statement each, for comparison.

  Paths within the working directory are relative: it may lie elsewhere on
  another host.
  """
  here = os.path.join(os.getcwd(), '')
  return sorted(
      _text(s).replace(f"'{here}", "'") for s in _bindings(gin.config_str())
  )


class Configuration(NamedTuple):
  """The configuration of a run.

  Attributes:
    bindings: As of `configuration`.
    operative: As of `operative_configuration`.
  """

  bindings: list[str]
  operative: str


def current() -> Configuration:
  """Returns the configuration of this process as it is now."""
  return Configuration(configuration(), operative_configuration())


def operative_configuration() -> str:
  """Returns all parameters in force, with defaults; complete after a step."""
  return gin.operative_config_str()


def check_no_dead_bindings(but: Collection[str] = ()) -> None:
  """Raises ValueError if a binding acted nowhere; after the first step.

  Gin silently ignores a binding to something that nothing references: a
  misspelled ablation would be reported as a negative result. What one file
  binds and a later one has put out of use is not dead: the sizes of a model
  that another replaces.

  Args:
    but: Statements, as of `configuration`, that need not act.
  """
  used = {_key(s) for s in _bindings(gin.operative_config_str())}
  bindings = _bindings(gin.config_str())
  # They are made where training begins, and of several processes in one.
  writers = _references(s for s in bindings if s.arg_name == 'writers')
  dead = [
      s
      for s in bindings
      if _key(s) not in used
      and s.selector not in writers
      and _text(s) not in {*_superseded, *but}
  ]
  if dead:
    raise ValueError(
        f'gin binding {_text(dead[0])!r} acts nowhere: nothing in this'
        ' configuration uses it; remove it, or reference it with @'
    )


class _Earlier(NamedTuple):
  """All bindings at some time, and those that a later file may supersede."""

  bound: list[config_parser.BindingStatement]
  of_file: list[config_parser.BindingStatement]


@contextlib.contextmanager
def _superseding() -> Iterator[list[_Earlier]]:
  """Notes whose bindings the configuration parsed inside puts out of use.

  Those from before, and those that are added to the list meanwhile.
  """
  before = _bindings(gin.config_str())
  earlier = [_Earlier(before, before)]
  yield earlier
  after = _bindings(gin.config_str())
  for bound, of_file in earlier:
    gone = _no_longer_referenced(bound, after)
    _superseded.update(_text(s) for s in of_file if s.selector in gone)


def _no_longer_referenced(
    before: list[config_parser.BindingStatement],
    after: list[config_parser.BindingStatement],
) -> set[str]:
  """Selectors that only `before` has in use, and what only they refer to."""
  gone: set[str] = set()
  while True:
    left = _references(s for s in after if s.selector not in gone)
    newly = _references(before) - left
    if newly <= gone:
      return gone
    gone |= newly


def _references(
    statements: Iterable[config_parser.BindingStatement],
) -> set[str]:
  """Returns selectors, without scopes, of the @references in the values."""
  found: set[str] = set()
  for statement in statements:
    references = re.findall(r'@([\w./]+)', str(statement.value))
    found.update(name.split('/')[-1] for name in references)
  return found


class _AsText(config_parser.ParserDelegate):
  """Leaves references and macros as text; notes what is referred to."""

  def __init__(self):
    self.references = set()

  def configurable_reference(self, scoped_name, evaluate):
    self.references.add(scoped_name.split('/')[-1])
    return f'@{scoped_name}' + ('()' if evaluate else '')

  def macro(self, scoped_name):
    return f'%{scoped_name}'


def _bindings(text: str) -> list[config_parser.BindingStatement]:
  return _statements(text, config_parser.BindingStatement)


def _statements(text: str, kind: Any = tuple) -> list[Any]:
  parser = config_parser.ConfigParser(text, _AsText())
  return [s for s in parser if isinstance(s, kind)]


def _key(statement: config_parser.BindingStatement) -> tuple[str, str, str]:
  return (statement.scope, statement.selector, statement.arg_name)


def _text(statement: config_parser.BindingStatement) -> str:
  scope = f'{statement.scope}/' if statement.scope else ''
  name = f'.{statement.arg_name}' if statement.arg_name else ''
  return f'{scope}{statement.selector}{name} = {statement.value!r}'


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()[0] if str(error) else repr(error)
  # A value of somebody's config.gin may be a page of text.
  return text if len(text) < 1000 else f'{text[:400]} ... {text[-400:]}'
