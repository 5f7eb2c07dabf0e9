"""The snippets of the README and of pages run as they stand there."""

import importlib
import pathlib
import re
import shlex
import sys
import types

import pytest
import run_cases

import codistill_jax as cj
from codistill_jax import run_directory

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
README = pathlib.Path(__file__).parents[1] / 'README.md'


def run_snippets(page):
  """Runs the snippets of a page in order; returns them, and their names."""
  snippets, scope = (
      re.findall(r'```python\n(.*?)```', page.read_text(), re.S),
      {},
  )
  for snippet in snippets:
    exec(compile(snippet, str(page), 'exec'), scope)  # Our own text.
  return snippets, scope


def run_command(line):
  """Runs a binary in this process, and groups in lockstep; what it prints."""
  binary, *argv = shlex.split(line)
  binary = binary.removeprefix('codistill-')
  if binary == 'train_local':
    binary = 'train_lockstep'
    if 'gin_configs' in line:  # Nothing but the data is ours.
      argv.append('--dry_run')
  if binary == 'prepare_data':
    argv.append('--workers=1')
  module = importlib.import_module(f'experiments.{binary}')
  status, output = run_cases.run(module, argv)
  assert status == 0, f'{line}\n{output}'
  return output


def run_page(page):
  """Does what a page says; returns what each command prints.

  A block that begins with the name of a file is (more of) that file.
  """
  found, scope = {}, {}
  blocks = re.findall(r'```(\w*)\n(.*?)```', page.read_text(), re.S)
  name_of = lambda block: re.match(r'# (\w+\.\w+)\n', block)
  for _, block in blocks:  # All first: a module is read once.
    if name := name_of(block):
      with open(name[1], 'a') as file:
        file.write(block[name.end() :])
  for kind, block in blocks:
    if name_of(block):
      continue
    if kind == 'python':
      exec(compile(block, str(page), 'exec'), scope)  # Our own text.
    else:
      found |= {line: run_command(line) for line in block.splitlines()}
  return found, scope


class LoggedRun(list):
  """Stands for a run of Weights & Biases."""

  def log(self, metrics, *, step):
    self.append(step)

  def finish(self):
    self.append('finished')


def test_a_table_a_model_a_loss_a_metric_and_a_logger_of_ones_own(
    tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  logged = {}
  wandb = types.SimpleNamespace(
      init=lambda **how: logged.setdefault(how['id'], LoggedRun())
  )
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  found, scope = run_page(DOCS / 'own_data.md')
  assert scope['batch']['inputs'].shape == (32, 8, 8)
  losses = [
      list(map(float, line.split()))
      for line in capsys.readouterr().out.splitlines()
  ]
  assert len(losses) == 100 and max(losses[-1]) < 0.5 < min(losses[0])
  found |= run_page(DOCS / 'own_model.md')[0]
  for name in ('people', 'mine', 'logged'):
    models = run_directory.read_comparison(f'runs/{name}')['models']
    for metrics in models.values():
      assert metrics['eval/accuracy'] > 0.8
      assert ('eval/brier' in metrics) == (name == 'logged')
  assert '  brier\n' in list(found.values())[-1]
  assert logged.keys() == {'logged-group-0', 'logged-group-1'}
  for group_id, steps in enumerate(logged.values()):
    path = run_directory.metrics_path('runs/logged', group_id)
    records = run_directory.read_metrics(path).records
    assert steps == [*(r['step'] for r in records), 'finished']
  # What the run says of itself is whole, and names whom to trust.
  with pytest.raises(ValueError, match=r'imports mine; .* name it by --trust'):
    cj.load('runs/logged')
  loaded = cj.load('runs/logged', trusted=['mine'])
  assert loaded.model.init.__module__ == 'mine'


def test_the_others_train_from_memory_in_twenty_lines():
  snippets, scope = run_snippets(README.parent / 'docs' / 'method.md')
  assert max(len(snippet.splitlines()) for snippet in snippets[1:]) <= 20
  alone, *others = scope['found'].members
  assert len(others) == 4
  for one in others:
    assert one['eval/accuracy'] > 0.85
    assert one['eval/loss'] != alone['eval/loss']
  # Softer targets, softer predictions; the student is like its teachers.
  pairs = scope['found'].pairs
  churn = [pairs[0, n]['churn/mean_abs'] for n in range(1, 5)]
  assert min(churn) == churn[3]


def test_the_notebook_snippet_trains_two_groups(capsys):
  (_,), scope = run_snippets(README)
  losses = [
      [float(x) for x in line.split()[1:]]
      for line in capsys.readouterr().out.splitlines()
  ]
  assert len(losses) == 5
  assert max(losses[-1]) < 0.7 * min(losses[0])
  last = scope['a'].metrics
  assert last['distill/weight'] == 1.0
  assert last['exchange/staleness_steps'] == 9


def test_the_readme_names_every_binary():
  text = README.read_text()
  experiments = README.parent / 'experiments'
  binaries = [
      path.stem
      for path in experiments.glob('*.py')
      if "if __name__ == '__main__'" in path.read_text()
  ]
  assert len(binaries) >= 7
  assert [b for b in binaries if f'`{b}`' not in text] == []
