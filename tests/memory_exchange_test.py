"""Groups of one process: copies, modes, dtypes, threads, and resumption."""

import concurrent.futures
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from waits import PATIENCE

from codistill_jax.base import Variables
from codistill_jax.exchange import publications
from codistill_jax.exchange.memory_exchange import Mirror, memory_exchanges
from codistill_jax.exchange.protocol import Plan, StaleError
from codistill_jax.group import run_group
from codistill_jax.storage import checkpoints

EVERY = 5
MODEL, TX = toy.RECURRENT, toy.ADAM
IDENTITY = {'tokenizer': 'abc'}


def train_step(number=4):
  return toy.on_replicas(MODEL, TX, number)


def start(group_id):
  return toy.start(MODEL, TX, group_id)


def run(exchange, group_id, state=None, *, num_steps, step=None):
  return run_group(
      step or train_step(),
      start(group_id) if state is None else state,
      toy.Tokens(8, group_id=group_id),
      num_steps=num_steps,
      exchange=exchange,
  )


def states_of(exchanges, starts=None, *, num_steps):
  """Step -> collected states of all groups, stepped in turn."""
  starts = starts or [None] * len(exchanges)
  groups = [
      run(exchange, g, state, num_steps=num_steps)
      for g, (exchange, state) in enumerate(zip(exchanges, starts))
  ]
  return {
      turn[0].step: [train_step().collect(r.state) for r in turn]
      for turn in zip(*groups)
  }


def variables(value, dtype=np.float32):
  return Variables({'w': np.full(3, value, dtype)}, {'n': np.int32(value)})


def shown(teachers):
  """The values of the teachers, one per peer; None where one is absent."""
  if teachers is None:
    return None
  values = teachers.variables.params['w'][:, 0]
  return [float(v) if p else None for v, p in zip(values, teachers.present_P)]


# -- publish ------------------------------------------------------------------


def test_it_publishes_at_multiples_of_the_interval_only():
  ours, theirs = memory_exchanges(2, every=EVERY, mode='freshest')
  for step in range(12):
    due = step in (5, 10)
    assert ours.publish_if_due(step, variables(step)) is due
    assert shown(theirs.fetch(step)) == (None if step < 5 else [step // 5 * 5])


def test_what_was_published_is_a_copy():
  ours, theirs = memory_exchanges(2, every=1, mode='freshest')
  mine = variables(1)
  ours.publish_if_due(1, mine)
  mine.params['w'][:] = 9.0
  assert shown(theirs.fetch(1)) == [1.0]


def test_publications_outlive_the_donated_state():
  # On CPU numpy.asarray gives a view of a buffer that the next step reuses.
  ours, theirs = memory_exchanges(2, every=1)
  step, stream = train_step(), toy.Tokens(8)
  state = step.place(start(0))
  for n in range(1, 4):
    state, _ = step(state, stream.batch(n), None, 0.0)
    ours.publish_if_due(n, state.variables)
    expected = jax.tree.map(np.array, state.variables)
    for _ in range(3):
      state, _ = step(state, stream.batch(n), None, 0.0)
    teachers = theirs.fetch(n)
    toy.assert_same(jax.tree.map(lambda x: x[0], teachers.variables), expected)


# -- fetch --------------------------------------------------------------------


def test_freshest_takes_the_newest_at_exchange_steps_and_never_waits():
  one, two, three = memory_exchanges(3, every=EVERY, mode='freshest')
  assert one.fetch(0) is None and one.fetch(5) is None
  two.publish_if_due(5, variables(5))
  # Whoever is without a teacher looks again at once; else at the next due.
  first = one.fetch(6)
  assert shown(first) == [5.0, None]
  three.publish_if_due(5, variables(50))
  two.publish_if_due(10, variables(10))
  assert one.fetch(7) is first and one.fetch(9) is first
  assert shown(one.fetch(10)) == [10.0, 50.0]
  assert [p.step for p in one.in_use] == [10, 5]
  assert [p.group_id for p in one.in_use] == [1, 2]
  # The same object until a teacher changes: nothing is placed again.
  assert one.fetch(15) is one.fetch(20)


def test_freshest_moves_forward_only():
  ours, theirs = memory_exchanges(2, every=EVERY, mode='freshest')
  ours.publish_if_due(10, variables(10))
  theirs.fetch(5)
  ours.publish_if_due(5, variables(5))  # Of a run that began again.
  assert shown(theirs.fetch(10)) == [10.0]


def test_lockstep_takes_what_was_asked_though_newer_is_there():
  plan = Plan(EVERY, 'lockstep', staleness=EVERY)
  ours, theirs = memory_exchanges(2, plan=plan)
  for step in (5, 10, 15):
    ours.publish_if_due(step, variables(step))
  assert theirs.fetch(9) is None
  assert shown(theirs.fetch(10)) == [5.0]
  assert shown(theirs.fetch(14)) == [5.0]
  assert shown(theirs.fetch(15)) == [10.0]


def test_lockstep_says_which_group_is_missing_and_what_to_do():
  ours, theirs = memory_exchanges(2, every=EVERY)
  ours.publish_if_due(5, variables(5))
  message = (
      'group 0 has not published step 10 within 0 s; its newest is step 5. Step'
      ' all groups in turn, or run them in threads with a timeout_seconds'
  )
  with pytest.raises(TimeoutError, match=re.escape(message)):
    theirs.fetch(10)
  with pytest.raises(TimeoutError, match='its newest is step none'):
    ours.fetch(10)


def test_a_group_alone_has_no_teachers():
  (alone,) = memory_exchanges(1, every=EVERY)
  assert alone.publish_if_due(5, variables(5)) and alone.fetch(5) is None
  alone.close()
  with pytest.raises(ValueError, match='num_groups=0'):
    memory_exchanges(0)


@pytest.mark.parametrize(
    'publish_dtype, teacher_dtype, value, dtype',
    [
        ('float32', 'float32', 1.001, 'float32'),
        ('float32', 'bfloat16', 1.0, 'bfloat16'),
        ('bfloat16', 'float32', 1.0, 'float32'),  # Rounded by the publisher.
        ('bfloat16', 'bfloat16', 1.0, 'bfloat16'),
    ],
)
def test_dtypes_of_publications_and_of_teachers(
    publish_dtype, teacher_dtype, value, dtype
):
  plan = Plan(EVERY, 'lockstep', 0, publish_dtype, teacher_dtype)
  ours, theirs = memory_exchanges(2, plan=plan)
  ours.publish_if_due(5, variables(1.001))
  found = theirs.fetch(5).variables
  assert found.params['w'].dtype == jnp.dtype(dtype)
  assert float(found.params['w'][0, 0]) == pytest.approx(value, abs=1e-6)
  assert found.model_state['n'].dtype == np.int32


def test_groups_in_threads_end_like_groups_in_turn():
  # One device: collectives of two programs must not interleave.
  step = train_step(number=1)

  def groups(exchanges):
    return [run(exchanges[g], g, num_steps=17, step=step) for g in range(2)]

  *_, turn = zip(*groups(memory_exchanges(2, every=EVERY)))
  ends = {}
  threads = []
  exchanges = memory_exchanges(2, every=EVERY, timeout_seconds=600.0)
  for g, group in enumerate(groups(exchanges)):
    finish = lambda g=g, group=group: ends.update({g: [*group][-1]})
    threads.append(threading.Thread(target=finish))
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for g, result in enumerate(turn):
    toy.assert_same(step.collect(ends[g].state), step.collect(result.state))


# -- resumption ---------------------------------------------------------------


def mirrored(root, staleness=0, num_groups=2):
  plan = Plan(EVERY, 'lockstep', staleness)
  mirror = Mirror(root, start(0).variables, IDENTITY)
  return memory_exchanges(num_groups, plan=plan, mirror=mirror)


@pytest.mark.parametrize('staleness', [0, EVERY])
def test_a_restart_from_the_mirror_gives_the_same_bits(tmp_path, staleness):
  plan = Plan(EVERY, 'lockstep', staleness)
  whole = states_of(memory_exchanges(2, plan=plan), num_steps=27)

  killed = mirrored(tmp_path, staleness)
  # Killed long after the checkpoint that is resumed from.
  seen = states_of(killed, num_steps=27)
  toy.assert_same(seen, whole)  # To keep them on disk changes nothing.
  for n in (10, 13):  # At an exchange step, and between two.
    exchanges = mirrored(tmp_path, staleness)
    for exchange, old in zip(exchanges, killed):
      steps = [p and p.step for p in old.in_use]
      exchange.restore(n, steps)
    resumed = states_of(exchanges, seen[n], num_steps=17)
    toy.assert_same(resumed, {k: whole[k] for k in range(n + 1, 18)})


def test_a_restart_makes_the_publication_that_a_killed_run_did_not(tmp_path):
  seen = states_of(mirrored(tmp_path), num_steps=12)
  for group_id in range(2):
    directory = publications.group_directory(tmp_path, group_id)
    checkpoints.delete(directory, [10])
  exchanges = mirrored(tmp_path)
  for exchange in exchanges:
    exchange.restore(10, [5])
  resumed = states_of(exchanges, seen[10], num_steps=12)
  toy.assert_same(resumed, {k: seen[k] for k in (11, 12)})


def test_from_an_exchange_step_a_run_goes_on_without_a_mirror():
  seen = states_of(memory_exchanges(2, every=EVERY), num_steps=12)
  exchanges = memory_exchanges(2, every=EVERY)
  resumed = states_of(exchanges, seen[10], num_steps=12)
  toy.assert_same(resumed, {k: seen[k] for k in (11, 12)})


def test_a_restart_refuses_peers_of_another_task(tmp_path):
  states_of(mirrored(tmp_path), num_steps=5)
  mirror = Mirror(tmp_path, start(0).variables, {'tokenizer': 'xyz'})
  ours, _ = memory_exchanges(2, every=EVERY, mirror=mirror)
  with pytest.raises(checkpoints.MismatchError, match='tokenizer=abc'):
    ours.restore(5, [None])


def test_publications_that_no_restart_needs_are_deleted(tmp_path):
  ours, theirs = mirrored(tmp_path, staleness=EVERY)

  def kept():
    return publications.published_steps(tmp_path, 0)

  for step in range(5, 31, 5):
    ours.publish_if_due(step, start(0).variables)
    theirs.publish_if_due(step, start(1).variables)
  ours.checkpointed(20)
  # Others may not have made theirs: the checkpoint before this one counts.
  assert kept() == [5, 10, 15, 20, 25, 30]
  ours.checkpointed(20)
  assert kept() == [5, 10, 15, 20, 25, 30]
  ours.checkpointed(30)
  assert kept() == [15, 20, 25, 30]
  ours.checkpointed(90)
  assert kept() == [25, 30]
  ours.checkpointed(200)
  assert kept() == [30]  # The newest is what an evaluation looks at.
  assert publications.published_steps(tmp_path, 1) == [5, 10, 15, 20, 25, 30]


# --- Limits, topologies, a disk that refuses ---------------------------------


def test_a_stale_peer_is_dropped_and_taken_back():
  plan = Plan(every=5, max_staleness_steps=10)
  ours, theirs, third = memory_exchanges(3, plan=plan)
  theirs.publish_if_due(5, variables(1))
  third.publish_if_due(10, variables(2))
  assert ours.fetch(15).present_P.tolist() == [1, 1]
  assert ours.fetch(16).present_P.tolist() == [0, 1]
  assert ours.metrics(16)['exchange/peers_present'] == 1
  assert ours.fetch(21) is None
  theirs.publish_if_due(20, variables(3))
  assert ours.fetch(21).present_P.tolist() == [1, 0]


@pytest.mark.parametrize(
    'policy, error', [('fail', StaleError), ('wait', TimeoutError)]
)
def test_a_stale_peer_ends_the_run_if_told_to(policy, error):
  plan = Plan(every=5, max_staleness_steps=10, staleness_policy=policy)
  ours, theirs = memory_exchanges(2, plan=plan)
  theirs.publish_if_due(5, variables(1))
  assert ours.fetch(15) is not None
  with pytest.raises(error, match='group 1'):
    ours.fetch(16)


def test_the_policy_wait_waits_for_a_thread():
  plan = Plan(every=5, max_staleness_steps=10, staleness_policy='wait')
  ours, theirs = memory_exchanges(2, plan=plan, timeout_seconds=600.0)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(ours.fetch, 16)
    theirs.publish_if_due(5, variables(1))  # Too old.
    theirs.publish_if_due(10, variables(2))
    assert waiting.result(PATIENCE) is not None
  assert ours.in_use[0].step == 10


def test_a_ring_in_memory_is_a_ring():
  plan = Plan(every=5, topology='ring')
  exchanges = memory_exchanges(4, plan=plan)
  assert [e.peers for e in exchanges] == [(3,), (0,), (1,), (2,)]
  exchanges[2].publish_if_due(5, variables(1))
  got = [e.fetch(5) is not None for e in exchanges]
  assert got == [False, False, False, True]


def test_a_full_disk_holds_up_the_mirror_and_not_the_training(
    tmp_path, monkeypatch
):
  original, full = publications.write, [True]

  def write(*args):
    if full:
      raise OSError(28, 'No space left on device')
    return original(*args)

  monkeypatch.setattr(publications, 'write', write)
  mirror = Mirror(tmp_path, variables(0), {})
  ours, theirs = memory_exchanges(2, every=5, mirror=mirror)
  for step in range(5, 55, 5):
    assert theirs.publish_if_due(step, variables(step))
    assert ours.fetch(step) is not None
  assert publications.published_steps(tmp_path, 1) == []
  with pytest.raises(OSError, match='not on disk yet'):
    theirs.settle(50)  # So no checkpoint is made that would need them.
  full.clear()
  theirs.settle(50)
  # A restart from the beginning makes the others again.
  assert publications.published_steps(tmp_path, 1) == [45, 50]


def test_an_update_that_went_wrong_is_not_published():
  ours, theirs = memory_exchanges(2, every=5, mode='freshest')
  with pytest.raises(FloatingPointError, match='loss/total of group 1 is nan'):
    theirs.publish_if_due(5, variables(1), {'loss/total': float('nan')})
  assert ours.fetch(5) is None
