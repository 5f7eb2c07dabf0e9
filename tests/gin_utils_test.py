"""Configuration: one-line errors, nothing dead, the same text every time."""

import contextlib
import gzip
import os

import configurables
import numpy as np
import pytest
from absl import flags

from codistill_jax import experiment, gin_utils

_IMPORTS = """\
from __gin__ import dynamic_registration
import configurables
"""
_CONFIG = _IMPORTS + """
configurables.Root.value = @configurables.leaf()
configurables.leaf.size = 3
"""


@pytest.fixture(autouse=True)
def clean():
  yield
  gin_utils.parse([])


def write(tmp_path, text, name='config.gin'):
  path = tmp_path / name
  path.write_text(text)
  return str(path)


def make_root():
  return gin_utils.make(configurables.Root)


def configured(tmp_path, *bindings, text=_CONFIG):
  gin_utils.parse([write(tmp_path, text)], bindings)
  return make_root()


def test_bindings_override_files_and_later_files_earlier_ones(tmp_path):
  first = write(tmp_path, _CONFIG, 'a.gin')
  second = write(tmp_path, _CONFIG + 'configurables.leaf.size = 4\n', 'b.gin')
  gin_utils.parse([first, second])
  assert make_root().value == (4, 'x')
  gin_utils.parse([second, first])
  assert make_root().value == (3, 'x')
  gin_utils.parse([first, second], ['leaf.size=5', "leaf.name='y'"])
  assert make_root().value == (5, 'y')
  gin_utils.parse([first])  # Nothing is left of what was parsed before.
  assert make_root().value == (3, 'x')


def test_files_of_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  gin_utils.parse(['gin_configs/base.gin'])
  assert 'experiment.Experiment.seed = 0' in gin_utils.configuration()


LEAF = _IMPORTS + 'configurables.leaf.size = {}\n'


def written(directory, **texts):
  """Writes files by name, `__` for a `/`."""
  for name, text in texts.items():
    path = directory / f'{name.replace("__", "/")}.gin'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_file_includes_what_lies_beside_it(tmp_path, monkeypatch, caplog):
  """From anywhere, and that in turn; where no directory is a package."""
  written(
      tmp_path / 'a',
      mine=_CONFIG + "include 'sub/one.gin'\n",
      sub__one="include 'two.gin'\ninclude '../three.gin'\n",
      sub__two=_IMPORTS + "configurables.leaf.name = 'y'\n",
      three=LEAF.format(7),
  )
  written(tmp_path / 'b', sub__one='', two='', three='')
  monkeypatch.syspath_prepend(tmp_path / 'b')
  for here, file in [('a', 'mine.gin'), ('b', '../a/mine.gin')]:
    monkeypatch.chdir(tmp_path / here)
    gin_utils.parse([file])
    assert make_root().value == (7, 'y')
    assert gin_utils.imported_by([file]) == {'configurables'}
  assert not caplog.records


def test_a_packaged_file_includes_packaged_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written(tmp_path, gin_configs__base='not gin', gin_configs__mine=_CONFIG)
  monkeypatch.syspath_prepend(tmp_path)  # A package, to Python.
  gin_utils.parse([DIGITS, 'gin_configs/mine.gin'])
  assert 'experiment.Experiment.seed = 0' in gin_utils.configuration()
  written(tmp_path, mine="include 'gin_configs/ablations/lockstep.gin'\n")
  gin_utils.parse([DIGITS, 'mine.gin'])
  assert "exchange.Checkpoints.mode = 'lockstep'" in gin_utils.configuration()


@pytest.fixture
def with_flags():
  """Parses a command line."""
  known = set(flags.FLAGS)
  gin_utils.define_flags()
  yield lambda *argv: flags.FLAGS(['binary', *argv])
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)


def test_flags_as_users_of_gin_know_them(tmp_path, monkeypatch, with_flags):
  written(
      tmp_path,
      x__task=_CONFIG + "include 'part.gin'\n",
      y__part=LEAF.format(5),
      y__task='not gin',
  )
  monkeypatch.chdir(tmp_path)
  paths = [f'--gin_search_paths={p}' for p in ('x', tmp_path / 'y')]
  bound = ["--gin=leaf.name='a'", "--gin_bindings=leaf.name='b'", '--gin=S=1']
  with_flags(*paths, '--gin_file=task.gin', *bound)
  again = gin_utils.flag_arguments()  # Those of the processes of a run.
  for _ in range(2):
    gin_utils.parse_flags()
    assert make_root().value == (5, 'b')
    assert 'S = 1' in gin_utils.configuration()
    flags.FLAGS.unparse_flags()
    with_flags(*again)
  with_flags('--gin_file=none.gin')
  with pytest.raises(ValueError, match=r'none\.gin: no such file.* x, .*/y, '):
    gin_utils.parse_flags()


@pytest.mark.parametrize(
    'binding',
    [
        'leaf.nonsense=1',
        'nothing.size=1',
        'leaf.size',
        'leaf.size=(',
        'leaf.size=[1,',
        'leaf.size=word',
        'Root.value=@nobody()',
    ],
)
def test_a_wrong_binding_is_one_line_with_its_place(tmp_path, binding):
  with pytest.raises(ValueError) as e:
    gin_utils.parse([write(tmp_path, _CONFIG)], [binding])
  assert '\n' not in str(e.value) and f'--gin={binding}: ' in str(e.value)


@pytest.mark.parametrize(
    'text, word',
    [
        ('configurables.leaf.size = \n', ''),
        ('configurables.leaf.size = 1 2\n', ''),
        ('this is not gin\n', ''),
        ('configurables.leaf.nonsense = 1\n', 'nonsense'),
        ('import no_such_module\n', 'no_such_module'),
        ("include 'nowhere.gin'\n", 'nowhere.gin'),
        ('\0\0\0', ''),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, text, word):
  path = write(tmp_path, _CONFIG + text)
  with pytest.raises(ValueError) as e:
    gin_utils.parse([path])
  assert '\n' not in str(e.value)
  assert word in str(e.value) and path in str(e.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(
      ValueError, match=r'--gin_file=nowhere\.gin: no such file'
  ):
    gin_utils.parse(['nowhere.gin'])
  with pytest.raises(ValueError, match='no such file'):
    gin_utils.parse([str(tmp_path)])


def test_without_a_task_it_says_what_to_give(tmp_path):
  configured(tmp_path)
  with pytest.raises(ValueError, match='says nothing of write; give a task'):
    gin_utils.make(write)


def test_what_a_configurable_refuses_is_one_line(tmp_path):
  text = _CONFIG + 'configurables.Root.other = @configurables.strict()\n'
  with pytest.raises(ValueError) as e:
    configured(tmp_path, 'strict.size=-1', text=text)
  assert str(e.value) == 'size=-1 is negative; set it to 0 or more'
  with pytest.raises(ValueError, match=r'configuration.*strict.*size') as e:
    configured(tmp_path, text=text)
  assert '\n' not in str(e.value)
  with pytest.raises(ValueError, match='0 or more') as e:
    configured(tmp_path, f'strict.size=-1{"0" * 3000}', text=text)
  assert len(str(e.value)) < 1000


def test_a_binding_that_acts_nowhere_is_an_error(tmp_path):
  configured(tmp_path)
  gin_utils.check_no_dead_bindings()
  configured(tmp_path, text=_CONFIG + 'configurables.unused.size = 7\n')
  with pytest.raises(ValueError) as e:
    gin_utils.check_no_dead_bindings()
  assert str(e.value) == (
      "gin binding 'configurables.unused.size = 7' acts nowhere: nothing in"
      ' this configuration uses it; remove it, or reference it with @'
  )


def swapped(tmp_path, *bindings, text=_CONFIG):
  """A configuration in which a later file replaces the reference."""
  first = write(tmp_path, text, 'first.gin')
  swap = _IMPORTS + 'configurables.Root.value = @configurables.unused()\n'
  second = write(tmp_path, swap, 'second.gin')
  gin_utils.parse([first, second], bindings)
  return make_root()


def test_what_a_later_file_puts_out_of_use_is_not_dead(tmp_path):
  assert swapped(tmp_path).value == 1
  gin_utils.check_no_dead_bindings()
  nested = """
configurables.Root.value = @configurables.strict()
configurables.strict.size = @big/configurables.leaf()
"""
  assert swapped(tmp_path, text=_CONFIG + nested).value == 1
  gin_utils.check_no_dead_bindings()
  configured(tmp_path, 'Root.value=@configurables.unused()')
  gin_utils.check_no_dead_bindings()


@pytest.mark.parametrize('before, dead', [('', 0), (LEAF.format(4), 1)])
def test_what_a_file_supersedes_of_one_that_it_includes_is_not_dead(
    tmp_path, before, dead
):
  """What it binds itself is."""
  written(tmp_path, task=_CONFIG, outer="include 'mine.gin'\n")
  swap = 'configurables.Root.value = @configurables.unused()\n'
  mine = (before or _IMPORTS) + f"include 'task.gin'\n{swap}"
  if dead:
    mine += 'configurables.leaf.size = 5\n'
  written(tmp_path, mine=mine)
  gin_utils.parse([str(tmp_path / 'outer.gin')])
  assert make_root().value == 1
  with contextlib.ExitStack() as stack:
    if dead:
      stack.enter_context(pytest.raises(ValueError, match='size = 5'))
    gin_utils.check_no_dead_bindings()


NEVER_USED = 'configurables.strict.size = 7\n'


@pytest.mark.parametrize(
    'make, text, bindings, dead',
    [
        # A scope that nobody enters; a macro that nobody uses.
        (
            configured,
            '',
            ['elsewhere/leaf.size=7'],
            r'elsewhere/.*leaf.size = 7',
        ),
        (configured, '', ['SIZE=9'], 'SIZE'),
        # Bound after it went out of use; also as in the file, where it acted.
        (swapped, '', ['leaf.size=4'], r'leaf\.size = 4'),
        (swapped, '', ['leaf.size=3'], r'leaf\.size = 3'),
        # What is typed is never excused, in whatever order.
        (
            configured,
            '',
            ['leaf.size=7', 'Root.value=@configurables.unused()'],
            r'leaf\.size = 7',
        ),
        # What never was in use, after a swap too.
        (swapped, NEVER_USED, [], r'strict\.size = 7'),
    ],
)
def test_what_acts_nowhere_is_dead(tmp_path, make, text, bindings, dead):
  make(tmp_path, *bindings, text=_CONFIG + text)
  with pytest.raises(ValueError, match=dead):
    gin_utils.check_no_dead_bindings()


def test_a_task_after_an_ablation_is_refused(tmp_path):
  """It would undo the ablation, whose bindings would pass for superseded."""
  ablation = write(tmp_path, _CONFIG, 'ablation.gin')
  task = write(tmp_path, "include 'gin_configs/base.gin'\n", 'task.gin')
  outer = write(tmp_path, f"include '{task}'\n", 'outer.gin')
  gin_utils.parse([outer, ablation])
  for file in (task, outer, 'gin_configs/base.gin'):
    with pytest.raises(ValueError, match=r'undoes .* give it first') as e:
      gin_utils.parse([ablation, file])
    assert str(e.value).startswith(f'--gin_file={file}: a task')


def test_what_was_excused_is_forgotten_with_its_configuration(tmp_path):
  swapped(tmp_path)
  never_used = 'configurables.Root.other = 2\nconfigurables.leaf.size = 3\n'
  configured(tmp_path, text=_IMPORTS + never_used)
  with pytest.raises(ValueError, match=r'leaf\.size = 3'):
    gin_utils.check_no_dead_bindings()


@pytest.mark.parametrize(
    'bindings, value',
    [
        (['Root.other=@big/configurables.leaf()', 'big/leaf.size=9'], (3, 'x')),
        (['leaf.size=%SIZE', 'SIZE=9'], (9, 'x')),
        (["leaf.name='a = b'"], (3, 'a = b')),
        (["leaf.name={'k': [1, (2.5, None)]}"], (3, {'k': [1, (2.5, None)]})),
        (["leaf.name='" + 100 * 'long ' + "'"], (3, 100 * 'long ')),
        (['leaf.name=@configurables.leaf'], (3, configurables.leaf)),
    ],
)
def test_what_acts_is_not_called_dead(tmp_path, bindings, value):
  root = configured(tmp_path, *bindings)
  if not callable(value[1]):
    assert root.value == value
  gin_utils.check_no_dead_bindings()
  gin_utils.configuration()


def test_the_configuration_does_not_depend_on_how_it_was_written(tmp_path):
  gin_utils.parse([write(tmp_path, _CONFIG)], ["leaf.name='y'"])
  one = gin_utils.configuration()
  make_root()  # Nor on whether it was used.
  assert gin_utils.configuration() == one
  text = (
      _CONFIG.replace('= 3', '=   3  # three')
      + 'configurables.leaf.name = "y"\n'
  )
  configured(tmp_path, text=text)
  assert gin_utils.configuration() == one
  assert one == sorted(one)
  assert 'configurables.leaf.size = 3' in one
  configured(tmp_path, "leaf.name='z'")
  assert gin_utils.configuration() != one


def test_the_operative_configuration_makes_the_same_again(tmp_path):
  made = configured(tmp_path, 'leaf.size=8')
  text = gin_utils.operative_configuration()
  assert "configurables.leaf.name = 'x'" in text  # A default, too.
  gin_utils.parse([write(tmp_path, text, 'operative.gin')])
  assert make_root().value == made.value
  gin_utils.check_no_dead_bindings()


def test_a_file_says_what_it_is_for(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text('# Does it help?\n# It may.\nimport x\n# Later.\n')
  assert gin_utils.headline(str(path)) == 'Does it help? It may.'
  path.write_text('import x\n')
  assert gin_utils.headline(str(path)) == ''
  with pytest.raises(ValueError, match='no such file'):
    gin_utils.headline('none.gin')


DIGITS = 'gin_configs/tasks/digits_resnet.gin'
CLIPPED = (
    'Experiment.optimizer=@optimizers.chain()',
    'optimizers.chain.transformations='
    '[@optax.clip_by_global_norm(), @optax.sgd()]',
    'optax.clip_by_global_norm.max_norm=0.5',
    'optax.sgd.learning_rate=2.0',
)


@pytest.mark.parametrize(
    'bindings, change',
    [
        (
            [
                'Experiment.optimizer=@optax.sgd()',
                'optax.sgd.learning_rate=2.0',
            ],
            6,
        ),
        (
            [
                'optax.sgd.learning_rate=2.0',
                'Experiment.optimizer=@optax.sgd()',
            ],
            6,
        ),
        (['Experiment.optimizer=@a/optax.sgd()', 'a/sgd.learning_rate=2.0'], 6),
        (
            [
                'Experiment.optimizer=@optimizers.momentum_sgd()',
                'momentum_sgd.learning_rate=2.0',
                'momentum_sgd.weight_decay=0.0',
            ],
            6,
        ),
        (CLIPPED, 1),
        (CLIPPED[::-1], 1),
    ],
)
def test_an_optimiser_is_swapped_and_clipped_on_the_command_line(
    bindings, change
):
  gin_utils.parse([DIGITS], bindings)
  made = gin_utils.make(experiment.Experiment)
  gin_utils.call(experiment.make_model, made)
  gin_utils.check_no_dead_bindings()
  params = {'kernel': np.float32([3.0])}
  tx = made.optimizer
  found, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(found['kernel'], -change)


@pytest.mark.parametrize(
    'bindings, expected',
    [
        ([], []),
        (['STEPS=4000'], []),
        (['Experiment.num_steps=4000'], ['warmup_cosine.total_steps = 200']),
        (['Experiment.num_steps=100'], ['warmup_cosine.total_steps = 200']),
        (['warmup_cosine.warmup_steps=150'], []),
        (
            ['STEPS=100', 'warmup_cosine.total_steps=150'],
            ['warmup_cosine.total_steps = 150'],
        ),
        (
            [
                'adam.learning_rate=@optax.linear_schedule()',
                'linear_schedule.init_value=0.0',
                'linear_schedule.end_value=1.0',
                'linear_schedule.transition_steps=500',
            ],
            ['optax.linear_schedule.transition_steps = 500'],
        ),
    ],
)
def test_counts_of_steps_that_do_not_suit_the_run_are_named(bindings, expected):
  gin_utils.parse([DIGITS], bindings)
  made = gin_utils.make(experiment.Experiment)
  found = gin_utils.steps_out_of(made.num_steps)
  assert [s.removeprefix('schedules.') for s in found] == expected


def test_what_no_file_imports_is_refused_with_what_to_write():
  with pytest.raises(ValueError, match='--gin_file imports'):
    gin_utils.parse([DIGITS], ['Experiment.optimizer=@subprocess.getoutput()'])


@pytest.mark.parametrize('old', gin_utils.RENAMED)
@pytest.mark.parametrize('typed', [True, False])
def test_a_renamed_binding_names_the_new_one_in_one_line(old, typed, tmp_path):
  file = tmp_path / 'old.gin'
  file.write_text(f"""
from __gin__ import dynamic_registration
from codistill_jax import experiment

experiment.{old} = 1
""")
  with pytest.raises(ValueError) as e:
    if typed:
      gin_utils.parse([DIGITS], [f'{old}=1'])
    else:
      gin_utils.parse([DIGITS, str(file)])
  assert f'{old} is now {gin_utils.RENAMED[old]}' in str(e.value)
  assert '\n' not in str(e.value)


def test_what_renamed_bindings_became_is_there():
  kinds = {'Checkpoints': [], 'Predictions': [], 'FixedTeachers': []}
  kinds['Predictions'] = ['gin_configs/ablations/deep_mutual_learning.gin']
  kinds['FixedTeachers'] = ['gin_configs/ablations/offline_distillation.gin']
  for new in gin_utils.RENAMED.values():
    binding = new.split()[0]
    gin_utils.parse([DIGITS, *kinds[binding.split('.')[1]]], [f'{binding}=1'])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('# x\n'.encode('utf-16'), 'in UTF-16'),
        ('# x\n'.encode('utf-16-le') * 40, 'UTF-16 without a mark'),
        (b'\xef\xbb\xbf# x\n', 'begins with a mark of UTF-8'),
        (gzip.compress(b'# x\n', mtime=0), 'compressed'),
        (b'PK\3\4' + bytes(99), 'zip archive'),
    ],
)
def test_a_file_that_is_no_plain_text_is_refused(tmp_path, content, message):
  path = tmp_path / 'a.gin'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    gin_utils.parse([str(path)])
  assert '\n' not in str(raised.value) and 'a.gin' in str(raised.value)


# -- a config.gin that is read back is data -----------------------------------

PLANTED = {
    'a program': (
        'import subprocess\nRoot.x = @subprocess.getoutput()\n'
        "subprocess.getoutput.cmd = 'touch {marker}'\n"
    ),
    'through a module of ours': (
        'from codistill_jax import experiment\n'
        'from codistill_jax import run_directory\n'
        'experiment.Experiment.seed = @run_directory.os.system()\n'
        "run_directory.os.system.command = 'touch {marker}'\n"
    ),
    'a module of ours that writes': (
        'from codistill_jax import experiment\n'
        'from codistill_jax.storage import files\n'
        'experiment.Experiment.seed = @files.write_bytes()\n'
        "files.write_bytes.path = '{marker}'\n"
        "files.write_bytes.data = b'x'\n"
    ),
    'what a module imports from others': (
        'from codistill_jax import experiment\n'
        'from codistill_jax import run_directory\n'
        'experiment.Experiment.seed = @run_directory.write_json()\n'
        "run_directory.write_json.path = '{marker}'\n"
        'run_directory.write_json.tree = {{}}\n'
    ),
    'a module by its side': 'import planted\n',
    'a name within a name': (
        'import codistill_jax as subprocess\n'
        'X = @subprocess.gin_utils.os.system()\n'
    ),
    'an include': "include '{other}'\n",
    'pickles': (
        'import jax.numpy\nX = @jax.numpy.load()\n'
        "jax.numpy.load.file = '{marker}.npy'\n"
        'jax.numpy.load.allow_pickle = True\n'
    ),
    'within a value': (
        'import optax\nimport os\n'
        "optax.sgd.learning_rate = [1, {{'a': @os.getcwd()}}]\n"
    ),
    'a scope': 'import os\nX = @a/b/os.getcwd()\n',
    'a block': 'import os\nos.system:\n  command = 1\n',
    'without dynamic registration': 'X = @getoutput()\n',
    'deep': 'X = ' + 5000 * '[' + '\n',
    'large': '# ' + 2_000_000 * 'x' + '\n',
}


@pytest.mark.parametrize('text', PLANTED.values(), ids=PLANTED)
def test_a_planted_configuration_is_refused_and_runs_nothing(
    text, tmp_path, monkeypatch
):
  marker, other = tmp_path / 'marker', tmp_path / 'other.gin'
  monkeypatch.syspath_prepend(tmp_path)
  code = f'import pathlib; pathlib.Path({str(marker)!r}).touch()'
  (tmp_path / 'planted.py').write_text(code)
  dynamic = 'from __gin__ import dynamic_registration\n'
  other.write_text(f'{dynamic}import planted\n')
  text = text.format(marker=marker, other=other)
  if not text.endswith('getoutput()\n'):
    text = dynamic + text
  path = write(tmp_path, text)
  with pytest.raises(ValueError) as e:
    gin_utils.parse([], saved=path)
    gin_utils.make(experiment.Experiment)
  assert str(e.value).startswith(path) and '\n' not in str(e.value)
  assert not marker.exists()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'config.gin')
  with pytest.raises(ValueError, match='no regular file'):
    gin_utils.parse([], saved=tmp_path / 'config.gin')


def test_what_a_run_saves_is_read_back_and_a_module_of_ones_own_is_named(
    tmp_path,
):
  gin_utils.parse([DIGITS], CLIPPED)
  made = gin_utils.make(experiment.Experiment)
  gin_utils.call(experiment.make_model, made)
  text = gin_utils.operative_configuration()
  saved = write(tmp_path, text)
  gin_utils.parse([], ['Experiment.seed=7'], saved=saved)
  assert gin_utils.make(experiment.Experiment).seed == 7
  own = write(tmp_path, _CONFIG, 'own.gin')
  with pytest.raises(ValueError, match=r'imports configurables; .* by --trust'):
    gin_utils.parse([], saved=own)
  for given in ({'trusted': ['configurables']}, {'files': [own]}):
    gin_utils.parse(**{'files': [], 'saved': own, **given})
    assert make_root().value == (3, 'x')
  # No reference, though it looks like one.
  text = _CONFIG + "configurables.leaf.name = 'me@os.system'\n"
  path = write(tmp_path, text, 'mail.gin')
  gin_utils.parse([], saved=path, trusted=['configurables'])


@pytest.mark.parametrize(
    'task, bindings',
    [
        ('bible_lm', ['language_model_task.data_dir={}']),
        ('cifar10_resnet20', ['cifar10_task.directory={}']),
        ('criteo_dnn', ['D={}', 'criteo_task.data_dir=%D']),
        (
            'bible_lm',
            [
                'Experiment.exchange=@exchange.FixedTeachers()',
                'FixedTeachers.runs=[{}]',
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    'typed, meant, compared',
    [
        ('data/a', '{here}/data/a', 'data/a'),
        ('~/a', '/home/me/a', '/home/me/a'),
        ('/a', '/a', '/a'),
        ('s3://a/~', 's3://a/~', 's3://a/~'),
    ],
)
def test_paths_are_absolute_in_what_is_saved_and_relative_in_comparisons(
    task, bindings, typed, meant, compared, monkeypatch, tmp_path
):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.chdir(tmp_path)
  gin_utils.parse(
      [f'gin_configs/tasks/{task}.gin'],
      [b.format(f'{typed!r}') for b in bindings],
  )
  # What is saved, and read back elsewhere.
  assert repr(meant.format(here=tmp_path)) in gin_utils.gin.config_str()
  assert any(repr(compared) in s for s in gin_utils.configuration())


@pytest.mark.parametrize('value', ['3', 'None', '[]', '[1]', "''"])
def test_a_value_that_is_no_path_is_left_to_who_asked_for_it(value):
  gin_utils.parse(
      ['gin_configs/tasks/bible_lm.gin'],
      [f'language_model_task.data_dir={value}'],
  )
  found = gin_utils.gin.query_parameter('language_model_task.data_dir')
  assert repr(found) == value
