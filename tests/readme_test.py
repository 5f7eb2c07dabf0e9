"""The snippets of the README and of pages run as they stand there."""

import pathlib
import re

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
