"""Smoothed targets and separate peers, against formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from codistill_jax import experiment as experiment_lib
from codistill_jax import losses
from codistill_jax.base import HeadOutputs, Model, Task, Updates, Variables
from codistill_jax.exchange.kinds import Predictions

RNG = np.random.default_rng(0)
B, P = 8, 3
LOGITS_BC = RNG.normal(size=(B, toy.CLASSES)).astype(np.float32)
LABELS_B = RNG.integers(toy.CLASSES, size=B).astype(np.int32)
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


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def smoothed_targets(labels, share, distribution_C):
  one_hot = np.eye(toy.CLASSES)[labels]
  return (1 - share) * one_hot + share * np.asarray(distribution_C)[None]


# -- label smoothing ----------------------------------------------------------


@pytest.mark.parametrize('share', [0.0, 0.1, 0.6])
@pytest.mark.parametrize(
    'name, distribution',
    [('uniform', np.full(toy.CLASSES, 0.25)), ('unigram', UNIGRAM_C)],
)
def test_a_smoothed_loss_is_that_of_the_mixed_target(name, distribution, share):
  if not share:
    name = 'uniform'
  loss = losses.training_loss(task(), share, name)(LOGITS_BC, LABELS_B)
  target_BC = smoothed_targets(LABELS_B, share, distribution)
  expected = -np.sum(target_BC * log_softmax(LOGITS_BC), axis=-1)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize('name, rate', [('uniform', 0.5), ('unigram', 0.2)])
def test_a_smoothed_log_loss_leans_to_a_half_or_to_the_base_rate(name, rate):
  clicks = task(np.array([0.8, 0.2]), num_classes=2, output='sigmoid')
  z, y = LOGITS_BC[:, 0].astype(np.float64), LABELS_B % 2
  loss = losses.training_loss(clicks, 0.3, name)(LOGITS_BC[:, 0], y)
  q, target = 1 / (1 + np.exp(-z)), 0.7 * y + 0.3 * rate
  expected = -(target * np.log(q) + (1 - target) * np.log(1 - q))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


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
  log_q = log_softmax(x @ p['kernel'] + p['bias'][None])
  target = smoothed_targets(batch['labels'], 0.2, UNIGRAM_C)
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


def test_labels_are_counted_only_where_that_is_asked_for():
  def counted():
    raise AssertionError

  for share in (0.0, 0.1):
    counting = task(label_frequencies=counted)
    losses.training_loss(counting, share, 'uniform')


# -- separate losses to each peer ---------------------------------------------

TEACHERS_PBC = 2 * RNG.normal(size=(P, B, toy.CLASSES)).astype(np.float32)


def in_numpy(name, student_logits, target):
  """A loss of the student towards one distribution, from its definition."""
  log_q = log_softmax(student_logits)
  q, p = np.exp(log_q), target
  kl = lambda a, b: np.sum(a * (np.log(a) - np.log(b)), axis=-1)
  return {
      'cross_entropy': lambda: -np.sum(p * log_q, axis=-1),
      'kl': lambda: kl(p, q),
      'reverse_kl': lambda: kl(q, p),
      'jsd': lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
  }[name]()


def value(target, name, teachers, present, student=LOGITS_BC, **kwargs):
  loss = losses.towards(target, losses.distill_loss(name))
  return loss(student, teachers, np.float32(present), **kwargs)


@pytest.mark.parametrize('present', [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize('name', ['cross_entropy', 'kl', 'reverse_kl', 'jsd'])
def test_each_is_the_mean_over_present_peers_of_the_loss_to_one(name, present):
  p_PBC = np.exp(log_softmax(TEACHERS_PBC))
  there = [p for p, here in zip(p_PBC, present) if here]
  each = np.mean([in_numpy(name, LOGITS_BC, p) for p in there], axis=0)
  mean = in_numpy(name, LOGITS_BC, np.mean(there, axis=0))
  found = value('each', name, TEACHERS_PBC, present)
  np.testing.assert_allclose(found, each, rtol=1e-4)
  np.testing.assert_allclose(
      value('mean', name, TEACHERS_PBC, present), mean, rtol=1e-4
  )
  # Linear in the target is cross entropy alone.
  differs = name != 'cross_entropy' and len(there) > 1
  assert np.all((np.abs(each - mean) > 1e-3) == differs)


@pytest.mark.parametrize('name', ['cross_entropy', 'kl', 'squared_logits'])
def test_of_these_each_and_mean_have_one_gradient(name):
  def gradient(target):
    total = lambda x: jnp.sum(value(target, name, TEACHERS_PBC, [1, 0, 1], x))
    return jax.grad(total)(LOGITS_BC)

  np.testing.assert_allclose(gradient('each'), gradient('mean'), atol=1e-6)


@pytest.mark.parametrize('name', ['reverse_kl', 'jsd'])
def test_of_these_they_have_not(name):
  def gradient(target):
    total = lambda x: jnp.sum(value(target, name, TEACHERS_PBC, [1, 0, 1], x))
    return jax.grad(total)(LOGITS_BC)

  assert np.abs(gradient('each') - gradient('mean')).max() > 0.01


@pytest.mark.parametrize('output', ['softmax', 'sigmoid'])
def test_of_one_peer_each_is_mean(output):
  teachers, student = TEACHERS_PBC[:1], LOGITS_BC
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
    return jnp.sum(value('each', name, teachers, present, student))

  loss, grad = jax.value_and_grad(total)(LOGITS_BC, [1, 0, 1])
  two = value('each', name, TEACHERS_PBC[[0, 2]], [1, 1])
  np.testing.assert_allclose(loss, np.sum(two), rtol=1e-5)
  assert np.all(np.isfinite(grad))
  assert total(LOGITS_BC, [0, 0, 0]) == 0.0


def test_peers_and_presence_must_be_as_many():
  with pytest.raises(ValueError, match=r'\(3, 8, 4\) and \(2,\)'):
    value('each', 'kl', TEACHERS_PBC, [1, 1])


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
      in_numpy(
          'jsd', logits(state.variables), np.exp(log_softmax(logits(peer)))
      )
      for peer in (peers[0], peers[2])
  ]
  np.testing.assert_allclose(found['loss/distill'], np.mean(each), rtol=1e-4)
