"""Losses against float64 references, at agreement, and at the extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill_jax import experiment as experiment_lib
from codistill_jax import losses
from codistill_jax.base import HeadOutputs, Model, Task, Updates, Variables
from codistill_jax.exchange.kinds import Predictions

SOFTMAX_LOSSES = [
    name for name in losses.DISTILL_LOSSES if name != 'sigmoid_cross_entropy'
]
ALL_LOSSES = list(losses.DISTILL_LOSSES)
CE = 'cross_entropy'
DIVERGENCES = ['kl', 'reverse_kl', 'jsd', 'squared_logits']


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def reference(name, student, teachers, present, temperature=1.0):
  """The formulas of the docstrings in float64, over present teachers only."""
  student = np.asarray(student, np.float64) / temperature
  teachers = np.asarray(teachers, np.float64) / temperature
  teachers = teachers[np.asarray(present) != 0]
  if name == 'sigmoid_cross_entropy':
    p, q = sigmoid(teachers).mean(0), sigmoid(student)
    return -p * np.log(q) - (1 - p) * np.log(1 - q)
  if name == 'squared_logits':
    d = student - teachers.mean(0)
    return 0.5 * ((d - d.mean(-1, keepdims=True)) ** 2).mean(-1)
  p, q = softmax(teachers).mean(0), softmax(student)
  kl = lambda a, b: (a * np.log(a / b)).sum(-1)
  return {
      'cross_entropy': lambda: -(p * np.log(q)).sum(-1),
      'kl': lambda: kl(p, q),
      'reverse_kl': lambda: kl(q, p),
      'jsd': lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
  }[name]()


def draw(seed, name, peers=3, lead=(2, 3), classes=5, scale=2.0):
  """Student (..., C), teachers (P, ..., C); no C for a sigmoid output."""
  rng = np.random.default_rng(seed)
  tail = () if name == 'sigmoid_cross_entropy' else (classes,)
  student = scale * rng.normal(size=(*lead, *tail))
  teachers = scale * rng.normal(size=(peers, *lead, *tail))
  return student.astype(np.float32), teachers.astype(np.float32)


@functools.cache
def compiled(name, items):
  def total(student, teachers, present):
    loss = losses.DISTILL_LOSSES[name]
    values = loss(student, teachers, present, **dict(items))
    return jnp.sum(values), values

  return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


def value_and_grad(name, student, teachers, present, **kwargs):
  """Loss per example, and the gradient of their sum for student, teachers."""
  grads, values = compiled(name, tuple(kwargs.items()))(
      jnp.asarray(student), jnp.asarray(teachers), jnp.asarray(present)
  )
  return values, *grads


# Task losses.


@settings(deadline=None, max_examples=15)
@given(
    lead=st.sampled_from([(), (3,), (2, 3)]),
    classes=st.sampled_from([1, 4]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    unigram=st.booleans(),
    seed=st.integers(0, 99),
)
def test_task_loss_is_cross_entropy_with_the_smoothed_target(
    lead, classes, smoothing, unigram, seed
):
  rng = np.random.default_rng(seed)
  logits = 3 * rng.normal(size=(*lead, classes))
  labels = rng.integers(classes, size=lead)
  other = rng.dirichlet(np.ones(classes)) if unigram else None
  target = np.full(classes, 1 / classes) if other is None else other
  target = (1 - smoothing) * np.eye(classes)[labels] + smoothing * target
  expected = -(target * np.log(softmax(logits))).sum(-1)
  loss = losses.task_loss(
      logits.astype(np.float32),
      labels,
      label_smoothing=smoothing,
      smoothing_distribution=other,
  )
  assert loss.shape == lead and loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('smoothing,rate', [(0.0, 0.5), (0.2, 0.5), (0.2, 0.1)])
def test_sigmoid_task_loss_is_log_loss_with_the_smoothed_target(
    smoothing, rate
):
  z = np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 4)
  labels = np.arange(12).reshape(3, 4) % 2
  y = (1 - smoothing) * labels + smoothing * rate
  q = sigmoid(z.astype(np.float64))
  expected = -y * np.log(q) - (1 - y) * np.log(1 - q)
  loss = losses.sigmoid_task_loss(
      z, labels, label_smoothing=smoothing, smoothing_probability=rate
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_task_losses_are_exact_and_finite_at_extreme_logits():
  logits = np.array([[1e4, -1e4, 0], [-1e9, 1e9, -1e9]], np.float32)
  labels = np.array([1, 1])
  loss, grad = jax.vjp(lambda x: losses.task_loss(x, labels), logits)
  np.testing.assert_allclose(loss, [2e4, 0])
  np.testing.assert_allclose(
      grad(jnp.ones(2))[0], [[1, -1, 0], [0, 0, 0]], atol=1e-6
  )
  z = np.array([1e4, -1e9, -1e9], np.float32)
  loss, grad = jax.vjp(
      lambda x: losses.sigmoid_task_loss(x, np.array([0, 1, 0])), z
  )
  np.testing.assert_allclose(loss, [1e4, 1e9, 0])
  np.testing.assert_allclose(grad(jnp.ones(3))[0], [1, -1, 0], atol=1e-6)


def test_a_class_at_minus_infinity_is_as_if_it_were_not_there():
  logits = np.array([[0.3, -1.0, 2.0]], np.float32)
  padded = np.concatenate([logits, [[-np.inf]]], -1).astype(np.float32)
  label = np.array([1])
  plain = jax.value_and_grad(lambda x: losses.task_loss(x, label).sum())
  (loss, grad), (loss_pad, grad_pad) = plain(logits), plain(padded)
  np.testing.assert_allclose(loss_pad, loss, rtol=1e-6)
  np.testing.assert_allclose(grad_pad[:, :3], grad, rtol=1e-5)
  assert grad_pad[0, 3] == 0


def test_labels_outside_the_classes_are_loud():
  logits = np.zeros((3, 4), np.float32)
  loss = losses.task_loss(logits, np.array([-1, 4, 3]))
  np.testing.assert_array_equal(np.isnan(loss), [True, True, False])


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: losses.task_loss(np.zeros((2, 3)), np.zeros(3, int)),
         r'\(2, 3\) and \(3,\)'),
        (lambda: losses.task_loss(np.zeros((2, 3)), np.zeros(2)), 'integers'),
        (lambda: losses.task_loss(np.zeros((2, 3)), np.zeros(2, int),
                                  label_smoothing=1.0), r'\[0, 1\)'),
        (lambda: losses.task_loss(np.zeros((2, 3)), np.zeros(2, int),
                                  label_smoothing=0.1,
                                  smoothing_distribution=np.ones(2) / 2),
         r'\(3,\), got \(2,\)'),
        (lambda: losses.task_loss(np.zeros((2, 3)), np.zeros(2, int),
                                  label_smoothing=0.1,
                                  smoothing_distribution=np.ones(3)),
         'sum to 1'),
        (lambda: losses.sigmoid_task_loss(np.zeros(2), np.zeros(3)),
         r'\(2,\) and \(3,\)'),
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((1, 2, 4)), np.ones(1)),
         r'\(1, 2, 4\) and \(2, 3\)'),
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((2, 2, 3)), np.ones(1)),
         r'\(2, 2, 3\) and \(1,\)'),
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((0, 2, 3)), np.ones(0)),
         'P >= 1'),
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((1, 2, 3)), np.ones(1),
                           temperature=0.0), 'temperature'),
        (lambda: losses.distill_loss('kll'), 'cross_entropy, kl, reverse_kl'),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# The soft target.


def test_soft_target_averages_probabilities_of_those_present():
  teachers = np.array([[2.0, 0.0], [-1.0, 3.0], [np.nan, 7.0]], np.float32)
  teachers = teachers[:, None, :]
  present = np.array([1.0, 1.0, 0.0], np.float32)
  expected = softmax(teachers[:2].astype(np.float64)).mean(0)
  of_logits = softmax(teachers[:2].mean(0))
  assert np.abs(expected - of_logits).max() > 0.05  # A case that tells.
  p = losses.soft_target(teachers, present)
  np.testing.assert_allclose(p, expected, rtol=1e-6)
  log_p = losses.log_soft_target(teachers, present)
  np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-6)


def test_soft_target_of_nobody_is_uniform_and_sums_to_one():
  teachers = np.full((2, 3, 4), np.nan, np.float32)
  absent = np.zeros(2, np.float32)
  np.testing.assert_allclose(losses.soft_target(teachers, absent), 0.25)
  log_p = losses.log_soft_target(teachers, absent)
  np.testing.assert_allclose(log_p, np.full((3, 4), np.log(0.25)), rtol=1e-6)


def test_log_soft_target_holds_where_the_probability_underflows():
  teachers = np.array([[[0.0, -500.0]], [[0.0, -400.0]]], np.float32)
  present = np.ones(2, np.float32)
  assert losses.soft_target(teachers, present)[0, 1] == 0
  np.testing.assert_allclose(
      losses.log_soft_target(teachers, present)[0, 1], -400 - np.log(2)
  )


# Distillation losses.


@pytest.mark.parametrize('name', ALL_LOSSES)
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_distill_losses_equal_their_formulas(name, temperature):
  for seed, present in enumerate([[1, 1, 1], [1, 0, 1], [0, 1, 0]]):
    student, teachers = draw(seed, name)
    loss = losses.DISTILL_LOSSES[name](
        student, teachers, np.float32(present), temperature=temperature
    )
    expected = reference(name, student, teachers, present, temperature)
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(ALL_LOSSES),
    lead=st.lists(st.integers(1, 3), max_size=3),
    peers=st.integers(1, 3),
    classes=st.integers(1, 4),
)
def test_distill_losses_take_any_leading_axes(name, lead, peers, classes):
  student, teachers = draw(0, name, peers, tuple(lead), classes)
  loss = jax.eval_shape(
      losses.DISTILL_LOSSES[name],
      jnp.asarray(student, jnp.bfloat16),
      teachers,
      np.ones(peers, np.float32),
  )
  assert loss.shape == tuple(lead) and loss.dtype == jnp.float32


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_gradient_vanishes_at_agreement_and_nowhere_else(name):
  student, _ = draw(0, name, scale=4.0)
  teachers = np.stack([student, student, student])
  present = np.ones(3, np.float32)
  _, grad, _ = value_and_grad(name, student, teachers, present)
  np.testing.assert_allclose(grad, np.zeros_like(grad), atol=1e-6)
  _, grad, _ = value_and_grad(name, student, -teachers, present)
  assert np.abs(grad).max() > 1e-2


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_no_gradient_flows_into_teachers(name):
  student, teachers = draw(0, name)
  _, _, grad = value_and_grad(name, student, teachers, np.ones(3, np.float32))
  np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_gradient_descends_towards_the_teachers(name):
  student, teachers = draw(0, name)
  present = np.ones(3, np.float32)
  loss, grad, _ = value_and_grad(name, student, teachers, present)
  near, _, _ = value_and_grad(name, student - 0.1 * grad, teachers, present)
  assert (near < loss).all()


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_weight_does_not_grow_with_the_number_of_peers(name):
  student, teachers = draw(0, name, peers=1)
  one = value_and_grad(name, student, teachers, np.ones(1, np.float32))
  many = value_and_grad(
      name, student, np.repeat(teachers, 3, axis=0), np.ones(3, np.float32)
  )
  for a, b in zip(one[:2], many[:2]):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_an_absent_peer_is_as_if_it_were_not_there(name):
  student, teachers = draw(0, name, peers=2)
  junk = np.full_like(teachers[:1], np.nan)
  few = value_and_grad(name, student, teachers, np.ones(2, np.float32))
  more = value_and_grad(
      name,
      student,
      np.concatenate([teachers[:1], junk, teachers[1:]]),
      np.array([1, 0, 1], np.float32),
  )
  for a, b in zip(few[:2], more[:2]):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_nobody_present_costs_nothing_and_pulls_nowhere(name):
  student, teachers = draw(0, name)
  student[0, 0] = 1e4
  teachers[:] = np.nan
  loss, grad, _ = value_and_grad(name, student, teachers, np.zeros(3))
  np.testing.assert_array_equal(loss, np.zeros_like(loss))
  np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize('name', ALL_LOSSES)
@pytest.mark.parametrize('size', [1e2, 1e4, 1e9])
def test_no_nan_at_extreme_logits(name, size):
  rng = np.random.default_rng(0)
  student, teachers = draw(0, name, lead=(50,))
  student = size * rng.choice([-1.0, 0.0, 1.0], student.shape)
  teachers = size * rng.choice([-1.0, 0.0, 1.0], teachers.shape)
  present = np.array([1, 0, 1], np.float32)
  loss, grad, _ = value_and_grad(
      name, student.astype(np.float32), teachers.astype(np.float32), present
  )
  assert np.isfinite(loss).all() and np.isfinite(grad).all()
  if name == 'jsd':
    assert (loss < np.log(2) + 1e-5).all() and (loss > -1e-5).all()


@pytest.mark.parametrize('name', SOFTMAX_LOSSES)
def test_padded_classes_of_minus_infinity_change_nothing(name):
  student, teachers = draw(0, name)
  pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)])
  student_pad, teachers_pad = pad(student), pad(teachers)
  student_pad[..., 5:] = teachers_pad[..., 5:] = -np.inf
  present = np.ones(3, np.float32)
  loss, grad, _ = value_and_grad(name, student, teachers, present)
  got, got_grad, _ = value_and_grad(name, student_pad, teachers_pad, present)
  assert np.isfinite(got).all() and np.isfinite(got_grad).all()
  if name != 'squared_logits':  # Which counts them, as agreement.
    np.testing.assert_allclose(got, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad[..., :5], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
@pytest.mark.parametrize('peers', [1, 3])
def test_divergence_of_equal_bfloat16_models_is_zero(name, peers):
  student, _ = draw(0, name, lead=(8,), classes=1000, scale=5.0)
  student = jnp.asarray(student, jnp.bfloat16)
  teachers = jnp.stack([student] * peers)
  loss = losses.DISTILL_LOSSES[name](student, teachers, np.ones(peers))
  np.testing.assert_allclose(loss, np.zeros(8), atol=2e-6)


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_bfloat16_logits_are_worked_on_in_float32(name):
  low = [jnp.asarray(x, jnp.bfloat16) for x in draw(0, name)]
  high = [x.astype(jnp.float32) for x in low]
  present = np.ones(3, np.float32)
  # Not under jit, where XLA may leave out a rounding to bfloat16.
  loss = losses.DISTILL_LOSSES[name]
  a = loss(*low, present, temperature=3.0)
  b = loss(*high, present, temperature=3.0)
  np.testing.assert_allclose(a, b, rtol=1e-6)


def test_cross_entropy_and_kl_have_the_same_gradient():
  student, teachers = draw(0, 'kl')
  present = np.ones(3, np.float32)
  _, a, _ = value_and_grad('cross_entropy', student, teachers, present)
  _, b, _ = value_and_grad('kl', student, teachers, present)
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_temperature_squared_is_a_factor_that_is_off_by_default(name):
  student, teachers = draw(0, name)
  loss = lambda **kwargs: losses.DISTILL_LOSSES[name](
      student, teachers, np.ones(3, np.float32), temperature=2.0, **kwargs
  )
  np.testing.assert_allclose(
      loss(scale_by_temperature_squared=True), 4 * loss(), rtol=1e-6
  )


def test_scaled_kl_tends_to_squared_logits_as_temperature_grows():
  student, teachers = draw(0, 'kl', peers=1)
  present = np.ones(1, np.float32)
  hot = losses.kl(
      student,
      teachers,
      present,
      temperature=100.0,
      scale_by_temperature_squared=True,
  )
  limit = losses.squared_logits(student, teachers, present)
  np.testing.assert_allclose(hot, limit, rtol=0.1)


def test_squared_logits_ignore_a_shift_of_all_logits():
  student, teachers = draw(0, 'squared_logits')
  present = np.ones(3, np.float32)
  np.testing.assert_allclose(
      losses.squared_logits(student + 7, teachers, present),
      losses.squared_logits(student, teachers, present),
      rtol=1e-4,
      atol=1e-5,
  )


def test_presence_and_temperature_may_be_traced():
  student, teachers = draw(0, 'kl')
  calls = []

  @jax.jit
  def loss(present, temperature):
    calls.append(1)
    return losses.kl(student, teachers, present, temperature=temperature)

  for present in ([1, 1, 1], [0, 1, 1], [0, 0, 0]):
    loss(jnp.asarray(present, jnp.float32), jnp.float32(2.0))
  assert len(calls) == 1


@pytest.mark.parametrize('name', ALL_LOSSES)
def test_a_sigmoid_output_is_distilled_as_the_two_classes_it_stands_for(name):
  rng = np.random.default_rng(3)
  student, teachers = rng.normal(size=(6,)), rng.normal(size=(3, 6))
  present = np.array([1, 0, 1], np.float32)
  two = lambda z: np.stack([np.zeros_like(z), z], axis=-1)
  classes = 'cross_entropy' if name == 'sigmoid_cross_entropy' else name
  expected = losses.distill_loss(classes)(two(student), two(teachers), present)
  found = losses.distill_loss(name, 'sigmoid')(student, teachers, present)
  assert found.shape == student.shape
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_task_loss_follows_the_kind_of_output():
  assert losses.task_loss_of('softmax') is losses.task_loss
  assert losses.task_loss_of('sigmoid') is losses.sigmoid_task_loss
  with pytest.raises(ValueError, match="'probit' is no kind of output"):
    losses.task_loss_of('probit')


def test_a_loss_of_one_logistic_output_is_refused_for_classes():
  with pytest.raises(ValueError, match='for a softmax output; choose one'):
    losses.distill_loss('sigmoid_cross_entropy')


# --- The losses of an experiment: smoothing, separate peers -------------------

B, P = 8, 3
UNIGRAM_C = np.array([0.5, 0.25, 0.25, 0.0])


def task(frequencies=UNIGRAM_C, **changes):
  return Task(
      train_stream=lambda **kwargs: toy.Clusters(kwargs['group_batch']),
      eval_batches=lambda rows: [toy.Clusters(rows).batch(0)],
      num_classes=toy.CLASSES,
      identity={'task': 'toy'},
      example_name='point',
      label_frequencies=None if frequencies is None else lambda: frequencies,
  )._replace(**changes)


@pytest.mark.parametrize('share', [0.0, 0.1, 0.6])
@pytest.mark.parametrize(
    'name, distribution',
    [('uniform', np.full(toy.CLASSES, 0.25)), ('unigram', UNIGRAM_C)],
)
def test_the_loss_of_a_task_is_smoothed_towards(name, distribution, share):
  student, _ = draw(0, CE, lead=(B,), classes=toy.CLASSES)
  labels = np.arange(B) % toy.CLASSES
  loss = losses.training_loss(task(), share, name if share else 'uniform')
  expected = losses.task_loss(
      student,
      labels,
      label_smoothing=share,
      smoothing_distribution=distribution,
  )
  np.testing.assert_allclose(loss(student, labels), expected, rtol=1e-5)


@pytest.mark.parametrize('name, rate', [('uniform', 0.5), ('unigram', 0.2)])
def test_the_log_loss_of_a_task_leans_to_a_half_or_to_the_base_rate(name, rate):
  clicks = task(np.array([0.8, 0.2]), num_classes=2, output='sigmoid')
  z, labels = np.linspace(-4, 4, B, dtype=np.float32), np.arange(B) % 2
  loss = losses.training_loss(clicks, 0.3, name)(z, labels)
  expected = losses.sigmoid_task_loss(
      z, labels, label_smoothing=0.3, smoothing_probability=rate
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_labels_are_counted_only_where_that_is_asked_for():
  def counted():
    raise AssertionError

  for share in (0.0, 0.1):
    counting = task(label_frequencies=counted)
    losses.training_loss(counting, share, 'uniform')


@pytest.mark.parametrize(
    'frequencies, message',
    [
        (np.full(3, 1 / 3), r'gives the shape \(3,\), expected \(4,\)'),
        (np.full(4, 0.3), 'sum to 1, got a sum of 1.2 '),
        (np.array([1.5, -0.5, 0, 0]), 'minimum of -0.5'),
        (np.full(4, np.nan), 'sum of nan'),
    ],
)
def test_frequencies_that_are_no_distribution_are_refused(frequencies, message):
  with pytest.raises(ValueError, match=message):
    losses.training_loss(task(frequencies), 0.1, 'unigram')


def make(**kwargs):
  return experiment_lib.Experiment(
      **{
          'task': task(),
          'model': lambda num_classes: HEAD,
          'optimizer': toy.SGD,
          'group_batch': B,
          **kwargs,
      }
  )


def head_model():
  """A linear classifier that leaves it to the loss to make the logits."""

  def init(rng, batch):
    del batch
    kernel = jax.random.normal(rng, (toy.FEATURES, toy.CLASSES))
    return Variables({'kernel': kernel, 'bias': jnp.zeros(toy.CLASSES)})

  def apply(variables, batch, carry, rng, train):
    del rng, train
    p = variables.params
    outputs = HeadOutputs(batch['inputs'], p['kernel'], p['bias'])
    return outputs, Updates({}, carry)

  return Model(init, apply)


HEAD = head_model()


@pytest.mark.parametrize('fused', [True, False])
def test_a_run_with_unigram_smoothing_updates_towards_the_mixed_target(fused):
  """A whole step, gradient by hand; evaluation stays the plain loss."""
  experiment = make(
      label_smoothing=0.2, smoothing_distribution='unigram', fused_loss=fused
  )
  step = experiment_lib.make_replicated_step(
      experiment, HEAD, jax.devices()[:1]
  )
  state = toy.start(HEAD, num_peers=0)
  batch = toy.Clusters(B, weights=True).batch(0)
  after, found = step(step.place(state), batch, None, 0.0)

  x, w = batch['inputs'].astype(np.float64), batch['weights']
  p = {k: np.float64(v) for k, v in state.variables.params.items()}
  log_q = np.log(softmax(x @ p['kernel'] + p['bias'][None]))
  target = 0.8 * np.eye(toy.CLASSES)[batch['labels']] + 0.2 * UNIGRAM_C[None]
  share = (w / w.sum())[:, None]
  np.testing.assert_allclose(
      found['loss/task'], -np.sum(share * target * log_q), rtol=1e-5
  )
  dz = share * (np.exp(log_q) - target)
  grads = {'kernel': x.T @ dz, 'bias': dz.sum(axis=0)}
  for name, grad in grads.items():  # The rate of `toy.SGD` is 1.
    change = np.asarray(after.variables.params[name]) - p[name]
    np.testing.assert_allclose(change, -grad, rtol=1e-4, atol=1e-6)

  sums, _ = experiment_lib.make_eval_step(experiment, HEAD)(
      state.variables, batch, ()
  )
  plain = -np.sum(share[:, 0] * log_q[np.arange(B), batch['labels']])
  np.testing.assert_allclose(sums['eval/loss'].value, plain, rtol=1e-5)
  assert abs(plain - found['loss/task']) > 0.01


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'label_smoothing': 1.0}, r'label_smoothing=1.0; .*in \[0, 1\)$'),
        ({'label_smoothing': '0.1'}, "label_smoothing='0.1'; "),
        (
            {'label_smoothing': 0.1, 'smoothing_distribution': 'bigram'},
            "smoothing_distribution='bigram' is not one of uniform, unigram",
        ),
        (
            {'smoothing_distribution': 'unigram'},
            'acts nowhere without label_smoothing',
        ),
        (
            {
                'task': task(None),
                'label_smoothing': 0.1,
                'smoothing_distribution': 'unigram',
            },
            'the task does not count its labels; .*Task.label_frequencies',
        ),
        ({'distill_target': 'all'}, "distill_target='all' is not one of mean"),
        (
            {'distill_target': 'each', 'exchange': Predictions()},
            "distill_target='each' with Experiment.exchange=@exchange.Predict",
        ),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message) as e:
    make(**wrong)
  assert '\n' not in str(e.value)


STUDENT_BC, TEACHERS_PBC = draw(7, CE, lead=(B,), classes=toy.CLASSES)


def towards(target, name, teachers, present, student=STUDENT_BC):
  loss = losses.towards(target, losses.distill_loss(name))
  return loss(student, teachers, np.float32(present))


@pytest.mark.parametrize('present', [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize('name', ['cross_entropy', 'kl', 'reverse_kl', 'jsd'])
def test_each_is_the_mean_over_present_peers_of_the_loss_to_one(name, present):
  there = [t[None] for t, here in zip(TEACHERS_PBC, present) if here]
  each = np.mean([reference(name, STUDENT_BC, t, [1]) for t in there], axis=0)
  mean = reference(name, STUDENT_BC, TEACHERS_PBC, present)
  for target, expected in (('each', each), ('mean', mean)):
    found = towards(target, name, TEACHERS_PBC, present)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
  # Linear in the target is cross entropy alone.
  differs = name != 'cross_entropy' and len(there) > 1
  assert np.all((np.abs(each - mean) > 1e-3) == differs)


@pytest.mark.parametrize('name', SOFTMAX_LOSSES)
def test_whether_each_and_mean_have_one_gradient(name):
  def gradient(target):
    total = lambda x: jnp.sum(towards(target, name, TEACHERS_PBC, [1, 0, 1], x))
    return jax.grad(total)(STUDENT_BC)

  apart = np.abs(gradient('each') - gradient('mean')).max()
  assert apart > 0.01 if name in ('reverse_kl', 'jsd') else apart < 1e-6


@pytest.mark.parametrize('output', ['softmax', 'sigmoid'])
def test_of_one_peer_each_is_mean(output):
  teachers, student = TEACHERS_PBC[:1], STUDENT_BC
  if output == 'sigmoid':
    teachers, student = teachers[..., 0], student[:, 0]
  for name in ('cross_entropy', 'kl', 'reverse_kl', 'jsd', 'squared_logits'):
    loss = losses.distill_loss(name, output)
    args = student, teachers, np.ones(1, np.float32)
    kwargs = {'temperature': 2.0, 'scale_by_temperature_squared': True}
    toy.assert_same(
        losses.towards('each', loss)(*args, **kwargs),
        loss(*args, **kwargs),
        rtol=1e-6,
    )


@pytest.mark.parametrize('name', ['cross_entropy', 'jsd', 'squared_logits'])
def test_an_absent_peer_may_say_anything_and_nobody_is_no_loss(name):
  teachers = TEACHERS_PBC.copy()
  teachers[1] = np.nan

  def total(student, present):
    return jnp.sum(towards('each', name, teachers, present, student))

  loss, grad = jax.value_and_grad(total)(STUDENT_BC, [1, 0, 1])
  two = towards('each', name, TEACHERS_PBC[[0, 2]], [1, 1])
  np.testing.assert_allclose(loss, np.sum(two), rtol=1e-5)
  assert np.all(np.isfinite(grad))
  assert total(STUDENT_BC, [0, 0, 0]) == 0.0


def test_peers_and_presence_must_be_as_many():
  with pytest.raises(ValueError, match=r'\(3, 8, 4\) and \(2,\)'):
    towards('each', 'kl', TEACHERS_PBC, [1, 1])


@pytest.mark.parametrize('fused', [True, False])
def test_a_run_with_separate_losses_learns_from_each(fused):
  experiment = make(distill_target='each', distill_loss='jsd', fused_loss=fused)
  step = experiment_lib.make_replicated_step(
      experiment, HEAD, jax.devices()[:1]
  )
  state, peers = toy.start(HEAD), toy.peers_of(HEAD, P)
  batch = toy.Clusters(B).batch(0)
  teachers = step.place_teachers(toy.stacked(peers, [1, 0, 1]))
  _, found = step(step.place(state), batch, teachers, 1.0)

  def logits(variables):
    p = variables.params
    return batch['inputs'] @ p['kernel'] + p['bias'][None]

  each = [
      reference('jsd', logits(state.variables), logits(peer)[None], [1])
      for peer in (peers[0], peers[2])
  ]
  np.testing.assert_allclose(found['loss/distill'], np.mean(each), rtol=1e-4)
