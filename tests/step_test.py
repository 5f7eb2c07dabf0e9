"""The update: algorithm 1 against numpy, and what must not leak into it."""

import functools

import algorithm1
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from codistill_jax import base, losses, metrics
from codistill_jax import step as step_lib
from codistill_jax.base import Teachers, Variables

TWO_LAYERS, RECURRENT = toy.TWO_LAYERS, toy.RECURRENT
STATISTICS, NOISE = toy.STATISTICS, toy.NOISE
TX = toy.SGD
BATCH = toy.Clusters(8).batch(0)
# Padding, and weights that are not 0 or 1.
WEIGHTED = {
    **toy.Clusters(8).batch(1),
    'weights': np.array([1, 0, 2, 0.5, 0, 1, 1, 3], np.float32),
}


@functools.cache
def compiled(model, **kwargs):
  return jax.jit(step_lib.make_train_step(model, TX, **kwargs))


def theta(variables):
  return algorithm1.as_float64(variables.params)


def two_teachers():
  return toy.stacked(toy.peers_of(TWO_LAYERS, 2))


# -- algorithm 1 --------------------------------------------------------------


@pytest.mark.parametrize('batch', [BATCH, WEIGHTED], ids=['plain', 'weighted'])
@pytest.mark.parametrize('present', [[1], [1, 1, 1], [1, 0, 1], [0, 1, 0]])
@pytest.mark.parametrize('weight', [1.0, 0.3])
def test_an_update_is_that_of_algorithm_1(batch, present, weight):
  state, peers = toy.start(TWO_LAYERS), toy.peers_of(TWO_LAYERS, len(present))
  there = [theta(peer) for peer, here in zip(peers, present) if here]

  after, found = compiled(TWO_LAYERS)(
      state, batch, toy.stacked(peers, present), weight
  )

  student = theta(state.variables)
  expected = algorithm1.update(student, batch, there, weight)
  toy.assert_same(theta(after.variables), expected, rtol=1e-5, atol=1e-6)
  phi, psi = algorithm1.losses(student, batch, there)
  np.testing.assert_allclose(found['loss/task'], phi, rtol=1e-5)
  np.testing.assert_allclose(found['loss/distill'], psi, rtol=1e-5)
  np.testing.assert_allclose(found['loss/total'], phi + weight * psi, rtol=1e-5)
  grad = algorithm1.gradient(student, batch, there, weight)
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grad)))
  np.testing.assert_allclose(found['optim/grad_norm'], norm, rtol=1e-5)
  assert after.step == 1


def test_the_gradient_by_hand_is_that_of_the_losses_by_hand():
  # The reference of the test above, against finite differences.
  one, *peers = [theta(v) for v in toy.peers_of(TWO_LAYERS, 3)]

  def total():
    phi, psi = algorithm1.losses(one, WEIGHTED, peers)
    return phi + 0.3 * psi

  grad = algorithm1.gradient(one, WEIGHTED, peers, 0.3)
  for layer, leaves in one.items():
    for name, values in leaves.items():
      index, eps = tuple(n // 2 for n in values.shape), 1e-5
      values[index] += eps
      above = total()
      values[index] -= 2 * eps
      slope = (above - total()) / (2 * eps)
      values[index] += eps
      np.testing.assert_allclose(grad[layer][name][index], slope, rtol=1e-6)


@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_burn_in_is_plain_training_whatever_the_weight(weight):
  state = toy.start(TWO_LAYERS, num_peers=3)
  after, found = compiled(TWO_LAYERS)(state, WEIGHTED, None, weight)
  expected = algorithm1.update(theta(state.variables), WEIGHTED)
  toy.assert_same(theta(after.variables), expected, rtol=1e-5, atol=1e-6)
  assert 'loss/distill' not in found
  assert found['loss/total'] == found['loss/task']


def test_at_agreement_teachers_change_nothing():
  state = toy.start(TWO_LAYERS)
  teachers = toy.stacked([state.variables] * 2)
  taught, _ = compiled(TWO_LAYERS)(state, BATCH, teachers, 5.0)
  alone, _ = compiled(TWO_LAYERS)(state, BATCH, None, 5.0)
  toy.assert_same(taught, alone, rtol=1e-5, atol=1e-6)


# -- teachers -----------------------------------------------------------------


def test_no_gradient_flows_into_teachers():
  # Not even with a loss that does not detach them, as the library's do; nor
  # through the carry.
  def square(student, teachers, present):
    del present
    return jnp.sum((teachers[0] - student) ** 2, axis=-1)

  batch = toy.Tokens().batch(0)
  step = step_lib.make_train_step(RECURRENT, TX, distill_loss=square)
  state = toy.start(RECURRENT, num_peers=1)

  def probe(variables):
    after, found = step(state, batch, Teachers(variables, np.ones(1)), 1.0)
    parts = (after.variables, after.teacher_carry, found['loss/total'])
    return sum(jnp.sum(x) for x in jax.tree.leaves(parts))

  teachers = toy.stacked(toy.peers_of(RECURRENT, 1)).variables
  grads = jax.jit(jax.grad(probe))(teachers)
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_burn_in_evaluates_no_teacher_and_later_each_teacher_once():
  step = step_lib.make_train_step(TWO_LAYERS, TX)
  state = toy.start(TWO_LAYERS)

  def products(teachers):
    return str(jax.make_jaxpr(step)(state, BATCH, teachers, 1.0)).count(
        ' dot_general['
    )

  # Two layers: two products forward, three backward; teachers are batched.
  assert products(None) == 5
  assert products(toy.stacked(toy.peers_of(TWO_LAYERS, 3))) == 5 + 2


def test_teachers_use_their_published_statistics_and_the_student_its_batch():
  state, (peer,) = toy.start(STATISTICS), toy.peers_of(STATISTICS, 1)
  mean = np.linspace(-1, 1, toy.FEATURES).astype(np.float32)
  peer = peer.replace(model_state={**peer.model_state, 'mean': mean})
  after, found = compiled(STATISTICS)(state, BATCH, toy.stacked([peer]), 1.0)

  x = BATCH['inputs'].astype(np.float64)
  log_q = jax.nn.log_softmax(
      (x - x.mean(axis=0)[None]) @ state.variables.params['kernel']
  )
  p = jax.nn.softmax((x - mean[None]) @ peer.params['kernel'])
  expected = -np.mean(np.sum(p * log_q, axis=-1))
  np.testing.assert_allclose(found['loss/distill'], expected, rtol=1e-5)
  np.testing.assert_allclose(
      after.variables.model_state['mean'], x.mean(axis=0) / 2, rtol=1e-5
  )
  # Running statistics are no business of the optimiser, nor of the teacher.
  assert after.variables.model_state['calls'] == 1


def test_each_teacher_carries_its_own_state_on_the_same_rows():
  stream = toy.Tokens()
  batch = stream.batch(0)
  state = toy.start(RECURRENT, num_peers=2)
  old, new = (toy.peers_of(RECURRENT, 4)[n : n + 2] for n in (0, 2))
  expected = [RECURRENT.init_carry(8)] * 2
  own = RECURRENT.init_carry(8)
  # At the swap of parameters, before step 2, the carries are kept.
  for step, teachers in enumerate([old, old, new, new]):
    batch = stream.batch(step)
    batch['resets'] = np.zeros_like(batch['resets'])
    _, updates = toy.evaluated(RECURRENT)(state.variables, batch, own)
    own = updates.carry
    state, _ = compiled(RECURRENT)(state, batch, toy.stacked(teachers), 1.0)
    expected = [
        toy.evaluated(RECURRENT)(teacher, batch, carry)[1].carry
        for teacher, carry in zip(teachers, expected)
    ]
    np.testing.assert_allclose(
        state.teacher_carry, np.stack(expected), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state.carry, own, rtol=1e-4, atol=1e-5)


def test_burn_in_advances_no_teacher():
  batch = toy.Tokens().batch(0)
  state = toy.start(RECURRENT, num_peers=2)
  after, _ = compiled(RECURRENT)(state, batch, None, 0.0)
  assert np.any(after.carry) and not np.any(after.teacher_carry)


@pytest.mark.parametrize('num_peers', [0, 1, 3])
def test_a_state_for_another_number_of_peers_is_refused(num_peers):
  state, batch = toy.start(RECURRENT, num_peers=num_peers), toy.Tokens(8).batch(
      0
  )
  teachers = toy.stacked(toy.peers_of(RECURRENT, 2))
  message = (
      f'^the state has recurrent states for {num_peers} teachers, but there are'
      ' 2; give init_state num_peers=2'
  )
  with pytest.raises(ValueError, match=message):
    compiled(RECURRENT)(state, batch, teachers, 1.0)


def test_teachers_may_be_held_in_bfloat16():
  batch = toy.Tokens().batch(0)
  state = toy.start(RECURRENT, num_peers=1)
  teachers = toy.stacked(toy.peers_of(RECURRENT, 1))
  half = base.cast_floats(teachers, 'bfloat16')
  exact, _ = compiled(RECURRENT)(state, batch, teachers, 1.0)
  near, _ = compiled(RECURRENT)(state, batch, half, 1.0)
  dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert dtypes(near) == dtypes(exact)  # Otherwise the next call compiles.
  toy.assert_same(near, exact, rtol=0.1, atol=0.05)
  assert np.any(near.variables.params['head'] != exact.variables.params['head'])


def test_a_model_of_their_own_computes_the_teachers_and_nothing_else():
  def halved(*args):
    logits, updates = TWO_LAYERS.apply(*args)
    return logits / 2, updates

  cheaper = TWO_LAYERS._replace(apply=halved)
  state, (peer,) = toy.start(TWO_LAYERS), toy.peers_of(TWO_LAYERS, 1)
  teachers = toy.stacked([peer])
  _, found = compiled(TWO_LAYERS, teacher_model=cheaper)(
      state, BATCH, teachers, 1.0
  )
  student, teacher = (
      toy.evaluated(TWO_LAYERS)(v, BATCH, ())[0]
      for v in (state.variables, peer)
  )
  expected = losses.cross_entropy(student, teacher[None] / 2, jnp.ones(1))
  np.testing.assert_allclose(
      found['loss/distill'], jnp.mean(expected), rtol=1e-5
  )


# -- padding, dtypes, choices -------------------------------------------------


def test_padding_holds_any_label_and_any_finite_input():
  rubbish = dict(WEIGHTED)
  pad = WEIGHTED['weights'] == 0
  rubbish['labels'] = np.where(pad, -7, WEIGHTED['labels']).astype(np.int32)
  rubbish['inputs'] = np.where(pad[:, None], np.float32(1e4), rubbish['inputs'])
  state, teachers = toy.start(TWO_LAYERS), two_teachers()
  clean = compiled(TWO_LAYERS)(state, WEIGHTED, teachers, 1.0)
  found = compiled(TWO_LAYERS)(state, rubbish, teachers, 1.0)
  toy.assert_same(found, clean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('scale', [1e-12, 1e-3, 0.1, 100.0])
def test_an_update_does_not_depend_on_the_unit_of_the_weights(scale):
  state, teachers = toy.start(TWO_LAYERS), two_teachers()
  scaled = WEIGHTED | {'weights': WEIGHTED['weights'] * np.float32(scale)}
  expected = compiled(TWO_LAYERS)(state, WEIGHTED, teachers, 1.0)
  found = compiled(TWO_LAYERS)(state, scaled, teachers, 1.0)
  toy.assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_changes_nothing():
  batch = {
      **BATCH,
      'labels': np.full(8, -1, np.int32),
      'weights': np.zeros(8, np.float32),
  }
  state = toy.start(TWO_LAYERS)
  after, found = compiled(TWO_LAYERS)(state, batch, two_teachers(), 1.0)
  toy.assert_same(after.variables, state.variables)
  assert {k: float(x) for k, x in found.items()} == dict.fromkeys(found, 0.0)


def test_losses_are_float32_whatever_the_model_computes_in():
  def apply(variables, batch, carry, rng, train):
    logits, updates = TWO_LAYERS.apply(variables, batch, carry, rng, train)
    return logits.astype(jnp.bfloat16), updates

  half = base.Model(TWO_LAYERS.init, apply)
  state, (peer,) = toy.start(TWO_LAYERS), toy.peers_of(TWO_LAYERS, 1)
  after, found = compiled(half)(state, BATCH, toy.stacked([peer]), 1.0)
  rounded = [
      np.asarray(apply(v, BATCH, (), None, False)[0], np.float64)
      for v in (state.variables, peer)
  ]
  log_q, log_p = map(jax.nn.log_softmax, rounded)
  phi = -np.mean(log_q[np.arange(8), BATCH['labels']])
  psi = -np.mean(np.sum(np.exp(log_p) * log_q, axis=-1))
  np.testing.assert_allclose(found['loss/task'], phi, rtol=1e-5)
  np.testing.assert_allclose(found['loss/distill'], psi, rtol=1e-5)
  assert all(x.dtype == jnp.float32 for x in found.values())
  assert all(
      x.dtype == jnp.float32 for x in jax.tree.leaves(after.variables.params)
  )


def test_a_head_trains_like_the_logits_that_it_stands_for():
  def head(variables, batch, carry, rng, train):
    del rng, train
    p = variables.params['head']
    outputs = base.HeadOutputs(batch['inputs'], p['kernel'], p['bias'])
    return outputs, base.Updates({}, carry)

  def logits(*args):
    outputs, updates = head(*args)
    return base.logits_of(outputs), updates

  kernel = np.random.default_rng(0).normal(size=(toy.FEATURES, toy.CLASSES))
  params = {'kernel': np.float32(kernel), 'bias': np.zeros(toy.CLASSES, 'f4')}
  variables = Variables({'head': params})
  state = toy.start(TWO_LAYERS).replace(variables=variables)
  peer = Variables({'head': {**params, 'bias': np.ones(toy.CLASSES, 'f4')}})
  results = [
      compiled(base.Model(None, apply))(
          state, WEIGHTED, toy.stacked([peer, variables]), 1.0
      )
      for apply in (head, logits)
  ]
  toy.assert_same(*results, rtol=1e-6, atol=1e-7)
  assert np.all(results[0][0].variables.params['head']['bias'] != 0.0)


# -- randomness ---------------------------------------------------------------


def test_randomness_is_a_function_of_key_and_step_alone():
  state = toy.start(NOISE)
  first, _ = compiled(NOISE)(state, BATCH, None, 0.0)
  again, _ = compiled(NOISE)(state, toy.Clusters(8).batch(3), None, 0.0)
  second, _ = compiled(NOISE)(first, BATCH, None, 0.0)
  np.testing.assert_array_equal(first.carry, again.carry)
  assert np.all(first.carry != second.carry)
  np.testing.assert_array_equal(state.rng, second.rng)
  other, _ = compiled(NOISE)(toy.start(NOISE, seed=1), BATCH, None, 0.0)
  assert np.all(first.carry != other.carry)


@functools.cache
def initialised(seed):
  key = jax.random.PRNGKey(seed)
  return step_lib.init_state(TWO_LAYERS, TX, key, BATCH)


def test_the_start_depends_on_the_key_and_on_no_value_of_the_batch():
  key, batch = jax.random.PRNGKey(0), toy.Clusters(8).batch(5)
  again = step_lib.init_state(TWO_LAYERS, TX, key, batch)
  toy.assert_same(again, initialised(0))
  kernel = lambda state: state.variables.params['Dense_0']['kernel']
  assert np.all(kernel(initialised(1)) != kernel(again))
  assert np.any(initialised(1).rng != again.rng)
  assert again.step.dtype == jnp.int32 and again.step == 0


def test_carries_have_a_row_for_each_row_of_the_group_batch():
  part, key = toy.Tokens(batch_size=2).batch(0), jax.random.PRNGKey(0)
  init = functools.partial(step_lib.init_state, RECURRENT, TX, key, part)
  state = init(num_peers=3, group_batch=8)
  assert state.carry.shape == (8, 6)
  assert state.teacher_carry.shape == (3, 8, 6)
  alone = init()
  assert alone.carry.shape == (2, 6)
  assert alone.teacher_carry == ()


def test_a_model_starts_from_one_row_however_large_the_batch():
  """The group batch itself, which may fill a device, is not put on it."""
  seen = []

  def init(rng, batch):
    seen.append(batch['inputs'].shape)
    return TWO_LAYERS.init(rng, batch)

  model = TWO_LAYERS._replace(init=init)
  batch = toy.Clusters(8).batch(0)
  state = step_lib.init_state(model, TX, jax.random.PRNGKey(0), batch)
  assert seen == [(1, *batch['inputs'].shape[1:])]
  toy.assert_same(state, initialised(0))


# -- what is wrong with a batch, and with what it makes ------------------------


def spoilt(model=TWO_LAYERS, batch=WEIGHTED, teachers=None, weight=1.0, **kw):
  """What is said of an update."""
  step = step_lib.make_train_step(model, kw.pop('tx', TX), **kw)
  _, found = jax.jit(step)(toy.start(TWO_LAYERS), batch, teachers, weight)
  return ': '.join(step_lib.fault_of(found))


def changed(key, index, value, dtype=None):
  array = np.array(WEIGHTED[key], dtype)
  array[index] = value
  return WEIGHTED | {key: array}


def overflowing(*args):
  logits, updates = TWO_LAYERS.apply(*args)
  return logits * jnp.inf, updates


@jax.custom_jvp
def steep(x):
  return x


steep.defjvp(lambda primal, tangent: (primal[0], tangent[0] * jnp.inf))


def without_gradient(*args):
  logits, updates = TWO_LAYERS.apply(*args)
  return steep(logits), updates


NAN_TEACHER = jax.tree.map(lambda x: x * np.nan, two_teachers().variables)


@pytest.mark.parametrize(
    'said, kwargs',
    [
        ('', {}),
        ('', {'batch': changed('labels', 1, -100)}),  # Of weight 0.
        ('inputs: 3 ', {'batch': changed('inputs', (0, slice(3)), np.nan)}),
        ('inputs: 1 ', {'batch': changed('inputs', (1, 0), -np.inf)}),
        ('labels: 2 ', {'batch': changed('labels', [0, 2], toy.CLASSES)}),
        ('labels: 1 ', {'batch': changed('labels', 0, -1)}),
        ('labels: 1 ', {'batch': changed('labels', 0, 255, np.uint8)}),
        ('labels: 1 ', {'batch': changed('labels', 0, 2**32 - 1, np.uint32)}),
        ('labels: 1 ', {'batch': changed('labels', 0, -1), 'fused': False}),
        (
            'labels: 1 ',
            {'batch': changed('labels', 0, 9), 'simulated_replicas': 4},
        ),
        ('weights: 1 ', {'batch': changed('weights', 1, -1e-3)}),
        ('weights: 2 ', {'batch': changed('weights', [0, 1], np.nan)}),
        ('weights: 1 ', {'batch': changed('weights', 0, np.inf)}),
        (
            'logits: ',
            {
                'model': TWO_LAYERS._replace(apply=overflowing),
                'batch': changed('labels', 1, -100),
            },
        ),
        (
            'labels: 1 ',
            {
                'batch': changed('labels', 0, np.nan, np.float32),
                'task_loss': lambda z, y: (z[:, 0] - y) ** 2,
            },
        ),
        ('loss/task: the ', {'task_loss': lambda z, y: z[:, 0] * jnp.nan}),
        (
            'loss/distill: the ',
            {'teachers': Teachers(NAN_TEACHER, np.ones(2, np.float32))},
        ),
        ('loss/total: ', {'weight': np.nan, 'teachers': two_teachers()}),
        ('gradient: ', {'model': TWO_LAYERS._replace(apply=without_gradient)}),
    ],
)
def test_what_was_first_not_finite_is_named(said, kwargs):
  found = spoilt(**kwargs)
  assert found == ': ' if not said else found.startswith(said)


@pytest.mark.parametrize('label, wrong', [(0, 0), (1, 0), (-1, 1), (2, 1)])
@pytest.mark.parametrize('dtype', [np.int32, np.float32, np.int8])
def test_labels_of_a_logistic_output_are_0_and_1(label, wrong, dtype):
  def apply(*args):
    logits, updates = TWO_LAYERS.apply(*args)
    return logits[:, 0], updates

  labels = np.array([0, 1] * 4, dtype)
  labels[3] = label
  found = spoilt(
      base.Model(TWO_LAYERS.init, apply),
      {**BATCH, 'labels': labels},
      task_loss=losses.sigmoid_task_loss,
      distill_loss=losses.sigmoid_cross_entropy,
  )
  assert found.startswith('labels: 1 ') if wrong else found == ': '


def test_a_loss_that_knows_other_labels_is_left_to_it():
  ignore = lambda z, y: jnp.where(y < 0, 0.0, losses.task_loss(z, y % 4))
  batch = changed('labels', [0, 2], -100)
  assert spoilt(batch=batch, task_loss=ignore) == ': '


@pytest.mark.parametrize(
    'batch, message',
    [
        (
            {'weights': np.ones((8, 1), 'f4')},
            r'weights float32\[8, 1\] and label',
        ),
        ({'weights': np.ones(4, 'f4')}, r"\['weights'\] has 4 rows and .* 8;"),
        ({'weights': np.ones(8, 'c8')}, r'weights complex64\[8\]'),
        ({'weights': None}, 'weights NoneType'),
        ({'labels': None}, 'labels: NoneType'),
        ({'labels': {'a': np.zeros(8, int)}}, "'labels', an array"),
        ({'keys': jax.random.split(jax.random.key(0), 8)}, 'is key<fry>'),
        ({'table': np.zeros((3, 2))}, r"\['table'\] has 3 rows and .* 8;"),
        ({'weights': np.float32(1)}, r"batch\['weights'\] is float32\[\]"),
        ({'labels': np.zeros((8, 1), int)}, r'labels int32\[8, 1\]'),
        (
            {'labels': np.zeros((8, 1), int), 'weights': np.ones((8, 1))},
            'logits',
        ),
        ({'labels': np.zeros(8), 'weights': np.ones(8)}, 'must be integers'),
        ({'labels': np.zeros((8, 4)), 'weights': np.ones((8, 4))}, 'logits'),
        ({'labels': np.zeros(4, int), 'weights': np.ones(4)}, r'has 4 rows'),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_named(batch, message):
  step = step_lib.make_train_step(TWO_LAYERS, TX)
  for run in (step, lambda s, b, *_: evaluate(s.variables, b, ())):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(run, toy.start(TWO_LAYERS), WEIGHTED | batch, None, 0.0)


evaluate = step_lib.make_eval_step(TWO_LAYERS)


class Series:
  dtype, shape = np.dtype('i4'), (8,)

  def __len__(self):
    return 8


@pytest.mark.parametrize(
    'values', [[0] * 8, np.zeros(8, 'm8[s]'), np.zeros(8, 'i4, f4'), Series()]
)
def test_what_is_no_array_of_numbers_is_refused_before_it_is_traced(values):
  with pytest.raises(ValueError, match=r"batch\['labels'\].* is "):
    step_lib.init_state(
        TWO_LAYERS, TX, jax.random.PRNGKey(0), WEIGHTED | {'labels': values}
    )


def updated(**parts):
  """An update, traced, of parts put together."""
  parts = {'model': TWO_LAYERS, 'tx': TX, 'batch': WEIGHTED, **parts}
  batch, teachers = parts.pop('batch'), parts.pop('teachers', None)
  step = step_lib.make_train_step(**parts)
  jax.eval_shape(step, toy.start(TWO_LAYERS), batch, teachers, 1.0)


@pytest.mark.parametrize(
    'parts, message',
    [
        (
            {'batch': (BATCH['inputs'], BATCH['labels'])},
            'Expected a batch: a dict',
        ),
        ({'batch': {'inputs': BATCH['inputs']}}, "with 'labels'"),
        ({'model': toy.TwoLayers()}, 'wrap a flax.linen module by from_linen'),
        ({'teacher_model': toy.TwoLayers()}, 'by from_linen'),
        ({'tx': 0.1}, r'tx=0.1 is no optimiser'),
        ({'distill_loss': 'kl'}, "distill_loss='kl' is no function; give one"),
        ({'task_loss': 'softmax'}, "task_loss='softmax' is no function"),
        ({'simulated_replicas': 0}, r'simulated_replicas=0; set it to a whole'),
        ({'simulated_replicas': 2.0}, r'simulated_replicas=2\.0; set it to'),
        ({'fused_bytes': '1GB'}, "fused_loss_bytes='1GB'; set it to a whole"),
        ({'task_loss': lambda z, y: z}, r'loss for each label.*got float32\['),
        ({'task_loss': lambda z, y: jnp.mean(z)}, r'got float32\[\]'),
        (
            {'distill_loss': lambda *a: a[0], 'teachers': two_teachers()},
            r'loss for each label, of shape \(8,\)',
        ),
        (
            {'teachers': toy.peers_of(TWO_LAYERS, 2)},
            'teachers must be Teachers',
        ),
        ({'axis_name': 'replica'}, r'run it in a PmapStep'),
        (
            {'tx': TX._replace(update=lambda g, s, p=None: (g, jnp.zeros(2)))},
            r'opt_state.* was not there before',
        ),
        (
            {'model': TWO_LAYERS._replace(apply=lambda *a: jnp.zeros((2, 4)))},
            r'Model.apply returns \(outputs, Updates\), got float32\[2, 4\]',
        ),
        (
            {
                'model': TWO_LAYERS._replace(
                    apply=lambda *a: (a[1]['inputs'], ())
                )
            },
            r'Updates\(model_state, carry\)\), got',
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(parts, message):
  with pytest.raises(ValueError, match=message) as e:
    updated(**parts)
  assert '\n' not in str(e.value).split('\n---')[0]


# -- evaluation ---------------------------------------------------------------


def test_evaluation_sums_over_batches_whatever_their_sizes():
  variables = toy.start(TWO_LAYERS).variables
  eval_step = jax.jit(step_lib.make_eval_step(TWO_LAYERS))
  whole = toy.Clusters(12, weights=True).batch(0)

  def over(*parts):
    sums = [eval_step(variables, part, ())[0] for part in parts]
    return functools.reduce(metrics.merge, sums)

  part = lambda a, b: {k: x[a:b] for k, x in whole.items()}
  padded = {k: np.concatenate([x[8:], x[:4]]) for k, x in whole.items()}
  padded['weights'][4:] = 0.0
  found = over(part(0, 8), padded)
  toy.assert_same(found, over(whole), rtol=1e-6)

  keep = whole['weights'] > 0
  probs, _ = algorithm1.predict(theta(variables), whole['inputs'])
  labels = whole['labels']
  assert found['eval/loss'].count == keep.sum()
  np.testing.assert_allclose(
      found['eval/loss'].value,
      algorithm1.losses(theta(variables), whole)[0],
      rtol=1e-5,
  )
  right = (probs.argmax(axis=1) == labels)[keep]
  np.testing.assert_allclose(found['eval/accuracy'].value, right.mean())


def test_evaluation_is_in_eval_mode_and_carries_its_state():
  (peer,) = toy.peers_of(STATISTICS, 1)
  mean = np.ones(toy.FEATURES, np.float32)
  peer = peer.replace(model_state={**peer.model_state, 'mean': mean})
  sums, _ = step_lib.make_eval_step(STATISTICS)(peer, BATCH, ())
  logits = (BATCH['inputs'] - mean[None]) @ peer.params['kernel']
  expected = jnp.mean(losses.task_loss(logits, BATCH['labels']))
  np.testing.assert_allclose(sums['eval/loss'].value, expected, rtol=1e-5)

  batch = toy.Tokens().batch(0)
  variables = toy.start(RECURRENT).variables
  carry = RECURRENT.init_carry(8)
  _, found = jax.jit(step_lib.make_eval_step(RECURRENT))(
      variables, batch, carry
  )
  _, updates = toy.evaluated(RECURRENT)(variables, batch, carry)
  np.testing.assert_array_equal(found, updates.carry)


def test_evaluation_reports_the_task_loss_alone_even_if_training_smooths():
  variables = toy.start(TWO_LAYERS).variables
  doubled = lambda logits, labels: 2 * losses.task_loss(logits, labels)
  plain, _ = step_lib.make_eval_step(TWO_LAYERS)(variables, BATCH, ())
  other, _ = step_lib.make_eval_step(TWO_LAYERS, task_loss=doubled)(
      variables, BATCH, ()
  )
  np.testing.assert_allclose(
      other['eval/loss'].value, 2 * plain['eval/loss'].value, rtol=1e-6
  )
