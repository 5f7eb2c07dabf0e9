"""experiments/evaluate.py: what it says of a run is true of its checkpoints."""

import shutil

import jax
import pytest
import tiny_run

import codistill_jax as cj
from codistill_jax import evaluate, run_directory
from codistill_jax.storage import files

LAST = tiny_run.NUM_STEPS
TRUST = '--trust=paced'  # What the tiny run's configuration imports.


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Copies of the finished run, most of them spoiled, by name."""
  _, finished = tiny_run.reference(tmp_path_factory)
  directory = tmp_path_factory.mktemp('evaluate')
  names = ('good', 'again', 'torn_config', 'no_config', 'lost', 'damaged')
  made = {name: directory / name for name in names}
  for workdir in made.values():
    shutil.copytree(finished, workdir)
  run_directory.config_path(made['torn_config']).write_text('import 3')
  run_directory.config_path(made['no_config']).unlink()
  shutil.rmtree(run_directory.checkpoints_dir(made['lost'], 1))
  record = run_directory.checkpoints_dir(made['damaged'], 1) / str(LAST)
  (record / 'record.json').write_text('{}')
  return {**made, 'nowhere': directory / 'nowhere'}


@pytest.fixture(scope='module')
def results(workdirs, tmp_path_factory):
  arguments = {
      'good': [],
      'again': ['--source=publications', f'--step={LAST}', '--eval_batch=3'],
      'lost': [],
      'damaged': [],
      'torn_config': [],
      'no_config': [],
      'nowhere': [],
  }
  cases = {
      name: [f'--workdir={workdirs[name]}', TRUST, *words]
      for name, words in arguments.items()
  }
  good = [f'--workdir={workdirs["good"]}', TRUST]
  cases['no_split'] = [*good, '--split=test']
  few = '--gin=language_model_task.max_eval_batches=1'
  cases['few'] = [*good, few]
  cases['all'] = [*good, few, '--all']
  for name, data in others(workdirs).items():
    cases[name] = [*good, f'--data={data}']
  cases['bound'] = [
      f'--workdir={workdirs["again"]}',
      TRUST,
      f"--gin=language_model_task.data_dir='{others(workdirs)['data']}'",
  ]
  cases['no_gin_file'] = [*good, '--gin_file=/no/such.gin']
  cases['no_binding'] = [*good, '--gin=language_model_task.nonsense=1']
  unused = workdirs['nowhere'].with_name('unused.gin')
  unused.write_text(
      'from __gin__ import dynamic_registration\n'
      'from codistill_jax.data import clicks\n'
      "clicks.criteo_task.data_dir = 'elsewhere'\n"
  )
  cases['unused'] = [*good, f'--gin_file={unused}']
  cases['unknown'] = [*good, '--gin=nothing.nonsense=1']
  cases['no_step'] = [*good, '--step=13']
  cases['untrusted'] = good[:1]
  with tiny_run.launcher(tmp_path_factory) as launch:
    return launch.cases('evaluate', cases)


def others(workdirs):
  """Data that are not those of the run, by case."""
  directory = workdirs['nowhere'].parent / 'others'
  if not directory.exists():
    tiny_run.write_data(directory / 'same', num_validation=4)
    tiny_run.write_data(directory / 'differs', tokenizer=b'another one')
  return {
      'data': directory / 'same',
      'other_tokenizer': directory / 'differs',
      'no_data': directory / 'nothing',
  }


def comparison(workdirs, name):
  return run_directory.read_comparison(workdirs[name])


def last_evaluation(workdir, group_id):
  records = tiny_run.records(workdir, group_id)
  return [r for r in records if 'eval/loss' in r][-1]


def test_each_group_is_as_its_own_training_found_it(workdirs, results):
  status, output = results['good']
  assert status == 0, output
  models = comparison(workdirs, 'good')['models']
  assert len(models) == 2
  for group_id in (0, 1):
    found = next(v for k, v in models.items() if k.endswith(f'_{group_id}'))
    logged = last_evaluation(workdirs['good'], group_id)
    assert found['step'] == logged['step'] == LAST
    for key in ('eval/loss', 'eval/accuracy', 'eval/perplexity'):
      assert found[key] == pytest.approx(logged[key], rel=1e-5)
    assert f'{found["eval/loss"]:.4f}' in output


def test_the_ensemble_and_the_differences_are_those_of_two_models(
    workdirs, results
):
  del results
  found = comparison(workdirs, 'good')
  losses = [m['eval/loss'] for m in found['models'].values()]
  (ensemble,) = found['ensembles'].values()
  # The loss is convex in the prediction.
  assert ensemble['eval/loss'] <= sum(losses) / 2
  ((pair,),) = found['pairs'].values()
  assert (pair['a'], pair['b']) == ('group_0', 'group_1')
  assert 0 < pair['churn/mean_abs'] < 1
  assert 0 <= pair['churn/disagreement'] <= 1


def test_publications_of_a_step_are_the_models_of_that_step(workdirs, results):
  """In float32 they hold the same parameters; the batch does not matter."""
  status, output = results['again']
  assert status == 0, output
  report = run_directory.report_dir(workdirs['again'])
  ours = files.read_json(report / f'comparison_{LAST}.json')['models'].values()
  theirs = comparison(workdirs, 'good')['models'].values()
  for a, b in zip(ours, theirs, strict=True):
    assert a['step'] == b['step']
    assert a['eval/loss'] == pytest.approx(b['eval/loss'], rel=1e-5)


def test_bindings_and_all_choose_what_is_evaluated(workdirs, results):
  """And their figures are not those that a report takes for the run's."""
  report = run_directory.report_dir(workdirs['good'])
  found = {'good': comparison(workdirs, 'good')}
  for name, file in (('few', 'other'), ('all', 'other_all')):
    status, output = results[name]
    assert status == 0 and f'comparison_{file}.json' in output, output
    found[name] = files.read_json(report / f'comparison_{file}.json')
  good, few, everything = (
      next(iter(found[name]['models'].values()))
      for name in ('good', 'few', 'all')
  )
  assert everything == good
  assert 0 < few['eval/examples'] < good['eval/examples']
  assert few['eval/loss'] != good['eval/loss']
  assert f'{good["eval/examples"]:,.0f}' in results['good'][1]
  (typed,) = found['few']['configuration']
  assert typed.endswith('max_eval_batches=1')


def test_other_data_are_evaluated_apart_from_those_of_the_run(
    workdirs, results
):
  status, output = results['data']
  assert status == 0, output
  assert output.startswith(f'on {others(workdirs)["data"]}:\n')
  report = run_directory.report_dir(workdirs['good'])
  (path,) = report.glob('comparison_on_same_*.json')
  again = run_directory.report_dir(workdirs['again'])
  found, bound = files.read_json(path), again / 'comparison_other.json'
  assert found['data'] == str(others(workdirs)['data'])
  assert str(path) in output and results['bound'][0] == 0
  for kind in ('models', 'ensembles', 'pairs'):
    assert found[kind] == files.read_json(bound)[kind]
    assert found[kind] != comparison(workdirs, 'good')[kind]


def test_a_trained_group_is_loaded_by_one_call(workdirs, results):
  """Of a step, too; and its evaluation is that of the binary."""
  del results
  loaded = cj.load(workdirs['good'], group=1, trusted=['paced'])
  assert loaded.step == LAST
  eval_step = jax.jit(cj.make_eval_step(loaded.model))
  found = evaluate.evaluate(
      eval_step,
      loaded.variables,
      loaded.task.eval_batches(4),
      loaded.model.init_carry(4),
  )
  models = comparison(workdirs, 'good')['models']
  expected = next(v for k, v in models.items() if k.endswith('_1'))
  assert found['eval/loss'] == pytest.approx(expected['eval/loss'], rel=1e-5)
  younger = cj.load(workdirs['good'], step=20, trusted=['paced'])
  assert younger.step == 20
  with pytest.raises(FileNotFoundError, match='group 2 of'):
    cj.load(workdirs['good'], group=2, trusted=['paced'])
  with pytest.raises(ValueError, match='imports paced'):
    cj.load(workdirs['good'])


@pytest.mark.parametrize(
    'name, words',
    [
        ('no_gin_file', ['--gin_file=/no/such.gin', 'no such file']),
        ('no_binding', ['nonsense', 'language_model_task']),
        ('unknown', ['nothing']),
        ('unused', ['criteo_task.data_dir', 'acts nowhere']),
        ('no_step', ['group 0', 'no checkpoints of step 13', '[20, 40, 50]']),
        ('no_split', ['no test split', 'it has: validation']),
        ('other_tokenizer', ['others/differs has another tokenizer']),
        ('no_data', ['Unknown source', 'others/nothing', 'text:PATH_OR_GLOB']),
        ('lost', ['group 1', 'no checkpoints']),
        ('damaged', ['checkpoints/50', 'altered']),
        ('torn_config', ['config.gin', 'line ']),
        ('no_config', ['holds no trained group yet', 'check the directory']),
        ('nowhere', ['nowhere']),
        ('untrusted', ['config.gin: it imports paced;', '--trust']),
    ],
)
def test_a_mistake_is_one_line(results, name, words):
  status, output = results[name]
  assert status == 1
  (line,) = output.splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line
