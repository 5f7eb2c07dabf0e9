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

ALL_LOSSES = list(losses.DISTILL_LOSSES)
SOFTMAX_LOSSES = [n for n in ALL_LOSSES if n != 'sigmoid_cross_entropy']
CE = 'cross_entropy'
of_all_losses = pytest.mark.parametrize('name', ALL_LOSSES)


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
  drawn = scale * rng.normal(size=(1 + peers, *lead, *tail))
  return drawn[0].astype(np.float32), drawn[1:].astype(np.float32)


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
  labels = np.array([1, 1])
  logits = np.array([[1e4, -1e4, 0], [-1e9, 1e9, -1e9]], np.float32)
  loss, grad = jax.vjp(lambda x: losses.task_loss(x, labels), logits)
  np.testing.assert_allclose(loss, [2e4, 0])
  np.testing.assert_allclose(
      grad(jnp.ones(2))[0], [[1, -1, 0], [0, 0, 0]], atol=1e-6
  )
  z, labels = np.array([1e4, -1e9, -1e9], np.float32), np.array([0, 1, 0])
  loss, grad = jax.vjp(lambda x: losses.sigmoid_task_loss(x, labels), z)
  np.testing.assert_allclose(loss, [1e4, 1e9, 0])
  np.testing.assert_allclose(grad(jnp.ones(3))[0], [1, -1, 0], atol=1e-6)


@pytest.mark.parametrize('smoothing', ['none', 'uniform', 'unigram'])
def test_a_class_at_minus_infinity_is_as_if_it_were_not_there(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4)).astype(np.float32)
  padded = np.insert(logits, [2, 4, 4], -np.inf, axis=-1)
  there = np.isfinite(padded[0])
  labels = rng.integers(4, size=6)
  kwargs = {'label_smoothing': 0.0 if smoothing == 'none' else 0.3}
  unigram = rng.dirichlet(np.ones(7))

  def run(logits, labels, unigram):
    if smoothing == 'unigram':
      kwargs['smoothing_distribution'] = unigram
    total = lambda x: losses.task_loss(x, labels, **kwargs).sum()
    return jax.value_and_grad(total)(logits)

  loss, grad = run(logits, labels, unigram[there] / unigram[there].sum())
  found, found_grad = run(padded, np.flatnonzero(there)[labels], unigram)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  np.testing.assert_allclose(found_grad[:, there], grad, rtol=1e-4, atol=1e-6)
  assert not np.any(found_grad[:, ~there])


INTEGERS = [np.dtype(f'{sign}{size}') for sign in 'iu' for size in (1, 2, 4, 8)]


@pytest.mark.parametrize('dtype', INTEGERS, ids=str)
@pytest.mark.parametrize('classes', [2, 127, 128, 200, 256, 384, 70_000])
def test_labels_of_any_integer_type_are_those_of_int32(dtype, classes):
  logits = np.random.default_rng(0).normal(size=(4, classes))
  highest = min(classes, np.iinfo(dtype).max + 1)
  labels = np.array([0, 1, highest // 2, highest - 1])
  expected = losses.task_loss(logits, labels.astype(np.int32))
  found = losses.task_loss(logits, labels.astype(dtype))
  np.testing.assert_array_equal(found, expected)
  q = softmax(np.float32(logits))[np.arange(4), labels]
  np.testing.assert_allclose(found, -np.log(q), rtol=1e-4)


def test_labels_outside_the_classes_are_loud():
  logits = np.zeros((5, 4), np.float32)
  logits[3, 0] = -np.inf  # A padded class is none.
  loss = losses.task_loss(logits, np.array([-1, 4, 3, 0, -100]))
  np.testing.assert_array_equal(np.isnan(loss), [1, 1, 0, 1, 1])
  loss = losses.sigmoid_task_loss(np.zeros(5), np.array([-1, 2, 1, 0, 0.3]))
  np.testing.assert_array_equal(np.isnan(loss), [1, 1, 0, 0, 0])


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
         r'has the shape \(2,\), expected \(3,\)'),
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
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((1, 2, 3)), np.ones(1),
                           temperature=np.float32(-1)), 'temperature'),
        (lambda: losses.kl(np.zeros((2, 3)), np.zeros((1, 2, 3)), np.ones(1),
                           temperature=np.inf), 'temperature'),
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


def test_soft_target_of_nobody_is_uniform():
  teachers = np.full((2, 3, 4), np.nan, np.float32)
  np.testing.assert_allclose(losses.soft_target(teachers, np.zeros(2)), 0.25)


def test_a_probability_of_a_teacher_that_underflows_is_not_lost():
  teachers = np.array([[[0.0, -500.0]], [[0.0, -400.0]]], np.float32)
  found = losses.reverse_kl(np.zeros((1, 2)), teachers, np.ones(2))
  np.testing.assert_allclose(found, (400 + np.log(2)) / 2 - np.log(2))


# Distillation losses.


@of_all_losses
@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('present', [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_distill_losses_and_their_gradients_equal_the_formulas(
    name, temperature, present
):
  """An absent peer may say anything; nobody's number makes the loss larger."""
  student, teachers = draw(sum(present), name)
  teachers[np.array(present) == 0] = np.nan
  values, grad, to_teachers = value_and_grad(
      name, student, teachers, np.float32(present), temperature=temperature
  )
  formula = lambda x: reference(name, x, teachers, present, temperature)
  np.testing.assert_allclose(values, formula(student), rtol=2e-5, atol=1e-6)
  towards = np.random.default_rng(0).normal(size=student.shape)
  ahead, behind = (formula(student + h * towards) for h in (1e-5, -1e-5))
  slope = np.sum(ahead - behind) / 2e-5
  np.testing.assert_allclose(np.sum(grad * towards), slope, rtol=1e-3)
  np.testing.assert_array_equal(to_teachers, np.zeros_like(teachers))


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


@of_all_losses
def test_gradient_vanishes_at_agreement_and_nowhere_else(name):
  student, _ = draw(0, name, scale=4.0)
  teachers = np.stack([student, student, student])
  present = np.ones(3, np.float32)
  _, grad, _ = value_and_grad(name, student, teachers, present)
  np.testing.assert_allclose(grad, np.zeros_like(grad), atol=1e-6)
  _, grad, _ = value_and_grad(name, student, -teachers, present)
  assert np.abs(grad).max() > 1e-2


@of_all_losses
def test_nobody_present_costs_nothing_and_pulls_nowhere(name):
  student, teachers = draw(0, name)
  student[0, 0] = 1e4
  teachers[:] = np.nan
  loss, grad, _ = value_and_grad(name, student, teachers, np.zeros(3))
  np.testing.assert_array_equal(loss, np.zeros_like(loss))
  np.testing.assert_array_equal(grad, np.zeros_like(grad))


@of_all_losses
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
@pytest.mark.parametrize('whose', ['all', 'student', 'teachers', 'one teacher'])
def test_padded_classes_of_minus_infinity_count_nowhere(name, whose):
  student, teachers = draw(0, name)
  expected = value_and_grad(name, student, teachers, np.ones(3, np.float32))
  pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)])
  student, teachers = pad(student), pad(teachers)
  lacking = teachers[1:2] if whose == 'one teacher' else teachers
  if whose != 'student':
    lacking[..., 5:] = -np.inf
  if whose in ('all', 'student'):
    student[..., 5:] = -np.inf
  found = value_and_grad(name, student, teachers, np.ones(3, np.float32))
  assert all(np.max(np.abs(x)) < 100 for x in found)
  # Elsewhere the student learns not to say what no teacher says.
  if whose in ('all', 'student') or (
      whose == 'teachers' and name in ('reverse_kl', 'squared_logits')
  ):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    grad, rest = np.split(found[1], [5], axis=-1)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-6)
    assert not np.any(rest)


@pytest.mark.parametrize('name', ['kl', 'reverse_kl', 'jsd', 'squared_logits'])
@pytest.mark.parametrize('peers', [1, 3])
def test_divergence_of_equal_bfloat16_models_is_zero(name, peers):
  student, _ = draw(0, name, lead=(8,), classes=1000, scale=5.0)
  student = jnp.asarray(student, jnp.bfloat16)
  teachers = jnp.stack([student] * peers)
  loss = losses.DISTILL_LOSSES[name](student, teachers, np.ones(peers))
  np.testing.assert_allclose(loss, np.zeros(8), atol=2e-6)


@of_all_losses
def test_bfloat16_logits_are_worked_on_in_float32(name):
  low = [jnp.asarray(x, jnp.bfloat16) for x in draw(0, name)]
  high = [x.astype(jnp.float32) for x in low]
  present = np.ones(3, np.float32)
  # Not under jit, where XLA may leave out a rounding to bfloat16.
  loss = losses.DISTILL_LOSSES[name]
  a = loss(*low, present, temperature=3.0)
  b = loss(*high, present, temperature=3.0)
  np.testing.assert_allclose(a, b, rtol=1e-6)


@of_all_losses
def test_temperature_squared_is_a_factor_that_is_off_by_default(name):
  student, teachers = draw(0, name)
  loss = lambda **kwargs: losses.DISTILL_LOSSES[name](
      student, teachers, np.ones(3, np.float32), temperature=2.0, **kwargs
  )
  np.testing.assert_allclose(
      loss(scale_by_temperature_squared=True), 4 * loss(), rtol=1e-6
  )


def test_what_a_sure_teacher_leaves_to_the_other_class_is_not_lost():
  """1 - sigmoid(40) is 0 in float32, sigmoid(-40) is not."""
  for sign in (1.0, -1.0):
    student, teachers = np.full(1, sign * 1e9), np.full((1, 1), sign * 40.0)
    found = losses.sigmoid_cross_entropy(student, teachers, np.ones(1))
    np.testing.assert_allclose(found, 1e9 * np.exp(-40.0), rtol=1e-5)


@of_all_losses
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
@pytest.mark.parametrize('name', ['uniform', 'unigram'])
def test_the_loss_of_a_task_is_smoothed_towards(name, share):
  student, _ = draw(0, CE, lead=(B,), classes=toy.CLASSES)
  labels = np.arange(B) % toy.CLASSES
  uniform = np.full(toy.CLASSES, 0.25)
  expected = losses.task_loss(
      student,
      labels,
      label_smoothing=share,
      smoothing_distribution=uniform if name == 'uniform' else UNIGRAM_C,
  )
  loss = losses.training_loss(task(), share, name if share else 'uniform')
  np.testing.assert_allclose(loss(student, labels), expected, rtol=1e-5)
  # Of one logistic output: a half, or the base rate.
  clicks = task(np.array([0.8, 0.2]), num_classes=2, output='sigmoid')
  loss = losses.training_loss(clicks, share, name if share else 'uniform')
  expected = losses.sigmoid_task_loss(
      student[:, 0],
      labels % 2,
      label_smoothing=share,
      smoothing_probability=0.5 if name == 'uniform' else 0.2,
  )
  np.testing.assert_allclose(loss(student[:, 0], labels % 2), expected, 1e-5)


def test_labels_are_counted_only_where_that_is_asked_for():
  def counted():
    raise AssertionError

  for share in (0.0, 0.1):
    counting = task(label_frequencies=counted)
    losses.training_loss(counting, share, 'uniform')


@pytest.mark.parametrize(
    'frequencies, message',
    [
        (np.full(3, 1 / 3), r'has the shape \(3,\), expected \(4,\)'),
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


def first_update(teachers=None, **kwargs):
  """Metrics of an update of a run so configured, and what it started with."""
  experiment = make(**kwargs)
  step = experiment_lib.make_replicated_step(
      experiment, HEAD, jax.devices()[:1]
  )
  state = toy.start(HEAD, num_peers=P if teachers else 0)
  batch = toy.Clusters(B, weights=True).batch(0)
  placed = teachers and step.place_teachers(teachers)
  _, found = step(step.place(state), batch, placed, 1.0)
  return experiment, state.variables, batch, found


def logits_of(variables, batch):
  p = variables.params
  return batch['inputs'].astype(np.float64) @ p['kernel'] + p['bias'][None]


@pytest.mark.parametrize('fused', [True, False])
def test_a_run_trains_with_the_smoothed_loss_and_is_judged_by_the_plain(fused):
  experiment, variables, batch, found = first_update(
      label_smoothing=0.2, smoothing_distribution='unigram', fused_loss=fused
  )
  log_q = np.log(softmax(logits_of(variables, batch)))
  labels_BC = np.eye(toy.CLASSES)[batch['labels']]
  share = (batch['weights'] / batch['weights'].sum())[:, None]
  target = 0.8 * labels_BC + 0.2 * UNIGRAM_C[None]
  expected = -np.sum(share * target * log_q)
  np.testing.assert_allclose(found['loss/task'], expected, rtol=1e-5)
  evaluate = experiment_lib.make_eval_step(experiment, HEAD)
  sums, _ = evaluate(variables, batch, ())
  plain = -np.sum(share * labels_BC * log_q)
  np.testing.assert_allclose(sums['eval/loss'].value, plain, rtol=1e-5)


@pytest.mark.parametrize('fused', [True, False])
def test_a_run_with_separate_losses_learns_from_each(fused):
  peers = toy.peers_of(HEAD, P)
  _, variables, batch, found = first_update(
      toy.stacked(peers, [1, 0, 1]),
      distill_target='each',
      distill_loss='jsd',
      fused_loss=fused,
  )
  student, *others = [logits_of(v, batch) for v in (variables, *peers)]
  each = [reference('jsd', student, others[p][None], [1]) for p in (0, 2)]
  expected = np.average(np.mean(each, axis=0), weights=batch['weights'])
  np.testing.assert_allclose(found['loss/distill'], expected, rtol=1e-4)


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
@pytest.mark.parametrize('name', SOFTMAX_LOSSES)
def test_each_is_the_mean_over_present_peers_of_the_loss_to_one(name, present):
  there = [t[None] for t, here in zip(TEACHERS_PBC, present) if here]
  teachers = TEACHERS_PBC.copy()
  teachers[np.array(present) == 0] = np.nan
  each = np.mean([reference(name, STUDENT_BC, t, [1]) for t in there], axis=0)
  mean = reference(name, STUDENT_BC, TEACHERS_PBC, present)
  for target, expected in (('each', each), ('mean', mean)):
    total = lambda x, to=target: jnp.sum(
        towards(to, name, teachers, present, x)
    )
    found, grad = jax.value_and_grad(total)(STUDENT_BC)
    np.testing.assert_allclose(found, np.sum(expected), rtol=1e-4)
    assert np.all(np.isfinite(grad))
  # Linear in the target is cross entropy alone.
  differs = name != 'cross_entropy' and len(there) > 1
  assert np.all((np.abs(each - mean) > 1e-3) == differs)
  assert not np.any(towards('each', name, teachers, [0, 0, 0]))


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


def test_peers_and_presence_must_be_as_many():
  with pytest.raises(ValueError, match=r'\(3, 8, 4\) and \(2,\)'):
    towards('each', 'kl', TEACHERS_PBC, [1, 1])
