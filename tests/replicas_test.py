"""Replicas: four devices on a group batch are one device on all of it."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import toy
from waits import PATIENCE

from codistill_jax import replicas
from codistill_jax import step as step_lib
from codistill_jax.base import ALONE

NUM_REPLICAS = 4
TWO_LAYERS, RECURRENT = toy.TWO_LAYERS, toy.RECURRENT
STATISTICS, NOISE = toy.STATISTICS, toy.NOISE
SGD, ADAM = toy.SGD, toy.ADAM


def uneven(batch):
  """Padding that falls on some replicas: the first has nothing else."""
  weights = np.array(batch['weights'])
  weights[:2] = 0.0
  weights[2:4] = 1.0
  weights[5] = 2.5
  return {**batch, 'weights': weights}


def teachers_of(model, present=(1, 1)):
  return toy.stacked(toy.peers_of(model, len(present)), present)


@functools.cache
def on_one_device(model, tx=SGD):
  return jax.jit(step_lib.make_train_step(model, tx))


CASES = {
    'sgd': (TWO_LAYERS, SGD, (1, 1), 4),
    'absent': (TWO_LAYERS, SGD, (0, 1), 4),
    'burn-in': (TWO_LAYERS, SGD, None, 4),
    'adam': (TWO_LAYERS, ADAM, (1, 1), 2),
    'recurrent': (RECURRENT, SGD, (1, 1), 4),
    'recurrent-absent': (RECURRENT, ADAM, (1, 0), 4),
    'recurrent-burn-in': (RECURRENT, ADAM, None, 4),
    'recurrent-one': (RECURRENT, SGD, (1, 1), 1),
}


@pytest.mark.parametrize(
    'model, tx, present, number', CASES.values(), ids=CASES
)
def test_replicas_agree_with_one_device_on_the_whole_batch(
    model, tx, present, number
):
  one, many = on_one_device(model, tx), toy.on_replicas(model, tx, number)
  state, stream = toy.start(model, tx, num_peers=2), toy.stream_of(model)
  teachers = present and teachers_of(model, present)
  placed = teachers and many.place_teachers(teachers)
  replicated = many.place(state)
  for step in range(3):
    batch = uneven(stream.batch(step))
    before = state.variables.params
    state, metrics = one(state, batch, teachers, 0.7)
    replicated, found = many(replicated, batch, placed, 0.7)
    collected = many.collect(replicated)
    # The scale of each array's gradient is its largest value.
    for whole, part, old in zip(
        *map(
            jax.tree.leaves,
            (state.variables.params, collected.variables.params, before),
        )
    ):
      change = np.asarray(whole - old)
      np.testing.assert_allclose(
          part - old, change, rtol=1e-5, atol=1e-5 * np.abs(change).max()
      )
    toy.assert_same(collected, state, rtol=1e-5, atol=1e-6)
    toy.assert_same(dict(found), dict(metrics), rtol=1e-5)


def test_replicas_hold_the_same_bits_after_a_step():
  # out_axes=None does not check it.
  step = toy.on_replicas(RECURRENT, ADAM)
  state = step.place(toy.start(RECURRENT, ADAM, num_peers=2))
  batch = uneven(toy.Tokens(8).batch(0))
  teachers = step.place_teachers(teachers_of(RECURRENT))
  state, metrics = step(state, batch, teachers, 1.0)
  shared = (state.step, state.variables, state.opt_state, state.rng, metrics)
  for leaf in jax.tree.leaves(shared):
    first, *others = [np.asarray(s.data) for s in leaf.addressable_shards]
    assert len(others) == NUM_REPLICAS - 1
    assert all(first.tobytes() == other.tobytes() for other in others)


def test_running_statistics_are_averaged_over_replicas():
  step, batch = toy.on_replicas(STATISTICS), toy.Clusters(8).batch(0)
  state, _ = step(step.place(toy.start(STATISTICS)), batch, None, 0.0)
  found = step.collect(state).variables.model_state
  parts = np.split(batch['inputs'], NUM_REPLICAS)
  expected = np.mean([part.mean(axis=0) / 2 for part in parts], axis=0)
  np.testing.assert_allclose(found['mean'], expected, rtol=1e-5, atol=1e-7)
  assert found['calls'] == 1 and found['calls'].dtype == np.int32


def test_randomness_differs_by_replica_and_by_step():
  step, batch = toy.on_replicas(NOISE), toy.Clusters(8).batch(0)
  state = step.place(toy.start(NOISE))
  seen = []
  for _ in range(3):
    state, _ = step(state, batch, None, 0.0)
    seen.append(step.collect(state).carry)
    np.testing.assert_array_equal(step.collect(state).rng, toy.start(NOISE).rng)
  # Also within a replica: rows have noise of their own.
  assert len(np.unique(seen)) == 3 * 8
  again, _ = step(step.place(toy.start(NOISE)), batch, None, 0.0)
  np.testing.assert_array_equal(step.collect(again).carry, seen[0])


def test_the_first_replica_draws_what_a_single_one_would():
  # A run of one replica is then a function of its seed in jit and pmap alike.
  batch = toy.Clusters(8).batch(0)
  step = toy.on_replicas(NOISE, number=1)
  state, _ = step(step.place(toy.start(NOISE)), batch, None, 0.0)
  alone, _ = on_one_device(NOISE)(toy.start(NOISE), batch, None, 0.0)
  toy.assert_same(step.collect(state).carry, alone.carry)


def some_state():
  """A state whose carries differ in every row."""
  number = lambda x: np.arange(np.size(x), dtype=np.float32).reshape(x.shape)
  state = toy.start(RECURRENT, ADAM, num_peers=2)
  return state.replace(
      step=np.int32(5),
      carry=number(state.carry),
      teacher_carry=number(state.teacher_carry),
  )


def test_collect_is_the_inverse_of_place():
  step, state = toy.on_replicas(RECURRENT, ADAM), some_state()
  placed = step.place(state)
  # Two rows each, of the student and of both teachers.
  assert placed.carry.shape == (4, 2, 6)
  assert placed.teacher_carry.shape == (4, 2, 2, 6)
  np.testing.assert_array_equal(
      placed.teacher_carry[1], state.teacher_carry[:, 2:4]
  )
  collected = step.collect(placed)
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(collected))
  toy.assert_same(collected, state)
  toy.assert_same(step.collect(step.place(collected)), state)


def test_place_takes_states_from_anywhere_and_leaves_them_alone():
  # A committed array, such as a restored one; the state of fewer replicas.
  step, fewer = (toy.on_replicas(RECURRENT, ADAM, n) for n in (4, 2))
  state = some_state()
  sources = {
      'numpy': jax.tree.map(np.array, state),
      'committed': jax.device_put(state, jax.devices()[1]),
      'two replicas': fewer.collect(fewer.place(state)),
  }
  batch = toy.Tokens(8).batch(0)
  expected, _ = step(step.place(state), batch, None, 0.0)
  for source in sources.values():
    after, _ = step(step.place(source), batch, None, 0.0)
    toy.assert_same(step.collect(after), step.collect(expected))
    toy.assert_same(source, state)


def test_the_state_passed_in_is_donated():
  step = toy.on_replicas(TWO_LAYERS)
  state = step.place(toy.start(TWO_LAYERS))
  step(state, toy.stream_of(TWO_LAYERS).batch(0), None, 0.0)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.variables))


def test_place_shares_nothing_even_with_a_state_that_is_placed_already():
  step = toy.on_replicas(TWO_LAYERS)
  placed = step.place(toy.start(TWO_LAYERS))
  kept = step.collect(placed)
  step(step.place(placed), toy.stream_of(TWO_LAYERS).batch(0), None, 0.0)
  toy.assert_same(step.collect(placed), kept)


def test_teachers_that_are_there_are_not_moved_again():
  step = toy.on_replicas(TWO_LAYERS)
  placed = step.place_teachers(teachers_of(TWO_LAYERS))
  for again, leaf in zip(
      jax.tree.leaves(step.place_teachers(placed)), jax.tree.leaves(placed)
  ):
    assert again is leaf
    assert len(leaf.addressable_shards) == NUM_REPLICAS


def test_teachers_survive_the_step():
  step = toy.on_replicas(TWO_LAYERS)
  state = step.place(toy.start(TWO_LAYERS))
  placed = step.place_teachers(teachers_of(TWO_LAYERS))
  for n in range(2):
    state, _ = step(state, toy.stream_of(TWO_LAYERS).batch(n), placed, 1.0)
  toy.assert_same(placed, teachers_of(TWO_LAYERS))


@pytest.mark.parametrize('group_batch', [0, -4, 6])
def test_a_group_batch_that_cannot_be_shared_is_refused(group_batch):
  with pytest.raises(ValueError, match=rf'group_batch={group_batch} .*4 rep'):
    replicas.check_group_batch(group_batch, 4)
  replicas.check_group_batch(8, 4)


def test_rows_that_cannot_be_shared_are_refused_one_line_each():
  message = re.escape(
      'group_batch=6 is not divisible by the 4 replicas of the group; set'
      ' group_batch to a multiple of 4'
  )
  step, state = toy.on_replicas(RECURRENT), toy.start(RECURRENT, num_peers=2)
  with pytest.raises(ValueError, match=f'^{message}$'):
    step.place(state.replace(carry=state.carry[:6]))
  with pytest.raises(ValueError, match=f'^{message}$'):
    step(step.place(state), toy.Tokens(6).batch(0), None, 0.0)


def make(axis_name=None, wrap=lambda step: step, number=4):
  step = step_lib.make_train_step(TWO_LAYERS, SGD, axis_name=axis_name)
  return replicas.PmapStep(wrap(step), jax.devices()[:number])


def first_update(step, batch=None):
  batch = batch or toy.stream_of(TWO_LAYERS).batch(0)
  return step(step.place(toy.start(TWO_LAYERS)), batch, None, 0.0)


# As a user may wrap it.
WRAPS = {
    'as it is': lambda f: f,
    'function': lambda f: lambda *a: f(*a),
    'jit': jax.jit,
}


@pytest.mark.parametrize('wrap', WRAPS.values(), ids=WRAPS)
def test_a_step_that_does_not_sum_over_the_replicas_is_refused(wrap):
  with pytest.raises(ValueError, match='sums no gradient over its 4 replicas'):
    first_update(make(None, wrap))
  first_update(make(None, wrap, 1))  # There is nothing to sum.
  first_update(make(replicas.REPLICA_AXIS, wrap, 2))


def test_sums_of_the_model_are_not_those_of_its_gradient():
  def apply(*args):
    logits, updates = TWO_LAYERS.apply(*args)
    mean = jax.lax.pmean(logits, replicas.REPLICA_AXIS)
    return logits + 0 * mean, updates

  step = step_lib.make_train_step(TWO_LAYERS._replace(apply=apply), SGD)
  with pytest.raises(ValueError, match='sums no gradient'):
    first_update(replicas.PmapStep(step))


@pytest.mark.parametrize(
    'act, message',
    [
        (
            lambda: first_update(make('batch')),
            'run it in a PmapStep, whose axis',
        ),
        (
            lambda: make(wrap=lambda step: None),
            'step from make_train_step.* None',
        ),
        (lambda: make(wrap=replicas.PmapStep), 'make_train_step.*got PmapStep'),
        (
            lambda: first_update(make(), {'inputs': [1.0], 'labels': [1]}),
            r"batch\['inputs'\]\[0\] is float; a batch has",
        ),
        (
            lambda: first_update(
                make(), {'inputs': np.ones((8, 5)), 'n': np.int32(1)}
            ),
            r"batch\['n'\] is int32\[\]",
        ),
        *(
            (lambda x=x: first_update(make(), {'labels': x}), message)
            for x, message in [
                (np.array(['a'] * 8), r"batch\['labels'\] is <U1\[8\]; a bat"),
                (np.array([None] * 8), r'is object\[8\]'),
                (
                    np.arange(8) + 2**32,
                    'from 4294967296 to 4294967303, which int32',
                ),
                (np.arange(8) - 2**40, 'which int32 does not hold'),
                (np.arange(8, dtype='u8') + 2**63, 'which uint32 does not'),
            ]
        ),
        (
            lambda: first_update(make(), [np.ones(8)]),
            'Expected a batch: a dict',
        ),
    ],
)
def test_what_is_put_together_wrongly_is_refused(act, message):
  with pytest.raises(ValueError, match=message):
    act()


def test_a_group_of_one_process_loads_all_rows_and_decides_alone():
  assert replicas.process_rows(8) is None
  assert replicas.agreement() is ALONE


PROCESS = """
import sys
import jax
from codistill_jax import replicas
group_id, *by_hand = map(int, sys.argv[1:])
given = ('127.0.0.1:%d' % by_hand[0], *by_hand[1:]) if by_hand else ()
replicas.start_processes(*given, group_id=group_id)
together = replicas.agreement().choose(jax.numpy.array(group_id))
print(jax.process_count(), jax.config.values['jax_cuda_visible_devices'],
      int(together), *replicas.hosts())
"""


def test_groups_of_one_allocation_join_and_use_all_their_devices():
  """As SLURM starts two of two processes, and one by hand within SLURM."""
  by_hand = str(tiny_run.free_port()), '1', '0'
  tasks = [(0, 1, 1), *((g, n, 2) for g in (1, 2) for n in (0, 1))]
  processes = [
      subprocess.Popen(
          [
              *(sys.executable, '-c', PROCESS, str(group_id)),
              *(by_hand if total == 1 else ()),
          ],
          env=os.environ
          | {
              'SLURM_JOB_ID': '77',
              'SLURM_STEP_NODELIST': '127.0.0.[1-2]',
              'SLURM_NTASKS': str(total),
              'SLURM_PROCID': str(task),
              # jax would give each the device of its number on the node.
              'SLURM_LOCALID': str(task),
              'SLURMD_NODENAME': f'node{task}',
          },
          cwd=tiny_run.ROOT,
          stdout=subprocess.PIPE,
          text=True,
      )
      for group_id, task, total in tasks
  ]
  try:
    said = [p.communicate(timeout=PATIENCE)[0].splitlines() for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [lines[-1] for lines in said] == [
      '1 all 0 node1',
      *('2 all 1 node0 node1', '2 all 1 node0 node1'),
      *('2 all 2 node0 node1', '2 all 2 node0 node1'),
  ]


def test_weights_may_be_integers_or_missing():
  # Each dtype is a program of its own, but the update is the same.
  step, batch = toy.on_replicas(TWO_LAYERS), toy.stream_of(TWO_LAYERS).batch(0)
  plain = {k: x for k, x in batch.items() if k != 'weights'}
  ones = {**plain, 'weights': np.ones(8, np.int32)}
  results = []
  for one in (plain, ones):
    state, _ = step(step.place(toy.start(TWO_LAYERS)), one, None, 0.0)
    results.append(step.collect(state))
  toy.assert_same(*results, rtol=1e-6)
  assert np.any(jnp.abs(results[0].variables.params['Dense_0']['bias']) > 0)
