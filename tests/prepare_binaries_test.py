"""The binaries that prepare data: killed, signalled, and used wrongly."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from prepared import (
    contents,
    run_clicks,
    run_text,
    texts,
    write_clicks,
    write_corpus,
)
from waits import PATIENCE, until

from codistill_jax.data import shards

ROOT = pathlib.Path(__file__).parent.parent

# Suspends itself as soon as it has read so many pieces: at a random moment it
# might be done before a test, on a busy machine, has struck.
HALTS = """
import os, signal, sys, time
from codistill_jax.data import records
cut = records.cut
def cut_and_halt(*arguments):
  for number, piece in enumerate(cut(*arguments)):
    if number == 9:
      os.kill(os.getpid(), signal.SIGSTOP)
      time.sleep(float(os.environ.get('WORK_LEFT', 0)))
    yield piece
records.cut = cut_and_halt
"""

# Gets SIGTERM from the system while it trains a tokenizer: after so much work
# (processor time), not at a time when it might be done.
TRAINS = """
import ctypes, sentencepiece, signal
trainer = sentencepiece.SentencePieceTrainer
train = trainer.train
def train_and_be_signalled(**kwargs):
  libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
  event = (ctypes.c_long * 8)(0, signal.SIGTERM)
  seconds = (ctypes.c_long * 4)(0, 0, 1, 0)
  cpu_time = 2  # CLOCK_PROCESS_CPUTIME_ID
  assert not libc.timer_create(cpu_time, event, ctypes.byref(timer))
  assert not libc.timer_settime(timer, 0, seconds, None)
  train(**kwargs)
trainer.train = train_and_be_signalled
"""
RUN = """
from experiments import cli, prepare_data
if __name__ == '__main__':
  prepare_data.define_flags()
  cli.run(prepare_data.main)
"""


def start(python, before, *flags, **options):
  return subprocess.Popen(
      [python, '-c', before + RUN, '--workers=2', *flags],
      cwd=ROOT,
      text=True,
      start_new_session=True,
      **options,
  )


def until_halted(process):
  def halted():
    assert process.poll() is None
    stat = pathlib.Path(f'/proc/{process.pid}/stat').read_text()
    return stat.rpartition(')')[2].split()[0] == 'T'

  until(halted)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A corpus for the binary: its flags, and what they should lead to."""
  folder = tmp_path_factory.mktemp('large')
  source = write_corpus(folder / 'a', texts(2000))
  run_text(folder / 'model', source, max_documents=200)
  options = {
      'tokenizer': folder / 'model' / 'tokenizer.model',
      'vocab_size': None,
      'shard_tokens': 3000,
  }
  run_text(folder / 'whole', source, **options)
  flags = [
      f'--source={source}',
      f'--tokenizer={options["tokenizer"]}',
      '--validation_fraction=0.2',
      '--shard_tokens=3000',
  ]

  def finish(output):
    assert not (output / 'meta.json').exists()
    assert any((output / 'pieces').glob('*.json'))
    _, lines = run_text(output, source, **options)
    assert lines[0].startswith('Continuing in')
    assert contents(output) == contents(folder / 'whole')

  return flags, finish


def is_gone(session):
  """Whether no process of a session is left."""
  try:
    os.killpg(session, 0)
  except ProcessLookupError:
    return True
  return False


def workers_of(parent):
  """The worker processes of a process, from /proc."""
  children = []
  for path in pathlib.Path(f'/proc/{parent}/task').glob('*/children'):
    children += path.read_text().split()
  return [
      int(child)
      for child in children
      if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
  ]


def test_kill_9_and_the_same_command_again(tmp_path, large, python):
  flags, finish = large
  output = tmp_path / 'out'
  null = subprocess.DEVNULL
  process = start(
      python, HALTS, f'--output={output}', *flags, stdout=null, stderr=null
  )
  try:
    until_halted(process)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  until(lambda: is_gone(process.pid))
  finish(output)


def test_a_killed_worker_is_a_clear_error_and_costs_nothing(
    tmp_path, large, python
):
  flags, finish = large
  output = tmp_path / 'out'
  pipe = subprocess.PIPE
  with start(
      python, HALTS, f'--output={output}', *flags, stdout=pipe, stderr=pipe
  ) as process:
    until_halted(process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 75
  assert errors.startswith('error: A worker process has died')
  assert len(errors.splitlines()) == 1
  until(lambda: is_gone(process.pid))
  finish(output)


@pytest.mark.skipif(sys.platform != 'linux', reason='timers, and /proc')
@pytest.mark.parametrize('phase', ['training', 'documents'])
def test_a_signal_ends_it_at_once(tmp_path, large, python, phase):
  """In C++, where a tokenizer is trained, and in Python."""
  flags, _ = large
  if phase == 'training':
    words = [
        f'{n:x}' * 3 for n in random.Random(0).sample(range(10**9), 300_000)
    ]
    documents = [' '.join(words[n : n + 20]) for n in range(0, 300_000, 20)]
    source = write_corpus(tmp_path / 'a', documents)
    flags = ['--vocab_size=30000', f'--source={source}']
  with start(
      python,
      TRAINS if phase == 'training' else HALTS,
      *flags,
      f'--output={tmp_path}/out',
      # What is left to do takes longer than to leave, on any machine.
      env=os.environ | {'WORK_LEFT': '1000'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
  ) as process:
    try:
      if phase == 'documents':
        until_halted(process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
      output, _ = process.communicate(timeout=PATIENCE)
    finally:
      process.kill()
  assert process.returncode == 143
  until(lambda: is_gone(process.pid))
  assert output.splitlines()[-1].startswith('stopped; the same command goes on')
  assert not (tmp_path / 'out' / 'meta.json').exists()


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory, python):
  """Runs a binary on lists of flags, in one process: by name."""

  def of(binary, cases):
    folder = tmp_path_factory.mktemp('cases')
    (folder / 'in.json').write_text(json.dumps(cases))
    script = ROOT / 'tests' / 'run_cases.py'
    subprocess.run(
        [python, script, binary, folder / 'in.json', folder / 'out'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=True,
    )
    return json.loads((folder / 'out').read_text())

  return of


def test_prepare_data_prints_a_summary_and_verifies(tmp_path, outcomes):
  source = write_corpus(tmp_path / 'source', texts(120))
  for name in 'ab':
    run_text(tmp_path / name, source)
  path = tmp_path / 'b' / 'train' / '00000.tokens.npy'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  shards.open_tokens(tmp_path / 'b', 'train')  # Which compares sizes only.
  again = [
      f'--output={tmp_path}/a',
      f'--source={source}',
      '--vocab_size=320',
      '--validation_fraction=0.2',
      '--shard_tokens=500',
  ]
  found = outcomes(
      'prepare_data',
      {
          'again': again,
          'good': [f'--output={tmp_path}/a', '--verify'],
          'two': [
              f'--output={tmp_path}/c',
              f'--source={source}',
              f'--source=text:{ROOT}/README.md',
              '--vocab_size=400',
              '--workers=1',
          ],
          'lost': [
              f'--output={tmp_path}/d',
              f'--source=jsonl:{ROOT}/README.md',
          ],
          'damaged': [f'--output={tmp_path}/b', '--verify'],
      },
  )
  status, output = found['again']
  assert status == 0 and 'nothing to do' in output
  for part in ('train: ', 'pieces per word', '2 bad_json', '320 word pieces'):
    assert part in output
  status, output = found['good']
  assert status == 0 and 'as they were written' in output
  assert found['two'][0] == 0
  assert ' + text:' in (tmp_path / 'c' / 'meta.json').read_text()
  status, output = found['lost']
  assert status == 1 and len(output.splitlines()) == 1
  status, output = found['damaged']
  assert status == 1
  assert output.startswith(f'error: {path} is damaged (SHA-256')


def test_prepare_clicks_prints_a_summary_and_verifies(tmp_path, outcomes):
  source = write_clicks(tmp_path)
  output = tmp_path / 'data'
  run_clicks(output / 'same', source)
  found = outcomes(
      'prepare_clicks',
      {
          'good': [
              f'--source={source}',
              f'--output={output}/new',
              '--validation_fraction=0.1',
              '--test_fraction=0.2',
              '--shard_lines=64',
              '--workers=1',
              '--max_rejected=0.5',
              '--verify',
          ],
          'no source': [f'--output={output}'],
          'no file': ['--source=criteo:nowhere.txt', f'--output={output}'],
      },
  )
  status, text = found['good']
  assert status == 0 and 'as they were written' in text
  assert 'rejected lines: 1 damaged_file, 3 wrong_columns' in text
  assert contents(output / 'new') == contents(output / 'same')
  assert found['no source'][0] == 1
  assert '--source is missing' in found['no source'][1]
  assert found['no file'] == [1, 'error: There is no file nowhere.txt.\n']


BAD_FLAGS = {
    'no output': ([], '--output is missing'),
    'stray': (['--output={}/o', 'stray'], "unexpected argument 'stray'"),
    'source': (['--output={}/o', '--source=ftp:a'], "Unknown source 'ftp:a'"),
    'no file': (['--output={}/o', '--source=text:{}/none'], 'There is no file'),
    'tokenizer': (['--output={}/o', '--tokenizer={}/none'], 'No such file'),
    'file': (['--output={}/file/o'], 'Not a directory'),
    'filter': (['--output={}/o', '--filter=x'], "no filter 'x'"),
    'list': (['--output={}/o', '--paragraph_ids={}/file'], 'selects from WET'),
    'verify': (['--output={}/o', '--verify'], 'holds no prepared data'),
    'hub': (['--output={}/o', '--source=hf:a/b'], 'Cannot read hf:a/b'),
}


@pytest.fixture(scope='module')
def refused(tmp_path_factory, outcomes):
  folder = tmp_path_factory.mktemp('bad')
  (folder / 'file').touch()
  return outcomes(
      'prepare_data',
      {
          name: [flag.format(folder) for flag in given]
          for name, (given, _) in BAD_FLAGS.items()
      },
  )


@pytest.mark.parametrize('name', BAD_FLAGS)
def test_bad_input_is_one_line_and_status_1(refused, name):
  status, output = refused[name]
  assert status == 1
  assert output.startswith('error: ') and BAD_FLAGS[name][1] in output
  assert len(output.splitlines()) == 1
