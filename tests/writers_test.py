"""Tests of writers: no step twice, no record lost, valid JSON always."""

import errno
import io
import itertools
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from waits import until

from codistill_jax import run_directory, writers
from codistill_jax.storage.background import Patience, Troubles


def _steps(path) -> list[int]:
  return [r['step'] for r in run_directory.read_metrics(path).records]


def _write_steps(path, steps, **kwargs) -> None:
  writer = writers.JsonlWriter(path, **kwargs)
  for step in steps:
    writer.write(step, {'loss/task': float(step)})
  writer.close()


def test_device_arrays_become_floats(tmp_path):
  path = tmp_path / 'deep' / 'metrics.jsonl'
  writer = writers.JsonlWriter(path, clock=lambda: 12.5)
  values = {
      'float32': jnp.float32(0.5),
      'bfloat16': jnp.asarray(0.5, jnp.bfloat16),
      'vector': jnp.asarray([0.5]),
      'numpy': np.float64(0.5),
      'python': 0.5,
  }
  writer.write(jnp.int32(3), values)
  writer.close()
  (line,) = path.read_text().splitlines()
  expected = {'step': 3, 'time': 12.5, **dict.fromkeys(values, 0.5)}
  assert json.loads(line) == expected


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  values = {'a': math.nan, 'b': math.inf, 'c': jnp.float32(-math.inf)}
  writer = writers.JsonlWriter(path)
  writer.write(1, values)
  writer.close()
  json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
  (record,) = run_directory.read_metrics(path).records
  assert math.isnan(record['a'])
  assert (record['b'], record['c']) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    'key, value, message',
    [
        *(
            ('loss/task', x, 'must be one number')
            for x in (np.ones(2), 'a', None)
        ),
        *((key, 1.0, 'is taken') for key in ('step', 'time')),
    ],
)
def test_what_is_no_metric_is_refused_by_name(tmp_path, key, value, message):
  writer = writers.JsonlWriter(tmp_path / 'metrics.jsonl')
  with pytest.raises(ValueError, match=f"'{key}' {message}"):
    writer.write(1, {key: value})
  writer.close()
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_a_torn_line_is_repaired_at_every_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  _write_steps(path, [1, 2])
  whole = path.read_bytes()
  first = whole.index(b'\n') + 1
  for cut in range(first, len(whole)):
    path.write_bytes(whole[:cut])
    _write_steps(path, [5])
    assert run_directory.read_metrics(path).damaged == 0
    assert _steps(path) == [1, 5]
    assert path.read_bytes().startswith(whole[:first])


def test_resume_drops_what_will_be_written_again(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  _write_steps(path, range(10, 60, 10))
  with path.open('ab') as f:
    f.write(b'{"step": 60, "ti')
  _write_steps(path, [40, 50], resume_step=30)
  assert _steps(path) == [10, 20, 30, 40, 50]
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_damaged_whole_lines_stay_for_a_person(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\nwhat \r is this\n{"step": 9}\n')
  _write_steps(path, [], resume_step=1)
  assert path.read_bytes() == b'{"step": 1}\nwhat \r is this\n'


def test_a_kill_loses_no_written_record(tmp_path, python):
  code = (
      'import os, signal, sys\n'
      'from codistill_jax import writers\n'
      'writer = writers.JsonlWriter(sys.argv[1])\n'
      'for step in range(1, 4):\n'
      '  writer.write(step, {"loss/task": 1.0})\n'
      'os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  path = tmp_path / 'metrics.jsonl'
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  done = subprocess.run([python, '-c', code, str(path)], cwd=root)
  assert done.returncode == -signal.SIGKILL
  assert _steps(path) == [1, 2, 3]


QUICK = Patience(retry=0.01, longest_retry=0.01)


@pytest.fixture
def free():
  """Lets a file grow by so many bytes only; a limit stands for the disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def set_free(path, size):
    limit = soft if size is None else os.path.getsize(path) + size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

  yield set_free
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('size', [0, 1, 30, 70])
def test_a_full_disk_loses_no_record_and_leaves_no_half_line(
    tmp_path, caplog, free, size
):
  path, now = tmp_path / 'metrics.jsonl', Troubles()
  writer = writers.JsonlWriter(
      path, clock=lambda: 1.0, troubles=now, patience=QUICK
  )
  with caplog.at_level(logging.WARNING, logger='absl'):
    writer.write(1, {'loss/task': 1.0})
    free(path, size)
    for step in (2, 3, 4):
      writer.write(step, {'loss/task': 1.0})
    assert [t.doing for t in now.now] == ['writing metrics']
    free(path, None)
    until(lambda: not now.now)  # It needs no further record for that.
    writer.write(5, {'loss/task': 1.0})
    until(lambda: _steps(path) == [1, 2, 3, 4, 5])
  writer.close()
  assert caplog.text.count('File too large') == 1
  assert run_directory.read_metrics(path).damaged == 0


def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path, free):
  path = tmp_path / 'metrics.jsonl'
  writer = writers.JsonlWriter(path, patience=QUICK)
  writer.write(1, {'loss/task': 1.0})
  free(path, 10)
  writer.write(2, {'loss/task': 1.0})
  with pytest.raises(TimeoutError, match=r'1 records .*metrics.jsonl .*large'):
    writer.close()
  free(path, None)
  _write_steps(path, [2])  # As the next process does.
  assert _steps(path) == [1, 2]


def test_what_waits_for_the_disk_is_bounded(tmp_path, free):
  path = tmp_path / 'metrics.jsonl'
  writer = writers.JsonlWriter(path, patience=QUICK, room=3)
  free(path, 0)
  for step in range(1, 8):
    writer.write(step, {'loss/task': 1.0})
  free(path, None)
  writer.close()
  # The newest; and one that was being tried, or not yet.
  assert _steps(path)[-3:] == [5, 6, 7] and len(_steps(path)) < 5


def test_a_log_on_a_full_disk_does_not_end_training():
  class Full(io.StringIO):

    def write(self, text):
      raise OSError(errno.ENOSPC, 'disk full')

  writers.ProgressWriter(50, stream=Full()).write(10, _TRAIN)


def _event_bytes(logdir) -> bytes:
  return b''.join(p.read_bytes() for p in sorted(logdir.iterdir()))


def test_tensorboard_takes_scalars_and_marks_a_resume(tmp_path):
  for resume_step in (None, 1):
    writer = writers.TensorBoardWriter(tmp_path, resume_step=resume_step)
    writer.write(2, {'loss/task': jnp.float32(0.5)})
    writer.close()
    data = _event_bytes(tmp_path)
    assert b'loss/task' in data
    # A session log of status START, 1, tells TensorBoard to purge.
    assert (b'\x3a\x02\x08\x01' in data) == (resume_step is not None)


def test_tensorboard_imports_nothing_large_that_it_does_not_use(
    tmp_path, monkeypatch
):
  (tmp_path / 'torch.py').write_text('raise AssertionError')
  (tmp_path / 'boto3.py').write_text('raise AssertionError')
  code = f"""
    from codistill_jax import writers
    writers.TensorBoardWriter({str(tmp_path / 'events')!r}).close()
    try:
      import torch
    except AssertionError:
      print('is there for others')
  """
  monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{os.getcwd()}')
  run = [sys.executable, '-c', textwrap.dedent(code)]
  assert b'is there for others' in subprocess.check_output(run)


def test_tensorboard_outlives_a_nan(tmp_path, caplog):
  writer = writers.TensorBoardWriter(tmp_path)
  with caplog.at_level(logging.ERROR):
    writer.write(1, {'loss/task': math.nan})
    writer.write(2, {'loss/later': 1.0})
  writer.close()
  assert b'loss/later' in _event_bytes(tmp_path)


def test_tensorboard_outlives_a_full_disk(tmp_path, free):
  """Its thread must go on, or a later write would wait for it for ever."""
  now = Troubles()
  writer = writers.TensorBoardWriter(tmp_path, troubles=now, patience=QUICK)
  writer.write(1, {'loss/first': 1.0})
  writer._writer.flush()
  (path,) = tmp_path.iterdir()
  free(path, 5)
  for step in range(2, 40):  # More than its queue holds.
    writer.write(step, {'loss/task': 1.0})
    writer._writer.flush()
  assert [t.doing for t in now.now] == ['writing TensorBoard events']
  free(path, None)
  writer.write(40, {'loss/last': 1.0})
  writer.close()
  assert b'loss/last' in _event_bytes(tmp_path)
  assert not now.now


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


_TRAIN = {
    'loss/task': 5.1234,
    'perf/steps_per_sec': 12.34,
    'exchange/staleness_steps': 20.0,
    'optim/grad_norm': 7.0,
}


def test_plain_lines_come_at_intervals_but_evaluations_and_the_end_always():
  stream, now = io.StringIO(), [0.0]
  writer = writers.ProgressWriter(
      50, name='group 1', stream=stream, every_seconds=10, clock=lambda: now[0]
  )
  for step, time in [(10, 0), (20, 5), (30, 10), (40, 11), (50, 12)]:
    now[0] = time
    writer.write(step, _TRAIN)
    if step == 20:
      writer.write(step, {'eval/loss': 5.0, 'eval/perplexity': 148.41})
  writer.close()
  numbers = '  loss/task 5.123  12.3 steps/s  staleness 20'
  assert stream.getvalue().splitlines() == [
      'group 1  step 10/50' + numbers,
      'group 1  step 20/50  eval/loss 5.0000  perplexity 148.4',
      'group 1  step 30/50' + numbers,
      'group 1  step 50/50' + numbers,
  ]


class _Notebook(io.StringIO):
  __module__ = 'ipykernel.iostream'


@pytest.mark.parametrize('kind', [_Terminal, _Notebook])
def test_people_get_a_bar_that_starts_where_the_run_resumes(kind):
  stream = kind()
  writer = writers.ProgressWriter(100, resume_step=40, stream=stream)
  assert '40/100' in stream.getvalue()
  writer.write(50, _TRAIN)
  writer.write(50, {'eval/loss': 5.0})
  writer.write(100, _TRAIN)
  writer.close()
  assert 'step 50/100  eval/loss 5.0000\n' in stream.getvalue()
  assert '100/100' in stream.getvalue().splitlines()[-1]
  assert 'loss/task 5.123' in stream.getvalue()


class _Recorder:

  def __init__(self, error: Exception | None = None):
    self.seen, self.closed, self._error = [], False, error

  def write(self, step, metrics):
    self.seen.append((step, dict(metrics)))

  def close(self):
    self.closed = True
    if self._error:
      raise self._error


def test_several_writers_get_the_same_and_all_are_closed():
  first, last = _Recorder(OSError('disk is full')), _Recorder()
  writer = writers.MultiWriter([first, writers.NullWriter(), last])
  writer.write(1, {'loss/task': jnp.float32(0.5)})
  assert first.seen == last.seen == [(1, {'loss/task': 0.5})]
  with pytest.raises(OSError, match='disk is full'):
    writer.close()
  assert last.closed


def of_ones_own(failing, recorder):
  """A class of writers whose calls of these numbers fail; 0 makes it."""
  calls = itertools.count()

  def call(do, *args):
    if next(calls) in failing:
      raise KeyError('broken')
    do(*args)

  class Mine:

    def __init__(self, source):
      assert source.group_id == 1
      call(lambda: None)

    def write(self, step, metrics):
      call(recorder.write, step, metrics)
      metrics.clear()  # Nobody else's.

    def close(self):
      call(recorder.close)

  return Mine


@pytest.mark.parametrize(
    'failing, got, said',
    [
        ([], [1, 2, 3, 4], []),
        ([2, 3], [1, 4], ['fails', 'after 2 failures', 'missed 2 of 4']),
        ([5], [1, 2, 3, 4], ['fails']),
        # It is made again with the records 1, 2 and 4.
        ([0, 1, 2], [4], ['fails', 'after 3 failures', 'missed 3 of 4']),
        (range(99), [], ['fails', 'missed 4 of 4']),
    ],
)
def test_what_a_writer_of_ones_own_raises_is_said_once_and_counted(
    failing, got, said, caplog
):
  recorder, other = _Recorder(), _Recorder()
  own = writers.OwnWriter(
      of_ones_own(failing, recorder),
      writers.Source('run/groups/group_1', 'run', 1, 2, 0),
      Troubles(),
  )
  writer = writers.MultiWriter([own, other])
  for step in (1, 2, 3, 4):
    writer.write(step, {'loss/task': 1.0})
  writer.close()
  assert recorder.seen == [(step, {'loss/task': 1.0}) for step in got]
  assert recorder.closed == (5 not in failing)
  assert other.seen == [(step, {'loss/task': 1.0}) for step in (1, 2, 3, 4)]
  found = [r.getMessage() for r in caplog.records]
  assert all(words in text for words, text in zip(said, found, strict=True))
  if said:
    assert 'writers_test.of_ones_own.<locals>.Mine fails' in found[0]
    assert "KeyError: 'broken'" in found[0]


def test_a_writer_serves_one_run(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer = writers.JsonlWriter(path)
  for step in (10, 30, 30):  # An update and its evaluation.
    writer.write(step, {'loss': 1.0})
  for again in (writer, writers.JsonlWriter(path)):
    with pytest.raises(ValueError, match='step 10 after one of step 30; make'):
      again.write(10, {'loss': 1.0})
    again.close()
  with pytest.raises(ValueError, match='after it was closed; make a new one'):
    writer.write(40, {'loss': 2.0})
  assert _steps(path) == [10, 30, 30]
  _write_steps(path, [10], resume_step=0)
  assert _steps(path) == [10]
