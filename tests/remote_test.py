"""What groups exchange may live in a bucket."""

import numpy as np

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.plan import Plan, Waiting
from codistill_jax.exchange.publications import Publication
from codistill_jax.exchange.store_exchange import CheckpointExchange
from codistill_jax.storage.background import Patience

ROOT = 's3://bucket/run/exchange'
IDENTITY = {'task': 'toy'}


def variables_of(value):
  return Variables(
      {'w': np.full((30, 20), value, np.float32)}, {'n': np.array(3, np.int32)}
  )


def join(group_id, **plan):
  return CheckpointExchange(
      ROOT,
      group_id,
      2,
      like=variables_of(0),
      plan=Plan(every=10, **plan),
      identity=IDENTITY,
      keep=2,
      waiting=Waiting(20.0),
      patience=Patience(remote_lease_settle=0.05),
  )


def value_of(teachers):
  return float(np.asarray(teachers.variables.params['w'])[0, 0, 0])


def test_two_groups_exchange_in_lockstep(bucket):
  groups = [join(g, mode='lockstep') for g in (0, 1)]
  try:
    for step in range(10, 60, 10):
      for g, exchange in enumerate(groups):
        exchange.publish_if_due(step, variables_of(100 * g + step))
      for g, exchange in enumerate(groups):
        assert value_of(exchange.fetch(step)) == 100 * (1 - g) + step
        exchange.checkpointed(step)
  finally:
    for exchange in groups:
      exchange.close()
  # Pruned, but for what is kept.
  for g in (0, 1):
    steps = publications.published_steps(ROOT, g)
    assert steps[-1] == 50 and 2 <= len(steps) < 5
  assert all(exchange.rejected == 0 for exchange in groups)


def test_a_restarted_group_takes_what_it_used(bucket):
  for step in (10, 20):
    publications.write(
        ROOT, Publication(1, step, 12.5, IDENTITY), variables_of(step)
    )
  exchange = join(0, mode='freshest')
  try:
    exchange.restore(20, [10])
    assert exchange.in_use[0].step == 10
    assert value_of(exchange.fetch(20)) in (10, 20)
  finally:
    exchange.close()


def test_a_damaged_publication_is_named_and_not_used(bucket):
  for step in (10, 20):
    publications.write(
        ROOT, Publication(1, step, 12.5, IDENTITY), variables_of(step)
    )
  start = '/bucket/run/exchange/group_1/20/arrays/'
  for path in [x for x in bucket.store if x.startswith(start)]:
    bucket.pipe_file(path, bucket.store[path].getvalue()[:-1])
  exchange = join(0, mode='freshest')
  try:
    exchange.restore(20, [20])
    assert exchange.in_use[0].step == 10
    assert exchange.rejected == 1 and 'group_1/20' in exchange.last_rejection
  finally:
    exchange.close()
