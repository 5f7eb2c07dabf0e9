"""500 spoiled small files: each is read or refused by name; nobody crashes.

Whoever can write in a run directory may have written any of them, or a disk.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal

import exchange_kit
import numpy as np
import pytest
from waits import Clock

from codistill_jax import experiment as experiment_lib
from codistill_jax import gin_utils, run_directory, trained, writers
from codistill_jax.exchange import publications
from codistill_jax.exchange.store_exchange import CheckpointExchange
from codistill_jax.storage import checkpoints, files, leases
from experiments import cli
from experiments.reports import pages, run_records, run_report, run_status

CASES, MANY = 500, 10_000
NOW = 10_000.0
SECONDS = 120  # Of one case: what takes longer hangs.
HERE = leases.this_process('training in', 30.0)
FAR = HERE._replace(machine='far', host='far')


def write_run(root: pathlib.Path) -> None:
  """Writes a run of two groups: every small file that a run may hold."""
  gin_utils.parse(['gin_configs/tasks/digits_resnet.gin'])
  gin_utils.call(
      experiment_lib.make_model, gin_utils.make(experiment_lib.Experiment)
  )
  config = gin_utils.operative_configuration()
  run_directory.config_path(root).write_text(config)
  run = dict.fromkeys(('num_groups', 'exchange_every', 'burn_in_steps'), 2)
  run |= dict.fromkeys(('num_steps', 'model_parameters'), 40)
  run |= {'arm': 'two', 'mode': 'freshest', 'example': 'token', 'data': 'toy'}
  run |= {'command': 'python', 'configuration': config.splitlines()}
  run |= {'exchange_dir': str(run_directory.exchange_root(root))}
  run_directory.write_run(root, run | {'config_sha256': 'abc', 'seed': 0})
  for group_id in (0, 1):
    write_group(root, group_id)
  figures = {'eval/loss': 1.5, 'eval/accuracy': 0.5, 'step': 40}
  pair = {'a': 'group_0', 'b': 'group_1', 'churn/disagreement': 0.1}
  files.write_json(
      run_directory.comparison_path(root),
      {
          'models': {'two/group_0': figures, 'two/group_1': figures},
          'ensembles': {'two': figures},
          'pairs': {'two': [pair]},
      },
  )


def write_group(root: pathlib.Path, group_id: int) -> None:
  """Writes what is of one group, at step 20 of 40."""
  peer = 1 - group_id
  trouble = {'doing': 'saving', 'reason': 'full', 'since': NOW, 'count': 2}
  status = {'step': 20, 'num_steps': 40, 'time': NOW, 'started': NOW - 9}
  status |= {'since': NOW, 'pid': 7, 'host': 'far', 'phase': 'training'}
  status |= {'steps_per_sec': 2.0, 'num_groups': 2, 'peers': [peer]}
  status |= {'teachers': [{'peer': peer, 'step': 10, 'time': NOW - 5}]}
  status |= {'rejected': 1, 'last_rejection': 'NaN', 'troubles': [trouble]}
  run_directory.write_status(root, group_id, status)
  path = run_directory.metrics_path(root, group_id)
  writer = writers.JsonlWriter(path, clock=lambda: NOW)
  for step in range(2, 22, 2):
    found = {'loss/task': 3.0, 'exchange/rejected': 0.0, 'eval/loss': 2.0}
    found |= {'perf/steps_per_sec': float('nan'), 'exchange/stall_ms': 1.0}
    writer.write(step, found | {f'exchange/staleness_steps_group_{peer}': 4.0})
  writer.close()
  saved = run_directory.checkpoints_dir(root, group_id) / '20'
  for path in (saved / 'commit_success.txt', saved / 'record.json'):
    files.write_bytes(path, b'Completed at Unix time 1.5\n')
  exchange = run_directory.exchange_root(root)
  exchange_kit.publish(exchange, group_id, 10)
  mine = publications.group_directory(exchange, group_id)
  for name in ('reading.json', 'process_1_reading.json'):
    mark = {'nonce': 'a', 'steps': {str(peer): 10}}
    files.write_json(mine / name, mark)
  files.write_json(mine / 'restart_step.json', {'step': 10})
  files.write_json(mine / 'failed.json', {'reason': 'loss is nan'})
  for directory in (run_directory.group_dir(root, group_id), mine):
    files.write_json(directory / 'lease.json', FAR._asdict())


# --- How a file is spoiled: each takes its bytes and a generator -------------

RAW = ('1e999', '-1e400', 'NaN', '-Infinity', '1' + 400 * '0', '-0.0', '1e-320')
RAW += (str(1 << 63), str((1 << 63) - 1), str(1 << 31), '1e308', '-1', '1.5')
ODD = (
    None,
    True,
    '',
    'NaN',
    'Infinity',
    '7',
    '\x1b[2J\x9b',
    '\u202etxt',
    'a\0b',
)
ODD += (
    '\ud800',
    '../..',
    'ftp://far/run',
    'x' * 10_000,
    '$\\frac{1$',
    '<b>|`',
    '\u0663',
    [],
    {},
)
ODD += ([[]], [None], {'a': None}, {'': [1]}, [0] * 300, -(1 << 62), 10**15)
PLANTED = (
    'import os',
    "include '/etc/passwd'",
    'X = @os.getcwd()',
    'X = ' + 2000 * '[',
    'experiment.Experiment.seed = 1e999',
    'experiment.Experiment.num_steps = -1',
    "experiment.Experiment.task = 'text'",
    '\x1b[2J = 3',
    'a/b.c = %d',
)


def spoil_bytes(data: bytes, rng: np.random.Generator) -> bytes:
  at = int(rng.integers(len(data) + 1))
  noise = rng.bytes(int(rng.integers(1, 40)))
  kinds = [
      data[:at],
      data[:at] + noise + data[at:],
      data[:at] + noise + data[at + len(noise) :],
      b'',
      noise,
      data[:at] + b'\n' + data[at:],
      data + data,
      b'\xff\xfe' + data,
      b'[' * 100_000,
      b'{"a":' * 60 + b'1' + b'}' * 60 + b'\n',
      data.replace(b'"', b"'"),
      bytes(len(data)),
      data.decode(errors='replace').encode('utf-16'),
  ]
  return kinds[rng.integers(len(kinds))]


def spoil_tree(data: bytes, rng: np.random.Generator) -> bytes:
  """Still JSON, some lines of it: values of another kind, other keys."""
  lines = data.splitlines() if data.count(b'\n{') > 1 else [data]
  for _ in range(rng.integers(1, 4)):
    at = int(rng.integers(len(lines)))
    with contextlib.suppress(ValueError):
      tree = {'': json.loads(lines[at])}
      spoil_node(tree, rng)
      text = json.dumps(tree[''])
      for i, raw in enumerate(RAW):
        text = text.replace(f'"raw {i}"', raw)
      lines[at] = text.encode()
  return b'\n'.join(lines) + b'\n'


def spoil_node(tree: dict, rng: np.random.Generator) -> None:
  nodes = [(tree, '')]
  for node, key in nodes:  # Grows.
    inside = node[key]
    if isinstance(inside, dict | list):
      keys = inside if isinstance(inside, dict) else range(len(inside))
      nodes += [(inside, k) for k in keys][:50]
  node, key = nodes[rng.integers(len(nodes))]
  odd = [*ODD, *(f'raw {i}' for i in range(len(RAW)))]
  other = odd[rng.integers(len(odd))]
  match rng.integers(4):
    case 0 if isinstance(node[key], dict):
      node[key][str(other)[:100]] = other
    case 1 if isinstance(node, dict) and key:
      del node[key]
    case _:
      node[key] = other


def spoil_lines(data: bytes, rng: np.random.Generator) -> bytes:
  lines = data.decode().splitlines()
  at = int(rng.integers(len(lines)))
  planted = PLANTED[rng.integers(len(PLANTED))]
  name = lines[at].partition(' = ')[0]
  odd = ODD[rng.integers(len(ODD))]
  lines[at : at + 1] = [
      [],
      [planted],
      [lines[at], planted],
      [f'{name} = {odd!r}'.encode('utf-8', 'replace').decode()],
      lines[at : at + 1] * 2,
      [lines[at][: len(lines[at]) // 2]],
  ][rng.integers(6)]
  return '\n'.join(lines).encode('utf-8', 'replace')


def spoil(path: pathlib.Path, rng: np.random.Generator) -> str:
  """Spoils one file; returns how."""
  data = path.read_bytes()
  if rng.random() < 0.15:
    path.unlink()
    kinds = (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to('/dev/zero'),
        lambda: path.symlink_to('/etc/hostname'),
        lambda: sparse(path),
        lambda: None,
    )
    chosen = rng.integers(len(kinds))
    kinds[chosen]()
    return f'kind {chosen}'
  changes = [spoil_bytes, spoil_tree, spoil_tree]
  if path.suffix == '.gin':
    changes = [spoil_bytes, spoil_lines, spoil_lines]
  change = changes[rng.integers(3)]
  path.write_bytes(change(data, rng))
  return change.__name__


def sparse(path: pathlib.Path) -> None:
  with path.open('wb') as f:
    f.truncate(60 << 30)


# --- Who reads: each takes the root, an exchange, and the spoiled files -------


def refusal(read, *args) -> str:
  """Returns why a reader refuses, as a binary would say it; '' if it reads."""
  try:
    read(*args)
  except (ValueError, OSError) as e:
    assert len(str(e)) < 2000
    return str(e)
  return ''


def assert_named(why: str, paths) -> None:
  assert not why or any(path.name in why for path in paths), why


def look(root, exchange, paths) -> None:
  """As `status` does: whatever it is, there is a view of it."""
  del exchange
  view, _ = run_status.look(str(root), NOW + 1)
  text = pages.plain(view)
  assert cli.printable(text) == text
  for path in paths:
    readers = {
        'run.json': (run_directory.read_run, root),
        'status.json': (files.read_json, path),
        'metrics.jsonl': (run_directory.read_metrics, path, 1 << 16),
    }
    if path.name in readers and refusal(*readers[path.name]):
      assert 'cannot be read: ' in text and path.name in text


def report(root, exchange, paths) -> None:
  """As `report` does; plots take long, so of some cases only."""
  del exchange
  try:
    (arm,) = run_records.load_arms([str(root)])
  except ValueError as e:
    assert 'metrics.jsonl' in str(e)
    return
  texts = [
      run_report.results_text([arm]),
      *run_report.summary([arm]),
      *run_report.notes([arm]),
      run_report.settings([arm]).to_string(),
      *run_report.commands([arm]),
  ]
  run_report.health([arm])
  run_report.speed([arm])
  if report.calls % 20 == 0:
    run_report.blocks([arm])
  report.calls += 1
  for why in arm.unreadable:
    assert_named(why, paths)
    assert cli.printable(why) in ' '.join(texts)


report.calls = 0


def evaluate(root, exchange, paths) -> None:
  """As `evaluate` does before it reads arrays."""
  del exchange
  why = refusal(trained.open_run, root)
  assert_named(why, [*paths, run_directory.config_path(root)])
  for group_id in (0, 1):
    directory = run_directory.checkpoints_dir(root, group_id)
    for step in checkpoints.completed_steps(directory):
      checkpoints.completed_at(directory, step)
      with contextlib.suppress(
          checkpoints.DamagedError, checkpoints.MissingError
      ):
        checkpoints.load_record(directory, step)


def publish(root, exchange, paths) -> None:
  """As a group does: reads its peer's marks and publications, deletes its own.

  Nothing of a peer's may end it, so nothing is refused here.
  """
  del root, paths
  publish.step += 2
  exchange_kit.publish_all(exchange, publish.step)
  exchange.fetch(publish.step)


def resume(root, exchange, paths) -> None:
  """As a group does with what is its own, when it starts again."""
  del exchange
  for path in paths:
    read = {
        'lease.json': (
            lambda path: leases.acquire(
                path.parent, 'training in', clock=Clock()
            ).release()
        ),
        'metrics.jsonl': write_on,
        'run.json': lambda _: run_directory.read_run(root),
    }
    why = refusal(read[path.name], path)
    assert_named(why, [path, path.parent])


def write_on(path) -> None:
  writer = writers.JsonlWriter(path, resume_step=20)
  writer.write(22, {'loss/task': 1.0})
  writer.close()
  assert run_directory.read_metrics(path).records[-1]['step'] == 22


# How often, and what they read; the later ones take longer.
MARKS = ('commit_success.txt', 'record.json')
OWN = ('run.json', 'metrics.jsonl', 'lease.json')
OF_PEERS = ('reading.json', 'process_1_reading.json', 'restart_step.json')
OF_PEERS += ('failed.json', *MARKS)
READERS = {
    look: (10, (*OWN, 'status.json', 'commit_success.txt')),
    resume: (5, OWN),
    report: (3, ('run.json', 'metrics.jsonl', 'config.gin', 'comparison.json')),
    evaluate: (1, ('config.gin', 'run.json', *MARKS)),
    publish: (1, OF_PEERS),
}
TURNS = [reader for reader, (times, _) in READERS.items() for _ in range(times)]


@contextlib.contextmanager
def limit():
  """Ends what hangs, such as the opening of a pipe."""

  def stop(*unused):
    raise AssertionError(f'it hangs: more than {SECONDS} s')

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run directory, the exchange of its group 0, and its small files."""
  root = tmp_path_factory.mktemp('run')
  write_run(root)
  own = publications.group_directory(run_directory.exchange_root(root), 0)
  shutil.rmtree(own)
  exchange = CheckpointExchange(
      run_directory.exchange_root(root),
      0,
      2,
      like=exchange_kit.variables_of(0),
      plan=exchange_kit.plan_of({'every': 2}),
      identity=exchange_kit.IDENTITY,
      keep=1,
      patience=exchange_kit.HASTY,
  )
  publish.step = 0
  found = [
      path
      for path in sorted(root.rglob('*'))
      if any(path.name in names for _, names in READERS.values())
      and own not in path.parents
  ]
  yield root, exchange, found
  exchange.close()


def fuzz(run, first, last) -> None:
  root, exchange, found = run
  for case in range(first, last):
    rng = np.random.default_rng([7, case])
    reader = TURNS[case % len(TURNS)]
    in_exchange = reader is publish
    mine = [
        path
        for path in found
        if path.name in READERS[reader][1]
        and (run_directory.exchange_root(root) in path.parents) is in_exchange
    ]
    spoiled = rng.permutation(len(mine))[: rng.integers(1, 4)]
    kept = {mine[i]: mine[i].read_bytes() for i in spoiled}
    how = [spoil(path, rng) for path in kept]
    try:
      with limit():
        reader(root, exchange, list(kept))
    except BaseException as e:
      names = [str(path.relative_to(root)) for path in kept]
      e.add_note(f'case {case}, {reader.__name__}: {dict(zip(names, how))}')
      raise
    finally:
      for path, data in kept.items():
        if path.is_dir() and not path.is_symlink():
          shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
  # And the group learns from its peer as ever, once that publishes anew: what
  # was rejected is not read again.
  shared = run_directory.exchange_root(root)
  checkpoints.delete(publications.group_directory(shared, 1), [10])
  exchange_kit.publish(shared, 1, 10)
  exchange_kit.fetch_until(exchange, publish.step, 10)


def test_no_small_file_of_others_ends_anybody(run):
  fuzz(run, 0, CASES)


@pytest.mark.slow
@pytest.mark.parametrize('first', range(CASES, CASES + MANY, CASES))
def test_none_of_many_small_files_ends_anybody(run, first):
  fuzz(run, first, first + CASES)
