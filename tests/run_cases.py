"""Runs one binary many times in one process: starting jax takes seconds.

python run_cases.py <binary> <cases.json> <results.json>

Cases are lists of arguments by name; results are [exit status, output] by name.
"""

import contextlib
import importlib
import io
import json
import sys

from absl import flags

from experiments import cli


def run(module, argv):
  """Exit status and output, as `python -m` would give them."""
  output = io.StringIO()
  before = set(flags.FLAGS)
  try:
    module.define_flags()
    cli.check_flags()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
      rest = flags.FLAGS([module.__name__, *argv])
      return cli.status_of(module.main, rest), output.getvalue()
  finally:  # Other binaries have flags of the same names.
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)


def main(binary, cases, results):
  module = importlib.import_module(f'experiments.{binary}')
  with open(cases) as f:
    found = {name: run(module, argv) for name, argv in json.load(f).items()}
  with open(results, 'w') as f:
    json.dump(found, f)


if __name__ == '__main__':
  main(*sys.argv[1:])
