"""What groups exchange, and record, may live in a bucket, also a bad one."""

import contextlib
import itertools
import os
import re
import subprocess
import threading
import time

import pytest
import remote
import tiny_run
from exchange_kit import (
    HASTY,
    IDENTITY,
    kept,
    plan_of,
    publish,
    shown,
    steps_in_use,
    variables_of,
)
from waits import PATIENCE, Clock, until

from codistill_jax import run_directory, writers
from codistill_jax.data import criteo, shards
from codistill_jax.exchange.plan import Waiting
from codistill_jax.exchange.store_exchange import CheckpointExchange
from codistill_jax.storage import files, leases
from codistill_jax.storage.background import Patience, Troubles

ROOT = 's3://bucket/run/exchange'


@contextlib.contextmanager
def joined(group_id=0, **kwargs):
  exchange = CheckpointExchange(
      ROOT,
      group_id,
      2,
      like=variables_of(0),
      plan=plan_of(kwargs),
      identity=IDENTITY,
      keep=2,
      waiting=Waiting(20.0),
      patience=HASTY,
  )
  with contextlib.closing(exchange):
    yield exchange


def test_two_groups_exchange_in_lockstep(bucket):
  with (
      joined(0, mode='lockstep') as ours,
      joined(1, mode='lockstep') as theirs,
  ):
    for step in range(10, 60, 10):
      ours.publish_if_due(step, variables_of(step))
      theirs.publish_if_due(step, variables_of(-step))
      assert shown(ours.fetch(step)) == [-step]
      assert shown(theirs.fetch(step)) == [step]
      ours.checkpointed(step)
      theirs.checkpointed(step)
  # Pruned, but for what is kept.
  for g in (0, 1):
    assert kept(ROOT, g)[-1] == 50 and 2 <= len(kept(ROOT, g)) < 5
  assert ours.rejected == theirs.rejected == 0


@pytest.mark.parametrize('damaged', [False, True])
def test_a_restarted_group_takes_what_it_used(bucket, damaged):
  for step in (10, 20):
    publish(ROOT, 1, step)
  start = '/bucket/run/exchange/group_1/20/arrays/'
  for path in [x for x in bucket.store if damaged and x.startswith(start)]:
    bucket.pipe_file(path, bucket.store[path].getvalue()[:-1])
  with joined() as exchange:
    exchange.restore(20, [20])
    assert steps_in_use(exchange) == (10 if damaged else 20,)
    assert exchange.rejected == damaged
    assert not damaged or 'group_1/20' in exchange.last_rejection


# --- Faults ------------------------------------------------------------------


class CloudError(Exception):
  """As of a client's library: no OSError."""


def refused(count):
  if count % 53 == 0:
    raise CloudError('503 slow down')


@pytest.mark.parametrize('fault', ['refused', 'slow', 'lagging', 'none'])
def test_an_exchange_outlives_faults_of_the_store(bucket, monkeypatch, fault):
  with (
      joined(0, mode='lockstep') as ours,
      joined(1, mode='lockstep') as theirs,
  ):
    requests = itertools.count(1)
    act = {'refused': refused, 'slow': lambda count: time.sleep(0.002)}
    act = act.get(fault, lambda count: None)
    monkeypatch.setattr(
        remote.Bucket, 'request', lambda self, *_: act(next(requests))
    )
    monkeypatch.setattr(remote.Bucket, 'lag', 3 if fault == 'lagging' else 0)
    for step in range(10, 40, 10):
      ours.publish_if_due(step, variables_of(step))
      theirs.publish_if_due(step, variables_of(-step))
      assert shown(ours.fetch(step)) == [-step]
      assert shown(theirs.fetch(step)) == [step]
    monkeypatch.undo()
  assert ours.rejected == theirs.rejected == 0
  assert next(requests) > 50


# --- Leases ------------------------------------------------------------------


@pytest.mark.parametrize('conditional', [True, False])
def test_of_newcomers_that_meet_one_gets_the_lease(
    bucket, monkeypatch, conditional
):
  monkeypatch.setattr(remote.Bucket, 'conditional', conditional)
  # Who relies on the condition does not wait to find out: it would be long.
  patience = Patience(remote_lease_settle=PATIENCE if conditional else 0.3)
  monkeypatch.setattr(leases, 'is_alive', lambda holder: holder and True)
  got, together, wrote = [], threading.Barrier(8), set()

  def request(self, kind, path):
    if kind == 'write' and threading.get_ident() not in wrote:
      wrote.add(threading.get_ident())
      together.wait()  # All have seen that nobody has it.

  monkeypatch.setattr(remote.Bucket, 'request', request)

  def want():
    with contextlib.suppress(leases.HeldError):
      got.append(leases.acquire('s3://bucket/d', 'in', patience=patience))

  wanting = [threading.Thread(target=want) for _ in range(8)]
  start = time.monotonic()
  for thread in wanting:
    thread.start()
  for thread in wanting:
    thread.join()
  assert len(got) == 1
  assert time.monotonic() - start < PATIENCE
  got[0].check()
  got[0].release()


def test_loading_the_client_is_no_slow_write(bucket, monkeypatch):
  clock, loaded = Clock(), []

  def request(self, kind, path):
    if not loaded:
      clock.now += 20.0
    loaded.append(kind)

  monkeypatch.setattr(remote.Bucket, 'request', request)
  monkeypatch.setattr(remote.Bucket, 'conditional', False)
  before = clock.now
  leases.acquire('s3://bucket/d', 'in', clock=clock).release()
  assert clock.now - before < 23.0  # That, and one time to settle.


# --- Records -----------------------------------------------------------------

METRICS = 's3://bucket/run/metrics.jsonl'


def steps_recorded():
  return [r['step'] for r in run_directory.read_metrics(METRICS).records]


def test_records_go_up_in_parts_and_a_kill_loses_one(bucket):
  killed = writers.JsonlWriter(METRICS)
  killed.write(1, {'loss/task': 1.0})
  until(lambda: steps_recorded() == [1])  # The first part, at once.
  for step in range(2, 9):
    killed.write(step, {'loss/task': 1.0})
  whole = steps_recorded()
  assert whole == list(range(1, len(whole) + 1))
  # As after a kill: another process goes on from a checkpoint.
  bucket.pipe_file(METRICS, bucket.cat_file(METRICS) + b'{"step": 9, "ti')
  writer = writers.JsonlWriter(METRICS, resume_step=1)
  for step in (2, 3):
    writer.write(step, {'loss/task': 2.0})
  writer.close()
  assert steps_recorded() == [1, 2, 3]
  killed.close()


def test_records_wait_for_a_store_that_refuses(bucket, monkeypatch):
  troubles = Troubles()
  writer = writers.JsonlWriter(METRICS, troubles=troubles, patience=HASTY)
  down = threading.Event()
  down.set()

  def request(self, kind, path):
    if down.is_set():
      raise CloudError('no route')

  monkeypatch.setattr(remote.Bucket, 'request', request)
  for step in range(1, 5):
    writer.write(step, {'loss/task': 1.0})
  until(lambda: troubles.now)
  down.clear()
  until(lambda: steps_recorded() == [1, 2, 3, 4])
  writer.close()
  assert steps_recorded() == [1, 2, 3, 4] and not troubles.now


# --- Paths -------------------------------------------------------------------


@pytest.mark.parametrize(
    'path',
    [
        *('s3:/lab/run', 'gs:/lab/run', 'gs:', '/tmp/gs:/run', './s3:'),
        *('s3://', 'gs:///', 'S3://lab/run', 's4://lab/run', 'file:///tmp/run'),
        *('/tmp/gs://lab/run', '/s3/lab/run', '/gs', '://lab'),
    ],
)
def test_what_is_no_place_is_refused_by_name(path):
  with pytest.raises(ValueError, match=re.escape(path.lstrip('.'))) as e:
    files.absolute(path)
  assert '\n' not in str(e.value)


def test_a_missing_bucket_is_named(bucket, monkeypatch):
  def request(self, kind, path):
    raise FileNotFoundError('404')

  monkeypatch.setattr(remote.Bucket, 'request', request)
  for write in (files.write_bytes, files.create):
    with pytest.raises(FileNotFoundError, match='no bucket s3://lab, '):
      write('s3://lab/run/a', b'')


def test_a_path_means_the_same_everywhere(tmp_path, monkeypatch, bucket):
  monkeypatch.setenv('HOME', '/home/me')
  cases = {
      '~/run': '/home/me/run',
      'run': os.path.join(os.getcwd(), 'run'),
      '/a/../b/': '/b',
      's3://lab/run': 's3://lab/run',
      '/data/s3/gs.d': '/data/s3/gs.d',
  }
  assert {path: files.absolute(path) for path in cases} == cases


@pytest.mark.parametrize('read', [shards.read_meta, criteo.read_meta])
def test_prepared_data_is_on_a_disk_and_a_home_is_found(read, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  with pytest.raises(ValueError, match='s3://lab/data is in an object store'):
    read('s3://lab/data')
  with pytest.raises(FileNotFoundError, match='/home/me/data'):
    read('~/data')


def test_a_missing_client_is_one_line_that_names_the_extra(python):
  code = """
import sys
from codistill_jax.storage import files
for package, path in (('s3fs', 's3://lab/run'), ('gcsfs', 'gs://lab/run')):
  sys.modules[package] = None
  try:
    files.read_bytes(path)
  except ValueError as e:
    print(e)
"""
  said = subprocess.run(
      [python, '-c', code], cwd=tiny_run.ROOT, capture_output=True, text=True
  ).stdout.splitlines()
  assert "'codistill_jax[s3]'" in said[0]
  assert "'codistill_jax[gcs]'" in said[1]
  assert len(said) == 2
