"""What every exchange of publications does, whatever its store and mode."""

import concurrent.futures
import logging
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from exchange_kit import (
    EVERY,
    HASTY,
    IDENTITY,
    fetch_until,
    plan_of,
    shown,
    steps_in_use,
    variables_of,
)
from exchange_kit import join as join
from exchange_kit import publish as publish_in
from waits import PATIENCE

from codistill_jax.exchange.plan import PeerError, Plan, StaleError, Waiting
from codistill_jax.exchange.store_exchange import (
    CheckpointExchange,
    memory_exchanges,
)
from codistill_jax.exchange.stores import Mirror
from codistill_jax.group import run_group
from codistill_jax.storage.background import Interrupted

STORES = ('memory', 'directory')
MODES = ('freshest', 'lockstep')
LIMIT = {'max_staleness_steps': 20}


def exchanges_of(store, root, num_groups=2, *, timeout=0.0, like=None, **plan):
  """The exchanges of all groups of a run."""
  plan = plan_of(plan)
  like = variables_of(0) if like is None else like
  if store == 'directory':
    return [
        CheckpointExchange(
            root,
            group_id,
            num_groups,
            like=like,
            plan=plan,
            identity=IDENTITY,
            waiting=Waiting(timeout),
            patience=HASTY,
        )
        for group_id in range(num_groups)
    ]
  mirror = Mirror(root, like, IDENTITY) if store == 'mirrored' else None
  return memory_exchanges(
      num_groups,
      plan=plan,
      timeout_seconds=timeout,
      mirror=mirror,
      patience=HASTY,
  )


@pytest.fixture
def made(request, tmp_path):
  """Makes exchanges, through the store of the test; closes them at the end."""
  every = []

  def make(store, num_groups=2, **kwargs):
    every.extend(exchanges_of(store, tmp_path, num_groups, **kwargs))
    return every[-num_groups:]

  yield make
  for exchange in every:
    exchange.close()


def publish(exchange, step, value=None):
  value = step if value is None else value
  assert exchange.publish_if_due(step, variables_of(value))
  exchange.flush()


both_stores = pytest.mark.parametrize('store', STORES)
both_modes = pytest.mark.parametrize('mode', MODES)


# --- Publishing --------------------------------------------------------------


@both_modes
@both_stores
def test_it_publishes_copies_at_multiples_of_the_interval_only(
    made, store, mode
):
  ours, theirs = made(store, mode=mode)
  due = []
  for n in range(31):
    mine = variables_of(n)
    if ours.publish_if_due(n, mine):
      due.append(n)
    mine.params['w'][:] = 99.0  # As the next step does, which reuses it.
  ours.flush()
  assert due == [n for n in range(31) if ours.due(n)] == [10, 20, 30]
  assert shown(fetch_until(theirs, 30, 30)) == [30.0]


@both_modes
@both_stores
@pytest.mark.parametrize(
    'publish_dtype, teacher_dtype, value',
    [
        ('float32', 'float32', 1.001),
        ('float32', 'bfloat16', 1.0),
        ('bfloat16', 'float32', 1.0),  # Rounded by the publisher.
        ('bfloat16', 'bfloat16', 1.0),
    ],
)
def test_dtypes_of_publications_and_of_teachers(
    made, store, mode, publish_dtype, teacher_dtype, value
):
  ours, theirs = made(
      store,
      mode=mode,
      publish_dtype=publish_dtype,
      teacher_dtype=teacher_dtype,
  )
  publish(ours, 10, 1.001)
  found = fetch_until(theirs, 10, 10).variables
  assert found.params['w'].dtype == jnp.dtype(teacher_dtype)
  assert float(found.params['w'][0, 0]) == pytest.approx(value, abs=1e-6)
  assert found.model_state['n'].dtype == np.int32
  size = 3 * jnp.dtype(publish_dtype).itemsize + 4
  assert ours.metrics(10)['exchange/publication_bytes'] == size
  assert 'exchange/publication_bytes' not in theirs.metrics(10)


@both_modes
@both_stores
@pytest.mark.parametrize('key', ['loss/total', 'optim/grad_norm', 'w'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_not_published(made, store, mode, key, value):
  ours, theirs = made(store, mode=mode, timeout=PATIENCE)
  metrics = {'loss/total': 1.0, 'optim/grad_norm': 1.0}
  if key == 'w':
    bad = value
  else:
    metrics[key], bad = value, 1.0
  ours.publish_if_due(11, variables_of(bad), metrics)  # No exchange step.
  with pytest.raises(FloatingPointError, match=f'{key}.*') as e:
    ours.publish_if_due(10, variables_of(bad), metrics)
    ours.flush()
  assert 'group 0' in str(e.value) and 'step 10' in str(e.value)
  if mode == 'freshest':
    assert theirs.fetch(10) is None
  else:  # It does not wait for what will never come.
    with pytest.raises(PeerError, match=f'group 0 has ended: .*{key}') as e:
      theirs.fetch(10)
  assert '\n' not in str(e.value)


def other_forms():
  """(What, the leaf that is named) of variables that are not as the others."""
  more = variables_of(1)
  more.model_state['losses'] = {'sown': (np.float32(1),)}
  less = variables_of(1)
  del less.model_state['n']
  other = variables_of(1)
  other.params['w'] = other.params['w'].astype(np.float16)
  return [
      (more, 'model_state/losses/sown/0'),
      (less, 'model_state/n'),
      (other, r'params/w float16\[3\]'),
      (variables_of(1, width=4), r'params/w float32\[4\]'),
  ]


@both_modes
@both_stores
@pytest.mark.parametrize('variables, leaf', other_forms())
def test_variables_that_change_their_form_are_named(
    made, store, mode, variables, leaf
):
  for exchange in made(store, mode=mode):  # Its own form, and that of a peer.
    publish(exchange, 10)
    message = f'group . has at step 20.*{leaf}'
    with pytest.raises(ValueError, match=message) as e:
      exchange.publish_if_due(20, variables)
    assert '\n' not in str(e.value)


def test_the_default_of_the_mode_is_one_and_a_plan_has_the_fields():
  ours, theirs = memory_exchanges(2, every=EVERY)
  same, _ = memory_exchanges(2, plan=Plan(every=EVERY))
  for exchange in (ours, same):
    publish(exchange, 10)
    with pytest.raises(TimeoutError):
      exchange.fetch(10)  # In lockstep.
  assert shown(theirs.fetch(10)) == [10.0]
  assert memory_exchanges(2, plan=Plan(mode='freshest'))[0].fetch(50) is None
  for name, value in (('every', 50), ('mode', 'lockstep')):
    with pytest.raises(ValueError, match=f'also {name}; set it in the plan'):
      memory_exchanges(2, plan=Plan(), **{name: value})


@both_stores
def test_a_group_alone_publishes_and_has_no_teachers(made, store):
  (alone,) = made(store, 1)
  publish(alone, 10)
  assert alone.fetch(10) is None and alone.in_use == ()
  with pytest.raises(ValueError, match='num_groups=0'):
    memory_exchanges(0)


@both_modes
@both_stores
def test_who_learns_from_whom_is_the_topology(made, store, mode):
  four = made(store, 4, mode=mode, topology='ring')
  assert [e.peers for e in four] == [(3,), (0,), (1,), (2,)]
  for g, exchange in enumerate(four):
    publish(exchange, 10, g)
  assert [shown(fetch_until(e, 10, 10)) for e in four] == [[3], [0], [1], [2]]


# --- Used twice ---------------------------------------------------------------


def life_of(exchanges, stop=30):
  """Groups that train to step `stop`, in turn; what they were shown."""
  seen = []
  for step in range(stop):
    for exchange in exchanges:
      seen.append(shown(exchange.fetch(step)))
    for exchange in exchanges:
      exchange.publish_if_due(step + 1, variables_of(step + 1))
      exchange.flush()
  return seen


@both_modes
@both_stores
@pytest.mark.parametrize('again', [0, 9, 10, 29])
def test_an_exchange_serves_one_run(made, store, mode, again):
  exchanges = made(store, mode=mode)
  life_of(exchanges)
  uses = [
      lambda e: e.fetch(again),
      lambda e: e.publish_if_due(again - again % EVERY + EVERY, None)
      if again < 20
      else e.fetch(again),
      lambda e: e.restore(again, [None]),
  ]
  for exchange in exchanges:
    for use in uses:
      with pytest.raises(ValueError, match='make new exchanges for another'):
        use(exchange)
    exchange.fetch(30)  # What goes on, goes on.
    exchange.close()
    with pytest.raises(ValueError, match='step 31 after it was closed; make'):
      exchange.fetch(31)


@both_modes
def test_new_exchanges_give_the_numbers_of_the_first_time(mode):
  lives = [life_of(memory_exchanges(2, every=7, mode=mode)) for _ in range(2)]
  assert lives[0] == lives[1]


# --- Freshest ----------------------------------------------------------------


@both_stores
def test_freshest_takes_the_newest_and_never_waits(made, store):
  one, two, three = made(store, 3)
  assert [one.fetch(n) for n in range(15)] == [None] * 15
  publish(two, 10)
  assert shown(fetch_until(one, 16, 10, None)) == [10.0, None]
  publish(three, 10, 50)  # One that is found does not postpone another.
  first = fetch_until(one, 17, 10, 10)
  assert shown(first) == [10.0, 50.0]
  publish(two, 20)
  # The same object until a teacher changes: nothing is placed again; and
  # nothing newer is looked for before the next exchange.
  assert all(one.fetch(n) is first for n in range(17, 20))
  assert shown(fetch_until(one, 20, 20, 10)) == [20.0, 50.0]
  assert [p.group_id for p in one.in_use] == [1, 2]
  assert shown(first) == [10.0, 50.0]  # In use until the swap.
  metrics = one.metrics(25)
  assert metrics['exchange/peers_present'] == 2.0
  assert metrics['exchange/staleness_steps'] == 10.0
  assert metrics['exchange/staleness_steps_max'] == 15.0
  assert metrics['exchange/rejected'] == 0.0


@both_stores
def test_a_stale_peer_is_dropped_and_taken_back(made, store, caplog):
  ours, one, two = made(store, 3, **LIMIT)
  publish(one, 10)
  publish(two, 30)
  teachers = fetch_until(ours, 30, 10, 30)
  assert ours.fetch(30) is teachers
  with caplog.at_level(logging.WARNING, logger='absl'):
    left = ours.fetch(31)
    assert shown(left) == [None, 30.0]
    assert left.variables is teachers.variables  # Nothing is copied.
    assert ours.fetch(32) is left and steps_in_use(ours) == (None, 30)
    assert ours.metrics(32)['exchange/peers_present'] == 1.0
    assert 'alone' not in caplog.text
    assert [ours.fetch(n) for n in range(51, 90)] == [None] * 39
    assert caplog.text.count('group 0 trains alone from step 51 on') == 1
    publish(one, 90)
    assert shown(fetch_until(ours, 90, 90, None)) == [90.0, None]
    assert caplog.text.count('has teachers again at step 90') == 1


@both_stores
def test_a_group_says_once_that_nobody_comes(made, store, caplog):
  ours, _ = made(store)
  with caplog.at_level(logging.WARNING, logger='absl'):
    for n in range(100):
      ours.fetch(n)
      if n == 19:
        assert 'alone' not in caplog.text
  assert caplog.text.count('group 0 trains alone from step 20') == 1


@both_stores
def test_the_policy_fail_ends_the_run_but_looks_first(made, store):
  ours, theirs = made(store, **LIMIT, staleness_policy='fail', timeout=PATIENCE)
  assert ours.fetch(20) is None  # As old as the start of its peer.
  publish(theirs, 30)
  assert shown(ours.fetch(50)) == [30.0]
  with pytest.raises(StaleError) as error:
    ours.fetch(51)
  assert str(error.value) == (
      'teachers of group 0 are stale at step 51: group 1 by 21 steps, and'
      ' max_staleness_steps=20; see whether these groups run, or set'
      ' staleness_policy to drop or wait'
  )


@both_stores
def test_the_policy_wait_waits_for_a_younger_one(made, store):
  ours, theirs = made(store, **LIMIT, staleness_policy='wait', timeout=PATIENCE)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(ours.fetch, 31)
    publish(theirs, 10)  # Too old.
    with pytest.raises(TimeoutError):
      waiting.result(0.1)
    publish(theirs, 20)
    assert shown(waiting.result(PATIENCE)) == [20.0]


# --- Lockstep ----------------------------------------------------------------


@both_stores
@pytest.mark.parametrize('staleness', [0, 20])
def test_lockstep_takes_what_was_asked_though_newer_is_there(
    made, store, staleness
):
  ours, theirs = made(store, mode='lockstep', staleness=staleness)
  taken = {}
  for n in range(60):
    if n and n % EVERY == 0:
      publish(theirs, n)
    teachers = ours.fetch(n)
    assert shown(teachers) == (teachers and list(steps_in_use(ours)))
    taken[n] = steps_in_use(ours)[0]
  asked = {n: n - n % EVERY - staleness for n in range(60)}
  assert taken == {n: s if s > 0 else None for n, s in asked.items()}


@both_stores
def test_lockstep_gives_up_and_says_on_whom_it_waited(made, store, tmp_path):
  ours, theirs = made(store, mode='lockstep', timeout=0.05)
  advice = {
      'memory': (
          'Step all groups in turn, or run them in threads with a'
          ' timeout_seconds'
      ),
      'directory': f'Is it running, with the same workdir ({tmp_path})?',
  }
  for newest in ('none', 'step 10'):
    with pytest.raises(TimeoutError) as e:
      ours.fetch(20)
    assert str(e.value) == (
        'after 0.05 s of waiting: group 1 has not published step 20; its newest'
        f' is {newest}. {advice[store]}'
    )
    publish(theirs, 10)


def test_a_stop_request_ends_a_wait_but_not_what_is_there(join, tmp_path):
  stop = threading.Event()
  waiting = Waiting(PATIENCE, stop.is_set)
  exchange = join(mode='lockstep', waiting=waiting)
  publish_in(tmp_path, 1, 10)
  stop.set()
  assert shown(exchange.fetch(10)) == [10.0]
  with pytest.raises(Interrupted, match='waiting: group 1 has not'):
    exchange.fetch(20)


# --- Trajectories ------------------------------------------------------------


MODEL, TX = toy.RECURRENT, toy.ADAM


def starts():
  return [toy.start(MODEL, TX, g) for g in (0, 1)]


def run(step, group_id, exchange, *, num_steps, state=None):
  return run_group(
      step,
      state or starts()[group_id],
      toy.Tokens(8, group_id=group_id),
      num_steps=num_steps,
      exchange=exchange,
  )


def trajectory(
    exchanges, states=(None, None), *, num_steps, order=(0, 1), replicas=4
):
  """By step, the collected states of both groups, stepped in turn."""
  step = toy.on_replicas(MODEL, TX, replicas)
  groups = {
      g: run(step, g, exchanges[g], num_steps=num_steps, state=states[g])
      for g in order
  }
  found = {}
  for turn in zip(*groups.values()):
    by_group = dict(zip(groups, turn))
    found[turn[0].step] = [step.collect(by_group[g].state) for g in (0, 1)]
  return found


def in_lockstep(made, store, staleness=0):
  like = starts()[0].variables
  return made(
      store,
      mode='lockstep',
      every=5,
      staleness=staleness,
      like=like,
      timeout=PATIENCE,
  )


@pytest.mark.parametrize('staleness', [0, 5])
def test_all_stores_give_the_same_bits_and_so_does_a_restart(made, staleness):
  whole = trajectory(in_lockstep(made, 'memory', staleness), num_steps=27)
  backwards = in_lockstep(made, 'memory', staleness)
  toy.assert_same(trajectory(backwards, num_steps=27, order=(1, 0)), whole)
  killed = in_lockstep(made, 'mirrored', staleness)
  seen = trajectory(killed, num_steps=27)
  toy.assert_same(seen, whole)  # To keep them on disk changes nothing.
  for exchange in killed:
    exchange.flush()
  for n in (10, 13):  # At an exchange step, and between two.
    # Killed long after the checkpoint that is resumed from.
    exchanges = in_lockstep(made, 'mirrored', staleness)
    for exchange, old in zip(exchanges, killed):
      exchange.restore(n, [p and p.step for p in old.in_use])
    resumed = trajectory(exchanges, seen[n], num_steps=17)
    toy.assert_same(resumed, {k: whole[k] for k in range(n + 1, 18)})


@pytest.mark.parametrize('staleness', [0, 5])
def test_a_directory_gives_the_bits_of_memory(made, staleness):
  expected = trajectory(in_lockstep(made, 'memory', staleness), num_steps=17)
  found = trajectory(in_lockstep(made, 'directory', staleness), num_steps=17)
  toy.assert_same(found, expected)


def test_groups_in_threads_end_like_groups_in_turn(made):
  # One device: collectives of two programs must not interleave.
  turns = trajectory(in_lockstep(made, 'memory'), num_steps=17, replicas=1)
  step = toy.on_replicas(MODEL, TX, 1)

  def last_of(g, exchange):
    *_, last = run(step, g, exchange, num_steps=17)
    return step.collect(last.state)

  exchanges = in_lockstep(made, 'memory')
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ends = [pool.submit(last_of, g, e) for g, e in enumerate(exchanges)]
    toy.assert_same([end.result(PATIENCE) for end in ends], turns[17])


def test_from_an_exchange_step_a_run_goes_on_without_a_mirror(made):
  seen = trajectory(in_lockstep(made, 'memory'), num_steps=12)
  resumed = trajectory(in_lockstep(made, 'memory'), seen[10], num_steps=12)
  toy.assert_same(resumed, {k: seen[k] for k in (11, 12)})
