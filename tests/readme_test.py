"""The README's snippet runs as it stands there."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_notebook_snippet_trains_two_groups(capsys):
  (snippet,) = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)
  scope = {}
  exec(compile(snippet, str(README), 'exec'), scope)  # Our own text.
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
