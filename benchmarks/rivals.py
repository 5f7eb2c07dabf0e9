r"""Updates in JAX against the same models written in PyTorch.

    python -m benchmarks.rivals --device=cpu

`rivals_torch` runs in a process of its own (the thread pools of both libraries
would get into each other's way in one), with as many threads as there are
cores. It starts from a copy of the parameters, and before anything is timed
both sides must agree, plain and codistilled: in the losses of the first three
updates, and in the norm of the first gradient (Adam makes much of the rounding
of small gradients, so that the later ones differ more). Then all arms are
measured in turn: jitted JAX steps, eager PyTorch, and `torch.compile` where
that works: of model and loss; of a language model's cell and loss, since the
loop over time would be unrolled and take minutes to compile.

A ratio is the time of PyTorch over ours: above 1 we are ahead.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import command, measure

STEPS = 3  # Compared before timing.
# Relative, of losses and of the norm. On an accelerator both sides multiply in
# tf32, which has 10 bits. On a CPU the norm of ResNet-50 (8 images) is 6.72514
# in float64 on both sides and in float32 here, but 6.71834 in PyTorch's
# float32: 1e-3 off by rounding alone.
TOLERANCE = {'cpu': (1e-3, 3e-3), 'gpu': (1e-2, 1e-2)}
_CONVOLUTIONS = 1 / 1.5  # XLA has slower ones than oneDNN.


class Rival(NamedTuple):
  """A case, and how it is compared.

  Attributes:
    kind: What `rivals_torch` calls its model.
    case: Of `cases`.
    repeats: Measurements of each arm; few where an update takes seconds.
    teach: Whether plain (False), codistilled, or both.
    least: Goal of the ratio.
  """

  kind: str
  case: Any
  repeats: int = 5
  teach: tuple[bool, ...] = (False, True)
  least: float = 1.0


def rows(options: command.Options) -> Iterator[dict[str, Any]]:
  """Yields one row for each model, and plain or codistilled."""
  if not measure.versions(['torch']):
    yield command.skipped('PyTorch', "needs the extra 'bench': torch")
    return
  for rival in _rivals(options):
    with torch_process(options.device) as ask:
      yield from compare(rival, options, ask)


def _rivals(options: command.Options) -> Iterator[Rival]:
  from benchmarks import cases

  if options.quick:
    yield Rival('lstm', cases.lstm_lm(8, 30, 2, 4))
    yield Rival('dnn', cases.click_dnn(4, (8,), tables=2, buckets=10))
    return
  # Rows of bible_lm.gin; of one replica of common_crawl_lm.gin on a GPU, and a
  # quarter of them on a CPU, where all would take some 10 seconds.
  few, many = (128, 128) if options.device == 'gpu' else (16, 32)
  yield Rival('dnn', cases.click_dnn(256))
  for vocab in (8192, 24006):
    yield Rival('lstm', cases.lstm_lm(256, vocab, few, 32))
  small = cases.resnet20(128)
  yield Rival('resnet', small, repeats=3, least=_CONVOLUTIONS)
  images = 128 if options.device == 'gpu' else 8
  large = cases.resnet50(images, 'float32')
  yield Rival('resnet', large, 3, (False,), _CONVOLUTIONS)
  yield Rival('lstm', cases.lstm_lm(1024, 8192, many, 32), repeats=3)
  largest = cases.lstm_lm(1024, 24006, many, 32)
  teach = (False, True) if options.device == 'gpu' else (False,)
  yield Rival('lstm', largest, repeats=3, teach=teach)


def compare(
    rival: Rival, options: command.Options, ask
) -> Iterator[dict[str, Any]]:
  """Rows of one model: plain, codistilled.

  Raises:
    ValueError: If the sides do not agree.
  """
  from benchmarks import cases

  with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, 'arrays.npz')
    write_arrays(rival, path)
    opened = ask(do='open', kind=rival.kind, path=path)
  checks = {teach: agree(rival, teach, options, ask) for teach in rival.teach}
  arms, compile_seconds, reasons = {}, {}, {}
  for teach in rival.teach:
    calls = cases.updates(rival.case, int(teach))
    arms[f'jax {teach}'] = measure.timed(calls)
    arms[f'eager {teach}'] = remote(ask, teach, compiled=False)
    compiled = ask(do='check', teach=teach, compiled=True, steps=STEPS)
    if 'error' in compiled:
      reasons[teach] = compiled['error']
      continue
    compile_seconds[teach] = round(compiled['seconds'], 1)
    arms[f'compiled {teach}'] = remote(ask, teach, compiled=True)
  seconds = measure.alternate(arms, options.times(rival.repeats))
  for teach in rival.teach:
    yield {
        'name': f'{rival.case.name}, {"P = 1" if teach else "plain"}',
        'sizes': rival.case.sizes,
        **opened,
        'deviation': checks[teach],
        **_times(seconds, teach, rival.least),
        'compile_seconds': compile_seconds.get(teach),
        'not_compiled': reasons.get(teach),
        'torch_operators': ask(do='profile', teach=teach, times=2)['operators'],
    }


def _times(
    seconds: dict[str, list[float]], teach: bool, least: float
) -> dict[str, Any]:
  ours = seconds[f'jax {teach}']
  found = {'jax_ms': measure.milliseconds(ours)}
  for name in ('eager', 'compiled'):
    theirs = seconds.get(f'{name} {teach}')
    if theirs:
      found[f'{name}_ms'] = measure.milliseconds(theirs)
      found[f'{name}_ratio'] = measure.ratio(theirs, ours)
  ratios = [x['median'] for key, x in found.items() if key.endswith('ratio')]
  found['goal'] = measure.goal(min(ratios), at_least=least)
  return found


def remote(ask, teach: bool, compiled: bool) -> measure.Arm:
  """Returns an arm of the other process, which times itself."""

  def arm(times: int) -> float:
    answer = ask(do='time', teach=teach, compiled=compiled, times=times)
    if 'error' in answer:
      raise ValueError(f'PyTorch failed: {answer["error"]}')
    return answer['seconds']

  return arm


def agree(
    rival: Rival, teach: bool, options: command.Options, ask
) -> dict[str, float]:
  """Returns the largest relative deviations of losses and first gradient norm.

  Raises:
    ValueError: If they are beyond `TOLERANCE`.
  """
  from benchmarks import cases

  theirs = ask(do='check', teach=teach, compiled=False, steps=STEPS)
  if 'error' in theirs:
    raise ValueError(f'PyTorch failed: {theirs["error"]}')
  call = cases.updates(rival.case, int(teach))
  ours = [{k: float(x) for k, x in call().items()} for _ in range(STEPS)]
  found = {}
  of_losses, of_norm = TOLERANCE[options.device]
  for key, their_key, steps, tolerance in (
      ('loss/total', 'losses', STEPS, of_losses),
      ('optim/grad_norm', 'grad_norms', 1, of_norm),
  ):
    pairs = [(a[key], b) for a, b in zip(ours, theirs[their_key])][:steps]
    off = max(abs(a / b - 1) for a, b in pairs)
    if not off <= tolerance:
      raise ValueError(
          f'{rival.case.name}: {key} of JAX and of PyTorch, {pairs}, differ by'
          f' {off:.2g}, more than {tolerance}: they are not the same model'
      )
    found[their_key] = measure.brief(off)
  return found


def write_arrays(rival: Rival, path: str) -> None:
  """Parameters of student and teacher and the batch, as torch reads them."""
  import jax
  import numpy as np

  from benchmarks import cases

  arrays = {}
  teacher = cases.teachers_of(rival.case, 1).variables.params
  trees = {
      'student': cases.state_of(rival.case).variables.params,
      'teacher': jax.tree.map(lambda x: x[0], teacher),
      'batch': _batch(rival),
  }
  for name, tree in trees.items():
    for key, x in jax.tree.leaves_with_path(tree):
      key = jax.tree_util.keystr(key, simple=True, separator='/')
      arrays[f'{name}/{key}'] = np.asarray(x)
  np.savez(path, **arrays)


def _batch(rival: Rival) -> dict[str, Any]:
  import numpy as np

  batch = rival.case.batch
  labels = np.asarray(batch['labels'])
  if rival.kind == 'lstm':  # Time first.
    resets = np.asarray(batch['resets']).T[..., None]
    return {
        'inputs': np.asarray(batch['inputs']).T.astype(np.int64),
        'keep': 1 - resets.astype(np.float32),
        'labels': labels.T.reshape(-1).astype(np.int64),
    }
  if rival.kind == 'dnn':
    inputs = {k: np.asarray(x) for k, x in batch['inputs'].items()}
    inputs['categories'] = inputs['categories'].astype(np.int64)
    return {**inputs, 'labels': labels.astype(np.float32)}
  images = np.asarray(batch['inputs']).transpose(0, 3, 1, 2)
  return {'inputs': images, 'labels': labels.astype(np.int64)}


@contextlib.contextmanager
def torch_process(device: str):
  """Yields `ask(do=..., **arguments) -> dict` of the process with PyTorch."""
  device = 'cuda' if device == 'gpu' else 'cpu'
  command_line = [sys.executable, '-m', 'benchmarks.rivals_torch']
  process = subprocess.Popen(
      [*command_line, str(measure.cores()), device],
      cwd=pathlib.Path(__file__).parents[1],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
  )

  def ask(**request: Any) -> dict[str, Any]:
    process.stdin.write(json.dumps(request) + '\n')
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
      raise ValueError(
          f'the process with PyTorch ended with status {process.wait()} at'
          f' {request["do"]!r}; see above'
      )
    return json.loads(line)

  try:
    yield ask
  finally:
    process.stdin.close()
    process.stdout.close()
    process.wait()


if __name__ == '__main__':
  command.run('rivals', rows)
