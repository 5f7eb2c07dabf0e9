"""What groups exchange may live in a bucket."""

import contextlib

import pytest
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

from codistill_jax.exchange.plan import Waiting
from codistill_jax.exchange.store_exchange import CheckpointExchange

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
